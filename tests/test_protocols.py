"""Protocols that bear a paper's name have its values, and train."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from medssl import compare, finetune_classification, finetune_detection, finetune_segmentation
from medssl.datasets.base import ImageDataset, Info
from medssl.datasets.masked_images import InstanceImages
from medssl.datasets.phantoms import ct, tissue
from medssl.datasets.registry import open_instances
from medssl.engine.order import learning_rate, make_optimizer
from medssl.engine.parallel import setup
from medssl.errors import InputError
from medssl.losses.segmentation import region_dice_cross_entropy, tversky
from medssl.models.unet3d import DeepUNet3d
from medssl.study import published
from medssl.tasks import classification
from medssl.tasks.detection import Detector, measure_statistics
from medssl.tasks.segmentation3d import RegionSegmenter, VolumeSegmentation, labels_of
from medssl.views.of_images import ClassificationViews, DetectionViews, SegmentationViews

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("few_radiographs")


def completed(script, words, info):
    """A script's options as it trains with them."""
    parser = script.get_parser()
    args = parser.parse_args(words)
    given = parser.given(words)
    if script is finetune_classification:
        return script.complete(args, info, given)
    data = ImageDataset(info, None, ["a"])
    return script.complete(args, data, given)


def rates(args, *epochs):
    return [learning_rate(args, epoch) for epoch in epochs]


def betas(args):
    return make_optimizer([{"params": [torch.zeros(1, requires_grad=True)]}], args).param_groups[0]["betas"]


# Values --------------------------------------------------------------------------------------------

GREY = Info("phantom2d", task="binary", classes=("a", "b"), channels=1)


@pytest.mark.parametrize(
    ("name", "arch", "b", "size", "norm", "expected", "patience"),
    [
        ("medmnist", "resnet18", 128, 28, "half", [1e-3, 1e-4, 1e-5], 0),
        ("magical-medmnist", "resnet50", 32, 28, "half", [1e-3, 1e-3, 1e-3], 30),
        ("magical-chexpert", "resnet50", 32, 224, "chestx-ray", [2e-4, 1e-4, 1e-4], 10),
        ("magical-shenzhen", "resnet50", 32, 224, "none", [2e-4, 1e-4, 1e-4], 10),
    ],
)
def test_classification(name, arch, b, size, norm, expected, patience):
    args = completed(finetune_classification, ["--protocol", name], GREY)
    assert (args.protocol, args.arch, args.b, args.image_size, args.normalization) == (name, arch, b, size, norm)
    assert (args.optimizer, args.select, args.patience, args.dropout) == ("adam", "auroc", patience, 0)
    assert rates(args, 10, 60, 80) == pytest.approx(expected)
    assert betas(args) == (0.9, 0.999)
    views = finetune_classification.make_views(args, 2, {"mean": [0] * 3, "std": [1] * 3})
    assert views.augment == (name == "magical-chexpert")
    assert (views.size, views.margin) == (size, 224 / 256 if name == "magical-chexpert" else 1)
    if name == "magical-chexpert":
        assert (tuple(views.scale), views.degrees) == ((0.08, 1), 7)
    given = completed(finetune_classification, ["--protocol", name, "--b", "7", "--image-size", "64"], GREY)
    assert (given.b, given.image_size, given.lr) == (7, 64, expected[0])  # what is typed wins


def test_what_was_the_default_is_ours():
    args = completed(finetune_classification, [], GREY)
    assert (args.protocol, args.b, args.lr, args.schedule, args.crop_scale) == (
        "ours",
        64,
        1e-3,
        "constant",
        [0.5, 1.0],
    )
    assert (args.image_size, args.dropout, args.augment, args.normalization) == (224, 0.2, "full", "weights")
    named = completed(finetune_classification, ["--protocol", "images"], GREY)
    assert {**vars(args), "protocol": ""} == {**vars(named), "protocol": ""}
    with pytest.raises(InputError, match="--protocol medmnist: is for images, and phantom3d has 3 dimensions"):
        completed(finetune_classification, ["--protocol", "medmnist"], Info("phantom3d", 3, task="binary"))


