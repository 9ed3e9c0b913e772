"""Any folder of images or of volumes: the way to pre-train and fine-tune on one's own data.

Volumes (`.mhd .mha .nii .nii.gz .nrrd`, folders of DICOM slices) are decoded whole every time, or once with `--cache`.
CTs of hundreds of slices are cut once with `preprocess/luna.py`, which takes any folder, and the cubes are given as
`--data`.
"""

import os
import posixpath
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from medssl.datasets import luna, segmentation2d, segmentation3d
from medssl.datasets.cache import DecodedVolumes
from medssl.datasets.lists import (
    SPLIT_SEED,
    asked_for,
    class_count,
    known_or_nan,
    line_of,
    patient_of,
    read_list,
    split_all,
    split_by_patient,
)
from medssl.datasets.reading import DICOM_EXTENSIONS, Files, find_images, read_image
from medssl.datasets.registry import ImageDataset, Info, Request, UnreadableImage, volume_item
from medssl.datasets.views3d import resize
from medssl.datasets.volumes import find_volumes, read_volume, to_unit, without_extension
from medssl.engine.options import InputError

SPLIT_FOLDERS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test",)}
MANY = 9  # classes that a message names
SPLITS_HELP = "give --list, --val-list and --test-list, or sort the images into class folders"


class VolumeFiles(DecodedVolumes):
    """Volumes of any shape, each resampled to one grid; items as `registry.volume_item` says.

    Args:
        paths: a file or folder of DICOM slices for each of `ids`.
        grid: voxels along x, y, z. A volume's own proportions go with it as "size" in mm.
        more: as for `ImageDataset`.
    """

    def __init__(self, info: Info, paths: Sequence[Path], ids: Sequence[str], grid: Sequence[int], **more) -> None:
        super().__init__(info, list(paths).__getitem__, ids, **more)
        self.grid = tuple(grid)

    @property
    def recipe(self) -> tuple:
        return self.grid

    def decode(self, source: Path) -> dict[str, Tensor]:
        """A volume scaled to [0, 1] as `volumes.to_unit` does, anti-aliased where the grid is coarser."""
        volume = read_volume(source)
        resampled = resize([torch.from_numpy(to_unit(volume.array))], self.grid)[0, 0]
        return volume_item(resampled, [n * step for n, step in zip(volume.array.shape, volume.spacing)])


def open_splits(request: Request, splits: Sequence[str]) -> dict[str, ImageDataset]:
    """Open splits of a folder; ids are paths relative to it, with forward slashes, volumes' without extension.

    The folder has images or volumes; where it has both, `--d` chooses. DICOM slices are volumes where more than two
    in a folder are of one series. Cubes that `preprocess/luna.py` made are opened as `luna` does.

    Which images and labels:
        * images or volumes with masks: as `segmentation2d` and, for pre-training, `segmentation3d` say, so that masks
          are no images, and pre-training sees no case that segmentation holds out;
        * lists where given, with names relative to the folder: one column of 0 and 1 is a binary task, of
          0…K−1 a multi-class one, several columns are a multi-label one (0, 1, or −1: not known). `--list`
          alone is split 70/10/20 when "val" or "test" is asked, and used whole when not.
        * else the folders `train`, `val` (or `valid`) and `test`, with class folders in them if labelled;
        * else class folders, split 70/10/20 when "val" or "test" is asked;
        * else all images, unlabelled, for "train" alone.

    Raises:
        InputError: for a folder without images, a list that cannot be used, or a split that is not there.
    """
    root = _root(request)
    if request.dims != 2 and (luna.find_pairs(root) or (root / "nodules.csv").is_file()):
        return luna.open_splits(request, splits)
    if request.dims != 3 and segmentation2d.has_pairs(root) and not sort_out(root)[1]:
        return segmentation2d.open_folder(request, splits, channels_of)
    found, dims = _find(root, request.dims)
    if dims == 3 and set(splits) == {"train"} and segmentation3d.has_pairs(root):
        cases = segmentation3d.split_cases(segmentation3d.find_pairs(root), request, whole=True)["train"]
        found = {case.id: case.images[0] for case in cases}
        return {"train": _dataset(Info("folder", 3), request, root, found, list(found), None)}
    if request.lists:
        chosen, info = _from_lists(request, splits, root, found, dims)
    else:
        chosen, info = _from_folders(root, list(found), splits)
    # Of the whole folder, not of what is asked: pre-training, fine-tuning and a cache must agree.
    channels = channels_of(list(found.values())) if dims == 2 else 1
    info = Info("folder", dims, channels, info.task, info.classes)
    return {split: _dataset(info, request, root, found, names, labels) for split, (names, labels) in chosen.items()}


