"""Medical volumes: found, read into one orientation, resampled and scaled; masks written back in a file's geometry.

Arrays have the axes x, y, z of the patient (DICOM's LPS: x to the left, y to the back, z to the head), whatever the
file's own order and directions. SimpleITK decodes; what it accepts in silence (NIfTI files cut short, DICOM series
with slices missing) or only complains about on the terminal is checked here.
"""

import contextlib
import functools
import gzip
import math
import os
import re
import struct
import threading
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from medssl.datasets.reading import DICOM_EXTENSIONS
from medssl.datasets.registry import UnreadableImage
from medssl.engine.options import InputError

EXTENSIONS = (".nii.gz", ".nii", ".mhd", ".mha", ".nrrd", ".nhdr")
AXES = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)  # the direction matrix of LPS, row by row
WINDOW = (-1000.0, 1000.0)  # Hounsfield units that become 0 and 1
LOWEST_HU = -1024  # scanners write nothing below; what lies below is padding
CT_BELOW = -200  # only CTs have such values
PERCENTILES = (0.5, 99.5)

STRAIGHT = 1e-3  # directions closer to the axes than this (half a voxel in 512) count as the axes
EVEN = 0.1  # share by which the gaps of a DICOM series may differ
MOST_VOXELS = 2**31
SLAB_VOXELS = 2**22  # of the input, resampled at a time


@dataclass(frozen=True, eq=False)
class Volume:
    """A scan in the patient's axes: its directions are always `AXES`.

    Attributes:
        array: (X, Y, Z) in stored units (HU for CT), float32 unless asked otherwise.
        spacing: mm between voxels along x, y, z.
        origin: position of voxel (0, 0, 0), mm.
    """

    array: np.ndarray
    spacing: tuple[float, float, float]
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)


# Finding -------------------------------------------------------------------------------------------


def find_volumes(folder: str | Path) -> list[tuple[str, Path]]:
    """Volumes in a folder and below it: files by extension, and folders that hold a DICOM series.

    Hidden files and `__MACOSX` are skipped; links to folders are followed, each folder once. A single file is found
    too, when its own path is given.

    Returns:
        (id, path), sorted by id. The id is the path relative to `folder` with forward slashes and without the
        extension, which stays where two volumes would share an id.

    Raises:
        InputError: when there is no such folder.
    """
    folder = Path(folder)
    if folder.is_file() and folder.name.lower().endswith(EXTENSIONS):
        return [(without_extension(folder.name), folder)]
    if not folder.is_dir():
        raise InputError(f"{folder}: not a folder")
    paths: list[Path] = []
    seen: set[tuple[int, int]] = set()
    for current, folders, files in os.walk(folder, followlinks=True):
        status = os.stat(current)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()  # a link back to where we have been
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if _shown(name))
        files = sorted(filter(_shown, files))
        paths += [Path(current, name) for name in files if name.lower().endswith(EXTENSIONS)]
        dicom = (name for name in files if _is_dicom(Path(current, name)))
        if next(dicom, None) and next(dicom, None):  # one alone is a radiograph
            paths.append(Path(current))
    names = {path: path.relative_to(folder).as_posix() if path != folder else folder.resolve().name for path in paths}
    short = {path: without_extension(name) for path, name in names.items()}
    taken = list(short.values())
    return sorted((short[path] if taken.count(short[path]) == 1 else names[path], path) for path in paths)


def without_extension(name: str) -> str:
    """A file's name without the extension of a volume; folders may have dots."""
    return next((name[: -len(end)] for end in EXTENSIONS if name.lower().endswith(end)), name)


