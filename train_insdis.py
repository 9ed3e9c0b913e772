"""Pre-train with instance discrimination (Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance
Discrimination", CVPR 2018, arXiv 1805.01978).

  python train_insdis.py --data DIR --n chest --b 256 --output OUT --gpus 0 --amp
  torchrun --nproc-per-node 4 -- train_insdis.py --data DIR --n chest --output OUT --amp
  python train_insdis.py --steps 20 --b 8 --image-size 64 --negatives 256 --output OUT       (no data, CPU)
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
from medssl.errors import InputError
from medssl.losses.contrastive import l2_normalize, make_contrast, similarities
from medssl.models.encoders import initialise, make_encoder
from medssl.models.heads import Embedder
from medssl.models.queue import MemoryBank
from medssl.views.of_images import MultiCropViews

DIM = 128


class InsDis(Method):
    """Learns to tell every image from all others: its embedding must find the one that the image had in the last epoch,
    among those of random other images, in a memory with one slot an image.

    L = ℓ(n f(x), slot of x) with K slots, drawn anew every step, as negatives; afterwards
    slot ← n(m slot + (1 − m) n f(x)).

    Batch: "view1" (B, 3, H, W) normalised, "index" (B,) int64 image numbers.

    Differences from the published code: the K slots are drawn once for the whole batch, which makes their comparison
    one matrix product, and an image's own slot is never its negative; InfoNCE unless `--loss nce` is given; no proximal
    term; the learning rate changes every step.
    """

    def __init__(
        self,
        arch: str = "resnet18",
        images: int = 1,
        negatives: int = 4096,
        temperature: float = 0.07,
        momentum: float = 0.5,
        loss: str = "infonce",
    ) -> None:
        super().__init__()
        encoder = make_encoder(arch)
        self.student = Embedder(encoder, nn.Linear(encoder.out_channels[-1], DIM))
        self.memory = MemoryBank(images, DIM)
        self.contrast = make_contrast(loss, temperature, images)
        self.negatives, self.momentum = negatives, momentum

    def forward(self, batch: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        features, z = run(self.student, batch["view1"])
        slots, index = self.memory.slots, batch["index"]
        drawn = torch.randint(len(slots), (self.negatives,), generator=run.generator).to(index.device)
        self.features, self.embeddings, z = features.detach(), z.detach(), l2_normalize(z)
        s = similarities(z, slots[index], slots[drawn])
        own = torch.nn.functional.pad(drawn == index[:, None], (1, 0))  # (B, 1 + K), the positive is not masked
        self.seen = index, z.detach()
        return {"contrast": self.contrast(s.masked_fill(own, -torch.inf))}

    def after_step(self, progress: float) -> None:
        self.memory.update(*self.seen, self.momentum)
        self.contrast.after_step()

    def encoder_state(self) -> dict[str, Tensor]:
        return self.student.encoder.state_dict()

    def compiled_parts(self) -> list[nn.Module]:
        return [self.student]


def get_parser() -> options.Parser:
    parser = options.pretraining_parser(__doc__, output="runs/insdis")
    group = options.add_contrast(parser)
    options.add_nce(group)
    group.add_argument(
        "--negatives", "--nce_k", type=options.positive_int, default=4096, metavar="K", help="slots drawn as negatives"
    )
    group.add_argument(
        "--memory-momentum", "--nce_m", type=options.fraction, default=0.5, help="share of the old embedding in a slot"
    )
    group = parser.add_argument_group("views")
    view_options.add_crops(group)
    view_options.add_rotation(group)
    view_options.add_jitter(group)
    view_options.add_blur(group, 0.0)
    view_options.add_cutout(group)
    parser.set_defaults(  # §4 of the paper: 200 epochs, lr .03 divided by 10 after 120 and 160, K 4096, T .07
        b=256, epochs=200, lr=0.03, momentum=0.9, weight_decay=1e-4, optimizer="sgd", schedule="step",
        milestones=None, temperature=0.07, rotation=0.0, cutout=0,
    )  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    args = options.complete(args, {"milestones": [0.6 * args.epochs, 0.8 * args.epochs]})
    devices = setup(args.gpus, args.device, args.deterministic)
    data = open_pretraining(args, (2,))
    if len(data) < 2:
        raise InputError(f"data set {data.info.name}: 1 image; there is nothing to tell it from")
    torch.manual_seed(args.seed)
    method = InsDis(args.arch, len(data), args.negatives, args.temperature, args.memory_momentum, args.loss)
    start = initialise(method.student.encoder, args.arch, args.init)
    views = MultiCropViews(**start["normalization"], **view_options.large_views(args), views=1, locals_=0, targets=0)
    pretrain(method, data, views, args, devices)


def cli() -> None:
    errors.run_script(main)


if __name__ == "__main__":
    cli()
