"""Look through a folder of images or volumes before training on it.

    python preprocess/check_data.py DIR
    python preprocess/check_data.py DIR --list train.txt valid.txt test.txt --json report.json

Reports file types, pixel types and sizes (of volumes: voxels along x, y, z, their spacing, and the range of values),
files that cannot be read, exact duplicates, and for lists: images that are not there, and images, patients or identical
files that two lists share. DICOM slices of a series count as one volume. Exit code 0: nothing wrong; 1: problems were
found; 2: the input could not be used.
"""

import functools
import hashlib
import itertools
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from medssl.datasets.folder import sort_out
from medssl.datasets.splits import Patients
from medssl.engine import options
from medssl.engine.options import Parser
from medssl.errors import InputError, UnreadableImage, run_script
from medssl.files import write_text
from medssl.markup import one_line
from medssl.processes import pool
from medssl.reading.find import VOLUME_EXTENSIONS, without_extension
from medssl.reading.intensities import CT_BELOW
from medssl.reading.pictures import describe, read_image
from medssl.reading.simpleitk import use_one_thread
from medssl.reading.tables import read_list
from medssl.reading.volumes import read_volume


def get_parser() -> Parser:
    """The options of this script."""
    parser = Parser(__doc__)
    parser.add_argument("folder", metavar="DIR", help="the folder, searched recursively")
    parser.add_argument(
        "--list", metavar="FILE", nargs="+", default=[], help="image lists that must not overlap; names are below DIR"
    )
    parser.add_argument("--json", metavar="FILE", help="write the report there too")
    parser.add_argument(
        "--workers", "--num-workers", "--num_workers", type=options.non_negative_int, default=4, help="processes"
    )
    return parser


def examine(path: Path) -> dict:
    """What one file is: `format`, `pixels`, `size` "WxH", `hash` of its bytes, `error` or None.

    A volume has `spacing` in mm and `values`, its range, besides, "XxYxZ" as size, and the hash of its voxels.
    """
    if path.is_dir() or path.name.lower().endswith(VOLUME_EXTENSIONS):
        return examine_volume(path)
    kind, pixels = describe(path)
    found = {"format": kind, "pixels": pixels, "size": None, "hash": None, "error": None}
    try:
        height, width = read_image(path).shape[:2]
        found["size"] = f"{width}x{height}"
        found["hash"] = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    except (UnreadableImage, OSError) as error:
        found["error"] = str(error)
    return found


def examine_volume(path: Path) -> dict:
    """`examine` for a file with a volume, or a folder with a DICOM series."""
    name = path.name.lower()
    kind = "DICOM series" if path.is_dir() else next(end for end in VOLUME_EXTENSIONS if name.endswith(end))
    found = {"format": kind, "pixels": None, "size": None, "spacing": None, "values": None, "hash": None, "error": None}
    try:
        volume = read_volume(path, dtype=None)
    except UnreadableImage as error:
        return {**found, "error": str(error)}
    low, high = volume.array.min(), volume.array.max()
    return {
        **found,
        "pixels": "CT" if low < CT_BELOW else "volume",
        "size": "x".join(map(str, volume.array.shape)),
        "spacing": " x ".join(f"{step:.2f}" for step in volume.spacing),
        "values": f"{low:g} to {high:g}" if low < high else f"constant {low:g}",
        "hash": hashlib.blake2b(volume.array.tobytes(), digest_size=16).hexdigest(),
    }


def examine_all(paths: Sequence[Path], workers: int) -> list[dict]:
    """`examine` every file, in order, in `workers` processes (0: in this one)."""
    shown = functools.partial(tqdm, total=len(paths), desc="check", disable=None)
    if not workers:
        return list(shown(map(examine, paths)))
    volumes = any(path.is_dir() or path.name.lower().endswith(VOLUME_EXTENSIONS) for path in paths)
    start = use_one_thread if volumes else None  # processes share the cores
    with pool(min(workers, len(paths)), start) as executor:
        return list(shown(executor.map(examine, paths, chunksize=1 if volumes else 8)))


UNKNOWN = "patients unknown: neither names nor a table patients.csv tell"


