"""What a data set is, and the names under which data sets are opened.

A data set is an `ImageDataset`: a *source* that decodes image number i to uint8, with ids, labels and
patients beside it. Files, MedMNIST arrays and phantoms differ in their source alone; sets whose items are
something else than a picture, such as volumes, override `load`.
"""

import argparse
import copy
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from medssl.engine.options import InputError

TASKS = ("multi-label", "binary", "multi-class")
CUBE_SIZE = (64, 64, 32)  # voxels of a view of a volume: PCRLv2's
SAMPLED = 16  # images of a split whose contents a run remembers


class UnreadableImage(Exception):
    """A file that cannot be decoded; its text names the file and the reason."""


@dataclass(frozen=True)
class Info:
    """What is known of a data set before an image is read.

    Attributes:
        name: the name given to `--dataset`.
        dims: spatial dimensions of an image, 2 or 3.
        channels: 1 (grey) or 3 (colour).
        task: one of `TASKS`, or None for unlabelled images.
        classes: names of the labels (multi-label) or of the classes.
        native_size: side of the images in pixels where all share one, else None.
    """

    name: str
    dims: int = 2
    channels: int = 1
    task: str | None = None
    classes: tuple[str, ...] = ()
    native_size: int | None = None


class ImageDataset(torch.utils.data.Dataset):
    """Images of one split.

    Args:
        info: description of the set.
        read: the source, which `load` asks: maps a position in `ids` to an image (H, W) or (H, W, 3), uint8,
            any size (subclasses: to whatever their `load` takes). It raises `UnreadableImage` for a file that
            cannot be decoded.
        ids: a name for every image, used in logs, lists and predictions.
        labels: (N, L) float for multi-label tasks (0, 1, or NaN: not known), (N,) int64 class numbers for
            the others, or None.
        patients: a patient's name for every image, or None where patients are not known.
        texture_size: side S of the square texture to which every image is resized; its original height
            and width go with it, so that views are drawn in the original geometry.

    An item is what `load` gives, "index": int, "bad": list of "id: reason" and, where there are labels,
    "label". An image that cannot be read is replaced by the next readable one, and named in "bad".

    A subclass overrides `load`. What else it holds for each image is looked up at `positions[i]`, which a
    subset shares with the whole set. Items of three dimensions are described in `volume_item` and `luna`.

    Attributes:
        weights: where the images are candidates for a finding in `patients`' scans, how many candidates of the
            scan each stands for, (whole set's images,) float; FROC curves count by it. None for other images.
        order: the patients, one an image, of the list that the split was taken from, in its order, where `--ratio`
            parts that list between patients; None where it parts the split between two images.
        contents: what `sample_contents` said of the split when it was opened.
        cached: gives the texture's item of a position from a cache, which then is not decoded; or None.
    """

    weights: np.ndarray | None = None
    order: Sequence[str] | None = None
    contents: str | None = None
    cached: Callable[[int], dict[str, Tensor]] | None = None

    def __init__(
        self,
        info: Info,
        read: Callable[[int], np.ndarray],
        ids: Sequence[str],
        labels: Tensor | None = None,
        patients: Sequence[str] | None = None,
        texture_size: int = 512,
    ) -> None:
        if len(ids) == 0:
            raise InputError(f"data set {info.name}: no images; check --data and --list")
        self.info, self.read, self.ids, self.labels = info, read, list(ids), labels
        self.patients = None if patients is None else list(patients)
        self.texture_size = texture_size
        self.positions = range(len(self.ids))  # position of each image in what `read` counts

    def __len__(self) -> int:
        return len(self.ids)

    def subset(self, indices: Sequence[int]) -> "ImageDataset":
        """The same data set with the images at `indices` only, in that order."""
        chosen = [int(i) for i in indices]
        if not chosen:
            raise InputError(f"data set {self.info.name}: none of its {len(self)} images is left")
        new = copy.copy(self)  # of the same class, with whatever else a subclass holds
        new.ids, new.positions = [self.ids[i] for i in chosen], [self.positions[i] for i in chosen]
        new.labels = None if self.labels is None else self.labels[torch.as_tensor(chosen, dtype=torch.long)]
        new.patients = None if self.patients is None else [self.patients[i] for i in chosen]
        return new

    def leading(self, ratio: float) -> int:
        """How many images from the first on are the first `ratio` of the list."""
        return round(ratio * len(self))

    def parted(self, ratio: float) -> tuple[Sequence[int], Sequence[int]]:
        """Positions of the images in the first `ratio` of the list, for pre-training, and of the rest, for fine-tuning.

        With `order`, whole patients in the order of their first image in the list, the last one that which reaches
        `ratio` of the list's images: no patient is in both parts, wherever the list has that patient's images. Else
        the first `leading(ratio)` images.
        """
        if self.order is None:
            count = self.leading(ratio)
            return range(count), range(count, len(self))
        wanted, images, first = round(ratio * len(self.order)), Counter(self.order), set()
        for patient, count in images.items():
            if wanted <= 0:
                break
            first.add(patient)
            wanted -= count
        inside = [patient in first for patient in self.patients]
        return [i for i, there in enumerate(inside) if there], [i for i, there in enumerate(inside) if not there]

    def annotation(self, i: int) -> tuple[np.ndarray, ...]:
        """What is known of image i beside its label, by which data are told from others: masks, where they are used.

        Raises:
            UnreadableImage: for a mask that cannot be decoded.
        """
        return ()

    def load(self, i: int) -> dict[str, Tensor]:
        """Image i: "image", its texture (C, S, S) uint8, and "size", its original height and width (2,) float32.

        Raises:
            UnreadableImage: for a file that cannot be decoded.
        """
        if self.cached is not None:
            return self.cached(self.positions[i])
        pixels = self.read(self.positions[i])
        texture = to_texture(pixels, self.texture_size, self.info.channels)
        return {"image": torch.from_numpy(texture), "size": torch.tensor(pixels.shape[:2], dtype=torch.float32)}

    def __getitem__(self, index: int) -> dict:
        bad: list[str] = []
        for attempt in range(min(len(self), 64)):
            i = (index + attempt) % len(self)
            try:
                sample = self.load(i)
            except UnreadableImage as error:
                bad.append(f"{self.ids[i]}: {error}")
                continue
            label = {} if self.labels is None else {"label": self.labels[i]}
            return {**sample, "index": i, "bad": bad, **label}
        raise InputError(f"data set {self.info.name}: {len(bad)} files in a row are unreadable, first {bad[0]}")


