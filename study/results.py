"""What a transfer study found: values of all its runs, paired comparisons with the first init, and tables of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from scipy import stats

from medssl.errors import unusable
from medssl.files import read_json, write_csv, write_json, write_text
from medssl.markup import latex_text, markdown_text
from medssl.study.intervals import CONFIDENCE, DAMAGED, MOST_TRIALS, Judged, trials_for, two_way_interval
from medssl.study.jobs import Job
from medssl.tasks.metrics import mean_of

JUDGED = {"auroc": ("predictions.csv", Judged.of_classes), "dice": ("predictions/cases.csv", Judged.of_cases)}
COLUMNS = (
    "task", "percent", "images", "init", "trial", "status", "metric", "value", "val_score", "matched_keys", "seconds",
    "reason",
)  # fmt: skip
MEASURES = {  # other numbers of a trial in results.json ("box.ap50": "ap50" of "box"), in words, and their decimals
    "auroc": ("AUROC", 3), "accuracy": ("accuracy", 3), "f1": ("F1", 3), "cpm": ("CPM", 3),
    "sensitivity": ("sensitivity", 3), "specificity": ("specificity", 3), "cldice": ("clDice", 3),
    "pooled_dice": ("Dice of all pixels, %", 1), "hd95": ("95 % Hausdorff distance", 1),
    "box.ap50": ("boxes, AP50", 1), "box.ap75": ("boxes, AP75", 1),
    "ap_mask": ("masks, AP", 1), "mask.ap50": ("masks, AP50", 1), "mask.ap75": ("masks, AP75", 1),
}  # fmt: skip


@cache
def read_once(path: Path, _changed: int) -> dict:
    """A JSON file's content, read once until it changes: tables of hundreds of runs are written after each run."""
    return read_json(path)


@dataclass(frozen=True)
class Cell:
    """One fine-tuning of a study: trial `trial` from `init` (its short name) with `percent` % of the labels of `task`,
    whose results.json calls the compared number `metric`."""

    task: str
    percent: float
    init: str
    trial: int
    metric: str
    job: Job

    def results(self) -> dict | None:
        """The only entry of its results.json's trials, with "device", "versions" and "config", "dataset" and, of newer
        runs, "protocol"; None before it ended."""
        if not self.job.finished():
            return None
        path = self.job.folder / "results.json"
        results = read_once(path, path.stat().st_mtime_ns)
        with unusable(path, DAMAGED):
            (trial,) = results["trials"]
            more = ("device", "versions", "config", "dataset", "protocol")
            entry = {**trial, **{key: results[key] for key in more if key in results}}
            check_entry(entry, self.metric)
            return entry

    def judged(self) -> tuple[Path, int] | None:
        """Its predictions of the test cases, and when they were written; None where they are not kept."""
        path = self.job.folder / JUDGED[self.metric][0] if self.metric in JUDGED else None
        return (path, path.stat().st_mtime_ns) if path and path.exists() else None

    def reason(self) -> str | None:
        """Why there is no value, or None."""
        if not self.job.finished():
            return self.job.record().get("reason") or "has not been run"
        if value_of(self.results(), self.metric) is None:
            return f"{self.metric} is undefined: the test split has one class, or no structure"
        return None


def check_entry(entry: dict, metric: str) -> None:
    """Raise whatever tables and reports would, for a trial whose results.json is not as a run wrote it."""
    value_of(entry, metric)
    per_class([entry])
    if not (isinstance(entry["device"], str) and isinstance(entry["config"], dict)):
        raise TypeError("device or config")
    numbers = (
        entry["seconds"], entry["train_images"], entry["start"]["missing"], entry.get("best_epoch", 0),
        entry["config"]["epochs"] if "best_epoch" in entry else 0,
    )  # fmt: skip
    if not all(isinstance(number, int | float) for number in numbers) or not isinstance(
        entry["versions"]["torch"], str
    ):
        raise TypeError("numbers or versions")


