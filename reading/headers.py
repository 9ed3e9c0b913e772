"""What volumes' headers say, read here before a C library sees them.

SimpleITK's readers take a header's word: names of files become formats of printf, counts become allocations, and what
a cut file lacks becomes zeros. So each file is read up to its values here first. A header that is not of the format's
own fields, or claims more than its file can hold, is refused by the field's name.
"""

import contextlib
import gzip
import math
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from medssl.errors import UnreadableImage
from medssl.reading.arrays import DEFLATE

BLOCK = 2**22  # bytes decompressed at a time
LONGEST = 2**15  # bytes of a header's line, of which MetaIO has room for about as many
LONGEST_FIELD = 500  # letters of a field of NRRD's: ITK repeats one that it cannot read, and has room for about 1000
MOST_LINES = 2**16  # with a DICOM header's elements, or the names of slices
MOST_FILES = 100_000  # of one volume
MOST_BYTES = 2**42  # of one volume

READERS = {
    **dict.fromkeys((".mhd", ".mha"), "MetaImageIO"),
    **dict.fromkeys((".nii", ".nii.gz"), "NiftiImageIO"),
    **dict.fromkeys((".nrrd", ".nhdr"), "NrrdImageIO"),
}


def reader_of(path: Path) -> str:
    """The reader of SimpleITK that a file's extension asks for, after a look at the header.

    Raises:
        UnreadableImage: for a header that is none, or that the file does not live up to. Others, for a damaged one.
    """
    end = next((end for end in READERS if path.name.lower().endswith(end)), None)
    with open(path, "rb") as file:  # raises what the system says of the path
        if end in (".mhd", ".mha"):
            _check_meta(path, file)
        elif end in (".nrrd", ".nhdr"):
            _check_nrrd(path, file)
        elif end:
            _check_nifti(path, file)
    if end is None:
        raise UnreadableImage(f"not a volume that can be read ({', '.join(READERS)})")
    return READERS[end]


# Fields --------------------------------------------------------------------------------------------


def _lines(file: BinaryIO, ends: str | None = None) -> Iterator[str]:
    """A header's lines, up to one that matches `ends`, which is given last.

    Raises:
        UnreadableImage: for lines that are no text, as values are.
    """
    for _ in range(MOST_LINES):
        line = file.readline(LONGEST).decode("latin-1")
        text = line.rstrip("\r\n")
        if (line and not line.endswith("\n")) and len(line) == LONGEST:
            raise UnreadableImage("its header has a line that is too long, or is none")
        if re.search(r"[\x00-\x08\x0a-\x1f\x7f]", text):
            raise UnreadableImage(f"its header has a line that is no text: {_shown(text)}")
        yield text
        if not line or (ends and re.match(ends, text)):
            return
    raise UnreadableImage("its header has too many lines")


def _shown(text: str) -> str:
    """The start of a header's text, for messages."""
    return ascii(text[:60])


def _numbers(key: str, text: str, count: int, kind: type = float) -> list:
    """The `count` numbers of a field."""
    words = text.split()
    try:
        values = [kind(word) for word in words]
        fits = len(values) == count and all(map(math.isfinite, values)) and not re.search(r"[^\d\s.eE+-]", text)
    except (ValueError, OverflowError):
        fits = False
    if not fits or (kind is int and any(abs(value) >= 2**62 for value in values)):
        what = "numbers" if kind is float else "whole numbers"
        raise UnreadableImage(f"damaged: its header says {key} = {_shown(text)}; {count} {what} are needed")
    return values


def _sizes(key: str, text: str, count: int) -> list[int]:
    sizes = _numbers(key, text, count, int)
    if min(sizes) < 1 or math.prod(sizes) * 8 > MOST_BYTES:
        raise UnreadableImage(f"its header claims {key} = {_shown(text)}")
    return sizes


