"""Write a pre-trained encoder for other tools, and check it there.

  python export_encoder.py --file OUT/encoder.pt --to torchvision timm smp --output EXPORTS
  python export_encoder.py --file OUT/encoder.pt --to onnx --image-size 224 --output EXPORTS
  python export_encoder.py CHECKPOINT WEIGHT_FILE                                                   (as published)

  torchvision   encoder_torchvision.pth: torchvision.models.resnet18() and the like, all but the last layer
  timm          encoder_timm.pth: timm.create_model("resnet18", num_classes=0)
  smp           encoder_smp.pth: segmentation_models_pytorch.Unet("resnet18"), encoder and, where there is one, decoder;
                its DenseNets and Xception end before their last ReLU, which ours have
  detectron2    encoder_detectron2.pkl: MODEL.WEIGHTS of ResNet-18, 34, 50, 101 and 152, with INPUT.FORMAT RGB, the mean
                and deviation that are printed, times 255, and MODEL.RESNETS.STRIDE_IN_1X1 False
  safetensors   encoder.safetensors: the same names, no pickle; the run's facts as metadata
  onnx          encoder.onnx: normalised images (B, 3, H, W) → features (B, F), the average of the last map

Every file is loaded into the tool's own network, which must give the same features as ours. ONNX wants the packages
`onnx`, `onnxscript` and `onnxruntime` (pip install -e '.[export]'); where detectron2 is not installed, its file is
checked against its published layout instead, and a note says so.
"""

import importlib.util
import json
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn

from medssl import errors
from medssl.engine import options
from medssl.engine.checkpoint import WITHOUT_LAST_RELU, lacks_last_relu, save_atomic
from medssl.errors import InputError
from medssl.files import writing
from medssl.models.encoders import check_normalization, make_encoder, read_encoder
from medssl.models.heads import Averaged

SIDE = 64  # pixels of the images on which features are compared
TOLERANCE = 1e-5  # of the largest feature
FACTS = ("dims", "channels", "method", "normalization", "version")  # that our files say of an encoder
HEADS = ("fc", "classifier", "head", "heads")  # last layers in torchvision's models


class Exported:
    """The 2D encoder of a file, as `read_encoder` reads it.

    Attributes:
        content: what the file says beside its entries. state: the encoder's entries. arch: its name. network: it and
            the average of its last map, in evaluation mode. decoder: its state dict, or None.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.arch, self.state, self.content = read_encoder(path)
        self.decoder = self.content.get("decoder_state_dict")
        encoder = make_encoder(self.arch)
        nn.Module.load_state_dict(encoder, self.state, strict=False)
        self.network = Averaged(encoder).eval()
        if lacks_last_relu(self.content.get("version"), self.arch):
            print(
                f"note: {path}: trained by a version whose {self.arch} ended before its last ReLU; with it, its "
                "features are others than in training",
                file=sys.stderr,
            )
        if self.content.get("normalization") is not None:
            check_normalization(self.content["normalization"], 2, path)

    def images(self, side: int = SIDE) -> Tensor:
        """Random images (2, 3, side, side)."""
        return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))

    def compare(self, tool: str, features: Callable[[Tensor], Tensor]) -> None:
        """Raise InputError unless `features` of images are ours."""
        images = self.images()
        with torch.no_grad():
            ours, theirs = self.network(images), features(images).flatten(1)
        if ours.shape != theirs.shape or (ours - theirs).abs().max() > TOLERANCE * ours.abs().max():
            raise InputError(f"--to {tool}: its {self.arch} gives other features; leave it out")


def load_into(network: nn.Module, state: dict[str, Tensor], tool: str, arch: str) -> None:
    """Load all of `state`, and nothing else; an InputError where names or shapes differ."""
    try:
        nn.Module.load_state_dict(network, state)
    except (RuntimeError, TypeError, AttributeError):
        raise InputError(f"--to {tool}: its {arch} has other layers than this encoder; leave it out") from None


# Formats -------------------------------------------------------------------------------------------


def to_torchvision(source: Exported, folder: Path) -> Path:
    """torchvision's classifier without its last layer."""
    from torchvision.models import get_model, list_models

    if source.arch not in list_models():
        raise InputError(f"--to torchvision: it has no {source.arch}; leave it out")
    with warnings.catch_warnings():  # of another weight initialisation in some models' future
        warnings.simplefilter("ignore")
        network = get_model(source.arch, weights=None)
    for name in HEADS:
        if hasattr(network, name):
            setattr(network, name, nn.Identity())
    load_into(network, source.state, "torchvision", source.arch)
    source.compare("torchvision", network.eval())
    return _save(source.state, folder / "encoder_torchvision.pth")


