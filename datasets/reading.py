"""Decode image files of every kind met in medical sets to uint8, and find them in folders.

What comes out:

* 8-bit images keep their values. Palettes, CMYK, YCbCr become RGB; bilevel images become 0 and 255.
* More than 8 bits (16- and 32-bit integers, floats): the range between the 0.5th and 99.5th percentile is
  mapped to 0…255 linearly. Few files use their type's whole range (12-bit radiographs in 16-bit files), so
  mapping that would leave them dark; and single hot pixels or burnt-in markers must not set the contrast.
  Sixteen-bit *colour* goes through its whole range, since a stretch would change hues between images.
* Alpha is composed onto black, the background of radiographs and fundus photographs and the value of padding.
  An alpha channel that is the same everywhere carries nothing (some tools save all zeros) and is dropped.
* DICOM: rescale slope and intercept, then the first VOI window or look-up table, or where there is none the
  percentile range; MONOCHROME1 is inverted; padding is black.
"""

import gzip
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from medssl.datasets.registry import UnreadableImage, digest
from medssl.engine.options import InputError

DICOM_EXTENSIONS = (".dcm", ".dicom", ".dic", ".ima")
EXTENSIONS = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".tif", ".tiff", ".bmp", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm", *DICOM_EXTENSIONS),
)
PERCENTILES = (0.5, 99.5)
_TIFF_PHOTOMETRIC, _TIFF_SAMPLE_FORMAT, _EXIF_ORIENTATION = 262, 339, 274


class Files:
    """The source of a data set of files: image i is decoded from `paths[i]`."""

    def __init__(self, paths: Sequence[str | Path]) -> None:
        self.paths = list(paths)

    def __call__(self, index: int) -> np.ndarray:
        return read_image(self.paths[index])

    def fingerprint(self, index: int, content: bool = True) -> str:
        """The file's size in bytes and, with `content`, a digest of them; "missing" where it cannot be read."""
        try:
            if not content:
                return str(os.stat(self.paths[index]).st_size)
            with open(self.paths[index], "rb") as file:
                everything = file.read()
        except OSError:
            return "missing"
        return f"{len(everything)}:{digest(everything)}"


def read_image(path: str | Path) -> np.ndarray:
    """Decode one file.

    Returns:
        (H, W) for grey images or (H, W, 3) for colour, uint8; see the module's text for the range.

    Raises:
        UnreadableImage: for a file that is missing, damaged, of an unknown kind, or a stack of images; its
            text is the reason in one line.
    """
    return _decoded(path, lambda file: _read_dicom(file) if _is_dicom(file, path) else _read_picture(file))


def read_mask(path: str | Path) -> np.ndarray:
    """Decode a mask: the values that the file stores, a palette's numbers and not its colours.

    Returns:
        (H, W), of colours the largest channel.

    Raises:
        UnreadableImage: as `read_image`.
    """

    def stored(file: BinaryIO) -> np.ndarray:
        image = Image.open(file)
        _refuse_stack(image)
        values = np.asarray(_upright(image))
        if image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
            values = values[..., :-1]
        return values.max(2) if values.ndim == 3 else values

    return _decoded(path, stored)


def _decoded(path: str | Path, read: Callable[[BinaryIO], np.ndarray]) -> np.ndarray:
    """What `read` makes of a file, which may be gzipped; every error becomes an UnreadableImage of one line."""
    try:
        with (gzip.open if os.fspath(path).lower().endswith(".gz") else open)(path, "rb") as file:
            return read(file)
    except UnreadableImage:
        raise
    except Image.UnidentifiedImageError:
        raise UnreadableImage("not an image that Pillow or pydicom can read") from None
    except FileNotFoundError:
        raise UnreadableImage("no such file") from None
    except Exception as error:
        # Decoders raise nearly anything on damaged files: SyntaxError, struct.error, KeyError, zlib.error …
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UnreadableImage(" ".join(reason.split())) from error


def describe(path: str | Path) -> tuple[str, str]:
    """The kind and pixel type of a file, from its header only.

    Returns:
        the format's name ("PNG", "DICOM", …, or "?") and the stored pixels ("L", "I;16", "MONOCHROME1 12-bit").
    """
    try:
        with open(path, "rb") as file:
            if not _is_dicom(file, path):
                with Image.open(file) as image:
                    return image.format or "?", image.mode
            import pydicom

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                header = pydicom.dcmread(file, stop_before_pixels=True, force=True)
            return "DICOM", f"{header.get('PhotometricInterpretation', '?')} {header.get('BitsStored', '?')}-bit"
    except Exception:  # what is wrong is read_image's to say
        return "?", "?"


