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


def region_dice_cross_entropy(logits: Tensor, target: Tensor, share: float = 0.2) -> dict[str, Tensor]:
    """PCRLv2's loss of BraTS' regions (published code, utils.py: brats_dice_loss), in float32: for each region one
    minus soft Dice, and a fifth of binary cross-entropy; the regions' sum.

    There, the cross-entropy takes a sigmoid of what is a probability already. Here it takes the logits.

    Args:
        logits: (B, R, *S). target: (B, R, *S) 0 or 1. share: weight of the cross-entropy.

    Returns:
        {"dice", "cross_entropy"}, weighted.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits, target = logits.float(), target.float()
        dice = (1 - soft_dice(logits.sigmoid(), target)).mean(0).sum()
        errors = F.binary_cross_entropy_with_logits(logits, target) * target.shape[1]
        return {"dice": dice, "cross_entropy": share * errors}


def tversky(logits: Tensor, target: Tensor, alpha: float = 0.3, beta: float = 0.7) -> Tensor:
    """Tversky loss (arXiv 1706.05721, Eq. 4), as PCRLv2 fine-tunes on LiTS (MICCAI-LITS2017/loss/Tversky.py), in
    float32: 1 − TP / (TP + α FP + β FN + 1), the sums over the voxels of one image and label, mean over both.

    Args:
        logits: (B, K, *S), before the sigmoid. target: (B, K, *S) 0 or 1.

    Returns:
        (), in [0, 1].
    """
    with torch.autocast(logits.device.type, enabled=False):
        p, truth = logits.float().sigmoid(), target.float()
        space = tuple(range(2, p.ndim))
        both, extra, missed = (product.sum(space) for product in (p * truth, p * (1 - truth), (1 - p) * truth))
        return (1 - both / (both + alpha * extra + beta * missed + 1)).mean()


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
