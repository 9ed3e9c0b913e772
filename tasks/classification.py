"""Classification: whole splits through a network in evaluation mode, and what is written of the predictions."""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import nn

from medssl.datasets import medmnist
from medssl.datasets.base import ImageDataset, Info
from medssl.engine.batches import autocast, evaluation_batches
from medssl.engine.parallel import Devices, Run
from medssl.errors import InputError
from medssl.files import copy_file, read_csv, write_csv
from medssl.losses.classification import classification_loss, probabilities
from medssl.tasks import plots
from medssl.tasks.metrics import froc, mean_of, score, score_with_intervals, targets_of
from medssl.views.of_images import ClassificationViews
from medssl.views.of_volumes import VolumeClassificationViews

# Protocols -----------------------------------------------------------------------------------------

OURS = {  # by what a data set's row says, or its dimension; also to be asked for by name
    "chest": {  # as C2L and PCRL fine-tune on chest X-rays: Adam 1e-4, halved every 50 epochs
        "optimizer": "adam", "lr": 1e-4, "schedule": "step", "milestones": [50, 100, 150, 200], "gamma": 0.5,
        "b": 32, "epochs": 100, "patience": 30, "select": "loss", "crop_scale": [0.08, 1.0], "margin": 224 / 256,
    },
    "images": {  # near MedMNIST's: Adam 1e-3, 100 epochs, best validation AUC; augmented, in half as large batches
        "optimizer": "adam", "lr": 1e-3, "schedule": "constant", "milestones": [50, 75], "gamma": 0.1,
        "b": 64, "epochs": 100, "patience": 30, "select": "auroc", "crop_scale": [0.5, 1.0], "margin": 1.0,
    },
    # Volumes are not cropped.
    "volumes": {
        "optimizer": "adam", "lr": 1e-3, "schedule": "constant", "milestones": [50, 75], "gamma": 0.1,
        "b": 16, "epochs": 100, "patience": 30, "select": "auroc",
    },
    "luna": {  # every third cube a nodule, as published; the learning rate is the chest X-ray protocol's
        "optimizer": "adam", "lr": 1e-4, "schedule": "cosine", "milestones": [50, 75], "gamma": 0.1,
        "b": 32, "epochs": 100, "patience": 30, "select": "auroc", "positive_share": 1 / 3,
    },
}  # fmt: skip
BY_DIMS = {2: "images", 3: "volumes"}  # protocols of sets whose row names none
MAGICAL = {  # its main_classification.py, engine.py and models.py: a ResNet-50 with one layer on top
    "arch": "resnet50", "dropout": 0.0, "optimizer": "adam", "betas": [0.9, 0.999], "b": 32, "select": "auroc",
}  # fmt: skip
HALVED = {"lr": 2e-4, "schedule": "step", "milestones": [*range(50, 1000, 50)], "gamma": 0.5, "epochs": 1000}
PLAIN = {"augment": "none", "margin": 1.0, "crop_scale": [1.0, 1.0], "rotation": 0.0}  # images are only resized
PUBLISHED = {
    # The benchmark's own (MedMNIST/experiments, MedMNIST2D/train_and_eval_pytorch.py). There, images of 28 pixels have
    # a ResNet of its own, without a stride in its stem, and the weights that are tested are the last ones: what is
    # kept as the best model is the model that goes on training.
    "medmnist": PLAIN | {
        "arch": "resnet18", "dropout": 0.0, "optimizer": "adam", "betas": [0.9, 0.999], "b": 128, "epochs": 100,
        "lr": 1e-3, "schedule": "step", "milestones": [50, 75], "gamma": 0.1, "patience": 0, "select": "auroc",
        "image_size": 28, "normalization": "half",
    },
    # The command of its README; RetinaMNIST alone is not normalised there.
    "magical-medmnist": MAGICAL | PLAIN | {
        "lr": 1e-3, "schedule": "constant", "milestones": [50, 75], "gamma": 0.1, "epochs": 100, "patience": 30,
        "image_size": 28, "normalization": "half",
    },
    # Defaults of main_classification.py. There, the validation images are the test images.
    "magical-chexpert": MAGICAL | HALVED | {
        "patience": 10, "image_size": 224, "augment": "full", "crop_scale": [0.08, 1.0], "rotation": 7.0,
        "margin": 224 / 256, "normalization": "chestx-ray",
    },
    # The same without augmentation, which dataloader.py (ShenzhenCXR_new) takes and does not use, and in [0, 1].
    "magical-shenzhen": MAGICAL | HALVED | PLAIN | {"patience": 10, "image_size": 224, "normalization": "none"},
}  # fmt: skip
PROTOCOLS = OURS | PUBLISHED
OF_VOLUMES = ("volumes", "luna")


# Evaluation ----------------------------------------------------------------------------------------


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
    if patients is not None:
        columns["patient"] = patients
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
        rows += [{"trial": k, **row} for row in read_csv(output / f"trial_{k}" / "predictions.csv")]
    write_csv(output / "predictions.csv", rows)
    copy_file(output / f"trial_{chosen}" / "best.pt", output / "best.pt")
    plots.roc(rows, info, output / "roc.png")
    plots.calibration(rows, info, output / "calibration.png")
    if "weight" in rows[0]:
        plots.froc(rows, info, output / "froc.png")
