"""BraTS: tumours in brain MR (Menze et al., IEEE TMI 34, 2015).

A folder a case, with `*_t1`, `*_t1ce`, `*_t2`, `*_flair` and `*_seg`, `.nii[.gz]`: 0, 1 necrosis, 2 oedema, 4 enhancing
tumour.
"""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from medssl.datasets.base import ImageDataset, Request
from medssl.datasets.masked_volumes import Labels, VolumeCase, open_cases
from medssl.errors import InputError
from medssl.reading.find import find_volumes

MODALITIES = ("t1", "t1ce", "t2", "flair")
LABELS = Labels(
    ("background", "necrosis", "oedema", "enhancing"), (0, 1, 2, 4), {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}
)


def open_splits(request: Request, splits: Sequence[str]) -> dict[str, ImageDataset]:
    """Open splits.

    Raises:
        InputError: for files that are missing or do not belong together, and lists that cannot be used.
    """
    return open_cases(request, splits, find_cases(request.folder()), LABELS)


def find_cases(root: Path) -> list[VolumeCase]:
    """Cases; an InputError where a modality or the mask is not there."""
    cases: dict[str, dict[str, Path]] = {}
    for name, path in find_volumes(root):
        match = re.fullmatch(rf"(.*)_({'|'.join((*MODALITIES, 'seg'))})", name)
        if match:
            cases.setdefault(match[1], {})[match[2]] = path
    if not cases:
        raise InputError(f"--data {root}: no case with {', '.join(f'*_{each}.nii.gz' for each in MODALITIES)}")
    for prefix, files in cases.items():
        for each in (*MODALITIES, "seg"):
            if each not in files:
                raise InputError(f"{root / prefix}_{each}.nii[.gz]: missing; add it, or move the case away")
    folders = Counter(prefix.rpartition("/")[0] for prefix in cases)
    found = []
    for prefix, files in sorted(cases.items()):
        folder = prefix.rpartition("/")[0]
        own = folder if folder and folders[folder] == 1 else prefix
        found.append(VolumeCase(own, tuple(files[each] for each in MODALITIES), files["seg"], own))
    return found
