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
def ema_update(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move a teacher's weights: θ' ← m θ' + (1 − m) θ (MoCo, arXiv 1911.05722, Eq. 2). Statistics stay its own."""
    get_ema_multi_avg_fn(momentum)(list(teacher.parameters()), list(student.parameters()), None)


def momentum_at(progress: float, base: float, schedule: str) -> float:
    """The teacher's momentum: "constant", or "cosine", which rises to 1 along half a cosine (BYOL, arXiv 2006.07733,
    §3.3).

    Args:
        progress: share of the run done, in [0, 1]. base: m at the start.
    """
    return base if schedule == "constant" else 1 - (1 - base) * (1 + math.cos(math.pi * progress)) / 2
