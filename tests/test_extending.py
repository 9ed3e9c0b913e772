"""A method and a data set cost what docs/extending.md says: both are added from that page, to a copy."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
METHOD, DATA_SET = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8").split("\n## A data set\n")
LEFT_OUT = shutil.ignore_patterns(".*", "runs", "*.egg-info", "__pycache__", "build")


def blocks(page, language, fence="```"):
    return re.findall(rf"^{fence}{language}\n(.*?)^{fence}$", page, flags=re.M | re.S)


class Copy:
    """A copy of the checkout, and what runs in it."""

    def __init__(self, folder):
        self.root = folder / "medssl"
        shutil.copytree(ROOT, self.root, ignore=LEFT_OUT)
        self.before = self.files()

    def files(self):
        paths = (path for path in self.root.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        return {path.relative_to(self.root).as_posix(): path.read_bytes() for path in paths}

    def changed(self):
        """Files that are new, or other than they were."""
        return {name for name, content in self.files().items() if self.before.get(name) != content}

    def insert(self, name, before, text):
        """Put text in front of the only place where `before` stands."""
        content = (self.root / name).read_text(encoding="utf-8")
        assert content.count(before) == 1
        (self.root / name).write_text(content.replace(before, text + before), encoding="utf-8")

    def call(self, *words):
        env = os.environ | {"PYTHONPATH": str(self.root.parent), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *map(str, words)]
        done = subprocess.run(command, cwd=self.root, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    def run(self, module, *words):
        return self.call("-m", module, *words)

    def python(self, code):
        return self.call("-c", code)

    def test(self, *words):
        self.run("pytest", "-q", "-p", "no:cacheprovider", *words)


@pytest.mark.slow
def test_a_method(tmp_path):
    copy, out = Copy(tmp_path), tmp_path / "out"
    (script,), (row,), (page,) = blocks(METHOD, "python"), blocks(METHOD, "text"), blocks(METHOD, "markdown", "~~~")
    (copy.root / "train_rotation.py").write_text(script, encoding="utf-8")
    copy.insert("tests/test_methods.py", '    "byol": Case(', row)
    copy.insert(
        "tests/test_methods.py", "from medssl.train_simclr import", "from medssl.train_rotation import Rotation\n"
    )
    (copy.root / "docs" / "methods" / "rotation.md").write_text(page, encoding="utf-8")

    small = ["--b", "8", "--image-size", "32", "--texture-size", "32", "--device", "cpu", "--workers", "0"]
    for steps in (3, 6):  # the second continues the first
        more = ["--log-every", "1", "--steps", steps, "--output", out]
        copy.run("medssl.train_rotation", *small, *more)
    copy.run("medssl.benchmarks.curves", out, "--output", copy.root / "docs" / "methods" / "rotation.jpg")
    own = {"train_rotation.py", "tests/test_methods.py", "docs/methods/rotation.md", "docs/methods/rotation.jpg"}
    assert copy.changed() == own

    copy.test("tests/test_methods.py", "-k", "rotation")
    copy.test("tests/test_help.py", "tests/test_engine.py", "-k", "train_rotation")
    copy.test("tests/test_docs.py", "-k", "rotation or site")
    copy.test("tests/test_house.py")
    assert "pcrlv2, rotation, simclr" in " ".join(copy.run("medssl.compare", "--help").split())
    show = "lambda **given: print(given['entry_points'])"
    listed = copy.python(f"import runpy, setuptools; setuptools.setup = {show}; runpy.run_path('setup.py')")
    assert "medssl-train-rotation = medssl.train_rotation:cli" in listed


@pytest.mark.slow
def test_a_data_set(tmp_path):
    copy, data = Copy(tmp_path), tmp_path / "data"
    (module,), (row,) = blocks(DATA_SET, "python"), blocks(DATA_SET, "text")
    (copy.root / "datasets" / "mine.py").write_text(module, encoding="utf-8")
    copy.insert("datasets/registry.py", "    *(\n        Row(flag", row)
    assert copy.changed() == {"datasets/mine.py", "datasets/registry.py"}
    for split, patients in (("train", range(8)), ("val", range(8, 12)), ("test", range(12, 16))):
        for patient in patients:
            folder = data / split / ("ill" if patient % 2 else "healthy")
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(patient).integers(0, 255, (40, 40), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{patient}_1.png")

    given = ["--data", data, "--dataset", "mine", "--image-size", "32", "--workers", "0", "--device", "cpu"]
    given += ["--b", "4", "--steps", "2", "--output"]
    weights = ["--init", tmp_path / "simclr" / "encoder.pt", "--no-tensorboard"]
    told = copy.python(
        "from medssl import finetune_classification, train_simclr\n"
        "from medssl import evaluate_features, finetune_segmentation, train_moco\n"
        "from medssl.docs import hooks\n"
        f"train_simclr.main({[*map(str, given), str(tmp_path / 'simclr')]})\n"
        f"finetune_classification.main({[*map(str, [*given, tmp_path / 'task', *weights])]})\n"
        "for script in (train_moco, finetune_segmentation, evaluate_features):\n"
        "    print(script.get_parser().format_help())\n"
        "print(hooks.data_sets())"
    )
    config = json.loads((tmp_path / "task" / "config.json").read_text())
    assert (config["protocol"], config["select"], config["lr"]) == ("ours", "loss", 1e-4)  # those of its row, chest's
    assert " ".join(told.split()).count("phantom3d, mine, or a MedMNIST name") == 3
    copy.test("tests/test_house.py")
    row = "| `mine` | chest radiographs, healthy or ill | 2 | classification | [CC BY 4.0](https://example.org) |"
    assert row in told
