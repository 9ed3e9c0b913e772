"""Detection and instance segmentation: Mask R-CNN's training, COCO's average precision, and what is written."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from medssl.datasets.masked_images import InstanceImages
from medssl.engine.batches import autocast, evaluation_batches, to_device, training_batches
from medssl.engine.method import Method
from medssl.engine.parallel import Devices, Run
from medssl.errors import InputError
from medssl.files import write_json
from medssl.tasks.coco import CATEGORY, annotations_of, average_precision, encode
from medssl.tasks.segmentation2d import file_names, panels, save_png
from medssl.tasks.trials import empty_folders, said
from medssl.views.draws import Draws
from medssl.views.of_images import DetectionViews

INSIDE = 0.5  # probability from which a pixel is of an instance
DRAWN = 0.5  # score from which an instance is drawn
SHOWN = 160  # side of the pictures of training, pixels


class Detector(Method):
    """Mask R-CNN, trained end to end with its five losses.

    Batch: "images", tensors (3, H, W) in [0, 1], and "targets", dicts with "boxes" (N, 4) left, top, right, bottom in
    pixels, "labels" (N,) and "masks" (N, H, W).
    """

    sync_batch_norm = True

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: dict, run: Run) -> dict[str, Tensor]:
        losses = self.network(batch["images"], batch["targets"])
        return {name.removeprefix("loss_"): loss.float() for name, loss in losses.items()}

    def pictures(self, batch: dict) -> dict[str, Tensor]:
        shown: dict[str, list[Tensor]] = {"view": [], "true": []}
        mean, std = (torch.tensor(t).view(3, 1, 1) for t in (self.network.transform.image_mean,
                                                             self.network.transform.image_std))  # fmt: skip
        for image, target in list(zip(batch["images"], batch["targets"]))[:8]:
            x = nn.functional.interpolate(image[None].cpu(), size=(SHOWN, SHOWN), mode="bilinear")[0]
            inside = target["masks"].cpu().amax(0, keepdim=True).float() if len(target["masks"]) else x[:1] * 0
            inside = nn.functional.interpolate(inside[None], size=(SHOWN, SHOWN), mode="nearest")[0]
            for name, picture in (("view", x), ("true", x * (0.4 + 0.6 * inside))):
                shown[name].append((picture - mean) / std)
        return {name: torch.stack(pictures) for name, pictures in shown.items()}


@torch.no_grad()
def measure_statistics(
    method: Detector, data: InstanceImages, views: DetectionViews, args: argparse.Namespace, devices: Devices, step: int
) -> None:
    """Replace the running statistics of batch norms by the means over `--precise-bn` batches of training, seen with the
    weights that are tested (precise BN, arXiv 2105.07576, §3; detectron2's TEST.PRECISE_BN).

    Args:
        method: trained. step: steps that it was trained for, from which the order of images goes on.
    """
    norms = [m for m in method.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d | nn.SyncBatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a mean of all batches, each counted alike
    method.train()
    views.train()
    rows = devices.own_rows(args.b)
    with training_batches(data, args, devices, rows, step, step + args.precise_bn) as batches:
        for i, batch in enumerate(batches, step):
            devices.seed_step(args.seed, i)
            draws = Draws((args.seed, i), args.b, rows.start, len(batch["index"]))
            with autocast(args, devices.device):
                method(views(to_device(batch, devices.device), draws), Run())
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum


def refuse_not_finite(_network: nn.Module, _inputs: tuple, maps: dict[str, Tensor]) -> None:
    """Raise InputError for maps that are not finite, in which torchvision would find nothing, and say nothing."""
    if not all(bool(torch.isfinite(m).all()) for m in maps.values()):
        raise InputError("the network's maps are not finite in evaluation; lower --lr, or leave out --amp")


@torch.inference_mode()
def predict(
    network: nn.Module, views: DetectionViews, data: InstanceImages, args: argparse.Namespace, devices: Devices
) -> Iterator[tuple[int, Tensor, np.ndarray, dict[str, np.ndarray]]]:
    """Find the instances of every readable image of a split.

    Yields:
        position in the split; the image (3, H, W) in [0, 1]; its true instances (H, W) integers; and what was found:
        "boxes" (N, 4) left, top, width, height in pixels, "scores" (N,), "masks" (N, H, W) bool.

    Raises:
        InputError: for outputs that are not finite.
    """
    network.eval()
    views.eval()
    check = network.backbone.register_forward_hook(refuse_not_finite)
    try:
        for batch in evaluation_batches(data, 1, args, devices):
            image = views(batch)["images"][0]
            with autocast(args, devices.device):
                (out,) = network([image])
            boxes = out["boxes"].float()
            boxes[:, 2:] -= boxes[:, :2]
            found = {"boxes": boxes, "scores": out["scores"].float(), "masks": out["masks"][:, 0].float() >= INSIDE}
            true = batch["instances"][0].cpu().numpy()
            yield int(batch["index"]), image, true, {name: value.cpu().numpy() for name, value in found.items()}
    finally:
        check.remove()


def evaluate(
    network: nn.Module,
    views: DetectionViews,
    data: InstanceImages,
    args: argparse.Namespace,
    devices: Devices,
    write: bool = False,
) -> dict:
    """`average_precision` of a split, and its "ap" of either kind as "ap_box" and "ap_mask".

    With `write`, leaves in `--output` predictions/instances.json, what was found in COCO's format,
    predictions/truth.json, and overlays/*.png of the first `--overlays` images.
    """
    folder, files = Path(args.output), file_names(data.ids)
    truth: dict = {"images": [], "annotations": [], "categories": [{"id": CATEGORY, "name": data.mask_labels[0]}]}
    results: list[dict] = []
    if write:
        empty_folders(folder)
    for number, (i, image, true, found) in enumerate(predict(network, views, data, args, devices)):
        height, width = true.shape
        truth["images"].append({"id": i, "file_name": data.ids[i], "height": height, "width": width})
        truth["annotations"] += annotations_of(true, i, len(truth["annotations"]) + 1)
        results += [
            {"image_id": i, "category_id": CATEGORY, "bbox": box.tolist(), "score": float(score),
             "segmentation": encode(mask)}
            for box, score, mask in zip(*found.values())
        ]  # fmt: skip
        if write and number < args.overlays:
            pixels = (image.permute(1, 2, 0).cpu().numpy() * 255).round().astype(np.uint8)
            numbers = np.unique(true[true > 0])
            drawn = found["masks"][found["scores"] >= DRAWN]
            save_png(folder / "overlays" / f"{files[i]}.png", panels(pixels, true == numbers[:, None, None], drawn))
    if write:
        (folder / "predictions").mkdir(parents=True, exist_ok=True)
        write_json(folder / "predictions" / "instances.json", results)
        write_json(folder / "predictions" / "truth.json", truth)
    precision = average_precision(truth, results)
    return {"ap_box": precision["box"]["ap"], "ap_mask": precision["mask"]["ap"], **precision}


def in_a_line(entry: dict) -> str:
    """A finished trial."""
    return f"AP of boxes {said(entry['ap_box'], 1)}, of masks {said(entry['ap_mask'], 1)}"
