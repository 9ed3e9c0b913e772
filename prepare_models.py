"""Turn other people's ResNet-50 checkpoints into files that fine-tuning starts from.

  python prepare_models.py --name moco-v2 --file moco_v2_800ep_pretrain.pth.tar --output MODELS
  python prepare_models.py --name byol --file pretrain_res50x1.pkl --output MODELS
  python prepare_models.py --name all --file DOWNLOADS --output MODELS
  python prepare_models.py --output MODELS                                      (downloads thirteen of them)

Without `--name` and `--file`, files are downloaded from where their authors keep them, to MODELS/downloads, and stay
there. SimCLR's want a conversion from TensorFlow first, and cmc's and supervised's to be downloaded by hand.

`all` takes a folder's files that are named after a model, as `moco-v2.pth` or `moco_v2_800ep.pth.tar` are. Each becomes
MODELS/NAME.pth, torchvision's key names without the classifier, loaded strictly and run once before it is written.
Then `--init NAME --proxy_dir MODELS` starts from it: fine-tuning takes its network, a pre-training wants
`--arch resnet50`.

SimCLR's networks were trained on images in [0, 1] that are not normalised, all others on ImageNet's mean and deviation.
The files say so in their state dict's metadata, and scripts that start from them do the same.

Models Genesis and this project's own files need no preparation: give them to `--init` as they are.
"""

import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from medssl import errors
from medssl.engine import options
from medssl.engine.checkpoint import load_safe, save_atomic
from medssl.engine.entries import shown
from medssl.errors import InputError, unusable
from medssl.models.encoders import IMAGENET, METADATA
from medssl.reading.pickles import read_pickle

WRAPPERS = ("state_dict", "model", "resnet")  # keys under which files keep their weights
PREFIXES = {
    **dict.fromkeys(("barlowtwins", "supervised", "simclr-v1"), ""),
    **dict.fromkeys(("swav", "deepcluster-v2", "sela-v2"), "module."),
    **dict.fromkeys(("moco-v1", "moco-v2", "pcl-v1", "pcl-v2"), "module.encoder_q."),
    **dict.fromkeys(("infomin", "insdis", "pirl"), "module.encoder."),
    "cmc": "module.encoder1.",
    "moco-v3": "module.base_encoder.",
}
# Where the authors of models keep them (MAGICAL's download_and_prepare_models.py).
META, SALESFORCE = (
    "https://dl.fbaipublicfiles.com",
    "https://storage.googleapis.com/sfr-pcl-data-research/PCL_checkpoint",
)
INFOMIN = "https://www.dropbox.com/sh/87d24jqsl6ra7t2"
URLS = {
    "moco-v1": f"{META}/moco/moco_checkpoints/moco_v1_200ep/moco_v1_200ep_pretrain.pth.tar",
    "moco-v2": f"{META}/moco/moco_checkpoints/moco_v2_800ep/moco_v2_800ep_pretrain.pth.tar",
    "moco-v3": f"{META}/moco-v3/r-50-300ep/r-50-300ep.pth.tar",
    "byol": "https://storage.googleapis.com/deepmind-byol/checkpoints/pretrain_res50x1.pkl",
    "swav": f"{META}/deepcluster/swav_800ep_pretrain.pth.tar",
    "deepcluster-v2": f"{META}/deepcluster/deepclusterv2_800ep_pretrain.pth.tar",
    "sela-v2": f"{META}/deepcluster/selav2_400ep_pretrain.pth.tar",
    "infomin": f"{INFOMIN}/AAAzMTynP3Qc8mIE4XWkgILUa/InfoMin_800.pth?dl=1",
    "insdis": f"{INFOMIN}/AACcsSIt1_Njv7GsmsuzZ6Sta/InsDis.pth?dl=1",
    "pirl": f"{INFOMIN}/AADN4jKnvTI0U5oT6hTmQZz8a/PIRL.pth?dl=1",
    "pcl-v1": f"{SALESFORCE}/PCL_v1_epoch200.pth.tar",
    "pcl-v2": f"{SALESFORCE}/PCL_v2_epoch200.pth.tar",
    "barlowtwins": f"{META}/barlowtwins/ep1000_bs2048_lrw0.2_lrb0.0048_lambd0.0051/resnet50.pth",
}
# What is no part of the encoder: heads, queues, and the networks beside it.
DROPPED = re.compile(
    r"(?:fc|linear|head|heads|projection|projection_head|projector|prototypes|jigsaw|head_jig)(?:\.|\d|$)|queue"
)
RAW = {"mean": [0.0] * 3, "std": [1.0] * 3}  # the converters' own evaluations of SimCLR 1 and 2 do not normalise
NORM = {"weight": "scale", "bias": "offset", "running_mean": "mean_ema", "running_var": "var_ema"}  # Haiku's names


def expected() -> dict[str, Tensor]:
    """torchvision's ResNet-50 without the classifier."""
    return bare_resnet50().state_dict()


def bare_resnet50() -> nn.Module:
    network = torchvision.models.resnet50()
    network.fc = nn.Identity()
    return network


# Formats -------------------------------------------------------------------------------------------


