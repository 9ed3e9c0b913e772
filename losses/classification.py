"""Supervised losses for labels of every task."""

import torch
import torch.nn.functional as F
from torch import Tensor


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy for class numbers, binary cross-entropy for several labels.

    Args:
        logits: (B, L).
        labels: (B,) int64 class numbers, or (B, L) floats in [0, 1] where NaN is not known and not counted.

    Returns:
        A scalar: the mean over the images, or over the known labels.
    """
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels)
    known = torch.isfinite(labels)
    errors = F.binary_cross_entropy_with_logits(logits, labels.nan_to_num(), reduction="none")
    return (errors * known).sum() / known.sum().clamp(min=1)


def probabilities(logits: Tensor, task: str) -> Tensor:
    """(B, L) logits → probabilities: per label in multi-label tasks, else over the classes."""
    return logits.sigmoid() if task == "multi-label" else logits.softmax(1)
