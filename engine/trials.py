"""Trials of a fine-tuning: repeated with other seeds, each continued or kept when the same command runs again."""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from medssl.datasets.registry import ImageDataset
from medssl.engine.checkpoint import file_digest
from medssl.engine.loop import plain, refuse_changes, versions, write_json
from medssl.engine.options import InputError
from medssl.engine.parallel import Devices

# What scripts leave beside the trials, made of them.
RESULTS = (
    "config.json", "results.json", "best.pt", "predictions.csv", "roc.png", "calibration.png", "froc.png",
    "predictions", "overlays",
)  # fmt: skip


def check_start(args: argparse.Namespace) -> None:
    """Look at `--resume` and `--init` before any data are read; notes the weights' digest in `args.init_digest`.

    Raises:
        InputError: for a `--resume` that names a file, or an `--init` that is not there.
    """
    if args.resume not in ("auto", "never"):
        raise InputError(f"--resume {args.resume}: fine-tuning continues what is in --output; use auto or never")
    if args.init not in ("random", "imagenet"):
        # The path alone would take results of older weights under the same name for finished trials.
        args.init_digest = file_digest(args.init)


def labelled_subset(train: ImageDataset, percent: float, seed: int) -> ImageDataset:
    """The first `percent` of the training images after a shuffle that depends on the seed alone; at least one."""
    count = max(1, round(len(train) * percent / 100))
    return train.subset(np.random.default_rng([seed, 1]).permutation(len(train))[:count])


def run_trials(
    args: argparse.Namespace, devices: Devices, run_trial: Callable[[int], dict], say: Callable[[dict], str]
) -> tuple[list[dict], int]:
    """Run `--trials` trials, less those that are finished in `--output`.

    Args:
        run_trial: fine-tunes trial k in the folder `trial_k`, and returns its entry of results.json, with the
            validation's "val_score".
        say: a line about a finished trial.

    Returns:
        the entries, and the number of the trial with the highest "val_score".

    Raises:
        InputError: when `--output` holds trials with other options.
    """
    output = Path(args.output)
    if devices.main:
        output.mkdir(parents=True, exist_ok=True)
        if args.resume == "never":
            for old in output.glob("trial_*"):
                shutil.rmtree(old)
            for name in RESULTS:  # which, beside a new config.json, would pass for its results if it fails
                shutil.rmtree(output / name) if (output / name).is_dir() else (output / name).unlink(missing_ok=True)
        elif (output / "config.json").exists():
            refuse_changes(json.loads((output / "config.json").read_text()), args, output, allowed={"trials"})
        write_json(output / "config.json", {**plain(args), "versions": versions()})
    devices.wait()
    entries = []
    for k in range(args.trials):
        folder = output / f"trial_{k}"
        finished = folder / "result.json"
        if not devices.broadcast(finished.exists()):
            entry = run_trial(k)
            if devices.main:
                write_json(finished, entry)
                (folder / "last.pt").unlink(missing_ok=True)
        devices.wait()
        entries.append(devices.broadcast(json.loads(finished.read_text()) if devices.main else None))
        if devices.main:
            print(f"trial {k}: {say(entries[-1])}, {entries[-1]['seconds']:.0f} s", flush=True)
    return entries, max(range(args.trials), key=lambda k: entries[k]["val_score"])  # the first of equals


def deviation(values: list[float]) -> float | None:
    """Standard deviation over trials (n − 1), or None for fewer than two."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None
