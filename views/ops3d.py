"""Operations on batches of volumes: batched, per-sample random augmentation on the training device.

Volumes have axes x, y, z. Their coordinates are the cube [−1, 1]³ whatever their shape; voxel centres lie at
(2i + 1) / n − 1. Crop boxes are (start x, y, z, side x, y, z) in voxels.

The published 3D code augments with torchio's transforms at their defaults, each applied to every sample:
`RandomFlip` (x axis, chance ½), `RandomAffine` (scales 0.9–1.1 and rotations ±10° per axis, padded with the
volume's minimum), `RandomBlur` (σ 0–2 voxels per axis, truncated at 4σ, mirrored borders), `RandomNoise`
(σ 0–0.25), `RandomGamma` (exponents e^±0.3, sign kept), `RandomSwap` (100 swaps; the authors' patches are
8×4×4). Their ranges are the defaults here. One difference: what an affine map brings in is 0, air in CT.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medssl.views.draws import Columns, random_field

Shape = tuple[int, int, int]
Size = tuple[float, float, float]

CUBE_SIZE, LOCAL_CUBE_SIZE = (64, 64, 32), (16, 16, 16)  # voxels of large and of local views: PCRLv2's
# Crop sizes in mm of PCRLv2's and PCRL's cubes (arXiv 2301.00772, 2109.04379 and their published preprocessing).
GLOBAL_SIZES = ((96, 96, 64), (96, 96, 96), (112, 112, 64), (64, 64, 32))
PCRL_SIZES = ((64, 64, 32), (96, 96, 48), (96, 96, 96), (32, 32, 16), (112, 112, 64))
LOCAL_SIZES = ((32, 32, 16), (16, 16, 16), (32, 32, 32), (8, 8, 8))
MIN_IOU, PCRL_MIN_IOU = 0.3, 0.25  # overlap above which two crops are a pair
CANDIDATES = 32  # pairs of boxes tried at once; all fail in one of several hundred volumes


def affine(
    extent: Sequence[float] | Tensor,
    flip: Tensor,
    scales: Tensor | None = None,
    degrees: Tensor | None = None,
    turns: Tensor | None = None,
) -> Tensor:
    """The map from output to input coordinates of: flip, turn by right angles, rotate, enlarge.

    Args:
        extent: (3,) or (N, 3) lengths of the volume along x, y, z, in the unit in which rotations are rigid.
        flip: (N, 3) bool, which axes are mirrored.
        scales: (N, 3) factors; structures look larger above 1.
        degrees: (N, 3) rotations about the x, y and z axis through the centre (R = R_z R_x R_y, as ITK's).
        turns: (N,) int64 right angles about z, from the x axis to the y axis, in volumes square in x and y.

    Returns:
        (N, 3, 4) matrices for `sample`.
    """
    n = len(flip)
    linear = torch.eye(3).repeat(n, 1, 1)
    if degrees is not None:
        cos, sin = torch.cos(torch.deg2rad(degrees)), torch.sin(torch.deg2rad(degrees))
        rotations = []
        for axis in range(3):
            a, b = (axis + 1) % 3, (axis + 2) % 3
            r = torch.eye(3).repeat(n, 1, 1)
            r[:, a, a] = r[:, b, b] = cos[:, axis]
            r[:, a, b], r[:, b, a] = -sin[:, axis], sin[:, axis]
            rotations.append(r)
        linear = (rotations[2] @ rotations[0] @ rotations[1]).transpose(1, 2)  # its inverse
    if scales is not None:
        linear = linear / scales[:, None]
    extent = torch.as_tensor(extent, dtype=torch.float32).expand(n, 3)
    linear = linear * extent[:, None] / extent[:, :, None]
    if turns is not None:
        c, s = (torch.tensor(t)[turns] for t in ([1.0, 0.0, -1.0, 0.0], [0.0, 1.0, 0.0, -1.0]))
        back = torch.zeros(n, 3, 3)
        back[:, 0, 0], back[:, 0, 1], back[:, 1, 0], back[:, 1, 1], back[:, 2, 2] = c, s, -s, c, 1
        linear = back @ linear
    linear = linear * (1 - 2 * flip.float())[:, :, None]
    return torch.cat([linear, torch.zeros(n, 3, 1)], 2)


def random_affine(
    draws: Columns,
    extent: Sequence[float] | Tensor,
    flips: Sequence[int] = (0, 1, 2),
    scale: float = 0.1,
    degrees: float = 10.0,
    turns: bool = False,
) -> Tensor:
    """Maps (N, 3, 4): flips of the axes `flips` with chance ½, right-angle turns, scales 1 ± `scale` and rotations
    of ± `degrees` per axis. Takes 10 columns."""
    n = len(draws.numbers)
    flip = torch.zeros(n, 3, dtype=torch.bool)
    flip[:, list(flips)] = draws.take(3)[:, list(flips)] < 0.5
    k = draws.take(1, 0, 4)[:, 0].long()
    factors, angles = draws.take(3, 1 - scale, 1 + scale), draws.take(3, -degrees, degrees)
    return affine(extent, flip, factors if scale else None, angles if degrees else None, k if turns else None)


def sample(volumes: Tensor, theta: Tensor, out: Shape | None = None, nearest: bool = False) -> Tensor:
    """Resample volumes; what lies outside of them is 0.

    Args:
        volumes: (N, C, X, Y, Z) float.
        theta: (N, 3, 4) maps from output to input coordinates, on the CPU.
        out: shape of the result; by default the volumes' own.
        nearest: take the nearest voxel, for labels.
    """
    out = tuple(volumes.shape[2:]) if out is None else out
    # grid_sample names the last axis first. Sums by component are faster than affine_grid's product over voxels, and
    # grid_sample reads them in this order as well.
    a = theta.flip(1).to(volumes.device, non_blocking=True)[..., None, None, None]  # (N, 3, 4, 1, 1, 1)
    x, y, z = ((torch.arange(n, device=volumes.device) * 2 + 1) / n - 1 for n in out)
    grid = (a[:, :, 3] + a[:, :, 0] * x.view(-1, 1, 1) + a[:, :, 1] * y.view(-1, 1)) + a[:, :, 2] * z
    grid = grid.permute(0, 2, 3, 4, 1)
    return F.grid_sample(volumes, grid, "nearest" if nearest else "bilinear", "zeros", align_corners=False)


def windows(volumes: Sequence[Tensor], start: Tensor, side: Sequence[int]) -> Tensor:
    """Cut a box out of each volume, 0 where it sticks out.

    Args:
        volumes: N volumes (X, Y, Z) of any shapes and type.
        start: (N, 3) int64 first voxel, on the CPU; may be negative.
        side: shape of the boxes.

    Returns:
        (N, *side) float32.
    """
    boxes = torch.zeros(len(volumes), *side, device=volumes[0].device)
    for box, volume, first in zip(boxes, volumes, start.tolist()):
        low = [max(f, 0) for f in first]
        high = [max(min(f + s, n), b) for f, s, n, b in zip(first, side, volume.shape, low)]
        target = tuple(slice(b - f, t - f) for b, t, f in zip(low, high, first))
        box[target] = volume[tuple(slice(b, t) for b, t in zip(low, high))]
    return boxes


def crop_resize(volumes: Sequence[Tensor], boxes: Tensor, out: Shape) -> Tensor:
    """Cut boxes out of volumes and resize them, linearly and anti-aliased.

    Each axis is one product with a banded matrix: a triangle filter as wide as the output's voxels where it
    shrinks (as torch's `interpolate(antialias=True)`), linear interpolation where it grows. Voxels around the box
    take part; the volume's border is repeated.

    Args:
        volumes: N volumes (X, Y, Z), of any shapes.
        boxes: (N, 6) start and side in voxels, on the CPU.
        out: shape of the result.

    Returns:
        (N, 1, *out) float32.
    """
    device = volumes[0].device
    shapes = torch.tensor([volume.shape for volume in volumes])  # (N, 3)
    start, side = boxes.double().split(3, 1)
    steps = side / torch.tensor(out)
    reach = steps.clamp(min=1)
    # Voxel centres within reach of the first and the last output centre.
    low = (start + steps / 2 - reach - 0.5).floor().long().clamp(min=0).minimum(shapes - 1)
    high = (start + side - steps / 2 + reach + 0.5).ceil().long().maximum(low + 1).minimum(shapes)
    widest = (high - low).amax(0).tolist()
    x = windows(volumes, low, widest)
    for axis, (n, w) in enumerate(zip(out, widest)):
        centre = start[:, axis, None] + (torch.arange(n) + 0.5) * steps[:, axis, None]  # (N, n)
        # Where a box passes the volume's border, the border's voxels are repeated.
        centre = torch.minimum(centre.clamp(min=0.5), shapes[:, axis, None] - 0.5)
        voxel = low[:, axis, None] + torch.arange(w)  # (N, w)
        weights = 1 - ((voxel + 0.5)[:, None] - centre[:, :, None]).abs() / reach[:, axis, None, None]
        weights = weights.clamp(min=0) * (voxel < shapes[:, axis, None])[:, None]
        weights = (weights / weights.sum(2, keepdim=True)).float().to(device, non_blocking=True)  # (N, n, w)
        x = _along_first(x, weights)
    return x[:, None]


def _along_first(x: Tensor, matrices: Tensor) -> Tensor:
    """(N, a, b, c) times (N, n, a) → (N, b, c, n): three calls treat all axes and restore their order, uncopied."""
    n, a, b, c = x.shape
    return torch.bmm(x.reshape(n, a, b * c).transpose(1, 2), matrices.transpose(1, 2)).view(n, b, c, -1)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes (…, 6) of start and side."""
    low = torch.maximum(a[..., :3], b[..., :3])
    high = torch.minimum(a[..., :3] + a[..., 3:], b[..., :3] + b[..., 3:])
    shared = (high - low).clamp(min=0).prod(-1)
    return shared / (a[..., 3:].prod(-1) + b[..., 3:].prod(-1) - shared)


def random_boxes(
    draws: Columns,
    size: Tensor,
    voxels: Tensor,
    locals_: int,
    crops: Sequence[Size] = GLOBAL_SIZES,
    min_iou: float = MIN_IOU,
    smalls: Sequence[Size] = LOCAL_SIZES,
    exact: bool = False,
) -> tuple[Tensor, Tensor]:
    """Crops of whole volumes: two large boxes that overlap, and small ones around them.

    Unless sizes are exact, those of a volume that is less than 1.25 times as long as the longest large box shrink by as
    much, per axis, so that a volume whose spacing is not known is cropped in proportion: with the published sizes,
    volumes below 140 × 140 × 120 mm.

    Args:
        draws: 8 × 32 + 4 × locals_ columns are taken.
        size: (N, 3) extent of the volumes in mm.
        voxels: (N, 3) their shapes. No box is less than 4 voxels long, or longer than its volume.
        locals_: small boxes V per volume.
        crops: sizes of the large boxes in mm, each as likely.
        min_iou: intersection over union that the large boxes exceed. Where none of 32 tries does, the best is taken.
        smalls: sizes of the small boxes in mm, each as likely.
        exact: whether sizes are meant as they are, in small volumes, too.

    Returns:
        large (N, 2, 6) and small (N, V, 6) boxes: start and side, in voxels.
    """
    n, k = len(size), CANDIDATES
    spacing = size / voxels
    table, small = (torch.tensor(sizes, dtype=torch.float32) for sizes in (crops, smalls))
    shrink = torch.ones(n, 3) if exact else (size / (1.25 * table.amax(0))).clamp(max=1)
    least = torch.minimum(4 * spacing, size)
    which = draws.take(2 * k, 0, len(table)).long().view(n, k, 2)
    sides = torch.maximum(table[which] * shrink[:, None, None], least[:, None, None])
    sides = torch.minimum(sides, size[:, None, None])  # (N, K, 2, 3)
    first, second = sides.unbind(2)
    free = size[:, None]
    place = draws.take(6 * k).view(n, k, 2, 3)
    start = place[:, :, 0] * (free - first)
    # An axis must overlap by this much even where the others overlap fully; nothing else needs to be tried.
    shortest = torch.minimum(first, second)
    needed = min_iou / (1 + min_iou) * (first.prod(2) + second.prod(2)) / shortest.prod(2)  # share of `shortest`
    overlap = needed.clamp(max=1)[..., None] * shortest
    low = (start - second + overlap).clamp(min=0)
    high = torch.minimum(start + first - overlap, free - second)
    other = low + place[:, :, 1] * (high - low).clamp(min=0)
    other = torch.minimum(other, free - second).clamp(min=0)
    pairs = torch.stack([torch.cat([start, first], 2), torch.cat([other, second], 2)], 2)  # (N, K, 2, 6)
    agreement = iou(pairs[:, :, 0], pairs[:, :, 1])
    fits = agreement > min_iou
    chosen = torch.where(fits.any(1), fits.float().argmax(1), agreement.argmax(1))
    large = pairs[torch.arange(n), chosen]

    # Small boxes start in the two boxes' common hull, 3 mm wider (shrunken as the sizes), and stay in the volume.
    which = draws.take(locals_, 0, len(small)).long()  # (N, V)
    side = torch.minimum(torch.maximum(small[which] * shrink[:, None], least[:, None]), size[:, None])
    low = large[..., :3].amin(1) - 3 * shrink
    high = (large[..., :3] + large[..., 3:]).amax(1) + 3 * shrink
    place = low[:, None] + draws.take(3 * locals_).view(n, locals_, 3) * (high - low)[:, None]
    place = torch.minimum(place, size[:, None] - side).clamp(min=0)
    to_voxels = torch.cat([spacing, spacing], 1)[:, None]
    return large / to_voxels, torch.cat([place, side], 2) / to_voxels


def gaussian_matrix(n: int, sigmas: Tensor) -> Tensor:
    """(M,) deviations in voxels → (M, n, n) matrices that blur n voxels: truncated at 4σ, with mirrored borders."""
    sigmas, device = sigmas.clamp(min=1e-3)[:, None], sigmas.device
    distance = torch.arange(4 * n, device=device)
    kernel = torch.exp(-(distance**2) / (2 * sigmas**2)) * (distance <= (4 * sigmas + 0.5).floor())
    i = torch.arange(n, device=device)
    images = torch.stack([source + 2 * n * k for k in (-1, 0, 1) for source in (i, -1 - i)])  # (6, n)
    weights = kernel[:, (images[:, None] - i[:, None]).abs()].sum(1)  # (M, n, n)
    return weights / weights.sum(2, keepdim=True)


def blur(x: Tensor, sigmas: Tensor) -> Tensor:
    """Gaussian blur of (N, 1, X, Y, Z) with deviations (N, 3) in voxels, as scipy's `gaussian_filter`."""
    y, sigmas = x[:, 0], sigmas.to(x.device, non_blocking=True)
    for axis, n in enumerate(x.shape[2:]):
        y = _along_first(y, gaussian_matrix(n, sigmas[:, axis]))
    return y[:, None]


def add_noise_(x: Tensor, std: Tensor, seeds: Sequence[int]) -> Tensor:
    """Add normal noise of deviation `std` (V·N, 1) to (V·N, 1, X, Y, Z), in place; `seeds` are those of N images."""
    std = std.view(-1, 1, 1, 1, 1).to(x.device, non_blocking=True)
    return x.addcmul_(random_field(x, seeds), std)


def gamma_(x: Tensor, log_gamma: Tensor) -> Tensor:
    """sign(x) |x|^γ in place, with γ = exp(`log_gamma`) (N, 1): noise has made some values negative."""
    exponent = log_gamma.exp().view(-1, 1, 1, 1, 1).to(x.device, non_blocking=True)
    power = x.abs().pow_(exponent)
    return torch.copysign(power, x, out=x)


def z_normalise(x: Tensor) -> Tensor:
    """(N, C, X, Y, Z) to zero mean and unit deviation per sample and channel.

    A deviation below 1e-4 (a fifth of a Hounsfield unit) counts as 1e-4: a constant volume stays near 0.
    """
    centred = x - x.mean((2, 3, 4), keepdim=True)
    std = torch.linalg.vector_norm(centred, dim=(2, 3, 4), keepdim=True) / (x[0, 0].numel() - 1) ** 0.5
    return centred.div_(std.clamp(min=1e-4))


def swap_patches(x: Tensor, draws: Columns, swaps: int = 100, patch: Shape = (8, 4, 4)) -> Tensor:
    """Exchange two patches of a volume, `swaps` times one after the other, in place.

    Where the two patches overlap, the one written last is whole. All volumes swap at once, on indices that are
    prepared on the CPU; the voxels move once.

    Args:
        x: (N, 1, X, Y, Z).
        draws: 6 × swaps columns are taken.
        swaps: number of exchanges.
        patch: shape of the patches, cut where the volume is smaller.
    """
    n, _, *shape = x.shape
    patch = [min(p, s) for p, s in zip(patch, shape)]
    room = torch.tensor(shape) - torch.tensor(patch) + 1
    strides = torch.tensor([shape[1] * shape[2], shape[2], 1])
    corners = ((draws.take(6 * swaps).view(n, swaps, 2, 3) * room).long() * strides).sum(3)  # (N, swaps, 2)
    inside = torch.cartesian_prod(*map(torch.arange, patch)) @ strides  # (P,)
    volume = x[0].numel()
    corners = (corners + torch.arange(n)[:, None, None] * volume).permute(1, 2, 0)  # (swaps, 2, N)
    source = np.arange(n * volume, dtype=np.int32)
    for first, second in (corners[..., None] + inside).numpy():  # (N, P) each
        one, two = source[first], source[second]
        source[second] = one
        source[first] = two
    moved = np.flatnonzero(source != np.arange(n * volume, dtype=np.int32))
    table = torch.from_numpy(np.stack([moved, source[moved]])).to(x.device, non_blocking=True)
    flat = x.view(-1)
    flat[table[0]] = flat[table[1]]
    return x


def resize(volumes: Sequence[Tensor], out: Shape) -> Tensor:
    """Whole volumes (X, Y, Z), of any shapes, as (N, 1, *out); see `crop_resize`."""
    boxes = torch.tensor([[0.0, 0.0, 0.0, *volume.shape] for volume in volumes])
    return crop_resize(volumes, boxes, out)