def open_all(request: Request) -> ImageDataset:
    """Every image of the folder, unlabelled, whatever its splits: what a cache holds."""
    root = _root(request)
    found, dims = _find(root, request.dims)
    info = Info("folder", dims, channels_of(list(found.values())) if dims == 2 else 1)
    return _dataset(info, request, root, found, list(found), None)


# names, and labels where there are
Chosen = tuple[list[str], Tensor | None]


def _root(request: Request) -> Path:
    root = request.folder()
    if not root.is_dir():
        raise InputError(f"--data {root}: not a folder")
    return root


def sort_out(root: Path) -> tuple[list[Path], list[tuple[str, Path]]]:
    """The images of a folder, and its volumes with their ids; slices of a DICOM series are no images."""
    volumes = [(name, path) for name, path in find_volumes(root) if path.is_file() or _is_series(path)]
    series = {path for _, path in volumes if path.is_dir()}
    return [path for path in find_images(root) if path.parent not in series], volumes


def _is_series(folder: Path) -> bool:
    """Whether more than two of a folder's DICOM files share a series: two may be views of a radiograph."""
    import pydicom

    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    uids: Counter = Counter()
    for path in files[:16]:
        old = path.suffix.lower() in DICOM_EXTENSIONS  # may lack the magic
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True, force=old, specific_tags=["SeriesInstanceUID"])
        except Exception:  # a picture beside the slices, or damaged: what is wrong is said where it is read
            continue
        uids[header.get("SeriesInstanceUID")] += 1
    del uids[None]
    return max(uids.values(), default=0) > 2


def _find(root: Path, dims: int | None) -> tuple[dict[str, Path], int]:
    """What the folder holds of a dimension, or of the only one there is: id → path, and the dimension."""
    if dims == 2:
        images, volumes = find_images(root), []
    elif dims == 3:
        images, volumes = [], find_volumes(root)
    else:
        images, volumes = sort_out(root)
    if images and volumes:
        raise InputError(
            f"--data {root}: holds images such as {images[0].relative_to(root)} and volumes such as {volumes[0][0]}; "
            "choose with --d 2 or --d 3"
        )
    if volumes:
        return dict(volumes), 3
    if not images:
        kind = "volumes" if dims == 3 else "images"
        raise InputError(f"--data {root}: no {kind} in this folder or below it{'' if dims else ', and no volumes'}")
    return {path.relative_to(root).as_posix(): path for path in images}, 2


def _dataset(
    info: Info, request: Request, root: Path, found: dict[str, Path], names: list[str], labels: Tensor | None
) -> ImageDataset:
    patients = [patient_of(name) for name in names]
    known = None if None in patients else patients
    if info.dims == 3:
        paths = [found[name] for name in names]
        return VolumeFiles(info, paths, names, request.resolve_grid(), labels=labels, patients=known)
    paths = [os.fspath(found.get(name, root / name)) for name in names]
    return ImageDataset(info, Files(paths), names, labels, known, request.resolve_texture(info))


def _from_lists(
    request: Request, splits: Sequence[str], root: Path, found: dict[str, Path], dims: int
) -> tuple[dict[str, Chosen], Info]:
    chosen: dict[str, Chosen] = {}
    columns = None
    for split, path in request.lists.items():
        listed, labels = read_list(path)
        names = [posixpath.normpath(name.replace("\\", "/")) for name in listed]
        if dims == 3:  # ids have no extension, lists may
            names = [name if name in found else without_extension(name) for name in names]
        for name, written in zip(names, listed):
            if name not in found and not (dims == 2 and (root / name).is_file()):
                raise InputError(f"{path}, line {line_of(path, written)}: {written} is not in {root}")
        width = 0 if labels is None else labels.shape[1]
        if columns is not None and width != columns:
            raise InputError(f"{path}: {width} labels a line, the other lists have {columns}")
        columns = width
        if width > 1:
            labels = known_or_nan(path, listed, labels)
        elif width == 1:
            if (labels < 0).any():
                name = listed[int((labels[:, 0] < 0).nonzero()[0])]
                raise InputError(f"{path}, line {line_of(path, name)}: class -1; classes count from 0")
            labels = labels[:, 0].long()
        chosen[split] = names, labels
    info = _task_of(chosen)
    if list(request.lists) == ["train"] and set(splits) != {"train"}:
        chosen = _split_all(*chosen["train"], f"{request.list} is one list")
    return asked_for("folder", chosen, splits), info


