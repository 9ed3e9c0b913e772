"""The whole road in about ten minutes on two cores, without data: pre-train, fine-tune, evaluate, compare.

  python demo.py                                (make demo does so, and installs what is needed)
  python demo.py --quick --output DIR

Generated chest radiographs stand in for a hospital's archive: many without labels, few with. PCRLv2 learns from the
former; a nodule classifier is then fine-tuned on a fraction of the labels from random and from pre-trained weights.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from medssl import compare, errors, train_pcrlv2
from medssl.engine import options


def get_parser() -> options.Parser:
    parser = options.Parser(__doc__)
    parser.add_argument("--output", metavar="DIR", default="runs/demo", help="where the results go")
    parser.add_argument("--quick", action="store_true", help="a few steps only: shows that everything runs")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    started, output = time.perf_counter(), Path(args.output)
    size = ["--dataset", "phantom2d", "--image-size", "64", "--workers", "0"]
    epochs, percent, trials, tuning = ("1", "5", "1", "1") if args.quick else ("6", "5", "3", "40")

    print("1. pre-train PCRLv2 on 2048 unlabelled phantom radiographs", flush=True)
    small = ["--b", "64", "--steps", "2"] if args.quick else ["--b", "16"]
    pretraining = [*size, *small, "--local-size", "32", "--epochs", epochs, "--lr", "0.05"]
    train_pcrlv2.main([*pretraining, "--output", str(output / "pcrlv2")])

    print(
        f"\n2. fine-tune a nodule classifier on {percent} % of the labels, from random and pre-trained weights",
        flush=True,
    )
    weights = str(output / "pcrlv2" / "encoder.pt")
    fraction = ["--annotation-percent", percent, "--trials", trials, "--epochs", tuning, "--b", "32", "--lr", "1e-3"]
    rows = compare.main(
        [*size, "--init", "random", weights, *fraction, "--no-tensorboard", "--no-features", "--jobs", "0"]
        + ["--output", str(output / "comparison")]
    )

    random, pretrained = rows[-2:]
    minutes = (time.perf_counter() - started) / 60
    print(
        f"\nTest AUROC with {random['images']} labelled images: {random['mean']:.3f} from random weights, "
        f"{pretrained['mean']:.3f} from PCRLv2's ({pretrained['gain']:+.3f} in pairs). {minutes:.1f} minutes."
    )
    print(f"Look at {output}/pcrlv2/samples/ (what the network saw and restored) and {output}/comparison/report.html")


def cli() -> None:
    errors.run_script(main)


if __name__ == "__main__":
    cli()
