"""How files are damaged, and made hostile: changes of bytes, and of what each format says of itself.

Every change is a function of a file's bytes, a `random.Random`, and the path of a marker that planted code would make
where a reader ran it. So a seed makes the same files again.
"""

import ast
import contextlib
import gzip
import io
import json
import os
import pickle
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from functools import cache
from random import Random

Change = Callable[[bytes, Random, str], bytes]

NUMBERS = (0, 1, 2, 3, 7, 8, 16, 127, 128, 255, 256, 1023, 32767, 32768, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1)
WORDS = (
    *("", "0", "-1", "1", "2", "3", "99999", "4294967296", "9223372036854775807", "99999999999999999999999", "nan"),
    *("inf", "-inf", "1e308", "1e-320", "0x10", "1_0", "%s", "%s%s%n", "%d", "%999999d", "a" * 300, "b" * 70_000),
    *("\x00", "\x1b[2J", "é", "\ud7ff", "../../etc/passwd", "/dev/zero", "/etc/passwd", "True", "null", "[]", "{}"),
    *('"', '"""', "'", ",", ",,,,", ";", "\t", "LIST", "LOCAL", "raw", "gzip", "1 1 1", "0 0 0", "-4 3 2", "a b c"),
    *("s%d.raw 1 2 1", "%s 1 5 1", "s%d%d 1 2 1", "s%n 1 2 1", "s%d 1 99999999 1", "s%d 1 2 0", "MET_LONG_LONG_ARRAY"),
)
VALUES = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", "1"),
    *("a" * 10_000, [], {}, [[]], [None], [0] * 1000, {"": None}, [[[[[]]]]], "\x00", "../x", "NaN", [1, 2], [1e400]),
)


# Bytes ---------------------------------------------------------------------------------------------


def any_bytes(data: bytes, rng: Random, marker: str = "") -> bytes:
    """Cut, flip, overwrite, insert, remove or repeat, one to three times."""
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        place = rng.randrange(len(made) + 1) if rng.random() < 0.5 else rng.randrange(min(len(made), 512) + 1)
        span = rng.choice((1, 2, 4, 16, 200))
        kind = rng.randrange(6)
        if kind == 0:
            del made[place:]
        elif kind == 1 and made:
            for _ in range(rng.choice((1, 2, 8, 64))):
                made[rng.randrange(len(made))] ^= 1 << rng.randrange(8)
        elif kind == 2:
            made[place : place + span] = rng.choice((bytes(span), b"\xff" * span, rng.randbytes(span)))[
                : len(made) - place
            ]
        elif kind == 3:
            made[place:place] = rng.choice((rng.randbytes(span), bytes(span), b"A" * span * 100))
        elif kind == 4:
            del made[place : place + span]
        else:
            made[place:place] = made[place : place + span * 10]
    return bytes(made)


def number_at(data: bytes, rng: Random, place: int, size: int, order: str | None = None) -> bytes:
    """Another number in the place of one of 1, 2, 4 or 8 bytes: an extreme, a neighbour, or any."""
    made, bits = bytearray(data), 8 * size
    if place + size > len(made):
        return any_bytes(data, rng)
    order = order or rng.choice(("little", "big"))
    before = int.from_bytes(made[place : place + size], order)
    value = rng.choice(
        (rng.choice(NUMBERS), before + 1, before - 1, 2 * before, 2**bits - 1, 2 ** (bits - 1), rng.getrandbits(bits))
    )
    made[place : place + size] = (value % 2**bits).to_bytes(size, order)
    return bytes(made)


