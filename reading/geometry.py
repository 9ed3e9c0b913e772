"""Where a volume's voxels lie: orientation, and resampling to other grids."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medssl.errors import UnreadableImage
from medssl.reading.simpleitk import array_of, simpleitk

AXES = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)  # the direction matrix of LPS, row by row
STRAIGHT = 1e-3  # directions closer to the axes than this (half a voxel in 512) count as the axes
MOST_VOXELS = 2**31
LARGEST_BOX = 1000  # voxels of the box around an oblique image for each of its own
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


def by(numbers: Sequence[float]) -> str:
    """Numbers of the axes in words: "512 x 512 x 133"."""
    return " x ".join(f"{number:g}" for number in numbers)


def axis_layout(direction: Sequence[float]) -> tuple[tuple[int, ...], tuple[bool, ...]] | None:
    """Which image axis lies along each patient axis, and which image axes run backwards; None for oblique scans."""
    matrix = np.array(direction).reshape(3, 3)
    order = np.abs(matrix).argmax(axis=1)
    straight = np.zeros((3, 3))
    straight[range(3), order] = np.sign(matrix[range(3), order])
    if sorted(order) != [0, 1, 2] or np.abs(matrix - straight).max() > STRAIGHT:
        return None
    return tuple(int(axis) for axis in order), tuple(bool(total < 0) for total in straight.sum(axis=0))


def flip_axes(array: np.ndarray, flips: Sequence[bool]) -> None:
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


def straightened(image, outside: float):
    """An oblique image interpolated onto the patient's axes, in the box around it, with spacing like its own."""
    sitk = simpleitk()
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
    if math.prod(size) > min(MOST_VOXELS, LARGEST_BOX * math.prod(image.GetSize())):
        raise UnreadableImage(f"{by(size)} voxels along the axes; are its directions and spacing right?")
    return sitk.Resample(image, size, sitk.Transform(), sitk.sitkLinear, low.tolist(), steps, AXES, outside)


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
        made[start - z0 : stop - z0] = on_grid(part, place, size, new, nearest, outside).transpose(2, 1, 0)
    return Volume(made.transpose(2, 1, 0), new, _shifted(volume.origin, (x0, y0, z0), new))


def _needed(start: int, stop: int, ratio: float, size: int) -> tuple[int, int]:
    """First and last (excluded) of `size` old voxels that new ones from `start` to `stop` are interpolated from."""
    return min(int(start * ratio), size - 1), min(int((stop - 1) * ratio) + 2, size)


def _shifted(origin: Sequence[float], voxels: Sequence[int], spacing: Sequence[float]) -> tuple[float, float, float]:
    return tuple(o + n * step for o, n, step in zip(origin, voxels, spacing))


def on_grid(
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
    sitk = simpleitk()
    kind = sitk.sitkNearestNeighbor if nearest else sitk.sitkLinear
    made = sitk.Resample(
        image_of(volume), tuple(size), sitk.Transform(), kind, tuple(origin), tuple(spacing), AXES, outside
    )
    return array_of(made).transpose(2, 1, 0)


def image_of(volume: Volume):
    """A SimpleITK image with a copy of a volume."""
    image = simpleitk().GetImageFromArray(np.ascontiguousarray(volume.array.transpose(2, 1, 0)))
    image.SetSpacing(volume.spacing)
    image.SetOrigin(volume.origin)
    return image


def volume_size(size: Sequence[int]) -> Sequence[int]:
    """The first three sizes; raises UnreadableImage where they are not all there is."""
    if len(size) == 2 or min(size[:3]) <= 1:
        raise UnreadableImage(f"a 2D image ({by(size)}), not a volume")
    if math.prod(size[3:]) != 1:
        raise UnreadableImage(f"{math.prod(size[3:])} volumes in one file ({by(size)})")
    return size[:3]
