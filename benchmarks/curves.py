"""Draw the losses of pre-training runs over epochs, with the value of chance where the loss is InfoNCE.

python benchmarks/curves.py runs/moco runs/c2l --output curves.png
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from medssl.engine import options
from medssl.engine.options import InputError

TERMS = (
    "contrast",
    "mixed_images",
    "mixed_features",
)  # of the contrastive methods; other terms have scales of their own
SMOOTH = 5  # lines of metrics.jsonl in a running mean


def read_run(folder: Path) -> tuple[dict, list[float], list[float]]:
    """A run's options, and epochs and contrastive losses of its log.

    Raises:
        InputError: for a folder that is no run, or one without a contrast.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    except (OSError, json.JSONDecodeError):
        raise InputError(f"{folder}: no config.json and metrics.jsonl of a run there") from None
    lines = [line for line in lines if "contrast" in line]
    if len(lines) < SMOOTH:
        raise InputError(f"{folder}: fewer than {SMOOTH} logged lines with a contrast")
    losses = [sum(line[term] for term in TERMS if term in line) for line in lines]
    means = [sum(losses[i : i + SMOOTH]) / SMOOTH for i in range(len(losses) - SMOOTH + 1)]
    return config, [line["epoch"] for line in lines[SMOOTH - 1 :]], means


def chance(config: dict) -> float | None:
    """InfoNCE of embeddings that tell nothing, the logarithm of the number of candidates; None for NCE."""
    candidates = config.get("queue") or config.get("negatives")
    return math.log(1 + candidates) if config["loss"] == "infonce" and candidates else None


def get_parser() -> options.Parser:
    """The options of this script."""
    parser = options.Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="--output of pre-training runs")
    parser.add_argument("--output", metavar="FILE", default="curves.png", help="the picture")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    runs = [read_run(Path(run)) for run in args.runs]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for config, epochs, losses in runs:
        axes.plot(epochs, losses, label=config["method"], linewidth=1.2)
    for value in sorted({chance(config) for config, *_ in runs} - {None}):
        axes.axhline(value, color="grey", linestyle="--", linewidth=1)
        label = f" chance, log {round(math.exp(value))} = {value:.2f}"
        # Out of the layout: chance may lie beyond the picture.
        axes.text(0, value, label, va="bottom", fontsize=8, color="grey", clip_on=True, in_layout=False)
    values = [value for *_, losses in runs for value in losses]
    # InsDis begins at twice its chance value, beside which the other curves would be flat.
    top = min(max(values), 1.05 * max((chance(config) or math.inf for config, *_ in runs), default=math.inf))
    axes.set(xlabel="epoch", ylabel="contrastive loss", ylim=(min(values) - 0.1, top + 0.1))
    axes.legend(frameon=False)
    figure.savefig(args.output, dpi=150)
    print(f"written: {args.output}")


def cli() -> None:
    """Command line."""
    options.run_script(main)


if __name__ == "__main__":
    cli()
