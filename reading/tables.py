"""Image lists in the published format, and CSV tables.

A list has one image a line: its name, then its labels as whole numbers, separated by blanks. −1 marks a label
that is not known. A list of names alone is a list for pre-training.
"""

import contextlib
import csv
import gzip
import os
import posixpath
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from medssl.errors import InputError, unusable
from medssl.files import write_text
from medssl.markup import csv_value
from medssl.reading.find import IMAGE_EXTENSIONS, VOLUME_EXTENSIONS, without_extension


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
    # -sig: editors on Windows write a byte-order mark
    with unusable(path, "not a text file, so not an image list"), open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line.strip()


PATIENTS = "patients.csv"  # the table of a folder's patients

# A name ends at the first image extension, so it may hold blanks; without one it ends at the first blank.
_ENDS = "|".join(map(re.escape, (*IMAGE_EXTENSIONS, *VOLUME_EXTENSIONS)))
_NAME = re.compile(rf".*?(?:{_ENDS})(?=\s|$)", re.IGNORECASE)


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


def list_text(names: Sequence[str], labels: Tensor | None = None) -> str:
    """The content of a list file. `labels` is (N, L) whole numbers, NaN becomes −1; or None.

    Raises:
        InputError: for a name that `read_list` would not bring back.
    """
    for name in names:
        if not _fits_a_line(name):
            raise InputError(
                f"{name}: an image list cannot hold this name: it has a line break, a blank where none can be, or "
                "letters that are not UTF-8; rename the file"
            )
    if labels is None:
        return "".join(f"{name}\n" for name in names)
    rows = torch.nan_to_num(labels.double(), nan=-1).long().tolist()
    return "".join(f"{name} {' '.join(map(str, row))}\n" for name, row in zip(names, rows, strict=True))


def _fits_a_line(name: str) -> bool:
    whole = name == name.strip() and not re.search("[\r\n\ud800-\udfff]", name)
    return bool(name) and whole and _split_line(name)[0] == name


def write_list(path: str | Path, names: Sequence[str], labels: Tensor | None = None) -> None:
    """Write a list file in one step, with the arguments of `list_text`."""
    write_text(path, list_text(names, labels))


@contextlib.contextmanager
def open_table(path: Path, whose: str) -> Iterator[TextIO]:
    """Open a CSV file, plain or gzipped, to read it within the block.

    Raises:
        InputError: naming the file, where it is damaged or no table; `whose` table it should be.
    """
    with unusable(path, f"not a table in UTF-8; is this {whose} table?"):
        try:
            with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", newline="") as file:
                yield file
        except (OSError, EOFError, zlib.error) as error:
            if isinstance(error, OSError) and error.filename is not None:
                raise
            raise InputError(f"{path}: cannot be read; is it whole? Download it again") from None


def read_patients(folder: Path) -> dict[str, str]:
    """The patients that a table `patients.csv` in a folder tells, with columns "file" and "patient": by the file's path
    in the folder or its name, and by both without a volume's extension. {} where there is no such table.

    Raises:
        InputError: naming file and line, for missing columns, empty fields, a file of two patients, and a file that is
            no table.
    """
    path = folder / PATIENTS
    if not path.is_file():
        return {}
    patients: dict[str, str] = {}
    with open_table(path, "your patients'") as file:
        lines = csv.DictReader(file)
        for column in ("file", "patient"):
            if column not in (lines.fieldnames or ()):
                raise InputError(f"{path}, line 1: no column {column!r}; its first line must be: file,patient")
        for row in lines:
            written, patient = (csv_value(row[column] or "").strip() for column in ("file", "patient"))
            if not written or not patient:
                raise InputError(f"{path}, line {lines.line_num}: has no file or no patient")
            name = plain_name(written)
            if patients.get(name, patient) != patient:
                raise InputError(f"{path}, line {lines.line_num}: {written} is of {patients[name]} and of {patient}")
            patients |= dict.fromkeys((name, without_extension(name)), patient)
    return patients
