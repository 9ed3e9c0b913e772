"""Cut CT volumes into the cubes that 3D pre-training reads, once, before training (LUNA16's layout, or any folder).

    python preprocess/luna.py --data LUNA16 --save cubes --workers 8                  (pairs for PCRLv2, all subsets)
    python preprocess/luna.py --data LUNA16 --save cubes --fold 0 1 2 --scale 16
    python preprocess/luna.py --data LUNA16 --save cubes_pcrl --method pcrl
    python preprocess/luna.py --data LUNA16 --save nodules --nodules LUNA16/candidates_V2.csv --negatives 50

DIR has `subset0` … `subset9` with `.mhd` files, and then nothing else in it is read; without subset folders, every
volume below it is (`.mhd .mha .nii .nii.gz .nrrd`, folders of DICOM slices), and counts as subset 0.

Written, all float16 in [0, 1] with axes x, y, z:

  * `subsetK/<uid>_global_<i>.npy` (2, 64, 64, 32), two overlapping crops, and `_local_<i>.npy` (6, 16, 16, 16);
    with `--method pcrl`, `_img_<i>.npy` (2, 64, 64, 32) alone;
  * with `--nodules`, instead: `subsetK/<uid>_nodule_<row>.npy` (48, 48, 48), 1 mm voxels, the candidate of that row of
    the table in the middle, and `nodules.csv`: uid, row, class, fold, x, y, z (mm), weight, file. A candidate that was
    kept stands for `weight` candidates of its scan and class: 1, unless negatives were left out;
  * `luna.json` (or `nodules.json`): per scan, what was made and rejected, in what time, or why nothing was.

A scan is finished when its record, `subsetK/<uid>.pairs.json`, is there; the same command continues with the rest.
Scans that failed are tried again. Where paths, or a table `patients.csv` in `--data`, tell patients, a table of that
name in `--save` tells whose the uids are. Cubes depend on the uid and `--seed`, not on workers, order or interruptions.

Differences from the published tools, on purpose: scans have their own random numbers; each crop is filtered by its own
volume; float16; where a scan is too small for all crop sizes, the free border is given up on that axis (which is what
padding by its width would do), and sizes that do not fit are not drawn.
"""

import concurrent.futures
import csv
import functools
import hashlib
import io
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter1d
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from medssl.datasets.splits import Patients
from medssl.engine import options
from medssl.engine.guards import Stop
from medssl.engine.options import Parser
from medssl.errors import InputError, UnreadableImage, run_script, unusable
from medssl.files import file_digest, name_bytes, read_json, write_atomic, write_csv, write_text
from medssl.locks import remove_abandoned
from medssl.markup import csv_cell, one_line
from medssl.processes import pool
from medssl.reading.find import find_volumes
from medssl.reading.geometry import Volume, on_grid, resample, resampled_shape
from medssl.reading.intensities import CT_BELOW, LOWEST_HU, scale, unit_range
from medssl.reading.simpleitk import use_one_thread
from medssl.reading.tables import PATIENTS, read_patients
from medssl.reading.volumes import read_volume
from medssl.views.ops3d import CUBE_SIZE, GLOBAL_SIZES, LOCAL_CUBE_SIZE, LOCAL_SIZES, MIN_IOU, PCRL_MIN_IOU, PCRL_SIZES

VERSION = 1  # of what is made from a scan; scans of other versions are not mixed

# Crop sizes in mm along x, y, z, and the overlap (IoU) above which two crops are a pair.
CROPS = {"pcrlv2": (GLOBAL_SIZES, MIN_IOU), "pcrl": (PCRL_SIZES, PCRL_MIN_IOU)}
BORDER = (70, 70, 15)  # mm at each side that crops leave free
SMALLER = 32  # by which a size shrinks along x and y where a scan is too small for it
LOCALS, LOCAL_MARGIN = 6, 3

