"""Devices and processes. No other file mentions ranks.

One process: a single device, or DataParallel over several `--gpus`. Under `torchrun`: one process per
device and DistributedDataParallel, on one machine or many.
"""

import os
import sys
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from medssl.engine.options import InputError


@dataclass
class Devices:
    """Where this process computes, and its place among the others.

    Attributes:
        device: of this process (the first one, with DataParallel).
        device_ids: GPUs of DataParallel; empty or one entry means none.
        rank, world: number of this process and of all processes.
    """

    device: torch.device
    device_ids: list[int] = field(default_factory=list)
    rank: int = 0
    world: int = 1
    control: object = None  # gloo group for agreements between processes that must not wait for GPUs

    @property
    def main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def share(self, batch_size: int, views: int = 1) -> slice:
        """This process's rows of a batch over all processes; `views` of each row go through the network together."""
        parts = max(self.world, len(self.device_ids))
        if batch_size % parts:
            raise InputError(f"--b {batch_size}: not a multiple of the {parts} devices; choose another batch size")
        if batch_size * views == parts:
            raise InputError(f"--b {batch_size}: batch norm needs at least 2 images on each of {parts} device(s)")
        count = batch_size // self.world
        return slice(self.rank * count, (self.rank + 1) * count)

    def any(self, value: bool) -> bool:
        """Whether `value` is true in any process; all processes must call it."""
        if self.world == 1:
            return value
        flag = torch.tensor([int(value)])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.control)
        return bool(flag.item())

    def mean(self, value: Tensor) -> Tensor:
        """Mean of a tensor over the processes, without gradient."""
        value = value.detach().clone()
        if self.world > 1:
            dist.all_reduce(value)
            value /= self.world
        return value

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            dist.barrier(group=self.control)

    def broadcast(self, value: object) -> object:
        """The main process's `value` (plain data) in every process."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]


class Run:
    """Calls networks on the devices: `run(net, *inputs)` inside a method's forward.

    Args:
        device_ids: over which `data_parallel` splits the inputs' first dimension; one or none: a plain call.
        generator: CPU generator of this step, the same in every process, for choices that the whole batch
            shares (a decoder level, a mixing weight).
    """

    def __init__(self, device_ids: list[int] | None = None, generator: torch.Generator | None = None) -> None:
        self.device_ids = device_ids or []
        self.generator = generator

    def __call__(self, net: nn.Module, *inputs: Tensor, **options: object) -> object:
        if len(self.device_ids) > 1:
            net = _Cast(net) if torch.is_autocast_enabled("cuda") else net
            return nn.parallel.data_parallel(net, inputs, self.device_ids, module_kwargs=options)
        return net(*inputs, **options)


class _Cast(nn.Module):
    """Carries autocast's type into DataParallel's threads, which would fall back to fp16 without a loss scaler."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.dtype = net, torch.get_autocast_dtype("cuda")

    def forward(self, *inputs: Tensor, **options: object) -> object:
        with torch.autocast("cuda", self.dtype):
            return self.net(*inputs, **options)


def setup(gpus: list[int] | None, device: str, deterministic: bool) -> Devices:
    """Choose devices from `--gpus` and `--device`, and join the other processes under torchrun.

    Raises:
        InputError: for GPUs that are not there, or an environment that torchrun did not make.
    """
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus and device == "cpu":
        raise InputError("--gpus and --device cpu exclude each other")
    absent = [gpu for gpu in gpus or [] if not 0 <= gpu < available]
    if absent:
        there = f"{available} GPU{'s' * (available != 1)}" if available else "no GPU"
        raise InputError(
            f"--gpus {','.join(map(str, gpus))}: this machine has {there} that PyTorch can use; "
            "leave --gpus out to use what is there"
        )
    if device == "cuda" and not available:
        raise InputError("--device cuda: this machine has no GPU that PyTorch can use")
    use_cuda = bool(available) and device != "cpu"
    make_deterministic(deterministic and use_cuda)

    world = int(os.environ.get("WORLD_SIZE") or 1)
    if world == 1:
        if not use_cuda:
            return Devices(torch.device("cpu"))
        ids = gpus or [0]
        torch.cuda.set_device(ids[0])
        return Devices(torch.device("cuda", ids[0]), ids)

    unset = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if unset:
        raise InputError(f"WORLD_SIZE is {world}, but {unset[0]} is not set; start with torchrun, or unset WORLD_SIZE")
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    place = torch.device("cpu")
    if use_cuda:
        ids = gpus or list(range(available))
        if local >= len(ids):
            raise InputError(f"torchrun started process {local} on this machine, which has {len(ids)} GPUs")
        place = torch.device("cuda", ids[local])
        torch.cuda.set_device(place)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if use_cuda else "gloo")
    control = dist.new_group(backend="gloo") if use_cuda else None
    return Devices(place, [], rank, world, control)


def make_deterministic(on: bool) -> None:
    """Choose GPU kernels that give the same bits on every run, or the fastest ones."""
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = not on
    torch.backends.cudnn.deterministic = on
    torch.use_deterministic_algorithms(on, warn_only=True)


def wrap(method: nn.Module, devices: Devices, find_unused: bool) -> nn.Module:
    """The method as the loop calls it: itself, or in DistributedDataParallel under torchrun."""
    if devices.world == 1:
        return method
    ids = [devices.device] if devices.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(method, device_ids=ids, find_unused_parameters=find_unused)


def finish() -> None:
    """Leave the process group, so that no warning follows a good run."""
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
