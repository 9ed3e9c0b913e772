"""Encoders by name, and the weights they start from. In 2D those of segmentation-models-pytorch, whose weights carry
torchvision's key names; in 3D the U-Net's way down."""

import logging
import math
import sys
import urllib.error
from collections.abc import Sequence
from pathlib import Path

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medssl.engine.checkpoint import WITHOUT_LAST_RELU, find_state_dict, lacks_last_relu, load_safe
from medssl.errors import InputError
from medssl.models.unet3d import WIDTHS, UNet3dEncoder

DEFAULT_ARCH = {2: "resnet18", 3: "unet3d"}  # by dimension
COMMON = {  # that published files hold, by dimension
    2: ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "densenet121", "densenet169", "densenet201"),
    3: tuple(WIDTHS),
}
METADATA = "medssl"  # under which prepare_models.py keeps what a flat state dict has no place for
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
INPUTS = {  # by the names that MAGICAL's fine-tuning has for them, and "half", MedMNIST's
    "imagenet": IMAGENET,
    "chestx-ray": {"mean": [0.5056] * 3, "std": [0.252] * 3},
    "half": {"mean": [0.5] * 3, "std": [0.5] * 3},
    "none": {"mean": [0.0] * 3, "std": [1.0] * 3},
}

# Where published checkpoints keep an encoder, longest first so that `module.` does not win by accident.
PREFIXES = (
    "module.model.encoder.",
    "module.encoder_q.",
    "student.encoder.",  # in the last.pt of our runs
    "network.encoder.",
    "module.encoder.",
    "encoder_q.0.",  # ConCL's
    "densenet121.module.",
    "encoder.module.",
    "model.encoder.",
    "module.",
    "encoder.",
    "backbone.",
    "",
)


def make_encoder(arch: str, channels: int | None = None, dims: int = 2) -> nn.Module:
    """A randomly initialised encoder.

    `encoder(x)` maps x (B, channels, *S) to a list of feature maps, shallow to deep, each half the size
    of the one before it; `encoder.out_channels` lists their channels. In 2D the first map is x itself, and the last one
    is what the published network averages; EfficientNets' alone is the one before their last convolution, to 1280
    channels or more, which the library leaves out.

    Args:
        arch: in 2D a name of segmentation-models-pytorch; in 3D a key of `unet3d.WIDTHS`.
        channels: of the input; 3 in 2D and 1 in 3D by default.
        dims: spatial dimensions of the input.

    Raises:
        InputError: for an unknown name, or one of the other dimension.
    """
    check_arch(arch, dims)
    if dims == 3:
        return UNet3dEncoder(channels or 1, width_of(arch))
    encoder = smp.encoders.get_encoder(arch, in_channels=channels or 3, depth=5, weights=None)
    if arch.startswith(WITHOUT_LAST_RELU):  # which the library's ends before
        encoder.register_forward_hook(_last_relu)
    return encoder


def _last_relu(_encoder: nn.Module, _inputs: tuple, maps: Sequence[Tensor]) -> list[Tensor]:
    """The maps with a ReLU on the last one, as torchvision's DenseNet and timm's Xception have it before they
    average."""
    return [*maps[:-1], F.relu(maps[-1])]


def is_encoder(name: object) -> bool:
    """Whether a name is one of ours, of either dimension."""
    return name in WIDTHS or name in smp.encoders.get_encoder_names()


