"""What bad input raises, and how a script ends for it and for what the machine lacks."""

import contextlib
import errno
import io
import os
import re
import sys
from collections.abc import Callable, Iterator

from medssl.markup import one_line

LACKS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # of the machine, whatever the file
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_SHARED_MEMORY = (
    "the workers' shared memory (/dev/shm) is full; use fewer --workers, or 0, or give more: docker run --shm-size 8g"
)
TOO_LARGE = "too large for the memory of this machine"
FEW_FILES = "too many open files; raise the limit (ulimit -n 65536), or use fewer --workers"
# How libraries say that an allocation failed; numpy and Python have a class for that.
NO_MEMORY = re.compile(
    r"out of memory|can't allocate memory|bad_alloc|_STATUS_ALLOC_FAILED|Unable to allocate|: allocation failed"
    r"|Cannot allocate memory"
)
WANTED = re.compile(r"(?:tried to|unable to) allocate ((\d[\d.]*) ([kmgtpe]?)i?b\w*)", re.IGNORECASE)
# How they say which error of the system it was: Python, and torch's C++.
NUMBERED = re.compile(r"\[Errno (?P<python>\d+)\] [^:]*(?:: '(?P<file>.*)')?$|: (?P<said>[^:]*) \((?P<torch>\d+)\)$")
# A DataLoader's worker hands an error over with its traceback in the text.
HANDED_OVER = "\nOriginal Traceback (most recent call last):\n"


class InputError(Exception):
    """Something the user gave cannot be used. Its text is one line: what is wrong, and what to do."""


class UnreadableImage(Exception):
    """A file that cannot be decoded; its text names the file and the reason."""


def unreadable(what: str = "") -> contextlib.AbstractContextManager[None]:
    """Whatever a decoder raises in this block for a file, the file is unreadable: an UnreadableImage of one line, with
    the reason behind `what`; of an error of the system, its reason alone."""

    def refuse(error: Exception) -> UnreadableImage:
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, OSError) and error.strerror:
            return UnreadableImage(error.strerror)
        return UnreadableImage(f"{what} ({reason})" if what else reason)

    return _blaming(refuse)


def unusable(path: object, what: str) -> contextlib.AbstractContextManager[None]:
    """The same for files that are no images: an InputError, the path and `what`. Errors of the system that name a file,
    such as those of permissions, pass as they are."""

    def refuse(error: Exception) -> Exception:
        return error if isinstance(error, OSError) and error.filename is not None else InputError(f"{path}: {what}")

    return _blaming(refuse)


@contextlib.contextmanager
def _blaming(refuse: Callable[[Exception], Exception]) -> Iterator[None]:
    """Decoders raise nearly anything for damaged files. What is not the file's fault passes as it is: the exceptions of
    this module, what the machine lacks, and Ctrl-C."""
    try:
        yield
    except (InputError, UnreadableImage):
        raise
    except Exception as error:
        if lacks(error):
            raise
        refused = refuse(error)
        if refused is error:
            raise
        raise refused from error


def lacks(error: BaseException) -> bool:
    """Whether an error tells of what the machine lacks: memory, of a GPU too, open files, room on a disk. A file may
    have caused it that claims more than it holds: `wanted` tells how much."""
    return isinstance(error, MemoryError) or error_number(error) in (*LACKS, *DISK) or _tells_of_memory(error)


def _tells_of_memory(error: BaseException) -> bool:
    """Whether a library tells in its words that memory was not there."""
    return isinstance(error, (OSError, RuntimeError)) and bool(NO_MEMORY.search(text_of(error)))


def wanted(error: BaseException) -> float | None:
    """The bytes that an allocation asked for, where its error tells; rounded as there."""
    found = WANTED.search(text_of(error))
    return float(found[2]) * 1024.0 ** " kmgtpe".index(found[3].lower() or " ") if found else None