def to_texture(pixels: np.ndarray, size: int, channels: int) -> np.ndarray:
    """Resize to a square and arrange channels.

    Args:
        pixels: (H, W) or (H, W, 3) uint8.
        size: side S of the texture.
        channels: 1 or 3; colour becomes luminance for 1, grey is repeated for 3.

    Returns:
        (channels, S, S) uint8, contiguous, anti-aliased where it shrinks.
    """
    image = Image.fromarray(pixels)
    if channels == 1 and image.mode != "L":
        image = image.convert("L")
    if image.size != (size, size):
        # The box filter is the fastest, but lets some pixels stand for one original and others for two where it
        # shrinks by less than half: phantoms of 584 pixels are then 6 dB farther from a Lanczos filter's result.
        halves = min(image.size) >= 2 * size
        image = image.resize((size, size), Image.Resampling.BOX if halves else Image.Resampling.BILINEAR)
    array = np.array(image)
    if array.ndim == 2:
        array = array[None]
        return np.repeat(array, 3, axis=0) if channels == 3 else array
    return np.ascontiguousarray(array.transpose(2, 0, 1))


def volume_item(volume: Tensor, size: Sequence[float]) -> dict[str, Tensor]:
    """The item of a volume: "image" (1, X, Y, Z) float16 and "size" (3,) float32.

    Args:
        volume: (X, Y, Z) in [0, 1], x to the patient's left, y to the back, z to the head.
        size: its extent along them, mm.
    """
    return {"image": volume[None].half(), "size": torch.tensor(size, dtype=torch.float32)}


