"""Generated fundus photographs with the vessels' mask: trees that grow from the optic disc, bend and branch.

What is easy to see is not enough: the background has choroidal streaks of a vessel's width and contrast, thin vessels
fade, and illumination falls off to one side, so that a threshold of the green channel finds a part of the tree only.
"""

import math
import sys
from collections.abc import Sequence
from functools import cache, partial

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from medssl.datasets.base import Info, Request
from medssl.datasets.phantoms.radiograph import GeneratedMasks, refuse_files
from medssl.datasets.phantoms.store import Arrays, Generated, seed_of
from medssl.errors import InputError

SPLITS = {"train": 128, "val": 16, "test": 32}
SPLIT_SEEDS = {"train": 201, "val": 202, "test": 203}
DEFAULT_SIZE = 256
MIN_SIZE = 64
RADIUS = 0.95  # of the field of view, in half sides
FINER = 2  # images are drawn so many times larger, then averaged

INFO = Info("fundus2d", dims=2, channels=3)


def open_splits(request: Request, splits: Sequence[str]) -> dict[str, GeneratedMasks]:
    """Open splits of `fundus2d`: colour images of side `request.texture_size` (256 where that is 0).

    Raises:
        InputError: for an unknown split, a list file, a data folder, or a texture below 64 pixels.
    """
    refuse_files(request)
    size = request.texture_size or DEFAULT_SIZE
    refuse_small(size)
    info = Info(INFO.name, INFO.dims, INFO.channels, native_size=size)
    opened = {}
    for split in splits:
        seed = seed_of(split, SPLIT_SEEDS, request.series)
        generated = _generated(split, size, SPLITS[split], seed)
        field = field_of_view(size)
        opened[split] = GeneratedMasks(info, split, generated, size, ("vessels",), tubular=True, field=field)
    return opened


@cache
def _generated(split: str, size: int, count: int, seed: int) -> Generated:
    """The images and masks of a split."""
    name = f"fundus2d-{split}-{count}-{size}-{seed}"
    return Generated(sys.modules[__name__], name, count, partial(_arrays, size=size, seed=seed))


def _arrays(numbers: Sequence[int], size: int, seed: int) -> Arrays:
    images, masks = draw(numbers, size, seed)
    return {"images": images, "masks": masks}


def field_of_view(size: int) -> np.ndarray:
    """Where the photographs are not black, (S, S) bool: a disc."""
    axis = (np.arange(size) + 0.5) / size * 2 - 1
    return np.hypot(axis[None, :], axis[:, None]) < RADIUS


