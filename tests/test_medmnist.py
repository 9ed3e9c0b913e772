"""MedMNIST names, files, labels, and what bad files are answered with."""

import pickle
import shutil
import sys

import medmnist.info
import numpy as np
import pytest
import torch

from medssl.datasets import base, registry
from medssl.datasets import medmnist as family
from medssl.datasets.base import Request
from medssl.errors import InputError


def write(path, channels=1, side=28, classes=2, columns=1, counts=(6, 4, 5), **changes):
    """A small file with MedMNIST's keys; `changes` replaces members, None removes them."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, n in zip(("train", "val", "test"), counts):
        shape = (n, side, side, 3) if channels == 3 else (n, side, side)
        arrays[f"{split}_images"] = rng.integers(0, 256, shape, dtype=np.uint8)
        arrays[f"{split}_labels"] = rng.integers(0, classes, (n, columns), dtype=np.uint8)
    arrays = {key: value for key, value in (arrays | changes).items() if value is not None}
    np.savez_compressed(path, **arrays)
    return arrays


def open_one(name, data, split="train", **more):
    return family.open_splits(Request(name=name, data=str(data), **more), [split])[split]


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("pneumoniamnist", "pneumoniamnist"),
        ("PneumoniaMNIST", "pneumoniamnist"),
        ("pathMNIST", "pathmnist"),
        ("pathmnist_64", "pathmnist_64"),
        ("OrganAMNIST_224", "organamnist_224"),
        ("NoduleMNIST3D", "nodulemnist3d"),
        ("organmnist3d_64", "organmnist3d_64"),
        ("chest", None),
        ("mnist", None),
        ("xmnist", None),
        ("pathmnist_x", None),
    ],
)
def test_flag_of(name, flag):
    assert family.flag_of(name) == flag


def test_flag_of_refuses():
    with pytest.raises(InputError, match="organmnist3d_128: MedMNIST has the sizes 28, 64$"):
        family.flag_of("organmnist3d_128")
    with pytest.raises(InputError, match="sizes 28, 64, 128, 224"):
        family.flag_of("pathmnist_65")


def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "medmnist", None)
    with pytest.raises(InputError, match="pip install medmnist"):
        registry.open_splits(Request(name="pathmnist"), ["train"])


def test_flags_are_the_packages():
    assert sorted(family.FLAGS) == sorted(medmnist.INFO)
    for flag in family.FLAGS:
        licence = medmnist.INFO[flag]["license"]
        assert licence == family.LICENCES[flag], flag


def test_binary_set(tmp_path):
    arrays = write(tmp_path / "pneumoniamnist.npz")
    opened = registry.open_splits(Request(name="PneumoniaMNIST", data=str(tmp_path)), ["train", "val", "test"], dims=2)
    data = opened["train"]
    assert [len(each) for each in opened.values()] == [6, 4, 5]
    assert data.info == base.Info("pneumoniamnist", 2, 1, "binary", ("normal", "pneumonia"), 28)
    assert data.ids[:2] == ["train/00000", "train/00001"]
    assert data.labels.dtype == torch.int64
    assert data.labels.tolist() == arrays["train_labels"][:, 0].tolist()
    assert np.array_equal(data[3]["image"][0], arrays["train_images"][3])
    assert data[3]["image"].dtype == torch.uint8
    assert data[3]["size"].tolist() == [28, 28]
    # Decoding processes that are spawned get the data set by pickle.
    assert torch.equal(pickle.loads(pickle.dumps(data))[3]["image"], data[3]["image"])


def test_colour_and_multi_label(tmp_path):
    arrays = write(tmp_path / "pathmnist.npz", channels=3, classes=9)
    data = open_one("pathmnist", tmp_path)
    assert (data.info.channels, data.info.task, len(data.info.classes)) == (3, "multi-class", 9)
    assert np.array_equal(data[0]["image"].permute(1, 2, 0), arrays["train_images"][0])

    arrays = write(tmp_path / "chestmnist.npz", columns=14)
    data = open_one("chestmnist", tmp_path)
    assert data.info.task == "multi-label"
    assert data.labels.dtype == torch.float32
    assert data.labels.tolist() == arrays["train_labels"].tolist()

    write(tmp_path / "retinamnist.npz", channels=3, classes=5)
    assert open_one("retinamnist", tmp_path).info.task == "multi-class"


def test_volumes(tmp_path):
    volumes = np.random.default_rng(0).integers(0, 256, (6, 28, 28, 28), dtype=np.uint8)
    arrays = write(tmp_path / "nodulemnist3d.npz", train_images=volumes)
    opened = registry.open_splits(Request(name="NoduleMNIST3D", data=str(tmp_path)), ["train"], dims=3)
    data = opened["train"]
    assert (data.info.dims, data.info.channels, data.info.task, data.info.native_size) == (3, 1, "binary", 28)
    assert data.info.classes == ("benign", "malignant")
    assert data.labels.tolist() == arrays["train_labels"][:, 0].tolist()
    sample = pickle.loads(pickle.dumps(data))[3]
    assert sample["image"].shape == (1, 28, 28, 28)
    assert sample["image"].dtype == torch.float16
    assert sample["size"].tolist() == [28, 28, 28]
    # Stored slice by slice (z, y, x); 8 bits are exact in half precision.
    assert np.array_equal((sample["image"][0].float() * 255).round(), volumes[3].transpose(2, 1, 0))
    with pytest.raises(InputError, match="--d 2: data set nodulemnist3d has 3 dimensions"):
        registry.open_splits(Request(name="nodulemnist3d", data=str(tmp_path)), ["train"], dims=2)
    write(tmp_path / "flat.npz")
    with pytest.raises(InputError, match="train_images has shape .6, 28, 28., which is not nodulemnist3d's"):
        open_one("nodulemnist3d", tmp_path / "flat.npz")
    with pytest.raises(InputError, match="no organmnist3d.npz or organmnist3d_64.npz in it"):
        open_one("organmnist3d", tmp_path)


def test_sizes(tmp_path):
    write(tmp_path / "bloodmnist_64.npz", channels=3, side=64, classes=8)
    for name in ("bloodmnist", "bloodmnist_64"):
        assert open_one(name, tmp_path).info.native_size == 64
    write(tmp_path / "bloodmnist.npz", channels=3, classes=8)
    assert open_one("bloodmnist", tmp_path).info.native_size == 28
    assert open_one("bloodmnist", tmp_path / "bloodmnist_64.npz").info.native_size == 64
    assert open_one("bloodmnist", tmp_path, texture_size=32)[0]["image"].shape == (3, 32, 32)
    with pytest.raises(InputError, match=r"bloodmnist.npz: images of 28 pixels"):
        open_one("bloodmnist_64", tmp_path / "bloodmnist.npz")
    with pytest.raises(InputError, match=r"no bloodmnist_128.npz in it"):
        open_one("bloodmnist_128", tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_labels": None}, "no train_labels in it, only"),
        ({"train_images": np.zeros((6, 28, 28))}, "uint8 pictures are needed"),
        ({"train_images": np.zeros((6, 28, 28, 3), np.uint8)}, "not pneumoniamnist's"),
        ({"train_images": np.zeros((6, 28, 20), np.uint8)}, "not pneumoniamnist's"),
        ({"train_images": np.zeros((5, 28, 28), np.uint8)}, "5 images but 6 labels"),
        ({"train_labels": np.full((6, 1), 2)}, "train_labels has values outside 0 to 1"),
        ({"train_labels": np.zeros((6, 3))}, "3 columns"),
        ({"train_labels": np.array([[object()]] * 6)}, "not a readable .npz"),
    ],
)
def test_wrong_files(tmp_path, changes, message):
    path = tmp_path / "pneumoniamnist.npz"
    write(path, **changes)
    with pytest.raises(InputError, match=f"pneumoniamnist.npz.*{message}"):
        open_one("pneumoniamnist", path)


def test_broken_files(tmp_path):
    path = tmp_path / "pneumoniamnist.npz"
    write(path, counts=(60, 4, 5))
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[400:3000] = bytes(2600)  # inside of a compressed member
    for content in (whole[: len(whole) // 2], whole[:10], b"", b"a page that says: not found", bytes(damaged)):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"pneumoniamnist.npz: not a readable .npz"):
            open_one("pneumoniamnist", path)
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(InputError, match=r"one.npy: not a readable .npz"):
        open_one("pneumoniamnist", tmp_path / "one.npy")


def test_bad_requests(tmp_path):
    write(tmp_path / "pneumoniamnist.npz")
    with pytest.raises(InputError, match="splits of its own"):
        open_one("pneumoniamnist", tmp_path, list="train.txt")
    with pytest.raises(InputError, match="train, val, test, not extra"):
        open_one("pneumoniamnist", tmp_path, "extra")
    with pytest.raises(InputError, match="no such file"):
        open_one("pneumoniamnist", tmp_path / "none")
    with pytest.raises(InputError, match="no pathmnist.npz or pathmnist_64.npz"):
        open_one("pathmnist", tmp_path)


def test_default_folder_and_download(tmp_path, monkeypatch):
    monkeypatch.setattr(medmnist.info, "DEFAULT_ROOT", str(tmp_path / "root"))
    source = tmp_path / "source.npz"
    write(source)

    def offline(*_, **__):
        raise OSError("no route to host")

    def online(url, root, filename, md5):
        assert "pneumoniamnist.npz" in url
        (tmp_path / "fetched").touch()
        shutil.copy(source, f"{root}/{filename}")

    request = Request(name="pneumoniamnist")
    monkeypatch.setattr("torchvision.datasets.utils.download_url", offline)
    with pytest.raises(InputError, match=r"pneumoniamnist.npz could not be downloaded; are you offline"):
        family.open_splits(request, ["val"])
    assert list((tmp_path / "root").iterdir()) == []  # nothing half-done stays
    monkeypatch.setattr("torchvision.datasets.utils.download_url", online)
    assert len(family.open_splits(request, ["val"])["val"]) == 4
    assert (tmp_path / "fetched").exists()
    monkeypatch.setattr("torchvision.datasets.utils.download_url", offline)  # now it is there
    assert len(family.open_splits(request, ["val"])["val"]) == 4


def test_the_evaluators_numbers():
    """AUC and ACC of every kind of task, from their definitions."""
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    for name, labels in (("pneumoniamnist", 2), ("bloodmnist_64", 8), ("retinamnist", 5), ("chestmnist", 14)):
        several = name == "chestmnist"
        truth = rng.integers(0, 2, (200, labels)) if several else np.eye(labels)[rng.integers(0, labels, 200)]
        p = rng.random((200, labels)) + truth
        p = p / p.max() if several else p / p.sum(1, keepdims=True)
        found = family.evaluate(name, p, truth.astype(np.float32))
        areas = [roc_auc_score(truth[:, i], p[:, i]) for i in range(labels)]
        assert found["medmnist_auc"] == pytest.approx(areas[1] if labels == 2 else np.mean(areas))
        right = ((p > 0.5) == truth).mean() if several else (p.argmax(1) == truth.argmax(1)).mean()
        assert found["medmnist_acc"] == pytest.approx(right)
        missing = family.evaluate(name, p, truth * (np.arange(labels) != 1))
        assert missing["medmnist_auc"] is None
    assert family.evaluate("phantom2d", p, truth) == {}
