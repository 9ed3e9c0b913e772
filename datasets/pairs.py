"""Any folder of images, or volumes, with masks.

  images   `images/` with `masks/` or `labels/`, where a mask has the name of its image, with or without `_seg`, `_mask`
           or `_label`. Where all masks hold one value beside 0, it is the label; else each value is one
  volumes  `images/` with `masks/` or `labels/` (`imagesTr/` with `labelsTr/`), where a mask has the name of its image;
           or a mask beside each image, whose name goes on with `_seg`, `_mask` or `_label`. Masks hold whole numbers
           from 0, the background, to 255

Splits are those of `splits.choose`; lists name images by path or file name, volumes by path with or without extension.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from medssl.datasets.base import Info, Request
from medssl.datasets.masked_images import ImageCase, MaskFiles, complete_cases
from medssl.datasets.masked_volumes import VolumeCase
from medssl.datasets.splits import MASK_ENDS, MASK_FOLDERS, Patients, choose, mask_of
from medssl.errors import InputError, UnreadableImage
from medssl.reading.find import find_images, find_volumes, without_extension
from medssl.reading.masks import read_mask
from medssl.reading.pictures import read_image

MOST_LABELS = 32  # a folder's masks with more values are no label maps


def find_image_pairs(root: Path) -> list[ImageCase]:
    """A folder's images with their masks, as the top of this page says; an InputError for an image without one."""
    masks = next((root / folder for folder in MASK_FOLDERS["images"] if (root / folder).is_dir()), None)
    if not (root / "images").is_dir() or masks is None:
        raise InputError(f"--data {root}: wanted are the folders images and masks")
    known: dict[str, Path] = {}
    for path in find_images(masks):
        stem = path.relative_to(masks).with_suffix("").as_posix()
        if stem in known:
            raise InputError(f"{path}: the same name as {known[stem].name}; keep one of them, or rename it")
        known[stem] = path
    images = {path.relative_to(root).as_posix(): path for path in find_images(root / "images")}
    patients, cases = Patients(root, images), []
    for name, path in images.items():
        stem = path.relative_to(root / "images").with_suffix("").as_posix()
        mask = mask_of(stem, known)
        if mask is None:
            raise InputError(f"{path}: no mask of that name in {masks}; add it, or move the image away")
        cases.append(ImageCase(name, path, (mask,), None, patients.of(name) or stem))
    return complete_cases(root, cases, "images in images/")


def has_image_pairs(root: Path) -> bool:
    """Whether a folder is one of images and masks."""
    return (root / "images").is_dir() and any((root / folder).is_dir() for folder in MASK_FOLDERS["images"])


def open_images(request: Request, splits: Sequence[str]) -> dict[str, MaskFiles]:
    """Open splits of a folder of images and masks.

    Raises:
        InputError: for an image without a mask, masks without labels, or with more values than labels have, and lists
            that cannot be used.
    """
    cases = find_image_pairs(request.folder())
    chosen = choose(cases, request, splits)
    lossy = next((case.masks[0] for case in cases if case.masks[0].suffix.lower() in (".jpg", ".jpeg")), None)
    if lossy:
        raise InputError(f"{lossy}: a mask in JPEG, which changes values; save masks as PNG")
    values = discover_image_labels(cases, request.labels)
    names = [f"label {value}" for value in values] if values else ["foreground"]
    info = Info("folder", 2, channels_of([case.image for case in cases]))
    texture = request.resolve_texture(info)
    groups = values and [(value,) for value in values]
    return {split: MaskFiles(info, part, names, groups, False, texture) for split, part in chosen.items()}


