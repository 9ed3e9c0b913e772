"""Trials of a fine-tuning: the same training from several seeds, each continued or kept when the same command runs
again, and what is written of them together."""

import argparse
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from torch import nn

from medssl.datasets.base import ImageDataset, Info
from medssl.datasets.registry import Opened
from medssl.engine.checkpoint import FORMAT_VERSION, save_atomic, weights_digest
from medssl.engine.loop import fit
from medssl.engine.method import Method
from medssl.engine.parallel import Devices
from medssl.engine.runs import describe, refuse_changes, refuse_older, settings, versions
from medssl.errors import InputError, unusable
from medssl.files import copy_file, read_json, write_folder, write_json
from medssl.tasks.metrics import mean_of
from medssl.views.of_images import Views

# What scripts leave beside the trials, made of them.
RESULTS = (
    "config.json", "results.json", "best.pt", "predictions.csv", "roc.png", "calibration.png", "froc.png",
    "predictions", "overlays",
)  # fmt: skip


PICTURES = ("predictions", "overlays")  # folders of a trial
FEW_STEPS = 100  # in which hardly anything is learnt


def check_start(args: argparse.Namespace) -> None:
    """Look at `--run`, `--resume` and `--init` before any data are read; notes the weights' digest in
    `args.init_digest`.

    Raises:
        InputError: for a `--resume` that names a file, or an `--init` that is not there.
    """
    if isinstance(args.run, str):
        args.output, args.run = f"{Path(args.output)}_{args.run}", 0
    if args.resume not in ("auto", "never"):
        raise InputError(f"--resume {args.resume}: fine-tuning continues what is in --output; use auto or never")
    if args.init not in ("random", "imagenet"):
        # The path alone would take results of older weights under the same name for finished trials.
        args.init_digest = weights_digest(args.init)


# The training images of a trial --------------------------------------------------------------------


def labelled_subset(train: ImageDataset, percent: float, seed: int) -> ImageDataset:
    """The first `percent` of the training images after a shuffle that depends on the seed alone; at least one. Of
    slices whose volumes are judged as one (`by_patient`), that share of the volumes."""
    by_patient = getattr(train, "by_patient", False)
    units = list(dict.fromkeys(train.patients)) if by_patient else range(len(train))
    count = max(1, round(len(units) * percent / 100))
    first = [units[i] for i in np.random.default_rng([seed, 1]).permutation(len(units))[:count]]
    if by_patient:
        chosen = set(first)
        first = [i for i, patient in enumerate(train.patients) if patient in chosen]
    return train.subset(first)


def oversample(train: ImageDataset, share: float) -> ImageDataset:
    """The training images with those of class 1 repeated, so that about `share` of an epoch's images are of it.

    Every image of class 0 still comes once an epoch, and class 1 is not thinned out where it is frequent enough.

    Args:
        share: in [0, 1); 0 changes nothing.
    """
    positive = [i for i, label in enumerate(train.labels) if share and label == 1]
    if not positive:
        return train
    others = len(train) - len(positive)
    times = max(1, round(others * share / (1 - share) / len(positive)))
    return train.subset([*range(len(train)), *positive * (times - 1)])


