"""Segmentation of whole volumes: sliding windows, what is measured, and what is written.

The sliding window and the 95 % Hausdorff distance are written here, in a screenful, and not taken from MONAI, whose
import takes twice as long as torch's, in every process; the distance's tests hold MONAI's values.
"""

import argparse
import csv
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from scipy import ndimage
from scipy.spatial import KDTree
from torch import Tensor, nn

from medssl.datasets.registry import ImageDataset
from medssl.datasets.segmentation3d import SegmentationVolumes
from medssl.datasets.views3d import VolumeSegmentationViews
from medssl.datasets.volumes import AXES
from medssl.engine.evaluation import evaluation_batches
from medssl.engine.loop import autocast
from medssl.engine.metrics import mean_of
from medssl.engine.parallel import Devices, Run

# Probabilities of a volume that take more bytes than this are added up in the machine's memory, not the device's.
LARGE_SUM = 1 << 32
PERCENTILE = 95


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


@torch.inference_mode()
def predict_masks(
    network: nn.Module, views: VolumeSegmentationViews, data: ImageDataset, args: argparse.Namespace, devices: Devices
) -> Iterator[tuple[int, dict, np.ndarray]]:
    """Segment every readable volume of a split.

    Yields:
        position in the split, the batch of one, and the labels (*S) uint8 on its voxels.
    """
    network.eval()
    views.eval()
    run = Run(devices.device_ids)

    def predict(windows: Tensor) -> Tensor:
        with autocast(args, devices.device):
            logits = run(network, views.normalise(windows))
        return logits.float().softmax(1)

    for batch in evaluation_batches(data, 1, args, devices):
        volume = views(batch)["view"][0]
        labels = sliding_window(predict, volume, views.patch, args.overlap, args.eval_b).argmax(0)
        labels = labels.to(torch.uint8).cpu().numpy()
        yield int(batch["index"]), batch, largest_component(labels) if args.largest_component else labels


def largest_component(labels: np.ndarray) -> np.ndarray:
    """Labels with everything set to background that does not hang together (by faces) with the largest structure."""
    parts, count = ndimage.label(labels > 0)
    if count < 2:
        return labels
    largest = 1 + np.bincount(parts.ravel())[1:].argmax()
    return np.where(parts == largest, labels, 0).astype(labels.dtype)


# Measures ------------------------------------------------------------------------------------------


def region_mask(labels: np.ndarray, region: Sequence[int]) -> np.ndarray:
    """Where uint8 labels are of a region, bool."""
    table = np.zeros(256, bool)
    table[list(region)] = True
    return table[labels]


def dice(predicted: np.ndarray, true: np.ndarray) -> float | None:
    """2 |A ∩ B| / (|A| + |B|) of two bool masks; 0 where one is empty, None where both are."""
    size = int(predicted.sum()) + int(true.sum())
    return 2 * int((predicted & true).sum()) / size if size else None