def discover_image_labels(cases: Sequence[ImageCase], wanted: Sequence[int] | None) -> list[int] | None:
    """The values of masks that are labels: `wanted`, or all; None where there is one beside 0."""

    def values(case: ImageCase) -> set[int]:
        try:
            return set(np.unique(read_mask(case.masks[0])).tolist()) - {0}
        except UnreadableImage:  # what is wrong is said where it is read
            return set()

    with ThreadPoolExecutor(8) as pool:
        found = sorted(set().union(*pool.map(values, cases)))
    if not found:
        raise InputError(f"{cases[0].masks[0]}: neither this nor any other mask has a value above 0")
    if wanted:
        absent = set(wanted) - set(found)
        if absent:
            raise InputError(f"--labels {min(absent)}: no mask has it; they have {', '.join(map(str, found[:20]))}")
        return sorted(set(wanted))
    if len(found) > MOST_LABELS:
        raise InputError(
            f"{cases[0].masks[0].parent}: masks with {len(found)} different values are no label maps; save them "
            "without interpolation as PNG, or choose values with --labels"
        )
    return found if len(found) > 1 else None


def by_stem(found: Sequence[tuple[str, Path]]) -> dict[str, Path]:
    """Volumes by their names without extension; an InputError for two of one name."""
    named: dict[str, Path] = {}
    for name, path in found:
        stem = without_extension(name)
        if stem in named:
            raise InputError(f"{path}: the same name as {named[stem].name}; keep one of them, or rename it")
        named[stem] = path
    return named


def has_volume_pairs(root: Path) -> bool:
    """Whether a folder's volumes come with masks, as the top of this page says."""
    if any((root / images).is_dir() and (root / m).is_dir() for images, masks in MASK_FOLDERS.items() for m in masks):
        return True
    names = {without_extension(name) for name, _ in find_volumes(root)}
    return any(name.endswith(end) and name.removesuffix(end) in names for name in names for end in MASK_ENDS)


def find_volume_pairs(root: Path) -> list[VolumeCase]:
    """Cases of a folder of image and mask files, as the top of this page says; an InputError for one alone."""
    for images, choices in MASK_FOLDERS.items():
        masks = next((folder for folder in choices if (root / folder).is_dir()), None)
        if (root / images).is_dir() and masks:
            known = by_stem(find_volumes(root / masks))
            known |= {name.removesuffix(end): path for name, path in known.items() for end in MASK_ENDS}
            names = by_stem(find_volumes(root / images))
            where = f"in {root / masks}"
            break
    else:
        if (root / "images").is_dir() or (root / "masks").is_dir():
            there, absent = ("images", "masks") if (root / "images").is_dir() else ("masks", "images")
            raise InputError(f"--data {root}: has the folder {there}, and no folder {absent} beside it")
        found = by_stem(find_volumes(root))
        known = {
            name.removesuffix(end): path for name, path in found.items() for end in MASK_ENDS if name.endswith(end)
        }
        names = {name: path for name, path in found.items() if not name.endswith(MASK_ENDS)}
        where = f"beside it (*{', *'.join(MASK_ENDS)})"
    if not names:
        raise InputError(
            f"--data {root}: no volumes with masks; wanted are the folders images and masks, or NAME.nii.gz and "
            "NAME_seg.nii.gz side by side"
        )
    for name, path in names.items():
        if name not in known:
            raise InputError(f"{path}: no mask of that name {where}; add it, or move the image away")
    alone = [path for name, path in known.items() if path not in {known[n] for n in names}]
    if alone:
        raise InputError(f"{alone[0]}: a mask without an image; add the image, or move the mask away")
    paths = {name: without_extension(path.relative_to(root).as_posix()) for name, path in names.items()}
    patients = Patients(root, paths.values())
    cases = [VolumeCase(name, (names[name],), known[name], patients.of(paths[name]) or name) for name in names]
    return sorted(cases, key=lambda case: case.id)


def channels_of(paths: Sequence[Path]) -> int:
    """1 where a handful of images, spread over the set, are all grey (also grey stored as colour), else 3."""
    reasons = []
    grey = []
    for i in np.unique(np.linspace(0, len(paths) - 1, 8).astype(int)):
        try:
            pixels = read_image(paths[i])
        except UnreadableImage as error:
            reasons.append(f"{paths[i]}: {error}")
            continue
        grey.append(pixels.ndim == 2 or bool((pixels == pixels[..., :1]).all()))
    if not grey:
        raise InputError(f"data set folder: none of {len(reasons)} tried images can be read, first {reasons[0]}")
    return 1 if all(grey) else 3
