"""How far the demo's gain spreads: the demo again and again, each time with other tiles, weights and labels.

  python benchmarks/demo_spread.py --seeds 20 40
  python benchmarks/demo_spread.py --tables

A row is written as a repetition ends, to `--rows`, a line of JSON each; the same command continues. Repetitions run
side by side, each a run at a time with its share of the cores: minutes are those of a machine with so many, and missing
where a repetition was interrupted.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from medssl import demo
from medssl.benchmarks.machine import ROOT, describe_machine
from medssl.engine import options
from medssl.errors import InputError, run_script
from medssl.files import append_text, read_json
from medssl.locks import own_folder


def repeat(seed: int, args: argparse.Namespace) -> None:
    """Run the demo with a seed, and write its row.

    Raises:
        InputError: where it fails.
    """
    folder, threads = Path(args.output) / f"seed_{seed}", max(1, (os.cpu_count() or 1) // args.jobs)
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "demo.py"), "--seed", str(seed), "--jobs", "1", "--output", str(folder)]
    with open(folder / "log.txt", "w") as log:
        env = os.environ | {"OMP_NUM_THREADS": str(threads)}
        code = subprocess.run(command, env=env, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        raise InputError(f"--seed {seed}: the demo ended with {code}; see {folder}/log.txt")
    machine = describe_machine()
    row = read_json(folder / "demo.json") | {"threads": threads, "cpu": machine["cpu"], "commit": machine["commit"]}
    row |= {"torch": machine["packages"]["torch"], "date": machine["date"][:10]}
    append_text(args.rows, json.dumps(row) + "\n")
    print(f"seed {seed}: {row['random']:.3f} to {row['pretrained']:.3f}", flush=True)


def table(rows: Sequence[dict]) -> str:
    """Every repetition, and what they tell together, as Markdown."""
    lines = ["| seed | torch | random | pre-trained | gain | minutes |", "| --- | --- | --- | --- | --- | --- |"]
    for row in sorted(rows, key=lambda row: (row["torch"], row["seed"])):
        values = " | ".join(f"{row[name]:.3f}" for name in ("random", "pretrained"))
        minutes = f"{row['minutes']:.1f}" if row["minutes"] else ""
        lines.append(f"| {row['seed']} | {row['torch']} | {values} | {row['gain']:+.3f} | {minutes} |")
    for name in ("random", "pretrained", "gain"):
        values = [row[name] for row in rows]
        deviation = np.std(values, ddof=1) if len(values) > 1 else 0.0
        lines.append(f"\n{name}: {np.mean(values):.3f}, deviation {deviation:.3f}")
    return "\n".join([*lines, "", f"{demo.spread(rows)}."])


def get_parser() -> options.Parser:
    parser = options.Parser(__doc__)
    parser.add_argument(
        "--seeds", type=options.non_negative_int, nargs=2, default=[20, 40], metavar=("FIRST", "END"),
        help="of the repetitions, END excluded; by them nothing was chosen",
    )  # fmt: skip
    parser.add_argument("--jobs", type=options.positive_int, default=2, help="repetitions at a time")
    parser.add_argument("--tables", action="store_true", help="run nothing; print what is known")
    parser.add_argument("--rows", type=Path, metavar="FILE", default=demo.SPREAD, help="what repetitions gave")
    parser.add_argument("--output", metavar="DIR", default="runs/demo_spread", help="of the repetitions")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    torch = describe_machine()["packages"]["torch"]
    if not args.tables:
        Path(args.output).mkdir(parents=True, exist_ok=True)
        with own_folder(args.output), ThreadPoolExecutor(args.jobs) as pool:
            done = {row["seed"] for row in demo.repetitions(args.rows) if row["torch"] == torch}
            list(pool.map(partial(repeat, args=args), [seed for seed in range(*args.seeds) if seed not in done]))
    if not (rows := demo.repetitions(args.rows)):
        raise InputError(f"--rows {args.rows}: has no repetition with the demo's settings")
    print(f"\n{table(rows)}")


if __name__ == "__main__":
    run_script(main)
