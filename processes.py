"""Worker processes: they leave signals to their parent, end with it, and are ended by it, whatever happens."""

import atexit
import concurrent.futures
import contextlib
import ctypes
import errno
import multiprocessing
import multiprocessing.connection
import multiprocessing.queues
import multiprocessing.synchronize
import multiprocessing.util  # whose own handler at exit, which waits for children, runs after the one that is here
import os
import re
import signal
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess

from medssl.errors import FEW_FILES, NO_SHARED_MEMORY, InputError, error_number

# What `end` sends to workers, as they ignore SIGTERM: an error is raised in them, so that they leave no lock held, in
# which torch's own ending of a loader would be caught, and no unfinished file.
END = signal.SIGUSR2
LAST = -1000  # the priority of what a process does at its end when all it put into queues is handed over
ASKED, KILLED = 1.0, 5.0  # seconds that they have to be gone after it, and after they are killed
PARENT_DIED = 1  # Linux's PR_SET_PDEATHSIG
LOST = re.compile(r"DataLoader worker \(pid|Pin memory thread exited")  # what torch says of a worker that is no more
KILLED_LINE = "a worker was killed, probably for want of memory; run the command again with fewer --workers"


# In a worker ---------------------------------------------------------------------------------------


def begin(_number: int = 0) -> None:
    """The start of a worker: it leaves signals to its parent, and ends with it, however that ends.

    Schedulers and terminals send SIGTERM and SIGINT to the whole group; a worker that died of it would break the
    step that is being finished. What goes wrong while results are handed over, in threads of `multiprocessing` which
    would print it and leave the parent waiting, ends the worker: with the number of a system's error as exit code.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(END, _leave)
    for number in (signal.SIGBUS, signal.SIGSEGV, signal.SIGFPE):  # on which torch says something of its own
        signal.signal(number, signal.SIG_DFL)
    sys.excepthook = lambda _kind, error, _trace: _give_up(error)
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(lambda error, _item: _give_up(error))
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    for value in multiprocessing.current_process()._args:
        if isinstance(value, multiprocessing.synchronize.Event):  # by which torch has a worker end
            multiprocessing.util.Finalize(None, _fail_unless, (value,), exitpriority=LAST)


def _leave(*_: object) -> None:
    """End because the parent says so, wherever that comes; a trace of it would be no news."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    sys.exit(1)


def _fail_unless(asked: multiprocessing.synchronize.Event) -> None:
    """Make a worker's end a failure unless it was asked for: at a KeyboardInterrupt torch ends it as if all were well,
    which the parent notices only after 5 s without a batch, and then waits for others."""
    if not asked.is_set():
        os._exit(1)


def _give_up(error: BaseException) -> None:
    number = error_number(error)
    if number is None:
        traceback.print_exception(error)
        sys.stderr.flush()
    os._exit(number or 1)


def _end_with(parent: BaseProcess) -> None:
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


# In the parent -------------------------------------------------------------------------------------


_own: "weakref.WeakSet[BaseProcess]" = weakref.WeakSet()  # the workers of all loaders


def end(processes: Iterable[BaseProcess]) -> None:
    """Have workers end, and wait until they are gone. Those that do not, as where a disk hangs, are killed."""
    running = [process for process in processes if process.is_alive()]
    with _undisturbed():
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, END)
        _wait_for(running, ASKED)
        for process in running:
            process.kill()
        _wait_for(running, KILLED)


def _wait_for(processes: Sequence[BaseProcess], seconds: float) -> None:
    until = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Without torch's handler of SIGCHLD, which raises an error when a worker of a DataLoader dies."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if previous is None else previous)


@atexit.register
def _end_all() -> None:
    """What an error that nobody caught left running; the interpreter would wait for it."""
    end(_own)


def end_with_parent() -> None:
    """Ask Linux to send SIGTERM when the parent ends: a run left behind would be in the way of the next."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DIED, signal.SIGTERM)


def why_ended(code: int) -> str | None:
    """What a worker's exit code says to the user, in one line; None for a fault of the code."""
    lines = {
        -signal.SIGKILL: KILLED_LINE, -signal.SIGBUS: NO_SHARED_MEMORY, errno.ENOSPC: NO_SHARED_MEMORY,
        errno.EMFILE: FEW_FILES, errno.ENFILE: FEW_FILES, errno.ENOMEM: KILLED_LINE.replace("killed", "ended"),
    }  # fmt: skip
    if code < 0 and code not in lines:
        return f"a worker was ended by {signal_name(-code)}; --workers 0 shows where"
    return lines.get(code)


