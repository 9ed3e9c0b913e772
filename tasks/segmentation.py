"""Segmentation: sliding windows, what is measured in any dimension, and how cases and trials are brought together.

The sliding window and the 95 % Hausdorff distance are written here, in a screenful, and not taken from MONAI, whose
import takes twice as long as torch's, in every process; the distance's tests hold MONAI's values.
"""

import argparse
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from scipy.spatial import KDTree
from torch import Tensor, nn

from medssl.datasets.base import ImageDataset, Info
from medssl.engine.method import Method
from medssl.engine.parallel import Devices
from medssl.errors import InputError
from medssl.files import write_csv
from medssl.tasks.metrics import mean_of
from medssl.views.of_images import Views

# Probabilities of a volume that take more bytes than this are added up in the machine's memory, not the device's.
LARGE_SUM = 1 << 32
PERCENTILE = 95
COUNTS = ("true", "predicted", "shared")  # pixels or voxels


class Segmentation(ABC):
    """What fine-tuning asks of segmentation, of images (`segmentation2d`) or of volumes (`segmentation3d`).

    Attributes:
        protocols: options by the name of a protocol: ours, by what a data set's row says, "folder" for those without;
            and `published` ones.
        published: names of those that bear a paper's name.
        options: options that data of this dimension alone have, and their defaults.
        what: "images" or "volumes".
        losses, augments, normalizations: choices of the options that have other ones of the other dimension.
        sides: how many numbers `--patch` has.
        measures: numbers of a case; the first is "dice".
        since: version of what runs leave, since which networks begin with the random weights of today.
    """

    protocols: Mapping[str, Mapping[str, object]]
    published: tuple[str, ...]
    what: str
    losses: tuple[str, ...]
    augments: tuple[str, ...]
    normalizations: tuple[str, ...]
    options: Mapping[str, object]
    sides: int
    measures: tuple[str, ...]
    since: int = 1

    @abstractmethod
    def add_options(self, group: argparse._ArgumentGroup) -> None:
        """The options that data of this dimension alone have, each None unless given."""

    def check_choices(self, args: argparse.Namespace, protocol: str, name: str) -> None:
        """Raise InputError for what the user chose, where data of this dimension do not have it.

        Args:
            protocol: that is asked for. name: of the data set.
        """
        for option, value, choices in (
            ("protocol", protocol, self.protocols), ("loss", args.loss, self.losses),
            ("normalization", args.normalization, ("weights", *self.normalizations)),
            ("augment", args.augment, self.augments),
        ):  # fmt: skip
            if value is not None and value not in choices:
                of, there = f"not for {self.what}, as {name} has", ", ".join(choices)
                raise InputError(f"--{option} {value}: {of}; use one of {there}")
        if args.patch and len(args.patch) != self.sides:
            wanted = {1: "one side", 3: "three sides"}[self.sides]
            raise InputError(f"--patch {' '.join(map(str, args.patch))}: {name} wants {wanted}")

    @abstractmethod
    def check(self, args: argparse.Namespace) -> None:
        """Raise InputError for sides that do not fit."""

    @abstractmethod
    def make_network(self, args: argparse.Namespace, data: ImageDataset) -> nn.Module:
        """The network for the labels of the data, with random weights."""

    @abstractmethod
    def inputs(self, name: str) -> dict:
        """What a `--normalization` other than "weights" brings inputs to, as `initialise` returns it."""

    @abstractmethod
    def make_views(self, args: argparse.Namespace, normalization: dict) -> Views:
        """Random parts in training, whole images or volumes in evaluation."""

    @abstractmethod
    def make_method(self, args: argparse.Namespace, network: nn.Module, data: ImageDataset) -> Method:
        """What trains the network."""

    @abstractmethod
    def described(self, args: argparse.Namespace, info: Info) -> dict:
        """What a network's file says of its input, beside what it always says."""

    def outputs(self, args: argparse.Namespace, data: ImageDataset) -> dict:
        """What a network's file says of its outputs, where these are not its labels."""
        return {}

    @abstractmethod
    def regions_of(self, data: ImageDataset) -> Collection[str]:
        """Names of what is judged."""

    @abstractmethod
    def validate(
        self, network: nn.Module, views: Views, data: ImageDataset, args: argparse.Namespace, devices: Devices
    ) -> dict:
        """What chooses the epoch: "score" is the mean Dice, 0 where there is none."""

    @abstractmethod
    def test(
        self, network: nn.Module, views: Views, data: ImageDataset, args: argparse.Namespace, devices: Devices
    ) -> dict:
        """`summarise_cases` of a split, with its rows as "cases"; leaves predictions and overlays in `--output`."""

    @abstractmethod
    def in_a_line(self, entry: dict) -> str:
        """A finished trial."""


