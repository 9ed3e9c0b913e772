"""Damaged and hostile files for every reader of the project: none may end in a traceback, a signal or a hang, and none
may run what it holds.

  python benchmarks/endure_files.py --minutes 5 --seed 0 --output DIR

Small valid files are damaged: half of them anywhere, and half in what their format says of itself. Each is read in a
child process that has the libraries already, and may use little memory. A file that a reader neither takes nor refuses
in a line is kept in DIR, with the reason. The same seed makes the same files.
"""

import contextlib
import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

from PIL import Image

from medssl.benchmarks import damage
from medssl.benchmarks.readers import READERS, Reader
from medssl.engine import options
from medssl.errors import InputError, UnreadableImage, run_script
from medssl.reading.simpleitk import use_one_thread

HANG = 20.0  # seconds that one file may take
BATCH = 40  # files that a child reads before another takes its place
MEMORY = 3 * 2**30  # bytes that a child may use beyond what its parent has
COUNTS = ("files", "headers", "refused", "accepted", "faults")


def spoil(reader: Reader, place: Path, seed: int, number: int) -> tuple[Path, bool]:
    """Damage one of a reader's valid files in a folder; every second one in its header, where that changes it.

    Returns:
        which, and whether it is its header that was changed.
    """
    rng = Random(f"{seed} {reader.name} {number}")
    victim = rng.choice(sorted(path for path in place.rglob(reader.victims) if path.is_file()))
    change = reader.change if number % 2 else damage.any_bytes
    data = victim.read_bytes()
    with contextlib.suppress(Exception):  # a change that cannot be made of what an earlier one left
        data = change(data, rng, str(marker_of(place)))
    changed = data != victim.read_bytes()
    victim.write_bytes(data if changed else damage.any_bytes(data, rng))
    return victim, changed and number % 2 == 1


def marker_of(place: Path) -> Path:
    """What planted code makes, where it runs."""
    return place.with_name("EXECUTED")


def judge(reader: Reader, place: Path) -> tuple[str, str]:
    """Read a folder: "accepted", "refused", or a kind of fault; and the reason."""
    try:
        reader.read(place)
        outcome = "accepted", ""
    except (InputError, UnreadableImage) as error:
        outcome = ("several lines" if "\n" in str(error) or not str(error) else "refused"), str(error)
    except OSError as error:
        named = error.filename is not None
        outcome = ("refused", str(error)) if named else ("traceback", traceback.format_exc())
    except BaseException:
        outcome = "traceback", traceback.format_exc()
    if marker_of(place).exists():
        return "executed", outcome[1]
    return outcome


def child(reader: Reader, valid: Path, work: Path, seed: int, numbers: Sequence[int], pipe: Connection) -> None:
    """Read files one after the other, and say of each that it begins, and how it ended."""
    quiet()
    for number in numbers:
        place = work / "case"
        shutil.rmtree(place, ignore_errors=True)
        shutil.rmtree(marker_of(place), ignore_errors=True)
        shutil.copytree(valid, place)
        _, header = spoil(reader, place, seed, number)
        shutil.rmtree(work / "before", ignore_errors=True)
        shutil.copytree(place, work / "before")  # as it was read: some readers write
        pipe.send((number, header))
        pipe.send(judge(reader, place))
    pipe.close()
    os._exit(0)


def quiet() -> None:
    """No output, no core files, little memory."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nowhere, stream)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


def batch(reader: Reader, valid: Path, work: Path, seed: int, numbers: Sequence[int], hang: float) -> list[tuple]:
    """(number, whether its header was changed, outcome, reason) of the files that one child reads before it ends, the
    last of them however it ended."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(reader, valid, work, seed, numbers, theirs))
    process.start()
    theirs.close()
    done, current = [], None
    with contextlib.suppress(EOFError):
        while mine.poll(hang):
            said = mine.recv()
            if current is None:
                current = said
            else:
                done.append((*current, *said))
                current = None
        process.kill()
        process.join()
        return [*done, (*(current or (numbers[len(done)], False)), "hang", f"no end within {hang:g} s")]
    process.join()
    if current is not None or (process.exitcode and len(done) < len(numbers)):
        outcome = "signal" if process.exitcode < 0 else "traceback"
        done.append((*(current or (numbers[len(done)], False)), outcome, f"ended by {-process.exitcode}"))
    return done


