"""Draw the losses of pre-training runs over epochs, with the value of chance where the loss is InfoNCE: of one run
every loss, and its last samples/ below; of several runs their contrast, side by side.

python benchmarks/curves.py runs/moco --output moco.jpg
python benchmarks/curves.py runs/moco runs/c2l --output curves.png
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from medssl.engine import options
from medssl.engine.options import InputError

CONTRAST = ("contrast", "mixed_images", "mixed_features")  # summed where runs are compared
WHOLE = ("contrast", "instance", "concept")  # terms that are InfoNCE itself, not a share of it
SMOOTH = 5  # lines of metrics.jsonl in a running mean


def read_run(folder: Path) -> tuple[dict, list[float], dict[str, list[float]]]:
    """A run's options, epochs of its log, and each of its losses there, NaN where the run had not begun or had left it.

    Raises:
        InputError: for a folder that is no run, or one of few lines.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    except (OSError, json.JSONDecodeError):
        raise InputError(f"{folder}: no config.json and metrics.jsonl of a run there") from None
    lines = [line for line in lines if "lr" in line]  # not those of a validation
    if len(lines) < SMOOTH:
        raise InputError(f"{folder}: fewer than {SMOOTH} logged lines")
    losses = {}
    for line in lines:
        names = list(line)
        losses |= {name: [] for name in names[names.index("loss") + 1 : names.index("lr")] if name not in losses}
    for name, values in losses.items():
        own = np.array([line.get(name) or np.nan for line in lines])
        values += np.convolve(own, np.full(SMOOTH, 1 / SMOOTH), mode="valid").tolist()
    return config, [line["epoch"] for line in lines[SMOOTH - 1 :]], losses


def chance(config: dict) -> float | None:
    """InfoNCE of embeddings that tell nothing, the logarithm of the number of candidates; None for NCE and methods
    without negatives."""
    if config["method"] in ("SimCLR", "MAGICAL"):
        return math.log(2 * config["b"] - 1)
    candidates = config.get("queue") or config.get("negatives")
    infonce = (
        config.get("loss", "infonce") == "infonce" and config["method"] != "DenseCL"
    )  # of which each term is a share
    return math.log(1 + candidates) if infonce and candidates else None


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
    sheet = np.asarray(Image.open(pictures[-1])) if pictures else None
    height = 0 if sheet is None else 9 * sheet.shape[0] / sheet.shape[1]
    figure = Figure(figsize=(9, 2.6 + height), layout="constrained")
    above = figure.add_gridspec(2, 1, height_ratios=[2.6, height]) if pictures else figure.add_gridspec(1, 1)
    grid = above[0].subgridspec(1, len(losses))
    # C2L's terms are thirds, of which the sum is compared with chance.
    expected = chance(config) if config["method"] != "C2L" else None
    for place, (name, values) in zip(grid, losses.items()):
        axes = figure.add_subplot(place)
        axes.plot(epochs, values, linewidth=1.2)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("epoch")
        if expected and name in WHOLE:
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
    for run, (_, _, losses) in zip(runs, read):
        if CONTRAST[0] not in losses:
            raise InputError(f"{run}: no contrast among its losses, {', '.join(losses)}")
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
    parser.add_argument("--output", metavar="FILE", default="curves.png", help="the picture")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    runs = [Path(run) for run in args.runs]
    figure = draw_one(runs[0]) if len(runs) == 1 else draw_many(runs)
    figure.savefig(args.output, dpi=110)
    print(f"written: {args.output}")


def cli() -> None:
    """Command line."""
    options.run_script(main)


if __name__ == "__main__":
    cli()
