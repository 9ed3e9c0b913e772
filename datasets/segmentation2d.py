"""Images with masks: vessels of fundus photographs, lungs of chest radiographs, and any folder of image and mask files.

  drive       `training/images/*_training.tif`, `training/1st_manual/*_manual1.gif`, `training/mask/*_training_mask.gif`
              (the field of view), and `test/` alike, where there is one with `1st_manual`
  stare       `stare-images/*.ppm[.gz]`, `labels-ah/*.ah.ppm[.gz]`
  chase       `Image_01L.jpg`, `Image_01L_1stHO.png`; their field of view, and stare's, is what is not black
  montgomery  `CXR_png/MCUCXR_0001_0.png`, `ManualMask/leftMask/`, `ManualMask/rightMask/`, files of the same name
  shenzhen    `CXR_png/CHNCXR_0001_0.png`; where it is there, `mask/CHNCXR_0001_0_mask.png`
  lits        slices that `preprocess/slices.py` cuts: `images/volume-N/0000.png`, `masks/volume-N/0000.png`
  folder      `images/` with `masks/` or `labels/`, where a mask has the name of its image, with or without `_seg`,
              `_mask` or `_label`. Where all masks hold one value beside 0, it is the label; else each value is one

The last digit of a radiograph's name says whether it shows tuberculosis: montgomery and shenzhen are classified too.

Images are split by `--list`, `--val-list` and `--test-list` (paths in `--data`, file names, or volumes of lits); else
drive as published, where its test masks are there, shenzhen's test images are a fifth drawn by scikit-learn with seed
42, and all others, and a `--list` alone, are split 70/10/20 by patient, always in the same way. Pre-training sees all
images of its `--list`, and without one the training images only. Patients of a folder are known from names as
ChestX-ray14's and CheXpert's; else each image counts as one.
"""

import re
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from scipy import ndimage
from sklearn.model_selection import train_test_split
from torch import Tensor

from medssl.datasets.lists import (
    HELD_OUT,
    SPLIT_SEED,
    asked_for,
    line_of,
    patient_of,
    read_list,
    split_all,
    split_by_patient,
)
from medssl.datasets.reading import Files, find_images, read_mask
from medssl.datasets.registry import ImageDataset, Info, Request, UnreadableImage, to_texture
from medssl.engine.options import InputError

MASK_FOLDERS = ("masks", "labels")
MASK_ENDS = ("", "_mask", "_seg", "_label")
TUBERCULOSIS = ("normal", "tuberculosis")
SHENZHEN_SEED = 42
FUNDUS_BLACK = 35  # grey levels that the surroundings of a fundus reach, noise and JPEG's ripples included
MOST_LABELS = 32  # a folder's masks with more values are no label maps


C = TypeVar("C")  # a kind of case


