"""Files made to do harm: none ends the process, runs anything, or takes more memory than it has bytes for.

What ended the process once is read in a process of its own, so that it fails its test and not all of them.
"""

import contextlib
import errno
import gzip
import io
import json
import multiprocessing
import os
import pickle
import shutil
import struct
import tempfile
import tracemalloc
import warnings
import zipfile
import zlib

import numpy as np
import pydicom
import pytest
import torch
from PIL import EpsImagePlugin, Image

from medssl.benchmarks import readers
from medssl.datasets import cache as caches
from medssl.datasets import chest, chexpert, luna, pathology
from medssl.datasets.base import Request
from medssl.engine.runs import refuse_changes
from medssl.errors import (
    DISK,
    HANDED_OVER,
    LACKS,
    TOO_LARGE,
    InputError,
    UnreadableImage,
    explain,
    unreadable,
    unusable,
)  # fmt: skip
from medssl.files import read_json, read_lines
from medssl.preprocess.luna import read_candidates
from medssl.preprocess.tiles import read_slide
from medssl.reading import arrays, dicom, elements
from medssl.reading.arrays import names_in, read_npy, read_npz
from medssl.reading.dicom import is_series
from medssl.reading.elements import check_elements
from medssl.reading.masks import read_mask, run_lengths
from medssl.reading.pickles import read_pickle
from medssl.reading.pictures import describe, read_image
from medssl.reading.simpleitk import reason_of
from medssl.reading.tables import read_patients
from medssl.reading.volumes import read_header, read_volume
from medssl.study.jobs import INTERRUPTION, Job
from medssl.study.report import picture
from medssl.study.results import Cell

sitk = pytest.importorskip("SimpleITK")


def outcome(read, path):
    """How reading a file in a process of its own ends: "read", the line that refuses it, or what went wrong."""

    def child(pipe):
        try:
            read(path)
            pipe.send("read")
        except (InputError, UnreadableImage) as error:
            pipe.send(f"refused: {error}")
        except BaseException as error:
            pipe.send(f"{type(error).__name__}: {error}")

    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(theirs,))
    process.start()
    theirs.close()
    process.join(20)
    if process.is_alive():
        process.kill()
        process.join()
        return "hangs"
    with contextlib.suppress(EOFError):
        return mine.recv()
    return f"ended by {-process.exitcode}"


def refused(read, path, reason, here=False):
    """Assert that a file is refused in one line that has the reason; `here` in this process, which is quicker."""
    if here:
        with pytest.raises((InputError, UnreadableImage)) as caught:
            read(path)
    said = f"refused: {caught.value}" if here else outcome(read, path)
    assert said.startswith("refused: "), said
    assert reason in said, said
    assert "\n" not in said


# Pickles -------------------------------------------------------------------------------------------

GLOBALS = {
    "dtype": b"cnumpy\ndtype\n", "ndarray": b"cnumpy\nndarray\n", "scalar": b"cnumpy.core.multiarray\nscalar\n",
    "rebuild": b"cnumpy.core.multiarray\n_reconstruct\n", "buffer": b"cnumpy.core.numeric\n_frombuffer\n",
    "ordered": b"ccollections\nOrderedDict\n", "encode": b"c_codecs\nencode\n", "haiku": b"chaiku\nFlatMapping\n",
}  # fmt: skip
JUNK = b"AAAAAAAA" * 4  # as pointers to objects


def plain(value):
    """The opcodes of a plain value, without those of a whole pickle."""
    return pickle.dumps(value, protocol=2)[2:-1].replace(b"q\x00", b"")


def call(name, *parts):
    return GLOBALS[name] + b"(" + b"".join(parts) + b"tR"


def dtype_of(kind, state=None):
    made = call("dtype", plain(kind), plain(False), plain(True))
    return made if state is None else made + plain(state) + b"b"


def array_of(dtype, raw=JUNK, shape=(4,), fortran=False):
    """An array that is rebuilt empty, and given its state."""
    empty = call("rebuild", GLOBALS["ndarray"], plain((0,)), plain(b"b"))
    return empty + b"(" + plain(1) + plain(shape) + dtype + plain(fortran) + plain(raw) + b"tb"


PLAIN_STATE = (3, "<", None, None, None, -1, -1, 0)
OBJECT_STATE = (3, "|", None, None, None, -1, -1, 63)
PLAINED_STATE = (3, "|", None, None, None, -1, -1, 0)  # of objects that say that they are none
FIELD = {"a": (np.dtype("O"), 0)}
FIELD_STATE = (3, "|", None, ("a",), FIELD, 8, 1, 0)


def touched(form):
    """A form whose values are looked at while the file is read: a mapping is made of them."""
    return call("ordered", form)


NESTED = b"N" + b"\x85" * 300_000  # a tuple in a tuple in …
CRASHES = {
    "objects as plain": touched(array_of(dtype_of("O8", PLAINED_STATE))),
    "scalar object as plain": call("scalar", dtype_of("O8", PLAINED_STATE), plain(JUNK[:8])),
    "buffer of objects as plain": touched(
        call("buffer", plain(JUNK), dtype_of("O8", PLAINED_STATE), plain((4,)), plain("C"))
    ),
    "field of objects as plain": touched(array_of(dtype_of("V8", FIELD_STATE))),
    "field in a scalar": touched(call("scalar", dtype_of("V8", FIELD_STATE), plain(JUNK[:8]))),
    "field in a buffer": touched(
        call("buffer", plain(JUNK), dtype_of("V8", FIELD_STATE), plain((4,)), plain("C"))
    ),
    "objects in Fortran's order": touched(array_of(dtype_of("O8", PLAINED_STATE), shape=(2, 2), fortran=True)),
    "an object of no axes": touched(array_of(dtype_of("O8", PLAINED_STATE), JUNK[:8], ())),
    "array of objects": array_of(dtype_of("O8", OBJECT_STATE)),
    "scalar object": call("scalar", dtype_of("O8", OBJECT_STATE), plain(JUNK[:8])),
    "buffer of objects": call("buffer", plain(JUNK), dtype_of("O8"), plain((4,)), plain("C")),
    "field of objects": array_of(
        dtype_of("V8", (3, "|", None, ("a",), FIELD, 8, 1, 63))
    ),
    "state makes objects": array_of(dtype_of("f8", OBJECT_STATE)),
    "sub-array of objects": array_of(dtype_of("f8", (3, "|", ("O", (4,)), None, None, 8, 8, 63))),
    "negative shape": array_of(dtype_of("f8", PLAIN_STATE), shape=(-4,)),
    "Fortran and too few": array_of(dtype_of("f8", PLAIN_STATE), shape=(400, 400), fortran=True),
    "overflow": array_of(dtype_of("f8", PLAIN_STATE), shape=(2**61, 8)),
    "overflow to nothing": array_of(dtype_of("f8", PLAIN_STATE), b"", (2**32, 2**32)),
    "one more than there is": array_of(dtype_of("f8", PLAIN_STATE), shape=(5,)),
    "scalar of too few": call("scalar", dtype_of("f8", PLAIN_STATE), plain(b"A")),
    "array of claimed size": call("ndarray", plain((2**40,)), dtype_of("O8")),
    "array by new": GLOBALS["ndarray"] + b"(" + plain((4,)) + dtype_of("O8") + b"t\x81",
    "strings": array_of(dtype_of("U8", (3, "<", None, None, None, 32, 4, 8))),
    "filled twice": array_of(dtype_of("f8", PLAIN_STATE)) + plain((1, (4,), 0, False, JUNK)) + b"b",
    "a state for a scalar": call("scalar", dtype_of("f8", PLAIN_STATE), plain(JUNK[:8])) + plain((1, 2)) + b"b",
    "a state for a class": GLOBALS["haiku"] + plain({"__setstate__": 1}) + b"b",
    "attributes of a class": GLOBALS["encode"] + plain((None, {"__code__": 1})) + b"b",
    "tuples as a key": b"}" + NESTED + b"Ns",
    "tuples as a set": b"\x8f(" + NESTED + b"\x90",
    "tuples behind a mapping": call("haiku") + b"}" + plain("_mapping") + b"](" + NESTED + b"N\x86esb",
    "a view of an array": array_of(dtype_of("f8", PLAIN_STATE)) + b"\x98",
    "a memo of 32 GB": b"Nr\xff\xff\xff\xff",
    "bytes of an exabyte": b"\x8e" + struct.pack("<Q", 2**60) + b"abc",
    "an array of an exabyte": b"\x96" + struct.pack("<Q", 2**34) + b"abc",
    "a frame of an exabyte": b"\x95" + struct.pack("<Q", 2**60) + b"N",
    "a long of 2 GB": b"\x8b\xff\xff\xff\x7fabc",
    "an extension": b"\x82\x01",
    "a call of a call": call("ordered") + b")R",
    "more than a class takes": call("dtype", plain("f8"), plain(1), plain(2), plain(3), plain(4)),
    "a lambda of codecs": call("encode", plain("abc"), plain("rot13")),
}  # fmt: skip
HARMLESS = ("tuples behind a mapping", "a memo of 32 GB", "a frame of an exabyte")  # read as what little is in them


