"""Write generated chest CTs as a LUNA16-like folder, to try the whole road from `.mhd` files without a download.

    python preprocess/make_phantom_ct.py --save phantom_luna --count 10
    python preprocess/make_phantom_ct.py --save phantom_luna --count 10 --shape 256 256 160    # quicker, coarser

The folder has `subset0` to `subset9` with `<seriesuid>.mhd` and `.raw`, `candidates.csv` and `annotations.csv`.
The default shape takes about 115 MB and five seconds per CT.
"""

from collections.abc import Sequence
from pathlib import Path

from medssl.datasets.phantoms.ct import write_luna
from medssl.engine import options
from medssl.engine.options import Parser
from medssl.errors import InputError, run_script


def get_parser() -> Parser:
    """The options of this script."""
    parser = Parser(__doc__)
    parser.add_argument("--save", "--output", metavar="DIR", required=True, help="where the folder goes")
    parser.add_argument("--count", type=options.positive_int, default=10, help="number of CTs")
    parser.add_argument(
        "--shape",
        type=options.positive_int,
        nargs=3,
        default=[512, 512, 220],
        metavar=("X", "Y", "Z"),
        help="voxels to the left, to the back and to the head; a CT shows about 360 x 360 x 290 mm",
    )
    parser.add_argument("--seed", type=options.non_negative_int, default=0, help="number of the series")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Write the CTs and say where they are."""
    args = get_parser().parse_args(argv)
    if min(args.shape) < 32:
        raise InputError(f"--shape {' '.join(map(str, args.shape))}: at least 32 voxels per axis are needed")
    uids = write_luna(Path(args.save), args.count, tuple(args.shape), args.seed)
    print(f"{args.save}: {len(uids)} CTs of {' x '.join(map(str, args.shape))} voxels, with candidates.csv")


def cli() -> None:
    """Console command."""
    run_script(main, less="a machine with more")


if __name__ == "__main__":
    cli()
