"""Views: batched, per-sample random augmentation on the training device.

Every random number of a step is drawn on the CPU for the whole batch, whatever the number of processes,
and each process takes the rows of its own images. So one GPU, four GPUs and four machines see the same
views, and nothing that the device computes has to be waited for.

Coordinates: an image is the square [−1, 1]², x to the right and y down, whatever its height and width; a
crop box is (centre x, centre y, half width, half height) in these units, so (0, 0, 1, 1) is all of it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import masks_to_boxes

CPU_PART = 4  # images whose views are made at a time on a CPU


@dataclass(frozen=True)
class Draws:
    """Uniform random numbers for the images of one batch, the same for any number of processes.

    Args:
        seeds: what the numbers depend on, such as (seed, step).
        total: images in the whole batch, over all processes.
        start, count: the rows that belong to this process.
    """

    seeds: tuple[int, ...]
    total: int
    start: int = 0
    count: int | None = None

    def generator(self, stream: int) -> torch.Generator:
        """A CPU generator that depends on the seeds and `stream` alone."""
        state = np.random.SeedSequence([*self.seeds, stream]).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(state >> np.uint64(1)))

    def uniform(self, stream: int, columns: int) -> Tensor:
        """(count, columns) numbers in [0, 1), on the CPU."""
        numbers = torch.rand(self.total, columns, generator=self.generator(stream))
        count = self.total - self.start if self.count is None else self.count
        return numbers[self.start : self.start + count]


class ImageDraws:
    """Uniform random numbers that belong to each image, whatever its batch: `Draws` for evaluation.

    Args:
        seed, indices: what the numbers of a row depend on.
    """

    def __init__(self, seed: int, indices: Sequence[int]) -> None:
        self.images = [Draws((seed, index), 1) for index in indices]

    def uniform(self, stream: int, columns: int) -> Tensor:
        """(images, columns) numbers in [0, 1), on the CPU."""
        return torch.cat([draws.uniform(stream, columns) for draws in self.images])


class Columns:
    """Hands out the columns of a matrix of uniform numbers (N, K) one operation after the other."""

    def __init__(self, numbers: Tensor) -> None:
        self.numbers, self.used = numbers, 0

    def take(self, n: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """The next `n` columns, (N, n), scaled to [low, high)."""
        if self.used + n > self.numbers.shape[1]:
            raise ValueError(f"{self.used + n} random columns wanted, {self.numbers.shape[1]} drawn")
        self.used += n
        return low + (high - low) * self.numbers[:, self.used - n : self.used]


def view_major(numbers: Tensor, views: int) -> Columns:
    """Numbers (B, V·K) of images → columns (V·B, K) of their views, in the views' order."""
    return Columns(numbers.view(len(numbers), views, -1).transpose(0, 1).flatten(0, 1))


# Geometry ------------------------------------------------------------------------------------------


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


# Colour --------------------------------------------------------------------------------------------


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


# Views of the methods ------------------------------------------------------------------------------


class Views(nn.Module):
    """Base of all views: what a batch of textures becomes before the method sees it.

    `forward(batch, draws)` takes {"image" (B, C, S, S) uint8, "size" (B, 2) original height and width, on the
    CPU, …} and returns the method's batch. `mean` and `std` are the normalisation of each channel, `patches` how many
    views of an image go through the network together.
    """

    patches = 1

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.mean, self.std = tuple(mean), tuple(std)

    def normalise(self, x: Tensor) -> Tensor:
        return normalise(x, self.mean, self.std)

    def random_crops(
        self, size: Tensor, draws: Columns, count: int, scale: tuple[float, float], degrees: float
    ) -> Tensor:
        """Maps (B, V, 2, 3) of `count` views: random resized crop, rotation up to ±`degrees`, left–right flip.

        `size` (B, 2) is the images' original height and width. 24 columns per view are taken. Rotation brings in
        what lies beside the crop.
        """
        thetas = [torch.empty(len(size), 0, 2, 3)]
        for _ in range(count):
            box = random_resized_crop(draws, size, scale)
            angle = draws.take(1, -degrees, degrees)[:, 0]
            flip = draws.take(1)[:, 0] < 0.5
            thetas.append(affine(box, angle if degrees else None, flip)[:, None])
        return torch.cat(thetas, 1)


