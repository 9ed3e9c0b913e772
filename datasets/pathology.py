"""Tiles and glands of stained tissue.

  nct    `NCT-CRC-HE-100K/<CLASS>/*.tif`, nine classes, to train on; `CRC-VAL-HE-7K/<CLASS>/*.tif` to test on
  glas   `train_1.bmp`, `train_1_anno.bmp`; `testA_1.bmp` …, `testB_1.bmp` … to test on; in `--data` or a folder there
  crag   `train/Images/*.png`, `train/Annotation/*.png`; `valid/…` to test on

Annotations hold 0 or the gland's number. Both gland sets are also read from COCO's format, as `preprocess/to_coco.py`
writes it: `annotations/train.json` and `annotations/test.json`, images in `train/` and `test/`.

A fixed tenth of the training images validates and never trains, also when only the training split is asked for, so
that pre-training does not see it. Which patient an image is of is not known in these sets. With `--list`, `--val-list`
and `--test-list` (paths in `--data`, or names), the lists say the splits.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath

import numpy as np
import torch

from medssl.datasets.base import Files, ImageDataset, Info, Request
from medssl.datasets.masked_images import InstanceImages
from medssl.datasets.splits import choose
from medssl.errors import InputError, UnreadableImage, unreadable
from medssl.reading.masks import read_mask, run_lengths

NCT_TRAIN, NCT_TEST = "NCT-CRC-HE-100K", "CRC-VAL-HE-7K"
NCT_CLASSES = ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")
MOST_PIXELS = 2**28  # of an image: Pillow opens none that is larger


@dataclass(frozen=True)
class Tile:
    """An image and, of gland sets, where its glands are.

    Attributes:
        id: path in `--data`. part: "train" or "test", as the set is published.
        glands: reads their numbers, (H, W) integers; None for images that are classified.
        label: class number; None for gland sets.
    """

    id: str
    image: Path
    part: str
    glands: Callable[[], np.ndarray] | None = None
    label: int | None = None

    @property
    def patient(self) -> str:
        """Not known: each tile counts as one."""
        return self.id

    @property
    def names(self) -> tuple[str, ...]:
        """What lists may call it."""
        return self.id, self.image.name


class Glands(InstanceImages):
    """Images with a mask for every gland.

    Args:
        tiles: of the split.
    """

    def __init__(self, info: Info, tiles: Sequence[Tile], texture_size: int) -> None:
        files = Files([tile.image for tile in tiles])
        super().__init__(info, files, [tile.id for tile in tiles], texture_size=texture_size)
        self.tiles = list(tiles)

    def instances(self, i: int) -> np.ndarray:
        return self.tiles[self.positions[i]].glands()


def open_splits(request: Request, splits: Sequence[str]) -> dict[str, ImageDataset]:
    """Open splits of `nct`, `glas` or `crag`.

    Raises:
        InputError: for a folder of another layout, a missing annotation, and lists that cannot be used.
    """
    root = request.folder()
    tiles = {"nct": find_nct, "glas": find_glas, "crag": find_crag}[request.name](root)
    chosen = choose(tiles, request, splits, published=True)
    opened: dict[str, ImageDataset] = {}
    if request.name == "nct":
        info = Info("nct", 2, 3, "multi-class", NCT_CLASSES)
        for split, tiles in chosen.items():
            files, labels = Files([tile.image for tile in tiles]), torch.tensor([tile.label for tile in tiles])
            ids = [tile.id for tile in tiles]
            opened[split] = ImageDataset(info, files, ids, labels, texture_size=request.resolve_texture(info))
        return opened
    info = Info(request.name, 2, 3)
    return {split: Glands(info, tiles, request.resolve_texture(info)) for split, tiles in chosen.items()}


# Layouts -------------------------------------------------------------------------------------------


def find_nct(root: Path) -> list[Tile]:
    """Tiles by class folder; an InputError for other folders than the nine classes'."""
    tiles = []
    for home, part in ((NCT_TRAIN, "train"), (NCT_TEST, "test")):
        if not (root / home).is_dir():
            continue
        for folder in sorted(path for path in (root / home).iterdir() if path.is_dir()):
            if folder.name not in NCT_CLASSES:
                raise InputError(f"{folder}: not a class of nct, which has {', '.join(NCT_CLASSES)}")
            label = NCT_CLASSES.index(folder.name)
            tiles += [
                Tile(path.relative_to(root).as_posix(), path, part, label=label)
                for path in sorted(folder.iterdir())
                if path.suffix.lower() in (".tif", ".tiff", ".png", ".jpg")
            ]
    if not any(tile.part == "train" for tile in tiles):
        raise InputError(f"--data {root}: no {NCT_TRAIN}/<CLASS>/*.tif there")
    return tiles


def find_glas(root: Path) -> list[Tile]:
    """GlaS' images, as published or in COCO's format."""
    if (root / "annotations").is_dir():
        return find_coco(root)
    home = next((path.parent for path in sorted(root.rglob("train_1.bmp"))), None)
    if home is None:
        raise InputError(f"--data {root}: no train_1.bmp and no annotations/train.json there; is this GlaS?")
    tiles = []
    for path in sorted(home.glob("*.bmp"), key=_natural):
        match = re.fullmatch(r"(train|testA|testB)_\d+", path.stem)
        if match:
            part = "train" if match[1] == "train" else "test"
            tiles.append(_with_mask(root, path, path.with_name(f"{path.stem}_anno.bmp"), part))
    return tiles


