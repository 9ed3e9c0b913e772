"""Which process a folder or a file is being written by: locks, which the system releases when a process ends, however
it ends."""

import contextlib
import errno
import fcntl
import glob
import math
import os
import platform
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from medssl.errors import InputError

LOCK = ".lock"  # the name of a folder's lock
PARENTS_LOCK = "MEDSSL_LOCK"  # names, in the environment, the open file of a lock that the parent has taken for a child
PATIENCE = 60.0  # seconds that a run waits for another to leave its folder: as one does that was told to end
PAUSE = 0.2  # seconds between two looks at a lock
FORGOTTEN = 24 * 3600  # seconds after which an unfinished file is nobody's, where the file system has no locks
OF_THIS_PROCESS = secrets.token_hex(4)  # beside its number, which a process in another container may have too
UNFINISHED = re.compile(r"\.tmp\.\d+\..+", re.DOTALL)
TAKEN = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES)  # what a lock says that another process has; SMB says the last
BROKEN = (errno.EIO, errno.ESTALE)  # what a disk says that is not there any more


# What is being written -----------------------------------------------------------------------------


def unfinished_name(path: Path) -> Path:
    """The name under which a file or folder is written. Hidden, and with the same extension, by which some libraries
    choose the format."""
    return path.with_name(f".tmp.{os.getpid()}.{OF_THIS_PROCESS}.{path.name}")


def is_unfinished(path: Path) -> bool:
    """Whether a name is one of `unfinished_name`'s, of any process."""
    return UNFINISHED.fullmatch(path.name) is not None


@contextlib.contextmanager
def in_use(unfinished: Path, make: Callable[[Path], object]) -> Iterator[None]:
    """Make an unfinished file or folder, and hold a lock on it in the block, by which others know that it is being
    written. Who removes it locks it first, so that it may be gone when the lock is there: then it is made anew."""
    while True:
        make(unfinished)
        with contextlib.suppress(FileNotFoundError):
            file = os.open(unfinished, os.O_RDONLY)
            with contextlib.suppress(OSError):  # there are no locks on this file system
                fcntl.flock(file, fcntl.LOCK_SH)
            if _same(file, unfinished):
                break
            os.close(file)
    try:
        yield
    finally:
        os.close(file)


