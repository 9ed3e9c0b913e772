"""Pre-train with MAGICAL ("Synergizing Generative and Contrastive Learning for Self-Supervised Pre-Training in Medical
Image Analysis", later published as TOWER, Neural Networks 167:810–826, 2023).

  python train_magical.py --data DIR --data_set drive -b 16 --suffix first --gpus 0 --amp
  torchrun --nproc-per-node 4 -- train_magical.py --data DIR --data_set chexpert --output OUT --amp
  python train_magical.py --data FILE --data_set pathMNIST --output OUT --gpus 0 --amp
  python train_magical.py --arch resnet18 --steps 20 -b 8 --image-size 64 --output OUT           (no data, CPU)

With the data set come these values where none is given; the first six rows are the published ones:

  LiTS        --image-size 512 -b  12 --lr 0.001  --epochs 200
  CheXpert    --image-size 224 -b  32 --lr 0.0002 --epochs 200
  DRIVE       --image-size 512 -b  16 --lr 0.001  --epochs 100
  Montgomery  --image-size 224 -b  16 --lr 0.001  --epochs 200
  Shenzhen    --image-size 224 -b  24 --lr 0.0002 --epochs 200
  MedMNIST    --image-size  28 -b 128 --lr 0.001  --epochs 100
  others      --image-size 224 -b  32 --lr 0.0002 --epochs 200
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medssl import errors
from medssl.datasets.base import ImageDataset
from medssl.datasets.registry import open_pretraining, resolve, row_of
from medssl.datasets.splits import split_for_validation
from medssl.engine import options
from medssl.engine.batches import autocast, evaluation_batches
from medssl.engine.loop import pretrain
from medssl.engine.method import Method
from medssl.engine.parallel import Devices, Run, setup
from medssl.errors import InputError
from medssl.losses.contrastive import nt_xent
from medssl.models.encoders import IMAGENET, initialise
from medssl.models.restoring_unet import PROJECTORS, EmbeddingUNet2d
from medssl.views.draws import ImageDraws
from medssl.views.of_images import MaskedToneViews
from medssl.views.ops2d import normalise

GREATEST_GRID = 256
DEFAULTS = {  # by the published script, which a data set's row names
    "lcs": {"image_size": 512, "b": 12, "lr": 1e-3, "epochs": 200},
    "dxc": {"image_size": 224, "b": 32, "lr": 2e-4, "epochs": 200},
    "vfs": {"image_size": 512, "b": 16, "lr": 1e-3, "epochs": 100},
    "lxs": {"image_size": 224, "b": 16, "lr": 1e-3, "epochs": 200},
    "txc": {"image_size": 224, "b": 24, "lr": 2e-4, "epochs": 200},
    "medmnist": {"image_size": 28, "b": 128, "lr": 1e-3, "epochs": 100},
    "others": {"image_size": 224, "b": 32, "lr": 2e-4, "epochs": 200},
}


class MAGICAL(Method):
    """Learns pixels and images at once: a U-Net restores the image x from x⁺ = M(NL(x)), whose tones are changed and
    of whose cells some are black, and the encoder gives x and x⁺ embeddings that find each other among those of all
    other images of the batch.

    L = NT-Xent(z, z⁺; T) + L1(d(x⁺), x), weights 1:1.

    Batch: "image", "changed" (B, 3, H, W) normalised, x and x⁺; "target" (B, C, H, W), x in [0, 1], one channel of grey
    images unless three are asked for, three of colour; "index" (B,) numbers of the images, where the batch may have one
    twice.

    Differences from the published code, on purpose:
      * The projector sees the average of the deepest map; there, maps larger than 1 × 1 are reshaped, which scrambles
        them.
      * Targets are in [0, 1], as the sigmoid's output is, for every data set; there, in [−1, 1] for some.
      * The mask is the paper's cells; the last release of the code has whole rows instead (`--mask stripes`), and
        leaves the tones as they are.
      * Images are not mirrored; there, those of DRIVE are, a whole batch alike, and normalised before they are changed,
        so that black is the mean colour. Here what is black is black, and everything is normalised after it.
      * NT-Xent is not scaled by T / 0.07, and takes its negatives from all devices.
      * x and x⁺ share their batch statistics, in one pass of the encoder, so that its running averages, with which it
        is validated, are those that it was trained with (there, and with `--no-joint-norm`, each has its own).
      * A tenth of the pre-training patients validates the restoration; there, the test split did.
      * The learning rate changes every step, not every epoch.
    """

    def __init__(
        self,
        arch: str = "resnet50",
        channels: int = 3,
        temperature: float = 0.1,
        skips: bool = True,
        projector: str = "plain",
        joint: bool = True,
        normalization: dict = IMAGENET,
    ) -> None:
        super().__init__()
        self.network = EmbeddingUNet2d(arch, channels, skips, projector, joint)
        self.temperature, self.normalization = temperature, normalization

    def forward(self, batch: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        out = run(self.network, batch["image"], batch["changed"])
        self.features, self.embeddings = out["features"].detach(), out["z"].detach()
        return {
            "contrast": nt_xent(out["z"], out["z_changed"], self.temperature, batch.get("index")),
            "restoration": F.l1_loss(out["restored"], batch["target"]),
        }

    def encoder_state(self) -> dict[str, Tensor]:
        return self.network.encoder_state()

    def decoder_state(self) -> dict[str, Tensor] | None:
        return self.network.decoder_state()

    def compiled_parts(self) -> list[nn.Module]:
        return [self.network.encoder, *self.network.decoder.blocks]

    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        restored = self.network(batch["changed"][:8])["restored"]
        return {"x": batch["image"], "x+": batch["changed"], "restored": normalise(restored, **self.normalization)}


@torch.inference_mode()
def validate(
    network: nn.Module, views: MaskedToneViews, data: ImageDataset, args: argparse.Namespace, devices: Devices
) -> dict[str, float]:
    """Mean absolute error of the restorations of held-out images; their changes are the same every time."""
    total = torch.zeros((), device=devices.device)
    count = 0
    for batch in evaluation_batches(data, devices.own_count(args.b), args, devices):
        inputs = views(batch, ImageDraws(args.seed, batch["index"].tolist()))
        with autocast(args, devices.device):
            restored = Run(devices.device_ids)(network, inputs["changed"])["restored"]
        total += F.l1_loss(restored, inputs["target"]) * len(restored)
        count += len(restored)
    if not count:
        raise InputError(f"none of the {len(data)} images that validate can be read; see bad_files.txt")
    error = float(total) / count
    return {"score": -error, "val_restoration": error}


def get_parser() -> options.Parser:
    parser = options.pretraining_parser(__doc__, output="runs/magical")
    group = parser.add_argument_group("MAGICAL")
    group.add_argument("--suffix", type=options.filled, help="of the output folder's name, after an underscore")
    group.add_argument("--image-size", type=options.positive_int, help="side of the views, pixels")
    group.add_argument(
        "--mask", choices=("cells", "stripes"), default="cells",
        help="what is blacked out: cells, as in the paper, or rows, as in the last release of its code",
    )  # fmt: skip
    group.add_argument(
        "--mask-ratio", "--mask_ratio", type=options.fraction, default=0.25, help="share of it that is blacked out"
    )
    group.add_argument(
        "--grid",
        type=options.positive_int,
        default=32,
        help=f"cells along a side of the image, at most {GREATEST_GRID}",
    )
    group.add_argument(
        "--temperature", type=options.bounded_float(1e-3, 1e6), default=0.1, help="temperature T of the contrast"
    )
    group.add_argument(
        "--crop-scale", type=options.bounded_float(1e-3, 1), metavar="SHARE",
        help="least share of the image in each of two crops, of which one is changed and restored; unless given, both "
        "are the whole image",
    )  # fmt: skip
    options.flag(group, "--skips", True, "let the decoder see the encoder's maps; without, it is not exported")
    group.add_argument(
        "--projector", choices=tuple(PROJECTORS), default="plain", help="norm: with a batch norm inside, as SimCLR's"
    )
    options.flag(group, "--joint-norm", True, "let images and changed ones share their batch statistics")
    group.add_argument("--patience", type=options.non_negative_int, default=30,
                       help="epochs without gain in the validation's restoration; 0 never stops")  # fmt: skip
    group.add_argument("--nb_class", type=options.positive_int,
                       help="channels of the restoration: those of the images, or 3 of grey ones")  # fmt: skip
    parser.set_defaults(  # the paper and the published scripts; None: the data set decides
        arch="resnet50", optimizer="adam", betas=[0.9, 0.99], weight_decay=0.0, schedule="cosine",
        **dict.fromkeys(DEFAULTS["others"]),
    )  # fmt: skip
    return parser


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """The options with the data set's values where the user gave none."""
    row = row_of(resolve(args.dataset, args.data, args.d))
    args = options.complete(args, DEFAULTS[row.protocols.get("magical", "others")])
    if args.mask == "stripes" and args.grid != get_parser().get_default("grid"):
        raise InputError(f"--grid {args.grid}: is of cells, and --mask stripes has rows; leave it out")
    if args.grid > GREATEST_GRID:
        raise InputError(f"--grid {args.grid}: at most {GREATEST_GRID} cells along a side")
    if args.suffix:
        args.output, args.suffix = f"{Path(args.output)}_{args.suffix}", None
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = complete(get_parser().parse_args(argv))
    devices = setup(args.gpus, args.device, args.deterministic)
    train, val = split_for_validation(open_pretraining(args, (2,)))
    channels, own = args.nb_class or train.info.channels, train.info.channels
    if channels not in (own, 3):
        raise InputError(f"--nb_class {channels}: images of {train.info.name} have {own} channels; leave it out")
    if channels == own:
        args.nb_class = None  # nothing that a continuation must repeat
    torch.manual_seed(args.seed)
    method = MAGICAL(args.arch, channels, args.temperature, args.skips, args.projector, args.joint_norm)
    start = initialise(method.network.encoder, args.arch, args.init)
    method.normalization = start["normalization"]
    asked = {"size": args.image_size, "mask": args.mask, "mask_ratio": args.mask_ratio, "grid": args.grid}
    views = MaskedToneViews(**start["normalization"], **asked, channels=channels, crop_scale=args.crop_scale)
    pretrain(method, train, views, args, devices, lambda: validate(method.network, views, val, args, devices))


def cli() -> None:
    errors.run_script(main)


if __name__ == "__main__":
    cli()
