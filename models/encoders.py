"""Encoders by name, and the weights they start from. In 2D those of segmentation-models-pytorch, whose weights carry
torchvision's key names; in 3D the U-Net's way down."""

import logging
import re
import sys
import urllib.error
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medssl.engine.checkpoint import WITHOUT_LAST_RELU, lacks_last_relu
from medssl.engine.entries import SHARE, Place, places_of, shown
from medssl.errors import InputError, unusable
from medssl.models.unet3d import WIDTHS, UNet3d, UNet3dEncoder
from medssl.models.weights import METADATA as METADATA  # who writes it asks for it here
from medssl.models.weights import Weights, spellings

DEFAULT_ARCH = {2: "resnet18", 3: "unet3d"}  # by dimension
COMMON = {  # that published files hold, by dimension
    2: ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "densenet121", "densenet169", "densenet201"),
    3: tuple(WIDTHS),
}
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
INPUTS = {  # by the names that MAGICAL's fine-tuning has for them, and "half", MedMNIST's
    "imagenet": IMAGENET,
    "chestx-ray": {"mean": [0.5056] * 3, "std": [0.252] * 3},
    "half": {"mean": [0.5] * 3, "std": [0.5] * 3},
    "none": {"mean": [0.0] * 3, "std": [1.0] * 3},
}
OUTPUT = "out_tr.final_conv.weight"  # of a 3D U-Net
LARGEST = torch.finfo(torch.float32).max
PARTIAL = {2: SHARE, 3: 0.5}  # what a file must have of an encoder, by dimension; a note says where it is not all


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
    return isinstance(name, str) and (name in WIDTHS or name in smp.encoders.get_encoder_names())


def arch_of(init: str, dims: int) -> str | None:
    """The encoder whose weights `--init` names, so that nobody need repeat it.

    Returns:
        what a checkpoint says, or else the largest of `COMMON` whose every entry it has, in its shape; None where it
        has none of them, is of another dimension, or is no file.
    """
    if init in ("random", "imagenet"):
        return None
    weights = Weights.read(init)
    with weights.looking():
        return _arch_of(weights, dims)


def _arch_of(weights: Weights, dims: int) -> str | None:
    said = weights.fields.get("arch")
    if is_encoder(said):  # others' names may mean other things
        return said if (said in WIDTHS) == (dims == 3) else None
    return _arch_by_entries(weights, dims)


def _arch_by_entries(weights: Weights, dims: int) -> str | None:
    """The largest of `COMMON` whose every entry a file has, in its shape (a ResNet-34 has all of a ResNet-18's)."""
    sizes = {}
    for arch in COMMON[dims]:
        for place in weights.places(_skeleton(arch, dims)):
            # The first kernel of volumes may have another number of channels.
            if set(place.fitting) >= set(place.learned[dims == 3 :]):
                sizes[arch] = len(place.learned)
    return max(sizes, key=sizes.get, default=None)


@cache
def _skeleton(arch: str, dims: int) -> nn.Module:
    """An encoder without numbers, whose names and shapes are compared with files'."""
    with torch.device("meta"):
        return make_encoder(arch, dims=dims)


def read_encoder(init: str | Path) -> tuple[str, dict[str, Tensor], dict]:
    """The 2D encoder of a checkpoint (FILE, or FILE:PREFIX) of ours, whether exported or not, or of a published one.

    Returns:
        its name, its state dict with the library's names, and what the file says beside.

    Raises:
        InputError: for a file that cannot be read, or holds no encoder that is known.
    """
    weights = Weights.read(init)
    with weights.looking():
        return _whole_encoder(weights)


