"""Generated images, the data that needs no download: chest radiographs with and without a nodule.

The label depends on one small structure, and everything large about a picture (pose, anatomy, exposure,
ribs, decoys) is drawn alike for both classes, so that a representation matters and mean brightness does not help.
An image is built as an absorption map, body minus air plus bones, and then exposed like a film.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medssl.datasets.base import ImageDataset, Info, Request
from medssl.datasets.masked_images import MaskedImages
from medssl.datasets.phantoms.store import Arrays, Generated, seed_of
from medssl.errors import InputError

# The pictures of a split are the same in every run and on every machine: `--series` changes them, not `--seed`.
SPLITS = {"train": 2048, "val": 256, "test": 512}
SPLIT_SEEDS = {"train": 101, "val": 102, "test": 103}
DEFAULT_SIZE = 64
MIN_SIZE = 32  # below it, the smallest nodule may fall between the pixel centres

NUMBERS_PER_IMAGE = 256  # uniform numbers reserved for the anatomy, so that changes leave the noise alone
PIXELS_PER_BATCH = 1 << 18  # rendered at once; larger batches only leave the processor's cache
VESSELS = 9  # drawn branches in each lung
DECOYS = 3  # blobs like a nodule, but outside of the lungs
DOTS = 5  # vessels seen end on, in the lungs: smaller and brighter than a nodule

INFO = Info("phantom2d", dims=2, channels=1, task="binary", classes=("clear", "nodule"))


def open_splits(request: Request, splits: Sequence[str]) -> dict[str, ImageDataset]:
    """Open splits of `phantom2d`: grey radiographs of side `request.texture_size` (64 where that is 0).

    Raises:
        InputError: for an unknown split, a list file, a data folder, or a texture below 32 pixels.
    """
    refuse_files(request)
    size = request.texture_size or DEFAULT_SIZE
    refuse_small(size)
    info = replace(INFO, native_size=size)
    opened = {}
    for split in splits:
        seed = seed_of(split, SPLIT_SEEDS, request.series)
        generated = _generated(split, size, SPLITS[split], seed)
        labels = torch.from_numpy(labels_of(SPLITS[split], seed))
        opened[split] = GeneratedMasks(info, split, generated, size, ("nodule",), labels)
    return opened


def refuse_files(request: Request) -> None:
    """Raise InputError for a folder or a list, which generated images do not have."""
    given = {"--data": request.data, "--list": request.list, "--val-list": request.val_list,
             "--test-list": request.test_list}  # fmt: skip
    for option, value in given.items():
        if value:
            raise InputError(f"{option} {value}: the images of {request.name} are generated; leave {option} out")


class GeneratedMasks(MaskedImages):
    """Generated images with masks of one label.

    Args:
        generated: "images" (N, S, S[, 3]) uint8, "masks" (N, S, S) uint8, 0 or 1. side: S.
        labels: as for `ImageDataset`.
        field: (S, S) bool, the field of view; everything by default.
    """

    def __init__(
        self,
        info: Info,
        split: str,
        generated: Generated,
        side: int,
        names: Sequence[str],
        labels: Tensor | None = None,
        tubular: bool = False,
        field: np.ndarray | None = None,
    ) -> None:
        ids = [f"{split}/{i:05d}" for i in range(generated.count)]
        super().__init__(info, partial(generated.row, "images"), ids, labels, texture_size=side)
        self.generated, self.mask_labels, self.tubular = generated, tuple(names), tubular
        self.field = np.ones((side, side), bool) if field is None else field

    def load(self, i: int) -> dict[str, Tensor]:
        self.generated.prepare()
        return super().load(i)

    def truth(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        return self.generated.row("masks", self.positions[i]).astype(bool)[None], self.field


@cache
def _generated(split: str, size: int, count: int, seed: int) -> Generated:
    """The images and nodule masks of a split."""
    name = f"phantom2d-{split}-{count}-{size}-{seed}"
    return Generated(sys.modules[__name__], name, count, partial(_arrays, size=size, seed=seed))


def _arrays(numbers: Sequence[int], size: int, seed: int) -> Arrays:
    images, _, masks = draw(numbers, size, seed)
    return {"images": images, "masks": masks}


def radiographs(count: int, size: int = DEFAULT_SIZE, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Generate frontal chest radiographs, half of them with a nodule in a lung.

    Image i depends on `size`, `seed` and i alone, not on `count`.

    Args:
        count: number N of images, at least 1.
        size: side S in pixels, at least 32. A nodule's radius is 4 to 7 % of it.
        seed: number of the series, at least 0.

    Returns:
        images (N, S, S) uint8, bone bright; labels (N,) int64, 1 = nodule, one in each pair (2k, 2k + 1);
        masks (N, S, S) uint8, 1 = nodule.

    Raises:
        InputError: for a count, size or seed outside these ranges.
    """
    if count < 1:
        raise InputError(f"phantom radiographs: {count} images asked for; at least 1 is needed")
    refuse_small(size)
    if seed < 0:
        raise InputError(f"phantom radiographs: seed {seed} is negative")
    return draw(range(count), size, seed)


