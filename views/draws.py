"""The random numbers of views.

Every random number of a step is drawn on the CPU for the whole batch, whatever the number of processes, and each
process takes the rows of its own images. So one GPU, four GPUs and four machines see the same views, and nothing that
the device computes has to be waited for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """Uniform random numbers for the images of one batch, the same for any number of processes.

    Args:
        seeds: what the numbers depend on, such as (seed, step).
        total: images in the whole batch, over all processes.
        start, count: the rows that belong to this process.
    """

    seeds: tuple[int, ...]
    total: int
    start: int = 0
    count: int | None = None

    def generator(self, stream: int) -> torch.Generator:
        """A CPU generator that depends on the seeds and `stream` alone."""
        state = np.random.SeedSequence([*self.seeds, stream]).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(state >> np.uint64(1)))

    def uniform(self, stream: int, columns: int) -> Tensor:
        """(count, columns) numbers in [0, 1), on the CPU."""
        numbers = torch.rand(self.total, columns, generator=self.generator(stream))
        count = self.total - self.start if self.count is None else self.count
        return numbers[self.start : self.start + count]


class ImageDraws:
    """Uniform random numbers that belong to each image, whatever its batch: `Draws` for evaluation.

    Args:
        seed, indices: what the numbers of a row depend on.
    """

    def __init__(self, seed: int, indices: Sequence[int]) -> None:
        self.images = [Draws((seed, index), 1) for index in indices]

    def uniform(self, stream: int, columns: int) -> Tensor:
        """(images, columns) numbers in [0, 1), on the CPU."""
        return torch.cat([draws.uniform(stream, columns) for draws in self.images])


class Columns:
    """Hands out the columns of a matrix of uniform numbers (N, K) one operation after the other."""

    def __init__(self, numbers: Tensor) -> None:
        self.numbers, self.used = numbers, 0

    def take(self, n: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """The next `n` columns, (N, n), scaled to [low, high)."""
        if self.used + n > self.numbers.shape[1]:
            raise ValueError(f"{self.used + n} random columns wanted, {self.numbers.shape[1]} drawn")
        self.used += n
        return low + (high - low) * self.numbers[:, self.used - n : self.used]


def view_major(numbers: Tensor, views: int) -> Columns:
    """Numbers (B, V·K) of images → columns (V·B, K) of their views, in the views' order."""
    return Columns(numbers.view(len(numbers), views, -1).transpose(0, 1).flatten(0, 1))


def seeds_of(draws: Draws, stream: int) -> list[int]:
    """A seed for every image of this process: fields of noise are too large to draw for all processes."""
    high, low = (draws.uniform(stream, 2).double() * 2**24).long().unbind(1)
    return (high * 2**24 + low).tolist()


def random_field(like: Tensor, seeds: Sequence[int], fill: Callable = Tensor.normal_) -> Tensor:
    """Random numbers (V·N, …) of the shape and device of `like`; the V views of image i depend on seeds[i] alone."""
    field = torch.empty_like(like)
    generator = torch.Generator(like.device)
    for i, seed in enumerate(seeds):
        generator.manual_seed(seed)
        for row in field[i :: len(seeds)]:
            fill(row, generator=generator)
    return field
