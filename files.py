"""Writing so that nobody ever sees half of a file, locks on folders, paths that options name, and digests."""

import contextlib
import csv
import fcntl
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from medssl.errors import InputError

LOCK = ".lock"  # the name of a folder's lock


# Writing -------------------------------------------------------------------------------------------


def unfinished_name(path: Path) -> Path:
    """The name under which a file or folder is written. Hidden, and with the same extension, by which some libraries
    choose the format."""
    return path.with_name(f".tmp.{os.getpid()}.{path.name}")


def is_unfinished(path: Path) -> bool:
    """Whether a name is one of `unfinished_name`'s, of any process. Earlier versions' names ended in `.tmp`."""
    return path.name.startswith(".tmp.") or (path.name.startswith(".") and path.name.endswith(".tmp"))


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
    for left in (*path.parent.glob(f".tmp.*.{path.name}"), path.with_name(f".{path.name}.tmp")):
        shutil.rmtree(left, ignore_errors=True)  # by a kill in the middle of this
    try:
        unfinished.mkdir(parents=True)
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


def write_json(path: str | Path, content: object) -> None:
    """`write_atomic` indented JSON."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_csv(path: str | Path, rows: list[dict]) -> None:
    """`write_atomic` rows that share their keys."""
    lines = io.StringIO(newline="")
    writer = csv.DictWriter(lines, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, lines.getvalue())


# Reading -------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict:
    """A JSON file's content; {} where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


# Folders -------------------------------------------------------------------------------------------


def lock_folder(folder: Path, wait: bool = True) -> TextIO | None:
    """Lock a folder against other processes that ask for its lock.

    The lock holds until the file is closed, here and in all processes that inherited it, or these processes end,
    however they end: a file that is left behind hinders nobody.

    Args:
        folder: is there. wait: until nobody else has the lock.

    Returns:
        the open file; None where another process has the lock and `wait` is false.
    """
    file = open(folder / LOCK, "w")  # noqa: SIM115, the caller closes it
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.close()
        return None
    except BaseException:
        file.close()
        raise
    return file


def existing_folder(path: str | Path, option: str = "--data") -> Path:
    """The folder that an option names; an InputError where it is none."""
    if not Path(path).is_dir():
        raise InputError(f"{option} {path}: not a folder")
    return Path(path)


# Digests -------------------------------------------------------------------------------------------


def digest(content: bytes) -> str:
    """16 hexadecimal digits that tell contents apart."""
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
