"""Processes end: whatever goes wrong, in whichever process, a run ends by itself, leaves none behind, and says why.

Each run is a fork of the tests' process, which has torch imported, with a process group of its own."""

import argparse
import atexit
import contextlib
import errno
import multiprocessing
import multiprocessing.synchronize
import os
import re
import resource
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
from process_tools import members

from medssl import errors, processes
from medssl.datasets import cache
from medssl.datasets.base import ImageDataset, Info
from medssl.engine import batches, options, parallel
from medssl.engine.batches import evaluation_batches
from medssl.engine.loop import fit
from medssl.engine.method import Method
from medssl.engine.parallel import Devices
from medssl.errors import InputError
from medssl.models.encoders import IMAGENET
from medssl.preprocess import check_data, luna, slices
from medssl.study import jobs
from medssl.views.of_images import ClassificationViews

LIMIT = 60  # seconds after which a run counts as one that never ends; those here take about two
CPU = Devices(torch.device("cpu"))


# Runs ----------------------------------------------------------------------------------------------


def run_forked(main, log):
    """As an interpreter that runs a script: `run_script`, the traceback of what it lets through, handlers at exit."""
    os.setsid()
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    sys.unraisablehook = sys.__unraisablehook__  # pytest's own prints nothing here
    code = 0
    try:
        errors.run_script(main)
    except SystemExit as error:
        code = error.code
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code, sys.last_value = 1, error  # as the interpreter, which keeps the traceback, and all that its frames hold
    atexit._run_exitfuncs()
    os._exit(code)


def start(main, log):
    """Run `main` in a process; its number."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try:
            run_forked(main, log)
        finally:
            os._exit(99)
    return pid


def code_of(pid):
    """How a process ended, by itself: its exit code, below 0 a signal's number. Nothing of its group is left."""
    until = time.monotonic() + LIMIT
    while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0 and time.monotonic() < until:
        time.sleep(0.02)
    by_itself = ended[0] == pid
    until = time.monotonic() + 10
    while by_itself and members(pid) and time.monotonic() < until:
        time.sleep(0.02)
    left = members(pid)
    if left:
        os.killpg(pid, signal.SIGKILL)
    if not by_itself:
        os.waitpid(pid, 0)
    assert by_itself, "still running"
    assert left == []
    return os.waitstatus_to_exitcode(ended[1])


def outcome(main, tmp_path):
    """Run `main` in a process: exit code, and what it said on standard error."""
    code = code_of(start(main, tmp_path / "log"))
    return code, (tmp_path / "log").read_text()


def in_worker():
    return multiprocessing.parent_process() is not None


