"""What data are known by, wherever they lie: digests of ids, labels, and samples of the contents."""

import os
import re
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path

import numpy as np

from medssl.datasets.base import ImageDataset
from medssl.errors import UnreadableImage
from medssl.files import digest, name_bytes

SAMPLED = 16  # images of a split whose contents a run remembers


def sample_contents(data: ImageDataset) -> str:
    """What the contents of `SAMPLED` images, spread over a split, are known by: their files' fingerprints, or pixels'.

    Of volumes, the size and the beginning of each file, for a whole one takes long to read.
    """
    prints = []
    for i in np.unique(np.linspace(0, len(data) - 1, SAMPLED).astype(int)):
        if hasattr(data.read, "fingerprint"):
            prints.append(data.read.fingerprint(data.positions[i]))
            continue
        try:
            found = data.read(data.positions[i])
        except UnreadableImage:
            prints.append("unreadable")
            continue
        if isinstance(found, np.ndarray):
            prints.append(digest(np.ascontiguousarray(found).tobytes()))
        else:
            prints += [_beginning(path) for path in files_in(found)]
    return digest("\n".join(prints).encode())


def sample_annotations(data: ImageDataset) -> list[str]:
    """What the annotations of those images are known by; none for a set without."""
    prints = []
    for i in np.unique(np.linspace(0, len(data) - 1, SAMPLED).astype(int)):
        try:
            prints += [digest(np.ascontiguousarray(part).tobytes()) for part in data.annotation(i)]
        except UnreadableImage:
            prints.append("unreadable")
    return prints


DETACHED = re.compile(rb"^(?:ElementDataFile *=|data ?file:) *([^\r\n]+)", re.MULTILINE)


def files_in(value: object) -> list[Path]:
    """The files of what a source of volumes gives: a path, or a tuple or dataclass that holds some.

    A folder stands for the slices in it, and a header (.mhd, .nhdr) also for the file with its voxels.
    """
    if isinstance(value, Path):
        if value.is_dir():
            return sorted(value.iterdir())
        if value.suffix.lower() in (".mhd", ".nhdr") and value.is_file():
            with open(value, "rb") as file:
                found = DETACHED.search(file.read(2**16))
            return [value, *([value.parent / os.fsdecode(found[1].strip())] if found else [])]
        return [value]
    parts = value if isinstance(value, tuple | list) else vars(value).values() if is_dataclass(value) else ()
    return [path for part in parts for path in files_in(part)]


def _beginning(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return f"{path.stat().st_size}:{digest(file.read(2**16))}"
    except OSError:
        return "missing"


def data_digest(splits: Mapping[str, ImageDataset], labels: bool = True) -> str:
    """What tells these images from others, wherever they lie: the splits' ids, labels, and samples of the contents, and
    of the masks where they are used."""
    parts = []
    for name, data in splits.items():
        known = b"" if data.labels is None or not labels else data.labels.numpy().tobytes()
        contents = sample_contents(data) if data.contents is None else data.contents
        masks = sample_annotations(data) if labels else []
        contents = digest("\n".join([contents, *masks]).encode()) if masks else contents
        parts += [name, "\n".join(data.ids), digest(known), contents]
    return digest(name_bytes("\0".join(parts)))
