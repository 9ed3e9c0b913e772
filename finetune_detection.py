"""Fine-tune Mask R-CNN with a feature pyramid on a pre-trained encoder, and evaluate boxes and masks of instances.

  python finetune_detection.py --data GLAS --dataset glas --init OURS/encoder.pt --runs 5 --output OUT --gpus 0 --amp
  torchrun --nproc-per-node 8 -- finetune_detection.py --data CRAG --dataset crag --init OURS/encoder.pt --output OUT
  python finetune_detection.py --iterations 20 --b 2 --output OUT                            (no data, CPU)

Data sets: `glas`, `crag` (layouts: datasets/pathology.py, published files or COCO's format) and the generated
`tissue2d`. With the set come these values where none is given; those of glas and crag are ConCL's (arXiv 2207.06733,
§4.1), for 16 images a step, and for what it does not say detectron2's:

  glas      --iterations  5000 --milestones 4000        --sides 400  522 --test-side 522
  crag      --iterations 15000 --milestones 10000 13000 --sides 768 1024 --test-side 768
            --proposals 1000 --samples 512 --warmup-iterations 1000
  tissue2d  --iterations   600 --milestones 450         --sides 128  160 --test-side 160
            --proposals  100 --samples  64 --warmup-iterations 50

`--protocol concl-glas` and `concl-crag` are those of the paper with what its published configuration adds: before it is
tested, the batch norms' statistics are measured anew (`--precise-bn 200`). There, all training images train:
`--all-train`.

`--milestones` are iterations here. Nothing is frozen; batch norms share their statistics between GPUs under torchrun.
The last state is tested: no split chooses one. The validation split, a tenth of the training images, is left out of
training unless `--all-train` is given, and says whose trial's predictions and overlays are kept, else the first's.
Trial k draws the labelled subset, the order and the new layers from seed + k, whatever the init, so that inits are
compared in pairs.

`--output` gets results.json: COCO's average precision ×100 of boxes ("ap_box") and masks ("ap_mask"), by IoU and size;
predictions/instances.json, what was found, and truth.json in COCO's format; overlays/*.png: image, true and predicted
instances.
"""

import argparse
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from medssl import errors
from medssl.datasets.base import Info
from medssl.datasets.masked_images import InstanceImages
from medssl.datasets.registry import open_instances, row_of
from medssl.engine import options
from medssl.engine.loop import fit
from medssl.engine.parallel import Devices, finish, setup
from medssl.engine.runs import alone_in
from medssl.errors import InputError
from medssl.models.detector import make_detector
from medssl.models.encoders import DEFAULT_ARCH, check_arch, initialise, make_encoder
from medssl.tasks import protocols, trials
from medssl.tasks.detection import Detector, evaluate, in_a_line, measure_statistics
from medssl.tasks.metrics import mean_of
from medssl.views.of_images import DetectionViews

DETECTRON2 = {"proposals": 1000, "samples": 512, "warmup_iterations": 1000}  # its Base-RCNN-FPN and defaults
PROTOCOLS = {
    "glas": {"iterations": 5000, "milestones": [4000.0], "sides": [400, 522], "test_side": 522} | DETECTRON2,
    "crag": {"iterations": 15000, "milestones": [10000.0, 13000.0], "sides": [768, 1024], "test_side": 768}
    | DETECTRON2,
    "tissue2d": {
        "iterations": 600, "milestones": [450.0], "sides": [128, 160], "test_side": 160,
        "proposals": 100, "samples": 64, "warmup_iterations": 50,
    },
}  # fmt: skip
# ConCL's benchmarks/detection/configs: TEST.PRECISE_BN, detectron2's 200 batches.
PUBLISHED = {f"concl-{name}": PROTOCOLS[name] | {"precise_bn": 200} for name in ("glas", "crag")}
PROTOCOLS |= PUBLISHED
LONGEST = 1333  # of an image's longer side, pixels: detectron2's


def run_trial(args: argparse.Namespace, splits: dict[str, InstanceImages], devices: Devices) -> dict:
    """Fine-tune once; leaves best.pt, predictions/ and overlays/ in `--output`, and returns the trial's entry."""
    info = splits["train"].info
    train = trials.labelled_subset(splits["train"], args.annotation_percent, args.seed)
    passes = args.b / len(train)  # of the images in a step: schedules are written in iterations
    own = argparse.Namespace(**vars(args))
    own.epochs, own.milestones = args.iterations * passes, [at * passes for at in args.milestones]
    own.warmup_epochs = args.warmup_iterations * passes

    torch.manual_seed(args.seed)
    encoder = make_encoder(args.arch)
    start = initialise(encoder, args.arch, args.init)
    sides = range(args.sides[0], args.sides[-1] + 1)
    network = make_detector(
        encoder, start["normalization"], 1, sides, args.test_side, LONGEST, args.proposals, args.samples
    )
    views = DetectionViews(**start["normalization"])
    method = Detector(network)
    groups = trials.parameter_groups(method, encoder, args.encoder_lr_scale)
    report = fit(method, train, views, own, devices, parameters=groups, tensorboard=args.tensorboard)
    if args.precise_bn:
        measure_statistics(method, train, views, own, devices, report["step"])
    values = {}
    if devices.main:
        values = evaluate(network, views, splits["test"], args, devices, write=True)
        values["val_score"] = 0.0  # all trials alike where no split chooses
        if "val" in splits:
            values["val_score"] = evaluate(network, views, splits["val"], args, devices)["ap_box"] or 0.0
        described = {"task": "detection", "labels": list(splits["train"].mask_labels), "test_side": args.test_side}
        trials.save_network(network, args, info, channels=3, normalization=start["normalization"], **described)
    return {**values, "steps": report["step"], "train_images": len(train), "start": start}