class Tiny(Method):
    """One linear layer."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)

    def forward(self, batch, run):
        return {"square": ((self.layer(batch["view"].mean((2, 3))) - 5) ** 2).mean()}


def tiny_data(each=lambda i: None):
    """Images, before the reading of which `each` is called."""

    def read(i):
        each(i)
        return np.full((8, 8), i, np.uint8)

    return ImageDataset(Info("tiny"), read, [f"image{i}" for i in range(12)], texture_size=8)


def tiny_args(output, **changes):
    parser = options.Parser("test")
    options.add_data(parser)
    options.add_training(parser)
    options.add_runtime(parser)
    options.add_output(parser, default=str(output))
    usual = {"b": 4, "epochs": 10, "workers": 2, "lr": 0.1, "log_every": 1, "save_every": 1, "patience": 0}
    parser.set_defaults(**(usual | {"schedule": "constant"} | changes))
    return parser.parse_args([])


def train(output, each=lambda i: None, method=None, views=None, evaluate=None, **changes):
    views = views or ClassificationViews(**IMAGENET, size=8)
    fit(method or Tiny(), tiny_data(each), views, tiny_args(output, **changes), CPU, evaluate, tensorboard=False)


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    monkeypatch.setattr(batches, "decoders", lambda args: args.workers)


# What goes wrong in the training process -----------------------------------------------------------


class Failing(Tiny):
    """Raises `error` in its third step."""

    def __init__(self, error):
        super().__init__()
        self.error, self.steps = error, 0

    def after_step(self, progress):
        self.steps += 1
        if self.steps == 3:
            raise self.error


class FailingViews(ClassificationViews):
    def forward(self, *args):
        raise IndexError("of a view")


def saved_step(output):
    return torch.load(output / "last.pt", weights_only=True)["step"]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ZeroDivisionError("of a step"), 1, "ZeroDivisionError: of a step"),
        (InputError("--lr: too high"), 2, "error: --lr: too high"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has"), 2,
         "error: out of GPU memory (20.00 MiB more were asked for); use a smaller --b, or --amp"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=["bug", "input", "memory", "second Ctrl-C"],
)  # fmt: skip
def test_an_error_in_a_step_ends_the_run(error, code, line, tmp_path):
    ended, said = outcome(lambda: train(tmp_path / "run", method=Failing(error)), tmp_path)
    assert ended == code
    assert said.splitlines()[-1:] == [line] * bool(line)
    assert ("Traceback" in said) == (code == 1)
    assert saved_step(tmp_path / "run") == 2


def test_an_error_in_a_view_ends_the_run(tmp_path):
    code, said = outcome(lambda: train(tmp_path / "run", views=FailingViews(**IMAGENET, size=8)), tmp_path)
    assert (code, said.splitlines()[-1]) == (1, "IndexError: of a view")


def test_an_error_in_an_evaluation_ends_the_run(tmp_path):
    """The loaders of training and of the evaluation have workers then; the traceback holds both."""

    def evaluate():
        for _ in evaluation_batches(tiny_data(), 4, tiny_args(tmp_path / "run"), CPU):
            raise ValueError("of an evaluation")

    code, said = outcome(lambda: train(tmp_path / "run", evaluate=evaluate), tmp_path)
    assert (code, said.splitlines()[-1]) == (1, "ValueError: of an evaluation")
    code, said = outcome(evaluate, tmp_path)  # a loader that no block outside of it ends
    assert (code, said.splitlines()[-1]) == (1, "ValueError: of an evaluation")


def test_two_signals_end_the_run(tmp_path):
    """The second comes in a step that would take for ever, to all processes."""

    class Slow(Tiny):
        def after_step(self, progress):
            (tmp_path / "slow").touch()
            time.sleep(1000)

    def main():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        train(tmp_path / "run", method=Slow())

    pid = start(main, tmp_path / "log")
    while not (tmp_path / "slow").exists():
        time.sleep(0.02)
    for _ in range(2):
        os.killpg(pid, signal.SIGINT)
        time.sleep(0.3)
    assert code_of(pid) == 130


# What goes wrong in a worker -----------------------------------------------------------------------


def hang(i):
    if in_worker() and i == 5:
        time.sleep(1000)


def stand_still(i):
    """As a read that a C library does without letting other threads run."""
    if in_worker() and i == 5:
        os.kill(os.getpid(), signal.SIGSTOP)


def fail(error):
    def each(i):
        if in_worker() and i == 5:
            raise error

    return each


def die(number):
    def each(i):
        if in_worker() and i == 5:
            os.kill(os.getpid(), number)

    return each


SLOW = r"error: no batch came from the workers for 1 s \(--worker-timeout\); does a disk hang\? .*"


@pytest.mark.parametrize(
    ("each", "code", "line"),
    [
        (fail(KeyError("of a reader")), 1, ".*of a reader.*"),
        (fail(MemoryError()), 2, "error: out of memory; use a smaller --b, or fewer --workers"),
        (fail(OSError(errno.EMFILE, "Too many open files", "a.png")), 2, r"error: too many open files; .*ulimit -n.*"),
        (fail(OSError(errno.ENOSPC, "No space left on device", "/cache/a.npz")), 2,
         r"error: /cache/a\.npz: No space left on device; make room on its disk, or choose another --output"),
        (die(signal.SIGKILL), 2, "error: a worker was killed, probably for want of memory; .* fewer --workers"),
        (die(signal.SIGBUS), 2, r"error: the workers' shared memory \(/dev/shm\) is full; .*--workers.*--shm-size 8g"),
        (die(signal.SIGFPE), 2, "error: a worker was ended by SIGFPE; --workers 0 shows where"),
        (hang, 2, SLOW),
        (stand_still, 2, SLOW),
    ],
    ids=["bug", "memory", "files", "disk", "killed", "bus", "crash", "hangs", "stands still"],
)  # fmt: skip
def test_what_a_worker_suffers_ends_the_run(each, code, line, tmp_path):
    ended, said = outcome(lambda: train(tmp_path / "run", each, worker_timeout=1), tmp_path)
    assert ended == code, said
    assert re.fullmatch(line, said.strip().splitlines()[-1]), said
    assert ("Traceback" in said) == (code == 1)


def test_a_worker_without_shared_memory(tmp_path, monkeypatch):
    """torch takes it where results are handed over, in a thread whose errors nobody sees."""

    def few():
        error = RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)"
        )
        monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", lambda self: throw(error))

    ended, said = outcome(lambda: train(tmp_path / "run", lambda i: few() if in_worker() else None), tmp_path)
    assert (ended, said.strip()) == (2, f"error: {errors.NO_SHARED_MEMORY}")


def throw(error):
    raise error


def few_semaphores(monkeypatch, count):
    """A /dev/shm in which there is room for so many."""
    left, make = [None] * count, multiprocessing.synchronize.SemLock.__init__

    def take(self, *args, **more):
        if not left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left.pop()
        make(self, *args, **more)

    monkeypatch.setattr(multiprocessing.synchronize.SemLock, "__init__", take)


@pytest.mark.parametrize("count", [0, 2, 5, 8, 11])
def test_workers_that_cannot_be_begun_for_want_of_shared_memory(count, tmp_path, monkeypatch):
    """The locks of queues take it too: what torch has built until then prints nothing at its end."""

    def main():
        few_semaphores(monkeypatch, count)
        train(tmp_path / "run")

    assert outcome(main, tmp_path) == (2, f"error: {errors.NO_SHARED_MEMORY}\n")


def test_a_pool_that_cannot_be_begun_for_want_of_shared_memory(tmp_path, monkeypatch):
    def main():
        few_semaphores(monkeypatch, 1)
        with processes.pool(2):
            pass

    assert outcome(main, tmp_path) == (2, f"error: {errors.NO_SHARED_MEMORY}\n")


def test_a_worker_that_ends_as_if_all_were_well(tmp_path):
    """torch's ends so at a KeyboardInterrupt, and looks for it only after each 5 s without a batch."""
    since = time.monotonic()
    code, said = outcome(lambda: train(tmp_path / "run", fail(KeyboardInterrupt())), tmp_path)
    assert (code, time.monotonic() - since < 4) == (1, True)
    assert "exited unexpectedly" in said


