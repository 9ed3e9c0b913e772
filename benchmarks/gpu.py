"""Does everything that needs a GPU work on this one, and how fast is it? One command of nine minutes.

  python benchmarks/gpu.py
  python benchmarks/gpu.py --parts split amp --methods moco pcrlv2 --minutes 3
  python benchmarks/gpu.py --device cpu --quick --minutes 30 --output OUT           (the same at toy size, no GPU)
  python benchmarks/gpu.py --study DATA --output STUDY

Checks, for every method in 2D and 3D: a batch in two parts by DataParallel, both on the one card, gives the losses and
gradients of the whole (split); losses are those of the CPU (cpu); mixed precision is near full precision (amp); a run
that was stopped continues to the same bits (resume); compiled networks have the same losses (compile). All but bfloat16
and float16 are in full precision, without TF32. Measurements, in bfloat16: speed and memory of every method (methods);
the wait for files, decoded or from a cache (data); ours against the plain recipe (plain), and against lightly, where it
is installed (lightly).

Every row is written as it comes, to gpu_CARD.json and the page gpu_CARD.md in `--output`. Every part has its share of
the minutes; what did not fit is listed as not run, and the same command goes on with it, and tries again what failed.

`--study DATA` trains instead, by compare.py, with DATA/hippocampus (folders images and masks) and
DATA/pneumoniamnist.npz: from random weights and from those that the methods learn. After `--minutes` the study is
stopped, with its state saved; the same command goes on. Its tables are gathered in study.md.
"""

import argparse
import functools
import importlib
import multiprocessing
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import torch

from medssl.benchmarks.machine import RESULTS, ROOT, describe_machine
from medssl.benchmarks.methods import BASELINE, METHODS, dims_of, parser_of
from medssl.engine import options
from medssl.engine.parallel import gpu_trouble
from medssl.errors import InputError, run_script
from medssl.files import read_json, write_json, write_text
from medssl.markup import markdown_text, one_line, shell_words

FULL = {"files": 64, "side": 96, "b": 16, "cube": (32, 32, 16), "cubes": 4, "arch": {2: "resnet18", 3: "unet3d"}}
QUICK = {"files": 64, "side": 64, "b": 8, "cube": (16, 16, 8), "cubes": 2, "arch": {2: "resnet18", 3: "unet3d_quarter"}}


@functools.cache
def parts() -> ModuleType:
    """`gpu_parts.py`, which needs all that training needs.

    Raises:
        InputError: where a package is missing.
    """
    try:
        found = importlib.import_module("medssl.benchmarks.gpu_parts")
        for method in METHODS:
            parser_of(method)
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed; pip install -r requirements.txt") from None
    return found


# Rows ----------------------------------------------------------------------------------------------


