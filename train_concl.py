"""Pre-train with ConCL (Yang et al., "ConCL: Concept Contrastive Learning for Dense Prediction Pre-training in
Pathology Images", ECCV 2022, arXiv 2207.06733).

  python train_concl.py --data DIR --dataset nct --b 256 --output OUT --gpus 0 --amp
  torchrun --nproc-per-node 8 -- train_concl.py --data DIR --dataset nct --epochs 800 --output OUT --amp
  python train_concl.py --steps 20 --b 8 --image-size 64 --queue 256 --warm-up 0 --output OUT          (no data, CPU)
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medssl import errors
from medssl.datasets.registry import open_pretraining
from medssl.engine import options, view_options
from medssl.engine.loop import pretrain
from medssl.engine.method import Method
from medssl.engine.parallel import Run, gather, setup
from medssl.models.concepts import concept_means, cosine_kmeans, random_pixels, view_maps
from medssl.models.encoders import IMAGENET, initialise, make_encoder
from medssl.models.heads import DenseEmbedder, begin_neck, mlp
from medssl.models.momentum import ema_update, make_teacher, momentum_at
from medssl.models.queue import QueueContrast
from medssl.views.of_images import ConceptViews
from medssl.views.ops2d import normalise

HIDDEN, DIM = 512, 128
ITERATIONS = 10  # of k-means
MANY_CONCEPTS, MANY_KEYS = 8, 4  # above so many concepts, as many keys an image enter the queue


class ConCL(Method):
    """Learns to tell concepts from each other, regions of a tile that look alike, and so learns for dense tasks: the
    teacher's map of the tile is clustered into K concepts, and a concept in one view must find itself in the other
    view among the concepts of thousands of earlier tiles.

    During the warm-up, MoCo's L_instance = ℓ(n g(GAP f4(x1)), n g̃(GAP f̃4(x2))). Then, with c = k-means of f̃3(r), r
    the smallest box around both crops, and c1, c2 its maps as the views see them, for all k in both c1 and c2:
    L = w · mean ℓ'(n g(mean of f4(x1) where c1 = k), n g̃(mean of f̃4(x2) where c2 = k)) + (1 − w) L_instance
    (paper §3.2 and §3.3). f3, f4: the last two maps, g: the head, ˜: of the teacher; ℓ, ℓ': InfoNCE, each over a queue
    of its own.

    Batch: "view1", "view2", "reference" (B, 3, H, W) normalised; "box1", "box2" (B, 5), as `ConceptViews` gives them.

    Differences from the published code, on purpose:
      * Keys are means of the teacher's map of their own image. There, the order of the shuffled teacher's maps is not
        undone, so that a concept's key comes from another image.
      * Seeds of k-means are different pixels of an image.
      * Over several processes, the loss is the mean over the concepts of all.
      * The learning rate changes every step.
    """

    def __init__(
        self,
        arch: str = "resnet18",
        concepts: int = 8,
        warm_up: float = 0.1,
        weight: float = 1.0,
        queue: int = 16384,
        temperature: float = 0.2,
        momentum: float = 0.999,
        schedule: str = "constant",
        normalization: dict = IMAGENET,
    ) -> None:
        """`warm_up` is the share of the run in which there is the instance loss alone."""
        super().__init__()
        encoder = make_encoder(arch)
        self.student = DenseEmbedder(encoder, begin_neck(mlp(encoder.out_channels[-1], HIDDEN, DIM)))
        self.teacher = make_teacher(self.student)
        self.contrast = QueueContrast("infonce", temperature, 1, queue, DIM)
        self.concept_contrast = QueueContrast("infonce", temperature, 1, queue, DIM)
        self.register_buffer("progress", torch.zeros((), dtype=torch.float64))  # as exact as what it is compared with
        self.concepts, self.warm_up, self.weight = concepts, warm_up, weight
        self.momentum, self.schedule, self.normalization = momentum, schedule, normalization

    def forward(self, batch: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        q, k = run(self.student, batch["view1"]), run.shuffled(self.teacher, batch["view2"])
        self.features, self.embeddings = q["features"].detach(), q["z"].detach()
        (instance,) = self.contrast([(q["z"], k["z"])])
        if float(self.progress) < self.warm_up:
            return {"instance": instance}
        concepts = self.cluster(batch["reference"], run)
        losses = {"concept": self.weight * self.compare(q["maps"][-1], k["maps"][-1], concepts, batch, run)}
        return losses | ({"instance": (1 - self.weight) * instance} if self.weight < 1 else {})

    @torch.no_grad()
    def cluster(self, reference: Tensor, run: Run) -> Tensor:
        """The concept of each cell of the reference view's map, (B, h, w)."""
        maps = run(self.teacher, reference)["maps"][-2]  # (B, C, h, w)
        pixels = maps.flatten(2).transpose(1, 2)
        seeds, spare = random_pixels(run, len(pixels), pixels.shape[1], self.concepts, ITERATIONS)
        return cosine_kmeans(pixels, seeds, spare)[0].view(len(maps), *maps.shape[2:])

    def compare(self, one: Tensor, other: Tensor, concepts: Tensor, batch: dict[str, Tensor], run: Run) -> Tensor:
        """ℓ' of the concepts that both views have; `one` and `other` are the views' maps."""
        means, there = [], []
        for maps, box in ((one, batch["box1"]), (other, batch["box2"])):
            seen = view_maps(concepts, box, self.concepts, maps.shape[-1])
            mean, present = concept_means(maps, seen, self.concepts)
            means.append(mean)
            there.append(present)
        both = there[0] & there[1]  # (B, K)
        q = self.student.head(means[0][both])
        with torch.no_grad():
            k = self.teacher.head(means[1])  # (B, K, 128), also of concepts that are not in both
        keys = self.choose_keys(k, both, run)
        (loss,) = self.concept_contrast([(q, k[both])], keys, count=run.mean_over(both.sum(), least=1))
        return loss

    def choose_keys(self, k: Tensor, both: Tensor, run: Run) -> Tensor:
        """What enters the queue: of all processes' keys (B, K, C) a fixed number, in random order, some several times
        where there are fewer; this process's share of them. None where no image has a concept in both views."""
        number = k.shape[1] if k.shape[1] <= MANY_CONCEPTS else MANY_KEYS
        everyone = gather(k.flatten(0, 1))[gather(both.flatten().to(torch.uint8)).bool()]
        order = torch.randperm(len(everyone), generator=run.generator).to(k.device)
        wanted = torch.arange(run.whole(number * len(k)), device=k.device)
        rows = order[wanted % max(1, len(order))] if len(order) else order
        return run.own_rows(everyone[rows])

    def after_step(self, progress: float) -> None:
        self.contrast.after_step()
        self.concept_contrast.after_step()
        ema_update(self.teacher, self.student, momentum_at(progress, self.momentum, self.schedule))
        self.progress.fill_(progress)

    def encoder_state(self) -> dict[str, Tensor]:
        return self.student.encoder.state_dict()

    def compiled_parts(self) -> list[nn.Module]:
        return [self.student, self.teacher]

    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        some = {name: value[:8] for name, value in batch.items()}
        generator = torch.Generator().manual_seed(0)
        concepts = self.cluster(some["reference"], Run(generator=generator)).float()
        shades = torch.linspace(0, 1, self.concepts + 1)[1:]
        colours = torch.stack([shades, (3 * shades) % 1, 1 - shades], 1).to(concepts.device)  # (K, 3)
        painted = colours[concepts.long()].permute(0, 3, 1, 2)
        painted = nn.functional.interpolate(painted, size=some["reference"].shape[2:], mode="nearest")
        over = 0.5 * some["reference"] + 0.5 * normalise(painted, **self.normalization)
        names = {"view 1": "view1", "view 2": "view2", "reference": "reference"}
        return {title: batch[name] for title, name in names.items()} | {"concepts": over}