def arch_of(init: str, dims: int) -> str | None:
    """The encoder whose weights `--init` names, so that nobody need repeat it.

    Returns:
        what a checkpoint says, or else the largest of `COMMON` whose every entry it has, in its shape (a ResNet-34 has
        all of a ResNet-18's); None where it has none of them, is of another dimension, or is no file.
    """
    if init in ("random", "imagenet"):
        return None
    content = load_safe(init)
    own = getattr(content, "_metadata", {}).get(METADATA, {})
    for fields in (own, content if isinstance(content, dict) else {}):
        if is_encoder(fields.get("arch")):  # others' names may mean other things
            return fields["arch"] if (fields["arch"] in WIDTHS) == (dims == 3) else None
    state, sizes = find_state_dict(content, init), {}
    for arch in COMMON[dims]:
        with torch.device("meta"):
            wanted = make_encoder(arch, dims=dims).state_dict()
        there = _strip(state, wanted)
        learned = [key for key in wanted if not key.endswith("num_batches_tracked")]
        if all(key in there and there[key].shape == wanted[key].shape for key in learned[dims == 3 :]):
            sizes[arch] = len(learned)  # the first kernel of volumes may have another number of channels
    return max(sizes, key=sizes.get, default=None)


def read_encoder(path: str | Path) -> tuple[str, dict[str, Tensor], dict]:
    """The 2D encoder of a checkpoint of ours, whether exported or not, or of a published one.

    Returns:
        its name, its state dict with the library's names, and what the file says beside.

    Raises:
        InputError: for a file that cannot be read, or holds no encoder that is known.
    """
    content = load_safe(path)
    if isinstance(content, dict) and {"method", "config", "optimizer"} <= content.keys():  # a run's last.pt
        beside = Path(path).with_name("encoder.pt")  # which knows what inputs were
        known = load_safe(beside).get("normalization") if beside.is_file() else None
        content = {
            "state_dict": content["method"], "arch": content["config"].get("arch"), "version": content.get("version"),
            "normalization": known,
        }  # fmt: skip
    fields = {**getattr(content, "_metadata", {}).get(METADATA, {}), **(content if isinstance(content, dict) else {})}
    arch = fields["arch"] if isinstance(fields.get("arch"), str) else arch_of(str(path), 2)
    if arch in WIDTHS or fields.get("dims") == 3:
        raise InputError(f"{path}: of volumes, which other tools' networks are not for; leave it as it is")
    if arch not in smp.encoders.get_encoder_names():
        raise InputError(f"{path}: holds no encoder that is known; give a run's encoder.pt")
    wanted = make_encoder(arch).state_dict()
    state = _strip(find_state_dict(content, path), wanted)
    for key, value in wanted.items():
        if not key.endswith("num_batches_tracked") and (key not in state or state[key].shape != value.shape):
            raise InputError(f"{path}: does not hold a whole {arch} encoder: {key} is missing, or of another shape")
    return arch, {key: state[key] for key in wanted if key in state}, fields


def default_arch(inits: Sequence[str], dims: int, otherwise: str | None = None) -> str:
    """The encoder of several `--init`: that of the first that says which, or else `otherwise`, or the dimension's."""
    known = (arch for arch in (arch_of(init, dims) for init in inits) if arch)
    return next(known, otherwise or DEFAULT_ARCH[dims])


def check_arch(arch: str, dims: int) -> None:
    """Raise InputError unless there is such an encoder for images of `dims` dimensions."""
    if dims == 3:
        width_of(arch)
        return
    if arch in WIDTHS:
        raise InputError(f"--arch {arch}: a 3-dimensional encoder, and the images have {dims}; try resnet18")
    if arch not in smp.encoders.get_encoder_names():
        close = [name for name in smp.encoders.get_encoder_names() if name[:4] == arch[:4].lower()]
        hint = f"; did you mean one of {', '.join(close[:8])}" if close else ""
        raise InputError(f"--arch {arch}: not an encoder of segmentation-models-pytorch{hint}")


def width_of(arch: str) -> int:
    """Channels of the first level of a 3D U-Net; an InputError for another name."""
    if arch not in WIDTHS:
        raise InputError(f"--arch {arch}: no 3-dimensional encoder; there are {', '.join(WIDTHS)}")
    return WIDTHS[arch]


