"""Arrays of numbers in numpy's files, `.npy` and `.npz`.

Nothing is unpickled, and nothing is allocated before what a header claims was compared with the file: a kilobyte that
claims terabytes is refused as any damaged file.
"""

import bz2
import copy
import io
import lzma
import math
import os
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy

from medssl.errors import unreadable

READ_HEADER = {
    (1, 0): npy.read_array_header_1_0,
    (2, 0): npy.read_array_header_2_0,
    (3, 0): npy.read_array_header_2_0,  # which differs in how names of fields are encoded; arrays of numbers have none
}
NUMBERS = "biuf"  # kinds of dtypes
MOST_AXES = 32  # of arrays in every version of numpy
DEFLATE = 1032  # bytes that deflate makes of one at most
# Bytes of what is inflated whole: those of any file, of which blank ones pack best; of a larger, for each of its own.
ALWAYS_INFLATED, MOST_INFLATED, INFLATED = 2**28, 2**30, 64
UNBOUNDED = 2**30  # bytes of an array that bzip2 or lzma packed: of these, a kilobyte can hold gigabytes
BLOCK = 2**20  # bytes decompressed at a time
ENDS, UNKNOWN = 2, 2**64 - 1  # zip's flag that LZMA's data mark their own end, and how LZMA's header says so
NPY, NPZ = "not an .npy file of numbers, or a truncated one", "not a readable .npz file of numbers"


def most_inflated(length: int) -> int:
    """Bytes to which a deflated file of so many may inflate where it is held in memory whole."""
    return min(MOST_INFLATED, max(ALWAYS_INFLATED, INFLATED * length))


def read_npy(path: str | Path, mapped: bool = False) -> np.ndarray:
    """Read an array of numbers of any shape and kind.

    Args:
        mapped: leave the values in the file, mapped into memory, read-only.

    Raises:
        UnreadableImage: for a file that is missing, damaged, or of something else than numbers.
    """
    with unreadable(NPY), open(path, "rb") as file:
        _check_header(file, os.fstat(file.fileno()).st_size)
        if mapped:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        file.seek(0)
        return npy.read_array(file, allow_pickle=False)


def read_npz(path: str | Path, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Read arrays of numbers by their names in a file, which may be compressed; others are not decompressed.

    Args:
        names: of those to read, less those that are not there; all by default. Members that are no `.npy` do not count.

    Raises:
        UnreadableImage: as `read_npy`.
    """
    with unreadable(NPZ), zipfile.ZipFile(path) as archive:
        members = {name.removesuffix(".npy"): archive.getinfo(name) for name in _arrays(archive)}
        wanted = members if names is None else [name for name in names if name in members]
        return {name: _read_member(archive, members[name], os.path.getsize(path)) for name in wanted}


def names_in(path: str | Path) -> list[str]:
    """The names of the arrays of an .npz file, sorted; raises UnreadableImage for another file."""
    with unreadable(NPZ), zipfile.ZipFile(path) as archive:
        return sorted(name.removesuffix(".npy") for name in _arrays(archive))


def _arrays(archive: zipfile.ZipFile) -> list[str]:
    return [name for name in archive.namelist() if name.endswith(".npy")]


def _check_header(file: BinaryIO, length: int) -> None:
    """Read the header of an .npy file of `length` bytes, which must hold the array that it tells of.

    Raises:
        ValueError: where it does not, or is of something else than numbers. Others, for a damaged header.
    """
    version = npy.read_magic(file)
    if version not in READ_HEADER:
        raise ValueError(f"of version {version[0]}.{version[1]}")
    try:
        shape, _, dtype = READ_HEADER[version](file)
    except MemoryError:  # Python's parser, of brackets in brackets
        raise ValueError("its header is no dictionary") from None
    if dtype.kind not in NUMBERS or dtype.subdtype is not None:
        raise ValueError(f"holds {dtype}")
    if len(shape) > MOST_AXES or not all(type(n) is int and 0 <= n < 2**48 for n in shape):
        raise ValueError(f"of shape {shape}")
    needed = math.prod(shape) * dtype.itemsize
    if needed > length - file.tell():
        raise ValueError(f"holds {length - file.tell()} of {needed} bytes")


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, length: int) -> np.ndarray:
    """One array of an archive of `length` bytes."""
    packed = min(member.compress_size, length)
    most = {zipfile.ZIP_STORED: packed, zipfile.ZIP_DEFLATED: DEFLATE * packed}
    if member.file_size > most.get(member.compress_type, max(UNBOUNDED, DEFLATE * packed)):
        raise ValueError(f"{member.filename} claims {member.file_size} bytes")
    held = member.file_size if member.compress_type in most else _unpacked(archive, member)
    with _opened(archive, member) as file:
        _check_header(file, held)
        file.seek(0)
        return npy.read_array(file, allow_pickle=False)


def _opened(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> BinaryIO:
    """A member to read from, of which no more is decompressed at a time than is read."""
    if member.compress_type not in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        return archive.open(member)
    stored = copy.copy(member)  # of these, the zipfile module decompresses all that a block holds, as gigabytes
    stored.compress_type, stored.file_size = zipfile.ZIP_STORED, member.compress_size
    del stored.CRC  # of what is packed
    file = io.BytesIO(archive.open(stored).read())
    if member.compress_type == zipfile.ZIP_BZIP2:
        return bz2.BZ2File(file)
    properties = file.read(9)[4:]  # of LZMA, behind a version and their length
    length = UNKNOWN if member.flag_bits & ENDS else member.file_size
    return lzma.LZMAFile(io.BytesIO(properties + struct.pack("<Q", length) + file.read()))


def _unpacked(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> int:
    """How many bytes a member holds, of those that it claims, however few it has."""
    found = 0
    with _opened(archive, member) as file:
        while found < member.file_size and (block := file.read(BLOCK)):
            found += len(block)
    return min(found, member.file_size)