class MaskedImages(ImageDataset):
    """Images with masks of K labels, which may overlap.

    An item of a set whose `segmented` is true has, beside the image's texture, "mask" (K, S, S) uint8, 255 inside, and
    "field" (1, S, S) uint8, 255 where the image is judged. A subclass gives `truth`.

    Attributes:
        mask_labels: names of the labels.
        tubular: whether they are trees of thin lines, whose centre lines are judged too.
        by_patient: whether a patient's images are one case (slices of a volume), whose Dice is that of all of them.
    """

    mask_labels: tuple[str, ...] = ()
    tubular = False
    by_patient = False
    segmented = False

    def case_of(self, i: int) -> str:
        """The case that image i is of, by which numbers are averaged."""
        return self.patients[i] if self.by_patient else self.ids[i]

    def truth(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Masks (K, H, W) and field of view (H, W) of image i at its own size, bool.

        Raises:
            UnreadableImage: for a mask that cannot be decoded or is of another size than its image.
        """
        raise NotImplementedError

    def annotation(self, i: int) -> tuple[np.ndarray, ...]:
        return self.truth(i) if self.segmented else ()

    def load(self, i: int) -> dict[str, Tensor]:
        item = super().load(i)
        if not self.segmented:
            return item
        masks, field = self.truth(i)
        height, width = item["size"].int().tolist()
        if masks.shape[1:] != (height, width) or field.shape != (height, width):
            raise UnreadableImage(f"its mask has {masks.shape[2]} × {masks.shape[1]} pixels, it has {width} × {height}")
        textures = [to_texture(mask * np.uint8(255), self.texture_size, 1) for mask in (*masks, field)]
        stacked = torch.from_numpy(np.concatenate(textures))
        return {**item, "mask": stacked[:-1], "field": stacked[-1:]}


def to_three_channels(pixels: np.ndarray) -> np.ndarray:
    """(H, W[, 3]) → (H, W, 3) uint8."""
    return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, 2)


class InstanceImages(MaskedImages):
    """Images in which every gland has a mask of its own. A subclass gives `instances`; as `MaskedImages`, all glands
    are one label.

    Where `detected` is true, an item is {"image" (3, H, W) uint8 at its own size, "instances" (H, W) int32}.
    """

    mask_labels = ("gland",)
    detected = False

    def load(self, i: int) -> dict[str, Tensor]:
        if not self.detected:
            return super().load(i)
        pixels, glands = to_three_channels(self.read(self.positions[i])), self.instances(i)
        if pixels.shape[:2] != glands.shape:
            sides = f"{glands.shape[1]} × {glands.shape[0]} pixels, it has {pixels.shape[1]} × {pixels.shape[0]}"
            raise UnreadableImage(f"its annotation has {sides}")
        image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        return {"image": image, "instances": torch.from_numpy(glands.astype(np.int32))}

    def instances(self, i: int) -> np.ndarray:
        """The glands of image i at its own size, (H, W) integers, 0 or the gland's number.

        Raises:
            UnreadableImage: for a file that cannot be decoded or is of another size than its image.
        """
        raise NotImplementedError

    def annotation(self, i: int) -> tuple[np.ndarray, ...]:
        return (self.instances(i),) if self.detected or self.segmented else ()

    def truth(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        glands = self.instances(i)
        return (glands > 0)[None], np.ones(glands.shape, bool)


@dataclass(frozen=True)
class Case:
    """Files of an image.

    Attributes:
        id: path in `--data`.
        masks: of structures that are joined to one label; none where there is no mask.
        field: the field of view; None for everything.
        patient, label: the patient's name, and the class where there are two.
    """

    id: str
    image: Path
    masks: tuple[Path, ...] = ()
    field: Path | None = None
    patient: str = ""
    label: int | None = None


class MaskFiles(MaskedImages):
    """Images and masks in files.

    Args:
        cases: of the split.
        values: in the masks' files of each of `names`, one or several; None for one label, all that is not 0.

    Attributes:
        allowed: all values that masks may have; None for any.
    """

    allowed: tuple[int, ...] | None = None

    def __init__(
        self,
        info: Info,
        cases: Sequence[Case],
        names: Sequence[str],
        values: Sequence[Sequence[int]] | None = None,
        tubular: bool = False,
        texture_size: int = 512,
    ) -> None:
        labels = [case.label for case in cases]
        super().__init__(
            info, Files([case.image for case in cases]), [case.id for case in cases],
            None if None in labels else torch.tensor(labels), [case.patient for case in cases], texture_size,
        )  # fmt: skip
        self.cases, self.mask_labels, self.values, self.tubular = list(cases), tuple(names), values, tubular

    def truth(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        case = self.cases[self.positions[i]]
        found = [read_mask(path) for path in case.masks]
        if len({mask.shape for mask in found}) > 1:
            raise UnreadableImage(f"its masks {case.masks[0].name} differ in size")
        wrong = np.setdiff1d(found[0], self.allowed) if self.allowed is not None else ()
        if len(wrong):
            raise UnreadableImage(
                f"its mask has the value {wrong[0]}, and labels are {', '.join(map(str, self.allowed))}"
            )
        if self.values is None:
            masks = np.any(np.stack(found) > 0, 0)[None]
        else:
            masks = np.stack([np.isin(found[0], group) for group in self.values])
        if case.field is not None:
            field = read_mask(case.field) > 0
        elif self.tubular:
            field = fundus_field(self.read(self.positions[i]))
        else:
            field = np.ones(masks.shape[1:], bool)
        return masks, field


def fundus_field(pixels: np.ndarray) -> np.ndarray:
    """The field of view of a fundus photograph that comes without one, (H, W) bool: the largest part that is not
    black, its holes filled.

    Args:
        pixels: (H, W, 3) uint8.
    """
    parts, count = ndimage.label(pixels.max(-1) > FUNDUS_BLACK)
    if not count:
        return np.ones(pixels.shape[:2], bool)
    return ndimage.binary_fill_holes(parts == 1 + np.bincount(parts.ravel())[1:].argmax())


# Finding cases -------------------------------------------------------------------------------------


def _files(folder: Path, pattern: str) -> list[tuple[Path, re.Match]]:
    """Files of a folder whose names match, sorted."""
    found = ((path, re.fullmatch(pattern, path.name)) for path in sorted(folder.iterdir())) if folder.is_dir() else ()
    return [(path, match) for path, match in found if match]


def _there(root: Path, cases: list[Case], what: str) -> list[Case]:
    """The cases; an InputError where there is none, or a mask's file is missing."""
    if not cases:
        raise InputError(f"--data {root}: no {what}")
    for case in cases:
        for path in (*case.masks, *([case.field] if case.field else [])):
            if not path.is_file():
                raise InputError(f"{case.image}: its mask {path} is missing; add it, or move the image away")
    return cases


def find_drive(root: Path) -> list[Case]:
    """DRIVE's images; those in `test/` only where their masks are there."""
    cases = []
    for part in ("training", "test"):
        home = root / part
        if part == "test" and not (home / "1st_manual").is_dir():
            continue
        cases += [
            Case(
                f"{part}/images/{path.name}", path, (home / "1st_manual" / f"{match[1]}_manual1.gif",),
                home / "mask" / f"{match[1]}_{part}_mask.gif", match[1],
            )
            for path, match in _files(home / "images", rf"(\d+)_{part}\.tiff?")
        ]  # fmt: skip
    return _there(root, cases, "training/images/*_training.tif; is this DRIVE's folder?")


def find_stare(root: Path) -> list[Case]:
    """STARE's images that the first observer labelled."""
    labels = {match[1]: path for path, match in _files(root / "labels-ah", r"(im\d+)\.ah\.ppm(?:\.gz)?")}
    cases = [
        Case(f"stare-images/{path.name}", path, (labels[match[1]],), None, match[1])
        for path, match in _files(root / "stare-images", r"(im\d+)\.ppm(?:\.gz)?")
        if match[1] in labels
    ]
    return _there(root, cases, "stare-images/*.ppm[.gz] with labels-ah/*.ah.ppm[.gz]")


def find_chase(root: Path) -> list[Case]:
    """CHASE_DB1's images, two eyes of a child each."""
    cases = [
        Case(path.name, path, (root / f"Image_{match[1]}{match[2]}_1stHO.png",), None, match[1])
        for path, match in _files(root, r"Image_(\d+)([LR])\.jpg")
    ]
    return _there(root, cases, "Image_01L.jpg with Image_01L_1stHO.png")


def find_montgomery(root: Path) -> list[Case]:
    """Montgomery's radiographs; a mask of each lung."""
    cases = [
        Case(
            f"CXR_png/{path.name}", path, tuple(root / "ManualMask" / side / path.name for side in SIDES), None,
            match[1], int(match[2]),
        )
        for path, match in _files(root / "CXR_png", r"(MCUCXR_\d+)_([01])\.png")
    ]  # fmt: skip
    return _there(root, cases, "CXR_png/MCUCXR_*.png; is this the Montgomery set's folder?")


SIDES = ("leftMask", "rightMask")


def find_shenzhen(root: Path) -> list[Case]:
    """Shenzhen's radiographs; some have a mask of the lungs."""
    cases = []
    for path, match in _files(root / "CXR_png", r"(CHNCXR_\d+)_([01])\.png"):
        mask = root / "mask" / f"{path.stem}_mask.png"
        masks = (mask,) if mask.is_file() else ()
        cases.append(Case(f"CXR_png/{path.name}", path, masks, None, match[1], int(match[2])))
    return _there(root, cases, "CXR_png/CHNCXR_*.png; is this the Shenzhen set's folder?")


def find_pairs(root: Path) -> list[Case]:
    """A folder's images with their masks, as the top of this page says; an InputError for an image without one."""
    masks = next((root / folder for folder in MASK_FOLDERS if (root / folder).is_dir()), None)
    if not (root / "images").is_dir() or masks is None:
        raise InputError(f"--data {root}: wanted are the folders images and masks")
    known: dict[str, Path] = {}
    for path in find_images(masks):
        stem = path.relative_to(masks).with_suffix("").as_posix()
        if stem in known:
            raise InputError(f"{path}: the same name as {known[stem].name}; keep one of them, or rename it")
        known[stem] = path
    cases = []
    for path in find_images(root / "images"):
        stem = path.relative_to(root / "images").with_suffix("").as_posix()
        mask = next((known[stem + end] for end in MASK_ENDS if stem + end in known), None)
        if mask is None:
            raise InputError(f"{path}: no mask of that name in {masks}; add it, or move the image away")
        name = path.relative_to(root).as_posix()
        cases.append(Case(name, path, (mask,), None, patient_of(name) or stem))
    return _there(root, cases, "images in images/")


@dataclass(frozen=True)
class Kind:
    """A known set: how its cases are found, its label, whether images are colour, and whether labels are thin lines."""

    find: Callable[[Path], list[Case]]
    label: str
    channels: int
    tubular: bool


KINDS = {
    "drive": Kind(find_drive, "vessels", 3, True),
    "stare": Kind(find_stare, "vessels", 3, True),
    "chase": Kind(find_chase, "vessels", 3, True),
    "montgomery": Kind(find_montgomery, "lungs", 1, False),
    "shenzhen": Kind(find_shenzhen, "lungs", 1, False),
}


# Splits --------------------------------------------------------------------------------------------


def open_splits(request: Request, splits: Sequence[str]) -> dict[str, ImageDataset]:
    """Open splits of one of `KINDS`: images, with labels where they are radiographs, and masks for those who ask.

    Raises:
        InputError: for files that are missing, and lists that cannot be used.
    """
    kind, root = KINDS[request.name], _folder(request)
    chosen = choose(kind.find(root), request, splits)
    classes = TUBERCULOSIS if next(iter(chosen.values()))[0].label is not None else ()
    info = Info(request.name, 2, kind.channels, "binary" if classes else None, classes)
    texture = request.resolve_texture(info)
    return {
        split: MaskFiles(info, cases, (kind.label,), None, kind.tubular, texture) for split, cases in chosen.items()
    }


def open_folder(request: Request, splits: Sequence[str], channels: Callable[[list[Path]], int]) -> dict:
    """Open splits of a folder of images and masks.

    Args:
        channels: of files: 1 or 3.

    Raises:
        InputError: as `open_splits`, and for masks without labels, or with more values than labels have.
    """
    root = _folder(request)
    cases = find_pairs(root)
    if not request.lists and len({case.patient for case in cases}) == len(cases):
        print(
            f"note: patients of {root} are unknown: split 70/10/20 by image; where a patient has several images, give "
            "--list, --val-list and --test-list, and the same --list to pre-training",
            file=sys.stderr,
        )
    chosen = choose(cases, request, splits)
    lossy = next((case.masks[0] for case in cases if case.masks[0].suffix.lower() in (".jpg", ".jpeg")), None)
    if lossy:
        raise InputError(f"{lossy}: a mask in JPEG, which changes values; save masks as PNG")
    values = discover(cases, request.labels)
    names = [f"label {value}" for value in values] if values else ["foreground"]
    info = Info("folder", 2, channels([case.image for case in cases]))
    texture = request.resolve_texture(info)
    groups = values and [(value,) for value in values]
    return {split: MaskFiles(info, part, names, groups, False, texture) for split, part in chosen.items()}


LITS_VALUES = (0, 1, 2)
LITS = {"liver": (1, 2), "tumour": (2,)}  # the challenge's liver includes its tumours


def open_lits(request: Request, splits: Sequence[str]) -> dict[str, ImageDataset]:
    """Open splits of LiTS' slices, by volume.

    Raises:
        InputError: as `open_splits`.
    """
    cases = [replace(case, patient=case.image.parent.name) for case in find_pairs(_folder(request))]
    info = Info("lits", 2, 1)
    texture = request.resolve_texture(info)
    opened = {}
    for split, part in choose(cases, request, splits).items():
        opened[split] = MaskFiles(info, part, tuple(LITS), tuple(LITS.values()), False, texture)
        opened[split].by_patient, opened[split].allowed = True, LITS_VALUES
    return opened


def has_pairs(root: Path) -> bool:
    """Whether a folder is one of images and masks."""
    return (root / "images").is_dir() and any((root / folder).is_dir() for folder in MASK_FOLDERS)


def has_slices(root: Path) -> bool:
    """Whether a folder is one of `preprocess/slices.py`."""
    return any((root / "images").glob("volume-*/*.png"))


def _folder(request: Request) -> Path:
    root = request.folder()
    if not root.is_dir():
        raise InputError(f"--data {root}: not a folder")
    return root


def discover(cases: Sequence[Case], wanted: Sequence[int] | None) -> list[int] | None:
    """The values of masks that are labels: `wanted`, or all; None where there is one beside 0."""

    def values(case: Case) -> set[int]:
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


def choose(cases: Sequence[Case], request: Request, splits: Sequence[str]) -> dict[str, list[Case]]:
    """The cases of the splits that are asked for."""
    if request.lists:
        chosen = listed(cases, request)
        if list(chosen) == ["train"] and list(splits) != ["train"]:
            print(
                f"note: {request.list}: no --val-list and --test-list, so it is split 70/10/20 by patient; "
                "pre-training on this list has seen all of its images",
                file=sys.stderr,
            )
            chosen = _drawn(chosen["train"], request.name)
    elif request.name == "drive" and any(case.id.startswith("test/") for case in cases):
        train = [case for case in cases if case.id.startswith("training/")]
        rest, held = split_by_patient([case.patient for case in train], HELD_OUT, SPLIT_SEED)
        chosen = {"train": [train[i] for i in rest], "val": [train[i] for i in held]}
        chosen["test"] = [case for case in cases if case.id.startswith("test/")]
    else:
        # Also when only "train" is asked: pre-training must not see what is held out.
        chosen = _drawn(cases, request.name)
    return asked_for(request.name, chosen, splits)


def listed(cases: Sequence[C], request: Request) -> dict[str, list[C]]:
    """The cases that lists name, by path, by file name where there is one of it, or by patient (LiTS' volumes).

    Args:
        cases: with "id", "image" and "patient" as `Case` has them.
    """
    names: dict[str, list[C]] = {}
    for case in cases:
        for name in {case.id, case.image.name, case.patient}:
            names.setdefault(name, []).append(case)
    chosen = {}
    for split, path in request.lists.items():
        written, _ = read_list(path)
        found: dict[str, C] = {}
        for name in written:
            named = names.get(name)
            if named is None:
                raise InputError(f"{path}, line {line_of(path, name)}: {name} is not in --data {request.data}")
            if len({case.patient for case in named}) > 1:
                raise InputError(
                    f"{path}, line {line_of(path, name)}: {len(named)} images are called {name}; give paths"
                )
            found |= {case.id: case for case in named}
        chosen[split] = list(found.values())
    return chosen


def _drawn(cases: Sequence[Case], name: str) -> dict[str, list[Case]]:
    patients = [case.patient for case in cases]
    if len(set(patients)) < 3:
        raise InputError(f"data set {name}: {len(cases)} images are too few to split; at least 3 patients are needed")
    if name == "shenzhen":
        rest, test = train_test_split(range(len(cases)), test_size=0.2, random_state=SHENZHEN_SEED)
        rest = sorted(rest)
        train, val = split_by_patient([patients[i] for i in rest], HELD_OUT / 0.8, SPLIT_SEED)
        rows = {"train": [rest[i] for i in train], "val": [rest[i] for i in val], "test": sorted(test)}
    else:
        rows = split_all(patients)
    return {split: [cases[i] for i in part] for split, part in rows.items()}


def with_masks(splits: dict[str, MaskedImages]) -> dict[str, MaskedImages]:
    """The splits with masks in their items, less the images that have none."""
    kept = {}
    for split, data in splits.items():
        if isinstance(data, MaskFiles):
            there = [i for i, position in enumerate(data.positions) if data.cases[position].masks]
            if not there:
                raise InputError(f"data set {data.info.name}: no image for {split} has a mask")
            if len(there) < len(data):
                print(f"note: {len(data) - len(there)} images for {split} have no mask; left out", file=sys.stderr)
                data = data.subset(there)
        data.segmented, data.labels = True, None
        kept[split] = data
    return kept
