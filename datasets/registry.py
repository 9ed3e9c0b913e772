"""The data sets by name, a row each, and how scripts open them."""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib import import_module

from medssl.datasets import cache, medmnist
from medssl.datasets.base import ImageDataset, Info, Request
from medssl.datasets.identity import data_digest, sample_contents
from medssl.datasets.masked_images import InstanceImages, with_masks
from medssl.datasets.splits import SPLITS, refuse_overlap
from medssl.errors import InputError, UnreadableImage

# What a row's `tasks` may be, besides pre-training, for which every set can be used.
TASKS = ("classification", "segmentation", "detection")
MASK_OPTIONS = ("labels", "spacing", "window")  # of sets whose masks, or way of reading, are not fixed


@dataclass(frozen=True)
class OwnOption:
    """An option that one set has and others refuse; a field of `Request` has its name.

    Attributes:
        labelled: whether it is of labelled use alone.
    """

    name: str
    choices: tuple[str, ...]
    help: str
    labelled: bool = False


@dataclass(frozen=True)
class Row:
    """A data set.

    Attributes:
        name: what `--dataset` calls it.
        module: of `datasets`, with `open_splits(request, splits)`, which gives the splits by name.
        dims: spatial dimensions that its images can have.
        tasks: those of `TASKS` for which it has labels, masks or instances.
        shows: in words, for tables.
        licence, source: where to get it, and under which terms; "" for generated images.
        protocols: names of the options that a script, or a task, uses unless the user says otherwise: by
            "classification", "segmentation", "detection", "magical".
        options: its own, that other sets refuse. masks: those of `MASK_OPTIONS` that it takes.
    """

    name: str
    module: str
    dims: tuple[int, ...]
    tasks: tuple[str, ...]
    shows: str
    licence: str = ""
    source: str = ""
    protocols: Mapping[str, str] = field(default_factory=dict)
    options: tuple[OwnOption, ...] = ()
    masks: tuple[str, ...] = ()


VIEW = OwnOption("view", ("frontal", "lateral", "all"), "views that are used; frontal unless given")
UNCERTAIN = OwnOption(
    "uncertain", ("lsr-ones", "lsr-zeros", "ones", "zeros", "ignore"),
    "what uncertain labels are in training: drawn from 0.55 to 0.85 (lsr-ones, which is meant unless given) or from 0 "
    "to 0.3 (lsr-zeros), 1, 0, or not counted; evaluation never counts them", labelled=True,
)  # fmt: skip
THERE = "said there"  # the terms are not a well-known licence
EITHER, SEGMENT = ("classification", "segmentation"), ("segmentation",)
NIH_LUNGS = (THERE, "https://openi.nlm.nih.gov/faq")

