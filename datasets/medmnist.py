"""MedMNIST: sets of small labelled images and volumes, read from `<flag>.npz` with the splits they come with.

Names, tasks and classes are those of the `medmnist` package, which is imported only here.

Volumes are stored slice by slice: the first stored axis is z, the last x. Which end of an axis is the patient's left,
back or head is not recorded, nor is the spacing: axes are kept as they run, and a voxel counts as 1 mm.
"""

import re
import shutil
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from medssl.datasets.base import ImageDataset, Info, Request, volume_item
from medssl.errors import InputError, UnreadableImage
from medssl.files import write_atomic
from medssl.reading.arrays import names_in, read_npz

FLAGS = (
    *("pathmnist", "chestmnist", "dermamnist", "octmnist", "pneumoniamnist", "retinamnist", "breastmnist"),
    *("bloodmnist", "tissuemnist", "organamnist", "organcmnist", "organsmnist"),
    *("organmnist3d", "nodulemnist3d", "adrenalmnist3d", "fracturemnist3d", "vesselmnist3d", "synapsemnist3d"),
)
LICENCES = dict.fromkeys(FLAGS, "CC BY 4.0") | {"dermamnist": "CC BY-NC 4.0"}
SIZES = {2: (28, 64, 128, 224), 3: (28, 64)}
SPLITS = ("train", "val", "test")
TASKS = {
    "multi-label, binary-class": "multi-label",
    "binary-class": "binary",
    "multi-class": "multi-class",
    "ordinal-regression": "multi-class",  # grades, scored as classes by MedMNIST too
}


class MedMnistVolumes(ImageDataset):
    """Volumes; items as `base.volume_item` says."""

    def load(self, i: int) -> dict[str, Tensor]:
        """Volume i without its label."""
        volume = torch.from_numpy(self.read(self.positions[i]).transpose(2, 1, 0) / np.float32(255))
        return volume_item(volume, volume.shape)


def _package():
    """The `medmnist` package, imported late: it takes a second, and other data sets do not need it."""
    try:
        import medmnist
    except ImportError:
        raise InputError("MedMNIST names need the medmnist package: pip install medmnist") from None
    return medmnist


def flag_of(name: str) -> str | None:
    """The MedMNIST flag that a name stands for.

    Args:
        name: a flag in any case, such as `PneumoniaMNIST`, with or without a size, such as `pathmnist_64`.

    Returns:
        The flag in lower case, with `_64`, `_128` or `_224` where the name has one, or None for other names.

    Raises:
        InputError: for a size that MedMNIST does not have.
    """
    match = re.fullmatch(r"([a-z]+mnist(?:3d)?)(?:_(\d+))?", name.lower())
    if match is None or match[1] not in FLAGS:
        return None
    flag, size = match[1], int(match[2] or 28)
    sizes = SIZES[dims_of(flag)]
    if size not in sizes:
        raise InputError(f"--dataset {name}: MedMNIST has the sizes {', '.join(map(str, sizes))}")
    # `pathmnist_28` keeps its size too: a bare flag takes what the folder has.
    return f"{flag}_{size}" if match[2] else flag


def evaluate(name: str, probabilities: np.ndarray, targets: np.ndarray) -> dict[str, float | None]:
    """The numbers of the package's own evaluator, which published results are given in.

    Args:
        name: of a data set; others than MedMNIST's have no such numbers.
        probabilities: (N, L). targets: (N, L) 0 or 1; of classes, one-hot.

    Returns:
        {"medmnist_auc", "medmnist_acc"}, None where a class is missing; {} for other sets.
    """
    flag = flag_of(name)
    if flag is None:
        return {}
    from medmnist.evaluator import getACC, getAUC

    task = _package().INFO[flag.partition("_")[0]]["task"]
    known = targets.any(0) & ~targets.all(0)
    truth = targets if TASKS[task] == "multi-label" else targets.argmax(1)
    auc = float(getAUC(truth, probabilities, task)) if known.all() else None
    return {"medmnist_auc": auc, "medmnist_acc": float(getACC(truth, probabilities, task))}


def dims_of(flag: str) -> int:
    """Spatial dimensions of the set of a flag."""
    return 3 if flag.endswith("3d") else 2


