"""Fine-tune a pre-trained network on images with masks, and evaluate it on cases that neither train nor select.

  python finetune_segmentation.py --data DIR --dataset lits --init OURS/encoder.pt --output OUT --gpus 0 --amp
  python finetune_segmentation.py --data DIR --dataset folder --init OURS/encoder.pt --spacing 1 1 1
      --annotation-percent 10 --trials 5 --output OUT
  python finetune_segmentation.py --arch unet3d_quarter --steps 20 --output OUT            (phantom CTs, CPU)

The dimension comes from the data set; so far, sets with masks have three: `lits`, `brats`, `phantom3d`, and `folder`,
any folder of image and mask volumes (their layout and lists: datasets/segmentation3d.py). The network is the 3D
U-Net with skips, on random patches; loss and sliding window are nnU-Net's (cross-entropy and Dice; Gaussian weights).
Every value that the data set chooses is an option:

  lits       patches 128 × 128 × 64, HU ±200, slices 1 mm apart, the largest component is kept
  brats      patches 96 × 96 × 96
  phantom3d  patches 48 × 48 × 32: whole volumes
  folder     patches 64 × 64 × 32, as in pre-training

An epoch is a pass over the training volumes, or `--epoch-steps` steps where that is more, so that few labels train
as long as many; the one with the best Dice on the validation cases is kept, and 30 without gain stop the run.
Trial k draws the labelled subset, the order and the new layers from seed + k, whatever the init, so that inits are
compared in pairs. Validation and test cases never shrink.

`--cache DIR` keeps decoded and resampled volumes there, which is several times faster where files are compressed.
"""

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from medssl.datasets.registry import ImageDataset, data_digest, request_of
from medssl.datasets.segmentation3d import SegmentationVolumes, open_segmented
from medssl.engine import options
from medssl.engine.checkpoint import FORMAT_VERSION, save_atomic
from medssl.engine.loop import Method, describe, fit, plain, versions, write_json
from medssl.engine.metrics import mean_of
from medssl.engine.options import InputError
from medssl.engine.parallel import Devices, Run, finish, setup
from medssl.engine.segmentation import PatchViews, join_cases, regions_of, test_and_write, validate
from medssl.engine.trials import check_start, deviation, labelled_subset, run_trials
from medssl.losses.segmentation import dice_cross_entropy
from medssl.models.encoders import initialise, width_of
from medssl.models.unet3d import UNet3d

PROTOCOLS = {
    # LiTS and BraTS: patches as large as 24 GiB hold at batch 2 × 2; the published LiTS windows have 64 slices.
    "lits": {"patch": [128, 128, 64], "b": 2, "patches": 2, "largest_component": True},
    "brats": {"patch": [96, 96, 96], "b": 2, "patches": 2, "largest_component": False},
    "phantom3d": {"patch": [48, 48, 32], "b": 4, "patches": 1, "largest_component": False},
    "folder": {"patch": [64, 64, 32], "b": 2, "patches": 4, "largest_component": False},
}