class Report:
    """The JSON file and the page, which are written anew with every row.

    Args:
        folder: where they go. card: in their names. command: as it was typed. kept: options that all rows share.
        anew: forget the rows of an earlier command.

    Raises:
        InputError: for rows of other code or options.
    """

    def __init__(self, folder: Path, card: str, command: str, kept: dict, anew: bool) -> None:
        self.json, self.page = folder / f"gpu_{card}.json", folder / f"gpu_{card}.md"
        found = {} if anew or not self.json.exists() else read_json(self.json)
        machine = describe_machine()
        same = kept | {name: machine[name] for name in ("packages", "gpu", "cpu")}
        same["commit"] = (machine["commit"] or "").rstrip("+")  # which this very file would bring, where git has it
        if found and found.get("same") != same:
            raise InputError(f"{self.json}: is of other code, options or machine; use another --output, or --anew")
        self.rows = found.get("rows", [])
        commands = list(dict.fromkeys([*found.get("commands", []), command]))
        self.content = {"benchmark": "gpu", "same": same, "commands": commands, "machine": machine, "rows": self.rows}

    def row_of(self, cell: object) -> dict | None:
        """What came of a cell."""
        return next((row for row in self.rows if all(row[key] == value for key, value in vars(cell).items())), None)

    def add(self, cell: object, row: dict) -> None:
        """Keep a row in the place of an earlier one, and write everything."""
        earlier = self.row_of(cell)
        if earlier is not None:
            self.rows.remove(earlier)
        self.rows.append({**vars(cell), **row})
        said = {True: parts().PARTS[cell.part].done, False: "FAILED", None: "not run"}
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in row.get("numbers", {}).items())
        print(f"{cell.part}: {cell.name}: {said[row['passed']]}: {row.get('reason', numbers)}", flush=True)
        self.write()

    def write(self) -> None:
        """Write both files."""
        write_json(self.json, self.content)
        write_text(self.page, self.text())

    def text(self) -> str:
        """The page: the machine, a table a part, and what was not run."""
        machine = self.content["machine"]
        packages = ", ".join(f"{name} {number}" for name, number in machine["packages"].items() if number)
        lines = [f"# On {markdown_text(machine['gpu'] or machine['cpu'])}", ""]
        lines += [f"{machine['cores']} cores of {markdown_text(machine['cpu'])}, {machine['system']}, "
                  f"CUDA {machine['cuda']}, Python {machine['python']}, {packages}; commit {machine['commit']}, "
                  f"{machine['date']}.", "", "```", *self.content["commands"], "```"]  # fmt: skip
        for name, part in parts().PARTS.items():
            rows = [row for row in self.rows if row["part"] == name and row["passed"] is not None]
            if rows:
                lines += ["", f"## {name}", "", " ".join(part.run.__doc__.split()), "", *table(rows, part.done)]
        lines += ["", "## Not run", ""]
        for name in parts().PARTS:
            left = [cell for cell in parts().cells() if cell.part == name]
            left = [(cell.name, row) for cell in left if not (row := self.row_of(cell)) or row["passed"] is None]
            told = [label + (f" ({markdown_text(row['reason'])})" if row else "") for label, row in left]
            lines += [f"* {name}: {', '.join(told)}"] if told else []
        return "\n".join(lines if lines[-1] else [*lines, "Nothing."]) + "\n"


def table(rows: Sequence[dict], done: str) -> list[str]:
    """Rows of one part, with a column for each of their numbers; `done` is what a row is that did not fail."""
    names = list(dict.fromkeys(name for row in rows for name in row.get("numbers", {})))
    lines = [f"| {' | '.join(['', 'outcome', *names, 'seconds'])} |", f"|{' --- |' * (len(names) + 3)}"]
    for row in rows:
        label = " ".join(filter(None, [row["method"], f"{row['dims']}D", row["variant"]]))
        said = done if row["passed"] else f"**failed** {markdown_text(row.get('reason', ''))}".strip()
        numbers = row.get("numbers", {})
        values = [f"{numbers[name]:.4g}" if name in numbers else "" for name in names]
        lines.append(f"| {' | '.join([label, said, *values, str(row['seconds'])])} |")
    return lines


# Running -------------------------------------------------------------------------------------------


def run(todo: Sequence[object], place: object, minutes: float, add: Callable[[object, dict], None]) -> None:
    """Run cells in a process of their own, which is killed when a part's time is over and which an error of CUDA may
    end: the next one goes on with the rest. Time that a part leaves is the next one's."""
    known, spawn = parts().PARTS, multiprocessing.get_context("spawn")
    chosen = [name for name in known if any(cell.part == name for cell in todo)]
    whole, ends, end = sum(known[name].share for name in chosen), {}, time.monotonic()
    for name in chosen:
        end += 60 * minutes * known[name].share / whole
        ends[name] = end
    while todo := [cell for cell in todo if time.monotonic() < ends[cell.part]]:
        here, there = spawn.Pipe(duplex=False)
        process = spawn.Process(target=parts().work, args=(todo, place, there))
        process.start()
        there.close()
        try:
            while todo and here.poll(max(0.0, ends[todo[0].part] - time.monotonic())):
                row = here.recv()
                add(todo[0], row)
                todo = todo[1:]
            process.join(0 if todo else 3)  # at its end it puts away what it shares with its workers
        except EOFError:
            process.join()
            log = (place.folder / "log.txt").read_text(errors="replace").split("\n")
            last = next((line for line in reversed(log) if line.strip()), "")
            reason = one_line(f"its process ended with exit code {process.exitcode}: {last}")
            add(todo[0], {"passed": False, "reason": reason, "seconds": 0.0})
            todo = todo[1:]
        finally:
            process.kill()
            process.join()


