"""Frozen-feature evaluation: its parts against known answers, and the script on small sets."""

import json
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image

from medssl import evaluate_features as script
from medssl import finetune_classification
from medssl.datasets import registry
from medssl.datasets.base import ImageDataset, Info
from medssl.datasets.phantoms import radiograph
from medssl.engine.batches import evaluation_batches
from medssl.engine.parallel import Devices
from medssl.errors import InputError, UnreadableImage
from medssl.models.encoders import make_encoder

BINARY = Info("x", task="binary", classes=("a", "b"))
CLASSES = Info("x", task="multi-class", classes=("a", "b", "c"))
LABELS = Info("x", task="multi-label", classes=("a", "b", "c"))


def clusters(n, seed, classes=3, spread=0.3):
    """(n, 8) features around one direction a class, (n,) labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    return (np.eye(8)[labels] + spread * rng.standard_normal((n, 8))).astype(np.float32), labels


def make_npz(folder, flag="bloodmnist", classes=8, columns=1):
    """A small MedMNIST file whose colour tells the class."""
    rng = np.random.default_rng(1)
    arrays = {}
    for split, n in (("train", 48), ("val", 24), ("test", 24)):
        labels = rng.integers(0, 2, (n, columns)) if columns > 1 else np.arange(n)[:, None] % classes
        shape = (n, 28, 28) if flag == "chestmnist" else (n, 28, 28, 3)
        noise = rng.integers(0, 60, shape)
        arrays[f"{split}_images"] = (noise + 25 * labels[:, 0].reshape(-1, *[1] * (noise.ndim - 1))).astype(np.uint8)
        arrays[f"{split}_labels"] = labels.astype(np.uint8)
    np.savez(folder / f"{flag}.npz", **arrays)
    return folder


def test_score_by_hand():
    p = np.array([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.8, 0.2]])
    result = script.score(p, script.targets_of(np.array([0, 1, 1, 0]), BINARY), BINARY)
    assert result == {"accuracy": 0.75, "f1": pytest.approx(2 / 3), "auroc": 1.0, "per_class": {"a": 1.0, "b": 1.0}}

    t = np.array([[1, 0, np.nan], [0, 0, 1], [1, 0, 0.0]])
    p = np.array([[0.9, 0.1, 0.5], [0.2, 0.6, 0.7], [0.1, 0.1, 0.9]])
    result = script.score(p, t, LABELS)
    # Label b has no positive; for c the unknown image is left out.
    assert result["per_class"] == {"a": 0.5, "b": None, "c": 0.0}
    assert result["auroc"] == 0.25
    assert result["accuracy"] == 5 / 8

    one = script.score(np.ones((3, 2)), script.targets_of(np.zeros(3, int), BINARY), BINARY)
    assert one["auroc"] is None


def test_knn_by_hand():
    train = np.array([[1, 0], [0, 1], [0, 2], [-1, 0]], np.float32)
    targets = np.array([[1, 0], [0, 1], [0, np.nan], [1, 0]])
    votes = script.knn(train, targets, np.array([[0, 5], [3, 0]], np.float32), k=2)
    assert np.allclose(votes[0], [0, 1])  # both neighbours vote on the first label, one on the second
    assert np.allclose(votes[1], [1, 0], atol=1e-5)  # the second neighbour, at a right angle, hardly counts
    weights = np.exp(np.array([1.0, 0.6]) / 0.5)
    near = np.array([[1, 0], [0.6, 0.8]], np.float32)
    votes = script.knn(near, np.eye(2), np.array([[2, 0]], np.float32), k=2, temperature=0.5)
    assert np.allclose(votes[0], weights / weights.sum(), atol=1e-6)
    few = script.knn(near, np.eye(2), np.array([[2, 0]], np.float32), k=9, temperature=0.5)
    assert np.allclose(few, votes)  # all there are
    unknown = script.knn(train, np.full((4, 1), np.nan), np.array([[1, 1]], np.float32), k=3)
    assert unknown.item() == 0.5


def test_probe_learns_what_is_linear():
    features, targets = {}, {}
    for seed, split in enumerate(script.SPLITS):
        features[split], labels = clusters(150, seed)
        targets[split] = script.targets_of(labels, CLASSES)
    result = script.linear_probe(features, targets, CLASSES)
    assert result["auroc"] > 0.98
    assert result["accuracy"] > 0.9
    assert result["C"] in script.STRENGTHS
    assert result["validation"]["auroc"] > 0.98
    near = script.knn(features["train"], targets["train"], features["test"], 20)
    assert script.score(near, targets["test"], CLASSES)["auroc"] > 0.98
    # Labels that are drawn by lot cannot be predicted: nothing leaks from the test split.
    shuffled = dict(targets, train=np.random.default_rng(0).permutation(targets["train"]))
    assert script.linear_probe(features, shuffled, CLASSES)["auroc"] < 0.75


def test_probe_with_unknown_labels_and_missing_classes():
    features, targets = {}, {}
    for seed, split in enumerate(script.SPLITS):
        features[split], labels = clusters(120, seed)
        t = np.eye(3)[labels]
        t[::7, 0] = np.nan
        t[:, 2] = 0  # never positive
        targets[split] = t
    result = script.linear_probe(features, targets, LABELS)
    assert result["per_class"]["c"] is None
    assert result["auroc"] > 0.98

    targets["val"] = np.full((120, 3), np.nan)  # which unreadable images may have left
    assert script.linear_probe(features, targets, LABELS)["C"] == script.STRENGTHS[0]

    x, labels = clusters(90, 5, classes=2)
    (p,) = script.probe(x, script.targets_of(labels, CLASSES), (features["test"],), 1.0, CLASSES)
    assert p.shape == (120, 3)
    assert (p[:, 2] == 0).all()  # a class without training images


def test_embedding():
    features, _ = clusters(60, 0)
    points, way = script.embed(features, limit=100, seed=0)
    assert (points.shape, way) == ((60, 2), "t-SNE")
    assert np.isfinite(points).all()
    points, way = script.embed(features, limit=59, seed=0)
    assert (points.shape, way) == ((60, 2), "PCA")
    # A collapsed network's, also but for rounding; t-SNE dies of them.
    for equal in (np.ones((60, 8), "f4"), np.ones((60, 8), "f4") + 1e-7 * features, np.zeros((60, 8), "f4")):
        points, way = script.embed(equal.astype(np.float32), limit=100, seed=0)
        assert (points == 0).all()
        assert (points.shape, way) == ((60, 2), "all equal")
    for n in (1, 2, 3):
        assert script.embed(features[:n], limit=100, seed=0)[0].shape == (n, 2)
    targets = np.array([[0, 0, 0], [1, 0, 1], [0, 1, 0], [np.nan, 0, 1]])
    assert script.names_of(targets, LABELS).tolist() == ["none", "several", "b", "c"]


def test_titles():
    inits = ["random", "runs/a/encoder.pt", "runs/b/encoder.pt"]
    assert [script.shorten(init, inits) for init in inits] == ["random", "a/encoder.pt", "b/encoder.pt"]


def test_script_side_by_side(tmp_path, capsys):
    torch.manual_seed(5)
    state = make_encoder("resnet18").state_dict()
    torch.save({"state_dict": state, "arch": "resnet18", "dims": 2}, tmp_path / "encoder.pt")
    out = tmp_path / "out"
    argv = ["--data", str(make_npz(tmp_path)), "--dataset", "BloodMNIST", "--image-size", "32", "--workers", "0"]
    argv += ["--device", "cpu", "--k", "5", "--output", str(out), "--init", "random", str(tmp_path / "encoder.pt")]
    script.main(argv)
    content = json.loads((out / "features.json").read_text())
    assert content["images"] == {"train": 48, "val": 24, "test": 24}
    assert [row["init"] for row in content["results"]] == ["random", str(tmp_path / "encoder.pt")]
    assert content["results"][0]["matched_keys"] == 0
    assert content["results"][1]["matched_keys"] > 90
    for row in content["results"]:
        # Even random features see brightness, which here is the class.
        assert row["probe"]["auroc"] > 0.8
        assert row["knn"]["auroc"] > 0.7
    assert content["results"][0]["probe"] != content["results"][1]["probe"]
    with Image.open(out / "embedding.png") as picture:
        assert picture.width > 1000
    assert "kNN acc" in capsys.readouterr().out
    first = content["results"]
    script.main(argv)
    assert json.loads((out / "features.json").read_text())["results"] == first


def test_results_are_written_before_the_picture(tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("no picture")

    monkeypatch.setattr(script, "draw_embedding", fails)
    argv = ["--data", str(make_npz(tmp_path)), "--dataset", "bloodmnist", "--image-size", "32", "--workers", "0"]
    with pytest.raises(RuntimeError, match="no picture"):
        script.main([*argv, "--device", "cpu", "--k", "5", "--output", str(tmp_path / "out")])
    assert json.loads((tmp_path / "out" / "features.json").read_text())["results"]


def test_script_multi_label(tmp_path):
    folder = make_npz(tmp_path, "chestmnist", columns=14)
    argv = ["--data", str(folder), "--dataset", "chestmnist", "--image-size", "32", "--workers", "0", "--k", "5"]
    script.main([*argv, "--device", "cpu", "--output", str(tmp_path / "out")])
    (row,) = json.loads((tmp_path / "out" / "features.json").read_text())["results"]
    assert row["probe"]["per_class"]["atelectasis"] > 0.9  # brightness again
    assert len(row["knn"]["per_class"]) == 14


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--init", "random", "random"], "--init: the same weights twice"),
        (["--init", "absent.pt"], "absent.pt: no such checkpoint file"),
        (["--arch", "resnet19"], "--arch resnet19: not an encoder"),
        (["--k", "49"], "--k 49: the training split has only 48"),
    ],
)
def test_bad_options(tmp_path, argv, message):
    given = ["--data", str(make_npz(tmp_path)), "--dataset", "bloodmnist", "--device", "cpu"]
    with pytest.raises(InputError, match=message):
        script.main([*given, "--output", str(tmp_path / "out"), *argv])
    assert not (tmp_path / "out").exists()


def test_bad_data(tmp_path):
    np.savez(
        tmp_path / "breastmnist.npz",
        **{f"{s}_images": np.zeros((30, 28, 28), np.uint8) for s in script.SPLITS},
        **{f"{s}_labels": np.zeros((30, 1), np.uint8) for s in script.SPLITS},
    )
    with pytest.raises(InputError, match="breastmnist: all training images are of one class"):
        script.main(["--data", str(tmp_path), "--dataset", "breastmnist", "--output", str(tmp_path / "out")])


def test_unreadable_images_are_left_out(tmp_path):
    """Not replaced by others, which would count twice."""

    def read(i):
        if i in (1, 2, 6):
            raise UnreadableImage("damaged")
        return np.full((8, 8), i, np.uint8)

    labels = torch.arange(7)
    data = ImageDataset(Info("x", task="multi-class", classes=tuple("abcdefg")), read, list("abcdefg"), labels, None, 8)
    args = Namespace(output=str(tmp_path), workers=0, worker_timeout=0, max_bad=1.0)
    batches = list(evaluation_batches(data, 2, args, Devices(torch.device("cpu"))))
    assert [batch["index"].tolist() for batch in batches] == [[0], [3], [4, 5]]  # the fourth has only g
    assert all(torch.equal(batch["image"][:, 0, 0, 0], batch["index"]) for batch in batches)
    assert torch.equal(torch.cat([batch["label"] for batch in batches]), torch.tensor([0, 3, 4, 5]))
    assert (tmp_path / "bad_files.txt").read_text().splitlines() == ["b: damaged", "c: damaged", "g: damaged"]
    with pytest.raises(InputError, match="more than --max-bad 0.1 allows"):
        list(evaluation_batches(data, 2, Namespace(**{**vars(args), "max_bad": 0.1}), Devices(torch.device("cpu"))))


@pytest.mark.parametrize("module", [script, finetune_classification])
def test_the_dimension_is_checked_by_the_scripts(module, tmp_path, monkeypatch):
    def open_volumes(request, splits):
        info = Info("volumes", dims=3, task="binary", classes=("a", "b"))
        read = np.zeros((30, 2, 2, 2), np.uint8).__getitem__
        return {s: ImageDataset(info, read, [f"{s}/{i}" for i in range(30)], torch.arange(30) % 2) for s in splits}

    row = registry.Row("volumes", "phantoms.radiograph", (3,), ("classification",), "")
    monkeypatch.setitem(registry.BY_NAME, "volumes", row)
    monkeypatch.setattr(radiograph, "open_splits", open_volumes)
    given = ["--dataset", "volumes", "--device", "cpu", "--output", str(tmp_path / "out")]
    with pytest.raises(InputError, match="--arch resnet18: no 3-dimensional encoder"):
        module.main([*given, "--d", "3", "--arch", "resnet18"])
    with pytest.raises(InputError, match="--d 2: data set volumes has 3 dimensions"):
        module.main([*given, "--d", "2"])


def test_help(capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    text = capsys.readouterr().out
    for option in ("--init", "--k", "--tsne-limit", "--margin", "--val-list", "--dataset", "--amp"):
        assert option in text
