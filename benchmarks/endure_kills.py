"""Kill runs of every script at every moment, continue them, and compare them with runs that nobody disturbed.

  python benchmarks/endure_kills.py --minutes 10 --seed 0 --output runs/endurance

A kill is SIGKILL, after a run's first checkpoint. Ways:

  forked    a process that has everything imported already, killed at any moment, alone or with its workers
  writing   the same, killed inside the writing of a checkpoint: in the middle of the bytes, before they reach the disk,
            before and after the file gets its name
  shell     a process of its own, started as a person does
  torchrun  two processes, killed together, or one of them or what started them alone: the others must end by themselves

Two lanes, each with its share of the scripts, run side by side unless `--lanes` says otherwise. After each kill, every
checkpoint that was there must be there still, whole, and no older. When a run is complete, its weights, optimiser,
exports and results must have the bits of the undisturbed run.
"""

import concurrent.futures
import contextlib
import functools
import importlib
import io
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from medssl.benchmarks.bits import METHODS, PREPARED, TUNING, VOLUMES, digest_of, make_data, pretrained, tuned
from medssl.benchmarks.bits import files as arrays_of
from medssl.engine import options
from medssl.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--arch", "mobilenet_v2"]  # whose checkpoints are written in a hundredth of a second
OFTEN = ["--save-every", "1", "--log-every", "1", "--device", "cpu"]
WAYS = ("forked", "writing", "shell", "torchrun")
PATIENCE = 300  # seconds after which a run that has not ended hangs
HOLD = 60  # seconds that a slowed writer waits for its kill
CHECKPOINT = "**/last.pt"
PLACES = ("bytes", "disk", "before", "after")  # of a kill inside a write


@dataclass(frozen=True)
class Task:
    """A script, and what of it is compared.

    Attributes:
        module: the script. words: its options, less the folder. digest: of a complete run's folder.
        place: the option that names the folder. proof: a pattern of files that its first checkpoint leaves.
        processes: whether it runs under torchrun too.
    """

    module: str
    words: tuple[str, ...]
    digest: Callable[[Path], str]
    place: str = "--output"
    proof: str = CHECKPOINT
    processes: bool = False


def tasks(data: Path) -> dict[str, Task]:
    """Every script that trains or writes, on tiny data."""
    mnist = ["--data", str(data / "pneumoniamnist.npz"), "--dataset", "pneumoniamnist"]
    made: dict[str, Task] = {}

    def add(name: str, module: str, *words: object, **more: object) -> None:
        made[name] = Task(module, tuple(map(str, words)), **more)

    for method, (tiny, whole) in METHODS.items():
        words = [*tiny, *SMALL, *whole, *mnist, "--epochs", 4, "--workers", 0, *OFTEN]
        add(method, f"train_{method}", *words, digest=pretrained, processes=True)
    for method, tiny in VOLUMES.items():
        cubes = ["--data", data / f"cubes_{PREPARED[method]}", "--dataset", "luna", "--epochs", 4, "--workers", 2]
        add(f"{method}_3d", f"train_{method}", *tiny, *cubes, *OFTEN, digest=pretrained)
    tuning = ["--device", "cpu", "--save-every", 1, *TUNING]
    images = [*SMALL, "--image-size", 32, "--b", 8]
    add("classification", "finetune_classification", *images, *mnist, *tuning, digest=tuned)
    add("segmentation", "finetune_segmentation", *images, "--dataset", "phantom2d", "--texture-size", 32, *tuning,
        "--annotation-percent", 1, "--epoch-steps", 3, "--overlays", 1, digest=tuned)  # fmt: skip
    add("detection", "finetune_detection", "--dataset", "tissue2d", "--arch", "resnet18", "--b", 2, "--iterations", 6,
        "--milestones", 4, "--warmup-iterations", 0, "--sides", 64, 72, "--test-side", 64, "--annotation-percent", 5,
        "--workers", 0, "--no-tensorboard", "--device", "cpu", "--save-every", 1, digest=tuned)  # fmt: skip
    add("study", "compare", *mnist, "--init", "random", "moco", *SMALL, "--image-size", 32, "--b", 8, "--trials", 1,
        "--annotation-percent", 100, "--epochs", 2, "--workers", 0, "--jobs", 0, "--with",
        "pretraining --epochs 2 --queue 64", "--no-features", digest=study)  # fmt: skip
    add("features", "evaluate_features", *mnist, "--image-size", 32, "--k", 3, "--workers", 0, digest=tuned, proof="*")
    add("cubes", "preprocess.luna", "--data", data / "scans", "--method", "pcrl", "--scale", 6, "--workers", 2,
        digest=arrays_of, place="--save", proof="**/*.npy")  # fmt: skip
    return made