def numbered_files(pattern: str, low: int, high: int, step: int) -> list[str]:
    """The files of a pattern with one `%d`, in which numbers from `low` to `high` stand.

    Raises:
        UnreadableImage: for a pattern with anything else that C's printf would act on, and for no or too many files.
    """
    if not re.fullmatch(r"[^%]*%0?[1-9]?[di][^%]*", pattern):
        raise UnreadableImage(f"its data files are {_shown(pattern)}; a pattern has one %d, as slice%03d.raw has")
    numbers = range(low, high + (1 if step > 0 else -1), step) if step else ()
    if not 0 < len(numbers) <= MOST_FILES:
        raise UnreadableImage(f"its data files are {_shown(pattern)} from {low} to {high} in steps of {step}")
    return [pattern % number for number in numbers]


def _check_files(path: Path, names: Sequence[str], needed: Sequence[int]) -> None:
    """Raise UnreadableImage where one of a header's data files is missing, or holds less than needed."""
    for name, length in zip(names, needed):
        data = path.parent / name
        if not data.is_file():
            raise UnreadableImage(f"its data file {data.name} is missing")
        _check_length(data.name, data.stat().st_size, length)


def _check_length(name: str, length: int, needed: int) -> None:
    if length < needed:
        raise UnreadableImage(f"truncated: {name} holds {length} of {needed} bytes")


def _check_deflated(name: str, file: BinaryIO, length: int, needed: int, wbits: int = 47) -> None:
    """Raise UnreadableImage where `length` deflated bytes from the file's place on do not hold `needed`.

    wbits: of zlib; 47 knows zlib's streams from gzip's.
    """
    if needed > DEFLATE * length:
        raise UnreadableImage(f"truncated: {name} has {length} compressed bytes for {needed}")
    found, unpacker = 0, zlib.decompressobj(wbits)
    while found < needed and length > 0 and not unpacker.eof:
        block = file.read(min(BLOCK, length))
        length -= len(block)
        if not block:
            break
        while block and found < needed:
            found += len(unpacker.decompress(block, BLOCK))
            block = unpacker.unconsumed_tail
    _check_length(name, found, needed)


# MetaImage -----------------------------------------------------------------------------------------

META_BYTES = {
    **{"CHAR": 1, "UCHAR": 1, "SHORT": 2, "USHORT": 2, "INT": 4, "UINT": 4, "LONG": 4, "ULONG": 4},
    **{"LONG_LONG": 8, "ULONG_LONG": 8, "FLOAT": 4, "DOUBLE": 8},
}
META_COUNTS = {  # numbers of a field, as a power of the dimensions
    **dict.fromkeys(("ElementSpacing", "ElementSize", "Offset", "Position", "Origin", "CenterOfRotation"), 1),
    **dict.fromkeys(("TransformMatrix", "Rotation", "Orientation"), 2),
    **dict.fromkeys(("ElementMin", "ElementMax", "ElementToIntensityFunctionSlope", "CompressionLevel"), 0),
    **dict.fromkeys(("ElementToIntensityFunctionOffset", "ID", "ParentID"), 0),
}
META_NEEDED = ("NDims", "DimSize", "ElementType", "ElementDataFile")
META_YES = ("BinaryData", "BinaryDataByteOrderMSB", "ElementByteOrderMSB", "CompressedData")
META_OTHERS = ("AnatomicalOrientation", "ObjectType", "ElementNumberOfChannels", "HeaderSize", "CompressedDataSize")
META_USED = {*META_NEEDED, *META_COUNTS, *META_YES, *META_OTHERS}
# What MetaIO copies into places of 255 bytes, and over what is behind them: these fields, and all fields' names.
META_TEXTS = ("Comment", "Name", "AcquisitionDate", "Modality", "DistanceUnits", "ObjectSubType")
LONGEST_TEXT = 254


