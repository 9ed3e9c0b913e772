"""Generated chest CTs: what three-dimensional runs use without `--data`, and what a LUNA16-like folder is made of.

A scan shows a torso with fat, muscle, ribs, spine, heart, aorta, airways and two lungs, in Hounsfield units. Vessels
branch from the hilum of each lung and thin out. Half of the scans have a nodule in a lung, which is the label. It has
the density of the vessels, and its place, size and shape vary, so that neither single voxels nor a mean tell the
classes apart; balls like it lie on the skin, in the chest wall and under the diaphragm of all scans.

Axes are x to the patient's left, y to the back, z to the head, in mm from the middle of the chest.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from medssl.datasets.base import ImageDataset, Info, Request
from medssl.datasets.phantoms.store import Arrays, Generated, seed_of
from medssl.errors import InputError
from medssl.files import write_text
from medssl.reading.volumes import write_image

Triple = tuple[float, float, float]

# The scans of a split are the same in every run and on every machine: `--series` changes them, not `--seed`.
SPLITS = {"train": 512, "val": 64, "test": 192}
SPLIT_SEEDS = {"train": 201, "val": 202, "test": 213}  # 203 had a mean density that told the classes apart a little
SHAPE, SPACING = (48, 48, 32), (4.0, 4.0, 4.0)  # a part of the chest, on a grid that a CPU can train on
RADII = (10.0, 16.0)  # of its nodules, in mm: half as many voxels across
ROAM = (50.0, 15.0, 35.0)  # how far the middle of what is shown lies from the chest's, at most, in mm

LABELS = ("background", "lungs", "heart", "nodule")  # of the masks; vessels and airways count as what surrounds them
INFO = Info("phantom3d", dims=3, channels=1, task="binary", classes=("clear", "nodule"))

FIELD_PADDING = -3024  # outside of a scanner's round field of view, as in LUNA16
VOXELS_PER_SLAB = 1 << 22  # rendered at once
STEMS = 7  # vessels that leave each hilum, and how often each forks
GENERATIONS = 5
DECOYS = 4
WAVES = 24  # of the unevenness of tissue


class PhantomVolumes(ImageDataset):
    """Scans of one split.

    An item is {"image": (1, X, Y, Z) float16, −1000 to 1000 HU scaled to [0, 1]; "mask": (X, Y, Z) uint8, numbers
    of `LABELS`; "size": (3,) extent in mm; "label": 1 with a nodule; "index"; "bad"}.
    """

    mask_labels = LABELS

    def __init__(self, split: str, generated: Generated, labels: np.ndarray) -> None:
        ids = [f"{split}/{i:05d}" for i in range(generated.count)]
        super().__init__(INFO, partial(generated.row, "hu"), ids, torch.from_numpy(labels))
        self.generated = generated

    def load(self, i: int) -> dict[str, Tensor]:
        """Scan i without its label."""
        self.generated.prepare()
        row = self.positions[i]
        image = (torch.from_numpy(self.read(row)[None]).float() + 1000) / 2000
        mask = torch.from_numpy(self.generated.row("masks", row))
        size = torch.tensor([n * s for n, s in zip(SHAPE, SPACING)])
        return {"image": image.clamp_(0, 1).half(), "mask": mask, "size": size}


def open_splits(request: Request, splits: Sequence[str]) -> dict[str, ImageDataset]:
    """Open splits of `phantom3d`: 48 × 48 × 32 voxels of 4 mm, with labels and masks.

    Raises:
        InputError: for an unknown split, a list file or a data folder.
    """
    for option, value in (("--data", request.data), ("--list", request.list)):
        if value:
            raise InputError(f"{option} {value}: the volumes of phantom3d are generated; leave {option} out")
    opened = {}
    for split in splits:
        seed = seed_of(split, SPLIT_SEEDS, request.series)
        opened[split] = PhantomVolumes(
            split, _generated(split, SPLITS[split], seed), labels_of(range(SPLITS[split]), seed)
        )
    return opened


@cache
def _generated(split: str, count: int, seed: int) -> Generated:
    """The scans and masks of a split."""
    name = f"phantom3d-{split}-{count}-{seed}"
    return Generated(sys.modules[__name__], name, count, partial(_arrays, seed=seed))


def _arrays(numbers: Sequence[int], seed: int) -> Arrays:
    hu, _, masks = draw(numbers, SHAPE, SPACING, seed, RADII, ROAM)
    return {"hu": hu, "masks": masks}


def chest_ct(
    count: int,
    shape: tuple[int, int, int] = SHAPE,
    spacing: Triple = SPACING,
    seed: int = 0,
    radii: tuple[float, float] = RADII,
    roam: Triple = ROAM,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Generate chest CTs, half of them with a nodule in a lung.

    Scan i depends on the other arguments and i alone, not on `count`.

    Args:
        count: number N of scans, at least 1.
        shape: voxels along x (to the left), y (to the back), z (to the head).
        spacing: their distances in mm. A whole chest takes about 360 × 260 × 290 mm.
        seed: number of the series, at least 0.
        radii: smallest and largest radius of a nodule in mm.
        roam: how far from the middle of the chest the middle of a scan lies at most, in mm.

    Returns:
        HU (N, X, Y, Z) int16; labels (N,) int64, 1 = nodule, one in each pair (2k, 2k + 1); masks (N, X, Y, Z)
        uint8, numbers of `LABELS`.

    Raises:
        InputError: for a count or seed outside these ranges, or a scan too small to hold a nodule.
    """
    if count < 1:
        raise InputError(f"phantom CTs: {count} scans asked for; at least 1 is needed")
    if seed < 0:
        raise InputError(f"phantom CTs: seed {seed} is negative")
    return draw(range(count), shape, spacing, seed, radii, roam)