@pytest.mark.parametrize("protocol", [0, 4])
@pytest.mark.parametrize("form", CRASHES)
def test_pickles_that_end_a_process_are_refused(tmp_path, form, protocol):
    path = tmp_path / "byol.pkl"
    path.write_bytes((b"" if protocol == 0 else b"\x80" + bytes([protocol])) + CRASHES[form] + b".")
    if form in HARMLESS:
        assert outcome(read_pickle, path) == "read"
    else:
        refused(read_pickle, path, "byol.pkl: ")


def test_arrays_of_every_plain_kind_are_read(tmp_path):
    kinds = [f"{order}{kind}" for order in "<>" for kind in ("i2", "i4", "i8", "u4", "f2", "f4", "f8")] + ["b1", "i1"]
    arrays = {kind: np.arange(6).reshape(2, 3).astype(kind) for kind in kinds}
    arrays |= {"fortran": np.asfortranarray(arrays["<f4"]), "none": np.zeros((0, 4)), "": np.float32(1.5), "n": 2**70}
    arrays |= {"shared": [arrays["<f8"], arrays["<f8"]]}
    for protocol in range(6):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(arrays, protocol))
        read = read_pickle(tmp_path / "a.pkl")
        assert read.keys() == arrays.keys()
        for key, array in arrays.items():
            np.testing.assert_array_equal(read[key], array)
            if isinstance(array, np.ndarray):
                assert read[key].dtype.newbyteorder("=") == array.dtype.newbyteorder("=")


# Arrays --------------------------------------------------------------------------------------------


def npy(header, values=b"", version=b"\x01\x00"):
    text = header.encode() if isinstance(header, str) else repr(header).encode()
    return b"\x93NUMPY" + version + struct.pack("<H", len(text) + 1) + text + b"\n" + values


def claims(shape, descr="<f4", fortran_order=False):
    return {"descr": descr, "fortran_order": fortran_order, "shape": shape}


class Planted:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (os.fspath(self.marker),)


FORGED = {
    "terabytes": npy(claims((2**20, 2**20)), bytes(64)),
    "more than a machine's words": npy(claims((2**62, 2**62)), bytes(64)),
    "negative": npy(claims((-4, 4)), bytes(64)),
    "overflow": npy(claims((2**61, 8, 0)), bytes(64)),
    "no numbers": npy(claims(("4",)), bytes(64)),
    "truths": npy(claims((True, 16)), bytes(64)),
    "many axes": npy(claims((1,) * 40), bytes(64)),
    "objects": npy(claims((4,), "|O"), pickle.dumps([1, 2, 3, 4])),
    "records": npy(claims((4,), [("a", "<f4"), ("b", "|O")]), bytes(64)),
    "text": npy(claims((4,), "<U4"), bytes(64)),
    "times": npy(claims((4,), "<M8[s]"), bytes(64)),
    "brackets": npy("-" * 9000 + "1"),
    "nested": npy("[" * 9000),
    "code": npy("__import__('os').mkdir('ran')"),
    "no dictionary": npy("[1, 2]"),
    "another version": npy(claims((4,)), bytes(64), b"\x09\x00"),
    "header cut": npy(claims((4,)))[:20],
    "values cut": npy(claims((16,)), bytes(63)),
    "nothing": b"",
    "a pickle": pickle.dumps([1]),
}


@pytest.mark.parametrize("form", FORGED)
def test_forged_arrays_are_refused(tmp_path, form, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.npy"
    path.write_bytes(FORGED[form])
    for mapped in (False, True):
        with pytest.raises(UnreadableImage, match="not an .npy file of numbers, or a truncated one"):
            read_npy(path, mapped=mapped)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", FORGED[form])
    with pytest.raises(UnreadableImage, match="not a readable .npz file of numbers"):
        read_npz(tmp_path / "a.npz")
    assert not (tmp_path / "ran").exists()


def test_planted_pickles_in_arrays_do_not_run(tmp_path):
    array = np.empty(1, object)
    array[0] = Planted(tmp_path / "ran")
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "a.npz", a=array)
    with pytest.raises(UnreadableImage, match="holds object"):
        read_npy(tmp_path / "a.npy")
    with pytest.raises(UnreadableImage, match="holds object"):
        read_npz(tmp_path / "a.npz")
    assert not (tmp_path / "ran").exists()