def _whole_encoder(weights: Weights) -> tuple[str, dict[str, Tensor], dict]:
    """What `read_encoder` returns, of a file that was read."""
    init, said = weights.init, weights.fields.get("arch")
    arch = said if isinstance(said, str) else _arch_of(weights, 2)
    if arch in WIDTHS or weights.fields.get("dims") == 3:
        raise InputError(f"{init}: of volumes, which other tools' networks are not for; leave it as it is")
    if arch not in smp.encoders.get_encoder_names():
        raise InputError(f"{init}: holds no encoder that is known; give a run's encoder.pt")
    encoder = make_encoder(arch)
    weights.check_prefix(encoder, PARTIAL[2])
    places = weights.places(encoder)
    place = next(iter(weights.best(places, PARTIAL[2])), None) or _nearest(places)
    if place is None:
        raise InputError(f"{init}: no entry fits {arch}; give a run's encoder.pt")
    for key in place.learned:
        if key not in place.fitting:
            raise InputError(f"{init}: does not hold a whole {arch} encoder: {key} is missing, or of another shape")
    return arch, place.state(), weights.fields


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
        init: "random" (left as it is), "imagenet" (2D; downloaded by the encoder library), or a checkpoint of anyone,
            FILE or FILE:PREFIX, in which the encoder is found by its entries' names and shapes. Where the file was
            trained on one channel and the encoder takes several, the first kernel is repeated for each and divided by
            their number.

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
        state, report["normalization"] = _imagenet(arch)
        weights = Weights(init, Path(init), None, state)
    else:
        weights = Weights.read(init)
    with weights.looking():
        if init != "imagenet":
            _check_said(weights, arch, dims)
        place, *rest = _find(weights, encoder, arch)
        report["normalization"] = _normalization(weights, place, dims) or report["normalization"]
        missing = [key for key in place.learned if key not in place.names]
        unexpected, state = place.unexpected(), place.state()
        larger = _larger(place, arch, dims) if unexpected else None
    print(
        f"{init}: {len(place.fitting)} of {len(place.learned)} encoder entries matched, "
        f"{len(missing)} missing, {len(unexpected)} unexpected{place.where}"
        + (f" (missing: {', '.join(missing[:5])})" if missing else "")
        + (f"; {', '.join(shown(other.name) for other in rest[:5])} would fit, too" if rest else "")
    )
    for key in place.grey:
        count = place.wanted[key].shape[1]
        print(f"note: {init}: {key} takes one channel; repeated for {count}, and divided by {count}", file=sys.stderr)
    if larger:
        print(f"note: {init}: it is all of a {larger}, of which {arch} takes a part; --arch {larger} takes it whole",
              file=sys.stderr)  # fmt: skip
    if not place.fits(SHARE):
        print(f"note: {init}: holds a part of {arch}; the missing {len(missing)} start at random", file=sys.stderr)
    # Not the encoder's own method: some of the library's (DenseNet's) know no `strict`.
    nn.Module.load_state_dict(encoder, state, strict=False)
    report |= {"matched": len(place.fitting), "missing": len(missing), "unexpected": len(unexpected)}
    return report


def _larger(place: Place, arch: str, dims: int) -> str | None:
    """The largest of `COMMON` that is where a smaller network was found: a ResNet-34 has all entries of a ResNet-18."""
    sizes = {arch: len(place.learned)}
    for other in COMMON[dims] if arch in COMMON[dims] else ():
        network = _skeleton(other, dims)
        for found in places_of([place.table], network.state_dict(), spellings(network)):
            same = (found.prefix, found.spelling) == (place.prefix, place.spelling)
            if same and len(found.fitting) == len(found.learned):
                sizes[other] = len(found.learned)
    largest = max(sizes, key=sizes.get)
    return None if largest == arch else largest


def check_weights(init: str, arch: str) -> None:
    """Raise InputError for a file that cannot be read or holds no entries, and for a prefix that is not in it."""
    weights, dims = Weights.read(init), 3 if arch in WIDTHS else 2
    with weights.looking():
        if weights.tables and weights.prefix is not None:
            weights.check_prefix(make_encoder(arch, dims=dims), PARTIAL[dims])


def _check_said(weights: Weights, arch: str, dims: int) -> None:
    """Raise InputError where a file says that it holds another encoder; note what an older version's is."""
    said, init = weights.fields, weights.init
    if isinstance(said.get("dims"), int) and said["dims"] != dims:
        raise InputError(f"--init {init}: a {said['dims']}-dimensional encoder, {dims} are needed")
    if is_encoder(said.get("arch")) and said["arch"] != arch:
        raise InputError(f"--init {init}: holds a {said['arch']} encoder; add --arch {said['arch']}")
    if lacks_last_relu(said.get("version"), arch):
        print(f"note: {init}: trained by a version whose {arch} ended before its last ReLU", file=sys.stderr)


def _normalization(weights: Weights, place: Place, dims: int) -> dict | None:
    """What inputs a file's weights expect, where it says or shows that."""
    said = weights.fields.get("normalization")
    if said is not None:
        return check_normalization(said, dims, weights.init)
    entries = place.table.entries
    if dims == 3 and any(name.endswith("aug_fc1.weight") for name in entries):
        return {"kind": "unit"}  # published PCRL, whose inputs were in [0, 1]
    # Those of published Models Genesis were, too: a whole network with one output, whose way up sees the way down.
    joined, output = (entries.get(f"{place.prefix}{name}") for name in ("up_tr64.ops.0.conv1.weight", OUTPUT))
    if dims == 3 and joined is not None and output is not None and len(output) == 1 < joined.shape[1] / len(joined) - 1:
        return {"kind": "unit"}
    return None


