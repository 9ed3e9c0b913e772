"""Any folder of images or of volumes: the way to pre-train and fine-tune on one's own data.

Volumes (`.mhd .mha .nii .nii.gz .nrrd`, folders of DICOM slices) are decoded whole every time, or once with `--cache`.
CTs of hundreds of slices are cut once with `preprocess/luna.py`, which takes any folder, and the cubes are given as
`--data`.
"""

import os
import posixpath
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from medssl.datasets import luna, pairs
from medssl.datasets.base import Files, ImageDataset, Info, Request, volume_item
from medssl.datasets.cache import DecodedVolumes
from medssl.datasets.masked_volumes import open_cases
from medssl.datasets.pairs import channels_of
from medssl.datasets.splits import (
    GIVE_LISTS,
    HELD_OUT,
    MIN_PATIENTS,
    SPLIT_SEED,
    SPLITS,
    Patients,
    asked_for,
    choose,
    split_all,
    split_by_patient,
    split_classes,
)
from medssl.errors import InputError
from medssl.reading.dicom import is_series
from medssl.reading.find import find_images, find_volumes, without_extension
from medssl.reading.intensities import to_unit
from medssl.reading.tables import PATIENTS, class_count, known_or_nan, line_of, read_list
from medssl.reading.volumes import read_volume
from medssl.views.ops3d import resize

SPLIT_FOLDERS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test",)}
MANY = 9  # classes that a message names
SEEN = "pre-training that was not given its training images by --list has seen the others, too"
SPLITS_HELP = "give --list, --val-list and --test-list, or sort the images into class folders"


class VolumeFiles(DecodedVolumes):
    """Volumes of any shape, each resampled to one grid, or as they are; items as `base.volume_item` says.

    Args:
        paths: a file or folder of DICOM slices for each of `ids`.
        grid: voxels along x, y, z; None leaves a volume its own. Its proportions go with it as "size" in mm.
        more: as for `ImageDataset`.
    """

    def __init__(
        self, info: Info, paths: Sequence[Path], ids: Sequence[str], grid: Sequence[int] | None, **more
    ) -> None:
        super().__init__(info, list(paths).__getitem__, ids, **more)
        self.grid = grid and tuple(grid)

    @property
    def recipe(self) -> tuple:
        return self.grid or ()

    def decode(self, source: Path) -> dict[str, Tensor]:
        """A volume scaled to [0, 1] as `intensities.to_unit` does, anti-aliased where the grid is coarser."""
        volume = read_volume(source)
        array = torch.from_numpy(to_unit(volume.array))
        array = resize([array], self.grid)[0, 0] if self.grid else array
        return volume_item(array, [n * step for n, step in zip(volume.array.shape, volume.spacing)])


def open_splits(request: Request, splits: Sequence[str]) -> dict[str, ImageDataset]:
    """Open splits of a folder; ids are paths relative to it, with forward slashes, volumes' without extension.

    The folder has images or volumes; where it has both, `--d` chooses. DICOM slices are volumes where more than two
    in a folder are of one series. Cubes that `preprocess/luna.py` made are opened as `luna` does.

    Which images and labels:
        * images or volumes with masks: as `pairs` says, of volumes for pre-training, so that masks are no images, and
          pre-training sees no case that segmentation holds out;
        * lists where given, with names relative to the folder: one column of 0 and 1 is a binary task, of
          0…K−1 a multi-class one, several columns are a multi-label one (0, 1, or −1: not known). `--list`
          alone is split 70/10/20 when "val" or "test" is asked, and used whole when not.
        * else the folders `train`, `val` (or `valid`) and `test`, with class folders in them if labelled;
        * else class folders, split 70/10/20 within each class when "val" or "test" is asked;
        * else all images, unlabelled, for "train" alone.

    All splits are by patient, wherever a table `patients.csv`, a name or a folder tells patients.

    Raises:
        InputError: for a folder without images, a list that cannot be used, or a split that is not there.
    """
    root = request.folder()
    if request.masks:
        return _open_masked(request, splits, root)
    if request.dims != 2 and (luna.find_pairs(root) or (root / "nodules.csv").is_file()):
        return luna.open_splits(request, splits)
    if request.dims != 3 and pairs.has_image_pairs(root) and not sort_out(root)[1]:
        return pairs.open_images(request, splits)
    found, dims = _find(root, request.dims)
    if dims == 3 and set(splits) == {"train"} and pairs.has_volume_pairs(root):
        cases = choose(pairs.find_volume_pairs(root), request, splits, "cases")["train"]
        found, own = {case.id: case.images[0] for case in cases}, [case.patient for case in cases]
        known = None if own == list(found) else own
        return {"train": _dataset(Info("folder", 3), request, root, found, (list(found), None), known)}
    patients = Patients(root, found)
    if request.lists:
        chosen, info = _from_lists(request, splits, root, found, dims, patients)
    else:
        chosen, info = _from_folders(root, list(found), splits, patients)
    # Of the whole folder, not of what is asked: pre-training, fine-tuning and a cache must agree.
    channels = channels_of(list(found.values())) if dims == 2 else 1
    info = Info("folder", dims, channels, info.task, info.classes)
    return {
        split: _dataset(info, request, root, found, part, patients.known(part[0])) for split, part in chosen.items()
    }


