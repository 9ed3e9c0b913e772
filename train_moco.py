"""Pre-train with MoCo (He et al., CVPR 2020, arXiv 1911.05722; version 2: Chen et al., arXiv 2003.04297).

  python train_moco.py --data DIR --n chest --b 256 --output OUT --gpus 0 --amp
  python train_moco.py --version 1 --data DIR --dataset folder --output OUT --gpus 0,1 --amp
  torchrun --nproc-per-node 4 -- train_moco.py --data DIR --n chest --output OUT --amp
  python train_moco.py --steps 20 --b 8 --image-size 64 --queue 256 --output OUT          (no data, CPU)

The version decides these values where none is given:

  1  --temperature 0.07 --schedule step    --jitter 0.4 0.4 0.4 0.4 --blur 0.0    and a linear head
  2  --temperature 0.2  --schedule cosine  --jitter 0.4 0.4 0.4 0.1 --blur 0.5    and a hidden layer in the head;
                                           8 of 10 views are jittered

`step` multiplies the learning rate by 0.1 after 60 % and 80 % of the epochs.
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
from medssl.models.encoders import initialise, make_encoder
from medssl.models.heads import Embedder, begin_neck, mlp
from medssl.models.momentum import ema_update, make_teacher, momentum_at
from medssl.models.queue import QueueContrast
from medssl.views.of_images import MultiCropViews

DIM = 128
VERSIONS = {  # §3 of both papers, and their published code
    1: {"temperature": 0.07, "schedule": "step", "jitter": [0.4, 0.4, 0.4, 0.4], "blur": 0.0},
    2: {"blur": 0.5} | {key: options.MOCO_V2[key] for key in ("temperature", "schedule", "jitter")},
}
JITTER_CHANCE = {1: 1.0, 2: 0.8}


class MoCo(Method):
    """Learns to tell an image from all others: an embedding of one view must find that of another view, which a slowly
    moving teacher makes, among the keys of thousands of earlier images in a queue.

    L = ℓ(n f(x1), n f̃(x2)), ℓ = InfoNCE over the queue (arXiv 1911.05722, Eq. 1), or NCE.

    Batch: "view1", "view2" (B, 3, H, W) normalised.

    Differences from the published code: the learning rate changes every step; views as `MultiCropViews` makes them; the
    queue has 16384 keys and the encoder is a ResNet-18 unless asked otherwise, as for the methods that this one is
    compared with (65536 and ResNet-50 there).
    """

    def __init__(
        self,
        arch: str = "resnet18",
        version: int = 2,
        images: int = 1,
        queue: int = 16384,
        temperature: float = 0.2,
        momentum: float = 0.999,
        loss: str = "infonce",
        schedule: str = "constant",
    ) -> None:
        super().__init__()
        encoder = make_encoder(arch)
        c = encoder.out_channels[-1]
        self.student = Embedder(encoder, begin_neck(nn.Linear(c, DIM) if version == 1 else mlp(c, c, DIM)))
        self.teacher = make_teacher(self.student)
        self.contrast = QueueContrast(loss, temperature, images, queue, DIM)
        self.momentum, self.schedule = momentum, schedule

    def forward(self, batch: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        features, z = run(self.student, batch["view1"])
        _, k = run.shuffled(self.teacher, batch["view2"])
        self.features, self.embeddings = features.detach(), z.detach()
        (loss,) = self.contrast([(z, k)])
        return {"contrast": loss}

    def after_step(self, progress: float) -> None:
        self.contrast.after_step()
        ema_update(self.teacher, self.student, momentum_at(progress, self.momentum, self.schedule))

    def encoder_state(self) -> dict[str, Tensor]:
        return self.student.encoder.state_dict()

    def compiled_parts(self) -> list[nn.Module]:
        return [self.student, self.teacher]


def get_parser() -> options.Parser:
    parser = options.pretraining_parser(__doc__, output="runs/moco")
    group = options.add_queued_contrast(parser)
    options.add_nce(group)
    group.add_argument("--version", type=int, choices=(1, 2), default=2, help="of MoCo: head, views and recipe")
    group = parser.add_argument_group("views")
    view_options.add_crops(group)
    view_options.add_rotation(group)
    view_options.add_jitter(group)
    view_options.add_blur(group)
    view_options.add_cutout(group)
    parser.set_defaults(  # §4 of 1911.05722; rotation and cutout are C2L's, for radiographs. None: the version decides
        b=256, epochs=200, lr=0.03, momentum=0.9, weight_decay=1e-4, optimizer="sgd", rotation=0.0, cutout=0,
        milestones=None, **dict.fromkeys(VERSIONS[2]),
    )  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    args = options.complete(args, VERSIONS[args.version] | {"milestones": [0.6 * args.epochs, 0.8 * args.epochs]})
    devices = setup(args.gpus, args.device, args.deterministic)
    data = open_pretraining(args, (2,))
    torch.manual_seed(args.seed)
    method = MoCo(
        args.arch, args.version, len(data), args.queue, args.temperature, args.ema, args.loss, args.ema_schedule
    )
    start = initialise(method.student.encoder, args.arch, args.init)
    method.teacher.load_state_dict(method.student.state_dict())
    views = MultiCropViews(
        **start["normalization"], **view_options.large_views(args),
        jitter_chance=JITTER_CHANCE[args.version], jitter_first=args.version == 2, locals_=0, targets=0,
    )  # fmt: skip
    pretrain(method, data, views, args, devices)


def cli() -> None:
    errors.run_script(main)


if __name__ == "__main__":
    cli()
