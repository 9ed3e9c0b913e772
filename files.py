"""Writing so that nobody ever sees half of a file, locks on folders, paths that options name, and digests."""

import contextlib
import csv
import fcntl
import glob
import hashlib
import io
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from medssl.errors import InputError
from medssl.markup import csv_cell, csv_value

LOCK = ".lock"  # the name of a folder's lock
PARENTS_LOCK = "MEDSSL_LOCK"  # names, in the environment, the open file of a lock that the parent has taken for a child
PATIENCE = 60.0  # seconds that a run waits for another to leave its folder: as one does that was told to end
PAUSE = 0.2  # seconds between two looks at a lock
FORGOTTEN = 24 * 3600  # seconds after which an unfinished file is nobody's, where the file system has no locks


# Writing -------------------------------------------------------------------------------------------


def unfinished_name(path: Path) -> Path:
    """The name under which a file or folder is written. Hidden, and with the same extension, by which some libraries
    choose the format."""
    return path.with_name(f".tmp.{os.getpid()}.{path.name}")


def is_unfinished(path: Path) -> bool:
    """Whether a name is one of `unfinished_name`'s, of any process. Earlier versions' names ended in `.tmp`."""
    return path.name.startswith(".tmp.") or (path.name.startswith(".") and path.name.endswith(".tmp"))


@contextlib.contextmanager
def _in_use(unfinished: Path, make: Callable[[Path], object]) -> Iterator[None]:
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
        file = os.open(unfinished, os.O_RDONLY if is_folder else os.O_RDWR)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            abandoned = True
        except BlockingIOError:
            abandoned = False
        except OSError:
            abandoned = time.time() - os.fstat(file).st_mtime > FORGOTTEN
        try:
            if abandoned:
                shutil.rmtree(unfinished) if is_folder else unfinished.unlink()
        finally:
            os.close(file)


def remove_abandoned(folder: Path) -> None:
    """Remove what kills in the middle of a write left in a folder and two levels below it."""
    for pattern in ("", "*/", "*/*/"):
        for path in filter(is_unfinished, folder.glob(f"{pattern}.*tmp*")):
            _remove_abandoned(path)


@contextlib.contextmanager
def naming(path: str | Path, written: Path | None = None) -> Iterator[None]:
    """What the disk refuses in the block is an OSError that names `path`, whatever a library makes of it.

    Args:
        written: the file or folder that the block writes; by default `path` itself.
    """
    path = Path(path)
    written = path if written is None else written
    try:
        yield
    except Exception as error:
        refused = error if isinstance(error, OSError) and error.errno is not None else no_room(written)
        if refused is None or (refused.filename and not Path(refused.filename).is_relative_to(written)):
            raise
        raise OSError(refused.errno, refused.strerror, str(path)) from error


def no_room(written: Path) -> OSError | None:
    """Why nothing can be added to a file, or to a folder; None where it can."""
    file = written / ".tmp.room" if written.is_dir() else written
    before = file.stat().st_size if file.exists() else None
    try:
        with open(file, "ab") as probe:
            probe.write(bytes(4096))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        return error
    finally:
        with contextlib.suppress(OSError):
            file.unlink() if before is None else os.truncate(file, before)
    return None


