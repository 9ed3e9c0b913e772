"""Operations on batches of images: batched, per-sample random augmentation on the training device.

Coordinates: an image is the square [−1, 1]², x to the right and y down, whatever its height and width; a
crop box is (centre x, centre y, half width, half height) in these units, so (0, 0, 1, 1) is all of it.
"""

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medssl.views.draws import Columns
from medssl.views.ops import apply_tones


def random_resized_crop(
    draws: Columns, size: Tensor, scale: tuple[float, float], ratio: tuple[float, float] = (3 / 4, 4 / 3)
) -> Tensor:
    """Crop boxes distributed as torchvision's RandomResizedCrop, without its rounding to whole pixels.

    Args:
        draws: 22 columns are taken.
        size: (N, 2) original height and width in pixels.
        scale: range of the crop's share of the image's area.
        ratio: range of its width over its height in original pixels, log-uniform.

    Returns:
        (N, 4) boxes.
    """
    height, width = size[:, :1], size[:, 1:]
    area = height * width * draws.take(10, *scale)
    aspect = torch.exp(draws.take(10, math.log(ratio[0]), math.log(ratio[1])))
    w, h = torch.sqrt(area * aspect), torch.sqrt(area / aspect)  # (N, 10)
    fits = (w <= width) & (h <= height)
    first = fits.float().argmax(1, keepdim=True)  # the first try that fits, as in the sequential original
    w, h = w.gather(1, first), h.gather(1, first)
    # No try fits: the largest centred crop of an allowed aspect ratio.
    whole = width / height
    w_full = torch.minimum(width, height * ratio[1])
    h_full = torch.minimum(height, width / ratio[0])
    any_fits = fits.any(1, keepdim=True)
    w = torch.where(any_fits, w, torch.where(whole < ratio[0], width, w_full)) / width
    h = torch.where(any_fits, h, torch.where(whole > ratio[1], height, h_full)) / height
    place = draws.take(2, -1, 1)
    place = torch.where(any_fits, place, torch.zeros_like(place))
    return torch.cat([place[:, :1] * (1 - w), place[:, 1:] * (1 - h), w, h], 1)


def affine(box: Tensor, angle: Tensor | None = None, flip: Tensor | None = None) -> Tensor:
    """The map from output to image coordinates of: crop, resize to a square, rotate, flip left to right.

    Args:
        box: (N, 4) crop boxes.
        angle: (N,) degrees counter-clockwise, about the output's centre.
        flip: (N,) bool.

    Returns:
        (N, 2, 3) matrices for `sample`.
    """
    n = len(box)
    linear = torch.eye(2).repeat(n, 1, 1)
    if angle is not None:
        a = torch.deg2rad(angle)
        c, s = torch.cos(a), torch.sin(a)
        # The inverse rotation, in coordinates whose y axis points down.
        linear = torch.stack([torch.stack([c, -s], 1), torch.stack([s, c], 1)], 1)
    if flip is not None:
        linear = linear * torch.stack([1 - 2 * flip.float(), torch.ones(n)], 1)[:, None, :]
    linear = linear * box[:, 2:, None]  # rows: x by half width, y by half height
    return torch.cat([linear, box[:, :2, None]], 2)


def pyramid_levels(theta: Tensor, side: int, out: int) -> Tensor:
    """The pyramid level from which each view is sampled, (N,) int64.

    Level l is the image shrunk 2^l times, for any side. A view that steps over s texture pixels per output
    pixel uses the level where the step is between 1/√2 and √2 pixels: bilinear sampling there neither skips
    pixels nor blurs much.
    """
    step = theta[:, :, :2].norm(dim=1) * side / out  # length in texture pixels of one output pixel, x and y
    level = torch.log2(step.prod(1).sqrt()).round()
    deepest = 0
    while level_side(side, deepest + 1) >= 4:
        deepest += 1
    return level.clamp(0, deepest).long()


