"""Pre-train with C2L (Zhou et al., "Comparing to Learn: Surpassing ImageNet Pretraining on Radiographs by Comparing
Image Representations", MICCAI 2020, arXiv 2007.07423).

  python train_c2l.py --data DIR --n chest --model resnet18 --batch_size 128 --num_workers 24 --gpus 0 --output OUT
  torchrun --nproc-per-node 4 -- train_c2l.py --data DIR --n chest --arch densenet121 --output OUT --amp
  python train_c2l.py --steps 20 --b 8 --image-size 64 --queue 256 --output OUT              (no data, CPU)

The authors' own large run: --epochs 150 --b 256, on 700 000 radiographs. `--no-mixup` is MoCo with this recipe.
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
from medssl.models.heads import Embedder
from medssl.models.mixup import Mixup
from medssl.models.momentum import ema_update, make_teacher, momentum_at
from medssl.models.queue import QueueContrast
from medssl.views.of_images import MultiCropViews

DIM = 128


class C2L(Method):
    """Learns to tell images from each other, and mixtures of images too: a student must find the teacher's embedding of
    the other view among a queue of earlier ones, that of the other view's mixture, and the mixture of embeddings.
    So representations are compared at more than the points where there are images.

    With q = f(x1), k = f̃(x2), q' = f(mix x1), k' = f̃(mix x2), one λ and one permutation in every mix:
    L = ⅓ [ℓ(n q, n k) + ℓ(n q', n k') + ℓ(n q', n mix k)] (paper §2.2, Eqs. 1–5), ℓ InfoNCE or NCE over the queue.
    Features are mixed before they are normalised. The step's keys n k, n k', n mix k enter the queue in this order.

    Batch: "view1", "view2" (B, 3, H, W) normalised.

    Differences from the published code, on purpose:
      * InfoNCE unless `--loss nce` is given; NCE keeps the fraction of Z that is cut there.
      * All three terms take their negatives from the queue as it is at the start of the step. There, the second and
        third found the keys of their own images in it, as negatives.
      * The student's mixed features, which no loss took, are not made.
      * The learning rate changes every step; rotation and crop are one interpolation.
    """

    def __init__(
        self,
        arch: str = "resnet18",
        images: int = 1,
        queue: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.999,
        loss: str = "infonce",
        mixup: bool = True,
        schedule: str = "constant",
    ) -> None:
        super().__init__()
        encoder = make_encoder(arch)
        self.student = Embedder(encoder, nn.Linear(encoder.out_channels[-1], DIM))
        self.teacher = make_teacher(self.student)
        self.contrast = QueueContrast(loss, temperature, images, queue, DIM)
        self.momentum, self.schedule, self.mixup = momentum, schedule, mixup

    def forward(self, batch: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        x1, x2 = batch["view1"], batch["view2"]
        features, q = run(self.student, x1)
        _, k = run.shuffled(self.teacher, x2)
        self.features, self.embeddings = features.detach(), q.detach()
        pairs = {"contrast": (q, k)}
        if self.mixup:
            mix = Mixup.draw(run, len(x1))
            _, q_mixed = run(self.student, mix(x1))
            _, k_mixed = run.shuffled(self.teacher, mix(x2))
            pairs |= {"mixed_images": (q_mixed, k_mixed), "mixed_features": (q_mixed, mix(k))}
        losses = self.contrast(pairs.values())
        return {name: loss / len(pairs) for name, loss in zip(pairs, losses)}

    def after_step(self, progress: float) -> None:
        self.contrast.after_step()
        ema_update(self.teacher, self.student, momentum_at(progress, self.momentum, self.schedule))

    def encoder_state(self) -> dict[str, Tensor]:
        return self.student.encoder.state_dict()

    def compiled_parts(self) -> list[nn.Module]:
        return [self.student, self.teacher]


def get_parser() -> options.Parser:
    parser = options.pretraining_parser(__doc__, output="runs/c2l")
    group = options.add_queued_contrast(parser)
    options.add_nce(group)
    options.flag(group, "--mixup", True, "the two terms with mixtures; without them this is MoCo")
    group = parser.add_argument_group("views")
    view_options.add_crops(group)
    view_options.add_rotation(group)
    view_options.add_jitter(group)
    view_options.add_blur(group, 0.0)
    view_options.add_cutout(group)
    parser.set_defaults(  # §3.1 of the paper and the published script
        b=128, epochs=120, lr=0.03, momentum=0.9, weight_decay=1e-4, optimizer="sgd", schedule="step",
        milestones=[60, 80, 100], temperature=0.07,
    )  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    devices = setup(args.gpus, args.device, args.deterministic)
    data = open_pretraining(args, (2,))
    torch.manual_seed(args.seed)
    method = C2L(args.arch, len(data), args.queue, args.temperature, args.ema, args.loss, args.mixup, args.ema_schedule)
    start = initialise(method.student.encoder, args.arch, args.init)
    method.teacher.load_state_dict(method.student.state_dict())
    views = MultiCropViews(**start["normalization"], **view_options.large_views(args), locals_=0, targets=0)
    pretrain(method, data, views, args, devices)


def cli() -> None:
    errors.run_script(main)


if __name__ == "__main__":
    cli()