@pytest.mark.parametrize(
    ("name", "size", "norm", "expected"),
    [("magical-drive", 512, "imagenet", (0.9, 0.999)), ("magical-montgomery", 224, "none", (0.9, 0.99))],
)
def test_segmentation_of_images(name, size, norm, expected):
    args = completed(finetune_segmentation, ["--protocol", name], Info("folder"))
    assert (args.arch, args.b, args.epochs, args.patience, args.loss) == ("resnet50", 32, 200, 30, "bce")
    assert (args.image_size, args.normalization, args.epoch_steps) == (size, norm, 1)
    assert rates(args, 0, 100, 199) == [1e-2] * 3
    assert betas(args) == expected
    kind = finetune_segmentation.BY_DIMS[2]
    assert not kind.make_views(args, kind.inputs(norm)).augment


def test_segmentation_of_volumes():
    brats = completed(finetune_segmentation, ["--protocol", "pcrlv2-brats"], Info("brats", 3, 4))
    assert (brats.patch, brats.b, brats.patches, brats.norm, brats.loss) == ([112, 128, 112], 4, 1, "group", "bce+dice")
    assert rates(brats, 0, 50, 100) == pytest.approx([1e-4, 5e-5, 2.5e-5])
    lits = completed(finetune_segmentation, ["--protocol", "pcrlv2-lits"], Info("lits", 3, 1))
    assert (lits.patch[2], lits.b, lits.norm, lits.loss, lits.epochs) == (64, 4, "group", "tversky", 500)
    assert rates(lits, 0, 250, 499) == [1e-4] * 3
    kind = VolumeSegmentation()
    views = kind.make_views(brats, {"kind": "unit"})
    assert (views.flips, views.scale, views.degrees, views.blur, views.noise) == ((0, 1, 2), 0, 0, 0, 0)
    assert kind.make_views(lits, {"kind": "unit"}).flips == ()
    assert views.foreground == 0
    for words, flips in (
        ("--mirror x", (0,)), ("--mirror yz", (1, 2)), ("--mirror none", ()), ("--augment flips", (0, 1, 2)),
        ("--augment none", ()), ("--augment none --mirror x", (0,)), ("--protocol pcrlv2-lits --mirror z", (2,)),
    ):  # fmt: skip
        args = completed(finetune_segmentation, words.split(), Info("brats", 3, 4))
        assert kind.make_views(args, {"kind": "z"}).flips == flips, words
    for words in (
        ["--protocol", "magical-drive"], ["--augment", "wrong"], ["--normalization", "imagenet"],
    ):  # fmt: skip
        with pytest.raises((InputError, SystemExit)):
            completed(finetune_segmentation, words, Info("brats", 3, 4))
    with pytest.raises(InputError, match="--mirror: is for volumes, and folder has 2 dimensions"):
        completed(finetune_segmentation, ["--mirror", "x"], Info("folder"))


def test_detection():
    for name in ("glas", "crag"):
        own, ours = (finetune_detection.PROTOCOLS[key] for key in (f"concl-{name}", name))
        assert own == ours | {"precise_bn": 200}


# Losses, labels and statistics ---------------------------------------------------------------------


def test_tversky_by_hand():
    """TP / (TP + .3 FP + .7 FN + 1) of two images: (½·4) / (2 + .3·½·4 + .7·½·4 + 1) = 2 / 5, and 0."""
    target = torch.zeros(2, 1, 8)
    target[0, 0, :4] = 1
    assert float(tversky(torch.zeros(2, 1, 8), target)) == pytest.approx(1 - (2 / 5 + 0) / 2)


def test_loss_of_regions_by_hand():
    """Each region's Dice and a fifth of its cross-entropy, summed: logits of 0 are probabilities of ½."""
    target = torch.zeros(1, 3, 8)
    target[:, 0, :4] = 1
    losses = region_dice_cross_entropy(torch.zeros(1, 3, 8), target)
    assert float(losses["dice"]) == pytest.approx((1 - 2 * 2 / (4 + 4)) + 2 * (1 - 1e-5 / (4 + 1e-5)), rel=1e-4)
    assert float(losses["cross_entropy"]) == pytest.approx(0.2 * 3 * np.log(2))


