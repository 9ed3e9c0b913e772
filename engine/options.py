"""Command-line options, in groups that scripts add one by one, and the way a script reports bad input.

Groups are functions, not argparse parents: a shared parent leaks one script's defaults into another.
"""

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from medssl.datasets import medmnist, registry
from medssl.datasets.base import Info
from medssl.engine.helptext import arrange
from medssl.errors import InputError
from medssl.files import split_init
from medssl.markup import one_line

# MoCo's second version (arXiv 2003.04297, §3, and its published code), which ConCL, DenseCL and PCL take over.
MOCO_V2 = {
    "b": 256, "epochs": 200, "lr": 0.03, "momentum": 0.9, "weight_decay": 1e-4, "optimizer": "sgd",
    "schedule": "cosine", "temperature": 0.2, "jitter": [0.4, 0.4, 0.4, 0.1],
}  # fmt: skip


PHASE_HELP = "of the published commands, where one script does both; here only this"


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keep the description's line breaks and show every default."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=100)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # None stands for "not given", which is no value to show.
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """ArgumentParser without abbreviations, whose errors are one line and exit code 2."""

    own_inits: tuple[str, ...] = ("random", "imagenet")  # values of --init that are no file and no model's name
    method: str | None = None  # which published commands name by --model, and which changes no encoder

    def __init__(self, description: str) -> None:
        text, examples = arrange(description)
        super().__init__(description=text, epilog=examples, formatter_class=_Formatter, allow_abbrev=False)

    def parse_known_args(self, *given: object, **named: object) -> tuple[argparse.Namespace, list[str]]:
        args, rest = super().parse_known_args(*given, **named)
        if self.method and args.arch == self.method:
            args.arch = self.get_default("arch")
        if getattr(args, "proxy_dir", None):
            several = isinstance(args.init, list)
            inits = args.init if several else [args.init]
            found = [resolve_init(init, args.proxy_dir, self.own_inits) for init in inits]
            if set(found) <= set(self.own_inits):
                raise InputError(
                    f"--proxy-dir {args.proxy_dir}: has no effect on --init {inits[0]}; give a model's name"
                )
            args.init = found if several else found[0]
        return args, rest

    def given(self, argv: Sequence[str] | None = None) -> set[str]:
        """Names, as in the parsed options, of those that were typed: all others may be a protocol's."""
        nothing = object()
        blank = argparse.Namespace(**{action.dest: nothing for action in self._actions})
        typed, _ = super().parse_known_args(argv, blank)
        return {name for name, value in vars(typed).items() if value is not nothing}

    def error(self, message: str) -> None:
        print(f"error: {one_line(message)} (see --help)", file=sys.stderr)
        raise SystemExit(2)


def flag(group: argparse._ArgumentGroup, name: str, default: bool, help: str) -> None:
    """Add `--name` and `--no-name`; `type=bool` would read the text "False" as true."""
    group.add_argument(name, action=argparse.BooleanOptionalAction, default=default, help=help)


def check_range(option: str, low: float, high: float) -> None:
    """Raise InputError unless low ≤ high."""
    if low > high:
        raise InputError(f"{option} {low:g} {high:g}: the first number must not be above the second")


def check_sides(option: str, sides: Sequence[int]) -> None:
    """Raise InputError for a volume that the 3D U-Net cannot halve three times."""
    if min(sides) < 8:
        raise InputError(f"{option} {' '.join(map(str, sides))}: the 3D U-Net needs sides of at least 8 voxels")


def decoders(args: argparse.Namespace) -> int:
    """Decoding processes: `--workers`, but no more than cores, where published commands would only be slower."""
    return min(args.workers, os.cpu_count() or 1)


def complete(
    args: argparse.Namespace, defaults: Mapping[str, object], given: Collection[str] | None = None
) -> argparse.Namespace:  # fmt: skip
    """The options, with `defaults` (of a data set, its dimension, or a protocol) where the user gave none: none of
    `given`, or, where that is None, those that have no default of their own."""
    own = vars(args)
    kept = {key for key, value in own.items() if (value is not None if given is None else key in given)}
    return argparse.Namespace(**{**own, **{key: value for key, value in defaults.items() if key not in kept}})