def collate(samples: list[dict]) -> dict:
    """Stack samples into a batch; tensors of differing shapes and `bad` become lists."""
    bad = [name for sample in samples for name in sample.pop("bad")]
    batch: dict = {"bad": bad}
    for key in samples[0]:
        values = [sample[key] for sample in samples]
        ragged = isinstance(values[0], Tensor) and len({value.shape for value in values}) > 1
        batch[key] = values if ragged else torch.utils.data.default_collate(values)
    return batch


@dataclass(frozen=True)
class Request:
    """What a script asks of a data set: the options of the data group, and the size of its views.

    Attributes:
        image_size: side of the views of images, pixels.
        cube_size: shape of the views of volumes, voxels; None for a script without a wish.
        dims: what `--d` says.
        labels: values of a folder's masks that are segmented; None for all.
        spacing: mm between voxels to which volumes with masks are resampled, 0 for their own; None for the set's.
        window: stored values (HU) that become 0 and 1 in volumes with masks; None for the set's.
        view: which views of CheXpert; None for its default.
        uncertain: what CheXpert's uncertain labels become in training; None for its default.
    """

    name: str | None = None
    data: str | None = None
    list: str | None = None
    val_list: str | None = None
    test_list: str | None = None
    cache: str | None = None
    texture_size: int = 0
    image_size: int = 224
    cube_size: Sequence[int] | None = None
    dims: int | None = None
    labels: Sequence[int] | None = None
    spacing: Sequence[float] | None = None
    window: Sequence[float] | None = None
    view: str | None = None
    uncertain: str | None = None

    @property
    def lists(self) -> dict[str, str]:
        """The list files that were given, by split."""
        given = {"train": self.list, "val": self.val_list, "test": self.test_list}
        return {split: path for split, path in given.items() if path}

    def resolve_texture(self, info: Info) -> int:
        """The texture's side: asked for, the set's own, or the power of two from 2 × image size on."""
        if self.texture_size:
            return self.texture_size
        if info.native_size:
            return info.native_size
        return 1 << (2 * self.image_size - 1).bit_length()

    def resolve_grid(self) -> tuple[int, int, int]:
        """Voxels to which volumes of many shapes are resampled: twice the views' shape, so that crops keep detail."""
        x, y, z = self.cube_size or CUBE_SIZE
        return 2 * x, 2 * y, 2 * z

    def folder(self) -> Path:
        """`--data` as an existing path."""
        if self.data is None:
            raise InputError(f"--dataset {self.name} needs --data")
        path = Path(self.data)
        if not path.exists():
            raise InputError(f"--data {self.data}: no such file or folder")
        return path


# name -> module with `open_splits(request, splits) -> dict[str, ImageDataset]`
FAMILIES = {
    "brats": "segmentation3d", "chase": "segmentation2d", "chest": "chest", "chexpert": "chexpert",
    "crag": "pathology", "drive": "segmentation2d", "folder": "folder", "fundus2d": "phantom_fundus",
    "glas": "pathology", "lits": "segmentation3d", "luna": "luna", "montgomery": "segmentation2d", "nct": "pathology",
    "phantom2d": "phantom", "phantom3d": "phantom_ct", "shenzhen": "segmentation2d", "stare": "segmentation2d",
    "tissue2d": "phantom_tissue",
}  # fmt: skip


def resolve(name: str | None, data: str | None, dims: int | None = None) -> tuple[str, str]:
    """A data set's own name, and the module that opens it, from what `--dataset`, `--data` and `--d` say.

    Raises:
        InputError: for an unknown name.
    """
    name = name or ("folder" if data else f"phantom{dims or 2}d")
    if name.lower() in FAMILIES:
        return name.lower(), FAMILIES[name.lower()]
    from medssl.datasets import medmnist

    flag = medmnist.flag_of(name)
    if flag is None:
        known = ", ".join(sorted(FAMILIES))
        raise InputError(f"--dataset {name}: unknown; known are {known} and the MedMNIST names")
    return flag, "medmnist"