def test_labels_of_nested_regions():
    """BraTS': all of a tumour, its core, what enhances; a voxel is of the innermost region that has it."""
    regions = [(1, 2, 3), (1, 3), (3,)]
    found = np.array([[1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 0, 0]], np.float32)
    assert labels_of(found, regions).tolist() == [2, 1, 3, 1, 0]
    assert labels_of(found[[2, 0, 1]], [regions[i] for i in (2, 0, 1)]).tolist() == [2, 1, 3, 1, 0]
    # Of labels that exclude each other, the most probable.
    assert labels_of(np.array([[0.9, 0.4, 0.6], [0.6, 0.7, 0.4]], np.float32), [(1,), (2,)]).tolist() == [1, 2, 1]


def test_deep_supervision_decays():
    torch.manual_seed(0)
    network = DeepUNet3d(2, width=16, norm="group")
    method = RegionSegmenter(network, [(1, 2), (2,)], 3, "tversky", epochs=100)
    x, target = torch.rand(2, 1, 16, 16, 8), torch.randint(0, 3, (2, 16, 16, 8))
    assert [y.shape for y in network.train()(x)] == [(2, 2, 16, 16, 8)] * 3
    assert network.eval()(x).shape == (2, 2, 16, 16, 8)
    network.train()
    run = setup(None, "cpu", False)
    losses = method({"view": x, "target": target}, lambda net, y: net(y))
    assert run.alone
    first = float(losses["deep"].detach())
    sum(losses.values()).backward()
    assert all(layer.weight.grad.abs().sum() > 0 for layer in network.deep)
    for progress, weight in ((0.39, 0.33), (0.41, 0.33 * 0.8), (0.81, 0.33 * 0.64)):
        method.after_step(progress)
        assert float(method.alpha) == pytest.approx(weight)
    later = method({"view": x, "target": target}, lambda net, y: net(y))
    assert float(later["deep"].detach()) == pytest.approx(0.64 * first, rel=1e-3)


def test_no_augmentation_shows_what_tests_show():
    images = {"image": torch.randint(0, 256, (3, 1, 40, 40), dtype=torch.uint8), "size": torch.full((3, 2), 40.0)}
    views = ClassificationViews([0] * 3, [1] * 3, 28, margin=1.0, augment=False)
    assert torch.equal(views.train()(images)["view"], views.eval()(images)["view"])
    masks = {"mask": torch.randint(0, 2, (3, 1, 40, 40), dtype=torch.uint8), "field": torch.ones(3, 1, 40, 40)}
    views = SegmentationViews([0] * 3, [1] * 3, 28, augment=False)
    trained, tested = views.train()(images | masks), views.eval()(images | masks)
    assert torch.equal(trained["view"], tested["view"])
    assert torch.equal(trained["target"], tested["target"])