EXTRA = 3  # slices beyond a crop that the tissue filter looks into
TISSUE = 0.425  # −150 HU
MOST_TISSUE = 0.15  # of a crop's volume
DRAWS = 100  # pairs drawn for each that is wanted, before a scan counts as too full of tissue

NODULE_SIDE = 48
TABLE_COLUMNS = ("seriesuid", "coordX", "coordY", "coordZ", "class")
INDEX_COLUMNS = ("uid", "row", "class", "fold", "x", "y", "z", "weight", "file")

Cubes = np.ndarray | Sequence[np.ndarray]


class Unusable(Exception):
    """A scan that can be read but gives no cubes; its text is the reason."""


@dataclass(frozen=True)
class Candidate:
    """A row of the candidates' table: its number from 0, 1 for a nodule, the position in mm (DICOM's axes)."""

    row: int
    label: int
    position: tuple[float, float, float]


@dataclass(frozen=True)
class Pairs:
    """What decides the pairs of a scan.

    Attributes:
        method: key of `CROPS`.
        size: voxels of a written crop.
        scale: pairs per scan.
        seed: with the uid, seeds everything drawn.
    """

    method: str = "pcrlv2"
    size: tuple[int, int, int] = CUBE_SIZE
    scale: int = 16
    seed: int = 0

    kind = "pairs"


@dataclass(frozen=True)
class Nodules:
    """What decides the nodule cubes of a scan.

    Attributes:
        table: hash of the candidates' table.
        negatives: candidates of class 0 kept per scan; None keeps all.
        seed: with the uid, seeds which.
    """

    table: str
    negatives: int | None
    seed: int = 0

    kind = "nodules"


@dataclass(frozen=True)
class Scan:
    """One volume to work on: where it is, where its files go, its patient where one is told, and its candidates."""

    uid: str
    fold: int
    path: Path
    save: Path
    patient: str | None = None
    candidates: tuple[Candidate, ...] = ()

    def file(self, what: str) -> Path:
        """`SAVE/subsetK/<uid><what>`."""
        return self.save / f"subset{self.fold}" / f"{self.uid}{what}"


# Crops ---------------------------------------------------------------------------------------------


