"""Fine-tune a pre-trained encoder on labelled images or volumes, and evaluate it on a test split that neither trains
nor selects.

  python finetune_classification.py --data DIR --dataset chest --init OURS/encoder.pt --output OUT --gpus 0 --amp
  python finetune_classification.py --data FILE --dataset pneumoniamnist --init OURS/encoder.pt --image-size 64
      --annotation-percent 1 --trials 5 --output OUT
  python finetune_classification.py --data NODULES --dataset luna --init OURS/encoder.pt --output OUT --gpus 0 --amp
  python finetune_classification.py --steps 10 --image-size 64 --output OUT          (phantom radiographs, CPU)
  python finetune_classification.py --d 3 --arch unet3d_quarter --steps 10 --b 8 --output OUT    (phantom CTs, CPU)

The protocol follows the data set; every value of it is an option:

  chest    Adam 1e-4, ×0.5 every 50 epochs, batch 32, random crop (0.08, 1), test: centre 224/256, the epoch with
           the best validation loss (the published chest X-ray protocol)
  others   Adam 1e-3, constant, batch 64, random crop (0.5, 1), test: whole image, the epoch with the best
           validation AUROC, stop after 30 epochs without gain (MedMNIST's); volumes: batch 16, no crop
  luna     Adam 1e-4, cosine, batch 32, every third training cube a nodule, the epoch with the best validation AUROC.
           Besides the AUROC: the sensitivity at 1/8 … 8 false positives per scan, their mean (CPM), and froc.png

Volumes are turned by right angles about z, flipped, and turned and scaled a little in training; in tests they are seen
whole. The published code flips and turns nodules only, by which a network can tell them; here all cubes are changed.

Trial k draws the labelled subset, the order and the head from seed + k, whatever the init, so that inits are
compared in pairs. Validation and test splits never shrink.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from medssl.datasets.registry import ImageDataset, Info, open_labelled
from medssl.datasets.views import ClassificationViews
from medssl.datasets.views3d import VolumeClassificationViews
from medssl.engine import options
from medssl.engine.checkpoint import FORMAT_VERSION, save_atomic
from medssl.engine.evaluation import join_trials, predict_classes, write_predictions
from medssl.engine.loop import Method, describe, fit, plain, versions, write_json
from medssl.engine.metrics import froc, mean_of, score, score_with_intervals
from medssl.engine.options import InputError
from medssl.engine.parallel import Devices, Run, finish, setup
from medssl.engine.trials import check_start, deviation, labelled_subset, run_trials
from medssl.losses.classification import classification_loss
from medssl.models.encoders import DEFAULT_ARCH, initialise, make_encoder
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
PROTOCOLS |= {  # for volumes, which are not cropped
    "volumes": {
        "optimizer": "adam", "lr": 1e-3, "schedule": "constant", "milestones": [50, 75], "gamma": 0.1,
        "b": 16, "epochs": 100, "patience": 30, "select": "auroc",
    },
    "luna": {  # every third cube a nodule, as published; the learning rate is the chest X-ray protocol's
        "optimizer": "adam", "lr": 1e-4, "schedule": "cosine", "milestones": [50, 75], "gamma": 0.1,
        "b": 32, "epochs": 100, "patience": 30, "select": "auroc", "positive_share": 1 / 3,
    },
}  # fmt: skip
EVAL_B = {2: 128, 3: 16}


class Classifier(Method):
    """`EncoderClassifier` trained with cross-entropy (binary cross-entropy for several labels).

    Batch: "view" (B, 3, H, W) or (B, 1, X, Y, Z) normalised, and "label": (B,) class numbers or (B, L) labels with NaN
    for unknown.
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


def oversample(train: ImageDataset, share: float) -> ImageDataset:
    """The training images with those of class 1 repeated, so that about `share` of an epoch's images are of it.

    Every image of class 0 still comes once an epoch, and class 1 is not thinned out where it is frequent enough.
    """
    positive = [i for i, label in enumerate(train.labels) if share and label == 1]
    if not positive:
        return train
    others = len(train) - len(positive)
    times = max(1, round(others * share / (1 - share) / len(positive)))
    return train.subset([*range(len(train)), *positive * (times - 1)])


def make_views(
    args: argparse.Namespace, dims: int, normalization: dict
) -> ClassificationViews | VolumeClassificationViews:
    """The views of images or volumes."""
    if dims == 3:
        return VolumeClassificationViews(args.cube_size, degrees=args.rotation)
    return ClassificationViews(
        **normalization, size=args.image_size, scale=args.crop_scale, degrees=args.rotation, margin=args.margin
    )


