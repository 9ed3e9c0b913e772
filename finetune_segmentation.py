"""Fine-tune a pre-trained network on images with masks, and evaluate it on cases that neither train nor select.

  python finetune_segmentation.py --data DIR --dataset lits --init OURS/encoder.pt --output OUT --gpus 0 --amp
  python finetune_segmentation.py --data DIR --dataset folder --init OURS/encoder.pt --spacing 1 1 1
      --annotation-percent 10 --trials 5 --output OUT
  python finetune_segmentation.py --arch unet3d_quarter --steps 20 --output OUT            (phantom CTs, CPU)

  python finetune_segmentation.py --data DRIVE --dataset drive --arch resnet50 --init OURS/encoder.pt
      --load encoder+decoder --annotation_percent 10 --trial 3 --output OUT --gpus 0 --amp           (images)

The dimension comes from the data set. Every value that the data set chooses is an option.

Volumes: LiTS, BraTS, generated CTs, and any folder of image and mask volumes (layout and lists: datasets/pairs.py).
The network is the 3D U-Net with skips, on random patches; loss and sliding window are nnU-Net's (cross-entropy and
Dice; Gaussian weights).

  lits       patches 128 × 128 × 64, HU ±200, slices 1 mm apart, the largest component is kept
  brats      patches 96 × 96 × 96
  phantom3d  patches 48 × 48 × 32: whole volumes
  folder     patches 64 × 64 × 32, as in pre-training

Images: fundus photographs with vessels, radiographs with lungs, colon glands, generated ones, and any folder of images
and masks (layout and lists: datasets/pairs.py). The network is a U-Net with skips on any encoder of
segmentation-models-pytorch. Images are resized to a square, of which `--patch` trains on random parts and predicts by
overlapping windows; predictions come back at the image's own size, and are judged there, in the field of view where
the set has one.

  vessels (DRIVE and others)      512 pixels, cross-entropy, mirrored both ways
  lungs (Montgomery, Shenzhen)    224 pixels, cross-entropy
  lits (preprocess/slices.py)     512 pixels, cross-entropy and Dice
  phantom2d                        64 pixels, cross-entropy and Dice
  folder                          256 pixels, cross-entropy and Dice

`--protocol` names a published one instead, whose epochs are passes over the training cases:

  magical-drive       images of 512 pixels, not changed, cross-entropy, Adam 1e-2, constant, batch 32
  magical-montgomery  the same of 224 pixels in [0, 1]
  pcrlv2-brats        patches 112 × 128 × 112, mirrored, sigmoid outputs of WT, TC and ET, cross-entropy and Dice, group
                      norm, Adam 1e-4, ×.5 every 50 epochs, batch 4
  pcrlv2-lits         windows of 64 slices, Tversky loss with deep supervision, group norm, Adam 1e-4, batch 4

Else an epoch is a pass over the training cases, or `--epoch-steps` steps where that is more, so that few labels train
as long as many; the one with the best Dice on the validation cases is kept, and 30 without gain stop the run.
Trial k draws the labelled subset, the order and the new layers from seed + k, whatever the init, so that inits are
compared in pairs. Validation and test cases never shrink. predictions/cases.csv has a row a trial, case (image) and
region, whose last numbers are pixels or voxels; the 95 % Hausdorff distance, hd95, is in mm, of images in pixels, and
the image's diagonal where only one of prediction and truth is there; that of lits' slices is their mean, not a
volume's.

`--cache DIR` keeps decoded and resampled volumes there, which is several times faster where files are compressed.
"""

import argparse
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch

from medssl import errors
from medssl.datasets.base import ImageDataset
from medssl.datasets.registry import Opened, open_segmented, row_of, segmented_name
from medssl.engine import options
from medssl.engine.parallel import Devices, finish, setup
from medssl.engine.runs import alone_in
from medssl.models.encoders import check_arch, initialise_unet
from medssl.tasks import protocols, segmentation2d, trials
from medssl.tasks.segmentation import Segmentation, average_trials, write_cases
from medssl.tasks.segmentation2d import ImageSegmentation
from medssl.tasks.segmentation3d import VolumeSegmentation

BY_DIMS: dict[int, Segmentation] = {2: ImageSegmentation(), 3: VolumeSegmentation()}


