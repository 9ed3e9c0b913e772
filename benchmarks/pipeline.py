"""Images per second of PCRLv2's input pipeline, from PNG files to a training batch: the published recipe, image
by image with PIL and torchvision, against ours, decoded each time and from a cache.

  python benchmarks/pipeline.py                                           (one core; 48 generated radiographs)
  python benchmarks/pipeline.py --workers 2 --passes 4 --output benchmarks/results/pipeline_workers2.json
  python benchmarks/pipeline.py --images 4 --size 128 --b 2 --repeats 1 --output /tmp/pipeline.json      (a smoke run)

Each image becomes two views of 224 pixels, six of 96, and one target. Without workers everything runs in one
process with one thread, so figures are per core. With a GPU, ours is also measured with the views made there.
"""

import argparse
import functools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from medssl import errors
from medssl.benchmarks.machine import add_measuring, interleave, report, summarise
from medssl.datasets import cache
from medssl.datasets.base import Files, ImageDataset, Info, Request, collate, to_texture
from medssl.datasets.phantoms.radiograph import radiographs
from medssl.engine import options
from medssl.engine.batches import to_device
from medssl.models.encoders import IMAGENET
from medssl.reading.pictures import read_image
from medssl.views.draws import Draws
from medssl.views.of_images import MultiCropViews

SIZE, LOCAL_SIZE, LOCAL_VIEWS = 224, 96, 6
PLAIN = "plain"


# The files -----------------------------------------------------------------------------------------


def write_images(folder: Path, count: int, side: int) -> list[Path]:
    """Write grey PNG files that cost what radiographs cost: smooth anatomy, and grain that does not compress.

    ChestX-ray14's files, 1024 pixels a side, have 0.4 MB on average.
    """
    coarse, _, _ = radiographs(count, min(256, side))
    rng = np.random.default_rng(0)
    paths = []
    for i, image in enumerate(coarse):
        smooth = F.interpolate(torch.from_numpy(image)[None, None].float(), size=(side, side), mode="bicubic")
        film = smooth[0, 0].numpy() + rng.normal(0, 4, (side, side))
        paths.append(folder / f"{i:04d}.png")
        Image.fromarray(film.round().clip(0, 255).astype(np.uint8)).save(paths[-1])
    return paths


# The published recipe ------------------------------------------------------------------------------


class Blur:
    """PIL's Gaussian blur with a random radius."""

    def __init__(self, low: float = 0.1, high: float = 2.0) -> None:
        self.low, self.high = low, high

    def __call__(self, image: Image.Image) -> Image.Image:
        radius = float(torch.empty(()).uniform_(self.low, self.high))
        return image.filter(ImageFilter.GaussianBlur(radius))