def to_timm(source: Exported, folder: Path) -> Path:
    """timm's model without a classifier."""
    import timm

    if source.arch not in timm.list_models():
        raise InputError(f"--to timm: it has no {source.arch}; leave it out")
    network = timm.create_model(source.arch, pretrained=False, num_classes=0)
    load_into(network, source.state, "timm", source.arch)
    source.compare("timm", network.eval())
    return _save(source.state, folder / "encoder_timm.pth")


def to_smp(source: Exported, folder: Path) -> Path:
    """The U-Net of segmentation-models-pytorch: encoder, and the decoder where the run had one with skips."""
    network = smp.Unet(source.arch, encoder_weights=None)
    load_into(network.encoder, source.state, "smp", source.arch)
    state = {f"encoder.{key}": value for key, value in source.state.items()}
    if source.decoder is not None:
        load_into(network.decoder, source.decoder, "smp", source.arch)
        state |= {f"decoder.{key}": value for key, value in source.decoder.items()}

    def features(images: Tensor) -> Tensor:
        (last,) = network.eval().encoder(images)[-1:]
        return (last.relu() if source.arch.startswith(WITHOUT_LAST_RELU) else last).mean((2, 3))

    source.compare("smp", features)
    return _save(state, folder / "encoder_smp.pth")


def to_detectron2(source: Exported, folder: Path) -> Path:
    """detectron2's names of a ResNet, as numpy arrays in a pickle."""
    if not re.fullmatch(r"resnet\d+", source.arch):
        raise InputError(f"--to detectron2: {source.arch} is no ResNet; leave it out")
    model = {
        detectron2_name(key): value.numpy()
        for key, value in source.state.items()
        if not key.endswith("num_batches_tracked")
    }
    path = folder / "encoder_detectron2.pkl"
    content = {"model": model, "__author__": "medssl", "matching_heuristics": True}
    with writing(path) as part:  # checked before it becomes the file
        raw = pickle.dumps(content)
        part.write_bytes(raw)
        back = pickle.loads(raw)["model"]  # not the file: others may write into its folder
        restored = {torchvision_name(key): torch.from_numpy(np.array(value)) for key, value in back.items()}
        if part.read_bytes() != raw or any(not torch.equal(restored[key], source.state[key]) for key in restored):
            raise InputError(f"--file {source.path}: {path} does not hold what was written")
        try:
            from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock, ResNet
        except ImportError:
            print("note: detectron2 is not installed; its file's names were checked, its features were not")
        else:
            network = detectron2_network(source.arch, ResNet, BasicBlock, BottleneckBlock)
            entries = {key: torch.from_numpy(np.array(value)) for key, value in back.items()}
            network.load_state_dict(entries, strict=False)
            source.compare("detectron2", lambda images: network.eval()(images)["res5"].mean((2, 3)))
    return path


def detectron2_name(key: str) -> str:
    """torchvision's name of a ResNet's entry → detectron2's: `stem`, `res2` to `res5`, norms inside convolutions."""
    key = re.sub(r"^layer(\d)", lambda found: f"res{int(found[1]) + 1}", key)
    key = key.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
    key = re.sub(r"\bbn(\d)\.", r"conv\1.norm.", key)
    return key if key.startswith("res") else f"stem.{key}"


def torchvision_name(key: str) -> str:
    """The inverse of `detectron2_name`."""
    key = re.sub(r"conv(\d)\.norm\.", r"bn\1.", key.removeprefix("stem."))
    key = key.replace("shortcut.norm.", "downsample.1.").replace("shortcut.", "downsample.0.")
    return re.sub(r"^res(\d)", lambda found: f"layer{int(found[1]) - 1}", key)


def detectron2_network(arch: str, resnet: type, basic: type, bottleneck: type) -> nn.Module:
    """detectron2's ResNet with the strides of torchvision's: in the 3 × 3 convolutions."""
    from detectron2.modeling.backbone.resnet import BasicStem

    depth = int(arch.removeprefix("resnet"))
    blocks = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}[depth]
    stages, c_in = [], 64
    for i, count in enumerate(blocks):
        c_out = 64 * 2**i * (1 if depth < 50 else 4)
        more = {} if depth < 50 else {"bottleneck_channels": 64 * 2**i, "stride_in_1x1": False}
        stages.append(
            resnet.make_stage(
                basic if depth < 50 else bottleneck, count, in_channels=c_in, out_channels=c_out, norm="BN",
                stride_per_block=[2 if i else 1, *[1] * (count - 1)], **more,
            )
        )  # fmt: skip
        c_in = c_out
    return resnet(BasicStem(3, 64, "BN"), stages, out_features=["res5"])


