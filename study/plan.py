"""Which runs a transfer study has, with which options, and what stands in their way."""

import argparse
import importlib
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType

from medssl import evaluate_features, finetune_classification, finetune_detection, finetune_segmentation
from medssl.datasets.registry import Opened, open_instances, open_labelled, open_pretraining
from medssl.engine import options
from medssl.engine.parallel import count_gpus
from medssl.engine.runs import refuse_changes, refuse_older
from medssl.errors import InputError
from medssl.files import read_json, split_init
from medssl.models.encoders import DEFAULT_ARCH, arch_of, check_weights
from medssl.reading.tables import list_text
from medssl.study.jobs import Job
from medssl.study.results import Cell


@dataclass(frozen=True)
class Task:
    """What is fine-tuned: the script, what opens its data, the compared number of a trial, and its name."""

    script: ModuleType
    open: Callable[[argparse.Namespace], Opened]
    metric: str
    name: str

    def since(self, dims: int) -> int:
        """As `Segmentation` has it, of data of so many dimensions."""
        return self.script.BY_DIMS[dims].since if self.script is finetune_segmentation else 1


TASKS = {
    "classification": Task(finetune_classification, open_labelled, "auroc", "test AUROC"),
    "segmentation": Task(finetune_segmentation, finetune_segmentation.open_data, "dice", "test Dice"),
    "detection": Task(finetune_detection, open_instances, "ap_box", "test AP of boxes"),
}
METHODS = tuple(sorted(path.stem.removeprefix("train_") for path in Path(__file__).parent.parent.glob("train_*.py")))
SHARED = (  # options of fine-tuning that pre-training and the features take over
    "data", "dataset", "series", "list", "val_list", "test_list", "d", "texture_size", "workers", "worker_timeout",
    "cache", "max_bad", "view", "image_size", "arch", "device", "amp", "amp_dtype", "compile", "deterministic",
)  # fmt: skip


def labels_of(inits: Sequence[str]) -> dict[str, str]:
    """A short name for each init, unlike all others, fit for a folder, a table and a figure."""
    labels = {init: init for init in inits if init in ("random", "imagenet", *METHODS)}
    own = ("random", "imagenet", *METHODS)  # which no file is called, in this study or not

    def parts(path: str) -> tuple[str, ...]:
        # A run's export is called encoder.pt in every run: the folder's name is what tells them apart.
        file, prefix = split_init(path)
        names = Path(file).absolute().with_suffix("").parts[1:]
        names = names[:-1] if names[-1] == "encoder" and len(names) > 1 else names
        return names if prefix is None else (*names[:-1], f"{names[-1]}-{prefix.strip('.')}")

    for init in inits:
        if init in labels:
            continue
        mine = parts(init)
        for n in range(1, len(mine) + 1):
            label = re.sub(r"[^\w.+-]", "-", "_".join(mine[-n:]))
            others = [parts(other)[-n:] for other in inits if other not in own and other != init]
            if mine[-n:] not in others and label not in (*own, *labels.values()):
                break
        number = 2
        while label in (*own, *labels.values()):  # a.pt beside a.pth
            label = f"{label.rpartition('-')[0] if number > 2 else label}-{number}"
            number += 1
        labels[init] = label
    return {init: labels[init] for init in inits}


@dataclass(frozen=True)
class Study:
    """All runs, in the order of their numbers (`--job`), and those of them that are compared."""

    jobs: list[Job]
    cells: list[Cell]
    tasks: tuple[str, ...]

    @property
    def metrics(self) -> dict[str, str]:
        """The compared number of each task, in words."""
        return {task: TASKS[task].name for task in self.tasks}

    @property
    def pretrainings(self) -> int:
        """How many of the jobs, the first ones, are pre-trainings."""
        return len({job.needs.folder for job in self.jobs if job.needs})


