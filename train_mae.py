"""Pre-train by restoring hidden patches with a convolutional encoder that sees the others alone: SparK (Tian et al.,
"Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked Modeling", ICLR 2023, arXiv 2301.03580).

  python train_mae.py --data DIR --dataset folder --b 64 --epochs 200 --output OUT --gpus 0 --amp
  torchrun --nproc-per-node 4 -- train_mae.py --data DIR --dataset chest --arch resnet50 --output OUT --amp
  python train_mae.py --data DIR --dataset folder --d 3 --output OUT --gpus 0 --amp           (volumes)
  python train_mae.py --steps 20 --b 8 --image-size 64 --output OUT                           (no data, CPU)

The data set knows its dimension, and with it come these values where none is given:

  2D  --arch resnet18 --b 64 --lr 0.001
  3D  --arch unet3d   --b 32 --lr 0.001      (unet3d_half and unet3d_quarter are narrower, for small machines)
"""

import argparse
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medssl import errors
from medssl.datasets.registry import open_pretraining
from medssl.engine import options, view_options
from medssl.engine.loop import pretrain
from medssl.engine.method import Method
from medssl.engine.parallel import Run, setup
from medssl.errors import InputError
from medssl.losses.patches import cut_patches, hidden_patch_error, join_patches, patch_scale
from medssl.models.encoders import DEFAULT_ARCH, initialise, make_encoder
from medssl.models.sparse import Densify, make_sparse, seeing
from medssl.models.unet2d import conv_norm_relu
from medssl.models.unet3d import ConvNorm3d
from medssl.views.of_images import HiddenPatchViews, Views
from medssl.views.of_volumes import HiddenPatchCubes

DEFAULTS = {  # of each dimension
    2: {"arch": DEFAULT_ARCH[2], "b": 64, "lr": 1e-3},
    3: {"arch": DEFAULT_ARCH[3], "b": 32, "lr": 1e-3},
}
ONLY_OF = {2: ("image_size", "crop_scale"), 3: ("cube_size", "crop_mm", "mirror")}
STRIDE = {2: 32, 3: 8}  # of the encoders' deepest maps
SCALES = 4  # maps that the decoder sees, the deepest ones (paper, §3.2)
WARM_UP = 40  # the part of a run in which the rate rises is one of so many (published code)
WIDTH = 512  # most channels of the decoder (published code)
LEAST_GRID = 4  # patches along an image's longest side; of fewer there is little to hide


class MaskedAutoencoder(nn.Module):
    """A sparse encoder, and a light dense decoder: D_i = B_i(D_{i+1}) + φ_i(S′_i) (paper, §3.2).

    Args:
        channels: of the restoration.
    """

    def __init__(self, arch: str, dims: int, channels: int) -> None:
        super().__init__()
        self.encoder = make_sparse(make_encoder(arch, dims=dims), arch)
        c_in = self.encoder.out_channels[: -SCALES - 1 : -1]  # deep to shallow, as all that follows
        levels = STRIDE[dims].bit_length()  # of the decoder, the deepest one without a block
        widths = [min(WIDTH, c_in[0] // 2) >> i for i in range(levels)]
        self.densify = nn.ModuleList(Densify(c, w, i == 0, dims) for i, (c, w) in enumerate(zip(c_in, widths)))
        layer = conv_norm_relu if dims == 2 else ConvNorm3d
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Upsample(scale_factor=2), layer(a, b), layer(b, b)) for a, b in zip(widths, widths[1:])
        )
        self.output = (nn.Conv2d if dims == 2 else nn.Conv3d)(widths[-1], channels, 1)

    def forward(self, x: Tensor, visible: Tensor) -> dict[str, Tensor]:
        """Restore images x (B, C, *S) from their visible patches, (B, 1, *grid) bool.

        Returns:
            "restored" (B, channels, *S), each patch in units of its own deviation, about its mean;
            "features" (B, F), the deepest map's average over what is visible.
        """
        with seeing(visible, x.shape[2:]) as seen:
            maps = self.encoder(seen.hide(x))[: -SCALES - 1 : -1]
            filled = [fill(m, seen.at(m.shape[2:])) for fill, m in zip(self.densify, maps)]
        y, *skips = filled
        for i, block in enumerate(self.blocks):
            y = block(y)
            y = y + skips[i] if i < len(skips) else y
        count = seen.at(maps[0].shape[2:]).flatten(2).sum(2)  # (B, 1)
        return {"restored": self.output(y).float(), "features": maps[0].float().flatten(2).sum(2) / count}


