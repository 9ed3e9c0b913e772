"""Does pre-training help? Pre-train, fine-tune from several encoders at several label fractions, and compare in pairs.

  python compare.py --data FILE --dataset pneumoniamnist --init random pcrlv2 OURS/encoder.pt --image-size 64
      --annotation-percent 1 10 100 --trials 5 --output OUT --gpus 0,1
  python compare.py --init random OURS/encoder.pt --annotation-percent 10 --trials 3 --image-size 64 --output OUT
  python compare.py --task segmentation --init random OURS/encoder.pt --annotation-percent 2 --output OUT
  python compare.py --task detection --init random OURS/encoder.pt --annotation-percent 100 --output OUT
  python compare.py --data DIR --dataset lits --task segmentation --d 3 --init random pcrlv2 --annotation-percent 10
      --with "pretraining --epochs 50" --with "segmentation --patch 48 48 48" --output OUT --jobs 2

An `--init` is random, imagenet, a checkpoint file, or a method, which is first pre-trained on the training images,
their labels unseen. Every option that is not listed below goes to finetune_classification.py, finetune_segmentation.py
or finetune_detection.py as it is; those that say what images are and on what to compute also go to pre-training
(`--list`, `--image-size`, `--arch`, `--amp` and the like). `--with "NAME OPTIONS"` adds options for one method, one
task, for `pretraining`, or for `features` (evaluate_features.py, which judges the frozen encoders of classification).

Trial k draws the same labelled images, order and head for every init, so that the gain over the first `--init` is a
mean of paired differences, with its standard error, and the p of a paired t-test, adjusted for the number of
comparisons (Holm). Every fine-tuning is a run of its own: a failed one is shown with its reason, and the rest goes on.
Finished runs are kept: the same command continues, and tries failed ones again.

`--output` gets report.html, one page with all that was found, to open in a browser, send or print; results.csv (a row a
run), comparison.json, comparison.md, comparison.tex, comparison.png; and the runs:
pretraining/METHOD, TASK/P_percent/INIT/run_K, features/INIT, each with job.json and log.txt.

On a cluster: `--slurm` prints a script that submits the study as arrays of jobs; `--job K` runs one of them.
"""

import argparse
import importlib
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType

from medssl import evaluate_features, finetune_classification, finetune_detection, finetune_segmentation
from medssl.datasets.registry import ImageDataset, Info, open_labelled, open_pretraining
from medssl.datasets.segmentation import open_instances, open_segmented
from medssl.engine import options, plots
from medssl.engine.jobs import Job, run_beside, run_here
from medssl.engine.loop import refuse_changes, write_json
from medssl.engine.options import InputError
from medssl.engine.parallel import count_gpus
from medssl.engine.report import read_json, write_report
from medssl.engine.segmentation2d import PROTOCOLS
from medssl.engine.study import Cell, gather, latex, markdown, write_csv
from medssl.models.encoders import DEFAULT_ARCH


@dataclass(frozen=True)
class Task:
    """What is fine-tuned: the script, what opens its data, the compared number of a trial, and its name."""

    script: ModuleType
    open: Callable[[argparse.Namespace], dict[str, ImageDataset]]
    metric: str
    name: str


TASKS = {
    "classification": Task(finetune_classification, open_labelled, "auroc", "test AUROC"),
    "segmentation": Task(finetune_segmentation, partial(open_segmented, protocols=PROTOCOLS), "dice", "test Dice"),
    "detection": Task(finetune_detection, open_instances, "ap_box", "test AP of boxes"),
}
ARRAY = 1000  # runs in an array: by default, SLURM numbers the tasks of one from 0 to 1000
METHODS = tuple(sorted(path.stem.removeprefix("train_") for path in Path(__file__).parent.glob("train_*.py")))
SHARED = (  # options of fine-tuning that pre-training and the features take over
    "data", "dataset", "list", "val_list", "test_list", "d", "texture_size", "workers", "cache", "max_bad", "view",
    "image_size", "arch", "device", "amp", "amp_dtype", "compile", "deterministic",
)  # fmt: skip


