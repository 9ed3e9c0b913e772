"""Stored values to grey levels of pictures, and to [0, 1] of volumes."""

import numpy as np

from medssl.errors import UnreadableImage

PERCENTILES = (0.5, 99.5)


def to_uint8(values: np.ndarray, ignore: np.ndarray | None = None) -> np.ndarray:
    """Map the range between the `PERCENTILES` of an image to 0…255, clipping what is outside.

    Args:
        values: any real type, (H, W) or (H, W, 3).
        ignore: (H, W) bool, pixels that do not count for the range (padding), or None.

    Returns:
        uint8 of the same shape. Values that are not finite become 0, and so does a constant image.

    Raises:
        UnreadableImage: when no value is finite.
    """
    step = max(1, int((values.size / 2**17) ** 0.5))  # about 10^5 values give percentiles well enough
    some = values[::step, ::step]
    some = some[~ignore[::step, ::step]] if ignore is not None and not ignore.all() else some.ravel()
    if values.dtype.kind == "f":
        some = some[np.isfinite(some)]
    if some.size == 0:
        raise UnreadableImage("holds no finite value")
    low, high = np.percentile(some, PERCENTILES)
    if low == high:  # nearly all pixels are equal, as in a mask
        finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
        low, high = float(finite.min()), float(finite.max())
    return to_levels(values, float(low), float(high))


def to_levels(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map [low, high] to 0…255, rounded and clipped; nothing but zeros when the range is empty."""
    if not high > low:
        return np.zeros(values.shape, np.uint8)
    # Eight and sixteen bits fit float32 exactly; 32-bit integers and float64 need more.
    kind = np.float32 if values.dtype.itemsize <= 2 or values.dtype == np.float32 else np.float64
    with np.errstate(invalid="ignore", over="ignore"):  # infinities and NaN are set to 0 below or clipped
        scaled = (values.astype(kind) - kind(low)) * kind(255 / (high - low))
    np.clip(scaled, 0, 255, out=scaled)
    if values.dtype.kind == "f":
        scaled[~np.isfinite(values)] = 0
    return np.rint(scaled, out=scaled).astype(np.uint8)


WINDOW = (-1000.0, 1000.0)  # Hounsfield units that become 0 and 1
LOWEST_HU = -1024  # scanners write nothing below; what lies below is padding
CT_BELOW = -200  # only CTs have such values
PERCENTILES = (0.5, 99.5)


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