@pytest.mark.parametrize("spare", [3, 8, 14])
def test_few_descriptors(spare, tmp_path):
    """Pipes to workers, or what is handed over, cannot be opened; where depends on how few there are."""

    def main():
        highest = max(map(int, os.listdir("/proc/self/fd")))
        while (free := os.open(os.devnull, os.O_RDONLY)) < highest:
            pass
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + spare, free + spare))
        train(tmp_path / "run")

    ended, said = outcome(main, tmp_path)
    assert (ended, said.strip().splitlines()[-1]) == (2, f"error: {errors.FEW_FILES}")
    assert "Traceback" not in said


def test_a_killed_run_leaves_no_worker(tmp_path):
    """Nor one that is busy."""
    pid = start(lambda: train(tmp_path / "run", hang), tmp_path / "log")
    while not (tmp_path / "run" / "last.pt").exists() or len(members(pid)) < 3:
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    assert code_of(pid) == -signal.SIGKILL


def test_workers_end_with_an_evaluation_that_is_left():
    found = evaluation_batches(tiny_data(), 4, tiny_args("."), CPU)
    assert next(found)["index"].tolist() == [0, 1, 2, 3]
    assert len(multiprocessing.active_children()) == 2
    found.close()
    assert multiprocessing.active_children() == []


def test_a_worker_that_is_slow_is_waited_for(tmp_path):
    train(tmp_path, lambda i: time.sleep(0.3 * (i == 5)), steps=4, worker_timeout=0)
    assert saved_step(tmp_path) == 4
    train(tmp_path, steps=5, worker_timeout=30)  # an option that may change on the way
    assert saved_step(tmp_path) == 5
    assert multiprocessing.active_children() == []
    assert signal.getsignal(signal.SIGCHLD) not in (signal.SIG_DFL, signal.SIG_IGN)  # torch's own is there again


# Pools ---------------------------------------------------------------------------------------------


def sleepy(seconds):
    time.sleep(seconds)


@pytest.mark.parametrize("error", [ZeroDivisionError("of the caller"), KeyboardInterrupt()])
def test_an_error_ends_a_pool(error, tmp_path):
    def main():
        with processes.pool(2) as executor:
            executor.submit(sleepy, 1000)
            executor.submit(sleepy, 0).result()
            raise error

    code, said = outcome(main, tmp_path)
    assert code == (130 if isinstance(error, KeyboardInterrupt) else 1)
    assert ("of the caller" in said) == (code == 1)


def test_a_worker_of_a_pool_that_dies(tmp_path):
    """Others ignore SIGTERM, which the pool sends them, and would wait for work for ever."""

    def main():
        with processes.pool(3) as executor:
            executor.submit(sleepy, 1000)
            executor.submit(os._exit, 9).result()

    code, said = outcome(main, tmp_path)  # others may say that their queue broke
    assert (code, said.splitlines()[-1]) == (2, f"error: {processes.KILLED_LINE}")


def fall_down(*_args, **_more):
    os.kill(os.getpid(), signal.SIGKILL)


