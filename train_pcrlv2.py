"""Pre-train with PCRLv2 (Zhou et al., "A Unified Visual Information Preservation Framework for
Self-supervised Pre-training in Medical Image Analysis", TPAMI 2023, arXiv 2301.00772).

  python train_pcrlv2.py --data DIR --n chest --b 64 --epochs 240 --lr 1e-2 --output OUT --gpus 0 --amp
  torchrun --nproc-per-node 4 -- train_pcrlv2.py --data DIR --n chest --output OUT --amp
  python train_pcrlv2.py --data DIR --n luna --d 3 --output OUT --gpus 0 --amp              (volumes)
  python train_pcrlv2.py --steps 20 --b 8 --image-size 64 --local-size 32 --output OUT      (no data, CPU)

The data set knows its dimension, and with it come these values where none is given (the published ones):

  2D  --arch resnet18 --b 64 --lr 0.01
  3D  --arch unet3d   --b 32 --lr 0.001      (unet3d_half and unet3d_quarter are narrower, for small machines)
"""

import argparse
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medssl import errors
from medssl.datasets.registry import open_pretraining
from medssl.engine import options, view_options
from medssl.engine.loop import pretrain
from medssl.engine.method import Method
from medssl.engine.parallel import Run, setup
from medssl.losses.contrastive import negative_cosine
from medssl.models.encoders import DEFAULT_ARCH, initialise, make_encoder, width_of
from medssl.models.heads import ScaleHead, global_average
from medssl.models.pcrlv2_model_3d import PCRLv23d
from medssl.models.unet2d import DECODER_CHANNELS, Decoder2d, make_output
from medssl.views.of_images import MultiCropViews, Views
from medssl.views.of_volumes import HIDDEN_SIDE, CubeViews
from medssl.views.ops3d import LOCAL_CUBE_SIZE

DEFAULTS = {  # of each dimension: §4.1 of the paper and the published scripts
    2: {"arch": DEFAULT_ARCH[2], "b": 64, "lr": 1e-2},
    3: {"arch": DEFAULT_ARCH[3], "b": 32, "lr": 1e-3},
}
ONLY_OF = {
    2: ("image_size", "local_size", "jitter", "blur", "blur_sigma", "cutout"),
    3: ("cube_size", "local_cube_size", "crop_mm", "decoder_skips", "mask_ratio"),
}


class MultiScaleUNet(nn.Module):
    """2D U-Net without skips, with PCRLv2's heads at every decoder level; `PCRLv23d` is the 3D one."""

    def __init__(self, arch: str, out_channels: int = 3) -> None:
        super().__init__()
        self.encoder = make_encoder(arch)
        self.decoder = Decoder2d(self.encoder.out_channels)
        self.heads = nn.ModuleList(ScaleHead(c, out_channels) for c in DECODER_CHANNELS)
        self.output = make_output(out_channels)
        self.levels = len(DECODER_CHANNELS)

    def forward(self, x: Tensor, levels: Sequence[int], restore: int | None = None) -> dict[str, Tensor]:
        """Embed an image batch at the drawn levels, and restore it if asked.

        Nothing that no loss asks for is computed: the decoder stops at the deepest level drawn, other
        levels' heads are left out, and without `restore` there is no restoration.

        Args:
            x: (B, 3, H, W) normalised images.
            levels: decoder levels (0 deepest) whose embeddings are wanted.
            restore: the level whose intermediate restoration is wanted, beside the full one.

        Returns:
            "feature" (B, C) the encoder's pooled map; "p{i}" and "q{i}" (B, C_i) for each level i; with
            `restore` also "restored" and "intermediate", both (B, 3, H, W).
        """
        features = self.encoder(x)
        maps = self.decoder(features, None if restore is not None else max(levels) + 1)
        out = {"feature": global_average(features[-1].detach())}
        for i in sorted(set(levels)):
            out[f"p{i}"], out[f"q{i}"] = self.heads[i].embed(maps[i])
        if restore is not None:
            out["restored"] = self.output(maps[-1])
            coarse = self.heads[restore].restore(maps[restore])
            out["intermediate"] = F.interpolate(coarse, size=x.shape[2:], mode="bilinear")
        return out

    def encoder_state(self) -> dict[str, Tensor]:
        """What is exported: the encoder, with torchvision's names."""
        return self.encoder.state_dict()

    def parts(self) -> list[nn.Module]:
        """What `--compile` compiles."""
        return [self.encoder, *self.decoder.blocks, *(head.restore for head in self.heads)]