def from_prefix(content: object, prefix: str) -> dict[str, Tensor]:
    """The entries below a prefix, without heads."""
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise InputError("no state dict in it")
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    own = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
    return {key: value for key, value in own.items() if not DROPPED.match(key)}


def from_simclr_v2(content: object) -> dict[str, Tensor]:
    """The names of SimCLRv2-PyTorch → torchvision's."""
    state = from_prefix(content, "")
    renamed = {}
    for key, value in state.items():
        new = key.replace("net.0.1.0.", "bn1.").replace("net.0.0.", "conv1.")
        found = re.fullmatch(r"net\.(\d)\.blocks\.(\d+)\.(.+)", key)
        if found:
            new = f"layer{found[1]}.{found[2]}.{_simclr_v2_part(found[3])}"
        renamed[new] = value
    return renamed


def _simclr_v2_part(part: str) -> str:
    """The name of a block's entry; an unknown one stays, and is refused later."""
    for pattern, name in (
        (r"net\.([024])\.(\w+)", lambda m: f"conv{int(m[1]) // 2 + 1}.{m[2]}"),
        (r"net\.([135])\.0\.(\w+)", lambda m: f"bn{(int(m[1]) + 1) // 2}.{m[2]}"),
        (r"projection\.shortcut\.(\w+)", lambda m: f"downsample.0.{m[1]}"),
        (r"projection\.bn\.0\.(\w+)", lambda m: f"downsample.1.{m[1]}"),
    ):
        found = re.fullmatch(pattern, part)
        if found:
            return name(found)
    return part


def from_byol(content: object) -> dict[str, Tensor]:
    """BYOL's Haiku parameters and state: convolutions and batch norms in the file's order, the initial ones, which are
    last there, first."""
    state = content.get("experiment_state") if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not {"online_params", "online_state"} <= state.keys():
        raise InputError("no experiment_state with online_params and online_state in it")
    own = {
        part: {
            name: value for name, value in state[part].items() if "res_net" in name.lower() or "resnet" in name.lower()
        }
        for part in ("online_params", "online_state")
    }
    network = bare_resnet50()
    kernels = [value["w"] for value in own["online_params"].values() if np.ndim(value.get("w")) == 4]
    norms = [(name, value) for name, value in own["online_params"].items() if {"scale", "offset"} <= value.keys()]
    convolutions = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)]
    places = [name for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)]
    if len(kernels) != len(convolutions) or len(norms) != len(places):
        raise InputError(
            f"{len(kernels)} convolutions and {len(norms)} batch norms; a ResNet-50 has {len(convolutions)} and "
            f"{len(places)}"
        )
    order = list(zip(places, [norms[-1], *norms[:-1]]))
    wrong = next((name for place, (name, _) in order if ("downsample" in place) != ("shortcut" in name)), None)
    if wrong:
        raise InputError(f"{wrong} is in another place than expected")
    made = {}
    for name, kernel in zip(convolutions, [kernels[-1], *kernels[:-1]]):
        made[f"{name}.weight"] = torch.from_numpy(np.ascontiguousarray(np.transpose(kernel, (3, 2, 0, 1)), np.float32))
    for place, (name, value) in order:
        averages = {
            kind: next((v["average"] for k, v in own["online_state"].items() if k == f"{name}/~/{kind}"), None)
            for kind in ("mean_ema", "var_ema")
        }
        for ours, theirs in NORM.items():
            array = value[theirs] if theirs in value else averages[theirs]
            if array is None:
                raise InputError(f"no average of {name}")
            made[f"{place}.{ours}"] = torch.from_numpy(np.array(array, np.float32).reshape(-1))
    return {key: value.float() for key, value in made.items()}


CONVERTERS: dict[str, Callable[[object], dict[str, Tensor]]] = {
    **{name: lambda content, prefix=prefix: from_prefix(content, prefix) for name, prefix in PREFIXES.items()},
    "simclr-v2": from_simclr_v2,
    "byol": from_byol,
}


# The script ----------------------------------------------------------------------------------------


