"""Image lists in the published format, and splits by patient.

A list has one image a line: its name, then its labels as whole numbers, separated by blanks. −1 marks a label
that is not known. A list of names alone is a list for pre-training.
"""

import contextlib
import csv
import gzip
import hashlib
import os
import posixpath
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO, TypeVar

import torch
from torch import Tensor

from medssl.datasets import volumes
from medssl.datasets.reading import EXTENSIONS
from medssl.engine.options import InputError

# Splits made on the fly do not follow `--seed`: pre-training and every fine-tuning trial must hold out the same
# patients, or the one trains on what the other tests on.
SPLIT_SEED = 0
HELD_OUT = 0.1  # share of the training patients that validates where a set has no validation list

T = TypeVar("T")


def plain_name(written: str) -> str:
    """A path as a list has it, in the one way that ids are written: no `./`, forward slashes."""
    return posixpath.normpath(written.replace("\\", "/"))


def file_name(written: str) -> str:
    """What `plain_name` has after its last slash."""
    return plain_name(written).rsplit("/", 1)[-1]


def read_list(path: str | Path, name_of: Callable[[str], str] = plain_name) -> tuple[list[str], Tensor | None]:
    """Read a list file.

    Args:
        name_of: from what is written to the image's name.

    Returns:
        names, and labels (N, L) float32 (whole numbers, −1 or above) or None where the list has names alone.

    Raises:
        InputError: naming file and line, for a missing or empty list, lines with different numbers of
            labels, labels that are not whole numbers of at least −1, and names listed twice.
    """
    names: list[str] = []
    rows: list[list[int]] = []
    lines: dict[str, int] = {}
    for number, text in _numbered_lines(path):
        written, fields = _split_line(text)
        name = name_of(written)
        # Nine digits at most: float32 and the class count end long before.
        if not all(re.fullmatch("[+-]?[0-9]{1,9}", field) for field in fields):
            raise InputError(f"{path}, line {number}: labels must be whole numbers, not {text!r}")
        row = [int(field) for field in fields]
        if min(row, default=0) < -1:
            raise InputError(f"{path}, line {number}: label {min(row)}; the least is -1 (not known)")
        if rows and len(row) != len(rows[0]):
            raise InputError(f"{path}, line {number}: {len(row)} labels, the lines above have {len(rows[0])}")
        if name in lines:
            raise InputError(f"{path}, line {number}: {name} is listed on line {lines[name]} already")
        lines[name] = number
        names.append(name)
        rows.append(row)
    if not names:
        raise InputError(f"{path}: the list is empty")
    return names, torch.tensor(rows, dtype=torch.float32) if rows[0] else None


def line_of(path: str | Path, name: str, name_of: Callable[[str], str] = plain_name) -> int:
    """The line on which a list names an image, for messages."""
    return next(number for number, text in _numbered_lines(path) if name_of(_split_line(text)[0]) == name)


def class_count(origin: str | Path, labels: Sequence[Tensor]) -> int:
    """How many classes the class numbers (N,) int64 of all lists of a set have.

    Raises:
        InputError: naming `origin`, where all images are of class 0, or a number below the largest has no image, as
            after a slip of the pen.
    """
    present = torch.unique(torch.cat(list(labels))).tolist()
    if present == [0]:
        raise InputError(f"{origin}: all labels are 0; two classes are needed")
    empty = next((number for number, there in enumerate(present) if number != there), None)
    if empty is not None:
        raise InputError(
            f"{origin}: class {present[-1]} is there, but class {empty} has no image; number the classes 0, 1, 2, …"
        )
    return len(present)


def _numbered_lines(path: str | Path) -> Iterable[tuple[int, str]]:
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such list file")
    try:
        with open(path, encoding="utf-8-sig") as file:  # -sig: editors on Windows write a byte-order mark
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line.strip()
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file, so not an image list") from None


# A name ends at the first image extension, so it may hold blanks; without one it ends at the first blank.
_NAME = re.compile(rf".*?(?:{'|'.join(map(re.escape, (*EXTENSIONS, *volumes.EXTENSIONS)))})(?=\s|$)", re.IGNORECASE)


