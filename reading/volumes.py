"""Medical volumes: read into one orientation, and masks written back in a file's geometry.

Arrays have the axes x, y, z of the patient (DICOM's LPS: x to the left, y to the back, z to the head), whatever the
file's own order and directions. SimpleITK decodes; what it accepts in silence (NIfTI files cut short, DICOM series
with slices missing) or only complains about on the terminal is checked here.
"""

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from medssl.errors import TOO_LARGE, UnreadableImage, unreadable
from medssl.files import check_room, naming, writing
from medssl.reading.dicom import load_series
from medssl.reading.geometry import AXES, Volume, axis_layout, by, flip_axes, image_of, straightened, volume_size
from medssl.reading.headers import reader_of
from medssl.reading.simpleitk import array_of, quiet, reason_of, set_type, simpleitk


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
    image = load_image(Path(path), dtype)
    with unreadable("damaged"):
        array = array_of(image)
        _replace_infinite(array)
        layout = axis_layout(image.GetDirection())
        if layout is None:
            image = straightened(image, float(array.min()))
            array, layout = array_of(image), axis_layout(AXES)
        order, flips = layout
        size, spacing = image.GetSize(), image.GetSpacing()
        origin = image.TransformIndexToPhysicalPoint([size[axis] - 1 if flips[axis] else 0 for axis in range(3)])
        flip_axes(array, flips)
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
    try:
        with unreadable(), quiet():
            reader = _opened(path)
    except UnreadableImage:
        return None
    if reader.GetDimension() != 3:
        return None
    size, spacing = reader.GetSize(), reader.GetSpacing()
    half = np.array([(n - 1) / 2 * step for n, step in zip(size, spacing)])
    centre = np.array(reader.GetDirection()).reshape(3, 3) @ half + reader.GetOrigin()
    return Header(size, spacing, tuple(centre))


def load_image(path: Path, dtype: type | None):
    """A SimpleITK image with three axes of more than one voxel and one number a voxel, as the file lays it out."""
    try:
        with unreadable("damaged"), quiet():
            if path.is_dir():
                image = load_series(path, dtype)
            else:
                reader = _opened(path)
                size = volume_size(reader.GetSize())
                set_type(reader, reader.GetPixelID(), dtype)
                reader.SetExtractSize([*size, *[0] * (reader.GetDimension() - 3)])
                image = reader.Execute()
    except UnreadableImage as refused:
        if isinstance(refused.__cause__, RuntimeError):  # SimpleITK's, of many lines
            reason = str(refused.__cause__)
            if "allocate memory" in reason:  # the file holds what it claims; the machine is too small
                raise MemoryError(f"{path}: {TOO_LARGE}") from None
            raise UnreadableImage(reason_of(reason)) from None
        raise
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise UnreadableImage(f"{image.GetNumberOfComponentsPerPixel()} numbers a voxel; only grey volumes are read")
    if not all(0 < step < math.inf for step in image.GetSpacing()):
        raise UnreadableImage(f"its header gives the spacing {by(image.GetSpacing())} mm")
    if not all(map(math.isfinite, (*image.GetDirection(), *image.GetOrigin()))):
        raise UnreadableImage("its header gives directions or an origin that are no numbers")
    return image


def _opened(path: Path):
    """SimpleITK's reader of a file, which has read its header; one that was looked at before."""
    reader = simpleitk().ImageFileReader()
    reader.SetImageIO(reader_of(path))  # not that of another format, whose content the file may have
    reader.SetFileName(os.fspath(path))
    reader.ReadImageInformation()
    return reader


def _replace_infinite(array: np.ndarray) -> None:
    if array.dtype.kind != "f" or (math.isfinite(array.min()) and math.isfinite(array.max())):
        return
    finite = np.isfinite(array)
    if not finite.any():
        raise UnreadableImage("holds no finite value")
    array[~finite] = array[finite].min()


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
    sitk = simpleitk()
    path = Path(path)
    if not path.name.endswith((".nii", ".nii.gz")):
        raise ValueError(f"{path}: labels are written as .nii or .nii.gz")
    image = load_image(Path(reference), None)
    layout = axis_layout(image.GetDirection())
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
        made = image_of(replace(grid, array=labels.astype(np.uint8)))
        made = sitk.Resample(made, image, sitk.Transform(), sitk.sitkNearestNeighbor, 0)
    write_image(made, path)


def write_image(image: object, path: Path) -> None:
    """Write a SimpleITK image with its header. The voxels of an `.mhd` file are in a `.raw` file beside it; the two do
    not appear at once.

    Raises:
        OSError: also on a full disk, of which the writer of NIfTI says nothing.
    """
    write = simpleitk().WriteImage
    if path.suffix == ".mhd":  # the header has the other file's name
        path.parent.mkdir(parents=True, exist_ok=True)
        with naming(path, path.with_suffix(".raw")), quiet():
            write(image, os.fspath(path))
            check_room(path.with_suffix(".raw"))
        return
    with writing(path) as unfinished, quiet():
        write(image, os.fspath(unfinished))
        check_room(unfinished)


def _check_shape(labels: np.ndarray, shape: tuple[int, ...]) -> None:
    if labels.shape != shape:
        raise ValueError(f"labels of {by(labels.shape)} voxels for a volume of {by(shape)}")