ROWS = (
    Row("chest", "chest", (2,), ("classification",), "chest radiographs (ChestX-ray14), 14 findings",
        THERE, "https://nihcc.app.box.com/v/ChestXray-NIHCC", {"classification": "chest"}),
    Row("chexpert", "chexpert", (2,), ("classification",), "chest radiographs, five findings",
        "Stanford's research use agreement", "https://stanfordmlgroup.github.io/competitions/chexpert",
        {"classification": "chest", "magical": "dxc"}, (VIEW, UNCERTAIN)),
    Row("montgomery", "lungs", (2,), EITHER, "chest radiographs, lungs and tuberculosis", *NIH_LUNGS,
        {"classification": "chest", "segmentation": "lungs", "magical": "lxs"}),
    Row("shenzhen", "lungs", (2,), EITHER, "chest radiographs, lungs and tuberculosis", *NIH_LUNGS,
        {"classification": "chest", "segmentation": "lungs", "magical": "txc"}),
    Row("drive", "vessels", (2,), SEGMENT, "fundus photographs, vessels", "research and teaching",
        "https://drive.grand-challenge.org", {"segmentation": "vessels", "magical": "vfs"}),
    Row("stare", "vessels", (2,), SEGMENT, "fundus photographs, vessels", THERE,
        "https://cecas.clemson.edu/~ahoover/stare", {"segmentation": "vessels"}),
    Row("chase", "vessels", (2,), SEGMENT, "fundus photographs (CHASE_DB1), vessels", THERE,
        "https://researchdata.kingston.ac.uk/96", {"segmentation": "vessels"}),
    Row("nct", "pathology", (2,), ("classification",), "tiles of colorectal tissue (NCT-CRC-HE-100K), nine classes",
        "CC BY 4.0", "https://zenodo.org/records/1214456"),
    Row("glas", "pathology", (2,), ("segmentation", "detection"), "colon glands", "research only",
        "https://warwick.ac.uk/fac/cross_fac/tia/data/glascontest", {"detection": "glas"}),
    Row("crag", "pathology", (2,), ("segmentation", "detection"), "colon glands", THERE,
        "https://warwick.ac.uk/fac/cross_fac/tia/data/mildnet", {"detection": "crag"}),
    Row("luna", "luna", (3,), ("classification",), "chest CTs (LUNA16), nodule candidates", "CC BY 4.0",
        "https://luna16.grand-challenge.org", {"classification": "luna"}),
    Row("lits", "lits", (2, 3), SEGMENT, "abdominal CTs, liver and tumours", "CC BY-NC-ND 4.0",
        "https://competitions.codalab.org/competitions/17094", {"segmentation": "lits", "magical": "lcs"},
        masks=MASK_OPTIONS),
    Row("brats", "brats", (3,), SEGMENT, "brain MR of four kinds, tumours", THERE,
        "https://www.med.upenn.edu/cbica/brats", {"segmentation": "brats"}, masks=("spacing", "window")),
    Row("folder", "folder", (2, 3), EITHER, "any folder of images or volumes", masks=MASK_OPTIONS),
    Row("phantom2d", "phantoms.radiograph", (2,), EITHER, "generated chest radiographs, nodules",
        protocols={"segmentation": "phantom2d"}),
    Row("fundus2d", "phantoms.fundus", (2,), SEGMENT, "generated fundus photographs, vessels",
        protocols={"segmentation": "vessels"}),
    Row("tissue2d", "phantoms.tissue", (2,), TASKS, "generated tiles of tissue, glands benign or malignant",
        protocols={"detection": "tissue2d"}),
    Row("phantom3d", "phantoms.ct", (3,), EITHER, "generated chest CTs, nodules, lungs, heart",
        protocols={"segmentation": "phantom3d"}),
    *(
        Row(flag, "medmnist", (medmnist.dims_of(flag),), ("classification",), "MedMNIST", medmnist.LICENCES[flag],
            "https://medmnist.com", {"magical": "medmnist"})
        for flag in medmnist.FLAGS
    ),
)  # fmt: skip
BY_NAME = {row.name: row for row in ROWS}


# Rows ----------------------------------------------------------------------------------------------


def names(task: str | None = None) -> list[str]:
    """Names of the sets that have a task, MedMNIST's left out; of all without one. In the order of the rows."""
    return [row.name for row in ROWS if row.module != "medmnist" and (task is None or task in row.tasks)]


def row_of(name: str) -> Row:
    """The row of a data set; of a MedMNIST name, also where it has a size."""
    return BY_NAME[name if name in BY_NAME else name.partition("_")[0]]


def resolve(name: str | None, data: str | None, dims: int | None = None) -> str:
    """A data set's own name, from what `--dataset`, `--data` and `--d` say.

    Raises:
        InputError: for an unknown name.
    """
    name = name or ("folder" if data else f"phantom{dims or 2}d")
    if name.lower() in BY_NAME and row_of(name.lower()).module != "medmnist":
        return name.lower()
    flag = medmnist.flag_of(name)
    if flag is None:
        known = ", ".join(sorted(names()))
        raise InputError(f"--dataset {name}: unknown; known are {known} and the MedMNIST names")
    return flag