def labels_of(inits: Sequence[str]) -> dict[str, str]:
    """A short name for each init, unlike all others, fit for a folder, a table and a figure."""
    labels = {init: init for init in inits if init in ("random", "imagenet", *METHODS)}
    own = ("random", "imagenet", *METHODS)  # which no file is called, in this study or not

    def parts(path: str) -> tuple[str, ...]:
        # A run's export is called encoder.pt in every run: the folder's name is what tells them apart.
        names = Path(path).absolute().with_suffix("").parts[1:]
        return names[:-1] if names[-1] == "encoder" and len(names) > 1 else names

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


# Planning ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Study:
    """All runs, in the order of their numbers (`--job`), and those of them that are compared."""

    jobs: list[Job]
    cells: list[Cell]
    tasks: tuple[str, ...]

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
class Opened:
    """A task's options with the digest of its data, and its splits."""

    args: argparse.Namespace
    splits: dict[str, ImageDataset]

    @property
    def info(self) -> Info:
        """What the data are."""
        return self.splits["train"].info


def open_tasks(args: argparse.Namespace, rest: Sequence[str]) -> dict[str, Opened]:
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
        splits = TASKS[task].open(given)  # which notes their digest
        opened[task] = Opened(given, splits)
    return opened


def held_out(job: Job, opened: dict[str, Opened]) -> Job:
    """A pre-training that sees no image by which a task is judged.

    Class folders and a single list are training images to a pre-training by itself, and are split by a task: those
    that the task trains on, and those without labels, then stand in a list of their own.

    Raises:
        InputError: where nothing is left.
    """
    args = job.options()
    args.ratio = 1.0  # of the list that is made here
    data = open_pretraining(args)
    same = [task.splits for task in opened.values() if task.args.data == args.data]  # elsewhere, names mean others
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
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(left) + "\n", encoding="utf-8")
    return replace(job, argv=(*job.argv, "--list", str(path)))


def plan(args: argparse.Namespace, rest: Sequence[str], opened: dict[str, Opened]) -> Study:
    """All runs of a study.

    Args:
        opened: data of the tasks; {} where they are not at hand, and nothing will be run.

    Raises:
        InputError, SystemExit: for options that a script refuses.
    """
    output, extra = Path(args.output), extra_options(args)
    here = args.jobs == 0 and args.gpus  # else each run sees its own GPU alone
    devices = ["--gpus", ",".join(map(str, args.gpus))] if here else ["--device", "cuda"] if args.gpus else []
    labels = labels_of(args.init)

    def options_for(script: ModuleType, task: str) -> list[str]:
        """What a script takes over from a task's options."""
        parser = TASKS[task].script.get_parser()
        given = parser.parse_args([*rest, *extra.get(task, [])])
        words = [*as_words(parser, given, SHARED, dests(script)), *devices]
        if given.dataset is None and task in opened:  # each script has a default of its own
            words += ["--dataset", opened[task].info.name]
        if "--arch" not in words and script.get_parser().get_default("arch"):  # MAGICAL's own is ResNet-50
            words += ["--arch", given.arch or DEFAULT_ARCH[2]]  # what comes in 3D too has none of its own
        return words

    pretraining = {}
    for init in args.init:
        if init in METHODS:
            script = importlib.import_module(f"medssl.train_{init}")
            words = [*options_for(script, args.task[0]), *extra.get("pretraining", []), *extra.get(init, [])]
            folder = output / "pretraining" / labels[init]
            job = Job(f"pre-training of {init}", f"train_{init}", tuple(words), folder, "encoder.pt")
            pretraining[init] = held_out(job, opened) if opened else job

    def started(init: str) -> dict:
        """What a job that starts from an init needs."""
        if init in pretraining:
            return {"needs": pretraining[init], "weights": pretraining[init].folder / "encoder.pt"}
        return {} if init in ("random", "imagenet") else {"weights": Path(init)}

    def value(init: str) -> str:
        """An init as scripts take it."""
        return str(pretraining[init].folder / "encoder.pt") if init in pretraining else init

    cells = []
    for task in args.task:
        script = TASKS[task].script.__name__.rpartition(".")[2]
        for percent, epochs in zip(args.annotation_percent, args.epochs):
            for init in args.init:
                words = [*rest, *devices, *extra.get(task, []), "--init", value(init)]
                words += ["--annotation-percent", f"{percent:g}"]
                words += [] if epochs is None else ["--epochs", str(epochs)]
                for k in range(args.trials):
                    job = Job(
                        f"{task}, {percent:g} % of the labels, {labels[init]}, trial {k}", script,
                        (*words, "--run", str(k)),
                        output / task / f"{percent:g}_percent" / labels[init] / f"run_{k}", "results.json",
                        **started(init),
                    )  # fmt: skip
                    cells.append(Cell(task, percent, labels[init], k, TASKS[task].metric, job))
    features = []
    if args.features and "classification" in args.task:
        words = [*options_for(evaluate_features, "classification"), *extra.get("features", [])]
        for init in args.init:
            folder, argv = output / "features" / labels[init], (*words, "--init", value(init))
            name = f"features of {labels[init]}"
            features.append(Job(name, "evaluate_features", argv, folder, "features.json", **started(init)))
    return Study([*pretraining.values(), *features, *(cell.job for cell in cells)], cells, tuple(args.task))


