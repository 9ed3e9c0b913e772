"""CheXpert: 223 414 radiographs of 64 540 patients to train on, 234 of 200 to test on (Irvin et al., AAAI 2019). The
latter are its published validation set, `valid.csv`; the published test set is not part of the download.

Read as it unpacks: `train.csv`, `valid.csv` (also gzipped, and named `chexpert_train.csv.gz`), `train/patientN/…`,
`valid/patientN/…`, in `--data` or in a folder `CheXpert-v1.0*` there. Images go by their paths from `train/` or
`valid/` on, in lists with or without the folder's name before.

**Views.** `--view` chooses frontal (191 027 of the training images, the default everywhere), lateral, or all. The
test images are mostly frontal (202 of 234), and one default for all scripts keeps pre-training and fine-tuning alike;
`--view all` gives pre-training a sixth more images. Which patients validate, and which `--ratio` gives to
pre-training, does not depend on it.

**Labels.** Blank is 0. What is uncertain (−1) becomes, in training, by `--uncertain`: a number drawn from U(0.55, 0.85)
(lsr-ones, the default) or U(0, 0.3) (lsr-zeros), as Pham et al. (Neurocomputing 437, 2021) smooth labels; 1; 0; or NaN,
which counts nowhere. In validation and test it is NaN whatever the policy: the truth is not known, and policies must
be judged on the same labels.
"""

import csv
import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from medssl.datasets.base import Files, ImageDataset, Info, Request
from medssl.datasets.splits import (
    Listed,
    asked_for,
    hold_out,
    patient_of,
    read_given,
    warn_of_absent,
    warn_of_unlabelled,
)
from medssl.errors import InputError
from medssl.files import name_bytes
from medssl.reading.tables import known_or_nan, line_of, open_table, plain_name

LABELS = (
    *("No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema"),
    *("Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other"),
    *("Fracture", "Support Devices"),
)
REPORTED = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
VIEW = "frontal"
POLICY = "lsr-ones"
BECOMES = {  # range of what an uncertain label becomes
    "lsr-ones": (0.55, 0.85), "lsr-zeros": (0.0, 0.3), "ones": (1.0, 1.0), "zeros": (0.0, 0.0),
    "ignore": (torch.nan, torch.nan),
}  # fmt: skip
SMOOTHING_SEED = 0


@dataclass(frozen=True)
class Table:
    """The rows of `train.csv` or `valid.csv`: names, labels (N, 14) float32 of 0, 1 and −1 (uncertain) in the order of
    `LABELS`, patients, and "frontal" or "lateral"."""

    path: Path
    names: list[str]
    labels: Tensor
    patients: list[str]
    views: list[str]


def name_in(written: str) -> str:
    """An image's path in the set: what is written, less the folder's name before it."""
    return re.sub(r"^CheXpert-v1\.0[^/]*/", "", plain_name(written))


def tables_in(folder: Path) -> dict[str, Path]:
    """Where the tables of "train" and "valid" are, of those that are there."""
    names = {
        part: [f"{stem}{part}.csv{end}" for stem in ("", "chexpert_") for end in ("", ".gz")]
        for part in ("train", "valid")
    }
    found = {}
    for part, known in names.items():
        paths = [place / name for place in _places(folder) for name in known]
        there = next((path for path in paths if path.is_file()), None)
        if there:
            found[part] = there
    return found


def _places(folder: Path) -> list[Path]:
    return [folder, *sorted(folder.glob("CheXpert-v1.0*"))]


def read_table(path: Path) -> Table:
    """Read `train.csv` or `valid.csv`; a blank label is 0.

    Raises:
        InputError: naming file and line, for missing columns, unknown values, paths without a patient or given twice,
            and a file that is damaged, empty or no table.
    """
    names: list[str] = []
    rows, patients, views = [], [], []
    value_of = {"": 0, "0": 0, "0.0": 0, "1": 1, "1.0": 1, "-1": -1, "-1.0": -1}
    with open_table(path, "CheXpert's") as file:
        lines = csv.reader(file)
        columns = {name: number for number, name in enumerate(next(lines, []))}
        for name in ("Path", "Frontal/Lateral", *LABELS):
            if name not in columns:
                raise InputError(f"{path}, line 1: no column {name!r}; is this CheXpert's table?")
        label_columns = [columns[name] for name in LABELS]
        path_column, view_column = columns["Path"], columns["Frontal/Lateral"]
        for line in lines:
            where = f"{path}, line {lines.line_num}"
            if len(line) < len(columns):
                raise InputError(f"{where}: {len(line)} columns of {len(columns)}; is the file whole?")
            try:
                rows.append([value_of[line[column]] for column in label_columns])
            except KeyError as error:
                raise InputError(f"{where}: label {error.args[0]!r}; labels must be 1, 0, -1 or blank") from None
            name, view = name_in(line[path_column]), line[view_column].lower()
            patient = patient_of(name)
            if patient is None:
                raise InputError(f"{where}: no patient in the path {name}")
            if view not in ("frontal", "lateral"):
                raise InputError(f"{where}: view {line[view_column]!r} is neither Frontal nor Lateral")
            names.append(name)
            patients.append(patient)
            views.append(view)
    if not names:
        raise InputError(f"{path}: has no images")
    if len(set(names)) < len(names):
        raise InputError(f"{path}: {Counter(names).most_common(1)[0][0]} is there twice")
    return Table(path, names, torch.from_numpy(np.array(rows, np.float32)), patients, views)


