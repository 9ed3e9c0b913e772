"""Data sets with masks, of either dimension."""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from medssl.datasets import folder, registry, segmentation2d, segmentation3d
from medssl.datasets.reading import find_images
from medssl.datasets.registry import ImageDataset, Request, UnreadableImage
from medssl.datasets.segmentation2d import InstanceImages
from medssl.datasets.volumes import find_volumes
from medssl.engine.options import InputError

SPLITS = ("train", "val", "test")
INSTANCES = ("crag", "glas", "tissue2d")
OF_VOLUMES = ("spacing", "window")  # options that only volumes have


def open_segmented(args: argparse.Namespace, protocols: Mapping[str, Mapping]) -> dict[str, ImageDataset]:
    """The train, val and test splits of a data set with masks; without a name, a `folder` with data and the phantom of
    `--d` without, `phantom3d` where it is not given.

    An item has "mask" beside what `ImageDataset` says; the data set has `mask_labels`, the labels' names. Notes in
    `args` the splits' `data_digest`, by which a continuation knows them, and the `spacing` and `window` of volumes.

    Args:
        protocols: "image_size" of images by data set, where the user gives none. Textures are of that size.

    Raises:
        InputError: as `registry.open_splits`, or for a data set without masks.
    """
    name = (args.dataset or ("folder" if args.data else f"phantom{args.d or 3}d")).lower()
    size = args.image_size or protocols.get(name, protocols["folder"])["image_size"]
    request = replace(registry.request_of(args), name=name, dims=args.d, image_size=size)
    request = replace(request, texture_size=request.texture_size or size)
    of_images = name == "folder" and (args.d or _dims_of(request.folder())) == 2
    if name in segmentation3d.SETS and not of_images:
        opened = registry.finish(request, segmentation3d.open_splits(request, SPLITS))
    elif of_images:
        _refuse(request, name, OF_VOLUMES)
        opened = registry.finish(request, segmentation2d.open_folder(request, SPLITS, folder.channels_of))
    else:
        opened = registry.open_splits(request, SPLITS, args.d)
        if not all(hasattr(data, "mask_labels") for data in opened.values()):
            known = ", ".join((*segmentation3d.SETS, *segmentation2d.KINDS, "phantom2d", "phantom3d", "fundus2d"))
            raise InputError(f"--dataset {name}: has no masks; known are {known}")
        _refuse(request, name, ("labels", *OF_VOLUMES))
    if opened["train"].info.dims == 2:
        opened = segmentation2d.with_masks(opened)
    args.data_digest = registry.data_digest(opened)
    for option in OF_VOLUMES:
        value = getattr(opened["train"], option, None)
        setattr(args, option, None if value is None else list(value))
    return opened


def open_instances(args: argparse.Namespace) -> dict[str, InstanceImages]:
    """The train, val and test splits of a set with instances, images at their own size; without data, `tissue2d`.

    Notes in `args` the set's name and the splits' `data_digest`, by which a continuation knows them.

    Raises:
        InputError: as `registry.open_splits`, for a data set without instances, and for options of decoding, which
            images at their own size do not have.
    """
    name = (args.dataset or "tissue2d").lower()
    if name not in INSTANCES:
        raise InputError(f"--dataset {name}: has no instances; known are {', '.join(INSTANCES)}")
    if args.cache:
        raise InputError(f"--cache {args.cache}: holds images of one size, and detection reads their own; leave it out")
    if args.texture_size and name != "tissue2d":
        raise InputError(f"--texture-size {args.texture_size}: detection reads images at their own size; leave it out")
    request = replace(registry.request_of(args), name=name)
    opened = registry.open_splits(request, SPLITS, args.d)
    for data in opened.values():
        data.detected = True
    args.dataset, args.data_digest = name, registry.data_digest(opened)
    for split, data in opened.items():
        data.labels = None
        if split != "val" and not any(has_instances(data, i) for i in range(len(data))):
            raise InputError(f"--dataset {name}: no image of the {split} split has an instance")
    return opened


def has_instances(data: InstanceImages, i: int) -> bool:
    """Whether image i has any; no, where its annotation cannot be read."""
    try:
        return bool(data.instances(i).any())
    except UnreadableImage:
        return False


def _refuse(request: Request, name: str, options: tuple[str, ...]) -> None:
    for option in options:
        if getattr(request, option):
            raise InputError(f"--{option}: {name} has its own; leave it out")


def _dims_of(root: Path) -> int:
    """3 for a folder with volumes, which are looked for first, or with nothing, else 2."""
    if not root.is_dir():
        raise InputError(f"--data {root}: not a folder")
    return 3 if any(path.is_file() for _, path in find_volumes(root)) or not find_images(root) else 2
