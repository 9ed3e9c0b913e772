"""Pre-train with PCL (Li et al., "Prototypical Contrastive Learning of Unsupervised Representations", ICLR 2021, arXiv
2005.04966), in the recipe of its second version.

  python train_pcl.py --data DIR --dataset nct --b 256 --output OUT --gpus 0 --amp
  torchrun --nproc-per-node 8 -- train_pcl.py --data DIR --dataset nct --output OUT --amp
  python train_pcl.py --steps 20 --b 8 --image-size 64 --queue 256 --warm-up 0 --output OUT  (no data, CPU)
"""

import argparse
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import Tensor, nn

from medssl import errors
from medssl.datasets.base import ImageDataset
from medssl.datasets.registry import open_pretraining
from medssl.engine import options, view_options
from medssl.engine.batches import autocast, evaluation_batches
from medssl.engine.loop import pretrain
from medssl.engine.method import Method
from medssl.engine.parallel import Devices, Run, setup
from medssl.errors import InputError
from medssl.losses.contrastive import l2_normalize
from medssl.models.encoders import initialise, make_encoder
from medssl.models.heads import Embedder, mlp
from medssl.models.momentum import ema_update, make_teacher, momentum_at
from medssl.models.queue import QueueContrast
from medssl.views.of_images import WholeOrCropViews

DIM = 128
IMAGES_A_CLUSTER = (51.2, 25.6, 12.8)  # ImageNet's 1.28 million images in 25 000, 50 000 and 100 000 clusters
ITERATIONS = 20  # of k-means
SMOOTH = 10.0  # α of the density


