"""Arrays of numbers in numpy's files, `.npy` and `.npz`.

Nothing is unpickled, and nothing is allocated before what a header claims was compared with the file: a kilobyte that
claims terabytes is refused as any damaged file.
"""

import math
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy

from medssl.errors import unreadable

READ_HEADER = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
NUMBERS = "biuf"  # kinds of dtypes
MOST_AXES = 32  # of arrays in every version of numpy
DEFLATE = 1032  # bytes that deflate makes of one at most
NPY, NPZ = "not an .npy file of numbers, or a truncated one", "not a readable .npz file of numbers"


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
        names: of those to read, less those that are not there; all by default.

    Raises:
        UnreadableImage: as `read_npy`.
    """
    with unreadable(NPZ), zipfile.ZipFile(path) as archive:
        members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
        wanted = members if names is None else [name for name in names if name in members]
        return {name: _read_member(archive, members[name], os.path.getsize(path)) for name in wanted}


def names_in(path: str | Path) -> list[str]:
    """The names of the arrays of an .npz file, sorted; raises UnreadableImage for another file."""
    with unreadable(NPZ), zipfile.ZipFile(path) as archive:
        return sorted(name.removesuffix(".npy") for name in archive.namelist())


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
    most = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: DEFLATE}.get(member.compress_type, 0)
    if member.file_size > most * min(member.compress_size, length):
        raise ValueError(f"{member.filename} claims {member.file_size} bytes")
    with archive.open(member) as file:
        _check_header(file, member.file_size)
        file.seek(0)
        return npy.read_array(file, allow_pickle=False)