def fundi(count: int, size: int = DEFAULT_SIZE, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Generate fundus photographs. Image i depends on `size`, `seed` and i alone.

    Args:
        count: number N of images, at least 1. size: side S in pixels, at least 64.

    Returns:
        images (N, S, S, 3) uint8; masks (N, S, S) uint8, 1 = vessel.

    Raises:
        InputError: for a count or size outside these ranges.
    """
    if count < 1:
        raise InputError(f"phantom fundi: {count} images asked for; at least 1 is needed")
    refuse_small(size)
    return draw(range(count), size, seed)


def refuse_small(size: int) -> None:
    """Raise InputError for a side below `MIN_SIZE`."""
    if size < MIN_SIZE:
        raise InputError(
            f"phantom fundi of {size} pixels: at least {MIN_SIZE} are needed; raise --texture-size or --image-size"
        )


def draw(numbers: Sequence[int], size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The images of these numbers and their masks, as `fundi` gives them."""
    made = [_photograph(np.random.default_rng([seed, i]), size) for i in numbers]
    return np.stack([image for image, _ in made]), np.stack([mask for _, mask in made])


def _photograph(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    left = rng.random() < 0.5  # which eye
    axis = (np.arange(size) + 0.5) / size * 2 - 1
    x, y = axis[None, :], axis[:, None]
    field = np.clip((RADIUS - np.hypot(x, y)) * size / 3, 0, 1)  # its edge is a few pixels wide
    disc = rng.uniform(0.45, 0.6), rng.uniform(-0.1, 0.1)
    macula = disc[0] - rng.uniform(0.75, 0.9), disc[1] + rng.uniform(0, 0.15)

    # Retina: a reddish ground, darker at the macula and towards one side, with choroidal streaks.
    unevenness = ndimage.gaussian_filter(rng.standard_normal((size, size)), size / 12) * size / 12
    light = 1 + 0.1 * unevenness
    light -= rng.uniform(0.05, 0.3) * np.hypot(x - rng.uniform(-0.5, 0.5), y - rng.uniform(-0.5, 0.5))
    light -= rng.uniform(0.15, 0.35) * np.exp(-(((x - macula[0]) ** 2 + (y - macula[1]) ** 2) / 0.03))
    streaks = ndimage.gaussian_filter(rng.standard_normal((size, size)), (size / 60, size / 20)) * size / 25
    light += rng.uniform(0.02, 0.06) * ndimage.rotate(streaks, rng.uniform(0, 180), reshape=False, mode="reflect")
    bright = np.exp(-((((x - disc[0]) / 0.11) ** 2 + ((y - disc[1]) / 0.13) ** 2) ** 2))  # optic disc
    light += rng.uniform(0.3, 0.5) * bright

    # Vessels: four arteries, four veins; each tree is drawn darker than the ground by its own amount.
    absorbed = np.zeros((size, size))
    covered = np.zeros((size, size))
    for number in range(8):
        dark = rng.uniform(0.14, 0.24) if number % 2 else rng.uniform(0.24, 0.38)
        quarter = math.pi * ((number // 2) / 2 + 0.25)
        lines = _grow(rng, disc, quarter + rng.normal(0, 0.25), rng.uniform(0.013, 0.02))
        drawn = _draw(lines, size)
        absorbed = np.maximum(absorbed, dark * drawn)
        covered = np.maximum(covered, drawn)
    light *= 1 - absorbed

    ground = np.array([rng.uniform(0.7, 0.9), rng.uniform(0.35, 0.5), rng.uniform(0.15, 0.28)])
    contrast = np.array([0.55, 1.0, 0.8])  # vessels are clearest in green
    image = ground * (1 + contrast * (light[..., None] - 1))
    image += rng.standard_normal(image.shape) * rng.uniform(0.008, 0.02)
    image = np.clip(image, 0, 1) * field[..., None]
    mask = (covered > 0.5) & (field > 0.5)
    if left:
        image, mask = image[:, ::-1], mask[:, ::-1]
    return np.rint(image * 255).astype(np.uint8), mask.astype(np.uint8)


Line = tuple[float, float, float, float, float]  # ends in picture coordinates from −1 to 1, and width


def _grow(rng: np.random.Generator, start: tuple[float, float], angle: float, width: float) -> list[Line]:
    """Lines of a tree that grows from `start`, bends, and splits into a wide and a thin branch."""
    lines: list[Line] = []
    waiting = [(*start, angle, width, rng.normal(0, 1.5))]
    while waiting:
        x, y, angle, width, bend = waiting.pop()
        length = rng.uniform(0.15, 0.4) * (0.5 + width / 0.02)
        for _ in range(max(2, int(length / 0.02))):
            angle += 0.02 * bend + rng.normal(0, 0.09)
            new = x + 0.02 * math.cos(angle), y + 0.02 * math.sin(angle)
            lines.append((x, y, *new, width))
            x, y = new
        if math.hypot(x, y) < 0.95 and width > 0.003:
            turn = rng.uniform(0.3, 0.8) * rng.choice((-1, 1))
            waiting.append((x, y, angle + 0.3 * turn, width * rng.uniform(0.8, 0.92), rng.normal(0, 1.5)))
            waiting.append((x, y, angle - turn, width * rng.uniform(0.4, 0.7), rng.normal(0, 1.5)))
    return lines


def _draw(lines: Sequence[Line], size: int) -> np.ndarray:
    """Lines as an image (S, S) in [0, 1], the share of each pixel that they cover."""
    scale = size * FINER / 2
    image = Image.new("L", (size * FINER, size * FINER))
    pen = ImageDraw.Draw(image)
    for x0, y0, x1, y1, width in lines:
        ends = [((x + 1) * scale, (y + 1) * scale) for x, y in ((x0, y0), (x1, y1))]
        pen.line(ends, 255, max(1, round(2 * width * scale)))
    return np.asarray(image.reduce(FINER), np.float32) / 255
