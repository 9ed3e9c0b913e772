"""Devices and processes. No other file of the code knows the number of this process, or of all.

One process: a single device, or DataParallel over several `--gpus`. Under `torchrun`: one process per
device and DistributedDataParallel, on one machine or many.
"""

import contextlib
import inspect
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from medssl.errors import InputError
from medssl.processes import end_with_parent

LAUNCHED = "TORCHELASTIC_RUN_ID"  # in the environment of what torchrun starts
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")  # is there where one is loaded


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
    asked: bool = True  # whether the user named the GPUs

    @property
    def main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    @property
    def parts(self) -> int:
        """Into how many parts a batch is split, over processes or GPUs."""
        return max(self.world, len(self.device_ids))

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.world == 1

    def narrow(self, batch_size: int, views: int, compiled: bool) -> None:
        """Use fewer of GPUs that nobody asked for where a batch cannot be split over all, `views` of each row going
        through the network together, and one alone where networks are compiled."""
        if self.asked or len(self.device_ids) < 2:
            return
        fits = [n for n in range(1, len(self.device_ids)) if batch_size % n == 0 and batch_size * views > n]
        whole = batch_size % len(self.device_ids) == 0 and batch_size * views > len(self.device_ids)
        count = 1 if compiled else len(self.device_ids) if whole else max(fits, default=1)
        if count < len(self.device_ids):
            why = "--compile" if compiled else f"--b {batch_size}"
            print(f"note: {why}: {count} of the {len(self.device_ids)} GPUs {'is' if count == 1 else 'are'} used")
            self.device_ids = self.device_ids[:count]

    def own_rows(self, batch_size: int, views: int = 1) -> slice:
        """This process's rows of a batch over all processes; `views` of each row go through the network together."""
        parts = self.parts
        if batch_size % parts:
            raise InputError(f"--b {batch_size}: not a multiple of the {parts} devices; choose another batch size")
        if batch_size * views == parts:
            raise InputError(f"--b {batch_size}: batch norm needs at least 2 images on each of {parts} device(s)")
        count = batch_size // self.world
        return slice(self.rank * count, (self.rank + 1) * count)

    def own_count(self, batch_size: int) -> int:
        """How many images a process has of a batch over all of them; at least one."""
        return max(1, batch_size // self.world)

    def own_file(self, path: Path) -> Path:
        """A file's name with this process's number: `loss.json` → `loss_0.json`."""
        return path.with_name(f"{path.stem}_{self.rank}{path.suffix}")

    def seed_step(self, seed: int, step: int) -> torch.Generator:
        """Seed torch's generators for a step, in each process otherwise; returns one that is the same in all."""
        torch.manual_seed(int(np.random.SeedSequence([seed, step, self.rank, 1]).generate_state(1)[0]))
        return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, step, 2]).generate_state(1)[0]))

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

    @property
    def parts(self) -> int:
        """Into how many parts networks see a batch, each with batch statistics of its own."""
        return max(world_size(), len(self.device_ids))

    def permutation(self, count: int) -> Tensor:
        """A random order of the whole batch, the same in all processes, which have `count` images each."""
        return torch.randperm(self.whole(count), generator=self.generator)

    def uniform(self, count: int, columns: int) -> Tensor:
        """(count, columns) numbers in [0, 1) on the CPU: this process's rows of what the whole batch draws."""
        return self.own_rows(torch.rand(self.whole(count), columns, generator=self.generator))

    def whole(self, count: int) -> int:
        """How many rows the whole batch has, of which this process has `count`."""
        return count * world_size()

    def own_rows(self, x: Tensor) -> Tensor:
        """This process's rows of what the whole batch has, as many in each process."""
        count = len(x) // world_size()
        return x[row_offset(count) : row_offset(count) + count]

    def mean_over(self, value: Tensor, least: int = 0) -> Tensor:
        """The mean over the processes of a number (), without gradient; at least that of a sum of `least`."""
        return gather(value[None]).sum().clamp(min=least) / world_size()

    def rows(self, x: Tensor, order: Tensor) -> Tensor:
        """This process's rows of the whole batch in a new order, without gradient.

        Args:
            x: (B, …), this process's images.
            order: (B over all processes,) int64, on the CPU.
        """
        own = order.chunk(world_size())[process_rank()].to(x.device, non_blocking=True)
        return gather(x.detach())[own]

    def shuffled(self, net: nn.Module, x: Tensor) -> object:
        """A network without gradient on a batch shuffled over all devices (Shuffle-BN, MoCo, arXiv 1911.05722, §3.3).

        So the batch statistics of a key are not those of its query. Every output is put back in order, embeddings and
        feature maps alike. On one device, where all share one batch, nothing moves.

        Args:
            x: (B, …).

        Returns:
            The network's output, tensors (B, …) or dicts, lists and tuples of them.
        """
        order = self.permutation(len(x))  # drawn on one device too, for the same numbers to follow
        with torch.no_grad():
            if self.parts == 1:
                return self(net, x)
            return map_tensors(self(net, self.rows(x, order)), lambda y: self.rows(y, order.argsort()))

    def __call__(self, net: nn.Module, *inputs: Tensor, **options: object) -> object:
        if len(self.device_ids) > 1:
            net = _Cast(net) if torch.is_autocast_enabled("cuda") else net
            return nn.parallel.data_parallel(net, inputs, self.device_ids, module_kwargs=options)
        return net(*inputs, **options)