def run(
    seconds: float, seed: int, keep: Path, readers: Sequence[Reader] = tuple(READERS), most: int | None = None,
    hang: float = HANG,
) -> dict:  # fmt: skip
    """Read damaged files for some time, about as many of each reader.

    Args:
        seed: of all that is drawn. keep: folder for what no reader may do.
        most: files of a reader, at most. hang: seconds that one file may take.

    Returns:
        {"seed", "seconds", "readers": {name: {"files", "headers" (of them, with changed headers), "refused",
        "accepted", "faults"}}, "faults": [{"reader", "number", "outcome", "reason", "kept"}]}.
    """
    load_libraries()
    began, faults = time.perf_counter(), []
    counts = {reader.name: dict.fromkeys(COUNTS, 0) for reader in readers}
    with tempfile.TemporaryDirectory() as folder:
        places = {reader.name: Path(folder, str(i)) for i, reader in enumerate(readers)}
        for reader in readers:
            (places[reader.name] / "valid").mkdir(parents=True)
            reader.make(places[reader.name] / "valid")
        while time.perf_counter() - began < seconds:
            reader = min(readers, key=lambda reader: counts[reader.name]["files"])
            count, work = counts[reader.name], places[reader.name]
            first = count["files"]
            numbers = range(first, min(first + BATCH, most or first + BATCH))
            if not numbers:
                break
            for number, header, outcome, reason in batch(reader, work / "valid", work, seed, numbers, hang):
                fault = outcome not in ("refused", "accepted")
                for key in ("files", "faults" if fault else outcome, *["headers"] * header):
                    count[key] += 1
                if fault:
                    kept = put(reader, work / "valid", keep, seed, number, outcome, reason)
                    found = {"reader": reader.name, "number": number, "outcome": outcome, "reason": reason}
                    faults.append(found | {"kept": str(kept)})
    return {"seed": seed, "seconds": round(time.perf_counter() - began, 1), "readers": counts, "faults": faults}


def load_libraries() -> None:
    """Import once what children would import for every batch."""
    import pycocotools.mask  # noqa: F401
    import pydicom.pixels  # noqa: F401

    Image.init()
    use_one_thread()  # threads would not be there in children, which would wait for them


def put(reader: Reader, valid: Path, keep: Path, seed: int, number: int, outcome: str, reason: str) -> Path:
    """Make a file again where it is kept, with what happened beside it."""
    place = keep / f"{reader.name.replace(' ', '_')}-{seed}-{number}" / "files"
    shutil.rmtree(place.parent, ignore_errors=True)
    shutil.copytree(valid, place)
    victim, _ = spoil(reader, place, seed, number)
    note = {"reader": reader.name, "seed": seed, "number": number, "file": victim.name, "outcome": outcome}
    (place.parent / "why.json").write_text(json.dumps(note | {"reason": reason}, indent=1) + "\n")
    return place.parent


def table(found: dict) -> str:
    """The counts, a line a reader."""
    rows = [["reader", *COUNTS], *([name, *map(str, count.values())] for name, count in found["readers"].items())]
    total = [str(sum(count[key] for count in found["readers"].values())) for key in COUNTS]
    rows.append(["all", *total])
    return "\n".join(f"{row[0]:24}" + "".join(f"{value:>10}" for value in row[1:]) for row in rows)


def get_parser() -> options.Parser:
    parser = options.Parser(__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="how long")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn")
    parser.add_argument("--output", metavar="DIR", default="runs/files", help="where files are kept that show a fault")
    parser.add_argument("--reader", metavar="NAME", help="one alone, of those that the table names")
    parser.add_argument("--files", metavar="N", type=int, help="of each reader, at most")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    readers = [reader for reader in READERS if args.reader in (None, reader.name)]
    if not readers:
        raise InputError(f"--reader {args.reader}: unknown; known are {', '.join(reader.name for reader in READERS)}")
    found = run(60 * args.minutes, args.seed, Path(args.output), readers, args.files)
    print(table(found))
    for fault in found["faults"]:
        print(f"{fault['kept']}: {fault['outcome']}: {fault['reason'].strip().splitlines()[-1][:160]}")
    if found["faults"]:
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
