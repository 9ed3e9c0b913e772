"""Runs of scripts, one after the other or beside each other: which are finished, which failed and why.

A run leaves job.json in its folder: its options, how it ended, and when; log.txt has what it printed. The same job,
asked for again, is not run again when it is finished, continues where it stopped, and is tried again when it failed.
"""

import argparse
import contextlib
import importlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import TextIO

from medssl.engine import checkpoint
from medssl.engine.runs import plain, refuse_changes
from medssl.errors import InputError, explain
from medssl.files import naming, read_json, write_json, write_text
from medssl.locks import PATIENCE, hand_over, handed_over, lock_folder, say_waiting, taken
from medssl.markup import shell_words
from medssl.processes import end_with_parent, signal_name

INTERRUPTION = "was interrupted; the same command continues"
INTERRUPTED = (128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM)  # exit codes
LONGEST_SAVING = 600  # seconds that a run may take from SIGTERM to its end
PAUSE = 0.1  # seconds between two looks at what runs


@cache
def digest(path: str, _changed: int) -> str:
    """`weights_digest`, once for a file that many runs start from; `_changed` is the time of its last change."""
    return checkpoint.weights_digest(path)


@dataclass(frozen=True)
class Job:
    """One run of a script.

    Attributes:
        name: in words.
        module: the script, as "finetune_classification".
        argv: its options, without `--output`.
        folder: its `--output`.
        proof: a file in it that only a finished run leaves.
        weights: the checkpoint that it starts from, whose content a finished run must have seen.
        needs: the job that makes `weights`.
        lists: text files that `argv` names, with their contents; written when it runs, and not before.
    """

    name: str
    module: str
    argv: tuple[str, ...]
    folder: Path
    proof: str
    weights: Path | None = None
    needs: "Job | None" = None
    lists: tuple[tuple[Path, str], ...] = ()

    @property
    def words(self) -> list[str]:
        """All options."""
        return [*self.argv, "--output", str(self.folder)]

    @property
    def command(self) -> str:
        """As a person types it in the checkout."""
        return shell_words(["python", f"{self.module}.py", *self.words])

    def options(self) -> argparse.Namespace:
        """What the script reads from `argv`, and the digest of the weights where they are there.

        Raises:
            InputError, SystemExit: for options that the script refuses.
        """
        args = importlib.import_module(f"medssl.{self.module}").get_parser().parse_args(self.words)
        if self.weights is not None and self.weights.is_file():
            args.weights_digest = digest(str(self.weights), self.weights.stat().st_mtime_ns)
        return args

    def record(self) -> dict:
        """job.json; {} before the first run."""
        try:
            found = read_json(self.folder / "job.json")
        except (OSError, InputError):  # not there, not to be read, or damaged, as by a disk that was full
            return {}
        return found if is_record(found) else {}

    def finished(self) -> bool:
        """Whether it has nothing left to do."""
        return self.record().get("status") == "finished" and (self.folder / self.proof).exists()

    def failed(self) -> bool:
        """Whether it ended for a reason of its own."""
        record = self.record()
        return record.get("status") == "failed" and record.get("reason") != INTERRUPTION

    def write_lists(self) -> None:
        """Write the lists that are not there yet, or of a run that is forgotten."""
        for path, text in self.lists:
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                write_text(path, text)

    def forget(self) -> bool:
        """Move what a failed run with other options left out of the way, where a continuation would find it; returns
        whether there was such a run. The folder is this process's."""
        if not self.failed():
            return False
        try:
            refuse_changes(self.record()["options"], plain(self.options()), self.folder)
        except InputError:
            old = self.folder.with_name(f"{self.folder.name}.failed")
            shutil.rmtree(old, ignore_errors=True)
            self.folder.rename(old)
            return True
        return False

    def claim(self, wait: float = 0) -> TextIO | None:
        """The lock of its folder, from which what a failed run with other options left is gone; None where another
        process has the folder for longer than `wait` seconds."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(self.folder, wait)
        if lock is not None and self.forget():  # and the lock with it
            with lock:
                self.folder.mkdir(exist_ok=True)
                return lock_folder(self.folder, wait)
        return lock

    def check(self) -> None:
        """Raise InputError where `folder` holds a run with other options, or from other weights.

        One that failed, for another reason than an interruption, is forgotten: other options may be what it needs.
        """
        before = self.record().get("options")
        if before is None or self.failed():
            return
        args = self.options()
        if before.get("weights_digest") not in (None, getattr(args, "weights_digest", None)):
            raise InputError(f"{self.folder}: was run from other weights in {self.weights}; give another --output")
        refuse_changes(before, plain(args), self.folder, "or another --output")
        for path, text in self.lists:
            if path.is_file() and path.read_text(encoding="utf-8") != text:
                raise InputError(
                    f"{self.folder}: was started with other data: the images that it may see are not those of {path}; "
                    "use the same data, or another --output"
                )
        steps = getattr(args, "steps", None)  # which may change while a run goes on
        if self.finished() and before.get("steps") != steps:
            raise InputError(f"{self.folder}: was run with --steps {before.get('steps')}; give another --output")


RECORD = {
    "status": str, "reason": str | None, "began": str, "seconds": float | int, "machine": str, "options": dict,
}  # fmt: skip


def is_record(found: dict) -> bool:
    """Whether a JSON object is as `note` writes it."""
    if not all(isinstance(value, RECORD[key]) for key, value in found.items() if key in RECORD):
        return False
    try:
        return found.get("reason") != INTERRUPTION or bool(datetime.fromisoformat(found["began"]) and found["seconds"])
    except (KeyError, ValueError):
        return False


def note(job: Job, status: str, since: float, reason: str | None = None) -> None:
    """Write job.json. `since`: when it began, of time.time()."""
    began, seconds, before = datetime.fromtimestamp(since, timezone.utc), time.time() - since, job.record()
    if before.get("reason") == INTERRUPTION:  # it went on
        began, seconds = datetime.fromisoformat(before["began"]), seconds + before["seconds"]
    ended = {
        "status": status, "reason": reason, "began": began.isoformat(timespec="seconds"), "seconds": round(seconds, 1),
        "machine": platform.node(), "options": plain(job.options()),
    }  # fmt: skip
    write_json(job.folder / "job.json", ended)


def unmet(job: Job) -> str | None:
    """Why a job cannot start."""
    if job.needs is None or job.needs.finished():
        return None
    return f"{job.needs.name}: {job.needs.record().get('reason') or 'has not been run'}"


def run_here(job: Job) -> str | None:
    """Run a job in this process.

    Returns:
        why it failed, in one line, or None.

    Raises:
        SystemExit, KeyboardInterrupt: when it was interrupted; the same job continues.
    """
    lock = job.claim()
    if lock is None:
        say_waiting(job.folder)
        lock = job.claim(PATIENCE)
    if lock is None:
        return str(taken(job.folder))
    with lock, handed_over(lock):
        return None if job.finished() else _run(job)  # another process may have ended it until now


def _run(job: Job) -> str | None:
    """Run a job whose folder is this process's."""
    job.write_lists()
    since, reason = time.time(), unmet(job)
    try:
        if reason is None:
            importlib.import_module(f"medssl.{job.module}").main(job.words)
    except SystemExit as error:
        if error.code in INTERRUPTED:
            raise
        reason = f"exit code {error.code}"
    except Exception as error:  # whatever it is, other jobs may do better
        reason = explain(error)
        if reason is None:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            write_text(job.folder / "log.txt", traceback.format_exc())
    note(job, "failed" if reason else "finished", since, reason)
    return reason