def _split_line(text: str) -> tuple[str, list[str]]:
    """A line's name and the fields after it."""
    named = _NAME.match(text)
    if named:
        return named[0], text[named.end() :].split()
    fields = text.split()
    return fields[0], fields[1:]


def known_or_nan(
    path: str | Path,
    names: Sequence[str],
    labels: Tensor,
    columns: int | None = None,
    name_of: Callable[[str], str] = plain_name,
) -> Tensor:
    """Check the labels of a multi-label list.

    Args:
        path, names, labels, name_of: a list file, and what `read_list` gave and was given for it.
        columns: how many labels each line must have, where that is known.

    Returns:
        (N, L) float32 of 0, 1, and NaN in the place of −1.

    Raises:
        InputError: naming file and line.
    """
    if columns is not None and labels.shape[1] != columns:
        line = line_of(path, names[0], name_of)
        raise InputError(f"{path}, line {line}: {labels.shape[1]} labels, the data set has {columns}")
    wrong = (labels > 1).nonzero()
    if len(wrong):
        row, column = wrong[0].tolist()
        value = int(labels[row, column])
        line = line_of(path, names[row], name_of)
        raise InputError(f"{path}, line {line}: label {value} of {names[row]} is not 0 or 1 (-1: not known)")
    return torch.where(labels < 0, torch.nan, labels)


def write_list(path: str | Path, names: Sequence[str], labels: Tensor | None = None) -> None:
    """Write a list file in one step. `labels` is (N, L) whole numbers, NaN becomes −1; or None."""
    if labels is None:
        text = "".join(f"{name}\n" for name in names)
    else:
        rows = torch.nan_to_num(labels.double(), nan=-1).long().tolist()
        text = "".join(f"{name} {' '.join(map(str, row))}\n" for name, row in zip(names, rows, strict=True))
    write_text(path, text)