def check_lists(lists: Sequence[str], hashes: dict[str, str | None], patients: Patients) -> dict[str, list[str]]:
    """Problems of lists: names that are missing, and what two lists share.

    Args:
        lists: list files.
        hashes: content hash by path below the folder, None for unreadable files.
        patients: of the folder.
    """
    by_name = {name.rsplit("/", 1)[-1]: name for name in hashes}  # ChestX-ray14 lists have names alone
    missing, shared = [], []
    contents = {}
    for path in lists:
        names = read_list(path)[0]
        # Volumes go by their names without extension.
        known = ((name, without_extension(name), by_name.get(name)) for name in names)
        paths = [next((one for one in each if one in hashes), None) for each in known]
        missing += [f"{path}: {name}" for name, there in zip(names, paths) if there is None]
        contents[path] = {
            "images": {there or name for name, there in zip(names, paths)},
            "patients": {patients.of(there or name) for name, there in zip(names, paths)} - {None},
            "identical files": {hashes[there] for there in paths if there} - {None},
        }
    for one, two in itertools.combinations(lists, 2):
        for what in ("images", "patients", "identical files"):
            both = contents[one][what] & contents[two][what]
            # Shared images are identical files as well; saying it once is enough.
            if both and not (what == "identical files" and contents[one]["images"] & contents[two]["images"]):
                shared.append(f"{one} and {two} share {len(both)} {what}, such as {min(both)}")
    sizes = {path: {part: len(contents[path][part]) for part in ("images", "patients")} for path in lists}
    return {"lists": sizes, "missing": missing, "overlaps": shared}


def check(folder: Path, lists: Sequence[str], workers: int) -> dict:
    """The report of a folder as a dictionary of plain values."""
    images, volumes = sort_out(folder)
    names = {**dict(volumes), **{path.relative_to(folder).as_posix(): path for path in images}}
    if not names:
        raise InputError(f"{folder}: no images in this folder or below it, and no volumes")
    for path in lists:
        read_list(path)  # a bad list is said at once, not after an hour of decoding
    found = dict(zip(names, examine_all(list(names.values()), workers), strict=True))
    same = defaultdict(list)
    for name, one in found.items():
        if one["hash"]:
            same[one["hash"]].append(name)
    good = [one for one in found.values() if one["error"] is None]
    return {
        "folder": str(folder),
        "images": len(found),
        "formats": dict(Counter(one["format"] for one in found.values()).most_common()),
        "pixels": dict(Counter(one["pixels"] for one in good).most_common()),
        "sizes": dict(Counter(one["size"] for one in good).most_common()),
        **{
            part: dict(Counter(one[key] for one in good if key in one).most_common())
            for part, key in (("spacing, mm", "spacing"), ("values", "values"))
            if volumes
        },
        "unreadable": {name: one["error"] for name, one in found.items() if one["error"] is not None},
        "duplicates": [names for names in same.values() if len(names) > 1],
        **check_lists(lists, {name: one["hash"] for name, one in found.items()}, Patients(folder, names)),
    }


def table(report: dict, rows: int = 12) -> Iterator[str]:
    """The report as lines to read, at most `rows` for each part."""
    yield f"{report['folder']}: {report['images']} images"
    for part in ("formats", "pixels", "sizes", "spacing, mm", "values"):
        if part not in report:
            continue
        counts = list(report[part].items())
        yield part
        yield from (f"  {value:24} {count:8}" for value, count in counts[:rows])
        if len(counts) > rows:
            yield f"  {'other':24} {sum(count for _, count in counts[rows:]):8}"
    problems = {
        "unreadable": [f"{name}: {reason}" for name, reason in report["unreadable"].items()],
        "duplicates": [" = ".join(names) for names in report["duplicates"]],
        "missing": report["missing"],
        "overlaps": report["overlaps"],
    }
    for path, part in report["lists"].items():
        yield f"{path}: {part['images']} images, " + (
            f"{part['patients']} patients" * bool(part["patients"]) or UNKNOWN
        )
    if not report["lists"]:  # then nothing was compared
        del problems["missing"], problems["overlaps"]
    for part, lines in problems.items():
        yield f"{part}: {len(lines) or 'none'}"
        yield from (f"  {line}" for line in lines[:rows])
        if len(lines) > rows:
            yield f"  and {len(lines) - rows} more"


def main(argv: Sequence[str] | None = None) -> None:
    """Print the report; leave with exit code 1 where it has problems."""
    args = get_parser().parse_args(argv)
    report = check(Path(args.folder), args.list, args.workers)
    print("\n".join(map(one_line, table(report))))
    if args.json:
        write_text(args.json, json.dumps(report, indent=1) + "\n")
    if any(report[part] for part in ("unreadable", "duplicates", "missing", "overlaps")):
        sys.exit(1)


def cli() -> None:
    """Console command."""
    run_script(main, less="fewer --workers")


if __name__ == "__main__":
    cli()
