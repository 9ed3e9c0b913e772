"""Pre-train with BYOL (Grill et al., "Bootstrap Your Own Latent", NeurIPS 2020, arXiv 2006.07733).

  python train_byol.py --data DIR --dataset nct --b 1024 --output OUT --gpus 0,1,2,3 --amp
  torchrun --nproc-per-node 8 -- train_byol.py --data DIR --dataset nct --output OUT --amp
  python train_byol.py --optimizer sgd --lr 0.05 --b 256 --data DIR --dataset folder --output OUT --gpus 0 --amp
  python train_byol.py --steps 20 --b 8 --image-size 64 --output OUT                         (no data, CPU)

The learning rate is for the batch that stands beside it; LARS' is usually made proportional to the batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from medssl import errors
from medssl.datasets.registry import open_pretraining
from medssl.engine import options, view_options
from medssl.engine.loop import pretrain
from medssl.engine.method import Method
from medssl.engine.parallel import Run, setup
from medssl.losses.contrastive import negative_cosine
from medssl.models.encoders import initialise, make_encoder
from medssl.models.heads import Embedder, begin_neck, norm_mlp
from medssl.models.momentum import ema_update, make_teacher, momentum_at
from medssl.views.of_images import PairViews

HIDDEN, DIM = 512, 256
BLUR, SOLARISED = (1.0, 0.1), (0.0, 0.2)  # chances of view 1 and view 2


class BYOL(Method):
    """Learns without negatives: from one view of an image, a predictor on top of the student must foretell the
    embedding that a slowly moving teacher gives to another view.

    L = 2 − 2 cos(p(g(f(x1))), g̃(f̃(x2))) + 2 − 2 cos(p(g(f(x2))), g̃(f̃(x1))) (paper, Eq. 2), g the projector, p the
    predictor, ˜ the teacher, whose momentum rises to 1.

    Batch: "view1", "view2" (B, 3, H, W) normalised.

    Differences from the published code: heads are those of ConCL's baseline, 512 – 512 – 256, of any encoder, and begin
    as they do there; views are resized bilinearly; batch statistics under DistributedDataParallel on GPUs are those of
    all devices; the learning rate changes every step. It is the paper's, 0.2 for 256 images after ten epochs of
    warm-up: ConCL's baseline has 0.2 for 1024 after two (`--lr 0.2 --warmup-epochs 2`).
    """

    sync_batch_norm = True

    def __init__(self, arch: str = "resnet18", momentum: float = 0.996, schedule: str = "cosine") -> None:
        super().__init__()
        encoder = make_encoder(arch)
        self.student = Embedder(encoder, begin_neck(norm_mlp(encoder.out_channels[-1], HIDDEN, DIM)))
        self.predictor = begin_neck(norm_mlp(DIM, HIDDEN, DIM), std=0.01)
        self.teacher = make_teacher(self.student)
        self.momentum, self.schedule = momentum, schedule

    def forward(self, batch: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        x1, x2 = batch["view1"], batch["view2"]
        (features, z1), (_, z2) = run(self.student, x1), run(self.student, x2)
        with torch.no_grad():
            (_, k1), (_, k2) = run(self.teacher, x1), run(self.teacher, x2)
        self.features = features.detach()
        p1, p2 = run(self.predictor, z1), run(self.predictor, z2)
        return {"prediction": 4 + 4 * negative_cosine(p1.float(), k1.float(), p2.float(), k2.float())}

    def after_step(self, progress: float) -> None:
        ema_update(self.teacher, self.student, momentum_at(progress, self.momentum, self.schedule))

    def encoder_state(self) -> dict[str, Tensor]:
        return self.student.encoder.state_dict()


def get_parser() -> options.Parser:
    parser = options.pretraining_parser(__doc__, output="runs/byol")
    options.add_teacher(parser.add_argument_group("teacher"))
    group = parser.add_argument_group("views")
    view_options.add_crops(group)
    view_options.add_jitter(group)
    # Batch and head of ConCL's baseline on NCT-CRC-HE-100K; the rest the paper's, §3.3 and appendix B: a rate of .2 for
    # 256 images, ten epochs of warm-up, crops of 8 % and more.
    parser.set_defaults(
        b=1024, epochs=200, lr=0.8, momentum=0.9, weight_decay=1.5e-6, optimizer="lars", schedule="cosine",
        warmup_epochs=10.0, ema=0.996, ema_schedule="cosine", jitter=[0.4, 0.4, 0.2, 0.1], crop_scale=0.08,
    )  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    devices = setup(args.gpus, args.device, args.deterministic)
    data = open_pretraining(args, (2,))
    torch.manual_seed(args.seed)
    method = BYOL(args.arch, args.ema, args.ema_schedule)
    start = initialise(method.student.encoder, args.arch, args.init)
    method.teacher.load_state_dict(method.student.state_dict())
    views = PairViews(**start["normalization"], **view_options.large_views(args), blur=BLUR, solarised=SOLARISED)
    pretrain(method, data, views, args, devices)


def cli() -> None:
    errors.run_script(main)


if __name__ == "__main__":
    cli()