def refuse_small(size: int) -> None:
    """Raise InputError for a side below `MIN_SIZE`."""
    if size < MIN_SIZE:
        raise InputError(f"--texture-size {size}: phantom radiographs have at least {MIN_SIZE} pixels a side")


def labels_of(count: int, seed: int) -> np.ndarray:
    """(N,) int64, as `radiographs` gives them. One of a pair has the nodule: classes are balanced in any even count."""
    return np.array([label_of(i, seed) for i in range(count)], np.int64)


def label_of(i: int, seed: int) -> int:
    """1 where image i has a nodule: one of each pair (2k, 2k + 1), chosen by a coin."""
    return (i + int(np.random.default_rng([seed, i // 2, 1]).integers(2))) % 2


def draw(numbers: Sequence[int], size: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The images of these numbers, their labels and masks, as `radiographs` gives them."""
    images = np.empty((len(numbers), size, size), np.uint8)
    masks = np.empty((len(numbers), size, size), np.uint8)
    labels = np.array([label_of(i, seed) for i in numbers], np.int64)
    step = max(1, PIXELS_PER_BATCH // size**2)
    for start in range(0, len(numbers), step):
        part = slice(start, min(start + step, len(numbers)))
        rngs = [np.random.default_rng([seed, i]) for i in numbers[part]]
        uniform = np.stack([rng.random(NUMBERS_PER_IMAGE) for rng in rngs])
        haze = np.stack([rng.standard_normal((2, 12, 12), dtype=np.float32) for rng in rngs])
        grain = np.stack([rng.standard_normal((size, size), dtype=np.float32) for rng in rngs])
        present = torch.from_numpy(labels[part]).view(-1, 1, 1)
        film, mask = _expose(
            _Draws(torch.from_numpy(uniform)), torch.from_numpy(haze), torch.from_numpy(grain), present
        )
        images[part], masks[part] = film.numpy(), mask.numpy()
    return images, labels, masks


class _Draws:
    """Hands out the uniform numbers (N, K) of a batch in order; each call gives (N, 1, 1) in [low, high]."""

    def __init__(self, numbers: Tensor) -> None:
        self.columns = iter(numbers.unbind(1))

    def __call__(self, low: float, high: float) -> Tensor:
        return (low + (high - low) * next(self.columns)).float().view(-1, 1, 1)

    def side(self) -> Tensor:
        """-1 (picture's left) or 1."""
        return torch.where(self(0, 1) < 0.5, -1.0, 1.0)


def _step(distance: Tensor, softness: float) -> Tensor:
    """0 outside, 1 inside, with a transition of about `softness`."""
    return torch.sigmoid(distance * (4 / softness))


def _blob(x: Tensor, y: Tensor, cx: Tensor, cy: Tensor, rx: Tensor, ry: Tensor) -> Tensor:
    """A Gaussian bump of height 1 at (cx, cy), exp(-1) at radii rx and ry."""
    return torch.exp(-(((x - cx) / rx) ** 2) - ((y - cy) / ry) ** 2)


def _ball(x: Tensor, y: Tensor, cx: Tensor, cy: Tensor, rx: Tensor, ry: Tensor) -> Tensor:
    """A soft-edged ball seen in projection: 1 in the middle, flatter than a Gaussian, a half near rx, ry."""
    return 1 / (1 + (((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2) ** 2)


class _Lungs:
    """Outline of the lungs in body coordinates: x from the spine outwards (both sides), y downwards.

    Between the apex and the dome of the diaphragm, `along` runs from 0 to 1; at each height a lung lies
    between `medial` and `lateral`.
    """

    def __init__(self, draw: _Draws) -> None:
        self.top = draw(-0.78, -0.68)
        self.bottom = draw(0.42, 0.62)
        self.width = draw(0.68, 0.8)
        self.round = draw(0.42, 0.62)
        self.medial_gap = draw(0.07, 0.12)

    def along(self, y: Tensor) -> Tensor:
        return ((y - self.top) / (self.bottom - self.top)).clamp(0, 1.2)

    def lateral(self, along: Tensor) -> Tensor:
        return self.width * (1 - (1 - along.clamp(max=1)) ** 2.6 + 1e-6) ** self.round

    def medial(self, along: Tensor) -> Tensor:
        return self.medial_gap + 0.05 * along

    def dome(self, x: Tensor, right: Tensor) -> Tensor:
        """Height of the diaphragm; the right one stands higher, over the liver."""
        return self.bottom - 0.12 - 0.04 * right + 0.75 * (x - 0.52 * self.width) ** 2 / self.width


def _expose(draw: _Draws, haze: Tensor, grain: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Render a batch.

    Args:
        draw: uniform numbers of the batch.
        haze: (N, 2, g, g) normal, smooth unevenness of tissue and of lungs.
        grain: (N, S, S) normal, film noise.
        present: (N, 1, 1) 1 where there is a nodule.

    Returns:
        film (N, S, S) uint8, nodule masks (N, S, S) uint8.
    """
    size = grain.shape[-1]
    pixel = 2 / size
    axis = (torch.arange(size, dtype=torch.float32) + 0.5) * pixel - 1
    px, py = axis.view(1, 1, -1), axis.view(1, -1, 1)  # picture coordinates, -1 to 1

    # Pose: body coordinates (x, y) of every pixel, and the way back for single points.
    angle, zoom = draw(-0.13, 0.13), draw(0.9, 1.12)
    shift_x, shift_y = draw(-0.09, 0.09), draw(-0.09, 0.09)
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    x = ((px - shift_x) * cos + (py - shift_y) * sin) / zoom**2
    y = ((py - shift_y) * cos - (px - shift_x) * sin) / zoom**2

    def to_picture(bx: Tensor, by: Tensor) -> tuple[Tensor, Tensor]:
        return bx * cos - by * sin + shift_x, bx * sin + by * cos + shift_y

    lungs = _Lungs(draw)
    out = x.abs()
    right = (x < 0).float()  # the patient's right is on the picture's left
    uneven = F.interpolate(haze, size=(size, size), mode="bicubic", align_corners=False)

    # Body: a torso with sloping shoulders and a neck, air around it.
    torso, shoulder, slope = draw(0.96, 1.2), draw(-0.95, -0.82), draw(0.15, 0.4)
    trunk = y - shoulder - slope * out**2 - 0.5 * (out - torso + 0.15).clamp(min=0)
    neck = 0.2 - out + 0.3 * (y + 0.8)
    body = _step(torso - out, 0.08) * _step(torch.logaddexp(trunk * 20, neck * 20) / 20, 0.05)
    depth = 0.85 - 0.4 * (out / torso).clamp(max=1) ** 2
    film = body * depth * (1 + draw(0.02, 0.07) * uneven[:, 0])

    # Lungs: air takes absorption away; rounded at the rims because they are thinner there.
    along = lungs.along(y)
    lateral = lungs.lateral(along)
    dome = lungs.dome(out, right)
    inside = torch.minimum(torch.minimum(lateral - out, out - lungs.medial(along)), dome - y)
    air = torch.tanh(inside.clamp(min=0) / draw(0.06, 0.13)) * _step(inside, 0.03)
    film = film - body * air * draw(0.52, 0.64) * (1 + draw(0.02, 0.06) * uneven[:, 1])
    film = film + body * _step(y - dome, 0.05) * 0.12  # liver, spleen

    # Middle: spine with its vertebrae, mediastinum, windpipe, aortic arch, heart.
    spine = torch.exp(-((out / draw(0.07, 0.09)) ** 4))
    film = film + body * spine * (draw(0.1, 0.2) + 0.03 * torch.cos(y * (6.283 / draw(0.12, 0.15))))
    film = film + body * _step(draw(0.1, 0.16) + 0.05 * along - out, 0.08) * _step(y - lungs.top, 0.2) * 0.14
    film = film - body * torch.exp(-((out / 0.035) ** 2)) * _step(-0.3 - y, 0.1) * draw(0.06, 0.14)
    film = film + _blob(x, y, draw(0.1, 0.16), draw(-0.36, -0.24), draw(0.08, 0.12), 0.1) * draw(0.1, 0.25)
    heart_x, heart_y = draw(0.1, 0.2), lungs.bottom - draw(0.24, 0.36)
    heart_rx, heart_ry, tilt = draw(0.24, 0.36), draw(0.2, 0.28), draw(0.2, 0.5)
    hx, hy = x - heart_x, y - heart_y - tilt * (x - heart_x)
    heart = _step(1 - (hx / heart_rx) ** 2 - (hy / heart_ry) ** 2, 0.5)
    film = film + body * heart * draw(0.28, 0.42)
    gas = _blob(x, y, draw(0.3, 0.45), lungs.bottom + draw(0.12, 0.25), 0.16, 0.09)  # in the stomach
    film = film - gas * draw(-0.2, 0.3).clamp(min=0)

    # Ribs: the front and back halves of one cage, each a family of equally spaced curves.
    cage = _step(lateral + 0.03 - out, 0.05) * _step(y - lungs.top + 0.02, 0.06) * _step(0.7 - y, 0.4) * body
    gap, bone, thin = draw(0.15, 0.19), draw(0.12, 0.2), draw(0.1, 0.4)
    rim = 0.8 + 0.6 * (out / (lateral + 0.05)).clamp(max=1) ** 4  # seen along their length at the side
    behind = y + draw(0.0, 0.1) * out - draw(0.45, 0.75) * out**2 * (1.1 - 0.5 * along)
    before = y + draw(0.55, 0.85) * out + 0.2 * out**2
    for curve, weight, extent in ((behind, 1.0, 0.05), (before, 0.6, 0.28)):
        wave = torch.cos((curve / gap + draw(0, 1)) * 6.283)
        band = _step(wave - thin, 0.9) * (1 - 0.3 * _step(wave - 0.7 - 0.2 * thin, 0.6))  # denser at its edges
        film = film + band * cage * rim * _step(out - extent, 0.08) * bone * weight

    # Collar bones and shoulder blades.
    for side in (-1, 1):
        xs = x * side
        collar = draw(-0.66, -0.52) - draw(0.05, 0.3) * xs + draw(-0.04, 0.04) * torch.sin(5 * xs)
        bar = torch.exp(-(((y - collar) / draw(0.03, 0.042)) ** 4))
        film = film + body * bar * _step(xs - 0.07, 0.06) * _step(draw(0.75, 0.95) - xs, 0.2) * draw(0.18, 0.3)
        blade = _step(xs - draw(0.58, 0.74) - 0.15 * (y + 0.3), 0.06) * _step(0.15 - y, 0.3) * _step(y + 0.72, 0.1)
        film = film + body * blade * draw(0.02, 0.1)

    # Vessels branch from the hilum of each lung and thin out; dots are vessels seen end on.
    for side in (-1, 1):
        root_x, root_y = side * draw(0.17, 0.24), draw(-0.12, 0.04)
        film = film + body * _blob(x, y, root_x, root_y, 0.09, draw(0.1, 0.16)) * draw(0.06, 0.18)
        for branch in range(VESSELS):
            turn = -1.2 + 2.6 * (branch + draw(0, 1)) / VESSELS
            dx, dy, length = side * torch.cos(turn), torch.sin(turn), draw(0.2, 0.5)
            t = (x - root_x) * dx + (y - root_y) * dy
            off = (y - root_y) * dx - (x - root_x) * dy + draw(-0.9, 0.9) * t**2
            width = 0.021 * (1 - 0.65 * t / length).clamp(0.3, 1)
            drawn = width.clamp(min=0.7 * pixel)  # thinner than a pixel: paler instead
            line = torch.exp(-((off / drawn) ** 2)) * (width / drawn) * _step(t, 0.05) * _step(length - t, 0.3)
            film = film + air * line * draw(0.03, 0.1)
    for _ in range(DOTS):
        dx, dy = to_picture(*_lung_point(lungs, draw, 0.25, 0.75, 0.1, 0.6))
        radius = draw(0.02, 0.034)
        film = film + _blob(px, py, dx, dy, radius, radius) * draw(0.1, 0.3) * draw(0, 1).round()

    # Decoys have a nodule's size and shape, but lie on the spine, under the diaphragm or beside the ribs.
    for _ in range(DECOYS):
        place, side = draw(0, 3).floor(), draw.side()
        low, where = draw(0, 1), draw(-1, 1)
        bx = torch.where(place == 0, 0.1 * where, torch.where(place == 1, 0.5 * where, side * (0.84 + 0.1 * where)))
        by = torch.where(place == 1, lungs.bottom + 0.12 + 0.2 * low, -0.55 + 1.1 * low)
        cx, cy = to_picture(bx, by)
        radius = draw(0.08, 0.13)
        film = film + _ball(px, py, cx, cy, radius, radius * draw(1, 1.2)) * draw(0.45, 0.75) * draw(0, 1).round()

    # The nodule. Its numbers are drawn for every image, so that nothing else tells the classes apart.
    cx, cy = to_picture(*_lung_point(lungs, draw, 0.2, 0.85, 0.25, 0.85))
    rx = draw(0.08, 0.13)
    ry = rx * draw(1, 1.2).clamp(max=0.14 / rx)
    film = film + _ball(px, py, cx, cy, rx, ry) * draw(0.55, 0.75) * present
    mask = (((px - cx) / rx) ** 2 + ((py - cy) / ry) ** 2 <= 1) & (present == 1)

    # Film: exposure and gamma are the radiographer's, noise grows where little light arrives.
    film = film.clamp(min=1e-4) ** draw(0.95, 1.3)
    bright = 1 - torch.exp(-draw(1.1, 1.7) * film)
    bright = draw(-0.08, 0.02) + bright * draw(1.0, 1.25)
    bright = bright + grain * draw(0.01, 0.024)
    return (bright * 255).round().clamp(0, 255).to(torch.uint8), mask.to(torch.uint8)


def _lung_point(
    lungs: _Lungs, draw: _Draws, top: float, bottom: float, inner: float, outer: float
) -> tuple[Tensor, Tensor]:
    """A random point of a lung in body coordinates, in the given ranges of height and of breadth (0 to 1)."""
    along, across, side = draw(top, bottom), draw(inner, outer), draw.side()
    medial, lateral = lungs.medial(along), lungs.lateral(along)
    out = medial + across * (lateral - medial)
    floor = lungs.dome(out, (side < 0).float()) - 0.1  # clear of the diaphragm
    y = torch.minimum(lungs.top + along * (lungs.bottom - lungs.top), floor)
    return side * out, y