def changed(parser: Parser, args: argparse.Namespace, names: Sequence[str]) -> list[str]:
    """Those of the options, as they are typed, that the user changed; `names` as in `args`."""
    return [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) != parser.get_default(name)]


def refuse_other_dims(dims: int, name: str, given: Mapping[int, Sequence[str]]) -> None:
    """Raise InputError where the user gave an option that data of this dimension do not have.

    Args:
        dims, name: of the data set. given: by dimension, the options given that only data of it have, as typed.
    """
    for other, options in given.items():
        if other != dims and options:
            kind = {2: "images", 3: "volumes"}[other]
            raise InputError(f"{options[0]}: is for {kind}, and {name} has {dims} dimensions; leave it out")


def for_dims(
    parser: Parser, args: argparse.Namespace, info: Info, defaults: Mapping[int, Mapping[str, object]],
    only_of: Mapping[int, Sequence[str]],
) -> argparse.Namespace:  # fmt: skip
    """The options of a method that has both dimensions, with the values of the data set's where the user gave none.

    Args:
        info: of the data set. defaults: values by dimension.
        only_of: names of the options that data of a dimension alone have, by dimension.

    Raises:
        InputError: where the user changed an option of the other dimension.
    """
    refuse_other_dims(info.dims, info.name, {dims: changed(parser, args, names) for dims, names in only_of.items()})
    return complete(args, defaults[info.dims])


def check_warm_up(args: argparse.Namespace, what: str) -> None:
    """Raise InputError for a run that ends before its `--warm-up`, after which there is `what`."""
    if args.warm_up >= args.epochs:
        raise InputError(
            f"--warm-up {args.warm_up:g}: a run of {args.epochs} epochs would never learn from {what}; give less"
        )


def check_inits(inits: Sequence[str], methods: Sequence[str] = ()) -> None:
    """Raise InputError where several `--init` name the same weights twice, or a file that is not there; `methods` may
    be named too."""
    named = ("random", "imagenet", *methods)
    files = {init: split_init(init) for init in inits if init not in named}
    same = {(str(Path(path).resolve()), prefix) for path, prefix in files.values()}
    if len(same) + len(set(inits) & set(named)) < len(inits):
        raise InputError("--init: the same weights twice")
    for init in files:  # found now, not after hours of work on the others
        if not Path(files[init][0]).is_file():
            what = "a folder; give the encoder.pt in it" if Path(init).is_dir() else "no such checkpoint file"
            known = f", and no method; methods are {', '.join(methods)}" if methods else ""
            raise InputError(f"--init {init}: {what}{known}")


def positive_int(text: str) -> int:
    """Parse an integer that is at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def non_negative_int(text: str) -> int:
    """Parse an integer that is at least 0."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def bounded_float(low: float, high: float) -> Callable[[str], float]:
    """Make an argparse type for finite floats in [low, high]."""
    wanted = "finite number" + (f" of at least {low:g}" if math.isfinite(low) else "")
    wanted = f"number from {low:g} to {high:g}" if math.isfinite(high) else wanted

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not (low <= value <= high and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text!r} is not a {wanted}")
        return value

    return parse


fraction = bounded_float(0.0, 1.0)
non_negative = bounded_float(0.0, math.inf)
finite = bounded_float(-math.inf, math.inf)


def filled(text: str) -> str:
    """Parse a path or name, which "" is not: it would mean the default."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; is a shell variable not set?")
    return text


def run_name(text: str) -> int | str:
    """Parse a run's number, which is added to the seed, or its name, which is not."""
    if text.isdecimal():
        return int(text)
    if not re.fullmatch(r"\w[\w.+-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor a name of letters, digits and _ . + -")
    return text


def gpu_list(text: str) -> list[int]:
    """Parse `0,1,2`, a list of GPU numbers."""
    try:
        return [int(part) for part in filled(text).split(",") if part != ""]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of GPU numbers such as 0,1") from None


