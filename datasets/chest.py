"""NIH ChestX-ray14: 112 120 frontal radiographs of 30 805 patients, 14 findings (Wang et al., CVPR 2017).

Read as it unpacks: `images/*.png` or `images_0*/images/*.png`, `Data_Entry_2017*.csv[.gz]`, `train_val_list.txt`,
`test_list.txt`. A copy with resized images works the same.
"""

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

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
from medssl.reading.find import IMAGE_EXTENSIONS
from medssl.reading.tables import file_name, known_or_nan, line_of, open_table, read_list

FINDINGS = (
    *("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia"),
    *("Pneumothorax", "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia"),
)


@dataclass(frozen=True)
class Entries:
    """The rows of `Data_Entry_2017*.csv`: the finding numbers and the patient of every image name."""

    table: Path
    findings: dict[str, tuple[int, ...]]
    patients: dict[str, str]

    def labels(self, names: Sequence[str]) -> Tensor:
        """(N, 14) float32 of 0 and 1; NaN for images that the table does not hold."""
        labels = torch.zeros(len(names), len(FINDINGS))
        for row, name in enumerate(names):
            if name in self.findings:
                labels[row, list(self.findings[name])] = 1
            else:
                labels[row] = torch.nan
        return labels


def read_entries(folder: Path) -> Entries | None:
    """Read the metadata table of a copy of the set; None where there is none.

    Raises:
        InputError: naming file and line, for missing columns and unknown findings, and a file that is damaged or no
            table.
    """
    tables = sorted(folder.glob("Data_Entry_2017*.csv")) + sorted(folder.glob("Data_Entry_2017*.csv.gz"))
    return _read_table(tables[0]) if tables else None


def _read_table(path: Path) -> Entries:
    findings: dict[str, tuple[int, ...]] = {}
    patients: dict[str, str] = {}
    numbers = {name: number for number, name in enumerate(FINDINGS)}
    with open_table(path, "the NIH") as file:
        reader = csv.DictReader(file)
        for column in ("Image Index", "Finding Labels", "Patient ID"):
            if column not in (reader.fieldnames or ()):
                raise InputError(f"{path}, line 1: no column {column!r}; is this the NIH table?")
        for row in reader:
            name, named = row["Image Index"], row["Finding Labels"]
            try:
                found = () if named == "No Finding" else tuple(numbers[one] for one in named.split("|"))
            except (KeyError, AttributeError):
                raise InputError(f"{path}, line {reader.line_num}: unknown finding in {named!r}") from None
            findings[name] = found
            patients[name] = patient_of(name) or row["Patient ID"]
    return Entries(path, findings, patients)


def patients_of(names: Sequence[str], entries: Entries | None) -> list[str]:
    """The patient of every image: from the table, or what its name has before the first `_`."""
    known = {} if entries is None else entries.patients
    return [known.get(name) or patient_of(name) or name.split("_")[0] for name in names]


def open_splits(request: Request, splits: Sequence[str]) -> dict[str, ImageDataset]:
    """Open splits of ChestX-ray14, multi-label over `FINDINGS`.

    Which images:
        * `request.list`, `val_list`, `test_list` where given. Where "val" is asked without `val_list`, it is a
          fixed tenth of the patients in `list`, which then do not train; "train" alone is the whole list.
          Without `test_list`, the test set is the official one.
        * else the official lists. A fixed tenth of the training patients is for validation and never trains,
          also when only "train" is asked, so that pre-training does not see it.
        * else, where only "train" is asked, every image of the folder.

    Labels are the lists', or the table's for lists of names alone; without both, the set is unlabelled.

    Raises:
        InputError: for a folder without images, a list or line that cannot be used, a listed file that is
            missing, or a split for which there is no list.
    """
    folder = request.folder()
    paths = _index(folder)
    entries = read_entries(folder)
    if request.lists:
        chosen = _given(request, splits, folder, entries)
    else:
        chosen = _official(folder, paths, splits, entries)
    opened = {}
    for split, listed in chosen.items():
        names, labels = listed.names, listed.labels
        for name in names:
            if name not in paths:
                line = line_of(listed.origin, name, file_name)
                raise InputError(f"{listed.origin}, line {line}: {name} is not in {folder}")
        if labels is None and entries is not None:
            labels = _from_table(listed.origin, names, entries)
        if labels is None:
            info = Info("chest")
        else:
            info = Info("chest", task="multi-label", classes=FINDINGS)
        files = Files([paths[name] for name in names])
        texture = request.resolve_texture(info)
        opened[split] = ImageDataset(info, files, names, labels, listed.patients, texture)
        opened[split].order = listed.order
    return opened


