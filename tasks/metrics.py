"""Scores of predicted probabilities, for every kind of labels. scikit-learn does the counting."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from sklearn.metrics import f1_score, roc_auc_score

from medssl.datasets.base import Info

RATES = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0)  # false positives per scan at which LUNA16 asks for the sensitivity


def targets_of(labels: np.ndarray, info: Info) -> np.ndarray:
    """(N, L) float64: one column a class or label, 0, 1, or NaN where it is not known."""
    if info.task == "multi-label":
        return labels.astype(np.float64)
    return np.eye(len(info.classes))[labels]


def score(probabilities: np.ndarray, targets: np.ndarray, info: Info) -> dict:
    """Accuracy, F1 and area under the ROC curve.

    Args:
        probabilities, targets: (N, L).

    Returns:
        "accuracy": the share of right classes; in multi-label tasks, of right answers at threshold ½.
        "f1": of class 1 in binary tasks; else the mean over the classes, or the labels at threshold ½.
        "auroc": mean over the classes (one against the rest) that have both kinds of images, else None.
        "per_class": class → its AUROC or None.
    """
    per_class, f1 = {}, []
    for name, p, t in zip(info.classes, probabilities.T, targets.T):
        known = np.isfinite(t)
        both = len(np.unique(t[known])) == 2
        per_class[name] = float(roc_auc_score(t[known], p[known])) if both else None
        if info.task == "multi-label" and known.any():
            f1.append(f1_score(t[known], p[known] > 0.5, zero_division=0.0))
    if info.task == "multi-label":
        known = np.isfinite(targets)
        accuracy = ((probabilities > 0.5) == targets)[known].mean() if known.any() else math.nan
    else:
        chosen, true = probabilities.argmax(1), targets.argmax(1)
        accuracy = (chosen == true).mean()
        average = "binary" if info.task == "binary" else "macro"
        f1.append(f1_score(true, chosen, average=average, zero_division=0.0))
    return {
        "accuracy": None if math.isnan(accuracy) else float(accuracy),
        "f1": mean_of(f1),
        "auroc": mean_of(per_class.values()),
        "per_class": per_class,
    }


def mean_of(values: Iterable[float | None]) -> float | None:
    """The mean of what is known, or None."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def score_with_intervals(
    probabilities: np.ndarray, targets: np.ndarray, info: Info, groups: Sequence[str] | None = None
) -> dict:
    """`score`, whose "per_class" maps a class to {"auroc", "interval"}; `groups` as in `auroc_interval`."""
    values = score(probabilities, targets, info)
    intervals = (auroc_interval(p, t, groups=groups) for p, t in zip(probabilities.T, targets.T))
    values["per_class"] = {
        name: {"auroc": auroc, "interval": interval}
        for (name, auroc), interval in zip(values["per_class"].items(), intervals)
    }
    return values


def auroc_interval(
    probabilities: np.ndarray,
    targets: np.ndarray,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    groups: Sequence[str] | None = None,
) -> list[float] | None:
    """Percentile bootstrap interval of one class's AUROC over the images, or over groups of them.

    Args:
        probabilities, targets: (N,), targets 0, 1 or NaN (left out).
        groups: the patient of each image, where known: patients are drawn, for images of one are no two opinions.

    Returns:
        [low, high], or None where only one kind of image is there, or one group, of which nothing can be drawn.
    """
    known = np.isfinite(targets)
    p, t = probabilities[known], targets[known]
    if len(np.unique(t)) < 2:
        return None
    names = np.arange(len(t)) if groups is None else np.asarray(groups)[known]
    if len(np.unique(names)) < 2:
        return None
    auroc = weighted_auroc(p, t)
    values = [value for counts in _bootstrap(names, resamples, seed) if (value := auroc(counts)) is not None]
    return _interval(values, level)