def test_archives_that_claim_more_than_deflate_can_hold(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", npy(claims((10**6,), "|u1"), bytes(10**6)))
    assert read_npz(tmp_path / "a.npz")["a"].shape == (10**6,)
    whole = (tmp_path / "a.npz").read_bytes()
    real = struct.pack("<I", 10**6 + len(npy(claims((10**6,), "|u1"))))
    assert real in whole
    (tmp_path / "a.npz").write_bytes(whole.replace(real, struct.pack("<I", 2**32 - 2)))
    with pytest.raises(UnreadableImage, match="a.npy claims 4294967294 bytes"):
        read_npz(tmp_path / "a.npz")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_archives_of_methods_that_pack_without_bound(tmp_path, method):
    """A kilobyte of these can hold gigabytes: an array is as long as what is unpacked, and no more is unpacked."""
    array, path = np.arange(10**5, dtype=np.uint16).reshape(100, -1), tmp_path / "a.npz"

    def write(*parts):
        with zipfile.ZipFile(path, "w", method) as archive, archive.open("a.npy", "w") as file:
            for part in parts:
                file.write(part)

    write(npy(claims(array.shape, "<u2"), array.tobytes()))
    np.testing.assert_array_equal(read_npz(path)["a"], array)
    write(npy(claims((2048, 2048), "|u1"), bytes(2**22)))
    np.testing.assert_array_equal(read_npz(path)["a"], 0)
    for claimed, shape, reason in (
        (2**30, (2**28,), f"holds {10**5 * 2} of {2**29} bytes"),
        (2**31, (2**30,), "a.npy claims 2147483648 bytes"),
    ):
        forged = npy(claims(shape, "<u2"), array.tobytes())
        write(forged)
        real = struct.pack("<I", len(forged))
        path.write_bytes(path.read_bytes().replace(real, struct.pack("<I", claimed)))
        tracemalloc.start()
        with pytest.raises(UnreadableImage, match=reason):
            read_npz(path)
        assert tracemalloc.get_traced_memory()[1] < 2**24
        tracemalloc.stop()
    write(npy(claims((4,)), bytes(16)), *[bytes(2**22)] * 8)
    tracemalloc.start()
    read_npz(path)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_members_that_are_no_arrays_are_passed_over(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("README.txt", "of whom these are")
        archive.writestr("a.npy", npy(claims((2,)), bytes(8)))
        archive.writestr("folder/", "")
    assert list(read_npz(tmp_path / "a.npz")) == names_in(tmp_path / "a.npz") == ["a"]
    assert read_npz(tmp_path / "a.npz", ["README.txt"]) == {}


def test_every_version_of_npy_is_read(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    for version in ((1, 0), (2, 0), (3, 0)):
        with open(tmp_path / "a.npy", "wb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's, that old versions of it do not read the later
            np.lib.format.write_array(file, array, version)
        for mapped in (False, True):
            np.testing.assert_array_equal(read_npy(tmp_path / "a.npy", mapped=mapped), array)


# Volumes -------------------------------------------------------------------------------------------

META = {
    "ObjectType": "Image", "NDims": "3", "BinaryData": "True", "BinaryDataByteOrderMSB": "False",
    "CompressedData": "False", "TransformMatrix": "1 0 0 0 1 0 0 0 1", "Offset": "0 0 0",
    "CenterOfRotation": "0 0 0", "AnatomicalOrientation": "RAI", "ElementSpacing": "1 1 1", "DimSize": "4 3 2",
    "ElementType": "MET_SHORT", "ElementDataFile": "LOCAL",
}  # fmt: skip
VALUES = np.arange(24, dtype=np.int16)
RAW = VALUES.tobytes()


def meta(path, values=RAW, **changes):
    """A MetaImage of changed fields; values behind the header. None leaves a field out."""
    fields = {**META, **changes}
    last = fields.pop("ElementDataFile")
    lines = [f"{key} = {value}" for key, value in fields.items() if value is not None]
    path.write_bytes("\n".join([*lines, f"ElementDataFile = {last}", ""]).encode("latin-1") + values)
    return path


def test_a_meta_header_never_becomes_a_format(tmp_path):
    """`%s%s%n` ended the process."""
    for written in (
        "%s%s%n 1 5 1", "%s 1 2 1", "%n", "slice%d%d.raw 1 2 1", "%1000000d 1 2 1", "%*d 1 2 1", "%ld 1 2 1",
        "a%da 1 100000000 1", "a%d 1 2 0", "a%d 1 2", "a%d 2 1 -1", "a%d 1 99999999999999999999 1", "LIST 7", "%",
    ):  # fmt: skip
        refused(read_volume, meta(tmp_path / "a.mhd", ElementDataFile=written), "ata")
    for end in ("mhd", "mha", "MHD"):
        path = meta(tmp_path / f"a.{end}", ElementDataFile="%s%s%n 1 5 1")
        refused(read_volume, path, "a pattern has one %d")
        assert outcome(read_header, path) == "read"  # as None


FIELDS = {
    "NDims": ("0", "11", "-3", "3 3", "9999999999", "three", "2"),
    "DimSize": ("4 3", "4 3 2 1", "-4 3 2", "0 3 2", "99999 99999 99999", "4 3 99999999999999999999", "nan 3 2", ""),
    "ElementType": ("MET_STRING", "MET_SHORT_ARRAY", "MET_NONE", "%s"),
    "ElementSpacing": ("1 1", "nan 1 1", "1 1 1 1 1 1", "%s", "1" * 2500),
    "TransformMatrix": ("1 0 0", "inf " * 9, "1 " * 4000),
    "AnatomicalOrientation": ("RAIS", "R" * 300, "%s%n"),
    "ElementNumberOfChannels": ("0", "-1", "2", "99999999999"),
    "HeaderSize": ("-2", "10", "99999999999", "x"),
    "CompressedData": ("True", "maybe"),
    "ObjectType": ("Mesh",),
    "DimSize = 4 3 2\nDimSize": ("9 9 9",),
    "A" * 5000: ("1",),
    "A" * 255: ("1",),
    "": ("1",),
    "Foo": ("A" * 40_000, "a\nno field", "1\nDimSize: 9 9 9", "1\nElementDataFile: %s%s%n"),
    "Comment": ("A" * 9000, "A" * 255, "a\x00b", "\x1b[2J"),
    "Name": ("A" * 255,),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in FIELDS.items() for value in values])
def test_meta_fields_are_checked(tmp_path, key, value):
    refused(read_volume, meta(tmp_path / "a.mha", **{key: value}), "", here=True)


def test_every_kind_of_meta_data_is_read(tmp_path):
    wanted = VALUES.reshape(2, 3, 4).transpose(2, 1, 0)
    raw, squeezed = VALUES.tobytes(), zlib.compress(VALUES.tobytes())
    for number in (1, 2):
        (tmp_path / f"slice{number:02d}.raw").write_bytes(VALUES[12 * (number - 1) : 12 * number].tobytes())
    (tmp_path / "head.raw").write_bytes(b"HEAD" + raw)
    (tmp_path / "a b.raw").write_bytes(raw)
    (tmp_path / "a.zraw").write_bytes(squeezed)
    for name, values, changes in (
        ("local.mha", raw, {}),
        ("local.MHA", raw, {}),
        ("small.mha", raw, {"ElementDataFile": "Local"}),
        ("file.mhd", b"", {"ElementDataFile": "a b.raw"}),
        ("file.MHD", b"", {"ElementDataFile": "a b.raw"}),
        ("sized.mha", squeezed, {"CompressedData": "True", "CompressedDataSize": len(squeezed)}),
        ("packed.mhd", b"", {"CompressedData": "True", "ElementDataFile": "a.zraw"}),
        ("head.mhd", b"", {"HeaderSize": "4", "ElementDataFile": "head.raw"}),
        ("end.mhd", b"", {"HeaderSize": "-1", "ElementDataFile": "head.raw"}),
        ("text.mha", " ".join(map(str, [*VALUES, ""])).encode(), {"BinaryData": "False"}),
        ("list.mhd", b"slice01.raw\nslice02.raw\n", {"ElementDataFile": "LIST"}),
        ("numbers.mhd", b"", {"ElementDataFile": "slice%02d.raw 1 2 1"}),
        ("list2.mhd", b"slice01.raw\nslice02.raw\n", {"ElementDataFile": "LIST 2"}),
        ("list2d.mhd", b"slice01.raw\nslice02.raw\n", {"ElementDataFile": "LIST 2D"}),
        ("more.mha", raw, {"Comment": "a CT, at 120 kV", "0008|0060": "CT", "SeriesDescription": None}),
        ("names.mha", raw, {"MyField:x": "3", "(0008,0060)": "CT", "a/b": "1", "Größe's %": "%s", "A" * 254: "1"}),
        ("twice.mha", raw, {"Comment": "a\nComment = b", "Foo": "1\nFoo: 2"}),
        ("long.mha", raw, {"Foo": "A" * 30_000, "Comment": "A" * 254}),
        ("colons.mha", raw, {"DimSize": None, "DimSize: 4 3 2\nFoo": "1"}),
        ("unoriented.mha", raw, {"AnatomicalOrientation": ""}),
        ("time.mha", raw, {"Offset": "0 0 0 7", "ElementSpacing": "1 1 1 4"}),
        ("lines.mha", raw, {f"F{i}": "1" for i in range(5000)}),
        ("one.mha", squeezed, {"CompressedData": "1", "CompressedDataSize": len(squeezed)}),
    ):
        path = meta(tmp_path / name, values, **changes)
        np.testing.assert_array_equal(read_volume(path).array, wanted, err_msg=name)
        assert read_header(path).size == (4, 3, 2)


def test_a_meta_image_of_four_axes_is_oriented_in_three(tmp_path):
    axes = " ".join("1" if i % 5 == 0 else "0" for i in range(16))
    zeros, ones = "0 0 0 0", "1 1 1 1"
    path = meta(tmp_path / "a.mha", NDims="4", DimSize="4 3 2 1", TransformMatrix=axes, Offset=zeros,
                CenterOfRotation=zeros, ElementSpacing=ones)  # fmt: skip
    assert outcome(read_volume, path) == "read"


def test_meta_data_that_are_cut_or_missing(tmp_path):
    squeezed = zlib.compress(np.random.default_rng(0).bytes(48))
    (tmp_path / "one.raw").write_bytes(bytes(23))
    text = " ".join(map(str, VALUES)).encode()
    for values, changes, reason in (
        (bytes(47), {}, "holds 47 of 48 bytes"),
        (squeezed[:-20], {"CompressedData": "True", "CompressedDataSize": len(squeezed) - 20}, "truncated"),
        (squeezed, {"CompressedData": "True", "CompressedDataSize": 1000}, "truncated"),
        (
            squeezed,
            {"CompressedData": "True", "CompressedDataSize": 50, "DimSize": "4096 4096 4096"},
            "compressed bytes for",
        ),
        (bytes(60), {"CompressedData": "True", "CompressedDataSize": 60}, "damaged"),
        (squeezed, {"CompressedData": "True"}, "its header lacks CompressedDataSize"),
        (b"one.raw\ngone.raw\n", {"ElementDataFile": "LIST"}, "one.raw holds 23 of 24 bytes"),
        (b"one.raw\n", {"ElementDataFile": "LIST"}, "names 1 data files for 2 slices"),
        (b"", {"ElementDataFile": "gone%d.raw 1 2 1"}, "gone1.raw is missing"),
        (b"", {"ElementDataFile": "slice%d.raw 1 3 1"}, "names 3 data files for 2 slices"),
        (b"1 2 3", {"BinaryData": "False"}, "holds 5 of 47 bytes"),
        (text, {"BinaryData": "False"}, "numbers as text, which must end in a blank or a new line"),
        (text.replace(b"7", b"x") + b"\n", {"BinaryData": "False"}, "its values are not such as its header says"),
        (b"one.raw\none.raw\n", {"ElementDataFile": "LIST", "CompressedData": "1"}, "compressed in several files"),
    ):
        refused(read_volume, meta(tmp_path / "a.mha", values, **changes), reason, here=True)


def nrrd(path, *lines, values=RAW, **changes):
    fields = {
        "type": "short", "dimension": "3", "sizes": "4 3 2", "encoding": "raw", "endian": "little",
        "space": "left-posterior-superior", "space directions": "(1,0,0) (0,1,0) (0,0,1)", **changes,
    }  # fmt: skip
    text = [f"{key.replace('_', ' ')}: {value}" for key, value in fields.items() if value is not None]
    path.write_bytes("\n".join(["NRRD0004", *text, *lines, "", ""]).encode("latin-1") + values)
    return path


def test_nrrd_headers_are_checked(tmp_path):
    (tmp_path / "s1.raw").write_bytes(VALUES[:12].tobytes())
    (tmp_path / "s2.raw").write_bytes(VALUES[12:].tobytes())
    wanted = VALUES.reshape(2, 3, 4).transpose(2, 1, 0)
    np.testing.assert_array_equal(read_volume(nrrd(tmp_path / "a.nrrd")).array, wanted)
    digits = RAW.hex("\n", 20).encode()
    np.testing.assert_array_equal(read_volume(nrrd(tmp_path / "h.nrrd", values=digits, encoding="hex")).array, wanted)
    refused(read_volume, nrrd(tmp_path / "h.nrrd", values=digits[:-6], encoding="hex"), "truncated", here=True)
    long = nrrd(tmp_path / "l.nrrd", f"key:={'A' * 10_000}")
    np.testing.assert_array_equal(read_volume(long).array, wanted)
    for field in ("kinds", "units", "space units", "foo bar"):  # SimpleITK ends the process for one that it cannot read
        refused(read_volume, nrrd(tmp_path / "l.nrrd", f"{field}: {'A' * 2000}"), "too long", here=True)
    many = nrrd(tmp_path / "a.nhdr", "data file: s%d.raw 1 2 1", values=b"")
    np.testing.assert_array_equal(read_volume(many).array, wanted)
    for written in (
        "%s%s%n 1 2 1",
        "s%n 1 2 1",
        "s%d 1 2 0",
        "s%d%d 1 2 1",
        "s%d 1 2",
        "s%999999d 1 2 1",
        "s%d 1 9999999 1",
    ):
        refused(read_volume, nrrd(tmp_path / "a.nhdr", f"data file: {written}", values=b""), "data file")
    for changes, reason in (
        ({"sizes": "99999 99999 99999"}, "claims"), ({"sizes": "4 3"}, "3 whole numbers are needed"),
        ({"sizes": "-4 3 2"}, "claims"), ({"dimension": "17"}, "dimension = 17"), ({"type": "block"}, "not read"),
        ({"encoding": "gzip"}, "damaged"), ({"encoding": "%s"}, "not read"), ({"byte_skip": "-5"}, "byte skip"),
        ({"byte_skip": "99"}, "truncated"), ({"sizes": "4 3 5"}, "holds"), ({"type": None}, "lacks type"),
    ):  # fmt: skip
        refused(read_volume, nrrd(tmp_path / "a.nrrd", **changes), reason, here=True)


def test_gzipped_nrrd_with_something_before_it(tmp_path):
    """Of 520 bytes that claim half a terabyte, a skip made an allocation: the run ended, and named no file."""
    wanted, packed = VALUES.reshape(2, 3, 4).transpose(2, 1, 0), gzip.compress(RAW)
    for values, skips in (
        (gzip.compress(b"abc" + RAW), {"byte_skip": 3}), (b"a\nb\n" + packed, {"line_skip": 2}),
        (b"a\n" + gzip.compress(b"b" + RAW), {"line_skip": 1, "byte_skip": 1}),
    ):  # fmt: skip
        path = nrrd(tmp_path / "a.nrrd", values=values, encoding="gzip", **skips)
        np.testing.assert_array_equal(read_volume(path).array, wanted)
    for skips, reason in (
        ({"byte_skip": 1}, "compressed bytes for"), ({"line_skip": 1}, "compressed bytes for"),
        ({"byte_skip": -1}, "byte skip: -1, which is for raw values"), ({"line_skip": 2**40}, "compressed bytes for"),
    ):  # fmt: skip
        path = nrrd(tmp_path / "a.nrrd", values=b"a\n" + packed, encoding="gzip", sizes="20000 20000 800", **skips)
        refused(read_volume, path, reason)
        refused(read_volume, nrrd(path, values=packed, encoding="gzip", sizes="4 3 5", **skips), "", here=True)


def test_memory_that_a_volume_needs_names_its_file():
    text = f"/data/a.nrrd: {TOO_LARGE}"
    said = f"{text}; use a smaller --b, or fewer --workers"
    assert explain(MemoryError(text)) == said
    handed = f"Caught MemoryError in DataLoader worker process 0.{HANDED_OVER}  File x\nMemoryError: {text}"
    assert explain(MemoryError(handed)) == said


def test_nrrd_data_in_other_files(tmp_path):
    wanted = VALUES.reshape(2, 3, 4).transpose(2, 1, 0)
    for i in range(6):
        (tmp_path / f"r{i}").write_bytes(VALUES[4 * i : 4 * i + 4].tobytes())
    for i in range(2):
        (tmp_path / f"s{i}").write_bytes(VALUES[12 * i : 12 * i + 12].tobytes())
    for name in ("50%.raw", "%n"):
        (tmp_path / name).write_bytes(RAW)
    rows = "\n".join(f"r{i}" for i in range(6))
    for written in ("LIST\ns0\ns1", "LIST 3\ns0\ns1", "LIST 2\ns0\ns1", f"LIST 1\n{rows}", "LIST 3\n50%.raw", "50%.raw",
                    "s%d 0 1 1 3", "r%d 0 5 1 1", "%n"):  # fmt: skip
        path = nrrd(tmp_path / "a.nhdr", f"data file: {written}", values=b"")
        if written.startswith("LIST"):
            path.write_bytes(path.read_bytes().rstrip() + b"\n")
        assert outcome(read_volume, path) == "read", written
        np.testing.assert_array_equal(read_volume(path).array, wanted, err_msg=written)
    for written, reason in (
        ("LIST 3\ns0\ns1\ns0", "names 3 data files as slabs of 2 slices"), ("LIST 4\ns0", "files have 1 to 3 axes"),
        ("LIST 1\ns0\ns1", "names 2 data files for 6 slices"), ("LIST 0\ns0", "1 to 3 axes"),
        ("LIST\n", "names 0 data files"),
    ):  # fmt: skip
        refused(read_volume, nrrd(tmp_path / "a.nhdr", f"data file: {written}", values=b""), reason)


def test_nifti_headers_are_checked(tmp_path):
    sitk.WriteImage(sitk.GetImageFromArray(VALUES.reshape(2, 3, 4)), str(tmp_path / "a.nii"))
    whole = (tmp_path / "a.nii").read_bytes()
    for place, kind, value, reason in (
        (40, "h", 0, "says dim"), (40, "h", 8, "says dim"), (42, "h", -4, "says dim"), (42, "h", 32767, "holds"),
        (70, "h", 1, "datatype = 1"), (70, "h", 9999, "datatype = 9999"), (108, "f", float("nan"), "vox_offset = nan"),
        (108, "f", 1e30, "vox_offset"), (108, "f", -352.0, "vox_offset"), (344, "i", 0x0031696E, "in another file"),
        (0, "i", 347, "not a NIfTI"),
    ):  # fmt: skip
        changed = bytearray(whole)
        struct.pack_into("<" + kind, changed, place, value)
        (tmp_path / "b.nii").write_bytes(changed)
        refused(read_volume, tmp_path / "b.nii", reason, here=True)


def test_gzipped_nifti_says_what_is_wrong(tmp_path):
    values = np.random.default_rng(0).integers(-1000, 1000, (8, 9, 10)).astype(np.int16)
    sitk.WriteImage(sitk.GetImageFromArray(values), str(tmp_path / "a.nii.gz"))
    whole = (tmp_path / "a.nii.gz").read_bytes()
    (tmp_path / "a.nii").write_bytes(whole)
    refused(read_volume, tmp_path / "a.nii", "gzipped, which its name does not say; rename it", here=True)
    (tmp_path / "a.nii.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UnreadableImage, match=r"a.nii.gz holds [1-9]\d\d of 1792 bytes"):
        read_volume(tmp_path / "a.nii.gz")


def test_reasons_name_no_places_in_memory():
    for text, reason in (
        ("Exception\nITK ERROR: NiftiImageIO(0x5655a0): not such a file", "not such a file"),
        ("itk::ERROR: NrrdImageIO(0x0f): Reason: why", "why"),
        (
            "ITK ERROR: MetaImageIO(0x1): File cannot be read: a.mha\nReason: Success",
            "damaged: its values are not such",
        ),
    ):
        assert reason_of(text).startswith(reason)


def test_a_bomb_is_not_unpacked_beyond_what_is_needed(tmp_path):
    """A quarter of a gigabyte of zeros behind a small volume."""
    buffer = io.BytesIO()
    sitk.WriteImage(sitk.GetImageFromArray(VALUES.reshape(2, 3, 4)), str(tmp_path / "a.nii"))
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    buffer.write(packer.compress((tmp_path / "a.nii").read_bytes()))
    block = bytes(2**22)
    for _ in range(2**6):
        buffer.write(packer.compress(block))
    buffer.write(packer.flush())
    (tmp_path / "a.nii.gz").write_bytes(buffer.getvalue())
    assert outcome(read_volume, tmp_path / "a.nii.gz") == "read"


def test_content_of_another_format_does_not_choose_the_reader(tmp_path):
    sitk.WriteImage(sitk.GetImageFromArray(VALUES.reshape(2, 3, 4)), str(tmp_path / "a.vtk"))
    for end, reason in (("nii", "not a NIfTI"), ("mha", "header"), ("nrrd", "not an NRRD")):
        (tmp_path / f"a.{end}").write_bytes((tmp_path / "a.vtk").read_bytes())
        refused(read_volume, tmp_path / f"a.{end}", reason)


# DICOM and pictures --------------------------------------------------------------------------------


def test_elements_that_claim_more_than_their_file(tmp_path):
    """GDCM and pydicom allocated what an element claims: gigabytes for a file of a kilobyte."""
    readers.make_series(tmp_path)
    whole = (tmp_path / "2.dcm").read_bytes()
    check_elements(whole)
    place = whole.index(b"OW\0\0") + 4  # of the length of the values
    claims = whole[:place] + struct.pack("<I", 2**32 - 16) + whole[place + 4 :]
    nested = (
        b"\x08\x00\x15\x11SQ\0\0" + struct.pack("<I", 16) + b"\xfe\xff\x00\xe0" + struct.pack("<I", 2**31) + bytes(8)
    )
    rows = whole.replace(b"\x28\x00\x10\x00US\x02\x00\x06\x00", b"\x28\x00\x10\x00US\x02\x00\xff\xff")
    assert rows != whole
    middle = whole.index(b"\x28\x00\x10\x00US")
    for forged, reason in ((claims, "claims 4294967280 bytes"), (rows, "claims 524280 values"), (
        whole[:middle] + nested + whole[middle:], "claims 2147483648 bytes")):  # fmt: skip
        with pytest.raises(ValueError, match=reason):
            check_elements(forged)
        (tmp_path / "2.dcm").write_bytes(forged)
        with pytest.raises(UnreadableImage, match=f"2.dcm is damaged .*{reason}"):
            read_volume(tmp_path)
    (tmp_path / "2.dcm").write_bytes(claims)
    tracemalloc.start()
    with contextlib.suppress(UnreadableImage):
        read_image(tmp_path / "2.dcm")
    describe(tmp_path / "2.dcm")
    is_series(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 2**28
    tracemalloc.stop()
    (tmp_path / "2.dcm").write_bytes(whole)
    (tmp_path / "notes.txt").write_bytes(b"\x08\0\x05\0" + b"\xff" * 300)  # no slice: GDCM never sees it
    assert read_volume(tmp_path).array.shape == (8, 6, 4)


def of_elements(path, *changes):
    """Change a DICOM file's bytes, each (what there is, what there is to be); both are there once."""
    data = path.read_bytes()
    for before, after in changes:
        assert data.count(before) == 1
        data = data.replace(before, after)
    path.write_bytes(data)


def number_element(element, *values):
    """An element of group 0028 with 16-bit numbers."""
    return struct.pack("<HH2sH", 0x28, element, b"US", 2 * len(values)) + struct.pack(f"<{len(values)}H", *values)


ROWS = number_element(0x10, 6)
FRAMES = struct.pack("<HH2sH", 0x28, 8, b"IS", 2)
TWO_WAYS = {  # of four slices with 96 bytes each, GDCM made up to a million voxels, of memory that was not the file's
    "rows twice": (ROWS, number_element(0x10, 60_000) + ROWS, r"\(0028,0010\) twice"),
    "rows behind an end": (ROWS, b"\xfe\xff\x0d\xe0\0\0\0\0" + number_element(0x10, 60_000), "that never began"),
    "several rows": (ROWS, number_element(0x10, 6000, 6), r"\(0028,0010\) has 4 bytes"),
    "no frames": (ROWS, FRAMES + b"0 " + number_element(0x10, 6000), "claims 0 frames"),
    "frames below none": (ROWS, FRAMES + b"-1" + number_element(0x10, 6000), "claims -1 frames"),
    "several bits": (number_element(0x100, 16), number_element(0x100, 64, 16), r"\(0028,0100\) has 4 bytes"),
    "no bits": (number_element(0x100, 16), number_element(0x100), r"\(0028,0100\) has 0 bytes"),
    "samples twice": (ROWS, number_element(2, 99) + ROWS, r"\(0028,0002\) twice"),
    "values twice": (b"\xe0\x7f\x10\0OW\0\0", b"\xe0\x7f\x10\0OW\0\0\x02\0\0\0ab" * 2, r"\(7fe0,0010\) twice"),
}


@pytest.mark.parametrize("form", TWO_WAYS)
def test_elements_that_readers_take_differently(tmp_path, form):
    """Where the walk and GDCM differ on a size, GDCM reads beyond the values."""
    readers.make_series(tmp_path)
    before, after, reason = TWO_WAYS[form]
    for path in tmp_path.iterdir():
        of_elements(path, (before, after))
    with pytest.raises(UnreadableImage, match=rf"0.dcm is damaged \(.*{reason}"):
        read_volume(tmp_path)
    with pytest.raises(UnreadableImage, match=reason):
        read_image(tmp_path / "0.dcm")


def test_what_gdcm_makes_of_slices_is_what_was_checked(tmp_path, monkeypatch):
    """However it comes that they differ."""
    readers.make_series(tmp_path)
    assert read_volume(tmp_path).array.shape == (8, 6, 4)
    with monkeypatch.context() as patch:
        patch.setattr(dicom, "check_elements", lambda data: 8 * 5)
        with pytest.raises(UnreadableImage, match="DICOM slices of 8 x 6 pixels, and 0.dcm is of others"):
            read_volume(tmp_path)
    for path in tmp_path.iterdir():
        of_elements(path, (ROWS, FRAMES + b"1 " + ROWS))
    assert read_volume(tmp_path).array.shape == (8, 6, 4)
    of_elements(tmp_path / "0.dcm", (FRAMES + b"1 ", struct.pack("<HH2sH", 0x28, 8, b"IS", 0)))  # as good as none
    assert read_volume(tmp_path).array.shape == (8, 6, 4)
    assert read_image(tmp_path / "0.dcm").shape == (6, 8)


def deflated(path, more=b""):
    """Make a DICOM file a deflated one, with more elements at its end."""
    data = pydicom.dcmread(path)
    data.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    data.save_as(path)
    if more:
        whole = path.read_bytes()
        place = 144 + struct.unpack_from("<I", whole, 140)[0]  # where its header says that it ends
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        before = zlib.decompress(whole[place:], -15)
        path.write_bytes(whole[:place] + packer.compress(before) + packer.compress(more) + packer.flush())


def test_deflated_dicom_is_read_and_is_no_bomb(tmp_path, monkeypatch):
    """Two megabytes took a picture's reader four gigabytes, and the look for series one."""
    readers.make_series(tmp_path)
    wanted, slice_alone = read_volume(tmp_path).array, read_image(tmp_path / "2.dcm")
    for path in tmp_path.iterdir():
        deflated(path)
    assert is_series(tmp_path)
    np.testing.assert_array_equal(read_volume(tmp_path).array, wanted)
    np.testing.assert_array_equal(read_image(tmp_path / "2.dcm"), slice_alone)
    assert describe(tmp_path / "2.dcm") == ("DICOM", "MONOCHROME2 12-bit")
    whole = (tmp_path / "2.dcm").read_bytes()
    (tmp_path / "2.dcm").write_bytes(whole[:-40])
    refused(read_image, tmp_path / "2.dcm", "cut short", here=True)
    (tmp_path / "2.dcm").write_bytes(whole)
    monkeypatch.setattr(arrays, "ALWAYS_INFLATED", 2**22)
    block = b"\xfc\xff\xfc\xffOB\0\0" + struct.pack("<I", 2**26) + bytes(2**26)  # of padding
    for path in tmp_path.iterdir():
        deflated(path, block)
    tracemalloc.start()
    refused(read_image, path, "bytes inflate to more than 4", here=True)
    refused(read_volume, tmp_path, "bytes inflate to more than 4", here=True)
    assert describe(path) == ("DICOM", "MONOCHROME2 12-bit")
    assert is_series(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 2**25
    tracemalloc.stop()


def test_elements_are_not_without_number(tmp_path, monkeypatch):
    """Each of eight bytes is an object of half a kilobyte."""
    monkeypatch.setattr(elements, "MOST_ELEMENTS", 60)
    readers.make_series(tmp_path)
    check_elements((tmp_path / "2.dcm").read_bytes())
    empty = b"".join(struct.pack("<HH2sH", 0x7FE1, 2 * i, b"SH", 0) for i in range(60))
    items = struct.pack("<HH2sHI", 0x7FE1, 0, b"SQ", 0, 60 * 8) + struct.pack("<HHI", 0xFFFE, 0xE000, 0) * 60
    for more in (empty, items):
        deflated(tmp_path / "2.dcm", more)
        refused(read_image, tmp_path / "2.dcm", "has more than 60 elements", here=True)


def legal_pictures():
    """DICOM files as makers write them: what differs, as a change of a data set."""

    def colours(data, kind, share=1.0):
        data.SamplesPerPixel, data.PlanarConfiguration, data.PhotometricInterpretation = 3, 0, kind
        data.BitsAllocated, data.BitsStored, data.HighBit = 8, 8, 7
        data.PixelData = bytes(int(6 * 8 * 3 * share))

    def bilevel(data):
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelData = 1, 1, 0, bytes(6)

    return {
        "as it is": lambda data: None, "RGB": lambda data: colours(data, "RGB"), "bilevel": bilevel,
        "shared colours": lambda data: colours(data, "YBR_FULL_422", 2 / 3),
        "no frames": lambda data: setattr(data, "NumberOfFrames", None),
        "more values than pixels": lambda data: setattr(data, "PixelData", data.PixelData + bytes(100)),
        "windows": lambda data: (setattr(data, "WindowCenter", [40, 400]), setattr(data, "WindowWidth", [400, 4000])),
    }  # fmt: skip


HEADLESS = [(kind, end) for end in (False, True) for kind in ("ImplicitVRLittle", "ExplicitVRLittle", "ExplicitVRBig")]


@pytest.mark.parametrize("form", legal_pictures())
@pytest.mark.parametrize(("syntax", "headless"), [*HEADLESS, ("DeflatedExplicitVRLittle", False)])
def test_legal_dicom_pictures_are_read(tmp_path, form, syntax, headless):
    path = tmp_path / "a.dcm"
    readers.write_dicom(path, picture=True)
    data = pydicom.dcmread(path)
    data.file_meta.TransferSyntaxUID = uid = getattr(pydicom.uid, f"{syntax}Endian")
    written_as = {"implicit_vr": uid.is_implicit_VR, "little_endian": uid.is_little_endian}
    legal_pictures()[form](data)
    pydicom.dcmwrite(path, data, force_encoding=True, **written_as)
    if headless:
        whole = path.read_bytes()
        path.write_bytes(whole[144 + struct.unpack_from("<I", whole, 140)[0] :])
    assert read_image(path).shape[:2] == (6, 8)
    assert describe(path)[0] == "DICOM"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EPERM])
@pytest.mark.parametrize("call", ["mkdir", "symlink"])
def test_a_full_temporary_folder_is_not_the_series_fault(tmp_path, monkeypatch, call, number):
    def fails(*_args, **_more):
        raise OSError(number, os.strerror(number), "/tmp/x")

    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "series").mkdir()
    readers.make_series(tmp_path / "series")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fails)
        with pytest.raises(InputError, match=rf"\({os.strerror(number)}\); set TMPDIR to a folder that can be written"):
            read_volume(tmp_path / "series")
    assert read_volume(tmp_path / "series").array.shape == (8, 6, 4)
    assert not list((tmp_path / "temporary").iterdir())


def test_no_temporary_folder_at_all(tmp_path, monkeypatch):
    readers.make_series(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "gone")])
    with pytest.raises(InputError, match=r"No usable temporary directory.*set TMPDIR to a folder"):
        read_volume(tmp_path)