def open_all(request: Request) -> ImageDataset:
    """Every image of the folder, unlabelled, whatever its splits: what a cache holds."""
    root = request.folder()
    found, dims = _find(root, request.dims)
    info = Info("folder", dims, channels_of(list(found.values())) if dims == 2 else 1)
    return _dataset(info, request, root, found, (list(found), None), Patients(root, found).known(list(found)))


def _open_masked(request: Request, splits: Sequence[str], root: Path) -> dict[str, ImageDataset]:
    """Images or volumes with masks: volumes are looked for first."""
    volumes = any(path.is_file() for _, path in find_volumes(root)) or not find_images(root)
    if request.dims != 2 and (request.dims == 3 or volumes):
        return open_cases(request, splits, pairs.find_volume_pairs(root))
    for option in ("spacing", "window"):
        if getattr(request, option):
            raise InputError(f"--{option}: folder has its own; leave it out")
    return pairs.open_images(request, splits)


# names, and labels where there are
Chosen = tuple[list[str], Tensor | None]


def sort_out(root: Path) -> tuple[list[Path], list[tuple[str, Path]]]:
    """The images of a folder, and its volumes with their ids; slices of a DICOM series are no images."""
    volumes = [(name, path) for name, path in find_volumes(root) if path.is_file() or is_series(path)]
    series = {path for _, path in volumes if path.is_dir()}
    return [path for path in find_images(root) if path.parent not in series], volumes


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
    info: Info, request: Request, root: Path, found: dict[str, Path], chosen: Chosen, known: list[str] | None
) -> ImageDataset:
    names, labels = chosen
    if info.dims == 3:
        paths = [found[name] for name in names]
        return VolumeFiles(info, paths, names, request.resolve_grid(), labels=labels, patients=known)
    paths = [os.fspath(found.get(name, root / name)) for name in names]
    return ImageDataset(info, Files(paths), names, labels, known, request.resolve_texture(info))


def _from_lists(
    request: Request, splits: Sequence[str], root: Path, found: dict[str, Path], dims: int, patients: Patients
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
        chosen = _split_all(patients, *chosen["train"], f"{request.list} is one list")
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


def _from_folders(
    root: Path, names: list[str], splits: Sequence[str], patients: Patients
) -> tuple[dict[str, Chosen], Info]:
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
            rest, held = split_by_patient(patients.grouped(parts["train"]), HELD_OUT, SPLIT_SEED)
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
    labels = _class_labels(names, classes, depth=0)
    chosen = _split_all(patients, names, labels, f"{root} has class folders only, {shown}", classes)
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


def _take(chosen: Chosen, rows: list[int]) -> Chosen:
    names, labels = chosen
    return [names[i] for i in rows], None if labels is None else labels[rows]


def _split_all(
    patients: Patients, names: list[str], labels: Tensor | None, why: str, classes: Sequence[str] = ()
) -> dict[str, Chosen]:
    """Split 70/10/20 by patient; where there are class folders, each class by itself. Says what is not known."""
    groups = patients.grouped(names)
    if len(set(groups)) < len(SPLITS):
        raise InputError(f"data set folder: {len(names)} images are too few to split; {SPLITS_HELP}")
    each = ", each class by itself (earlier versions: all together)" if classes else ""
    if groups != names:
        print(f"note: {why}: split 70/10/20 by patient{each}; {SEEN}", file=sys.stderr)
    else:
        print(
            f"note: {why} and patients are unknown: split 70/10/20 by image{each}; where a patient has several "
            f"images, {GIVE_LISTS}, or a table {PATIENTS}; {SEEN}",
            file=sys.stderr,
        )
    parts = split_classes(groups, labels.tolist()) if classes else split_all(groups)
    if not parts["val"] or not parts["test"]:
        raise InputError(
            f"data set folder: no class has {MIN_PATIENTS} patients or images of its own to be split; {GIVE_LISTS}"
        )
    for split in ("val", "test") if classes else ():
        absent = sorted(set(range(len(classes))) - {int(labels[i]) for i in parts[split]})
        if absent:
            few = f"{classes[absent[0]]} has fewer than {MIN_PATIENTS} patients or images of its own"
            print(f"note: {', '.join(classes[i] for i in absent)}: not in {split}; {few}", file=sys.stderr)
    return {split: _take((names, labels), rows) for split, rows in parts.items()}