def head(length: int, order: str | None = None) -> Change:
    """Numbers within the first `length` bytes."""

    def change(data: bytes, rng: Random, marker: str) -> bytes:
        size = rng.choice((1, 2, 4))
        return number_at(data, rng, rng.randrange(max(1, min(length, len(data)) - size)) // size * size, size, order)

    return change


def fields(places: Sequence[tuple[int, int]], order: str = "little") -> Change:
    """Numbers at given (place, size)."""
    return lambda data, rng, marker: number_at(data, rng, *rng.choice(places), order)


def one_of(*changes: Change) -> Change:
    """One of several changes."""
    return lambda data, rng, marker: rng.choice(changes)(data, rng, marker)


def within(unpack: Callable[[bytes], bytes], pack: Callable[[bytes], bytes], change: Change) -> Change:
    """A change of what is compressed."""
    return lambda data, rng, marker: pack(change(unpack(data), rng, marker))


def gzipped(change: Change) -> Change:
    """A change of what a gzip file holds."""
    return within(gzip.decompress, lambda data: gzip.compress(data, 1, mtime=0), change)


# Text ----------------------------------------------------------------------------------------------


def lines(separator: str, ends: str) -> Change:
    """Fields of a header of lines, which ends with the line that matches `ends`."""

    def change(data: bytes, rng: Random, marker: str) -> bytes:
        text = data.decode("latin-1")
        found = re.search(ends, text, re.MULTILINE)
        place = found.end() if found else len(text)
        rows, rest = text[:place].split("\n"), text[place:]
        for _ in range(rng.choice((1, 1, 2, 3))):
            i, kind = rng.randrange(len(rows)), rng.randrange(8)
            key, mark, value = rows[i].partition(separator)
            if kind < 4:
                rows[i] = f"{key}{mark or separator} {rng.choice(WORDS)}"
            elif kind == 4:
                rows[i] = (
                    f"{key}{mark} {' '.join(rng.choice(WORDS) if rng.random() < 0.5 else w for w in value.split())}"
                )
            elif kind == 5 and len(rows) > 1:
                del rows[i]
            elif kind == 6:
                rows.insert(i, rows[rng.randrange(len(rows))])
            else:
                rows.insert(i, f"{rng.choice(WORDS)}{separator}{rng.choice(WORDS)}")
        return ("\n".join(rows) + rest).encode("latin-1", "replace")

    return change


def table(data: bytes, rng: Random, marker: str) -> bytes:
    """Cells of a table, with commas or blanks."""
    text = data.decode("utf-8", "replace")
    comma = "," if "," in text else " "
    rows = [row.split(comma) for row in text.split("\n")]
    for _ in range(rng.choice((1, 1, 2, 4))):
        row = rows[rng.choice((0, rng.randrange(len(rows))))]
        i, kind = rng.randrange(len(row)), rng.randrange(6)
        if kind < 3:
            row[i] = rng.choice((*WORDS, "c" * 200_000, "=1+1", '"a', "\r", "\n\n", "\ufeff"))
        elif kind == 3:
            del row[i]
        elif kind == 4:
            row.insert(i, rng.choice(row))
        else:
            rows.insert(rng.randrange(len(rows)), rng.choice(rows))
        rows = [row for row in rows if row] or [[""]]
    return "\n".join(comma.join(row) for row in rows).encode("utf-8", "surrogatepass")


def in_json(data: bytes, rng: Random, marker: str) -> bytes:
    """Values of a JSON file, or of a line of one in JSON a line."""
    rows = data.decode("utf-8").splitlines()
    whole = len(rows) > 1 and rows[1][:1] == "{"
    i = rng.randrange(len(rows)) if whole else 0
    content = json.loads(rows[i] if whole else data)
    if rng.random() < 0.1:
        text = rng.choice(
            ("[" * 100_000, '{"a":' * 50_000, "[]", "1", "null", '"x"', "", "{", "9" * 5000, "[1e999]", "NaN")
        )
    else:
        for _ in range(rng.choice((1, 1, 2, 3))):
            content = _changed(content, rng)
        text = json.dumps(content)
    rows = [*rows[:i], text, *rows[i + 1 :]] if whole else [text]
    return "\n".join(rows).encode("utf-8", "surrogatepass")


def _changed(content: object, rng: Random) -> object:
    """A JSON value with another in some place."""
    if not isinstance(content, dict | list) or not content or rng.random() < 0.05:
        return rng.choice(VALUES)
    made = dict(content) if isinstance(content, dict) else list(content)
    key = rng.choice(list(made)) if isinstance(made, dict) else rng.randrange(len(made))
    kind = rng.randrange(8)
    if kind == 0:
        del made[key]
    elif kind == 1 and isinstance(made, dict):
        made[rng.choice(("", "x", "0", key))] = rng.choice(VALUES)
    elif kind == 1:
        made.insert(key, rng.choice(VALUES))
    elif kind == 2:
        made[key] = rng.choice(VALUES)
    else:
        made[key] = _changed(made[key], rng)
    return made


# Pictures ------------------------------------------------------------------------------------------


def png(data: bytes, rng: Random, marker: str) -> bytes:
    """Chunks of a PNG, with checksums that are right."""
    place, chunks = 8, []
    while place + 8 <= len(data):
        length, kind = struct.unpack(">I4s", data[place : place + 8])
        chunks.append([kind, data[place + 8 : place + 8 + length]])
        place += 12 + length
    i, how = rng.randrange(len(chunks)), rng.randrange(6)
    if rng.random() < 0.4:
        i, how = 0, 0
    if how < 2:
        chunks[i][1] = number_at(
            chunks[i][1], rng, rng.randrange(max(1, len(chunks[i][1]))), rng.choice((1, 1, 4)), "big"
        )
    elif how == 2:
        chunks[i][0] = rng.choice(
            (b"IDAT", b"PLTE", b"tRNS", b"iCCP", b"zTXt", b"acTL", b"eXIf", b"gAMA", b"IEND", b"abcd")
        )
    elif how == 3:
        del chunks[i]
    elif how == 4:
        chunks.insert(i, chunks[rng.randrange(len(chunks))])
    else:
        bomb = b"a\x00\x00" + zlib.compress(bytes(rng.choice((10, 10_000_000))))
        chunks.insert(1, [rng.choice((b"iCCP", b"zTXt", b"eXIf", b"tRNS", b"acTL")), bomb])
    made = [struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks]
    return data[:8] + b"".join(made)


def tiff(data: bytes, rng: Random, marker: str) -> bytes:
    """Entries of a TIFF's first directory."""
    start = struct.unpack("<I", data[4:8])[0]
    count = struct.unpack("<H", data[start : start + 2])[0]
    if rng.random() < 0.1:
        return number_at(data, rng, *rng.choice(((2, 2), (4, 4), (start, 2))), "little")
    entry = start + 2 + 12 * rng.randrange(count)
    place, size = rng.choice(((0, 2), (2, 2), (4, 4), (8, 4), (8, 2), (8, 4)))
    made = number_at(data, rng, entry + place, size, "little")
    if rng.random() < 0.3:
        made = (
            made[:entry]
            + struct.pack("<H", rng.choice((256, 257, 258, 259, 262, 273, 277, 278, 279, 317, 339, 347)))
            + made[entry + 2 :]
        )
    return made


def jpeg(data: bytes, rng: Random, marker: str) -> bytes:
    """Segments of a JPEG."""
    starts = [found.start() for found in re.finditer(rb"\xff[\xc0-\xfe]", data[:2000])]
    start = rng.choice(starts or [0])
    return number_at(data, rng, start + rng.randrange(20), rng.choice((1, 1, 2)), "big")


def ppm(data: bytes, rng: Random, marker: str) -> bytes:
    """Words of a portable pixmap's header."""
    words = data.split(maxsplit=4)
    words[rng.randrange(len(words[:4]))] = rng.choice((*WORDS, "P3", "P1", "P6", "Pf", "#")).encode("utf-8", "replace")
    return rng.choice((b" ", b"\n", b"\n#c\n")).join(words)


def number_element(element: int, *values: int) -> bytes:
    """An element of DICOM's group 0028 with 16-bit numbers."""
    return struct.pack("<HH2sH", 0x28, element, b"US", 2 * len(values)) + struct.pack(f"<{len(values)}H", *values)


def two_ways(data: bytes, rng: Random) -> bytes:
    """A DICOM file of which readers make several sizes."""
    place = data.find(b"\x28\0\x10\0US\x02\0")  # of its rows
    if place < 0:
        return any_bytes(data, rng)
    rows, large = data[place : place + 10], rng.choice((7, 12, 6000, 60_000, 65_535))
    frames = struct.pack("<HH2sH", 0x28, 8, b"IS", 2) + rng.choice((b"0 ", b"-1", b"2 ", b" \0", b"1\\", b"\xb2 "))
    made = rng.choice((
        number_element(0x10, large) + rows, rows + number_element(0x10, large), number_element(0x10, large, 6),
        b"\xfe\xff\x0d\xe0\0\0\0\0" + number_element(0x10, large), frames + number_element(0x10, large),
        b"\xfe\xff\xdd\xe0\0\0\0\0" + number_element(0x10, large), number_element(0x10),
        number_element(2, large) + rows, rows + number_element(0x11, large), rows + number_element(0x100, 8),
    ))  # fmt: skip
    made = data[:place] + made + data[place + 10 :]
    if rng.random() < 0.3:
        made = made.replace(number_element(0x100, 16), number_element(0x100, *rng.choice(((8, 16), (64, 16), ()))))
    return made


def dicom(data: bytes, rng: Random, marker: str) -> bytes:
    """Elements of an explicit little-endian DICOM file: tag, kind, length or value."""
    if rng.random() < 0.2:
        return two_ways(data, rng)
    found, place = [], 132
    while place + 8 <= len(data):
        kind = data[place + 4 : place + 6]
        long = kind in (b"OB", b"OW", b"OF", b"SQ", b"UT", b"UN", b"OD", b"OL", b"UC", b"UR")
        head_length = 12 if long else 8
        length = struct.unpack_from("<I" if long else "<H", data.ljust(place + 12, b"\0"), place + (8 if long else 6))[
            0
        ]
        found.append((place, head_length, length))
        place += head_length + length
    place, head_length, length = rng.choice(found)
    how = rng.randrange(6)
    if how == 0:
        return number_at(data, rng, place + rng.choice((0, 2)), 2, "little")
    if how == 1:
        kinds = (b"US", b"SS", b"UL", b"DS", b"IS", b"SQ", b"OB", b"OW", b"UN", b"LO", b"FD", b"AT", b"PN", b"zz")
        return data[: place + 4] + rng.choice(kinds) + data[place + 6 :]
    if how == 2:
        return number_at(data, rng, place + (8 if head_length == 12 else 6), 4 if head_length == 12 else 2, "little")
    if how == 3:
        return data[:place] + data[place + head_length + length :]
    value = rng.choice(WORDS).encode("utf-8", "replace")[:60]
    value += b" " * (len(value) % 2)
    if how == 4 and length <= 4 and head_length == 8:
        return number_at(data, rng, place + 8, max(1, length // 2 * 2) if length in (2, 4) else 1, "little")
    if head_length == 8:
        packed = data[place : place + 6] + struct.pack("<H", len(value))
        return data[:place] + packed + value + data[place + 8 + length :]
    return number_at(data, rng, place + head_length + rng.randrange(max(1, min(length, 64))), 1)


def deflated_dicom(data: bytes, rng: Random, marker: str) -> bytes:
    """What a deflated DICOM file holds, or one that holds a bomb."""
    place = 144 + struct.unpack_from("<I", data, 140)[0]  # where its header says that it ends
    inner = zlib.decompress(data[place:], -15)
    packer = zlib.compressobj(1, zlib.DEFLATED, -15)
    if rng.random() < 0.05:
        return data[:place] + packer.compress(inner) + packer.flush(zlib.Z_SYNC_FLUSH) + bomb()
    inner = dicom(bytes(128) + b"DICM" + inner, rng, marker)[132:]
    return data[:place] + packer.compress(inner) + packer.flush()


@cache
def bomb() -> bytes:
    """A DICOM element of half a gigabyte, deflated."""
    packer, block = zlib.compressobj(1, zlib.DEFLATED, -15), bytes(2**20)
    head = b"\xfc\xff\xfc\xffOB\0\0" + struct.pack("<I", 2**29)
    return packer.compress(head) + b"".join(packer.compress(block) for _ in range(2**9)) + packer.flush()


# Arrays --------------------------------------------------------------------------------------------

SHAPES = (
    *((), (0,), (1,), (-1,), (2**31,), (2**62, 2**62), (2**20, 2**20), (0, 2**62), (2, 3), ("a",), (1.5,), (None,)),
    *((1,) * 33, (1,) * 70, (True, 2), 5, [2], "x", (10**30,), (2, -3, 4)),
)
DTYPES = (
    *("|O", "<f4", "<f8", ">f4", "<f2", "|u1", "<i8", "<U4", "|S9", "<M8[s]", "<m8[ns]", "|V8", "<c16", "|b1", "<f16"),
    *("x", "", 3, None, [("a", "<f4")], [("a", "|O"), ("b", "<f4")], [("a", "<f4", (2**20, 2**20))], "<U999999999"),
    *(("<f4", (4,)), "O,O", "2f4", "<V0", "|S0", "<f3"),
)


class Planted:
    """Makes the marker where it is unpickled."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.marker,)


def npy(data: bytes, rng: Random, marker: str) -> bytes:
    """The header of an .npy file, or an array of objects with planted code."""
    length = struct.unpack("<H", data[8:10])[0]
    header, rest = ast.literal_eval(data[10 : 10 + length].decode("latin-1")), data[10 + length :]
    kind = rng.randrange(8)
    if kind < 3:
        header["shape"] = rng.choice((*SHAPES, (*header["shape"], rng.choice((1, 2, 2**40)))))
    elif kind < 5:
        header["descr"] = rng.choice(DTYPES)
    elif kind == 5:
        header["fortran_order"] = rng.choice((True, 1, None, "x"))
    elif kind == 6:
        header |= {"descr": "|O", "shape": (1,)}
        rest = pickle.dumps([Planted(marker)], protocol=rng.randrange(5))
    else:
        header[rng.choice(("x", "descr", "shape"))] = rng.choice(("x", 1, None, "-" * 3000))
    text = rng.choice((repr(header),) * 9 + ("[" * 5000, "-" * 8000 + "1", f"__import__('os').mkdir({marker!r})"))
    text = text.ljust(64) + "\n"
    version = rng.choice((b"\x01\x00",) * 8 + (b"\x02\x00", b"\x03\x00", b"\x09\x09"))
    wide = version[0] in (2, 3)
    return data[:6] + version + struct.pack("<I" if wide else "<H", len(text) % 65536) + text.encode() + rest


ZIP_FIELDS = {
    b"PK\x03\x04": ((4, 2), (6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2)),
    b"PK\x01\x02": ((6, 2), (8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (32, 2), (38, 4), (42, 4)),
    b"PK\x05\x06": ((4, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2)),
    b"PK\x06\x06": ((4, 8), (24, 8), (32, 8), (40, 8), (48, 8)),
}


def zip_fields(data: bytes, rng: Random, marker: str) -> bytes:
    """Numbers of a zip archive's directories."""
    places = [(found.start(), mark) for mark in ZIP_FIELDS for found in re.finditer(re.escape(mark), data)]
    start, mark = rng.choice(places or [(0, b"PK\x03\x04")])
    place, size = rng.choice(ZIP_FIELDS[mark])
    return number_at(data, rng, start + place, size, "little")


def zip_member(change: Change, pattern: str = ".") -> Change:
    """A change of one member whose name matches; the archive is right."""

    def changed(data: bytes, rng: Random, marker: str) -> bytes:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(info, archive.read(info)) for info in archive.infolist()]
        fitting = [i for i, (info, _) in enumerate(members) if re.search(pattern, info.filename)]
        chosen, how = rng.choice(fitting), rng.randrange(12)
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w") as archive:
            for i, (info, content) in enumerate(members):
                if i == chosen and how == 0:
                    continue
                name = "x" if i == chosen and how == 1 else info.filename
                content = change(content, rng, marker) if i == chosen and how > 1 else content
                archive.writestr(zipfile.ZipInfo(name), content, info.compress_type)
        return made.getvalue()

    return changed


# Pickles -------------------------------------------------------------------------------------------

GLOBALS = (
    *("os system", "posix system", "builtins eval", "builtins exec", "builtins getattr", "subprocess Popen"),
    *("numpy dtype", "numpy ndarray", "numpy.core.multiarray _reconstruct", "numpy._core.multiarray scalar"),
    *("numpy._core.numeric _frombuffer", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"),
    *("torch._utils _rebuild_sparse_tensor", "torch._utils _rebuild_qtensor", "torch.storage UntypedStorage"),
    *("torch FloatStorage", "torch DoubleStorage", "torch BoolStorage", "torch.nn.parameter Parameter"),
    *("torch._utils _rebuild_meta_tensor_no_storage", "torch._tensor _rebuild_from_type_v2", "torch Tensor"),
    *("torch Size", "torch device", "collections OrderedDict", "argparse Namespace", "_codecs encode"),
    *("torch.serialization _get_layout", "torch float64", "torch bfloat16", "torch complex64", "torch quint8"),
    *("haiku x", "jax x", "builtins bytearray", "datetime datetime", "pathlib PosixPath", "functools partial"),
)  # fmt: skip
FRAGMENTS = (
    b"N\x85" * 2000, b"}" * 500 + b"Ns" * 10, b"]" * 5000, b"(" * 500, b"2" * 300, b"0" * 3, b"\x8f", b"\x90", b"\x91",
    b"\x97", b"\x98", b"\x82\x01", b"r\xff\xff\xff\x3f", b"j\xff\xff\xff\x7f", b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7fA",
    b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x8b\xff\xff\xff\x7fA", b"B\xff\xff\xff\x7fA", b"X\xff\xff\xff\xffA",
    b"I" + b"9" * 5000 + b"\n", b"F1e999\n", b"S'\\xff'\n", b"Pid\n", b"Q", b"b", b"R", b"\x81", b"\x92", b"\x93",
    b"u", b"s",
)  # fmt: skip


def planted(marker: str, rng: Random) -> bytes:
    """Opcodes that make the marker, and leave something on the stack."""
    text = pickle.dumps(marker, protocol=0)[:-1].rsplit(b"p0\n")[0]
    return rng.choice((
        b"cposix\nmkdir\n(" + text + b"tR", b"cos\nmkdir\n(" + text + b"tR", b"(" + text + b"ios\nmkdir\n",
        b"cbuiltins\neval\n(V__import__('os').mkdir(" + repr(marker).encode() + b")\ntR",
        b"cbuiltins\ngetattr\n(cos\nmkdir\nV__call__\ntR(" + text + b"tR", b"(cposix\nmkdir\n" + text + b"o",
    ))  # fmt: skip


def opcodes(data: bytes, rng: Random, marker: str) -> bytes:
    """Opcodes of a pickle, and their arguments."""
    places = []
    with contextlib.suppress(Exception):
        places += [(op, place) for op, _, place in pickletools.genops(data)]
    ends = [place for _, place in places[1:]] + [len(data)]
    parts = [data[place:end] for (_, place), end in zip(places, ends)]
    for _ in range(rng.choice((1, 1, 2, 3))):
        i, how = rng.randrange(len(parts)), rng.randrange(9)
        name = places[i][0].name if i < len(places) else ""
        if how == 0:
            parts.insert(i, planted(marker, rng))
        elif how == 1:
            parts.insert(i, rng.choice(FRAGMENTS))
        elif how == 2:
            parts[i] = rng.choice(parts)
        elif how == 3 and len(parts) > 2:
            del parts[i]
        elif how == 4:
            parts.insert(i, b"c" + rng.choice(GLOBALS).replace(" ", "\n").encode() + b"\n")
        elif how == 5:
            found = [k for k, part in enumerate(parts) if part[:1] == b"c"] or [i]
            parts[rng.choice(found)] = b"c" + rng.choice(GLOBALS).replace(" ", "\n").encode() + b"\n"
        elif "INT" in name or "LONG" in name or how == 6:
            found = [k for k, part in enumerate(parts) if part[:1] in b"KMJ" and len(part) in (2, 3, 5)] or [i]
            parts[rng.choice(found)] = b"J" + struct.pack("<i", rng.choice((0, 1, -1, 2, 1000, 2**31 - 1, -(2**31))))
        else:
            parts[i] = any_bytes(parts[i], rng)
    return b"".join(parts)


def safetensors(data: bytes, rng: Random, marker: str) -> bytes:
    """The header of a safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    if rng.random() < 0.2:
        return number_at(data, rng, 0, 8, "little")
    text = in_json(data[8 : 8 + length], rng, marker)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]