class MultiCropViews(Views):
    """Random crops of an image, with colours changed: one or several large ones and, for PCRLv2, small ones
    (arXiv 2301.00772, §4.1). The defaults are PCRLv2's.

    Args:
        size, local_size: sides of large and local views in pixels.
        views: number of large views n.
        locals_: number of local views V.
        targets: of how many large views the state before their colours changed is wanted.
        scale, local_scale: area shares of the crops.
        degrees: largest rotation.
        gray, blur: chances that a view turns grey, is blurred; blur's may differ between large views (n numbers).
        solarised: chance of each large view to be solarised; of none by default.
        jitter_first: jitter before grey and blur, as MoCo and its followers do; PCRL and PCRLv2 do so afterwards.
        jitter: brightness, contrast, saturation, hue of the colour jitter, which has the chance `jitter_chance`.
        blur_sigma: range of the blur's standard deviation in pixels.
        hole: side of each of the three cutout holes in pixels.

    Returns, from `forward`:
        {"view1" … "view{n}" (B, 3, size, size), "locals" (V·B, 3, local_size, local_size), view-major, "target" and
        "target2" (B, 3, size, size): the first views before their colours were changed}, all normalised; "index" (B,)
        image numbers.

    Random columns of an image, by stream of `Draws`:
        0: 24 for each large view, 24 for each local view, as `random_crops` takes them;
        1: 18 for each large view: 12 as `color` takes them, 6 for the holes;
        2: 12 for each local view, as `color` takes them;
        4: where views are solarised, 1 for each large view.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        size: int = 224,
        local_size: int = 96,
        views: int = 2,
        locals_: int = 6,
        targets: int = 1,
        scale: tuple[float, float] = (0.3, 1.0),
        local_scale: tuple[float, float] = (0.05, 0.3),
        degrees: float = 10.0,
        gray: float = 0.2,
        blur: float | Sequence[float] = 0.5,
        jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.4),
        jitter_chance: float = 1.0,
        blur_sigma: tuple[float, float] = (0.1, 2.0),
        hole: int = 32,
        solarised: Sequence[float] = (),
        jitter_first: bool = False,
    ) -> None:
        super().__init__(mean, std)
        self.solarised, self.jitter_first = tuple(solarised), jitter_first
        self.size, self.local_size, self.views, self.locals_ = size, local_size, views, locals_
        self.targets, self.scale, self.local_scale, self.degrees = targets, scale, local_scale, degrees
        self.gray, self.blur, self.jitter, self.jitter_chance = gray, blur, jitter, jitter_chance
        self.blur_sigma, self.hole = blur_sigma, hole

    def color(self, x: Tensor, draws: Columns) -> Tensor:
        """Grey, blur, colour jitter. 12 columns."""
        blur = self.blur
        if isinstance(blur, Sequence):
            blur = torch.tensor(blur).repeat_interleave(len(x) // self.views)  # rows are view-major
        if self.jitter_first:
            x = color_jitter(x, draws, *self.jitter, p=self.jitter_chance)
        x = random_gray(x, draws, self.gray)
        x = random_blur(x, draws, blur, self.blur_sigma)
        return x if self.jitter_first else color_jitter(x, draws, *self.jitter, p=self.jitter_chance)

    def forward(self, batch: dict, draws: Draws) -> dict[str, Tensor]:
        b, n, v = len(batch["image"]), self.views, self.locals_
        numbers = [draws.uniform(0, 24 * (n + v)), draws.uniform(1, 18 * n), draws.uniform(2, 12 * v)]
        rows = [batch["image"], batch["size"], *numbers]
        # On a CPU few images at a time: what is computed in between then stays in the processor's cache.
        part = CPU_PART if batch["image"].device.type == "cpu" else b
        parts = [self.crop_and_color(*some) for some in zip(*(whole.split(part) for whole in rows))]
        # (V, B, C, h, w) → (V·B, C, h, w), view-major
        targets, large, small = (torch.cat(views, 1).flatten(0, 1) for views in zip(*parts))
        if self.solarised:
            chances = torch.tensor(self.solarised).repeat_interleave(b)
            large = solarise(large, view_major(draws.uniform(4, n), n), chances)
        views = self.normalise(large)
        if self.hole:
            columns = view_major(numbers[1], n)
            columns.take(12)  # for the colours
            views = cutout(views, columns, 3, self.hole)
        out = {f"view{i}": view for i, view in enumerate(views.split(b), 1)}
        if self.targets:
            out |= zip(("target", "target2"), self.normalise(targets).split(b))
        if v:
            out["locals"] = self.normalise(small)
        if "index" in batch:
            out["index"] = batch["index"]
        return out

    def crop_and_color(
        self, images: Tensor, size: Tensor, spatial: Tensor, color: Tensor, local_color: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All views of b images, not yet normalised, from rows of uniform numbers.

        Returns:
            the first views before their colours changed (targets, b, C, size, size), the large views
            (n, b, C, size, size), and the local views (V, b, C, local_size, local_size).
        """
        columns, side = Columns(spatial), images.shape[-1]
        large = self.random_crops(size, columns, self.views, self.scale, self.degrees)
        small = self.random_crops(size, columns, self.locals_, self.local_scale, self.degrees)
        # Large and small views read from one pyramid.
        plans = [(large.flatten(0, 1), self.size), (small.flatten(0, 1), self.local_size)]
        levels = torch.cat([pyramid_levels(theta, side, out) for theta, out in plans])
        pyramid = Pyramid(images, int(levels.min()), int(levels.max()))

        def cut(theta: Tensor, out: int, numbers: Tensor) -> tuple[Tensor, Tensor]:
            b, count = theta.shape[:2]
            views = sample(pyramid, theta, out, black_outside=self.degrees > 0)
            numbers = numbers.view(b, count, -1).transpose(0, 1).flatten(0, 1)
            return tuple(x.unflatten(0, (count, b)) for x in (views, self.color(views, Columns(numbers))))

        before, after = cut(large, self.size, color)
        locals_ = cut(small, self.local_size, local_color)[1] if self.locals_ else after[:0]
        return before[: self.targets], after, locals_


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