def as_words(parser: argparse.ArgumentParser, args: argparse.Namespace, names: Sequence[str], known: set) -> list[str]:
    """Options that were changed from their defaults, as they are typed, for a parser that has those in `known`."""
    words: list[str] = []
    for action in parser._actions:  # of which argparse has no public list
        name, value = action.dest, getattr(args, action.dest, None)
        if name not in names or name not in known or value == parser.get_default(name):
            continue
        option = next(text for text in action.option_strings if text.startswith("--"))
        if isinstance(action, argparse.BooleanOptionalAction):
            words.append(option if value else "--no-" + option[2:])
        elif value is True:
            words.append(option)
        else:
            words += [option, *map(str, value if isinstance(value, list) else [value])]
    return words


def dests(script: ModuleType) -> set[str]:
    """Names of a script's options."""
    return {action.dest for action in script.get_parser()._actions}


def extra_options(args: argparse.Namespace) -> dict[str, list[str]]:
    """What `--with` adds to each kind of run.

    Raises:
        InputError: for a name that is none, or of which the study has no run.
    """
    extra: dict[str, list[str]] = {}
    methods = [init for init in args.init if init in METHODS]
    judged = ["features"] if args.features and "classification" in args.task else []
    for text in args.extra:
        try:
            name, *words = shlex.split(text)
        except ValueError as error:
            raise InputError(f"--with {text}: {error}") from None
        if name not in (*METHODS, *TASKS, "pretraining", "features"):
            raise InputError(f"--with {name}: no method, no task, and neither pretraining nor features")
        if name not in (*methods, *args.task, *judged, *(["pretraining"] if methods else [])):
            raise InputError(f"--with {name}: this study has no such run; leave it out")
        extra.setdefault(name, []).extend(words)
    return extra


@dataclass(frozen=True)
class OpenedTask:
    """A task's options, and its data."""

    args: argparse.Namespace
    data: Opened


def open_tasks(args: argparse.Namespace, rest: Sequence[str]) -> dict[str, OpenedTask]:
    """The data of each task.

    Raises:
        InputError, SystemExit: for data that cannot be used, and options that the study chooses itself.
    """
    opened, extra = {}, extra_options(args)
    for task in args.task:
        parser = TASKS[task].script.get_parser()
        given = parser.parse_args([*rest, *extra.get(task, [])])
        planned = options.changed(parser, given, ("run", "resume", "trials", "output", "init", "annotation_percent"))
        if planned:
            raise InputError(f"{planned[0]}: the study chooses it; leave it out")
        opened[task] = OpenedTask(given, TASKS[task].open(given))
    return opened


def with_network(rest: Sequence[str], args: argparse.Namespace, opened: dict[str, OpenedTask]) -> list[str]:
    """The options of fine-tuning, with the encoder of the files that are compared, or of the protocol, and with the
    protocol's size of images, where these are not the defaults: that all runs, also pre-trainings and those from random
    weights, have the same.

    Args:
        args: the study's.

    Raises:
        InputError: for files of several encoders.
    """
    words, extra = list(rest), extra_options(args)
    for name, task in opened.items():
        typed = TASKS[name].script.get_parser().given([*rest, *extra.get(name, [])])
        plain = argparse.Namespace(**{**vars(task.args), "init": "random"})
        data = task.data["train"] if name == "segmentation" else task.data.info
        own = TASKS[name].script.complete(plain, data, typed)
        dims = task.data.info.dims
        found = {arch_of(init, dims) for init in args.init if init not in METHODS} - {None}
        if len(found) > 1 and "arch" not in typed:
            raise InputError(f"--init: encoders of {' and '.join(sorted(found))}; a study compares one of them")
        arch = next(iter(found), own.arch)
        if "arch" not in typed and {arch, own.arch} != {DEFAULT_ARCH[dims]}:
            task.args.arch = arch
            words += ["--arch", arch]
        side = getattr(own, "image_size", None)
        if own.protocol != "ours" and "image_size" not in typed and side != getattr(task.args, "image_size", None):
            words += ["--image-size", str(side)]
    return words


