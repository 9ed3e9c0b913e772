"""Fine-tune a pre-trained encoder on labelled images, and evaluate it on a test split that neither trains nor selects.

  python finetune_classification.py --data DIR --dataset chest --init OURS/encoder.pt --output OUT --gpus 0 --amp
  python finetune_classification.py --data FILE --dataset pneumoniamnist --init OURS/encoder.pt --image-size 64
      --annotation-percent 1 --trials 5 --output OUT
  python finetune_classification.py --steps 10 --image-size 64 --output OUT          (phantom radiographs, CPU)

The protocol follows the data set; every value of it is an option:

  chest    Adam 1e-4, ×0.5 every 50 epochs, batch 32, random crop (0.08, 1), test: centre 224/256, the epoch with
           the best validation loss (the published chest X-ray protocol)
  others   Adam 1e-3, constant, batch 64, random crop (0.5, 1), test: whole image, the epoch with the best
           validation AUROC, stop after 30 epochs without gain (MedMNIST's)

Trial k draws the labelled subset, the order and the head from seed + k, whatever the init, so that inits are
compared in pairs. Validation and test splits never shrink.
"""

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from medssl.datasets.registry import ImageDataset, Info, open_labelled
from medssl.datasets.views import ClassificationViews
from medssl.engine import options
from medssl.engine.checkpoint import FORMAT_VERSION, file_digest, save_atomic
from medssl.engine.evaluation import join_trials, predict_classes, write_predictions
from medssl.engine.loop import Method, describe, fit, plain, refuse_changes, versions, write_json
from medssl.engine.metrics import mean_of, score, score_with_intervals
from medssl.engine.options import InputError
from medssl.engine.parallel import Devices, Run, finish, setup
from medssl.losses.classification import classification_loss
from medssl.models.encoders import initialise, make_encoder
from medssl.models.heads import EncoderClassifier

PROTOCOLS = {
    "chest": {  # methods.md of the published chest X-ray benchmarks: Adam 1e-4, halved every 50 epochs
        "optimizer": "adam", "lr": 1e-4, "schedule": "step", "milestones": [50, 100, 150, 200], "gamma": 0.5,
        "b": 32, "epochs": 100, "patience": 30, "select": "loss", "crop_scale": [0.08, 1.0], "margin": 224 / 256,
    },
    "medmnist": {  # MedMNIST: Adam 1e-3, 100 epochs, best validation AUC
        "optimizer": "adam", "lr": 1e-3, "schedule": "constant", "milestones": [50, 75], "gamma": 0.1,
        "b": 64, "epochs": 100, "patience": 30, "select": "auroc", "crop_scale": [0.5, 1.0], "margin": 1.0,
    },
}  # fmt: skip


class Classifier(Method):
    """`EncoderClassifier` trained with cross-entropy (binary cross-entropy for several labels).

    Batch: "view" (B, 3, H, W) normalised, and "label": (B,) class numbers or (B, L) labels with NaN for unknown.
    """

    def __init__(self, network: EncoderClassifier) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        self.features, logits = run(self.network, batch["view"])
        return {"classification": classification_loss(logits, batch["label"])}

    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"view": batch["view"]}

    def compiled_parts(self) -> list[nn.Module]:
        return [self.network.encoder]


