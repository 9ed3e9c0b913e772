"""Files of tensors: written atomically, read without ever executing what they hold."""

import argparse
import pickle
import struct
from pathlib import Path
from zipfile import BadZipFile

import torch
from torch import Tensor

from medssl.errors import InputError
from medssl.files import file_digest, write_atomic

FORMAT_VERSION = 2  # of what runs leave

# Encoders whose names begin so ended before their network's last ReLU in files of version 1.
WITHOUT_LAST_RELU = ("densenet", "xception")


def lacks_last_relu(version: object, arch: str) -> bool:
    """Whether what a run of a version left is of an encoder without its network's last ReLU; of no version, which files
    of others have: no."""
    return isinstance(version, int) and version < 2 and arch.startswith(WITHOUT_LAST_RELU)


def save_atomic(content: object, path: str | Path) -> None:
    """Write `content` with torch.save so that `path` always holds a complete file, old or new.

    The data reach the disk before the rename; a kill or a full disk leaves the previous file in place.
    """

    def write(unfinished: Path) -> None:
        with open(unfinished, "wb") as file:  # torch's own file would not tell why it cannot be written
            torch.save(content, file)

    write_atomic(path, write)


def weights_digest(path: str | Path) -> str:
    """SHA-256 of a checkpoint, hexadecimal; an InputError when it is not there."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such checkpoint file")
    return file_digest(path)


def load_safe(path: str | Path, device: str | torch.device = "cpu") -> object:
    """Read a file written by torch.save: tensors, plain values, and argparse.Namespace (published files).

    Raises:
        InputError: when the file is missing, truncated, no checkpoint, or asks for any other class, which
            would mean running code from it.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        text = str(error)
        if "Unsupported global" in text or "Unsupported class" in text or "GLOBAL" in text:
            raise InputError(f"{path}: refused, the file wants to run code on loading") from None
        raise InputError(f"{path}: not a checkpoint, or a truncated one") from None
    except (ArithmeticError, AssertionError, AttributeError, BadZipFile, EOFError, LookupError, MemoryError, OSError,
            RuntimeError, TypeError, ValueError, struct.error) as error:  # fmt: skip
        if isinstance(error, OSError) and error.filename is not None:
            raise  # no permission, for example; a file cut very short gives an OSError without a name
        raise InputError(f"{path}: not a checkpoint, or a truncated one") from None


def find_state_dict(content: object, path: str | Path) -> dict[str, Tensor]:
    """The state dict inside a checkpoint: under `state_dict`, `model` or `encoder`, or the whole content."""
    for key in ("state_dict", "model", "encoder"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if isinstance(content, dict):
        tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
        if tensors:
            return tensors
    run = isinstance(content, dict) and {"method", "optimizer"} <= set(content)
    more = "; it is a run's state, and encoder.pt beside it has the encoder" if run else ""
    raise InputError(f"{path}: no state dict in this file{more}")
