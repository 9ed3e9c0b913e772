"""What the benchmarks share: the machine in words, fair timing, peak memory, options, and the report."""

import argparse
import concurrent.futures
import contextlib
import datetime
import multiprocessing
import os
import platform
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import torch

from medssl.engine.options import Parser, positive_int
from medssl.files import write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
STATUS = Path("/proc/self/status")  # of a process; Linux has it
PACKAGES = ("torch", "torchvision", "Pillow", "numpy", "scipy", "SimpleITK", "segmentation-models-pytorch")


def describe_machine() -> dict:
    """Everything on which a figure depends: processor, versions, date, commit, and how busy the machine is."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit, with "+" where files differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def add_measuring(
    parser: Parser,
    output: str | None,
    help_: str = "the JSON file",
    repeats: str = "interleaved runs; the median counts",
) -> argparse._ArgumentGroup:
    """Add the options of every benchmark; `output` is the default's name beside the other results."""
    group = parser.add_argument_group("measuring")
    group.add_argument("--repeats", type=positive_int, default=5, help=repeats)
    group.add_argument("--output", metavar="FILE", default=output and str(RESULTS / output), help=help_)
    return group


def alone(function: Callable, *arguments: object) -> object:
    """`function(*arguments)` in a new process of its own, where peak memory is that of this call; both picklable."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *arguments).result()


def peak_mb() -> float:
    """Peak resident memory of this process in MB (10⁶ bytes) so far; a peak never falls.

    Not from `getrusage`: on Linux its figure includes what the parent had when it started this process.
    """
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / 1e6


def interleave(variants: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Measure all variants in turn, `repeats` times, every other time in reverse order.

    So a machine that slows down or is disturbed for a while does not do so to one variant alone.

    Args:
        variants: each call measures once and returns images per second.
    """
    speeds: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(repeats):
        for name in list(variants)[:: -1 if repeat % 2 else 1]:
            speeds[name].append(variants[name]())
    return speeds


def summarise(speeds: dict[str, list[float]], baseline: str) -> dict[str, dict]:
    """Median, range and ratio to the baseline; the ratio is the median of the repeats' ratios."""
    return {
        name: {
            "images_per_s": median(values),
            "lowest": min(values),
            "highest": max(values),
            "ratio": median(value / plain for value, plain in zip(values, speeds[baseline])),
        }
        for name, values in speeds.items()
    }


def report(path: str | Path, benchmark: str, options: dict, results: dict[str, dict], **more: object) -> dict:
    """Print the table and write the JSON file.

    Args:
        results: variant → numbers: first what was measured, whose name says the unit, then "lowest", "highest",
            "ratio" and, where there is one, "peak_mb".
        more: further entries of the file.
    """
    width = max(map(len, results))
    memory = any("peak_mb" in row for row in results.values())
    quantity = next(iter(next(iter(results.values()))))
    print(f"{'':{width}}  {quantity:>16}  (lowest, highest)     ratio" + ("   peak MB" if memory else ""))
    for name, row in results.items():
        extent = f"({row['lowest']:.4g}, {row['highest']:.4g})"
        line = f"{name:{width}}  {row[quantity]:16.4g}  {extent:<18}  {row['ratio']:5.2f} x"
        print(line + (f"  {row['peak_mb']:8.0f}" if "peak_mb" in row else ""))
    options = {key: value for key, value in options.items() if key != "output"}
    content = {"benchmark": benchmark, "options": options, "results": results, **more, "machine": describe_machine()}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_json(Path(path), content)
    print(f"written to {path}")
    return content