def run_trial(args: argparse.Namespace, splits: Mapping[str, ImageDataset], devices: Devices) -> dict:
    """Fine-tune once; leaves best.pt, predictions/ and overlays/ in `--output`, and returns the trial's entry, with the
    rows of cases.csv as "cases"."""
    info = splits["train"].info
    train = trials.labelled_subset(splits["train"], args.annotation_percent, args.seed)
    shown = trials.lengthen(train, args.epoch_steps, args.b)

    torch.manual_seed(args.seed)
    kind = BY_DIMS[info.dims]
    network = kind.make_network(args, train)
    start = initialise_unet(network, args.arch, args.init, args.load)
    if args.normalization != "weights":
        start["normalization"] = kind.inputs(args.normalization)
    views = kind.make_views(args, start["normalization"])
    method = kind.make_method(args, network, train)

    def evaluate() -> dict[str, float]:
        return kind.validate(network, views, splits["val"], args, devices)

    groups = trials.parameter_groups(method, network.encoder, args.encoder_lr_scale)
    report = trials.fit_best(method, shown, views, args, devices, evaluate, groups)
    values = {}
    if devices.main:
        values = kind.test(network, views, splits["test"], args, devices)
        described = {
            "labels": list(train.mask_labels),
            "normalization": start["normalization"],
            **kind.described(args, info),
        }
        described |= kind.outputs(args, train)
        trials.save_network(network, args, info, task="segmentation", **described)
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
    options.add_runtime(parser)
    options.add_output(parser, default="runs/segmentation")
    group = options.add_trials(parser)
    protocols.add_protocol(group, (name for kind in BY_DIMS.values() for name in kind.protocols))
    group.add_argument("--patience", type=options.non_negative_int, default=30, help="epochs without gain; 0: never")
    options.add_epoch_steps(group, 50)
    options.add_encoder_rate(group)
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
    losses = dict.fromkeys(name for kind in BY_DIMS.values() for name in kind.losses)
    by_set.add_argument(
        "--loss", choices=tuple(losses),
        help="of images bce, dice or bce+dice; of volumes ce+dice, of labels that exclude each other, unless given, or "
        "bce+dice or tversky, of regions that may overlap, as PCRLv2 has for BraTS and LiTS",
    )  # fmt: skip
    by_set.add_argument(
        "--augment", choices=tuple(dict.fromkeys(name for kind in BY_DIMS.values() for name in kind.augments)),
        help="what training changes, of images all or nothing; flips: volumes are mirrored only; full unless given",
    )  # fmt: skip
    inputs = dict.fromkeys(name for kind in BY_DIMS.values() for name in kind.normalizations)
    by_set.add_argument(
        "--normalization", choices=("weights", *inputs),
        help="what inputs are brought to: what the --init expects, unless given; of images mean and deviation by name, "
        "of volumes z, zero mean and unit deviation, or unit, [0, 1]",
    )  # fmt: skip
    for kind in BY_DIMS.values():
        kind.add_options(by_set)
    # Adam 1e-3 as in the other fine-tuning; cosine to 0, close to nnU-Net's polynomial decay.
    parser.set_defaults(arch=None, optimizer="adam", lr=1e-3, weight_decay=0.0, schedule="cosine", epochs=100, b=None)
    return parser


def ours(dataset: str) -> str:
    """The name of a data set's own protocol."""
    return row_of(dataset).protocols.get("segmentation", "folder")


def open_data(args: argparse.Namespace) -> Opened:
    """The splits, images as large as the data set's protocol says unless the user does."""
    protocol = protocols.protocol_of(args, ours(segmented_name(args)))
    of_images = segmentation2d.PROTOCOLS.get(protocol, segmentation2d.PROTOCOLS["folder"])
    return open_segmented(args, args.image_size or of_images["image_size"])


def complete(args: argparse.Namespace, train: ImageDataset, given: Collection[str] = ()) -> argparse.Namespace:
    """The options with the protocol's values where the user gave none.

    Args:
        given: names of those that were typed.

    Raises:
        InputError: for an option that images, or volumes, do not have, and sides that do not fit.
    """
    info = train.info
    wrong = {
        dims: [f"--{key.replace('_', '-')}" for key in kind.options if getattr(args, key) is not None]
        for dims, kind in BY_DIMS.items()
    }
    options.refuse_other_dims(info.dims, info.name, wrong)
    kind, protocol = BY_DIMS[info.dims], protocols.protocol_of(args, ours(info.name))
    kind.check_choices(args, protocol, info.name)
    always = {"augment": "full", "normalization": "weights", **kind.options}
    args = protocols.complete(args, kind.protocols, ours(info.name), info.dims, given, always)
    for option in ("spacing", "window"):  # as the volumes are read
        value = getattr(train, option, None)
        setattr(args, option, None if value is None else list(value))
    check_arch(args.arch, info.dims)
    kind.check(args)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    parser = get_parser()
    args = parser.parse_args(argv)
    trials.check_start(args)
    devices = setup(args.gpus, args.device, args.deterministic)
    splits = open_data(args)
    info = splits.info
    args = complete(args, splits["train"], parser.given(argv))
    kind = BY_DIMS[info.dims]
    with alone_in(args.output, devices):
        entries, best = trials.run_trials(
            args, splits.digest, devices, lambda own: run_trial(own, splits, devices), kind.in_a_line, kind.since
        )
        if devices.main:
            output, regions = Path(args.output), kind.regions_of(splits["test"])
            summary = trials.summarise_trials(entries, "dice", args, splits, devices)
            summary |= average_trials(entries, regions, kind.measures)
            trials.keep_chosen(output, best)
            write_cases(output, [entry.pop("cases") for entry in entries])  # which results.json is too small for
            trials.write_results(output, {**summary, "load": args.load}, "Dice")
    devices.wait()
    finish()


def cli() -> None:
    errors.run_script(main)


if __name__ == "__main__":
    cli()