class RestorationViews(MultiCropViews):
    """PCRL's 2D views (arXiv 2109.04379, §4.1): two crops, their clean states, and both transformed by a code.

    Returns, from `forward`: what `MultiCropViews` does, and what `add_transforms` adds.
    Stream 3 of `Draws` has 3 columns for each view.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], **options: object) -> None:
        super().__init__(mean, std, locals_=0, targets=2, **options)

    def forward(self, batch: dict, draws: Draws) -> dict[str, Tensor]:
        return add_transforms(super().forward(batch, draws), view_major(draws.uniform(3, 2 * 3), 2), axes=2)


class PairViews(MultiCropViews):
    """Two crops, eight of ten jittered before they turn grey and are blurred, not rotated: the views of MoCo's second
    version, SimCLR, BYOL and their followers."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], **options: object) -> None:
        own = {"degrees": 0.0, "hole": 0, "locals_": 0, "targets": 0, "jitter_chance": 0.8, "jitter_first": True}
        super().__init__(mean, std, **{**own, **options})


class WholeOrCropViews(PairViews):
    """`PairViews` in training; in evaluation {"whole" (B, 3, size, size)}, the whole image, normalised."""

    def forward(self, batch: dict, draws: Draws | None = None) -> dict[str, Tensor]:
        if self.training:
            return super().forward(batch, draws)
        whole = torch.eye(2, 3).expand(len(batch["image"]), 1, 2, 3)
        return {"whole": self.normalise(sample(batch["image"], whole, self.size).clamp_(0, 1))}


class ConceptViews(PairViews):
    """ConCL's views (arXiv 2207.06733, §3.2): two crops, and the reference view, the smallest box around both, whose
    colours stay.

    Returns, from `forward`: what `MultiCropViews` does, "reference" (B, 3, size, size) normalised, and "box1", "box2"
    (B, 5) on the CPU: the crop's top, left, bottom and right, shares of the reference view, and 1 where the crop is
    mirrored left to right.
    """

    def forward(self, batch: dict, draws: Draws) -> dict[str, Tensor]:
        out = super().forward(batch, draws)
        crops = self.random_crops(batch["size"], Columns(draws.uniform(0, 24 * 2)), 2, self.scale, 0.0)  # the same
        whole, boxes = box_around(crops)
        out["reference"] = self.normalise(sample(batch["image"], whole[:, None], self.size).clamp_(0, 1))
        return out | {f"box{i}": box for i, box in enumerate(boxes.unbind(1), 1)}


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
    n = len(x)
    curve, falling = draws.take(1, 0, len(TONE_CURVES))[:, 0].long(), draws.take(1) < 0.5
    table = tone_table()[curve]  # (N, TONE_STEPS + 1)
    table = torch.where(falling, table.flip(1), table).to(x.device, non_blocking=True)
    place = x.reshape(n, -1) * TONE_STEPS
    left = place.long().clamp(0, TONE_STEPS - 1)
    return torch.lerp(table.gather(1, left), table.gather(1, left + 1), place - left).view_as(x)


