"""Write a set of glands in COCO's format, which every detection toolbox reads.

    python preprocess/to_coco.py --data GLAS --dataset glas --output GLAS_COCO
    python preprocess/to_coco.py --dataset tissue2d --output TISSUE_COCO          (generated tiles)

OUT has `train/` and `test/` with the images, as files that they are or as PNG, and `annotations/train.json` and
`test.json`: one category, masks as run lengths, boxes in pixels. The parts are those that the set is published with;
images that `--dataset` holds out for validation are in train. This project reads OUT with `--dataset` glas or crag.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from medssl.datasets.base import Files, Request
from medssl.datasets.masked_images import InstanceImages
from medssl.datasets.registry import open_splits
from medssl.engine import options
from medssl.engine.options import Parser
from medssl.errors import InputError, UnreadableImage, run_script
from medssl.files import copy_file, write_atomic, write_text
from medssl.locks import remove_abandoned
from medssl.tasks.coco import annotations_of

PARTS = {"train": ("train", "val"), "test": ("test",)}


def write_part(part: str, splits: Sequence[InstanceImages], output: Path) -> dict:
    """Write the images of a part; returns its annotations."""
    content: dict = {"images": [], "annotations": [], "categories": [{"id": 1, "name": splits[0].mask_labels[0]}]}
    (output / part).mkdir(parents=True, exist_ok=True)
    names: set[str] = set()
    for data in splits:
        for i, identity in enumerate(data.ids):
            source = Path(data.read.paths[data.positions[i]]) if isinstance(data.read, Files) else None
            name = source.name if source else f"{identity.replace('/', '_')}.png"
            if name in names:
                raise InputError(f"{identity}: another image of {part} has the name {name}")
            names.add(name)
            number = len(content["images"]) + 1
            try:
                pixels, glands = data.read(data.positions[i]), data.instances(i)
            except UnreadableImage as error:
                raise InputError(f"{identity}: {error}") from None
            if pixels.shape[:2] != glands.shape:
                raise InputError(f"{identity}: its annotation has another size")
            if source:
                copy_file(source, output / part / name)
            else:
                write_atomic(output / part / name, Image.fromarray(pixels).save)
            height, width = glands.shape
            content["images"].append({"id": number, "file_name": name, "height": height, "width": width})
            first = len(content["annotations"]) + 1
            content["annotations"] += annotations_of(glands, number, first)
    return content


def get_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--dataset", choices=("glas", "crag", "tissue2d"), required=True, help="which set")
    parser.add_argument("--data", metavar="DIR", help="its folder")
    parser.add_argument("--output", metavar="DIR", default="coco", help="where the images and annotations go")
    parser.add_argument("--texture-size", type=options.positive_int, default=0, help="side of generated tiles, pixels")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    output = Path(args.output)
    if args.data and output.resolve() == Path(args.data).resolve():
        raise InputError(f"--output {output}: is --data; choose another folder")
    for part in PARTS:
        if (output / "annotations" / f"{part}.json").exists():
            raise InputError(f"--output {output}: has annotations/{part}.json already; choose another folder")
    request = Request(args.dataset, args.data, texture_size=args.texture_size)
    opened = open_splits(request, ["train", "val", "test"])
    (output / "annotations").mkdir(parents=True, exist_ok=True)
    remove_abandoned(output)
    for part, names in PARTS.items():
        content = write_part(part, [opened[name] for name in names], output)
        path = output / "annotations" / f"{part}.json"
        write_text(path, json.dumps(content))
        print(f"{path}: {len(content['images'])} images, {len(content['annotations'])} glands")


def cli() -> None:
    run_script(main, less="a machine with more")


if __name__ == "__main__":
    cli()
