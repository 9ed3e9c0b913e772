"""Classification: whole splits through a network in evaluation mode, and what is written of the predictions."""

import argparse
import csv
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import nn

from medssl.datasets import medmnist
from medssl.datasets.base import ImageDataset, Info
from medssl.engine.batches import autocast, evaluation_batches
from medssl.engine.parallel import Devices, Run
from medssl.errors import InputError
from medssl.files import write_csv
from medssl.losses.classification import classification_loss, probabilities
from medssl.tasks import plots
from medssl.tasks.metrics import froc, mean_of, score, score_with_intervals, targets_of
from medssl.views.of_images import ClassificationViews
from medssl.views.of_volumes import VolumeClassificationViews


@torch.inference_mode()
def predict_classes(
    network: nn.Module,
    views: ClassificationViews | VolumeClassificationViews,
    data: ImageDataset,
    args: argparse.Namespace,
    devices: Devices,
    tta: str = "none",
) -> tuple[np.ndarray, np.ndarray, list[int], float]:
    """Class probabilities of a whole split.

    Args:
        network: an `EncoderClassifier`.
        tta: "tencrop" averages the probabilities of ten crops of an image; volumes have none.

    Returns:
        probabilities (N, L), targets (N, L) with NaN for unknown, the images' positions in the split, and the
        mean loss.

    Raises:
        InputError: when the network gives a probability that is not finite.
    """
    network.eval()
    views.eval()
    run = Run(devices.device_ids)
    rows, labels, indices, losses = [], [], [], []
    for batch in evaluation_batches(data, args.eval_b, args, devices):
        count = len(batch["index"])
        view = views.ten_crops(batch) if tta == "tencrop" else views(batch)["view"]
        with autocast(args, devices.device):
            _, logits = run(network, view)
        several = probabilities(logits, data.info.task).view(-1, count, logits.shape[1])
        losses.append(classification_loss(logits[-count:], batch["label"]) * count)
        rows.append(several.mean(0).cpu().numpy())
        labels.append(batch["label"].cpu().numpy())
        indices += batch["index"].tolist()
    loss = float(torch.stack(losses).sum()) / len(indices)
    bad = [data.ids[i] for i, row in zip(indices, np.concatenate(rows)) if not np.isfinite(row).all()]
    if bad:
        hint = "with --amp, try --amp-dtype bf16 or leave it out; else " if args.amp else ""
        raise InputError(
            f"{len(bad)} of {len(indices)} predictions are not finite, such as of {bad[0]}: the weights have diverged, "
            f"or half precision overflows; {hint}lower --lr or use --clip-grad"
        )
    return np.concatenate(rows), targets_of(np.concatenate(labels), data.info), indices, loss


def validate_classes(
    network: nn.Module,
    views: ClassificationViews | VolumeClassificationViews,
    data: ImageDataset,
    args: argparse.Namespace,
    devices: Devices,
) -> dict[str, float]:
    """What chooses the epoch: "score" is the AUROC, or, by `--select` or where one class only is there, −loss."""
    p, targets, _, loss = predict_classes(network, views, data, args, devices)
    auroc = score(p, targets, data.info)["auroc"]
    by_loss = args.select == "loss" or auroc is None
    return {"score": -loss if by_loss else auroc, "val_loss": loss, "val_auroc": auroc}


def test_classes(
    network: nn.Module,
    views: ClassificationViews | VolumeClassificationViews,
    data: ImageDataset,
    args: argparse.Namespace,
    devices: Devices,
) -> dict:
    """`score_with_intervals` of a split, `froc` where its images are weighted candidates, and of a MedMNIST set its own
    numbers; the main process leaves predictions.csv in `--output`: a row an image, with truth and probability of every
    class."""
    p, targets, indices, _ = predict_classes(network, views, data, args, devices, args.tta)
    patients = None if data.patients is None else [data.patients[i] for i in indices]
    columns, detection = {"id": [data.ids[i] for i in indices]}, {}
    if data.weights is not None:
        positions = [data.positions[i] for i in indices]
        weights, scans = data.weights[positions], [data.scans[i] for i in positions]
        columns |= {"scan": scans, "weight": weights.tolist()}
        detection = froc(p[:, 1], targets[:, 1], weights, scans)
    if devices.main:
        columns |= {f"true {name}": column for name, column in zip(data.info.classes, targets.T)}
        columns |= {f"probability {name}": [f"{q:.9g}" for q in each] for name, each in zip(data.info.classes, p.T)}
        rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
        write_csv(Path(args.output) / "predictions.csv", rows)
    own = medmnist.evaluate(data.info.name, p, targets)
    return {**score_with_intervals(p, targets, data.info, patients), **detection, **own}


def summarise_classes(entries: list[dict], info: Info) -> dict:
    """Means over the trials of what `test_classes` gave, for results.json."""
    keys = ["accuracy", "f1", *(key for key in ("medmnist_auc", "medmnist_acc") if key in entries[0])]
    summary = {key: mean_of(entry[key] for entry in entries) for key in keys}
    if "cpm" in entries[0]:
        sampled = entries[0]["largest_weight"] > 1
        summary |= {
            "cpm": mean_of(entry["cpm"] for entry in entries),
            "sensitivity": {
                rate: mean_of(entry["sensitivity"][rate] for entry in entries) for rate in entries[0]["sensitivity"]
            },
            "false_positives": "of sampled negatives, each counted as the candidates it stands for" if sampled
            else "of all candidates",
        }  # fmt: skip
    per_class = {
        name: {
            "mean": mean_of(entry["per_class"][name]["auroc"] for entry in entries),
            "interval_of_trial_0": entries[0]["per_class"][name]["interval"],
        }
        for name in info.classes
    }
    return {"task": info.task, **summary, "per_class": per_class}


def join_trials(output: Path, trials: int, chosen: int, info: Info) -> None:
    """Bring the trials together: predictions.csv, plots, and the chosen trial's best.pt."""
    rows = []
    for k in range(trials):
        with open(output / f"trial_{k}" / "predictions.csv", newline="", encoding="utf-8") as file:
            rows += [{"trial": k, **row} for row in csv.DictReader(file)]
    write_csv(output / "predictions.csv", rows)
    shutil.copyfile(output / f"trial_{chosen}" / "best.pt", output / "best.pt")
    plots.roc(rows, info, output / "roc.png")
    plots.calibration(rows, info, output / "calibration.png")
    if "weight" in rows[0]:
        plots.froc(rows, info, output / "froc.png")