class PCRLv2(Method):
    """Learns three kinds of information at once: pixels (restore the clean crop from the changed one), semantics
    (views of an image agree, SimSiam-like, with no teacher and no negatives), and scale (both at a decoder level
    drawn anew for every pair of views, and between large crops and small ones).

    L = w MSE(out(x1), gt1) + S(x1, x2) + 1/(2V) Σ_v [S(x1, l_v) + S(x2, l_v)] + w β MSE(level(x1), gt1), with
    S(a, b) = −½[cos(q_a, sg p_b) + cos(q_b, sg p_a)] at one level drawn per call, and β = ½(1 + cos(π e/E))
    (paper §3, Eqs. 3–9, where w = 1). The intermediate restoration is of the level drawn for S(x1, x2).

    Batch in 2D: "view1", "view2" (B, 3, H, W), "target" (B, 3, H, W) and "locals" (V·B, 3, h, w, view-major), all
    normalised. In 3D: "view1", "view2" (B, 1, X, Y, Z) and "locals" (V·B, 1, x, y, z), each volume normalised to
    zero mean and unit deviation; "target" (B, 1, X, Y, Z) in [0, 1], as are the restorations.

    Differences from the published code, on purpose:
      * β follows the run's own length, not a constant 240 epochs.
      * β and the learning rate change every step, not every epoch.
      * The encoder starts from random weights unless `--init imagenet` is given; there, ImageNet was silent.
      * Only drawn levels are computed; the others' losses were thrown away.
      * Rotation and crop are one interpolation, and rotated corners show the image instead of black.
      * No step is skipped for its loss, as there in 3D above 1000 after 10 epochs: squares of differences in [0, 1]
        and cosines cannot get there, and a loss that is not finite stops the run and names its volumes.
    """

    find_unused = True  # levels that a step does not draw have no gradient

    def __init__(
        self, arch: str = "resnet18", locals_: int = 6, dims: int = 2, weight: float = 1.0, skips: bool = False
    ) -> None:
        super().__init__()
        self.network = MultiScaleUNet(arch) if dims == 2 else PCRLv23d(width=width_of(arch), skips=skips)
        self.locals_, self.weight = locals_, weight
        self.register_buffer("beta", torch.ones(()))

    def draw_levels(self, generator: torch.Generator | None) -> list[int]:
        """Levels of S(x1, x2), then of S(x1, l_v) and S(x2, l_v) for each local view v."""
        count = 1 + 2 * self.locals_
        return torch.randint(self.network.levels, (count,), generator=generator).tolist()

    def forward(self, batch: dict[str, Tensor], run: Run, levels: Sequence[int] | None = None) -> dict[str, Tensor]:
        pair, *cross = levels or self.draw_levels(run.generator)
        with1, with2 = cross[::2], cross[1::2]  # levels at which views 1 and 2 meet the local views

        x1 = run(self.network, batch["view1"], levels=[pair, *with1], restore=pair)
        x2 = run(self.network, batch["view2"], levels=[pair, *with2])
        self.features = x1["feature"]
        losses = {
            "restoration": self.weight * F.mse_loss(x1["restored"].float(), batch["target"]),
            "intermediate": self.weight * self.beta * F.mse_loss(x1["intermediate"].float(), batch["target"]),
            "siamese": agreement(x1, x2, pair),
        }
        if self.locals_:
            # All local views share one pass, and so their batch statistics, as published.
            small = run(self.network, batch["locals"], levels=cross)
            views = [{k: t.chunk(self.locals_)[v] for k, t in small.items()} for v in range(self.locals_)]
            terms = [agreement(x1, view, level) for view, level in zip(views, with1)]
            terms += [agreement(x2, view, level) for view, level in zip(views, with2)]
            losses["local"] = sum(terms) / len(terms)
        return losses

    def after_step(self, progress: float) -> None:
        self.beta.fill_(0.5 * (1 + math.cos(math.pi * progress)))

    def encoder_state(self) -> dict[str, Tensor]:
        return self.network.encoder_state()

    def compiled_parts(self) -> list[nn.Module]:
        # Parts rather than the whole: each draw of levels would be another program.
        return self.network.parts()

    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        middle = self.network.levels // 2
        x1 = self.network(batch["view1"][:8], levels=[middle], restore=middle)
        rows = {"view 1": batch["view1"], "view 2": batch["view2"], "target": batch["target"]}
        rows |= {"restored": x1["restored"], f"level {middle}": x1["intermediate"]}
        if self.locals_:
            rows["local 1"] = batch["locals"].chunk(self.locals_)[0]
        return rows


