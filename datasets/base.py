"""What a data set is.

A data set is an `ImageDataset`: a *source* that decodes image number i to uint8, with ids, labels and
patients beside it. Files, MedMNIST arrays and phantoms differ in their source alone; sets whose items are
something else than a picture, such as volumes, override `load`.
"""

import copy
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from medssl.errors import InputError, UnreadableImage
from medssl.files import digest, existing_folder
from medssl.reading.pictures import read_image
from medssl.views.ops3d import CUBE_SIZE


@dataclass(frozen=True)
class Info:
    """What is known of a data set before an image is read.

    Attributes:
        name: the name given to `--dataset`.
        dims: spatial dimensions of an image, 2 or 3.
        channels: 1 (grey) or 3 (colour).
        task: "multi-label", "binary" or "multi-class", or None for unlabelled images.
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
        weights: where the images are candidates for a finding in scans, how many candidates of the scan each stands
            for, (whole set's images,) float; FROC curves count by it. None for other images.
        scans: the scan of each candidate, of the whole set's, by which FROC curves count too; or None.
        order: the patients, one an image, of the list that the split was taken from, in its order, where `--ratio`
            parts that list between patients; None where it parts the split between two images.
        contents: what `sample_contents` said of the split when it was opened.
        digest: what tells the data that were opened together, all their splits, from others; None for a data set that
            was not opened by its name.
        prepared: whether an item has cubes that were cut before, not a volume to cut them out of.
        cached: gives the texture's item of a position from a cache, which then is not decoded; or None.
    """

    weights: np.ndarray | None = None
    scans: Sequence[str] | None = None
    order: Sequence[str] | None = None
    contents: str | None = None
    digest: str | None = None
    prepared = False
    whole = 0  # files of all splits together, where they are known
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

    @property
    def files(self) -> int:
        """Files of the data set, against which unreadable ones are judged: of all its splits, as far as it has any."""
        return self.whole or len(set(self.ids))

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
                item = self.load(i)
            except UnreadableImage as error:
                bad.append(f"{self.ids[i]}: {error}")
                continue
            label = {} if self.labels is None else {"label": self.labels[i]}
            return {**item, "index": i, "bad": bad, **label}
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


def collate(items: list[dict]) -> dict:
    """Stack items into a batch; tensors of differing shapes and `bad` become lists."""
    bad = [name for item in items for name in item.pop("bad")]
    batch: dict = {"bad": bad}
    for key in items[0]:
        values = [item[key] for item in items]
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
        masks: whether images with masks are asked for, to be segmented: a folder's are found otherwise than its images.
        labels: values of a folder's masks that are segmented; None for all.
        spacing: mm between voxels to which volumes with masks are resampled, 0 for their own; None for the set's.
        window: stored values (HU) that become 0 and 1 in volumes with masks; None for the set's.
        view: which views of CheXpert; None for its default.
        uncertain: what CheXpert's uncertain labels become in training; None for its default.
        series: of a generated set: which of its series of images.
        crop_mm: exact sizes of the cubes that are cut out of volumes; None for the published ones.
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
    masks: bool = False
    labels: Sequence[int] | None = None
    spacing: Sequence[float] | None = None
    window: Sequence[float] | None = None
    view: str | None = None
    uncertain: str | None = None
    series: int = 0
    crop_mm: Sequence[float] | None = None

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

    def resolve_grid(self) -> tuple[int, int, int] | None:
        """Voxels to which volumes of many shapes are resampled: twice the views' shape, so that crops keep detail; None
        where crops have sizes in mm, which a grid might not show."""
        if self.crop_mm:
            return None
        x, y, z = self.cube_size or CUBE_SIZE
        return 2 * x, 2 * y, 2 * z

    def path(self) -> Path:
        """`--data`, an existing file or folder."""
        if self.data is None:
            raise InputError(f"--dataset {self.name} needs --data")
        path = Path(self.data)
        if not path.exists():
            raise InputError(f"--data {self.data}: no such file or folder")
        return path

    def folder(self) -> Path:
        """`--data`, an existing folder."""
        return existing_folder(self.path())


class Files:
    """The source of a data set of files: image i is decoded from `paths[i]`."""

    def __init__(self, paths: Sequence[str | Path]) -> None:
        self.paths = list(paths)

    def __call__(self, index: int) -> np.ndarray:
        return read_image(self.paths[index])

    def fingerprint(self, index: int, content: bool = True) -> str:
        """The file's size in bytes and, with `content`, a digest of them; "missing" where it cannot be read."""
        try:
            if not content:
                return str(os.stat(self.paths[index]).st_size)
            with open(self.paths[index], "rb") as file:
                everything = file.read()
        except OSError:
            return "missing"
        return f"{len(everything)}:{digest(everything)}"
