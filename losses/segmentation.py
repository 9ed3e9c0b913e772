"""Losses between predicted and true masks, for any number of spatial dimensions."""

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_dice(p: Tensor, truth: Tensor, smooth: float = 1e-5) -> Tensor:
    """Dice coefficient of soft masks (V-Net, arXiv 1606.04797, Eq. of §3, with sums in place of sums of squares in the
    denominator, as in nnU-Net, arXiv 1809.10486, Eq. 1).

    D = (2 Σ p·t + ε) / (Σ p + Σ t + ε), the sums over the voxels of one image and label. A label that neither has
    gives 1.

    Args:
        p: (B, K, *S) probabilities. truth: (B, K, *S) 0 or 1. smooth: ε.

    Returns:
        (B, K) in [0, 1].
    """
    space = tuple(range(2, p.ndim))
    both = (p * truth).sum(space)
    return (2 * both + smooth) / (p.sum(space) + truth.sum(space) + smooth)


def binary_dice_cross_entropy(logits: Tensor, target: Tensor, field: Tensor, kind: str) -> dict[str, Tensor]:
    """Binary cross-entropy and one minus soft Dice of labels that may overlap, inside a field of view, in float32.

    Args:
        logits: (B, K, *S). target: (B, K, *S) 0 or 1. field: (B, 1, *S) 1 where pixels count, else 0.
        kind: "bce", "dice" or "bce+dice".

    Returns:
        the terms by name; cross-entropy is the mean over the pixels of all fields and over labels (of this process:
        where processes have fields of different size, theirs count alike).
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits, terms = logits.float(), {}
        if "bce" in kind:
            errors = F.binary_cross_entropy_with_logits(logits, target, reduction="none") * field
            terms["cross_entropy"] = errors.sum() / (field.sum() * target.shape[1]).clamp(min=1)
        if "dice" in kind:
            terms["dice"] = 1 - soft_dice(logits.sigmoid() * field, target * field).mean()
        return terms


def dice_cross_entropy(logits: Tensor, target: Tensor) -> dict[str, Tensor]:
    """nnU-Net's loss (arXiv 1809.10486, Eq. 1): one minus the mean Dice over images and labels, and cross-entropy.

    Dice is taken per image, so that the loss of a batch is the mean over its images, and over labels without the
    background, which would hide the others. Both are computed in float32: half precision cannot hold the sums.

    Args:
        logits: (B, K, *S), channel 0 the background. target: (B, *S) int64 label numbers below K.

    Returns:
        {"dice": in [0, 1], "cross_entropy": at least 0}, whose sum is minimised.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.float()
        truth = F.one_hot(target, logits.shape[1]).movedim(-1, 1)
        dice = soft_dice(logits.softmax(1)[:, 1:], truth[:, 1:])
        return {"dice": 1 - dice.mean(), "cross_entropy": F.cross_entropy(logits, target)}