def iou_of_corners(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes (…, 6): x0, x1, y0, y1, z0, z1, ends excluded."""
    low, high = np.maximum(one[..., ::2], two[..., ::2]), np.minimum(one[..., 1::2], two[..., 1::2])
    both = (high - low).clip(0).prod(-1)
    return both / (volume_of(one) + volume_of(two) - both)


def volume_of(boxes: np.ndarray) -> np.ndarray:
    """Voxels in boxes (…, 6)."""
    return (boxes[..., 1::2] - boxes[..., ::2]).prod(-1)


def fitting_sizes(shape: Sequence[int], sizes: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Crop sizes that a scan has room for, and the border to keep free.

    Args:
        shape: voxels of the scan at 1 mm.
        sizes: the method's crop sizes.

    Returns:
        (S, 3) sizes and (3,) border.

    Raises:
        Unusable: when the scan cannot hold the smallest crop.
    """
    shape, border, extra = np.array(shape), np.array(BORDER), np.array((0, 0, EXTRA))
    shrunk = []
    for size in np.array(sizes):
        if (shape < size + 2 * border)[:2].any() and (size[:2] > SMALLER).all():
            size[:2] -= SMALLER
        shrunk.append(size)
    smallest = np.min(shrunk, axis=0) + extra
    if (shape < smallest).any():
        raise Unusable(f"too small: {_by(shape)} mm, the smallest crop takes {_by(smallest)} mm")
    border = np.where(shape < smallest + 2 * border, 0, border)
    room = shape - 2 * border - extra
    return np.array([size for size in shrunk if (size <= room).all()]), border


def _by(numbers: Sequence[int]) -> str:
    return " x ".join(map(str, numbers))


def draw_pairs(shape: Sequence[int], method: str, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Pairs of boxes (2, 6) whose overlap is that of the method, without end.

    Sizes and places of both are drawn anew until they overlap enough. Boxes do not count the `EXTRA` slices, for
    which there is room behind each.
    """
    sizes, overlap = CROPS[method]
    sizes, border = fitting_sizes(shape, sizes)
    while True:
        size = sizes[rng.integers(len(sizes), size=(1024, 2))]  # (N, 2, 3)
        room = np.array(shape) - 2 * border - size - (0, 0, EXTRA)
        start = border + rng.integers(0, room, endpoint=True)
        boxes = np.stack([start, start + size], axis=-1).reshape(-1, 2, 6)
        yield from boxes[iou_of_corners(boxes[:, 0], boxes[:, 1]) > overlap]


def draw_locals(shape: Sequence[int], pair: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Boxes (6, 6) of the local crops: origins in the union of the pair's boxes, grown by 3, cut at the border."""
    low = (pair[:, ::2] - LOCAL_MARGIN).clip(0)
    high = (pair[:, 1::2] + LOCAL_MARGIN).clip(None, shape)
    start = np.empty((0, 3), int)
    while len(start) < LOCALS:
        points = rng.integers(low.min(axis=0), high.max(axis=0), size=(64, 3))
        inside = ((points[:, None] >= low) & (points[:, None] < high)).all(-1).any(-1)
        start = np.concatenate([start, points[inside]])[:LOCALS]
    size = np.array(LOCAL_SIZES)[rng.integers(len(LOCAL_SIZES), size=LOCALS)]
    return np.stack([start, np.minimum(start + size, shape)], axis=-1).reshape(LOCALS, 6)


def reachable(shape: Sequence[int], method: str) -> list[tuple[int, int]]:
    """First and last (excluded) voxel along x, y, z of which crops and local crops can be made."""
    _, border = fitting_sizes(shape, CROPS[method][0])
    low = (border - LOCAL_MARGIN).clip(0)
    high = np.minimum(shape, shape - border + LOCAL_MARGIN + np.max(LOCAL_SIZES, axis=0))
    return [(int(start), int(stop)) for start, stop in zip(low, high)]


@functools.lru_cache(maxsize=256)
def resize_weights(old: int, new: int) -> np.ndarray:
    """Matrix (new, old) float32 that resizes an axis: a Gaussian against aliasing, then linear interpolation.

    The Gaussian's standard deviation is (old / new − 1) / 2 where the axis shrinks; borders are mirrored about the
    outermost voxels' centres. These are scikit-image's choices, with which the published cubes were made.
    """
    if old == 1:
        return np.ones((new, 1), np.float32)
    places = (np.arange(new) + 0.5) * old / new - 0.5
    places = old - 1 - np.abs(old - 1 - np.abs(places))
    first = np.minimum(places.astype(int), old - 2)
    weights = np.zeros((new, old))
    weights[range(new), first] = 1 - (places - first)
    weights[range(new), first + 1] = places - first
    if old > new:
        weights = weights @ gaussian_filter1d(np.eye(old), (old / new - 1) / 2, axis=0, mode="mirror")
    return weights.astype(np.float32)


def resize(crop: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Resize a crop (X, Y, Z) to `size`, float32, without aliasing; see `resize_weights`."""
    across_x, across_y, across_z = (resize_weights(old, new) for old, new in zip(crop.shape, size))
    planes = np.ascontiguousarray(crop.transpose(2, 1, 0), np.float32)
    depth, height, width = planes.shape
    planes = (across_z @ planes.reshape(depth, -1)).reshape(-1, height, width)
    return (across_y @ (planes @ across_x.T)).transpose(2, 1, 0)


def tissue_score(crop: np.ndarray, depth: int) -> float:
    """How much of a crop looks like tissue: for every voxel, 1 where it has tissue, ½ where the next slice does.

    Args:
        crop: (X, Y, Z) in [0, 1], at least one slice longer than `depth`.
        depth: slices that count.
    """
    tissue = crop >= TISSUE
    here, behind = tissue[..., :depth], tissue[..., 1 : depth + 1]
    return np.count_nonzero(here) + 0.5 * np.count_nonzero(behind & ~here)


# One scan ------------------------------------------------------------------------------------------


def generator_of(uid: str, seed: int) -> np.random.Generator:
    """The random numbers of a scan."""
    return np.random.default_rng([seed, int.from_bytes(hashlib.sha256(name_bytes(uid)).digest()[:8], "little")])


def read_scan(path: Path) -> tuple[Volume, tuple[float, float]]:
    """A scan as stored, and the values that become 0 and 1.

    Raises:
        UnreadableImage: as `read_volume`.
        Unusable: when nothing in it differs.
    """
    volume = read_volume(path, dtype=None)
    low, high = unit_range(volume.array)
    least, most = volume.array.min(), volume.array.max()
    if max(least, low) >= min(most, high):
        raise Unusable(f"constant: all voxels are {least:g}" if least == most else f"no value in {low:g} … {high:g}")
    if least < LOWEST_HU and low < CT_BELOW:
        np.maximum(volume.array, LOWEST_HU, out=volume.array)  # padding must not bleed into tissue beside it
    return volume, (low, high)


def make_pairs(scan: Scan, made: Pairs, save: Callable[[Path, Cubes], object]) -> dict:
    """Make a scan's pairs; returns how many, and how many draws the tissue filter rejected."""
    volume, (low, high) = read_scan(scan.path)
    shape = resampled_shape(volume)
    reach = reachable(shape, made.method)
    first = [start for start, _ in reach]
    array = resample(volume, outside=low, box=reach).array
    del volume  # the larger half of the memory
    rng = generator_of(scan.uid, made.seed)
    *plane, depth = made.size

    def cut(box: np.ndarray, size: Sequence[int], extra: int = 0) -> np.ndarray:
        (x0, x1), (y0, y1), (z0, z1) = zip(box[::2] - first, box[1::2] - first)
        return resize(scale(array[x0:x1, y0:y1, z0 : z1 + extra], low, high), size)

    pairs = rejected = 0
    for boxes in draw_pairs(shape, made.method, rng):
        if pairs == made.scale or pairs + rejected == DRAWS * made.scale:
            break
        crops = []
        for box in boxes:
            crop = cut(box, (*plane, depth + EXTRA), EXTRA)
            if tissue_score(crop, depth) > MOST_TISSUE * volume_of(box):
                break
            crops.append(crop[..., :depth])
        if len(crops) < 2:
            rejected += 1
            continue
        if made.method == "pcrl":
            save(scan.file(f"_img_{pairs}.npy"), crops)
        else:
            small = [cut(box, LOCAL_CUBE_SIZE) for box in draw_locals(shape, boxes, rng)]
            save(scan.file(f"_local_{pairs}.npy"), small)
            save(scan.file(f"_global_{pairs}.npy"), crops)
        pairs += 1
    if pairs == 0:
        raise Unusable(f"too much tissue in all of {rejected} drawn pairs")
    return {"pairs": pairs, "rejected": rejected}


def make_nodules(scan: Scan, made: Nodules, save: Callable[[Path, Cubes], object]) -> dict:
    """Make the cubes around a scan's candidates; returns their index rows, and how many lay outside of the scan."""
    volume, (low, high) = read_scan(scan.path)
    spacing, origin = np.array(volume.spacing), np.array(volume.origin)
    shape = np.array(volume.array.shape)
    groups = {label: [one for one in scan.candidates if one.label == label] for label in (0, 1)}
    kept = dict(groups)
    if made.negatives is not None and len(groups[0]) > made.negatives:
        rng = generator_of(scan.uid, made.seed)
        chosen = rng.choice(len(groups[0]), made.negatives, replace=False)
        kept[0] = [groups[0][i] for i in sorted(chosen)]
    rows, outside = [], 0
    for one in sorted([*kept[0], *kept[1]], key=lambda one: one.row):
        place = (np.array(one.position) - origin) / spacing
        if (place < -0.5).any() or (place > shape - 0.5).any():
            outside += 1
            continue
        start = np.array(one.position) - (NODULE_SIDE - 1) / 2  # the cube's first voxel, mm
        first = np.floor((start - origin) / spacing).astype(int).clip(0)
        last = np.ceil((start + NODULE_SIDE - 1 - origin) / spacing).astype(int) + 2
        around = volume.array[tuple(map(slice, first, last))].astype(np.float32)
        part = Volume(around, volume.spacing, tuple(origin + first * spacing))
        cube = on_grid(part, start.tolist(), (NODULE_SIDE,) * 3, outside=low)
        save(scan.file(f"_nodule_{one.row}.npy"), scale(cube, low, high))
        weight = len(groups[one.label]) / len(kept[one.label])
        rows.append([one.row, one.label, *one.position, weight])
    return {"cubes": len(rows), "outside": outside, "rows": rows}


def save_cubes(path: Path, cubes: Cubes) -> str:
    """Write an array as float16; returns its name. It is on the disk then: the record, written last, is not older."""
    write_atomic(path, lambda unfinished: np.save(unfinished, np.ascontiguousarray(cubes, np.float16)))
    return path.name


def remove_others(scan: Scan, made: Pairs | Nodules, written: set[str]) -> None:
    """Remove a scan's cubes that are not those `written` now: training would take what a killed run with other
    options left for this one's."""
    parts = "global|local|img" if isinstance(made, Pairs) else "nodule"
    own = re.compile(rf"(\.(tmp\.\d+\.)?)?{re.escape(scan.uid)}_({parts})_\d+\.npy(\.tmp)?")
    folder = scan.file("").parent
    for name in os.listdir(folder):
        if own.fullmatch(name) and name not in written:
            (folder / name).unlink()


def process(scan: Scan, made: Pairs | Nodules) -> None:
    """Make one scan's cubes, and its record last; a scan that gives none has the reason in it."""
    started = time.perf_counter()
    make = make_pairs if isinstance(made, Pairs) else make_nodules
    # Cubes are written beside the work, since the disk is waited for after each. One thread for sums: workers share
    # the cores, and the sums are the same everywhere.
    with threadpool_limits(1), concurrent.futures.ThreadPoolExecutor(4) as writers:
        saves: list[concurrent.futures.Future] = []
        try:
            result = make(scan, made, lambda path, cubes: saves.append(writers.submit(save_cubes, path, cubes)))
        except (UnreadableImage, Unusable) as error:
            result = {"failed": str(error)}
        written = {one.result() for one in saves}
    remove_others(scan, made, written)
    result["seconds"] = round(time.perf_counter() - started, 2)
    write_text(scan.file(f".{made.kind}.json"), json.dumps({"settings": settings_of(made), **result}))


def settings_of(made: Pairs | Nodules) -> dict:
    """What a record is compared by."""
    return json.loads(json.dumps({"version": VERSION, **asdict(made)}))


def read_record(path: Path) -> dict | None:
    """A scan's record, or None where there is none that can be read."""
    try:
        record = read_json(path)
    except InputError:
        return None
    counts = [record[key] for key in ("pairs", "rejected", "cubes", "outside") if key in record]
    whole = isinstance(record.get("settings"), dict) and isinstance(record.get("failed", ""), str)
    whole = whole and all(type(count) is int and 0 <= count < 2**31 for count in counts)
    whole = whole and isinstance(record.get("seconds", 0), int | float) and isinstance(record.get("rows", []), list)
    if whole and "failed" not in record:
        whole = "pairs" in record or "rows" in record
    return record if whole and all(map(_is_row, record.get("rows", []))) else None


def _is_row(row: object) -> bool:
    """Whether a value is an index row of `make_nodules`: number, class, position and weight."""
    return isinstance(row, list) and len(row) == 6 and all(type(value) in (int, float) for value in row)


def is_finished(scan: Scan, made: Pairs | Nodules) -> bool:
    """The scan's record says that it has cubes, and these are there."""
    record = read_record(scan.file(f".{made.kind}.json"))
    if record is None or "failed" in record or ("rows" if isinstance(made, Nodules) else "pairs") not in record:
        return False
    if isinstance(made, Nodules):
        names = [f"_nodule_{row[0]}.npy" for row in record["rows"]]
    else:
        parts = ("img",) if made.method == "pcrl" else ("global", "local")
        names = [f"_{part}_{i}.npy" for i in range(record["pairs"]) for part in parts]
    return all(scan.file(name).is_file() for name in names)


def write_patients(save: Path, scans: Sequence[Scan]) -> None:
    """Note who is on the scans, where it is told, beside what other calls noted: the cubes have the uids alone."""
    told = read_patients(save) | {scan.uid: scan.patient or scan.uid for scan in scans}
    if any(uid != patient for uid, patient in told.items()):
        save.mkdir(parents=True, exist_ok=True)
        write_csv(save / PATIENTS, [{"file": uid, "patient": patient} for uid, patient in sorted(told.items())])


# All scans -----------------------------------------------------------------------------------------


def find_scans(data: Path, folds: Sequence[int] | None, save: Path) -> list[Scan]:
    """The scans to work on, by fold and uid.

    Raises:
        InputError: for a missing folder or fold, no volumes, or two with one uid.
    """
    if not data.exists():
        raise InputError(f"--data {data}: no such folder")
    folders = {
        int(match[1]): path
        for path in (data.iterdir() if data.is_dir() else ())
        if path.is_dir() and (match := re.fullmatch(r"subset(\d+)", path.name))
    }
    if folds is not None:
        for fold in folds:
            if fold not in folders:
                there = ", ".join(map(str, sorted(folders))) or "no subset folders at all"
                raise InputError(f"--fold {fold}: no folder {data / f'subset{fold}'}; there are {there}")
        folders = {fold: folders[fold] for fold in folds}
    if not folders and save.resolve() == data.resolve():
        # Its subset folders would be taken for LUNA16's when the run is continued, and the volumes not be found.
        raise InputError(f"--save {save}: holds the volumes themselves; choose another folder for the cubes")
    found = {fold: find_volumes(folder) for fold, folder in sorted((folders or {0: data}).items())}
    inside = {fold: f"{folders[fold].name}/" if folders else "" for fold in found}
    patients = Patients(data, [inside[fold] + name for fold, volumes in found.items() for name, _ in volumes])
    scans = []
    for fold, volumes in found.items():
        paths: dict[str, tuple[Path, str | None]] = {}
        for name, path in volumes:
            # An archive may be unpacked into subset0/subset0; the scan is still what the tables call it.
            uid = name.rpartition("/")[2] if folders else name.replace("/", "_")
            if uid in paths:
                raise InputError(f"{path}: its files would have the names of those of {paths[uid][0]}; rename one")
            paths[uid] = path, patients.of(inside[fold] + name)
        scans += [Scan(uid, fold, path, save, patient) for uid, (path, patient) in paths.items()]
    if not scans:
        raise InputError(f"--data {data}: no volumes there (.mhd .mha .nii .nii.gz .nrrd or folders of DICOM slices)")
    return scans


def read_candidates(path: Path) -> dict[str, list[Candidate]]:
    """The candidates of every uid.

    Raises:
        InputError: naming file and line, for a missing file, columns, positions and classes.
    """
    if not path.is_file():
        raise InputError(f"--nodules {path}: no such file")
    found: dict[str, list[Candidate]] = {}
    with unusable(f"--nodules {path}", "not a text file, so not a table of candidates"):
        lines = csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""))
        columns = {name: number for number, name in enumerate(next(lines, []))}
        for name in TABLE_COLUMNS:
            if name not in columns:
                raise InputError(f"{path}, line 1: no column {name!r}; is this LUNA16's table of candidates?")
        uid, *position, label = (columns[name] for name in TABLE_COLUMNS)
        for row, line in enumerate(line for line in lines if line):
            where = f"{path}, line {lines.line_num}"
            with unusable(where, "not a uid, three coordinates and class 0 or 1"):
                place = tuple(float(line[column]) for column in position)
                one = Candidate(row, ("0", "1").index(line[label].strip()), place)
                scan = line[uid]
            if not np.isfinite(place).all():
                raise InputError(f"{where}: coordinates must be numbers of mm")
            found.setdefault(scan, []).append(one)
    return found


def refuse_other_settings(save: Path, made: Pairs | Nodules) -> None:
    """Raise InputError where `save` has scans made with other options: a data set of both would be neither."""
    wanted = settings_of(made)
    for path in sorted(save.glob(f"subset*/*.{made.kind}.json")):
        record = read_record(path)
        if record and "failed" not in record and record["settings"] != wanted:
            old = record["settings"]
            key = next(key for key in {**old, **wanted} if old.get(key) != wanted.get(key))
            raise InputError(
                f"{path}: made with {key} {old.get(key)}, not {wanted.get(key)}; choose another --save or remove it"
            )


def process_all(scans: Sequence[Scan], made: Pairs | Nodules, workers: int, bar: tqdm) -> None:
    """`process` every scan. After SIGTERM or SIGINT, scans in progress are finished, then the run ends.

    Raises:
        InputError: when a worker dies.
        SystemExit: after a signal.
    """
    with Stop() as stop:
        if workers == 0 or len(scans) < 2:
            for scan in scans:
                if stop.signal is None:
                    process(scan, made)
                    bar.update()
        else:
            _process_parallel(scans, made, min(workers, len(scans)), bar, stop)
        if stop.signal is not None:
            raise SystemExit(128 + stop.signal)


def _process_parallel(scans: Sequence[Scan], made: Pairs | Nodules, workers: int, bar: tqdm, stop: Stop) -> None:
    waiting = list(reversed(scans))
    with pool(workers, use_one_thread) as executor:
        running: set[concurrent.futures.Future] = set()
        while running or (waiting and stop.signal is None):
            # No more is handed out than is worked on, so that after a signal little is left to finish.
            while waiting and len(running) < workers and stop.signal is None:
                running.add(executor.submit(process, waiting.pop(), made))
            done, running = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                future.result()
                bar.update()


def summarise(save: Path, made: Pairs | Nodules) -> dict:
    """Collect all records in `save` into `luna.json`, or into `nodules.json` and `nodules.csv`."""
    scans, index = {}, []
    for path in sorted(save.glob(f"subset*/*.{made.kind}.json"), key=_fold_and_name):
        record = read_record(path)
        if record is None:
            continue
        fold, uid = _fold_and_name(path)[0], path.name.removesuffix(f".{made.kind}.json")
        for row, label, *place, weight in record.pop("rows", ()):
            index.append((uid, row, label, fold, *place, weight, f"subset{fold}/{uid}_nodule_{row}.npy"))
        del record["settings"]
        scans[f"subset{fold}/{uid}"] = record
    counted = ("pairs", "rejected") if isinstance(made, Pairs) else ("cubes", "outside")
    totals = {key: round(sum(one.get(key, 0) for one in scans.values()), 2) for key in (*counted, "seconds")}
    totals = {"scans": len(scans), "failed": sum("failed" in one for one in scans.values()), **totals}
    summary = {"settings": settings_of(made), "totals": totals, "scans": scans}
    name = "luna" if isinstance(made, Pairs) else "nodules"
    if isinstance(made, Nodules):
        lines = io.StringIO()
        csv.writer(lines, lineterminator="\n").writerows([map(csv_cell, row) for row in (INDEX_COLUMNS, *index)])
        write_text(save / "nodules.csv", lines.getvalue())
    write_text(save / f"{name}.json", json.dumps(summary, indent=1) + "\n")
    return summary


def _fold_and_name(path: Path) -> tuple[int, str]:
    return int(path.parent.name.removeprefix("subset")), path.name


# The script ----------------------------------------------------------------------------------------


def count_or_all(text: str) -> int | str:
    """Parse a whole number of at least 0, or the word `all`."""
    return text if text == "all" else options.non_negative_int(text)


def get_parser() -> Parser:
    """The options of this script."""
    parser = Parser(__doc__)
    group = parser.add_argument_group("data")
    group.add_argument("--data", metavar="DIR", required=True, help="LUNA16's folder, or any folder of volumes")
    group.add_argument("--save", metavar="DIR", required=True, help="where the cubes go")
    group.add_argument(
        "--fold", type=options.non_negative_int, nargs="+", metavar="K", help="subsets to work on; without it, all"
    )
    group = parser.add_argument_group("pairs of cubes")
    group.add_argument("--method", choices=tuple(CROPS), default="pcrlv2", help="whose crops")
    for name, axis, default in zip(("rows", "cols", "deps"), "xyz", CUBE_SIZE):
        group.add_argument(
            f"--input_{name}",
            f"--input-{name}",
            type=options.positive_int,
            default=default,
            help=f"voxels of a crop along {axis}",
        )
    group.add_argument("--scale", type=options.positive_int, default=16, help="pairs per scan")  # published: 16
    group = parser.add_argument_group("nodules")
    group.add_argument(
        "--nodules", metavar="FILE", help="candidates.csv or candidates_V2.csv: cut cubes around candidates instead"
    )
    group.add_argument(
        "--negatives",
        type=count_or_all,
        default=50,  # candidates_V2.csv has about 850 in each scan, of 0.2 MB each
        metavar="N",
        help="candidates that are no nodules kept per scan, drawn by --seed; a number or all",
    )
    group = parser.add_argument_group("running")
    group.add_argument("--seed", type=options.non_negative_int, default=0, help="seed of everything drawn")
    group.add_argument(
        "--workers", "--num-workers", "--num_workers", type=options.non_negative_int, default=4, help="processes"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Make the cubes and say what was made."""
    args = get_parser().parse_args(argv)
    save = Path(args.save)
    scans = find_scans(Path(args.data), args.fold, save)
    if args.nodules:
        table = read_candidates(Path(args.nodules))
        negatives = None if args.negatives == "all" else args.negatives
        made = Nodules(file_digest(args.nodules)[:16], negatives, args.seed)
        listed = len(scans)
        scans = [replace(scan, candidates=tuple(table[scan.uid])) for scan in scans if scan.uid in table]
        if not scans:
            raise InputError(f"--nodules {args.nodules}: none of the {listed} scans in --data is in this table")
        print(f"{len(scans)} of {listed} scans have candidates")
    else:
        made = Pairs(args.method, (args.input_rows, args.input_cols, args.input_deps), args.scale, args.seed)
    refuse_other_settings(save, made)
    remove_abandoned(save)
    write_patients(save, scans)
    todo = [scan for scan in scans if not is_finished(scan, made)]
    for fold in {scan.fold for scan in todo}:
        (save / f"subset{fold}").mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(scans), initial=len(scans) - len(todo), desc="luna", unit="scan", disable=None) as bar:
        try:
            process_all(todo, made, args.workers, bar)
        finally:
            summary = summarise(save, made)
    totals = summary["totals"]
    failed = {name: one["failed"] for name, one in summary["scans"].items() if "failed" in one}
    what = f"{totals['pairs']} pairs" if isinstance(made, Pairs) else f"{totals['cubes']} cubes"
    print(f"{save}: {what} from {totals['scans'] - totals['failed']} scans, {totals['failed']} scans failed")
    for name, reason in list(failed.items())[:20]:
        print(one_line(f"  {name}: {reason}"))
    if len(failed) > 20:
        print(f"  and {len(failed) - 20} more, in the JSON file there")
    if len(failed) == totals["scans"]:
        raise InputError(f"--data {args.data}: no scan gave cubes; {': '.join(next(iter(failed.items())))}")


def cli() -> None:
    """Console command."""
    run_script(main, less="fewer --workers")


if __name__ == "__main__":
    cli()