def _find(weights: Weights, encoder: nn.Module, arch: str) -> list[Place]:
    """Where an encoder is in a file: the place that is taken first, then others that would fit.

    Raises:
        InputError: that says best why it is nowhere.
    """
    dims, init = 3 if arch in WIDTHS else 2, weights.init
    weights.check_prefix(encoder, PARTIAL[dims])
    places = weights.places(encoder)
    found = weights.best(places, PARTIAL[dims])
    if found:
        return found
    kernels = (value.ndim - 2 for table in weights.tables for value in table.entries.values() if value.ndim in (4, 5))
    there = next(kernels, dims)
    if there != dims:
        raise InputError(f"--init {init}: a {there}-dimensional encoder, {dims} are needed")
    nearest = _nearest(places)
    if nearest is None:
        first = shown(next(iter(weights.tables[0].entries)))
        raise InputError(f"--init {init}: no entry fits {arch}; first key is {first}")
    known = _arch_by_entries(weights, dims)
    hint = "another architecture? see --arch" + (f": it holds all of {known}" if known not in (None, arch) else "")
    if nearest.others == nearest.learned[:1] and len(nearest.fitting) == len(nearest.learned) - 1:
        hint = "all else fits: its first convolution is another network's"
    if nearest.others:
        key = nearest.others[0]
        shapes = tuple(nearest.entry(key).shape), tuple(nearest.wanted[key].shape)
        raise InputError(f"--init {init}: {key} has shape {shapes[0]}, {arch} needs {shapes[1]}; {hint}")
    count, missing = len(nearest.fitting), next(key for key in nearest.learned if key not in nearest.names)
    raise InputError(
        f"--init {init}: only {count} of {len(nearest.learned)} entries fit {arch}, {missing} is missing; {hint}"
    )


def _nearest(places: Sequence[Place]) -> Place | None:
    """The place with most of an encoder's names, by which a refusal is explained; numbers alone mean little."""
    telling = [place for place in places if not place.spelling or len(place.names) > len(place.learned) / 2]
    return max(telling, key=lambda place: len(place.names), default=None)


def check_normalization(found: object, dims: int, path: str | Path) -> dict:
    """What a checkpoint says of its inputs, as `initialise` returns it; an InputError where it says something else."""

    def three_numbers(values: object) -> bool:
        return (
            isinstance(values, Sequence)
            and len(values) == 3
            and all(isinstance(value, int | float) and abs(value) < LARGEST for value in values)
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
        content = {} if init == "imagenet" else Weights.read(init).content
        state = content.get("decoder_state_dict") if isinstance(content, dict) else None
        if not isinstance(state, dict) or not state:
            raise InputError(f"--init {init}: its decoder is not there; use --load encoder")
        with unusable(
            f"--init {init}",
            "its decoder is of other shapes, as those without skips are (PCRLv2's); use --load encoder",
        ):
            network.decoder.load_state_dict(state)
        print(f"{init}: {len(state)} of {len(state)} decoder entries matched")
        return start | {"matched": start["matched"] + len(state)}
    try:
        start = initialise(_without_output(network), arch, init)
    except InputError as error:
        if not network.skips or not re.search(r": up_tr\S* has shape", str(error)):
            raise
        start = _take_without_skips(network, arch, init)
    if start["missing"]:
        raise InputError(f"--init {init}: holds no whole decoder; use --load encoder")
    return start


def _without_output(network: UNet3d) -> nn.Module:
    """Ways down and up of a 3D U-Net, as a module that shares their layers."""
    body = nn.Module()
    for name, part in network.named_children():
        if name not in ("out_tr", "deep"):
            body.add_module(name, part)
    return body


def _take_without_skips(network: UNet3d, arch: str, init: str) -> dict:
    """`initialise` a 3D U-Net with skips from one without, PCRLv2's. A level of its way up sees two maps: its kernels
    for the one from below are taken, those for the skipped one stay as they are."""
    plain = _without_output(UNet3d(1, False, network.channels, network.width, network.norm))
    try:
        start = initialise(plain, arch, init)
    except InputError:
        raise InputError(f"--init {init}: its decoder has other shapes; use --load encoder") from None
    own = network.state_dict()
    for key, value in plain.state_dict().items():
        shared = own[key] if own[key].shape == value.shape else own[key][:, : value.shape[1]]
        shared.copy_(value)
    print(f"{init}: its decoder sees no skipped maps; their kernels start at random")
    return start


def _imagenet(arch: str) -> tuple[dict[str, Tensor], dict]:
    """ImageNet weights of the encoder library, and what inputs they expect; an InputError when they cannot be had."""
    if arch in WIDTHS:
        raise InputError(f"--init imagenet: there are no ImageNet weights for {arch}; use random or a checkpoint")
    state = _download_imagenet(arch)
    expected = smp.encoders.get_preprocessing_params(arch, pretrained="imagenet")
    return state, {"mean": list(expected["mean"]), "std": list(expected["std"])}


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
