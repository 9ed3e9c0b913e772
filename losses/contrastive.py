"""Losses between embeddings of views."""

import torch.nn.functional as F
from torch import Tensor


def negative_cosine(q_a: Tensor, p_a: Tensor, q_b: Tensor, p_b: Tensor) -> Tensor:
    """Symmetric negative cosine similarity with stop-gradient (SimSiam, arXiv 2011.10566, Eq. 2).

    S(a, b) = −½[cos(q_a, sg p_b) + cos(q_b, sg p_a)], averaged over the batch.

    Args:
        q_a, p_a, q_b, p_b: predictions and projections of two views, each (B, C).

    Returns:
        A scalar in [−1, 1]; −1 when the views agree.
    """
    ab = F.cosine_similarity(q_a, p_b.detach(), dim=1).mean()
    ba = F.cosine_similarity(q_b, p_a.detach(), dim=1).mean()
    return -0.5 * (ab + ba)
