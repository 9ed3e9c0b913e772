"""Files whose values are labels."""

from pathlib import Path
from typing import BinaryIO

import numpy as np

from medssl.errors import UnreadableImage
from medssl.reading.geometry import AXES, Volume
from medssl.reading.pictures import decoded, opened, refuse_stack, upright
from medssl.reading.simpleitk import array_of, simpleitk
from medssl.reading.volumes import load_image


def read_mask(path: str | Path) -> np.ndarray:
    """Decode a mask: the values that the file stores, a palette's numbers and not its colours.

    Returns:
        (H, W), of colours the largest channel.

    Raises:
        UnreadableImage: as `read_image`.
    """

    def stored(file: BinaryIO) -> np.ndarray:
        image = opened(file)
        refuse_stack(image)
        values = np.asarray(upright(image))
        if image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
            values = values[..., :-1]
        return values.max(2) if values.ndim == 3 else values

    return decoded(path, stored)


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
    sitk = simpleitk()
    try:
        image = load_image(path, None)
    except UnreadableImage as error:
        raise UnreadableImage(f"its mask {path.name}: {error}") from None
    kind = sitk.sitkNearestNeighbor
    made = sitk.Resample(image, grid.array.shape, sitk.Transform(), kind, grid.origin, grid.spacing, AXES, 0.0)
    array = array_of(made).transpose(2, 1, 0)
    wrong = wrong_label(array)
    if wrong is not None:
        raise UnreadableImage(f"its mask {path.name} has the value {wrong:g}; labels are whole numbers to 255")
    return array.astype(np.uint8)


def read_values(path: Path) -> np.ndarray:
    """The values that occur in a file, ascending; raises UnreadableImage as `read_volume` does."""
    return np.unique(array_of(load_image(path, None)))


def wrong_label(values: np.ndarray) -> float | None:
    """One of the values that is no whole number from 0 to 255, as labels are; None where there is none."""
    wrong = values[~((values >= 0) & (values <= 255) & (values == np.floor(values)))]
    return float(wrong[0]) if wrong.size else None


def run_lengths(text: str | bytes) -> list[int]:
    """COCO's compressed run lengths as numbers: five bits a character, the lowest first, of the difference to the last
    but one length.

    Raises:
        ValueError, IndexError: for other text.
    """
    lengths: list[int] = []
    codes = [code - 48 for code in (text.encode("ascii") if isinstance(text, str) else text)]
    if not all(0 <= code < 64 for code in codes):
        raise ValueError("letters that run lengths have not")
    place = 0
    while place < len(codes):
        value = bits = 0
        while True:
            code = codes[place]
            value |= (code & 31) << bits
            place, bits = place + 1, bits + 5
            if not code & 32:
                break
            if bits > 60:
                raise ValueError("a run length of more than 60 bits")
        if code & 16:
            value -= 1 << bits
        lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
    return lengths