def add_data(parser: Parser) -> argparse._ArgumentGroup:
    """Which images, and how they are read."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", type=filled, metavar="DIR", help="the data set's folder or file; without it, generated phantom images"
    )
    group.add_argument(
        "--dataset",
        "--n",
        "--data_set",
        type=filled,
        metavar="NAME",
        help=f"{', '.join(registry.names())}, or a MedMNIST name: {', '.join(medmnist.FLAGS)}, also with a size, as in "
        "pathmnist_64",
    )
    group.add_argument(
        "--series", type=non_negative_int, default=0, metavar="N",
        help="of a generated set: which of its series of images, each drawn anew; results of two cannot be compared",
    )  # fmt: skip
    group.add_argument(
        "--list", type=filled, metavar="FILE", help="image list: a name, then labels, separated by blanks"
    )
    group.add_argument(
        "--d",
        type=int,
        choices=(2, 3),
        help="dimension; checked against the data set, and chooses where --data is missing or holds both kinds",
    )
    group.add_argument(
        "--texture-size",
        type=non_negative_int,
        default=0,
        help="side in pixels to which images are decoded; 0 chooses the set's own size, "
        "or the power of two from twice the image size on",
    )
    group.add_argument(
        "--workers",
        "--num-workers",
        "--num_workers",
        type=non_negative_int,
        default=min(4, os.cpu_count() or 1),
        help="decoding processes, at most one a core",
    )
    add_worker_timeout(group)
    group.add_argument(
        "--cache",
        type=filled,
        metavar="DIR",
        help="decoded images made by preprocess/cache_images.py; volumes of files are kept there as they are read",
    )
    group.add_argument(
        "--max-bad", type=fraction, default=0.01, help="stop when more than this share of the files cannot be read"
    )
    return group


def add_worker_timeout(group: argparse._ActionsContainer) -> None:
    """How long workers may take."""
    group.add_argument(
        "--worker-timeout",
        type=non_negative_int,
        default=600,
        metavar="SECONDS",
        help="stop when the workers give no batch for so long, as where a network disk hangs; 0 waits for ever",
    )


def add_evaluation_lists(group: argparse._ArgumentGroup) -> None:
    """Lists of the splits that choose and judge a model."""
    group.add_argument("--val-list", type=filled, metavar="FILE", help="image list of the validation split")
    group.add_argument("--test-list", type=filled, metavar="FILE", help="image list of the test split")


def add_own_options(group: argparse._ArgumentGroup, labelled: bool = True) -> None:
    """Options that one data set has, and others refuse; those of labelled use where that is meant."""
    for row in registry.ROWS:
        for option in row.options:
            if labelled or not option.labelled:
                group.add_argument(f"--{option.name}", choices=option.choices, help=f"{row.name}: {option.help}")


def pretraining_parser(description: str, output: str) -> Parser:
    """The options that all pre-training scripts have; `output` is the default folder."""
    parser = Parser(description)
    add_own_options(add_data(parser), labelled=False)
    add_pretraining(parser)
    add_training(parser)
    add_network(parser)
    add_runtime(parser)
    add_output(parser, default=output)
    return parser


def add_pretraining(parser: Parser) -> argparse._ArgumentGroup:
    """How much of the training list pre-training uses."""
    group = parser.add_argument_group("pre-training")
    group.add_argument("--ratio", type=fraction, default=1.0, help="use the first R of the training list")
    flag(group, "--log-gradients", False, "with each logged line, the norm of each loss's gradient in the encoder")
    return group


def add_published(parser: Parser, method: str) -> None:
    """What the published commands of PCRL and PCRLv2 say of pre-training: `--phase`, and `--model` with their name."""
    parser.method = method
    group = parser.add_argument_group("of the published command")
    group.add_argument("--phase", choices=("pretask",), default="pretask", help=PHASE_HELP)


def add_contrast(parser: Parser) -> argparse._ArgumentGroup:
    """The group of a contrast's options, with its temperature."""
    group = parser.add_argument_group("contrast")
    group.add_argument(
        "--temperature", "--moco_t", "--nce_t", type=bounded_float(1e-3, math.inf), default=0.07, help="temperature T"
    )
    return group


