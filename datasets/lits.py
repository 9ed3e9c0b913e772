"""LiTS: the liver and its tumours in CTs (Bilic et al., Medical Image Analysis 84, 2023).

  volumes  `volume-N.nii[.gz]` and `segmentation-N.nii[.gz]`, anywhere in the folder: 0, 1 liver, 2 tumour
  slices   that `preprocess/slices.py` cuts: `images/volume-N/0000.png`, `masks/volume-N/0000.png`

A volume is a patient: its slices are of one split. Lists name volumes, or slices.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from medssl.datasets.base import ImageDataset, Info, Request
from medssl.datasets.masked_images import ImageCase, MaskFiles
from medssl.datasets.masked_volumes import Labels, VolumeCase, open_cases
from medssl.datasets.pairs import find_image_pairs
from medssl.datasets.splits import choose
from medssl.errors import InputError
from medssl.reading.find import find_volumes, without_extension

# The challenge's liver includes its tumours.
LABELS = Labels(("background", "liver", "tumour"), (0, 1, 2), {"liver": (1, 2), "tumour": (2,)})
SPACING = (0.0, 0.0, 1.0)  # mm, to which volumes are resampled: slices of 1 mm
WINDOW = (-200.0, 200.0)  # HU that become 0 and 1


def open_splits(request: Request, splits: Sequence[str]) -> dict[str, ImageDataset]:
    """Open splits of volumes, or of slices where the folder has them.

    Raises:
        InputError: for files that do not belong together, and lists that cannot be used.
    """
    root = request.folder()
    if has_slices(root):
        for option in ("labels", "spacing", "window"):
            if getattr(request, option):
                raise InputError(f"--{option}: is for volumes, and {root} has slices of them; leave it out")
        return open_slices(request, splits)
    if request.dims == 2:
        raise InputError(f"--d 2: {root} has volumes; cut them with preprocess/slices.py --data {root} --output DIR")
    return open_cases(request, splits, find_volume_cases(root), LABELS, SPACING, WINDOW)


def open_slices(request: Request, splits: Sequence[str]) -> dict[str, ImageDataset]:
    """Open splits of slices."""
    info = Info("lits", 2, 1)
    texture, opened = request.resolve_texture(info), {}
    for split, part in choose(find_slices(request.folder()), request, splits).items():
        data = MaskFiles(info, part, tuple(LABELS.regions), tuple(LABELS.regions.values()), False, texture)
        data.by_patient, data.allowed = True, LABELS.values
        opened[split] = data
    return opened


def has_slices(root: Path) -> bool:
    """Whether a folder is one of `preprocess/slices.py`."""
    return any((root / "images").glob("volume-*/*.png"))


def find_slices(root: Path) -> list[ImageCase]:
    """Slices with their masks."""
    return [replace(case, patient=case.image.parent.name) for case in find_image_pairs(root)]


def split_cases(request: Request, splits: Sequence[str]) -> dict[str, list[ImageCase]]:
    """The volumes of the splits."""
    return choose(find_cases(request), request, splits)


def find_cases(request: Request) -> list[ImageCase]:
    """One case a volume, whether the folder has volumes or slices: what lists name."""
    root = request.folder()
    volumes = sorted(path.name for path in (root / "images").glob("volume-*"))
    volumes = volumes or [case.id for case in find_volume_cases(root)]
    return [ImageCase(volume, root / volume, patient=volume) for volume in volumes]


def find_volume_cases(root: Path) -> list[VolumeCase]:
    """Volumes with their masks; an InputError where a volume has no segmentation."""
    found: dict[str, dict[str, Path]] = {"volume": {}, "segmentation": {}}
    for name, path in find_volumes(root):
        match = re.fullmatch(r"(volume|segmentation)-(\d+)", without_extension(name.rpartition("/")[2]))
        if match:
            found[match[1]][match[2]] = path
    if not found["volume"]:
        raise InputError(f"--data {root}: no volume-N.nii or volume-N.nii.gz in this folder or below it")
    for number, path in found["volume"].items():
        if number not in found["segmentation"]:
            raise InputError(f"{path}: has no mask segmentation-{number}.nii[.gz]; add it, or move the volume away")
    return [
        VolumeCase(f"volume-{number}", (found["volume"][number],), found["segmentation"][number], f"volume-{number}")
        for number in sorted(found["volume"], key=int)
    ]
