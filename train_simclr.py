"""Pre-train with SimCLR (Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML
2020, arXiv 2002.05709).

  python train_simclr.py --data DIR --dataset nct --b 1024 --output OUT --gpus 0,1,2,3 --amp
  torchrun --nproc-per-node 8 -- train_simclr.py --data DIR --dataset nct --output OUT --amp
  python train_simclr.py --optimizer sgd --lr 0.03 --b 256 --data DIR --dataset folder --output OUT --gpus 0 --amp
  python train_simclr.py --steps 20 --b 8 --image-size 64 --output OUT                       (no data, CPU)

The learning rate is for the batch that stands beside it; LARS' is usually made proportional to the batch.
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
from medssl.losses.contrastive import nt_xent
from medssl.models.encoders import initialise, make_encoder
from medssl.models.heads import Embedder, begin_neck, norm_mlp
from medssl.views.of_images import PairViews

HIDDEN, DIM = 512, 128


class SimCLR(Method):
    """Learns to tell an image from the others of the batch: the embeddings of its two views must find each other among
    those of both views of all images.

    L = NT-Xent(g(f(x1)), g(f(x2)); T) (paper, Eq. 1), over the images of all devices, with gradient.

    Batch: "view1", "view2" (B, 3, H, W) normalised; "index" (B,) numbers of the images, where one may come twice.

    Differences from the published code: the head is ConCL's baseline's, 512 – 512 – 128, of any encoder; both views
    share their batch statistics, which under DistributedDataParallel on GPUs are those of all devices; the learning
    rate changes every step.
    """

    sync_batch_norm = True

    def __init__(self, arch: str = "resnet18", temperature: float = 0.1) -> None:
        super().__init__()
        encoder = make_encoder(arch)
        head = begin_neck(norm_mlp(encoder.out_channels[-1], HIDDEN, DIM))
        head.append(nn.BatchNorm1d(DIM))
        self.student = Embedder(encoder, head)
        self.temperature = temperature

    def forward(self, batch: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        features, z = run(self.student, torch.stack([batch["view1"], batch["view2"]], 1).flatten(0, 1))
        self.features, self.embeddings = features[::2].detach(), z[::2].detach()
        return {"contrast": nt_xent(z[::2], z[1::2], self.temperature, batch.get("index"))}

    def encoder_state(self) -> dict[str, Tensor]:
        return self.student.encoder.state_dict()

    def compiled_parts(self) -> list[nn.Module]:
        return [self.student]


def get_parser() -> options.Parser:
    parser = options.pretraining_parser(__doc__, output="runs/simclr")
    options.add_contrast(parser)
    view_options.add_pair_views(parser)
    parser.set_defaults(  # ConCL's baseline on NCT-CRC-HE-100K; crops of 8 % and more as in the paper, appendix A
        b=1024, epochs=200, lr=0.6, momentum=0.9, weight_decay=1e-6, optimizer="lars", schedule="cosine",
        warmup_epochs=10.0, temperature=0.1, jitter=[0.8, 0.8, 0.8, 0.2], crop_scale=0.08,
    )  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    devices = setup(args.gpus, args.device, args.deterministic)
    data = open_pretraining(args, (2,))
    torch.manual_seed(args.seed)
    method = SimCLR(args.arch, args.temperature)
    start = initialise(method.student.encoder, args.arch, args.init)
    views = PairViews(**start["normalization"], **view_options.large_views(args))
    pretrain(method, data, views, args, devices)


def cli() -> None:
    errors.run_script(main)


if __name__ == "__main__":
    cli()