def add_queued_contrast(parser: Parser) -> argparse._ArgumentGroup:
    """The options of a contrast with a teacher's queue."""
    group = add_contrast(parser)
    add_queue(group)
    add_teacher(group)
    return group


def add_nce(group: argparse._ArgumentGroup) -> None:
    """Which loss a contrast has."""
    group.add_argument(
        "--loss", choices=("infonce", "nce"), default="infonce",
        help="softmax over all candidates, or noise-contrastive estimation",
    )  # fmt: skip


def add_queue(group: argparse._ArgumentGroup) -> None:
    """How many negatives a teacher's queue holds."""
    group.add_argument(
        "--queue", "--nce_k", type=positive_int, default=16384, metavar="K", help="keys in the queue: the negatives"
    )


def add_teacher(group: argparse._ArgumentGroup) -> None:
    """How a teacher follows the student."""
    group.add_argument("--ema", "--alpha", type=fraction, default=0.999, help="momentum of the teacher's weights")
    group.add_argument(
        "--ema-schedule", choices=("constant", "cosine"), default="constant",
        help="cosine lets the momentum rise to 1 over the run",
    )  # fmt: skip


def add_training(parser: Parser) -> argparse._ArgumentGroup:
    """Optimisation: how long, how fast, how many images a step."""
    group = parser.add_argument_group("training")
    group.add_argument(
        "-b",
        "--b",
        "--batch-size",
        "--batch_size",
        "--train_batch_size",
        type=positive_int,
        default=64,
        help="images per step, all devices",
    )
    group.add_argument("--epochs", type=positive_int, default=100, help="passes over the training images")
    group.add_argument("--steps", type=positive_int, help="stop after this many steps (a smoke run)")
    group.add_argument("--lr", "-lr", "--learning_rate", type=non_negative, default=1e-2, help="peak learning rate")
    group.add_argument("--optimizer", choices=("sgd", "lars", "adam", "adamw"), default="sgd", help="optimiser")
    group.add_argument("--momentum", type=fraction, default=0.9, help="momentum of SGD and LARS")
    group.add_argument(
        "--betas", type=bounded_float(0, 0.999999), nargs=2, default=[0.9, 0.999], metavar=("B1", "B2"),
        help="decay of Adam's averages of the gradient and of its square",
    )  # fmt: skip
    group.add_argument("--weight-decay", "--weight_decay", type=non_negative, default=1e-4, help="weight decay (L2)")
    group.add_argument(
        "--schedule", choices=("cosine", "step", "constant"), default="cosine", help="learning rate over time"
    )
    group.add_argument(
        "--milestones",
        type=non_negative,
        nargs="+",
        default=[60, 80],
        help="epochs at which `step` decays; where no default is shown, 60 %% and 80 %% of --epochs",
    )
    group.add_argument("--gamma", type=fraction, default=0.1, help="factor of each `step` decay")
    group.add_argument(
        "--warmup-epochs", type=non_negative, default=0, help="epochs of linear rise to the learning rate"
    )
    group.add_argument("--clip-grad", type=non_negative, default=0.0, help="largest gradient norm; 0 does not clip")
    group.add_argument("--seed", type=non_negative_int, default=0, help="seed of everything random")
    return group


def add_runtime(parser: Parser) -> argparse._ArgumentGroup:
    """Devices and precision."""
    group = parser.add_argument_group("devices")
    group.add_argument(
        "--gpus",
        type=gpu_list,
        help="GPU numbers such as 0,1,2,3: several in one process use DataParallel; all that are visible unless given",
    )
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="kind of device")
    group.add_argument("--amp", action="store_true", help="mixed precision")
    group.add_argument("--amp-dtype", choices=("bf16", "fp16"), default="bf16", help="its low-precision type")
    group.add_argument("--compile", action="store_true", help="compile the networks with torch.compile")
    flag(group, "--deterministic", True, "ask GPUs for kernels that give the same bits on every run (slower there)")
    return group