def open_splits(request: Request, splits: Sequence[str]) -> dict[str, ImageDataset]:
    """Open splits of CheXpert, multi-label over `REPORTED`.

    Which images:
        * `request.list`, `val_list`, `test_list` where given, with labels in the order of `LABELS` (14, as
          `preprocess/make_lists.py` writes them) or of `REPORTED` (5), −1 where uncertain, or names alone, whose labels
          the tables have. Where "val" is asked without `val_list`, it is a fixed tenth of the patients in `list`,
          which then do not train; "train" alone is the whole list. Without `test_list`, valid.csv is the test set.
        * else the tables: valid.csv is the test set. A fixed tenth of train.csv's patients is for validation and never
          trains, also when only "train" is asked, so that pre-training does not see it.

    Raises:
        InputError: for a folder without images, a table, list or line that cannot be used, a listed file that is
            missing, a split for which nothing says its images, and options that would do nothing.
    """
    folder = request.folder()
    root = _root(folder)
    tables = {part: read_table(path) for part, path in tables_in(folder).items()}
    if request.lists:
        chosen = _given(request, splits, root, tables)
    else:
        chosen = _official(request, splits, root, tables)
    opened = {}
    for split, listed in chosen.items():
        labels = listed.labels
        if labels is None and tables:
            labels = _from_tables(listed, list(tables.values()))
        if labels is not None:
            policy = (request.uncertain or POLICY) if split == "train" else "ignore"
            if split == "train" and request.uncertain and not (labels == -1).any():
                raise InputError(
                    f"--uncertain {request.uncertain}: {listed.origin} has no uncertain label (-1); leave it out, or "
                    "make the list with preprocess/make_lists.py --uncertain ignore"
                )
            labels = settle(labels, listed.names, policy)
        info = Info("chexpert") if labels is None else Info("chexpert", task="multi-label", classes=REPORTED)
        files = Files([os.path.join(root, name) for name in listed.names])
        texture = request.resolve_texture(info)
        opened[split] = ImageDataset(info, files, listed.names, labels, listed.patients, texture)
        opened[split].order = listed.order
    return opened


def settle(labels: Tensor, names: Sequence[str], policy: str) -> Tensor:
    """What uncertain labels become.

    A smoothed label is a function of the image's name and the class alone: it is drawn once, the same in every epoch,
    trial, resumed run, list and process.

    Args:
        labels: (N, 5) of 0, 1, −1 (uncertain) and NaN, for the classes `REPORTED`.
        names: of the images.
        policy: a key of `BECOMES`.

    Returns:
        (N, 5) float32 in [0, 1], or NaN.
    """
    low, high = BECOMES[policy]
    uncertain = labels == -1
    settled = torch.where(uncertain, low, labels)
    if low < high:
        rows, columns = uncertain.nonzero(as_tuple=True)
        drawn = [_unit(names[i], REPORTED[j]) for i, j in zip(rows.tolist(), columns.tolist())]
        settled[rows, columns] = low + (high - low) * torch.tensor(drawn)
    return settled


def _unit(name: str, label: str) -> float:
    """A number in [0, 1) for an image's label."""
    code = hashlib.blake2b(name_bytes(f"{SMOOTHING_SEED}:{name}:{label}"), digest_size=8).digest()
    return int.from_bytes(code, "big") / 2**64


def _reported(labels: Tensor) -> Tensor:
    """(N, 14) → (N, 5)."""
    return labels[:, [LABELS.index(name) for name in REPORTED]]