def find_images(folder: str | Path) -> list[Path]:
    """Image files below a folder, sorted by path.

    Files count by extension, and by the DICOM magic where there is no extension (or only the last number of
    a UID). Hidden files and `__MACOSX` are skipped. Links to folders are followed, each folder once.

    Raises:
        InputError: when `folder` is not a folder.
    """
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: not a folder")
    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    waiting = [os.fspath(folder)]
    while waiting:
        current = waiting.pop()
        status = os.stat(current)
        if (status.st_dev, status.st_ino) in seen:
            continue  # a link back to where we have been
        seen.add((status.st_dev, status.st_ino))
        folders = []
        with os.scandir(current) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name == "__MACOSX":
                    continue
                if entry.is_dir():
                    folders.append(entry.path)
                # A broken link is listed, so that reading it is what reports it.
                elif (entry.is_file() or entry.is_symlink()) and _looks_like_image(entry.path):
                    found.append(entry.path)
        waiting += sorted(folders, reverse=True)  # sorted: which of two links to a folder wins is fixed
    return sorted(map(Path, found), key=Path.as_posix)


def _looks_like_image(path: str) -> bool:
    extension = os.path.splitext(path)[1].lower()
    if extension and not extension[1:].isdigit():
        return extension in EXTENSIONS
    try:
        with open(path, "rb") as file:
            return _has_magic(file)
    except OSError:
        return False


def _has_magic(file: BinaryIO) -> bool:
    head = file.read(132)
    file.seek(0)
    return head[128:] == b"DICM"


def _is_dicom(file: BinaryIO, path: str | Path) -> bool:
    # Old DICOM files lack the magic; for those the extension speaks.
    return _has_magic(file) or os.fspath(path).lower().endswith(DICOM_EXTENSIONS)


def _read_picture(file: BinaryIO) -> np.ndarray:
    """Read what Pillow reads."""
    image = Image.open(file)
    _refuse_stack(image)
    if image.mode in ("L", "RGB") and "transparency" not in image.info and image.format != "TIFF":
        image.load()  # the common case: nothing but decoding
        return np.asarray(_upright(image))
    if image.format == "TIFF":
        values = _tiff_values(image)
        if values is not None:
            return values
    image = _upright(image)
    if image.mode == "F" or image.mode.startswith("I"):
        return to_uint8(np.asarray(image))
    if image.mode == "1":
        return np.asarray(image.convert("L"))
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        return _without_alpha(image)
    if image.mode == "L":
        return np.asarray(image)
    colour = np.asarray(image.convert("RGB"))
    # GIF has palettes only; one without colours is a grey image, such as a mask.
    is_grey = image.mode == "P" and (colour == colour[..., :1]).all()
    return np.ascontiguousarray(colour[..., 0]) if is_grey else colour


def _refuse_stack(image: Image.Image) -> None:
    # Only these formats hold stacks; a JPEG with a second picture (MPO) is still one photograph.
    if image.format not in ("TIFF", "GIF", "PNG") or getattr(image, "n_frames", 1) == 1:
        return
    size, frames = image.size, image.n_frames
    image.seek(1)
    second = image.size
    image.seek(0)
    # Pages of other sizes are the thumbnails and levels of a slide; its first page is the image.
    if second == size:
        raise UnreadableImage(f"a stack of {frames} frames, not one 2D image")


def _upright(image: Image.Image) -> Image.Image:
    if image.getexif().get(_EXIF_ORIENTATION, 1) == 1:
        return image
    return ImageOps.exif_transpose(image)


def _tiff_values(image: Image.Image) -> np.ndarray | None:
    """A grey TIFF whose pixels Pillow does not interpret by itself, or None for all others."""
    signed = image.tag_v2.get(_TIFF_SAMPLE_FORMAT, (1,))[0] == 2
    white_is_zero = image.tag_v2.get(_TIFF_PHOTOMETRIC) == 0
    deep = image.mode == "F" or image.mode.startswith("I")
    if not deep and not (signed and image.mode == "L"):
        return None
    values = np.asarray(_upright(image))
    if image.mode == "L":
        values = values.view(np.int8)
    elif image.mode == "I" and not signed:
        values = values.view(np.uint32)  # Pillow has no unsigned 32-bit mode
    levels = to_uint8(values)
    return 255 - levels if white_is_zero else levels