class MAE(Method):
    """Learns to restore an image from two fifths of its patches: the encoder sees these alone, as a transformer would,
    in every layer whose positions are no larger than a patch; the decoder gets its maps of four scales, with learnt
    embeddings where nothing was seen.

    L = mean over hidden patches of ‖x̂_p − (x_p − mean(x_p)) / std(x_p)‖² / pixels (paper, §3.3; arXiv 2111.06377,
    §3): 1 for a restoration of zeros.

    Batch: "image" (B, 3, H, W), or (B, 1, X, Y, Z) of volumes, normalised; "visible" (B, 1, *grid) bool, 1 where a
    patch is seen, as many of each image. Of grey images one channel is restored, of which the others are copies.

    Differences from the published code, on purpose:
      * Any ResNet, ResNeXt or DenseNet and the 3D U-Net, not ResNet-50 and ConvNeXt.
      * Batch statistics are those of a device's images, there of all devices'.
      * Patches smaller than the encoder's stride, for small images: a deep position is visible where any of its
        patches is.
      * Patches are normalised channel by channel, there all together; variances are over P, not P − 1, pixels.
      * The decoder begins with half of the encoder's channels, at most 512, up-samples by nearest neighbour, and its
        blocks end in a ReLU; there 512, transposed convolutions, ReLU6 in their middle alone.
      * AdamW at 0.001 for 64 images in place of LAMB for 4096, and a shorter run; norms and biases decay too, and the
        decay stays .04, where it rises to .2. Layers of the decoder begin as torch's do.
      * In 3D, cubes are mirrored along all axes, or those of `--mirror`.
    """

    def __init__(self, arch: str = "resnet18", dims: int = 2, channels: int = 3) -> None:
        super().__init__()
        self.network = MaskedAutoencoder(arch, dims, channels)
        self.channels = channels

    def forward(self, batch: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        image, visible = batch["image"], batch["visible"]
        out = run(self.network, image, visible)
        self.features = out["features"].detach()
        return {"restoration": hidden_patch_error(out["restored"], image[:, : self.channels], visible)}

    def encoder_state(self) -> dict[str, Tensor]:
        return self.network.encoder.state_dict()

    def compiled_parts(self) -> list[nn.Module]:
        # Not the encoder, whose layers ask for the patches of the call under way: each would be a graph of its own.
        return [*self.network.blocks]

    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        image, visible = batch["image"][:8], batch["visible"][:8]
        grid, seen = visible.shape[2:], visible.flatten(2)[..., None]  # (N, 1, L, 1)
        patches = cut_patches(image, grid)
        mean, deviation = patch_scale(patches)
        restored = cut_patches(self.network(image, visible)["restored"], grid) * deviation + mean
        rows = {"masked": patches * seen, "restored": torch.where(seen, patches, restored)}
        return {"image": image} | {name: join_patches(row, grid, image.shape[2:]) for name, row in rows.items()}


def choose_patch(option: str, sides: Sequence[int], patch: int | None, ratio: float) -> int:
    """The side of a patch: as asked for, or the encoder's stride, halved while few would fit.

    Args:
        option: that gives the image's sides, as typed. ratio: share of the patches that is hidden.

    Raises:
        InputError: for sides that the encoder's stride does not divide, a patch that does not divide them, and a ratio
            that hides all or nothing.
    """
    stride, size = STRIDE[len(sides)], f"{option} {' '.join(map(str, sides if option == '--cube-size' else sides[:1]))}"
    if any(side % stride for side in sides):
        raise InputError(f"{size}: sides must be multiples of {stride}, the encoder's stride")
    if patch is None:
        patch = stride
        while max(sides) < LEAST_GRID * patch:
            patch //= 2
    if patch < 2 or any(side % patch for side in sides):
        raise InputError(f"--patch {patch}: give 2 or more that divide {size}, such as {stride} or {stride // 2}")
    view_options.check_hidden([side // patch for side in sides], ratio)
    return patch


def get_parser() -> options.Parser:
    parser = options.pretraining_parser(__doc__, output="runs/mae")
    group = parser.add_argument_group("hidden patches")
    group.add_argument("--mask-ratio", type=options.fraction, default=0.6, help="share of the patches that is hidden")
    group.add_argument(
        "--patch", type=options.positive_int, metavar="SIDE",
        help="side of a patch in pixels or voxels; unless given, the encoder's stride (32, in 3D 8), halved for images "
        f"with fewer than {LEAST_GRID} of them along a side",
    )  # fmt: skip
    view_options.add_crops(parser.add_argument_group("views of images (2D)"))
    group = parser.add_argument_group("views of volumes (3D)")
    view_options.add_cubes(group)
    view_options.add_cutting(group)
    view_options.add_mirror(group)
    # Crops, clipping, and the decay's beginning: published code. None: by dimension; warm-up is a fortieth of the run.
    parser.set_defaults(
        epochs=200, warmup_epochs=None, optimizer="adamw", betas=[0.9, 0.95], weight_decay=0.04, clip_grad=5.0,
        schedule="cosine", crop_scale=0.67, **dict.fromkeys(DEFAULTS[2]),
    )  # fmt: skip
    return parser


def make_views(args: argparse.Namespace, dims: int, normalization: dict) -> Views:
    """The views of images or volumes."""
    hidden = {"patch": args.patch, "mask_ratio": args.mask_ratio}
    if dims == 3:
        flips, crops = view_options.flips_of(args.mirror), view_options.crops_of(args)
        return HiddenPatchCubes(tuple(args.cube_size), **hidden, flips=flips, crop_mm=crops, **normalization)
    return HiddenPatchViews(**normalization, **hidden, **view_options.large_views(args))


def main(argv: Sequence[str] | None = None) -> None:
    parser = get_parser()
    args = parser.parse_args(argv)
    devices = setup(args.gpus, args.device, args.deterministic)
    data = open_pretraining(args)
    dims = data.info.dims
    args = options.for_dims(parser, args, data.info, DEFAULTS, ONLY_OF)
    view_options.check_cutting(args, data)
    args = options.complete(args, {"warmup_epochs": args.epochs / WARM_UP})
    option, sides = ("--cube-size", args.cube_size) if dims == 3 else ("--image-size", [args.image_size] * 2)
    patch = choose_patch(option, sides, args.patch, args.mask_ratio)
    if args.patch is None and patch < STRIDE[dims] and devices.main:
        print(
            f"note: {option}: too small for patches of {STRIDE[dims]}; hiding patches of {patch}; deep layers see a "
            "position where any of its patches is seen",
            file=sys.stderr,
        )
    args.patch = patch
    torch.manual_seed(args.seed)
    method = MAE(args.arch, dims, data.info.channels if dims == 2 else 1)
    start = initialise(method.network.encoder, args.arch, args.init)
    pretrain(method, data, make_views(args, dims, start["normalization"]), args, devices)


def cli() -> None:
    errors.run_script(main)


if __name__ == "__main__":
    cli()