def _task_of(chosen: dict[str, Chosen]) -> Info:
    """The task that the lists' labels are for."""
    labels = [labels for _, labels in chosen.values()]
    if labels[0] is None:
        return Info("folder")
    if labels[0].ndim == 2:
        return Info("folder", task="multi-label", classes=tuple(map(str, range(labels[0].shape[1]))))
    count = class_count("data set folder", labels)
    return Info("folder", task="binary" if count == 2 else "multi-class", classes=tuple(map(str, range(count))))


def _from_folders(root: Path, names: list[str], splits: Sequence[str]) -> tuple[dict[str, Chosen], Info]:
    tops = sorted({name.split("/")[0] for name in names if "/" in name})
    folders = {
        split: next((top for top in tops if top.lower() in known), None) for split, known in SPLIT_FOLDERS.items()
    }
    if folders["train"] and (folders["val"] or folders["test"]):
        # Also when only "train" is asked: pre-training must not see the other folders.
        parts = {split: [name for name in names if name.startswith(f"{top}/")] for split, top in folders.items() if top}
        classes = _classes(parts["train"], depth=1)
        chosen = {split: (part, _class_labels(part, classes, depth=1)) for split, part in parts.items()}
        if "val" in splits and "val" not in chosen:
            rest, held = split_by_patient(_grouping(parts["train"]), 0.1, SPLIT_SEED)
            train = chosen["train"]
            chosen["train"], chosen["val"] = _take(train, rest), _take(train, held)
            print("note: there is no folder val; a tenth of train validates", file=sys.stderr)
        return asked_for("folder", chosen, splits), _class_info(classes)
    if set(splits) == {"train"}:
        return {"train": (names, None)}, Info("folder")
    classes = _classes(names, depth=0)
    if not classes:
        raise InputError(f"--data {root}: only unlabelled training images; for {' and '.join(splits)}, {SPLITS_HELP}")
    shown = ", ".join(classes[:MANY]) + (" and others" if len(classes) > MANY else "")
    chosen = _split_all(names, _class_labels(names, classes, depth=0), f"{root} has class folders only, {shown}")
    return asked_for("folder", chosen, splits), _class_info(classes)


def _classes(names: Sequence[str], depth: int) -> tuple[str, ...]:
    """The folders at a depth where every image lies in one of at least two, else nothing."""
    parts = [name.split("/") for name in names]
    classes = {part[depth] for part in parts}
    return tuple(sorted(classes)) if len(classes) > 1 and all(len(p) > depth + 1 for p in parts) else ()


def _class_labels(names: Sequence[str], classes: tuple[str, ...], depth: int) -> Tensor | None:
    if not classes:
        return None
    numbers = {name: number for number, name in enumerate(classes)}
    labels = []
    for name in names:
        folder = name.split("/")[depth]
        if folder not in numbers:
            raise InputError(f"{name}: {folder} is none of the classes in train, {', '.join(classes)}")
        labels.append(numbers[folder])
    return torch.tensor(labels)


def _class_info(classes: tuple[str, ...]) -> Info:
    task = None if not classes else "binary" if len(classes) == 2 else "multi-class"
    return Info("folder", task=task, classes=classes)


def _grouping(names: Sequence[str]) -> list[str]:
    """What must stay together in a split: the patient where the name tells, else the image."""
    return [patient_of(name) or name for name in names]


def _take(chosen: Chosen, rows: list[int]) -> Chosen:
    names, labels = chosen
    return [names[i] for i in rows], None if labels is None else labels[rows]


def _split_all(names: list[str], labels: Tensor | None, why: str) -> dict[str, Chosen]:
    """Split 70/10/20."""
    groups = _grouping(names)
    if len(set(groups)) < 3:
        raise InputError(f"data set folder: {len(names)} images are too few to split; {SPLITS_HELP}")
    if groups != names:
        print(f"note: {why}: split 70/10/20 by patient", file=sys.stderr)
    else:
        print(
            f"note: {why} and patients are unknown: split 70/10/20 by image; where a patient has several "
            "images, give --list, --val-list and --test-list, and the same --list to pre-training",
            file=sys.stderr,
        )
    return {split: _take((names, labels), rows) for split, rows in split_all(groups).items()}


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
