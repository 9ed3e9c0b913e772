"""Fine-tune a pre-trained encoder on labelled images or volumes, and evaluate it on a test split that neither trains
nor selects.

  python finetune_classification.py --data DIR --dataset chest --init OURS/encoder.pt --output OUT --gpus 0 --amp
  python finetune_classification.py --data FILE --dataset pneumoniamnist --init OURS/encoder.pt --image-size 64
      --annotation-percent 1 --trials 5 --output OUT
  python finetune_classification.py --data NODULES --dataset luna --init OURS/encoder.pt --output OUT --gpus 0 --amp
  python finetune_classification.py --steps 10 --image-size 64 --output OUT          (phantom radiographs, CPU)
  python finetune_classification.py --d 3 --arch unet3d_quarter --steps 10 --b 8 --output OUT    (phantom CTs, CPU)

Unless `--protocol` names another, the protocol is ours, and follows the data set; every value of it is an option:

  chest    Adam 1e-4, ×0.5 every 50 epochs, batch 32, random crop (0.08, 1), test: centre 224/256, the epoch with
           the best validation loss (the published chest X-ray protocol); of all sets of chest radiographs
  images   Adam 1e-3, constant, batch 64, random crop (0.5, 1), test: whole image, the epoch with the best
           validation AUROC; of all others
  volumes  the same, batch 16, no crop
  luna     Adam 1e-4, cosine, batch 32, every third training cube a nodule, the epoch with the best validation AUROC.
           Besides the AUROC: the sensitivity at 1/8 … 8 false positives per scan, their mean (CPM), and froc.png

Published ones, whose results can be set beside their papers'; images are resized, and not changed otherwise, but for
magical-chexpert:

  medmnist          28 pixels, less .5 by .5, Adam 1e-3, ×.1 at epochs 50 and 75, batch 128, best validation AUROC
  magical-medmnist  28 pixels, less .5 by .5, Adam 1e-3, constant, batch 32, best validation AUROC
  magical-chexpert  chest's views, turned by 7°, Adam 2e-4, ×.5 every 50 epochs, batch 32, best validation AUROC
  magical-shenzhen  224 pixels in [0, 1], Adam 2e-4, ×.5 every 50 epochs, batch 32, best validation AUROC

Ours stop after 30 epochs without gain. Volumes are turned by right angles about z, flipped, and turned and scaled a
little in training; in tests they are seen whole. The published code flips and turns nodules only, by which a network
can tell them; here all cubes are changed.

Trial k draws the labelled subset, the order and the head from seed + k, whatever the init, so that inits are
compared in pairs. Validation and test splits never shrink.
"""

import argparse
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from medssl import errors
from medssl.datasets.base import ImageDataset, Info
from medssl.datasets.registry import open_labelled, row_of
from medssl.engine import options
from medssl.engine.method import Method
from medssl.engine.parallel import Devices, Run, finish, setup
from medssl.engine.runs import alone_in
from medssl.errors import InputError
from medssl.losses.classification import classification_loss
from medssl.models.encoders import INPUTS, initialise, make_encoder
from medssl.models.heads import EncoderClassifier
from medssl.tasks import protocols, trials
from medssl.tasks.classification import (
    BY_DIMS,
    OF_VOLUMES,
    PROTOCOLS,
    join_trials,
    summarise_classes,
    test_classes,
    validate_classes,
)
from medssl.views.of_images import ClassificationViews
from medssl.views.of_volumes import VolumeClassificationViews

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


def make_views(
    args: argparse.Namespace, dims: int, normalization: dict
) -> ClassificationViews | VolumeClassificationViews:
    """The views of images or volumes."""
    if dims == 3:
        return VolumeClassificationViews(args.cube_size, degrees=args.rotation, **normalization)
    return ClassificationViews(
        **normalization, size=args.image_size, scale=args.crop_scale, degrees=args.rotation, margin=args.margin,
        augment=args.augment == "full",
    )  # fmt: skip


def run_trial(args: argparse.Namespace, splits: Mapping[str, ImageDataset], devices: Devices) -> dict:
    """Fine-tune once; leaves best.pt and predictions.csv in `--output`, and returns the trial's entry."""
    info = splits["train"].info
    train = trials.labelled_subset(splits["train"], args.annotation_percent, args.seed)
    shown = trials.oversample(train, args.positive_share or 0)
    args.b = trials.batch_size(args.b, len(shown), devices)
    shown = trials.lengthen(shown, args.epoch_steps, args.b)

    torch.manual_seed(args.seed)
    encoder = make_encoder(args.arch, dims=info.dims)
    network = EncoderClassifier(encoder, len(info.classes), args.dropout, args.freeze)
    start = initialise(network.encoder, args.arch, args.init)
    start["normalization"] = INPUTS.get(args.normalization, start["normalization"])
    views = make_views(args, info.dims, start["normalization"])

    def evaluate() -> dict[str, float]:
        return validate_classes(network, views, splits["val"], args, devices)

    method = Classifier(network)
    groups = trials.parameter_groups(method, network.encoder, args.encoder_lr_scale)
    report = trials.fit_best(method, shown, views, args, devices, evaluate, groups)
    values = test_classes(network, views, splits["test"], args, devices)
    if devices.main:
        side = {"image_size": args.image_size} if info.dims == 2 else {"cube_size": args.cube_size}
        described = {"task": info.task, "classes": list(info.classes), "normalization": start["normalization"], **side}
        trials.save_network(network, args, info, channels=3 if info.dims == 2 else 1, **described)
    return {**values, **report, "train_images": len(train), "start": start}


