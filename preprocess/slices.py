"""Cut LiTS volumes into axial slices, PNG images and masks, for 2D pre-training and segmentation.

    python preprocess/slices.py --data LITS --output SLICES --workers 4
    python train_magical.py --data SLICES --data_set lits --output OUT --gpus 0 --amp
    python finetune_segmentation.py --data SLICES --dataset lits --init OUT/encoder.pt --arch resnet50 --output LIVER

SLICES has `images/volume-N/0000.png`, the window of Hounsfield units as grey levels, and `masks/volume-N/0000.png` with
0, 1 (liver) and 2 (tumour), slices from the feet to the head. A volume is a patient: its slices are of one split.

A volume that is finished is skipped when the command runs again; one that was interrupted is done anew.
"""

import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from medssl.datasets.registry import UnreadableImage
from medssl.datasets.segmentation3d import LITS, READ_AS, Case, check_headers, find_lits
from medssl.datasets.volumes import read_labels, read_volume, scale
from medssl.engine import options
from medssl.engine.options import InputError, Parser, run_script

PARTS = ("images", "masks")


def write_slices(case: Case, output: Path, window: tuple[float, float]) -> tuple[int, str]:
    """Write the slices of a case, so that its folders are complete or not there.

    Returns:
        how many there are, and what is wrong with a case that cannot be read ("" for nothing).
    """
    finished = [output / part / case.id for part in PARTS]
    if all(folder.is_dir() for folder in finished):
        return len(list(finished[0].iterdir())), ""
    try:
        scan = read_volume(case.images[0])
        labels = read_labels(case.mask, scan)
        LITS.encode(labels)  # for what it refuses
    except UnreadableImage as error:
        return 0, str(error)
    grey = np.rint(scale(scan.array, *window) * 255).astype(np.uint8)
    for folder, voxels in zip(finished, (grey, labels)):
        unfinished = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        for z in range(voxels.shape[2]):
            Image.fromarray(np.ascontiguousarray(voxels[:, :, z].T)).save(unfinished / f"{z:04d}.png", compress_level=1)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(unfinished, folder)
    return grey.shape[2], ""


def get_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--data", metavar="DIR", required=True, help="folder with volume-N.nii and segmentation-N.nii")
    parser.add_argument("--output", "--save", metavar="DIR", required=True, help="where the slices go")
    parser.add_argument(
        "--window", type=options.finite, nargs=2, default=list(READ_AS["lits"]["window"]), metavar=("LOW", "HIGH"),
        help="Hounsfield units that become black and white",
    )  # fmt: skip
    parser.add_argument("--workers", type=options.positive_int, default=1, help="processes")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    if not args.window[0] < args.window[1]:
        raise InputError(f"--window {args.window[0]:g} {args.window[1]:g}: the first number must be below the second")
    root, output = Path(args.data), Path(args.output)
    if not root.is_dir():
        raise InputError(f"--data {root}: not a folder")
    cases = find_lits(root)
    check_headers(cases)
    output.mkdir(parents=True, exist_ok=True)
    note = output / "window.txt"
    window = "{:g} {:g}".format(*args.window)
    if note.exists() and note.read_text().strip() != window:
        raise InputError(f"{note}: slices there have the window {note.read_text().strip()}; choose another --output")
    note.write_text(window + "\n")
    work = partial(write_slices, output=output, window=tuple(args.window))
    failed = 0
    with ProcessPoolExecutor(args.workers) as pool:
        for case, (count, reason) in zip(cases, pool.map(work, cases)):
            failed += bool(reason)
            print(f"{case.id}: {reason or f'{count} slices'}", flush=True)
    if failed:
        raise InputError(f"{failed} of {len(cases)} volumes could not be read; the others are in {output}")


def cli() -> None:
    run_script(main)


if __name__ == "__main__":
    cli()