def get_parser() -> options.Parser:
    parser = options.Parser(__doc__)
    data = options.add_data(parser)
    options.add_evaluation_lists(data)
    options.add_training(parser)
    options.add_network(parser)
    options.add_runtime(parser)
    options.add_output(parser, default="runs/detection")
    options.flag(
        data, "--all-train", False, "train on the validation images too; the first trial's predictions are kept"
    )
    group = options.add_trials(parser)
    protocols.add_protocol(group, PROTOCOLS)
    options.add_encoder_rate(group)
    group.add_argument("--overlays", type=options.non_negative_int, default=8, help="test images that are drawn")
    by_set = parser.add_argument_group("set by the data set unless given")
    by_set.add_argument("--iterations", type=options.positive_int, help="steps of a trial")
    by_set.add_argument(
        "--sides", type=options.positive_int, nargs=2, metavar=("LOW", "HIGH"),
        help="range of the shorter side to which training resizes, pixels",
    )  # fmt: skip
    by_set.add_argument("--test-side", type=options.positive_int, help="shorter side in evaluation, pixels")
    by_set.add_argument(
        "--proposals", type=options.positive_int,
        help="regions of an image that reach the heads; of each level twice as many are proposed in training",
    )  # fmt: skip
    by_set.add_argument("--samples", type=options.positive_int, help="regions drawn of them in training")
    by_set.add_argument(
        "--precise-bn", type=options.non_negative_int, metavar="N",
        help="measure batch norms' statistics on N batches of training before the test; 0 unless the protocol has it",
    )  # fmt: skip
    by_set.add_argument(
        "--warmup-iterations", type=options.non_negative_int, help="steps of linear rise to the learning rate"
    )
    parser.set_defaults(  # detectron2's, which ConCL uses: SGD, .02 for 16 images
        arch=DEFAULT_ARCH[2], b=16, optimizer="sgd", lr=0.02, momentum=0.9, weight_decay=1e-4, schedule="step",
        milestones=None, gamma=0.1, dataset=None,
    )  # fmt: skip
    return parser


def complete(args: argparse.Namespace, info: Info, given: Collection[str] = ()) -> argparse.Namespace:
    """The options with the protocol's values where the user gave none; `given`: names of those that were typed."""
    ours = row_of(info.name).protocols["detection"]
    return protocols.complete(args, PROTOCOLS, ours, 2, given, {"precise_bn": 0})


def main(argv: Sequence[str] | None = None) -> None:
    parser = get_parser()
    args = parser.parse_args(argv)
    epochs = options.changed(parser, args, ("epochs", "warmup_epochs"))
    if epochs:
        raise InputError(f"{epochs[0]}: schedules of detection are in steps; give --iterations and --warmup-iterations")
    trials.check_start(args)
    devices = setup(args.gpus, args.device, args.deterministic, several=False)
    if len(devices.device_ids) > 1:
        raise InputError(
            "--gpus: images of many sizes are not split between GPUs; start one process a GPU with torchrun"
        )
    splits = open_instances(args)
    info = splits.info
    args.dataset = info.name
    args = complete(args, info, parser.given(argv))
    check_arch(args.arch, 2)
    options.check_range("--sides", *args.sides)
    if args.schedule == "step" and args.warmup_iterations >= min(args.milestones):
        raise InputError(
            f"--warmup-iterations {args.warmup_iterations}: the rate falls at {min(args.milestones):g} "
            "(--milestones); give less"
        )
    with alone_in(args.output, devices):
        entries, best = trials.run_trials(
            args, splits.digest, devices, lambda own: run_trial(own, splits, devices), in_a_line
        )
        if devices.main:
            output = Path(args.output)
            summary = trials.summarise_trials(entries, "ap_box", args, splits, devices)
            keys = list(entries[0]["box"])
            for kind in ("box", "mask"):
                summary[kind] = {key: mean_of(entry[kind][key] for entry in entries) for key in keys}
            trials.keep_chosen(output, best)
            trials.write_results(output, {**summary, "task": "detection"}, "AP of boxes")
    devices.wait()
    finish()


def cli() -> None:
    errors.run_script(main)


if __name__ == "__main__":
    cli()
