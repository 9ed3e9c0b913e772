"""Volumes with masks: LiTS, BraTS, and any folder of image and mask files. A case is a scan and its mask.

  lits    `volume-N.nii[.gz]` and `segmentation-N.nii[.gz]`, anywhere in the folder: 0, 1 liver, 2 tumour
  brats   a folder a case: `*_t1`, `*_t1ce`, `*_t2`, `*_flair` and `*_seg`, `.nii[.gz]`: 0, 1, 2, 4
  folder  `images/` with `masks/` or `labels/` (`imagesTr/` with `labelsTr/`), where a mask has the name of its
          image; or a mask beside each image, whose name goes on with `_seg`, `_mask` or `_label`. Any format of
          `volumes.find_volumes`. Masks hold whole numbers from 0, the background, to 255.

Cases are split by `--list`, `--val-list` and `--test-list`: a case's name a line, which is its file's name relative
to the folder (for brats its folder's) with or without extension. `--list` alone, or no list, is split 70/10/20 at
random, always in the same way, whatever `--seed`: every trial and every pre-training must hold out the same cases.
"""

import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from medssl.datasets import segmentation2d, volumes
from medssl.datasets.cache import DecodedVolumes
from medssl.datasets.lists import asked_for, read_list, split_all
from medssl.datasets.registry import ImageDataset, Info, Request, UnreadableImage
from medssl.datasets.volumes import (
    Volume,
    by,
    find_volumes,
    read_header,
    read_labels,
    read_values,
    read_volume,
    without_extension,
    wrong_label,
)
from medssl.engine.options import InputError

MASK_FOLDERS = {"images": ("masks", "labels"), "imagesTr": ("labelsTr",)}
MASK_ENDS = ("_seg", "_mask", "_label")
MODALITIES = ("t1", "t1ce", "t2", "flair")
LISTS_HELP = "give --list, --val-list and --test-list"


@dataclass(frozen=True)
class Labels:
    """What the numbers in masks mean.

    Attributes:
        names: of each label; the first is the background.
        values: the number in the files of each label.
        regions: name → the labels that are judged as one: evaluation counts their union. By default, each alone.
    """

    names: tuple[str, ...]
    values: tuple[int, ...]
    regions: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, names: Sequence[str], values: Sequence[int] | None = None) -> "Labels":
        """Labels that are judged one by one, numbered as in the files unless said otherwise."""
        regions = {name: (i,) for i, name in enumerate(names) if i > 0}
        return cls(tuple(names), tuple(values or range(len(names))), regions)

    def encode(self, array: np.ndarray) -> np.ndarray:
        """Values of a file → label numbers, uint8; an UnreadableImage for a value that is none of them."""
        table = np.full(256, 255, np.uint8)
        table[list(self.values)] = range(len(self.values))
        encoded = table[array]
        if encoded.max() == 255:
            values = ", ".join(map(str, self.values))
            raise UnreadableImage(f"its mask has the value {array[encoded == 255].min()}, and labels are {values}")
        return encoded

    def decode(self, labels: np.ndarray) -> np.ndarray:
        """Label numbers → values of a file, uint8."""
        return np.array(self.values, np.uint8)[labels]


# The liver of the challenge includes its tumours. Labels of BraTS: necrosis, oedema, enhancing tumour.
LITS = Labels(("background", "liver", "tumour"), (0, 1, 2), {"liver": (1, 2), "tumour": (2,)})
BRATS = Labels(
    ("background", "necrosis", "oedema", "enhancing"), (0, 1, 2, 4), {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}
)


@dataclass(frozen=True)
class Case:
    """Files of a case: a scan of one or several channels, and the mask on their voxels."""

    id: str
    images: tuple[Path, ...]
    mask: Path