def _check_meta(path: Path, file: BinaryIO) -> None:
    """MetaImage: the fields have their kinds of values, and the data files are there and as long as these say."""
    fields = _meta_fields(file)
    for key in META_NEEDED:
        if key not in fields:
            raise UnreadableImage(f"its header lacks {key}")
    (dims,) = _numbers("NDims", fields["NDims"], 1, int)
    if not 1 <= dims <= 10:
        raise UnreadableImage(f"its header says NDims = {dims}")
    written = fields["ElementDataFile"]
    local, many = written.lower() == "local", "%" in written or written.startswith("LIST")
    if not local and not many:
        _check_files(path, [written], [0])
    sizes = _sizes("DimSize", fields["DimSize"], dims)
    _check_meta_values(fields, dims)
    needed = _meta_bytes(fields, sizes)
    if many:
        _check_meta_files(path, _meta_names(file, written, sizes), fields, needed)
    elif local:
        _check_meta_data(path, file.tell(), fields, needed)
    else:
        _check_meta_data(path.parent / written, 0, fields, needed)


def _meta_fields(file: BinaryIO) -> dict[str, str]:
    """The header's fields, the last of which is ElementDataFile; values may follow it. Of a field that is not used,
    any text, and the first where there are several."""
    fields: dict[str, str] = {}
    for line in _lines(file, r"\s*ElementDataFile\s*[=:]"):
        if not line.strip():
            continue
        key, *rest = (part.strip() for part in re.split("[=:]", line, maxsplit=1))  # MetaIO takes both
        if not rest or not 0 < len(key) <= LONGEST_TEXT:
            raise UnreadableImage(f"its header has a line that is no field: {_shown(line)}")
        if key in fields and key in META_USED:
            raise UnreadableImage(f"its header says {key} twice")
        if (len(rest[0]) > 2000 and key in META_USED) or (not rest[0] and key in META_NEEDED):
            raise UnreadableImage(f"damaged: its header says {key} = {_shown(rest[0])}")
        if key in META_TEXTS and len(rest[0]) > LONGEST_TEXT:
            raise UnreadableImage(f"its header has a {key} of more than {LONGEST_TEXT} letters, which is not read")
        fields.setdefault(key, rest[0])
    return fields


def _yes(fields: dict[str, str], key: str, otherwise: str = "False") -> bool:
    return fields.get(key, otherwise).lower() in ("true", "1")


def _check_meta_values(fields: dict[str, str], dims: int) -> None:
    for key, value in fields.items():
        if key in META_COUNTS:
            one_more = META_COUNTS[key] == 1 and len(value.split()) == dims + 1  # of time, which MetaIO passes over
            _numbers(key, value, dims ** META_COUNTS[key] + one_more)
        elif key in META_YES and value.lower() not in ("true", "false", "1", "0"):
            raise UnreadableImage(f"its header says {key} = {_shown(value)}, which is neither True nor False")
        elif key == "AnatomicalOrientation" and not re.fullmatch(rf"[A-Za-z?]{{0,{dims}}}", value):
            raise UnreadableImage(f"its header says {key} = {_shown(value)}; at most {dims} letters are read")
        elif key == "ObjectType" and value != "Image":
            raise UnreadableImage(f"its header says {key} = {_shown(value)}, which is no Image")


def _meta_bytes(fields: dict[str, str], sizes: Sequence[int]) -> int:
    """How many bytes the values have, at least."""
    kind = fields["ElementType"].removeprefix("MET_")
    if kind not in META_BYTES:
        raise UnreadableImage(f"its header says ElementType = {_shown(fields['ElementType'])}, which is not read")
    (channels,) = _numbers("ElementNumberOfChannels", fields.get("ElementNumberOfChannels", "1"), 1, int)
    if not 1 <= channels <= 4096:
        raise UnreadableImage(f"its header says ElementNumberOfChannels = {channels}")
    count = math.prod(sizes) * channels
    if not _yes(fields, "BinaryData", "True"):
        return 2 * count - 1  # a digit each, and blanks between
    return count * META_BYTES[kind]


