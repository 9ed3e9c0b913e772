"""How sure a gain is: its interval over trials and test cases, and how many trials would tell a small one."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from medssl.errors import unusable
from medssl.files import read_csv
from medssl.tasks.metrics import weighted_auroc
from medssl.tasks.segmentation import COUNTS, dice

CONFIDENCE = 0.95
POWER = 0.8  # with which a test finds what is there
RESAMPLES = 1000
MOST_TRIALS = 10_000
DAMAGED = "damaged; restore it from a copy, or remove its folder, and the run is made again"

Metric = Callable[[np.ndarray], float]  # of counts (N,): how often each test case was drawn


class Judged:
    """A run's predictions of the test cases, of which its number is made again for any resample of the cases.

    Args:
        units: what is drawn: the patient, image or volume of each row.
        metric: from how often each row counts, (N,), to the number; NaN where it is undefined.
    """

    def __init__(self, units: Sequence[str], metric: Metric) -> None:
        self.units, self.metric = tuple(units), metric

    @classmethod
    def of_classes(cls, path: Path) -> "Judged":
        """Mean AUROC over the classes, of a predictions.csv as `test_classes` leaves it.

        Raises:
            InputError: for a damaged table.
        """
        with unusable(path, DAMAGED):
            rows = read_csv(path)
            names = [key.removeprefix("true ") for key in rows[0] if key.startswith("true ")]
            units = [row.get("patient") or row["id"] for row in rows]
            true = {name: np.array([float(row[f"true {name}"]) for row in rows]) for name in names}
            scores = {name: np.array([float(row[f"probability {name}"]) for row in rows]) for name in names}
        classes = [weighted_auroc(scores[name], true[name]) for name in names]

        def metric(counts: np.ndarray) -> float:
            values = [auroc(counts) for auroc in classes]
            known = [value for value in values if value is not None]
            return float(np.mean(known)) if known else math.nan

        return cls(units, metric)

    @classmethod
    def of_cases(cls, path: Path) -> "Judged":
        """Dice, the mean over the regions of their means over the cases, of a cases.csv as `write_cases` leaves it.

        Raises:
            InputError: for a damaged table.
        """
        with unusable(path, DAMAGED):
            rows = [row | {key: int(row[key]) for key in COUNTS} for row in read_csv(path)]
            names = list(dict.fromkeys((row["region"], row["case"]) for row in rows))
            groups = {name: dict.fromkeys(COUNTS, 0) for name in names}
        for row in rows:  # a case may have several images
            for key in COUNTS:
                groups[row["region"], row["case"]][key] += row[key]
        values = np.array([math.nan if (value := dice(group)) is None else value for group in groups.values()])
        known = np.isfinite(values)
        regions = dict.fromkeys(region for region, _ in names)
        own = [known & np.array([region == name for region, _ in names]) for name in regions]

        def metric(counts: np.ndarray) -> float:
            means = [values[part] @ counts[part] / counts[part].sum() for part in own if counts[part].any()]
            return float(np.mean(means)) if means else math.nan

        return cls([case for _, case in names], metric)


def two_way_interval(
    mine: Sequence[Judged], its: Sequence[Judged], resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float] | None:
    """95 % interval of the mean paired gain over trials, by a bootstrap over trials × test cases (Owen, The pigeonhole
    bootstrap, 2007).

    Trials share one test set: the spread over trials says nothing of another test set's. A resample draws trials, one
    fewer than there are, for which its variance is the right one (Hesterberg, 2015), and test cases, the same for all
    runs. Quantiles are widened as Student's t is wider than the normal, with Satterthwaite's degrees of freedom.

    Args:
        mine, its: of trial k, from an init and from the first; all of the same test cases.

    Returns:
        (low, high); None for fewer than two trials or cases.
    """
    names = sorted(set(mine[0].units))
    if len(mine) < 2 or len(names) < 2 or any(set(part.units) != set(names) for part in (*mine, *its)):
        return None
    place = {name: i for i, name in enumerate(names)}
    index = {id(part): np.array([place[name] for name in part.units]) for part in (*mine, *its)}

    def gains(drawn: np.ndarray, trials: Sequence[int]) -> np.ndarray:
        counts = {id(part): drawn[index[id(part)]] for k in trials for part in (mine[k], its[k])}
        return np.array([mine[k].metric(counts[id(mine[k])]) - its[k].metric(counts[id(its[k])]) for k in trials])

    everyone = gains(np.ones(len(names)), range(len(mine)))
    rng, n, k = np.random.default_rng(seed), len(names), len(mine)
    found = []
    for _ in range(resamples):
        chosen, times = np.unique(rng.integers(k, size=k - 1), return_counts=True)
        drawn = np.bincount(rng.integers(n, size=n), minlength=n)
        found.append(gains(drawn, chosen) @ times / (k - 1))
    found = np.array(found)[np.isfinite(found)]
    if len(found) < resamples / 2:
        return None
    centre, of_trials = everyone.mean(), everyone.var(ddof=1) / k
    of_cases = max(found.var() - of_trials, 0.0)
    parts = of_trials**2 / (k - 1) + of_cases**2 / (n - 1)
    freedom = (of_trials + of_cases) ** 2 / parts if parts else k - 1
    tail = (1 + CONFIDENCE) / 2
    wider = stats.t.ppf(tail, freedom) / stats.norm.ppf(tail)
    low, high = np.quantile(found, [1 - tail, tail])
    return float(centre + wider * (low - centre)), float(centre + wider * (high - centre))


def trials_for(deviation: float, gain: float) -> int | None:
    """How many paired trials find a gain in 4 of 5 studies, by a two-sided t-test at 5 %.

    Args:
        deviation: of the paired differences, as they were found. gain: the mean difference to be found.

    Returns:
        at least 2; None where it would take more than `MOST_TRIALS`.
    """
    if deviation == 0:
        return 2
    # A normal test needs fewer, and is the start of the search.
    normal = (stats.norm.ppf((1 + CONFIDENCE) / 2) + stats.norm.ppf(POWER)) * deviation / gain
    trials = max(2, math.floor(normal**2))
    while trials <= MOST_TRIALS and power_of(trials, deviation / gain) < POWER:
        trials += 1
    return trials if trials <= MOST_TRIALS else None


def power_of(trials: int, deviation: float) -> float:
    """The share of studies of so many paired trials in which a two-sided t-test at 5 % finds a gain of 1."""
    shift, freedom = math.sqrt(trials) / deviation, trials - 1
    threshold = stats.t.ppf((1 + CONFIDENCE) / 2, freedom)
    return float(stats.nct.sf(threshold, freedom, shift) + stats.nct.cdf(-threshold, freedom, shift))