def get_parser() -> options.Parser:
    parser = options.pretraining_parser(__doc__, output="runs/concl")
    group = options.add_queued_contrast(parser)
    group.add_argument("--concepts", type=options.positive_int, default=8, metavar="K", help="concepts of a tile")
    group.add_argument("--warm-up", type=options.non_negative, default=20.0, help="epochs of the instance loss alone")
    group.add_argument(
        "--concept-weight",
        type=options.fraction,
        default=1.0,
        help="weight w of the concept loss; the instance's: 1 - w",
    )
    view_options.add_pair_views(parser)
    parser.set_defaults(**options.MOCO_V2)  # §4.1 of the paper and the published configuration
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    devices = setup(args.gpus, args.device, args.deterministic)
    options.check_warm_up(args, "concepts")
    data = open_pretraining(args, (2,))
    torch.manual_seed(args.seed)
    method = ConCL(
        args.arch, args.concepts, args.warm_up / args.epochs, args.concept_weight, args.queue, args.temperature,
        args.ema, args.ema_schedule,
    )  # fmt: skip
    start = initialise(method.student.encoder, args.arch, args.init)
    method.normalization = start["normalization"]
    method.teacher.load_state_dict(method.student.state_dict())
    views = ConceptViews(**start["normalization"], **view_options.large_views(args))
    pretrain(method, data, views, args, devices)


def cli() -> None:
    errors.run_script(main)


if __name__ == "__main__":
    cli()
