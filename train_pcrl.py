"""Pre-train with PCRL (Zhou et al., "Preservational Learning Improves Self-supervised Medical Image Models by
Reconstructing Diverse Contexts", ICCV 2021, arXiv 2109.04379).

  python train_pcrl.py --data DIR --n chest --b 64 --epochs 240 --lr 1e-3 --output OUT --gpus 0 --amp
  torchrun --nproc-per-node 4 -- train_pcrl.py --data DIR --n chest --output OUT --amp
  python train_pcrl.py --data DIR --n luna --d 3 --b 16 --output OUT --gpus 0 --amp       (volumes)
  python train_pcrl.py --steps 20 --b 8 --image-size 64 --queue 256 --output OUT          (no data, CPU)

The data set knows its dimension, and with it come these values where none is given (the published ones):

  2D  --arch resnet18 --b 64 --lr 0.001
  3D  --arch unet3d   --b 16 --lr 0.001      (unet3d_half and unet3d_quarter are narrower, for small machines)
"""

import argparse
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
from medssl.errors import InputError
from medssl.models.context_unet import CHANNELS, ContextUNet2d, ContextUNet3d, attend, blend
from medssl.models.encoders import DEFAULT_ARCH, initialise
from medssl.models.mixup import Mixup, mixing_weight
from medssl.models.momentum import ema_update, make_teacher, momentum_at
from medssl.models.queue import QueueContrast
from medssl.views.of_images import RestorationViews, Views
from medssl.views.of_volumes import RestorationCubeViews

DEFAULTS = {  # of each dimension: §4.1 of the paper and the published commands
    2: {"arch": DEFAULT_ARCH[2], "b": 64, "lr": 1e-3},
    3: {"arch": DEFAULT_ARCH[3], "b": 16, "lr": 1e-3},
}
ONLY_OF = {
    2: ("image_size", "crop_scale", "rotation", "jitter", "blur", "blur_sigma", "cutout"),
    3: ("cube_size", "crop_mm"),
}