@pytest.mark.parametrize("number", [*LACKS, *DISK])
def test_what_the_machine_lacks_is_no_files_fault(number):
    for block in (unreadable("damaged"), unusable("a.pt", "damaged")):
        with pytest.raises(OSError, match=os.strerror(number)), block:
            raise OSError(number, os.strerror(number))


def test_the_series_that_a_file_names_may_be_damaged(tmp_path):
    """pydicom decodes an element when it is asked for, which is no part of the reading."""
    readers.make_series(tmp_path)
    assert is_series(tmp_path)
    whole = (tmp_path / "2.dcm").read_bytes()
    forged = whole.replace(b"\x20\0\x0e\0UI", b"\x20\0\x0e\0FD")
    assert forged != whole
    for path in tmp_path.iterdir():
        path.write_bytes(forged)
    assert not is_series(tmp_path)


def test_depths_of_sequences_are_bounded():
    item = b"\x08\x00\x15\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
    with pytest.raises(ValueError, match="in too many sequences"):
        check_elements(b"\0" * 128 + b"DICM" + item * 5000)


def test_pictures_that_claim_more_than_their_file(tmp_path):
    """Half a minute was spent on 12 000 × 12 000 pixels of nothing."""
    Image.fromarray(np.zeros((3000, 3000), np.uint8)).save(tmp_path / "flat.png")
    assert (tmp_path / "flat.png").stat().st_size < 12_000
    assert read_image(tmp_path / "flat.png").shape == (3000, 3000)
    Image.fromarray(np.zeros((8, 8, 4), np.uint8)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    header = b"IHDR" + struct.pack(">II", 12_000, 12_000) + data[24:29]
    (tmp_path / "a.png").write_bytes(data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:])
    for read in (read_image, read_mask):
        with pytest.raises(UnreadableImage, match="claims 12000 x 12000 pixels in"):
            read(tmp_path / "a.png")


