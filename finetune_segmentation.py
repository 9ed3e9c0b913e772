"""Fine-tune a pre-trained network on images with masks, and evaluate it on cases that neither train nor select.

  python finetune_segmentation.py --data DIR --dataset lits --init OURS/encoder.pt --output OUT --gpus 0 --amp
  python finetune_segmentation.py --data DIR --dataset folder --init OURS/encoder.pt --spacing 1 1 1
      --annotation-percent 10 --trials 5 --output OUT
  python finetune_segmentation.py --arch unet3d_quarter --steps 20 --output OUT            (phantom CTs, CPU)

  python finetune_segmentation.py --data DRIVE --dataset drive --arch resnet50 --init OURS/encoder.pt
      --load encoder+decoder --annotation_percent 10 --trial 3 --output OUT --gpus 0 --amp           (images)

The dimension comes from the data set. Every value that the data set chooses is an option.

Volumes: `lits`, `brats`, `phantom3d`, and `folder`, any folder of image and mask volumes (layout and lists:
datasets/segmentation3d.py). The network is the 3D U-Net with skips, on random patches; loss and sliding window are
nnU-Net's (cross-entropy and Dice; Gaussian weights).

  lits       patches 128 × 128 × 64, HU ±200, slices 1 mm apart, the largest component is kept
  brats      patches 96 × 96 × 96
  phantom3d  patches 48 × 48 × 32: whole volumes
  folder     patches 64 × 64 × 32, as in pre-training

Images: `drive`, `stare`, `chase`, `montgomery`, `shenzhen`, the generated `phantom2d` and `fundus2d`, and `folder`, any
folder of images and masks (layout and lists: datasets/segmentation2d.py). The network is a U-Net with skips on any
encoder of segmentation-models-pytorch. Images are resized to a square, of which `--patch` trains on random parts and
predicts by overlapping windows; predictions come back at the image's own size, and are judged there, in the field of
view where the set has one.

  drive, stare, chase, fundus2d   512 pixels, cross-entropy, mirrored both ways
  montgomery, shenzhen            224 pixels, cross-entropy
  lits (preprocess/slices.py)     512 pixels, cross-entropy and Dice
  phantom2d                        64 pixels, cross-entropy and Dice
  folder                          256 pixels, cross-entropy and Dice

An epoch is a pass over the training cases, or `--epoch-steps` steps where that is more, so that few labels train
as long as many; the one with the best Dice on the validation cases is kept, and 30 without gain stop the run.
Trial k draws the labelled subset, the order and the new layers from seed + k, whatever the init, so that inits are
compared in pairs. Validation and test cases never shrink.

`--cache DIR` keeps decoded and resampled volumes there, which is several times faster where files are compressed.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from medssl.datasets.registry import ImageDataset, Info
from medssl.datasets.segmentation import open_segmented
from medssl.datasets.views import SegmentationViews
from medssl.datasets.views3d import VolumeSegmentationViews
from medssl.engine import options, trials
from medssl.engine.loop import Method
from medssl.engine.options import InputError
from medssl.engine.parallel import Devices, Run, finish, setup
from medssl.engine.segmentation import join_cases, summarise_segmentation, test_and_write, validate
from medssl.engine.segmentation2d import summarise_trials_of_images, test_images, validate_images
from medssl.losses.segmentation import binary_dice_cross_entropy, dice_cross_entropy
from medssl.models.encoders import DEFAULT_ARCH, check_arch, initialise_unet, width_of
from medssl.models.unet2d import UNet2d
from medssl.models.unet3d import UNet3d

VESSELS = {"image_size": 512, "b": 4, "loss": "bce", "flip": "both"}  # MAGICAL's DRIVE protocol
LUNGS = {"image_size": 224, "b": 16, "loss": "bce", "flip": "horizontal"}  # MAGICAL's Montgomery protocol
PROTOCOLS_2D = {
    **dict.fromkeys(("drive", "stare", "chase", "fundus2d"), VESSELS),
    **dict.fromkeys(("montgomery", "shenzhen"), LUNGS),
    "lits": {"image_size": 512, "b": 4, "loss": "bce+dice", "flip": "none"},
    "phantom2d": {"image_size": 64, "b": 16, "loss": "bce+dice", "flip": "horizontal"},
    "folder": {"image_size": 256, "b": 8, "loss": "bce+dice", "flip": "horizontal"},
}
FLIPS = {"none": (False, False), "horizontal": (True, False), "both": (True, True)}
PROTOCOLS_3D = {
    # LiTS and BraTS: patches as large as 24 GiB hold at batch 2 × 2; the published LiTS windows have 64 slices.
    "lits": {"patch": [128, 128, 64], "b": 2, "patches": 2, "largest_component": True},
    "brats": {"patch": [96, 96, 96], "b": 2, "patches": 2, "largest_component": False},
    "phantom3d": {"patch": [48, 48, 32], "b": 4, "patches": 1, "largest_component": False},
    "folder": {"patch": [64, 64, 32], "b": 2, "patches": 4, "largest_component": False},
}


class ImageSegmenter(Method):
    """A 2D U-Net trained with binary cross-entropy, soft Dice, or both, for labels that may overlap.

    Batch: "view" (B, 3, H, W) normalised, "target" (B, K, H, W) and "field" (B, 1, H, W), 0 or 1.
    """

    def __init__(self, network: nn.Module, loss: str) -> None:
        super().__init__()
        self.network, self.loss = network, loss

    def forward(self, batch: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        logits = run(self.network, batch["view"])
        return binary_dice_cross_entropy(logits, batch["target"], batch["field"], self.loss)

    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        # Views are normalised; so that masks come out black and white, they go from dark to bright of the same.
        dark, bright = batch["view"].amin(), batch["view"].amax()
        shades = {"true": batch["target"], "predicted": self.network(batch["view"][:8]).sigmoid()}
        shown = {name: dark + (bright - dark) * mask.amax(1, keepdim=True) for name, mask in shades.items()}
        return {"view": batch["view"]} | {name: mask.expand(-1, 3, -1, -1) for name, mask in shown.items()}


class VolumeSegmenter(Method):
    """A 3D U-Net trained with cross-entropy and Dice.

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