def value_of(entry: dict, metric: str) -> float | None:
    """The compared number of a trial, or None where it is undefined or not finite."""
    value = entry[metric]
    return None if value is None or not math.isfinite(value) else value


# Statistics ----------------------------------------------------------------------------------------


def paired_gain(values: Sequence[float], baseline: Sequence[float]) -> tuple[float, float | None]:
    """Mean of the differences trial by trial, and its standard error (None for one trial)."""
    difference = np.subtract(values, baseline)
    if len(difference) < 2:
        return float(difference.mean()), None
    return float(difference.mean()), float(difference.std(ddof=1) / math.sqrt(len(difference)))


def paired_test(values: Sequence[float], baseline: Sequence[float]) -> float | None:
    """Two-sided p of Student's t-test of the paired differences; None for fewer than two, or where all are equal."""
    difference = np.subtract(values, baseline)
    if len(difference) < 2 or np.ptp(difference) < 1e-12:
        return None
    return float(stats.ttest_rel(values, baseline).pvalue)


def holm(probabilities: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm, 1979): the k-th smallest of m times m − k + 1, never falling."""
    order, adjusted, largest = np.argsort(probabilities), [0.0] * len(probabilities), 0.0
    for k, i in enumerate(order):
        largest = max(largest, min(1.0, float(probabilities[i]) * (len(order) - k)))
        adjusted[i] = largest
    return adjusted


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % confidence interval of a mean, by Student's t; None for fewer than two values."""
    if len(values) < 2:
        return None
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return float(np.mean(values) - half), float(np.mean(values) + half)


@cache
def interval_of_gain(
    metric: str, mine: tuple[tuple[Path, int], ...], its: tuple[tuple[Path, int], ...]
) -> tuple[float, float] | None:
    """`two_way_interval` of runs' predictions, made once until these change: tables are written after each run."""
    read = JUDGED[metric][1]
    return two_way_interval(*([read(path) for path, _ in part] for part in (mine, its)))


# Gathering -----------------------------------------------------------------------------------------


def gather(cells: Sequence[Cell]) -> list[dict]:
    """One row for each task, share of labels and init, in the cells' order.

    Numbers of a row are over the trials that have a value ("values" has None for others, "failures" their reasons);
    its comparison with the first init of its task and share is over the trials that both have. "p" is the paired
    t-test's, "p_adjusted" Holm's over all comparisons of the task; "gain_interval" is over trials and test cases, and
    "trials_needed" are those that would tell `least_gain`.
    """
    groups: dict[tuple, list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.task, cell.percent, cell.init), []).append(cell)
    rows, first = [], {}
    for (task, percent, init), own in groups.items():
        entries = [cell.results() for cell in own]
        values = [value_of(entry, cell.metric) if entry else None for cell, entry in zip(own, entries)]
        known = [value for value in values if value is not None]
        done = [entry for entry in entries if entry]
        baseline, its_cells = first.setdefault((task, percent), (values, own))
        row = {
            "task": task, "percent": percent, "init": init, "metric": own[0].metric,
            "file": own[0].job.argv[own[0].job.argv.index("--init") + 1],
            "images": done[0]["train_images"] if done else None,
            "values": values, "trials": len(known), "mean": mean_of(known),
            "std": float(np.std(known, ddof=1)) if len(known) > 1 else None, "interval": interval(known),
            "gain": None, "standard_error": None, "better": None, "pairs": 0, "p": None, "p_adjusted": None,
            "gain_interval": None, "trials_needed": None,
            "failures": {cell.trial: cell.reason() for cell in own if cell.reason()},
            "per_class": per_class(done), "measures": join_measures(done, own[0].metric),
            "seconds": sum(entry["seconds"] for entry in done),
            "versions": done[0]["versions"] if done else None, "device": done[0]["device"] if done else None,
        }  # fmt: skip
        pairs = [(a, b) for a, b in zip(values, baseline) if None not in (a, b)]
        if baseline is not values and pairs:
            mine, its = zip(*pairs)
            row["gain"], row["standard_error"] = paired_gain(mine, its)
            row["p"], row["pairs"] = paired_test(mine, its), len(pairs)
            row["better"] = int(np.sum(np.greater(mine, its)))
            row |= how_sure(own, its_cells, mine, its)
        rows.append(row)
    for task in {row["task"] for row in rows}:
        tested = [row for row in rows if row["task"] == task and row["p"] is not None]
        for row, p in zip(tested, holm([row["p"] for row in tested])):
            row["p_adjusted"] = p
    return rows


