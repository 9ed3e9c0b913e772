"""Which images train, validate and test: one policy for every family.

In this order: lists where they are given, official splits where a set has them, else 70/10/20 by patient, always the
same, wherever names, tables or folders tell patients; of class folders, each class by itself. Where pre-training asks
for the training images alone, it gets those of that split: it must not see what is held out. Of a plain folder it gets
all images, as it may be of scans without labels that nothing is held out of; a later split of such a folder says so."""

import hashlib
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from torch import Tensor

from medssl.datasets.base import ImageDataset, Request
from medssl.errors import InputError
from medssl.files import name_bytes
from medssl.reading.tables import PATIENTS, file_name, line_of, read_list, read_patients

# Splits made on the fly do not follow `--seed`: pre-training and every fine-tuning trial must hold out the same
# patients, or the one trains on what the other tests on.
SPLIT_SEED = 0
SPLITS = ("train", "val", "test")
HELD_OUT = 0.1  # share of the patients that validates where a set has no validation list
TEST = 0.2  # share of the patients that tests where a set has no test list
MIN_PATIENTS = len(SPLITS)  # of a class, fewer cannot be in all splits
T = TypeVar("T")

GIVE_LISTS = "give --list, --val-list and --test-list"

MASK_FOLDERS = {"images": ("masks", "labels"), "imagesTr": ("labelsTr",)}  # of images, and of their masks
MASK_ENDS = ("_seg", "_mask", "_label")  # of a mask's name, behind its image's


# Patients ------------------------------------------------------------------------------------------


# A part of a path that names a patient: `patient0001`, `sub-01`, `Subject 7`, alone or before `_`, `-`, `.` or a blank
_PATIENT = re.compile(
    r"(?:^|/)((?:patient|subject|subj|pat|pid)[-_ ]?\d\w*?|sub-[a-z0-9]+|sub_?\d+)(?=[-_./ ]|$)", re.IGNORECASE
)


def patient_of(name: str) -> str | None:
    """The patient that a path tells, or None: as in ChestX-ray14 (`00000013_005.png`), CheXpert (`patient00001/…`) and
    BIDS (`sub-01/…`), or a folder or beginning of a file's name with the word patient, subject or the like. In lower
    case: `Patient1` is `patient1`."""
    match = re.search(r"(?:^|/)(\d{8})_\d{3}\.\w+$", name) or _PATIENT.search(name)
    return match and match[1].lower()


class Patients:
    """Who is on the images of a folder: what its table `patients.csv` tells, else what their paths do.

    Args:
        root: the folder; of `images/` alone, the table is that of the folder around it. names: paths in `root` of all
            its images, volumes with or without extension.

    Raises:
        InputError: for a table that is none, and one that has none of the images.
    """

    def __init__(self, root: Path, names: Collection[str]) -> None:
        above = root.name in MASK_FOLDERS and not (root / PATIENTS).is_file()
        self.inside = f"{root.name}/" if above else ""
        folder = root.parent if above else root
        self.table = read_patients(folder)
        absent = [name for name in names if self._told(name) is None]
        if self.table and len(absent) == len(names):
            raise InputError(f"{folder / PATIENTS}: has none of the {len(names)} images, such as {absent[0]}")
        if self.table and absent:
            print(
                f"warning: {folder / PATIENTS}: {len(absent)} of the {len(names)} images are not in it, such as "
                f"{absent[0]}; where their paths tell no patient, each counts as a patient of its own",
                file=sys.stderr,
            )

    def _told(self, name: str) -> str | None:
        return self.table.get(self.inside + name) or self.table.get(file_name(name))

    def of(self, name: str) -> str | None:
        """The patient of an image, by its path in the folder; None where nothing tells."""
        return self._told(name) or patient_of(name)

    def grouped(self, names: Sequence[str]) -> list[str]:
        """What must stay together in a split: the patient where it is told, else the image."""
        return [self.of(name) or name for name in names]

    def known(self, names: Sequence[str]) -> list[str] | None:
        """`grouped`, or None where no patient is told."""
        found = self.grouped(names)
        return None if found == list(names) else found