# Prediction ----------------------------------------------------------------------------------------


def window_starts(length: int, window: int, overlap: float) -> list[int]:
    """First voxels of the windows along an axis: the fewest that overlap enough, evenly spread from end to end.

    Args:
        length: voxels of the axis, at least `window`.
        overlap: share of a window that the next one covers too, at least, in [0, 1).
    """
    step = max(1, int(window * (1 - overlap)))
    count = -(-(length - window) // step) + 1
    return [round(i * (length - window) / max(1, count - 1)) for i in range(count)]


def gaussian_window(shape: Sequence[int]) -> Tensor:
    """Weights of a window's voxels, (*shape), 1 at the middle: a Gaussian, σ an eighth of each side (nnU-Net)."""
    weights = torch.ones(())
    for n in shape:
        x = (torch.arange(n) - (n - 1) / 2) / (n / 8)
        weights = weights[..., None] * torch.exp(-0.5 * x**2)
    return weights / weights.max()


def sliding_window(
    predict: Callable[[Tensor], Tensor], volume: Tensor, window: Sequence[int], overlap: float = 0.5, b: int = 4
) -> Tensor:
    """Predict a volume in overlapping windows, averaged with Gaussian weights, any number of axes S.

    A volume that is smaller than the window is padded with 0 around it, as training patches are.

    Args:
        predict: (N, C, *window) → (N, K, *window).
        volume: (C, *S).
        overlap: see `window_starts`.
        b: windows at a time.

    Returns:
        (K, *S) float32.
    """
    shape = volume.shape[1:]
    padding = [(-((n - w) // 2), max(0, w - n)) if n < w else (0, 0) for n, w in zip(shape, window)]
    x = F.pad(volume, [p for before, both in padding[::-1] for p in (before, both - before)])
    starts = list(product(*(window_starts(n, w, overlap) for n, w in zip(x.shape[1:], window))))
    boxes = [(slice(None), *(slice(s, s + w) for s, w in zip(start, window))) for start in starts]
    weights = gaussian_window(window).to(x.device)
    total, seen = None, None
    for i in range(0, len(boxes), b):
        made = predict(torch.stack([x[box] for box in boxes[i : i + b]])).float() * weights
        if total is None:
            size = (made.shape[1], *x.shape[1:])
            place = x.device if 4 * np.prod(size) <= LARGE_SUM else torch.device("cpu")
            total, seen = torch.zeros(size, device=place), torch.zeros(1, *x.shape[1:], device=place)
        for box, each in zip(boxes[i : i + b], made.to(total.device)):
            total[box] += each
            seen[box] += weights.to(total.device)
    inner = tuple(slice(before, before + n) for (before, _), n in zip(padding, shape))
    return total.div_(seen)[(slice(None), *inner)]


def all_finite(logits: Tensor) -> Tensor:
    """The logits; an InputError where one is not finite, which would count as a structure that was not found."""
    if not bool(torch.isfinite(logits).all()):
        raise InputError("the network's outputs are not finite in evaluation; lower --lr, or leave out --amp")
    return logits


# Measures ------------------------------------------------------------------------------------------


def counts(predicted: np.ndarray, true: np.ndarray) -> dict[str, int]:
    """`COUNTS` of two bool masks."""
    return dict(zip(COUNTS, (int(true.sum()), int(predicted.sum()), int((predicted & true).sum()))))


def dice(count: dict[str, int]) -> float | None:
    """2 |A ∩ B| / (|A| + |B|) from `counts`; 0 where one mask is empty, None where both are."""
    size = count["true"] + count["predicted"]
    return 2 * count["shared"] / size if size else None


def hausdorff95(predicted: np.ndarray, true: np.ndarray, spacing: Sequence[float]) -> float | None:
    """95 % Hausdorff distance of two bool masks, of any number of axes.

    Of the distances from each surface voxel (or pixel) of one mask to the nearest of the other, the 95th percentile; of
    the two directions the larger. Surface voxels have a face neighbour outside of the mask, or lie on the border.

    Args:
        spacing: between voxels along each axis, mm; ones for a distance in pixels.

    Returns:
        in the unit of `spacing`. Where one mask is empty, the diagonal, the worst that can be: leaving such cases out
        would reward a structure that was missed. None where both are empty.
    """
    if not predicted.any() and not true.any():
        return None
    if not predicted.any() or not true.any():
        return float(np.linalg.norm(np.multiply(predicted.shape, spacing)))
    surfaces = [_surface(mask) * np.asarray(spacing) for mask in (predicted, true)]
    trees = [KDTree(points) for points in surfaces]
    one, other = trees[1].query(surfaces[0])[0], trees[0].query(surfaces[1])[0]
    return float(max(np.percentile(one, PERCENTILE), np.percentile(other, PERCENTILE)))


def _surface(mask: np.ndarray) -> np.ndarray:
    """Indices (N, S) of the surface voxels."""
    box = ndimage.find_objects(mask.astype(np.uint8))[0]
    inner = mask[box]
    return np.argwhere(inner & ~ndimage.binary_erosion(inner)) + [part.start for part in box]


# Cases and trials ----------------------------------------------------------------------------------


def join_rows(rows: Sequence[dict], measures: Sequence[str]) -> list[dict]:
    """A row a case from the rows of a region: of several images, the Dice of all their pixels, others' means."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["case"], []).append(row)
    joined = []
    for group in groups.values():
        total = {key: sum(row[key] for row in group) for key in COUNTS}
        means = {measure: mean_of(row[measure] for row in group) for measure in measures}
        joined.append({**means, **total, "dice": dice(total)})
    return joined


def summarise_cases(rows: Sequence[dict], regions: Iterable[str], measures: Sequence[str]) -> dict:
    """Numbers of a split from the rows of its cases and regions.

    Args:
        rows: with "case", "region", the measures (None where undefined) and `COUNTS`; several of a case and region
            where a case has several images.
        measures: "dice" and others.

    Returns:
        each measure's mean over the cases of each region, then over the regions; "pooled_dice": of all pixels of the
        split together, ×100, mean over the regions; "per_class": the same of each region, with "cases", the number
        of those that have it, truly or as predicted. None where no case has it.
    """
    per_class = {}
    for name in regions:
        cases = join_rows([row for row in rows if row["region"] == name], measures)
        pooled = dice({key: sum(case[key] for case in cases) for key in COUNTS})
        per_class[name] = {
            **{measure: mean_of(case[measure] for case in cases) for measure in measures},
            "pooled_dice": None if pooled is None else 100 * pooled,
            "cases": sum(case["dice"] is not None for case in cases),
        }
    means = {key: mean_of(each[key] for each in per_class.values()) for key in (*measures, "pooled_dice")}
    return {**means, "per_class": per_class}


def average_trials(entries: Sequence[dict], regions: Iterable[str], measures: Sequence[str]) -> dict:
    """Means over the trials of what `summarise_cases` gave, for results.json."""
    keys = (*measures, "pooled_dice")
    return {
        "task": "segmentation",
        **{key: mean_of(entry[key] for entry in entries) for key in keys if key != "dice"},
        "per_class": {
            name: {key: mean_of(entry["per_class"][name][key] for entry in entries) for key in keys} for name in regions
        },
    }


def write_cases(output: Path, rows: list[list[dict]]) -> None:
    """Write predictions/cases.csv: the rows of each trial."""
    write_csv(
        output / "predictions" / "cases.csv", [{"trial": k, **row} for k, part in enumerate(rows) for row in part]
    )