def check(study: Study, opened: dict[str, Opened]) -> None:
    """Find before the hours of work what cannot work: options, data, results of other options in `--output`.

    Raises:
        InputError, SystemExit: naming it.
    """
    for job in study.jobs:
        job.check()
    for cell in study.cells:
        task = opened[cell.task]
        arch = task.args.arch or DEFAULT_ARCH[task.info.dims]
        made = cell.job.needs and cell.job.needs.options().arch
        if made not in (None, arch):
            raise InputError(f"{cell.job.needs.name}: --arch {made}, but {cell.task} has {arch}; give one for both")
        entry = cell.results()
        if entry:
            refuse_other_data(entry["config"], task.args, cell.job)
    for job in study.jobs[: -len(study.cells)]:
        if job.finished():
            args_of_one = job.options()
            (open_pretraining if job.proof == "encoder.pt" else open_labelled)(args_of_one)  # which notes the digest
            refuse_other_data(read_json(job.folder / "config.json"), args_of_one, job)


def refuse_other_data(before: dict, args: argparse.Namespace, job: Job) -> None:
    """Raise InputError where a finished run saw other data than there are now."""
    refuse_changes({"data_digest": before.get("data_digest")}, args, job.folder, "or another --output")


# Running -------------------------------------------------------------------------------------------


