"""SimpleITK, kept quiet, and its images as arrays and back."""

import contextlib
import functools
import os
import re
import threading
from collections.abc import Iterator

import numpy as np


@functools.cache
def simpleitk():
    """SimpleITK, told to keep its warnings to itself."""
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    return sitk


def use_one_thread() -> None:
    """Let SimpleITK use one thread in this process, as is right where processes share the cores."""
    simpleitk().ProcessObject.SetGlobalDefaultNumberOfThreads(1)


_stderr_lock = threading.Lock()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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


class _Held:
    """Lets an array use an image's memory, and keeps the image as long as the array lives."""

    def __init__(self, image) -> None:
        view = simpleitk().GetArrayViewFromImage(image)
        self.image = image
        self.__array_interface__ = {**view.__array_interface__, "data": (view.ctypes.data, False)}


def array_of(image) -> np.ndarray:
    """(K, J, I), writable, without a copy."""
    return np.asarray(_Held(image))


def set_type(reader, stored: int, dtype: type | None) -> None:
    sitk = simpleitk()
    small = (sitk.sitkInt8, sitk.sitkUInt8, sitk.sitkInt16, sitk.sitkUInt16)
    kinds = (*small, sitk.sitkInt32, sitk.sitkUInt32, sitk.sitkInt64, sitk.sitkUInt64, sitk.sitkFloat64)
    if stored in kinds and not (dtype is None and stored in small):
        reader.SetOutputPixelType(sitk.sitkFloat32)


def reason_of(text: str) -> str:
    """The part of a SimpleITK error that says something: its last line, without places in the source."""
    if "Unable to determine ImageIO" in text:
        return "not a volume that SimpleITK can read"
    if "MetaImageIO" in text:  # which gives the reason of whatever failed last in this process, such as "Success"
        return "damaged: its values are not such as its header says"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    noise = r"^((sitk::ERROR:|(itk::|ITK )ERROR:|Reason:|\w+\(0x[0-9a-f]+\):)\s*)+"
    return re.sub(noise, "", lines[-1]) if lines else "SimpleITK gives no reason"