# Drawn splits --------------------------------------------------------------------------------------


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
    order = sorted(set(patients), key=lambda name: hashlib.sha256(name_bytes(f"{seed}:{name}")).digest())
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
    rest, test = split_by_patient(patients, TEST, SPLIT_SEED)
    train, val = split_by_patient([patients[i] for i in rest], HELD_OUT / (1 - TEST), SPLIT_SEED)
    return {"train": [rest[i] for i in train], "val": [rest[i] for i in val], "test": test}


def split_classes(patients: Sequence[str], classes: Sequence[int]) -> dict[str, list[int]]:
    """`split_all` of the patients of each class by themselves, so that none is missing from a split that has three.

    Args:
        classes: the class of every image. A patient with several counts as one of the rarest of them.
    """
    found: dict[str, set[int]] = {}
    for patient, number in zip(patients, classes):
        found.setdefault(patient, set()).add(number)
    frequency = Counter(number for numbers in found.values() for number in numbers)
    stratum = {patient: min(numbers, key=lambda n: (frequency[n], n)) for patient, numbers in found.items()}
    parts: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for number in sorted(set(stratum.values())):
        rows = [i for i, patient in enumerate(patients) if stratum[patient] == number]
        if len({patients[i] for i in rows}) < MIN_PATIENTS:
            parts["train"] += rows
            continue
        for split, chosen in split_all([patients[i] for i in rows]).items():
            parts[split] += [rows[i] for i in chosen]
    return {split: sorted(rows) for split, rows in parts.items()}


# Official splits -----------------------------------------------------------------------------------


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


# Cases ---------------------------------------------------------------------------------------------


class Case(Protocol):
    """What is split in sets whose images have files beside them: an image or a scan, and its masks.

    Attributes:
        id: path in `--data`.
        patient: the patient's name, or the id where it is not known.
        part: "train" or "test", as the set is published; None where it has no such parts.
        names: all that lists may call it.
    """

    id: str
    patient: str
    part: str | None
    names: tuple[str, ...]


C = TypeVar("C", bound=Case)


def choose(
    cases: Sequence[C], request: Request, splits: Sequence[str], noun: str = "images", whole: bool | None = None,
    draw: Callable[[Sequence[str]], dict[str, list[int]]] = split_all, published: bool = False,
) -> dict[str, list[C]]:  # fmt: skip
    """The cases of the splits that are asked for, by the policy of this page.

    Args:
        noun: "images" or "cases", for messages.
        whole: whether `--list` alone is used whole; by default, where training images alone are asked for.
        draw: from the cases' patients to the positions of each split.
        published: the set's own parts hold beside lists, too: where lists do not say which images test, the published
            test images do, and a tenth of the training patients validates.

    Raises:
        InputError: for too few cases, and lists that cannot be used.
    """
    if whole is None:
        whole = list(splits) == ["train"]
    parts = {part: found for part in ("train", "test") if (found := [case for case in cases if case.part == part])}
    if request.lists:
        chosen = listed(cases, request, noun)
        if published and "test" in splits and "test" in parts:
            chosen.setdefault("test", parts["test"])
        elif not published and list(chosen) == ["train"] and not whole:
            chosen = drawn(chosen["train"], request, draw, noun)
    elif published or "test" in parts:
        chosen = parts
    else:
        chosen = drawn(cases, request, draw, noun)  # also when training images alone are asked for
    if "val" not in chosen and "train" in chosen and (not request.lists or (published and "val" in splits)):
        rest, held = split_by_patient([case.patient for case in chosen["train"]], HELD_OUT, SPLIT_SEED)
        chosen |= {split: [chosen["train"][i] for i in rows] for split, rows in (("train", rest), ("val", held))}
    return asked_for(request.name, chosen, splits, noun)


