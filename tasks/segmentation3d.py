"""Segmentation of volumes: the 3D U-Net on random patches, sliding windows over whole volumes, masks in the scan's own
geometry."""

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from scipy import ndimage
from torch import Tensor, nn

from medssl.datasets.base import ImageDataset, Info
from medssl.datasets.masked_volumes import SegmentationVolumes
from medssl.engine import options
from medssl.engine.batches import autocast, evaluation_batches
from medssl.engine.method import Method
from medssl.engine.parallel import Devices, Run
from medssl.engine.view_options import AXES_HELP, MIRRORS, flips_of
from medssl.errors import InputError
from medssl.files import write_atomic
from medssl.losses.segmentation import dice_cross_entropy, region_dice_cross_entropy, tversky
from medssl.models.encoders import width_of
from medssl.models.unet3d import NORMS, DeepUNet3d, UNet3d
from medssl.reading.geometry import AXES
from medssl.reading.volumes import write_image
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
from medssl.views.of_images import Views
from medssl.views.of_volumes import VolumeSegmentationViews

PROTOCOLS = {
    # LiTS and BraTS: patches as large as 24 GiB hold at batch 2 × 2; the published LiTS windows have 64 slices.
    "lits": {"patch": [128, 128, 64], "b": 2, "patches": 2, "largest_component": True},
    "brats": {"patch": [96, 96, 96], "b": 2, "patches": 2, "largest_component": False},
    "phantom3d": {"patch": [48, 48, 32], "b": 4, "patches": 1, "largest_component": False},
    "folder": {"patch": [64, 64, 32], "b": 2, "patches": 4, "largest_component": False},
    # PCRLv2's finetune.py, utils.py and datasets/bratsDataset.py. There, the way up sees no maps of the way down, the
    # middle of each validation volume chooses the epoch by its loss, and the epochs are the user's.
    "pcrlv2-brats": {
        "patch": [112, 128, 112], "b": 4, "patches": 1, "foreground": 0.0, "largest_component": False,
        "norm": "group", "loss": "bce+dice", "augment": "flips", "normalization": "unit", "optimizer": "adam",
        "lr": 1e-4, "schedule": "step", "milestones": [50, 100, 150, 200, 250, 300, 350], "gamma": 0.5,
        "epoch_steps": 1,
    },
    # PCRLv2's MICCAI-LITS2017 (parameter.py, train_ds.py). There, a window is a whole slice at half its size, which a
    # first convolution halves again, with dropout, and only 20 slices beside the liver train.
    "pcrlv2-lits": {
        "patch": [128, 128, 64], "b": 4, "patches": 1, "foreground": 0.0, "largest_component": True,
        "norm": "group", "loss": "tversky", "augment": "none", "normalization": "unit", "optimizer": "adam",
        "lr": 1e-4, "schedule": "constant", "epochs": 500, "epoch_steps": 1,
    },
}  # fmt: skip
PUBLISHED = ("pcrlv2-brats", "pcrlv2-lits")
LOSSES = ("ce+dice", "bce+dice", "tversky")  # the first unless given, which runs have without a name
OF_REGIONS = LOSSES[1:]  # an output for each region; else for each label
NORMALIZATIONS = ("z", "unit")
CHANGES = {  # what training changes of patches beside mirroring, by `--augment`
    "full": {},
    "flips": {"scale": 0, "degrees": 0, "blur": 0, "noise": 0, "log_gamma": 0, "contrast": 0},
}
CHANGES["none"] = CHANGES["flips"]
OPTIONS = {  # of volumes alone
    "patches": None, "foreground": 0.5, "largest_component": None, "norm": "batch", "mirror": None,
}  # fmt: skip
DEEP, DECAY, DECAY_EPOCHS = 0.33, 0.8, 40  # weight of deep supervision, and its decay (PCRLv2's train_ds.py)
SIDES = 3  # numbers of --patch
MEASURES = ("dice", "hd95")
THRESHOLD = 0.5


