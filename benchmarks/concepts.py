"""Images per second of ConCL's clustering and pooling, on maps that lie on the device: loops over images and clusters
against ours.

  python benchmarks/concepts.py
  python benchmarks/concepts.py --b 4 --concepts 3 --repeats 1 --output /tmp/concepts.json

"loops" takes one image after the other, and in it one cluster after the other: its cosines with all pixels, its
average, and the pooling of each view's map and of its concepts' features. "lean loops" takes the cosines of all
clusters of an image at once. "ours" is what train_concl.py does. All start from the same pixels, and must give the same
maps and means.
"""

import argparse
import functools
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from medssl import errors
from medssl.benchmarks.machine import add_measuring, interleave, report, summarise
from medssl.benchmarks.variants import choose_device, synchronise
from medssl.engine import options
from medssl.engine.parallel import Run
from medssl.models.concepts import concept_means, cosine_kmeans, random_pixels, view_maps

ITERATIONS = 10
LOOPS, LEAN, OURS = "loops", "lean loops", "ours"


def make_inputs(args: argparse.Namespace) -> dict[str, Tensor]:
    """Maps of ResNet-18 for views of 224 pixels, of smooth noise, and where the views lie."""
    generator = torch.Generator().manual_seed(0)
    middle = F.interpolate(torch.randn(args.b, 256, 5, 5, generator=generator), size=14, mode="bilinear")
    seeds, spare = random_pixels(Run(generator=generator), args.b, 14 * 14, args.concepts, ITERATIONS)
    inputs = {"pixels": middle.flatten(2).transpose(1, 2).contiguous(), "seeds": seeds, "spare": spare}
    for view in (1, 2):
        low, high = (0.4 * torch.rand(args.b, 2, generator=generator) for _ in range(2))
        mirrored = (torch.rand(args.b, 1, generator=generator) < 0.5).float()
        inputs[f"box{view}"] = torch.cat([low, 1 - high, mirrored], 1)
        inputs[f"deep{view}"] = torch.randn(args.b, 512, 7, 7, generator=generator)
    return {name: value.to(args.device) for name, value in inputs.items()}


def loops(x: dict[str, Tensor], concepts: int, lean: bool = False) -> tuple[Tensor, Tensor]:
    """Both views' maps (2·B, 7, 7) and means of concepts (2·B, K, C), image by image and concept by concept."""
    clusters = []
    for i, pixels in enumerate(F.normalize(x["pixels"], dim=2)):
        centroids = pixels[x["seeds"][i]]
        for spare in x["spare"][:, i]:
            if lean:
                own = (pixels @ F.normalize(centroids, dim=1).T).argmax(1)
            else:
                own = torch.stack([F.cosine_similarity(pixels, centre[None]) for centre in centroids], 1).argmax(1)
            for k in range(concepts):
                inside = own == k
                centroids[k] = pixels[inside].mean(0) if inside.any() else pixels[spare[k]]
        clusters.append(own.view(14, 14))
    maps, means = [], []
    for view in (1, 2):
        for own, box, deep in zip(clusters, x[f"box{view}"], x[f"deep{view}"]):
            one_hot = F.one_hot(own, concepts).permute(2, 0, 1).float()
            top, left, bottom, right = (round(14 * side) for side in box[:4].tolist())
            seen = F.adaptive_avg_pool2d(one_hot[:, top:bottom, left:right], 7).argmax(0)
            seen = seen.flip(1) if box[4] > 0 else seen
            maps.append(seen)
            for k in range(concepts):
                inside = seen == k
                means.append(deep[:, inside].mean(1) if inside.any() else deep.new_zeros(len(deep)))
    return torch.stack(maps), torch.stack(means).view(len(maps), concepts, -1)


def ours(x: dict[str, Tensor], concepts: int) -> tuple[Tensor, Tensor]:
    """The same, batched."""
    clusters = cosine_kmeans(x["pixels"], x["seeds"], x["spare"])[0].view(-1, 14, 14)
    maps = [view_maps(clusters, x[f"box{view}"], concepts, 7) for view in (1, 2)]
    means = [concept_means(x[f"deep{view}"], seen, concepts)[0] for view, seen in enumerate(maps, 1)]
    return torch.cat(maps), torch.cat(means)


def get_parser() -> options.Parser:
    """The options of this script."""
    parser = options.Parser(__doc__)
    parser.add_argument("--b", type=options.positive_int, default=32, help="images at a time")
    parser.add_argument("--concepts", type=options.positive_int, default=8, help="concepts K of an image")
    parser.add_argument("--threads", type=options.positive_int, help="of PyTorch on the CPU; its own choice by default")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="kind of device")
    add_measuring(parser, "concepts.json")
    return parser


def main(argv: Sequence[str] | None = None) -> dict:
    """Measure, print the table, write and return the report."""
    args = get_parser().parse_args(argv)
    args.device = choose_device(args.device)
    before = torch.get_num_threads()
    args = options.complete(args, {"threads": before})
    torch.set_num_threads(args.threads)
    inputs = make_inputs(args)
    difference = refuse_difference(inputs, args.concepts)
    print(f"loops and ours give the same maps; means differ by {difference:.0e}")

    def timer(function: Callable, calls: int) -> Callable[[], float]:
        def measure() -> float:
            synchronise(args)
            since = time.perf_counter()
            for _ in range(calls):
                function(inputs, args.concepts)
            synchronise(args)
            return calls * args.b / (time.perf_counter() - since)

        return measure

    try:
        ways = {LOOPS: timer(loops, 1), LEAN: timer(functools.partial(loops, lean=True), 1), OURS: timer(ours, 10)}
        speeds = interleave(ways, args.repeats)
    finally:
        torch.set_num_threads(before)
    return report(args.output, "concepts", vars(args), summarise(speeds, LOOPS), difference=difference)


def refuse_difference(inputs: dict[str, Tensor], concepts: int) -> float:
    """The largest difference of means.

    Raises:
        RuntimeError: where maps differ, or means by more than 10⁻⁵; then speeds would not compare.
    """
    maps, means = ours(inputs, concepts)
    theirs = [loops(inputs, concepts, lean) for lean in (False, True)]
    difference = max(float((means - other).abs().max()) for _, other in theirs)
    if not all(torch.equal(maps, other) for other, _ in theirs) or not difference < 1e-5:
        raise RuntimeError(f"loops and ours do not compute the same: means differ by {difference:.0e}")
    return difference


def cli() -> None:
    """Command line."""
    errors.run_script(main)


if __name__ == "__main__":
    cli()