def study(folder: Path) -> str:
    """The digest of a study: its pre-trained encoders, and its table."""
    exports = [torch.load(path, weights_only=True) for path in sorted(folder.rglob("encoder.pt"))]
    table = [line.split("|")[:6] for line in (folder / "comparison.md").read_text().splitlines()]
    return digest_of([exports, table])


# Starting and killing ------------------------------------------------------------------------------


@dataclass
class Started:
    """A run under way, in a session of its own.

    Attributes:
        pid: of its first process. main: whom to kill where not all are. log: what it prints.
    """

    pid: int
    log: Path
    code: int | None = None

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def kill(self, alone: int | None = None) -> None:
        """SIGKILL to one process alone, or to all of its session; waits for the first to be gone."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL) if alone is None else os.kill(alone, signal.SIGKILL)
        self.wait()

    def wait(self) -> int:
        """Wait for its end: its exit code, or 124 where it hangs and is killed."""
        until = time.monotonic() + PATIENCE
        while self.poll() is None:
            if time.monotonic() > until:
                self.kill()
                return 124
            time.sleep(0.01)
        return self.code

    def children(self) -> list[int]:
        """Processes that the first has started."""
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
            return [int(number) for number in text.split()]
        return []


def fork(task: Task, folder: Path, log: Path, hold: tuple[str, int, float] | None = None) -> Started:
    """Run a script in a fork of this process; `hold`: as `slow_down` has it."""
    module = importlib.import_module(f"medssl.{task.module}")
    pid = os.fork()
    if pid:
        return Started(pid, log)
    code = 1
    try:
        os.setsid()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.argv = [f"{task.module}.py", *task.words, task.place, str(folder)]
        if hold:
            slow_down(*hold, folder)
        module.cli()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def slow_down(place: str, number: int, share: float, folder: Path) -> None:
    """Make this process stop inside the writing of its checkpoint `number` (from 0), and leave the file `holds`.

    Args:
        place: of `PLACES`. share: of the bytes that are written by then, for the first place.
    """
    save, replace, sync, count = torch.save, os.replace, os.fsync, itertools.count()
    now = False

    def stop() -> None:
        (folder / "holds").touch()
        time.sleep(HOLD)

    def slow_save(content: object, file: object, *rest: object, **more: object) -> None:
        nonlocal now
        now = next(count) == number
        made = io.BytesIO()
        save(content, made, *rest, **more)
        whole = made.getvalue()
        with contextlib.nullcontext(file) if hasattr(file, "write") else open(file, "wb") as part:
            if now and place == "bytes":
                part.write(whole[: int(share * len(whole))])
                part.flush()
                stop()
            part.write(whole)

    def slow_sync(file: int) -> None:
        if now and place == "disk":
            stop()
        sync(file)

    def slow_replace(*names: object) -> None:
        if now and place == "before":
            stop()
        replace(*names)
        if now and place == "after":
            stop()

    torch.save, os.fsync, os.replace = slow_save, slow_sync, slow_replace


def shell(task: Task, folder: Path, log: Path, processes: int = 1) -> Started:
    """Run a script as a person types it, or under torchrun."""
    script = str(ROOT / f"{task.module.replace('.', '/')}.py")
    command = [sys.executable, script]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        start = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", port]
        command = [sys.executable, *start, script]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(log, "a") as out:
        process = subprocess.Popen(
            [*command, *task.words, task.place, str(folder)], stdout=out, stderr=out, stdin=subprocess.DEVNULL,
            start_new_session=True, env=env,
        )  # fmt: skip
    process.returncode = 0  # it is waited for by `Started`
    return Started(process.pid, log)


# Judging -------------------------------------------------------------------------------------------


def steps(folder: Path) -> dict[str, int]:
    """The steps that each checkpoint of a folder holds.

    Raises:
        Exception: whatever torch.load says of one that is not whole.
    """
    found = {}
    for path in sorted(folder.rglob("last.pt")):
        with contextlib.suppress(FileNotFoundError):  # a trial that has ended needs none
            found[str(path.relative_to(folder))] = torch.load(path, weights_only=True, mmap=True)["step"]
    return found


def finished(folder: Path, checkpoint: str) -> bool:
    """Whether the trial of a checkpoint that is no longer there has ended."""
    return (folder / checkpoint).with_name("result.json").exists()


@dataclass
class Ledger:
    """What was done and found.

    Attributes:
        keep: a folder for what shows a fault. kills: by (task, way). runs: that were continued to their end.
        faults: a line each; their folders are kept.
    """

    keep: Path
    kills: Counter = field(default_factory=Counter)
    lost: int = 0
    differing: int = 0
    runs: int = 0
    faults: list[str] = field(default_factory=list)

    def counts(self) -> dict:
        """What `run` returns, of this one."""
        by_way = {way: sum(n for (_, own), n in self.kills.items() if own == way) for way in WAYS}
        by_script = Counter()
        for (name, _), n in self.kills.items():
            by_script[name] += n
        return {
            "kills": self.kills.total(), "by_way": by_way, "by_script": dict(by_script), "completed": self.runs,
            "lost_checkpoints": self.lost, "differing": self.differing, "faults": self.faults,
        }  # fmt: skip

    def fault(self, text: str, folder: Path) -> None:
        """Note a fault and keep the folder in which it happened."""
        place = self.keep / f"{folder.parent.name}_{len(self.faults)}"
        shutil.copytree(folder.parent, place, dirs_exist_ok=True)
        self.faults.append(f"{text}; kept in {place}")
        print(f"FAULT {text}", flush=True)


class Laboratory:
    """Runs tasks, kills them, and compares.

    Args:
        made: the tasks, by name. work: a folder for undisturbed runs and runs under way.
    """

    def __init__(self, made: dict[str, Task], work: Path, keep: Path, seed: str) -> None:
        self.tasks, self.work, self.rng, self.ledger = made, work, random.Random(seed), Ledger(keep)
        self.references: dict[tuple[str, int], tuple[str, float]] = {}

    def reference(self, name: str, processes: int) -> tuple[str, float]:
        """The digest of an undisturbed run, and the seconds that it took after its first checkpoint."""
        key = (name, processes)
        if key not in self.references:
            folder, task = self.fresh(f"reference_{name}_{processes}"), self.tasks[name]
            run = (
                shell(task, folder, self.log(folder), processes)
                if processes > 1
                else fork(task, folder, self.log(folder))
            )
            self.await_proof(run, task, folder)
            since = time.monotonic()
            if run.wait():
                raise RuntimeError(f"{name}: fails undisturbed: {self.log(folder).read_text()[-2000:]}")
            self.references[key] = task.digest(folder), time.monotonic() - since
        return self.references[key]

    def fresh(self, name: str) -> Path:
        """An empty folder's place, in an empty folder that holds the log too."""
        shutil.rmtree(self.work / name, ignore_errors=True)
        (self.work / name).mkdir(parents=True)
        return self.work / name / "run"

    @staticmethod
    def log(folder: Path) -> Path:
        return folder.with_name("log.txt")

    @staticmethod
    def newest(task: Task, folder: Path) -> int:
        """When the newest file was written that shows a run's progress; 0 where there is none."""
        times = [0]
        with contextlib.suppress(FileNotFoundError):  # what a run removes while this looks: it is looked at again
            times += [path.stat().st_mtime_ns for path in folder.glob(task.proof)]
        return max(times)

    def await_proof(self, run: Started, task: Task, folder: Path, before: int = 0) -> bool:
        """Wait for a run's first checkpoint after a time, or its end; False where neither comes."""
        return self.await_that(lambda: run.poll() is not None or self.newest(task, folder) > before)

    @staticmethod
    def await_that(happened: Callable[[], bool], seconds: float = PATIENCE) -> bool:
        """Wait for something to happen; False where it does not."""
        until = time.monotonic() + seconds
        while not happened():
            if time.monotonic() > until:
                return False
            time.sleep(0.005)
        return True

    def chain(self, name: str, way: str, most: int) -> None:
        """One run from its beginning to its end, killed up to `most` times on the way."""
        task, processes = self.tasks[name], 2 if way == "torchrun" else 1
        digest, seconds = self.reference(name, processes)
        folder, before = self.fresh(f"{name}_{way}"), {}
        for kill in range(most + 1):
            newest = self.newest(task, folder)
            run = self.begin(task, way, folder, held=kill < most)
            if kill == most:
                break
            killed = self.kill(run, task, way, folder, seconds, newest)
            if killed is None:
                self.ledger.fault(f"{name}, {way}: hangs for {PATIENCE} s", folder)
                return
            if not killed:
                break
            self.ledger.kills[name, way] += 1
            before = self.look(name, way, folder, before)
            if before is None:
                return
        code = run.wait()
        self.ledger.runs += 1
        if code:
            self.ledger.fault(f"{name}, {way}: ends with {code} after kills", folder)
        elif task.digest(folder) != digest:
            self.ledger.differing += 1
            self.ledger.fault(f"{name}, {way}: differs from the undisturbed run", folder)

    def begin(self, task: Task, way: str, folder: Path, held: bool) -> Started:
        """Start or continue a run; `held`: one that is to be killed inside a write stops there."""
        if way in ("shell", "torchrun"):
            return shell(task, folder, self.log(folder), 2 if way == "torchrun" else 1)
        hold = (self.rng.choice(PLACES), self.rng.randint(1, 3), self.rng.random())
        hold = hold if held and way == "writing" else None
        return fork(task, folder, self.log(folder), hold)

    def kill(self, run: Started, task: Task, way: str, folder: Path, seconds: float, newest: int) -> bool | None:
        """Kill a run after its first checkpoint, one in five of those that continue while it starts.

        Returns:
            False where it ended before; None where it hangs, or goes on without one of its processes.
        """
        starting = newest and way != "writing" and self.rng.random() < 0.2
        if not self.await_proof(run, task, folder, 0 if starting else newest):
            run.kill()
            return None
        if way == "writing":
            if not self.await_that(lambda: run.poll() is not None or (folder / "holds").exists()):
                run.kill()
                return None
        else:
            self.await_that(lambda: run.poll() is not None, self.rng.uniform(0, seconds / 2))
        if run.poll() is not None:
            return False
        alone = self.rng.choice([run.pid, *(run.children() if way == "torchrun" else [])])
        run.kill(alone if self.rng.random() < 0.5 else None)
        (folder / "holds").unlink(missing_ok=True)
        return None if run.code == 124 else True

    def look(self, name: str, way: str, folder: Path, before: dict[str, int]) -> dict[str, int] | None:
        """The checkpoints' steps after a kill; None, and a fault, where one is not whole, older or gone."""
        try:
            now = steps(folder)
        except Exception as error:  # whatever it is, the file is not whole
            self.ledger.lost += 1
            self.ledger.fault(f"{name}, {way}: a checkpoint cannot be read: {error}", folder)
            return None
        for checkpoint, step in before.items():
            if now.get(checkpoint, -1) < step and not finished(folder, checkpoint):
                self.ledger.lost += 1
                self.ledger.fault(f"{name}, {way}: {checkpoint} was at step {step}, now {now.get(checkpoint)}", folder)
                return None
        return now