class VolumeSegmenter(Method):
    """A 3D U-Net trained with cross-entropy and Dice.

    Batch: "view" (B, C, *S) normalised, and "target" (B, *S) int64 label numbers.
    """

    def __init__(self, network: nn.Module, labels: int) -> None:
        super().__init__()
        self.network, self.labels = network, labels

    def forward(self, batch: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        return dice_cross_entropy(run(self.network, batch["view"]), batch["target"])

    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        predicted = self.network(batch["view"]).argmax(1)
        shades = {"true": batch["target"], "predicted": predicted}
        return {"view": batch["view"][:, :1]} | {k: v[:, None] / (self.labels - 1) for k, v in shades.items()}


class RegionSegmenter(Method):
    """A 3D U-Net with an output for each region, which may overlap, trained as PCRLv2 fine-tunes: with Dice and binary
    cross-entropy, or with the Tversky loss, at every level of the way up, where the network gives several.

    L = tversky(fine) + α Σ tversky(coarser), α = 0.33, times 0.8 every 40 epochs.

    Batch: "view" (B, C, *S) normalised, and "target" (B, *S) int64 label numbers.
    """

    def __init__(self, network: nn.Module, regions: Sequence[Sequence[int]], labels: int, loss: str, epochs: float):
        super().__init__()
        self.network, self.loss, self.epochs, self.labels = network, loss, epochs, labels
        table = torch.zeros(labels, len(regions))
        for number, region in enumerate(regions):
            table[list(region), number] = 1
        self.register_buffer("table", table)
        self.register_buffer("alpha", torch.tensor(DEEP))

    def forward(self, batch: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        target = self.table[batch["target"]].movedim(-1, 1)  # (B, R, *S)
        logits = run(self.network, batch["view"])
        if self.loss == "bce+dice":
            return region_dice_cross_entropy(logits, target)
        fine, *coarser = logits
        return {"tversky": tversky(fine, target), "deep": self.alpha * sum(tversky(y, target) for y in coarser)}

    def after_step(self, progress: float) -> None:
        self.alpha.fill_(DEEP * DECAY ** int(progress * self.epochs / DECAY_EPOCHS))

    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        predicted = self.network(batch["view"]).sigmoid().amax(1)
        true = (batch["target"] > 0).float()
        return {"view": batch["view"][:, :1], "true": true[:, None], "predicted": predicted[:, None]}


def labels_of(probabilities: np.ndarray, regions: Sequence[Sequence[int]]) -> np.ndarray:
    """Label numbers from probabilities of regions, (R, *S) → (*S) uint8.

    Where regions lie in each other, a voxel is of the innermost that has it, and so of all around it, and gets the
    label that no region further in has; where they exclude each other, it is of the most probable.
    """
    labels, surest = (np.zeros(probabilities.shape[1:], kind) for kind in (np.uint8, np.float32))
    for number in sorted(range(len(regions)), key=lambda r: -len(regions[r])):
        own = set(regions[number])
        inner = [set(other) for other in regions if set(other) < own]
        rivals = not inner and not any(own < set(other) for other in regions)
        found = (probabilities[number] >= THRESHOLD) & (probabilities[number] > surest * rivals)
        labels[found] = min(own.difference(*inner) or own)
        surest[found] = probabilities[number][found]
    return labels


# Evaluation ----------------------------------------------------------------------------------------


@torch.inference_mode()
def predict(
    network: nn.Module, views: VolumeSegmentationViews, data: ImageDataset, args: argparse.Namespace, devices: Devices
) -> Iterator[tuple[int, dict, np.ndarray]]:
    """Segment every readable volume of a split.

    Yields:
        position in the split, the batch of one, and the labels (*S) uint8 on its voxels.
    """
    network.eval()
    views.eval()
    run = Run(devices.device_ids)
    exclusive = args.loss not in OF_REGIONS

    def probabilities(windows: Tensor) -> Tensor:
        with autocast(args, devices.device):
            logits = all_finite(run(network, views.normalise(windows)).float())
            return logits.softmax(1) if exclusive else logits.sigmoid()

    for batch in evaluation_batches(data, 1, args, devices):
        volume = views(batch)["view"][0]
        found = sliding_window(probabilities, volume, views.patch, args.overlap, args.eval_b)
        if exclusive:
            labels = found.argmax(0).to(torch.uint8).cpu().numpy()
        else:
            labels = labels_of(found.cpu().numpy(), list(regions_of(data).values()))
        yield int(batch["index"]), batch, largest_component(labels) if args.largest_component else labels


def largest_component(labels: np.ndarray) -> np.ndarray:
    """Labels with everything set to background that does not hang together (by faces) with the largest structure."""
    parts, count = ndimage.label(labels > 0)
    if count < 2:
        return labels
    largest = 1 + np.bincount(parts.ravel())[1:].argmax()
    return np.where(parts == largest, labels, 0).astype(labels.dtype)


def regions_of(data: ImageDataset) -> dict[str, tuple[int, ...]]:
    """What is judged: name → labels. Sets that say nothing else have each label but the background."""
    alone = {name: (i,) for i, name in enumerate(data.mask_labels) if i > 0}
    return getattr(data, "regions", alone)


def region_mask(labels: np.ndarray, region: Sequence[int]) -> np.ndarray:
    """Where uint8 labels are of a region, bool."""
    table = np.zeros(256, bool)
    table[list(region)] = True
    return table[labels]


def judge(
    case: str, predicted: np.ndarray, true: np.ndarray, regions: dict, spacing: Sequence[float] | None = None
) -> list[dict]:
    """A row for each region of a case: Dice, voxels, and with a `spacing` the 95 % Hausdorff distance in mm."""
    rows = []
    for name, region in regions.items():
        p, t = region_mask(predicted, region), region_mask(true, region)
        count = counts(p, t)
        distance = None if spacing is None else hausdorff95(p, t, spacing)
        rows.append({"case": case, "region": name, "dice": dice(count), "hd95": distance, **count})
    return rows


def write_alone(path: Path, labels: np.ndarray, spacing: Sequence[float]) -> None:
    """Write labels (X, Y, Z) of a volume that has no file: in the patient's axes, from the origin on."""
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(np.ascontiguousarray(labels.transpose(2, 1, 0)))
    image.SetSpacing(tuple(spacing))
    image.SetDirection(AXES)
    write_image(image, path)


def overlay(
    image: np.ndarray,
    true: np.ndarray,
    predicted: np.ndarray,
    spacing: Sequence[float],
    names: Sequence[str],
    path: Path,
) -> None:
    """Draw the axial, coronal and sagittal slice with most of the true mask: true labels above, predicted ones below.

    The patient's left is on the right of axial and coronal slices, the front on the left of sagittal ones; the front
    is up in axial slices, the head in the others. A millimetre is as long in every direction.

    Args:
        image: (X, Y, Z), axes to the patient's left, back and head.
        true, predicted: (X, Y, Z) labels, numbers of `names`.
        spacing: mm between voxels.
    """
    shown = true if true.any() else predicted
    extent = np.multiply(image.shape, spacing)
    low, high = np.percentile(image, (0.5, 99.5))
    planes = {"axial": (0, 1), "coronal": (0, 2), "sagittal": (1, 2)}  # axes across and down
    width, height = sum(extent[a] for a, _ in planes.values()), max(extent[b] for _, b in planes.values())
    figure = Figure(figsize=(10, 1 + 20 * height / width), layout="constrained")
    panels = figure.subplots(2, 3, width_ratios=[extent[a] for a, _ in planes.values()])
    for column, (name, (a, b)) in enumerate(planes.items()):
        across = 3 - a - b
        amount = (shown > 0).sum((a, b))
        at = int(amount.argmax()) if amount.any() else image.shape[across] // 2
        for axes, mask, title in zip(panels[:, column], (true, predicted), ("true", "predicted")):
            frame = {"extent": (0, extent[a], 0, extent[b]), "origin": "lower", "aspect": "equal"}
            axes.imshow(image.take(at, across).T, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), **frame)
            cut = mask.take(at, across).T
            colours = np.zeros((*cut.shape, 4))
            for label in range(1, len(names)):
                colours[cut == label] = _colour(label)
            axes.imshow(colours, interpolation="nearest", **frame)
            axes.set_title(f"{name}, {title}", fontsize=9)
            axes.set_axis_off()
            if name == "axial":
                axes.invert_yaxis()
    present = [label for label in range(1, len(names)) if (true == label).any() or (predicted == label).any()]
    if present:
        handles = [Patch(color=_colour(label), label=names[label]) for label in present]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(present)), fontsize=8)
    write_atomic(path, partial(figure.savefig, dpi=110))