def held_out(job: Job, opened: dict[str, OpenedTask]) -> Job:
    """A pre-training that sees no image by which a task is judged.

    Class folders and a single list are training images to a pre-training by itself, and are split by a task: those
    that the task trains on, and those without labels, then stand in a list of their own.

    Raises:
        InputError: where nothing is left, or a name that no list can hold.
    """
    args = job.options()
    args.ratio = 1.0  # of the list that is made here
    data = open_pretraining(args)
    same = [task.data for task in opened.values() if task.args.data == args.data]  # elsewhere, names mean others
    judged = [part for splits in same for split, part in splits.items() if split != "train"]
    ids = {name for part in judged for name in part.ids}
    patients = {name for part in judged for name in part.patients or ()}
    known = data.patients or [None] * len(data)
    left = [name for name, patient in zip(data.ids, known) if name not in ids and patient not in patients]
    if len(left) == len(data):
        return job
    if not left:
        raise InputError(f"{job.name}: all its images are validation or test images of {' or '.join(opened)}")
    path = job.folder.with_name(f"{job.folder.name}_images.txt")
    return replace(job, argv=(*job.argv, "--list", str(path)), lists=((path, list_text(left)),))


@dataclass(frozen=True)
class Draft:
    """What a plan is made of.

    Attributes:
        args: the study's options. rest: those of fine-tuning.
        opened: data of the tasks; {} where they are not at hand, and nothing will be run.
    """

    args: argparse.Namespace
    rest: Sequence[str]
    opened: dict[str, OpenedTask]

    @cached_property
    def extra(self) -> dict[str, list[str]]:
        """What `--with` adds to each kind of run."""
        return extra_options(self.args)

    @cached_property
    def labels(self) -> dict[str, str]:
        """A short name for each init."""
        return labels_of(self.args.init)

    @cached_property
    def devices(self) -> list[str]:
        """On what runs compute."""
        here = self.args.jobs == 0 and self.args.gpus  # else each run sees its own GPU alone
        if here:
            return ["--gpus", ",".join(map(str, self.args.gpus))]
        if self.args.gpus:
            return ["--device", "cuda"]
        return ["--gpus", "0"] if count_gpus(None) > 1 else []  # a run has one, also where it could have all

    def options_for(self, script: ModuleType, task: str) -> list[str]:
        """What a script takes over from a task's options."""
        given = TASKS[task].script.get_parser().parse_args([*self.rest, *self.extra.get(task, [])])
        words = as_words(TASKS[task].script.get_parser(), given, SHARED, dests(script)) + self.devices
        if given.dataset is None and task in self.opened:  # each script has a default of its own
            words += ["--dataset", self.opened[task].data.info.name]
        if "--arch" not in words and script.get_parser().get_default("arch"):  # MAGICAL's own is ResNet-50
            words += ["--arch", given.arch or DEFAULT_ARCH[2]]  # what comes in 3D too has none of its own
        return words

    @cached_property
    def pretraining(self) -> dict[str, Job]:
        """The pre-training of each init that is a method."""
        jobs = {}
        for init in self.args.init:
            if init in METHODS:
                script = importlib.import_module(f"medssl.train_{init}")
                words = self.options_for(script, self.args.task[0])
                words += [*self.extra.get("pretraining", []), *self.extra.get(init, [])]
                folder = Path(self.args.output) / "pretraining" / self.labels[init]
                job = Job(f"pre-training of {init}", f"train_{init}", tuple(words), folder, "encoder.pt")
                jobs[init] = held_out(job, self.opened) if self.opened else job
        return jobs

    def started(self, init: str) -> dict:
        """What a job that starts from an init needs."""
        if init in self.pretraining:
            return {"needs": self.pretraining[init], "weights": self.pretraining[init].folder / "encoder.pt"}
        return {} if init in ("random", "imagenet") else {"weights": Path(split_init(init)[0])}

    def value(self, init: str) -> str:
        """An init as scripts take it."""
        return str(self.pretraining[init].folder / "encoder.pt") if init in self.pretraining else init

    def features(self) -> list[Job]:
        """Frozen features of each init."""
        if not self.args.features or "classification" not in self.args.task:
            return []
        words = [*self.options_for(evaluate_features, "classification"), *self.extra.get("features", [])]
        jobs = []
        for init in self.args.init:
            name, argv = f"features of {self.labels[init]}", (*words, "--init", self.value(init))
            folder = Path(self.args.output) / "features" / self.labels[init]
            jobs.append(Job(name, "evaluate_features", argv, folder, "features.json", **self.started(init)))
        return jobs

    def cells(self) -> list[Cell]:
        """Every fine-tuning."""
        made = []
        for task in self.args.task:
            for percent, epochs in zip(self.args.annotation_percent, self.args.epochs):
                for init in self.args.init:
                    words = [*self.rest, *self.devices, *self.extra.get(task, []), "--init", self.value(init)]
                    words += ["--annotation-percent", f"{percent:g}"]
                    words += [] if epochs is None else ["--epochs", str(epochs)]
                    made += [self.cell(task, percent, init, k, words) for k in range(self.args.trials)]
        return made

    def cell(self, task: str, percent: float, init: str, trial: int, words: Sequence[str]) -> Cell:
        """One fine-tuning, with the options `words`."""
        label = self.labels[init]
        folder = Path(self.args.output) / task / f"{percent:g}_percent" / label / f"run_{trial}"
        job = Job(
            f"{task}, {percent:g} % of the labels, {label}, trial {trial}",
            TASKS[task].script.__name__.rpartition(".")[2], (*words, "--run", str(trial)), folder, "results.json",
            **self.started(init),
        )  # fmt: skip
        return Cell(task, percent, label, trial, TASKS[task].metric, job)