def map_tensors(value: object, change: Callable[[Tensor], Tensor]) -> object:
    """Apply `change` to a tensor, or to all in dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: map_tensors(part, change) for key, part in value.items()}
    return type(value)(map_tensors(part, change) for part in value)


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def process_rank() -> int:
    """The number of this one."""
    return dist.get_rank() if dist.is_initialized() else 0


def row_offset(count: int) -> int:
    """Where this process's rows begin among those of all, `count` each."""
    return process_rank() * count


def gather(x: Tensor) -> Tensor:
    """The rows of all processes, in the order of the whole batch, without gradient: (B, …) → (B · processes, …)."""
    if world_size() == 1:
        return x.detach()
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


def gather_with_gradient(x: Tensor) -> Tensor:
    """The rows of all processes, in the order of the whole batch; gradients go back to the process a row is from.

    What a process gets is the sum of all processes' gradients. DistributedDataParallel divides by their number, so a
    loss whose mean over the processes is meant comes out right.
    """
    return x if world_size() == 1 else _Gather.apply(x)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return gather(x)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        # A sum of everything, not a reduce-scatter, which gloo lacks: embeddings are small.
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # others may hold the same tensor
        dist.all_reduce(gradient)
        return gradient.chunk(world_size())[process_rank()]


class _Cast(nn.Module):
    """Carries autocast's type into DataParallel's threads, which would fall back to fp16 without a loss scaler."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.dtype = net, torch.get_autocast_dtype("cuda")

    def forward(self, *inputs: Tensor, **options: object) -> object:
        with torch.autocast("cuda", self.dtype):
            return self.net(*inputs, **options)


def gpu_trouble() -> str | None:
    """Why torch cannot use the GPUs of this machine, and what to do, in one line; None where it can, or there are none.

    PyTorch's default wheels bring a version of CUDA that older drivers and cards do not know. It warns of that among
    other lines, and computes on the CPU.
    """
    if torch.version.cuda is None or not NVIDIA_DRIVER.exists():
        return None
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    what = f"torch {torch.__version__} with CUDA {torch.version.cuda}"
    older = "update the driver, or install a torch for an older CUDA, such as torch==2.6.* with torchvision==0.21.*"
    if not usable and any("driver" in str(each.message) and "too old" in str(each.message) for each in told):
        return f"{what} cannot use this machine's GPUs: its driver is too old; {older}"
    known = [int(name.rpartition("_")[2].rstrip("af")) for name in torch.cuda.get_arch_list() if name.startswith("sm_")]
    for i in range(torch.cuda.device_count() if usable and known else 0):
        major, minor = torch.cuda.get_device_capability(i)
        if 10 * major + minor < min(known):
            name = f"{torch.cuda.get_device_name(i)} (compute capability {major}.{minor})"
            return f"{what} has no code for {name}; {older}"
    return None


def count_gpus(wanted: list[int] | None) -> int:
    """How many GPUs there are; an InputError where one of `--gpus` is not among them."""
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if any(not 0 <= gpu < available for gpu in wanted or []):
        there = f"{available} GPU{'s' * (available != 1)}" if available else "no GPU"
        raise InputError(
            f"--gpus {','.join(map(str, wanted))}: this machine has {there} that PyTorch can use; "
            "leave --gpus out to use what is there"
        )
    return available


def setup(gpus: list[int] | None, device: str, deterministic: bool, several: bool = True) -> Devices:
    """Choose devices from `--gpus` and `--device`, and join the other processes under torchrun.

    Args:
        gpus: None for all that CUDA_VISIBLE_DEVICES leaves visible; the first of them without `several`.

    Raises:
        InputError: for GPUs that are not there, or an environment that torchrun did not make.
    """
    if gpus and device == "cpu":
        raise InputError("--gpus and --device cpu exclude each other")
    trouble = gpu_trouble() if device != "cpu" else None
    if trouble and (gpus or device == "cuda"):
        raise InputError(trouble)
    if trouble and int(os.environ.get("LOCAL_RANK", "0")) == 0:
        print(f"note: {trouble}", file=sys.stderr)
    available = count_gpus(gpus)
    if device == "cuda" and not available:
        raise InputError("--device cuda: this machine has no GPU that PyTorch can use")
    use_cuda = bool(available) and device != "cpu"
    make_deterministic(deterministic and use_cuda)

    world = int(os.environ.get("WORLD_SIZE") or 1)
    if world == 1:
        if not use_cuda:
            return Devices(torch.device("cpu"))
        ids = gpus or [*range(available if several else 1)]
        if not gpus and len(ids) > 1:
            print(f"{len(ids)} GPUs: each batch is split over all of them; --gpus 0 uses one", flush=True)
        torch.cuda.set_device(ids[0])
        return Devices(torch.device("cuda", ids[0]), ids, asked=gpus is not None)

    if LAUNCHED in os.environ:
        end_with_parent()
        if orphaned():  # whoever should bring the processes together is gone, which they would wait for
            raise InputError("torchrun, which started this process, has ended")
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


def orphaned() -> bool:
    """Whether the process that started this one has ended, so that the system's first one is its parent; torchrun
    itself may be that in a container."""
    with contextlib.suppress(OSError):
        return os.getppid() == 1 and b"torch" not in Path("/proc/1/cmdline").read_bytes()
    return False


def make_deterministic(on: bool) -> None:
    """Choose GPU kernels that give the same bits on every run, or the fastest ones."""
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = not on
    torch.backends.cudnn.deterministic = on
    torch.use_deterministic_algorithms(on, warn_only=True)


def wrap(method: nn.Module, devices: Devices, find_unused: bool, sync_batch_norm: bool = False) -> nn.Module:
    """The method as the loop calls it: itself, or in DistributedDataParallel under torchrun."""
    if devices.world == 1:
        return method
    cuda = devices.device.type == "cuda"
    if sync_batch_norm and cuda:  # torch has it for GPUs alone
        method = nn.SyncBatchNorm.convert_sync_batchnorm(method)
    ids = [devices.device] if cuda else None
    # Queues and memories are equal in all processes by themselves, and large; batch norms' running statistics are
    # used in evaluation alone, which is the main process's.
    known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    alone = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # until torch 2.14
    return nn.parallel.DistributedDataParallel(
        method, device_ids=ids, find_unused_parameters=find_unused, **{alone: False}
    )


def finish() -> None:
    """Leave the process group, so that no warning follows a good run."""
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