def _labels_of(path: str, names: list[str], labels: Tensor) -> Tensor:
    """A list's labels (N, 5) of 0, 1 and −1."""
    if labels.shape[1] not in (len(REPORTED), len(LABELS)):
        line = line_of(path, names[0], name_in)
        raise InputError(f"{path}, line {line}: {labels.shape[1]} labels; chexpert's lists have 14, or the 5 reported")
    known_or_nan(path, names, labels, name_of=name_in)  # for what it refuses
    return labels if labels.shape[1] == len(REPORTED) else _reported(labels)


def _from_tables(listed: Listed, tables: list[Table]) -> Tensor | None:
    """The labels (N, 5) that the tables have, NaN with a warning where they lack images; None where they lack all."""
    rows = {name: row for row, name in enumerate(name for table in tables for name in table.names)}
    absent = [name for name in listed.names if name not in rows]
    warn_of_unlabelled(listed.origin, absent, len(listed.names), " or ".join(str(table.path) for table in tables))
    if len(absent) == len(listed.names):
        return None
    unknown = torch.full((1, len(LABELS)), torch.nan)
    labels = torch.cat([*(table.labels for table in tables), unknown])
    return _reported(labels[[rows.get(name, -1) for name in listed.names]])


def _given(request: Request, splits: Sequence[str], root: Path, tables: dict[str, Table]) -> dict[str, Listed]:
    """The splits of the user's lists."""
    official = "test" in splits and not request.test_list and "valid" in tables
    if request.view and not official:
        raise InputError(
            f"--view {request.view}: the lists say which images; leave it out, or make them with "
            "preprocess/make_lists.py --view"
        )
    chosen = read_given(
        request.lists,
        splits,
        name_in,
        _labels_of,
        lambda names: [patient_of(name) or name for name in names],
        lambda name: name.startswith("valid/"),
        tables["valid"].path if "valid" in tables else "valid.csv",
    )
    for listed in chosen.values():
        for name in listed.names:
            if not os.path.isfile(os.path.join(root, name)):
                line = line_of(listed.origin, name, name_in)
                raise InputError(f"{listed.origin}, line {line}: {name} is not in {root}")
    if official:
        chosen |= _seen(request, {"test": _listed(tables["valid"])}, {"test": tables["valid"]}, root)
    return asked_for("chexpert", chosen, splits, or_=", or put the official valid.csv into --data")


def _listed(table: Table) -> Listed:
    return Listed(table.path, table.names, _reported(table.labels), table.patients, table.patients)


def _official(request: Request, splits: Sequence[str], root: Path, tables: dict[str, Table]) -> dict[str, Listed]:
    """The splits of the tables."""
    whole, of = {}, {}
    if "train" in tables:
        # Split before views are chosen and missing images left out: which patients are held out is always the same.
        whole |= hold_out(_listed(tables["train"]))
        of |= dict.fromkeys(whole, tables["train"])
    if "valid" in tables:
        whole["test"], of["test"] = _listed(tables["valid"]), tables["valid"]
    wanted = asked_for("chexpert", whole, splits, or_=", or put the official train.csv and valid.csv into --data")
    return _seen(request, wanted, of, root)


def _seen(request: Request, whole: dict[str, Listed], of: dict[str, Table], root: Path) -> dict[str, Listed]:
    """Of splits of the tables `of`, the images of the view that is asked for and that are there."""
    view = request.view or VIEW
    # One look into each folder of patients: asking for 223 414 files one by one takes long on a server.
    there = {f"{part.name}/{name}" for part in _parts(root) for name in os.listdir(part)}
    chosen = {}
    for split, listed in whole.items():
        view_of = dict(zip(of[split].names, of[split].views))
        rows = [i for i, name in enumerate(listed.names) if view in ("all", view_of[name])]
        if not rows:
            raise InputError(f"--view {view}: {listed.origin} has no such images for {split}; choose another")
        present = [i for i in rows if listed.names[i].rsplit("/", 2)[0] in there]
        if not present:
            raise InputError(f"{listed.origin}: none of its images for {split} is in {root}")
        warn_of_absent(listed.origin, len(rows) - len(present), len(rows), root)
        chosen[split] = replace(listed.rows(present), order=listed.patients)
    return chosen


def _root(folder: Path) -> Path:
    """The folder with `train/` or `valid/`."""
    for place in _places(folder):
        if _parts(place):
            return place
    raise InputError(f"--data {folder}: no images in train/ or valid/, nor in a folder CheXpert-v1.0*")


def _parts(root: Path) -> list[Path]:
    return [root / part for part in ("train", "valid") if (root / part).is_dir()]
