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
mean of paired differences, with its standard error, the p of a paired t-test, adjusted for the number of comparisons
(Holm), and how many trials would tell a gain of .01 (of AP, 1). All trials share the test cases, and their differences
say nothing of other cases: the gain's interval is a bootstrap over trials and test cases. Every fine-tuning is a run
of its own: a failed one is shown with its reason, and the rest goes on. Finished runs are kept: the same command
continues, and tries failed ones again.

`--output` gets report.html, one page with all that was found, to open in a browser, send or print; results.csv (a row a
run), comparison.json, comparison.md, comparison.tex, comparison.png; and the runs:
pretraining/METHOD, TASK/P_percent/INIT/run_K, features/INIT, each with job.json and log.txt.

On a cluster: `--slurm` prints a script that submits the study as arrays of jobs; `--job K` runs one of them.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from medssl import errors
from medssl.engine import options
from medssl.engine.parallel import count_gpus
from medssl.errors import InputError
from medssl.locks import own_folder
from medssl.markup import one_line, shell_words
from medssl.study import figures
from medssl.study.jobs import Job, places, run_beside, run_here
from medssl.study.plan import METHODS, TASKS, Study, check, open_tasks, plan, with_network
from medssl.study.report import write_report
from medssl.study.results import write_tables
from medssl.study.slurm import slurm_script


def run(study: Study, args: argparse.Namespace) -> None:
    """Run what is not finished, and write what there is after each run."""
    jobs: list[Job] = []
    done = 0

    def say(job: Job, reason: str | None) -> None:
        nonlocal done
        done += 1
        print(f"[{done}/{len(jobs)}] {job.name}: {outcome(study, job, reason)}", flush=True)
        tidy(study, job, args)
        write_tables(study.cells, study.metrics, Path(args.output))

    with own_folder(args.output):  # which another study may have had until now, and have finished runs
        jobs += [job for job in study.jobs if not job.finished()]
        if args.jobs:
            run_beside(jobs, places(args), say)
        else:
            for job in jobs:
                say(job, run_here(job))


def outcome(study: Study, job: Job, reason: str | None) -> str:
    """How a run ended, in a line."""
    if reason:
        return f"failed: {one_line(reason)}"
    cell = next((cell for cell in study.cells if cell.job is job), None)
    value = cell.results()[cell.metric] if cell else None
    number = f"{TASKS[cell.task].name} {value:.4f}, " if value is not None else ""
    return f"{number}{job.record()['seconds']:.0f} s"


def tidy(study: Study, job: Job, args: argparse.Namespace) -> None:
    """Remove a finished fine-tuning's networks, unless they are wanted."""
    if not args.keep_networks and any(cell.job is job for cell in study.cells) and job.finished():
        for path in job.folder.rglob("best.pt"):
            path.unlink()


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
        help="weights to compare, the first the baseline: random, imagenet, a file (FILE:PREFIX where it has several), "
        f"a model's name in --proxy-dir, or a method, {', '.join(METHODS)}",
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
    running.add_argument(
        "--published", action="store_true", help="beside the results in the report, what papers report of the same set"
    )
    running.add_argument("--keep-networks", action="store_true", help="keep every fine-tuned network (best.pt)")
    running.add_argument("--output", metavar="DIR", default="runs/comparison", help="where the results go")
    return parser


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """The options checked, with one number of epochs for each percentage, and the number of runs at a time."""
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
    return args


def run_one(study: Study, args: argparse.Namespace) -> None:
    """Run the job `--job` in this process; an InputError where it fails."""
    if args.job >= len(study.jobs):
        raise InputError(f"--job {args.job}: the study has the runs 0 to {len(study.jobs) - 1}")
    job = study.jobs[args.job]
    job.check()
    reason = run_here(job)
    tidy(study, job, args)
    if reason:
        raise InputError(f"{job.name}: {reason}")


def main(argv: Sequence[str] | None = None) -> list[dict]:
    argv = sys.argv[1:] if argv is None else list(argv)
    args, rest = get_parser().parse_known_args(argv)
    args, output = complete(args), Path(args.output)
    try:
        opened = open_tasks(args, rest)
    except InputError:
        if not args.tables_only:  # which are written where the data need not be
            raise
        opened = {}
    rest = with_network(rest, args, opened)
    study = plan(args, rest, opened)
    if args.slurm:
        check(study, opened)
        print(slurm_script(study, argv, args.output))
        return []
    if args.job is not None:
        run_one(study, args)
        return []
    output.mkdir(parents=True, exist_ok=True)
    if not args.tables_only:
        check(study, opened)
        run(study, args)
    rows = write_tables(study.cells, study.metrics, output)
    figures.label_efficiency(rows, study.metrics, output / "comparison.png")
    command = shell_words(["python", "compare.py", *(word for word in argv if word != "--tables-only")])
    write_report(output / "report.html", command, study.metrics, rows, study.cells, study.jobs, args.published)
    print(f"\n{(output / 'comparison.md').read_text(encoding='utf-8')}")
    print(f"written: {output}/report.html, results.csv, comparison.md, .tex, .json and .png", flush=True)
    failed = {job: job.record().get("reason") or "has not been run" for job in study.jobs if not job.finished()}
    if len(failed) == len(study.jobs) and len(set(failed.values())) == 1:
        raise InputError(next(iter(failed.values())))
    for job, reason in failed.items():
        print(f"failed: {job.name}: {one_line(reason)}", file=sys.stderr)
    if failed:
        raise SystemExit(1)
    return rows


def cli() -> None:
    errors.run_script(main)


if __name__ == "__main__":
    cli()