def _colour(label: int) -> tuple[float, float, float, float]:
    return (*colormaps["tab10"]((label - 1) % 10)[:3], 0.45)


class VolumeSegmentation(Segmentation):
    """Segmentation of volumes."""

    protocols, published, losses, normalizations = PROTOCOLS, PUBLISHED, LOSSES, NORMALIZATIONS
    options, sides, measures = OPTIONS, SIDES, MEASURES
    what, augments = "volumes", tuple(CHANGES)

    def add_options(self, group: argparse._ArgumentGroup) -> None:
        """Norms of the network, and how training cuts patches out of volumes and mirrors them."""
        group.add_argument("--norm", choices=tuple(NORMS), help="norms of the 3D U-Net; batch unless given")
        group.add_argument(
            "--mirror", choices=MIRRORS,
            help=f"axes along which training mirrors volumes: {AXES_HELP}; xyz unless given, with --augment none none. "
            "Leave out those that tell labels apart",
        )  # fmt: skip
        group.add_argument("--patches", type=options.positive_int, help="patches of each of the --b volumes of a step")
        group.add_argument("--foreground", type=options.fraction, help="share of patches around a label; 0.5")
        group.add_argument(
            "--largest-component", action=argparse.BooleanOptionalAction,
            help="keep one structure of each predicted volume",
        )  # fmt: skip

    def check(self, args: argparse.Namespace) -> None:
        """Raise InputError for patches that the network cannot take."""
        options.check_sides("--patch", args.patch)
        if args.norm == "instance" and max(args.patch) < 16:
            raise InputError(
                "--norm instance: one voxel is left of this --patch in the deepest level; make a side 16 or more"
            )

    def make_network(self, args: argparse.Namespace, data: ImageDataset) -> UNet3d:
        """The network, with random weights: an output for each label, or for each region where these may overlap."""
        shape = {"channels": data.info.channels, "width": width_of(args.arch), "norm": args.norm}
        if args.loss not in OF_REGIONS:
            return UNet3d(len(data.mask_labels), **shape)
        outputs = len(self.regions_of(data))
        return DeepUNet3d(outputs, **shape) if args.loss == "tversky" else UNet3d(outputs, **shape)

    def inputs(self, name: str) -> dict:
        """What a `--normalization` other than "weights" brings inputs to, as `initialise` returns it."""
        return {"kind": name}

    def make_views(self, args: argparse.Namespace, normalization: dict) -> VolumeSegmentationViews:
        """Random patches in training, whole volumes in evaluation."""
        flips = flips_of(args.mirror or ("none" if args.augment == "none" else "xyz"))
        own = {"flips": flips, "patches": args.patches, **CHANGES[args.augment], **normalization}
        return VolumeSegmentationViews(args.patch, args.foreground, **own)

    def make_method(self, args: argparse.Namespace, network: nn.Module, data: ImageDataset) -> Method:
        """What trains the network."""
        if args.loss not in OF_REGIONS:
            return VolumeSegmenter(network, len(data.mask_labels))
        regions = list(self.regions_of(data).values())
        return RegionSegmenter(network, regions, len(data.mask_labels), args.loss, args.epochs)

    def described(self, args: argparse.Namespace, info: Info) -> dict:
        """What a network's file says of its input, beside what it always says."""
        own = ("norm", "patch", "spacing", "window", "loss")
        return {"channels": info.channels, **{key: getattr(args, key) for key in own}}

    def outputs(self, args: argparse.Namespace, data: ImageDataset) -> dict:
        """Which outputs a network has, where these are not its labels: regions, name → labels, each a sigmoid."""
        if args.loss not in OF_REGIONS:
            return {}
        return {"regions": {name: list(labels) for name, labels in self.regions_of(data).items()}}

    def regions_of(self, data: ImageDataset) -> dict[str, tuple[int, ...]]:
        """What is judged, as `regions_of` says."""
        return regions_of(data)

    def validate(
        self, network: nn.Module, views: Views, data: ImageDataset, args: argparse.Namespace, devices: Devices
    ) -> dict:
        """What chooses the epoch, on the voxels that the network sees: the Dice of `summarise_cases`, 0 for none."""
        regions, rows = self.regions_of(data), []
        for i, batch, labels in predict(network, views, data, args, devices):
            rows += judge(data.ids[i], labels, batch["mask"][0].cpu().numpy(), regions)
        found = summarise_cases(rows, regions, MEASURES)["dice"]
        return {"score": found or 0.0, "val_dice": found}

    def test(
        self, network: nn.Module, views: Views, data: ImageDataset, args: argparse.Namespace, devices: Devices
    ) -> dict:
        """`summarise_cases` of a split, with its rows as "cases", measured on the voxels of the scans' files.

        Leaves in `--output` predictions/*.nii.gz in the files' geometry, and overlays/*.png of the first `--overlays`
        cases.
        """
        folder = Path(args.output)
        regions, rows = self.regions_of(data), []
        empty_folders(folder)
        for i, batch, labels in predict(network, views, data, args, devices):
            image, true = batch["image"][0, 0].cpu().float().numpy(), batch["mask"][0].cpu().numpy()
            spacing = tuple((batch["size"][0] / torch.tensor(true.shape)).tolist())
            if len(rows) < args.overlays * len(regions):
                overlay(image, true, labels, spacing, data.mask_labels, folder / "overlays" / f"{data.ids[i]}.png")
            path = folder / "predictions" / f"{data.ids[i]}.nii.gz"
            if isinstance(data, SegmentationVolumes):
                labels, true, spacing = data.restore(i, labels)
                data.write(path, i, labels)
            else:
                write_alone(path, labels, spacing)
            rows += judge(data.ids[i], labels, true, regions, spacing)
        return {**summarise_cases(rows, regions, MEASURES), "cases": rows}

    def in_a_line(self, entry: dict) -> str:
        """A finished trial."""
        return f"Dice {said(entry['dice'])}, 95 % Hausdorff {said(entry['hd95'], 1)} mm"
