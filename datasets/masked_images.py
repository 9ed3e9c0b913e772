"""Images with masks."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from medssl.datasets.base import Files, ImageDataset, Info, to_texture
from medssl.errors import InputError, UnreadableImage
from medssl.reading.masks import read_mask

FUNDUS_BLACK = 35  # grey levels that the surroundings of a fundus reach, noise and JPEG's ripples included


class MaskedImages(ImageDataset):
    """Images with masks of K labels, which may overlap.

    An item of a set whose `segmented` is true has, beside the image's texture, "mask" (K, S, S) uint8, 255 inside, and
    "field" (1, S, S) uint8, 255 where the image is judged. A subclass gives `truth`.

    Attributes:
        mask_labels: names of the labels.
        tubular: whether they are trees of thin lines, whose centre lines are judged too.
        by_patient: whether a patient's images are one case (slices of a volume), whose Dice is that of all of them.
    """

    mask_labels: tuple[str, ...] = ()
    tubular = False
    by_patient = False
    segmented = False

    def case_of(self, i: int) -> str:
        """The case that image i is of, by which numbers are averaged."""
        return self.patients[i] if self.by_patient else self.ids[i]

    def truth(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Masks (K, H, W) and field of view (H, W) of image i at its own size, bool.

        Raises:
            UnreadableImage: for a mask that cannot be decoded or is of another size than its image.
        """
        raise NotImplementedError

    def annotation(self, i: int) -> tuple[np.ndarray, ...]:
        return self.truth(i) if self.segmented else ()

    def load(self, i: int) -> dict[str, Tensor]:
        item = super().load(i)
        if not self.segmented:
            return item
        masks, field = self.truth(i)
        height, width = item["size"].int().tolist()
        if masks.shape[1:] != (height, width) or field.shape != (height, width):
            raise UnreadableImage(f"its mask has {masks.shape[2]} × {masks.shape[1]} pixels, it has {width} × {height}")
        textures = [to_texture(mask * np.uint8(255), self.texture_size, 1) for mask in (*masks, field)]
        stacked = torch.from_numpy(np.concatenate(textures))
        return {**item, "mask": stacked[:-1], "field": stacked[-1:]}


def to_three_channels(pixels: np.ndarray) -> np.ndarray:
    """(H, W[, 3]) → (H, W, 3) uint8."""
    return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, 2)