def _check_meta_data(data: Path, start: int, fields: dict[str, str], needed: int) -> None:
    """A single file with the values from byte `start` on, or after as many as HeaderSize says."""
    (head,) = _numbers("HeaderSize", fields.get("HeaderSize", "0"), 1, int)
    length = data.stat().st_size - start
    if head < -1 or (head > 0 and start) or head > length:
        raise UnreadableImage(f"its header says HeaderSize = {head}")
    if not _yes(fields, "CompressedData"):
        _check_length(data.name, length - max(0, head), needed)
        if not _yes(fields, "BinaryData", "True"):
            _check_text(data, start + max(0, head))
        return
    (squeezed,) = _numbers("CompressedDataSize", fields.get("CompressedDataSize", "0"), 1, int)
    if start and "CompressedDataSize" not in fields:  # of what is in the header's own file, ITK asks for it
        raise UnreadableImage("its header lacks CompressedDataSize")
    if squeezed < 0 or head or (start and not squeezed):
        raise UnreadableImage(f"its header says CompressedDataSize = {squeezed} and HeaderSize = {head}")
    _check_length(data.name, length, squeezed)
    with open(data, "rb") as file:
        file.seek(start)
        _check_deflated(data.name, file, squeezed or length, needed)


def _check_text(data: Path, start: int) -> None:
    """Raise UnreadableImage where text from byte `start` on holds more than numbers, of which older MetaIO makes zeros,
    or ends in one: MetaIO wants to see that it ends."""
    last = b""
    with open(data, "rb") as file:
        file.seek(start)
        while part := file.read(2**20):
            if re.search(rb"[^\d\s.eE+\-naifNAIF]", part):
                raise UnreadableImage("its values are not such as its header says")
            last = part
    if not last[-1:].isspace():
        raise UnreadableImage(f"{data.name} has numbers as text, which must end in a blank or a new line")


def _check_meta_files(path: Path, names: Sequence[str], fields: dict[str, str], needed: int) -> None:
    """Several files with the values, each after as many bytes as HeaderSize says."""
    (head,) = _numbers("HeaderSize", fields.get("HeaderSize", "0"), 1, int)
    squeezed = _yes(fields, "CompressedData")
    each = 0 if squeezed else needed // len(names) + max(0, head)
    _check_files(path, names, [each] * len(names))
    if squeezed:
        raise UnreadableImage("its values are compressed in several files; only those of one are read")


def _meta_names(file: BinaryIO, written: str, sizes: Sequence[int]) -> list[str]:
    """The data files of a list, which follows the header, or of a pattern: one for each last index."""
    if written.startswith("LIST"):
        if written.split() not in (["LIST"], ["LIST", f"{len(sizes) - 1}"], ["LIST", f"{len(sizes) - 1}D"]):
            raise UnreadableImage(f"its header says ElementDataFile = {_shown(written)}; lists name slices")
        names = [line.strip() for line in _lines(file) if line.strip()]
    else:
        pattern, *words = written.split()
        if len(words) not in (0, 1, 3):  # of two numbers ITK makes steps of zero
            raise UnreadableImage(f"its header says ElementDataFile = {_shown(written)}; three numbers are needed")
        low, high, step = (1, sizes[-1], 1)
        if words:
            low, *more = _numbers("ElementDataFile", " ".join(words), len(words), int)
            high, step = more or (low + sizes[-1] - 1, 1)
        names = numbered_files(pattern, low, high, step) if step > 0 else []
    if len(names) != sizes[-1]:
        raise UnreadableImage(f"its header names {len(names)} data files for {sizes[-1]} slices")
    return names


# NIfTI ---------------------------------------------------------------------------------------------

NIFTI_BITS = {2: 8, 4: 16, 8: 32, 16: 32, 32: 64, 64: 64, 128: 24, 256: 8, 512: 16, 768: 32, 1024: 64, 1280: 64}
NIFTI_BITS |= {1792: 128, 2304: 32}


def _check_nifti(path: Path, file: BinaryIO) -> None:
    """NIfTI: ITK fills what a truncated file lacks with zeros or noise."""
    zipped = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    if zipped and not path.name.lower().endswith(".gz"):
        raise UnreadableImage("gzipped, which its name does not say; rename it so that it ends in .nii.gz")
    with gzip.open(file) if zipped else open(path, "rb") as content:
        needed = _nifti_bytes(content.read(540))
    length = path.stat().st_size
    if not zipped:
        _check_length(path.name, length, needed)
        return
    if needed > DEFLATE * length:
        raise UnreadableImage(f"truncated: {path.name} has {length} compressed bytes for {needed}")
    file.seek(-4, 2)
    if struct.unpack("<I", file.read(4))[0] != needed % 2**32:
        # Cut short, or written in several parts, or with something behind: only reading it tells.
        found = 0
        with gzip.open(path) as content, contextlib.suppress(EOFError):
            while found < needed and (block := content.read1(BLOCK)):
                found += len(block)
        _check_length(path.name, found, needed)


