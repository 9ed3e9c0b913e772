"""A laboratory: questions about pre-training, each with a budget, seeds and a measure that stand before it is run.

  python benchmarks/lab.py --data ../data --hours 2
  python benchmarks/lab.py --data ../data --tables
  python benchmarks/lab.py --questions MINE.py

The questions, in order of their value, are those of `questions.py`, or `QUESTIONS` of another file of Python. Of each,
init by init, random weights first: the init is pre-trained; where asked, its frozen features are judged; learning rate
and length of its fine-tuning are searched, over as many values for each, by the validation of seeds that no trial has.
Then trials are run with what was chosen, in pairs with those from random weights, on the same labelled images.

Every run continues after an interruption, and its row is written as it ends, to `--rows`, a line of JSON each. A run
that has its row is not run again, also where its folder is gone. Hours that are left are told from the rows.
"""

import importlib
import json
import runpy
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from pathlib import Path

import numpy as np

from medssl import compare, evaluate_features
from medssl.benchmarks.machine import describe_machine
from medssl.benchmarks.questions import QUESTIONS, Question
from medssl.engine import options
from medssl.errors import InputError, run_script
from medssl.files import append_text, read_json, read_lines
from medssl.locks import own_folder
from medssl.study.jobs import Job, places, run_beside
from medssl.study.plan import TASKS, Draft, held_out, open_tasks, with_network
from medssl.study.results import Cell, gather, markdown

MEASURES = ("value", "val_score", "validation", "probe", "knn", "seconds")  # that a run's line tells
PLACES = ("--data", "--list", "--init", "--output")
SEARCH = 1000  # the first seed of the search, far from those of trials


class Rows:
    """What runs gave, a line of JSON each: of one question, stage, init, percent, rate, length, run and seed."""

    KEY = ("question", "stage", "init", "percent", "rate", "length", "run", "seed")

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, {}
        for row in read_lines(path) if path.exists() else []:
            self.rows[tuple(row[name] for name in self.KEY)] = row

    def add(self, row: dict) -> None:
        """Keep a row, and write it."""
        self.rows[tuple(row[name] for name in self.KEY)] = row
        append_text(self.path, json.dumps(row) + "\n")

    def of(self, question: str, run: "Run") -> dict | None:
        """The row of a run.

        Raises:
            InputError: where it is of a run with other options.
        """
        row = self.rows.get((question, *key_of(run).values()))
        if row and own_words(row["options"]) != own_words(run.job.command):
            raise InputError(
                f"{self.path}: {question}: {run.job.name}: was run with other options; rename the question"
            )
        return row

    def find(self, **wanted: object) -> list[dict]:
        """Rows that have the wanted values."""
        return [row for row in self.rows.values() if all(row[name] == value for name, value in wanted.items())]


@dataclass(frozen=True)
class Run:
    """A run of the laboratory: its job, and the values of `Rows.KEY` less the question's name."""

    job: Job
    stage: str
    init: str
    percent: float | None = None
    rate: float | None = None
    length: int | None = None
    run: int | None = None
    seed: int | None = None