def lengthen(train: ImageDataset, steps: int, b: int) -> ImageDataset:
    """The training images so often that an epoch has at least `steps` steps of `b`."""
    passes = -(-steps * b // len(train)) if steps > 1 else 1  # an epoch of one image has a step as it is
    return train.subset([*range(len(train))] * passes) if passes > 1 else train


def batch_size(wanted: int, count: int, devices: Devices) -> int:
    """Images per step: as many as wanted; where there are only `count`, about so many, at least 2 on each device, or on
    one alone where nobody asked for several."""
    parts = devices.parts if devices.asked or count >= 2 * devices.parts else 1
    return wanted if count >= wanted else max(2, count // parts) * parts


# Running -------------------------------------------------------------------------------------------


def run_trials(
    args: argparse.Namespace,
    data_digest: str,
    devices: Devices,
    run_trial: Callable[[argparse.Namespace], dict],
    say: Callable[[dict], str],
    since: int = 1,
) -> tuple[list[dict], int]:
    """Run `--trials` trials, less those that are finished in `--output`.

    Args:
        data_digest: of all splits, by which a continuation knows them.
        run_trial: fine-tunes with the options of trial k, whose `output` is the folder `trial_k` and whose `seed`
            is `--seed` + `--run` + k, and returns its entry of results.json, with the validation's "val_score".
        say: a line about a finished trial.
        since: as `Segmentation` has it.

    Returns:
        the entries, and the number of the trial with the highest "val_score".

    Raises:
        InputError: when `--output` holds trials with other options.
    """
    output = Path(args.output)
    if args.compile:
        devices.narrow(args.b, 1, compiled=True)  # before a trial counts the devices
    if devices.main:
        output.mkdir(parents=True, exist_ok=True)
        if args.resume == "never":
            for old in output.glob("trial_*"):
                shutil.rmtree(old)
            for name in RESULTS:  # which, beside a new config.json, would pass for its results if it fails
                shutil.rmtree(output / name) if (output / name).is_dir() else (output / name).unlink(missing_ok=True)
        elif any(output.glob("trial_*/config.json")):  # a command that was refused before has begun nothing
            before = read_json(output / "config.json")
            refuse_changes(before, settings(args, data_digest), output)
            refuse_older(before, since, output)
        write_json(output / "config.json", {**settings(args, data_digest), "versions": versions()})
    devices.wait()
    entries = []
    for k in range(args.trials):
        seed = args.seed + args.run + k
        folder = output / f"trial_{k}"
        finished = folder / "result.json"
        if not devices.broadcast(finished.exists()):
            began = time.perf_counter()
            entry = run_trial(argparse.Namespace(**{**vars(args), "output": str(folder), "seed": seed, "run": 0}))
            if devices.main:
                seconds = round(time.perf_counter() - began, 1)
                write_json(finished, {"trial": k, "seed": seed, **entry, "seconds": seconds, "limit": args.steps})
                (folder / "last.pt").unlink(missing_ok=True)
        devices.wait()
        entries.append(devices.broadcast(read_json(finished) if devices.main else None))
        with unusable(finished, "damaged; remove it, and the trial is run again"):
            said, _ = f"{say(entries[-1])}, {entries[-1]['seconds']:.0f} s", f"{entries[-1]['val_score']:g}"
        if entries[-1].get("limit") != args.steps:
            raise InputError(
                f"{folder}: was ended with --steps {entries[-1].get('limit')}, now {args.steps}; "
                "use the same value, another --output, or --resume never"
            )
        if devices.main:
            print(f"trial {k}: {said}", flush=True)
    return entries, max(range(args.trials), key=lambda k: entries[k]["val_score"])  # the first of equals


def parameter_groups(network: nn.Module, encoder: nn.Module, scale: float) -> list[dict] | None:
    """Optimiser groups of a network whose encoder learns with `scale` times the rate; None where all learn alike."""
    if scale == 1:
        return None
    own = {id(parameter) for parameter in encoder.parameters()}
    free = [parameter for parameter in network.parameters() if parameter.requires_grad]
    groups = [{"params": [p for p in free if id(p) not in own]}]
    return [*groups, {"params": [p for p in free if id(p) in own], "lr_scale": scale}]


def fit_best(
    method: Method,
    train: ImageDataset,
    views: Views,
    args: argparse.Namespace,
    devices: Devices,
    evaluate: Callable[[], dict[str, float]],
    parameters: list[dict] | None = None,
) -> dict:
    """`fit`, which leaves the state with the best validation in `method`: {"val_score", "best_epoch", "steps",
    "stopped_early"}, the last for one that `--patience` ended before there were enough steps to learn from, which it
    says, too."""
    report = fit(method, train, views, args, devices, evaluate, parameters, tensorboard=args.tensorboard)
    stopped_early = report["step"] < min(round(args.epochs * len(train) / args.b), args.steps or FEW_STEPS, FEW_STEPS)
    if devices.main and stopped_early:
        print(
            f"note: stopped after {report['step']} steps, too few to learn from, as {args.patience} epochs brought no "
            "gain (--patience); give epochs more steps (--epoch-steps), or --patience 0",
            file=sys.stderr,
        )
    best = report["best"]
    method.load_state_dict(best["state"])
    return {
        "val_score": best["score"], "best_epoch": round(best["epoch"], 2), "steps": report["step"],
        "stopped_early": stopped_early,
    }  # fmt: skip


# Writing -------------------------------------------------------------------------------------------


def save_network(network: nn.Module, args: argparse.Namespace, info: Info, **more: object) -> None:
    """Write `best.pt` to `--output`: the network's state dict, what it was made for, and `more` plain values."""
    content = {
        "state_dict": {key: value.cpu() for key, value in network.state_dict().items()},
        "arch": args.arch, "dims": info.dims, **more, "version": FORMAT_VERSION,
    }  # fmt: skip
    save_atomic(content, Path(args.output) / "best.pt")


def empty_folders(output: Path) -> None:
    """Remove the predictions and overlays of a trial that was interrupted."""
    for name in PICTURES:
        shutil.rmtree(output / name, ignore_errors=True)


def keep_chosen(output: Path, chosen: int) -> None:
    """Bring the chosen trial's predictions, overlays and best.pt to `--output`."""
    trial = output / f"trial_{chosen}"
    empty_folders(output)
    for name in PICTURES:
        if (trial / name).exists():  # no overlays where --overlays is 0
            write_folder(output / name, partial(shutil.copytree, trial / name, dirs_exist_ok=True))
    copy_file(trial / "best.pt", output / "best.pt")


def summarise_trials(
    entries: list[dict], metric: str, args: argparse.Namespace, data: Opened, devices: Devices
) -> dict:  # fmt: skip
    """results.json: every trial, and the mean and standard deviation (n − 1) of the metric over those that have it."""
    values = [entry[metric] for entry in entries if entry[metric] is not None]
    return {
        "metric": metric, "dataset": data.info.name, "protocol": args.protocol, "init": args.init, "arch": args.arch,
        "annotation_percent": args.annotation_percent,
        "mean": mean_of(values), "std": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "matched_keys": entries[0]["start"]["matched"], "trials": entries,
        "config": settings(args, data.digest), "versions": versions(), "device": describe(devices),
    }  # fmt: skip


def write_results(output: Path, summary: dict, name: str) -> None:
    """Write results.json, and say in a line what came out; `name` is the metric's."""
    write_json(output / "results.json", summary)
    spread = "" if summary["std"] is None else f" ± {summary['std']:.4f}"
    print(
        f"{summary['init']}, {summary['annotation_percent']:g} % of the labels: test {name} "
        f"{said(summary['mean'])}{spread}; see {output / 'results.json'}",
        flush=True,
    )


def said(value: float | None, digits: int = 4) -> str:
    """A number as text; "undefined" where no image could tell."""
    return "undefined" if value is None else f"{value:.{digits}f}"
