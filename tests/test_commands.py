"""Published command lines: every row of docs/commands.md runs two steps on a copy of its data's layout."""

import importlib
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import test_chexpert
import test_detection
import test_luna_data
import test_medmnist
import test_segmentation2d
import torch
from PIL import Image
from test_segmentation import ball, write

from medssl.datasets import medmnist
from medssl.datasets.brats import MODALITIES
from medssl.datasets.pathology import NCT_CLASSES
from medssl.engine.checkpoint import load_safe
from medssl.models.encoders import make_encoder

ROOT = Path(__file__).parent.parent
ROWS = re.findall(r"^\| .* \| `(.*)` \|$", (ROOT / "docs" / "commands.md").read_text(), flags=re.M)
NOT_RUN = {  # tested elsewhere, for the reason that stands there
    "prepare_models.py": "downloads",
    "preprocess/luna.py": "scans of a size that takes minutes; tests/test_luna.py runs it on small ones",
}


def words_of(row):
    """The script, and its options."""
    script, *words = shlex.split(re.sub(r"^(?:python|torchrun .* --) ", "", row))
    return script, words


def value(words, *names):
    """Of an option, by any of its names."""
    return next((words[words.index(name) + 1] for name in names if name in words), None)


def noise(path, side=24, channels=3, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (side, side, 3) if channels == 3 else (side, side)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).save(path)


def chest(root):
    rows = ["Image Index,Finding Labels,Follow-up #,Patient ID"]
    names = [f"{patient:08d}_000.png" for patient in range(1, 31)]
    for number, name in enumerate(names):
        noise(root / "images" / name, channels=1, seed=number)
        rows.append(f"{name},{['No Finding', 'Hernia', 'Effusion'][number % 3]},0,{number + 1}")
    (root / "Data_Entry_2017_v2020.csv").write_text("\n".join(rows))
    (root / "train_val_list.txt").write_text("\n".join(names[:20]))
    (root / "test_list.txt").write_text("\n".join(names[20:]))
    return root


def nct(root):
    for part in ("NCT-CRC-HE-100K", "CRC-VAL-HE-7K"):
        for number, name in enumerate(NCT_CLASSES * 3):
            noise(root / part / name / f"{name}-{number}.png", seed=number)
    return root


def brats(root):
    for i in range(6):
        image, mask = ball((16, 16, 16), i, 4)
        for each in MODALITIES:
            write(root / f"case{i}" / f"case{i}_{each}.nii.gz", image)
        write(root / f"case{i}" / f"case{i}_seg.nii.gz", mask)
    return root


def one_medmnist(root, name):
    flag = medmnist.flag_of(name)
    info = medmnist._package().INFO[flag]
    root.mkdir()
    counts = (40, 20, 20)
    labels = {f"{split}_labels": (np.arange(n) % len(info["label"]))[:, None].astype(np.uint8)
              for split, n in zip(("train", "val", "test"), counts)}  # fmt: skip
    test_medmnist.write(root / f"{flag}.npz", info["n_channels"], counts=counts, **labels)
    return root


LAYOUTS = {
    "chest": chest,
    "nct": nct,
    "brats": brats,
    "luna": test_luna_data.make_pairs,
    "lits": lambda root: test_segmentation2d.slices(root, (1, 2)),
    "chexpert": test_chexpert.make,
    "drive": lambda root: test_segmentation2d.make(root, "drive"),
    "montgomery": lambda root: test_segmentation2d.make(root, "montgomery"),
    "shenzhen": lambda root: test_segmentation2d.make(root, "shenzhen"),
    "glas": test_detection.glas,
    "crag": test_detection.crag,
}


def weights(folder, arch="resnet50"):
    """A flat file of torchvision's names, as prepare_models.py and the published tools leave it."""
    folder.mkdir(exist_ok=True)
    torch.save(make_encoder(arch).state_dict(), folder / "barlowtwins.pth")
    return folder / "barlowtwins.pth"


