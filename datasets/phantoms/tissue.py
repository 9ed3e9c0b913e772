"""Generated tiles of stained tissue: glands in a fibrous ground, with a mask for every gland, benign or malignant.

What tells the classes apart is small: the nuclei of a benign gland stand in one row along its border, those of a
malignant one lie scattered over its wall. Number and mean size of nuclei, shape and place of glands, the fibres, and
how strongly either stain took are drawn alike for both. They differ from tile to tile as tissues do, so that a tile can
be told from others where the views have lost its colours. Colours follow the law of Beer and Lambert, with the
absorbance of haematoxylin and eosin (Ruifrok and Johnston, 2001).
"""

import math
import sys
from collections.abc import Sequence
from functools import cache, partial

import numpy as np
import torch
from PIL import Image, ImageDraw
from scipy import ndimage
from torch import Tensor

from medssl.datasets.base import ImageDataset, Info, Request
from medssl.datasets.masked_images import InstanceImages
from medssl.datasets.phantoms.radiograph import refuse_files
from medssl.datasets.phantoms.store import Arrays, Generated, seed_of
from medssl.errors import InputError

SPLITS = {"train": 1024, "val": 64, "test": 128}
SPLIT_SEEDS = {"train": 301, "val": 302, "test": 303}
DEFAULT_SIZE = 128
MIN_SIZE = 64
FINER = 2  # tiles are drawn so many times larger, then averaged
CORNERS = 48  # of the polygon that outlines a gland
HAEMATOXYLIN = np.array([0.65, 0.70, 0.29])
EOSIN = np.array([0.07, 0.99, 0.11])
GLANDS = (2, 5)  # in a tile, at least and at most
RADIUS = (0.1, 0.19)  # mean of a tile's glands; each differs by a seventh at most
HOLLOW = (0.3, 0.6)  # radius of the lumen, of the gland's
GROUND_NUCLEI = (8, 100)
COARSER = 2.0  # the coarsest fibres, and the finest, against the middle
CLASSES = ("benign", "malignant")


class GeneratedTissue(InstanceImages):
    """Generated tiles.

    Args:
        generated: "images" (N, S, S, 3) uint8, "glands" (N, S, S) uint8, 0 or the gland's number. side: S.
        labels: (N,) int64.
    """

    def __init__(self, info: Info, split: str, generated: Generated, side: int, labels: np.ndarray) -> None:
        ids = [f"{split}/{i:05d}" for i in range(generated.count)]
        read = partial(generated.row, "images")
        super().__init__(info, read, ids, torch.from_numpy(labels), texture_size=side)
        self.generated = generated

    def load(self, i: int) -> dict[str, Tensor]:
        self.generated.prepare()
        return super().load(i)

    def instances(self, i: int) -> np.ndarray:
        return self.generated.row("glands", self.positions[i])


def open_splits(request: Request, splits: Sequence[str]) -> dict[str, ImageDataset]:
    """Open splits of `tissue2d`: colour tiles of side `request.texture_size` (128 where that is 0).

    Raises:
        InputError: for an unknown split, a list file, a data folder, or a texture below 64 pixels.
    """
    refuse_files(request)
    size = request.texture_size or DEFAULT_SIZE
    refuse_small(size)
    info = Info("tissue2d", dims=2, channels=3, task="binary", classes=CLASSES, native_size=size)
    opened: dict[str, ImageDataset] = {}
    for split in splits:
        seed = seed_of(split, SPLIT_SEEDS, request.series)
        labels = labels_of(range(SPLITS[split]), seed)
        opened[split] = GeneratedTissue(info, split, _generated(split, size, SPLITS[split], seed), size, labels)
    return opened


@cache
def _generated(split: str, size: int, count: int, seed: int) -> Generated:
    """The tiles and glands of a split."""
    name = f"tissue2d-{split}-{count}-{size}-{seed}"
    return Generated(sys.modules[__name__], name, count, partial(_arrays, size=size, seed=seed))


def _arrays(numbers: Sequence[int], size: int, seed: int) -> Arrays:
    images, glands, _ = draw(numbers, size, seed)
    return {"images": images, "glands": glands}