class Cutout:
    """Zero square holes of a normalised image (C, H, W)."""

    def __init__(self, holes: int, side: int) -> None:
        self.holes, self.side = holes, side

    def __call__(self, image: Tensor) -> Tensor:
        h, w = image.shape[1:]
        mask = torch.ones(h, w)
        for _ in range(self.holes):
            y, x = int(torch.randint(h, ())), int(torch.randint(w, ()))
            top, left = max(0, y - self.side // 2), max(0, x - self.side // 2)
            mask[top : y + self.side // 2, left : x + self.side // 2] = 0
        return image * mask


class PlainDataset(Dataset):
    """The published recipe: every view of every image by itself, with PIL and torchvision.

    It makes what the loss uses; the published loader also makes a second target, which nothing uses.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self.spatial, self.local_spatial = (
            transforms.Compose(
                [
                    transforms.RandomResizedCrop(side, scale=scale),
                    transforms.RandomRotation(10),
                    transforms.RandomHorizontalFlip(),
                ]
            )
            for side, scale in ((SIZE, (0.3, 1.0)), (LOCAL_SIZE, (0.05, 0.3)))
        )
        self.normalise = transforms.Compose([transforms.ToTensor(), transforms.Normalize(**IMAGENET)])
        self.color = transforms.Compose(
            [
                transforms.RandomGrayscale(0.2),
                transforms.RandomApply([Blur()], 0.5),
                transforms.ColorJitter(0.4, 0.4, 0.4, 0.4),
                self.normalise,
            ]
        )
        self.cutout = Cutout(3, 32)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        image = Image.open(self.paths[index]).convert("RGB")
        crop1, crop2 = self.spatial(image), self.spatial(image)
        target = self.normalise(crop1)
        view1, view2 = self.cutout(self.color(crop1)), self.cutout(self.color(crop2))
        return view1, view2, target, [self.color(self.local_spatial(image)) for _ in range(LOCAL_VIEWS)]


def plain_batches(loader: DataLoader) -> Iterator[int]:
    """Number of images of each finished batch."""
    for view1, _view2, _target, small in loader:
        torch.cat(small)  # (V·B, 3, h, w), as the network takes them
        yield len(view1)


# Ours ----------------------------------------------------------------------------------------------


def our_batches(loader: DataLoader, device: torch.device) -> Iterator[int]:
    """Number of images of each finished batch; views are made on `device`, as in training."""
    views = MultiCropViews(**IMAGENET, size=SIZE, local_size=LOCAL_SIZE, locals_=LOCAL_VIEWS).to(device)
    for step, batch in enumerate(loader):
        count = len(batch["index"])
        with torch.no_grad():
            views(to_device(batch, device), Draws((0, step), count))
        yield count


# Measuring -----------------------------------------------------------------------------------------


def speed(batches: Callable[[], Iterator[int]]) -> float:
    """Images per second of one run through the batches."""
    started = time.perf_counter()
    images = sum(batches())
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return images / (time.perf_counter() - started)


def stages(paths: Sequence[Path], texture_size: int, b: int) -> dict[str, float]:
    """Where our time goes, in ms per image on one core: decoding, resizing to the texture, views on the CPU."""
    views = MultiCropViews(**IMAGENET, size=SIZE, local_size=LOCAL_SIZE, locals_=LOCAL_VIEWS)
    times: dict[str, list[float]] = {"decode": [], "texture": [], "views": []}

    def timed(name: str, call: Callable, count: int = 1) -> object:
        started = time.perf_counter()
        result = call()
        times[name].append(1000 * (time.perf_counter() - started) / count)
        return result

    textures, sizes = [], []
    for path in paths:
        pixels = timed("decode", functools.partial(read_image, path))
        texture = timed("texture", functools.partial(to_texture, pixels, texture_size, 1))
        textures.append(torch.from_numpy(texture))
        sizes.append(pixels.shape)
    for step in range(len(paths) // b):
        rows = slice(step * b, (step + 1) * b)
        batch = {"image": torch.stack(textures[rows]), "size": torch.tensor(sizes[rows]).float()}
        with torch.no_grad():
            timed("views", functools.partial(views, batch, Draws((0, step), b)), b)
    return {name: median(values) for name, values in times.items()}


def get_parser() -> options.Parser:
    """The options of this script."""
    parser = options.Parser(__doc__)
    group = parser.add_argument_group("files and batches")
    group.add_argument("--images", type=options.positive_int, default=48, help="generated PNG files")
    group.add_argument("--size", type=options.positive_int, default=1024, help="their side in pixels")
    group.add_argument("--b", type=options.positive_int, default=16, help="images per batch")
    group = add_measuring(parser, "pipeline.json")
    group.add_argument("--passes", type=options.positive_int, default=1, help="times that a run goes through the files")
    group.add_argument(
        "--workers", type=options.non_negative_int, default=0, help="loader processes; 0: figures are per core"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> dict:
    """Measure, print the table, write and return the report."""
    args = get_parser().parse_args(argv)
    if args.images < args.b:
        raise errors.InputError(f"--images {args.images}: fewer than the {args.b} of one batch (--b)")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            return measure(args, Path(folder))
    finally:
        torch.set_num_threads(threads)


def measure(args: argparse.Namespace, folder: Path) -> dict:
    """Everything that `main` does, with temporary files in `folder`."""
    paths = write_images(folder, args.images, args.size)
    png_kb = sum(path.stat().st_size for path in paths) / len(paths) / 1000
    print(f"{len(paths)} PNG files of {args.size} x {args.size}, {png_kb:.0f} kB each")

    info = Info("folder")
    texture_size = Request(image_size=SIZE).resolve_texture(info)
    decoding = ImageDataset(info, Files(paths), [path.name for path in paths], texture_size=texture_size)
    cache.build(decoding, folder / "cache")
    cached = cache.attach(decoding, folder / "cache")

    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(0)).tolist() * args.passes
    cuda = torch.cuda.is_available()

    def load(data: Dataset, collate_fn: Callable | None = None) -> DataLoader:
        return DataLoader(
            data,
            batch_size=args.b,
            sampler=order,
            drop_last=True,
            num_workers=args.workers,
            collate_fn=collate_fn,
            persistent_workers=args.workers > 0,  # starting processes is not what is measured
            pin_memory=cuda,
        )

    cpu = torch.device("cpu")
    ours = {"ours, decoding": load(decoding, collate), "ours, cache": load(cached, collate)}
    variants = {PLAIN: functools.partial(plain_batches, load(PlainDataset(paths)))}
    variants |= {name: functools.partial(our_batches, loader, cpu) for name, loader in ours.items()}
    if cuda:
        gpu = torch.device("cuda")
        variants |= {f"{name}, GPU views": functools.partial(our_batches, loader, gpu) for name, loader in ours.items()}
    torch.manual_seed(0)
    for batches in variants.values():  # warm caches and start workers
        if args.workers:
            sum(batches())  # a persistent worker does not forget the rest of an unfinished run
        else:
            next(batches())
    speeds = interleave({name: functools.partial(speed, batches) for name, batches in variants.items()}, args.repeats)
    parts = stages(paths, texture_size, args.b)
    results = summarise(speeds, PLAIN)
    more = {"png_kb": png_kb, "texture_size": texture_size, "per_core": args.workers == 0, "ours_ms_per_image": parts}
    content = report(args.output, "pipeline", vars(args), results, **more)
    print("ours, ms per image on one core: " + ", ".join(f"{name} {ms:.1f}" for name, ms in parts.items()))
    return content


def cli() -> None:
    """Command line."""
    errors.run_script(main)


if __name__ == "__main__":
    cli()