def _from_table(origin: Path, names: list[str], entries: Entries) -> Tensor | None:
    """The labels that the table has, with a warning where it lacks images; None where it lacks all."""
    absent = [name for name in names if name not in entries.findings]
    warn_of_unlabelled(origin, absent, len(names), entries.table)
    return entries.labels(names) if len(absent) < len(names) else None


def _listed(origin: Path, names: list[str], entries: Entries | None) -> Listed:
    patients = patients_of(names, entries)
    return Listed(origin, names, None, patients, patients)


def _given(request: Request, splits: Sequence[str], folder: Path, entries: Entries | None) -> dict[str, Listed]:
    """The splits of the user's lists."""
    official = folder / "test_list.txt"
    hidden = read_list(official, file_name)[0] if official.is_file() else []
    chosen = read_given(
        request.lists,
        splits,
        # Some published lists write `images/00000001_000.png`; the name alone identifies the image.
        file_name,
        lambda path, names, labels: known_or_nan(path, names, labels, len(FINDINGS), file_name),
        lambda names: patients_of(names, entries),
        set(hidden).__contains__,
        official,
    )
    if "test" in splits and "test" not in chosen and hidden:
        chosen["test"] = _listed(official, hidden, entries)
    return _only(chosen, splits)


def _official(folder: Path, paths: dict[str, str], splits: Sequence[str], entries: Entries | None) -> dict[str, Listed]:
    """The splits of the official lists, or all images for training alone."""
    files = {"train": folder / "train_val_list.txt", "test": folder / "test_list.txt"}
    if not any(file.is_file() for file in files.values()) and list(splits) == ["train"]:
        return {"train": _listed(folder, sorted(paths), entries)}
    chosen: dict[str, Listed] = {}
    for split, file in files.items():
        if not file.is_file():
            continue
        whole = _listed(file, read_list(file, file_name)[0], entries)
        # Split before missing images are left out: a partial copy holds out the same patients.
        parts = hold_out(whole) if split == "train" else {"test": whole}
        # Many keep only some of the twelve archives: what is there can be used, but is not the official set.
        there = sum(name in paths for name in whole.names)
        if not there:
            raise InputError(f"{file}: none of its images is in {folder}")
        warn_of_absent(file, len(whole.names) - there, len(whole.names), folder)
        for part, listed in parts.items():
            rows = [i for i, name in enumerate(listed.names) if name in paths]
            chosen[part] = replace(listed.rows(rows), order=listed.patients)
    return _only(chosen, splits)


def _only(chosen: dict[str, Listed], splits: Sequence[str]) -> dict[str, Listed]:
    or_ = ", or put the official train_val_list.txt and test_list.txt into --data"
    return asked_for("chest", chosen, splits, or_=or_)


def _index(folder: Path) -> dict[str, str]:
    """Paths by file name. One scan of the folders: asking for 112 120 files one by one takes long."""
    places = [folder / "images", *sorted(folder.glob("images_*/images")), folder]
    paths: dict[str, str] = {}
    for place in places:
        if place.is_dir():
            with os.scandir(place) as entries:
                for entry in entries:
                    if entry.name.lower().endswith(IMAGE_EXTENSIONS) and not entry.name.startswith("."):
                        paths.setdefault(entry.name, entry.path)
    if not paths:
        raise InputError(f"--data {folder}: no images in images/ or images_0*/images/")
    return paths
