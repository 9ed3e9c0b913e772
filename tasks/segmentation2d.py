"""Segmentation of images: a 2D U-Net on any encoder, prediction at the image's own size, what is measured inside the
field of view, and what is written."""

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from medssl.datasets.base import Info
from medssl.datasets.masked_images import MaskedImages, to_three_channels
from medssl.engine import options
from medssl.engine.batches import autocast, evaluation_batches
from medssl.engine.method import Method
from medssl.engine.parallel import Devices, Run
from medssl.errors import InputError
from medssl.files import write_atomic
from medssl.losses.segmentation import binary_dice_cross_entropy
from medssl.models.encoders import INPUTS
from medssl.models.unet2d import UNet2d
from medssl.tasks.segmentation import (
    Segmentation,
    all_finite,
    counts,
    dice,
    hausdorff95,
    sliding_window,
    summarise_cases,
)
from medssl.tasks.trials import empty_folders, said
from medssl.views.of_images import SegmentationViews, Views

VESSELS = {"image_size": 512, "b": 4, "loss": "bce", "flip": "both"}  # size and loss of MAGICAL's DRIVE
LUNGS = {"image_size": 224, "b": 16, "loss": "bce", "flip": "horizontal"}  # size and loss of MAGICAL's Montgomery
MAGICAL = {  # its main_segmentation.py, engine.py and dataloader.py: images are resized, and not changed otherwise
    "arch": "resnet50", "b": 32, "lr": 1e-2, "schedule": "constant", "optimizer": "adam", "epochs": 200, "patience": 30,
    "epoch_steps": 1, "loss": "bce", "augment": "none", "flip": "none", "rotation": 0.0,
}  # fmt: skip
PROTOCOLS = {  # by the name that a data set's row has
    "vessels": VESSELS,
    "lungs": LUNGS,
    "lits": {"image_size": 512, "b": 4, "loss": "bce+dice", "flip": "none"},
    "phantom2d": {"image_size": 64, "b": 16, "loss": "bce+dice", "flip": "horizontal"},
    "folder": {"image_size": 256, "b": 8, "loss": "bce+dice", "flip": "horizontal"},
    # The rate's schedule is made there, and never stepped (segmentation_engine). Adam's averages are torch's defaults.
    "magical-drive": MAGICAL | {"image_size": 512, "betas": [0.9, 0.999], "normalization": "imagenet"},
    # segmentation_engine_0506, in [0, 1].
    "magical-montgomery": MAGICAL | {"image_size": 224, "betas": [0.9, 0.99], "normalization": "none"},
}
PUBLISHED = ("magical-drive", "magical-montgomery")
LOSSES = ("bce", "dice", "bce+dice")
FLIPS = {"none": (False, False), "horizontal": (True, False), "both": (True, True)}
OPTIONS = {"image_size": None, "flip": None, "rotation": 10.0}  # of images alone, and their defaults
SIDES = 1  # numbers of --patch
THRESHOLD = 0.5
MEASURES = ("dice", "auroc", "sensitivity", "specificity", "cldice", "hd95")
COLOURS = ((255, 60, 60), (60, 200, 60), (80, 120, 255), (255, 200, 40), (220, 80, 255), (40, 220, 220))
GREATEST_SIDE = 1024  # of a panel of an overlay, pixels