def test_no_picture_starts_a_program(tmp_path, monkeypatch):
    """Pillow recognises formats by their content, whatever the name; for EPS it runs Ghostscript."""
    (tmp_path / "bin").mkdir()
    ghostscript = tmp_path / "bin" / "gs"
    ghostscript.write_text(f"#!/bin/sh\n: > {tmp_path}/ran\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # not looked for yet
    path = tmp_path / "e.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
    refused(read_image, path, "not an image that Pillow or pydicom can read", here=True)
    refused(read_mask, path, "not an image that Pillow or pydicom can read", here=True)
    refused(read_slide, path, "not an image that Pillow can read", here=True)
    assert describe(path) == ("?", "?")
    assert picture(path, "", "") is None
    assert not (tmp_path / "ran").exists()


def test_pictures_of_every_format_are_read_whatever_their_names(tmp_path):
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8))
    for kind in ("PNG", "JPEG", "TIFF", "BMP", "DIB", "GIF", "PPM", "WEBP", "JPEG2000", "AVIF", "MPO"):
        path = tmp_path / f"{kind}.png"
        try:
            if kind == "MPO":  # of cameras: a JPEG with another behind it
                image.save(path, kind, save_all=True, append_images=[image])
            else:
                image.save(path, kind)
        except (OSError, ValueError, KeyError):  # which this Pillow does not write
            continue
        assert read_image(path).shape[:2] == read_mask(path).shape[:2] == read_slide(path).shape[:2] == (6, 8)
        assert describe(path)[0] == kind


