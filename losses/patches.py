"""The error of restored patches, each measured by its own mean and deviation (He et al., "Masked Autoencoders Are
Scalable Vision Learners", CVPR 2022, arXiv 2111.06377, §3)."""

from collections.abc import Sequence

import torch
from torch import Tensor

EPS = 1e-6  # of a patch's variance; one that is flat has zeros as its target


def cut_patches(x: Tensor, grid: Sequence[int]) -> Tensor:
    """(B, C, *S) → (B, C, L, P): the L patches of a grid, one row after the other, of P pixels each."""
    axes = len(grid)
    for axis, n in enumerate(grid):
        x = x.unflatten(2 + 2 * axis, (n, -1))  # (B, C, rows, pixels of a row, columns, …)
    x = x.permute(0, 1, *range(2, 2 + 2 * axes, 2), *range(3, 3 + 2 * axes, 2))
    return x.flatten(2 + axes).flatten(2, 1 + axes)


def join_patches(patches: Tensor, grid: Sequence[int], sides: Sequence[int]) -> Tensor:
    """(B, C, L, P) → (B, C, *sides): the inverse of `cut_patches`."""
    axes = len(grid)
    x = patches.unflatten(3, [side // n for side, n in zip(sides, grid)]).unflatten(2, tuple(grid))
    x = x.permute(0, 1, *(place for axis in range(axes) for place in (2 + axis, 2 + axes + axis)))
    return x.reshape(*patches.shape[:2], *sides)


def patch_scale(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation, (B, C, L, 1) each, of patches (B, C, L, P)."""
    var, mean = torch.var_mean(patches, 3, correction=0, keepdim=True)
    return mean, (var + EPS).sqrt()


def hidden_patch_error(restored: Tensor, image: Tensor, visible: Tensor) -> Tensor:
    """Mean squared error over the hidden patches, whose target is each patch less its mean, over its deviation.

    Args:
        restored: (B, C, *S), in units of the patches' deviations.
        image: (B, C, *S).
        visible: (B, 1, *grid) bool, 1 where a patch was seen; as many of each image.

    Returns:
        (), float32: 1 for a restoration of zeros.
    """
    grid = visible.shape[2:]
    patches = cut_patches(image.float(), grid)
    mean, deviation = patch_scale(patches)
    errors = cut_patches(restored.float(), grid) - (patches - mean) / deviation
    hidden = ~visible.flatten(1)  # (B, L)
    return (errors.square().mean((1, 3)) * hidden).sum() / hidden.sum()
