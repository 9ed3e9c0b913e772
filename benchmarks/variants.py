"""Ways to do a training step, which benchmarks of steps share: the published way or ours, and its precision."""

import argparse
import contextlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from medssl.engine.method import Method
from medssl.engine.parallel import make_deterministic
from medssl.errors import InputError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Variant(NamedTuple):
    """One way to do a step; its name is `str(variant)`."""

    kind: str  # plain or ours
    precision: str  # fp32, bf16 or fp16
    compiled: bool = False

    def __str__(self) -> str:
        return f"{self.kind}, {self.precision}" + (", compiled" if self.compiled else "")


PLAIN = Variant("plain", "fp32")


def choose_variants(cuda: bool, compiled: bool) -> list[Variant]:
    """What is measured; fp16 is for GPUs. "plain, bf16" separates what mixed precision gives from the rest."""
    precisions = ["fp32", "bf16", "fp16"] if cuda else ["fp32", "bf16"]
    variants = [PLAIN, Variant("plain", "bf16"), *(Variant("ours", p) for p in precisions)]
    return variants + [Variant("ours", p, True) for p in precisions if compiled]


def autocast(args: argparse.Namespace, variant: Variant) -> contextlib.AbstractContextManager:
    """Mixed precision where the variant has it."""
    if variant.precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(args.device, DTYPES[variant.precision])


def set_kernels(args: argparse.Namespace, variant: Variant) -> None:
    """On a GPU: cuDNN's benchmark mode for plain, what the training scripts do for ours."""
    if args.device == "cuda":
        make_deterministic(variant.kind == "ours" and args.deterministic)


def synchronise(args: argparse.Namespace) -> None:
    """Wait for the GPU, where there is one."""
    if args.device == "cuda":
        torch.cuda.synchronize()


def choose_device(device: str) -> str:
    """ "cuda" or "cpu" for what `--device` says.

    Raises:
        InputError: for a GPU that is not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this machine has no GPU that PyTorch can use")
    return device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def loop_step(
    args: argparse.Namespace,
    variant: Variant,
    method: Method,
    parameters: Iterable[nn.Parameter],
    lr: float,
    losses_of: Callable[[object], dict[str, Tensor]],
) -> Callable[[object], None]:
    """A function that does one step of engine/loop.py; what it is given goes to `losses_of`, which calls the method."""
    optimizer = torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=1e-4)
    scaler = torch.amp.GradScaler(args.device, enabled=variant.precision == "fp16")
    pending: list[Tensor] = []
    if variant.compiled:
        torch._dynamo.config.cache_size_limit = 64  # as engine/loop.py
        for part in method.compiled_parts():
            part.compile()

    def step(drawn: object) -> None:
        with autocast(args, variant):
            losses = losses_of(drawn)
        loss = sum(losses.values())
        pending.append(torch.stack([*losses.values()]).detach())
        waits = 1 if args.device == "cuda" else 0  # a GPU's step is looked at during the next
        if len(pending) > waits and not bool(torch.isfinite(pending.pop(0)).all()):
            raise RuntimeError(f"{variant}: the loss is not finite")
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        method.after_step(0.0)

    return step