class Statistics(nn.Module):
    """A batch norm of the images' brightness."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(1, momentum=0.1)

    def forward(self, images, targets):
        x = torch.stack([image.mean() for image in images])[:, None]
        return {"loss_x": self.norm(x).sum()}


def test_precise_statistics_are_means_of_batches(tmp_path):
    words = ["--dataset", "tissue2d", "--texture-size", "64", "--b", "4", "--workers", "0", "--device", "cpu"]
    args = finetune_detection.get_parser().parse_args([*words, "--precise-bn", "3", "--output", str(tmp_path)])
    data: InstanceImages = open_instances(args)["train"].subset(range(12))
    method = Detector(Statistics())
    views = DetectionViews([0] * 3, [1] * 3)
    measure_statistics(method, data, views, args, setup(None, "cpu", False), 0)
    seen = torch.stack([views.eval()(to_batch(data[i]))["images"][0].mean() for i in range(12)])
    norm = method.network.norm
    assert float(norm.running_mean) == pytest.approx(float(seen.mean()), abs=1e-5)  # three batches are all images
    assert norm.momentum == 0.1
    assert float(norm.num_batches_tracked) == 3


def to_batch(item):
    return {key: [value] if isinstance(value, torch.Tensor) else value for key, value in item.items()}


# Two steps -----------------------------------------------------------------------------------------

FEW = ["--steps", "2", "--workers", "0", "--device", "cpu", "--no-tensorboard"]


@pytest.mark.parametrize("name", [*classification.PUBLISHED])
def test_two_steps_of_classification(name, tmp_path):
    words = ["--dataset", "phantom2d", "--image-size", "32", "--texture-size", "32", "--arch", "resnet18", "--b", "8"]
    words += ["--annotation-percent", "1", "--protocol", name, "--output", str(tmp_path)]
    finetune_classification.main([*words, *FEW])
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["protocol"] == results["config"]["protocol"] == name


@pytest.mark.parametrize("name", ["magical-drive", "magical-montgomery"])
def test_two_steps_of_segmentation(name, tmp_path):
    words = ["--dataset", "phantom2d", "--image-size", "32", "--arch", "resnet18", "--b", "4", "--overlays", "0"]
    words += ["--annotation-percent", "1", "--protocol", name, "--output", str(tmp_path)]
    finetune_segmentation.main([*words, *FEW])
    assert json.loads((tmp_path / "results.json").read_text())["protocol"] == name


@pytest.mark.parametrize("name", ["pcrlv2-brats", "pcrlv2-lits"])
def test_two_steps_of_volumes(name, tmp_path, monkeypatch):
    monkeypatch.setattr(ct, "SPLITS", {"train": 8, "val": 1, "test": 2})
    ct._generated.cache_clear()
    words = ["--dataset", "phantom3d", "--patch", "16", "16", "16", "--arch", "unet3d_quarter", "--b", "2"]
    words += ["--overlap", "0", "--protocol", name, "--overlays", "0", "--output", str(tmp_path)]
    finetune_segmentation.main([*words, *FEW])
    ct._generated.cache_clear()
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["protocol"] == name
    regions = torch.load(tmp_path / "best.pt", weights_only=True)["regions"]
    assert list(regions) == list(results["per_class"])
    weights = torch.load(tmp_path / "best.pt", weights_only=True)["state_dict"]
    assert len(weights["out_tr.final_conv.weight"]) == len(regions)


def test_two_steps_of_detection(tmp_path, monkeypatch):
    monkeypatch.setattr(tissue, "SPLITS", {"train": 12, "val": 2, "test": 4})
    tissue._generated.cache_clear()
    words = ["--dataset", "tissue2d", "--texture-size", "64", "--iterations", "2", "--b", "2", "--sides", "64", "64"]
    words += [
        "--test-side",
        "64",
        "--proposals",
        "20",
        "--samples",
        "8",
        "--warmup-iterations",
        "0",
        "--milestones",
        "1",
    ]
    words += ["--protocol", "concl-glas", "--precise-bn", "2", "--all-train", "--overlays", "0"]
    finetune_detection.main([*words, *FEW[2:], "--output", str(tmp_path)])
    tissue._generated.cache_clear()
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["protocol"], results["trials"][0]["val_score"]) == ("concl-glas", 0.0)


# Published results ---------------------------------------------------------------------------------


def test_the_page_of_published_results_is_the_table():
    rows = re.findall(r"^\| (\w+) \| (\w+) \| (\w+) \| ([^|]+) \| (\w+) \| ([\d.]+) \|",
                      (ROOT / "docs" / "published.md").read_text(), flags=re.M)  # fmt: skip
    assert rows == [
        (row.dataset, row.task, row.measure, row.init, row.arch, f"{row.value:g}") for row in published.rows()
    ]
    named = {row.protocol for row in published.rows()} - {""}
    known = [*classification.PUBLISHED, *finetune_segmentation.BY_DIMS[2].published]
    assert named <= {*known, *finetune_detection.PUBLISHED}
    assert [row.value for row in published.of("pneumoniamnist", "classification")] == [0.944]
    assert not published.of("pneumoniamnist_224", "classification")


def test_the_report_has_the_protocol_and_what_papers_report(tmp_path):
    study = ["--init", "random", "--annotation-percent", "1", "--trials", "1", "--no-features", "--jobs", "0"]
    study += ["--dataset", "phantom2d", "--image-size", "32", "--texture-size", "32", "--arch", "resnet18", "--b", "8"]
    study += ["--protocol", "magical-shenzhen", *FEW, "--output", str(tmp_path)]
    compare.main([*study, "--published"])
    page = (tmp_path / "report.html").read_text()
    assert "Protocol: magical-shenzhen." in page
    assert "None that is known here, of this set and task." in page
    (path,) = tmp_path.glob("classification/*/random/run_0/results.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "dataset": "shenzhen"}))
    compare.main([*study, "--tables-only", "--published"])
    page = (tmp_path / "report.html").read_text()
    assert "theirs, not measured here" in page
    assert "0.9652" in page
    compare.main([*study, "--tables-only"])
    assert "0.9652" not in (tmp_path / "report.html").read_text()