def mask_cells(x: Tensor, draws: Columns, ratio: float, grid: int) -> Tensor:
    """Black out exactly round(ratio · grid²) of each image's cells, in all channels (MAGICAL's M).

    Takes grid² columns.

    Args:
        x: (N, C, H, W).
        ratio: share of the cells.
        grid: cells along each side. Where pixels are fewer, some cells have none.
    """
    hidden = draws.take(grid * grid).argsort(1)[:, : round(ratio * grid * grid)]
    kept = torch.ones(len(x), grid * grid).scatter_(1, hidden, 0.0).to(x.device, non_blocking=True)
    return x * F.interpolate(kept.view(-1, 1, grid, grid), size=x.shape[2:], mode="nearest")


class MaskedToneViews(Views):
    """MAGICAL's views: the whole image, and the same with its tones changed and cells blacked out.

    Args:
        size: side of the views in pixels; no image is cropped.
        mask_ratio: share of the cells blacked out. grid: cells along a side.

    Returns, from `forward`:
        {"image", "changed" (B, 3, size, size) normalised; "target" (B, C, size, size) the image in [0, 1]; "index" (B,)
        image numbers}.

    Random columns of an image: stream 0 of `Draws` has 2 for the tones, stream 1 grid² for the cells.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], size: int = 224, mask_ratio: float = 0.25, grid: int = 32
    ) -> None:
        super().__init__(mean, std)
        self.size, self.mask_ratio, self.grid = size, mask_ratio, grid

    def forward(self, batch: dict, draws: Draws) -> dict[str, Tensor]:
        b = len(batch["image"])
        whole = torch.eye(2, 3).expand(b, 1, 2, 3)
        x = sample(batch["image"], whole, self.size).clamp_(0, 1)
        changed = change_tones(x, Columns(draws.uniform(0, 2)))
        changed = mask_cells(changed, Columns(draws.uniform(1, self.grid**2)), self.mask_ratio, self.grid)
        out = {"image": self.normalise(x), "changed": self.normalise(changed), "target": x}
        return out | ({"index": batch["index"]} if "index" in batch else {})


class SegmentationViews(Views):
    """One view an image and its masks, for training; the whole image in evaluation.

    Args:
        size: side in pixels to which whole images are resized.
        patch: side of the part that training cuts out of the resized image; all of it by default.
        zoom: range of the part's side over `patch` pixels; of a part that would be larger than the image, the image.
        degrees: largest rotation. flips: mirrored left–right, upside down, each with chance ½.
        jitter: strengths of brightness and contrast.

    `forward` takes the items of `MaskedImages` and gives "view" (B, 3, P, P), normalised, "target" (B, K, P, P) and
    "field" (B, 1, P, P), float 0 or 1: random in training mode, the whole image (P = size) in evaluation mode.
    Parts beside the image are black, and not in the field. Stream 0 of `Draws` has 6 columns, stream 1 has 9.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        size: int = 512,
        patch: int | None = None,
        zoom: tuple[float, float] = (0.8, 1.25),
        degrees: float = 10.0,
        flips: tuple[bool, bool] = (True, False),
        jitter: tuple[float, float] = (0.2, 0.2),
    ) -> None:
        super().__init__(mean, std)
        self.size, self.patch, self.zoom = size, patch or size, zoom
        self.degrees, self.flips, self.jitter = degrees, flips, jitter

    def random_parts(self, count: int, draws: Columns) -> Tensor:
        """Maps (N, 2, 3) of `count` parts. 6 columns are taken."""
        half = (draws.take(1, *self.zoom) * self.patch / self.size).clamp(max=1)
        centre = draws.take(2, -1, 1) * (1 - half)
        angle = draws.take(1, -self.degrees, self.degrees)[:, 0]
        mirrored = (draws.take(2) < 0.5) & torch.tensor(self.flips)
        theta = affine(torch.cat([centre, half, half], 1), angle if self.degrees else None, mirrored[:, 0])
        theta[:, :, 1] *= 1 - 2 * mirrored[:, 1:].float()
        return theta

    def forward(self, batch: dict, draws: Draws | None = None) -> dict[str, Tensor]:
        b = len(batch["image"])
        if self.training:
            theta = self.random_parts(b, Columns(draws.uniform(0, 6)))[:, None]
            side = self.patch
        else:
            theta, side = torch.eye(2, 3).expand(b, 1, 2, 3), self.size
        x = sample(batch["image"], theta, side, black_outside=True)
        if self.training:
            x = color_jitter(x, Columns(draws.uniform(1, 9)), *self.jitter, 0, 0)
        masks = torch.cat([batch["mask"], batch["field"]], 1)
        inside = (sample(masks, theta, side, black_outside=True) > 0.5).float()
        return {**batch, "view": self.normalise(x), "target": inside[:, :-1], "field": inside[:, -1:]}


