"""Seconds a pair and peak memory of preprocessing a CT into PCRLv2's cubes, from `.mhd` to `.npy` files: loops as the
published tools have them, against ours.

  python benchmarks/luna.py                                    (generated CTs of 512 x 512 x 300, and one of 600 slices)
  python benchmarks/luna.py --side 160 --slices 110 --memory-slices 0 --scale 2 --repeats 1 --output /tmp/luna.json

All run on one core, in one process, on the same files, in turn. The published loops resample the whole volume, scale
it in float64, copy it twice for every draw, resize both crops with a Gaussian filter and a spline of order 1 in
float64, score both voxel by voxel in Python, and write float64. They are also measured without the copies. Peak memory
is that of a process of its own which makes two pairs of one CT. The CTs have the size and the tissue of chest CTs: a
body with lungs, heart, spine, ribs, vessels, and noise.
"""

import argparse
import functools
import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy import ndimage
from threadpoolctl import threadpool_limits

from medssl import errors
from medssl.benchmarks.machine import STATUS, add_measuring, alone, interleave, peak_mb, report, summarise
from medssl.engine import options
from medssl.preprocess import luna
from medssl.reading.simpleitk import use_one_thread

PLAIN, LEAN, OURS = "published loops", "published loops, no copies", "ours"
SPACING_X, SPACING_Z = 0.7, 1.25  # mm, common in LUNA16


# The files -----------------------------------------------------------------------------------------


def write_ct(path: Path, side: int, slices: int, spacing_z: float, seed: int = 0) -> None:
    """Write a chest CT of ellipsoids as `.mhd` and `.raw`, int16, HU, `side` pixels of 0.7 mm · 512 / side."""
    rng = np.random.default_rng(seed)
    axis = np.linspace(-1, 1, side, dtype=np.float32)
    x, y = axis[None, :], axis[:, None]
    vessels = rng.uniform((-0.6, -0.4, 0.02), (0.6, 0.4, 0.05), (40, 3))  # x, y, radius
    tilts = rng.uniform(-0.3, 0.3, (40, 2))

    def disc(cx: float, cy: float, rx: float, ry: float) -> np.ndarray:
        return ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < 1

    def plane_at(z: float) -> np.ndarray:
        plane = np.full((side, side), -1000, np.float32)
        plane[disc(0, 0, 0.92, 0.7)] = -90  # fat
        plane[disc(0, 0, 0.86, 0.64)] = 40
        lung = np.sqrt(max(0.0, 1 - (z / 1.15) ** 2))
        if lung:
            lungs = disc(-0.4, 0, 0.36 * lung, 0.54 * lung) | disc(0.4, 0, 0.36 * lung, 0.54 * lung)
            ring = disc(0, 0, 0.82, 0.6) & ~disc(0, 0, 0.78, 0.56) & (np.sin(40 * z + 4 * x) > 0.4)
            plane[ring] = 500
            plane[lungs] = -850
            for (cx, cy, radius), (tx, ty) in zip(vessels, tilts):
                plane[disc(cx + tx * z, cy + ty * z, radius, radius) & lungs] = 30
        heart = np.sqrt(max(0.0, 1 - ((z + 0.3) / 0.5) ** 2))
        if heart:
            plane[disc(0.1, -0.15, 0.3 * heart, 0.28 * heart)] = 60
        plane[disc(0, 0.45, 0.09, 0.09)] = 350
        return plane + rng.normal(0, 25, plane.shape)

    step = SPACING_X * 512 / side
    header = {"ObjectType": "Image", "NDims": 3, "DimSize": f"{side} {side} {slices}", "ElementType": "MET_SHORT"}
    header |= {"ElementSpacing": f"{step} {step} {spacing_z}", "ElementDataFile": f"{path.stem}.raw"}
    path.write_text("".join(f"{key} = {value}\n" for key, value in header.items()))
    with open(path.with_suffix(".raw"), "wb") as file:
        for z in np.linspace(-1, 1, slices):
            file.write(plane_at(z).astype("<i2").tobytes())