def start(job: Job, place: dict[str, str]) -> subprocess.Popen | None:
    """Start a job in a process of its own, which prints to log.txt; None where its folder is another's: a run that
    outlived a killed study holds the lock, until it has saved its state."""
    lock = job.claim()
    if lock is None:
        return None
    call = f"from medssl import {job.module} as script; script.cli()"
    log_file = job.folder / "log.txt"
    with lock, naming(log_file), open(log_file, "w", encoding="utf-8") as log:
        job.write_lists()
        return subprocess.Popen(
            [sys.executable, "-c", call, *job.words], pass_fds=[lock.fileno()],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **place, **hand_over(lock)},
            start_new_session=True,  # Ctrl-C reaches it once, through its parent: a second signal ends without saving
            preexec_fn=end_with_parent,
        )  # fmt: skip


def reason_of(job: Job, code: int) -> str:
    """Why a process failed: its last line, or its signal."""
    if code < 0:
        hint = "; was there too little memory?" if code == -signal.SIGKILL else ""
        return f"ended by {signal_name(-code)}{hint}"
    lines = (job.folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].removeprefix("error: ") if lines else f"exit code {code}"


def stop(processes: Collection[subprocess.Popen]) -> None:
    """Have processes save their state and end. Those that take too long are killed, all at a second signal."""
    for process in processes:
        process.terminate()
    until = time.monotonic() + LONGEST_SAVING
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            for process in processes:
                process.wait(max(0.0, until - time.monotonic()))
    finally:
        for process in processes:
            process.kill()  # which those that have ended do not notice
            process.wait()


