"""Does pre-training help? Fine-tune from several encoders at several label fractions, and compare in pairs.

  python compare.py --data FILE --dataset pneumoniamnist --init random OURS/encoder.pt --annotation-percent 1 10 100
      --trials 5 --image-size 64 --output OUT
  python compare.py --init random OURS/encoder.pt --annotation-percent 10 --trials 3 --image-size 64 --output OUT
  python compare.py --task segmentation --init random OURS/encoder.pt --annotation-percent 2 --output OUT
  python compare.py --task detection --init random OURS/encoder.pt --annotation-percent 100 --output OUT

Every other option goes to finetune_classification.py, finetune_segmentation.py or finetune_detection.py as it is.
Trial k draws the same labelled images, order and head for every init, so that the gain over the first `--init` is a
mean of paired differences, with its standard error. Finished trials are kept: the same command continues. Writes
`comparison.json`, `comparison.md` and `comparison.png` to `--output`.
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medssl import finetune_classification, finetune_detection, finetune_segmentation
from medssl.engine import options
from medssl.engine.loop import write_json
from medssl.engine.options import InputError

# task -> the script that fine-tunes, the number of a trial that is compared, and its name
TASKS = {
    "classification": (finetune_classification, "auroc", "test AUROC"),
    "segmentation": (finetune_segmentation, "dice", "test Dice"),
    "detection": (finetune_detection, "ap_box", "test AP of boxes"),
}


def label_of(init: str, inits: Sequence[str]) -> str:
    """A short name for an init, unique among `inits`, fit for a folder."""
    if init in ("random", "imagenet"):
        return init

    def parts(path: str) -> tuple[str, ...]:
        # A run's export is called encoder.pt in every run: the folder's name is what tells them apart.
        names = Path(path).absolute().with_suffix("").parts[1:]
        return names[:-1] if names[-1] == "encoder" and len(names) > 1 else names

    own = parts(init)
    for n in range(1, len(own) + 1):
        if sum(parts(other)[-n:] == own[-n:] for other in inits) == 1:
            break
    return "_".join(own[-n:])


def paired_gain(values: Sequence[float], baseline: Sequence[float]) -> tuple[float, float | None]:
    """Mean of the differences trial by trial, and its standard error (None for one trial)."""
    difference = np.subtract(values, baseline)
    if len(difference) < 2:
        return float(difference.mean()), None
    return float(difference.mean()), float(difference.std(ddof=1) / math.sqrt(len(difference)))


def table(rows: list[dict], inits: Sequence[str], metric: str) -> str:
    """Markdown: one row per label fraction and init."""
    lines = [
        f"| labels | images | init | {metric} (mean ± std) | paired gain over "
        f"{inits[0]} (± standard error) | trials better |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        spread = "" if row["std"] is None else f" ± {row['std']:.3f}"
        gain = better = "–"
        if row["gain"] is not None:
            error = "" if row["standard_error"] is None else f" ± {row['standard_error']:.3f}"
            gain, better = f"{row['gain']:+.3f}{error}", f"{row['better']} of {row['trials']}"
        cells = [f"{row['percent']:g} %", row["images"], row["init"], f"{row['mean']:.3f}{spread}", gain, better]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def draw(rows: list[dict], metric: str, path: Path) -> None:
    """The metric over the share of labels; a point per trial, a line through the means."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(row["init"] for row in rows))
    percents = sorted({row["percent"] for row in rows})
    for i, name in enumerate(names):
        own = sorted((row for row in rows if row["init"] == name), key=lambda row: row["percent"])
        shift = 1.04 ** (i - (len(names) - 1) / 2)  # points of different inits beside each other
        for row in own:
            axes.plot([row["percent"] * shift] * row["trials"], row["values"], ".", color=f"C{i}", alpha=0.4)
        axes.plot(
            [row["percent"] * shift for row in own], [row["mean"] for row in own], "o-", color=f"C{i}", label=name
        )
    axes.set_xscale("log")
    axes.set_xticks(percents, [f"{p:g} %" for p in percents])
    axes.minorticks_off()
    if len(percents) == 1:
        axes.set_xlim(percents[0] / 2, percents[0] * 2)
    axes.set(xlabel="share of the training labels", ylabel=metric)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)


def get_parser() -> options.Parser:
    parser = options.Parser(__doc__)
    group = parser.add_argument_group("comparison")
    group.add_argument("--task", choices=tuple(TASKS), default="classification", help="what is fine-tuned")
    group.add_argument(
        "--init",
        nargs="+",
        default=["random"],
        metavar="{random,imagenet,FILE}",
        help="encoder weights to compare; the first is the baseline",
    )
    options.add_proxy_folder(group)
    group.add_argument(
        "--annotation-percent",
        "--annotation_percent",
        nargs="+",
        type=options.bounded_float(1e-6, 100),
        default=[1.0, 10.0, 100.0],
        help="percentages of the training labels",
    )
    group.add_argument("--trials", "--trial", type=options.positive_int, default=5, help="paired trials of each")
    group.add_argument(
        "--epochs", nargs="+", type=options.positive_int, help="passes over the labels: one number, or one a percentage"
    )
    group.add_argument("--output", metavar="DIR", default="runs/comparison", help="where the results go")
    return parser


def main(argv: Sequence[str] | None = None) -> list[dict]:
    args, rest = get_parser().parse_known_args(argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("compare runs in one process; start it without torchrun, with --gpus for several")
    options.check_inits(args.init)
    epochs = args.epochs or [None]
    if len(epochs) not in (1, len(args.annotation_percent)):
        raise InputError(
            f"--epochs: {len(epochs)} numbers for {len(args.annotation_percent)} percentages; give 1 or as many"
        )
    epochs = epochs * len(args.annotation_percent) if len(epochs) == 1 else epochs
    output, rows = Path(args.output), []
    script, key, metric = TASKS[args.task]
    names = [label_of(init, args.init) for init in args.init]
    for percent, passes in zip(args.annotation_percent, epochs):
        baseline = None
        for init, name in zip(args.init, names):
            folder = output / f"{percent:g}_percent" / name
            own = ["--init", init, "--annotation-percent", f"{percent:g}", "--trials", str(args.trials)]
            own += [] if passes is None else ["--epochs", str(passes)]
            script.main([*rest, *own, "--output", str(folder)])
            results = json.loads((folder / "results.json").read_text())
            values = [trial[key] for trial in results["trials"]]
            if None in values:
                raise InputError(f"{folder}: {metric} is undefined: the test split has one class, or no structure")
            if baseline is None:
                baseline, gain, error, better = values, None, None, None
            else:
                gain, error = paired_gain(values, baseline)
                better = int(np.sum(np.greater(values, baseline)))
            rows.append(
                {
                    "percent": percent, "images": results["trials"][0]["train_images"], "init": name, "file": init,
                    "mean": results["mean"], "std": results["std"], "values": values, "gain": gain,
                    "standard_error": error, "better": better, "trials": args.trials, "metric": key,
                    "seconds": sum(trial["seconds"] for trial in results["trials"]), "versions": results["versions"],
                    "device": results["device"],
                }
            )  # fmt: skip
            # Written after every cell: a study that is stopped shows what it has.
            write_json(output / "comparison.json", rows)
    text = table(rows, names, metric)
    (output / "comparison.md").write_text(text + "\n", encoding="utf-8")
    draw(rows, metric, output / "comparison.png")
    print(f"\n{text}\n\nwritten: {output}/comparison.md, .json and .png", flush=True)
    return rows


def cli() -> None:
    options.run_script(main)


if __name__ == "__main__":
    cli()
