"""Pre-train with PCRLv2 (Zhou et al., "A Unified Visual Information Preservation Framework for
Self-supervised Pre-training in Medical Image Analysis", TPAMI 2023, arXiv 2301.00772).

  python train_pcrlv2.py --data DIR --n chest --b 64 --epochs 240 --lr 1e-2 --output OUT --gpus 0 --amp
  torchrun --nproc-per-node 4 train_pcrlv2.py --data DIR --n chest --output OUT --amp
  python train_pcrlv2.py --steps 20 --b 8 --image-size 64 --local-size 32 --output OUT      (no data, CPU)
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medssl.datasets.registry import open_pretraining
from medssl.datasets.views import MultiCropViews
from medssl.engine import options
from medssl.engine.loop import Method, pretrain
from medssl.engine.parallel import Run, setup
from medssl.losses.contrastive import negative_cosine
from medssl.models.encoders import initialise, make_encoder
from medssl.models.heads import ScaleHead, global_average
from medssl.models.unet2d import DECODER_CHANNELS, Decoder2d


class MultiScaleUNet(nn.Module):
    """U-Net without skips, with PCRLv2's heads at every decoder level."""

    def __init__(self, arch: str, out_channels: int = 3) -> None:
        super().__init__()
        self.encoder = make_encoder(arch)
        self.decoder = Decoder2d(self.encoder.out_channels)
        self.heads = nn.ModuleList(ScaleHead(c, out_channels) for c in DECODER_CHANNELS)
        self.output = nn.Conv2d(DECODER_CHANNELS[-1], out_channels, 3, padding=1)

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


class PCRLv2(Method):
    """Learns three kinds of information at once: pixels (restore the clean crop from the changed one), semantics
    (views of an image agree, SimSiam-like, with no teacher and no negatives), and scale (both at a decoder level
    drawn anew for every pair of views, and between large crops and small ones).

    L = MSE(out(x1), gt1) + S(x1, x2) + 1/(2V) Σ_v [S(x1, l_v) + S(x2, l_v)] + β MSE(level(x1), gt1), with
    S(a, b) = −½[cos(q_a, sg p_b) + cos(q_b, sg p_a)] at one level drawn per call, and β = ½(1 + cos(π e/E))
    (paper §3, Eqs. 3–9). The intermediate restoration is of the level drawn for S(x1, x2).

    Batch: "view1", "view2" (B, 3, H, W), "target" (B, 3, H, W) and "locals" (V·B, 3, h, w, view-major), all
    normalised.

    Differences from the published code, on purpose:
      * β follows the run's own length, not a constant 240 epochs.
      * β and the learning rate change every step, not every epoch.
      * The encoder starts from random weights unless `--init imagenet` is given; there, ImageNet was silent.
      * Only drawn levels are computed; the others' losses were thrown away.
      * Rotation and crop are one interpolation, and rotated corners show the image instead of black.
    """

    find_unused = True  # levels that a step does not draw have no gradient

    def __init__(self, arch: str = "resnet18", locals_: int = 6) -> None:
        super().__init__()
        self.network = MultiScaleUNet(arch)
        self.locals_ = locals_
        self.register_buffer("beta", torch.ones(()))

    def draw_levels(self, generator: torch.Generator | None) -> list[int]:
        """Levels of S(x1, x2), then of S(x1, l_v) and S(x2, l_v) for each local view v."""
        count = 1 + 2 * self.locals_
        return torch.randint(len(self.network.heads), (count,), generator=generator).tolist()

    def forward(self, batch: dict[str, Tensor], run: Run, levels: Sequence[int] | None = None) -> dict[str, Tensor]:
        pair, *cross = levels or self.draw_levels(run.generator)
        with1, with2 = cross[::2], cross[1::2]  # levels at which views 1 and 2 meet the local views

        x1 = run(self.network, batch["view1"], levels=[pair, *with1], restore=pair)
        x2 = run(self.network, batch["view2"], levels=[pair, *with2])
        self.features = x1["feature"]
        losses = {
            "restoration": F.mse_loss(x1["restored"].float(), batch["target"]),
            "intermediate": self.beta * F.mse_loss(x1["intermediate"].float(), batch["target"]),
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
        return self.network.encoder.state_dict()

    def compiled_parts(self) -> list[nn.Module]:
        # Parts rather than the whole: each draw of levels would be another program.
        return [self.network.encoder, *self.network.decoder.blocks, *(head.restore for head in self.network.heads)]

    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        middle = len(self.network.heads) // 2
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
    parser = options.Parser(__doc__)
    options.add_data(parser)
    options.add_pretraining(parser)
    options.add_training(parser)
    options.add_network(parser)
    options.add_runtime(parser)
    options.add_output(parser, default="runs/pcrlv2")
    group = parser.add_argument_group("PCRLv2")
    group.add_argument("--image-size", type=options.positive_int, default=224, help="side of the large views, pixels")
    group.add_argument("--local-size", type=options.positive_int, default=96, help="side of the local views, pixels")
    group.add_argument("--local-views", type=options.non_negative_int, default=6, help="local views V per image")
    options.add_photometric(group)
    parser.set_defaults(  # §4.1 of the paper and the published script
        b=64, epochs=240, lr=1e-2, momentum=0.9, weight_decay=1e-4, optimizer="sgd", schedule="cosine"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    options.check_range("--blur-sigma", *args.blur_sigma)
    devices = setup(args.gpus, args.device, args.deterministic)
    torch.manual_seed(args.seed)
    method = PCRLv2(args.arch, args.local_views)
    start = initialise(method.network.encoder, args.arch, args.init)
    data = open_pretraining(args)
    views = MultiCropViews(
        **start["normalization"],
        size=args.image_size,
        local_size=args.local_size,
        locals_=args.local_views,
        jitter=args.jitter,
        blur_sigma=args.blur_sigma,
        hole=round(args.cutout * args.image_size / 224),
    )
    pretrain(method, data, views, args, devices)


def cli() -> None:
    options.run_script(main)


if __name__ == "__main__":
    cli()