class ImageSegmenter(Method):
    """A 2D U-Net trained with binary cross-entropy, soft Dice, or both, for labels that may overlap.

    Batch: "view" (B, 3, H, W) normalised, "target" (B, K, H, W) and "field" (B, 1, H, W), 0 or 1.
    """

    def __init__(self, network: nn.Module, loss: str) -> None:
        super().__init__()
        self.network, self.loss = network, loss

    def forward(self, batch: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        logits = run(self.network, batch["view"])
        return binary_dice_cross_entropy(logits, batch["target"], batch["field"], self.loss)

    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        # Views are normalised; so that masks come out black and white, they go from dark to bright of the same.
        dark, bright = batch["view"].amin(), batch["view"].amax()
        shades = {"true": batch["target"], "predicted": self.network(batch["view"][:8]).sigmoid()}
        shown = {name: dark + (bright - dark) * mask.amax(1, keepdim=True) for name, mask in shades.items()}
        return {"view": batch["view"]} | {name: mask.expand(-1, 3, -1, -1) for name, mask in shown.items()}


# Evaluation ----------------------------------------------------------------------------------------


@torch.inference_mode()
def predict(
    network: nn.Module, views: SegmentationViews, data: MaskedImages, args: argparse.Namespace, devices: Devices
) -> Iterator[tuple[int, np.ndarray]]:
    """Segment every readable image of a split: resized as in training, in windows as large as training's patches.

    Yields:
        position in the split, and the probabilities (K, H, W) float32 at the image's own size.
    """
    network.eval()
    views.eval()
    run = Run(devices.device_ids)

    def probabilities(windows: Tensor) -> Tensor:
        with autocast(args, devices.device):
            return all_finite(run(network, windows).float()).sigmoid()

    whole = views.patch == views.size
    for batch in evaluation_batches(data, args.eval_b if whole else 1, args, devices):
        images = views(batch)["view"]
        window = (views.patch, views.patch)
        found = (
            probabilities(images)
            if whole
            else sliding_window(probabilities, images[0], window, args.overlap, args.eval_b)[None]
        )
        for i, probability, size in zip(batch["index"].tolist(), found, batch["size"].int().tolist()):
            full = F.interpolate(probability[None], size=size, mode="bilinear", antialias=True)[0]
            yield i, full.cpu().numpy()


def judge(
    image: str,
    case: str,
    probability: np.ndarray,
    masks: np.ndarray,
    field: np.ndarray,
    names: Sequence[str],
    tubular: bool = False,
    everything: bool = True,
) -> list[dict]:
    """A row for each label of an image, all measured inside the field of view.

    Args:
        probability: (K, H, W). masks: (K, H, W) bool. field: (H, W) bool.
        tubular: measure clDice too. everything: not Dice alone.

    Returns:
        rows of "image", "case", "region", `MEASURES` (None where undefined; the distance in pixels) and `COUNTS`.
    """
    rows = []
    for name, p, t in zip(names, probability, masks):
        found, true = (p >= THRESHOLD) & field, t & field
        count, inside = counts(found, true), int(field.sum())
        row = {"image": image, "case": case, "region": name, **dict.fromkeys(MEASURES), "dice": dice(count), **count}
        if everything:
            positive, shared = count["true"], count["shared"]
            negative, wrong = inside - positive, count["predicted"] - shared
            if positive and negative:
                row["auroc"] = float(roc_auc_score(t[field], p[field]))
            row["sensitivity"] = shared / positive if positive else None
            row["specificity"] = 1 - wrong / negative if negative else None
            row["cldice"] = centreline_dice(found, true) if tubular else None
            row["hd95"] = hausdorff95(found, true, (1, 1))
        rows.append(row)
    return rows


def centreline_dice(predicted: np.ndarray, true: np.ndarray) -> float | None:
    """clDice (Shit et al., CVPR 2021, arXiv 2003.07311, Eq. 1 and 2): the harmonic mean of the share of the predicted
    centre line inside the true mask and of the true centre line inside the predicted one.

    Args:
        predicted, true: (H, W) bool.

    Returns:
        in [0, 1]; 0 where one mask is empty, None where both are.
    """
    from skimage.morphology import skeletonize

    if not predicted.any() and not true.any():
        return None
    if not predicted.any() or not true.any():
        return 0.0
    lines = skeletonize(predicted), skeletonize(true)
    precision, sensitivity = (line[mask].sum() / line.sum() for line, mask in zip(lines, (true, predicted)))
    both = precision + sensitivity
    return float(2 * precision * sensitivity / both) if both else 0.0


def file_names(ids: Sequence[str]) -> list[str]:
    """A file's name for each image: its path in one word, without the extension where that is enough."""
    short = [Path(identity).with_suffix("").as_posix().replace("/", "_") for identity in ids]
    again = {name for name, count in Counter(short).items() if count > 1}
    return [f"{name}_{i}" if name in again else name for i, name in enumerate(short)]


def label_map(found: np.ndarray) -> np.ndarray:
    """(K, H, W) bool → (H, W) uint8: 255 inside the one label, or the number of one of several, from 1 on: where they
    overlap of the last, which is the inner one where they are nested (LiTS' tumours in the liver)."""
    if len(found) == 1:
        return found[0] * np.uint8(255)
    numbers = np.zeros(found.shape[1:], np.uint8)
    for number, mask in enumerate(found, 1):
        numbers[mask] = number
    return numbers


def panels(pixels: np.ndarray, masks: np.ndarray, found: np.ndarray) -> np.ndarray:
    """The image, with the true masks and with the predicted ones, side by side, (h, 3·w, 3) uint8."""
    shown = [pixels]
    for several in (masks, found):
        painted = pixels.astype(np.float32)
        for number, mask in enumerate(several):
            colour = np.array(COLOURS[number % len(COLOURS)], np.float32)
            painted[mask] = 0.4 * painted[mask] + 0.6 * colour
        shown.append(painted.astype(np.uint8))
    image = Image.fromarray(np.concatenate(shown, 1))
    shrink = max(1.0, max(pixels.shape[:2]) / GREATEST_SIDE)
    return np.asarray(image.resize([round(n / shrink) for n in image.size], Image.Resampling.BOX))


def save_png(path: Path, pixels: np.ndarray) -> None:
    """Write an image, making its folder."""
    write_atomic(path, Image.fromarray(pixels).save)


class ImageSegmentation(Segmentation):
    """Segmentation of images."""

    protocols, published, losses, normalizations = PROTOCOLS, PUBLISHED, LOSSES, tuple(INPUTS)
    options, sides, measures = OPTIONS, SIDES, MEASURES
    what, augments = "images", ("full", "none")
    since = 2  # decoders began with torch's defaults, whose deviation is 2.45 times smaller

    def add_options(self, group: argparse._ArgumentGroup) -> None:
        """Size of images, and how training mirrors and turns them."""
        group.add_argument("--image-size", type=options.positive_int, help="side to which images are resized, pixels")
        group.add_argument("--flip", choices=tuple(FLIPS), help="how images are mirrored in training")
        group.add_argument("--rotation", type=options.non_negative, help="largest rotation of images, degrees; 10")

    def check(self, args: argparse.Namespace) -> None:
        """Raise InputError for patches that are larger than the image."""
        if args.patch and args.patch[0] > args.image_size:
            raise InputError(f"--patch {args.patch[0]}: larger than --image-size {args.image_size}")
        if args.patch and args.augment == "none":
            raise InputError("--augment none: shows whole images; leave --patch out")

    def make_network(self, args: argparse.Namespace, data: MaskedImages) -> UNet2d:
        """The network, with random weights."""
        return UNet2d(args.arch, len(data.mask_labels))

    def inputs(self, name: str) -> dict:
        """What a `--normalization` other than "weights" brings inputs to, as `initialise` returns it."""
        return INPUTS[name]

    def make_views(self, args: argparse.Namespace, normalization: dict) -> SegmentationViews:
        """Random parts in training, whole images in evaluation."""
        return SegmentationViews(
            **normalization, size=args.image_size, patch=args.patch[0] if args.patch else None,
            degrees=args.rotation, flips=FLIPS[args.flip], augment=args.augment == "full",
        )  # fmt: skip

    def make_method(self, args: argparse.Namespace, network: nn.Module, data: MaskedImages) -> Method:
        """What trains the network."""
        return ImageSegmenter(network, args.loss)

    def described(self, args: argparse.Namespace, info: Info) -> dict:
        """What a network's file says of its input, beside what it always says."""
        return {"channels": 3, **{key: getattr(args, key) for key in ("image_size", "patch")}}

    def regions_of(self, data: MaskedImages) -> tuple[str, ...]:
        """Names of what is judged: each label."""
        return data.mask_labels

    def validate(
        self, network: nn.Module, views: Views, data: MaskedImages, args: argparse.Namespace, devices: Devices
    ) -> dict:
        """What chooses the epoch: the mean Dice at the images' own size, 0 where there is none."""
        rows = []
        for i, probability in predict(network, views, data, args, devices):
            truth = data.truth(i)
            rows += judge(data.ids[i], data.case_of(i), probability, *truth, data.mask_labels, everything=False)
        found = summarise_cases(rows, self.regions_of(data), MEASURES)["dice"]
        return {"score": found or 0.0, "val_dice": found}

    def test(
        self, network: nn.Module, views: Views, data: MaskedImages, args: argparse.Namespace, devices: Devices
    ) -> dict:
        """`summarise_cases` of a split, with its rows as "cases".

        Leaves in `--output` predictions/*.png at the images' own size, 255 inside or, of several labels, their numbers
        from 1 on, and overlays/*.png of the first `--overlays` images.
        """
        folder, rows, files = Path(args.output), [], file_names(data.ids)
        empty_folders(folder)
        for number, (i, probability) in enumerate(predict(network, views, data, args, devices)):
            masks, field = data.truth(i)
            rows += judge(data.ids[i], data.case_of(i), probability, masks, field, data.mask_labels, data.tubular)
            name = f"{files[i]}.png"
            found = (probability >= THRESHOLD) & field
            save_png(folder / "predictions" / name, label_map(found))
            if number < args.overlays:
                pixels = to_three_channels(data.read(data.positions[i]))
                save_png(folder / "overlays" / name, panels(pixels, masks & field, found))
        return {**summarise_cases(rows, self.regions_of(data), MEASURES), "cases": rows}

    def in_a_line(self, entry: dict) -> str:
        """A finished trial."""
        return f"Dice {said(entry['dice'])}, AUROC {said(entry['auroc'])}"