def test_gzipped_pictures_are_no_bombs(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "ALWAYS_INFLATED", 2**20)
    path = tmp_path / "a.png.gz"
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8)).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    for more, fits in ((bytes(2**19), True), (bytes(2**26), False)):
        path.write_bytes(gzip.compress(whole + more, 1))
        for read in (read_image, read_mask):
            if fits:
                assert read(path).shape == (6, 8)
                continue
            tracemalloc.start()
            refused(read, path, "gunzips to more than ", here=True)
            assert tracemalloc.get_traced_memory()[1] < 2**26
            tracemalloc.stop()


BLANK = Image.new("P", (2400, 2400))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("png", {"bits": 1}),
        ("png", {"bits": 2}),
        ("webp", {"lossless": True}),
        ("jp2", {}),
        ("avif", {"speed": 10}),
        ("gif", {}),
        ("tif", {"compression": "zstd"}),
    ],
)
def test_blank_pictures_are_read(tmp_path, kind, options):
    """Of nothing, some formats pack a hundred thousand pixels in a byte."""
    path = tmp_path / f"a.{kind}"
    image = BLANK if kind in ("png", "gif") else BLANK.convert("L" if kind in ("jp2", "tif") else "RGB")
    try:
        image.save(path, **options)
    except (OSError, ValueError, KeyError) as error:
        pytest.skip(f"this Pillow does not write it: {error}")
    for read in (read_image, read_mask):
        values = read(path)
        assert values.shape[:2] == (2400, 2400)
        assert not values.any()