class Plan:
    """All runs of a question.

    Args:
        data: what {data} stands for. output: a folder for all runs. jobs: runs at a time.
    """

    def __init__(self, question: Question, data: str, output: Path, jobs: int) -> None:
        self.question, self.folder = question, output / question.name
        words = ["--task", question.task, "--init", "random", "--annotation-percent", *map(str, question.percents)]
        words += ["--no-features", "--jobs", str(jobs), "--output", str(self.folder)]
        words += shlex.split(question.options.format(data=data))
        args, rest = compare.get_parser().parse_known_args(words)
        args = compare.complete(args)
        self.opened = open_tasks(args, rest)
        self.draft = Draft(args, with_network(rest, args, self.opened), self.opened)
        self.places = places(args)

    @property
    def others(self) -> list[str]:
        """Inits but random weights."""
        return [init for init, words in self.question.inits.items() if words]

    @cached_property
    def pretrainings(self) -> dict[tuple[str, int], Run]:
        """The pre-training of each init and seed; it sees no image by which fine-tuning is judged. Inits of the same
        words, which differ in fine-tuning, share the first one's."""
        made: dict[tuple[str, int], Run] = {}
        for seed, init in product(range(self.question.pretrained), self.others):
            first = next(other for other in self.others if self.question.inits[other] == self.question.inits[init])
            made[init, seed] = made[first, seed] if first != init else self.pretraining(init, seed)
        return made

    def pretraining(self, init: str, seed: int) -> Run:
        """One of them."""
        method, *words = shlex.split(self.question.inits[init])
        script = importlib.import_module(f"medssl.train_{method}")
        words = [*self.draft.options_for(script, self.question.task), *words, "--seed", str(seed)]
        folder, name = self.folder / "pretraining" / f"{init}_{seed}", f"{init}, pre-training {seed}"
        job = Job(name, f"train_{method}", tuple(words), folder, "encoder.pt")
        return Run(held_out(job, self.opened), "pretraining", init, seed=seed)

    def tuning(self, stage: str, init: str, percent: float, rate: float, length: int, run: int, seed: int) -> Run:
        """A fine-tuning; `run` is its seed, `seed` that of the pre-training."""
        before = self.pretrainings[init, seed].job if init in self.others else None
        start = {"needs": before, "weights": before.folder / "encoder.pt"} if before else {}
        words = [*self.draft.rest, *self.draft.devices, *shlex.split(self.question.tuning.get(init, ""))]
        words += ["--init", str(start.get("weights", "random")), "--annotation-percent", f"{percent:g}"]
        words += ["--lr", f"{rate:g}", self.question.length, str(length), "--run", str(run)]
        name = f"{init}_{seed}" if before else init
        folder = self.folder / stage / f"{percent:g}_percent" / name / f"lr_{rate:g}_length_{length}_run_{run}"
        module = TASKS[self.question.task].script.__name__.rpartition(".")[2]
        title = f"{stage}, {percent:g} %, {name}, rate {rate:g}, length {length}, run {run}"
        job = Job(title, module, tuple(words), folder, "results.json", **start)
        return Run(job, stage, init, percent, rate, length, run, seed if before else None)

    def features(self) -> list[Run]:
        """The frozen features of each init and seed, where they are asked for."""
        made = []
        for seed, init in product(
            range(self.question.pretrained), self.question.inits if self.question.features else ()
        ):
            before = self.pretrainings[init, seed].job if init in self.others else None
            start = {"needs": before, "weights": before.folder / "encoder.pt"} if before else {}
            words = [*self.draft.options_for(evaluate_features, self.question.task), "--seed", str(seed)]
            words += ["--init", str(start.get("weights", "random"))]
            folder, name = self.folder / "features" / f"{init}_{seed}", f"features of {init}, seed {seed}"
            job = Job(name, "evaluate_features", tuple(words), folder, "features.json", **start)
            made.append(Run(job, "features", init, seed=seed))
        return made

    def searches(self) -> list[Run]:
        """Every point of the search, random weights first."""
        own, made = self.question, []
        for init, percent in product(own.inits, own.percents):
            points = product(own.rates, own.lengths, range(SEARCH, SEARCH + own.searched))
            made += [self.tuning("search", init, percent, rate, length, run, 0) for rate, length, run in points]
        return made

    def trials(self, rows: Rows) -> list[Run]:
        """Every trial, with the rate and length that the search chose: trial by trial, that pairs end together."""
        own, made = self.question, []
        for seed, trial, percent, init in product(range(own.pretrained), range(own.trials), own.percents, own.inits):
            rate, length = chosen(own, rows, init, percent)
            made.append(self.tuning("trial", init, percent, rate, length, seed * own.trials + trial, seed))
        return made

    def cells(self, runs: Sequence[Run]) -> list[Cell]:
        """Trials as `gather` has them."""
        task = self.question.task
        order = sorted(runs, key=lambda run: (run.percent, list(self.question.inits).index(run.init), run.run))
        return [Cell(task, run.percent, run.init, run.run, TASKS[task].metric, run.job) for run in order]


def chosen(question: Question, rows: Rows, init: str, percent: float) -> tuple[float, int]:
    """The rate and length with the best mean validation over the search's seeds; the first of equals.

    Raises:
        InputError: where the search is not finished.
    """
    found: dict[tuple[float, int], list[float]] = {}
    for row in rows.find(question=question.name, stage="search", init=init, percent=percent):
        found.setdefault((row["rate"], row["length"]), []).append(row["val_score"])
    points = list(product(question.rates, question.lengths))
    short = [point for point in points if len(found.get(point, [])) < question.searched]
    if short:
        raise InputError(f"{question.name}: the search of {init} at {percent:g} % is not finished: {short[0]}")
    return max(points, key=lambda point: np.mean(found[point]))


# Running -------------------------------------------------------------------------------------------