def check_room(written: Path) -> None:
    """Raise an OSError where nothing can be added to a file: for writers that say nothing of a full disk."""
    refused = no_room(written)
    if refused is not None:
        raise refused


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """A path to write a file to in the block, in the same folder and with the same extension as `path`, which it
    becomes at the block's end. Nothing changes where the block raises.

    So `path` is complete, old or new, whatever interrupts this: a kill, a full disk, a loss of power.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = unfinished_name(path)
    try:
        with naming(path, unfinished), _in_use(unfinished, Path.touch):
            yield unfinished
            with open(unfinished, "rb") as file:  # the data must reach the disk before the name does
                os.fsync(file.fileno())
            os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def write_atomic(path: str | Path, write: Callable[[Path], object]) -> None:
    """Write a file as `writing` does; `write` is called with the path to write to."""
    with writing(path) as unfinished:
        write(unfinished)


def write_folder(path: str | Path, write: Callable[[Path], object]) -> None:
    """Write a folder, which is complete or not there.

    Args:
        path: the folder, which one process writes at a time. What is there is removed, when the new one is complete.
        write: fills the empty folder that it is given.
    """
    path = Path(path)
    unfinished = unfinished_name(path)
    for left in (*path.parent.glob(f".tmp.*.{glob.escape(path.name)}"), path.with_name(f".{path.name}.tmp")):
        _remove_abandoned(left)  # by a kill in the middle of this
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with naming(path, unfinished), _in_use(unfinished, lambda folder: folder.mkdir(exist_ok=True)):
            write(unfinished)
            shutil.rmtree(path, ignore_errors=True)
            os.replace(unfinished, path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def write_bytes(path: str | Path, content: bytes) -> None:
    """`write_atomic` bytes."""
    write_atomic(path, lambda unfinished: unfinished.write_bytes(content))


def write_text(path: str | Path, text: str) -> None:
    """`write_atomic` text, UTF-8, with "\\n" at the ends of lines on every system."""
    write_bytes(path, text.encode())


def copy_file(source: str | Path, path: str | Path) -> None:
    """`write_atomic` what another file has."""
    write_atomic(path, lambda unfinished: shutil.copyfile(source, unfinished))


def append_bytes(path: str | Path, content: bytes) -> None:
    """Add to the end of a file, of which a kill may leave a part."""
    with naming(path), open(path, "ab") as file:
        file.write(content)
        file.flush()


def append_text(path: str | Path, text: str) -> None:
    """`append_bytes` text, UTF-8."""
    append_bytes(path, text.encode())


def write_json(path: str | Path, content: object) -> None:
    """`write_atomic` indented JSON."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_csv(path: str | Path, rows: list[dict]) -> None:
    """`write_atomic` rows that share their keys, of which no cell is a formula. Names that are not UTF-8 keep their
    bytes."""
    lines = io.StringIO(newline="")
    writer = csv.DictWriter(lines, list(rows[0]))
    writer.writerow({key: csv_cell(key) for key in rows[0]})
    writer.writerows({key: csv_cell(value) for key, value in row.items()} for row in rows)
    write_bytes(path, name_bytes(lines.getvalue()))


# Reading -------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict:
    """A JSON file's content; {} where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows that `write_csv` wrote, as text.

    Raises:
        InputError: for a file that was damaged since.
    """
    try:
        with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
            header, *lines = csv.reader(file)
        return [dict(zip(map(csv_value, header), map(csv_value, line), strict=True)) for line in lines]
    except (csv.Error, ValueError):
        raise InputError(f"{path}: not a whole table; remove {path.parent} and run the same command again") from None


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
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115, the caller closes it
    try:
        while not (_lock(file) and _same(file.fileno(), path)):
            if not _same(file.fileno(), path):  # removed, by its last owner or with the folder
                file.close()
                file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
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


def _lock(file: TextIO) -> bool:
    """Lock an open file; False where another process has it locked. True, with a note, where there are no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        print(
            f"note: {file.name}: this file system has no locks ({error.strerror}); start nothing else in this folder",
            file=sys.stderr,
        )
    return True


def take_folder(folder: Path, option: str = "--output") -> TextIO:
    """`lock_folder` a folder for a run; others that are told to end, as before a requeued job begins, are waited for.

    Raises:
        InputError: where another process still has the folder after `PATIENCE` seconds.
    """
    lock = lock_folder(folder, 0)
    if lock is None:
        owner = (folder / LOCK).read_text(encoding="utf-8").strip() or "another process"
        print(f"note: {option} {folder}: {owner} is at work there; waiting {PATIENCE:g} s for it", file=sys.stderr)
        lock = lock_folder(folder, PATIENCE)
    if lock is None:
        raise InputError(f"{option} {folder}: {owner} is at work there; wait for it, or choose another {option}")
    return lock


def hand_over(lock: TextIO) -> dict[str, str]:
    """What a child that inherits a lock's open file needs in its environment to know that the folder is its own."""
    return {PARENTS_LOCK: str(lock.fileno())}


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


def existing_folder(path: str | Path, option: str = "--data") -> Path:
    """The folder that an option names; an InputError where it is none."""
    if not Path(path).is_dir():
        raise InputError(f"{option} {path}: not a folder")
    return Path(path)


# Digests -------------------------------------------------------------------------------------------


def name_bytes(text: str) -> bytes:
    """Text as UTF-8, with the own bytes of names of files that are not UTF-8."""
    return text.encode(errors="surrogateescape")


def digest(content: bytes) -> str:
    """16 hexadecimal digits that tell contents apart."""
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