def run_beside(jobs: Sequence[Job], places: Sequence[dict[str, str]], say: Callable[[Job, str | None], None]) -> None:
    """Run jobs in processes of their own, as many at a time as there are places. A job waits for the one that it needs.

    Args:
        jobs: those to run; what a job needs stands before it, or is finished.
        places: environment variables of each place, such as CUDA_VISIBLE_DEVICES.
        say: called after each job with why it failed, or None.

    Raises:
        SystemExit: after SIGTERM or Ctrl-C; jobs that ran have saved their state.
    """
    waiting, free = list(jobs), list(places)
    running: dict[subprocess.Popen, tuple[Job, dict[str, str], float]] = {}
    taken_since: dict[Path, float] = {}  # folders that others have; they are waited for while other jobs go on

    def end(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    previous = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        while waiting or running:
            busy = {job.folder for job, *_ in running.values()} | {job.folder for job in waiting}
            ready = [job for job in waiting if job.needs is None or job.needs.folder not in busy]
            for job in ready:
                reason = unmet(job)
                if reason is None and not free:
                    break
                if reason is None:
                    try:
                        process = start(job, free[0])
                        if process is None:
                            wait_for_folder(job, taken_since)
                            continue
                        running[process] = job, free.pop(0), time.time()
                    except InputError as error:
                        reason = str(error)
                waiting.remove(job)
                if reason is not None:
                    job.folder.mkdir(parents=True, exist_ok=True)
                    note(job, "failed", time.time(), reason)
                    say(job, reason)
            time.sleep(PAUSE)
            for process in [process for process in running if process.poll() is not None]:
                job, place, since = running.pop(process)
                free.append(place)
                reason = None if process.returncode == 0 else reason_of(job, process.returncode)
                if process.returncode in INTERRUPTED:
                    reason = INTERRUPTION
                note(job, "failed" if reason else "finished", since, reason)
                say(job, reason)
    finally:
        stop(running)
        for process, (job, _, since) in running.items():
            finished = process.returncode == 0  # it may have been at its end
            note(job, "finished" if finished else "failed", since, None if finished else INTERRUPTION)
        for number, handler in previous.items():
            signal.signal(number, handler)


def wait_for_folder(job: Job, taken_since: dict[Path, float]) -> None:
    """Note that a job's folder is another's, and since when; an InputError where that is too long."""
    now = time.monotonic()
    if job.folder not in taken_since:
        taken_since[job.folder] = now
        say_waiting(job.folder)
    if now - taken_since[job.folder] >= PATIENCE:
        raise taken(job.folder)


def places(args: argparse.Namespace) -> list[dict[str, str]]:
    """Environment variables of each of the `--jobs` that run at a time."""
    if args.gpus:
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        if visible and max(args.gpus) >= len(visible):
            raise InputError(f"--gpus {max(args.gpus)}: CUDA_VISIBLE_DEVICES names {len(visible)}")
        names = [visible[gpu] if visible else str(gpu) for gpu in args.gpus]
        return [{"CUDA_VISIBLE_DEVICES": names[i % len(names)]} for i in range(args.jobs)]
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    return [{"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}] * args.jobs