class SegmentationVolumes(DecodedVolumes):
    """Cases with masks.

    An item is {"image": (C, X, Y, Z) float16 in [0, 1]; "mask": (X, Y, Z) uint8 label numbers; "size": (3,) extent
    in mm; "index"; "bad"}, on the voxels of the files, in the patient's axes, unless `spacing` says otherwise.

    Args:
        cases: of the split.
        labels: what masks hold; other values are refused, or belong to the background where `ignore_others`.
        spacing: mm between voxels; 0 leaves an axis as it is.
        window: HU that become 0 and 1; None chooses by `volumes.to_unit`, each channel by itself.
    """

    def __init__(
        self,
        info: Info,
        cases: Sequence[Case],
        labels: Labels,
        ignore_others: bool = False,
        spacing: Sequence[float] = (0.0, 0.0, 0.0),
        window: Sequence[float] | None = None,
    ) -> None:
        super().__init__(info, list(cases).__getitem__, [case.id for case in cases])
        self.mask_labels, self.regions = labels.names, labels.regions
        self.labels_in_files, self.ignore_others = labels, ignore_others
        self.spacing, self.window = tuple(spacing), None if window is None else tuple(window)

    @property
    def recipe(self) -> tuple:
        return self.spacing, self.window, self.labels_in_files.values, self.ignore_others

    def decode(self, case: Case) -> dict[str, Tensor]:
        """A case; an UnreadableImage for files that cannot be decoded, and masks with values they should not have."""
        scans = [read_volume(path) for path in case.images]
        mask = self.read_mask(case, scans[0])
        grid = scans[0]
        size = [n * step for n, step in zip(grid.array.shape, grid.spacing)]
        spacing = self.spacing_of(grid)
        if spacing != grid.spacing:
            # The one layer that rounding can add repeats what is the volume's lowest value, or background.
            scans = [volumes.resample(scan, spacing, outside=float(scan.array.min())) for scan in scans]
            mask = volumes.resample(replace(grid, array=mask), spacing, nearest=True).array
        scale = volumes.to_unit if self.window is None else lambda array: volumes.scale(array, *self.window)
        return {
            "image": torch.from_numpy(np.stack([scale(scan.array).astype(np.float16) for scan in scans])),
            "mask": torch.from_numpy(np.ascontiguousarray(mask)),
            "size": torch.tensor(size, dtype=torch.float32),
        }

    def read_mask(self, case: Case, grid: Volume) -> np.ndarray:
        """The mask of a case on the voxels of its scan, (X, Y, Z) uint8 label numbers."""
        array = read_labels(case.mask, grid)
        if self.ignore_others:
            array = np.where(np.isin(array, self.labels_in_files.values), array, 0)
        return self.labels_in_files.encode(array)

    def spacing_of(self, grid: Volume) -> tuple[float, ...]:
        """mm between the voxels of an item whose scan is `grid`."""
        return tuple(new or old for new, old in zip(self.spacing, grid.spacing))

    def restore(self, i: int, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[float, ...]]:
        """Bring labels on an item's voxels back to the voxels of its scan: what is compared there.

        Args:
            labels: (X, Y, Z) uint8 label numbers.

        Returns:
            the labels, the true ones, and the spacing in mm.
        """
        case = self.read(self.positions[i])
        grid = read_volume(case.images[0], None)
        labels = Volume(labels, self.spacing_of(grid), grid.origin)
        if labels.spacing != grid.spacing:
            labels = replace(
                labels, array=volumes.sample(labels, grid.origin, grid.array.shape, grid.spacing, nearest=True)
            )
        return labels.array, self.read_mask(case, grid), grid.spacing

    def write(self, path: Path, i: int, labels: np.ndarray) -> None:
        """Write labels on the voxels of a scan, with the values of the masks, in the geometry of the scan's file."""
        reference = self.read(self.positions[i]).images[0]
        volumes.write_labels(path, self.labels_in_files.decode(labels), reference)


# Finding cases -------------------------------------------------------------------------------------


def find_lits(root: Path) -> list[Case]:
    """Cases of LiTS; an InputError where a volume has no segmentation."""
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
        Case(f"volume-{number}", (found["volume"][number],), found["segmentation"][number])
        for number in sorted(found["volume"], key=int)
    ]


