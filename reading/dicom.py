"""DICOM files: radiographs, single slices and photographs as pictures, and the series of a folder as a volume."""

import contextlib
import io
import math
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from medssl.errors import LACKS, InputError, UnreadableImage, unreadable
from medssl.reading.elements import check_elements, inflated
from medssl.reading.find import DICOM_EXTENSIONS, is_dicom
from medssl.reading.geometry import by, volume_size
from medssl.reading.intensities import to_levels, to_uint8
from medssl.reading.simpleitk import set_type, simpleitk


def read_frame(file: BinaryIO) -> np.ndarray:
    """Read a single-frame DICOM file: radiographs, single slices, colour photographs."""
    import pydicom

    content = inflated(file.read())  # which pydicom would do without bound
    check_elements(content, subsampled=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom warns of every oddity that it then copes with
        data = pydicom.dcmread(io.BytesIO(content), force=True)  # of files, it reads as much as an element claims
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
            return stored if stored.dtype == np.uint8 else to_levels(stored, 0, 2 ** int(data.BitsStored) - 1)
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
        return pixel_array(data, allow_excess_frames=False)  # of values behind the last, it would make frames
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
        return to_levels(looked_up, 0, 2 ** int(table.LUTDescriptor[2]) - 1)
    center, width = (_first_number(data.get(name)) for name in ("WindowCenter", "WindowWidth"))
    if center is None or width is None:
        return None
    function = data.get("VOILUTFunction", "LINEAR")
    if function == "SIGMOID" and width > 0:
        with np.errstate(over="ignore"):
            levels = to_levels(1 / (1 + np.exp(-4 * (values - center) / width)), 0, 1)
    elif function == "LINEAR_EXACT":
        levels = to_levels(values, center - width / 2, center + width / 2)
    else:  # DICOM PS3.3 C.11.2.1.2.1
        levels = to_levels(values, center - 0.5 - (width - 1) / 2, center - 0.5 + (width - 1) / 2)
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


HEAD = 2**20  # bytes of a file that have its series, which comes early
EVEN = 0.1  # share by which the gaps of a DICOM series may differ


def load_series(folder: Path, dtype: type | None):
    """The DICOM series of a folder. Series of one or two images (scouts, reports) do not count."""
    if not folder.exists():
        raise UnreadableImage("no such file or folder")
    with slices_alone(folder) as (checked, pixels):
        return _load_checked(checked, pixels, dtype)


@contextlib.contextmanager
def slices_alone(folder: Path) -> Iterator[tuple[Path, dict[str, int]]]:
    """A folder with links to the DICOM files of a folder, each of which holds what its elements claim; and by the
    links' names, how many pixels each has.

    Raises:
        UnreadableImage: for one that does not. InputError: where no temporary folder can be written.
    """
    slices, pixels = [], {}
    for path in sorted(folder.iterdir()):
        if not path.is_file() or path.name.startswith("."):
            continue
        with unreadable(f"{path.name} is damaged"), open(path, "rb") as file:
            if is_dicom(file, path):
                pixels[path.name] = check_elements(file.read())
                slices.append(path)
    with contextlib.ExitStack() as stack:
        try:
            links = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
            for path in slices:
                (links / path.name).symlink_to(path.resolve())
        except OSError as error:  # not the series' fault
            if error.errno in LACKS:
                raise
            raise InputError(
                f"cannot link DICOM slices in a temporary folder ({error.strerror or error}); set TMPDIR to a folder"
                " that can be written, on a disk with room"
            ) from error
        yield links, pixels


def _load_checked(folder: Path, pixels: dict[str, int], dtype: type | None):
    """`load_series` of a folder with nothing else than checked files, with so many pixels each."""
    sitk = simpleitk()
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
    for path in map(Path, names[large[0]]):  # ITK sees to it that all are of the first's size
        if pixels[path.name] != math.prod(first.GetSize()):
            raise UnreadableImage(f"DICOM slices of {by(first.GetSize()[:2])} pixels, and {path.name} is of others")
    volume_size((*first.GetSize()[:2], len(names[large[0]])))
    set_type(reader, first.GetPixelID(), dtype)
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


def is_series(folder: Path) -> bool:
    """Whether more than two of a folder's DICOM files share a series: two may be views of a radiograph."""
    import pydicom

    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    uids: Counter = Counter()
    for path in files[:16]:
        old = path.suffix.lower() in DICOM_EXTENSIONS  # may lack the magic
        try:
            with open(path, "rb") as file:
                head = io.BytesIO(inflated(file.read(HEAD), HEAD))
            header = pydicom.dcmread(head, stop_before_pixels=True, force=old, specific_tags=["SeriesInstanceUID"])
            uid = header.get("SeriesInstanceUID")  # which pydicom decodes only now
        except Exception:  # a picture beside the slices, or damaged: what is wrong is said where it is read
            continue
        uids.update([str(uid)] if uid else [])
    return max(uids.values(), default=0) > 2
