"""Options of views, in groups that scripts add one by one."""

import argparse
import math
from collections.abc import Sequence

from medssl.datasets.base import ImageDataset
from medssl.engine.options import (
    Parser,
    bounded_float,
    check_range,
    fraction,
    non_negative,
    non_negative_int,
    positive_int,
)
from medssl.errors import InputError
from medssl.views.ops import hidden_count
from medssl.views.ops3d import CUBE_SIZE, Shape, Size

MIRRORS = ("none", "x", "y", "z", "xy", "xz", "yz", "xyz")  # axes along which volumes are mirrored, by `--mirror`
AXES_HELP = "x left–right, y front–back, z foot–head"


def add_crops(group: argparse._ArgumentGroup) -> None:
    """Size and place of large views."""
    group.add_argument("--image-size", type=positive_int, default=224, help="side of the views, pixels")
    group.add_argument(
        "--crop-scale", "--crop", type=bounded_float(1e-3, 1), default=0.2, help="least share of the image in a crop"
    )


def add_rotation(group: argparse._ArgumentGroup) -> None:
    """Rotation of large views."""
    group.add_argument("--rotation", type=non_negative, default=10.0, help="largest rotation, degrees")


def add_jitter(group: argparse._ArgumentGroup) -> None:
    """Strength of the colour jitter, by default that of the chest X-ray methods."""
    group.add_argument(
        "--jitter",
        type=non_negative,
        nargs=4,
        default=[0.4, 0.4, 0.4, 0.4],
        metavar=("B", "C", "S", "H"),
        help="strength of the jitter of brightness, contrast, saturation and hue",
    )


def add_blur(group: argparse._ArgumentGroup, chance: float = 0.5) -> None:
    """How often and how much views are blurred."""
    group.add_argument("--blur", type=fraction, default=chance, help="chance that a view is blurred")
    group.add_argument(
        "--blur-sigma",
        type=non_negative,
        nargs=2,
        default=[0.1, 2.0],
        metavar=("LOW", "HIGH"),
        help="range of the blur's standard deviation, pixels",
    )


def add_cutout(group: argparse._ArgumentGroup) -> None:
    """Holes in large views."""
    group.add_argument(
        "--cutout", type=non_negative_int, default=32, help="side of the cutout holes for views of 224 pixels; 0: none"
    )


def add_cubes(
    group: argparse._ArgumentGroup, name: str = "--cube-size", size: Shape = CUBE_SIZE, what: str = "cubes"
) -> None:
    """Size of cubes."""
    axes = {"nargs": 3, "metavar": ("X", "Y", "Z"), "default": list(size)}
    group.add_argument(name, type=positive_int, **axes, help=f"sides of the {what}, voxels")


def add_cutting(group: argparse._ArgumentGroup) -> None:
    """Size of the cubes that are cut out of volumes."""
    group.add_argument(
        "--crop-mm", type=bounded_float(1e-3, math.inf), nargs="+", metavar="MM",
        help="sides X Y Z in mm of the cubes that are cut out of volumes, at most the volume itself; of several sizes, "
        "those of a pair that overlaps enough. By default the published sizes, which are for chest CTs, in proportion "
        "where a volume is smaller",
    )  # fmt: skip


def check_cutting(args: argparse.Namespace, data: ImageDataset) -> None:
    """Raise InputError for sizes that are not three numbers each, and of data whose cubes are cut already."""
    if args.crop_mm and len(args.crop_mm) % 3:
        raise InputError(f"--crop-mm: {len(args.crop_mm)} numbers; each size has three, X Y Z")
    if args.crop_mm and data.prepared:
        raise InputError("--crop-mm: these cubes were cut when they were prepared; leave it out")


def crops_of(args: argparse.Namespace) -> list[Size] | None:
    """The sizes that `--crop-mm` names."""
    given = args.crop_mm or []
    return [tuple(given[i : i + 3]) for i in range(0, len(given), 3)] or None


def add_mirror(group: argparse._ArgumentGroup) -> None:
    """Mirroring of cubes."""
    group.add_argument(
        "--mirror", choices=MIRRORS, default="xyz", help=f"axes along which cubes are mirrored: {AXES_HELP}"
    )


def flips_of(mirror: str) -> tuple[int, ...]:
    """Numbers of the axes that a value of `--mirror` names."""
    return () if mirror == "none" else tuple("xyz".index(axis) for axis in mirror)


def large_views(args: argparse.Namespace) -> dict:
    """What the options of views that a script has ask of `MultiCropViews`."""
    given = vars(args)
    asked = {"size": args.image_size}
    if "crop_scale" in given:
        asked["scale"] = (args.crop_scale, 1.0)
    if "rotation" in given:
        asked["degrees"] = args.rotation
    if "blur" in given:
        check_range("--blur-sigma", *args.blur_sigma)
    if "cutout" in given:
        asked["hole"] = round(args.cutout * args.image_size / 224)
    return asked | {name: given[name] for name in ("jitter", "blur", "blur_sigma") if name in given}


def add_pair_views(parser: Parser) -> None:
    """The options of `PairViews`."""
    group = parser.add_argument_group("views")
    add_crops(group)
    add_jitter(group)
    add_blur(group)


def check_hidden(grid: Sequence[int], ratio: float) -> None:
    """Raise InputError for a `--mask-ratio` that hides all patches of a grid or none."""
    count, hidden = math.prod(grid), hidden_count(grid, ratio)
    if not 0 < hidden < count:
        raise InputError(
            f"--mask-ratio {ratio:g}: hides {hidden} of {count} patches; give a share that leaves both kinds"
        )