def run_trial(args: argparse.Namespace, splits: dict[str, ImageDataset], devices: Devices) -> dict:
    """Fine-tune once; leaves best.pt, predictions/ and overlays/ in `--output`, and returns the trial's entry, with the
    rows of cases.csv as "cases"."""
    info, labels = splits["train"].info, splits["train"].mask_labels
    train = trials.labelled_subset(splits["train"], args.annotation_percent, args.seed)
    passes = -(-args.epoch_steps * args.b // len(train))  # of the cases, in an epoch of that many steps
    shown = train.subset([*range(len(train))] * max(1, passes))

    torch.manual_seed(args.seed)
    if info.dims == 2:
        network = UNet2d(args.arch, len(labels))
        start = initialise_unet(network, args.arch, args.init, args.load)
        views = SegmentationViews(
            **start["normalization"], size=args.image_size, patch=args.patch[0] if args.patch else None,
            degrees=args.rotation, flips=FLIPS[args.flip],
        )  # fmt: skip
        method, judge, test = ImageSegmenter(network, args.loss), validate_images, test_images
        described = {key: getattr(args, key) for key in ("image_size", "patch")}
    else:
        network = UNet3d(len(labels), channels=info.channels, width=width_of(args.arch), norm=args.norm)
        start = initialise_unet(network, args.arch, args.init, args.load)
        views = VolumeSegmentationViews(args.patch, args.foreground, patches=args.patches, **start["normalization"])
        method, judge, test = VolumeSegmenter(network, len(labels)), validate, test_and_write
        described = {key: getattr(args, key) for key in ("norm", "patch", "spacing", "window")}

    def evaluate() -> dict[str, float]:
        return judge(network, views, splits["val"], args, devices)

    report = trials.fit_best(method, shown, views, args, devices, evaluate)
    values = {}
    if devices.main:
        values = test(network, views, splits["test"], args, devices)
        described |= {"labels": list(labels), "normalization": start["normalization"]}
        channels = 3 if info.dims == 2 else info.channels
        trials.save_network(network, args, info, channels=channels, task="segmentation", **described)
    return {**values, **report, "train_images": len(train), "start": start}


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
        "--window", type=options.finite, nargs=2, metavar=("LOW", "HIGH"), help="stored values (HU) that become 0 and 1"
    )
    options.add_training(parser)
    network = options.add_network(parser)
    network.add_argument(
        "--load", choices=("encoder", "encoder+decoder"), default="encoder", help="what is taken from --init"
    )
    network.add_argument("--norm", choices=NORMS, help="normalisation layers of the 3D U-Net; batch unless given")
    options.add_runtime(parser)
    options.add_output(parser, default="runs/segmentation")
    group = options.add_trials(parser)
    group.add_argument("--patience", type=options.non_negative_int, default=30, help="epochs without gain; 0: never")
    group.add_argument("--epoch-steps", type=options.positive_int, default=50, help="fewest steps of an epoch")
    group.add_argument(
        "--overlap", type=options.bounded_float(0, 0.9), default=0.5, help="of windows in evaluation, share of a side"
    )
    group.add_argument("--eval-b", type=options.positive_int, default=4, help="windows at a time in evaluation")
    group.add_argument("--overlays", type=options.non_negative_int, default=8, help="test cases that are drawn")
    by_set = parser.add_argument_group("set by the data set unless given")
    by_set.add_argument(
        "--patch", type=options.positive_int, nargs="+", metavar="N",
        help="sides of what training cuts out: X Y Z voxels; of images one side, by default the whole",
    )  # fmt: skip
    by_set.add_argument("--image-size", type=options.positive_int, help="side to which images are resized, pixels")
    by_set.add_argument("--loss", choices=("bce", "dice", "bce+dice"), help="of images")
    by_set.add_argument("--flip", choices=tuple(FLIPS), help="how images are mirrored in training")
    by_set.add_argument("--rotation", type=options.non_negative, help="largest rotation of images, degrees; 10")
    by_set.add_argument("--patches", type=options.positive_int, help="patches of each of the --b volumes of a step")
    by_set.add_argument("--foreground", type=options.fraction, help="share of patches of volumes around a label; 0.5")
    by_set.add_argument(
        "--largest-component", action=argparse.BooleanOptionalAction,
        help="keep one structure of each predicted volume",
    )  # fmt: skip
    # Adam 1e-3 as in the other fine-tuning; cosine to 0, close to nnU-Net's polynomial decay.
    parser.set_defaults(arch=None, optimizer="adam", lr=1e-3, weight_decay=0.0, schedule="cosine", epochs=100, b=None)
    return parser