class PCRL(Method):
    """Learns what tells an image from others (C2L's three contrasts with a momentum teacher and a queue), and to keep
    what the contrast would drop: the U-Net restores the images it sees in diverse contexts — turned as a code at its
    bottleneck asks, and mixed with other images and with the teacher's maps of the other view.

    With D the decoder, f and f̃ the maps of student and teacher, a_i = attention(code_i) on the deepest of them,
    T_i the transform that code_i names, α1, α2 = max(b, 1 − b), b ~ Beta(1, 1), and mix as in `Mixup`:

      contrast     ⅓ [ℓ(z, z̃) + ℓ(z', z̃') + ℓ(z', mix z̃)], z of x1, z̃ of x2, primes of the mixed images
      restoration  ¼ [ MSE(D(f(x1)·a1), T1(x1)) + MSE(D(f(mix x1)), mix gt1)
                     + MSE(D(α1 f(x1)·a1 + (1 − α1) f̃(x2)·a2), α1 T1(x1) + (1 − α1) T2(x2))
                     + MSE(D(α2 f(mix x1) + (1 − α2) f̃(mix x2)), α2 mix gt1 + (1 − α2) mix gt2) ]

    where skipped maps are mixed like the deepest, and their sum is minimised (paper §3, Eqs. 1–7).

    Batch: "view1", "view2", "target", "target2", "turned1", "turned2" (B, 3, H, W) normalised, or in 3D
    (B, 1, X, Y, Z) in [0, 1]; "code1", "code2" (B, 6), in 3D (B, 7).

    Differences from the published code, on purpose:
      * InfoNCE, not NCE, unless `--loss nce` is given; NCE counts images, where the published code counts batches, and
        keeps the fraction of Z that is cut there.
      * All three contrasts take their negatives from the queue as it is at the start of the step. There, the second
        and third found the keys of their own images in it.
      * The target has the view's own rotation and flip, in 3D its flip and affine map; there it is the crop before
        them, which no network can know. In 3D each view is painted or not by itself.
      * The learning rate follows a cosine over the run's own length, every step.
      * In 2D rotation and crop are one interpolation.
    """

    def __init__(
        self,
        arch: str = "resnet18",
        dims: int = 2,
        images: int = 1,
        queue: int = 16384,
        temperature: float = 0.2,
        momentum: float = 0.999,
        loss: str = "infonce",
        schedule: str = "constant",
    ) -> None:
        super().__init__()
        self.student = ContextUNet2d(arch) if dims == 2 else ContextUNet3d(arch)
        self.teacher = make_teacher(self.student)
        self.contrast = QueueContrast(loss, temperature, images, queue)
        self.momentum, self.schedule = momentum, schedule

    def forward(self, batch: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        x1, x2 = batch["view1"], batch["view2"]
        mix = Mixup.draw(run, len(x1))
        alpha1, alpha2 = mixing_weight(run), mixing_weight(run)

        student, mixed = run(self.student, x1), run(self.student, mix(x1))
        teacher, mixed_teacher = run.shuffled(self.teacher, x2), run.shuffled(self.teacher, mix(x2))
        self.features, self.embeddings = student["features"].detach(), student["z"].detach()

        q, q_mixed, k, k_mixed = (out["z"] for out in (student, mixed, teacher, mixed_teacher))
        contrasts = self.contrast([(q, k), (q_mixed, k_mixed), (q_mixed, mix(k))])

        a1, a2 = (self.student.attention(batch[code]) for code in ("code1", "code2"))
        own, other = attend(student["maps"], a1), attend(teacher["maps"], a2)
        turned1, turned2 = batch["turned1"], batch["turned2"]
        clean1, clean2 = mix(batch["target"]), mix(batch["target2"])
        contexts = [  # maps to decode, and what they are decoded to
            (own, turned1),
            (mixed["maps"], clean1),
            (blend(own, other, alpha1), torch.lerp(turned2, turned1, alpha1)),
            (blend(mixed["maps"], mixed_teacher["maps"], alpha2), torch.lerp(clean2, clean1, alpha2)),
        ]
        errors = [F.mse_loss(run(self.student, *maps, decode=True).float(), target) for maps, target in contexts]
        return {"contrast": sum(contrasts) / 3, "restoration": sum(errors) / 4}

    def after_step(self, progress: float) -> None:
        self.contrast.after_step()
        ema_update(self.teacher, self.student, momentum_at(progress, self.momentum, self.schedule))

    def encoder_state(self) -> dict[str, Tensor]:
        return self.student.encoder_state()

    def decoder_state(self) -> dict[str, Tensor] | None:
        return self.student.decoder_state()

    def compiled_parts(self) -> list[nn.Module]:
        return [self.student, self.teacher]

    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        some = {name: value[:8] for name, value in batch.items()}
        maps = attend(self.student(some["view1"])["maps"], self.student.attention(some["code1"]))
        names = {"view 1": "view1", "view 2": "view2", "clean 1": "target", "transformed 1": "turned1"}
        return {title: batch[name] for title, name in names.items()} | {"restored": self.student(*maps, decode=True)}


def get_parser() -> options.Parser:
    parser = options.pretraining_parser(__doc__, output="runs/pcrl")
    group = options.add_queued_contrast(parser)
    options.add_nce(group)
    group.add_argument(
        "--inchannel",
        type=options.positive_int,
        help="channels of the input; only checked against the data (2D 3, 3D 1)",
    )
    group.add_argument("--outchannel", type=options.positive_int, help="channels of the restoration; only checked")
    options.add_published(parser, "pcrl")
    group = parser.add_argument_group("views of images (2D)")
    view_options.add_crops(group)
    view_options.add_rotation(group)
    view_options.add_jitter(group)
    view_options.add_blur(group)
    view_options.add_cutout(group)
    group = parser.add_argument_group("views of volumes (3D)")
    view_options.add_cubes(group)
    view_options.add_cutting(group)
    parser.set_defaults(  # §4.1 of the paper and the published scripts; None: the dimension decides
        epochs=240, momentum=0.9, weight_decay=1e-4, optimizer="sgd", schedule="cosine", temperature=0.2,
        **dict.fromkeys(DEFAULTS[2]),
    )  # fmt: skip
    return parser


def make_views(args: argparse.Namespace, dims: int, normalization: dict) -> Views:
    """The views of images or volumes."""
    if dims == 3:
        return RestorationCubeViews(tuple(args.cube_size), crop_mm=view_options.crops_of(args))
    return RestorationViews(**normalization, **view_options.large_views(args))


def check_cube(sides: Sequence[int]) -> None:
    """Raise InputError for cubes that cannot be turned about z, painted, or halved three times."""
    options.check_sides("--cube-size", sides)
    if sides[0] != sides[1]:
        raise InputError(f"--cube-size {' '.join(map(str, sides))}: PCRL turns cubes about z; X and Y must be the same")


def main(argv: Sequence[str] | None = None) -> None:
    parser = get_parser()
    args = parser.parse_args(argv)
    check_cube(args.cube_size)
    devices = setup(args.gpus, args.device, args.deterministic)
    data = open_pretraining(args)
    dims = data.info.dims
    for option in ("inchannel", "outchannel"):
        if getattr(args, option) not in (None, CHANNELS[dims]):
            given, needed = getattr(args, option), CHANNELS[dims]
            raise InputError(
                f"--{option} {given}: data set {data.info.name} has {dims} dimensions, which take {needed}"
            )
    args = options.for_dims(parser, args, data.info, DEFAULTS, ONLY_OF)
    view_options.check_cutting(args, data)
    torch.manual_seed(args.seed)
    method = PCRL(args.arch, dims, len(data), args.queue, args.temperature, args.ema, args.loss, args.ema_schedule)
    encoder = method.student.encoder
    start = initialise(encoder, args.arch, args.init)
    method.teacher.load_state_dict(method.student.state_dict())
    views = make_views(args, dims, start["normalization"])
    pretrain(method, data, views, args, devices)


def cli() -> None:
    errors.run_script(main)


if __name__ == "__main__":
    cli()
