"""What a step of every method costs: images per second and peak memory of its own script, views and update included.

  python benchmarks/methods.py
  python benchmarks/methods.py --b 64 --gpus 0 --output benchmarks/results/methods_gpu.json
  python benchmarks/methods.py --methods moco concl --b 2 --image-size 64 --steps 2 --output methods.json

Every method trains in mixed precision, in one process that also decodes and makes the views, as after its warm-up:
on images of noise, on generated CTs in 3D. The first window of steps does not count. PCL clusters
the 64 images every fourth step of 16, the others have nothing between epochs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

from medssl import errors
from medssl.benchmarks.machine import ROOT, add_measuring, report
from medssl.engine import options
from medssl.errors import InputError

METHODS = sorted(path.stem.removeprefix("train_") for path in ROOT.glob("train_*.py"))
VOLUMES = ("mae", "pcrl", "pcrlv2")
IMAGES = 64
BASELINE = "moco"  # to which costs are compared
EXTRA = {  # the loss after the warm-up, not before
    "concl": ["--warm-up", "0"],
    "pcl": ["--warm-up", "0", "--clusters", "8", "16", "32"],
    "magical": ["--patience", "0"],
}


def command(method: str, dims: int, args: argparse.Namespace, output: Path) -> list[str]:
    """What measures a method."""
    words = [sys.executable, str(ROOT / f"train_{method}.py"), "--amp", "--workers", "0"]
    words += ["--steps", str((args.repeats + 1) * args.steps), "--log-every", str(args.steps), "--output", str(output)]
    words += ["--gpus", ",".join(map(str, args.gpus))] if args.gpus else ["--device", args.device]
    if dims == 3:
        return [*words, "--d", "3", "--b", str(args.cubes), "--dataset", "phantom3d"]
    words += ["--data", str(output.parent / "images"), "--dataset", "folder", "--epochs", "1000000"]
    words += [*EXTRA.get(method, []), "--b", str(args.b), "--arch", args.arch]
    return [*words, "--image-size", str(args.image_size)]


def write_images(folder: Path, size: int) -> None:
    """Grey PNG files of noise, a little larger than the views."""
    folder.mkdir()
    for i in range(IMAGES):
        noise = np.random.default_rng(i).integers(0, 256, (size * 8 // 7,) * 2, np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")


def measure(method: str, dims: int, args: argparse.Namespace) -> tuple[list[float], float]:
    """Images (or pairs of cubes) per second of each window, and the peak memory in MB."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        write_images(Path(folder) / "images", args.image_size)
        words = command(method, dims, args, output)
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr.strip() or "nothing printed").splitlines()[-1]
            raise InputError(f"train_{method}.py failed with exit code {done.returncode}: {said}")
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "images_per_s" in line][1:]
    return [line["images_per_s"] for line in lines], max(line["peak_memory_mib"] for line in lines) * 2**20 / 1e6


def get_parser() -> options.Parser:
    """The options of this script."""
    parser = options.Parser(__doc__)
    group = parser.add_argument_group("steps")
    group.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD", help="which")
    group.add_argument("--b", type=options.positive_int, default=16, help="images in a step")
    group.add_argument("--cubes", type=options.positive_int, default=2, help="pairs of cubes in a step, in 3D")
    group.add_argument("--image-size", type=options.positive_int, default=224, help="side of the views")
    group.add_argument("--arch", default="resnet18", help="2D encoder")
    group = add_measuring(parser, "methods.json", repeats="windows that count; their median is reported")
    group.add_argument("--steps", type=options.positive_int, default=4, help="steps in a window")
    group.add_argument("--gpus", type=options.gpu_list, help="GPU numbers")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="kind of device")
    parser.set_defaults(repeats=3)
    return parser


def main(argv: Sequence[str] | None = None) -> dict:
    args = get_parser().parse_args(argv)
    if args.b > IMAGES or min(args.b, args.cubes) < 2:
        raise InputError(f"--b {args.b}, --cubes {args.cubes}: from 2 on, --b up to {IMAGES}")
    if BASELINE not in args.methods:
        args.methods = [BASELINE, *args.methods]
    cases = [(method, 2) for method in args.methods] + [(method, 3) for method in VOLUMES if method in args.methods]
    speeds, memory = {}, {}
    for method, dims in cases:
        name = method if dims == 2 else f"{method} 3D"
        speeds[name], memory[name] = measure(method, dims, args)
    results = {}
    for name, values in speeds.items():
        middle = median(values)  # windows of other processes, so that there are no pairs of them
        ratio = middle / median(speeds[BASELINE])
        results[name] = {"images_per_s": middle, "lowest": min(values), "highest": max(values), "ratio": ratio}
        results[name]["peak_mb"] = memory[name]
    return report(args.output, "methods", vars(args), results)


def cli() -> None:
    """Command line."""
    errors.run_script(main)


if __name__ == "__main__":
    cli()