class Laboratory:
    """Runs what has no row yet.

    Args:
        hours: after which no run begins, and those that run save their state and end.
    """

    def __init__(self, rows: Rows, hours: float) -> None:
        self.rows, self.until = rows, time.monotonic() + 3600 * hours

    def run(self, plan: Plan) -> None:
        """Run what is left of a question.

        Raises:
            SystemExit: when the time is over.
        """
        order = list(plan.question.inits).index
        runs = [*plan.pretrainings.values(), *plan.features(), *plan.searches()]
        self.run_those(plan, sorted(runs, key=lambda run: order(run.init)))  # weights are used while they are there
        self.run_those(plan, plan.trials(self.rows))

    def run_those(self, plan: Plan, runs: Sequence[Run]) -> None:
        """Run those without a row, and the pre-trainings that they need, whose files may be gone."""
        name = plan.question.name
        left = [run for run in runs if not self.rows.of(name, run)]
        pretrained = {run.job.folder: run for run in plan.pretrainings.values()}
        pending: dict[Job, Run] = {}
        for run in left:
            before = [pretrained[run.job.needs.folder]] if run.job.needs else []
            pending |= {each.job: each for each in (*before, run) if not each.job.finished()}
        for run in left:
            if run.job.finished():
                self.note(plan, run)
        print(f"{name}: {len(pending)} runs, {hours_left(self.rows, pending.values(), len(plan.places))}", flush=True)
        run_beside(list(pending), plan.places, partial(self.say, plan, pending))

    def say(self, plan: Plan, pending: dict[Job, Run], job: Job, reason: str | None) -> None:
        """Note a run that has ended."""
        run = pending.pop(job)
        left = hours_left(self.rows, pending.values(), len(plan.places))
        if reason:
            print(f"{job.name}: failed: {reason}", flush=True)
        else:
            print(f"{job.name}: {self.note(plan, run)}; {len(pending)} runs, {left}", flush=True)
        if time.monotonic() > self.until:
            raise SystemExit(f"the time is over; {left}; the same command continues")

    def note(self, plan: Plan, run: Run) -> str:
        """Write a finished run's row; returns its numbers in words."""
        row = {"question": plan.question.name, **key_of(run), **measured(plan, run)}
        said = ", ".join(f"{name} {row[name]:.4g}" for name in MEASURES if name in row)
        machine = describe_machine()
        row |= {"options": run.job.command, "cpu": machine["cpu"], "gpu": machine["gpu"]}
        row |= {"torch": machine["packages"].get("torch"), "commit": machine["commit"], "date": machine["date"][:10]}
        if not self.rows.of(plan.question.name, run):
            self.rows.add(row)
        return said


def measured(plan: Plan, run: Run) -> dict:
    """A finished run's numbers. Of a search, none of the test cases', which nothing may be chosen by."""
    if run.stage == "pretraining":
        return {"seconds": run.job.record()["seconds"]}
    metric = TASKS[plan.question.task].metric
    if run.stage == "features":
        entry = read_json(run.job.folder / "features.json")["results"][0]
        known = {
            "validation": entry["probe"]["validation"][metric],
            **{name: entry[name][metric] for name in ("probe", "knn")},
        }
        return {"seconds": run.job.record()["seconds"], **known}
    entry = Cell(plan.question.task, run.percent, run.init, run.run, metric, run.job).results()
    row = {"seconds": run.job.record()["seconds"], "val_score": entry["val_score"], "images": entry["train_images"]}
    return row | ({"value": entry[metric]} if run.stage == "trial" else {})


def own_words(command: str) -> list[str]:
    """A command less its places, which differ between machines."""
    words = shlex.split(command)
    return [word for before, word in zip(["", *words], words) if not {before, word} & set(PLACES)]


def key_of(run: Run) -> dict:
    """A run's values of `Rows.KEY` but the question's name."""
    return {name: getattr(run, name) for name in Rows.KEY[1:]}


def hours_left(rows: Rows, runs: Sequence[Run], beside: int) -> str:
    """How long runs will take, by what those of their kind took; in words."""
    known: dict[tuple, list[float]] = {}
    for row in rows.rows.values():
        known.setdefault((row["stage"] == "pretraining", row["init"], row["length"]), []).append(row["seconds"])
    everything = [seconds for part in known.values() for seconds in part]
    if not runs or not everything:
        return "nobody knows how long" if runs else "none left"
    guess = np.mean(everything)
    seconds = sum(np.mean(known.get((run.stage == "pretraining", run.init, run.length), guess)) for run in runs)
    return f"about {seconds / beside / 3600:.1f} hours left"


# Answers -------------------------------------------------------------------------------------------


def answer(plan: Plan, rows: Rows) -> str:
    """What is known of a question so far, as Markdown: frozen features; what the search chose, and what longer training
    is worth there; then the trials whose predictions are there."""
    own = plan.question
    lines = [f"## {own.name}", "", own.asks, "", *features_table(own, rows)]
    if not own.rates:
        return "\n".join(lines)
    lines += search_table(own, rows)
    try:
        cells = [cell for cell in plan.cells(plan.trials(rows)) if cell.job.finished()]
    except InputError as error:  # what is searched for is not known yet
        return "\n".join([*lines, "", str(error)])
    if cells:
        lines += ["", markdown(gather(cells), TASKS[own.task].name)]
    return "\n".join(lines)