def make_cubes(data: Path) -> None:
    """Two generated scans, and their cubes for each method in 3D."""
    for module, words in (
        ("make_phantom_ct", ["--save", data / "scans", "--count", 2, "--shape", 160, 160, 140]),
        *(("luna", ["--data", data / "scans", "--save", data / f"cubes_{method}", "--method", method, "--scale", 6])
          for method in sorted(set(PREPARED.values()))),
    ):  # fmt: skip
        command = [sys.executable, str(ROOT / "preprocess" / f"{module}.py"), *map(str, words)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def turns(made: dict[str, Task]) -> Iterator[tuple[str, str, int]]:
    """Tasks, ways and kills at most, for ever; each task in every way that it has before the next."""
    for name in itertools.cycle(made):
        yield name, "forked", 10
        yield (name, "writing", 5) if made[name].proof == CHECKPOINT else (name, "forked", 10)
        yield name, "shell", 2
        if made[name].processes:
            yield name, "torchrun", 3


def lane(made: dict[str, Task], names: Sequence[str], seed: str, until: float, keep: Path) -> None:
    """Kill runs of some of the tasks until a time of the monotonic clock; what was found is written as it comes."""
    laboratory = Laboratory({name: made[name] for name in names}, keep / "work", keep / f"seed_{seed}", seed)
    for name, way, most in turns(laboratory.tasks):
        write_json(keep / "ledgers" / f"{seed}.json", laboratory.ledger.counts())
        if time.monotonic() > until:
            break
        laboratory.chain(name, way, most)


def run(seconds: float, seed: int, keep: Path, scripts: Sequence[str] = (), lanes: int = 2) -> dict:
    """Kill for some time; returns counts and faults, also of earlier times, finished or not, in the same folder.

    Args:
        keep: where cases that failed are kept. scripts: names of `tasks`, all unless given. lanes: side by side.
    """
    torch.set_num_threads(1)  # other threads would not survive a fork
    until, data = time.monotonic() + seconds, keep / "work" / "data"
    if not data.exists():
        data.mkdir(parents=True)
        make_data(data)
        make_cubes(data)
    made = tasks(data)
    names = list(scripts) or list(made)
    for name in names:
        importlib.import_module(f"medssl.{made[name].module}")
    random.Random(seed).shuffle(names)
    parts = [names[number::lanes] for number in range(min(lanes, len(names)))]
    fork = multiprocessing.get_context("fork")  # with everything imported
    with concurrent.futures.ProcessPoolExecutor(len(parts), fork) as pool:
        begin = functools.partial(pool.submit, lane, made, until=until, keep=keep)
        running = [begin(names=part, seed=f"{seed}_{number}") for number, part in enumerate(parts)]
        for future in running:
            future.result()
    return functools.reduce(add, map(read_json, sorted((keep / "ledgers").glob("*.json"))))


def add(before: object, more: object) -> object:
    """Counts of two times together: numbers add up, lists follow each other, dictionaries by their keys."""
    if isinstance(before, dict) and isinstance(more, dict):
        return {key: add(before.get(key), more.get(key)) for key in {**before, **more}}
    if before is None or more is None:
        return more if before is None else before
    return before + more


def get_parser() -> options.Parser:
    parser = options.Parser(__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn")
    parser.add_argument("--output", metavar="DIR", default="runs/kills", help="where runs that show a fault are kept")
    parser.add_argument("--scripts", nargs="*", metavar="NAME", default=[], help="such as moco, study; all by default")
    parser.add_argument("--lanes", type=int, default=2, metavar="N", help="this many runs side by side")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    found = run(60 * args.minutes, args.seed, Path(args.output), args.scripts, args.lanes)
    write_json(Path(args.output) / "kills.json", found)
    print({key: value for key, value in found.items() if key != "faults"})
    raise SystemExit(bool(found["faults"]))


if __name__ == "__main__":
    main()