# The published loops -------------------------------------------------------------------------------


def plain_resize(crop: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """scikit-image's resize of order 1 with anti-aliasing, on the functions of SciPy that it calls."""
    factors = np.divide(crop.shape, size)
    smooth = ndimage.gaussian_filter(crop, np.maximum(0, (factors - 1) / 2), mode="mirror")
    return ndimage.zoom(smooth, 1 / factors, order=1, mode="mirror", grid_mode=True)


def plain_score(crop: np.ndarray) -> float:
    """The tissue filter, voxel by voxel; like the published one it also collects the values, which nothing uses."""
    rows, columns, depth = crop.shape[0], crop.shape[1], crop.shape[2] - luna.EXTRA
    values = np.zeros((rows, columns, depth))
    found = np.zeros((rows, columns, depth))
    for d in range(depth):
        for i in range(rows):
            for j in range(columns):
                for k in range(luna.EXTRA):
                    if crop[i, j, d + k] >= luna.TISSUE:
                        values[i, j, d] = crop[i, j, d + k]
                        found[i, j, d] = k
                        break
                    if k == luna.EXTRA - 1:
                        found[i, j, d] = k
    return float((1 - found.astype(np.float32) / (luna.EXTRA - 1)).sum())


def plain_iou(one: Sequence[int], two: Sequence[int]) -> float:
    """IoU of two boxes x0, x1, y0, y1, z0, z1."""
    both = 1
    for axis in (0, 2, 4):
        both *= max(0, min(one[axis + 1], two[axis + 1]) - max(one[axis], two[axis]))
    volumes = [(box[1] - box[0]) * (box[3] - box[2]) * (box[5] - box[4]) for box in (one, two)]
    return both / (sum(volumes) - both)


def plain_scan(path: Path, save: Path, pairs: int, copies: bool = True) -> None:
    """Cubes of one CT, with the recipe of `luna.make_pairs` done plainly."""
    image = sitk.ReadImage(str(path))
    size = [int(n * step + 0.5) for n, step in zip(image.GetSize(), image.GetSpacing())]
    image = sitk.Resample(
        image, size, sitk.Transform(), sitk.sitkLinear, image.GetOrigin(), (1, 1, 1), image.GetDirection(), 0
    )
    array = sitk.GetArrayFromImage(image).transpose(2, 1, 0)
    array[array < -1000] = -1000
    array[array > 1000] = 1000
    array = (array + 1000.0) / 2000.0
    sizes, overlap = luna.CROPS["pcrlv2"]
    sizes, border = luna.fitting_sizes(array.shape, sizes)
    made = 0
    while made < pairs:
        one, two = (array.copy(), array.copy()) if copies else (array, array)
        while True:
            boxes = [plain_box(array.shape, sizes, border) for _ in range(2)]
            if plain_iou(*boxes) > overlap:
                break
        crops = []
        for (x0, x1, y0, y1, z0, z1), source in zip(boxes, (one, two)):
            crops.append(plain_resize(source[x0:x1, y0:y1, z0 : z1 + luna.EXTRA], (64, 64, 32 + luna.EXTRA)))
        scores = [plain_score(crop) for crop in crops]
        if any(score > luna.MOST_TISSUE * luna.volume_of(np.array(box)) for score, box in zip(scores, boxes)):
            continue
        small = []
        for x0, x1, y0, y1, z0, z1 in luna.draw_locals(array.shape, np.array(boxes), np.random.default_rng(made)):
            small.append(plain_resize(one[x0:x1, y0:y1, z0:z1], luna.LOCAL_CUBE_SIZE))
        np.save(save / f"{path.stem}_global_{made}.npy", np.stack(crops)[..., :32])
        np.save(save / f"{path.stem}_local_{made}.npy", np.stack(small))
        made += 1


def plain_box(shape: Sequence[int], sizes: np.ndarray, border: np.ndarray) -> list[int]:
    """A crop drawn with Python's random numbers: x0, x1, y0, y1, z0, z1."""
    box = []
    for axis, size in enumerate(random.choice(sizes)):
        extra = luna.EXTRA if axis == 2 else 0
        start = random.randint(border[axis], shape[axis] - border[axis] - size - extra)
        box += [start, start + size]
    return box


# Measuring -----------------------------------------------------------------------------------------


def make(variant: str, path: Path, save: Path, pairs: int) -> None:
    """Make the pairs of one CT, on one core."""
    use_one_thread()
    (save / "subset0").mkdir(parents=True, exist_ok=True)
    with threadpool_limits(1):
        if variant == OURS:
            luna.process(luna.Scan(path.stem, 0, path, save), luna.Pairs(scale=pairs))
        else:
            random.seed(path.stem)
            plain_scan(path, save / "subset0", pairs, copies=variant == PLAIN)


def speed(variant: str, paths: Sequence[Path], save: Path, pairs: int) -> float:
    """Pairs per second over all CTs."""
    started = time.perf_counter()
    for path in paths:
        make(variant, path, save, pairs)
    return pairs * len(paths) / (time.perf_counter() - started)


def peak_memory(variant: str, path: Path, save: Path) -> float:
    """Peak memory in MB of this process, which makes two pairs of one CT and does nothing else."""
    make(variant, path, save, 2)
    return peak_mb()


def get_parser() -> options.Parser:
    """The options of this script."""
    parser = options.Parser(__doc__)
    group = parser.add_argument_group("generated CTs and their pairs")
    group.add_argument("--cts", type=options.positive_int, default=2, help="generated CTs")
    group.add_argument("--side", type=options.positive_int, default=512, help="their pixels per row and column")
    group.add_argument("--slices", type=options.positive_int, default=300, help="their slices, 1.25 mm apart")
    group.add_argument("--scale", type=options.positive_int, default=16, help="pairs per CT")
    add_measuring(parser, "luna.json").add_argument(
        "--memory-slices",
        type=options.non_negative_int,
        default=600,
        help="slices, 1 mm apart, of the CT on which memory is measured; 0: not measured",
    )
    parser.set_defaults(repeats=3)  # the published loops take a minute each
    return parser


def main(argv: Sequence[str] | None = None) -> dict:
    """Measure, print the table, write and return the report."""
    args = get_parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        return measure(args, Path(name))


def measure(args: argparse.Namespace, folder: Path) -> dict:
    """Everything that `main` does, with temporary files in `folder`."""
    variants = (PLAIN, LEAN, OURS)
    peaks: dict[str, float] = {}
    if args.memory_slices and STATUS.exists():
        write_ct(folder / "long.mhd", args.side, args.memory_slices, 1.0)
        peaks = {variant: alone(peak_memory, variant, folder / "long.mhd", folder) for variant in (PLAIN, OURS)}
        (folder / "long.raw").unlink()
    paths = [folder / f"ct{number}.mhd" for number in range(args.cts)]
    for number, path in enumerate(paths):
        write_ct(path, args.side, args.slices, SPACING_Z, number)
    calls = {variant: functools.partial(speed, variant, paths, folder / "cubes", args.scale) for variant in variants}
    results = {}
    for variant, row in summarise(interleave(calls, args.repeats), PLAIN).items():
        results[variant] = {
            "seconds_per_pair": 1 / row["images_per_s"],
            "lowest": 1 / row["highest"],
            "highest": 1 / row["lowest"],
            "ratio": row["ratio"],
        }
        if variant in peaks:
            results[variant]["peak_mb"] = peaks[variant]
    made = json.loads((folder / "cubes" / "subset0" / "ct0.pairs.json").read_text())
    first = {key: made[key] for key in ("pairs", "rejected", "seconds")}
    return report(args.output, "luna", vars(args), results, ours_on_first_ct=first)


def cli() -> None:
    """Command line."""
    errors.run_script(main)


if __name__ == "__main__":
    cli()