def features_table(own: Question, rows: Rows) -> list[str]:
    """Probe and neighbours of each init, and by how much they are better than random weights', seed by seed; lines of
    Markdown. Of several inits the validation chooses: the best on the test images is better there than elsewhere."""
    if not own.features:
        return []
    lines = ["| init | linear probe, validation | gain | linear probe, test | gain | nearest neighbours, test | gain |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    found = {row["init"]: {} for row in rows.find(question=own.name, stage="features")}
    for row in rows.find(question=own.name, stage="features"):
        found[row["init"]][row["seed"]] = row
    base = found.get("random", {})
    for init in filter(found.get, own.inits):
        cells = []
        for name in ("validation", "probe", "knn"):
            values = {seed: row[name] for seed, row in found[init].items()}
            pairs = [value - base[seed][name] for seed, value in values.items() if seed in base]
            cells += [mean_of(list(values.values())), "" if init == "random" else mean_of(pairs, "+")]
        lines.append(f"| {init} | {' | '.join(cells)} |")
    return [*lines, ""]


def search_table(own: Question, rows: Rows) -> list[str]:
    """What the search chose; lines of Markdown."""
    lines = [f"| labels | init | rate | length | validation with each length ({own.length}) | gain |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    for percent in own.percents:
        base: dict[int, float] = {}
        for init in own.inits:
            try:
                rate, length = chosen(own, rows, init, percent)
            except InputError:
                lines.append(f"| {percent:g} % | {init} | | | not finished | |")
                continue
            same = rows.find(question=own.name, stage="search", init=init, percent=percent, rate=rate)
            by_length = {n: {row["run"]: row["val_score"] for row in same if row["length"] == n} for n in own.lengths}
            base = by_length[length] if init == "random" else base
            gain = "" if init == "random" else mean_of([by_length[length][run] - base[run] for run in base], "+")
            means = ", ".join(f"{n}: {mean_of(list(values.values()))}" for n, values in by_length.items())
            lines.append(f"| {percent:g} % | {init} | {rate:g} | {length} | {means} | {gain} |")
    return lines


def mean_of(values: Sequence[float], sign: str = "") -> str:
    """Mean and standard error in words."""
    return f"{np.mean(values):{sign}.4f} ± {error_of(values):.4f}" if values else ""


def error_of(values: Sequence[float]) -> float:
    """The standard error of a mean; 0 of one value."""
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0


def read_questions(path: str) -> list[Question]:
    """The questions of a file, which is run.

    Raises:
        InputError: where it has none, or two of a name.
    """
    if not Path(path).is_file():
        raise InputError(f"--questions {path}: no such file")
    found = runpy.run_path(path).get("QUESTIONS")
    if not found or not all(isinstance(question, Question) for question in found):
        raise InputError(f"--questions {path}: makes no QUESTIONS, a list of medssl.benchmarks.questions.Question")
    names = [question.name for question in found]
    if len(set(names)) < len(names):
        raise InputError(f"--questions {path}: two questions of one name")
    return found


def get_parser() -> options.Parser:
    parser = options.Parser(__doc__)
    here = Path(__file__).resolve().parent
    group = parser.add_argument_group("questions")
    group.add_argument("--questions", metavar="FILE", help="what to find out; else those of the project")
    group.add_argument("--only", nargs="+", metavar="NAME", default=[], help="these questions alone")
    group.add_argument("--data", metavar="DIR", default=".", help="what {data} stands for in the questions")
    group.add_argument("--tables", action="store_true", help="run nothing; print what is known")
    group = parser.add_argument_group("running")
    group.add_argument("--hours", type=float, default=1e9, help="after which no run begins")
    group.add_argument("--jobs", type=options.positive_int, default=2, help="runs at a time")
    group.add_argument("--rows", metavar="FILE", default=str(here / "results" / "lab.jsonl"), help="what runs gave")
    group.add_argument("--output", metavar="DIR", default="runs/lab", help="of the runs")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    questions = read_questions(args.questions) if args.questions else QUESTIONS
    unknown = set(args.only) - {question.name for question in questions}
    if unknown:
        raise InputError(f"--only {min(unknown)}: no such question; there are {', '.join(q.name for q in questions)}")
    rows = Rows(Path(args.rows))
    laboratory = Laboratory(rows, args.hours)
    Path(args.output).mkdir(parents=True, exist_ok=True)
    with own_folder(args.output):
        for question in questions:
            if args.only and question.name not in args.only:
                continue
            plan = Plan(question, args.data, Path(args.output), args.jobs)
            if not args.tables:
                laboratory.run(plan)
            print(f"\n{answer(plan, rows)}\n", flush=True)


if __name__ == "__main__":
    run_script(main)
