"""Segmentation of whole images: prediction at the image's own size, what is measured inside the field of view, and what
is written."""

import argparse
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import nn

from medssl.datasets.segmentation2d import MaskedImages
from medssl.datasets.views import SegmentationViews
from medssl.engine.evaluation import evaluation_batches
from medssl.engine.loop import autocast
from medssl.engine.metrics import mean_of
from medssl.engine.parallel import Devices, Run
from medssl.engine.segmentation import dice, sliding_window

THRESHOLD = 0.5
MEASURES = ("dice", "auroc", "sensitivity", "specificity", "cldice")
COLOURS = ((255, 60, 60), (60, 200, 60), (80, 120, 255), (255, 200, 40), (220, 80, 255), (40, 220, 220))
GREATEST_SIDE = 1024  # of a panel of an overlay, pixels


@torch.inference_mode()
def predict_images(
    network: nn.Module, views: SegmentationViews, data: MaskedImages, args: argparse.Namespace, devices: Devices
) -> Iterator[tuple[int, np.ndarray]]:
    """Segment every readable image of a split: resized as in training, in windows as large as training's patches.

    Yields:
        position in the split, and the probabilities (K, H, W) float32 at the image's own size.
    """
    network.eval()
    views.eval()
    run = Run(devices.device_ids)

    def predict(windows: torch.Tensor) -> torch.Tensor:
        with autocast(args, devices.device):
            return run(network, windows).float().sigmoid()

    whole = views.patch == views.size
    for batch in evaluation_batches(data, args.eval_b if whole else 1, args, devices):
        images = views(batch)["view"]
        window = (views.patch, views.patch)
        found = (
            predict(images) if whole else sliding_window(predict, images[0], window, args.overlap, args.eval_b)[None]
        )
        for i, probability, size in zip(batch["index"].tolist(), found, batch["size"].int().tolist()):
            full = F.interpolate(probability[None], size=size, mode="bilinear", antialias=True)[0]
            yield i, full.cpu().numpy()


def judge(
    image: str,
    case: str,
    probability: np.ndarray,
    masks: np.ndarray,
    field: np.ndarray,
    names: Sequence[str],
    tubular: bool = False,
    everything: bool = True,
) -> list[dict]:
    """A row for each label of an image, all measured inside the field of view.

    Args:
        probability: (K, H, W). masks: (K, H, W) bool. field: (H, W) bool.
        tubular: measure clDice too. everything: not Dice alone.

    Returns:
        rows of "image", "case", "label", `MEASURES` (None where they are undefined) and numbers of pixels.
    """
    rows = []
    for name, p, t in zip(names, probability, masks):
        found, true = (p >= THRESHOLD) & field, t & field
        shared, positive, inside = int((found & true).sum()), int(true.sum()), int(field.sum())
        row = {"image": image, "case": case, "label": name, **dict.fromkeys(MEASURES), "dice": dice(found, true)}
        if everything:
            negative, wrong = inside - positive, int(found.sum()) - shared
            if positive and negative:
                row["auroc"] = float(roc_auc_score(t[field], p[field]))
            row["sensitivity"] = shared / positive if positive else None
            row["specificity"] = 1 - wrong / negative if negative else None
            row["cldice"] = centreline_dice(found, true) if tubular else None
        counts = {"true_pixels": positive, "predicted_pixels": int(found.sum()), "shared_pixels": shared}
        rows.append({**row, **counts})
    return rows


def centreline_dice(predicted: np.ndarray, true: np.ndarray) -> float | None:
    """clDice (Shit et al., CVPR 2021, arXiv 2003.07311, Eq. 1 and 2): the harmonic mean of the share of the predicted
    centre line inside the true mask and of the true centre line inside the predicted one.

    Args:
        predicted, true: (H, W) bool.

    Returns:
        in [0, 1]; 0 where one mask is empty, None where both are.
    """
    from skimage.morphology import skeletonize

    if not predicted.any() and not true.any():
        return None
    if not predicted.any() or not true.any():
        return 0.0
    lines = skeletonize(predicted), skeletonize(true)
    precision, sensitivity = (line[mask].sum() / line.sum() for line, mask in zip(lines, (true, predicted)))
    both = precision + sensitivity
    return float(2 * precision * sensitivity / both) if both else 0.0


