"""COCO's format of instances, and its average precision, by pycocotools."""

import contextlib
import io
from collections.abc import Sequence

import numpy as np

CATEGORY = 1
AREAS = ((0, 32**2), (32**2, 96**2), (96**2, float("inf")))  # of small, medium and large instances, pixels
NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")


def annotations_of(instances: np.ndarray, image: int, first: int = 1) -> list[dict]:
    """The instances of an image as COCO's annotations.

    Args:
        instances: (H, W) integers, 0 or the instance's number.
        image: the image's number. first: of the annotations.

    Returns:
        dicts of plain values: "segmentation" in compressed run lengths, "bbox" x, y, width, height in pixels, "area".
    """
    from pycocotools import mask as coco

    made = []
    for number in np.unique(instances[instances > 0]):
        runs = encode(instances == number)
        made.append(
            {"id": first + len(made), "image_id": image, "category_id": CATEGORY, "iscrowd": 0,
             "bbox": coco.toBbox(runs).tolist(), "area": int(coco.area(runs)), "segmentation": runs}
        )  # fmt: skip
    return made


def encode(mask: np.ndarray) -> dict:
    """A bool mask (H, W) as compressed run lengths, plain values."""
    from pycocotools import mask as coco

    runs = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(n) for n in runs["size"]], "counts": runs["counts"].decode()}


def average_precision(truth: dict, found: Sequence[dict]) -> dict[str, dict[str, float | None]]:
    """COCO's average precision of boxes and of masks, ×100.

    Args:
        truth: "images", "annotations", "categories" in COCO's format.
        found: dicts of "image_id", "category_id", "bbox", "segmentation", "score".

    Returns:
        {"box", "mask"}: `NAMES` → average precision over IoU .5 to .95, at .5, at .75, and of small (below 32² pixels),
        medium and large (from 96² on) instances; None where the truth has none.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # it prints tables
        known = COCO()
        known.dataset = {"info": {}, **truth}
        known.createIndex()
        values: dict[str, dict[str, float | None]] = {}
        for name, kind in (("box", "bbox"), ("mask", "segm")):
            if not found:
                areas = [a["area"] for a in truth["annotations"]]
                there = [True, True, True, *(any(low <= a < high for a in areas) for low, high in AREAS)]
                values[name] = {key: 0.0 if areas and is_there else None for key, is_there in zip(NAMES, there)}
                continue
            # A mask's size is its own, not its box's, from which pycocotools takes it where there is one.
            left = {"bbox"} if kind == "segm" else set()
            results = [{key: value for key, value in each.items() if key not in left} for each in found]
            judge = COCOeval(known, known.loadRes(results), kind)
            judge.evaluate()
            judge.accumulate()
            judge.summarize()
            values[name] = {key: None if v < 0 else 100 * float(v) for key, v in zip(NAMES, judge.stats[: len(NAMES)])}
    return values
