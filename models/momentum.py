"""Teachers: copies of a network that follow it slowly and are never trained."""

import copy
import math

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


def make_teacher(student: nn.Module) -> nn.Module:
    """A copy of `student` that starts with its weights and takes no gradient.

    Its batch norms normalise with their own batch, as the student's do, and keep running statistics of their own.
    """
    return copy.deepcopy(student).requires_grad_(False)


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move a teacher's weights: θ' ← m θ' + (1 − m) θ (MoCo, arXiv 1911.05722, Eq. 2). Statistics stay its own."""
    get_ema_multi_avg_fn(momentum)(list(teacher.parameters()), list(student.parameters()), None)


def cosine_momentum(start: float, progress: float) -> float:
    """Momentum that rises from `start` to 1 along half a cosine (BYOL, arXiv 2006.07733, §3.3).

    Args:
        progress: share of the run done, in [0, 1].
    """
    return 1 - (1 - start) * (1 + math.cos(math.pi * progress)) / 2