def how_sure(own: Sequence[Cell], its: Sequence[Cell], values: Sequence[float], baseline: Sequence[float]) -> dict:
    """ "gain_interval" and "trials_needed" of a row, of the trials that both inits have."""
    pairs = [(a, b) for a, b in zip(own, its) if not (a.reason() or b.reason())]
    kept = [(a.judged(), b.judged()) for a, b in pairs]
    found = {"gain_interval": None, "trials_needed": None}
    if all(None not in pair for pair in kept):
        found["gain_interval"] = interval_of_gain(own[0].metric, *map(tuple, zip(*kept)))
    if len(values) > 1:
        deviation = float(np.subtract(values, baseline).std(ddof=1))
        found["trials_needed"] = trials_for(deviation, least_gain(own[0].metric))
    return found


def per_class(entries: Sequence[dict]) -> dict[str, float | None]:
    """Mean over trials of the AUROC of each class, or the Dice of each region; {} for detection, of one class."""
    names = entries[0].get("per_class", {}) if entries else {}
    key = "auroc" if any("interval" in value for value in names.values()) else "dice"
    return {name: mean_of(entry["per_class"][name][key] for entry in entries) for name in names}


def measures_of(entry: dict, metric: str) -> dict[str, float]:
    """Those of `MEASURES` that a trial has, but the compared one."""
    found = {}
    for key in MEASURES:
        value = entry
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        # In 3D classification, "sensitivity" has one for each rate.
        if key != metric and isinstance(value, float) and math.isfinite(value):
            found[key] = value
    return found


def join_measures(entries: Sequence[dict], metric: str) -> dict[str, dict[str, float | None]]:
    """Mean and standard deviation over the trials of each of `measures_of`."""
    known: dict[str, list[float]] = {}
    for entry in entries:
        for key, value in measures_of(entry, metric).items():
            known.setdefault(key, []).append(value)
    return {
        key: {"mean": mean_of(values), "std": float(np.std(values, ddof=1)) if len(values) > 1 else None}
        for key, values in known.items()
    }


def best_of(rows: Sequence[dict], row: dict) -> bool:
    """Whether a row has the highest mean of its task and share of labels, among those of which most trials ended well:
    the mean of a lucky one is no rival."""
    rivals = [r for r in rows if (r["task"], r["percent"]) == (row["task"], row["percent"])]
    most = max(r["trials"] for r in rivals)
    return row["trials"] == most > 0 and row["mean"] == max(r["mean"] for r in rivals if r["trials"] == most)


# Tables --------------------------------------------------------------------------------------------

HEADER = (
    "labels", "images", "init", "{metric} (mean ± std)", "paired gain over {first} (± standard error)",
    "95 % interval over trials and cases", "p", "trials better", "trials that tell {least:g}",
)  # fmt: skip


def digits(row: dict) -> int:
    """Decimals: COCO's AP is from 0 to 100, other numbers from 0 to 1."""
    return 1 if row["metric"].startswith("ap_") else 3


def least_gain(metric: str) -> float:
    """A gain that is worth telling from chance."""
    return 1.0 if metric.startswith("ap_") else 0.01


