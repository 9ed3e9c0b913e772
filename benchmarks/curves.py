"""Draw the losses of pre-training runs over epochs, with the value of chance where the loss is InfoNCE: of one run
every loss, and its last samples/ below; of several runs their contrast, side by side.

python benchmarks/curves.py runs/moco --output moco.jpg
python benchmarks/curves.py runs/moco runs/c2l --output curves.png
"""

import contextlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from medssl import errors
from medssl.engine import options
from medssl.engine.monitor import loss_names
from medssl.errors import InputError
from medssl.reading.pictures import recognised

CONTRAST = ("contrast", "mixed_images", "mixed_features")  # summed where runs are compared
SMOOTH = 5  # lines of metrics.jsonl in a running mean


def read_run(folder: Path) -> tuple[dict, list[float], dict[str, np.ndarray]]:
    """A run's options, epochs of its log, and each of its losses there, NaN where the run had not begun or had left it.

    Raises:
        InputError: for a folder that is no run, or one of few lines.
    """
    lines = []
    try:
        config = json.loads((folder / "config.json").read_text())
        for text in (folder / "metrics.jsonl").read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # a line cut short by a kill
                lines.append(json.loads(text))
    except (OSError, ValueError):
        raise InputError(f"{folder}: no config.json and metrics.jsonl of a run there") from None
    if not isinstance(config, dict) or "method" not in config:
        raise InputError(f"{folder}: its config.json is not that of a pre-training")
    lines = [line for line in lines if isinstance(line, dict) and {"epoch", "loss", "lr"} <= set(line)]
    names = loss_names(lines)
    losses = {name: np.array([line.get(name) for line in lines], float) for name in names}  # None becomes NaN
    if len(lines) < SMOOTH or not any(np.isfinite(values).sum() >= SMOOTH for values in losses.values()):
        raise InputError(f"{folder}: fewer than {SMOOTH} logged lines with losses")
    smooth = {name: np.convolve(own, np.full(SMOOTH, 1 / SMOOTH), mode="valid") for name, own in losses.items()}
    smooth = {name: values for name, values in smooth.items() if np.isfinite(values).any()}
    return config, [line["epoch"] for line in lines[SMOOTH - 1 :]], smooth


def weight(config: dict, name: str) -> float | None:
    """With what a loss that is InfoNCE, or NT-Xent, is multiplied in the log; None for other losses."""
    method = config["method"]
    if method == "C2L":
        return 1 / 3 if config.get("mixup", True) else 1.0
    if method == "DenseCL":
        return {"contrast": 1 - config["dense_weight"], "dense": config["dense_weight"]}.get(name)
    if method == "ConCL":
        w = config.get("concept_weight", 1.0)
        return {"instance": 1.0 if w == 1 else None, "concept": w}.get(name)  # the instance's changes with the warm-up
    return 1.0 if name == "contrast" else None


def chance(config: dict) -> float | None:
    """InfoNCE of embeddings that tell nothing, the logarithm of the number of candidates; None for NCE and methods
    without negatives."""
    if config["method"] in ("SimCLR", "MAGICAL"):
        return math.log(2 * config["b"] - 1)
    candidates = config.get("queue") or config.get("negatives")
    return math.log(1 + candidates) if config.get("loss", "infonce") == "infonce" and candidates else None


def draw_chance(axes: Axes, value: float, name: str) -> None:
    """A dashed line, named."""
    axes.axhline(value, color="grey", linestyle="--", linewidth=1)
    # Out of the layout: chance may lie beyond the picture.
    place = {"transform": axes.get_yaxis_transform(), "va": "top", "clip_on": True, "in_layout": False}
    axes.text(0.01, value, name, fontsize=8, color="grey", **place)


def draw_one(run: Path) -> Figure:
    """Every loss of a run, and what it saw last."""
    config, epochs, losses = read_run(run)
    pictures = sorted((run / "samples").glob("step_*.png"))
    try:
        sheet = np.asarray(recognised(pictures[-1])) if pictures else None
    except OSError as error:
        raise InputError(f"{pictures[-1]}: {error}") from None
    height = 0 if sheet is None else 9 * sheet.shape[0] / sheet.shape[1]
    figure = Figure(figsize=(9, 2.6 + height), layout="constrained")
    above = figure.add_gridspec(2, 1, height_ratios=[2.6, height]) if pictures else figure.add_gridspec(1, 1)
    grid = above[0].subgridspec(1, len(losses))
    whole = chance(config)
    for place, (name, values) in zip(grid, losses.items()):
        axes = figure.add_subplot(place)
        axes.plot(epochs, values, linewidth=1.2)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("epoch")
        share = weight(config, name)
        if whole and share:
            expected = whole * share
            draw_chance(axes, expected, f" chance {expected:.2f}")
            axes.set_ylim(top=max(expected, min(np.nanmax(values), 1.05 * expected)) + 0.1)
    if sheet is not None:
        axes = figure.add_subplot(above[1])
        axes.imshow(sheet)
        axes.axis("off")
    return figure


def draw_many(runs: Sequence[Path]) -> Figure:
    """The contrast of several runs."""
    read = [read_run(run) for run in runs]
    for run, (config, _, losses) in zip(runs, read):
        if CONTRAST[0] not in losses or weight(config, CONTRAST[0]) not in (1, 1 / 3):
            raise InputError(f"{run}: no whole contrast among its losses, {', '.join(losses)}")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    sums = [np.sum([losses[name] for name in CONTRAST if name in losses], axis=0) for *_, losses in read]
    for (config, epochs, _), values in zip(read, sums):
        axes.plot(epochs, values, label=config["method"], linewidth=1.2)
    known = {chance(config) for config, *_ in read} - {None}
    for value in sorted(known):
        draw_chance(axes, value, f" chance, log {round(math.exp(value))} = {value:.2f}")
    # InsDis begins at twice its chance value, beside which the other curves would be flat.
    top = min(max(map(np.nanmax, sums)), 1.05 * max(known, default=math.inf))
    axes.set(xlabel="epoch", ylabel="contrastive loss", ylim=(min(map(np.nanmin, sums)) - 0.1, top + 0.1))
    axes.legend(frameon=False)
    return figure


def get_parser() -> options.Parser:
    """The options of this script."""
    parser = options.Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="--output of pre-training runs")
    parser.add_argument("--output", type=options.filled, metavar="FILE", default="curves.png", help="the picture")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    runs = [Path(run) for run in args.runs]
    figure = draw_one(runs[0]) if len(runs) == 1 else draw_many(runs)
    try:
        figure.savefig(args.output, dpi=110)
    except (OSError, ValueError) as error:
        raise InputError(f"--output {args.output}: {error}") from None
    print(f"written: {args.output}")


def cli() -> None:
    """Command line."""
    errors.run_script(main)


if __name__ == "__main__":
    cli()
