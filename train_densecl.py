"""Pre-train with DenseCL (Wang et al., "Dense Contrastive Learning for Self-Supervised Visual Pre-Training", CVPR 2021,
arXiv 2011.09157).

  python train_densecl.py --data DIR --dataset nct --b 256 --output OUT --gpus 0 --amp
  torchrun --nproc-per-node 8 -- train_densecl.py --data DIR --dataset nct --output OUT --amp
  python train_densecl.py --steps 20 --b 8 --image-size 64 --queue 256 --output OUT          (no data, CPU)
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medssl import errors
from medssl.datasets.registry import open_pretraining
from medssl.engine import options, view_options
from medssl.engine.loop import pretrain
from medssl.engine.method import Method
from medssl.engine.parallel import Run, setup
from medssl.losses.contrastive import l2_normalize
from medssl.models.encoders import initialise, make_encoder
from medssl.models.heads import DenseEmbedder, begin_neck, global_average, mlp
from medssl.models.momentum import ema_update, make_teacher, momentum_at
from medssl.models.queue import QueueContrast
from medssl.views.of_images import PairViews

HIDDEN, DIM = 512, 128


class DenseHead(DenseEmbedder):
    """A `DenseEmbedder` which embeds every cell of the last map too: "dense" (B, 128, h, w)."""

    def __init__(self, arch: str) -> None:
        encoder = make_encoder(arch)
        c = encoder.out_channels[-1]
        super().__init__(encoder, begin_neck(mlp(c, HIDDEN, DIM)))
        self.dense_head = nn.Sequential(nn.Conv2d(c, HIDDEN, 1), nn.ReLU(inplace=True), nn.Conv2d(HIDDEN, DIM, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor | list[Tensor]]:
        out = super().forward(x)
        return out | {"dense": self.dense_head(out["maps"][-1])}


class DenseCL(Method):
    """Learns to tell images, and places in images, from each other: beside MoCo's contrast of whole images, each cell
    of one view's map must find the cell of the other view that looks most like it.

    L = (1 − λ) ℓ(n g(f(x1)), n g̃(f̃(x2))) + λ mean_s ℓ'(n d(x1)_s, n d̃(x2)_c(s)), with the match
    c(s) = argmax_t cos(f(x1)_s, f̃(x2)_t) of the encoders' last maps (paper, Eqs. 2–4); d: the dense head, ˜: of the
    teacher. ℓ and ℓ' are InfoNCE over queues of their own; the average of an image's dense keys enters the second.

    Batch: "view1", "view2" (B, 3, H, W) normalised.

    Differences from the published code: the learning rate changes every step.
    """

    def __init__(
        self,
        arch: str = "resnet18",
        weight: float = 0.5,
        queue: int = 16384,
        temperature: float = 0.2,
        momentum: float = 0.999,
        schedule: str = "constant",
    ) -> None:
        super().__init__()
        self.student = DenseHead(arch)
        self.teacher = make_teacher(self.student)
        self.contrast = QueueContrast("infonce", temperature, 1, queue, DIM)
        self.dense_contrast = QueueContrast("infonce", temperature, 1, queue, DIM)
        self.weight, self.momentum, self.schedule = weight, momentum, schedule

    def forward(self, batch: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        q, k = run(self.student, batch["view1"]), run.shuffled(self.teacher, batch["view2"])
        self.features, self.embeddings = q["features"].detach(), q["z"].detach()
        (whole,) = self.contrast([(q["z"], k["z"])])
        matched = match(q["maps"][-1], k["maps"][-1], k["dense"])
        pairs = [(cells(q["dense"]).flatten(0, 1), matched.flatten(0, 1))]
        (dense,) = self.dense_contrast(pairs, keys=global_average(k["dense"].float()))
        return {"contrast": (1 - self.weight) * whole, "dense": self.weight * dense}

    def after_step(self, progress: float) -> None:
        self.contrast.after_step()
        self.dense_contrast.after_step()
        ema_update(self.teacher, self.student, momentum_at(progress, self.momentum, self.schedule))

    def encoder_state(self) -> dict[str, Tensor]:
        return self.student.encoder.state_dict()

    def compiled_parts(self) -> list[nn.Module]:
        return [self.student, self.teacher]


def cells(maps: Tensor) -> Tensor:
    """(B, C, h, w) → (B, h·w, C) float32."""
    return maps.flatten(2).transpose(1, 2).float()


@torch.no_grad()
def match(q_map: Tensor, k_map: Tensor, keys: Tensor) -> Tensor:
    """The key of the cell that each cell of another view looks most like.

    Args:
        q_map, k_map: (B, C, h, w) the encoders' maps of both views. keys: (B, D, h, w).

    Returns:
        (B, h·w, D), a row a cell of `q_map`.
    """
    alike = l2_normalize(cells(q_map), 2) @ l2_normalize(cells(k_map), 2).transpose(1, 2)  # (B, h·w, h·w)
    best = alike.argmax(2, keepdim=True)
    return cells(keys).gather(1, best.expand(-1, -1, keys.shape[1]))


def get_parser() -> options.Parser:
    parser = options.pretraining_parser(__doc__, output="runs/densecl")
    group = options.add_queued_contrast(parser)
    group.add_argument("--dense-weight", type=options.fraction, default=0.5, help="weight λ of the dense contrast")
    view_options.add_pair_views(parser)
    parser.set_defaults(**options.MOCO_V2)  # ConCL's baseline on NCT-CRC-HE-100K
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    devices = setup(args.gpus, args.device, args.deterministic)
    data = open_pretraining(args, (2,))
    torch.manual_seed(args.seed)
    method = DenseCL(args.arch, args.dense_weight, args.queue, args.temperature, args.ema, args.ema_schedule)
    start = initialise(method.student.encoder, args.arch, args.init)
    method.teacher.load_state_dict(method.student.state_dict())
    views = PairViews(**start["normalization"], **view_options.large_views(args))
    pretrain(method, data, views, args, devices)


def cli() -> None:
    errors.run_script(main)


if __name__ == "__main__":
    cli()
