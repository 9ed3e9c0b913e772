"""What a checkpoint holds."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from medssl.datasets.base import ImageDataset
from medssl.engine.checkpoint import FORMAT_VERSION, save_atomic
from medssl.engine.method import Method
from medssl.engine.order import make_optimizer
from medssl.engine.parallel import Devices
from medssl.engine.runs import settings
from medssl.errors import InputError, lacks, unusable


@dataclass
class State:
    """All that a checkpoint holds, and nothing else: a run goes on from it as if it had never been stopped.

    Attributes:
        method, optimizer, scaler: by their state dicts.
        images: of the training set, N.
        config: all options, with the data's digest.
        step: steps done.
        best: {"score", "epoch", "state"} of the best validation, or None.
        since_best: validations since then.
        over: whether they were too many (`--patience`).
    """

    method: Method
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    images: int
    config: dict
    step: int = 0
    best: dict | None = None
    since_best: int = 0
    over: bool = False
    name: str = field(init=False)

    def __post_init__(self) -> None:
        self.name = type(self.method).__name__

    # Where the run is

    @property
    def epoch(self) -> float:
        """Passes over the training images."""
        return self.step * self.config["b"] / self.images

    def starts_epoch(self) -> bool:
        """Whether the next step is the first of an epoch."""
        b, n = self.config["b"], self.images
        return self.step == 0 or self.step * b // n > (self.step - 1) * b // n

    def ends_epoch(self, total: int) -> bool:
        """Whether the last step was the last of an epoch, or of all the `total`."""
        return self.starts_epoch() or self.step == total

    # The best of it

    def snapshot(self, judged: dict) -> dict:
        """A validation's {"score", "epoch"}, with the weights that it judged."""
        return {**judged, "state": {k: v.detach().cpu().clone() for k, v in self.method.state_dict().items()}}

    def is_best(self, judged: dict) -> bool:
        """Whether a validation is better than all before."""
        return self.best is None or judged["score"] > self.best["score"]

    def keep(self, judged: dict, patience: int) -> None:
        """Note a validation; the run is over after `patience` without gain (0: never)."""
        self.since_best += 1
        if self.is_best(judged):
            self.best, self.since_best = self.snapshot(judged), 0
        self.over = bool(patience) and self.since_best >= patience

    # On the disk

    def save(self, path: Path) -> None:
        """Write it."""
        content = {
            "name": self.name, "method": self.method.state_dict(), "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(), "step": self.step, "best": self.best, "since_best": self.since_best,
            "over": self.over, "images": self.images,
            "config": self.config, "version": FORMAT_VERSION,
        }  # fmt: skip
        save_atomic(content, path)

    def restore(self, saved: dict, folder: Path) -> None:
        """Take over what `save` wrote; `folder`, the run's, is for messages.

        Raises:
            InputError: for weights of other shapes, and another number of images.
        """
        with unusable(folder, "its checkpoint is damaged; use another --output, or --resume never"):
            if saved["images"] != self.images:
                raise InputError(
                    f"{folder}: the data set had {saved['images']} images, now {self.images}; use another --output"
                )
            try:
                self.method.load_state_dict(saved["method"])
                load_optimizer(self.optimizer, saved["optimizer"])
            except (RuntimeError, ValueError, KeyError) as error:
                if lacks(error):
                    raise
                raise InputError(f"{folder}: its checkpoint does not fit: {str(error).splitlines()[0]}") from None
            self.scaler.load_state_dict(saved["scaler"])
            self.step, self.since_best, self.over = saved["step"], saved["since_best"], saved["over"]
            if type(self.since_best) is not int or type(self.over) is not bool:
                raise ValueError("no counts of validations")
            if saved["best"] is not None:
                score, epoch = float(saved["best"]["score"]), float(saved["best"]["epoch"])
                self.best = {"score": score, "epoch": epoch, "state": self.like_method(saved["best"]["state"])}

    def like_method(self, saved: dict) -> dict[str, Tensor]:
        """A saved state dict on the CPU; a ValueError where it is not one of the method's."""
        own = self.method.state_dict()
        if {key: value.shape for key, value in saved.items()} != {key: value.shape for key, value in own.items()}:
            raise ValueError("other entries")
        return {key: torch.empty_like(own[key], device="cpu").copy_(saved[key].detach()) for key in saved}


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Give an optimizer its saved state; a ValueError for one of other options, shapes or kinds."""
    before = [dict(group) for group in optimizer.param_groups]
    shapes = {parameter.shape for group in before for parameter in group["params"]}
    for key, value in (pair for values in saved["state"].values() for pair in values.items()):
        plain = value.layout == torch.strided if isinstance(value, Tensor) else isinstance(value, int | float | None)
        if not plain:
            raise ValueError("the optimizer's state holds no plain numbers")
        if isinstance(value, Tensor) and value.ndim and value.shape not in shapes:  # before memory is taken for it
            raise ValueError(f"the optimizer's {key} has shape {tuple(value.shape)}")
    optimizer.load_state_dict(saved)
    for own, group in zip(before, optimizer.param_groups, strict=True):
        known = own.keys() & group.keys() - {"params", "lr"}  # another version of torch may have more
        if own.keys() - group.keys() or any(own[key] != group[key] for key in known):  # torch fills in what is newer
            raise ValueError("the optimizer's options differ")
    for parameter, own in optimizer.state.items():
        for key, value in own.items():
            if not isinstance(value, Tensor):
                continue
            if value.ndim and value.shape != parameter.shape:
                raise ValueError(f"the optimizer's {key} has shape {tuple(value.shape)}")
            own[key] = value.detach()  # without the hooks that a file may have given it


def start(
    method: Method, data: ImageDataset, args: argparse.Namespace, devices: Devices, folder: Path, saved: dict | None,
    parameters: Sequence[dict] | None,
) -> State:  # fmt: skip
    """The state from which a run goes on: the beginning, or the checkpoint's content `saved`.

    Args:
        method: on its device. parameters: optimiser groups; all parameters of the method by default.
    """
    groups = parameters or [{"params": [p for p in method.parameters() if p.requires_grad]}]
    scaler = torch.amp.GradScaler(devices.device.type, enabled=args.amp and args.amp_dtype == "fp16")
    state = State(method, make_optimizer(groups, args), scaler, len(data), settings(args, data.digest))
    if saved is not None:
        state.restore(saved, folder)
    return state


def judged(scores: dict[str, float], state: State) -> dict:
    """A validation as `State` keeps it: a score that is not finite is the worst."""
    score = scores["score"] if math.isfinite(scores["score"]) else -math.inf
    return {"score": score, "epoch": state.epoch}
