"""Operations on batches of any number of spatial dimensions."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from medssl.views.draws import Columns


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


def hidden_count(grid: Sequence[int], ratio: float) -> int:
    """How many patches of a grid are hidden where `ratio` of them shall be."""
    return round(ratio * math.prod(grid))


def visible_patches(draws: Columns, grid: Sequence[int], ratio: float) -> Tensor:
    """Which patches of each image are seen, as many of each: (N, 1, *grid) bool on the CPU. Takes a column a patch."""
    places = draws.take(math.prod(grid)).argsort(1).argsort(1)  # of each patch in the image's random order
    return (places >= hidden_count(grid, ratio)).view(-1, 1, *grid)