def _nifti_bytes(head: bytes) -> int:
    """How many bytes a file has whose first 540 are these, at least."""
    for order in "<>":
        if len(head) >= 348 and struct.unpack_from(order + "i", head)[0] == 348:
            sizes, kind = struct.unpack_from(order + "8h", head, 40), struct.unpack_from(order + "h", head, 70)[0]
            start, magic = struct.unpack_from(order + "f", head, 108)[0], head[344:348]
            break
        if len(head) >= 540 and struct.unpack_from(order + "i", head)[0] == 540:
            sizes, kind = struct.unpack_from(order + "8q", head, 16), struct.unpack_from(order + "h", head, 12)[0]
            start, magic = struct.unpack_from(order + "q", head, 168)[0], head[4:8]
            break
    else:
        raise UnreadableImage("not a NIfTI file, or a truncated one")
    if magic[:1] == b"n" and magic[1:2] == b"i":
        raise UnreadableImage("a NIfTI header whose values are in another file; only those of one file are read")
    if not 1 <= sizes[0] <= 7 or sizes[1] < 1 or min(sizes[1 : 1 + sizes[0]]) < 0:
        raise UnreadableImage(f"its header says dim = {list(sizes)}")
    if kind not in NIFTI_BITS:
        raise UnreadableImage(f"its header says datatype = {kind}, which is not read")
    if not 0 <= start < MOST_BYTES:
        raise UnreadableImage(f"its header says vox_offset = {start}")
    return int(start) + math.prod(max(1, n) for n in sizes[1 : 1 + sizes[0]]) * NIFTI_BITS[kind] // 8


# NRRD ----------------------------------------------------------------------------------------------

NRRD_BYTES = {
    **dict.fromkeys(("signed char", "int8", "int8_t", "uchar", "unsigned char", "uint8", "uint8_t"), 1),
    **dict.fromkeys(("short", "short int", "signed short", "signed short int", "int16", "int16_t"), 2),
    **dict.fromkeys(("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"), 2),
    **dict.fromkeys(
        ("int", "signed int", "int32", "int32_t", "uint", "unsigned int", "uint32", "uint32_t", "float"), 4
    ),
    **dict.fromkeys(("longlong", "long long", "long long int", "signed long long", "signed long long int"), 8),
    **dict.fromkeys(("int64", "int64_t", "ulonglong", "unsigned long long", "unsigned long long int"), 8),
    **dict.fromkeys(("uint64", "uint64_t", "double"), 8),
}
NRRD_PACKED = ("gzip", "gz")
NRRD_TEXT = ("txt", "text", "ascii")
NRRD_HEX = "hex"  # two digits a byte


