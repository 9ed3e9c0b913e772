"""Batches on the device, in half precision where asked, and whole splits one batch after the other."""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from medssl import processes
from medssl.datasets.base import ImageDataset, collate
from medssl.engine.guards import BadFiles
from medssl.engine.options import decoders
from medssl.engine.order import Order
from medssl.engine.parallel import Devices
from medssl.processes import Watch, iterating


def to_device(batch: dict, device: torch.device) -> dict:
    """Move images and labels, also lists of volumes; sizes stay on the CPU, where views are drawn."""

    def move(value: object) -> object:
        if isinstance(value, list):
            return [move(entry) for entry in value]
        return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

    return {key: value if key == "size" else move(value) for key, value in batch.items()}


def autocast(args: argparse.Namespace, device: torch.device) -> contextlib.AbstractContextManager:
    """Mixed precision as `--amp` and `--amp-dtype` say."""
    if not args.amp:
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if args.amp_dtype == "bf16" else torch.float16)


# Memory layout of networks, by spatial dimensions: what convolutions are fastest in.
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


def training_batches(
    data: ImageDataset, args: argparse.Namespace, devices: Devices, rows: slice, start: int, stop: int
) -> contextlib.AbstractContextManager[Watch]:
    """This process's `rows` of the batches of steps `start` to `stop`, in the run's order, not yet on the device.

    The block in which they are used ends the decoding processes, however it ends; `iterating` says what it raises.
    """
    loader = DataLoader(
        data,
        batch_sampler=Order(len(data), args.b, rows, args.seed, start, stop),
        num_workers=decoders(args),
        collate_fn=collate,
        worker_init_fn=processes.begin,
        pin_memory=devices.device.type == "cuda",
        prefetch_factor=4 if args.workers else None,
    )
    return iterating(loader, args.worker_timeout)


def evaluation_batches(data: ImageDataset, b: int, args: argparse.Namespace, devices: Devices) -> Iterator[dict]:
    """Every readable image of a split once, in order, `b` at a time, on the device.

    An unreadable image is noted in bad_files.txt and left out: its stand-in would count twice. "index" says
    which images of the split a batch has.

    Raises:
        InputError: when more than `--max-bad` of the files cannot be read, or a decoding process is lost.
    """
    loader = DataLoader(data, b, num_workers=decoders(args), collate_fn=collate, worker_init_fn=processes.begin)
    bad = BadFiles(Path(args.output), args.max_bad, data.files)
    asked = 0
    with iterating(loader, args.worker_timeout) as batches:
        for batch in batches:
            count = len(batch["index"])
            bad.note(batch["bad"])
            own = torch.nonzero(batch["index"] == torch.arange(asked, asked + count))[:, 0]
            asked += count
            if len(own) < count:
                batch = {key: value[own] if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
            if len(own):
                yield to_device(batch, devices.device)
