"""Cut LiTS volumes into axial slices, PNG images and masks, for 2D pre-training and segmentation.

    python preprocess/slices.py --data LITS --output SLICES --workers 4
    python train_magical.py --data SLICES --data_set lits --output OUT --gpus 0 --amp
    python finetune_segmentation.py --data SLICES --dataset lits --init OUT/encoder.pt --arch resnet50 --output LIVER

SLICES has `images/volume-N/0000.png`, the window of Hounsfield units as grey levels, and `masks/volume-N/0000.png` with
0, 1 (liver) and 2 (tumour), slices from the feet to the head. A volume is a patient: its slices are of one split.

A volume that is finished is skipped when the command runs again; one that was interrupted is done anew.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from medssl.datasets import lits
from medssl.datasets.masked_volumes import VolumeCase, check_headers
from medssl.engine import options
from medssl.engine.options import Parser
from medssl.errors import InputError, UnreadableImage, run_script
from medssl.files import existing_folder, write_folder, write_text
from medssl.markup import one_line
from medssl.processes import pool
from medssl.reading.intensities import scale
from medssl.reading.masks import read_labels
from medssl.reading.volumes import read_volume

PARTS = ("images", "masks")


def save_slices(voxels: np.ndarray, folder: Path) -> None:
    """Write axial slices (X, Y, Z) uint8 as PNG, from the feet to the head."""
    for z in range(voxels.shape[2]):
        Image.fromarray(np.ascontiguousarray(voxels[:, :, z].T)).save(folder / f"{z:04d}.png", compress_level=1)


def write_slices(case: VolumeCase, output: Path, window: tuple[float, float]) -> tuple[int, str]:
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
        lits.LABELS.encode(labels)  # for what it refuses
    except UnreadableImage as error:
        return 0, str(error)
    grey = np.rint(scale(scan.array, *window) * 255).astype(np.uint8)
    for folder, voxels in zip(finished, (grey, labels)):
        write_folder(folder, partial(save_slices, voxels))
    return grey.shape[2], ""


def get_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--data", metavar="DIR", required=True, help="folder with volume-N.nii and segmentation-N.nii")
    parser.add_argument("--output", "--save", metavar="DIR", required=True, help="where the slices go")
    parser.add_argument(
        "--window", type=options.finite, nargs=2, default=list(lits.WINDOW), metavar=("LOW", "HIGH"),
        help="Hounsfield units that become black and white",
    )  # fmt: skip
    parser.add_argument("--workers", type=options.positive_int, default=1, help="processes")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    if not args.window[0] < args.window[1]:
        raise InputError(f"--window {args.window[0]:g} {args.window[1]:g}: the first number must be below the second")
    root, output = existing_folder(args.data), Path(args.output)
    cases = lits.find_volume_cases(root)
    check_headers(cases)
    output.mkdir(parents=True, exist_ok=True)
    note = output / "window.txt"
    window = "{:g} {:g}".format(*args.window)
    if note.exists() and note.read_text().strip() != window:
        raise InputError(f"{note}: slices there have the window {note.read_text().strip()}; choose another --output")
    write_text(note, window + "\n")
    work = partial(write_slices, output=output, window=tuple(args.window))
    failed = 0
    with pool(args.workers) as executor:
        for case, (count, reason) in zip(cases, executor.map(work, cases)):
            failed += bool(reason)
            print(one_line(f"{case.id}: {reason or f'{count} slices'}"), flush=True)
    if failed:
        raise InputError(f"{failed} of {len(cases)} volumes could not be read; the others are in {output}")


def cli() -> None:
    run_script(main, less="fewer --workers")


if __name__ == "__main__":
    cli()