class Segmenter(Method):
    """A U-Net trained with cross-entropy and Dice.

    Batch: "view" (B, C, *S) normalised, and "target" (B, *S) int64 label numbers.
    """

    def __init__(self, network: nn.Module, labels: int) -> None:
        super().__init__()
        self.network, self.labels = network, labels

    def forward(self, batch: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        return dice_cross_entropy(run(self.network, batch["view"]), batch["target"])

    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        predicted = self.network(batch["view"]).argmax(1)
        shades = {"true": batch["target"], "predicted": predicted}
        return {"view": batch["view"][:, :1]} | {k: v[:, None] / (self.labels - 1) for k, v in shades.items()}


def load_start(network: UNet3d, args: argparse.Namespace) -> dict:
    """Set the starting weights of a segmentation network, as `--init` and `--load` say; `initialise`'s report.

    Raises:
        InputError: as `initialise`, or when the decoder is asked for and the weights have none that fits.
    """
    if args.load == "encoder" or args.init == "random":
        return initialise(network.encoder, args.arch, args.init)
    body = nn.Module()  # all but the last layer, whose labels are this task's
    for name, part in network.named_children():
        if name != "out_tr":
            body.add_module(name, part)
    try:
        start = initialise(body, args.arch, args.init)
    except InputError as error:
        if "up_tr" not in str(error):
            raise
        raise InputError(
            f"--init {args.init}: its decoder has other shapes, as those without skips have (PCRLv2's); "
            "use --load encoder"
        ) from None
    if start["missing"]:
        raise InputError(f"--init {args.init}: holds no whole decoder; use --load encoder")
    return start


def run_trial(k: int, splits: dict[str, ImageDataset], args: argparse.Namespace, devices: Devices) -> dict:
    """Fine-tune once; leaves best.pt, predictions/ and overlays/ in `trial_k`, and returns its entry of results.json
    with the rows of cases.csv as "cases"."""
    info, names = splits["train"].info, splits["train"].mask_labels
    seed, folder = args.seed + k, Path(args.output) / f"trial_{k}"
    own = argparse.Namespace(**{**vars(args), "output": str(folder), "seed": seed})
    train = labelled_subset(splits["train"], args.annotation_percent, seed)
    count = len(train)
    train = train.subset(list(range(count)) * max(1, -(-args.epoch_steps * args.b // count)))

    torch.manual_seed(seed)
    network = UNet3d(len(names), channels=info.channels, width=width_of(args.arch), norm=args.norm)
    start = load_start(network, args)
    normalization = start.pop("normalization")
    views = PatchViews(args.patches, patch=args.patch, foreground=args.foreground)

    def evaluate() -> dict[str, float]:
        values = validate(network, views, splits["val"], own, devices)
        return {"score": values["dice"] or 0.0, "val_dice": values["dice"]}

    since = time.perf_counter()
    method = Segmenter(network, len(names))
    report = fit(method, train, views, own, devices, evaluate, tensorboard=args.tensorboard)
    best = report["best"]
    method.load_state_dict(best["state"])
    values, rows = {}, []
    if devices.main:
        values, rows = test_and_write(network, views, splits["test"], own, devices, folder)
        weights = {
            "state_dict": {key: value.cpu() for key, value in network.state_dict().items()}, "arch": args.arch,
            "dims": info.dims, "channels": info.channels, "task": "segmentation", "labels": list(names),
            "normalization": normalization, "patch": list(args.patch), "spacing": args.spacing,
            "window": args.window, "norm": args.norm, "version": FORMAT_VERSION,
        }  # fmt: skip
        save_atomic(weights, folder / "best.pt")
    return {
        "trial": k, "seed": seed, **values, "val_score": best["score"], "best_epoch": round(best["epoch"], 2),
        "steps": report["step"], "train_images": count, "seconds": round(time.perf_counter() - since, 1),
        "start": start, "cases": rows,
    }  # fmt: skip


def summarise(entries: list[dict], args: argparse.Namespace, data: ImageDataset, devices: Devices) -> dict:
    """results.json: every trial, and the mean and standard deviation over trials."""
    values = [entry["dice"] for entry in entries if entry["dice"] is not None]
    keys = ("dice", "pooled_dice", "hd95")
    return {
        "metric": "dice", "dataset": data.info.name, "task": "segmentation", "init": args.init, "arch": args.arch,
        "load": args.load, "annotation_percent": args.annotation_percent, "mean": mean_of(values),
        "std": deviation(values), **{key: mean_of(entry[key] for entry in entries) for key in keys[1:]},
        "per_class": {
            name: {key: mean_of(entry["per_class"][name][key] for entry in entries) for key in keys}
            for name in regions_of(data)
        },
        "matched_keys": entries[0]["start"]["matched"],
        "trials": [{key: value for key, value in entry.items() if key != "cases"} for entry in entries],
        "config": plain(args), "versions": versions(), "device": describe(devices),
    }  # fmt: skip


def get_parser() -> options.Parser:
    parser = options.Parser(__doc__)
    data = options.add_data(parser)
    options.add_evaluation_lists(data)
    data.add_argument("--labels", type=options.positive_int, nargs="+", help="values of a folder's masks to segment")
    data.add_argument(
        "--spacing", type=options.non_negative, nargs=3, metavar=("X", "Y", "Z"),
        help="mm between voxels, to which volumes are resampled; 0 leaves an axis as it is",
    )  # fmt: skip
    data.add_argument(
        "--window", type=float, nargs=2, metavar=("LOW", "HIGH"), help="stored values (HU) that become 0 and 1"
    )
    options.add_training(parser)
    network = options.add_network(parser)
    network.add_argument(
        "--load", choices=("encoder", "encoder+decoder"), default="encoder", help="what is taken from --init"
    )
    network.add_argument("--norm", choices=("batch", "group", "instance"), default="batch", help="normalisation layers")
    options.add_runtime(parser)
    options.add_output(parser, default="runs/segmentation")
    group = parser.add_argument_group("fine-tuning")
    group.add_argument(
        "--annotation-percent", "--annotation_percent", type=options.bounded_float(1e-6, 100), default=100.0,
        help="use this percentage of the training cases",
    )  # fmt: skip
    group.add_argument("--trials", "--trial", type=options.positive_int, default=1, help="repeat with seeds 0, 1, …")
    group.add_argument("--patience", type=options.non_negative_int, default=30, help="epochs without gain; 0: never")
    group.add_argument("--epoch-steps", type=options.positive_int, default=50, help="fewest steps of an epoch")
    group.add_argument("--foreground", type=options.fraction, default=0.5, help="share of patches around a label")
    group.add_argument(
        "--overlap", type=options.bounded_float(0, 0.9), default=0.5, help="of windows in evaluation, share of a side"
    )
    group.add_argument("--eval-b", type=options.positive_int, default=4, help="windows at a time in evaluation")
    group.add_argument("--overlays", type=options.non_negative_int, default=8, help="test cases that are drawn")
    options.flag(group, "--tensorboard", True, "write TensorBoard events")
    by_set = parser.add_argument_group("set by the data set unless given")
    by_set.add_argument("--patch", type=options.positive_int, nargs=3, metavar=("X", "Y", "Z"), help="voxels")
    by_set.add_argument("--patches", type=options.positive_int, help="patches of each of the --b volumes of a step")
    by_set.add_argument(
        "--largest-component", action=argparse.BooleanOptionalAction, help="keep one structure of each prediction"
    )
    # Adam 1e-3 as in the other fine-tuning; cosine to 0, close to nnU-Net's polynomial decay.
    parser.set_defaults(
        arch="unet3d", optimizer="adam", lr=1e-3, weight_decay=0.0, schedule="cosine", epochs=100, b=None
    )
    return parser


def complete(args: argparse.Namespace, splits: dict[str, ImageDataset]) -> argparse.Namespace:
    """The options with the data set's values where the user gave none; and what data sets are told of the user's."""
    info = splits["train"].info
    defaults = PROTOCOLS.get(info.name, PROTOCOLS["folder"])
    given = {key: value for key, value in vars(args).items() if value is not None or key not in defaults}
    args = argparse.Namespace(**{**defaults, **given})
    if min(args.patch) < 8:
        raise InputError(f"--patch {' '.join(map(str, args.patch))}: the network halves each side 3 times; at least 8")
    if args.norm == "instance" and max(args.patch) < 16:
        raise InputError(
            "--norm instance: one voxel is left of this --patch in the deepest level; make a side 16 or more"
        )
    for option in ("spacing", "window"):
        value = getattr(args, option)
        if value is None:
            setattr(args, option, getattr(splits["train"], option, None))
            continue
        if not isinstance(splits["train"], SegmentationVolumes):
            raise InputError(f"--{option}: the volumes of {info.name} are generated; leave it out")
        for data in splits.values():
            setattr(data, option, tuple(value))
    if args.window is not None and not -math.inf < args.window[0] < args.window[1] < math.inf:
        raise InputError(f"--window {args.window[0]:g} {args.window[1]:g}: the first number must be below the second")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    check_start(args)
    width_of(args.arch)
    devices = setup(args.gpus, args.device, args.deterministic)
    splits = open_segmented(request_of(args), args.d, args.labels)
    args.data_digest = data_digest(splits)
    args = complete(args, splits)
    entries, best = run_trials(
        args,
        devices,
        lambda k: run_trial(k, splits, args, devices),
        lambda entry: f"Dice {said(entry['dice'])}, 95 % Hausdorff {said(entry['hd95'], 1)} mm",
    )
    if devices.main:
        output = Path(args.output)
        summary = summarise(entries, args, splits["test"], devices)
        write_json(output / "results.json", summary)
        join_cases(output, [entry["cases"] for entry in entries], best)
        spread = "" if summary["std"] is None else f" ± {summary['std']:.4f}"
        print(
            f"{args.init}, {args.annotation_percent:g} % of the labels: test Dice {said(summary['mean'])}{spread}; "
            f"see {output / 'results.json'}",
            flush=True,
        )
    devices.wait()
    finish()


def said(value: float | None, digits: int = 4) -> str:
    """A number as text; "undefined" where no case has the structure."""
    return "undefined" if value is None else f"{np.round(value, digits):.{digits}f}"


def cli() -> None:
    options.run_script(main)


if __name__ == "__main__":
    cli()
