"""Judge frozen encoders without fine-tuning: k nearest neighbours, a linear probe, and a picture of the features.

  python evaluate_features.py --init random runs/pcrlv2/encoder.pt --image-size 64 --output OUT      (no data, CPU)
  python evaluate_features.py --data DIR --dataset pneumoniamnist --init random imagenet OURS/encoder.pt --output OUT
  python evaluate_features.py --d 3 --arch unet3d_quarter --init random --output OUT                (volumes, CPU)
  python evaluate_features.py --data DIR --dataset chest --list train.txt --val-list valid.txt --test-list test.txt
      --init OURS/encoder.pt --gpus 0 --amp --output OUT

Several `--init` of one `--arch` stand side by side. Features are the last map's average over a centre view, or
over a whole volume.
The neighbours and the probe learn from the training split, the probe's C is chosen on the validation split, and
both are scored on the test split. Writes `features.json` and `embedding.png` (test images, t-SNE) to `--output`.
"""

import argparse
import math
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from torch import nn

from medssl import errors
from medssl.datasets import registry
from medssl.datasets.base import ImageDataset, Info
from medssl.engine import options
from medssl.engine.batches import CHANNELS_LAST, autocast, evaluation_batches
from medssl.engine.parallel import Devices, Run, setup
from medssl.engine.runs import describe, settings, versions
from medssl.errors import InputError
from medssl.files import write_atomic, write_json
from medssl.markup import figure_text, one_line
from medssl.models.encoders import default_arch, initialise, make_encoder
from medssl.models.heads import Averaged
from medssl.tasks.metrics import score, targets_of
from medssl.views.of_images import ClassificationViews
from medssl.views.of_volumes import VolumeClassificationViews

SPLITS = ("train", "val", "test")
B = {2: 256, 3: 16}  # images at a time
STRENGTHS = [10.0**e for e in range(-5, 3)]  # the probe's C, from strong to weak regularisation


@torch.inference_mode()
def extract(
    networks: Sequence[tuple[nn.Module, ClassificationViews | VolumeClassificationViews]],
    data: ImageDataset,
    args: argparse.Namespace,
    devices: Devices,
) -> tuple[list[np.ndarray], np.ndarray]:
    """Features of every readable image under every network; files are decoded once for all of them.

    Returns:
        for each network (N, C) float32, and the labels, (N,) or (N, L) as the data set has them.
    """
    run = Run(devices.device_ids)
    features: list[list[np.ndarray]] = [[] for _ in networks]
    labels = []
    for batch in evaluation_batches(data, args.b, args, devices):
        labels.append(batch["label"].cpu().numpy())
        for (network, views), rows in zip(networks, features):
            view = views(batch)["view"]  # in full precision, as in training
            with autocast(args, devices.device):
                rows.append(run(network, view).float().cpu().numpy())
    return [np.concatenate(rows) for rows in features], np.concatenate(labels)


def knn(train: np.ndarray, targets: np.ndarray, queries: np.ndarray, k: int, temperature: float = 0.07) -> np.ndarray:
    """Votes of the k training images of highest cosine similarity s, weighted by exp(s / temperature).

    (Wu et al., arXiv 1805.01978, §3.4, which is where the temperature comes from.)

    Args:
        train: (N, C) features, targets: (N, L) with NaN where not known, queries: (M, C) features.

    Returns:
        (M, L) shares of the votes; ½ where no neighbour's label is known.
    """
    bank = torch.nn.functional.normalize(torch.from_numpy(train), dim=1)
    known = torch.from_numpy(np.isfinite(targets).astype(np.float32))
    positive = torch.from_numpy(np.nan_to_num(targets).astype(np.float32))
    votes = []
    for part in torch.nn.functional.normalize(torch.from_numpy(queries), dim=1).split(1024):
        similarity, nearest = (part @ bank.T).topk(min(k, len(bank)))  # unreadable images may have left fewer
        # The largest is taken away first, so that the exponential stays in range.
        weight = torch.exp((similarity - similarity[:, :1]) / temperature)[..., None]
        yes, all_ = ((weight * t[nearest]).sum(1) for t in (positive, known))
        votes.append(torch.where(all_ > 0, yes / all_.clamp(min=1e-30), torch.full_like(yes, 0.5)))
    return torch.cat(votes).numpy()