def _without_alpha(image: Image.Image) -> np.ndarray:
    grey = image.mode in ("L", "LA", "La")
    image = image.convert("RGBA")
    alpha = image.getchannel("A")
    low, high = alpha.getextrema()
    if low != high:
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return np.asarray(image.getchannel("R") if grey else image.convert("RGB"))


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
    return _levels(values, float(low), float(high))


def _levels(values: np.ndarray, low: float, high: float) -> np.ndarray:
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


def _read_dicom(file: BinaryIO) -> np.ndarray:
    """Read a single-frame DICOM file: radiographs, single slices, colour photographs."""
    import pydicom

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom warns of every oddity that it then copes with
        data = pydicom.dcmread(file, force=True)
        if not any(name in data for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
            raise UnreadableImage("a DICOM file without an image")
        frames = int(data.get("NumberOfFrames") or 1)
        if frames > 1:
            raise UnreadableImage(f"a DICOM stack of {frames} frames, not one 2D image")
        stored = _dicom_pixels(data)
        kind = str(data.get("PhotometricInterpretation", "MONOCHROME2"))
        if kind == "PALETTE COLOR":
            colour = pydicom.pixels.apply_color_lut(stored, data)
            return colour if colour.dtype == np.uint8 else (colour >> 8).astype(np.uint8)
        if stored.ndim == 3:
            return stored if stored.dtype == np.uint8 else _levels(stored, 0, 2 ** int(data.BitsStored) - 1)
        padding = _dicom_padding(data, stored)
        values = pydicom.pixels.apply_modality_lut(stored, data)
        levels = _dicom_window(data, values)
    if levels is None:
        as_stored = stored.dtype == np.uint8 and np.array_equal(values, stored)
        if as_stored:
            levels = stored * np.uint8(255) if int(data.BitsStored) == 1 else stored
        else:
            levels = to_uint8(values, padding)
    if kind == "MONOCHROME1":
        levels = 255 - levels
    return levels if padding is None else np.where(padding, np.uint8(0), levels)


def _dicom_pixels(data) -> np.ndarray:
    """Stored values of a frame: (H, W), or (H, W, 3) in RGB whatever colour space the file has."""
    from pydicom.pixels import pixel_array
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    if "TransferSyntaxUID" not in data.file_meta:  # a file without a header: as its elements were read
        implicit, little = data.original_encoding
        plain = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        data.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else plain
    try:
        return pixel_array(data)
    except RuntimeError as error:
        syntax = data.file_meta.TransferSyntaxUID.name
        lines = str(error).splitlines()
        reasons = "; ".join(" ".join(line.split()) for line in lines[1:]) or lines[0]
        raise UnreadableImage(f"cannot decode {syntax}: {reasons}") from error


def _dicom_padding(data, stored: np.ndarray) -> np.ndarray | None:
    """Where the file says that there is no image: (H, W) bool, or None."""
    first = data.get("PixelPaddingValue")
    if not isinstance(first, int):
        return None
    last = data.get("PixelPaddingRangeLimit", first)
    padding = (stored >= min(first, last)) & (stored <= max(first, last))
    return padding if padding.any() and not padding.all() else None


def _dicom_window(data, values: np.ndarray) -> np.ndarray | None:
    """`values` through the file's first VOI table or window, uint8; None where there is none of use."""
    import pydicom

    if data.get("VOILUTSequence"):
        table = data.VOILUTSequence[0]
        looked_up = pydicom.pixels.apply_voi(np.rint(values).astype(np.int64), data)
        return _levels(looked_up, 0, 2 ** int(table.LUTDescriptor[2]) - 1)
    center, width = (_first_number(data.get(name)) for name in ("WindowCenter", "WindowWidth"))
    if center is None or width is None:
        return None
    function = data.get("VOILUTFunction", "LINEAR")
    if function == "SIGMOID" and width > 0:
        with np.errstate(over="ignore"):
            levels = _levels(1 / (1 + np.exp(-4 * (values - center) / width)), 0, 1)
    elif function == "LINEAR_EXACT":
        levels = _levels(values, center - width / 2, center + width / 2)
    else:  # DICOM PS3.3 C.11.2.1.2.1
        levels = _levels(values, center - 0.5 - (width - 1) / 2, center - 0.5 + (width - 1) / 2)
    # Headers with a width of 1, or made for other values, leave nothing to see; then the range is measured.
    usable = levels.min() < levels.max() or values.min() == values.max()
    return levels if usable else None


def _first_number(value) -> float | None:
    try:
        return float(value)
    except TypeError:
        return float(value[0]) if value else None
    except ValueError:
        return None
