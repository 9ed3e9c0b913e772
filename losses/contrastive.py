"""Losses between embeddings of views."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medssl.engine.parallel import gather, gather_with_gradient, row_offset


def l2_normalize(x: Tensor, dim: int = 1) -> Tensor:
    """n(x): scaled to unit length along `dim`, by default the rows of (B, C), in float32."""
    return F.normalize(x.float(), dim=dim)


def similarities(q: Tensor, k: Tensor, negatives: Tensor) -> Tensor:
    """Cosines of queries with their positives (column 0) and with all negatives: (B, 1 + K), float32.

    Args:
        q, k: (B, C) queries and keys, unit length; keys take no gradient.
        negatives: (K, C) unit length.
    """
    with torch.autocast(q.device.type, enabled=False):  # differences between candidates are finer than bf16
        q, k = q.float(), k.detach().float()
        return torch.cat([(q * k).sum(1, keepdim=True), q @ negatives.T], 1)


class InfoNCE(nn.Module):
    """−log of the softmax probability of the positive among 1 + K candidates (CPC, arXiv 1807.03748, Eq. 4; MoCo,
    arXiv 1911.05722, Eq. 1). Its value for random embeddings is about log(1 + K) or above.

    Args:
        temperature: T, by which cosines are divided.
    """

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, s: Tensor, count: Tensor | None = None) -> Tensor:
        """Mean loss of `similarities` (B, 1 + K); −inf marks what is no candidate.

        Args:
            count: () by which the sum is divided, where it is not B: a process's share of what all have.
        """
        each = F.cross_entropy(s / self.temperature, s.new_zeros(len(s), dtype=torch.int64), reduction="none")
        return each.mean() if count is None else each.sum() / count

    def after_step(self) -> None:
        """Nothing changes."""


class NCE(nn.Module):
    """Noise-contrastive estimation: tell the positive from K noise samples one by one (InsDis, arXiv 1805.01978, §3.2).

    P = exp(s / T) / Z, h = P / (P + K/n + ε) for the positive, and 1 − h = (K/n) / (P + K/n + ε) for each negative;
    the loss is −log h − Σ log(1 − h), ε = 1e-5. Z, the number of images n times the mean of exp(s / T), is
    estimated once, on the first call of the first step (§3.2 there), and then kept. The published code cuts it to an
    integer; here it stays what it is. All is computed in logarithms, so that no temperature overflows.

    Args:
        temperature: T. images: n.
    """

    def __init__(self, temperature: float, images: int) -> None:
        super().__init__()
        self.temperature, self.images = temperature, images
        self.register_buffer("log_z", torch.tensor(-torch.inf))  # −∞: not estimated yet
        self.estimated = False
        self.first: Tensor | None = None

    def log_probabilities(self, s: Tensor) -> Tensor:
        """log P of each candidate, (B, 1 + K)."""
        logits = s / self.temperature
        self.estimated = self.estimated or bool(self.log_z > -torch.inf)
        if self.estimated:
            return logits - self.log_z
        if self.first is None:
            sums = gather(logits.detach().logsumexp((0, 1))[None])  # of each process, over equally many candidates
            self.first = sums.logsumexp(0) - math.log(len(sums) * logits.numel()) + math.log(self.images)
        return logits - self.first

    def forward(self, s: Tensor, count: Tensor | None = None) -> Tensor:
        """Mean loss of `similarities` (B, 1 + K), as `InfoNCE` has it."""
        log_p = self.log_probabilities(s)
        noise = (s.shape[1] - 1) / self.images
        log_all = torch.logaddexp(log_p, log_p.new_tensor(math.log(noise + 1e-5)))
        positive, negative = log_p[:, 0] - log_all[:, 0], math.log(noise) - log_all[:, 1:]
        each = -(positive + negative.sum(1))
        return each.mean() if count is None else each.sum() / count

    def after_step(self) -> None:
        """Keep the first step's estimate of Z."""
        if not self.estimated and self.first is not None:
            self.log_z.copy_(self.first)
        self.first = None


def make_contrast(kind: str, temperature: float, images: int) -> nn.Module:
    """The loss that `--loss` names: "infonce" or "nce"."""
    return InfoNCE(temperature) if kind == "infonce" else NCE(temperature, images)


def nt_xent(z1: Tensor, z2: Tensor, temperature: float, index: Tensor | None = None) -> Tensor:
    """Normalised temperature-scaled cross-entropy (SimCLR, arXiv 2002.05709, Eq. 1) over the images of all processes.

    Every embedding must find the other view of its image among all views of all images, itself left out; chance is
    log(2N − 1) for N images. Gradients reach the embeddings of other processes too.

    Args:
        z1, z2: (B, C), two views of this process's images, of any length.
        temperature: T.
        index: (B,) numbers of the images. An image that the batch has twice, as one larger than the data set does, is
            not its own negative.

    Returns:
        the mean over this process's 2B embeddings.
    """
    b = len(z1)
    with torch.autocast(z1.device.type, enabled=False):
        own = torch.cat([l2_normalize(z1), l2_normalize(z2)])  # (2B, C)
        everything = gather_with_gradient(own)
        s = own @ everything.T / temperature
        first = row_offset(2 * b)  # where this process's embeddings lie among all
        rows = torch.arange(2 * b, device=s.device)
        places, partners = first + rows, first + rows.roll(b)
        if index is None:
            same = F.one_hot(places, s.shape[1]).bool()
        else:
            numbers = torch.cat([index, index]).to(s.device)
            same = numbers[:, None] == gather(numbers)
        left_out = same.scatter(1, partners[:, None], False)
        return F.cross_entropy(s.masked_fill(left_out, -torch.inf), partners)


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