def add_output(parser: Parser, default: str) -> argparse._ArgumentGroup:
    """What a run leaves behind, and how it continues."""
    group = parser.add_argument_group("output")
    group.add_argument("--output", type=filled, metavar="DIR", default=default, help="where the run's files go")
    group.add_argument(
        "--resume",
        default="auto",
        metavar="{auto,never,FILE}",
        help="continue what is in --output, start anew over it, or continue from a checkpoint file",
    )
    group.add_argument(
        "--save-every",
        type=positive_int,
        default=500,
        help="steps between checkpoints; one is also written every 5 minutes",
    )
    group.add_argument("--log-every", type=positive_int, default=10, help="steps between logged lines")
    return group


def add_network(parser: Parser) -> argparse._ArgumentGroup:
    """The encoder and where its weights start."""
    group = parser.add_argument_group("network")
    group.add_argument(
        "--arch",
        "--model",
        default="resnet18",
        help="encoder: in 2D any name of segmentation-models-pytorch; in 3D unet3d, unet3d_half or unet3d_quarter; of "
        "PCRL and PCRLv2 also their own name, as published, which changes nothing. Fine-tuning takes that of --init",
    )
    group.add_argument(
        "--init", "--weight", default="random", metavar="{random,imagenet,FILE,NAME}",
        help="encoder weights to start from; FILE:PREFIX where a file has several, as moco.pth:encoder_k",
    )  # fmt: skip
    add_proxy_folder(group)
    return group


def add_proxy_folder(group: argparse._ArgumentGroup) -> None:
    """Where `--init NAME` finds other people's weights."""
    group.add_argument(
        "--proxy-dir", "--proxy_dir", type=filled, metavar="DIR",
        help="folder of prepare_models.py, in which --init NAME is NAME.pth",
    )  # fmt: skip


def resolve_init(init: str, folder: str, others: Sequence[str] = Parser.own_inits) -> str:
    """What `--init` means with `--proxy-dir`: random, imagenet, a file, a model's name there, however it is spelled, or
    one of `others`.

    Raises:
        InputError: for a folder that is not there, and a name that it does not have.
    """
    if not Path(folder).is_dir():
        raise InputError(f"--proxy-dir {folder}: no such folder")
    if init in ("random", "imagenet") or Path(split_init(init)[0]).is_file():
        return init
    known = {plain_name(path.stem): path for path in sorted(Path(folder).glob("*.pth"))}
    if plain_name(init) not in known and init in others:
        return init
    if plain_name(init) not in known:
        there = ", ".join(path.stem for path in known.values()) or "none"
        raise InputError(f"--init {init}: no such file, and no such model in {folder}, which has {there}")
    return str(known[plain_name(init)])


def plain_name(text: str) -> str:
    """A model's name without capitals and signs: people write MoCo-v2, moco_v2, mocov2."""
    return re.sub(r"[^a-z0-9]", "", text.lower())


def add_encoder_rate(group: argparse._ArgumentGroup) -> None:
    """The encoder's part of the learning rate."""
    group.add_argument(
        "--encoder-lr-scale", type=non_negative, default=1.0, metavar="S",
        help="the encoder learns with S times the rate; below 1 pre-trained weights change less",
    )  # fmt: skip


def add_epoch_steps(group: argparse._ArgumentGroup, fewest: int) -> None:
    """Length of an epoch of few images."""
    group.add_argument(
        "--epoch-steps", type=positive_int, default=fewest,
        help="fewest steps of an epoch, after which the network is validated: few images are shown several times",
    )  # fmt: skip


def add_trials(parser: Parser) -> argparse._ArgumentGroup:
    """How much is labelled, and how often fine-tuning is repeated."""
    group = parser.add_argument_group("fine-tuning")
    group.add_argument(
        "--annotation-percent",
        "--annotation_percent",
        type=bounded_float(1e-6, 100),
        default=100.0,
        help="use this percentage of the labelled training images",
    )
    group.add_argument("--trials", "--trial", "--runs", type=positive_int, default=1, help="repeat with seeds 0, 1, …")
    group.add_argument(
        "--run", type=run_name, default=0,
        help="number of a repetition, added to --seed; or a name, added to the output folder's after an underscore",
    )  # fmt: skip
    group.add_argument("--phase", choices=("finetune",), default="finetune", help=PHASE_HELP)
    flag(group, "--tensorboard", True, "write TensorBoard events")
    return group
