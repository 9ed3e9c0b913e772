"""What an environment does to runs: full and read-only disks, data and folders that vanish, two runs in one folder, few
open files, little memory, little shared memory.

  python benchmarks/endure_faults.py --minutes 5 --seed 0 --output runs/endurance

A run may end well, or with exit code 2 and one line that says why; it must not hang, leave a traceback, or end by a
signal, and its last checkpoint must be whole. Disks of their own want root on Linux; without it, these cases are left
out, and said.
"""

import itertools
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from medssl.benchmarks.bits import METHODS, TUNING, make_data
from medssl.engine import options
from medssl.files import write_json

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 240  # seconds after which a run hangs
ENDED = (0, 2)  # exit codes that are no fault
SMALL = ["--arch", "mobilenet_v2", "--device", "cpu", "--save-every", "1", "--log-every", "1"]


@dataclass
class Case:
    """A run in an environment.

    Attributes:
        command: script and options. folder: where the case happens. output: the run's folder.
        mount: shell words that are run first, in a mount namespace of the case's own. limits: of the run's process, by
            the names of the module resource. meanwhile: called again and again while it runs.
        second: a command that is started half a second later, in the same folder.
        unhelpful: an option that does not mend it, which the last line must not name.
    """

    command: list[str]
    folder: Path
    output: Path
    mount: str = ""
    limits: dict[int, int] = field(default_factory=dict)
    meanwhile: Callable[[], None] | None = None
    second: list[str] | None = None
    unhelpful: str | None = None


def pictures(folder: Path, count: int = 24) -> Path:
    """A folder of noisy pictures."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (64, 64), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


class Faults:
    """Makes cases; each method is one kind.

    Args:
        work: an empty folder for each case is made in it.
    """

    def __init__(self, work: Path, rng: random.Random) -> None:
        self.work, self.rng, self.number = work, rng, itertools.count()
        self.data = work / "data"
        if not self.data.exists():
            self.data.mkdir(parents=True)
            make_data(self.data)

    def folder(self) -> Path:
        """An empty folder."""
        folder = self.work / f"case_{next(self.number)}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def command(self, output: Path, data: Path | None = None, workers: int = 0, epochs: int = 4) -> list[str]:
        """A tiny pre-training or fine-tuning, of a MedMNIST file or a folder of pictures."""
        mnist = ["--data", str(self.data / "pneumoniamnist.npz"), "--dataset", "pneumoniamnist"]
        source = mnist if data is None else ["--data", str(data), "--dataset", "folder", "--texture-size", "64"]
        more = ["--workers", str(workers), "--output", str(output)]
        if data is None and self.rng.random() < 0.4:
            words = ["finetune_classification.py", *source, "--image-size", "32", "--b", "8", *TUNING, *SMALL]
            return [*words, "--epochs", str(epochs), *more]
        method = self.rng.choice(("moco", "byol", "pcrlv2", "magical"))
        tiny, whole = METHODS[method]
        return [f"train_{method}.py", *source, *tiny, *whole, *SMALL, "--epochs", str(epochs), *more]

    def full_disk(self) -> Case:
        folder = self.folder()
        size = self.rng.choice((0, 1, 4, 12, 20, 30, 45, 60, 90))
        mount = f"mount -t tmpfs -o size={max(1, 1024 * size)}k tmpfs {folder}/disk"
        return Case(self.command(folder / "disk" / "run"), folder, folder / "disk" / "run", mount)

    def read_only_disk(self) -> Case:
        folder = self.folder()
        mount = f"mount -t tmpfs tmpfs {folder}/disk && mount -o remount,ro {folder}/disk"
        return Case(self.command(folder / "disk" / "run"), folder, folder / "disk" / "run", mount)

    def small_shared_memory(self) -> Case:
        folder = self.folder()
        mount = f"mount -t tmpfs -o size={self.rng.choice((4, 16, 32, 48, 64, 512))}k tmpfs /dev/shm"
        command = self.command(folder / "run", pictures(folder / "pictures"), workers=2)
        return Case(command, folder, folder / "run", mount, unhelpful="--output")

    def deleted_data(self) -> Case:
        folder = self.folder()
        own = pictures(folder / "pictures")
        wanted, left = self.rng.uniform(2, 12), list(own.iterdir())
        since = time.monotonic()

        def remove() -> None:
            if time.monotonic() - since > wanted:
                for path in left:
                    path.unlink(missing_ok=True)

        command = self.command(folder / "run", own, self.rng.choice((0, 2)), epochs=60)
        return Case(command, folder, folder / "run", meanwhile=remove)

    def deleted_output(self) -> Case:
        folder, since, wanted = self.folder(), time.monotonic(), self.rng.uniform(3, 12)
        gone: list[bool] = []

        def remove() -> None:
            if not gone and time.monotonic() - since > wanted:
                shutil.rmtree(folder / "run", ignore_errors=True)
                gone.append(True)

        return Case(self.command(folder / "run", epochs=30), folder, folder / "run", meanwhile=remove)

    def two_in_one_folder(self) -> Case:
        folder = self.folder()
        command = self.command(folder / "run", epochs=self.rng.choice((2, 20)))
        return Case(command, folder, folder / "run", second=command)

    def few_open_files(self) -> Case:
        folder = self.folder()
        own, workers = (None, 0) if self.rng.random() < 0.5 else (pictures(folder / "pictures"), 2)
        limits = {resource.RLIMIT_NOFILE: self.rng.randint(8, 64)}
        return Case(self.command(folder / "run", own, workers), folder, folder / "run", limits=limits)

    def little_memory(self) -> Case:
        folder = self.folder()
        limits = {resource.RLIMIT_AS: self.rng.randint(1500, 9000) * 2**20}
        return Case(self.command(folder / "run"), folder, folder / "run", limits=limits)

    def small_files(self) -> Case:
        folder = self.folder()
        limits = {resource.RLIMIT_FSIZE: self.rng.choice((2**14, 10**5, 10**6, 10**7))}  # its log is a file, too
        return Case(self.command(folder / "run"), folder, folder / "run", limits=limits)


FAULTS = (
    "full_disk", "read_only_disk", "small_shared_memory", "deleted_data", "deleted_output", "two_in_one_folder",
    "few_open_files", "little_memory", "small_files",
)  # fmt: skip


def start(case: Case, command: Sequence[str], log: Path) -> subprocess.Popen:
    """Start a case's command in a session of its own, which prints to a file."""

    def limit() -> None:
        for name, value in case.limits.items():
            resource.setrlimit(name, (value, value))

    words = [sys.executable, str(ROOT / command[0]), *command[1:]]
    if case.mount:
        (case.folder / "disk").mkdir(exist_ok=True)
        # The checkpoint is copied to where it can be looked at: the mount is the case's own.
        keep = f'code=$?; cp "{case.output}/last.pt" "{case.folder}/kept.pt" 2>/dev/null; exit $code'
        words = ["unshare", "-m", "sh", "-c", f'{case.mount} && {{ "$@"; {keep}; }}', "sh", *words]
    with open(log, "w") as out:
        return subprocess.Popen(
            words, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            preexec_fn=limit, env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(case.folder)},
        )  # fmt: skip