class PCL(Method):
    """Learns to tell images from each other, and to gather those that are alike: beside MoCo's contrast, an image's
    embedding must find the prototype of its cluster, where clusters are made anew before every epoch from the
    teacher's embeddings of all images, at several granularities M.

    L = ℓ(n g(x1), n g̃(x2)) + mean_M CE(n g(x1) · c_j / φ_j over all prototypes j; the image's own cluster)
    (paper, Eq. 11), ℓ InfoNCE over a queue, c the centroids, unit length, and φ their densities (Eq. 12). During the
    warm-up, the first term alone.

    Batch: "view1", "view2" (B, 3, H, W) normalised; "index" (B,) int64 image numbers.

    Differences from the published code: prototypes of all clusters are candidates, not a sample of 16000; k-means is
    scikit-learn's, from one start instead of five, on whole images, resized, instead of their centres; the learning
    rate changes every step.
    """

    def __init__(
        self,
        arch: str = "resnet18",
        images: int = 1,
        clusters: Sequence[int] = (1,),
        queue: int = 16384,
        temperature: float = 0.2,
        momentum: float = 0.999,
        schedule: str = "constant",
    ) -> None:
        """`clusters` are the numbers of them, one for each granularity."""
        super().__init__()
        encoder = make_encoder(arch)
        c = encoder.out_channels[-1]
        self.student = Embedder(encoder, mlp(c, c, DIM))
        self.teacher = make_teacher(self.student)
        self.contrast = QueueContrast("infonce", temperature, 1, queue, DIM)
        for m, count in enumerate(clusters):
            self.register_buffer(f"assigned{m}", torch.arange(images) % count)
            self.register_buffer(f"prototypes{m}", l2_normalize(torch.randn(count, DIM)))
            self.register_buffer(f"density{m}", torch.full((count,), temperature))
        self.register_buffer("clustered", torch.zeros((), dtype=torch.bool))  # whether there are prototypes yet
        self.clusters, self.temperature = tuple(clusters), temperature
        self.momentum, self.schedule = momentum, schedule

    def forward(self, batch: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        features, z = run(self.student, batch["view1"])
        _, k = run.shuffled(self.teacher, batch["view2"])
        self.features, self.embeddings = features.detach(), z.detach()
        (instance,) = self.contrast([(z, k)])
        if not self.clustered:
            return {"contrast": instance}
        q, terms = l2_normalize(z), []
        for m in range(len(self.clusters)):
            assigned, prototypes, density = (self.get_buffer(f"{name}{m}") for name in BUFFERS)
            with torch.autocast(q.device.type, enabled=False):
                logits = q @ prototypes.T / density
            terms.append(F.cross_entropy(logits, assigned[batch["index"].to(assigned.device)]))
        return {"contrast": instance, "prototypes": sum(terms) / len(terms)}

    def after_step(self, progress: float) -> None:
        self.contrast.after_step()
        ema_update(self.teacher, self.student, momentum_at(progress, self.momentum, self.schedule))

    def encoder_state(self) -> dict[str, Tensor]:
        return self.student.encoder.state_dict()

    def compiled_parts(self) -> list[nn.Module]:
        return [self.student, self.teacher]


BUFFERS = ("assigned", "prototypes", "density")  # of a granularity


def cluster(z: np.ndarray, count: int, temperature: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prototypes of embeddings.

    Args:
        z: (N, C) float32, unit length. count: of clusters K, at most N.

    Returns:
        the cluster of each, (N,) int64; centroids (K, C), unit length; densities φ (K,), positive, whose mean is the
        temperature: the mean distance of a cluster's embeddings to its centroid over the logarithm of their number
        (paper, Eq. 12), where there are several; else the largest; all between their 10th and 90th percentile.
    """
    found = KMeans(count, init="random", n_init=1, max_iter=ITERATIONS, random_state=seed).fit(z)
    assigned = found.labels_.astype(np.int64)
    distance = np.linalg.norm(z - found.cluster_centers_[assigned], axis=1)
    size = np.bincount(assigned, minlength=count)
    density = np.bincount(assigned, distance, count) / np.maximum(size, 1) / np.log(size + SMOOTH)
    several = size > 1
    density[~several] = density[several].max() if several.any() else 1.0
    density = np.clip(density, *np.percentile(density, (10, 90)))
    density = temperature * density / max(density.mean(), 1e-12) if density.max() > 0 else np.full(count, temperature)
    centroids = found.cluster_centers_ / np.maximum(
        np.linalg.norm(found.cluster_centers_, axis=1, keepdims=True), 1e-12
    )
    return assigned, centroids.astype(np.float32), np.maximum(density, 1e-3 * temperature).astype(np.float32)


@torch.no_grad()
def update_clusters(
    method: PCL, views: WholeOrCropViews, data: ImageDataset, args: argparse.Namespace, devices: Devices, step: int
) -> None:
    """Make the prototypes of the epoch that begins after `step` steps, where the warm-up is over; in all processes the
    same."""
    if round(step * args.b / len(data)) < args.warm_up:
        return
    made = None
    if devices.main:
        method.eval()
        views.eval()
        z = torch.empty(len(data), DIM)
        seen = torch.zeros(len(data), dtype=torch.bool)
        for batch in evaluation_batches(data, args.b, args, devices):
            with autocast(args, devices.device):
                _, k = Run(devices.device_ids)(method.teacher, views(batch)["whole"])
            z[batch["index"].cpu()] = l2_normalize(k).cpu()
            seen[batch["index"].cpu()] = True
        # An image that cannot be read is never asked for: its stand-in is.
        z[~seen] = z[seen].mean(0)
        made = [cluster(z.numpy(), count, method.temperature, args.seed + step) for count in method.clusters]
    for m, values in enumerate(devices.broadcast(made)):
        for name, value in zip(BUFFERS, values):
            method.get_buffer(f"{name}{m}").copy_(torch.from_numpy(value))
    method.clustered.fill_(True)


def get_parser() -> options.Parser:
    parser = options.pretraining_parser(__doc__, output="runs/pcl")
    group = options.add_queued_contrast(parser)
    group.add_argument("--warm-up", type=options.non_negative, default=20.0, help="epochs without prototypes")
    group.add_argument(
        "--clusters", type=options.positive_int, nargs="+", metavar="K",
        help="numbers of clusters; by default one for 51, 26 and 13 images, as the paper has for ImageNet",
    )  # fmt: skip
    view_options.add_pair_views(parser)
    # Appendix A of the paper, version 2, on MoCo-v2's views; the batch is ConCL's.
    parser.set_defaults(**options.MOCO_V2)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    devices = setup(args.gpus, args.device, args.deterministic)
    data = open_pretraining(args, (2,))
    options.check_warm_up(args, "prototypes")
    if len(data) < 2:
        raise InputError("PCL: one image makes no clusters; give more images")
    by_size = [max(2, math.ceil(len(data) / images)) for images in IMAGES_A_CLUSTER]
    args = options.complete(args, {"clusters": by_size})
    if max(args.clusters) > len(data) or min(args.clusters) < 2:
        raise InputError(f"--clusters {' '.join(map(str, args.clusters))}: {len(data)} images make 2 to {len(data)}")
    torch.manual_seed(args.seed)
    method = PCL(args.arch, len(data), args.clusters, args.queue, args.temperature, args.ema, args.ema_schedule)
    start = initialise(method.student.encoder, args.arch, args.init)
    method.teacher.load_state_dict(method.student.state_dict())
    views = WholeOrCropViews(**start["normalization"], **view_options.large_views(args))
    pretrain(
        method, data, views, args, devices,
        before_epoch=lambda step: update_clusters(method, views, data, args, devices, step),
    )  # fmt: skip


def cli() -> None:
    errors.run_script(main)


if __name__ == "__main__":
    cli()