NORMS = ("batch", "group", "instance")
OF_IMAGES = {"image_size": None, "loss": None, "flip": None, "rotation": 10.0}  # and their defaults
OF_VOLUMES = {"patches": None, "foreground": 0.5, "largest_component": None, "norm": "batch"}


def complete(args: argparse.Namespace, info: Info) -> argparse.Namespace:
    """The options with the data set's values where the user gave none.

    Raises:
        InputError: for an option that images, or volumes, do not have, and sides that do not fit.
    """
    others, kind = (OF_VOLUMES, "volumes") if info.dims == 2 else (OF_IMAGES, "images")
    for option in others:
        if getattr(args, option) is not None:
            raise InputError(f"--{option.replace('_', '-')}: is for {kind}, and {info.name} has {info.dims} dimensions")
    if args.patch and len(args.patch) != (1 if info.dims == 2 else 3):
        wanted = "one side" if info.dims == 2 else "three sides"
        raise InputError(f"--patch {' '.join(map(str, args.patch))}: {info.name} wants {wanted}")
    by_dims = {"arch": DEFAULT_ARCH[info.dims], **(OF_IMAGES if info.dims == 2 else OF_VOLUMES)}
    protocols = PROTOCOLS_2D if info.dims == 2 else PROTOCOLS_3D
    args = options.complete(args, {**by_dims, **protocols.get(info.name, protocols["folder"])})
    check_arch(args.arch, info.dims)
    if info.dims == 2:
        if args.patch and args.patch[0] > args.image_size:
            raise InputError(f"--patch {args.patch[0]}: larger than --image-size {args.image_size}")
        return args
    options.check_sides("--patch", args.patch)
    if args.norm == "instance" and max(args.patch) < 16:
        raise InputError(
            "--norm instance: one voxel is left of this --patch in the deepest level; make a side 16 or more"
        )
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    trials.check_start(args)
    devices = setup(args.gpus, args.device, args.deterministic)
    splits = open_segmented(args, PROTOCOLS_2D)
    args = complete(args, splits["train"].info)
    entries, best = trials.run_trials(args, devices, lambda own: run_trial(own, splits, devices), in_a_line)
    if devices.main:
        output, test = Path(args.output), splits["test"]
        summarise = summarise_trials_of_images if test.info.dims == 2 else summarise_segmentation
        summary = trials.summarise_trials(entries, "dice", args, test.info, devices)
        join_cases(output, [entry.pop("cases") for entry in entries], best)  # which results.json is too small for
        trials.write_results(output, {**summary, **summarise(entries, test), "load": args.load}, "Dice")
    devices.wait()
    finish()


def in_a_line(entry: dict) -> str:
    """A finished trial."""
    more = (
        f"95 % Hausdorff {trials.said(entry['hd95'], 1)} mm"
        if "hd95" in entry
        else f"AUROC {trials.said(entry['auroc'])}"
    )
    return f"Dice {trials.said(entry['dice'])}, {more}"


def cli() -> None:
    options.run_script(main)


if __name__ == "__main__":
    cli()