def _same(file: int, path: Path) -> bool:
    """Whether an open file is the one that has the name now."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _remove_abandoned(unfinished: Path) -> None:
    """Remove an unfinished file or folder, unless a process is writing it."""
    is_folder = unfinished.is_dir()
    with contextlib.suppress(OSError):  # gone, or another user's
        file = os.open(unfinished, os.O_NOFOLLOW | (os.O_RDONLY if is_folder else os.O_RDWR))
        try:
            free = _try_lock(file)
            if free is None:
                free = time.time() - os.fstat(file).st_mtime > FORGOTTEN
            if free and _same(file, unfinished):  # else it has got its name, and another is written
                shutil.rmtree(unfinished) if is_folder else unfinished.unlink()
        finally:
            os.close(file)


def remove_abandoned(folder: Path, name: str = "") -> None:
    """Remove what kills in the middle of a write left in a folder and two levels below it, or of one `name` in it, also
    as earlier versions called it. What lies behind a symbolic link is another's."""
    if name:
        own = glob.escape(name)
        found = [path for path in folder.glob(f".tmp.*.{own}") if is_unfinished(path)] + [*folder.glob(f".{own}.tmp")]
    else:
        found, folders = [], [folder]
        for _ in range(3):
            entries = [entry for part in folders for entry in _entries(part)]
            found += [Path(entry.path) for entry in entries if UNFINISHED.fullmatch(entry.name)]
            folders = [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
    for path in found:
        _remove_abandoned(path)


def _entries(folder: Path) -> list[os.DirEntry]:
    """What a folder has; [] where that cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []


# Folders -------------------------------------------------------------------------------------------


def lock_folder(folder: Path, wait: float = math.inf) -> TextIO | None:
    """Lock a folder against other processes that ask for its lock.

    The lock holds until the file is closed, here and in all processes that inherited it, or these processes end,
    however they end: a file that is left behind hinders nobody. Where the file system has no locks, a note says so.

    Args:
        folder: is there. wait: seconds, for others that have the lock.

    Returns:
        the open file; None where another process still has the lock.
    """
    path, until = folder / LOCK, time.monotonic() + wait
    file = _open_lock(path)
    try:
        while not (_lock(file) and _same(file.fileno(), path)):
            if not _same(file.fileno(), path):  # removed, by its last owner or with the folder
                file.close()
                file = _open_lock(path)
            elif time.monotonic() >= until:
                file.close()
                return None
            else:
                time.sleep(PAUSE)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
    except BaseException:
        file.close()
        raise
    return file


def _open_lock(path: Path) -> TextIO:
    """Open a lock, which is made where it is not there; an OSError names its folder."""
    try:
        return open(path, "a+", encoding="utf-8", opener=lambda name, how: os.open(name, how | os.O_NOFOLLOW, 0o666))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path.parent)) from error


def _try_lock(file: int) -> bool | None:
    """Lock an open file: False where another process has it locked, None where the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in BROKEN:
            raise
        return False if error.errno in TAKEN else None
    return True


def _lock(file: TextIO) -> bool:
    """Lock an open file; False where another process has it locked. True, with a note, where there are no locks."""
    try:
        locked = _try_lock(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, file.name) from error
    if locked is None:
        said = "this file system has no locks; two runs that write here at once are not kept apart"
        print(f"note: {file.name}: {said}", file=sys.stderr)
    return locked is not False


def take_folder(folder: Path, option: str = "--output") -> TextIO:
    """`lock_folder` a folder for a run; others that are told to end, as before a requeued job begins, are waited for.

    Raises:
        InputError: where another process still has the folder after `PATIENCE` seconds.
    """
    lock = lock_folder(folder, 0)
    if lock is None:
        say_waiting(folder, option)
        lock = lock_folder(folder, PATIENCE)
    if lock is None:
        raise taken(folder, option)
    return lock


def say_waiting(folder: Path, option: str = "--output", wait: float | None = None) -> None:
    """Note that a folder's owner is waited for, `PATIENCE` unless given."""
    wait = PATIENCE if wait is None else wait
    print(f"note: {option} {folder}: {_owner(folder)} is at work there; waiting {wait:g} s for it", file=sys.stderr)


def taken(folder: Path, option: str = "--output") -> InputError:
    """What is said where a folder's owner has not left it."""
    return InputError(f"{option} {folder}: {_owner(folder)} is at work there; wait for it, or choose another {option}")


def _owner(folder: Path) -> str:
    with contextlib.suppress(OSError):
        return (folder / LOCK).read_text(encoding="utf-8").strip() or "another process"
    return "another process"


def hand_over(lock: TextIO) -> dict[str, str]:
    """What a child that inherits a lock's open file needs in its environment to know that the folder is its own."""
    return {PARENTS_LOCK: str(lock.fileno())}


@contextlib.contextmanager
def handed_over(lock: TextIO) -> Iterator[None]:
    """What this process itself starts in the block knows that the folder of a lock is its own."""
    before = os.environ.get(PARENTS_LOCK)
    os.environ.update(hand_over(lock))
    try:
        yield
    finally:
        os.environ.pop(PARENTS_LOCK) if before is None else os.environ.update({PARENTS_LOCK: before})


def _handed_over(folder: Path) -> bool:
    """Whether the process that started this one has locked a folder for it."""
    try:
        return _same(int(os.environ[PARENTS_LOCK]), folder / LOCK)
    except (KeyError, ValueError, OSError):  # OSError: no open file has that number
        return False


@contextlib.contextmanager
def own_folder(folder: str | Path, option: str = "--output") -> Iterator[None]:
    """Make a folder, keep all others that ask for it out while the block runs, and remove what kills left there.

    Raises:
        InputError: as `take_folder`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.nullcontext() if _handed_over(folder) else take_folder(folder, option):
        remove_abandoned(folder)
        yield