def write_text(path: str | Path, text: str) -> None:
    """Replace a file's text in one step: readers see the old text or the new one, never half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(unfinished, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def patient_of(name: str) -> str | None:
    """The patient in a file name of ChestX-ray14 (`00000013_005.png`) or CheXpert (`patient00001/…`), or None."""
    match = re.search(r"(?:^|/)(?:(\d{8})_\d{3}\.\w+$|(patient\d+)/)", name)
    return match and (match[1] or match[2])


def split_by_patient(patients: Sequence[str], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Hold out the images of a share of the patients.

    Patients are ordered by a hash of (seed, name), so the split is the same on every machine and version,
    whatever the images' order, and a patient more moves few others.

    Args:
        patients: the patient of every image.
        fraction: share of the *patients* held out, in [0, 1]; at least one where it is above 0, and never all
            where it is below 1.
        seed: chooses the split.

    Returns:
        positions of the images that stay, and of those held out, both ascending.
    """
    order = sorted(set(patients), key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    count = round(fraction * len(order))
    if 0 < fraction < 1:
        count = min(max(count, 1), len(order) - 1)
    held = set(order[:count])
    return (
        [i for i, patient in enumerate(patients) if patient not in held],
        [i for i, patient in enumerate(patients) if patient in held],
    )


def split_all(patients: Sequence[str]) -> dict[str, list[int]]:
    """Positions of the images of each split in a set that has none: 70 % of the patients train, 10 % validate."""
    rest, test = split_by_patient(patients, 0.2, SPLIT_SEED)
    train, val = split_by_patient([patients[i] for i in rest], 0.1 / 0.8, SPLIT_SEED)
    return {"train": [rest[i] for i in train], "val": [rest[i] for i in val], "test": test}


@dataclass(frozen=True)
class Listed:
    """The images of a split.

    Attributes:
        origin: the list or table that names them, for messages.
        names: theirs.
        labels: (N, L), or None where `origin` has names alone.
        patients: theirs.
        order: the patients of all images of the list that the split was taken from, in its order: what `--ratio`
            parts, so that what a script leaves out (validation patients, views, missing files) moves no patient.
    """

    origin: Path
    names: list[str]
    labels: Tensor | None
    patients: list[str]
    order: list[str]

    def rows(self, chosen: Sequence[int]) -> "Listed":
        """The images at the positions `chosen`."""
        labels = None if self.labels is None else self.labels[list(chosen)]
        names, patients = ([each[i] for i in chosen] for each in (self.names, self.patients))
        return Listed(self.origin, names, labels, patients, self.order)


def hold_out(whole: Listed) -> dict[str, Listed]:
    """A fixed tenth of the patients of a training list for validation, the others for training."""
    parts = split_by_patient(whole.patients, HELD_OUT, SPLIT_SEED)
    return {split: whole.rows(rows) for split, rows in zip(("train", "val"), parts)}


def read_given(
    given: Mapping[str, str],
    splits: Sequence[str],
    name_of: Callable[[str], str],
    labels_of: Callable[[str, list[str], Tensor], Tensor],
    patients_of: Callable[[list[str]], list[str]],
    hidden: Callable[[str], bool],
    official: str | Path,
) -> dict[str, Listed]:
    """The splits of a user's lists for a set that has an official test set.

    Where "val" is asked without a list, a tenth of the patients of the training list validates. A warning says how
    many images of a list that trains or validates are official test images: published lists have them.

    Args:
        given: list files by split.
        splits: that are asked for.
        name_of: from what is written to the image's name.
        labels_of: checks and rewrites (path, names, labels as `read_list` has them).
        patients_of: the patients of names.
        hidden: whether a name is an official test image's.
        official: the file that says so, for the warning.

    Raises:
        InputError: for lists that cannot be used.
    """
    chosen: dict[str, Listed] = {}
    for split, path in given.items():
        names, labels = read_list(path, name_of)
        if labels is not None:
            labels = labels_of(path, names, labels)
        patients = patients_of(names)
        chosen[split] = Listed(Path(path), names, labels, patients, patients)
        leaked = sum(map(hidden, names))
        if split != "test" and leaked:
            use = "trains" if split == "train" else "chooses models"
            print(
                f"warning: {path}: {leaked} of its {len(names)} images are in the official test set "
                f"({official}); a result there means nothing for a model that {use} on them",
                file=sys.stderr,
            )
    if "val" in splits and "val" not in chosen and "train" in chosen:
        print(
            f"note: {chosen['train'].origin}: no --val-list, so a tenth of its patients validates; "
            "pre-training on this list has seen their images",
            file=sys.stderr,
        )
        chosen |= hold_out(chosen["train"])
    return chosen


def warn_of_absent(origin: Path, absent: int, of: int, folder: Path) -> None:
    """Say that a copy lacks images of an official split."""
    if absent:
        print(
            f"warning: {origin}: {absent} of its {of} images are not in {folder}; "
            "results are not those of the official split",
            file=sys.stderr,
        )


def warn_of_unlabelled(origin: Path, absent: Sequence[str], of: int, table: str | Path) -> None:
    """Say that a table lacks images of a list."""
    if absent:
        print(
            f"warning: {origin}: {len(absent)} of its {of} images are not in {table}, such as "
            f"{absent[0]}; their labels are not known and count nowhere",
            file=sys.stderr,
        )


@contextlib.contextmanager
def open_table(path: Path, whose: str) -> Iterator[TextIO]:
    """Open a CSV file, plain or gzipped, to read it within the block.

    Raises:
        InputError: naming the file, where it is damaged or no table; `whose` table it should be.
    """
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", newline="") as file:
            yield file
    except (OSError, EOFError, zlib.error):
        raise InputError(f"{path}: cannot be read; is it whole? Download it again") from None
    except (UnicodeDecodeError, csv.Error):
        raise InputError(f"{path}: not a table in UTF-8; is this {whose} table?") from None


def asked_for(
    name: str, chosen: Mapping[str, T], splits: Sequence[str], what: str = "images", or_: str = ""
) -> dict[str, T]:
    """What was chosen for the splits that are asked for.

    Args:
        name: of the data set.
        what: is split.
        or_: what can be done other than giving a list.

    Raises:
        InputError: where nothing was chosen for a split.
    """
    for split in splits:
        if split not in chosen:
            option = "--list" if split == "train" else f"--{split}-list"
            raise InputError(f"data set {name}: nothing says which {what} are for {split}; give {option}{or_}")
    return {split: chosen[split] for split in splits}