def refuse_options(request: Request, row: Row) -> None:
    """Raise InputError for an option that another set has."""
    own = {option.name for option in row.options}
    for owner in ROWS:
        for option in owner.options:
            value = getattr(request, option.name)
            if value is not None and option.name not in own:
                raise InputError(f"--{option.name} {value}: is for {owner.name}, not for {row.name}; leave it out")
    if request.series and not row.module.startswith("phantoms."):
        raise InputError(f"--series {request.series}: is for generated sets, and {row.name} is none; leave it out")
    if request.series and request.cache:
        raise InputError(f"--cache {request.cache}: caches are of series 0, and {row.name} needs none; leave it out")
    for option in MASK_OPTIONS:
        if getattr(request, option) and option not in row.masks:
            raise InputError(f"--{option}: {row.name} has its own; leave it out")


# Opening -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Opened(Mapping[str, ImageDataset]):
    """Splits of a data set by name.

    Attributes:
        digest: what tells them from others, wherever they lie; each split has it, too, so that a run that is given one
            knows its data when it continues.
    """

    splits: dict[str, ImageDataset]
    digest: str

    def __getitem__(self, split: str) -> ImageDataset:
        return self.splits[split]

    def __iter__(self) -> Iterator[str]:
        return iter(self.splits)

    def __len__(self) -> int:
        return len(self.splits)

    @property
    def info(self) -> Info:
        """What the data are."""
        return next(iter(self.splits.values())).info


def known(splits: Mapping[str, ImageDataset], labels: bool = True) -> Opened:
    """Splits with their digest, which depends on their labels where these are used."""
    digest = data_digest(splits, labels)
    whole = len({name for data in splits.values() for name in data.ids})
    for data in splits.values():
        data.digest, data.whole = digest, whole
    return Opened(dict(splits), digest)


def open_splits(request: Request, splits: Sequence[str], dims: int | None = None) -> Opened:
    """Open splits of a data set.

    Args:
        request: which data set, and where it is. Without a name: `folder` with `--data`, else the phantom of
            the dimension asked for, `phantom2d` where none is.
        splits: names among "train", "val" and "test".
        dims: what `--d` says. It chooses the phantom, and in a folder with images and volumes; the rest is checked.

    Raises:
        InputError: for an unknown name, a missing path, an empty or overlapping list, a wrong dimension, an option that
            the set does not have, and a cache that cannot be used.
    """
    name = resolve(request.name, request.data, dims)
    row = row_of(name)
    request = replace(request, name=name, dims=dims)
    refuse_options(request, row)
    opened = import_module(f"medssl.datasets.{row.module}").open_splits(request, splits)
    for data in opened.values():
        if dims not in (None, data.info.dims):
            raise InputError(f"--d {dims}: data set {name} has {data.info.dims} dimensions")
        # Generated images may differ in a grey level between machines, on which a run may continue.
        data.contents = sample_contents(data)
    refuse_overlap(opened)
    if request.cache:
        opened = {split: cache.attach(data, request.cache, request.data) for split, data in opened.items()}
    return known(opened)


def request_of(args: argparse.Namespace) -> Request:
    """The request that a script's options make: `--dataset`, and every other field that the script has."""
    asked = {each.name for each in fields(Request)} & vars(args).keys()
    return Request(name=args.dataset, **{key: getattr(args, key) for key in asked})


def open_pretraining(args: argparse.Namespace, dims: Sequence[int] = (2, 3)) -> ImageDataset:
    """The training images that pre-training uses: the first `--ratio` of the list, as `parted` has it, without labels.

    Args:
        dims: dimensions that the method takes.
    """
    data = open_splits(request_of(args), ["train"], args.d)["train"]
    if data.info.dims not in dims:
        instead = "train_genesis.py, train_mae.py, train_pcrl.py and train_pcrlv2.py take both"
        instead = "cut it with preprocess/slices.py" if 2 in row_of(data.info.name).dims else instead
        raise InputError(
            f"data set {data.info.name} has {data.info.dims} dimensions, and this method takes images of {dims[0]}; "
            + instead
        )
    first, rest = data.parted(args.ratio)
    if not first:
        raise InputError(f"--ratio {args.ratio:g}: leaves none of {len(data)} images")
    return known({"train": data.subset(first) if rest else data}, labels=False)["train"]