def tiles(count: int, size: int = DEFAULT_SIZE, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Generate tiles. Tile i depends on `size`, `seed` and i alone.

    Args:
        count: number N of tiles, at least 1. size: side S in pixels, at least 64.

    Returns:
        images (N, S, S, 3) uint8; glands (N, S, S) uint8, 0 or the gland's number from 1 on; labels (N,) int64,
        1 = malignant, one in each pair (2k, 2k + 1).

    Raises:
        InputError: for a count or size outside these ranges.
    """
    if count < 1:
        raise InputError(f"phantom tissue: {count} tiles asked for; at least 1 is needed")
    refuse_small(size)
    return draw(range(count), size, seed)


def refuse_small(size: int) -> None:
    """Raise InputError for a side below `MIN_SIZE`."""
    if size < MIN_SIZE:
        raise InputError(f"phantom tissue of {size} pixels: at least {MIN_SIZE} are needed; raise --texture-size")


def labels_of(numbers: Sequence[int], seed: int) -> np.ndarray:
    """The labels of the tiles of these numbers, as `tiles` gives them."""
    return np.array([(i + np.random.default_rng([seed, i // 2, 1]).integers(2)) % 2 for i in numbers], np.int64)


def draw(numbers: Sequence[int], size: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The tiles of these numbers, their glands and labels, as `tiles` gives them."""
    labels = labels_of(numbers, seed)
    made = [_tile(np.random.default_rng([seed, i]), size, bool(label)) for i, label in zip(numbers, labels)]
    return np.stack([image for image, _ in made]), np.stack([glands for _, glands in made]), labels


Point = tuple[float, float]


def _tile(rng: np.random.Generator, size: int, malignant: bool) -> tuple[np.ndarray, np.ndarray]:
    """One tile (S, S, 3) uint8 and its glands (S, S) uint8."""
    side = size * FINER
    outlines = _outlines(rng)
    hollow = rng.uniform(*HOLLOW)

    # Ground: eosin in wavy fibres, fine or coarse, with few or many spindle-shaped nuclei along them.
    angle, coarse = rng.uniform(0, 180), math.exp(rng.uniform(-math.log(COARSER), math.log(COARSER)))
    width, length = coarse * side / 120, rng.uniform(1, 8) * coarse * side / 120
    fibres = ndimage.gaussian_filter(rng.standard_normal((side, side)), (width, length))
    fibres = ndimage.rotate(fibres, angle, reshape=False, mode="reflect", order=1)
    fibres /= fibres.std()
    eosin = rng.uniform(0.3, 0.6) + rng.uniform(0.08, 0.25) * fibres
    nuclei = Image.new("L", (side, side))
    pen = ImageDraw.Draw(nuclei)
    grow, scatter = rng.uniform(0.8, 1.4), rng.uniform(0.1, 0.8)
    for _ in range(round(math.exp(rng.uniform(*np.log(GROUND_NUCLEI))))):
        turn = math.radians(-angle) + rng.normal(0, scatter)
        _ellipse(pen, rng.uniform(0, 1, 2), (0.017 * grow, 0.006 * grow), turn, side, rng.integers(140, 220))

    # Glands: a pale wall around an empty lumen; ground nuclei do not show through.
    glands = Image.new("L", (side, side))
    wall = Image.new("L", (side, side))
    for number, (centre, corners) in enumerate(outlines, 1):
        outer = [(x * side, y * side) for x, y in corners]
        inner = [_towards(corner, centre, hollow, side) for corner in corners]
        ImageDraw.Draw(glands).polygon(outer, number)
        pen.polygon(outer, 0)
        ImageDraw.Draw(wall).polygon(outer, 255)
        ImageDraw.Draw(wall).polygon(inner, 128)
    inside = np.asarray(wall)
    eosin = np.where(inside == 255, rng.uniform(0.2, 0.4) + 0.05 * fibres, eosin)
    eosin = np.where(inside == 128, 0.02, eosin)
    for centre, corners in outlines:
        _wall_nuclei(rng, pen, centre, corners, hollow, malignant, side)

    haematoxylin = np.asarray(nuclei, np.float64) / 255
    haematoxylin *= 1 + 0.25 * ndimage.gaussian_filter(rng.standard_normal((side, side)), 1.5) * 3
    stains = rng.uniform(0.7, 1.3, 2)
    absorbed = stains[0] * haematoxylin[..., None] * HAEMATOXYLIN * 1.3 + stains[1] * eosin[..., None] * EOSIN
    image = np.exp(-np.clip(absorbed, 0, None)) * rng.uniform(0.9, 1.0)
    image = image.reshape(size, FINER, size, FINER, 3).mean((1, 3)) + 0.01 * rng.standard_normal((size, size, 3))
    numbers = np.asarray(glands)[FINER // 2 :: FINER, FINER // 2 :: FINER]
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8), numbers


def _outlines(rng: np.random.Generator) -> list[tuple[Point, list[Point]]]:
    """Glands that do not touch: centre and corners in picture coordinates from 0 to 1."""
    wanted, found, mean = rng.integers(GLANDS[0], GLANDS[1] + 1), [], rng.uniform(*RADIUS)
    radii: list[tuple[Point, float]] = []
    for _ in range(200):
        if len(found) == wanted:
            break
        radius, centre = mean * rng.uniform(6 / 7, 8 / 7), tuple(rng.uniform(0.08, 0.92, 2))
        if any(math.dist(centre, other) < 1.25 * (radius + r) for other, r in radii):
            continue
        theta = np.arange(CORNERS) * 2 * np.pi / CORNERS
        wave = sum(rng.normal(0, 0.07) * np.cos(k * theta + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 4))
        r = radius * (1 + np.clip(wave, -0.2, 0.2))
        corners = list(zip(centre[0] + r * np.cos(theta), centre[1] + r * np.sin(theta)))
        radii.append((centre, radius))
        found.append((centre, corners))
    return found


def _wall_nuclei(
    rng: np.random.Generator,
    pen: ImageDraw.ImageDraw,
    centre: Point,
    corners: list[Point],
    hollow: float,
    malignant: bool,
    side: int,
) -> None:
    """Draw the nuclei of a gland, whose lumen has the share `hollow` of its radius: in one row, long axes towards the
    centre, or scattered and turned at random."""
    length = sum(math.dist(a, b) for a, b in zip(corners, [*corners[1:], corners[0]]))
    count = max(8, round(length / 0.035))
    for i in range(count):
        along = i + (rng.uniform(-0.5, 0.5) if malignant else rng.normal(0, 0.08))
        place = (along / count * CORNERS) % CORNERS
        a, b = corners[int(place)], corners[(int(place) + 1) % CORNERS]
        t = place - int(place)
        edge = a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1])
        depth = rng.uniform(hollow + 0.1, 0.93) if malignant else 0.86 + rng.normal(0, 0.01)
        at = centre[0] + depth * (edge[0] - centre[0]), centre[1] + depth * (edge[1] - centre[1])
        turn = math.atan2(edge[1] - centre[1], edge[0] - centre[0])
        turn = rng.uniform(0, math.pi) if malignant else turn + rng.normal(0, 0.1)
        grow = math.exp(rng.normal(0, 0.12))
        _ellipse(pen, at, (0.016 * grow, 0.0105 * grow), turn, side, rng.integers(170, 250))


def _ellipse(
    pen: ImageDraw.ImageDraw, centre: Sequence[float], radii: Point, turn: float, side: int, shade: int
) -> None:
    """A filled ellipse, its first radius at the angle `turn`; lengths are shares of the tile's side."""
    t = np.arange(12) * 2 * np.pi / 12
    x, y = radii[0] * np.cos(t), radii[1] * np.sin(t)
    c, s = math.cos(turn), math.sin(turn)
    pen.polygon(list(zip((centre[0] + c * x - s * y) * side, (centre[1] + s * x + c * y) * side)), int(shade))


def _towards(corner: Point, centre: Point, share: float, side: int) -> Point:
    """A corner moved to `share` of its distance from the centre, in pixels."""
    return tuple((m + share * (p - m)) * side for p, m in zip(corner, centre))