def probe(train: np.ndarray, targets: np.ndarray, others: Sequence[np.ndarray], strength: float, info: Info) -> list:
    """Fit logistic regression on features (N, C).

    Returns:
        probabilities (M, L) for each array (M, C) of `others`; 0 for classes without a training image.
    """

    def fit(x: np.ndarray, y: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        model = LogisticRegression(C=strength, max_iter=500)
        with warnings.catch_warnings():
            # Weakly regularised fits need not converge; the validation split decides whether they are used.
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(x, y)
        return [(model.classes_, model.predict_proba(other)) for other in others]

    out = [np.zeros((len(other), targets.shape[1])) for other in others]
    if info.task == "multi-label":
        for column in range(targets.shape[1]):
            known = np.isfinite(targets[:, column])
            y = targets[known, column]
            if len(np.unique(y)) < 2:  # nothing to learn: the same answer for all
                for rows in out:
                    rows[:, column] = y[0] if len(y) else 0.5
                continue
            for rows, (_, p) in zip(out, fit(train[known], y)):
                rows[:, column] = p[:, 1]
    else:
        for rows, (classes, p) in zip(out, fit(train, targets.argmax(1))):
            rows[:, classes] = p
    return out


def linear_probe(features: dict[str, np.ndarray], targets: dict[str, np.ndarray], info: Info) -> dict:
    """Logistic regression on standardised features, its C chosen by the validation split's AUROC.

    Returns:
        the test split's `score`, with "C" and "validation" (that split's score).
    """
    mean, std = features["train"].mean(0), features["train"].std(0)
    train, val, test = ((features[split] - mean) / np.maximum(std, 1e-6) for split in SPLITS)
    best = None
    for strength in STRENGTHS:
        on_val, on_test = probe(train, targets["train"], (val, test), strength, info)
        validation = score(on_val, targets["val"], info)
        value = validation["accuracy"] if validation["auroc"] is None else validation["auroc"]
        value = -math.inf if value is None else value  # no label is known
        if best is None or value > best[0]:  # of equals, the most regularised
            best = (value, strength, validation, on_test)
    return {**score(best[3], targets["test"], info), "C": best[1], "validation": best[2]}


def embed(features: np.ndarray, limit: int, seed: int) -> tuple[np.ndarray, str]:
    """Two coordinates (N, 2) for features (N, C) and the way they were found: t-SNE, or PCA above `limit` images.

    Features that are all equal, as of a collapsed network, are all at 0.
    """
    n = len(features)
    if np.ptp(features, axis=0).max() <= 1e-5 * np.abs(features).max():  # t-SNE divides by their deviation
        return np.zeros((n, 2)), "all equal"
    reduced = PCA(min(50, n, features.shape[1]), random_state=seed).fit_transform(features)
    if n > limit or n < 5:
        return reduced[:, :2], "PCA"
    points = TSNE(perplexity=min(30, (n - 1) / 3), init="pca", random_state=seed).fit_transform(reduced)
    return points, "t-SNE"


def names_of(targets: np.ndarray, info: Info) -> np.ndarray:
    """What each image is coloured by, (N,) strings: its class, or "none" or "several" of many labels."""
    names = np.array([*info.classes, "none", "several"], dtype=object)
    positive = np.nan_to_num(targets)
    count = positive.sum(1)
    return names[np.where(count == 0, len(names) - 2, np.where(count > 1, len(names) - 1, positive.argmax(1)))]


def draw_embedding(
    panels: dict[str, np.ndarray], names: np.ndarray, info: Info, limit: int, seed: int, path: Path
) -> None:
    """One scatter plot for every entry of `panels`, title → features (N, C), coloured by `names` (N,)."""
    # Figure itself, not pyplot: no window system, nothing global.
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(panels), 4.8), layout="constrained")
    legend = [name for name in (*info.classes, "none", "several") if (names == name).any()]
    colours = colormaps["tab10" if len(legend) <= 10 else "tab20"].colors
    for axes, (title, features) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        points, way = embed(features, limit, seed)
        for i, name in enumerate(legend):
            chosen = points[names == name]
            axes.scatter(
                *chosen.T, s=8, linewidths=0, alpha=0.7, color=colours[i % len(colours)], label=figure_text(name)
            )
        axes.set(title=figure_text(title), xlabel=way, xticks=[], yticks=[])
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=6, markerscale=2)
    write_atomic(path, partial(figure.savefig, dpi=150))


def shorten(init: str, inits: Sequence[str]) -> str:
    """A title for an `--init`: as few of its path's last parts as tell it from the others."""
    parts = Path(init).parts
    for n in range(1, len(parts)):
        if sum(Path(other).parts[-n:] == parts[-n:] for other in inits) == 1:
            return "/".join(parts[-max(n, 2) :])
    return init


