"""Lungs of chest radiographs, whose names say whether they show tuberculosis: segmented, and classified too.

  montgomery  `CXR_png/MCUCXR_0001_0.png`, `ManualMask/leftMask/`, `ManualMask/rightMask/`, files of the same name
  shenzhen    `CXR_png/CHNCXR_0001_0.png`; where it is there, `mask/CHNCXR_0001_0_mask.png`

Of shenzhen's images, a fifth tests, drawn by scikit-learn with seed 42, as published.
"""

from collections.abc import Sequence
from pathlib import Path

from sklearn.model_selection import train_test_split

from medssl.datasets.base import ImageDataset, Info, Request
from medssl.datasets.masked_images import ImageCase, MaskFiles, complete_cases, matching_files
from medssl.datasets.splits import HELD_OUT, SPLIT_SEED, TEST, choose, split_all, split_by_patient

SIDES = ("leftMask", "rightMask")  # of Montgomery's masks
TUBERCULOSIS = ("normal", "tuberculosis")
SHENZHEN_SEED = 42


def open_splits(request: Request, splits: Sequence[str]) -> dict[str, ImageDataset]:
    """Open splits, with labels, and masks for those who ask.

    Raises:
        InputError: for files that are missing, and lists that cannot be used.
    """
    chosen = split_cases(request, splits)
    info = Info(request.name, 2, 1, "binary", TUBERCULOSIS)
    texture = request.resolve_texture(info)
    return {split: MaskFiles(info, cases, ("lungs",), texture_size=texture) for split, cases in chosen.items()}


def find_cases(request: Request) -> list[ImageCase]:
    """All images of the set."""
    return FIND[request.name](request.folder())


def split_cases(request: Request, splits: Sequence[str]) -> dict[str, list[ImageCase]]:
    """Those of the splits."""
    return choose(find_cases(request), request, splits, draw=DRAWS[request.name])


def draw_shenzhen(patients: Sequence[str]) -> dict[str, list[int]]:
    """A fifth tests, as published; an eighth of the others' patients validates."""
    rest, test = train_test_split(range(len(patients)), test_size=TEST, random_state=SHENZHEN_SEED)
    rest = sorted(rest)
    train, val = split_by_patient([patients[i] for i in rest], HELD_OUT / (1 - TEST), SPLIT_SEED)
    return {"train": [rest[i] for i in train], "val": [rest[i] for i in val], "test": sorted(test)}


def find_montgomery(root: Path) -> list[ImageCase]:
    """Montgomery's radiographs; a mask of each lung."""
    cases = [
        ImageCase(
            f"CXR_png/{path.name}", path, tuple(root / "ManualMask" / side / path.name for side in SIDES), None,
            match[1], int(match[2]),
        )
        for path, match in matching_files(root / "CXR_png", r"(MCUCXR_\d+)_([01])\.png")
    ]  # fmt: skip
    return complete_cases(root, cases, "CXR_png/MCUCXR_*.png; is this the Montgomery set's folder?")


def find_shenzhen(root: Path) -> list[ImageCase]:
    """Shenzhen's radiographs; some have a mask of the lungs."""
    cases = []
    for path, match in matching_files(root / "CXR_png", r"(CHNCXR_\d+)_([01])\.png"):
        mask = root / "mask" / f"{path.stem}_mask.png"
        masks = (mask,) if mask.is_file() else ()
        cases.append(ImageCase(f"CXR_png/{path.name}", path, masks, None, match[1], int(match[2])))
    return complete_cases(root, cases, "CXR_png/CHNCXR_*.png; is this the Shenzhen set's folder?")


FIND = {"montgomery": find_montgomery, "shenzhen": find_shenzhen}
DRAWS = {"montgomery": split_all, "shenzhen": draw_shenzhen}
