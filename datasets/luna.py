"""LUNA16 as `preprocess/luna.py` leaves it: pairs of cubes for pre-training, labelled cubes around nodule candidates.

    subsetK/<uid>_global_<i>.npy (2, X, Y, Z), subsetK/<uid>_local_<i>.npy (V, x, y, z)        pairs of PCRLv2
    subsetK/<uid>_img_<i>.npy (2, X, Y, Z)                                                     pairs of PCRL
    nodules.csv, subsetK/<uid>_nodule_<row>.npy (X, Y, Z)                                      candidates

Files of the published tools (float64) are read as well. Subsets 0–6 train, 7 validates, 8 and 9 test. The training
list is ordered by patient, so that `--ratio` parts it between patients, and pre-training on pairs and fine-tuning on
nodules, which are other files of the same scans, part it in the same place. A scan of LUNA16 is a patient of its own;
of others the uid, or a table `patients.csv` whose files are uids, tells.
"""

import csv
import hashlib
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from medssl.datasets.base import ImageDataset, Info, Request, volume_item
from medssl.datasets.splits import Patients
from medssl.errors import InputError, UnreadableImage, unusable
from medssl.files import name_bytes
from medssl.markup import csv_value
from medssl.reading.arrays import read_npy
from medssl.reading.tables import read_list

FOLDS = {"train": range(7), "val": range(7, 8), "test": range(8, 10)}
CLASSES = ("no nodule", "nodule")
COLUMNS = ("uid", "class", "fold", "weight", "file")  # of nodules.csv, that are read here
PAIR = re.compile(r"(?P<uid>.+)_(?P<kind>global|img)_(?P<number>\d+)\.npy")


class _LunaDataset(ImageDataset):
    """Items ordered by their patients' places in [0, 1), `places` (N,)."""

    places: np.ndarray

    def leading(self, ratio: float) -> int:
        """How many items are of the patients in the first `ratio` of the list."""
        return int(np.searchsorted(self.places[list(self.positions)], ratio))


class LunaPairs(_LunaDataset):
    """Prepared pairs.

    An item is {"image": (2, X, Y, Z) float16, two overlapping cubes in [0, 1]; "locals": (V, x, y, z) float16, small
    cubes around them, where there are such files; "index"; "bad"}.
    """

    prepared = True

    def load(self, i: int) -> dict[str, Tensor]:
        """Pair i.

        Raises:
            UnreadableImage: for files that are missing, damaged, or of other shapes than the first pair's.
        """
        path, shapes = self.read(self.positions[i])
        item = {"image": torch.from_numpy(read_cubes(path, 4, shapes[0]))}
        if len(shapes) > 1:
            item["locals"] = torch.from_numpy(read_cubes(local_of(path), 4, shapes[1]))
        return item


class LunaNodules(_LunaDataset):
    """Cubes around candidates, 1 mm voxels: items as `volume_item` says, with "label" 1 for a nodule."""

    def load(self, i: int) -> dict[str, Tensor]:
        """Candidate i without its label.

        Raises:
            UnreadableImage: for a file that is missing, damaged, or of another shape than the first.
        """
        path, shapes = self.read(self.positions[i])
        cube = read_cubes(path, 3, shapes[0])
        return volume_item(torch.from_numpy(cube), cube.shape)


class _Paths:
    """The source: item number i → its file, and the shapes of a good item's arrays."""

    def __init__(self, paths: Sequence[Path], shapes: Sequence[tuple[int, ...]]) -> None:
        self.paths, self.shapes = [os.fspath(path) for path in paths], tuple(shapes)

    def __call__(self, index: int) -> tuple[Path, tuple[tuple[int, ...], ...]]:
        return Path(self.paths[index]), self.shapes