def get_parser() -> options.Parser:
    parser = options.Parser(__doc__)
    data = options.add_data(parser)
    options.add_evaluation_lists(data)
    options.add_own_options(data)
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
    group = options.add_trials(parser)
    protocols.add_protocol(group, PROTOCOLS)
    group.add_argument(
        "--image-size", type=options.positive_int, default=224, help="side of the view of images, pixels"
    )
    group.add_argument(
        "--cube-size", type=options.positive_int, nargs=3, metavar=("X", "Y", "Z"),
        help="resize volumes to as many voxels; by default they stay as the data set has them",
    )  # fmt: skip
    options.add_epoch_steps(group, 1)
    options.add_encoder_rate(group)
    group.add_argument("--dropout", type=options.fraction, default=0.2, help="before the last layer")
    options.flag(group, "--freeze", False, "train the last layer only (linear evaluation)")
    group.add_argument("--rotation", type=options.non_negative, default=10.0, help="largest rotation, degrees")
    group.add_argument(
        "--tta", choices=("none", "tencrop"), default="none",
        help="test-time views of images; tencrop needs a --margin below 1, as the protocol chest has",
    )  # fmt: skip
    group.add_argument(
        "--augment", choices=("full", "none"), default="full",
        help="what training changes of images: full crops, mirrors and turns them; none shows what tests show",
    )  # fmt: skip
    group.add_argument(
        "--normalization", choices=("weights", *INPUTS), default="weights",
        help="what inputs of images are brought to: what the --init expects, or mean and deviation by name",
    )  # fmt: skip
    group.add_argument("--eval-b", type=options.positive_int, help="images at a time in evaluation: 128, volumes 16")
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


def complete(args: argparse.Namespace, info: Info, given: Collection[str] = ()) -> argparse.Namespace:
    """The options with the protocol's and the dimension's values where the user gave none.

    Args:
        given: names of those that were typed.

    Raises:
        InputError: for an option or a protocol that images, or volumes, do not have.
    """
    of_images = {"--crop-scale": args.crop_scale, "--margin": args.margin, "--tta tencrop": args.tta == "tencrop"}
    of_images |= {"--augment none": args.augment == "none", "--normalization": args.normalization != "weights"}
    of_images |= {f"--protocol {name}": args.protocol == name for name in PROTOCOLS if name not in OF_VOLUMES}
    of_volumes = {"--cube-size": args.cube_size}
    of_volumes |= {f"--protocol {name}": args.protocol == name for name in OF_VOLUMES}
    wrong = {
        2: [key for key, value in of_images.items() if value],
        3: [key for key, value in of_volumes.items() if value],
    }
    options.refuse_other_dims(info.dims, info.name, wrong)
    ours = row_of(info.name).protocols.get("classification", BY_DIMS[info.dims])
    args = protocols.complete(args, PROTOCOLS, ours, info.dims, given, {"eval_b": EVAL_B[info.dims]})
    if args.positive_share and info.task != "binary":
        raise InputError(f"--positive-share: needs two classes, and {info.name} is {info.task}; set it to 0")
    if args.freeze and args.encoder_lr_scale != 1:
        raise InputError("--encoder-lr-scale: with --freeze the encoder learns nothing; leave one out")
    if args.tta == "tencrop" and args.margin == 1:
        raise InputError("--tta tencrop: with --margin 1 its crops are all the same; give --margin 0.875")
    if info.dims == 2:
        options.check_range("--crop-scale", *args.crop_scale)
    elif args.cube_size:
        options.check_sides("--cube-size", args.cube_size)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    parser = get_parser()
    args = parser.parse_args(argv)
    trials.check_start(args)
    devices = setup(args.gpus, args.device, args.deterministic)
    splits = open_labelled(args)
    info = splits.info
    args = complete(args, info, parser.given(argv))
    with alone_in(args.output, devices):
        entries, best = trials.run_trials(
            args, splits.digest, devices, lambda own: run_trial(own, splits, devices), in_a_line
        )
        if devices.main:
            output = Path(args.output)
            summary = trials.summarise_trials(entries, "auroc", args, splits, devices)
            join_trials(output, args.trials, best, info)
            trials.write_results(output, {**summary, **summarise_classes(entries, info)}, "AUROC")
    devices.wait()
    finish()


def in_a_line(entry: dict) -> str:
    """A finished trial."""
    cpm = f", CPM {trials.said(entry['cpm'])}" if "cpm" in entry else ""
    return f"AUROC {trials.said(entry['auroc'])}{cpm}, accuracy {trials.said(entry['accuracy'])}"


def cli() -> None:
    errors.run_script(main)


if __name__ == "__main__":
    cli()