def in_words(p: float | None) -> str:
    """A p-value as people write it."""
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def cells_of(row: dict, minus: str = "-") -> list[str]:
    """A row's texts under HEADER."""
    n = digits(row)
    if row["mean"] is None:
        mean = "failed"
    else:
        mean = f"{row['mean']:.{n}f}" + ("" if row["std"] is None else f" ± {row['std']:.{n}f}")
    gain = better = interval_text = needed = "–"
    if row["gain"] is not None:
        gain = f"{row['gain']:+.{n}f}".replace("-", minus)
        gain += "" if row["standard_error"] is None else f" ± {row['standard_error']:.{n}f}"
        better = f"{row['better']} of {row['pairs']}"
        needed = "–" if row["pairs"] < 2 else str(row["trials_needed"] or f"> {MOST_TRIALS}")
    if row["gain_interval"] is not None:
        interval_text = " to ".join(f"{end:+.{n}f}".replace("-", minus) for end in row["gain_interval"])
    images = "–" if row["images"] is None else str(row["images"])
    p = in_words(row["p_adjusted"])
    return [f"{row['percent']:g} %", images, row["init"], mean, gain, interval_text, p, better, needed]


def header_of(row: dict, metric: str) -> list[str]:
    """HEADER for a task whose first row is `row`."""
    return [text.format(metric=metric, first=row["init"], least=least_gain(row["metric"])) for text in HEADER]


def markdown(rows: Sequence[dict], metric: str) -> str:
    """The table of one task; `metric` in words."""
    texts = [header_of(rows[0], metric), *map(cells_of, rows)]
    header, *lines = ["| " + " | ".join(map(markdown_text, line)) + " |" for line in texts]
    return "\n".join([header, "| " + " | ".join(["---"] * len(HEADER)) + " |", *lines])


def latex(rows: Sequence[dict], metric: str) -> str:
    """The table of one task for booktabs, the best mean of each share of labels in bold."""
    lines = []
    for i, row in enumerate(rows):
        if i and row["percent"] != rows[i - 1]["percent"]:
            lines.append(r"\midrule")
        texts = [latex_text(text) for text in cells_of(row, minus="−")]
        if best_of(rows, row):
            texts[3] = rf"\textbf{{{texts[3]}}}"
        lines.append(" & ".join(texts) + r" \\")
    header = " & ".join(map(latex_text, header_of(rows[0], metric))) + r" \\"
    start = [r"% needs \usepackage{booktabs}", r"\begin{tabular}{rrllllrrr}", r"\toprule", header, r"\midrule"]
    return "\n".join([*start, *lines, r"\bottomrule", r"\end{tabular}"])


def write_runs(cells: Sequence[Cell], path: Path) -> None:
    """One row a run; after `COLUMNS`, those of `MEASURES` that a run has."""
    entries = [cell.results() or {} for cell in cells]
    others = [measures_of(entry, cell.metric) for cell, entry in zip(cells, entries)]
    columns = (*COLUMNS, *(key for key in MEASURES if any(key in other for other in others)))
    rows = []
    for cell, entry, other in zip(cells, entries, others):
        row = {key: getattr(cell, key) for key in ("task", "percent", "init", "trial", "metric")}
        row |= {"status": "failed" if cell.reason() else "finished", "reason": cell.reason() or ""}
        row |= {"images": entry.get("train_images"), "value": value_of(entry, cell.metric) if entry else None}
        row |= {"matched_keys": entry.get("start", {}).get("matched")}
        row |= other | {key: entry.get(key) for key in ("val_score", "seconds")}
        rows.append({key: row.get(key) for key in columns})
    write_csv(path, rows)


def write_tables(cells: Sequence[Cell], names: dict[str, str], output: Path) -> list[dict]:
    """Write results.csv, comparison.json, .md and .tex, and return the rows.

    Args:
        names: the metric of each task in words.
    """
    rows = gather(cells)
    write_runs(cells, output / "results.csv")
    write_json(output / "comparison.json", rows)
    for suffix, table, comment in (("md", markdown, "{}"), ("tex", latex, "% {}")):
        parts = []
        for task in names:
            heading = [comment.format(f"{task}:"), ""] if len(names) > 1 else []
            own = [row for row in rows if row["task"] == task]
            parts.append("\n".join([*heading, table(own, names[task])]))
        write_text(output / f"comparison.{suffix}", "\n\n".join(parts) + "\n")
    return rows
