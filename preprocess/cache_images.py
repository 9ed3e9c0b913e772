"""Decode and resize a data set once, so that training reads finished textures from one file.

    python preprocess/cache_images.py --dataset chest --data DIR --output caches/chest --workers 8
    python train_pcrlv2.py --dataset chest --data DIR --cache caches/chest

    python preprocess/cache_images.py --dataset folder --data DIR --output caches/mine --image-size 224

All splits go into one cache. A build that was stopped continues with the same command.
"""

from collections.abc import Sequence

from medssl.datasets import cache, folder, registry
from medssl.datasets.base import ImageDataset, Request
from medssl.engine import options
from medssl.engine.options import Parser
from medssl.errors import InputError, run_script
from medssl.markup import one_line


def get_parser() -> Parser:
    """The options of this script."""
    parser = Parser(__doc__)
    group = parser.add_argument_group("data")
    group.add_argument("--data", metavar="DIR", help="the data set's folder or file; without it, phantom images")
    group.add_argument(
        "--dataset", "--n", "--data_set", metavar="NAME", help="any set of images; see a script's --help"
    )
    group.add_argument("--list", metavar="FILE", help="cache the images of this list only")
    group = parser.add_argument_group("cache")
    group.add_argument("--output", metavar="DIR", required=True, help="where the cache goes")
    group.add_argument(
        "--texture-size",
        type=options.non_negative_int,
        default=0,
        help="side in pixels of the cached images; 0 chooses as training does, from --image-size",
    )
    group.add_argument(
        "--image-size", type=options.positive_int, default=224, help="the image size of the training to come"
    )
    group.add_argument(
        "--workers", "--num-workers", "--num_workers", type=options.non_negative_int, default=4, help="processes"
    )
    options.add_worker_timeout(group)
    return parser


def open_images(request: Request) -> ImageDataset:
    """All images that training on this set could ask for."""
    if request.list:
        return registry.open_splits(request, ["train"])["train"]
    name = (request.name or ("folder" if request.data else "phantom2d")).lower()
    if name == "folder":
        return folder.open_all(request)
    try:
        opened = registry.open_splits(request, ["train", "val", "test"])
    except InputError:
        # A copy without split files has all its images in train; what else is wrong is said again here.
        opened = registry.open_splits(request, ["train"])
    return cache.union(list(opened.values()))


def main(argv: Sequence[str] | None = None) -> None:
    """Make the cache and say what is in it."""
    args = get_parser().parse_args(argv)
    data = open_images(registry.request_of(args))
    index = cache.build(data, args.output, args.workers, args.worker_timeout)
    ids, bad = index["ids"], index["bad"]
    shape = f"{index['channels']} x {index['size']} x {index['size']}"
    print(f"{args.output}: {len(ids)} images of {shape}, {len(bad)} of them unreadable")
    for row, reason in list(bad.items())[:20]:
        print(one_line(f"  {ids[int(row)]}: {reason}"))
    if len(bad) > 20:
        print(f"  and {len(bad) - 20} more, all in {args.output}/index.json")


def cli() -> None:
    """Console command."""
    run_script(main, less="fewer --workers")


if __name__ == "__main__":
    cli()