def initialise(encoder: nn.Module, arch: str, init: str) -> dict:
    """Set an encoder's starting weights in place, as `--init` says.

    Args:
        encoder: what `make_encoder` gave.
        init: "random" (left as it is), "imagenet" (2D; downloaded by the encoder library), or a checkpoint:
            our `encoder.pt`, or a published file with a state dict. In 3D, where the file was trained on one
            channel and the encoder takes several, the first kernel is repeated for each and divided by their number.

    Returns:
        {"init", "matched", "missing", "unexpected", "normalization"}; counts of keys, and what inputs the weights
        expect: {"mean", "std"} of each channel in 2D (of inputs in [0, 1]), {"kind"} in 3D: "z", each volume to zero
        mean and unit deviation, or "unit", left in [0, 1].

    Raises:
        InputError: when the weights are not there, are of another architecture or dimension, or match nothing.
    """
    dims = 3 if arch in WIDTHS else 2
    normalization = IMAGENET if dims == 2 else {"kind": "z"}
    report = {"init": init, "matched": 0, "missing": 0, "unexpected": 0, "normalization": normalization}
    if init == "random":
        return report
    if init == "imagenet":
        if dims == 3:
            raise InputError(f"--init imagenet: there are no ImageNet weights for {arch}; use random or a checkpoint")
        state = _download_imagenet(arch)
        expected = smp.encoders.get_preprocessing_params(arch, pretrained="imagenet")
        report["normalization"] = {"mean": list(expected["mean"]), "std": list(expected["std"])}
    else:
        content = load_safe(init)
        state = find_state_dict(content, init)
        fields = {
            **getattr(content, "_metadata", {}).get(METADATA, {}),
            **(content if isinstance(content, dict) else {}),
        }
        found = fields["dims"] if isinstance(fields.get("dims"), int) else _dims_of(state)
        if found not in (None, dims):
            raise InputError(f"--init {init}: a {found}-dimensional encoder, {dims} are needed")
        if is_encoder(fields.get("arch")) and fields["arch"] != arch:
            raise InputError(f"--init {init}: holds a {fields['arch']} encoder; add --arch {fields['arch']}")
        if lacks_last_relu(fields.get("version"), arch):
            print(f"note: {init}: trained by a version whose {arch} ended before its last ReLU", file=sys.stderr)
        if fields.get("normalization") is not None:
            report["normalization"] = check_normalization(fields["normalization"], dims, init)
        elif dims == 3 and any(key.endswith("aug_fc1.weight") for key in state):
            report["normalization"] = {"kind": "unit"}  # published PCRL, whose inputs were in [0, 1]
    wanted = encoder.state_dict()
    state = _strip(state, wanted)
    if dims == 3:
        _repeat_first(state, wanted)
    shapes = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    if shapes:
        raise InputError(
            f"--init {init}: {shapes[0]} has shape {tuple(state[shapes[0]].shape)}, "
            f"{arch} needs {tuple(wanted[shapes[0]].shape)}; another architecture? see --arch"
        )
    # Without its statistics a batch norm would run on another distribution than it learned.
    learned = [key for key in wanted if not key.endswith("num_batches_tracked")]
    matched = [key for key in learned if key in state]
    missing = [key for key in learned if key not in state]
    unexpected = [key for key in state if key not in wanted]
    print(
        f"{init}: {len(matched)} of {len(learned)} encoder entries matched, "
        f"{len(missing)} missing, {len(unexpected)} unexpected"
        + (f" (missing: {', '.join(missing[:5])})" if missing else "")
    )
    if not matched:
        raise InputError(f"--init {init}: no entry fits {arch}; first key is {next(iter(state), 'none')}")
    if len(matched) < len(learned) / 2:
        raise InputError(
            f"--init {init}: only {len(matched)} of {len(learned)} entries fit {arch}; another architecture? see --arch"
        )
    # Not the encoder's own method: some of the library's (DenseNet's) know no `strict`.
    nn.Module.load_state_dict(encoder, {key: state[key] for key in wanted if key in state}, strict=False)
    report |= {"matched": len(matched), "missing": len(missing), "unexpected": len(unexpected)}
    return report


