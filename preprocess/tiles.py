"""Cut a stained slide into tiles, with lists for pre-training and for three small tasks.

    python preprocess/get_samples.py --sample slide --save DIR
    python preprocess/tiles.py --slide DIR/slide/cmu_small_region.svs --output TILES
    python train_concl.py --data TILES --dataset folder --list TILES/train.txt --image-size 96 --output OUT
    python evaluate_features.py --data TILES --dataset folder --list TILES/stain_train.txt
        --val-list TILES/stain_valid.txt --test-list TILES/stain_test.txt --init random OUT/encoder.pt --image-size 96
        --margin 1 --output FEATURES

Any picture that training reads can be a slide, `.svs` and other pyramids of TIFF at their finest level. TILES gets
`tiles/Y_X.png`, named by their upper left corner in pixels, and

  train.txt                         the training tiles with some tissue, without labels
  tissue_{train,valid,test}.txt     0 background (less than 5 % of the pixels are tissue), 1 tissue (more than half)
  stain_{train,valid,test}.txt      of those with tissue, 0 the third with the least haematoxylin, 1 that with the most
  texture_{train,valid,test}.txt    of those full of tissue (nine tenths), among tiles of like stain: 0 the third where
                                    haematoxylin varies least from pixel to pixel at the scale of nuclei, 1 the most

The slide is divided into ten bands from top to bottom, of which two are for the test and one for validation. A tile
that lies in two bands is left out, so that no pixel is in two splits. Labels are computed, not a pathologist's: they
show whether features tell textures apart, nothing more.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from medssl.engine import options
from medssl.engine.options import Parser
from medssl.errors import InputError, run_script
from medssl.files import write_atomic
from medssl.locks import remove_abandoned
from medssl.reading.pictures import recognised
from medssl.reading.tables import write_list

BANDS = ("train", "train", "test", "train", "train", "valid", "train", "test", "train", "train")
COLOURED = 20  # grey levels between the largest and the smallest channel from which a pixel is tissue
BACKGROUND, TISSUE, FULL = 0.05, 0.5, 0.9  # shares of tissue
NUCLEI = (2, 8)  # standard deviations of the two Gaussians whose difference shows nuclei at 20×, pixels
GROUPS = 6  # of tiles of like stain
SPLITS = ("train", "valid", "test")


def read_slide(path: Path) -> np.ndarray:
    """A slide's finest level, (H, W, 3) uint8; an InputError for what is no image."""
    if not path.is_file():
        raise InputError(f"--slide {path}: no such file")
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # slides are large, not bombs
    try:
        with recognised(path) as image:
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
        raise InputError(f"--slide {path}: not an image that Pillow can read") from None
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def corners(height: int, width: int, side: int, stride: int) -> list[tuple[int, int, str]]:
    """Upper left corners (y, x) of the tiles inside one band, row by row, and their split."""
    edges = np.linspace(0, height, len(BANDS) + 1).round().astype(int)
    found = []
    for y in range(0, height - side + 1, stride):
        band = int(np.searchsorted(edges, y, side="right")) - 1
        if y + side <= edges[band + 1]:
            found += [(y, x, BANDS[band]) for x in range(0, width - side + 1, stride)]
    return found


def measure(tile: np.ndarray) -> tuple[float, float, float]:
    """The share of a tile's pixels that are tissue, and of these the haematoxylin: its mean, and the standard deviation
    of what is as large as nuclei in it. 0 where there is no tissue.

    Args:
        tile: (S, S, 3) uint8.
    """
    from scipy.ndimage import gaussian_filter
    from skimage.color import rgb2hed

    tissue = np.ptp(tile, axis=2) >= COLOURED
    if not tissue.any():
        return 0.0, 0.0, 0.0
    haematoxylin = rgb2hed(tile)[..., 0]
    fine, coarse = (gaussian_filter(haematoxylin, sigma) for sigma in NUCLEI)
    return float(tissue.mean()), float(haematoxylin[tissue].mean()), float((fine - coarse)[tissue].std())


def outer_thirds(values: np.ndarray) -> dict[int, int]:
    """Positions of the lowest third of the values, as 0, and of the highest, as 1."""
    if not len(values):
        return {}
    low, high = np.quantile(values, (1 / 3, 2 / 3))
    return {int(i): int(values[i] > high) for i in np.flatnonzero((values <= low) | (values > high))}


def lists_of(
    splits: Sequence[str], shares: np.ndarray, stains: np.ndarray, textures: np.ndarray
) -> dict[str, list[tuple[int, int | None]]]:
    """What each list holds: positions of tiles, and labels.

    Args:
        splits, shares, stains, textures: of each tile.
    """
    some, tissue, full = shares >= BACKGROUND, np.flatnonzero(shares > TISSUE), np.flatnonzero(shares > FULL)
    lists: dict[str, list[tuple[int, int | None]]] = {
        "train": [(i, None) for i, split in enumerate(splits) if split == "train" and some[i]]
    }
    labels = {
        "tissue": {i: int(shares[i] > TISSUE) for i in range(len(splits)) if shares[i] > TISSUE or not some[i]},
        "stain": {int(tissue[i]): label for i, label in outer_thirds(stains[tissue]).items()},
        "texture": {
            int(group[i]): label
            for group in np.array_split(full[np.argsort(stains[full])], GROUPS)
            for i, label in outer_thirds(textures[group]).items()
        },
    }
    for task, known in labels.items():
        for name in SPLITS:
            lists[f"{task}_{name}"] = [(i, label) for i, label in sorted(known.items()) if splits[i] == name]
    return lists


def get_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--slide", metavar="FILE", required=True, help="the image")
    parser.add_argument("--output", metavar="DIR", default="tiles", help="where tiles and lists go")
    parser.add_argument("--side", type=options.positive_int, default=96, help="of a tile, pixels")
    parser.add_argument("--stride", type=options.positive_int, default=48, help="from tile to tile, pixels")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    import torch

    args = get_parser().parse_args(argv)
    slide, output = read_slide(Path(args.slide)), Path(args.output)
    places = corners(*slide.shape[:2], args.side, args.stride)
    if not places:
        raise InputError(f"--side {args.side}: bands of {slide.shape[0] // len(BANDS)} pixels hold no tile of it")
    folder = output / "tiles"
    folder.mkdir(parents=True, exist_ok=True)
    remove_abandoned(output)
    names, measures = [], []
    for y, x, _ in places:
        tile = slide[y : y + args.side, x : x + args.side]
        measures.append(measure(tile))
        names.append(f"tiles/{y:06d}_{x:06d}.png")
        write_atomic(output / names[-1], Image.fromarray(tile).save)
    lists = lists_of([split for *_, split in places], *np.array(measures).T)
    if not lists["train"]:
        raise InputError(f"--slide {args.slide}: no tile has tissue, which is coloured")
    for name, members in lists.items():
        labels = [[label] for _, label in members if label is not None]
        write_list(
            output / f"{name}.txt", [names[i] for i, _ in members],
            torch.tensor(labels, dtype=torch.float32) if labels else None,
        )  # fmt: skip
        counts = "" if not labels else f", {sum(label for (label,) in labels)} of class 1"
        print(f"{output / name}.txt: {len(members)} tiles{counts}")


def cli() -> None:
    run_script(main, less="a machine with more")


if __name__ == "__main__":
    cli()