def to_safetensors(source: Exported, folder: Path) -> Path:
    """safetensors, with the run's facts as metadata."""
    from safetensors.torch import load_file, save_file

    facts = {"arch": source.arch, **{key: source.content[key] for key in FACTS if key in source.content}}
    metadata = {
        key: value if isinstance(value, str) else json.dumps(value, default=str) for key, value in facts.items()
    }
    path = folder / "encoder.safetensors"
    with writing(path) as part:  # checked before it becomes the file
        save_file({key: value.contiguous() for key, value in source.state.items()}, part, metadata)
        back = load_file(part)
        if back.keys() != source.state.keys() or any(not torch.equal(back[key], source.state[key]) for key in back):
            raise InputError(f"--file {source.path}: {path} does not hold what was written")
    return path


def need_onnx() -> None:
    """Raise InputError where what ONNX needs is not installed."""
    for name in ("onnx", "onnxscript", "onnxruntime"):  # torch's exporter wants the second
        if importlib.util.find_spec(name) is None:
            raise InputError(f"--to onnx: needs {name}; pip install -e '.[export]' in the checkout, or leave onnx out")


def to_onnx(source: Exported, folder: Path, side: int = SIDE) -> Path:
    """ONNX for any batch size; run once by onnxruntime."""
    import onnxruntime

    path = folder / "encoder.onnx"
    batch = torch.export.Dim("batch")
    images = source.images(side)
    with writing(path) as part:  # checked before it becomes the file
        torch.onnx.export(
            source.network, (images,), part, input_names=["image"], output_names=["features"],
            dynamic_shapes={"x": {0: batch}}, dynamo=True, external_data=False, verbose=False,
        )  # fmt: skip
        session = onnxruntime.InferenceSession(part, providers=["CPUExecutionProvider"])
        for count in (1, 2):
            (theirs,) = session.run(None, {"image": images[:count].numpy()})
            with torch.no_grad():
                ours = source.network(images[:count]).numpy()
            if np.abs(ours - theirs).max() > TOLERANCE * np.abs(ours).max():
                raise InputError(
                    "--to onnx: onnxruntime gives other features; another version of onnx or torch may not"
                )
    return path


TO = {
    "torchvision": to_torchvision, "timm": to_timm, "smp": to_smp, "detectron2": to_detectron2,
    "safetensors": to_safetensors, "onnx": to_onnx,
}  # fmt: skip


def extract(checkpoint: Path, weights: Path) -> None:
    """Write a checkpoint's encoder under `state_dict`, with torchvision's names, and what is known of it beside: what
    every `--init` and tools that expect such a file read (ConCL's tools/extract_backbone_weights.py)."""
    arch, state, fields = read_encoder(checkpoint)
    known = {key: fields[key] for key in FACTS if fields.get(key) is not None and key != "dims"}
    weights.parent.mkdir(parents=True, exist_ok=True)
    save_atomic({"state_dict": state, "arch": arch, "dims": 2, **known}, weights)
    print(f"{arch}: {len(state)} entries in {weights}", flush=True)


def _save(state: dict[str, Tensor], path: Path) -> Path:
    save_atomic(state, path)
    return path


# The script ----------------------------------------------------------------------------------------


def get_parser() -> options.Parser:
    parser = options.Parser(__doc__)
    group = parser.add_argument_group("files")
    group.add_argument(
        "published", nargs="*", metavar="CHECKPOINT WEIGHT_FILE",
        help="as published by ConCL: write the encoder of the one to the other, by torchvision's names",
    )  # fmt: skip
    group.add_argument(
        "--file",
        metavar="FILE",
        help="encoder.pt or last.pt of a 2D pre-training run, or another checkpoint; FILE:PREFIX where it has several",
    )
    group.add_argument("--output", metavar="DIR", default="exports", help="where the files go")
    group = parser.add_argument_group("tools")
    group.add_argument(
        "--to", nargs="+", choices=tuple(TO), default=["torchvision"], metavar="TOOL", help=f"tools: {', '.join(TO)}"
    )
    group.add_argument("--image-size", type=options.positive_int, default=224, help="side of ONNX's images, pixels")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    if bool(args.file) == bool(args.published) or len(args.published) not in (0, 2):
        raise InputError("give --file FILE, or the two files CHECKPOINT WEIGHT_FILE")
    if args.published:
        wrong = options.changed(get_parser(), args, ("to", "output", "image_size"))
        if wrong:
            raise InputError(f"{wrong[0]}: goes with --file; leave it out, or give --file CHECKPOINT")
        extract(*map(Path, args.published))
        return
    if "onnx" in args.to:
        need_onnx()  # before other files are written
    source, folder = Exported(Path(args.file)), Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    for tool in args.to:
        path = to_onnx(source, folder, args.image_size) if tool == "onnx" else TO[tool](source, folder)
        print(f"{tool}: {path}", flush=True)
    normalization = source.content.get("normalization") or {}
    if normalization:
        print(f"images in [0, 1], less {normalization['mean']}, divided by {normalization['std']}")


def cli() -> None:
    errors.run_script(main, less="a machine with more")


if __name__ == "__main__":
    cli()