def find_brats(root: Path) -> list[Case]:
    """Cases of BraTS; an InputError where a modality or the mask is not there."""
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
        found.append(Case(own, tuple(files[each] for each in MODALITIES), files["seg"]))
    return found


def by_stem(found: Sequence[tuple[str, Path]]) -> dict[str, Path]:
    """Volumes by their names without extension; an InputError for two of one name."""
    named: dict[str, Path] = {}
    for name, path in found:
        stem = without_extension(name)
        if stem in named:
            raise InputError(f"{path}: the same name as {named[stem].name}; keep one of them, or rename it")
        named[stem] = path
    return named


def has_pairs(root: Path) -> bool:
    """Whether a folder's volumes come with masks, as the top of this page says."""
    if any((root / images).is_dir() and (root / m).is_dir() for images, masks in MASK_FOLDERS.items() for m in masks):
        return True
    names = {without_extension(name) for name, _ in find_volumes(root)}
    return any(name.endswith(end) and name.removesuffix(end) in names for name in names for end in MASK_ENDS)


def find_pairs(root: Path) -> list[Case]:
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
    return [Case(name, (path,), known[name]) for name, path in sorted(names.items())]


def check_headers(cases: Sequence[Case]) -> None:
    """Look at the headers of all files: a mask lies on the voxels of its images.

    Raises:
        InputError: for another shape, spacing or place. Files whose header cannot be read are left to the reading.
    """
    for case in cases:
        first = read_header(case.images[0])
        for path in (*case.images[1:], case.mask):
            own = read_header(path)
            if first is None or own is None:
                continue
            # Sorted: files may order their axes differently.
            if sorted(own.size) != sorted(first.size):
                raise InputError(
                    f"{path}: {by(own.size)} voxels, and its image {case.images[0].name} has {by(first.size)}; "
                    "one of them is another scan, or was resampled"
                )
            extents = [sorted(n * step for n, step in zip(box.size, box.spacing)) for box in (first, own)]
            if np.abs(np.subtract(*extents)).max() > max(first.spacing):
                raise InputError(
                    f"{path}: voxels of {by(own.spacing)} mm, and those of its image {case.images[0].name} have "
                    f"{by(first.spacing)} mm; copy the image's origin, spacing and direction to it"
                )
            apart = float(np.linalg.norm(np.subtract(own.centre, first.centre)))
            if apart > max(first.spacing):
                raise InputError(
                    f"{path}: its header places it {apart:.0f} mm from its image {case.images[0].name}; "
                    "copy the image's origin, spacing and direction to it"
                )


def discover(splits: dict[str, list[Case]], wanted: Sequence[int] | None = None) -> Labels:
    """Read all masks of a folder for the labels they hold.

    Args:
        splits: cases of each split.
        wanted: values to segment; all others are background. By default all that occur.

    Raises:
        InputError: for a mask with values that are no labels, a label that training never sees, and no label.
    """
    cases = [case for part in splits.values() for case in part]
    if len(cases) > 20:
        print(f"reading {len(cases)} masks for their labels", file=sys.stderr)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = dict(zip((case.id for case in cases), pool.map(_values, cases)))
    seen = {split: set().union(*(found[case.id] for case in part)) for split, part in splits.items()}
    for value in wanted or ():
        if value not in seen["train"]:
            raise InputError(f"--labels {value}: no training mask has it; there are {_listed(seen['train'])}")
    for split in ("val", "test"):
        new = seen[split] - seen["train"] if wanted is None else set()
        if new:
            case = next(case for case in splits[split] if found[case.id] & new)
            raise InputError(
                f"{case.mask}: label {min(new)} is in no training mask; move a case with it to training, or choose "
                f"labels with --labels {' '.join(map(str, sorted(seen['train'])))}"
            )
    values = sorted(seen["train"] if wanted is None else set(wanted))
    if not values:
        raise InputError(f"{splits['train'][0].mask}: neither this nor any other training mask has a label above 0")
    return Labels.of(("background", *(f"label {value}" for value in values)), (0, *values))


