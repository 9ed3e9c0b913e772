"""Ways to do a training step, which benchmarks of steps share: the published way or ours, and its precision."""

import argparse
import contextlib
from typing import NamedTuple

import torch

from medssl.engine.options import InputError
from medssl.engine.parallel import make_deterministic

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
