"""Figures of a study. Without pyplot: no window system, no global state."""

from functools import partial
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from medssl.files import write_atomic
from medssl.markup import figure_text


def label_efficiency(rows: list[dict], names: dict[str, str], path: Path) -> None:
    """A study's metric over the share of labels, a panel a task: a point a trial, a line through the means, and the
    means' 95 % confidence intervals as bands.

    Args:
        rows: of `results.gather`. names: the metric of each task in words.
    """
    figure = Figure(figsize=(6 * len(names), 4.2), layout="constrained")
    for axes, (task, metric) in zip(figure.subplots(1, len(names), squeeze=False)[0], names.items()):
        draw_label_efficiency(axes, [row for row in rows if row["task"] == task])
        axes.set_ylabel(metric)
        if len(names) > 1:
            axes.set_title(task)
    write_atomic(path, partial(figure.savefig, dpi=130))


def colour_of(i: int) -> tuple[float, float, float]:
    """The colour of init i of a study, the same in all its figures."""
    strong, pale = colormaps["tab20"].colors[::2], colormaps["tab20"].colors[1::2]
    return (*strong, *pale)[i % 20]


def draw_label_efficiency(axes: Axes, rows: list[dict]) -> None:
    """One panel of `label_efficiency`."""
    inits = list(dict.fromkeys(row["init"] for row in rows))
    percents = sorted({row["percent"] for row in rows})
    for i, init in enumerate(inits):
        own = sorted((row for row in rows if row["init"] == init and row["trials"]), key=lambda row: row["percent"])
        shift = 1.04 ** (i - (len(inits) - 1) / 2)  # points of different inits beside each other
        for row in own:
            known = [value for value in row["values"] if value is not None]
            axes.plot([row["percent"] * shift] * len(known), known, ".", color=colour_of(i), alpha=0.4)
        at = [row["percent"] * shift for row in own]
        axes.plot(at, [row["mean"] for row in own], "o-", color=colour_of(i), label=figure_text(init))
        bands = [(x, *row["interval"]) for x, row in zip(at, own) if row["interval"]]
        if bands:
            axes.fill_between(*zip(*bands), color=colour_of(i), alpha=0.12, linewidth=0)
    axes.set_xscale("log")
    axes.set_xticks(percents, [f"{p:g} %" for p in percents])
    axes.minorticks_off()
    if len(percents) == 1:
        axes.set_xlim(percents[0] / 2, percents[0] * 2)
    axes.set_xlabel("share of the training labels")
    axes.grid(alpha=0.3)
    axes.legend()