def open_labelled(args: argparse.Namespace) -> Opened:
    """The train, val and test splits of a labelled set, less the first `--ratio` of the training list.

    Raises:
        InputError: as `open_splits`, or when there is no label, or one class only, or a split's labels are all unknown.
    """
    opened = open_splits(request_of(args), SPLITS, args.d)
    splits, info = dict(opened), opened.info
    if info.task is None or any(data.labels is None for data in splits.values()):
        raise InputError(f"--dataset {info.name}: has no labels, which this script needs; give --list")
    if info.task != "multi-label" and len(splits["train"].labels.unique()) < 2:
        raise InputError(f"--dataset {info.name}: all training images are of one class")
    for split, data in splits.items():
        if data.labels.is_floating_point() and not data.labels.isfinite().any():
            option = "--list" if split == "train" else f"--{split}-list"
            raise InputError(f"--dataset {info.name}: none of the labels of the {split} split is known; see {option}")
    if info.task != "multi-label" and len(splits["test"].labels.unique()) < 2:
        print("warning: all test images are of one class; their AUROC is undefined", file=sys.stderr)
    first, rest = splits["train"].parted(getattr(args, "ratio", 0.0))
    if not rest:
        raise InputError(f"--ratio {args.ratio:g}: leaves no image to fine-tune on")
    if first:
        splits["train"] = splits["train"].subset(rest)
    return known(splits)


def segmented_name(args: argparse.Namespace) -> str:
    """The name of the set that segmentation opens: without one, a `folder` with data and the phantom of `--d` without,
    `phantom3d` where it is not given."""
    return resolve(args.dataset, args.data, args.d or 3)


def open_segmented(args: argparse.Namespace, image_size: int) -> Opened:
    """The train, val and test splits of a data set with masks.

    An item has "mask" beside what `ImageDataset` says; the data set has `mask_labels`, the labels' names.

    Args:
        image_size: to whose size images are decoded, pixels, where the user gives no other.

    Raises:
        InputError: as `open_splits`, or for a data set without masks.
    """
    name = segmented_name(args)
    request = replace(request_of(args), name=name, image_size=image_size, masks=True)
    request = replace(request, texture_size=request.texture_size or image_size)
    if "segmentation" not in row_of(name).tasks:
        raise InputError(f"--dataset {name}: has no masks; known are {', '.join(names('segmentation'))}")
    opened = open_splits(request, SPLITS, args.d)
    if not all(hasattr(data, "mask_labels") for data in opened.values()):
        raise InputError(f"--dataset {name}: has no masks; known are {', '.join(names('segmentation'))}")
    return known(with_masks(opened) if opened.info.dims == 2 else opened)


def open_instances(args: argparse.Namespace) -> Opened:
    """The train, val and test splits of a set with instances, images at their own size; without data, `tissue2d`. With
    `--all-train` no val: its images train.

    Raises:
        InputError: as `open_splits`, for a data set without instances, and for options of decoding, which images at
            their own size do not have.
    """
    name = (args.dataset or "tissue2d").lower()
    if name not in names("detection"):
        raise InputError(f"--dataset {name}: has no instances; known are {', '.join(sorted(names('detection')))}")
    if args.cache:
        raise InputError(f"--cache {args.cache}: holds images of one size, and detection reads their own; leave it out")
    if args.texture_size and row_of(name).source:
        raise InputError(f"--texture-size {args.texture_size}: detection reads images at their own size; leave it out")
    if args.all_train and args.val_list:
        raise InputError(f"--val-list {args.val_list}: with --all-train no split validates; leave one of them out")
    splits = [split for split in SPLITS if split != "val" or not args.all_train]
    opened = open_splits(replace(request_of(args), name=name), splits, args.d)
    for data in opened.values():
        data.detected = True
    opened = known(opened)  # also by their labels, which detection does not use
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
