"""Operations on batches of any number of spatial dimensions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from medssl.views.draws import Columns, random_field

BEZIER_POINTS = 1000  # at which a random tone curve is evaluated
BEZIER_STEPS = 1024  # of its table
SHUFFLED = (10_000, (64, 64, 32))  # windows of local shuffling, and the volume that has so many (published code)


def transform_code(flips: Tensor, turns: Tensor) -> Tensor:
    """(N, axes) bool and (N,) int64 in 0…3 → (N, axes + 4) float32: the flips, then the right angles one-hot."""
    return torch.cat([flips.float(), F.one_hot(turns, 4).float()], 1)


def draw_transform(draws: Columns, axes: int) -> tuple[Tensor, Tensor]:
    """Flips (N, axes) bool, each with chance ½, and right angles (N,) int64 in 0…3. Takes axes + 1 columns."""
    return draws.take(axes) < 0.5, draws.take(1, 0, 4)[:, 0].long()


def transform(x: Tensor, flips: Tensor, turns: Tensor) -> Tensor:
    """Mirror and turn each image or volume by its own code (PCRL, arXiv 2109.04379, §3.2).

    Args:
        x: (N, C, *S), as long along the first axis of S as along the second.
        flips: (N, axes) bool, which axes of S are mirrored, one after the other.
        turns: (N,) int64 right angles from the first axis of S to the second, after the flips.
    """
    for axis, mirrored in enumerate(flips.T):
        chosen = mirrored.to(x.device, non_blocking=True).view(-1, *[1] * (x.ndim - 1))
        x = torch.where(chosen, x.flip(2 + axis), x)
    out = x.clone()
    for k in (1, 2, 3):
        rows = torch.nonzero(turns == k)[:, 0].to(x.device, non_blocking=True)
        out[rows] = torch.rot90(x[rows], k, (2, 3))
    return out


def add_transforms(out: dict[str, Tensor], draws: Columns, axes: int) -> dict[str, Tensor]:
    """Add PCRL's codes of both views, "code1", "code2" (B, axes + 4), and the views transformed by them, "turned1",
    "turned2". `draws` are the numbers of both views' rows, view-major; axes + 1 columns are taken."""
    views = torch.cat([out["view1"], out["view2"]])
    flips, turns = draw_transform(draws, axes)
    for name, rows in (
        ("code", transform_code(flips, turns).to(views.device)),
        ("turned", transform(views, flips, turns)),
    ):
        out[f"{name}1"], out[f"{name}2"] = rows.chunk(2)
    return out


def apply_tones(x: Tensor, table: Tensor) -> Tensor:
    """Put each image through a tone curve of its own, one for all its channels.

    Args:
        x: (N, C, *S) in [0, 1].
        table: (N, T + 1) the curves at 0, 1/T, …, 1, on the CPU; linear in between.
    """
    steps, table = table.shape[1] - 1, table.to(x.device, non_blocking=True)
    place = x.reshape(len(x), -1) * steps
    left = place.long().clamp(0, steps - 1)
    return torch.lerp(table.gather(1, left), table.gather(1, left + 1), place - left).view_as(x)


def random_tones(x: Tensor, draws: Columns, p: float = 0.9, falling: float = 0.5) -> Tensor:
    """Models Genesis' non-linear transformation of (N, C, *S) in [0, 1], with chance `p`: a cubic Bézier curve from
    (0, 0) to (1, 1) whose two other control points are uniform in the unit square; with chance `falling` it runs from
    1 down to 0. Takes 6 columns."""
    n = len(x)
    changed, falls = draws.take(1) < p, draws.take(1) < falling
    t = torch.linspace(0, 1, BEZIER_POINTS)
    basis = torch.stack([3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2])  # (2, P); the first point is 0, the last below
    xs, ys = (draws.take(2) @ basis + t**3 for _ in range(2))  # (N, P), which rise: the points lie in the unit square
    grid = torch.linspace(0, 1, BEZIER_STEPS + 1).expand(n, -1).contiguous()
    right = torch.searchsorted(xs, grid).clamp(1, BEZIER_POINTS - 1)
    x0, x1, y0, y1 = (values.gather(1, right - back) for values in (xs, ys) for back in (1, 0))
    rising = torch.lerp(y0, y1, ((grid - x0) / (x1 - x0).clamp(min=1e-9)).clamp(0, 1))
    table = torch.where(falls, rising.flip(1), rising)
    return apply_tones(x, torch.where(changed, table, grid))