def check_normalization(found: object, dims: int, path: str | Path) -> dict:
    """What a checkpoint says of its inputs, as `initialise` returns it; an InputError where it says something else."""

    def three_numbers(values: object) -> bool:
        return (
            isinstance(values, Sequence)
            and len(values) == 3
            and all(isinstance(value, int | float) and math.isfinite(value) for value in values)
        )

    if dims == 3:
        good = isinstance(found, dict) and found.get("kind") in ("z", "unit")
    else:
        good = isinstance(found, dict) and three_numbers(found.get("mean")) and three_numbers(found.get("std"))
        good = good and min(found["std"]) > 0
    if not good:
        raise InputError(f"{path}: its normalization is not one of a {dims}-dimensional encoder; is it ours?")
    return found


def initialise_unet(network: nn.Module, arch: str, init: str, load: str) -> dict:
    """`initialise` a segmentation network, `UNet2d` or `UNet3d`, all but its last layer, whose labels are the task's.

    Args:
        load: "encoder", or "encoder+decoder" where the weights have a way up too.

    Raises:
        InputError: as `initialise`, or when the decoder is asked for and the weights have none that fits.
    """
    if load == "encoder" or init == "random":
        return initialise(network.encoder, arch, init)
    if arch not in WIDTHS:
        start = initialise(network.encoder, arch, init)
        content = {} if init == "imagenet" else load_safe(init)
        state = content.get("decoder_state_dict") if isinstance(content, dict) else None
        try:
            network.decoder.load_state_dict(state or {})
        except (RuntimeError, TypeError, AttributeError):
            which = "of other shapes, as those without skips are (PCRLv2's)" if state else "not there"
            raise InputError(f"--init {init}: its decoder is {which}; use --load encoder") from None
        print(f"{init}: {len(state)} of {len(state)} decoder entries matched")
        return start | {"matched": start["matched"] + len(state)}
    body = nn.Module()
    for name, part in network.named_children():
        if name not in ("out_tr", "deep"):
            body.add_module(name, part)
    try:
        start = initialise(body, arch, init)
    except InputError as error:
        if "up_tr" not in str(error).removeprefix(f"--init {init}"):
            raise
        raise InputError(
            f"--init {init}: its decoder has other shapes, as those without skips have (PCRLv2's); use --load encoder"
        ) from None
    if start["missing"]:
        raise InputError(f"--init {init}: holds no whole decoder; use --load encoder")
    return start


def _strip(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefix under which most of the wanted keys are found, if there is one."""
    found = {prefix: sum(prefix + key in state for key in wanted) for prefix in PREFIXES}
    best = max(PREFIXES, key=found.get)
    if not found[best]:
        return state
    return {key[len(best) :]: value for key, value in state.items() if key.startswith(best)}


def _dims_of(state: dict[str, Tensor]) -> int | None:
    """Spatial dimensions of the first convolution in a state dict; None where there is none."""
    return next((value.ndim - 2 for value in state.values() if value.ndim in (4, 5)), None)


def _repeat_first(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Give a one-channel first kernel as many input channels as are wanted, so that equal channels act as one did."""
    key = next(iter(wanted))
    if key in state and state[key].ndim == 5 and state[key].shape[1] == 1:
        count = wanted[key].shape[1]
        state[key] = state[key].expand(-1, count, -1, -1, -1) / count


def _download_imagenet(arch: str) -> dict[str, Tensor]:
    """ImageNet weights of the encoder library; an InputError when they cannot be had."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        return smp.encoders.get_encoder(arch, in_channels=3, depth=5, weights="imagenet").state_dict()
    except (OSError, urllib.error.URLError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise InputError(
            f"--init imagenet: the weights of {arch} could not be downloaded ({reason}); "
            "run once with a network connection, or give a checkpoint file"
        ) from None
    except KeyError:
        raise InputError(f"--init imagenet: there are no ImageNet weights for {arch}") from None