def level_side(side: int, level: int) -> int:
    """Pixels along a side of a pyramid level; where `side` is not divisible, the last sticks out of the image."""
    return -(-side // 2**level)


class Pyramid:
    """Images at the levels that views need, side by side in one atlas, so that one `grid_sample` reaches all.

    The first level lies at the left, the others in a column beside it.

    Args:
        images: (B, C, S, S) uint8 textures, or floats in [0, 1].
        low, high: the first and the last level.
    """

    def __init__(self, images: Tensor, low: int, high: int) -> None:
        self.side, self.low = images.shape[-1], low
        base = images.float().div_(255) if images.dtype == torch.uint8 else images
        for _ in range(low):
            base = self._halve(base)
        sides = [level_side(self.side, level) for level in range(low, high + 1)]
        # Left and top of each level, pixels
        self.places = [(0, 0), *((sides[0], sum(sides[1:i])) for i in range(1, len(sides)))]
        if high > low:
            atlas = base.new_empty(*base.shape[:2], max(sides[0], sum(sides[1:])), sides[0] + sides[1])
            for (left, top), s in zip(self.places, sides):
                base = self._halve(base) if left else base
                # The pixels between the levels are read with weight 0, which NaN in fresh memory would survive.
                atlas[..., top : top + s, left + s :] = 0
                atlas[..., top + s :, left : left + s] = 0
                atlas[..., top : top + s, left : left + s] = base
            base = atlas
        self.atlas = base

    @staticmethod
    def _halve(x: Tensor) -> Tensor:
        # An odd side's last pixel is averaged with a copy of itself, so that level l is exactly 2^l times smaller.
        return F.avg_pool2d(x, 2, ceil_mode=True)


def sample(images: Tensor | Pyramid, theta: Tensor, out: int, black_outside: bool = False) -> Tensor:
    """Cut views out of images, anti-aliased: where a view shrinks, the pyramid has averaged what it cannot show.

    Args:
        images: (B, C, S, S) uint8 textures or floats in [0, 1], or their pyramid.
        theta: (B, V, 2, 3) maps from output to image coordinates, on the CPU.
        out: side of the views in pixels.
        black_outside: what lies outside of the image is 0; otherwise the border is repeated.

    Returns:
        (V·B, C, out, out) float32 in [0, 1], view-major: the first B are view 1.
    """
    b, v = theta.shape[:2]
    side = images.side if isinstance(images, Pyramid) else images.shape[-1]
    level = pyramid_levels(theta.flatten(0, 1), side, out)
    if not isinstance(images, Pyramid):
        images = Pyramid(images, int(level.min()), int(level.max()))
    base, low, device = images.atlas, images.low, images.atlas.device

    # Where each view's level lies in the atlas, in the coordinates of grid_sample: the map to the atlas and the
    # level's borders become one small table, made on the CPU and moved once.
    extent = (side / 2.0**level).view(b, v, 1)  # pixels, not whole where the side is not divisible
    place = torch.tensor(images.places, dtype=torch.float32)[level - low].view(b, v, 2)
    shape = torch.tensor([base.shape[-1], base.shape[-2]], dtype=torch.float32)  # width and height of the atlas
    first = 2 * place / shape - 1  # (B, V, 2), as all of these
    last = first + 2 * extent / shape
    to_atlas = theta * (extent / shape)[..., None]
    to_atlas[..., 2] += (first + last) / 2
    table = torch.stack([*to_atlas.unbind(3), first, last, first + 1 / shape, last - 1 / shape], 3)
    a_x, a_y, a_1, first, last, low_edge, high_edge = table.to(device, non_blocking=True)[..., None, None].unbind(3)

    axis = (torch.arange(out, device=device) * 2 + 1) / out - 1  # output pixel centres
    xy = torch.addcmul(a_y * axis[:, None] + a_1, a_x, axis)  # (B, V, 2, out, out)
    inside = ((xy >= first) & (xy <= last)).all(2) if black_outside else None  # (B, V, out, out)
    # Clamping to the level's own outer pixel centres repeats its border, and keeps its neighbours out.
    xy = torch.clamp(xy, low_edge, high_edge)
    grid = xy.permute(0, 1, 3, 4, 2).reshape(b, v * out, out, 2)
    views = F.grid_sample(base, grid, align_corners=False, padding_mode="border").view(b, -1, v, out, out)
    if inside is not None:
        views.mul_(inside[:, None])
    return views.permute(2, 0, 1, 3, 4).reshape(v * b, -1, out, out)


def luminance(x: Tensor) -> Tensor:
    """(N, 3, H, W) → (N, 1, H, W), ITU-R 601 weights; grey images pass."""
    if x.shape[1] == 1:
        return x
    weights = torch.tensor([0.299, 0.587, 0.114], device=x.device, dtype=x.dtype)
    return (x * weights.view(1, 3, 1, 1)).sum(1, keepdim=True)


def adjust_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Rotate the hue of (N, 3, H, W) images in [0, 1] by (N,) turns."""
    top, which = x.max(1)
    chroma = top - x.amin(1)
    safe = torch.where(chroma > 0, chroma, torch.ones_like(chroma))
    r, g, b = x.unbind(1)
    sector = torch.stack([((g - b) / safe) % 6, (b - r) / safe + 2, (r - g) / safe + 4], 1)
    hue = sector.gather(1, which[:, None])[:, 0] + 6 * shift.view(-1, 1, 1)
    # Each channel is the value less the chroma times a trapezoid of the hue.
    k = (torch.tensor([5.0, 3.0, 1.0], device=x.device).view(1, 3, 1, 1) + hue[:, None]) % 6
    return top[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def color_jitter(
    x: Tensor,
    draws: Columns,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
    p: float = 1.0,
) -> Tensor:
    """torchvision's ColorJitter with factors and order of its own for every image.

    Args:
        x: (N, C, H, W) in [0, 1]; saturation and hue leave grey images alone.
        draws: 9 columns are taken.
        p: the chance that an image is jittered at all.
    """
    n, grey, device = len(x), x.shape[1] == 1, x.device
    order = draws.take(4).argsort(1)  # (N, 4): operation done in each round; 0 to 3 as in the arguments
    factors = torch.cat(
        [
            draws.take(1, max(0.0, 1 - brightness), 1 + brightness),
            draws.take(1, max(0.0, 1 - contrast), 1 + contrast),
            draws.take(1, max(0.0, 1 - saturation), 1 + saturation),
            draws.take(1, -hue, hue),
        ],
        1,
    )
    active = draws.take(1)[:, 0] < p
    factors[~active] = torch.tensor([1.0, 1.0, 1.0, 0.0])
    if grey:
        # Two of the four operations are the identity: keep the order of the other two.
        order = order[order < 2].view(n, 2)
    for operation in order.unbind(1):
        # Brightness, contrast and saturation blend with black, with the mean, with the image's own grey.
        factor = factors.gather(1, operation[:, None])[:, 0]
        factor = torch.where(operation == 3, torch.ones_like(factor), factor)
        f, op = (t.to(device, non_blocking=True).view(n, 1, 1, 1) for t in (factor, operation))
        gray = luminance(x)
        reference = (op == 1) * gray.mean((2, 3), keepdim=True)
        if not grey:
            reference = reference + (op == 2) * gray
        x = torch.addcmul(reference * (1 - f), x, f).clamp_(0, 1)
        turned = torch.nonzero((operation == 3) & active & (not grey and hue > 0))[:, 0]
        if len(turned):
            rows = turned.to(device, non_blocking=True)
            x = x.index_copy(0, rows, adjust_hue(x[rows], factors[turned, 3].to(device)))
    return x


def solarise(x: Tensor, draws: Columns, p: Tensor) -> Tensor:
    """Invert the pixels from ½ up, with chance `p` (N,) of each image (BYOL, arXiv 2006.07733, appendix B). Takes 1
    column."""
    chosen = (draws.take(1)[:, 0] < p).to(x.device, non_blocking=True).view(-1, 1, 1, 1)
    return torch.where(chosen & (x >= 0.5), 1 - x, x)


def random_gray(x: Tensor, draws: Columns, p: float) -> Tensor:
    """Turn images grey with chance `p`; takes 1 column."""
    chosen = draws.take(1)[:, 0] < p
    if x.shape[1] == 1:
        return x
    mask = chosen.to(x.device, non_blocking=True).view(-1, 1, 1, 1)
    return torch.where(mask, luminance(x), x)


def random_blur(x: Tensor, draws: Columns, p: float | Tensor, sigma: tuple[float, float]) -> Tensor:
    """Gaussian blur with chance `p`, of each image (N,) or of all, and a standard deviation in pixels of its own for
    every image.

    Each axis is one product with a banded matrix, whose rows are normalised, so that borders are averages
    of what is there. Takes 2 columns.
    """
    chosen = torch.nonzero(draws.take(1)[:, 0] < p)[:, 0]
    # A kernel of .001 pixels is the identity; 0 would divide by 0.
    sigmas = draws.take(1, *sigma)[chosen].clamp(min=1e-3).view(-1, 1, 1).to(x.device, non_blocking=True)
    if len(chosen) == 0:
        return x
    rows = chosen.to(x.device, non_blocking=True)

    def matrix(n: int) -> Tensor:  # (M, n, n), rows sum to 1
        i = torch.arange(n, device=x.device, dtype=x.dtype)
        return torch.softmax(-((i[:, None] - i) ** 2) / (2 * sigmas**2), 2)

    down, across = matrix(x.shape[2])[:, None], matrix(x.shape[3])[:, None].transpose(2, 3)
    return x.index_copy(0, rows, down @ x[rows] @ across)


def normalise(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(N, 1 or 3, H, W) in [0, 1] → (N, 3, H, W), zero mean and unit deviation; grey becomes three channels here."""
    mean, std = (torch.tensor(t, dtype=x.dtype) for t in (mean, std))
    scale, shift = (t.to(x.device, non_blocking=True) for t in (1 / std, -mean / std))
    # Computed with channels last, as networks take it: six times faster than to convert it afterwards.
    n, c, h, w = x.shape
    last = x.reshape(n, h, w, 1) if c == 1 else x.permute(0, 2, 3, 1)
    normalised = torch.addcmul(shift, last, scale).permute(0, 3, 1, 2)
    return normalised.contiguous(memory_format=torch.channels_last)


def denormalise(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The inverse of `normalise`, clamped to [0, 1]: for pictures."""
    mean, std = (torch.tensor(t, device=x.device, dtype=x.dtype).view(1, 3, 1, 1) for t in (mean, std))
    return (x * std + mean).clamp(0, 1)


def cutout(x: Tensor, draws: Columns, holes: int, side: int) -> Tensor:
    """Zero square holes in normalised images, in place: paint them with the mean colour.

    Args:
        x: (N, C, H, W).
        draws: 2 × holes columns are taken.
        side: of a hole in pixels. Its centre is anywhere; what lies outside the image is cut off.
    """
    h, w = x.shape[2:]
    corner = (draws.take(2 * holes).view(-1, holes, 2) * torch.tensor([h, w])).floor().int() - side // 2
    # Few and small: on a CPU, written one by one, they cost a twentieth of a mask over all pixels.
    return (erase_slices if x.device.type == "cpu" else erase_mask)(x, corner, side)


def erase_slices(x: Tensor, corner: Tensor, side: int) -> Tensor:
    """Zero squares with (N, holes, 2) top left corners in (N, C, H, W), in place, one after the other."""
    for image, holes_of in zip(x, corner.tolist()):
        for top, left in holes_of:
            image[:, max(0, top) : max(0, top + side), max(0, left) : max(0, left + side)] = 0
    return x


def erase_mask(x: Tensor, corner: Tensor, side: int) -> Tensor:
    """The same by a mask, in a few operations whatever the number of images and holes."""
    top, left = corner.to(x.device, non_blocking=True)[..., None].unbind(2)  # (N, holes, 1) each
    rows, columns = torch.arange(x.shape[2], device=x.device), torch.arange(x.shape[3], device=x.device)
    hidden_rows, hidden_columns = (rows >= top) & (rows < top + side), (columns >= left) & (columns < left + side)
    # Outer products of rows and columns, summed over the holes, by one matrix product.
    hidden = hidden_rows.float().transpose(1, 2) @ hidden_columns.float() > 0  # (N, H, W)
    return x.masked_fill_(hidden[:, None], 0.0)


def box_around(crops: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest box around the crops of an image.

    Args:
        crops: (B, V, 2, 3) maps of crops without rotation, as `affine` makes them.

    Returns:
        its map (B, 2, 3), and the crops in it, (B, V, 5): top, left, bottom, right, shares of its sides, and 1 where
        mirrored left to right.
    """
    linear, centre = crops[..., :2], crops[..., 2]
    half = linear.diagonal(dim1=2, dim2=3).abs()  # (B, V, 2), x and y
    low, high = centre - half, centre + half
    first, last = low.amin(1, keepdim=True), high.amax(1, keepdim=True)
    whole = affine(torch.cat([(first + last) / 2, (last - first) / 2], 2)[:, 0])
    inside = [((side - first) / (last - first)).flip(2) for side in (low, high)]  # y, x
    return whole, torch.cat([*inside, (linear[..., 0, :1] < 0).float()], 2)


# x and y of a cubic Bézier curve, as polynomials of its parameter t: coefficients of t, t², t³
TONE_CURVES = (
    ((0, 3, -2), (0, 3, -2)),  # (0,0) (0,0) (1,1) (1,1): the identity
    ((0, 3, -2), (3, -6, 4)),  # (0,0) (0,1) (1,0) (1,1)
    ((0.75, 0.75, -0.5), (2.25, -3.75, 2.5)),  # (0,0) (¼,¾) (¾,¼) (1,1)
)
TONE_STEPS = 4096  # of the table; curves are steep near black, where a step is a sixteenth of a grey level


@cache
def tone_table() -> Tensor:
    """(3, TONE_STEPS + 1): the curves' y for x in even steps from 0 to 1."""
    t = np.linspace(0, 1, TONE_STEPS + 1)
    powers = np.stack([t, t**2, t**3])
    curves = [np.interp(t, np.dot(x, powers), np.dot(y, powers)) for x, y in TONE_CURVES]
    return torch.from_numpy(np.stack(curves)).float()


def change_tones(x: Tensor, draws: Columns) -> Tensor:
    """Put each image through a monotone tone curve of its own, one for all its channels (MAGICAL's NL).

    One of the three curves, with chance ½ mirrored, so that it falls. Takes 2 columns.

    Args:
        x: (N, C, H, W) in [0, 1].

    Returns:
        the same shape and range.
    """
    curve, falling = draws.take(1, 0, len(TONE_CURVES))[:, 0].long(), draws.take(1) < 0.5
    table = tone_table()[curve]  # (N, TONE_STEPS + 1)
    return apply_tones(x, torch.where(falling, table.flip(1), table))


def mask_cells(x: Tensor, draws: Columns, ratio: float, rows: int, columns: int) -> Tensor:
    """Black out exactly round(ratio · rows · columns) of each image's cells, in all channels (MAGICAL's M; with one
    column of as many rows as pixels, the stripes of its published code, func.py).

    Takes rows · columns columns.

    Args:
        x: (N, C, H, W).
        ratio: share of the cells.
        rows, columns: cells along each side. Where pixels are fewer, some cells have none.
    """
    hidden = draws.take(rows * columns).argsort(1)[:, : round(ratio * rows * columns)]
    kept = torch.ones(len(x), rows * columns).scatter_(1, hidden, 0.0).to(x.device, non_blocking=True)
    return x * F.interpolate(kept.view(-1, 1, rows, columns), size=x.shape[2:], mode="nearest")
