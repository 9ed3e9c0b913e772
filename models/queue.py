"""Memories of embeddings of earlier steps: what a contrastive loss takes its negatives from."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medssl.engine.parallel import gather
from medssl.losses.contrastive import l2_normalize, make_contrast, similarities


class KeyQueue(nn.Module):
    """The newest K keys, first in, first out (MoCo, arXiv 1911.05722, §3.1). Starts with random directions.

    Attributes:
        keys: (K, C) float32, unit length.
        pointer: () int64, where the next key goes.
    """

    def __init__(self, size: int = 16384, channels: int = 128) -> None:
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(size, channels), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Replace the oldest keys, wrapping around; of more than K keys the last K stay.

        Args:
            keys: (B, C) unit length, this process's rows; all processes enqueue the rows of all, in the same order.
        """
        keys, size = gather(keys.float()), len(self.keys)
        skipped = max(0, len(keys) - size)
        places = (self.pointer + torch.arange(skipped, len(keys), device=keys.device)) % size
        self.keys.index_copy_(0, places, keys[skipped:])
        self.pointer.add_(len(keys)).remainder_(size)


class QueueContrast(nn.Module):
    """ℓ(n q, n k) of queries and their keys against a queue, which takes the step's keys when the step is done: no
    query meets a key of its own images among its negatives.

    Args:
        loss: "infonce" or "nce". temperature: T. images: n of NCE. size: keys K in the queue.
    """

    def __init__(self, loss: str, temperature: float, images: int, size: int, channels: int = 128) -> None:
        super().__init__()
        self.loss = make_contrast(loss, temperature, images)
        self.queue = KeyQueue(size, channels)
        self.keys: list[Tensor] = []

    def forward(
        self, pairs: Iterable[tuple[Tensor, Tensor]], keys: Tensor | None = None, count: Tensor | None = None
    ) -> list[Tensor]:
        """The loss of each pair (q, k), both (B, C) of any length; k takes no gradient.

        Args:
            keys: (N, C), what enters the queue, as many in each process; by default the keys of the pairs.
            count: as in `InfoNCE`.
        """
        pairs = [(l2_normalize(q), l2_normalize(k)) for q, k in pairs]
        self.keys = [k for _, k in pairs] if keys is None else [l2_normalize(keys)]
        return [self.loss(similarities(q, k, self.queue.keys), count) for q, k in pairs]

    def after_step(self) -> None:
        """Enqueue the step's keys, in their order."""
        for keys in self.keys:
            self.queue.enqueue(keys)
        self.loss.after_step()


class MemoryBank(nn.Module):
    """One embedding for every image of the data set (InsDis, arXiv 1805.01978, §3.2).

    Attributes:
        slots: (N, C) float32, unit length; random directions until an image is seen.
    """

    def __init__(self, images: int, channels: int = 128) -> None:
        super().__init__()
        self.register_buffer("slots", F.normalize(torch.randn(images, channels), dim=1))

    @torch.no_grad()
    def update(self, index: Tensor, embeddings: Tensor, momentum: float) -> None:
        """slot ← n(m · slot + (1 − m) · embedding), in all processes for the rows of all.

        Args:
            index: (B,) int64 image numbers. One may come twice, where a batch spans two epochs, is
                larger than the set, or an unreadable image is replaced: the last counts.
            embeddings: (B, C) unit length.
            momentum: m.
        """
        index, embeddings = gather(index), gather(embeddings.float())
        rows = list({image: row for row, image in enumerate(index.tolist())}.values())
        index, embeddings = index[rows], embeddings[rows]
        self.slots[index] = F.normalize(momentum * self.slots[index] + (1 - momentum) * embeddings, dim=1)