def convert(name: str, path: Path) -> dict[str, Tensor]:
    """A model's file → torchvision's state dict, checked. Its metadata say what inputs the model wants.

    Raises:
        InputError: for a file that cannot be read, or is of another model.
    """
    state, network = read_model(name, path), bare_resnet50()
    with unusable(path, f"not laid out as {name}'s file is"):
        network.load_state_dict(state)
    with torch.no_grad():
        features = network.eval()(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    if not bool(torch.isfinite(features).all()):
        raise InputError(f"{path}: its features are not finite")
    return state


def read_model(name: str, path: Path) -> dict[str, Tensor]:
    """A model's file → torchvision's state dict of the right names, shapes and types; errors as `convert`'s."""
    content = read_pickle(path) if name == "byol" else load_safe(path)
    with unusable(path, f"not laid out as {name}'s file is"):
        return _checked(name, path, content)


def _checked(name: str, path: Path, content: object) -> dict[str, Tensor]:
    """A file's content → torchvision's state dict; an InputError, or anything, where it is of another model."""
    try:
        state = CONVERTERS[name](content)
    except InputError as error:
        raise InputError(f"{path}: {error}; is it {name}'s file?") from None
    wanted = expected()
    learned = [key for key in wanted if not key.endswith("num_batches_tracked")]
    state = {key: value for key, value in state.items() if key in wanted or not key.endswith("num_batches_tracked")}
    for key in learned:
        if key not in state:
            raise InputError(f"{path}: has no {key}; is it {name}'s ResNet-50?")
        if state[key].shape != wanted[key].shape:
            shapes = tuple(state[key].shape), tuple(wanted[key].shape)
            raise InputError(f"{path}: {key} has shape {shapes[0]}, ResNet-50's has {shapes[1]}")
        if not state[key].is_floating_point() or state[key].layout != torch.strided:
            raise InputError(f"{path}: {key} holds no plain numbers ({state[key].dtype}, {state[key].layout})")
        state[key] = state[key].float()
    unknown = [key for key in state if key not in wanted]
    if unknown:
        raise InputError(f"{path}: has {shown(unknown[0])}, which ResNet-50 has not; is it {name}'s file?")
    # Counts of batches may be missing.
    state = OrderedDict((key, state.get(key, wanted[key]).clone()) for key in wanted)
    state._metadata = {METADATA: {"normalization": RAW if name.startswith("simclr") else IMAGENET}}
    return state


def model_of(text: str) -> str | None:
    """The model that a name or a file's name begins with, the longest that fits; None for none."""
    fitting = [name for name in CONVERTERS if options.plain_name(text).startswith(options.plain_name(name))]
    return max(fitting, key=len, default=None)


def files_of(name: str, given: Path) -> list[tuple[str, Path]]:
    """Models and their files.

    Raises:
        InputError: for an unknown model, a missing file, and a folder without known names.
    """
    if not given.exists():
        raise InputError(f"--file {given}: no such file or folder")
    if name.lower() != "all":
        model = next((known for known in CONVERTERS if options.plain_name(known) == options.plain_name(name)), None)
        if model is None:
            raise InputError(f"--name {name}: unknown; known are {', '.join(sorted(CONVERTERS))}, and all")
        if given.is_dir():
            raise InputError(f"--file {given}: a folder; give the model's file, or --name all")
        return [(model, given)]
    if not given.is_dir():
        raise InputError(f"--file {given}: not a folder, which --name all wants")
    found: dict[str, Path] = {}
    for path in sorted(given.iterdir()):
        model = model_of(path.name) if path.is_file() else None
        if model is None and path.is_file():
            print(f"note: {path.name}: not named after a model; left out", file=sys.stderr)
        if model in found:
            raise InputError(f"{path}: {found[model].name} is {model} too; keep one of them")
        if model:
            found[model] = path
    if not found:
        raise InputError(f"--file {given}: no file there is named after a model, such as moco-v2.pth")
    return list(found.items())


def download(folder: Path) -> tuple[list[tuple[str, Path]], list[str]]:
    """Models and their files, downloaded to a folder unless they are there; and the names of those that cannot be,
    which it says."""
    folder.mkdir(parents=True, exist_ok=True)
    found, failed = [], []
    for name, url in URLS.items():
        path = folder / f"{name}{Path(url.partition('?')[0]).suffix.replace('.tar', '.pth')}"
        if not path.exists():
            print(f"{name}: {url}", flush=True)
            try:
                torch.hub.download_url_to_file(url, str(path), progress=sys.stderr.isatty())
            except (OSError, HTTPException, RuntimeError) as error:
                hint = f"connect and start again, or download it by hand and give --name {name} --file FILE"
                print(f"error: {name}: could not be downloaded from {url} ({error}); {hint}", file=sys.stderr)
                failed.append(name)
                continue
        found.append((name, path))
    return found, failed


def get_parser() -> options.Parser:
    parser = options.Parser(__doc__)
    group = parser.add_argument_group("models")
    group.add_argument(
        "--name", help=f"{', '.join(sorted(CONVERTERS))}; or all; with neither, what can be downloaded is"
    )
    group.add_argument("--file", metavar="FILE", help="the published file; a folder for all")
    group.add_argument("--output", metavar="DIR", default="models_zoo", help="where NAME.pth goes")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    output = Path(args.output)
    if (args.name is None) != (args.file is None):
        raise InputError("--name and --file belong together; give both, or neither to download")
    files, failed = (files_of(args.name, Path(args.file)), []) if args.name else download(output / "downloads")
    output.mkdir(parents=True, exist_ok=True)
    wanted = len(files) + len(failed)
    for name, path in files:
        try:
            state = convert(name, path)
        except InputError as error:
            if wanted == 1:
                raise
            failed.append(path.name)
            print(f"error: {error}", file=sys.stderr, flush=True)
            continue
        save_atomic(state, output / f"{name}.pth")
        print(f"{path.name}: {output / f'{name}.pth'}", flush=True)
    if failed:
        raise InputError(f"{len(failed)} of {wanted} files could not be used: {', '.join(failed)}")


def cli() -> None:
    errors.run_script(main, less="a machine with more")


if __name__ == "__main__":
    cli()
