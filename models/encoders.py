"""2D encoders: segmentation-models-pytorch's, whose weights carry torchvision's key names."""

import logging
import urllib.error
from pathlib import Path

import segmentation_models_pytorch as smp
from torch import Tensor, nn

from medssl.engine.checkpoint import find_state_dict, load_safe
from medssl.engine.options import InputError

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}

# Where published checkpoints keep an encoder, longest first so that `module.` does not win by accident.
PREFIXES = (
    "module.model.encoder.",
    "module.encoder.",
    "encoder.module.",
    "model.encoder.",
    "module.",
    "encoder.",
    "backbone.",
    "",
)


def make_encoder(arch: str, channels: int = 3) -> nn.Module:
    """A randomly initialised encoder.

    `encoder(x)` maps x (B, channels, H, W) to a list of feature maps, shallow to deep, each half the size
    of the one before it; `encoder.out_channels` lists their channels.

    Raises:
        InputError: for an unknown name.
    """
    if arch not in smp.encoders.get_encoder_names():
        close = [name for name in smp.encoders.get_encoder_names() if name[:4] == arch[:4].lower()]
        hint = f"; did you mean one of {', '.join(close[:8])}" if close else ""
        raise InputError(f"--arch {arch}: not an encoder of segmentation-models-pytorch{hint}")
    return smp.encoders.get_encoder(arch, in_channels=channels, depth=5, weights=None)


def initialise(encoder: nn.Module, arch: str, init: str) -> dict:
    """Set an encoder's starting weights in place, as `--init` says.

    Args:
        init: "random" (left as it is), "imagenet" (downloaded by the encoder library), or a checkpoint:
            our `encoder.pt`, or a published file with a state dict.

    Returns:
        {"init", "matched", "missing", "unexpected", "normalization"}; counts of keys, and the channel
        means and standard deviations that the weights expect (inputs in [0, 1]).

    Raises:
        InputError: when the weights are not there, are of another architecture, or match nothing.
    """
    report = {"init": init, "matched": 0, "missing": 0, "unexpected": 0, "normalization": IMAGENET}
    if init == "random":
        return report
    if init == "imagenet":
        state = _download_imagenet(arch)
        source = "imagenet"
        expected = smp.encoders.get_preprocessing_params(arch, pretrained="imagenet")
        report["normalization"] = {"mean": list(expected["mean"]), "std": list(expected["std"])}
    else:
        content = load_safe(init)
        source = Path(init).name
        if isinstance(content, dict) and isinstance(content.get("arch"), str) and content["arch"] != arch:
            raise InputError(f"--init {init}: holds a {content['arch']} encoder; add --arch {content['arch']}")
        if isinstance(content, dict) and content.get("dims", 2) != 2:
            raise InputError(f"--init {init}: a {content['dims']}-dimensional encoder, 2 are needed")
        if isinstance(content, dict) and isinstance(content.get("normalization"), dict):
            report["normalization"] = content["normalization"]
        state = find_state_dict(content, init)
    wanted = encoder.state_dict()
    state = _strip(state, wanted)
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
        f"{source}: {len(matched)} of {len(learned)} encoder entries matched, "
        f"{len(missing)} missing, {len(unexpected)} unexpected"
        + (f" (missing: {', '.join(missing[:5])})" if missing else "")
    )
    if not matched:
        raise InputError(f"--init {init}: no entry fits {arch}; first key is {next(iter(state), 'none')}")
    if len(matched) < len(learned) / 2:
        raise InputError(
            f"--init {init}: only {len(matched)} of {len(learned)} entries fit {arch}; another architecture? see --arch"
        )
    encoder.load_state_dict({key: state[key] for key in wanted if key in state}, strict=False)
    report |= {"matched": len(matched), "missing": len(missing), "unexpected": len(unexpected)}
    return report


def _strip(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefix under which most of the wanted keys are found, if there is one."""
    found = {prefix: sum(prefix + key in state for key in wanted) for prefix in PREFIXES}
    best = max(PREFIXES, key=found.get)
    if not found[best]:
        return state
    return {key[len(best) :]: value for key, value in state.items() if key.startswith(best)}


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
