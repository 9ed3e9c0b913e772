"""The order of images, the learning rate, and the random numbers of a step."""

import argparse
import math
from collections.abc import Iterator

import numpy as np
import timm.optim
import torch


class Order:
    """The order of images: epochs' permutations, one after the other, cut into batches of equal size.

    Step s takes places s·B to (s+1)·B − 1 of that stream, so every image is seen once an epoch, no batch is
    short, and any step can be found without those before it. Indices are those of this process.

    Args:
        count: images N. batch: images per step B, over all processes. rows: this process's.
        seed: epoch e is permuted by (seed, e).
    """

    def __init__(self, count: int, batch: int, rows: slice, seed: int, start: int, stop: int) -> None:
        self.count, self.batch, self.rows, self.seed = count, batch, rows, seed
        self.start, self.stop = start, stop
        self._permutation: tuple[int, np.ndarray] = (-1, np.empty(0, int))

    def _epoch(self, epoch: int) -> np.ndarray:
        if self._permutation[0] != epoch:
            self._permutation = (epoch, np.random.default_rng([self.seed, epoch]).permutation(self.count))
        return self._permutation[1]

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, self.stop):
            places = range(step * self.batch, (step + 1) * self.batch)
            yield [int(self._epoch(p // self.count)[p % self.count]) for p in places][self.rows]


def learning_rate(args: argparse.Namespace, epoch: float) -> float:
    """The learning rate at a (fractional) epoch, as `--schedule`, `--warmup-epochs` and `--milestones` say."""
    if epoch < args.warmup_epochs:
        return args.lr * epoch / args.warmup_epochs
    if args.schedule == "cosine":
        span = max(args.epochs - args.warmup_epochs, 1e-9)
        return args.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, (epoch - args.warmup_epochs) / span)))
    if args.schedule == "step":
        return args.lr * args.gamma ** sum(epoch >= m for m in args.milestones)
    return args.lr


def set_learning_rate(optimizer: torch.optim.Optimizer, args: argparse.Namespace, epoch: float) -> None:
    """Give all groups the learning rate of an epoch, times their own "lr_scale" where they have one."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(args, epoch) * group.get("lr_scale", 1.0)


def make_optimizer(parameters: list[dict], args: argparse.Namespace) -> torch.optim.Optimizer:
    """SGD, LARS, Adam or AdamW over the parameters."""
    if args.optimizer == "lars":
        # Biases and the weights of norms neither decay nor have their step adapted (BYOL, arXiv 2006.07733, §3.3).
        groups = [
            {**group, "params": [p for p in group["params"] if (p.ndim > 1) == large], **more}
            for group in parameters
            for large, more in ((True, {"always_adapt": True}), (False, {"weight_decay": 0.0}))
        ]
        groups = [group for group in groups if group["params"]]
        return timm.optim.Lars(groups, args.lr, momentum=args.momentum, weight_decay=args.weight_decay)
    if args.optimizer == "sgd":
        # Not fused: torch's fused SGD fails when a parameter gets its first gradient later than others,
        # as the heads of decoder levels do.
        return torch.optim.SGD(parameters, args.lr, momentum=args.momentum, weight_decay=args.weight_decay)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[args.optimizer]
    return kind(parameters, args.lr, betas=tuple(args.betas), weight_decay=args.weight_decay, fused=True)