def open_splits(request: Request, splits: Sequence[str], dims: int | None = None) -> dict[str, ImageDataset]:
    """Open splits of a data set.

    Args:
        request: which data set, and where it is. Without a name: `folder` with `--data`, else the phantom of
            the dimension asked for, `phantom2d` where none is.
        splits: names among "train", "val" and "test".
        dims: what `--d` says. It chooses the phantom, and in a folder with images and volumes; the rest is checked.

    Raises:
        InputError: for an unknown name, a missing path, an empty or overlapping list, a wrong dimension.
    """
    name, family = resolve(request.name, request.data, dims)
    for option in ("view", "uncertain"):
        if getattr(request, option) is not None and family != "chexpert":
            raise InputError(f"--{option} {getattr(request, option)}: is for chexpert, not for {name}; leave it out")
    module = import_module(f"medssl.datasets.{family}")
    request = replace(request, name=name, dims=dims)
    return finish(request, module.open_splits(request, splits))


def finish(request: Request, opened: dict[str, ImageDataset]) -> dict[str, ImageDataset]:
    """What opening splits ends with, whatever the set: they are checked, noted in `contents`, and read from a cache.

    Raises:
        InputError: for a wrong dimension, splits that overlap, and a cache that cannot be used.
    """
    for data in opened.values():
        if request.dims not in (None, data.info.dims):
            raise InputError(f"--d {request.dims}: data set {request.name} has {data.info.dims} dimensions")
        # Generated images may differ in a grey level between machines, on which a run may continue.
        data.contents = sample_contents(data)
    refuse_overlap(opened)
    if request.cache:
        from medssl.datasets import cache

        opened = {split: cache.attach(data, request.cache, request.data) for split, data in opened.items()}
    return opened


def sample_contents(data: ImageDataset) -> str:
    """What the contents of `SAMPLED` images, spread over a split, are known by: their files' fingerprints, or pixels'.

    Of volumes, the size and the beginning of each file, for a whole one takes long to read.
    """
    prints = []
    for i in np.unique(np.linspace(0, len(data) - 1, SAMPLED).astype(int)):
        if hasattr(data.read, "fingerprint"):
            prints.append(data.read.fingerprint(data.positions[i]))
            continue
        try:
            found = data.read(data.positions[i])
        except UnreadableImage:
            prints.append("unreadable")
            continue
        if isinstance(found, np.ndarray):
            prints.append(digest(np.ascontiguousarray(found).tobytes()))
        else:
            prints += [_beginning(path) for path in files_in(found)]
    return digest("\n".join(prints).encode())


def sample_annotations(data: ImageDataset) -> list[str]:
    """What the annotations of those images are known by; none for a set without."""
    prints = []
    for i in np.unique(np.linspace(0, len(data) - 1, SAMPLED).astype(int)):
        try:
            prints += [digest(np.ascontiguousarray(part).tobytes()) for part in data.annotation(i)]
        except UnreadableImage:
            prints.append("unreadable")
    return prints


DETACHED = re.compile(rb"^(?:ElementDataFile *=|data ?file:) *([^\r\n]+)", re.MULTILINE)


def files_in(value: object) -> list[Path]:
    """The files of what a source of volumes gives: a path, or a tuple or dataclass that holds some.

    A folder stands for the slices in it, and a header (.mhd, .nhdr) also for the file with its voxels.
    """
    if isinstance(value, Path):
        if value.is_dir():
            return sorted(value.iterdir())
        if value.suffix.lower() in (".mhd", ".nhdr") and value.is_file():
            with open(value, "rb") as file:
                found = DETACHED.search(file.read(2**16))
            return [value, *([value.parent / os.fsdecode(found[1].strip())] if found else [])]
        return [value]
    parts = value if isinstance(value, tuple | list) else vars(value).values() if is_dataclass(value) else ()
    return [path for part in parts for path in files_in(part)]