def labels_of(numbers: Sequence[int], seed: int) -> np.ndarray:
    """The labels of the scans of these numbers, as `chest_ct` gives them. A coin for every pair, not for every scan:
    classes are balanced in any even count."""
    return np.array([(i + int(np.random.default_rng([seed, i // 2, 1]).integers(2))) % 2 for i in numbers])


def draw(
    numbers: Sequence[int], shape: tuple[int, int, int], spacing: Triple, seed: int, radii: tuple[float, float],
    roam: Triple,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """The scans of these numbers, their labels and masks, as `chest_ct` gives them."""
    labels, scans = labels_of(numbers, seed), []
    for i, label in zip(numbers, labels):
        scans.append(scan_chest(np.random.default_rng([seed, i]), shape, spacing, int(label), radii, roam))
    return np.stack([scan.hu for scan in scans]), labels, np.stack([scan.mask for scan in scans])


@dataclass(frozen=True)
class Scan:
    """A generated CT.

    Attributes:
        hu: (X, Y, Z) int16.
        mask: (X, Y, Z) uint8, numbers of `LABELS`.
        nodules: (K, 4) centres and radii, in mm from the middle of the scan.
        vessels: (P, 3) points on vessels of at least 2 mm radius inside the lungs, likewise.
    """

    hu: np.ndarray
    mask: np.ndarray
    nodules: np.ndarray
    vessels: np.ndarray


def scan_chest(
    rng: np.random.Generator,
    shape: tuple[int, int, int],
    spacing: Triple,
    nodules: int = 1,
    radii: tuple[float, float] = (4.0, 15.0),
    roam: Triple = (0.0, 0.0, 0.0),
) -> Scan:
    """Generate one chest CT with up to 4 nodules; see `chest_ct`. All else is the same for any number of nodules.

    Raises:
        InputError: where no place in a lung is large enough for a nodule.
    """
    patient = _Patient(rng)
    middle = rng.uniform(-1, 1, 3) * roam
    axes = [((np.arange(n) + 0.5) * s - n * s / 2 + m).astype(np.float32) for n, s, m in zip(shape, spacing, middle)]
    found = _place_nodules(patient, rng, axes, radii)[:nodules]
    edge = float(np.prod(spacing)) ** (1 / 3)
    step = max(1, VOXELS_PER_SLAB // (shape[0] * shape[1]))
    hu, mask = np.empty(shape, np.int16), np.empty(shape, np.uint8)
    for start in range(0, shape[2], step):
        slab = (..., slice(start, start + step))
        x, y, z = (torch.from_numpy(axis) for axis in (axes[0], axes[1], axes[2][slab]))
        density, organs = patient.render(x.view(-1, 1, 1), y.view(-1, 1), z, edge, found)
        noise = rng.standard_normal(density.shape, dtype=np.float32) * patient.noise
        hu[slab] = (density.numpy() + noise).round().clip(-1024, 3071)
        mask[slab] = organs.numpy()
    on, thickness = patient.vessels.balls(1.0)
    on = on[thickness >= 2]
    inside = on[patient.lung_distance(*torch.from_numpy(on).unbind(1)).numpy() > 2]
    inside = inside[np.all([(inside[:, k] > a[0]) & (inside[:, k] < a[-1]) for k, a in enumerate(axes)], 0)]
    places = np.array([[*nodule.centre, nodule.radius] for nodule in found]).reshape(-1, 4)
    return Scan(hu, mask, places - [*middle, 0], inside - middle)


@dataclass(frozen=True)
class _Nodule:
    """An ellipsoid with bumps."""

    centre: np.ndarray
    radius: float
    axes: np.ndarray  # (3,) relative lengths
    bumps: np.ndarray  # (3, 4) directions and phases
    density: float

    def depth(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """About the distance in mm from the surface, positive inside."""
        p = [(c - m) / (self.radius * a) for c, m, a in zip((x, y, z), self.centre.tolist(), self.axes.tolist())]
        length = (p[0] ** 2 + p[1] ** 2 + p[2] ** 2).sqrt()
        waves = sum(torch.sin(b[0] * p[0] + b[1] * p[1] + b[2] * p[2] + b[3]) for b in self.bumps.tolist())
        return self.radius * (1 + 0.05 * waves - length)


def _place_nodules(
    patient: "_Patient", rng: np.random.Generator, axes: list[np.ndarray], radii: tuple[float, float]
) -> list[_Nodule]:
    """Four nodules inside of lungs, at centres of voxels, apart from each other.

    They are drawn whether they are shown or not, so that nothing else tells the classes apart.
    """
    # Large scans are searched on every fourth voxel or so.
    few = [axis[len(axis) % stride // 2 :: stride] for axis in axes for stride in [max(1, len(axis) // 64)]]
    x, y, z = (torch.from_numpy(axis) for axis in few)
    depth = patient.lung_distance(x.view(-1, 1, 1), y.view(-1, 1), z)
    margin = [torch.minimum(axis - axis[0], axis[-1] - axis) for axis in (x, y, z)]
    border = torch.minimum(torch.minimum(margin[0].view(-1, 1, 1), margin[1].view(-1, 1)), margin[2])
    depth = torch.minimum(depth, border)  # the whole nodule is in the scan
    found: list[_Nodule] = []
    for _ in range(4):
        radius = math.exp(rng.uniform(*np.log(radii)))
        radius = max(radii[0], min(radius, float(depth.max()) / 1.2 - 1))  # the largest that fits
        places = torch.nonzero(depth >= 1.2 * radius + 1)
        pick, shape = rng.random(), rng.uniform(0.85, 1.15, 3)
        bumps = np.concatenate([rng.uniform(-4, 4, (3, 3)), rng.uniform(0, 2 * math.pi, (3, 1))], 1)
        density = rng.uniform(-20, 60)
        if len(places) == 0:
            break
        i, j, k = places[int(pick * len(places))].tolist()
        centre = np.array([few[0][i], few[1][j], few[2][k]], np.float64)
        found.append(_Nodule(centre, radius, shape, bumps, density))
        apart = ((x - centre[0]).view(-1, 1, 1) ** 2 + (y - centre[1]).view(-1, 1) ** 2 + (z - centre[2]) ** 2).sqrt()
        depth = torch.minimum(depth, apart - 1.2 * radius)
    if not found:
        raise InputError(
            f"phantom CTs: no place for a nodule of {radii[0]:g} mm in a scan of "
            f"{' x '.join(f'{axis[-1] - axis[0]:.0f}' for axis in axes)} mm; make the scan larger"
        )
    return found


@dataclass(frozen=True)
class _Tubes:
    """Curved tapering tubes, `start` + `along` · t + `bend` · t² for t from 0 to 1, all (P, 3); `radius` (P,); mm."""

    start: np.ndarray
    along: np.ndarray
    bend: np.ndarray
    radius: np.ndarray
    taper: float

    @staticmethod
    def through(points: np.ndarray, radius: float, taper: float = 1.0) -> "_Tubes":
        """Straight pieces through (P + 1, 3) points."""
        steps = np.diff(points, axis=0)
        return _Tubes(points[:-1], steps, 0 * steps, np.full(len(steps), radius), taper)

    def balls(self, gap: float) -> tuple[np.ndarray, np.ndarray]:
        """Centres (B, 3) and radii (B,), float32, of balls at most about `gap` mm apart."""
        count = np.ceil(np.linalg.norm(self.along, axis=1) / gap).astype(int) + 1
        piece = np.repeat(np.arange(len(count)), count)
        first = np.cumsum(count) - count
        t = ((np.arange(len(piece)) - first[piece]) / np.maximum(count - 1, 1)[piece])[:, None]
        centres = self.start[piece] + self.along[piece] * t + self.bend[piece] * t**2
        radii = self.radius[piece] * (1 + (self.taper - 1) * t[:, 0])
        return centres.astype(np.float32), radii.astype(np.float32)


class _Patient:
    """The anatomy of one patient: numbers drawn once, evaluated on any grid."""

    def __init__(self, rng: np.random.Generator) -> None:
        def draw(low: float, high: float) -> float:
            return float(rng.uniform(low, high))

        self.width, self.depth = draw(150, 172), draw(102, 118)  # half axes of the torso
        self.fat = draw(8, 18)
        self.wall = self.fat + draw(16, 20)
        self.top, self.base = draw(120, 138), draw(-62, -42)  # apex of the lungs, height of the left diaphragm
        self.right_rise, self.curve = draw(6, 20), draw(0.7, 1.3)
        self.gap = draw(0.85, 1.25)  # width of the mediastinum
        self.heart_at = (draw(18, 32), draw(-32, -18), draw(-38, -22))
        self.heart_size = (draw(50, 62), draw(38, 46), draw(46, 58))
        self.heart_turn = draw(0.4, 0.8)
        self.rib_gap, self.rib_phase, self.rib_slope = draw(24, 29), draw(0, 29), draw(0.35, 0.55)
        self.spine_y = self.depth - draw(54, 60)
        self.vertebra_phase = draw(0, 25)
        self.air, self.tissue, self.blood = draw(-890, -820), draw(35, 60), draw(30, 60)
        self.gravity = draw(30, 110)  # HU between the front and the back of the lungs
        self.bone = draw(300, 500)
        self.noise = draw(12, 40)
        self.gas = (draw(40, 75), draw(-40, 0), draw(18, 32))  # bubble in the stomach: x, y, radius
        self.gas_shown = draw(0, 1) < 0.6
        # Waves of wavelengths from 30 to 200 mm make tissue and lungs uneven.
        self.waves = np.concatenate(
            [rng.normal(0, 0.06, (WAVES, 3)), rng.uniform(0, 2 * math.pi, (WAVES, 3))], 1
        ).astype(np.float32)
        self.vessels, self.aorta, self.airways = _vessel_tree(rng), self._aorta(), self._airways()
        self.decoys = [self._decoy(rng) for _ in range(DECOYS)]

    # Shapes: each gives about the distance in mm from a surface, positive inside.

    def _cavity(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """The inside of the rib cage, which narrows towards the apex."""
        middle = -30.0
        rise = ((z - middle) / (self.top - middle)).clamp(min=0)
        narrow = (1 - rise**2.6).clamp(min=1e-3).sqrt()
        a, b = (self.width - self.wall) * narrow, (self.depth - self.wall) * (0.25 + 0.75 * narrow)
        return (1 - _oval(x / a, (y - 3) / b)) * b

    def _heart(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        cos, sin = math.cos(self.heart_turn), math.sin(self.heart_turn)
        x, y, z = (c - m for c, m in zip((x, y, z), self.heart_at))
        # The long axis points to the left, the front and below.
        u, v = x * cos - z * sin - 0.3 * y, x * sin + z * cos
        a, b, c = self.heart_size
        return (1 - ((u / a) ** 2 + (y / b) ** 2 + (v / c) ** 2).sqrt()) * b

    def _dome(self, x: Tensor, y: Tensor) -> Tensor:
        """Height of the diaphragm; the right one stands higher, over the liver."""
        across = (x.abs() - 0.42 * self.width) / 70
        dome = self.base - self.curve * (32 * across**2 + 45 * ((y + 15) / 75) ** 2)
        return dome + self.right_rise * torch.sigmoid(-x / 8)

    def lung_distance(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return self._lungs(x, y, z, self._cavity(x, y, z), self._heart(x, y, z), self._dome(x, y))

    def _lungs(self, x: Tensor, y: Tensor, z: Tensor, cavity: Tensor, heart: Tensor, dome: Tensor) -> Tensor:
        # Lungs nearly meet behind the breastbone, and leave room for the great vessels and the spine.
        behind = torch.sigmoid((y + 38) / 7)
        medial = 5 + self.gap * behind * (17 + 9 * torch.exp(-(((z - 10) / 45) ** 2)))
        medial = medial + 6 * torch.sigmoid((y - self.spine_y + 22) / 4)
        inside = torch.minimum(cavity - 1, x.abs() - medial)
        return torch.minimum(torch.minimum(inside, z - dome), -3 - heart)

    def _aorta(self) -> list[_Tubes]:
        """Up from the heart, over the left main bronchus, down beside the spine."""
        t = np.linspace(0, math.pi, 13)[:, None]
        start, end = np.array([-8.0, -22, 48]), np.array([20.0, self.spine_y - 18, 48])
        arch = (start + end) / 2 + (start - end) / 2 * np.cos(t) + np.array([0, 0, 24]) * np.sin(t)
        up, down = np.array([[10.0, -18, -5]]), np.array([[14.0, self.spine_y - 20, -160]])
        return [_Tubes.through(np.concatenate([up, arch]), 13.5), _Tubes.through(np.concatenate([end[None], down]), 12)]

    def _airways(self) -> list[_Tubes]:
        """Windpipe and main bronchi."""
        fork = [0.0, 14, 38]
        bronchi = np.array([[42.0, 16, 12], fork, [-42, 16, 6]])
        return [_Tubes.through(np.array([[0.0, 8, 160], fork]), 9), _Tubes.through(bronchi, 6)]

    def _decoy(self, rng: np.random.Generator) -> tuple[list[float], float, float]:
        """Centre, radius and density of a ball outside of the lungs."""
        kind, angle, level = rng.integers(3), rng.uniform(0, 2 * math.pi), rng.uniform(-90, 90)
        radius, low = rng.uniform(6, 14), rng.uniform(14, 40)
        side = math.copysign(1, math.cos(angle))
        if kind == 0:  # on the skin
            a, b, density = self.width + radius - 2, self.depth + radius - 2, rng.uniform(0, 80)
        elif kind == 1:  # in the wall of the chest
            a, b, density = self.width - self.fat / 2, self.depth - self.fat / 2, rng.uniform(0, 80)
        else:  # under the diaphragm
            x, y = side * rng.uniform(45, 85), rng.uniform(-40, 30)
            z = float(self._dome(torch.tensor(x), torch.tensor(y))) - radius - low
            return [x, y, z], radius, rng.uniform(110, 220)
        reach = _oval(torch.tensor(math.cos(angle)), torch.tensor(math.sin(angle))).item()
        return [a * math.cos(angle) / reach, b * math.sin(angle) / reach, level], radius, density

    def render(self, x: Tensor, y: Tensor, z: Tensor, edge: float, nodules: list[_Nodule]) -> tuple[Tensor, Tensor]:
        """HU without noise, and labels, on a grid.

        Args:
            x, y, z: (X, 1, 1), (Y, 1) and (Z,) coordinates of the voxels' centres.
            edge: side of a voxel in mm, over which borders are blended.
            nodules: what is shown of them.
        """

        def inside(distance: Tensor) -> Tensor:
            return (distance / edge + 0.5).clamp(0, 1)

        def periodic(phase: Tensor, period: float) -> Tensor:  # distance from the middle of the period
            return ((phase / period) % 1 - 0.5).abs() * period

        k = torch.from_numpy(self.waves)
        cx, cy, cz = (torch.cos(axis.view(-1, 1) * k[:, a] + k[:, 3 + a]) for a, axis in enumerate((x, y, z)))
        uneven = ((cx[:, None] * cy) @ cz.T) * (2 / WAVES) ** 0.5  # (X, Y, Z), about unit deviation

        # Torso: fat under the skin, muscle below, narrower at the neck.
        neck = 1 - 0.3 * torch.sigmoid((z - 142) / 8)
        skin = (1 - _oval(x / (self.width * neck), y / (self.depth * neck))) * self.depth
        hu = -105 + inside(skin - self.fat) * (self.tissue + 105 + 8 * uneven)
        cavity, heart, dome = self._cavity(x, y, z), self._heart(x, y, z), self._dome(x, y)
        lungs = self._lungs(x, y, z, cavity, heart, dome)

        # Mediastinal fat, and the liver and its neighbours below the diaphragm.
        below = inside(dome - z)
        hu = torch.lerp(hu, -85 + below * (145 + 6 * uneven), inside(cavity))
        if self.gas_shown:
            gx, gy, radius = self.gas
            gz = float(self._dome(torch.tensor(gx), torch.tensor(gy))) - radius - 8
            bubble = radius - ((x - gx) ** 2 + (y - gy) ** 2 + (z - gz) ** 2).sqrt()
            hu = torch.lerp(hu, torch.tensor(-950.0), inside(bubble))

        # Bones: ribs slope downwards to the front, where they end in cartilage; breastbone; shoulder blades.
        shell = cavity + 7
        ribs = inside(4.5 - shell.abs()) * inside(5.5 - periodic(z - self.rib_slope * y + self.rib_phase, self.rib_gap))
        gristle = torch.sigmoid((-30 - y) / 4) * torch.sigmoid((60 - x.abs()) / 4)
        marrow = 1 - 0.5 * inside(2.2 - shell.abs())
        hu = torch.lerp(hu, self.bone * (marrow - 0.5 * gristle) + 60, ribs * inside(self.top + 15 - z))
        sternum = inside(19 - x.abs()) * inside(6 - shell.abs()) * torch.sigmoid(-y / 4) * inside(z + 45)
        hu = torch.lerp(hu, torch.tensor(0.5 * self.bone), sternum)
        blade = inside(2.5 - (cavity + 17).abs()) * inside(x.abs() - 62) * inside(y - 15) * inside(z - 15)
        hu = torch.lerp(hu, torch.tensor(0.8 * self.bone), blade * inside(self.top - z))

        hu = torch.lerp(hu, torch.tensor(self.blood) + 6 * uneven, inside(heart))
        for tubes, value in ((self.aorta, self.blood), (self.airways, -960.0)):
            for tube in tubes:
                hu = torch.lerp(hu, torch.tensor(value), _share_inside(tube, x, y, z, edge))

        # Lungs, denser at the back; vessels are shown where they lie in them.
        air = self.air + self.gravity * (y / 100) + 14 * uneven
        vessels = _share_inside(self.vessels, x, y, z, edge)
        hu = torch.lerp(hu, air + vessels * (self.blood - air), inside(lungs))

        # Spine: vertebrae with a dense rim, discs, the canal and its arch, the spinous processes.
        sy = self.spine_y
        body = (1 - ((x / 19) ** 2 + ((y - sy) / 15) ** 2).sqrt()) * 16
        disc = inside(2.5 - periodic(z + self.vertebra_phase, 25.0))
        spongy = 0.45 * self.bone + 0.6 * self.bone * torch.exp(-((body / 2) ** 2))
        hu = torch.lerp(hu, spongy + disc * (85 - spongy), inside(body))
        canal = (x**2 + (y - sy - 24) ** 2).sqrt()
        process = torch.minimum(4 - x.abs(), torch.minimum(y - sy - 33, sy + 52 - y))
        process = torch.minimum(process, 8 - periodic(z + self.vertebra_phase + 0.4 * y, 25.0))
        wings = torch.minimum(5 - (y - sy - 22 - 0.1 * x.abs()).abs(), torch.minimum(x.abs() - 10, 36 - x.abs()))
        wings = torch.minimum(wings, 6 - periodic(z + self.vertebra_phase, 25.0))
        arch = torch.maximum(torch.minimum(canal - 9, 13.5 - canal), torch.maximum(process, wings))
        hu = torch.lerp(hu, torch.tensor(0.9 * self.bone), inside(arch))
        hu = torch.lerp(hu, torch.tensor(25.0), inside(9 - canal))
        hu = torch.lerp(torch.tensor(-1000.0), hu, inside(skin))

        for centre, radius, density in self.decoys:
            distance = ((x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2).sqrt()
            hu = torch.lerp(hu, torch.tensor(density), inside(radius - distance))

        mask = torch.zeros(hu.shape, dtype=torch.uint8)
        mask[lungs > 0] = LABELS.index("lungs")
        mask[(heart > 0) & (z > dome)] = LABELS.index("heart")
        for nodule in nodules:
            depth = nodule.depth(x, y, z)
            hu = torch.lerp(hu, torch.tensor(nodule.density), inside(depth))
            mask[depth > 0] = LABELS.index("nodule")
        return hu, mask


def _oval(x: Tensor, y: Tensor) -> Tensor:
    """1 on a rounded rectangle that reaches 1 on both axes, and in proportion elsewhere: between circle and square."""
    x, y = x * x, y * y
    return (x * x + y * y + 1.2 * x * y).sqrt().sqrt()


def _vessel_tree(rng: np.random.Generator) -> _Tubes:
    """Branching vessels of both lungs. Each forks `GENERATIONS` − 1 times; what leaves the lungs is not shown."""
    n = 2 * STEMS
    side = np.repeat([1.0, -1.0], STEMS)
    at = np.stack([side * 34, rng.normal(8, 5, n), rng.normal(6, 10, n)], 1)
    tilt = np.tile(np.linspace(-1.3, 1.25, STEMS), 2) + rng.normal(0, 0.12, n)  # from down to up
    heading = np.stack([side * np.cos(tilt), rng.normal(0, 0.6, n), np.sin(tilt)], 1)
    radius, length = rng.uniform(3.6, 5.2, n), rng.uniform(26, 40, n)
    pieces = []
    for _ in range(GENERATIONS):
        along = heading / np.linalg.norm(heading, axis=1, keepdims=True) * length[:, None]
        bend = rng.normal(0, 0.22, heading.shape) * length[:, None]
        pieces.append((at, along, bend, radius))
        at = np.repeat(at + along + bend, 2, 0)
        heading = along + 2 * bend
        heading = np.repeat(heading / np.linalg.norm(heading, axis=1, keepdims=True), 2, 0)
        # The two children part in opposite directions.
        apart = np.repeat(rng.normal(0, 0.5, (len(radius), 3)), 2, 0)
        apart[1::2] *= -rng.uniform(0.4, 1.2, (len(radius), 1))
        heading = heading + apart + rng.normal(0, 0.12, heading.shape)
        radius = np.repeat(radius, 2) * rng.uniform(0.6, 0.8, 2 * len(radius))
        length = np.repeat(length, 2) * rng.uniform(0.65, 0.95, 2 * len(length))
    return _Tubes(*map(np.concatenate, zip(*pieces)), taper=0.8)


def _share_inside(tubes: _Tubes, x: Tensor, y: Tensor, z: Tensor, edge: float) -> Tensor:
    """The share of each voxel that lies in tubes, (X, Y, Z); thinner tubes than a voxel are paler.

    Args:
        x, y, z: evenly spaced coordinates of the grid.
        edge: side of a voxel in mm.
    """
    axes = [axis.flatten() for axis in (x, y, z)]
    shape = torch.tensor([len(axis) for axis in axes])
    step = torch.stack([axis[1] - axis[0] if len(axis) > 1 else torch.tensor(edge) for axis in axes])
    first = torch.stack([axis[0] for axis in axes])
    # Balls a quarter of their radius apart make a tube that is smooth to 1 %.
    gap = max(edge / 2, float(tubes.radius.min()) * tubes.taper / 4)
    points, radii = map(torch.from_numpy, tubes.balls(gap))
    drawn = radii.clamp(min=0.6 * edge)
    reach = torch.ceil((drawn[:, None] + edge / 2) / step).long()  # (B, 3) voxels
    place = ((points - first) / step).round().long()
    rows = ((place >= -reach) & (place < shape + reach)).all(1)
    points, drawn, strength = points[rows], drawn[rows], ((radii / drawn) ** 2)[rows]
    reach, place = reach[rows], place[rows]
    cover = torch.zeros(int(shape.prod()))
    # Balls of the same reach share a neighbourhood of offsets.
    for block in reach.unique(dim=0):
        offsets = torch.cartesian_prod(*(torch.arange(-r, r + 1) for r in block.tolist()))  # (O, 3)
        same = torch.nonzero((reach == block).all(1))[:, 0]
        for rows in same.split(max(1, VOXELS_PER_SLAB // len(offsets))):
            squared, flat, valid = 0.0, 0, True
            for axis in range(3):
                voxel = place[rows, None, axis] + offsets[:, axis]  # (R, O)
                squared = squared + (first[axis] + voxel * step[axis] - points[rows, None, axis]) ** 2
                flat = flat * shape[axis] + voxel
                valid = valid & (voxel >= 0) & (voxel < shape[axis])
            share = ((drawn[rows, None] - squared.sqrt()) / edge + 0.5).clamp(0, 1) * strength[rows, None]
            valid = valid & (share > 0)
            cover.scatter_reduce_(0, flat[valid], share[valid], "amax")
    return cover.view(*shape.tolist())


# LUNA16-like folders -------------------------------------------------------------------------------


def write_luna(
    folder: Path,
    count: int,
    shape: tuple[int, int, int] = (512, 512, 220),
    seed: int = 0,
    false_candidates: int = 12,
) -> list[str]:
    """Write generated CTs as LUNA16 has them: `subset0` to `subset9` with `<uid>.mhd` and `.raw`, and two tables.

    Each shows a whole chest, so that the spacing follows from `shape`: about 0.7 × 0.7 × 1.3 mm for the default.
    What lies outside of the scanner's round field is −3024. Scans have none to three nodules of 4 to 15 mm radius.
    `candidates.csv` (seriesuid, coordX, coordY, coordZ in mm, class) has each of them, found within a third of
    its radius, and places on vessels with class 0; `annotations.csv` has centres and diameters.

    Args:
        folder: made where it does not exist.
        count: number of CTs; CT i goes to subset i mod 10.
        shape: voxels along x, y, z.
        seed: number of the series.
        false_candidates: places on vessels per CT.

    Returns:
        The series' uids.

    Raises:
        InputError: where `folder` has a `candidates.csv` already.
    """
    import SimpleITK as sitk

    folder = Path(folder)
    if (folder / "candidates.csv").exists():
        raise InputError(f"{folder}: has a candidates.csv already; choose a new folder")
    uids, candidates, annotations = [], [], []
    for i in range(count):
        rng = np.random.default_rng([seed, i, 2])
        uid = f"2.25.{int(rng.integers(1 << 62)) * (1 << 60) + int(rng.integers(1 << 60))}"  # a UUID's root
        size = np.array([rng.uniform(350, 375)] * 2 + [rng.uniform(280, 300)])
        spacing = (size / shape).round(4)
        scan = scan_chest(rng, shape, tuple(spacing), int(rng.integers(4)))
        x, y = (np.arange(n) - (n - 1) / 2 for n in shape[:2])
        outside = (x[:, None] / shape[0]) ** 2 + (y / shape[1]) ** 2 > 0.25
        scan.hu[outside] = FIELD_PADDING
        origin = rng.uniform([-200, -200, -400], [-150, -150, -100]).round(3)  # of the first voxel's centre, mm
        middle = origin + (np.array(shape) - 1) / 2 * spacing
        image = sitk.GetImageFromArray(np.ascontiguousarray(scan.hu.transpose(2, 1, 0)))
        image.SetSpacing(spacing.tolist())
        image.SetOrigin(origin.tolist())
        write_image(image, folder / f"subset{i % 10}" / f"{uid}.mhd")
        for *centre, radius in scan.nodules:
            annotations.append((uid, *(centre + middle), 2 * radius))
            candidates.append((uid, *(centre + middle + rng.uniform(-1, 1, 3) * radius / 3 / 3**0.5), 1))
        apart = np.linalg.norm(scan.vessels[:, None] - scan.nodules[None, :, :3], axis=2) - scan.nodules[:, 3]
        free = scan.vessels[(apart > 12).all(1)]
        for place in rng.permutation(free)[:false_candidates]:
            candidates.append((uid, *(place + middle), 0))
        uids.append(uid)
    # Written last: a folder with the table is complete.
    _write_table(folder / "annotations.csv", "seriesuid,coordX,coordY,coordZ,diameter_mm", annotations)
    _write_table(folder / "candidates.csv", "seriesuid,coordX,coordY,coordZ,class", candidates)
    return uids


def _write_table(path: Path, header: str, rows: list[tuple]) -> None:
    """Rows of a uid and numbers as CSV."""
    lines = [",".join([uid, *(f"{v:.4f}" if isinstance(v, float) else str(v) for v in rest)]) for uid, *rest in rows]
    write_text(path, "\n".join([header, *lines]) + "\n")
