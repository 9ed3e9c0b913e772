"""A run's folder: what it was started with, whether it can continue, and what it notes about itself."""

import argparse
import contextlib
import json
import platform
import shutil
from pathlib import Path

import torch

import medssl
from medssl.engine.checkpoint import FORMAT_VERSION, lacks_last_relu, load_safe
from medssl.engine.parallel import Devices
from medssl.errors import InputError, unusable
from medssl.files import write_json
from medssl.locks import own_folder

# Options that may differ between a run and its continuation: none of them changes a result. Data may move, but not
# change, which their digest tells, with a message of its own.
FREE_OPTIONS = {
    "output", "resume", "steps", "workers", "worker_timeout", "cache", "max_bad", "gpus", "device", "save_every",
    "log_every", "log_gradients", "data", "data_digest", "compile", "trials", "format",
    "protocol",  # whose values are options, too
}  # fmt: skip
# Options that are newer than some runs, and the value by which these were made.
AS_EVER = {
    "augment": "full", "normalization": "weights", "precise_bn": 0, "all_train": False, "mask": "cells",
    "mirror": "xyz", "restoration_weight": 1.0, "skips": True, "projector": "plain", "joint_norm": True,
    "crop_scale": None, "crop_mm": None, "epoch_steps": 1, "series": 0, "decoder_skips": False,
    "encoder_lr_scale": 1.0, "mask_ratio": 0.0,
}  # fmt: skip
OR_RESUME = "another --output, or --resume never"
MOST_STEPS = 2**40  # of any run


def alone_in(output: str, devices: Devices) -> contextlib.AbstractContextManager:
    """Keep other runs out of `--output` while a block runs; the main process does it for all."""
    return own_folder(output) if devices.main else contextlib.nullcontext()


def open_output(
    args: argparse.Namespace, method_name: str, data_digest: str | None, devices: Devices
) -> tuple[Path, dict | None]:  # fmt: skip
    """Make the output folder, find the checkpoint to continue, and write config.json.

    Returns:
        the folder, and the checkpoint's content, or None for a run that begins.

    Raises:
        InputError: when the folder holds another method's run, or one with other options.
    """
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    if devices.main:
        probe = folder / ".write_test"
        probe.touch()
        probe.unlink()
    devices.wait()
    source = folder / "last.pt" if args.resume == "auto" else Path(args.resume)
    saved = None
    if args.resume != "never" and (args.resume != "auto" or source.exists()):
        saved = _checkpoint_of(source, method_name)
        refuse_changes(saved["config"], settings(args, data_digest), source)
    if devices.any((saved or {}).get("step", 0) != devices.broadcast((saved or {}).get("step", 0))):
        raise InputError(f"--output {folder}: not the same files on every machine; use a shared file system")
    if devices.main:
        if saved is None:
            # Files of an earlier run that --resume never replaces; their lines would mix with the new ones.
            for name in ("last.pt", "encoder.pt", "metrics.jsonl", "bad_files.txt", "warnings.txt"):
                (folder / name).unlink(missing_ok=True)
            for name in ("samples", "tensorboard"):
                shutil.rmtree(folder / name, ignore_errors=True)
        config = {
            "method": method_name,
            **settings(args, data_digest),
            "versions": versions(),
            "device": describe(devices),
        }
        write_json(folder / "config.json", config)
    return folder, saved


def _checkpoint_of(source: Path, method_name: str) -> dict:
    """The content of a run's last.pt; an InputError where it is none of this method."""
    saved = load_safe(source)
    with unusable(source, f"damaged; use {OR_RESUME}"):
        if not isinstance(saved, dict) or not {"name", "config", "step"} <= saved.keys():
            raise InputError(f"--resume {source}: not a checkpoint that can be continued")
        if type(saved["step"]) is not int or not 0 <= saved["step"] < MOST_STEPS:
            raise InputError(f"{source}: damaged: no number of steps; use {OR_RESUME}")
        if saved["name"] != method_name:
            raise InputError(f"{source}: a run of {saved['name']}, not {method_name}; choose another --output")
    return saved


def settings(args: argparse.Namespace, data_digest: str | None = None) -> dict:
    """What a run is known by: `plain` options, and the digest of its data where there is one."""
    return plain(args) | ({} if data_digest is None else {"data_digest": data_digest})


def refuse_changes(before: dict, now: dict, where: Path, instead: str = OR_RESUME) -> None:
    """Raise InputError when an option that changes results, the data, or the network that the same options make, differ
    from what a run was started with.

    Args:
        before, now: `settings`. where: is named. instead: says what else than the same can be done.
    """
    with unusable(where, f"its options are damaged; use {instead}"):
        arch = before.get("arch") or ""
        if lacks_last_relu(before.get("format", 1), arch) and not lacks_last_relu(now.get("format", 1), arch):
            raise InputError(
                f"{where}: was started by a version whose {arch} ended before its last ReLU; use that version, "
                + instead
            )
        # Runs without a digest are older than digests.
        if before.get("data_digest") not in (None, now.get("data_digest")):
            raise InputError(
                f"{where}: was started with other data: images, their order, lists or labels differ, or an "
                "earlier version split them otherwise; use the same data, " + instead
            )
        for key, value in now.items():
            # An option that the run did not know is newer than it; None was not given.
            was = before.get(key, value if value is None else AS_EVER.get(key, value))
            if key not in FREE_OPTIONS and was != value:
                raise InputError(f"{where}: was started with {key} {was}, now {value}; use the same value, {instead}")


def refuse_older(before: dict, since: int, where: Path, instead: str = OR_RESUME) -> None:
    """Raise InputError for `settings` from before the version `since` which networks begin with the random weights of
    today: what is trained from now on could not be compared with what was."""
    made = before.get("format", 1)
    if not isinstance(made, int) or made < since:
        raise InputError(
            f"{where}: was started by a version whose networks began with other random weights; use that version, "
            + instead
        )


def plain(args: argparse.Namespace) -> dict:
    """Options as JSON values, and the format (version) of what a run leaves."""
    return {**json.loads(json.dumps(vars(args), default=str)), "format": FORMAT_VERSION}


def versions() -> dict[str, str]:
    """What the run was made with."""
    return {"medssl": medssl.__version__, "torch": torch.__version__, "python": platform.python_version()}


def describe(devices: Devices) -> str:
    """The device in words."""
    if devices.device.type == "cuda":
        return f"{torch.cuda.get_device_name(devices.device)} × {devices.parts}"
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"