def agreement(a: dict[str, Tensor], b: dict[str, Tensor], level: int) -> Tensor:
    """S(a, b) at a decoder level, in float32."""
    return negative_cosine(*(view[f"{kind}{level}"].float() for view in (a, b) for kind in "qp"))


def get_parser() -> options.Parser:
    parser = options.pretraining_parser(__doc__, output="runs/pcrlv2")
    options.add_published(parser, "pcrlv2")
    group = parser.add_argument_group("PCRLv2")
    size = options.positive_int
    group.add_argument("--local-views", type=options.non_negative_int, default=6, help="local views V per image")
    group.add_argument("--restoration-weight", type=options.non_negative, default=1.0, help="weight w of restorations")
    group = parser.add_argument_group("views of images (2D)")
    group.add_argument("--image-size", type=size, default=224, help="side of the large views, pixels")
    group.add_argument("--local-size", type=size, default=96, help="side of the local views, pixels")
    view_options.add_jitter(group)
    view_options.add_blur(group)
    view_options.add_cutout(group)
    group = parser.add_argument_group("views of volumes (3D)")
    view_options.add_cubes(group)
    view_options.add_cubes(group, "--local-cube-size", LOCAL_CUBE_SIZE, "local cubes")
    view_options.add_cutting(group)
    options.flag(
        group, "--decoder-skips", False, "let the decoder see the encoder's maps, as that of segmentation does"
    )
    group.add_argument(
        "--mask-ratio", type=options.fraction, default=0.0, help="share of the large cubes' 8³ patches that is hidden"
    )
    parser.set_defaults(  # §4.1 of the paper and the published scripts; None: the dimension decides
        epochs=240, momentum=0.9, weight_decay=1e-4, optimizer="sgd", schedule="cosine", **dict.fromkeys(DEFAULTS[2])
    )
    return parser


def make_views(args: argparse.Namespace, dims: int, normalization: dict) -> Views:
    """The views of images or volumes."""
    if dims == 3:
        sizes, crops = (tuple(args.cube_size), tuple(args.local_cube_size)), view_options.crops_of(args)
        return CubeViews(*sizes, args.local_views, crop_mm=crops, mask_ratio=args.mask_ratio)
    return MultiCropViews(
        **normalization,
        **view_options.large_views(args),
        local_size=args.local_size,
        locals_=args.local_views,
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = get_parser()
    args = parser.parse_args(argv)
    options.check_sides("--cube-size", args.cube_size)
    options.check_sides("--local-cube-size", args.local_cube_size)
    devices = setup(args.gpus, args.device, args.deterministic)
    data = open_pretraining(args)
    dims = data.info.dims
    args = options.for_dims(parser, args, data.info, DEFAULTS, ONLY_OF)
    view_options.check_cutting(args, data)
    if args.mask_ratio:
        view_options.check_hidden([side // HIDDEN_SIDE for side in args.cube_size], args.mask_ratio)
    torch.manual_seed(args.seed)
    method = PCRLv2(args.arch, args.local_views, dims, args.restoration_weight, args.decoder_skips)
    start = initialise(method.network.encoder, args.arch, args.init)
    views = make_views(args, dims, start["normalization"])
    pretrain(method, data, views, args, devices)


def cli() -> None:
    errors.run_script(main)


if __name__ == "__main__":
    cli()