def open_splits(request: Request, splits: Sequence[str]) -> dict[str, ImageDataset]:
    """Open splits of a prepared folder.

    The training split alone is what pre-training asks for: pairs where there are pairs, else the candidates'
    cubes. With other splits it is the candidates. Lists name scans by uid, one a line; `--list` chooses among
    the scans of subsets 0–6, and orders them for `--ratio`; `--val-list` and `--test-list` among all.

    Raises:
        InputError: for a folder that is not prepared, a table that is none, a list that matches nothing, or
            a split without cubes.
    """
    root = request.folder()
    table = root / "nodules.csv"
    pairs = find_pairs(root) if set(splits) == {"train"} else []
    if not pairs and not table.is_file():
        refuse_unprepared(root, nodules=set(splits) != {"train"})
    rows = [] if pairs else read_nodules(table)
    uids = [uid for uid, _, _ in pairs] or [row["uid"] for row in rows]
    folds = [fold for _, fold, _ in pairs] or [row["fold"] for row in rows]
    patients = Patients(root, set(uids)).grouped(uids)
    opened = {}
    shapes = None
    for split in splits:
        listed = request.lists.get(split)
        order = read_order(listed) if listed else None
        within = FOLDS[split] if split == "train" or order is None else range(max(folds) + 1)
        chosen = [i for i, fold in enumerate(folds) if fold in within and (order is None or uids[i] in order)]
        if not chosen:
            what = f"none of the scans of {listed} has" if listed else "no"
            raise InputError(
                f"--data {root}: {what} {'pairs' if pairs else 'candidates'} in subset {named(within)}, "
                f"the {split} split; prepare these subsets, or give lists of scans"
            )
        first: dict[str, float] = {}  # a list may have a patient's scans apart
        for i in chosen:
            place = place_of(patients[i]) if order is None else order[uids[i]]
            first[patients[i]] = min(place, first.get(patients[i], place))
        places = [first[patients[i]] for i in chosen]
        # Files of a scan stay together and in their own order, since sorting is stable.
        ranked = np.argsort(places, kind="stable")
        chosen = [chosen[i] for i in ranked]
        if pairs:
            paths = [pairs[i][2] for i in chosen]
            shapes = shapes or shapes_of_pairs(paths)
            names = [path.relative_to(root).as_posix().removesuffix(".npy") for path in paths]
            data: _LunaDataset = LunaPairs(Info("luna", 3), _Paths(paths, shapes), names)
        else:
            paths = [root / rows[i]["file"] for i in chosen]
            shapes = shapes or [first_shape(paths, 3)]
            names = [rows[i]["file"].removesuffix(".npy") for i in chosen]
            labels = torch.tensor([rows[i]["class"] for i in chosen])
            data = LunaNodules(Info("luna", 3, 1, "binary", CLASSES), _Paths(paths, shapes), names, labels)
            data.weights = np.array([rows[i]["weight"] for i in chosen])
            data.scans = [uids[i] for i in chosen]
        data.patients = [patients[i] for i in chosen]
        data.places = np.array(places)[ranked]
        opened[split] = data
    return opened


def find_pairs(root: Path) -> list[tuple[str, int, Path]]:
    """(uid, fold, path) of every pair, by fold, uid and number."""
    found = []
    for folder in root.glob("subset*"):
        fold = folder.name.removeprefix("subset")
        if fold.isdigit() and folder.is_dir():
            matches = (PAIR.fullmatch(name) for name in os.listdir(folder) if not name.startswith("."))
            found += [(int(fold), m["uid"], int(m["number"]), folder / m[0]) for m in matches if m]
    return [(uid, fold, path) for fold, uid, _, path in sorted(found)]


def local_of(path: Path) -> Path:
    """The small cubes of a pair."""
    match = PAIR.fullmatch(path.name)
    return path.with_name(f"{match['uid']}_local_{match['number']}.npy")


def refuse_unprepared(root: Path, nodules: bool) -> None:
    """Raise InputError: what the folder holds instead of cubes, and what makes them."""
    command = f"python preprocess/luna.py --data {root} --save CUBES"
    if nodules and find_pairs(root):
        raise InputError(
            f"--data {root}: holds pairs for pre-training, no labelled nodules (nodules.csv); make them with "
            "python preprocess/luna.py --data LUNA16 --save NODULES --nodules candidates_V2.csv"
        )
    raw = next(root.glob("subset*/*.mhd"), None) or next(root.glob("*.mhd"), None)
    found = f"raw CTs such as {raw.relative_to(root)}, not cubes" if raw else "no cubes (subsetK/<uid>_global_<i>.npy)"
    more = " --nodules candidates_V2.csv" if nodules else ""
    raise InputError(f"--data {root}: {found}; prepare them once: {command}{more}, then --data CUBES")


