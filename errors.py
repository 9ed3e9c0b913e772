"""What bad input raises, and how a script ends for it."""

import io
import os
import sys
from collections.abc import Callable

from medssl.markup import one_line


class InputError(Exception):
    """Something the user gave cannot be used. Its text is one line: what is wrong, and what to do."""


class UnreadableImage(Exception):
    """A file that cannot be decoded; its text names the file and the reason."""


def run_script(main: Callable[[], object]) -> None:
    """Run a script's `main`, turning bad input into one line on standard error and exit code 2."""
    open_streams()
    try:
        main()
    except InputError as error:
        # A decoding process hands its error over with the traceback in the text; the last part is the message.
        message = " ".join(str(error).rpartition("InputError: ")[2].split())
    except OSError as error:
        # Paths without permission, full disks, folders in the place of files: the user's to mend.
        if error.filename is None and error.errno is None:
            raise
        message = f"{error.filename or 'input/output'}: {error.strerror or error}"
    except KeyboardInterrupt:
        sys.exit(130)
    else:
        return
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
