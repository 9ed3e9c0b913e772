"""The whole road in a few minutes on two cores, without data: pre-train, fine-tune, evaluate, compare.

  python demo.py                                (make demo does so, and installs what is needed)
  python demo.py --quick --output DIR
  python demo.py --seed 7 --output runs/demo_7  (other tiles, other weights, other labels)

Generated tiles of stained tissue stand in for a laboratory's archive: many without labels, few with. MAE learns from
the former by restoring what is hidden of them; a classifier of benign and malignant glands is then fine-tuned on a
fraction of the labels, from random and from pre-trained weights.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path

from medssl import compare, errors
from medssl.engine import options
from medssl.files import read_lines, write_json

DATA = "--dataset tissue2d --texture-size 64 --image-size 64 --arch resnet18 --amp --workers 0"
TRIALS = 4
TUNING = "--annotation-percent 2 --b 8 --epoch-steps 20 --lr 1e-3 --patience 0 --no-tensorboard --no-features"
SETTINGS = {
    "data": DATA,
    "pretraining": "--b 32 --epochs 14 --lr 2e-3",
    "tuning": f"{TUNING} --epochs 12 --trials {TRIALS}",
}
QUICK = {"data": DATA, "pretraining": "--b 64 --steps 2", "tuning": f"{TUNING} --steps 1 --trials 1"}
SPREAD = Path(__file__).resolve().parent / "benchmarks" / "results" / "demo.jsonl"  # what benchmarks/demo_spread.py saw


def get_parser() -> options.Parser:
    parser = options.Parser(__doc__)
    parser.add_argument("--output", metavar="DIR", default="runs/demo", help="where the results go")
    parser.add_argument("--quick", action="store_true", help="a few steps only: shows that everything runs")
    parser.add_argument(
        "--seed", type=options.non_negative_int, default=0, help="of the tiles, of pre-training and of the trials"
    )
    parser.add_argument("--jobs", type=options.positive_int, default=min(2, os.cpu_count() or 1), help="runs at a time")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    started, output = time.perf_counter(), Path(args.output)
    words = QUICK if args.quick else SETTINGS

    print("Pre-train MAE on 1024 generated tiles of tissue, without labels, and fine-tune a classifier of glands on 20")
    print("labelled ones, from random and from pre-trained weights. The first line comes in a minute.\n", flush=True)
    begun = any(output.glob("*/*"))
    rows = compare.main([
        *DATA.split(), "--series", str(args.seed), "--init", "random", "mae",
        "--with", f"pretraining {words['pretraining']} --seed {args.seed}",
        *words["tuning"].split(), "--seed", str(args.seed * TRIALS),  # of trials that no other seed has
        "--jobs", "0" if args.quick else str(args.jobs), "--output", str(output),
    ])  # fmt: skip

    random, pretrained = rows[-2:]
    found = {"seed": args.seed, "images": random["images"], "random": random["mean"], "pretrained": pretrained["mean"]}
    found |= {"gain": pretrained["gain"], "settings": words}
    found["minutes"] = None if begun else (time.perf_counter() - started) / 60  # of a part, where it goes on
    write_json(output / "demo.json", found)
    print(
        f"\nTest AUROC with {found['images']} labelled images: {found['random']:.3f} from random weights, "
        f"{found['pretrained']:.3f} from MAE's ({found['gain']:+.3f} in pairs)."
        + ("" if begun else f" {found['minutes']:.1f} minutes.")
    )
    known = [row for row in repetitions() if row["seed"] != args.seed]
    if known and not args.quick:
        print(f"{spread(known)} (benchmarks/results/demo.md).")
    print(f"Look at {output}/pretraining/mae/samples/ (what the network saw and restored) and {output}/report.html")


def repetitions(path: Path = SPREAD) -> list[dict]:
    """What the demo gave with other seeds, where its settings were those of today."""
    return [row for row in read_lines(path) if row["settings"] == SETTINGS]


def spread(rows: Sequence[dict]) -> str:
    """How far the gains of repetitions spread, in words."""
    gains = [row["gain"] for row in rows]
    better = sum(gain > 0 for gain in gains)
    return (
        f"With other tiles, weights and labels the gain was {min(gains):+.3f} to {max(gains):+.3f}, "
        f"above 0 in {better} of {len(gains)} repetitions"
    )


def cli() -> None:
    errors.run_script(main)


if __name__ == "__main__":
    cli()
