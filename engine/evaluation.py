"""Whole splits through a network in evaluation mode, and what is written of the predictions."""

import argparse
import csv
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from medssl.datasets.registry import ImageDataset, Info, collate
from medssl.datasets.views import ClassificationViews
from medssl.datasets.views3d import VolumeClassificationViews
from medssl.engine import plots
from medssl.engine.loop import BadFiles, autocast, ignore_signals, to_device
from medssl.engine.metrics import targets_of
from medssl.engine.options import InputError
from medssl.engine.parallel import Devices, Run
from medssl.losses.classification import classification_loss, probabilities


def evaluation_batches(data: ImageDataset, b: int, args: argparse.Namespace, devices: Devices) -> Iterator[dict]:
    """Every readable image of a split once, in order, `b` at a time, on the device.

    An unreadable image is noted in bad_files.txt and left out: its stand-in would count twice. "index" says
    which images of the split a batch has.

    Raises:
        InputError: when more than `--max-bad` of the reads fail.
    """
    loader = DataLoader(data, b, num_workers=args.workers, collate_fn=collate, worker_init_fn=ignore_signals)
    bad = BadFiles(Path(args.output), args.max_bad, len(data))
    asked = 0
    for batch in loader:
        count = len(batch["index"])
        bad.note(batch["bad"], count)
        own = torch.nonzero(batch["index"] == torch.arange(asked, asked + count))[:, 0]
        asked += count
        if len(own) < count:
            batch = {key: value[own] if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
        if len(own):
            yield to_device(batch, devices.device)


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


def write_predictions(
    path: Path,
    trial: int,
    ids: Sequence[str],
    probabilities: np.ndarray,
    targets: np.ndarray,
    info: Info,
    more: Mapping[str, Sequence] | None = None,
) -> None:
    """Write a trial's predictions.csv: a row an image, with truth and probability (N, L) of every class.

    `more` has further columns, a value for each image: for candidates, their "scan" and "weight".
    """
    columns = more or {}
    rows = [
        {"trial": trial, "id": name}
        | {key: values[i] for key, values in columns.items()}
        | {f"true {each}": t for each, t in zip(info.classes, target)}
        | {f"probability {each}": f"{q:.6f}" for each, q in zip(info.classes, probability)}
        for i, (name, probability, target) in enumerate(zip(ids, probabilities, targets))
    ]
    _write_csv(path, rows)


def join_trials(output: Path, trials: int, chosen: int, info: Info) -> None:
    """Bring the trials together: predictions.csv, plots, and the chosen trial's best.pt."""
    rows = []
    for k in range(trials):
        with open(output / f"trial_{k}" / "predictions.csv", newline="", encoding="utf-8") as file:
            rows += list(csv.DictReader(file))
    _write_csv(output / "predictions.csv", rows)
    shutil.copyfile(output / f"trial_{chosen}" / "best.pt", output / "best.pt")
    plots.roc(rows, info, output / "roc.png")
    plots.calibration(rows, info, output / "calibration.png")
    if "weight" in rows[0]:
        plots.froc(rows, info, output / "froc.png")


def _write_csv(path: Path, rows: list[dict]) -> None:
    """Write rows that share their keys."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