def run_trial(k: int, splits: dict[str, ImageDataset], args: argparse.Namespace, devices: Devices) -> dict:
    """Fine-tune once; leaves best.pt and predictions.csv in `trial_k`, and returns its entry of results.json."""
    info, train = splits["train"].info, splits["train"]
    seed, folder = args.seed + k, Path(args.output) / f"trial_{k}"
    train = labelled_subset(train, args.annotation_percent, seed)
    shown = oversample(train, args.positive_share or 0)
    own = argparse.Namespace(**{**vars(args), "output": str(folder), "seed": seed})
    parts = max(devices.world, len(devices.device_ids))
    fewer = len(shown) < args.b  # few labels: a smaller batch
    own.b = max(2, min(args.b, len(shown)) // parts) * parts if fewer else args.b

    torch.manual_seed(seed)
    encoder = make_encoder(args.arch, dims=info.dims)
    network = EncoderClassifier(encoder, len(info.classes), args.dropout, args.freeze)
    start = initialise(network.encoder, args.arch, args.init)
    normalization = start.pop("normalization")
    views = make_views(args, info.dims, normalization)

    def evaluate() -> dict[str, float]:
        p, targets, _, loss = predict_classes(network, views, splits["val"], own, devices)
        auroc = score(p, targets, info)["auroc"]
        by_loss = args.select == "loss" or auroc is None
        return {"score": -loss if by_loss else auroc, "val_loss": loss, "val_auroc": auroc}

    since = time.perf_counter()
    method = Classifier(network)
    report = fit(method, shown, views, own, devices, evaluate, tensorboard=args.tensorboard)
    best = report["best"]
    method.load_state_dict(best["state"])
    test = splits["test"]
    p, targets, indices, _ = predict_classes(network, views, test, own, devices, args.tta)
    patients = None if test.patients is None else [test.patients[i] for i in indices]
    more, detection = None, {}
    if test.weights is not None:
        weight = test.weights[[test.positions[i] for i in indices]]
        more = {"scan": patients, "weight": weight.tolist()}
        detection = froc(p[:, 1], targets[:, 1], weight, patients)
    if devices.main:
        weights = {
            "state_dict": {key: value.cpu() for key, value in network.state_dict().items()}, "arch": args.arch,
            "dims": info.dims, "channels": 3 if info.dims == 2 else 1, "task": info.task,
            "classes": list(info.classes), "normalization": normalization, "version": FORMAT_VERSION,
            **({"image_size": args.image_size} if info.dims == 2 else {"cube_size": args.cube_size}),
        }  # fmt: skip
        save_atomic(weights, folder / "best.pt")
        write_predictions(folder / "predictions.csv", k, [test.ids[i] for i in indices], p, targets, info, more)
    return {
        "trial": k, "seed": seed, **score_with_intervals(p, targets, info, patients), **detection,
        "val_score": best["score"], "best_epoch": round(best["epoch"], 2), "steps": report["step"],
        "train_images": len(train), "seconds": round(time.perf_counter() - since, 1), "start": start,
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
    detection = {}
    if "cpm" in entries[0]:
        sampled = entries[0]["largest_weight"] > 1
        detection = {
            "cpm": mean_of(entry["cpm"] for entry in entries),
            "sensitivity": {
                rate: mean_of(entry["sensitivity"][rate] for entry in entries) for rate in entries[0]["sensitivity"]
            },
            "false_positives": "of sampled negatives, each counted as the candidates it stands for" if sampled
            else "of all candidates",
        }  # fmt: skip
    return {
        "metric": "auroc", "dataset": info.name, "task": info.task, "init": args.init, "arch": args.arch,
        "annotation_percent": args.annotation_percent, "mean": mean_of(values),
        "std": deviation(values),
        **{key: mean_of(entry[key] for entry in entries) for key in ("accuracy", "f1")},
        **detection, "per_class": per_class, "matched_keys": entries[0]["start"]["matched"], "trials": entries,
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
        "--protocol", choices=("auto", *PROTOCOLS), default="auto", help="defaults of the options; auto: the data set's"
    )
    group.add_argument(
        "--image-size", type=options.positive_int, default=224, help="side of the view of images, pixels"
    )
    group.add_argument(
        "--cube-size", type=options.positive_int, nargs=3, metavar=("X", "Y", "Z"),
        help="resize volumes to as many voxels; by default they stay as the data set has them",
    )  # fmt: skip
    group.add_argument(
        "--annotation-percent", "--annotation_percent", type=options.bounded_float(1e-6, 100), default=100.0,
        help="use this percentage of the training labels",
    )  # fmt: skip
    group.add_argument("--trials", "--trial", type=options.positive_int, default=1, help="repeat with seeds 0, 1, …")
    group.add_argument("--dropout", type=options.fraction, default=0.2, help="before the last layer")
    options.flag(group, "--freeze", False, "train the last layer only (linear evaluation)")
    group.add_argument("--rotation", type=options.non_negative, default=10.0, help="largest rotation, degrees")
    group.add_argument(
        "--tta", choices=("none", "tencrop"), default="none",
        help="test-time views of images; tencrop needs a --margin below 1, as the protocol chest has",
    )  # fmt: skip
    group.add_argument("--eval-b", type=options.positive_int, help="images at a time in evaluation: 128, volumes 16")
    options.flag(group, "--tensorboard", True, "write TensorBoard events")
    by_protocol = parser.add_argument_group("set by the protocol unless given")
    by_protocol.add_argument("--patience", type=options.non_negative_int, help="epochs without gain; 0 never stops")
    by_protocol.add_argument("--select", choices=("auroc", "loss"), help="validation number that chooses the epoch")
    by_protocol.add_argument(
        "--positive-share", type=options.bounded_float(0.0, 0.9),
        help="repeat images of class 1 until they are this share of an epoch; 0 leaves them as they are",
    )  # fmt: skip
    by_protocol.add_argument(
        "--crop-scale", type=options.bounded_float(0.01, 1.0), nargs=2, help="area share of the training crops"
    )
    by_protocol.add_argument(
        "--margin", type=options.bounded_float(0.1, 1.0), help="centre square seen in tests, share of the side"
    )
    # None: the protocol or the dimension decides.
    parser.set_defaults(weight_decay=0.0, arch=None, **dict.fromkeys(PROTOCOLS["chest"]))
    return parser


def complete(args: argparse.Namespace, info: Info) -> argparse.Namespace:
    """The options with the protocol's and the dimension's values where the user gave none.

    Raises:
        InputError: for an option that images or volumes do not have.
    """
    refused = ("crop_scale", "margin") if info.dims == 3 else ("cube_size",)
    for option in refused:
        if getattr(args, option) is not None:
            kind = "images" if info.dims == 3 else "volumes"
            raise InputError(f"--{option.replace('_', '-')}: is for {kind}, and {info.name} has {info.dims} dimensions")
    if info.dims == 3 and args.tta == "tencrop":
        raise InputError(f"--tta tencrop: is for images, and {info.name} has 3 dimensions; leave it out")
    if info.dims == 3 and args.cube_size and min(args.cube_size) < 8:
        raise InputError("--cube-size: the 3D U-Net needs sides of at least 8 voxels")
    name = args.protocol
    if name == "auto" and info.dims == 3:
        name = "luna" if info.name == "luna" else "volumes"
    elif name == "auto":
        name = "chest" if info.name in ("chest", "chexpert") else "medmnist"
    if info.dims == 2 and name in ("volumes", "luna"):
        raise InputError(f"--protocol {name}: is for volumes, and {info.name} has 2 dimensions")
    defaults = {**PROTOCOLS[name], "arch": DEFAULT_ARCH[info.dims], "eval_b": EVAL_B[info.dims]}
    given = {key: value for key, value in vars(args).items() if value is not None or key not in defaults}
    completed = argparse.Namespace(**{**defaults, **given, "protocol": name})
    if completed.positive_share and info.task != "binary":
        raise InputError(f"--positive-share: needs two classes, and {info.name} is {info.task}; set it to 0")
    if completed.tta == "tencrop" and completed.margin == 1:
        raise InputError("--tta tencrop: with --margin 1 its crops are all the same; give --margin 0.875")
    return completed


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    check_start(args)
    devices = setup(args.gpus, args.device, args.deterministic)
    splits = open_labelled(args)
    info = splits["train"].info
    args = complete(args, info)
    if info.dims == 2:
        options.check_range("--crop-scale", *args.crop_scale)
    entries, best = run_trials(args, devices, lambda k: run_trial(k, splits, args, devices), say)
    if devices.main:
        output = Path(args.output)
        summary = summarise(entries, args, info, devices)
        write_json(output / "results.json", summary)
        join_trials(output, args.trials, best, info)
        spread = "" if summary["std"] is None else f" ± {summary['std']:.4f}"
        mean = said(summary["mean"]) + spread
        where = output / "results.json"
        print(f"{args.init}, {args.annotation_percent:g} % of the labels: test AUROC {mean}; see {where}", flush=True)
    devices.wait()
    finish()


def say(entry: dict) -> str:
    """A trial in a line."""
    cpm = "" if entry.get("cpm") is None else f", CPM {said(entry['cpm'])}"
    return f"AUROC {said(entry['auroc'])}{cpm}, accuracy {said(entry['accuracy'])}"


def said(value: float | None) -> str:
    """A number as text; "undefined" where the labels do not say."""
    return "undefined" if value is None else f"{value:.4f}"


def cli() -> None:
    options.run_script(main)


if __name__ == "__main__":
    cli()