def get_parser() -> options.Parser:
    parser = options.Parser(__doc__)
    data = options.add_data(parser)
    options.add_evaluation_lists(data)
    options.add_own_options(data)
    options.add_runtime(parser)
    group = parser.add_argument_group("features")
    group.add_argument(
        "--arch",
        "--model",
        help="encoder: in 2D any name of segmentation-models-pytorch, by default resnet18; in 3D unet3d (the default), "
        "unet3d_half or unet3d_quarter",
    )
    group.add_argument(
        "--init",
        nargs="+",
        default=["random"],
        metavar="INIT",
        help="encoder weights to judge: random, imagenet, a file (FILE:PREFIX where it has several), or a model's name "
        "in --proxy-dir; several stand side by side",
    )
    options.add_proxy_folder(group)
    group.add_argument("--image-size", type=options.positive_int, default=224, help="side of an image's view, pixels")
    group.add_argument(
        "--margin",
        type=options.bounded_float(0.1, 1.0),
        default=0.875,  # 224/256, the usual evaluation crop
        help="side of the centre view as a share of the image's shorter side",
    )
    group.add_argument("--k", type=options.positive_int, default=20, help="neighbours that vote")
    group.add_argument(
        "--tsne-limit", type=options.non_negative_int, default=5000, help="above as many test images, PCA draws them"
    )
    group.add_argument(
        "--b", "--batch-size", "--batch_size", type=options.positive_int, help="images at a time: 256, volumes 16"
    )
    group.add_argument("--seed", type=options.non_negative_int, default=0, help="seed of random weights and of t-SNE")
    group.add_argument(
        "--output", type=options.filled, metavar="DIR", default="runs/features", help="where the results go"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    options.check_inits(args.init)
    devices = setup(args.gpus, args.device, args.deterministic)
    if not devices.alone:
        raise InputError("evaluate_features runs in one process; start it without torchrun, with --gpus for several")
    data = registry.open_labelled(args)
    info = data["train"].info
    args = options.complete(args, {"arch": default_arch(args.init, info.dims), "b": B[info.dims]})
    if args.k > len(data["train"]):
        raise InputError(f"--k {args.k}: the training split has only {len(data['train'])} images")

    networks, reports = [], []
    for init in args.init:
        torch.manual_seed(args.seed)
        encoder = make_encoder(args.arch, dims=info.dims)
        reports.append(initialise(encoder, args.arch, init))
        if args.compile:
            encoder.compile()
        network = Averaged(encoder).to(devices.device, memory_format=CHANNELS_LAST[info.dims]).eval()
        if info.dims == 3:
            views = VolumeClassificationViews(**reports[-1]["normalization"])
        else:
            views = ClassificationViews(**reports[-1]["normalization"], size=args.image_size, margin=args.margin)
        networks.append((network, views.to(devices.device).eval()))

    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    extracted, targets = {}, {}
    for split in SPLITS:
        extracted[split], labels = extract(networks, data[split], args, devices)
        targets[split] = targets_of(labels, info)

    results = []
    print(f"{'init':40} {'kNN acc':>8} {'AUROC':>7} {'probe acc':>10} {'AUROC':>7}")
    for i, (init, report) in enumerate(zip(args.init, reports)):
        features = {split: extracted[split][i] for split in SPLITS}
        if not all(np.isfinite(x).all() for x in features.values()):
            raise InputError(f"--init {init}: its features are not finite; with --amp, try --amp-dtype bf16")
        near = score(knn(features["train"], targets["train"], features["test"], args.k), targets["test"], info)
        linear = linear_probe(features, targets, info)
        results.append({"init": init, "matched_keys": report["matched"], "knn": near, "probe": linear})
        row = [math.nan if s[m] is None else s[m] for s in (near, linear) for m in ("accuracy", "auroc")]
        name = one_line(shorten(init, args.init))[-40:]
        print("{:40} {:8.4f} {:7.4f} {:10.4f} {:7.4f}".format(name, *row), flush=True)

    content = {
        "dataset": info.name,
        "task": info.task,
        "classes": list(info.classes),
        "images": {split: len(targets[split]) for split in SPLITS},
        "arch": args.arch,
        "features": int(extracted["test"][0].shape[1]),
        **({"image_size": args.image_size, "margin": args.margin} if info.dims == 2 else {}),
        "k": args.k,
        "seed": args.seed,
        "results": results,
        "versions": versions(),
        "device": describe(devices),
    }
    write_json(output / "config.json", settings(args, data.digest))
    write_json(output / "features.json", content)
    titles = [shorten(init, args.init) for init in args.init]
    panels = dict(zip(titles, extracted["test"]))
    draw_embedding(panels, names_of(targets["test"], info), info, args.tsne_limit, args.seed, output / "embedding.png")
    print(f"written: {output}/features.json, {output}/embedding.png")


def cli() -> None:
    errors.run_script(main)


if __name__ == "__main__":
    cli()