class InstanceImages(MaskedImages):
    """Images in which every gland has a mask of its own. A subclass gives `instances`; as `MaskedImages`, all glands
    are one label.

    Where `detected` is true, an item is {"image" (3, H, W) uint8 at its own size, "instances" (H, W) int32}.
    """

    mask_labels = ("gland",)
    detected = False

    def load(self, i: int) -> dict[str, Tensor]:
        if not self.detected:
            return super().load(i)
        pixels, glands = to_three_channels(self.read(self.positions[i])), self.instances(i)
        if pixels.shape[:2] != glands.shape:
            sides = f"{glands.shape[1]} × {glands.shape[0]} pixels, it has {pixels.shape[1]} × {pixels.shape[0]}"
            raise UnreadableImage(f"its annotation has {sides}")
        image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        return {"image": image, "instances": torch.from_numpy(glands.astype(np.int32))}

    def instances(self, i: int) -> np.ndarray:
        """The glands of image i at its own size, (H, W) integers, 0 or the gland's number.

        Raises:
            UnreadableImage: for a file that cannot be decoded or is of another size than its image.
        """
        raise NotImplementedError

    def annotation(self, i: int) -> tuple[np.ndarray, ...]:
        return (self.instances(i),) if self.detected or self.segmented else ()

    def truth(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        glands = self.instances(i)
        return (glands > 0)[None], np.ones(glands.shape, bool)


@dataclass(frozen=True)
class ImageCase:
    """Files of an image.

    Attributes:
        id: path in `--data`.
        masks: of structures that are joined to one label; none where there is no mask.
        field: the field of view; None for everything.
        patient, label: the patient's name, and the class where there are two.
        part: "train" or "test", where the set is published in parts.
    """

    id: str
    image: Path
    masks: tuple[Path, ...] = ()
    field: Path | None = None
    patient: str = ""
    label: int | None = None
    part: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """What lists may call it."""
        return self.id, self.image.name, self.patient


class MaskFiles(MaskedImages):
    """Images and masks in files.

    Args:
        cases: of the split.
        values: in the masks' files of each of `names`, one or several; None for one label, all that is not 0.

    Attributes:
        allowed: all values that masks may have; None for any.
    """

    allowed: tuple[int, ...] | None = None

    def __init__(
        self,
        info: Info,
        cases: Sequence[ImageCase],
        names: Sequence[str],
        values: Sequence[Sequence[int]] | None = None,
        tubular: bool = False,
        texture_size: int = 512,
    ) -> None:
        labels = [case.label for case in cases]
        super().__init__(
            info, Files([case.image for case in cases]), [case.id for case in cases],
            None if None in labels else torch.tensor(labels), [case.patient for case in cases], texture_size,
        )  # fmt: skip
        self.cases, self.mask_labels, self.values, self.tubular = list(cases), tuple(names), values, tubular

    def truth(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        case = self.cases[self.positions[i]]
        found = [read_mask(path) for path in case.masks]
        if len({mask.shape for mask in found}) > 1:
            raise UnreadableImage(f"its masks {case.masks[0].name} differ in size")
        wrong = np.setdiff1d(found[0], self.allowed) if self.allowed is not None else ()
        if len(wrong):
            raise UnreadableImage(
                f"its mask has the value {wrong[0]}, and labels are {', '.join(map(str, self.allowed))}"
            )
        if self.values is None:
            masks = np.any(np.stack(found) > 0, 0)[None]
        else:
            masks = np.stack([np.isin(found[0], group) for group in self.values])
        if case.field is not None:
            field = read_mask(case.field) > 0
        elif self.tubular:
            field = fundus_field(self.read(self.positions[i]))
        else:
            field = np.ones(masks.shape[1:], bool)
        return masks, field


def fundus_field(pixels: np.ndarray) -> np.ndarray:
    """The field of view of a fundus photograph that comes without one, (H, W) bool: the largest part that is not
    black, its holes filled.

    Args:
        pixels: (H, W, 3) uint8.
    """
    parts, count = ndimage.label(pixels.max(-1) > FUNDUS_BLACK)
    if not count:
        return np.ones(pixels.shape[:2], bool)
    return ndimage.binary_fill_holes(parts == 1 + np.bincount(parts.ravel())[1:].argmax())


def matching_files(folder: Path, pattern: str) -> list[tuple[Path, re.Match]]:
    """Files of a folder whose names match, sorted."""
    found = ((path, re.fullmatch(pattern, path.name)) for path in sorted(folder.iterdir())) if folder.is_dir() else ()
    return [(path, match) for path, match in found if match]


def complete_cases(root: Path, cases: list[ImageCase], what: str) -> list[ImageCase]:
    """The cases; an InputError where there is none, or a mask's file is missing."""
    if not cases:
        raise InputError(f"--data {root}: no {what}")
    for case in cases:
        for path in (*case.masks, *([case.field] if case.field else [])):
            if not path.is_file():
                raise InputError(f"{case.image}: its mask {path} is missing; add it, or move the image away")
    return cases


def with_masks(splits: dict[str, MaskedImages]) -> dict[str, MaskedImages]:
    """The splits with masks in their items, less the images that have none."""
    kept = {}
    for split, data in splits.items():
        if isinstance(data, MaskFiles):
            there = [i for i, position in enumerate(data.positions) if data.cases[position].masks]
            if not there:
                raise InputError(f"data set {data.info.name}: no image for {split} has a mask")
            if len(there) < len(data):
                print(f"note: {len(data) - len(there)} images for {split} have no mask; left out", file=sys.stderr)
                data = data.subset(there)
        data.segmented, data.labels = True, None
        kept[split] = data
    return kept