def check_and_measure(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Everything but `--study`."""
    folder, made = Path(args.output or RESULTS), parts()
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    card = re.sub(r"\W+", "_", name.lower()).strip("_")
    sizes = QUICK if args.quick else FULL
    large = {**FULL, "files": 1024, "side": 224, "b": args.b, "cube": (64, 64, 32), "cubes": args.cubes, "window": 5}
    with tempfile.TemporaryDirectory() as work:
        kept = {"quick": args.quick, "b": args.b, "cubes": args.cubes, "workers": args.workers}
        report = Report(folder, card, shell_words(["python", "benchmarks/gpu.py", *argv]), kept, args.anew)
        place = made.Place(
            args.device, Path(work), args.workers, made.Sizes(**sizes), made.Sizes(**(QUICK if args.quick else large)),
            radiograph=128 if args.quick else 1024,
        )  # fmt: skip
        wanted = [cell for cell in made.cells() if cell.part in args.parts and cell.method in args.methods]
        rows = {cell: report.row_of(cell) for cell in wanted}
        todo = [cell for cell in wanted if not rows[cell] or not rows[cell]["passed"]]
        report.write()
        run(todo, place, args.minutes, report.add)
    print(f"written: {report.json} and {report.page}", flush=True)
    failed = [row for row in report.rows if row["passed"] is False]
    left = len([cell for cell in wanted if not report.row_of(cell)])
    print(f"{len(report.rows)} rows, {len(failed)} failed; {left} of what was asked for not run")
    if failed:
        raise SystemExit(1)


# Studies -------------------------------------------------------------------------------------------


def studies(args: argparse.Namespace) -> dict[str, list[str]]:
    """The options of compare.py, by a study's name.

    Raises:
        InputError: where there are no data for one.
    """
    data, quick, made = Path(args.study), args.quick, {}
    both = [method for method in args.methods if dims_of(method) == [2, 3]]
    flat = [method for method in args.methods if method == BASELINE or method in both]
    where = ["--device", "cpu"] if args.device == "cpu" else ["--amp", "--gpus", "0"]
    where += ["--trials", "1" if quick else "5", "--jobs", "1" if quick else "3", "--workers", str(args.workers)]
    if (data / "hippocampus" / "images").is_dir() and (data / "hippocampus" / "masks").is_dir():
        made["hippocampus"] = ["--task", "segmentation", "--data", str(data / "hippocampus"), "--dataset", "folder",
                               "--init", "random", *both, "--annotation-percent", "5", "20", *where,
                               "--arch", "unet3d_quarter" if quick else "unet3d", "--patch", "32", "32", "32",
                               "--epochs", "1" if quick else "40"]  # fmt: skip
        length = "--steps 2 --b 2" if quick else "--epochs 600 --b 16"
        made["hippocampus"] += ["--with", f"pretraining {length} --cube-size 32 32 32"] if both else []
        made["hippocampus"] += ["--with", "segmentation --epoch-steps 1"] if quick else []
    if (data / "pneumoniamnist.npz").is_file():
        made["pneumoniamnist"] = ["--data", str(data / "pneumoniamnist.npz"), "--dataset", "pneumoniamnist",
                                  "--init", "random", *flat, "--annotation-percent", "1", "10", *where,
                                  "--image-size", "32" if quick else "64"]  # fmt: skip
        made["pneumoniamnist"] += ["--epochs", "1"] if quick else []
        length = "--steps 2 --b 8" if quick else "--epochs 300 --b 256"
        made["pneumoniamnist"] += ["--with", f"pretraining {length}"] if flat else []
    if not made:
        raise InputError(f"--study {data}: has neither hippocampus/images and hippocampus/masks nor pneumoniamnist.npz")
    return made


def study(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Run the studies, one after the other, each for as long as the others leave; gather their tables."""
    parts()  # which tells of packages that are missing
    output, end, found = Path(args.output or "runs/gpu_study"), time.monotonic() + 60 * args.minutes, studies(args)
    lines = [f"# Studies on {markdown_text(describe_machine()['gpu'] or 'a CPU')}", "",
             f"commit {describe_machine()['commit']}, {describe_machine()['date']}", "",
             "```", shell_words(["python", "benchmarks/gpu.py", *argv]), "```"]  # fmt: skip
    ended = {}
    for number, (name, words) in enumerate(found.items()):
        command = [sys.executable, str(ROOT / "compare.py"), *words, "--output", str(output / name)]
        print(shell_words(["python", "compare.py", *command[2:]]), flush=True)
        seconds = (end - time.monotonic()) / (len(found) - number)
        code, said = stopped_after(command, max(0.0, seconds))
        if code == 2:
            raise InputError(f"compare.py, {name}: {said}")
        if code in (-signal.SIGTERM, 128 + signal.SIGTERM):  # what there is, as a table
            subprocess.run([*command, "--tables-only"], capture_output=True)
            ended[name] = (
                "stopped by --minutes; the same command continues, and runs without a result are still to come"
            )
        else:
            ended[name] = "finished" if code == 0 else f"ended with exit code {code}: {said}"
        page = output / name / "comparison.md"
        lines += ["", f"## {name}", "", f"{markdown_text(ended[name])}.", "", "```",
                  shell_words(["python", "compare.py", *command[2:]]), "```", ""]  # fmt: skip
        lines += [page.read_text(encoding="utf-8").strip() if page.is_file() else "No run has finished yet."]
        write_text(output / "study.md", "\n".join(lines) + "\n")
    print("; ".join(f"{name}: {how}" for name, how in ended.items()), f"written: {output}/study.md", sep="\n")


def stopped_after(command: Sequence[str], seconds: float) -> tuple[int, str]:
    """The exit code of a command, which gets SIGTERM after so many seconds, and the last line of its errors."""
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        try:
            said = process.communicate(timeout=seconds)[1]
        except subprocess.TimeoutExpired:
            process.terminate()
            said = process.communicate()[1]
    except BaseException:  # Ctrl-C, which it got too
        process.terminate()
        process.wait()
        raise
    return process.returncode, next((line for line in reversed(said.splitlines()) if line.strip()), "nothing said")


def get_parser() -> options.Parser:
    """The options of this script."""
    parser, known = options.Parser(__doc__), parts().PARTS
    group = parser.add_argument_group("what is run")
    group.add_argument("--parts", nargs="+", choices=tuple(known), default=[*known], metavar="PART", help="which parts")
    group.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD", help="which methods")
    group.add_argument("--study", metavar="DATA", help="train studies on the data in this folder instead")
    group.add_argument("--minutes", type=options.bounded_float(0.01, 1e5), default=9.0, help="of all parts together")
    group.add_argument("--quick", action="store_true", help="toy sizes, which a CPU can do")
    group.add_argument("--anew", action="store_true", help="forget the rows of earlier commands")
    group = parser.add_argument_group("machine")
    group.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="kind of device")
    group.add_argument("--workers", type=options.non_negative_int, default=12, help="decoding processes")
    group.add_argument("--b", type=options.positive_int, default=128, help="images of a measured step")
    group.add_argument("--cubes", type=options.positive_int, default=32, help="cubes of a measured step")
    group.add_argument("--output", metavar="DIR", help="where results go: benchmarks/results, or runs/gpu_study")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Check, measure and report; or train."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = get_parser().parse_args(argv)
    trouble = gpu_trouble() if args.device != "cpu" else None
    if trouble or (args.device == "cuda" and not torch.cuda.is_available()):
        raise InputError(trouble or "--device cuda: this machine has no GPU that PyTorch can use")
    args.workers = options.decoders(args)
    args.device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    (study if args.study else check_and_measure)(args, argv)


def cli() -> None:
    """Command line."""
    run_script(main)


if __name__ == "__main__":
    cli()