def open_splits(request: Request, splits: Sequence[str]) -> dict[str, ImageDataset]:
    """Open splits of a MedMNIST set.

    Args:
        request: `name` is from `flag_of`; `data` is the .npz file or a folder that holds it. Without `data`,
            MedMNIST's own folder is searched, and then its download tried.
        splits: names among "train", "val" and "test".

    Returns:
        Data sets whose ids are `split/number` and whose labels are int64 class numbers (N,), or float
        (N, L) for the multi-label set. The arrays stay uint8; only the splits asked for are read.

    Raises:
        InputError: for a missing, truncated or different file, for a list, or when the download fails.
    """
    if request.lists:
        raise InputError(f"--list: {request.name} has splits of its own; leave the list out")
    flag, _, size = request.name.partition("_")
    row = _package().INFO[flag]
    path = _locate(request, flag, int(size) if size else None)
    classes = tuple(row["label"][str(i)] for i in range(len(row["label"])))
    task, channels = TASKS[row["task"]], row["n_channels"]
    opened = {}
    for split in splits:
        if split not in SPLITS:
            raise InputError(f"{request.name} has the splits {', '.join(SPLITS)}, not {split}")
        images, raw = _arrays(path, split)
        side = images.shape[1]
        if size and side != int(size):
            raise InputError(f"{path}: images of {side} pixels, but --dataset {request.name} asks for {size}")
        dims = dims_of(flag)
        if images.shape[1:] != (*[side] * dims, *([3] if channels == 3 else [])):
            raise InputError(f"{path}: {split}_images has shape {images.shape}, which is not {flag}'s")
        info = Info(request.name, dims, channels, task, classes, side)
        opened[split] = (ImageDataset if dims == 2 else MedMnistVolumes)(
            info,
            images.__getitem__,
            [f"{split}/{i:05d}" for i in range(len(images))],
            _labels(raw, info, f"{path}: {split}_labels"),
            texture_size=request.resolve_texture(info),
        )
    return opened


def _arrays(path: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, S, S[, 3]) uint8 and labels (N, L) of one split; other members are not decompressed."""
    keys = (f"{split}_images", f"{split}_labels")
    try:
        arrays = read_npz(path, keys)
        missing = next((key for key in keys if key not in arrays), None)
        if missing:
            found = ", ".join(names_in(path)[:6]) or "nothing"
            raise InputError(f"{path}: no {missing} in it, only {found}; is it a MedMNIST file?")
    except UnreadableImage as error:
        raise InputError(f"{path}: {error}; if it was downloaded, download it again") from None
    images, labels = (arrays[key] for key in keys)
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or labels.ndim not in (1, 2):
        raise InputError(f"{path}: {split}_images is {images.dtype} {images.shape}; uint8 pictures are needed")
    if len(images) != len(labels):
        raise InputError(f"{path}: {split} has {len(images)} images but {len(labels)} labels")
    return images, labels.reshape(len(labels), -1)


def _labels(raw: np.ndarray, info: Info, where: str) -> Tensor:
    """Labels (N, L) as the registry wants them; an InputError for values that the set does not have."""
    if info.task == "multi-label":
        columns, top = len(info.classes), 1
    else:
        columns, top = 1, len(info.classes) - 1
    if raw.shape[1] != columns:
        raise InputError(f"{where} has {raw.shape[1]} columns, {info.name} has {columns}")
    if raw.size and not np.isin(raw, np.arange(top + 1)).all():
        raise InputError(f"{where} has values outside 0 to {top}; is it another set than {info.name}?")
    if info.task == "multi-label":
        return torch.from_numpy(raw.astype(np.float32))
    return torch.from_numpy(raw[:, 0].astype(np.int64))


def _file_name(flag: str, size: int) -> str:
    """MedMNIST's name of a file: the size is left out where it is 28."""
    return f"{flag}.npz" if size == 28 else f"{flag}_{size}.npz"


def _locate(request: Request, flag: str, size: int | None) -> Path:
    """The .npz file of a request, downloaded where there is no `--data` and MedMNIST's folder lacks it."""
    sizes = SIZES[dims_of(flag)] if size is None else (size,)
    names = [_file_name(flag, each) for each in sizes]
    if request.data:
        path = request.path()
        if path.is_file():
            return path
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise InputError(f"--data {path}: no {' or '.join(names)} in it")
        return found[0]
    _package()
    from medmnist import info

    root = Path(info.DEFAULT_ROOT or Path.home() / ".medmnist")
    for name in names:
        if (root / name).is_file():
            return root / name
    _download(flag, size or 28, root)
    return root / names[0]


def _download(flag: str, size: int, root: Path) -> None:
    """Let the medmnist package download a file to `root`, and check it; an InputError when it cannot."""
    name = _file_name(flag, size)
    package = _package()
    print(f"downloading {name} to {root}")
    root.mkdir(parents=True, exist_ok=True)
    # Into a folder of its own first: an interrupted download must not be taken for the file later.
    with tempfile.TemporaryDirectory(dir=root) as folder:
        try:
            getattr(package, package.INFO[flag]["python_class"])("val", download=True, root=folder, size=size)
        except (RuntimeError, OSError, ValueError, AttributeError):
            raise InputError(
                f"--dataset {flag}: {name} could not be downloaded; are you offline? Fetch it from "
                f"{package.HOMEPAGE} and give --data FILE, or put it into {root}"
            ) from None
        write_atomic(root / name, partial(shutil.move, Path(folder) / name))