def explain(error: BaseException, less: str = "a smaller --b, or fewer --workers") -> str | None:
    """An error in one line, if it is the user's to mend: bad input, and what the machine lacks. None for a fault of
    the code, whose traceback is to be seen.

    Args:
        error: also one that a worker handed over.
        less: what needs less memory.
    """
    text = text_of(error)
    if isinstance(error, InputError):
        return " ".join(text.rpartition("InputError: ")[2].split())
    if not isinstance(error, (OSError, MemoryError, RuntimeError)):
        return None
    number, file = error_number(error), file_of(error)
    if file is None and number in (*DISK, errno.EPIPE) and isinstance(error, OSError) and not _prints("\n"):
        return f"standard output: {os.strerror(number)}; send it elsewhere"
    if "</torch_" in text:  # the name of a piece of shared memory
        return FEW_FILES if number in (errno.EMFILE, errno.ENFILE) else NO_SHARED_MEMORY
    if number in (errno.EMFILE, errno.ENFILE) or "Too many open files" in text or "ancillary data" in text:
        return FEW_FILES
    if isinstance(error, MemoryError) or number == errno.ENOMEM or _tells_of_memory(error):
        return out_of_memory(error, less)
    if number is None:  # no OSError, or one by which a library tells of something else
        return f"{file}: {text}" if file else None
    if number in DISK:
        return f"{file or 'a file'}: {os.strerror(number)}; make room on its disk, or choose another --output"
    # Paths without permission, folders in the place of files.
    return f"{file or 'input/output'}: {os.strerror(number)}" if isinstance(error, OSError) else None


def out_of_memory(error: BaseException, less: str) -> str:
    """The line about memory that was not there."""
    text = text_of(error)
    gpu = any(word in text for word in ("CUDA", "CUBLAS", "CUDNN", "HIP"))
    if TOO_LARGE in text:  # which names the file
        return f"{text.rpartition('MemoryError: ')[2]}; use {less}"
    asked = WANTED.search(text)
    amount = f" ({asked[1]} more were asked for)" if asked else ""
    return f"out of {'GPU ' if gpu else ''}memory{amount}; use {'a smaller --b, or --amp' if gpu else less}"


def text_of(error: BaseException) -> str:
    """An error's text; of one that a worker handed over, without the traceback."""
    text = str(error).rstrip()
    if HANDED_OVER not in text:
        return text
    begun = [*re.finditer(r"^[A-Za-z_][\w.]*: ", text, re.MULTILINE)]
    return text[begun[-1].start() :] if begun else text


def error_number(error: BaseException) -> int | None:
    """The system's number of an error (`errno.ENOSPC`, …), from its text where that alone tells."""
    number = getattr(error, "errno", None)
    if isinstance(number, int):
        return number
    found = NUMBERED.search(text_of(error))
    if found is None or (found["torch"] and found["said"] != os.strerror(int(found["torch"]))):
        return None
    return int(found["python"] or found["torch"])


def file_of(error: BaseException) -> str | None:
    """The file that an error names."""
    found = NUMBERED.search(text_of(error))
    return getattr(error, "filename", None) or (found["file"] if found else None)


def _prints(text: str = "") -> bool:
    """Whether standard output takes a text, and what was printed before and is still to be written."""
    try:
        print(text, end="", flush=True)
    except OSError:
        return False
    return True


def run_script(main: Callable[[], object], less: str = "a smaller --b, or fewer --workers") -> None:
    """Run a script's `main`, turning what `explain` knows into one line on standard error and exit code 2.

    Args:
        less: what needs less memory.
    """
    open_streams()
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        message = explain(error, less)
        if message is None:
            raise
    else:
        return
    finally:
        if not _prints():  # the interpreter would try once more at its end, and leave a traceback
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    print(f"error: {one_line(message)}", file=sys.stderr)
    sys.exit(2)


def open_streams() -> None:
    """Make printing safe: a service has no standard streams, and encodings lack letters that names of files have."""
    for number in range(3):  # ascending: a file is opened under the lowest number that is free
        try:
            os.fstat(number)
        except OSError:  # else the next file has this number, a checkpoint perhaps, and libraries print into it
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, to the process's end
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