def weighted_auroc(probabilities: np.ndarray, targets: np.ndarray) -> Callable[[np.ndarray], float | None]:
    """The AUROC of one class as a function of how often each image counts, (N,): None where one kind is left.

    Nothing is sorted again for another resample.

    Args:
        probabilities, targets: (N,), targets 0, 1 or NaN (left out).
    """
    known = np.isfinite(targets)
    t = targets[known]
    _, tie = np.unique(probabilities[known], return_inverse=True)  # equal scores share a group, groups ascend
    ties = tie.max() + 1 if len(tie) else 0

    def auroc(counts: np.ndarray) -> float | None:
        own = counts[known]
        positive = np.bincount(tie, own * t, ties)
        negative = np.bincount(tie, own * (1 - t), ties)
        if not (positive.sum() and negative.sum()):
            return None
        below = np.cumsum(negative) - negative / 2  # a tie counts half
        return float(positive @ below / (positive.sum() * negative.sum()))

    return auroc


def _bootstrap(groups: Sequence[str] | np.ndarray, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each image is in a resample, (N,), where whole groups are drawn."""
    _, group = np.unique(groups, return_inverse=True)
    count = group.max() + 1
    rng = np.random.default_rng(seed)
    for _ in range(resamples):
        yield np.bincount(rng.integers(count, size=count), minlength=count)[group]


def _interval(values: Sequence[float], level: float) -> list[float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return [float(low), float(high)]


def froc_curve(
    probabilities: np.ndarray, targets: np.ndarray, weights: np.ndarray, scans: int
) -> tuple[np.ndarray, np.ndarray]:
    """False positives per scan and sensitivity, from the highest threshold to the lowest, beginning at (0, 0).

    Args:
        probabilities, targets: (N,) of candidates; 1 is a finding.
        weights: (N,) how many candidates each stands for.
        scans: number of scans, also those without a finding.

    Returns:
        (K,) and (K,), ascending; nothing but zeros for the sensitivity where there is no finding.
    """
    order = np.argsort(-probabilities, kind="stable")
    p, found = probabilities[order], weights[order] * targets[order]
    false = weights[order] - found
    last = np.append(p[1:] != p[:-1], True)  # candidates of one score are above a threshold together
    x, y = (np.append(0.0, np.cumsum(part)[last]) for part in (false, found))
    return x / scans, y / max(y[-1], 1e-30)


def froc(
    probabilities: np.ndarray,
    targets: np.ndarray,
    weights: np.ndarray,
    scans: Sequence[str],
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict:
    """LUNA16's score of detected candidates: the mean sensitivity at `RATES` (Setio et al., arXiv 1612.08012).

    Between the points of the curve it is interpolated linearly, as the challenge does. Unlike there, each candidate
    of class 1 counts as a finding of its own, and findings without a candidate do not count.

    Args:
        probabilities, targets, weights: (N,), as for `froc_curve`.
        scans: the scan of each candidate. A scan without candidates is not known of, and not counted.

    Returns:
        "cpm": the mean, with "cpm_interval", a percentile bootstrap interval over the scans.
        "sensitivity": rate → sensitivity.
        "scans", "findings": numbers. "largest_weight": above 1, the false positives are an estimate from a sample.
        cpm, its interval and sensitivities are None where there is no finding; the interval also for one scan.
    """
    names, count = np.asarray(scans), len(set(scans))
    counts = {"scans": count, "findings": int(targets.sum()), "largest_weight": float(weights.max())}
    if not targets.any():
        empty = dict.fromkeys(f"{rate:g}" for rate in RATES)
        return {"cpm": None, "cpm_interval": None, "sensitivity": empty, **counts}
    order = np.argsort(-probabilities, kind="stable")  # sorted once: every resample changes weights alone
    p, t, w, names = (part[order] for part in (probabilities, targets, weights, names))
    sensitivity = np.interp(RATES, *froc_curve(p, t, w, count))
    draws = _bootstrap(names, resamples, seed)
    means = [np.interp(RATES, *froc_curve(p, t, w * n, count)).mean() for n in draws if (t * n).any()]
    return {
        "cpm": float(sensitivity.mean()),
        "cpm_interval": _interval(means, level) if count > 1 else None,
        "sensitivity": {f"{rate:g}": float(value) for rate, value in zip(RATES, sensitivity)},
        **counts,
    }
