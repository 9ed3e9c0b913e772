"""Pre-train with Models Genesis (Zhou et al., "Models Genesis: Generic Autodidactic Models for 3D Medical Image
Analysis", MICCAI 2019, arXiv 1908.06912; Medical Image Analysis 67, 2021): restoration alone, which the methods that
add to it must beat.

  python train_genesis.py --data DIR --dataset luna --d 3 --output OUT --gpus 0 --amp          (volumes)
  python train_genesis.py --data DIR --dataset chest --output OUT --gpus 0 --amp               (images)
  torchrun --nproc-per-node 4 -- train_genesis.py --data DIR --dataset luna --d 3 --output OUT --amp
  python train_genesis.py --steps 20 --b 8 --image-size 64 --output OUT                        (no data, CPU)

The data set knows its dimension, and with it come these values where none is given:

  2D  --arch resnet18 --b 64
  3D  --arch unet3d   --b 6      (unet3d_half and unet3d_quarter are narrower, for small machines)
"""

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from medssl import errors
from medssl.datasets.registry import open_pretraining
from medssl.engine import options, view_options
from medssl.engine.loop import pretrain
from medssl.engine.method import Method
from medssl.engine.parallel import Run, setup
from medssl.models.encoders import DEFAULT_ARCH, IMAGENET, initialise
from medssl.models.restoring_unet import RestoringUNet2d, RestoringUNet3d
from medssl.views.of_images import GenesisViews, Views
from medssl.views.of_volumes import GenesisCubeViews
from medssl.views.ops import GenesisChanges
from medssl.views.ops2d import normalise

DEFAULTS = {  # of each dimension; 3D: the published configuration, 2D: as PCRL's
    2: {"arch": DEFAULT_ARCH[2], "b": 64},
    3: {"arch": DEFAULT_ARCH[3], "b": 6},
}
ONLY_OF = {2: ("image_size", "crop_scale"), 3: ("cube_size", "crop_mm", "mirror")}


class Genesis(Method):
    """Learns anatomy by restoring it: a U-Net with skips sees a crop whose tones run along a random curve, whose pixels
    are shuffled within small windows, and of which parts are noise, and gives back the crop.

    L = MSE(d(f(g(x))), x), where g draws each change by itself (paper, §3).

    Batch: "changed" (B, 3, H, W) normalised, or in 3D (B, 1, X, Y, Z) in [0, 1]; "target" (B, C, H, W), one channel of
    grey images and three of colour, or (B, 1, X, Y, Z), in [0, 1].

    Differences from the published code, on purpose:
      * Each axis of a cube is mirrored with chance ½; there, up to three flips of random axes follow one another, each
        with chance .4.
      * The tone curve is looked up in a table of 1025 values.
      * Cubes are cut, or were prepared, as PCRLv2's; published cubes have the same 64 × 64 × 32 voxels.
      * In 2D the encoder is any of the library's, and images are cropped at random.
      * Adam at .001, along a cosine over the run's own length; there SGD at 1, halved every 40 epochs, and the best of
        the validation is kept, which is not done here.
      * In 2D, local shuffling has as many windows over a pixel as a published volume has over a voxel.
    """

    def __init__(
        self, arch: str = "resnet18", dims: int = 2, channels: int = 3, normalization: dict = IMAGENET
    ) -> None:
        super().__init__()
        self.network = RestoringUNet2d(arch, channels) if dims == 2 else RestoringUNet3d(arch)
        self.normalization = normalization

    def forward(self, batch: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        out = run(self.network, batch["changed"])
        self.features = out["features"]
        return {"restoration": F.mse_loss(out["restored"], batch["target"])}

    def encoder_state(self) -> dict[str, Tensor]:
        return self.network.encoder_state()

    def decoder_state(self) -> dict[str, Tensor] | None:
        return self.network.decoder_state()

    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        restored, target = self.network(batch["changed"][:8])["restored"], batch["target"][:8]
        if target.ndim == 4:  # pictures of images are normalised
            restored, target = (normalise(x, **self.normalization) for x in (restored, target))
        return {"changed": batch["changed"], "target": target, "restored": restored}


def get_parser() -> options.Parser:
    parser = options.pretraining_parser(__doc__, output="runs/genesis")
    group = parser.add_argument_group("views")
    chances = {"type": options.fraction, "metavar": "P"}
    group.add_argument("--tones", **chances, default=0.9, help="chance of a random tone curve")
    group.add_argument("--falling", **chances, default=0.5, help="share of curves that turn dark to light")
    group.add_argument("--shuffle", **chances, default=0.5, help="chance of local shuffling")
    group.add_argument("--paint", **chances, default=0.9, help="chance of painting")
    group.add_argument("--inner", **chances, default=0.2, help="share of in-painting; the rest is out-painting")
    view_options.add_crops(parser.add_argument_group("views of images (2D)"))
    group = parser.add_argument_group("views of volumes (3D)")
    view_options.add_cubes(group)
    view_options.add_cutting(group)
    view_options.add_mirror(group)
    # Adam, not the published SGD at rate 1, which was not tried. None: the dimension decides.
    parser.set_defaults(
        epochs=240, optimizer="adam", lr=1e-3, weight_decay=0.0, schedule="cosine", **dict.fromkeys(DEFAULTS[2])
    )
    return parser


def make_views(args: argparse.Namespace, dims: int, normalization: dict) -> Views:
    """The views of images or volumes."""
    changes = GenesisChanges(args.tones, args.falling, args.shuffle, args.paint, args.inner)
    if dims == 3:
        flips, crops = view_options.flips_of(args.mirror), view_options.crops_of(args)
        return GenesisCubeViews(tuple(args.cube_size), flips, changes, crops)
    return GenesisViews(**normalization, **view_options.large_views(args), changes=changes)


def main(argv: Sequence[str] | None = None) -> None:
    parser = get_parser()
    args = parser.parse_args(argv)
    options.check_sides("--cube-size", args.cube_size)
    devices = setup(args.gpus, args.device, args.deterministic)
    data = open_pretraining(args)
    dims = data.info.dims
    args = options.for_dims(parser, args, data.info, DEFAULTS, ONLY_OF)
    view_options.check_cutting(args, data)
    torch.manual_seed(args.seed)
    method = Genesis(args.arch, dims, data.info.channels)
    start = initialise(method.network.encoder, args.arch, args.init)
    method.normalization = start["normalization"]
    pretrain(method, data, make_views(args, dims, start["normalization"]), args, devices)


def cli() -> None:
    errors.run_script(main)


if __name__ == "__main__":
    cli()