def _values(case: Case) -> set[int]:
    """The labels above 0 in a mask. A mask that cannot be decoded has none here: reading it says why."""
    try:
        values = read_values(case.mask)
    except UnreadableImage:
        return set()
    wrong = wrong_label(values)
    if wrong is not None:
        raise InputError(f"{case.mask}: has the value {wrong:g}; the labels of masks are whole numbers to 255")
    return {int(value) for value in values if value > 0}


def _listed(values: set[int]) -> str:
    return ", ".join(map(str, sorted(values))) or "none"


# Splits --------------------------------------------------------------------------------------------

SETS: dict[str, Callable[[Path], list[Case]]] = {"lits": find_lits, "brats": find_brats, "folder": find_pairs}
SPLITS = ("train", "val", "test")
READ_AS = {"lits": {"spacing": (0.0, 0.0, 1.0), "window": (-200.0, 200.0)}}  # unless the user says otherwise


def open_splits(request: Request, splits: Sequence[str] = SPLITS) -> dict[str, ImageDataset]:
    """Open splits of `lits`, `brats` or a `folder` of pairs.

    Raises:
        InputError: for files that do not belong together, and lists that cannot be used.
    """
    root, window = request.folder(), request.window
    if not root.is_dir():
        raise InputError(f"--data {root}: not a folder")
    if request.name == "lits" and segmentation2d.has_slices(root):
        for option in ("labels", "spacing", "window"):
            if getattr(request, option):
                raise InputError(f"--{option}: is for volumes, and {root} has slices of them; leave it out")
        return segmentation2d.open_lits(request, splits)
    if request.name == "lits" and request.dims == 2:
        raise InputError(f"--d 2: {root} has volumes; cut them with preprocess/slices.py --data {root} --output DIR")
    if window is not None and not window[0] < window[1]:
        raise InputError(f"--window {window[0]:g} {window[1]:g}: the first number must be below the second")
    cases = SETS[request.name](root)
    check_headers(cases)
    chosen = split_cases(cases, request)
    info = Info(request.name, dims=3, channels=len(cases[0].images))
    known = {"lits": LITS, "brats": BRATS}.get(request.name)
    if known is not None and request.labels:
        raise InputError(f"--labels: {request.name} has its own; leave it out")
    known = known or discover(chosen, request.labels)
    asked = {key: getattr(request, key) for key in ("spacing", "window") if getattr(request, key) is not None}
    read_as = {**READ_AS.get(request.name, {}), **asked, "ignore_others": request.labels is not None}
    return {split: SegmentationVolumes(info, chosen[split], known, **read_as) for split in splits}


def split_cases(cases: Sequence[Case], request: Request, whole: bool = False) -> dict[str, list[Case]]:
    """Cases of the three splits, as the top of this page says; an InputError for fewer than three, or bad lists.

    With `whole`, `--list` alone is not split: it says what pre-training may see.
    """
    known = {case.id: case for case in cases}
    if len(cases[0].images) == 1:
        known |= {case.id + _extension(case.images[0]): case for case in cases}
    listed: dict[str, list[Case]] = {}
    for split, path in request.lists.items():
        names, _ = read_list(path)
        for name in names:
            if name not in known:
                raise InputError(f"{path}: {name} is no case of --data {request.data}, such as {cases[0].id}")
        listed[split] = list({known[name].id: known[name] for name in names}.values())
    if whole and list(listed) == ["train"]:
        return listed
    if list(listed) not in ([], ["train"]):
        return asked_for(request.name, listed, SPLITS, "cases")
    cases = listed.get("train", list(cases))
    if len(cases) < 3:
        raise InputError(
            f"data set {request.name}: {len(cases)} case{'s' * (len(cases) != 1)} cannot be split into training, "
            f"validation and test; at least 3 are needed, or cut a large scan into several files"
        )
    print(
        f"note: {len(cases)} cases split 70/10/20 at random; where a patient has several, {LISTS_HELP}",
        file=sys.stderr,
    )
    return {split: [cases[i] for i in rows] for split, rows in split_all([case.id for case in cases]).items()}


def _extension(path: Path) -> str:
    return path.name[len(without_extension(path.name)) :]