def by_case(rows: list[dict]) -> list[dict]:
    """A row a case from the rows of a label: of several images, the Dice of all their pixels, others' means."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["case"], []).append(row)
    joined = []
    for group in groups.values():
        counts = {key: sum(row[key] for row in group) for key in ("true_pixels", "predicted_pixels", "shared_pixels")}
        size = counts["true_pixels"] + counts["predicted_pixels"]
        means = {measure: mean_of(row[measure] for row in group) for measure in MEASURES}
        joined.append({**group[0], **means, **counts, "dice": 2 * counts["shared_pixels"] / size if size else None})
    return joined


def summarise_images(rows: list[dict], names: Sequence[str]) -> dict:
    """Numbers of a split: each measure's mean over the cases of each label, then over the labels; "pooled_dice" of all
    pixels of the split together, ×100; "per_class": the same of each label. None where no case has it."""
    per_class = {}
    for name in names:
        own = by_case([row for row in rows if row["label"] == name])
        shared = sum(row["shared_pixels"] for row in own)
        pixels = sum(row["true_pixels"] + row["predicted_pixels"] for row in own)
        per_class[name] = {measure: mean_of(row[measure] for row in own) for measure in MEASURES}
        per_class[name]["pooled_dice"] = 200 * shared / pixels if pixels else None
    return {
        **{key: mean_of(each[key] for each in per_class.values()) for key in (*MEASURES, "pooled_dice")},
        "per_class": per_class,
    }


def validate_images(
    network: nn.Module, views: SegmentationViews, data: MaskedImages, args: argparse.Namespace, devices: Devices
) -> dict:
    """What chooses the epoch: the mean Dice at the images' own size, 0 where there is none."""
    rows = []
    for i, probability in predict_images(network, views, data, args, devices):
        rows += judge(data.ids[i], data.case_of(i), probability, *data.truth(i), data.mask_labels, everything=False)
    found = summarise_images(rows, data.mask_labels)["dice"]
    return {"score": found or 0.0, "val_dice": found}


def test_images(
    network: nn.Module, views: SegmentationViews, data: MaskedImages, args: argparse.Namespace, devices: Devices
) -> dict:
    """`summarise_images` of a split, with its rows as "cases".

    Leaves in `--output` predictions/*.png at the images' own size, 255 inside or, of several labels, their numbers
    from 1 on, and overlays/*.png of the first `--overlays` images.
    """
    folder, rows, files = Path(args.output), [], file_names(data.ids)
    for name in ("predictions", "overlays"):
        shutil.rmtree(folder / name, ignore_errors=True)  # of a trial that was interrupted
    for number, (i, probability) in enumerate(predict_images(network, views, data, args, devices)):
        masks, field = data.truth(i)
        rows += judge(data.ids[i], data.case_of(i), probability, masks, field, data.mask_labels, data.tubular)
        name = f"{files[i]}.png"
        found = (probability >= THRESHOLD) & field
        save_png(folder / "predictions" / name, label_map(found))
        if number < args.overlays:
            pixels = to_three_channels(data.read(data.positions[i]))
            save_png(folder / "overlays" / name, panels(pixels, masks & field, found))
    return {**summarise_images(rows, data.mask_labels), "cases": rows}


def file_names(ids: Sequence[str]) -> list[str]:
    """A file's name for each image: its path in one word, without the extension where that is enough."""
    short = [Path(identity).with_suffix("").as_posix().replace("/", "_") for identity in ids]
    again = {name for name, count in Counter(short).items() if count > 1}
    return [f"{name}_{i}" if name in again else name for i, name in enumerate(short)]


def label_map(found: np.ndarray) -> np.ndarray:
    """(K, H, W) bool → (H, W) uint8: 255 inside the one label, or the number of one of several, from 1 on: where they
    overlap of the last, which is the inner one where they are nested (LiTS' tumours in the liver)."""
    if len(found) == 1:
        return found[0] * np.uint8(255)
    numbers = np.zeros(found.shape[1:], np.uint8)
    for number, mask in enumerate(found, 1):
        numbers[mask] = number
    return numbers


def to_three_channels(pixels: np.ndarray) -> np.ndarray:
    """(H, W[, 3]) → (H, W, 3) uint8."""
    return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, 2)


def panels(pixels: np.ndarray, masks: np.ndarray, found: np.ndarray) -> np.ndarray:
    """The image, with the true masks and with the predicted ones, side by side, (h, 3·w, 3) uint8."""
    shown = [pixels]
    for several in (masks, found):
        painted = pixels.astype(np.float32)
        for number, mask in enumerate(several):
            colour = np.array(COLOURS[number % len(COLOURS)], np.float32)
            painted[mask] = 0.4 * painted[mask] + 0.6 * colour
        shown.append(painted.astype(np.uint8))
    image = Image.fromarray(np.concatenate(shown, 1))
    shrink = max(1.0, max(pixels.shape[:2]) / GREATEST_SIDE)
    return np.asarray(image.resize([round(n / shrink) for n in image.size], Image.Resampling.BOX))


def save_png(path: Path, pixels: np.ndarray) -> None:
    """Write an image, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def summarise_trials_of_images(entries: list[dict], data: MaskedImages) -> dict:
    """Means over the trials of what `test_images` gave, for results.json."""
    keys = (*MEASURES, "pooled_dice")
    return {
        "task": "segmentation",
        **{key: mean_of(entry[key] for entry in entries) for key in keys[1:]},
        "per_class": {
            name: {key: mean_of(entry["per_class"][name][key] for entry in entries) for key in keys}
            for name in data.mask_labels
        },
    }