def test_blank_slices_of_compressed_series_pass(tmp_path):
    """JPEG 2000, JPEG-LS and run lengths of a blank slice are as short as those of a picture."""
    readers.make_series(tmp_path)
    data = pydicom.dcmread(tmp_path / "2.dcm")
    data.file_meta.TransferSyntaxUID = pydicom.uid.JPEG2000Lossless
    data["PixelData"].is_undefined_length = True
    for rows, fits in ((4096, True), (32_768, False)):
        data.Rows = data.Columns = rows
        data.PixelData = pydicom.encaps.encapsulate([bytes(300)])
        data.save_as(tmp_path / "2.dcm")
        with contextlib.nullcontext() if fits else pytest.raises(ValueError, match="claims 1073741824 values"):
            check_elements((tmp_path / "2.dcm").read_bytes())


# Tables and JSON -----------------------------------------------------------------------------------


def test_run_lengths_are_cocos():
    coco = pytest.importorskip("pycocotools.mask")
    for seed in range(20):
        mask = np.random.default_rng(seed).random((37, 51)) > seed / 20
        written = coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
        lengths = np.diff(np.flatnonzero(np.diff(mask.T.ravel(), prepend=False, append=not mask.T.ravel()[-1])))
        assert run_lengths(written)[1:] == lengths.tolist()
        assert sum(run_lengths(written.decode())) == mask.size


@pytest.mark.parametrize(
    "shape",
    [
        {"size": [20, 30], "counts": "o" * 200}, {"size": [20, 30], "counts": "_" * 40},
        {"size": [20, 30], "counts": "PP"},
        {"size": [99999, 99999], "counts": "`" * 9}, {"size": [20, 30], "counts": [300, 301]}, {"counts": 5},
        {"size": [20, 30], "counts": [2**40, 600 - 2**40]}, {"size": [20, 30], "counts": [600.5]}, [[1e9] * 8],
        [[0, 0, 5, float("inf"), 3, 3]], [[1, 2, 3]], [["a"] * 6], "x", None, [[[1, 2], [3, 4]]],
    ],
)  # fmt: skip
def test_shapes_that_pycocotools_would_follow_out_of_the_image(shape, tmp_path):
    shapes = pathology.Shapes([[[1, 1, 10, 1, 10, 10]], shape], 20, 30)
    refused(lambda _: shapes(), tmp_path, "its annotation 2 is no polygon and no run lengths")


def test_shapes_as_tools_write_them():
    """Parts that simplification left with two corners, and run lengths that were floats on their way."""
    line, triangle = [1, 1, 10, 1], [1, 1, 10, 1, 10, 10]
    whole = pathology.Shapes([[triangle]], 20, 30)()
    assert whole.any()
    np.testing.assert_array_equal(pathology.Shapes([[line, triangle, [3, 3]]], 20, 30)(), whole)
    floats = pathology.Shapes([{"size": [20, 30], "counts": [100.0, 50.0, 450]}], 20, 30)()
    assert floats.sum() == 50
    for shape in ([line], [], [line, [1, 2, 3]], [[1e9, 0], triangle]):
        with pytest.raises(UnreadableImage, match="its annotation 1 is no polygon"):
            pathology.Shapes([shape], 20, 30)()


def test_json_may_mark_the_order_of_its_bytes(tmp_path):
    (tmp_path / "a.json").write_text('{"a": "é"}', encoding="utf-8-sig")
    assert read_json(tmp_path / "a.json") == {"a": "é"}
    readers.make_coco(tmp_path)
    path = tmp_path / "annotations" / "train.json"
    path.write_text(path.read_text(), encoding="utf-8-sig")
    readers.read_coco(tmp_path)


def test_json_that_is_damaged_or_something_else_is_named(tmp_path):
    path = tmp_path / "a.json"
    assert read_json(path) == {}
    for text in ("", "{", "[1]", "null", '"x"', "[" * 100_000, '{"a":' * 100_000, "9" * 5000, "\udcff"):
        path.write_text(text, errors="surrogateescape")
        with pytest.raises(InputError, match=r"a.json: (damaged, or )?no JSON.*restore it from a copy, or remove it"):
            read_json(path)
    path.write_text('{"step": 1}\n[2]\n{"step": \nnull\n' + "[" * 100_000 + '\n{"step": 3}')
    assert read_lines(path) == [{"step": 1}, {"step": 3}]