def try_case(case: Case) -> list[str]:
    """Run a case: what is wrong with its end, nothing where all is well."""
    commands = [case.command] if case.second is None else [case.command, case.second]
    logs = [case.folder / f"log_{i}.txt" for i in range(len(commands))]
    running = [start(case, command, log) for command, log in zip(commands, logs)]
    until = time.monotonic() + LONGEST
    while any(process.poll() is None for process in running) and time.monotonic() < until:
        if case.meanwhile:
            case.meanwhile()
        time.sleep(0.02)
    wrong = []
    for process, log in zip(running, logs):
        if process.poll() is None:
            os.killpg(process.pid, 9)
            process.wait()
            wrong.append(f"hangs for {LONGEST} s")
        elif process.returncode not in ENDED:
            wrong.append(f"ends with {process.returncode}")
        text = log.read_text(errors="replace")
        if "Traceback" in text:
            wrong.append("leaves a traceback")
        last = text.rstrip().rpartition("\n")[2]
        if process.returncode == 2 and not last.startswith("error: "):
            wrong.append("its last line is not the error's")
        if case.unhelpful and case.unhelpful in last:
            wrong.append(f"its last line names {case.unhelpful}, which does not help")
    return wrong + unreadable(case)


def unreadable(case: Case) -> list[str]:
    """Checkpoints of a case that are not whole."""
    wrong = []
    for path in (*case.output.rglob("last.pt"), *case.folder.glob("kept.pt")):
        try:
            torch.load(path, weights_only=True, mmap=True)
        except Exception as error:  # whatever it is, the file is not whole
            wrong.append(f"{path.name} cannot be read: {error}")
    return wrong


def has_mounts() -> bool:
    """Whether this process may mount a disk of its own."""
    command = ["unshare", "-m", "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
    return bool(shutil.which("unshare")) and subprocess.run(command, capture_output=True).returncode == 0


def run(seconds: float, seed: int, keep: Path, kinds: Sequence[str] = FAULTS) -> dict:
    """Try cases for some time, at least one of each kind; returns counts and faults, whose folders are kept."""
    until = time.monotonic() + seconds
    faults, counts, made = [], Counter(), Faults(keep, random.Random(seed))
    mounted = has_mounts()
    if not mounted:
        print("note: no disks of their own without root: full, read-only and shared memory are left out")
    kinds = [kind for kind in kinds if mounted or kind not in FAULTS[:3]]
    for turn in itertools.count():
        for kind in kinds:
            if turn and time.monotonic() > until:
                return {"cases": dict(counts), "faults": faults}
            case = getattr(made, kind)()
            wrong = try_case(case)
            counts[kind] += 1
            if wrong:
                faults.append(f"{kind}: {'; '.join(wrong)}; kept in {case.folder}")
                print(f"FAULT {faults[-1]}", flush=True)
                write_json(case.folder / "case.json", {"kind": kind, "command": case.command, "wrong": wrong})
            else:
                shutil.rmtree(case.folder)
    raise AssertionError("unreachable")


def get_parser() -> options.Parser:
    parser = options.Parser(__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="how long, at least one case of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn")
    parser.add_argument("--output", metavar="DIR", default="runs/faults", help="where cases that show a fault are kept")
    parser.add_argument("--kinds", nargs="+", choices=FAULTS, default=FAULTS, metavar="KIND", help=", ".join(FAULTS))
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    found = run(60 * args.minutes, args.seed, Path(args.output), args.kinds)
    print(found["cases"])
    raise SystemExit(bool(found["faults"]))


if __name__ == "__main__":
    main()