def places(args: argparse.Namespace) -> list[dict[str, str]]:
    """Environment variables of each of the `--jobs` that run at a time."""
    if args.gpus:
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        if visible and max(args.gpus) >= len(visible):
            raise InputError(f"--gpus {max(args.gpus)}: CUDA_VISIBLE_DEVICES names {len(visible)}")
        names = [visible[gpu] if visible else str(gpu) for gpu in args.gpus]
        return [{"CUDA_VISIBLE_DEVICES": names[i % len(names)]} for i in range(args.jobs)]
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    return [{"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}] * args.jobs


def run(study: Study, args: argparse.Namespace) -> None:
    """Run what is not finished, and write what there is after each run."""
    jobs = [job for job in study.jobs if not job.finished()]
    done = 0

    def say(job: Job, reason: str | None) -> None:
        nonlocal done
        done += 1
        print(f"[{done}/{len(jobs)}] {job.name}: {outcome(study, job, reason)}", flush=True)
        tidy(study, job, args)
        write_tables(study, Path(args.output))

    if args.jobs:
        run_beside(jobs, places(args), say)
    else:
        for job in jobs:
            say(job, run_here(job))


def outcome(study: Study, job: Job, reason: str | None) -> str:
    """How a run ended, in a line."""
    if reason:
        return f"failed: {reason}"
    cell = next((cell for cell in study.cells if cell.job is job), None)
    value = cell.results()[cell.metric] if cell else None
    number = f"{TASKS[cell.task].name} {value:.4f}, " if value is not None else ""
    return f"{number}{job.record()['seconds']:.0f} s"


def tidy(study: Study, job: Job, args: argparse.Namespace) -> None:
    """Remove a finished fine-tuning's networks, unless they are wanted."""
    if not args.keep_networks and any(cell.job is job for cell in study.cells) and job.finished():
        for path in job.folder.rglob("best.pt"):
            path.unlink()


def write_tables(study: Study, output: Path) -> list[dict]:
    """Write results.csv, comparison.json, .md and .tex, and return the rows."""
    rows = gather(study.cells)
    write_csv(study.cells, output / "results.csv")
    write_json(output / "comparison.json", rows)
    for suffix, table, comment in (("md", markdown, "{}"), ("tex", latex, "% {}")):
        parts = []
        for task in study.tasks:
            heading = [comment.format(f"{task}:"), ""] if len(study.tasks) > 1 else []
            own = [row for row in rows if row["task"] == task]
            parts.append("\n".join([*heading, table(own, TASKS[task].name)]))
        (output / f"comparison.{suffix}").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return rows


def slurm_script(study: Study, argv: Sequence[str], output: str) -> str:
    """A shell script that submits all runs: pre-trainings, then all others, then the tables."""
    words = [word for word in argv if word != "--slurm"]
    command = shlex.join([sys.executable, str(Path(__file__).resolve()), *words])
    logs = shlex.quote(str(Path(output).absolute() / "slurm"))
    first, count = study.pretrainings, len(study.jobs)

    def submit(options: str, after: Sequence[str], job: str) -> str:
        waits = f" --dependency=afterany:{':'.join(f'${name}' for name in after)}" if after else ""
        return (
            f"$(sbatch --parsable --output=\"$logs/%A_%a.txt\" {options}{waits} <<'END'\n#!/bin/bash\n"
            f"cd {shlex.quote(os.getcwd())} && exec {command} {job}\nEND\n)"
        )

    lines = [
        "#!/bin/bash",
        f"# {first} pre-trainings, {count - first} other runs, and their tables. Submit with: bash FILE",
        "set -e",
        f"logs={logs}",
        'mkdir -p "$logs"',
        "# what your cluster wants for each run:",
        'each="--gpus=1 --cpus-per-task=8 --mem=32G --time=1-00:00:00 --requeue"',
    ]
    names: list[str] = []
    before: list[str] = []
    for start, end in ((0, first), (first, count)):
        made = []
        for k in range(start, end, ARRAY):
            made.append(f"runs_{len(names) + len(made)}")
            size, job = min(end - k, ARRAY), f"--job $(({k} + $SLURM_ARRAY_TASK_ID))"
            lines.append(f"{made[-1]}={submit(f'$each --array=0-{size - 1}', before, job)}")
        names, before = names + made, made
    lines.append(f"tables={submit('--cpus-per-task=2 --mem=8G --time=1:00:00', before, '--tables-only')}")
    lines.append(f'echo "submitted: {" ".join(f"${name}" for name in (*names, "tables"))}"')
    return "\n".join(lines)


# The command line ----------------------------------------------------------------------------------


def get_parser() -> options.Parser:
    parser = options.Parser(__doc__)
    parser.own_inits += METHODS
    group = parser.add_argument_group("study")
    group.add_argument(
        "--task", nargs="+", choices=tuple(TASKS), default=["classification"], metavar="TASK",
        help=f"what is fine-tuned: {', '.join(TASKS)}",
    )  # fmt: skip
    group.add_argument(
        "--init", nargs="+", default=["random"], metavar="INIT",
        help="weights to compare, the first the baseline: random, imagenet, a file, a model's name in --proxy-dir, or "
        f"a method, {', '.join(METHODS)}",
    )  # fmt: skip
    options.add_proxy_folder(group)
    group.add_argument(
        "--annotation-percent",
        "--annotation_percent",
        nargs="+",
        type=options.bounded_float(1e-6, 100),
        metavar="P",
        default=[1.0, 10.0, 100.0],
        help="percentages of the training labels",
    )
    group.add_argument("--trials", "--trial", type=options.positive_int, default=5, help="paired trials of each")
    group.add_argument(
        "--epochs",
        nargs="+",
        type=options.positive_int,
        metavar="E",
        help="passes over the labels: one number, or one a percentage",
    )
    group.add_argument(
        "--with", action="append", default=[], dest="extra", metavar='"NAME OPTIONS"', type=options.filled,
        help="options for a method, a task, pretraining or features; may be given several times",
    )  # fmt: skip
    running = parser.add_argument_group("running")
    running.add_argument("--gpus", type=options.gpu_list, help="GPU numbers such as 0,1: a run at a time on each")
    running.add_argument(
        "--jobs", type=options.non_negative_int,
        help="runs at a time: as many as --gpus, or 1; 0 runs one after the other in this process",
    )  # fmt: skip
    running.add_argument("--job", type=options.non_negative_int, metavar="K", help="only run K, in this process")
    running.add_argument("--slurm", action="store_true", help="print a script that submits all runs to SLURM, and end")
    running.add_argument("--tables-only", action="store_true", help="run nothing; write the tables of what there is")
    options.flag(running, "--features", True, "judge the frozen encoders of classification too")
    running.add_argument("--keep-networks", action="store_true", help="keep every fine-tuned network (best.pt)")
    running.add_argument("--output", metavar="DIR", default="runs/comparison", help="where the results go")
    return parser


def main(argv: Sequence[str] | None = None) -> list[dict]:
    argv = sys.argv[1:] if argv is None else list(argv)
    args, rest = get_parser().parse_known_args(argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("compare starts its runs itself; start it without torchrun, with --gpus for several")
    options.check_inits(args.init, METHODS)
    if args.gpus and not (args.slurm or args.tables_only):
        count_gpus(args.gpus)  # which says what is not there
    for name in ("task", "annotation_percent"):
        given = getattr(args, name)
        if len(set(given)) < len(given):
            raise InputError(f"--{name.replace('_', '-')}: the same value twice")
    epochs = args.epochs or [None]
    if len(epochs) not in (1, len(args.annotation_percent)):
        raise InputError(
            f"--epochs: {len(epochs)} numbers for {len(args.annotation_percent)} percentages; give 1 or as many"
        )
    args.epochs = epochs * len(args.annotation_percent) if len(epochs) == 1 else epochs
    args.jobs = max(1, len(args.gpus or [])) if args.jobs is None else args.jobs
    output = Path(args.output)
    try:
        opened = open_tasks(args, rest)
    except InputError:
        if not args.tables_only:  # which are written where the data need not be
            raise
        opened = {}
    study = plan(args, rest, opened)
    if args.slurm:
        check(study, opened)
        print(slurm_script(study, argv, args.output))
        return []
    if args.job is not None:
        if args.job >= len(study.jobs):
            raise InputError(f"--job {args.job}: the study has the runs 0 to {len(study.jobs) - 1}")
        job = study.jobs[args.job]
        job.check()
        reason = None if job.finished() else run_here(job)
        tidy(study, job, args)
        if reason:
            raise InputError(f"{job.name}: {reason}")
        return []
    output.mkdir(parents=True, exist_ok=True)
    if not args.tables_only:
        check(study, opened)
        run(study, args)
    rows = write_tables(study, output)
    plots.label_efficiency(rows, {task: TASKS[task].name for task in study.tasks}, output / "comparison.png")
    command = shlex.join(["python", "compare.py", *(word for word in argv if word != "--tables-only")])
    write_report(
        output / "report.html", command, {task: TASKS[task].name for task in study.tasks}, rows, study.cells, study.jobs
    )
    print(f"\n{(output / 'comparison.md').read_text(encoding='utf-8')}")
    print(f"written: {output}/report.html, results.csv, comparison.md, .tex, .json and .png", flush=True)
    failed = {job: job.record().get("reason") or "has not been run" for job in study.jobs if not job.finished()}
    if len(failed) == len(study.jobs) and len(set(failed.values())) == 1:
        raise InputError(next(iter(failed.values())))
    for job, reason in failed.items():
        print(f"failed: {job.name}: {reason}", file=sys.stderr)
    if failed:
        raise SystemExit(1)
    return rows


def cli() -> None:
    options.run_script(main)


if __name__ == "__main__":
    cli()