def plan(args: argparse.Namespace, rest: Sequence[str], opened: dict[str, OpenedTask]) -> Study:
    """All runs of a study, as `Draft` has its arguments.

    Raises:
        InputError, SystemExit: for options that a script refuses.
    """
    draft = Draft(args, rest, opened)
    cells = draft.cells()
    jobs = [*draft.pretraining.values(), *draft.features(), *(cell.job for cell in cells)]
    return Study(jobs, cells, tuple(args.task))


def check(study: Study, opened: dict[str, OpenedTask]) -> None:
    """Find before the hours of work what cannot work: options, data, results of other options in `--output`.

    Raises:
        InputError, SystemExit: naming it.
    """
    for job in study.jobs:
        job.check()
    starts: dict[tuple[str, str], None] = {}  # weights and encoders, once each
    for cell in study.cells:
        task = opened[cell.task]
        arch = task.args.arch or DEFAULT_ARCH[task.data.info.dims]
        if cell.job.weights and not cell.job.needs:
            starts[cell.job.argv[cell.job.argv.index("--init") + 1], arch] = None
        made = cell.job.needs and cell.job.needs.options().arch
        if made not in (None, arch):
            raise InputError(f"{cell.job.needs.name}: --arch {made}, but {cell.task} has {arch}; give one for both")
        entry = cell.results()
        if entry:
            refuse_other_data(entry["config"], task.data.digest, cell.job)
            since = TASKS[cell.task].since(task.data.info.dims)
            refuse_older(entry["config"], since, cell.job.folder, "or another --output")
    for init, arch in starts:
        check_weights(init, arch)
    for job in study.jobs[: -len(study.cells)]:
        if job.finished():
            job.write_lists()  # those that were removed
            data = (open_pretraining if job.proof == "encoder.pt" else open_labelled)(job.options())
            refuse_other_data(read_json(job.folder / "config.json"), data.digest, job)


def refuse_other_data(before: dict, digest: str, job: Job) -> None:
    """Raise InputError where a finished run, of these settings, saw other data than there are now."""
    known = {"data_digest": before.get("data_digest")}
    refuse_changes(known, {"data_digest": digest}, job.folder, "or another --output")