def test_damaged_records_of_a_study(tmp_path):
    readers.make_study(tmp_path)
    job = Job("run", "finetune_classification", ("--init", "x"), tmp_path / "run", "results.json")
    cell = Cell("classification", 1, "x", 0, "auroc", job)
    assert cell.results()["auroc"] == 0.7
    path = tmp_path / "run" / "results.json"
    whole = json.loads(path.read_text())
    (entry,) = whole["trials"]
    for changes in (
        {"trials": []}, {"trials": 3}, {"config": "x"}, {"versions": None}, {"device": 1},
        {"trials": [entry | {"auroc": "0.7"}]}, {"trials": [entry | {"per_class": {"a": 1}}]},
        {"trials": [entry | {"best_epoch": {}}]},
        *({"trials": [entry | {"best_epoch": 1.0}], "config": config} for config in ({"epochs": "x"}, {})),
    ):  # fmt: skip
        path.write_text(json.dumps({**whole, **changes, "more": len(str(changes)) * "x"}))
        os.utime(path, ns=(0, len(str(changes)) * 1000))  # a file is read again when it has changed
        with pytest.raises(InputError, match="results.json: damaged; restore it from a copy, or remove its folder"):
            cell.results()
    for record in ([1], {"status": 3}, {"status": "finished", "options": [1]}, {"reason": INTERRUPTION, "began": "x"}):
        (job.folder / "job.json").write_text(json.dumps(record))
        assert job.record() == {}
    with pytest.raises(InputError, match="its options are damaged; use another --output"):
        refuse_changes({"arch": {"a": 1}, "format": 1}, {"arch": "densenet121"}, tmp_path, "another --output")


@pytest.mark.parametrize("change", [{"val_score": "1"}, {"seconds": None}, {"auroc": []}, {"val_score": None}])
def test_damaged_results_of_a_trial(tmp_path, change):
    readers.make_trials(tmp_path)
    readers.read_trials(tmp_path)
    path = tmp_path / "trial_0" / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match="result.json: damaged; remove it, and the trial is run again"):
        readers.read_trials(tmp_path)


def test_damaged_indices_of_caches(tmp_path):
    readers.make_cache(tmp_path)
    path = tmp_path / "cache" / "index.json"
    whole = json.loads(path.read_text())
    for change in ({"ids": 3}, {"ids": [1] * 5}, {"size": "8"}, {"size": -8}, {"sizes": [[1, 2]]}, {"bad": {"x": "y"}},
                   {"sizes": [["a", 2]] * 5}, {"sizes": [["8", 2]] * 5}, {"fingerprints": [None] * 5}, {"block": 0},
                   {"bad": [1]}):  # fmt: skip
        path.write_text(json.dumps(whole | change))
        with pytest.raises(InputError, match=r"index.json: not the index of a cache; choose another folder"):
            readers.read_cache(tmp_path)
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    readers.make_begun(tmp_path)
    progress = tmp_path / "cache" / "progress.jsonl"
    lines = progress.read_text().splitlines()
    damaged = ('{"block": 7}', "[1]", lines[0].replace('"block": 0', '"block": -1'), lines[0].replace("[[", '[["a",'))
    progress.write_text("\n".join([lines[1], *damaged, "[" * 9000]))
    built = caches.build(readers.cached_images(tmp_path), tmp_path / "cache")
    assert (len(built["sizes"]), built["finished"]) == (5, True)
    readers.read_cache(tmp_path)


@pytest.mark.parametrize("number", LACKS)
def test_what_the_machine_lacks_is_no_caches_fault(tmp_path, monkeypatch, number):
    def fails(*_args, **_more):
        raise OSError(number, os.strerror(number))

    readers.write_volume(tmp_path / "a.mha")
    data = readers.kept_volumes(tmp_path)
    monkeypatch.setattr(caches, "write_atomic", fails)
    monkeypatch.setattr(tempfile, "TemporaryFile", fails)
    for use in (lambda: data.load(0), lambda: caches.attach(data, tmp_path / "cache")):
        with pytest.raises(OSError, match=os.strerror(number)):
            use()


def test_what_a_kept_volume_lacks_is_made_anew(tmp_path):
    readers.make_kept(tmp_path)
    data = readers.kept_volumes(tmp_path)
    name = tmp_path / data._name(tmp_path / "a.mha")
    wanted = data.load(0)["image"]
    whole = name.read_bytes()
    for forged in (whole[:-100], b"PK", npy(claims((2, 2))), {"image": np.zeros(3)}, {"size": np.zeros(3)}, {
        "image": np.zeros((1, 2, 2, 2), ">f4"), "size": np.zeros(3)}, {"image": np.array([None])}):  # fmt: skip
        if isinstance(forged, dict):
            np.savez(name, **forged)
        else:
            name.write_bytes(forged)
        assert data.load(0)["image"].equal(wanted)


def test_a_cube_that_claims_terabytes_is_a_bad_file(tmp_path):
    readers.make_cubes(tmp_path)
    path = tmp_path / "subset0" / "1.2_global_0.npy"
    shutil.copy(path, path.with_name("1.3_global_0.npy"))
    (tmp_path / "subset0" / "1.2_local_0.npy").unlink()
    data = luna.open_splits(Request("luna", str(tmp_path)), ["train"])["train"]
    for form in ("terabytes", "overflow", "brackets", "objects", "another version"):
        (tmp_path / f"{data.ids[0]}.npy").write_bytes(FORGED[form])
        item = data[0]
        assert (item["index"], len(item["bad"])) == (1, 1)
        assert "not an .npy file of numbers, or a truncated one" in item["bad"][0]


def test_tables_with_fields_that_are_too_large(tmp_path):
    readers.make_tables(tmp_path)
    readers.read_tables(tmp_path)
    for name, read in (
        ("nodules.csv", luna.read_nodules), ("candidates_V2.csv", read_candidates),
        ("Data_Entry_2017.csv", lambda path: chest.read_entries(path.parent)), ("train.csv", chexpert.read_table),
        ("patients.csv", lambda path: read_patients(path.parent)),
    ):  # fmt: skip
        path = tmp_path / name
        path.write_text(path.read_text() + "c" * 200_000 + ',"' + "d" * 200_000)
        with pytest.raises(InputError, match=f"{name}: not a t"):
            read(path)


# Checkpoints ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": {"state": {}, "param_groups": []}}, {"method": 3}, {"step": "x"}, {"best": [1]},
        {"best": {"score": 1}}, {"since_best": None}, {"name": 5}, {"config": [1]}, {"images": 3}, {"images": None},
        {"step": -5}, {"step": 2.5}, {"step": True}, {"step": 10**30}, {"step": float("nan")}, {"over": "yes"},
        {"step": torch.tensor([1, 2])}, {"best": {"score": 1.0, "epoch": 1.0, "state": {"a": torch.ones(1)}}},
    ],
)  # fmt: skip
def test_damaged_states_of_runs(tmp_path, change):
    readers.make_run(tmp_path)
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    torch.save(saved | change, tmp_path / "last.pt")
    with pytest.raises(InputError) as caught:
        readers.read_run(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_an_optimizers_state_must_fit_its_parameters(tmp_path):
    readers.make_run(tmp_path)
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    moment = saved["optimizer"]["state"][0]["exp_avg"]
    saved["optimizer"]["state"][0]["exp_avg"] = torch.zeros(7)
    torch.save(saved, tmp_path / "last.pt")
    with pytest.raises(InputError, match=r"its checkpoint does not fit: the optimizer's exp_avg has shape \(7,\)"):
        readers.read_run(tmp_path)
    for forged in ("x", torch.eye(len(moment)).to_sparse()):
        saved["optimizer"]["state"][0]["exp_avg"] = forged
        torch.save(saved, tmp_path / "last.pt")
        with pytest.raises(InputError, match="the optimizer's state holds no plain numbers"):
            readers.read_run(tmp_path)
    saved["optimizer"]["state"][0]["exp_avg"] = moment
    group = saved["optimizer"]["param_groups"][0]
    for damaged in (group | {"betas": "x"}, {key: value for key, value in group.items() if key != "eps"}):
        saved["optimizer"]["param_groups"][0] = damaged
        torch.save(saved, tmp_path / "last.pt")
        with pytest.raises(InputError, match="the optimizer's options differ"):
            readers.read_run(tmp_path)
