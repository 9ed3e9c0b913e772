"""What bad input raises, and how a script ends for it."""

import sys
from collections.abc import Callable


class InputError(Exception):
    """Something the user gave cannot be used. Its text is one line: what is wrong, and what to do."""


class UnreadableImage(Exception):
    """A file that cannot be decoded; its text names the file and the reason."""


def run_script(main: Callable[[], object]) -> None:
    """Run a script's `main`, turning bad input into one line on standard error and exit code 2."""
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
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
