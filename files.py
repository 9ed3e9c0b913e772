"""Writing so that nobody ever sees half of a file, paths that options name, and digests."""

import contextlib
import csv
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from medssl.errors import InputError, unusable
from medssl.locks import in_use, remove_abandoned, unfinished_name
from medssl.markup import csv_cell, csv_value

# Writing -------------------------------------------------------------------------------------------


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
        with naming(path, unfinished), in_use(unfinished, Path.touch):
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
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path.parent, path.name)  # by a kill in the middle of this
    try:
        with naming(path, unfinished), in_use(unfinished, lambda folder: folder.mkdir(exist_ok=True)):
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
    """Add to the end of a file, of which a kill may leave a part. Its folder may have been removed meanwhile."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
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
    """A JSON file's object; {} where there is no file, and an InputError where it holds something else."""
    if not path.is_file():
        return {}
    with unusable(path, "damaged, or no JSON; restore it from a copy, or remove it"):
        content = json.loads(path.read_text(encoding="utf-8-sig"))  # others' tools may mark the order of bytes
    if not isinstance(content, dict):
        raise InputError(f"{path}: no JSON object; restore it from a copy, or remove it")
    return content


def read_lines(path: Path) -> list[dict]:
    """The objects of a file with one in JSON a line, less lines that a kill has cut, and other damaged ones; [] where
    there is no file."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(InputError), unusable(path, "damaged"):
            content = json.loads(line)
            if isinstance(content, dict):
                lines.append(content)
    return lines


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


def existing_folder(path: str | Path, option: str = "--data") -> Path:
    """The folder that an option names; an InputError where it is none."""
    if not Path(path).is_dir():
        raise InputError(f"{option} {path}: not a folder")
    return Path(path)


def split_init(init: str | Path) -> tuple[str, str | None]:
    """`FILE:PREFIX` → the file, and the prefix under which its weights are asked for: None where all of `init` is a
    file's name, or nothing in it is."""
    text = str(init)
    ends = [place for place, letter in enumerate(text) if letter == ":"]
    end = next((end for end in reversed(ends) if Path(text[:end]).is_file()), None)
    return (text, None) if end is None or Path(text).is_file() else (text[:end], text[end + 1 :])


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
