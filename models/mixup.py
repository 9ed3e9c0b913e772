"""Mixing the images of a batch with each other, and what is made of them alike."""

from dataclasses import dataclass

import torch
from torch import Tensor

from medssl.engine.parallel import Run


@dataclass(frozen=True)
class Mixup:
    """mix(a) = λ a + (1 − λ) a[order], with one λ and one order for the whole batch, over all processes
    (arXiv 1710.09412; C2L, arXiv 2007.07423, §2.2).

    Attributes:
        weight: λ in [½, 1].
        order: (B over all processes,) int64, with whom each image is mixed.
    """

    weight: float
    order: Tensor
    run: Run

    @classmethod
    def draw(cls, run: Run, images: int) -> "Mixup":
        """λ ~ Beta(1, 1), the uniform distribution, folded to its upper half; `images` are those of this process."""
        return cls(mixing_weight(run), run.permutation(images), run)

    def __call__(self, x: Tensor) -> Tensor:
        """Mix (B, …); what comes from other images has no gradient."""
        return torch.lerp(self.run.rows(x, self.order), x, self.weight)


def mixing_weight(run: Run) -> float:
    """max(λ, 1 − λ) of λ ~ Beta(1, 1), the same in all processes."""
    weight = torch.rand((), generator=run.generator).item()
    return max(weight, 1 - weight)