def test_tools_end_with_their_workers(tmp_path, monkeypatch):
    """Where a process of theirs is killed: one line, and no wait for it."""
    for i in range(3):
        (tmp_path / f"{i}.png").touch()
    monkeypatch.setattr(check_data, "examine", fall_down)
    lines = f"error: {processes.KILLED_LINE}\n"
    assert outcome(lambda: check_data.examine_all(sorted(tmp_path.glob("*.png")), 2), tmp_path) == (2, lines)

    monkeypatch.setattr(luna, "process", fall_down)
    scans = [argparse.Namespace(uid=str(i)) for i in range(3)]
    bar = contextlib.nullcontext()
    assert outcome(lambda: luna.process_all(scans, None, 2, bar), tmp_path) == (2, lines)

    monkeypatch.setattr(slices, "write_slices", fall_down)
    monkeypatch.setattr("medssl.datasets.lits.find_volume_cases", lambda root: scans)
    monkeypatch.setattr(slices, "check_headers", lambda cases: None)
    words = ["--data", str(tmp_path), "--output", str(tmp_path / "out"), "--workers", "2"]
    assert outcome(lambda: slices.main(words), tmp_path) == (2, lines)


def test_building_a_cache_ends(tmp_path):
    code, said = outcome(lambda: cache.build(tiny_data(hang), tmp_path / "a", 2, limit=1), tmp_path)
    assert code == 2
    assert re.match(SLOW, said)
    code, said = outcome(lambda: cache.build(tiny_data(die(signal.SIGKILL)), tmp_path / "b", 2), tmp_path)
    assert (code, said) == (2, f"error: {processes.KILLED_LINE}\n")


def test_a_study_ends_its_runs(tmp_path, monkeypatch):
    """Also one that does not heed SIGTERM; at a second signal, at once."""
    code = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(1000)"
    )

    def start_one(_job, _place):
        process = subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE)
        process.stdout.readline()  # it ignores the signal from now on
        return process

    monkeypatch.setattr(jobs, "start", start_one)
    job = jobs.Job("slow", "fake", (), tmp_path / "job", "proof")
    run = partial(jobs.run_beside, [job], [{}], print)

    def fail_soon():
        monkeypatch.setattr(jobs, "LONGEST_SAVING", 0.5)
        monkeypatch.setattr(jobs.time, "sleep", lambda _seconds: 1 / 0)
        run()

    monkeypatch.setattr(jobs, "note", lambda *_: None)
    ended, said = outcome(fail_soon, tmp_path)
    assert (ended, said.splitlines()[-1]) == (1, "ZeroDivisionError: division by zero")
    pid = start(run, tmp_path / "log")
    while len(members(pid)) < 2:
        time.sleep(0.02)
    for _ in range(2):
        time.sleep(0.5)
        os.kill(pid, signal.SIGTERM)
    assert code_of(pid) == 128 + signal.SIGTERM


# A real process ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_script_whose_step_fails(workers, tmp_path):
    code = "import torch; torch.optim.SGD.step = lambda *_: 1 / 0; from medssl import train_moco; train_moco.cli()"
    words = ["--dataset", "phantom2d", "--texture-size", "32", "--image-size", "32", "--b", "4", "--steps", "3"]
    words += ["--workers", workers, "--device", "cpu", "--output", str(tmp_path)]
    ran = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=LIMIT)
    assert ran.returncode == 1
    assert "ZeroDivisionError" in ran.stderr


WAITS = """
import os, subprocess, sys, time
env = os.environ | {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
code = "from medssl.engine import parallel; print(1, flush=True); parallel.setup(None, 'cpu', False)"
child = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, start_new_session=True)
child.stdout.readline()
time.sleep(1)
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("launched", [True, False])
def test_a_process_of_torchrun_does_not_wait_for_one_that_is_gone(launched):
    """It would for the half hour that torch waits for the others, who are brought together by what has started all."""
    env = {key: value for key, value in os.environ.items() if key != parallel.LAUNCHED}
    env |= {parallel.LAUNCHED: "1"} if launched else {}
    launcher = subprocess.Popen([sys.executable, "-c", WAITS], env=env, stdout=subprocess.PIPE, text=True)
    pid = int(launcher.stdout.readline())
    launcher.kill()
    launcher.wait()
    try:
        until = time.monotonic() + (60 if launched else 2)
        while members(pid) and time.monotonic() < until:
            time.sleep(0.1)
        assert bool(members(pid)) != launched
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_a_process_whose_torchrun_ended_before_it_began_says_so(monkeypatch):
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), (parallel.LAUNCHED, "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(parallel, "end_with_parent", lambda: None)
    monkeypatch.setattr(parallel, "orphaned", lambda: True)
    with pytest.raises(InputError, match="torchrun, which started this process, has ended"):
        parallel.setup(None, "cpu", False)


def test_signals_without_a_name_have_a_number():
    assert processes.why_ended(-signal.SIGSEGV).startswith("a worker was ended by SIGSEGV")
    assert processes.why_ended(-40).startswith("a worker was ended by signal 40")