def _shown(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"


def _is_dicom(path: Path) -> bool:
    extension = path.suffix.lower()
    if extension and not extension[1:].isdigit():  # the last number of a UID is no extension
        return extension in DICOM_EXTENSIONS
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


# Reading -------------------------------------------------------------------------------------------


@functools.cache
def _sitk():
    """SimpleITK, told to keep its warnings to itself."""
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    return sitk


def use_one_thread() -> None:
    """Let SimpleITK use one thread in this process, as is right where processes share the cores."""
    _sitk().ProcessObject.SetGlobalDefaultNumberOfThreads(1)


_stderr_lock = threading.Lock()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing that libraries below SimpleITK (MetaIO, GDCM, NIfTI) print reaches the terminal."""
    with _stderr_lock:
        kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, 2)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            os.close(nowhere)


def read_volume(path: str | Path, dtype: type | None = np.float32) -> Volume:
    """Read a file, or a folder with a DICOM series, in the patient's axes.

    Axes are swapped and flipped as the directions say; oblique scans are interpolated onto the patient's axes, with
    the scan's lowest value in the corners. Values that are not finite become the lowest finite one.

    Args:
        path: `.mhd .mha .nii .nii.gz .nrrd .nhdr`, or a folder of DICOM slices.
        dtype: np.float32, or None: integers of up to 16 bits stay as stored, in half the memory.

    Raises:
        UnreadableImage: the reason in one line: no such file, a missing or truncated data file, a 2D image,
            several volumes, colours, spacing that is no length, slices missing in a DICOM series, …
    """
    image = _load(Path(path), dtype)
    array = _array_of(image)
    _replace_infinite(array)
    layout = _layout(image.GetDirection())
    if layout is None:
        image = _straightened(image, float(array.min()))
        array, layout = _array_of(image), _layout(AXES)
    order, flips = layout
    size, spacing = image.GetSize(), image.GetSpacing()
    origin = image.TransformIndexToPhysicalPoint([size[axis] - 1 if flips[axis] else 0 for axis in range(3)])
    _flip(array, flips)
    return Volume(array.transpose(2, 1, 0).transpose(order), tuple(spacing[axis] for axis in order), origin)


@dataclass(frozen=True)
class Header:
    """What a volume's file says of its place, in the order of its own axes.

    Attributes:
        size: voxels along its axes.
        spacing: mm between them.
        centre: of the box of voxels, in the patient's axes, mm.
    """

    size: tuple[int, ...]
    spacing: tuple[float, ...]
    centre: tuple[float, ...]


def read_header(path: Path) -> Header | None:
    """Read a file's header alone; None for DICOM series, damaged headers, and what is no volume."""
    if path.is_dir():
        return None
    reader = _sitk().ImageFileReader()
    reader.SetFileName(os.fspath(path))
    try:
        with _quiet():
            reader.ReadImageInformation()
    except RuntimeError:
        return None
    if reader.GetDimension() != 3:
        return None
    size, spacing = reader.GetSize(), reader.GetSpacing()
    half = np.array([(n - 1) / 2 * step for n, step in zip(size, spacing)])
    centre = np.array(reader.GetDirection()).reshape(3, 3) @ half + reader.GetOrigin()
    return Header(size, spacing, tuple(centre))


def _load(path: Path, dtype: type | None):
    """A SimpleITK image with three axes of more than one voxel and one number a voxel, as the file lays it out."""
    sitk = _sitk()
    try:
        with _quiet():
            if path.is_dir():
                image = _load_series(path, dtype)
            else:
                _check_file(path)
                reader = sitk.ImageFileReader()
                reader.SetFileName(os.fspath(path))
                reader.ReadImageInformation()
                size = _volume_size(reader.GetSize())
                _set_type(reader, reader.GetPixelID(), dtype)
                reader.SetExtractSize([*size, *[0] * (reader.GetDimension() - 3)])
                image = reader.Execute()
    except RuntimeError as error:
        raise UnreadableImage(_reason(str(error))) from None
    except EOFError:
        raise UnreadableImage("truncated: its compressed data end early") from None
    except (OSError, zlib.error, ValueError, OverflowError) as error:
        raise UnreadableImage(getattr(error, "strerror", None) or f"damaged: {error}") from None
    except MemoryError:
        raise UnreadableImage("too large for the memory of this machine") from None
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise UnreadableImage(f"{image.GetNumberOfComponentsPerPixel()} numbers a voxel; only grey volumes are read")
    if not all(0 < step < math.inf for step in image.GetSpacing()):
        raise UnreadableImage(f"its header gives the spacing {by(image.GetSpacing())} mm")
    return image


def _volume_size(size: Sequence[int]) -> Sequence[int]:
    """The first three sizes; raises UnreadableImage where they are not all there is."""
    if len(size) == 2 or min(size[:3]) == 1:
        raise UnreadableImage(f"a 2D image ({by(size)}), not a volume")
    if math.prod(size[3:]) != 1:
        raise UnreadableImage(f"{math.prod(size[3:])} volumes in one file ({by(size)})")
    return size[:3]


def _set_type(reader, stored: int, dtype: type | None) -> None:
    sitk = _sitk()
    small = (sitk.sitkInt8, sitk.sitkUInt8, sitk.sitkInt16, sitk.sitkUInt16)
    kinds = (*small, sitk.sitkInt32, sitk.sitkUInt32, sitk.sitkInt64, sitk.sitkUInt64, sitk.sitkFloat64)
    if stored in kinds and not (dtype is None and stored in small):
        reader.SetOutputPixelType(sitk.sitkFloat32)


def _load_series(folder: Path, dtype: type | None):
    """The DICOM series of a folder. Series of one or two images (scouts, reports) do not count."""
    sitk = _sitk()
    if not folder.exists():
        raise UnreadableImage("no such file or folder")
    names = {
        series: sitk.ImageSeriesReader.GetGDCMSeriesFileNames(os.fspath(folder), series)
        for series in sitk.ImageSeriesReader.GetGDCMSeriesIDs(os.fspath(folder))
    }
    if not names:
        raise UnreadableImage("a folder without DICOM slices")
    large = [series for series in names if len(names[series]) > 2] or list(names)
    if len(large) > 1:
        raise UnreadableImage(f"a folder with {len(large)} DICOM series; give each a folder of its own")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(names[large[0]])
    first = sitk.ImageFileReader()
    first.SetFileName(names[large[0]][0])
    first.ReadImageInformation()
    _volume_size((*first.GetSize()[:2], len(names[large[0]])))
    _set_type(reader, first.GetPixelID(), dtype)
    reader.MetaDataDictionaryArrayUpdateOn()
    image = reader.Execute()
    _check_gaps(reader, image)
    return image


def _check_gaps(reader, image) -> None:
    """Refuse a series with slices missing or twice, which ITK stacks as if they were evenly spaced."""
    key, count = "0020|0032", image.GetDepth()  # ImagePositionPatient
    if not all(reader.HasMetaDataKey(i, key) for i in range(count)):
        return
    positions = np.array([[float(v) for v in reader.GetMetaData(i, key).split("\\")] for i in range(count)])
    gaps = np.linalg.norm(np.diff(positions, axis=0), axis=1)
    if gaps.max() - gaps.min() > EVEN * np.median(gaps):
        raise UnreadableImage(f"DICOM slices are {gaps.min():g} to {gaps.max():g} mm apart: some are missing or twice")


def _check_file(path: Path) -> None:
    """Say what is wrong with a file where SimpleITK would read it all the same, or give no reason."""
    name = path.name.lower()
    with open(path, "rb") as file:  # raises what the system says of the path
        head = file.read(4)
    if name.endswith((".mhd", ".mha")):
        _check_meta(path)
    elif name.endswith((".nii", ".nii.gz")):
        _check_nifti(path, zipped=head[:2] == b"\x1f\x8b")


META_BYTES = {"CHAR": 1, "UCHAR": 1, "SHORT": 2, "USHORT": 2, "INT": 4, "UINT": 4, "LONG": 4, "ULONG": 4}
META_BYTES |= {"LONG_LONG": 8, "ULONG_LONG": 8, "FLOAT": 4, "DOUBLE": 8}


def _check_meta(path: Path) -> None:
    """MetaImage: the data file is there, and as long as the header says."""
    fields: dict[str, str] = {}
    with open(path, "rb") as file:
        for line in file:
            key, equals, value = line.decode("latin-1").partition("=")
            if not equals or len(line) > 10_000:
                break
            fields[key.strip()] = value.strip()
            if key.strip() == "ElementDataFile":  # the last field; pixels may follow
                break
        start = file.tell()
    if "DimSize" not in fields or "ElementDataFile" not in fields:
        raise UnreadableImage("its header lacks DimSize or ElementDataFile")
    data = path if fields["ElementDataFile"] == "LOCAL" else path.parent / fields["ElementDataFile"]
    if data.name == "LIST" or "%" in data.name:  # many files; ITK says what is wrong with one
        return
    if not data.is_file():
        raise UnreadableImage(f"its data file {data.name} is missing")
    each = META_BYTES.get(fields.get("ElementType", "").removeprefix("MET_"))
    if each and fields.get("CompressedData", "False").lower() != "true":
        channels = int(fields.get("ElementNumberOfChannels", 1))
        needed = math.prod(map(int, fields["DimSize"].split())) * each * channels
        _check_length(data, data.stat().st_size - (start if data == path else 0), needed)


def _check_nifti(path: Path, zipped: bool) -> None:
    """NIfTI: ITK fills what a truncated file lacks with zeros or noise."""
    with (gzip.open if zipped else open)(path, "rb") as file:
        head = file.read(540)
    for order in "<>":
        if len(head) >= 348 and struct.unpack_from(order + "i", head)[0] == 348:
            sizes, bits = struct.unpack_from(order + "8h", head, 40), struct.unpack_from(order + "h", head, 72)[0]
            start = int(struct.unpack_from(order + "f", head, 108)[0])
            break
        if len(head) >= 540 and struct.unpack_from(order + "i", head)[0] == 540:
            sizes, bits = struct.unpack_from(order + "8q", head, 16), struct.unpack_from(order + "h", head, 14)[0]
            start = struct.unpack_from(order + "q", head, 168)[0]
            break
    else:
        raise UnreadableImage("not a NIfTI file, or a truncated one")
    needed = start + math.prod(max(1, size) for size in sizes[1 : 1 + max(0, sizes[0])]) * bits // 8
    if not zipped:
        _check_length(path, path.stat().st_size, needed)
        return
    with open(path, "rb") as file:
        file.seek(-4, os.SEEK_END)
        noted = struct.unpack("<I", file.read(4))[0]
    if noted != needed % 2**32:
        # Cut short, or written in several parts, or with something behind: only reading it all tells.
        length = 0
        with gzip.open(path) as file:
            while block := file.read(2**22):
                length += len(block)
        _check_length(path, length, needed)


def _check_length(data: Path, length: int, needed: int) -> None:
    if length < needed:
        raise UnreadableImage(f"truncated: {data.name} holds {length} of {needed} bytes")


def _reason(text: str) -> str:
    """The part of a SimpleITK error that says something: its last line, without places in the source."""
    if "Unable to determine ImageIO" in text:
        return "not a volume that SimpleITK can read"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return re.sub(r"^(sitk::ERROR:|ITK ERROR:|Reason:)\s*", "", lines[-1]) if lines else "SimpleITK gives no reason"


def by(numbers: Sequence[float]) -> str:
    """Numbers of the axes in words: "512 x 512 x 133"."""
    return " x ".join(f"{number:g}" for number in numbers)


class _Held:
    """Lets an array use an image's memory, and keeps the image as long as the array lives."""

    def __init__(self, image) -> None:
        view = _sitk().GetArrayViewFromImage(image)
        self.image = image
        self.__array_interface__ = {**view.__array_interface__, "data": (view.ctypes.data, False)}


def _array_of(image) -> np.ndarray:
    """(K, J, I), writable, without a copy."""
    return np.asarray(_Held(image))


def _replace_infinite(array: np.ndarray) -> None:
    if array.dtype.kind != "f" or (math.isfinite(array.min()) and math.isfinite(array.max())):
        return
    finite = np.isfinite(array)
    if not finite.any():
        raise UnreadableImage("holds no finite value")
    array[~finite] = array[finite].min()


def _layout(direction: Sequence[float]) -> tuple[tuple[int, ...], tuple[bool, ...]] | None:
    """Which image axis lies along each patient axis, and which image axes run backwards; None for oblique scans."""
    matrix = np.array(direction).reshape(3, 3)
    order = np.abs(matrix).argmax(axis=1)
    straight = np.zeros((3, 3))
    straight[range(3), order] = np.sign(matrix[range(3), order])
    if sorted(order) != [0, 1, 2] or np.abs(matrix - straight).max() > STRAIGHT:
        return None
    return tuple(int(axis) for axis in order), tuple(bool(total < 0) for total in straight.sum(axis=0))


def _flip(array: np.ndarray, flips: Sequence[bool]) -> None:
    """Reverse axes i, j, k of an array (K, J, I) in place: a copy of a large CT is what memory lacks."""
    step_i, step_j = (-1 if flip else 1 for flip in flips[:2])
    if flips[0] or flips[1]:
        for plane in array:
            plane[:] = plane[::step_j, ::step_i].copy()
    if flips[2]:
        for k in range(len(array) // 2):
            kept = array[k].copy()
            array[k] = array[-1 - k]
            array[-1 - k] = kept


def _straightened(image, outside: float):
    """An oblique image interpolated onto the patient's axes, in the box around it, with spacing like its own."""
    sitk = _sitk()
    spacing = np.array(image.GetSpacing())
    ends = [(0, n - 1) for n in image.GetSize()]
    corners = np.array(
        [image.TransformIndexToPhysicalPoint([i, j, k]) for i in ends[0] for j in ends[1] for k in ends[2]]
    )
    # Of the axes that a patient axis mixes, the main one's spacing; of two equal shares, the finer.
    shares = np.abs(np.array(image.GetDirection()).reshape(3, 3))
    steps = [float(spacing[row > row.max() - 1e-3].min()) for row in shares]
    low, high = corners.min(axis=0), corners.max(axis=0)
    size = [int(np.ceil((high[p] - low[p]) / steps[p] - 1e-6)) + 1 for p in range(3)]
    return sitk.Resample(image, size, sitk.Transform(), sitk.sitkLinear, low.tolist(), steps, AXES, outside)


# Resampling and scaling ----------------------------------------------------------------------------


def resampled_shape(volume: Volume, spacing: Sequence[float] = (1.0, 1.0, 1.0)) -> tuple[int, int, int]:
    """Voxels along x, y, z after `resample`: size · old spacing / new, rounded, at least 1."""
    return tuple(max(1, int(n * a / b + 0.5)) for n, a, b in zip(volume.array.shape, volume.spacing, spacing))


def resample(
    volume: Volume,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    nearest: bool = False,
    outside: float = 0.0,
    box: Sequence[tuple[int, int]] | None = None,
) -> Volume:
    """Change the distance between voxels, linearly interpolated; axes stay, and the origin does without `box`.

    Args:
        volume: integers stay integers, cut towards zero, as the published tools do.
        spacing: new mm between voxels.
        nearest: take the nearest voxel, for labels.
        outside: value of new voxels that lie more than half a voxel outside of the volume. The rounded size can
            have one layer of them at an axis' end; 0 is what the published tools leave there.
        box: first and last (excluded) new voxel along x, y, z: make this part of the result alone.

    Raises:
        UnreadableImage: when the result would be absurdly large, as from a wrong header.
    """
    old, new = volume.spacing, tuple(float(step) for step in spacing)
    shape = resampled_shape(volume, new)
    if math.prod(shape) > MOST_VOXELS:
        raise UnreadableImage(f"{by(shape)} voxels at {by(new)} mm; is its spacing of {by(old)} mm right?")
    box = box or tuple((0, n) for n in shape)
    if old == new:
        part = volume.array[tuple(slice(*ends) for ends in box)]
        return Volume(part, new, _shifted(volume.origin, [start for start, _ in box], new))
    first, last = zip(*(_needed(*ends, b / a, n) for ends, a, b, n in zip(box, old, new, volume.array.shape)))
    (x0, x1), (y0, y1), (z0, z1) = box
    made = np.empty((z1 - z0, y1 - y0, x1 - x0), volume.array.dtype)
    # In slabs along z, because SimpleITK needs a copy of what it resamples.
    plane = (last[0] - first[0]) * (last[1] - first[1])
    count = max(1, int(SLAB_VOXELS * old[2] / new[2] / plane))
    for start in range(z0, z1, count):
        stop = min(start + count, z1)
        front, back = _needed(start, stop, new[2] / old[2], volume.array.shape[2])
        slab = volume.array[first[0] : last[0], first[1] : last[1], front:back]
        part = Volume(slab, old, _shifted((0, 0, 0), (*first[:2], front), old))
        place = _shifted((0, 0, 0), (x0, y0, start), new)
        size = (x1 - x0, y1 - y0, stop - start)
        made[start - z0 : stop - z0] = sample(part, place, size, new, nearest, outside).transpose(2, 1, 0)
    return Volume(made.transpose(2, 1, 0), new, _shifted(volume.origin, (x0, y0, z0), new))


def _needed(start: int, stop: int, ratio: float, size: int) -> tuple[int, int]:
    """First and last (excluded) of `size` old voxels that new ones from `start` to `stop` are interpolated from."""
    return min(int(start * ratio), size - 1), min(int((stop - 1) * ratio) + 2, size)


def _shifted(origin: Sequence[float], voxels: Sequence[int], spacing: Sequence[float]) -> tuple[float, float, float]:
    return tuple(o + n * step for o, n, step in zip(origin, voxels, spacing))


def sample(
    volume: Volume,
    origin: Sequence[float],
    size: Sequence[int],
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    nearest: bool = False,
    outside: float = 0.0,
) -> np.ndarray:
    """Values of a volume on another grid with the same axes.

    Args:
        origin: position of the grid's first point, mm.
        size: points along x, y, z.
        spacing: mm between them.
        nearest: as for `resample`.
        outside: value of points that lie more than half a voxel outside of the volume.

    Returns:
        `size`, the volume's type.
    """
    sitk = _sitk()
    kind = sitk.sitkNearestNeighbor if nearest else sitk.sitkLinear
    made = sitk.Resample(
        _image_of(volume), tuple(size), sitk.Transform(), kind, tuple(origin), tuple(spacing), AXES, outside
    )
    return _array_of(made).transpose(2, 1, 0)


def _image_of(volume: Volume):
    """A SimpleITK image with a copy of a volume."""
    image = _sitk().GetImageFromArray(np.ascontiguousarray(volume.array.transpose(2, 1, 0)))
    image.SetSpacing(volume.spacing)
    image.SetOrigin(volume.origin)
    return image


def unit_range(array: np.ndarray) -> tuple[float, float]:
    """The stored values that become 0 and 1.

    A CT, known by values below −200, has `WINDOW`. Other volumes have the 0.5th and 99.5th percentile of their
    voxels that are not 0, since 0 is the background there; where these are equal, the lowest and highest value.
    """
    if array.min() < CT_BELOW:
        return WINDOW
    step = max(1, round((array.size / 2**20) ** (1 / 3)))  # a million voxels give percentiles well enough
    some = array[::step, ::step, ::step]
    some = some[some != 0]
    low, high = np.percentile(some, PERCENTILES) if some.size else (0.0, 0.0)
    return (float(low), float(high)) if low < high else (float(array.min()), float(array.max()))


def scale(array: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map [low, high] to [0, 1], float32, clipping what is outside; zeros when the range is empty."""
    if not high > low:
        return np.zeros(array.shape, np.float32)
    made = array.astype(np.float32)  # a copy, in the array's own order in memory
    made -= np.float32(low)
    made *= np.float32(1 / (high - low))
    return np.clip(made, 0, 1, out=made)


def to_unit(array: np.ndarray) -> np.ndarray:
    """Map a volume's `unit_range` to [0, 1], float32: Hounsfield units by the CT window, others by percentiles."""
    return scale(array, *unit_range(array))


# Masks ---------------------------------------------------------------------------------------------


def read_labels(path: Path, grid: Volume) -> np.ndarray:
    """Read a mask on the voxels of its scan, each voxel the nearest of the mask's: the inverse of `write_labels`.

    Args:
        path: the mask's file.
        grid: the scan, as `read_volume` gives it; oblique scans are on other voxels than their files.

    Returns:
        (X, Y, Z) uint8.

    Raises:
        UnreadableImage: for a file that cannot be decoded, and values that are no whole numbers from 0 to 255.
    """
    sitk = _sitk()
    try:
        image = _load(path, None)
    except UnreadableImage as error:
        raise UnreadableImage(f"its mask {path.name}: {error}") from None
    kind = sitk.sitkNearestNeighbor
    made = sitk.Resample(image, grid.array.shape, sitk.Transform(), kind, grid.origin, grid.spacing, AXES, 0.0)
    array = _array_of(made).transpose(2, 1, 0)
    wrong = wrong_label(array)
    if wrong is not None:
        raise UnreadableImage(f"its mask {path.name} has the value {wrong:g}; labels are whole numbers to 255")
    return array.astype(np.uint8)


def read_values(path: Path) -> np.ndarray:
    """The values that occur in a file, ascending; raises UnreadableImage as `read_volume` does."""
    return np.unique(_array_of(_load(path, None)))


def wrong_label(values: np.ndarray) -> float | None:
    """One of the values that is no whole number from 0 to 255, as labels are; None where there is none."""
    wrong = values[~((values >= 0) & (values <= 255) & (values == np.floor(values)))]
    return float(wrong[0]) if wrong.size else None


def write_labels(path: str | Path, labels: np.ndarray, reference: str | Path, grid: Volume | None = None) -> None:
    """Write a mask as NIfTI, on the voxels and in the orientation of the file that it belongs to.

    The file is complete or not there. Labels on other voxels than the file's go to the nearest.

    Args:
        path: ends in `.nii` or `.nii.gz`.
        labels: (X, Y, Z) uint8, on the voxels of `read_volume(reference)`, or of `grid`.
        reference: the scan.
        grid: spacing and origin of the labels where they are not on the scan's voxels, as after `resample`.

    Raises:
        ValueError: for another extension, or labels whose shape is not that of the voxels they are said to be on.
        UnreadableImage: when the scan cannot be read.
    """
    sitk = _sitk()
    path = Path(path)
    if not path.name.endswith((".nii", ".nii.gz")):
        raise ValueError(f"{path}: labels are written as .nii or .nii.gz")
    image = _load(Path(reference), None)
    layout = _layout(image.GetDirection())
    if grid is None and layout is not None:
        order, flips = layout
        shape = tuple(image.GetSize()[axis] for axis in order)
        _check_shape(labels, shape)
        steps = tuple(slice(None, None, -1 if flip else 1) for flip in flips)
        stored = labels.transpose(np.argsort(order))[steps]
        made = sitk.GetImageFromArray(np.ascontiguousarray(stored.transpose(2, 1, 0), np.uint8))
        made.CopyInformation(image)
    else:
        grid = grid or read_volume(reference)
        _check_shape(labels, grid.array.shape)
        made = _image_of(replace(grid, array=labels.astype(np.uint8)))
        made = sitk.Resample(made, image, sitk.Transform(), sitk.sitkNearestNeighbor, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{os.getpid()}.{path.name}")  # SimpleITK chooses the format by the extension
    try:
        sitk.WriteImage(made, os.fspath(unfinished))
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _check_shape(labels: np.ndarray, shape: tuple[int, ...]) -> None:
    if labels.shape != shape:
        raise ValueError(f"labels of {by(labels.shape)} voxels for a volume of {by(shape)}")