def _beginning(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return f"{path.stat().st_size}:{digest(file.read(2**16))}"
    except OSError:
        return "missing"


def digest(content: bytes) -> str:
    """16 hexadecimal digits that tell contents apart."""
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def data_digest(splits: Mapping[str, ImageDataset], labels: bool = True) -> str:
    """What tells these images from others, wherever they lie: the splits' ids, labels, and samples of the contents, and
    of the masks where they are used."""
    parts = []
    for name, data in splits.items():
        known = b"" if data.labels is None or not labels else data.labels.numpy().tobytes()
        contents = sample_contents(data) if data.contents is None else data.contents
        masks = sample_annotations(data) if labels else []
        contents = digest("\n".join([contents, *masks]).encode()) if masks else contents
        parts += [name, "\n".join(data.ids), digest(known), contents]
    return digest("\0".join(parts).encode())


def request_of(args: argparse.Namespace) -> Request:
    """The request that a script's options make: `--dataset`, and every other field that the script has."""
    asked = {field.name for field in fields(Request)} & vars(args).keys()
    return Request(name=args.dataset, **{key: getattr(args, key) for key in asked})


def open_pretraining(args: argparse.Namespace, dims: Sequence[int] = (2, 3)) -> ImageDataset:
    """The training images that pre-training uses: the first `--ratio` of the list, as `parted` has it, without labels.

    Notes their digest in `args.data_digest`, by which a continuation knows them.

    Args:
        dims: dimensions that the method takes.
    """
    data = open_splits(request_of(args), ["train"], args.d)["train"]
    if data.info.dims not in dims:
        instead = "train_pcrl.py and train_pcrlv2.py take both"
        instead = "cut it with preprocess/slices.py" if data.info.name == "lits" else instead
        raise InputError(
            f"data set {data.info.name} has {data.info.dims} dimensions, and this method takes images of {dims[0]}; "
            + instead
        )
    first, rest = data.parted(args.ratio)
    if not first:
        raise InputError(f"--ratio {args.ratio:g}: leaves none of {len(data)} images")
    data = data.subset(first) if rest else data
    args.data_digest = data_digest({"train": data}, labels=False)
    return data


def split_for_validation(data: ImageDataset) -> tuple[ImageDataset, ImageDataset]:
    """Training images of a method that validates itself, and a fixed tenth of their patients that judge it.

    They come from what pre-training may see. A data set's own validation and test splits stay unseen.

    Raises:
        InputError: for fewer than two patients.
    """
    from medssl.datasets.lists import HELD_OUT, SPLIT_SEED, split_by_patient

    train, val = split_by_patient(data.patients or data.ids, HELD_OUT, SPLIT_SEED)
    if not train or not val:
        raise InputError(f"data set {data.info.name}: {len(data)} images of one patient; some must validate")
    return data.subset(train), data.subset(val)


def open_labelled(args: argparse.Namespace) -> dict[str, ImageDataset]:
    """The train, val and test splits of a labelled set, less the first `--ratio` of the training list.

    Notes their digest in `args.data_digest`, by which a continuation knows them.

    Raises:
        InputError: as `open_splits`, or when there is no label, or one class only, or a split's labels are all unknown.
    """
    splits = open_splits(request_of(args), ("train", "val", "test"), args.d)
    info = splits["train"].info
    if info.task is None or any(data.labels is None for data in splits.values()):
        raise InputError(f"--dataset {info.name}: has no labels, which this script needs; give --list")
    if info.task != "multi-label" and len(splits["train"].labels.unique()) < 2:
        raise InputError(f"--dataset {info.name}: all training images are of one class")
    for split, data in splits.items():
        if data.labels.is_floating_point() and not data.labels.isfinite().any():
            option = "--list" if split == "train" else f"--{split}-list"
            raise InputError(f"--dataset {info.name}: none of the labels of the {split} split is known; see {option}")
    first, rest = splits["train"].parted(getattr(args, "ratio", 0.0))
    if not rest:
        raise InputError(f"--ratio {args.ratio:g}: leaves no image to fine-tune on")
    if first:
        splits["train"] = splits["train"].subset(rest)
    args.data_digest = data_digest(splits)
    return splits


def refuse_overlap(splits: dict[str, ImageDataset]) -> None:
    """Raise InputError where two splits share an image or a patient."""
    names = list(splits)
    for a, first in enumerate(names):
        for second in names[a + 1 :]:
            for what in ("ids", "patients"):
                one, two = getattr(splits[first], what), getattr(splits[second], what)
                shared = set(one or ()) & set(two or ())
                if shared:
                    kind = "images" if what == "ids" else "patients"
                    raise InputError(
                        f"{first} and {second} share {len(shared)} {kind}, such as {min(shared)}; "
                        "splits must be disjoint: make them with preprocess/make_lists.py"
                    )
