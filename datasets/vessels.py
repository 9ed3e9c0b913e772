"""Vessels of fundus photographs.

  drive  `training/images/*_training.tif`, `training/1st_manual/*_manual1.gif`, `training/mask/*_training_mask.gif`
         (the field of view), and `test/` alike, where there is one with `1st_manual`
  stare  `stare-images/*.ppm[.gz]`, `labels-ah/*.ah.ppm[.gz]`
  chase  `Image_01L.jpg`, `Image_01L_1stHO.png`; their field of view, and stare's, is what is not black

Drive is split as published where its test masks are there, the others 70/10/20 by patient.
"""

from collections.abc import Sequence
from pathlib import Path

from medssl.datasets.base import ImageDataset, Info, Request
from medssl.datasets.masked_images import ImageCase, MaskFiles, complete_cases, matching_files
from medssl.datasets.splits import choose


def open_splits(request: Request, splits: Sequence[str]) -> dict[str, ImageDataset]:
    """Open splits, with masks for those who ask.

    Raises:
        InputError: for files that are missing, and lists that cannot be used.
    """
    chosen = split_cases(request, splits)
    info = Info(request.name, 2, 3)
    texture = request.resolve_texture(info)
    return {split: MaskFiles(info, cases, ("vessels",), None, True, texture) for split, cases in chosen.items()}


def find_cases(request: Request) -> list[ImageCase]:
    """All images of the set."""
    return FIND[request.name](request.folder())


def split_cases(request: Request, splits: Sequence[str]) -> dict[str, list[ImageCase]]:
    """Those of the splits."""
    return choose(find_cases(request), request, splits)


def find_drive(root: Path) -> list[ImageCase]:
    """DRIVE's images; those in `test/` only where their masks are there."""
    cases = []
    for part in ("training", "test"):
        home = root / part
        if part == "test" and not (home / "1st_manual").is_dir():
            continue
        cases += [
            ImageCase(
                f"{part}/images/{path.name}", path, (home / "1st_manual" / f"{match[1]}_manual1.gif",),
                home / "mask" / f"{match[1]}_{part}_mask.gif", match[1], part=part.removesuffix("ing"),
            )
            for path, match in matching_files(home / "images", rf"(\d+)_{part}\.tiff?")
        ]  # fmt: skip
    return complete_cases(root, cases, "training/images/*_training.tif; is this DRIVE's folder?")


def find_stare(root: Path) -> list[ImageCase]:
    """STARE's images that the first observer labelled."""
    labels = {match[1]: path for path, match in matching_files(root / "labels-ah", r"(im\d+)\.ah\.ppm(?:\.gz)?")}
    cases = [
        ImageCase(f"stare-images/{path.name}", path, (labels[match[1]],), None, match[1])
        for path, match in matching_files(root / "stare-images", r"(im\d+)\.ppm(?:\.gz)?")
        if match[1] in labels
    ]
    return complete_cases(root, cases, "stare-images/*.ppm[.gz] with labels-ah/*.ah.ppm[.gz]")


def find_chase(root: Path) -> list[ImageCase]:
    """CHASE_DB1's images, two eyes of a child each."""
    cases = [
        ImageCase(path.name, path, (root / f"Image_{match[1]}{match[2]}_1stHO.png",), None, match[1])
        for path, match in matching_files(root, r"Image_(\d+)([LR])\.jpg")
    ]
    return complete_cases(root, cases, "Image_01L.jpg with Image_01L_1stHO.png")


FIND = {"drive": find_drive, "stare": find_stare, "chase": find_chase}
