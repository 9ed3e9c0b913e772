"""Volumes with masks. A case is a scan and its mask."""

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from medssl.datasets.base import Info, Request
from medssl.datasets.cache import DecodedVolumes
from medssl.datasets.splits import SPLITS, choose
from medssl.errors import InputError, UnreadableImage
from medssl.reading import geometry, intensities, volumes
from medssl.reading.find import without_extension
from medssl.reading.geometry import Volume, by
from medssl.reading.masks import read_labels, read_values, wrong_label
from medssl.reading.volumes import read_header, read_volume


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


@dataclass(frozen=True)
class VolumeCase:
    """Files of a case: a scan of one or several channels, and the mask on their voxels. `patient` is the id where it is
    not known."""

    id: str
    images: tuple[Path, ...]
    mask: Path
    patient: str

    part = None  # no such set is published in parts

    @property
    def names(self) -> tuple[str, ...]:
        """What lists may call it: with or without the extension of its one file."""
        path = self.images[0]
        extension = path.name[len(without_extension(path.name)) :]
        return (self.id, self.id + extension) if len(self.images) == 1 else (self.id,)


class SegmentationVolumes(DecodedVolumes):
    """Cases with masks.

    An item is {"image": (C, X, Y, Z) float16 in [0, 1]; "mask": (X, Y, Z) uint8 label numbers; "size": (3,) extent
    in mm; "index"; "bad"}, on the voxels of the files, in the patient's axes, unless `spacing` says otherwise.

    Args:
        cases: of the split.
        labels: what masks hold; other values are refused, or belong to the background where `ignore_others`.
        spacing: mm between voxels; 0 leaves an axis as it is.
        window: HU that become 0 and 1; None chooses by `intensities.to_unit`, each channel by itself.
    """

    def __init__(
        self,
        info: Info,
        cases: Sequence[VolumeCase],
        labels: Labels,
        ignore_others: bool = False,
        spacing: Sequence[float] = (0.0, 0.0, 0.0),
        window: Sequence[float] | None = None,
    ) -> None:
        ids = [case.id for case in cases]
        patients = [case.patient for case in cases]
        super().__init__(info, list(cases).__getitem__, ids, patients=None if patients == ids else patients)
        self.mask_labels, self.regions = labels.names, labels.regions
        self.labels_in_files, self.ignore_others = labels, ignore_others
        self.spacing, self.window = tuple(spacing), None if window is None else tuple(window)

    @property
    def recipe(self) -> tuple:
        return self.spacing, self.window, self.labels_in_files.values, self.ignore_others

    def decode(self, case: VolumeCase) -> dict[str, Tensor]:
        """A case; an UnreadableImage for files that cannot be decoded, and masks with values they should not have."""
        scans = [read_volume(path) for path in case.images]
        mask = self.read_mask(case, scans[0])
        grid = scans[0]
        size = [n * step for n, step in zip(grid.array.shape, grid.spacing)]
        spacing = self.spacing_of(grid)
        if spacing != grid.spacing:
            # The one layer that rounding can add repeats what is the volume's lowest value, or background.
            scans = [geometry.resample(scan, spacing, outside=float(scan.array.min())) for scan in scans]
            mask = geometry.resample(replace(grid, array=mask), spacing, nearest=True).array
        scale = intensities.to_unit if self.window is None else lambda array: intensities.scale(array, *self.window)
        return {
            "image": torch.from_numpy(np.stack([scale(scan.array).astype(np.float16) for scan in scans])),
            "mask": torch.from_numpy(np.ascontiguousarray(mask)),
            "size": torch.tensor(size, dtype=torch.float32),
        }

    def read_mask(self, case: VolumeCase, grid: Volume) -> np.ndarray:
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
                labels, array=geometry.on_grid(labels, grid.origin, grid.array.shape, grid.spacing, nearest=True)
            )
        return labels.array, self.read_mask(case, grid), grid.spacing

    def write(self, path: Path, i: int, labels: np.ndarray) -> None:
        """Write labels on the voxels of a scan, with the values of the masks, in the geometry of the scan's file."""
        reference = self.read(self.positions[i]).images[0]
        volumes.write_labels(path, self.labels_in_files.decode(labels), reference)


def open_cases(
    request: Request, splits: Sequence[str], cases: Sequence[VolumeCase], labels: Labels | None = None,
    spacing: Sequence[float] | None = None, window: Sequence[float] | None = None,
) -> dict[str, SegmentationVolumes]:  # fmt: skip
    """Open splits of cases.

    Args:
        labels: of the set; by default all values that the masks of its splits hold, or those of `--labels`.
        spacing, window: of the set, where the user gives none.

    Raises:
        InputError: for files that do not belong together, and lists that cannot be used.
    """
    if request.window is not None and not request.window[0] < request.window[1]:
        raise InputError(
            f"--window {request.window[0]:g} {request.window[1]:g}: the first number must be below the second"
        )
    check_headers(cases)
    chosen = choose(cases, request, SPLITS, "cases", whole=False)
    info = Info(request.name, dims=3, channels=len(cases[0].images))
    read_as = {"spacing": request.spacing or spacing or (0.0, 0.0, 0.0), "window": request.window or window}
    read_as["ignore_others"] = request.labels is not None
    labels = labels or discover_labels(chosen, request.labels)
    return {split: SegmentationVolumes(info, chosen[split], labels, **read_as) for split in splits}


def check_headers(cases: Sequence[VolumeCase]) -> None:
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


def discover_labels(splits: dict[str, list[VolumeCase]], wanted: Sequence[int] | None = None) -> Labels:
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
        found = dict(zip((case.id for case in cases), pool.map(_labels_in, cases)))
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


def _labels_in(case: VolumeCase) -> set[int]:
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