def signal_name(number: int) -> str:
    """A signal's name, or its number where it has none, as the real-time ones."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class Watch:
    """The batches of a loader, whose workers are killed when one does not come.

    Args:
        workers: the loader's processes. limit: seconds to wait for a batch; 0: for ever.
    """

    def __init__(self, batches: Iterator, workers: Sequence[BaseProcess], limit: float) -> None:
        self.batches, self.workers, self.limit = batches, workers, limit
        self.since: float | None = None  # when waiting for the next batch began
        self.expired = False
        self.closed = threading.Event()
        if workers and limit:
            threading.Thread(target=self._look, daemon=True).start()

    def __iter__(self) -> "Watch":
        return self

    def __next__(self) -> object:
        self.since = time.monotonic()
        try:
            return next(self.batches)
        finally:
            self.since = None

    def _look(self) -> None:
        while not self.closed.wait(min(1.0, self.limit / 4)):
            since = self.since
            if since is not None and time.monotonic() - since > self.limit:
                self.expired = True
                end(self.workers)  # which the waiting thread notices, whatever it waits for
                return


@contextlib.contextmanager
def iterating(loader: Iterable, limit: float = 0) -> Iterator[Watch]:
    """The batches of a torch DataLoader, whose workers (begun by `begin`) end with the block, however that ends.

    Args:
        limit: seconds to wait for a batch; 0: for ever.

    Raises:
        InputError: when a worker died, no batch came within `limit`, or there is no shared memory for the workers.
    """
    before = set(multiprocessing.active_children())
    workers: list[BaseProcess] = []
    watch = None
    try:
        try:
            batches = iter(loader)
        finally:  # of those that were begun before one could not be
            workers = [process for process in multiprocessing.active_children() if process not in before]
            _own.update(workers)
        watch = Watch(batches, workers, limit)
        del batches
        yield watch
        watch.batches = iter(())  # torch ends workers that are well by itself
    except InputError:
        raise
    except Exception as error:
        line = _why_lost(error, workers, watch)
        if watch is None:
            end(workers)
            _forget_half_built(error)
        if line is None:
            raise
        raise InputError(line) from error
    finally:
        if watch is not None:
            watch.closed.set()
        end(workers)
        _own.difference_update(workers)


def _forget_half_built(error: Exception) -> None:
    """Delete what an error's frames hold: torch's iterator, whose own end fails where its beginning did, and would
    print a traceback."""
    previous, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        traceback.clear_frames(error.__traceback__)
    finally:
        sys.unraisablehook = previous


def _why_lost(error: Exception, workers: Sequence[BaseProcess], watch: Watch | None) -> str | None:
    """What became of the workers, if an error tells of that."""
    if watch is None and error_number(error) == errno.ENOSPC:  # their queues have locks there
        return NO_SHARED_MEMORY
    if watch is not None and watch.expired:
        return (
            f"no batch came from the workers for {watch.limit:g} s (--worker-timeout); does a disk hang? Where reading "
            "takes that long, give more; --workers 0 reads without them"
        )
    if isinstance(error, (EOFError, ConnectionError)) or LOST.match(str(error)):
        multiprocessing.connection.wait([worker.sentinel for worker in workers], 1.0)  # the last steps of its end
        codes = [worker.exitcode for worker in workers]
        return next((why_ended(code) for code in codes if code), None)
    return None


# Pools ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def pool(workers: int, start: Callable[[], object] | None = None) -> Iterator[concurrent.futures.ProcessPoolExecutor]:
    """A pool of processes, which end at once where the block raises, and with this process.

    Args:
        start: called first in each.

    Raises:
        InputError: when one of them died, or there is no shared memory for them.
    """
    before = set(multiprocessing.active_children())
    try:
        made = concurrent.futures.ProcessPoolExecutor(workers, initializer=_begin_with, initargs=(start,))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise InputError(NO_SHARED_MEMORY) from error
    with made as executor:
        try:
            yield executor
        except BaseException as error:
            executor.shutdown(wait=False, cancel_futures=True)
            end(process for process in multiprocessing.active_children() if process not in before)
            if isinstance(error, BrokenProcessPool):
                raise InputError(KILLED_LINE) from None
            raise


def _begin_with(start: Callable[[], object] | None) -> None:
    begin()
    if start is not None:
        start()