def drawn(
    cases: Sequence[C], request: Request, draw: Callable[[Sequence[str]], dict[str, list[int]]], noun: str
) -> dict[str, list[C]]:  # fmt: skip
    """Cases split by patient; says so, and what is not known."""
    patients = [case.patient for case in cases]
    known = len(set(patients)) < len(cases)
    few = len(set(patients)) < len(SPLITS)
    if noun == "images" and few:
        raise InputError(
            f"data set {request.name}: {len(cases)} images are too few to split; at least 3 patients are needed"
        )
    if few:
        of = f" of {len(set(patients))} patient{'s' * (len(set(patients)) != 1)}" if known else ""
        raise InputError(
            f"data set {request.name}: {len(cases)} case{'s' * (len(cases) != 1)}{of} cannot be split into training, "
            "validation and test; at least 3 are needed, or cut a large scan into several files"
        )
    if noun == "images" and request.lists:
        note = (
            f"{request.list}: no --val-list and --test-list, so it is split 70/10/20 by patient; "
            "pre-training on this list has seen all of its images"
        )
    elif noun == "images":
        note = "" if known or request.name != "folder" else (
            f"patients of {request.data} are unknown: split 70/10/20 by image; where a patient has several images, "
            f"{GIVE_LISTS}, and the same --list to pre-training"
        )  # fmt: skip
    elif known:
        example = next(case for case in cases if patients.count(case.patient) > 1)
        note = (
            f"{len(cases)} cases of {len(set(patients))} patients split 70/10/20 by patient, as names tell them "
            f"({example.id}: {example.patient}); earlier versions parted the cases of a patient"
        )
    else:
        note = f"{len(cases)} cases split 70/10/20 at random; where a patient has several, {GIVE_LISTS}"
    if note:
        print(f"note: {note}", file=sys.stderr)
    return {split: [cases[i] for i in rows] for split, rows in draw(patients).items()}


def listed(cases: Sequence[C], request: Request, noun: str = "images") -> dict[str, list[C]]:
    """The cases that lists name, by one of their `names`; an InputError for a name that none has, or several."""
    by_name: dict[str, list[C]] = {}
    for case in cases:
        for name in set(case.names):
            by_name.setdefault(name, []).append(case)
    chosen = {}
    for split, path in request.lists.items():
        found: dict[str, C] = {}
        for name in read_list(path)[0]:
            named = by_name.get(name)
            if named is None and noun == "cases":
                raise InputError(f"{path}: {name} is no case of --data {request.data}, such as {cases[0].id}")
            if named is None:
                raise InputError(f"{path}, line {line_of(path, name)}: {name} is not in --data {request.data}")
            if len({case.patient for case in named}) > 1:
                raise InputError(
                    f"{path}, line {line_of(path, name)}: {len(named)} {noun} are called {name}; give paths"
                )
            found |= {case.id: case for case in named}
        chosen[split] = list(found.values())
    return chosen


def mask_of(stem: str, masks: Mapping[str, T]) -> T | None:
    """The mask of an image: of its name without extension, or that and one of `MASK_ENDS`; None where there is none."""
    return next((masks[stem + end] for end in ("", *MASK_ENDS) if stem + end in masks), None)


# Splits of data sets --------------------------------------------------------------------------------


def split_for_validation(data: ImageDataset) -> tuple[ImageDataset, ImageDataset]:
    """Training images of a method that validates itself, and a fixed tenth of their patients that judge it.

    They come from what pre-training may see. A data set's own validation and test splits stay unseen.

    Raises:
        InputError: for fewer than two patients.
    """
    train, val = split_by_patient(data.patients or data.ids, HELD_OUT, SPLIT_SEED)
    if not train or not val:
        raise InputError(f"data set {data.info.name}: {len(data)} images of one patient; some must validate")
    return data.subset(train), data.subset(val)


def refuse_overlap(splits: dict[str, ImageDataset]) -> None:
    """Raise InputError where two splits share an image or a patient."""
    names = list(splits)
    for a, first in enumerate(names):
        for second in names[a + 1 :]:
            for what in ("ids", "patients"):
                one, two = getattr(splits[first], what), getattr(splits[second], what)
                shared = set(one or ()) & set(two or ())
                if shared:
                    kind = "images" if what == "ids" else "patients"
                    raise InputError(
                        f"{first} and {second} share {len(shared)} {kind}, such as {min(shared)}; "
                        "splits must be disjoint: make them with preprocess/make_lists.py"
                    )