def _check_nrrd(path: Path, file: BinaryIO) -> None:
    """NRRD: the fields that say how long the data are, and the data files."""
    fields, start = _nrrd_fields(file), file.tell()
    for key in ("type", "dimension", "sizes", "encoding"):
        if key not in fields:
            raise UnreadableImage(f"its header lacks {key}")
    (dims,) = _numbers("dimension", fields["dimension"], 1, int)
    if not 1 <= dims <= 16:
        raise UnreadableImage(f"its header says dimension = {dims}")
    sizes = _sizes("sizes", fields["sizes"], dims)
    if fields["type"].lower() not in NRRD_BYTES:
        raise UnreadableImage(f"its header says type: {_shown(fields['type'])}, which is not read")
    encoding = fields["encoding"].lower()
    if encoding not in ("raw", NRRD_HEX, *NRRD_TEXT, *NRRD_PACKED):
        raise UnreadableImage(f"its header says encoding: {_shown(fields['encoding'])}, which is not read")
    needed = math.prod(sizes) * NRRD_BYTES[fields["type"].lower()]
    if encoding in NRRD_TEXT:
        needed = 2 * math.prod(sizes) - 1
    elif encoding == NRRD_HEX:
        needed *= 2
    skips = [_numbers(key, fields.get(key, "0"), 1, int)[0] for key in ("line skip", "byte skip")]
    if skips[0] < 0 or skips[1] < -1 or max(skips) > MOST_BYTES:
        raise UnreadableImage(f"its header says line skip: {skips[0]}, byte skip: {skips[1]}")
    written = fields.get("data file")
    names = [path.name] if written is None else _nrrd_names(file, written, sizes)
    start = start if written is None else 0
    each = needed // len(names)
    if encoding not in NRRD_PACKED:
        _check_files(path, names, [start + max(0, skips[1]) + each] * len(names))
        return
    if skips[1] < 0:  # only of raw values, and ITK would take minutes for megabytes
        raise UnreadableImage(f"its header says byte skip: {skips[1]}, which is for raw values")
    _check_files(path, names, [start] * len(names))
    for name in names:
        with open(path.parent / name, "rb") as data:
            data.seek(start)
            for _ in range(skips[0]):  # lines before what is compressed, and bytes within
                if not data.readline():
                    break
            length = (path.parent / name).stat().st_size - data.tell()
            _check_deflated(Path(name).name, data, length, each + skips[1])


def _nrrd_fields(file: BinaryIO) -> dict[str, str]:
    """The header's fields, up to an empty line or the data file, with their names in lower case."""
    lines = _lines(file, r"$|data ?file:\s*LIST")
    if not re.fullmatch(r"NRRD000[1-5]", next(lines)):
        raise UnreadableImage("not an NRRD file: its header does not begin with NRRD")
    fields: dict[str, str] = {}
    for line in lines:
        if line.startswith("#") or ":=" in line or not line:
            continue
        key, colon, value = line.partition(":")
        key = {"datafile": "data file", "lineskip": "line skip", "byteskip": "byte skip"}.get(key.lower(), key.lower())
        if not colon or not re.fullmatch(r"[a-z ]+", key) or key in fields:
            raise UnreadableImage(f"its header has a line that is no field, or one twice: {_shown(line)}")
        if len(line) > LONGEST_FIELD and key != "content":
            raise UnreadableImage(f"its header says {key}: {_shown(value.strip())}…, which is too long")
        fields[key] = value.strip()
    return fields


def _nrrd_names(file: BinaryIO, written: str, sizes: Sequence[int]) -> list[str]:
    """The data files of a list, which follows the header, or of a pattern; or the one."""
    words = written.split()
    if written.startswith("LIST"):
        names = [line.strip() for line in _lines(file) if line.strip()]
        subdim = words[1:]
    elif re.search(r"%\d*d", written) or "%" in written and len(words) > 1:  # NRRD's library acts on the first alone
        if len(words) not in (4, 5):
            raise UnreadableImage(f"its header says data file: {_shown(written)}; three numbers are needed")
        names = numbered_files(words[0], *_numbers("data file", " ".join(words[1:4]), 3, int))
        subdim = words[4:]
    else:
        return [written]
    axes = int(subdim[0]) if subdim and re.fullmatch(r"[0-9]{1,2}", subdim[0]) else len(sizes) - 1
    if len(subdim) > 1 or (subdim and not 1 <= axes <= len(sizes)):
        raise UnreadableImage(f"its header says data file: {_shown(written)}; files have 1 to {len(sizes)} axes")
    if axes == len(sizes):  # slabs, all as thick
        if not names or sizes[-1] % len(names):
            raise UnreadableImage(f"its header names {len(names)} data files as slabs of {sizes[-1]} slices")
    elif len(names) != math.prod(sizes[axes:]):
        raise UnreadableImage(f"its header names {len(names)} data files for {math.prod(sizes[axes:])} slices")
    return names