# Two steps, on a CPU, of images and networks that are small enough.
FEW = {"--steps": "2", "--device": "cpu", "--workers": "0"}
SMALLER = {
    "train": {"--image-size": "32"},
    "train_concl": {"--image-size": "64"},  # whose concepts are places of a map
    "train_pcrlv2": {"--image-size": "32", "--local-size": "32"},
    "train_3d": {"--arch": "unet3d_quarter", "--cube-size": "16 16 8"},
    "train_pcrlv2_3d": {"--local-cube-size": "8 8 8"},
    "finetune_classification": {"--image-size": "32"},
    "finetune_segmentation": {"--image-size": "32"},
    "finetune_segmentation_3d": {"--patch": "8 8 8", "--arch": "unet3d_quarter"},
    "finetune_detection": {
        "--iterations": "2",
        "--sides": "64 64",
        "--test-side": "64",
        "--proposals": "20",
        "--samples": "8",
        "--warmup-iterations": "0",
        "--milestones": "1",
    },  # fmt: skip
}
LARGEST = 16  # images of a step
ONCE = {"--trial": "1", "--runs": "1"}  # in place of ten and five


def shortened(script, words):
    """The line with fewer and smaller images, and fewer repetitions."""
    name, volumes = script.removesuffix(".py"), value(words, "--d") == "3"
    words = list(words)
    for option in ("--gpus", "--arch", "--num_workers"):
        if option in words and (option != "--arch" or volumes):
            at = words.index(option)
            del words[at : at + 2]
    for option, low in ONCE.items():
        if option in words:
            words[words.index(option) + 1] = low
    for option in ("-b", "--b", "--batch_size", "--train_batch_size"):
        if option in words:
            words[words.index(option) + 1] = str(min(LARGEST, int(value(words, option))))
    more = dict(FEW)
    if name.startswith("train"):
        more |= SMALLER["train_3d"] if volumes else SMALLER["train"] | SMALLER.get(name, {})
        more |= SMALLER.get(f"{name}_3d", {}) if volumes else {}
    else:
        more |= SMALLER[f"{name}_3d" if volumes else name]
    if name == "finetune_detection":
        del more["--steps"]
        more["--b"] = "2"
    return words + [word for option, text in more.items() for word in (option, *text.split())]


def test_every_published_line_has_a_row():
    scripts = {words_of(row)[0] for row in ROWS}
    assert len(ROWS) == 34
    methods = ("c2l", "pcrl", "pcrlv2", "magical", "concl", "moco", "simclr", "byol", "densecl", "pcl")
    assert scripts >= {f"train_{name}.py" for name in methods}
    assert scripts >= {"prepare_models.py", "export_encoder.py", "preprocess/luna.py", "finetune_detection.py"}


FIRST = {words_of(row)[0]: row for row in reversed(ROWS)}  # of each script; the others run in make test-full


@pytest.mark.parametrize(
    "row", [pytest.param(row, marks=[pytest.mark.slow] * (row not in FIRST.values())) for row in ROWS]
)
def test_a_row_runs(row, tmp_path, monkeypatch):
    script, words = words_of(row)
    module = importlib.import_module("medssl." + script.removesuffix(".py").replace("/", "."))
    monkeypatch.chdir(tmp_path)
    if script in NOT_RUN:
        module.get_parser().parse_args(words)  # as the data of no test have their size, or it would download
        return
    files = weights(tmp_path / "P", "resnet50" if "barlowtwins" in words else "resnet18")
    if script == "export_encoder.py":
        for name in ("CHECKPOINT", "IN.pth"):
            files.rename(name) if name in words else None
        module.main(words)
        assert Path("WEIGHT_FILE").exists() or Path("O/encoder_detectron2.pkl").exists()
        return

    name = value(words, "--n", "--data_set", "--dataset").lower()
    make = LAYOUTS.get(name, lambda root: one_medmnist(root, name))
    at = words.index("--data") + 1
    words[at] = str(make(tmp_path / words[at]))
    if name == "brats":
        torch.save(
            {"state_dict": make_encoder("unet3d_quarter", 1, 3).state_dict()}, tmp_path / "P" / "barlowtwins.pth"
        )
    words = [str(files) if word in ("FILE", "WEIGHTS") else word for word in words]
    argv = shortened(script, words)
    module.main(argv)

    args = module.get_parser().parse_args(argv)
    if script.startswith("train"):
        output = Path(args.output if not getattr(args, "suffix", None) else f"{args.output}_{args.suffix}")
        assert load_safe(output / "last.pt")["step"] == 2
        assert (output / "encoder.pt").exists()
    else:
        output = Path(f"{args.output}_{args.run}" if isinstance(args.run, str) else args.output)
        assert (output / "results.json").exists()
        if "barlowtwins" in words:
            assert load_safe(output / "best.pt")["arch"] == "resnet50"  # the file's
