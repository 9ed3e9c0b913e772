"""How much of a segmentation of volumes frozen encoders hold: logistic regression, voxel by voxel, on all their maps.

  python benchmarks/frozen_voxels.py --init random OUT/encoder.pt --data DIR --dataset folder --arch unet3d_quarter
      --annotation-percent 3.6

A voxel's features are those of every level of the encoder there, enlarged to the volume's size (hypercolumns,
Hariharan et al., CVPR 2015). The regression learns from `--voxels` of the labelled volumes of a draw, as fine-tuning
has them: as many of each volume and label, where there are so many. It is judged by the mean Dice of the validation
volumes; the test volumes are not read. Norms take the statistics of the volume that they see, as random weights have
none of their own. Further options are those of finetune_segmentation.py that say which data are read, what is labelled
of them, and the network; those of its training change nothing.
"""

import argparse
import json
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from medssl import finetune_segmentation
from medssl.benchmarks.lab import SEARCH, mean_of
from medssl.benchmarks.machine import describe_machine
from medssl.datasets.base import ImageDataset
from medssl.engine import options
from medssl.engine.batches import evaluation_batches
from medssl.engine.parallel import Devices, setup
from medssl.errors import InputError, run_script
from medssl.files import append_text
from medssl.models.encoders import initialise_unet
from medssl.tasks import trials
from medssl.tasks.segmentation import counts, dice
from medssl.train_mae import STRIDE
from medssl.views.of_volumes import VolumeSegmentationViews


@torch.inference_mode()
def columns(encoder: nn.Module, x: Tensor) -> np.ndarray:
    """Features of every voxel, (N, C) float32, of a normalised volume (1, channels, X, Y, Z), N = X·Y·Z."""
    shape = x.shape[2:]
    # Sides become multiples of the encoder's stride, by repeating the last voxels.
    x = F.pad(x, [p for side in shape[::-1] for p in (0, -side % STRIDE[3])], mode="replicate")
    maps = [F.interpolate(level, size=x.shape[2:], mode="trilinear") for level in encoder(x)]
    own = torch.cat(maps, 1)[0][:, : shape[0], : shape[1], : shape[2]]
    return own.flatten(1).T.cpu().numpy()


def voxels(
    encoder: nn.Module, views: VolumeSegmentationViews, data: ImageDataset, args: argparse.Namespace, devices: Devices
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each volume's `columns`, and its label numbers (N,)."""
    for batch in evaluation_batches(data, 1, args, devices):
        seen = views(batch)
        yield columns(encoder, views.normalise(seen["view"])), seen["target"].flatten().cpu().numpy()


def judge(args: argparse.Namespace, splits: dict[str, ImageDataset], init: str, draw: int, devices: Devices) -> float:
    """The mean Dice over validation volumes and labels, of a draw of the labelled ones."""
    kind = finetune_segmentation.BY_DIMS[3]
    labelled = trials.labelled_subset(splits["train"], args.annotation_percent, draw)
    torch.manual_seed(draw)
    network = kind.make_network(args, labelled)
    start = initialise_unet(network, args.arch, init, "encoder")
    views, encoder = kind.make_views(args, start["normalization"]).eval(), network.encoder.to(devices.device).train()
    count = len(labelled.mask_labels)
    most = max(1, args.voxels // (len(labelled) * count))  # of each label of a volume
    generator, features, labels = np.random.default_rng(draw), [], []
    for x, y in voxels(encoder, views, labelled, args, devices):
        kept = np.concatenate([generator.permutation(np.flatnonzero(y == label))[:most] for label in range(count)])
        features.append(x[kept])
        labels.append(y[kept])
    x, y = np.concatenate(features), np.concatenate(labels)
    mean, std = x.mean(0), np.maximum(x.std(0), 1e-6)
    model = LogisticRegression(C=args.c, max_iter=100).fit((x - mean) / std, y)
    found = []
    for x, y in voxels(encoder, views, splits["val"], args, devices):
        predicted = model.predict((x - mean) / std)
        found += [dice(counts(predicted == label, y == label)) for label in range(1, count)]
    return float(np.nanmean([np.nan if value is None else value for value in found]))


def get_parser() -> options.Parser:
    parser = options.Parser(__doc__)
    group = parser.add_argument_group("what is judged")
    group.add_argument("--init", nargs="+", default=["random"], help="as in fine-tuning; gains are over the first")
    group.add_argument("--draws", type=options.positive_int, default=3, help="of the labelled volumes")
    group.add_argument("--voxels", type=options.positive_int, default=144000, help="that the regression learns from")
    group.add_argument(
        "--c", type=options.bounded_float(1e-9, 1e9), default=0.01, help="inverse strength of the regression's penalty"
    )
    group.add_argument("--rows", metavar="FILE", help="a line of JSON for each init is added to it")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    own, rest = get_parser().parse_known_args(argv)
    options.check_inits(own.init)
    parser = finetune_segmentation.get_parser()
    args = parser.parse_args(rest)
    devices = setup(args.gpus, args.device, args.deterministic)
    splits = finetune_segmentation.open_data(args)
    if splits.info.dims != 3:
        raise InputError(f"--dataset {splits.info.name}: has images, not volumes")
    args = finetune_segmentation.complete(args, splits["train"], parser.given(rest))
    args = argparse.Namespace(**{**vars(args), "voxels": own.voxels, "c": own.c})
    first = None
    for init in own.init:
        found = [judge(args, splits, init, draw, devices) for draw in range(SEARCH, SEARCH + own.draws)]
        first = first or found
        gain = "" if found is first else f", gain {mean_of([a - b for a, b in zip(found, first)], '+')}"
        print(f"{init}: Dice {mean_of(found)}{gain}", flush=True)
        if own.rows:
            machine = describe_machine()
            row = {"init": init, "dice": found, "options": rest, "commit": machine["commit"], "date": machine["date"]}
            row |= {"cpu": machine["cpu"], "torch": machine["packages"]["torch"]}
            append_text(own.rows, json.dumps(row) + "\n")


if __name__ == "__main__":
    run_script(main)