def named(folds: Sequence[int]) -> str:
    """A range of subsets in words: "7", "0-6"."""
    return f"{folds[0]}" if len(folds) == 1 else f"{folds[0]}-{folds[-1]}"


def place_of(patient: str) -> float:
    """A patient's place in the training list, in [0, 1): the same whatever other patients there are."""
    return int.from_bytes(hashlib.sha256(name_bytes(patient)).digest()[:6], "big") / 2**48


def read_order(path: str) -> dict[str, float]:
    """A list of scans: uid → place in [0, 1)."""
    names, _ = read_list(path)
    return {name: i / len(names) for i, name in enumerate(names)}


def read_nodules(path: Path) -> list[dict]:
    """The rows of nodules.csv, in its order, "class" and "fold" as int and "weight" as float.

    Raises:
        InputError: naming file and line.
    """
    rows = []
    with unusable(path, "not a text file; run preprocess/luna.py --nodules again"):
        lines = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""))
        missing = [name for name in COLUMNS if name not in (lines.fieldnames or ())]
        if missing:
            raise InputError(f"{path}, line 1: no column {missing[0]!r}; run preprocess/luna.py --nodules again")
        for line in lines:
            where = f"{path}, line {lines.line_num}"
            with unusable(where, "class, fold and weight must be numbers"):
                row = {"uid": csv_value(line["uid"] or ""), "class": int(line["class"]), "fold": int(line["fold"])}
                row |= {"weight": float(line["weight"]), "file": line["file"]}
            if row["class"] not in (0, 1) or not 1 <= row["weight"] < float("inf") or not row["file"]:
                raise InputError(f"{where}: class must be 0 or 1, weight at least 1, and file a name")
            rows.append(row)
    if not rows:
        raise InputError(f"{path}: no candidates in it; run preprocess/luna.py --nodules again")
    return rows


def shapes_of_pairs(paths: Sequence[Path]) -> list[tuple[int, ...]]:
    """Shapes of the arrays of a pair, with that of the small cubes where there are some.

    Raises:
        InputError: when the first files cannot be read, or do not hold two cubes.
    """
    shapes = [first_shape(paths, 4)]
    if shapes[0][0] != 2:
        raise InputError(f"{paths[0]}: has shape {shapes[0]}; a pair's first axis has length 2")
    small = [path for path in map(local_of, paths[:16]) if path.is_file()]
    return shapes + ([first_shape(small, 4)] if small else [])


def first_shape(paths: Sequence[Path], ndim: int) -> tuple[int, ...]:
    """The shape of the first file that can be read, among some; all of a batch must have it."""
    reasons = []
    for path in paths[:16]:
        try:
            return read_cubes(path, ndim).shape
        except UnreadableImage as error:
            reasons.append(f"{path.parent}: {error}")
    raise InputError(f"data set luna: none of {len(reasons)} tried files can be read, first {reasons[0]}")


def read_cubes(path: Path, ndim: int, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Read an array of cubes.

    Args:
        path: an .npy file of floats.
        ndim: axes it must have; one more of length 1, a channel's, is dropped.
        shape: that it must have.

    Returns:
        (N, X, Y, Z) or (X, Y, Z) float16.

    Raises:
        UnreadableImage: for a file that is missing, damaged, not of numbers in [0, 1], or of another shape.
    """
    if not path.is_file():
        raise UnreadableImage(f"{path.name} is missing")
    try:
        array = read_npy(path)
    except UnreadableImage as error:
        raise UnreadableImage(f"{path.name}: {error}") from None
    if array.dtype.kind != "f":
        raise UnreadableImage(f"{path.name}: not an array of floats")
    if array.ndim > ndim and 1 in array.shape:
        array = array.squeeze(array.shape.index(1))
    if array.ndim != ndim or (shape is not None and array.shape != shape):
        wanted = f"{ndim} axes" if shape is None else f"{shape} like the others"
        raise UnreadableImage(f"{path.name}: has shape {array.shape}, not {wanted}")
    # What is not a number fails these comparisons as well.
    if not (array.size and array.min() >= -1e-3 and array.max() <= 1 + 1e-3):
        raise UnreadableImage(f"{path.name}: holds values outside of 0 to 1")
    return np.ascontiguousarray(array, np.float16)