def run_trial(k: int, splits: dict[str, ImageDataset], args: argparse.Namespace, devices: Devices) -> dict:
    """Fine-tune once; leaves best.pt and predictions.csv in `trial_k`, and returns its entry of results.json."""
    info, train = splits["train"].info, splits["train"]
    seed, folder = args.seed + k, Path(args.output) / f"trial_{k}"
    count = max(1, round(len(train) * args.annotation_percent / 100))
    train = train.subset(np.random.default_rng([seed, 1]).permutation(len(train))[:count])
    own = argparse.Namespace(**{**vars(args), "output": str(folder), "seed": seed})
    parts = max(devices.world, len(devices.device_ids))
    own.b = max(2, min(args.b, count) // parts) * parts if count < args.b else args.b  # few labels: a smaller batch

    torch.manual_seed(seed)
    network = EncoderClassifier(make_encoder(args.arch), len(info.classes), args.dropout, args.freeze)
    start = initialise(network.encoder, args.arch, args.init)
    normalization = start.pop("normalization")
    views = ClassificationViews(
        **normalization, size=args.image_size, scale=args.crop_scale, degrees=args.rotation, margin=args.margin
    )

    def evaluate() -> dict[str, float]:
        p, targets, _, loss = predict_classes(network, views, splits["val"], own, devices)
        auroc = score(p, targets, info)["auroc"]
        by_loss = args.select == "loss" or auroc is None
        return {"score": -loss if by_loss else auroc, "val_loss": loss, "val_auroc": auroc}

    since = time.perf_counter()
    method = Classifier(network)
    report = fit(method, train, views, own, devices, evaluate, tensorboard=args.tensorboard)
    best = report["best"]
    method.load_state_dict(best["state"])
    test = splits["test"]
    p, targets, indices, _ = predict_classes(network, views, test, own, devices, args.tta)
    patients = None if test.patients is None else [test.patients[i] for i in indices]
    if devices.main:
        weights = {
            "state_dict": {key: value.cpu() for key, value in network.state_dict().items()}, "arch": args.arch,
            "dims": info.dims, "channels": 3, "task": info.task, "classes": list(info.classes),
            "normalization": normalization, "image_size": args.image_size, "version": FORMAT_VERSION,
        }  # fmt: skip
        save_atomic(weights, folder / "best.pt")
        write_predictions(folder / "predictions.csv", k, [test.ids[i] for i in indices], p, targets, info)
    return {
        "trial": k, "seed": seed, **score_with_intervals(p, targets, info, patients),
        "val_score": best["score"], "best_epoch": round(best["epoch"], 2), "steps": report["step"],
        "train_images": count, "seconds": round(time.perf_counter() - since, 1), "start": start,
    }  # fmt: skip


def summarise(entries: list[dict], args: argparse.Namespace, info: Info, devices: Devices) -> dict:
    """results.json: every trial, and the mean and standard deviation over trials."""
    values = [entry["auroc"] for entry in entries if entry["auroc"] is not None]
    per_class = {
        name: {
            "mean": mean_of(entry["per_class"][name]["auroc"] for entry in entries),
            "interval_of_trial_0": entries[0]["per_class"][name]["interval"],
        }
        for name in info.classes
    }
    return {
        "metric": "auroc", "dataset": info.name, "task": info.task, "init": args.init, "arch": args.arch,
        "annotation_percent": args.annotation_percent, "mean": mean_of(values),
        "std": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        **{key: mean_of(entry[key] for entry in entries) for key in ("accuracy", "f1")},
        "per_class": per_class, "matched_keys": entries[0]["start"]["matched"], "trials": entries,
        "config": plain(args), "versions": versions(), "device": describe(devices),
    }  # fmt: skip


def get_parser() -> options.Parser:
    parser = options.Parser(__doc__)
    data = options.add_data(parser)
    options.add_evaluation_lists(data)
    data.add_argument(
        "--ratio",
        type=options.fraction,
        default=0.0,
        help="leave out the first R of the training list (pre-training's)",
    )
    options.add_training(parser)
    options.add_network(parser)
    options.add_runtime(parser)
    options.add_output(parser, default="runs/classification")
    group = parser.add_argument_group("fine-tuning")
    group.add_argument(
        "--protocol", choices=("auto", *PROTOCOLS), default="auto", help="defaults of the options: chest, or medmnist's"
    )
    group.add_argument("--image-size", type=options.positive_int, default=224, help="side of the view, pixels")
    group.add_argument(
        "--annotation-percent", "--annotation_percent", type=options.bounded_float(1e-6, 100), default=100.0,
        help="use this percentage of the training labels",
    )  # fmt: skip
    group.add_argument("--trials", "--trial", type=options.positive_int, default=1, help="repeat with seeds 0, 1, …")
    group.add_argument("--dropout", type=options.fraction, default=0.2, help="before the last layer")
    options.flag(group, "--freeze", False, "train the last layer only (linear evaluation)")
    group.add_argument("--rotation", type=options.non_negative, default=10.0, help="largest rotation, degrees")
    group.add_argument("--tta", choices=("none", "tencrop"), default="none", help="test-time views")
    group.add_argument("--eval-b", type=options.positive_int, default=128, help="images at a time in evaluation")
    options.flag(group, "--tensorboard", True, "write TensorBoard events")
    by_protocol = parser.add_argument_group("set by the protocol unless given")
    by_protocol.add_argument("--patience", type=options.non_negative_int, help="epochs without gain; 0 never stops")
    by_protocol.add_argument("--select", choices=("auroc", "loss"), help="validation number that chooses the epoch")
    by_protocol.add_argument("--crop-scale", type=options.fraction, nargs=2, help="area share of the training crops")
    by_protocol.add_argument("--margin", type=options.fraction, help="centre square seen in tests, share of the side")
    # None: the protocol decides.
    parser.set_defaults(weight_decay=0.0, **dict.fromkeys(PROTOCOLS["chest"]))
    return parser


def complete(args: argparse.Namespace, info: Info) -> argparse.Namespace:
    """The options with the protocol's values where the user gave none."""
    name = args.protocol if args.protocol != "auto" else "chest" if info.name in ("chest", "chexpert") else "medmnist"
    given = {key: value for key, value in vars(args).items() if value is not None or key not in PROTOCOLS[name]}
    return argparse.Namespace(**{**PROTOCOLS[name], **given, "protocol": name})


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    if args.resume not in ("auto", "never"):
        raise InputError(f"--resume {args.resume}: fine-tuning continues what is in --output; use auto or never")
    devices = setup(args.gpus, args.device, args.deterministic)
    splits = open_labelled(args)
    info = splits["train"].info
    if info.dims != 2:
        raise InputError(f"--dataset {info.name}: has {info.dims} dimensions, 2 are needed")
    args = complete(args, info)
    options.check_range("--crop-scale", *args.crop_scale)
    if args.init not in ("random", "imagenet"):
        # The path alone would take results of older weights under the same name for finished trials.
        args.init_digest = file_digest(args.init)
    output = Path(args.output)
    results = output / "results.json"
    if devices.main:
        output.mkdir(parents=True, exist_ok=True)
        if args.resume == "never":
            for old in output.glob("trial_*"):
                shutil.rmtree(old)
        elif (output / "config.json").exists():
            refuse_changes(json.loads((output / "config.json").read_text()), args, output, allowed={"trials"})
        write_json(output / "config.json", {**plain(args), "versions": versions()})
    devices.wait()

    entries, best = [], None
    for k in range(args.trials):
        folder = output / f"trial_{k}"
        finished = folder / "result.json"
        if not devices.broadcast(finished.exists()):
            entry = run_trial(k, splits, args, devices)
            if devices.main:
                write_json(finished, entry)
                (folder / "last.pt").unlink(missing_ok=True)
        devices.wait()
        entry = devices.broadcast(json.loads(finished.read_text()) if devices.main else None)
        entries.append(entry)
        if best is None or entry["val_score"] > best["val_score"]:
            best = entry
        if devices.main:
            auroc = "undefined" if entry["auroc"] is None else f"{entry['auroc']:.4f}"
            print(f"trial {k}: AUROC {auroc}, accuracy {entry['accuracy']:.4f}, {entry['seconds']:.0f} s", flush=True)
    if devices.main:
        summary = summarise(entries, args, info, devices)
        write_json(results, summary)
        join_trials(output, args.trials, best["trial"], info)
        spread = "" if summary["std"] is None else f" ± {summary['std']:.4f}"
        mean = "undefined" if summary["mean"] is None else f"{summary['mean']:.4f}{spread}"
        print(f"{args.init}, {args.annotation_percent:g} % of the labels: test AUROC {mean}; see {results}", flush=True)
    devices.wait()
    finish()


def cli() -> None:
    options.run_script(main)


if __name__ == "__main__":
    cli()