def window_share(shape: Sequence[int]) -> float:
    """The share of an image or volume that a random window of local shuffling has."""
    sides = [(1 + max(n // 10, 1)) / 2 for n in shape]  # 1 to a tenth, on average
    return math.prod(sides) / math.prod(shape)


def window_count(shape: Sequence[int]) -> int:
    """Windows of a volume, as published, and of an image, as many as cover it as often as they cover such a volume."""
    count, published = SHUFFLED
    return count if len(shape) == 3 else round(count * window_share(published) / window_share(shape))


def shuffle_map(shape: Sequence[int], generator: torch.Generator, count: int | None = None) -> Tensor:
    """Where each voxel (pixel) of a locally shuffled volume (image) comes from: (V,) int64 flat indices.

    Windows with sides of 1 to a tenth of the volume's are shuffled one after the other, all reading the original. So
    only the last window over a voxel matters, and no window has to wait for another.

    Args:
        shape: of the volume, whose product is V. count: of the windows; `window_count` unless given.
    """
    device, axes, count = generator.device, len(shape), count or window_count(shape)
    dims = torch.tensor(shape, device=device)
    numbers = torch.rand(count, 2 * axes, generator=generator, device=device)
    side = 1 + (numbers[:, :axes] * (dims // 10).clamp(min=1)).long()
    start = (numbers[:, axes:] * (dims - side + 1)).long()
    voxels = side.prod(1)
    window = torch.repeat_interleave(voxels)  # (T,) window of each entry
    entry = torch.arange(len(window), device=device)
    rest, place, stride = entry - (voxels.cumsum(0) - voxels)[window], torch.zeros_like(entry), 1
    for axis in reversed(range(axes)):
        length = side[window, axis]
        place += (start[window, axis] + rest % length) * stride
        rest, stride = rest // length, stride * shape[axis]
    # Sorting by window and then by chance permutes the entries of every window.
    keys = window + torch.rand(len(window), generator=generator, device=device, dtype=torch.float64)
    shuffled = place[keys.argsort()]
    last = torch.full((stride,), -1, device=device)
    last = last.scatter_reduce(0, place, entry, "amax")
    return torch.where(last >= 0, shuffled[last.clamp(min=0)], torch.arange(len(last), device=device))


def local_shuffling(x: Tensor, draws: Columns, seeds: Sequence[int], p: float = 0.5) -> Tensor:
    """Models Genesis' and PCRL's local pixel shuffling of (N, C, *S) with chance `p`; all channels alike. Takes 1
    column. `seeds` are of the N images."""
    chosen = torch.nonzero(draws.take(1)[:, 0] < p)[:, 0].tolist()
    generator = torch.Generator(x.device)
    out = x.clone() if chosen else x
    for i in chosen:
        generator.manual_seed(seeds[i])
        out[i] = x[i].flatten(1)[:, shuffle_map(tuple(x.shape[2:]), generator)].view(x.shape[1:])
    return out


def painting(x: Tensor, draws: Columns, seeds: Sequence[int], p: float = 0.9, inner: float = 0.2) -> Tensor:
    """Models Genesis' and PCRL's in-painting (share `inner`) or out-painting, with chance `p`.

    In-painting puts uniform noise into up to five blocks with sides of a sixth to a third of the image's;
    out-painting leaves one to five windows, with sides of about 3/7 to 4/7, of an image of noise. A further block
    has chance .95, and none follows the first that is left out. All keep 3 voxels from the border.

    Args:
        x: (N, C, *S) in [0, 1].
        draws: 7 + 10 columns for each axis of S are taken.
        seeds: of the N images, for their noise.
    """
    n, _, *shape = x.shape
    dims, axes = torch.tensor(shape), len(shape)
    painted, inside = draws.take(1)[:, 0] < p, draws.take(1) < inner  # (N,), (N, 1)
    active = draws.take(5) < 0.95
    active[:, 0] |= ~inside[:, 0]  # one window of the image always stays
    active = active.int().cumprod(1).bool()
    within = inside[..., None]
    low = torch.where(within, dims // 6, dims - 4 * dims // 7)  # (N, 1, axes)
    high = torch.where(within, dims // 3, dims - 3 * dims // 7)
    side = low + (draws.take(5 * axes).view(n, 5, axes) * (high - low + 1)).floor()  # (N, 5, axes)
    start = 3 + (draws.take(5 * axes).view(n, 5, axes) * (dims - side - 5).clamp(min=1)).floor()
    table = torch.stack([start, start + side], 3)
    table[~active] = 0
    table = table.to(x.device, non_blocking=True)
    spans = []  # (N, 5, length) for each axis: whether a block is there
    for axis, length in enumerate(shape):
        i = torch.arange(length, device=x.device)
        spans.append(((i >= table[:, :, axis, :1]) & (i < table[:, :, axis, 1:])).to(x.dtype))
    plane = spans[0]  # (N, 5, all axes but the last)
    for span in spans[1:-1]:
        plane = (plane[..., None] * span[:, :, None]).flatten(2)
    blocks = torch.bmm(plane.transpose(1, 2), spans[-1]).view(n, 1, *shape) > 0
    # In-painting: noise in the blocks. Out-painting: noise outside of them. Neither: noise nowhere.
    inside, painted = (t.view(-1, *[1] * (axes + 1)).to(x.device, non_blocking=True) for t in (inside, painted))
    return torch.where((blocks == inside) & painted, random_field(x, seeds, Tensor.uniform_), x)


def hidden_count(grid: Sequence[int], ratio: float) -> int:
    """How many patches of a grid are hidden where `ratio` of them shall be."""
    return round(ratio * math.prod(grid))


def visible_patches(draws: Columns, grid: Sequence[int], ratio: float) -> Tensor:
    """Which patches of each image are seen, as many of each: (N, 1, *grid) bool on the CPU. Takes a column a patch."""
    places = draws.take(math.prod(grid)).argsort(1).argsort(1)  # of each patch in the image's random order
    return (places >= hidden_count(grid, ratio)).view(-1, 1, *grid)


@dataclass(frozen=True)
class GenesisChanges:
    """What Models Genesis changes of images or volumes (arXiv 1908.06912, §3): shuffled locally, put through a random
    tone curve, painted, each with a chance of its own.

    Args:
        tones, shuffle, paint: chances of each.
        falling: share of the curves that turn dark to light. inner: share of in-painting, the rest is out-painting.
    """

    tones: float = 0.9
    falling: float = 0.5
    shuffle: float = 0.5
    paint: float = 0.9
    inner: float = 0.2

    @staticmethod
    def columns(axes: int) -> int:
        """Random columns that are taken: for shuffling, tones and painting."""
        return 1 + 6 + 7 + 10 * axes

    def __call__(self, x: Tensor, columns: Columns, seeds: Sequence[Sequence[int]]) -> Tensor:
        """(N, C, *S) in [0, 1] → the same; `seeds` are two lists of N, of shuffling and of painting."""
        x = local_shuffling(x, columns, seeds[0], self.shuffle)
        x = random_tones(x, columns, self.tones, self.falling)
        return painting(x, columns, seeds[1], self.paint, self.inner)
