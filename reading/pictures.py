"""Decode image files of every kind met in medical sets to uint8.

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

import functools
import gzip
import io
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from medssl.errors import UnreadableImage, unreadable
from medssl.reading.arrays import DEFLATE, most_inflated
from medssl.reading.dicom import HEAD, read_frame
from medssl.reading.elements import inflated
from medssl.reading.find import is_dicom
from medssl.reading.intensities import to_uint8


def read_image(path: str | Path) -> np.ndarray:
    """Decode one file.

    Returns:
        (H, W) for grey images or (H, W, 3) for colour, uint8; see the module's text for the range.

    Raises:
        UnreadableImage: for a file that is missing, damaged, of an unknown kind, or a stack of images; its
            text is the reason in one line.
    """
    return decoded(path, lambda file: read_frame(file) if is_dicom(file, path) else _read_picture(file))


def decoded(path: str | Path, read: Callable[[BinaryIO], np.ndarray]) -> np.ndarray:
    """What `read` makes of a file, which may be gzipped; every error becomes an UnreadableImage of one line."""
    with unreadable():
        try:
            with open(path, "rb") as file:
                return read(_gunzipped(file) if os.fspath(path).lower().endswith(".gz") else file)
        except Image.UnidentifiedImageError:
            raise UnreadableImage("not an image that Pillow or pydicom can read") from None
        except FileNotFoundError:
            raise UnreadableImage("no such file") from None


def describe(path: str | Path) -> tuple[str, str]:
    """The kind and pixel type of a file, from its header only.

    Returns:
        the format's name ("PNG", "DICOM", …, or "?") and the stored pixels ("L", "I;16", "MONOCHROME1 12-bit").
    """
    try:
        with open(path, "rb") as file:
            if not is_dicom(file, path):
                with recognised(file) as image:
                    return image.format or "?", image.mode
            import pydicom

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                head = inflated(file.read(), HEAD)
                header = pydicom.dcmread(io.BytesIO(head), stop_before_pixels=True, force=True)
            return "DICOM", f"{header.get('PhotometricInterpretation', '?')} {header.get('BitsStored', '?')}-bit"
    except Exception:  # what is wrong is read_image's to say
        return "?", "?"


def _gunzipped(file: BinaryIO) -> BinaryIO:
    """What a gzip file holds, in memory."""
    most = most_inflated(os.fstat(file.fileno()).st_size)
    with gzip.open(file) as content:
        data = content.read(most + 1)
    if len(data) > most:
        raise UnreadableImage(f"gunzips to more than {most} bytes")
    return io.BytesIO(data)


def _read_picture(file: BinaryIO) -> np.ndarray:
    """Read what Pillow reads."""
    image = opened(file)
    refuse_stack(image)
    if image.mode in ("L", "RGB") and "transparency" not in image.info and image.format != "TIFF":
        image.load()  # the common case: nothing but decoding
        return np.asarray(upright(image))
    if image.format == "TIFF":
        values = _tiff_values(image)
        if values is not None:
            return values
    image = upright(image)
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


# Pixels for each byte of a file, where the format sets a bound: eight in a byte of what deflate packs. The codes of
# others (WebP, JPEG 2000, AVIF, …) have none, and for them Pillow's own limit of pixels is the only one.
MOST_PIXELS = {"PNG": 8 * DEFLATE}


# Of what Pillow recognises, whatever a file's name says: EPS would run Ghostscript, and others are no pictures.
RASTERS = ("PNG", "JPEG", "TIFF", "BMP", "DIB", "GIF", "PPM", "WEBP", "JPEG2000", "AVIF")


@functools.cache
def _rasters() -> list[str]:
    """Of RASTERS, those that this Pillow has."""
    Image.init()
    return [kind for kind in RASTERS if kind in Image.OPEN]


def recognised(file: BinaryIO | Path) -> Image.Image:
    """A picture whose header was read, by Pillow, of the formats that the project reads; raises what Pillow raises."""
    return Image.open(file, formats=_rasters())


def opened(file: BinaryIO) -> Image.Image:
    """A picture whose header was read; an UnreadableImage for one that claims more pixels than its bytes can hold, and
    for more than Pillow's limit."""
    image = recognised(file)
    place = file.tell()
    length = file.seek(0, os.SEEK_END)
    file.seek(place)
    width, height = image.size
    if width * height > MOST_PIXELS.get(image.format or "", math.inf) * length:
        raise UnreadableImage(f"claims {width} x {height} pixels in {length} bytes")
    return image


_TIFF_PHOTOMETRIC, _TIFF_SAMPLE_FORMAT, _EXIF_ORIENTATION = 262, 339, 274


def refuse_stack(image: Image.Image) -> None:
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


def upright(image: Image.Image) -> Image.Image:
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
    values = np.asarray(upright(image))
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