def find_crag(root: Path) -> list[Tile]:
    """CRAG's images, as published or in COCO's format."""
    if (root / "annotations").is_dir():
        return find_coco(root)
    tiles = []
    for home, part in (("train", "train"), ("valid", "test")):
        for path in sorted((root / home / "Images").glob("*.png"), key=_natural):
            tiles.append(_with_mask(root, path, root / home / "Annotation" / path.name, part))
    if not any(tile.part == "train" for tile in tiles):
        raise InputError(f"--data {root}: no train/Images/*.png and no annotations/train.json there; is this CRAG?")
    return tiles


def _natural(path: Path) -> tuple[str, int]:
    number = re.search(r"(\d+)$", path.stem)
    return path.stem[: number.start()] if number else path.stem, int(number[1]) if number else 0


def _with_mask(root: Path, image: Path, mask: Path, part: str) -> Tile:
    if not mask.is_file():
        raise InputError(f"{image}: its annotation {mask} is missing; add it, or move the image away")
    return Tile(image.relative_to(root).as_posix(), image, part, partial(read_glands, mask))


def read_glands(path: Path) -> np.ndarray:
    """The glands' numbers (H, W) int32."""
    return read_mask(path).astype(np.int32)


def find_coco(root: Path) -> list[Tile]:
    """Images and glands of `annotations/{train,test}.json`, in `{train,test}/`; every category counts as a gland.

    Raises:
        InputError: for a file that is no COCO annotation, one with regions of crowds, or an image that is missing.
    """
    tiles = []
    for part in ("train", "test"):
        path = root / "annotations" / f"{part}.json"
        if not path.is_file():
            continue
        images = read_coco(path)
        for name, shapes in images.items():
            image = root / part / name
            if not image.is_file():
                raise InputError(f"{path}: names {image}, which is missing")
            tiles.append(Tile(image.relative_to(root).as_posix(), image, part, shapes))
    if not any(tile.part == "train" for tile in tiles):
        raise InputError(f"--data {root}: no annotations/train.json there")
    return tiles


def read_coco(path: Path) -> dict[str, "Shapes"]:
    """An annotation file's images by name.

    Raises:
        InputError: for regions of crowds, and other contents.
    """
    try:
        with unreadable():
            return _images_of(path)
    except UnreadableImage as error:
        cause = error.__cause__
        raise InputError(f"{path}: no COCO annotation ({type(cause).__name__}: {error})") from None


def _images_of(path: Path) -> dict[str, "Shapes"]:
    content = json.loads(path.read_text(encoding="utf-8-sig"))  # which some tools mark
    names: dict[object, str] = {}
    images: dict[str, Shapes] = {}
    for image in content["images"]:
        name, height, width = image["file_name"], image["height"], image["width"]
        if type(height) is not int or type(width) is not int or min(height, width) < 1 or height * width > MOST_PIXELS:
            raise ValueError(f"{name} has the sides {height} and {width}")
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            raise ValueError(f"{name} leads out of the folder")
        if image["id"] in names or name in images:
            raise ValueError(f"{name} or its id {image['id']} comes twice")
        names[image["id"]], images[name] = name, Shapes([], height, width)
    for annotation in content["annotations"]:
        if annotation.get("iscrowd"):
            raise InputError(f"{path}: annotation {annotation.get('id')} is a crowd, which is no instance; remove it")
        images[names[annotation["image_id"]]].segmentations.append(annotation["segmentation"])
    return images


@dataclass(frozen=True)
class Shapes:
    """Reads an image's segmentations in COCO's format, polygons or run lengths; where they overlap, the last counts."""

    segmentations: list[object]
    height: int
    width: int

    def __call__(self) -> np.ndarray:
        """The glands' numbers (H, W)."""
        from pycocotools import mask as coco

        found = np.zeros((self.height, self.width), np.int32)
        for number, shape in enumerate(self.segmentations, 1):
            with unreadable(f"its annotation {number} is no polygon and no run lengths"):
                if isinstance(shape, list):
                    runs = coco.merge(coco.frPyObjects(self._polygons(shape), self.height, self.width))
                else:
                    runs = coco.frPyObjects(self._runs(shape), self.height, self.width)
                found[coco.decode(runs) > 0] = number
        return found

    # pycocotools is C, and writes where it is told to.

    def _polygons(self, polygons: list) -> list:
        """The polygons of a shape, without parts of one or two corners, which tools leave where they simplify; raises
        ValueError for corners that are no numbers, or far from the image, and where no polygon is left."""
        left = [corners for corners in polygons if not (isinstance(corners, list) and len(corners) in (2, 4))]
        if not left:
            raise ValueError("no part has three corners")
        for corners in polygons:
            values = np.array(corners, np.float64)
            if values.ndim != 1 or len(values) < 2 or len(values) % 2:
                raise ValueError("a polygon has at least three corners of two numbers")
            if not (np.abs(values) <= 2 * max(self.height, self.width) + 2).all():
                raise ValueError(f"its corners are not of {self.height} × {self.width} pixels")
        return left

    def _runs(self, shape: dict) -> dict:
        """Run lengths as numbers, which cover the image."""
        counts = shape["counts"]
        lengths = counts if isinstance(counts, list) else run_lengths(counts)
        lengths = [int(n) if isinstance(n, float) and n.is_integer() else n for n in lengths]  # as some tools write
        size = [self.height, self.width]
        whole = all(type(length) is int and length >= 0 for length in lengths) and sum(lengths) == math.prod(size)
        if not whole or list(shape.get("size", size)) != size:
            raise ValueError(f"its runs are not of {self.height} × {self.width} pixels")
        return {"size": size, "counts": lengths}