class DetectionViews(Views):
    """Images at their own size, for networks that resize them: in training mirrored left to right with chance ½.

    `forward` takes the items of `InstanceImages` whose `detected` is true, and gives "images", tensors (3, H, W) in
    [0, 1], and "targets", dicts with "boxes" (N, 4) left, top, right, bottom in pixels, "labels" (N,), all 1, and
    "masks" (N, H, W) uint8. Stream 0 of `Draws` has 1 column.
    """

    def forward(self, batch: dict, draws: Draws | None = None) -> dict[str, list]:
        images, targets = [], []
        flips = draws.uniform(0, 1)[:, 0] < 0.5 if self.training else torch.zeros(len(batch["image"])).bool()
        for image, instances, flip in zip(batch["image"], batch["instances"], flips):
            if flip:
                image, instances = image.flip(2), instances.flip(1)
            images.append(image.float() / 255)
            targets.append(instance_targets(instances))
        return {"images": images, "targets": targets}


def instance_targets(instances: Tensor) -> dict[str, Tensor]:
    """(H, W) integers, 0 or the instance's number → "boxes", "labels", "masks" as `DetectionViews` gives them."""
    numbers = instances.unique()
    masks = instances == numbers[numbers > 0][:, None, None]  # (N, H, W)
    boxes = masks_to_boxes(masks)
    boxes[:, 2:] += 1  # it gives the last pixels, not where they end
    return {"boxes": boxes, "labels": boxes.new_ones(len(boxes), dtype=torch.int64), "masks": masks.to(torch.uint8)}


class ClassificationViews(Views):
    """One view an image for supervised training; centre views for evaluation.

    Args:
        size: side of the view in pixels.
        scale: area share of the random crop, degrees: largest rotation, flip: left–right, chance ½.
        margin: evaluation takes the centre square of this share of the shorter side (224/256 in the published
            protocol).

    `forward` adds "view" (B, 3, size, size), normalised, to the batch: random in training mode, centred in
    evaluation mode. `ten_crops` gives the four corners and the centre, and their mirror images.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        size: int = 224,
        scale: tuple[float, float] = (0.08, 1.0),
        degrees: float = 10.0,
        margin: float = 224 / 256,
    ) -> None:
        super().__init__(mean, std)
        self.size, self.scale, self.degrees, self.margin = size, scale, degrees, margin

    def forward(self, batch: dict, draws: Draws | None = None) -> dict[str, Tensor]:
        if self.training:
            columns = Columns(draws.uniform(0, 24))
            theta = self.random_crops(batch["size"], columns, 1, self.scale, self.degrees)
            view = sample(batch["image"], theta, self.size, black_outside=self.degrees > 0)
        else:
            box = self._box(batch, torch.zeros(2))
            view = sample(batch["image"], affine(box)[:, None], self.size)
        return {**batch, "view": self.normalise(view)}

    def ten_crops(self, batch: dict) -> Tensor:
        """(10·B, 3, size, size) normalised, crop-major."""
        places = torch.tensor([[-1.0, -1], [1, -1], [-1, 1], [1, 1], [0, 0]])
        thetas = [
            affine(self._box(batch, place), flip=torch.full((len(batch["size"]),), flip))
            for flip in (False, True)
            for place in places
        ]
        return self.normalise(sample(batch["image"], torch.stack(thetas, 1), self.size))

    def _box(self, batch: dict, place: Tensor) -> Tensor:
        """(B, 4) boxes of the evaluation square at `place`, from −1 (left, top) to 1 in the resized image."""
        short = batch["size"].amin(1, keepdim=True)
        half = (short / batch["size"]).flip(1) * self.margin  # (B, 2) half width and height
        return torch.cat([place * (1 - half), half], 1)
