"""Pictures of results. Figures without pyplot: no window system, no global state."""

from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_auc_score, roc_curve

from medssl.datasets.base import Info
from medssl.files import write_atomic
from medssl.markup import figure_text
from medssl.tasks.metrics import RATES, froc_curve


def _curves(rows: list[dict], info: Info) -> list[tuple[str, list[tuple[np.ndarray, np.ndarray]]]]:
    """(name, [(targets, probabilities) of each trial]) for each class worth a curve, from predictions.csv's rows."""
    names = info.classes[1:] if info.task == "binary" else info.classes
    trials = sorted({row["trial"] for row in rows}, key=int)
    out = []
    for name in names:
        pairs = []
        for trial in trials:
            chosen = [row for row in rows if row["trial"] == trial]
            t = np.array([float(row[f"true {name}"]) for row in chosen])
            p = np.array([float(row[f"probability {name}"]) for row in chosen])
            known = np.isfinite(t)
            if len(np.unique(t[known])) == 2:
                pairs.append((t[known], p[known]))
        if pairs:
            out.append((name, pairs))
    return out


def roc(rows: list[dict], info: Info, path: Path) -> None:
    """ROC curves on the test split: one colour a class, one thin line a trial."""
    figure = Figure(figsize=(5.2, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=0.8)
    for i, (name, pairs) in enumerate(_curves(rows, info)):
        areas = [roc_auc_score(t, p) for t, p in pairs]
        for trial, (t, p) in enumerate(pairs):
            x, y, _ = roc_curve(t, p)
            label = f"{figure_text(name)} {np.mean(areas):.3f}" if trial == 0 else None
            axes.plot(x, y, color=f"C{i % 10}", alpha=0.8 / len(pairs) ** 0.5, linewidth=1.2, label=label)
    axes.set(xlabel="false positive rate", ylabel="true positive rate", title="ROC, test split (mean AUROC)")
    axes.set_aspect("equal")
    if len(axes.lines) > 1:
        axes.legend(loc="lower right", fontsize=8)
    write_atomic(path, partial(figure.savefig, dpi=130))


def calibration(rows: list[dict], info: Info, path: Path) -> None:
    """How often a class is there, against the probability that was predicted; all trials together, ten bins."""
    figure = Figure(figsize=(5.2, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=0.8)
    for i, (name, pairs) in enumerate(_curves(rows, info)):
        t, p = (np.concatenate(parts) for parts in zip(*pairs))
        y, x = calibration_curve(t, p, n_bins=10, strategy="quantile")
        axes.plot(x, y, "o-", color=f"C{i % 10}", markersize=3, linewidth=1.2, label=figure_text(name))
    axes.set(xlabel="predicted probability", ylabel="observed share", title="Calibration, test split")
    axes.set_aspect("equal")
    if len(axes.lines) > 1:
        axes.legend(loc="upper left", fontsize=8)
    write_atomic(path, partial(figure.savefig, dpi=130))


def froc(rows: list[dict], info: Info, path: Path) -> None:
    """Sensitivity over false positives per scan, from LUNA16's lowest rate to its highest; one line a trial."""
    figure = Figure(figsize=(5.6, 4.6), layout="constrained")
    axes = figure.subplots()
    trials = sorted({row["trial"] for row in rows}, key=int)
    means = []
    for trial in trials:
        chosen = [row for row in rows if row["trial"] == trial]
        p, t, w = (
            np.array([float(row[key]) for row in chosen])
            for key in (f"probability {info.classes[1]}", f"true {info.classes[1]}", "weight")
        )
        x, y = froc_curve(p, t, w, len({row["scan"] for row in chosen}))
        at = np.interp(RATES, x, y)
        means.append(at.mean())
        # Linear in the rate between its points, which a logarithmic axis bends.
        fine = np.geomspace(RATES[0], RATES[-1], 400)
        alpha = 0.8 / len(trials) ** 0.5
        axes.plot(fine, np.interp(fine, x, y), color="C0", alpha=alpha, linewidth=1.2)
        axes.plot(RATES, at, "o", color="C0", alpha=alpha, markersize=4)
    axes.set_xscale("log", base=2)
    axes.set_xticks(RATES, ["1/8", "1/4", "1/2", "1", "2", "4", "8"])
    sampled = max(float(row["weight"]) for row in rows) > 1
    note = ", estimated: negatives are a sample" if sampled else ""
    axes.set(xlabel=f"false positives per scan{note}", ylabel="sensitivity to the candidates that are nodules")
    axes.set(title=f"FROC, test split (mean of the seven points {np.mean(means):.3f})", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    write_atomic(path, partial(figure.savefig, dpi=130))
