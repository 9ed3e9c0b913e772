"""Scores of predicted probabilities, for every kind of labels. scikit-learn does the counting."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
from sklearn.metrics import f1_score, roc_auc_score

from medssl.datasets.registry import Info


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

    Every resample is a vector of counts over one sorted order, so that nothing is sorted again.

    Args:
        probabilities, targets: (N,), targets 0, 1 or NaN (left out).
        groups: the patient of each image, where known: patients are drawn, for images of one are no two opinions.

    Returns:
        [low, high], or None where only one kind of image is there.
    """
    known = np.isfinite(targets)
    p, t = probabilities[known], targets[known]
    if len(np.unique(t)) < 2:
        return None
    names = np.arange(len(t)) if groups is None else np.asarray(groups)[known]
    _, group = np.unique(names, return_inverse=True)
    patients = group.max() + 1
    _, tie = np.unique(p, return_inverse=True)  # equal scores share a group, groups ascend
    ties = tie.max() + 1
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(resamples):
        counts = np.bincount(rng.integers(patients, size=patients), minlength=patients)[group]
        positive = np.bincount(tie, counts * t, ties)
        negative = np.bincount(tie, counts * (1 - t), ties)
        if positive.sum() and negative.sum():
            below = np.cumsum(negative) - negative / 2  # a tie counts half
            values.append(float(positive @ below / (positive.sum() * negative.sum())))
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return [float(low), float(high)]