def hausdorff95(predicted: np.ndarray, true: np.ndarray, spacing: Sequence[float]) -> float | None:
    """95 % Hausdorff distance of two bool masks, in mm.

    Of the distances from each surface voxel of one mask to the nearest surface voxel of the other, the 95th
    percentile; of the two directions the larger. Surface voxels have a face neighbour outside of the mask, or lie
    on the volume's border.

    Args:
        spacing: mm between voxels along each axis.

    Returns:
        mm. Where one mask is empty, the volume's diagonal, the worst that can be: leaving such cases out would
        reward a structure that was missed. None where both are empty.
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


def regions_of(data: ImageDataset) -> dict[str, tuple[int, ...]]:
    """What is judged: name → labels. Sets that say nothing else have each label but the background."""
    alone = {name: (i,) for i, name in enumerate(data.mask_labels) if i > 0}
    return getattr(data, "regions", alone)


def summarise_cases(rows: list[dict], names: Iterable[str]) -> dict:
    """Numbers of a split from the rows of its cases and regions.

    Returns:
        "dice", "hd95": the mean over the cases of each region, then over the regions; "pooled_dice": of all voxels
        of the split together, ×100, mean over the regions; "per_class": the same of each region, with "cases", the
        number of those that have it, truly or as predicted. None where no case has it.
    """
    per_class = {}
    for name in names:
        own = [row for row in rows if row["region"] == name]
        shared = sum(row["shared_voxels"] for row in own)
        voxels = sum(row["true_voxels"] + row["predicted_voxels"] for row in own)
        per_class[name] = {
            "dice": mean_of(row["dice"] for row in own), "hd95": mean_of(row["hd95"] for row in own),
            "pooled_dice": 200 * shared / voxels if voxels else None,
            "cases": sum(row["dice"] is not None for row in own),
        }  # fmt: skip
    means = {key: mean_of(each[key] for each in per_class.values()) for key in ("dice", "pooled_dice", "hd95")}
    return {**means, "per_class": per_class}


def judge(
    case: str, predicted: np.ndarray, true: np.ndarray, regions: dict, spacing: Sequence[float] | None = None
) -> list[dict]:
    """A row for each region of a case: Dice, voxels, and with a `spacing` the 95 % Hausdorff distance."""
    rows = []
    for name, region in regions.items():
        p, t = region_mask(predicted, region), region_mask(true, region)
        rows.append(
            {
                "case": case,
                "region": name,
                "dice": dice(p, t),
                "hd95": None if spacing is None else hausdorff95(p, t, spacing),
                "true_voxels": int(t.sum()),
                "predicted_voxels": int(p.sum()),
                "shared_voxels": int((p & t).sum()),
            }  # fmt: skip
        )
    return rows


def validate(
    network: nn.Module, views: VolumeSegmentationViews, data: ImageDataset, args: argparse.Namespace, devices: Devices
) -> dict:
    """What chooses the epoch, on the voxels that the network sees: the Dice of `summarise_cases`, 0 for none."""
    regions, rows = regions_of(data), []
    for i, batch, labels in predict_masks(network, views, data, args, devices):
        rows += judge(data.ids[i], labels, batch["mask"][0].cpu().numpy(), regions)
    dice = summarise_cases(rows, regions)["dice"]
    return {"score": dice or 0.0, "val_dice": dice}


def test_and_write(
    network: nn.Module, views: VolumeSegmentationViews, data: ImageDataset, args: argparse.Namespace, devices: Devices
) -> dict:
    """`summarise_cases` of a split, with its rows as "cases", measured on the voxels of the scans' files.

    Leaves in `--output` predictions/*.nii.gz in the files' geometry, and overlays/*.png of the first `--overlays`
    cases.
    """
    folder = Path(args.output)
    regions, rows = regions_of(data), []
    for name in ("predictions", "overlays"):
        shutil.rmtree(folder / name, ignore_errors=True)  # of a trial that was interrupted
    for i, batch, labels in predict_masks(network, views, data, args, devices):
        image, true = batch["image"][0, 0].cpu().float().numpy(), batch["mask"][0].cpu().numpy()
        spacing = tuple((batch["size"][0] / torch.tensor(true.shape)).tolist())
        if len(rows) < args.overlays * len(regions):
            overlay(image, true, labels, spacing, data.mask_labels, folder / "overlays" / f"{data.ids[i]}.png")
        path = folder / "predictions" / f"{data.ids[i]}.nii.gz"
        if isinstance(data, SegmentationVolumes):
            labels, true, spacing = data.restore(i, labels)
            data.write(path, i, labels)
        else:
            write_alone(path, labels, spacing)
        rows += judge(data.ids[i], labels, true, regions, spacing)
    return {**summarise_cases(rows, regions), "cases": rows}


def summarise_segmentation(entries: list[dict], data: ImageDataset) -> dict:
    """Means over the trials of what `test_and_write` gave, for results.json."""
    keys = ("dice", "pooled_dice", "hd95")
    return {
        "task": "segmentation",
        **{key: mean_of(entry[key] for entry in entries) for key in keys[1:]},
        "per_class": {
            name: {key: mean_of(entry["per_class"][name][key] for entry in entries) for key in keys}
            for name in regions_of(data)
        },
    }


def write_alone(path: Path, labels: np.ndarray, spacing: Sequence[float]) -> None:
    """Write labels (X, Y, Z) of a volume that has no file: in the patient's axes, from the origin on."""
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(np.ascontiguousarray(labels.transpose(2, 1, 0)))
    image.SetSpacing(tuple(spacing))
    image.SetDirection(AXES)
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))


def overlay(
    image: np.ndarray,
    true: np.ndarray,
    predicted: np.ndarray,
    spacing: Sequence[float],
    names: Sequence[str],
    path: Path,
) -> None:
    """Draw the axial, coronal and sagittal slice with most of the true mask: true labels above, predicted ones below.

    The patient's left is on the right of axial and coronal slices, the front on the left of sagittal ones; the front
    is up in axial slices, the head in the others. A millimetre is as long in every direction.

    Args:
        image: (X, Y, Z), axes to the patient's left, back and head.
        true, predicted: (X, Y, Z) labels, numbers of `names`.
        spacing: mm between voxels.
    """
    shown = true if true.any() else predicted
    extent = np.multiply(image.shape, spacing)
    low, high = np.percentile(image, (0.5, 99.5))
    planes = {"axial": (0, 1), "coronal": (0, 2), "sagittal": (1, 2)}  # axes across and down
    width, height = sum(extent[a] for a, _ in planes.values()), max(extent[b] for _, b in planes.values())
    figure = Figure(figsize=(10, 1 + 20 * height / width), layout="constrained")
    panels = figure.subplots(2, 3, width_ratios=[extent[a] for a, _ in planes.values()])
    for column, (name, (a, b)) in enumerate(planes.items()):
        across = 3 - a - b
        amount = (shown > 0).sum((a, b))
        at = int(amount.argmax()) if amount.any() else image.shape[across] // 2
        for axes, mask, title in zip(panels[:, column], (true, predicted), ("true", "predicted")):
            frame = {"extent": (0, extent[a], 0, extent[b]), "origin": "lower", "aspect": "equal"}
            axes.imshow(image.take(at, across).T, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), **frame)
            cut = mask.take(at, across).T
            colours = np.zeros((*cut.shape, 4))
            for label in range(1, len(names)):
                colours[cut == label] = _colour(label)
            axes.imshow(colours, interpolation="nearest", **frame)
            axes.set_title(f"{name}, {title}", fontsize=9)
            axes.set_axis_off()
            if name == "axial":
                axes.invert_yaxis()
    present = [label for label in range(1, len(names)) if (true == label).any() or (predicted == label).any()]
    if present:
        handles = [Patch(color=_colour(label), label=names[label]) for label in present]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(present)), fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _colour(label: int) -> tuple[float, float, float, float]:
    return (*colormaps["tab10"]((label - 1) % 10)[:3], 0.45)


def join_cases(output: Path, rows: list[list[dict]], chosen: int) -> None:
    """Bring the trials together: predictions/cases.csv, and the chosen trial's masks, overlays and best.pt.

    Args:
        rows: of each trial.
    """
    trial = output / f"trial_{chosen}"
    for name in ("predictions", "overlays"):
        shutil.rmtree(output / name, ignore_errors=True)
        if (trial / name).exists():  # no overlays where --overlays is 0
            shutil.copytree(trial / name, output / name)
    shutil.copyfile(trial / "best.pt", output / "best.pt")
    with open(output / "predictions" / "cases.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["trial", *rows[0][0]])
        writer.writeheader()
        writer.writerows({"trial": k, **row} for k, part in enumerate(rows) for row in part)
