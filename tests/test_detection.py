"""Pathology: generated tissue, layouts of tiles and glands, COCO's format and precision, Mask R-CNN on our encoders."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from medssl import finetune_detection, finetune_segmentation
from medssl.datasets.base import Request
from medssl.datasets.pathology import NCT_CLASSES
from medssl.datasets.phantoms.tissue import tiles
from medssl.datasets.registry import open_splits
from medssl.engine.parallel import Devices, setup, wrap
from medssl.errors import InputError, UnreadableImage
from medssl.models.detector import make_detector
from medssl.models.encoders import IMAGENET, make_encoder
from medssl.preprocess import to_coco
from medssl.reading.tables import write_list
from medssl.tasks.coco import annotations_of, average_precision, encode
from medssl.tasks.detection import Detector, evaluate
from medssl.views.draws import Draws
from medssl.views.of_images import DetectionViews, instance_targets


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def picture(i, height=64, width=80):
    """A tile with two glands, whose place depends on i, and their numbers, 3 and 7."""
    rng = np.random.default_rng(i)
    glands = np.zeros((height, width), np.uint8)
    glands[8 : 30 + i % 5, 6:36], glands[40:60, 44 : 70 + i % 7] = 3, 7
    image = rng.integers(180, 220, (height, width, 3)).astype(np.uint8)
    image[glands > 0] //= 3
    return image, glands


def glas(root):
    for part, count in (("train", 10), ("testA", 2), ("testB", 1)):
        for i in range(1, count + 1):
            image, glands = picture(i)
            save(root / "Warwick" / f"{part}_{i}.bmp", image)
            save(root / "Warwick" / f"{part}_{i}_anno.bmp", glands)
    return root


def crag(root):
    for part, count in (("train", 10), ("valid", 3)):
        for i in range(1, count + 1):
            image, glands = picture(i)
            save(root / part / "Images" / f"{part}_{i}.png", image)
            save(root / part / "Annotation" / f"{part}_{i}.png", glands)
    return root


SETS = {"glas": glas, "crag": crag}


def opened(name, root, splits=("train", "val", "test"), **more):
    return open_splits(Request(name, str(root), image_size=32, **more), list(splits))


# The phantom ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tissue():
    return tiles(120, 64, 9)


def test_tissue(tissue):
    images, glands, labels = tissue
    assert (images.shape, images.dtype) == ((120, 64, 64, 3), np.uint8)
    assert labels.sum() == 60
    for numbers in glands:
        assert sorted(set(numbers.flatten()) - {0}) == list(range(1, numbers.max() + 1))
        assert 1 <= numbers.max() <= 5
    again, same, _ = tiles(3, 64, 9)  # a tile does not depend on how many there are
    assert np.array_equal(again, images[:3])
    assert np.array_equal(same, glands[:3])
    for image, numbers in zip(images[:20], glands):
        assert image[numbers == 0].std() > 5
    with pytest.raises(InputError, match="phantom tissue of 32 pixels: at least 64"):
        tiles(1, 32)
    with pytest.raises(InputError, match="0 tiles asked for"):
        tiles(0)


def test_colours_and_glands_do_not_tell_the_classes_apart(tissue):
    images, glands, labels = tissue
    columns = {
        "mean": images.mean((1, 2)), "spread": images.std((1, 2)), "count": glands.max((1, 2))[:, None],
        "area": (glands > 0).mean((1, 2))[:, None], "dark": (images[..., 0] < 150).mean((1, 2))[:, None],
    }  # fmt: skip
    for name, values in columns.items():
        one, other = values[labels == 0], values[labels == 1]
        error = np.sqrt(one.var(0, ddof=1) / 60 + other.var(0, ddof=1) / 60)
        assert (np.abs(one.mean(0) - other.mean(0)) < 3.5 * error).all(), name


def test_tissue_as_a_data_set(capsys):
    splits = open_splits(Request("tissue2d", texture_size=64), ["val", "test"])
    assert [len(data) for data in splits.values()] == [64, 128]
    data = splits["val"]
    assert (data.info.task, data.info.classes) == ("binary", ("benign", "malignant"))
    assert np.array_equal(data.truth(3)[0][0], data.instances(3) > 0)
    with pytest.raises(InputError, match="--data x: the images of tissue2d are generated"):
        open_splits(Request("tissue2d", "x"), ["val"])


# Layouts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETS)
def test_glands(name, tmp_path):
    splits = opened(name, SETS[name](tmp_path))
    assert [len(data) for data in splits.values()] == [9, 1, 3]
    assert len(opened(name, tmp_path, ["train"])["train"]) == 9  # pre-training does not see what validates
    for data in splits.values():
        for i, identity in enumerate(data.ids):
            number = int(identity.rpartition("_")[2].partition(".")[0])
            image, glands = picture(number)
            assert np.array_equal(data.instances(i), glands)
            assert np.array_equal(data.truth(i)[0][0], glands > 0)
            data.detected = True
            item = data[i]
            assert np.array_equal(item["image"].numpy(), image.transpose(2, 0, 1))
            assert np.array_equal(item["instances"].numpy(), glands)
    assert all("test" in identity or "valid" in identity for identity in splits["test"].ids)
    mask = tmp_path / {"glas": "Warwick/train_1_anno.bmp", "crag": "train/Annotation/train_1.png"}[name]
    save(mask, np.zeros((5, 5), np.uint8))
    data = opened(name, tmp_path)
    broken = [(part, i) for part in data.values() for i, identity in enumerate(part.ids) if "train_1." in identity]
    ((part, i),) = broken
    part.detected = True
    with pytest.raises(UnreadableImage, match="its annotation has 5 × 5 pixels, it has 80 × 64"):
        part.load(i)
    mask.unlink()
    with pytest.raises(InputError, match="its annotation .* is missing"):
        opened(name, tmp_path)


def test_lists_of_glands(tmp_path):
    glas(tmp_path / "data")
    write_list(tmp_path / "train.txt", ["train_1.bmp", "Warwick/train_2.bmp"])
    write_list(tmp_path / "val.txt", ["train_3.bmp"])
    lists = {"list": str(tmp_path / "train.txt"), "val_list": str(tmp_path / "val.txt")}
    splits = opened("glas", tmp_path / "data", **lists)
    assert splits["train"].ids == ["Warwick/train_1.bmp", "Warwick/train_2.bmp"]
    assert (splits["val"].ids, len(splits["test"])) == (["Warwick/train_3.bmp"], 3)
    write_list(tmp_path / "train.txt", ["train_99.bmp"])
    with pytest.raises(InputError, match=r"train.txt, line 1: train_99.bmp is not in --data"):
        opened("glas", tmp_path / "data", **lists)


def test_nct(tmp_path):
    for home in ("NCT-CRC-HE-100K", "CRC-VAL-HE-7K"):
        for label, name in enumerate(NCT_CLASSES):
            for i in range(3):
                save(tmp_path / home / name / f"{name}-{i}.tif", np.full((8, 8, 3), 20 * label, np.uint8))
    splits = opened("nct", tmp_path)
    assert [len(data) for data in splits.values()] == [24, 3, 27]
    assert splits["train"].info.classes == NCT_CLASSES
    for data in splits.values():
        assert all(identity.split("/")[1] == NCT_CLASSES[label] for identity, label in zip(data.ids, data.labels))
        assert all(int(data[i]["image"].max()) == 20 * int(data.labels[i]) for i in range(len(data)))
    (tmp_path / "NCT-CRC-HE-100K" / "OTHER").mkdir()
    with pytest.raises(InputError, match="OTHER: not a class of nct, which has ADI"):
        opened("nct", tmp_path)


@pytest.mark.parametrize("name", ["nct", "glas", "crag"])
def test_folders_of_something_else(name, tmp_path):
    with pytest.raises(InputError, match="there"):
        opened(name, tmp_path)
    with pytest.raises(InputError, match="no such file or folder"):
        opened(name, tmp_path / "gone")


# COCO ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETS)
def test_coco_and_back(name, tmp_path, capsys):
    root = SETS[name](tmp_path / "published")
    to_coco.main(["--data", str(root), "--dataset", name, "--output", str(tmp_path / "coco")])
    assert "10 images, 20 glands" in capsys.readouterr().out
    ours, theirs = opened(name, root), opened(name, tmp_path / "coco")
    assert [len(data) for data in theirs.values()] == [9, 1, 3]
    known = {
        identity.split("/")[-1]: data.instances(i) for data in ours.values() for i, identity in enumerate(data.ids)
    }
    for data in theirs.values():
        for i, identity in enumerate(data.ids):
            original = known[identity.split("/")[-1]]
            assert np.array_equal(data.instances(i), (original == 3) + 2 * (original == 7))
    content = json.loads((tmp_path / "coco" / "annotations" / "test.json").read_text())
    first = content["annotations"][0]
    assert first["bbox"] == [6, 8, 30, 23]
    assert first["area"] == 30 * 23
    with pytest.raises(InputError, match="is --data; choose another folder"):
        to_coco.main(["--data", str(root), "--dataset", name, "--output", str(root)])
    with pytest.raises(InputError, match="has annotations/train.json already; choose another folder"):
        to_coco.main(["--data", str(root), "--dataset", name, "--output", str(tmp_path / "coco")])
    image = next(path for path in sorted(root.rglob("*")) if path.name in ("train_1.bmp", "train_1.png"))
    image = image if image.suffix == ".bmp" else root / "train" / "Images" / "train_1.png"
    image.write_bytes(image.read_bytes()[:200])
    with pytest.raises(InputError, match="train_1.*truncated"):
        to_coco.main(["--data", str(root), "--dataset", name, "--output", str(tmp_path / "again")])


def test_coco_files_of_other_tools(tmp_path):
    """Polygons, and run lengths that are not compressed."""
    save(tmp_path / "train" / "a.png", np.zeros((20, 30, 3), np.uint8))
    runs = [20 * 5, 10, 10, 10, 20 * 30 - 130]  # down the columns: the upper halves of columns 5 and 6
    shapes = [[[10.0, 4.0, 20.0, 4.0, 20.0, 14.0, 10.0, 14.0]], {"size": [20, 30], "counts": runs}]
    content = {
        "images": [{"id": 5, "file_name": "a.png", "height": 20, "width": 30}],
        "annotations": [{"id": i, "image_id": 5, "segmentation": shape} for i, shape in enumerate(shapes)],
    }
    path = tmp_path / "annotations" / "train.json"
    path.parent.mkdir()
    path.write_text(json.dumps(content))
    (tile,) = coco_tiles(tmp_path)
    glands = tile.glands()
    assert (glands[4:14, 10:20] == 1).all()
    assert (glands == 1).sum() == 100
    assert (glands[:10, 5:7] == 2).all()
    assert (glands == 2).sum() == 20
    content["annotations"][0]["segmentation"] = {"nothing": 1}
    path.write_text(json.dumps(content))
    with pytest.raises(UnreadableImage, match="its annotation 1 is no polygon and no run lengths"):
        coco_tiles(tmp_path)[0].glands()
    content["images"][0]["file_name"] = "b.png"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="names .*b.png, which is missing"):
        coco_tiles(tmp_path)
    path.write_text("[1]")
    with pytest.raises(InputError, match="train.json: no COCO annotation"):
        coco_tiles(tmp_path)


def test_damaged_coco_files(tmp_path):
    save(tmp_path / "train" / "a.png", np.zeros((20, 30, 3), np.uint8))
    path = tmp_path / "annotations" / "train.json"
    path.parent.mkdir()

    def tiles(image=(), annotation=(), **more):
        one = {"id": 5, "file_name": "a.png", "height": 20, "width": 30} | dict(image)
        shape = {"id": 7, "image_id": 5, "segmentation": [[1, 1, 9, 1, 9, 9]]} | dict(annotation)
        path.write_text(json.dumps({"images": [one], "annotations": [shape], **more}))
        return coco_tiles(tmp_path)

    assert tiles()[0].glands().any()
    for image in ({"height": None}, {"height": "20"}, {"width": -1}, {"file_name": 3}, {"file_name": "/etc/a.png"},
                  {"file_name": "../train/a.png"}, {"id": [1]}):  # fmt: skip
        with pytest.raises(InputError, match="train.json: no COCO annotation"):
            tiles(image)
    same = {"id": 5, "file_name": "a.png", "height": 20, "width": 30}
    for twice in ([same, same | {"id": 6}], [same, same | {"file_name": "b.png"}]):
        with pytest.raises(InputError, match="comes twice"):
            tiles(images=twice)
    with pytest.raises(InputError, match="annotation 7 is a crowd"):
        tiles(annotation={"iscrowd": 1})
    for shape in ([[1, 2]], [{"a": 1}], {"size": [20, 30], "counts": [-5, 605]}, {"size": [20, 30], "counts": [5, 5]}):
        with pytest.raises(UnreadableImage, match="its annotation 1 is no polygon"):
            tiles(annotation={"segmentation": shape})[0].glands()
    path.write_text("[" * 100000)
    with pytest.raises(InputError, match="train.json: no COCO annotation"):
        coco_tiles(tmp_path)


def coco_tiles(root):
    from medssl.datasets.pathology import find_coco

    return find_coco(root)


def perfect(scores=(0.9, 0.8)):
    truth = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "gland"}]}
    for image in range(3):
        glands = picture(image, 200, 240)[1].repeat(2, 0).repeat(2, 1)
        truth["images"].append({"id": image, "height": glands.shape[0], "width": glands.shape[1]})
        truth["annotations"] += annotations_of(glands, image, len(truth["annotations"]) + 1)
    found = [{**{k: a[k] for k in ("image_id", "category_id", "bbox", "segmentation")}, "score": scores[i % 2]}
             for i, a in enumerate(truth["annotations"])]  # fmt: skip
    return truth, found


def test_precision_of_a_perfect_prediction():
    truth, found = perfect()
    values = average_precision(truth, found)
    for kind in ("box", "mask"):
        assert values[kind]["ap"] == values[kind]["ap50"] == values[kind]["ap75"] == pytest.approx(100)
        assert values[kind]["ap_large"] is None  # there is none
    none = average_precision(truth, [])
    assert none["mask"]["ap"] == none["box"]["ap50"] == 0
    assert none["mask"]["ap_large"] is None


def test_precision_by_hand():
    truth, found = perfect()
    half = average_precision(truth, found[::2])  # one gland of two: precision 1 up to a recall of ½
    assert half["box"]["ap"] == pytest.approx(100 * 51 / 101, abs=0.01)
    moved = [dict(each, bbox=[each["bbox"][0] + 0.2 * each["bbox"][2], *each["bbox"][1:]]) for each in found]
    values = average_precision(truth, moved)  # IoU .8 / 1.2 = .67: found at .5, .55, .6 and .65
    assert values["box"]["ap"] == pytest.approx(40, abs=0.5)
    assert values["box"]["ap50"] == pytest.approx(100)
    assert values["box"]["ap75"] == 0
    assert values["mask"]["ap"] == pytest.approx(100)
    wrong = [dict(each, score=0.95, image_id=(each["image_id"] + 1) % 3, bbox=[0, 0, 3, 3]) for each in found]
    assert average_precision(truth, [*found, *wrong])["box"]["ap"] == pytest.approx(50, abs=1)


# Mask R-CNN ----------------------------------------------------------------------------------------


def test_targets_and_flips():
    glands = torch.from_numpy(picture(0)[1].astype(np.int32))
    target = instance_targets(glands)
    assert target["boxes"].tolist() == [[6, 8, 36, 30], [44, 40, 70, 60]]
    assert target["labels"].tolist() == [1, 1]
    assert torch.equal(target["masks"].bool(), torch.stack([glands == 3, glands == 7]))
    empty = instance_targets(torch.zeros(4, 5, dtype=torch.int32))
    assert (empty["boxes"].shape, empty["masks"].shape) == ((0, 4), (0, 4, 5))
    image = torch.randint(0, 256, (3, 64, 80), dtype=torch.uint8)
    batch = {"image": [image] * 16, "instances": [glands] * 16}
    views = DetectionViews([0] * 3, [1] * 3)
    out = views.train()(batch, Draws((0, 0), 16))
    mirrored = 0
    for x, target in zip(out["images"], out["targets"]):
        if torch.equal(x, image.flip(2) / 255):
            mirrored += 1
            assert target["boxes"].tolist() in ([[44, 8, 74, 30], [10, 40, 36, 60]],)
        else:
            assert torch.equal(x, image / 255)
            assert target["boxes"].tolist() == [[6, 8, 36, 30], [44, 40, 70, 60]]
    assert 0 < mirrored < 16
    plain = views.eval()(batch)
    assert all(torch.equal(x, image / 255) for x in plain["images"])


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    encoder = make_encoder("resnet18")
    return encoder, make_detector(encoder, IMAGENET, 1, (64,), 96, 200, proposals=20, samples=16)


def test_the_encoder_is_inside(small):
    encoder, network = small
    x = torch.randn(1, 3, 64, 64)
    maps = network.backbone.eval()(x)
    assert {name: tuple(m.shape) for name, m in maps.items()} == {
        "0": (1, 256, 16, 16), "1": (1, 256, 8, 8), "2": (1, 256, 4, 4), "3": (1, 256, 2, 2), "pool": (1, 256, 1, 1)
    }  # fmt: skip
    assert network.backbone.encoder is encoder
    assert all(p.requires_grad for p in encoder.parameters())


def test_sides_of_training_and_test(small):
    _, network = small
    image = [torch.rand(3, 50, 70)]
    assert network.transform.eval()(image)[0].tensors.shape[-2:] == (96, 160)  # 96 × 134, padded to 32
    network.transform.train()
    sizes = {network.transform(image)[0].image_sizes[0][0] for _ in range(3)}
    assert sizes == {64}


def test_losses_fall_on_a_fixed_batch(small):
    _, network = small
    method = Detector(network).train()
    glands = [torch.from_numpy(picture(i)[1].astype(np.int32)) for i in range(2)]
    images = [torch.from_numpy(picture(i)[0]).permute(2, 0, 1) / 255 for i in range(2)]
    batch = {"images": images, "targets": [instance_targets(g) for g in glands]}
    optimizer = torch.optim.SGD(method.parameters(), 0.01, momentum=0.9)
    history = []
    for _ in range(12):
        torch.manual_seed(0)
        losses = method(batch, None)
        history.append(sum(losses.values()).item())
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert set(losses) == {"classifier", "box_reg", "mask", "objectness", "rpn_box_reg"}
    assert history[-1] < 0.6 * history[0]
    pictures = method.eval().pictures(batch)
    assert {name: tuple(x.shape) for name, x in pictures.items()} == {
        "view": (2, 3, 160, 160),
        "true": (2, 3, 160, 160),
    }


SMALL = [
    "--b",
    "2",
    "--workers",
    "0",
    "--device",
    "cpu",
    "--no-tensorboard",
    "--sides",
    "64",
    "72",
    "--test-side",
    "64",
]
SMALL += ["--proposals", "20", "--samples", "16", "--warmup-iterations", "0"]


def test_the_encoder_may_stay_as_it_is(tmp_path):
    glas(tmp_path / "data")
    before = make_encoder("resnet18").state_dict()
    torch.save({"state_dict": before, "arch": "resnet18", "dims": 2}, tmp_path / "e.pt")
    run = ["--data", str(tmp_path / "data"), "--dataset", "glas", "--init", str(tmp_path / "e.pt"), *SMALL]
    run += ["--iterations", "1", "--output", str(tmp_path / "out"), "--encoder-lr-scale"]
    for scale, same in (("0", True), ("1", False)):
        finetune_detection.main([*run, scale, "--resume", "never"])
        after = torch.load(tmp_path / "out" / "best.pt", weights_only=True)["state_dict"]
        (key,) = (key for key in after if key.endswith("encoder.layer4.1.conv2.weight"))
        assert torch.equal(after[key], before["layer4.1.conv2.weight"]) == same


def test_script(tmp_path):
    glas(tmp_path / "data")
    torch.save({"state_dict": make_encoder("resnet18").state_dict(), "arch": "resnet18", "dims": 2}, tmp_path / "e.pt")
    run = ["--data", str(tmp_path / "data"), "--dataset", "glas", "--init", str(tmp_path / "e.pt"), *SMALL]
    run += ["--iterations", "2", "--milestones", "1", "--runs", "2", "--output", str(tmp_path / "out")]
    finetune_detection.main(run)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (results["metric"], results["task"], len(results["trials"])) == ("ap_box", "detection", 2)
    assert results["matched_keys"] == 100
    for trial in results["trials"]:
        assert trial["steps"] == 2
        assert trial["ap_box"] == trial["box"]["ap"]
        assert trial["train_images"] == 9
    assert results["mean"] == pytest.approx(np.mean([trial["ap_box"] for trial in results["trials"]]))
    assert len(list((tmp_path / "out" / "overlays").glob("*.png"))) == 3
    truth = json.loads((tmp_path / "out" / "predictions" / "truth.json").read_text())
    found = json.loads((tmp_path / "out" / "predictions" / "instances.json").read_text())
    best = max(range(2), key=lambda k: results["trials"][k]["val_score"])
    assert average_precision(truth, found)["mask"] == results["trials"][best]["mask"]
    kept = torch.load(tmp_path / "out" / "best.pt", weights_only=True)
    encoder = make_encoder("resnet18")
    make_detector(encoder, kept["normalization"], 1, (64,), 64, 200).load_state_dict(kept["state_dict"])
    again = json.loads((tmp_path / "out" / "results.json").read_text())
    finetune_detection.main(run)  # finished trials are not done again
    assert json.loads((tmp_path / "out" / "results.json").read_text())["trials"] == again["trials"]
    # Unless they were cut short, or annotations have changed since.
    with pytest.raises(InputError, match="trial_0: was ended with --steps None, now 1"):
        finetune_detection.main([*run, "--steps", "1"])
    for path in (tmp_path / "data").rglob("*_anno.bmp"):
        Image.fromarray(np.asarray(Image.open(path)).T.clip(0, 1)).save(path)
    with pytest.raises(InputError, match="was started with other data"):
        finetune_detection.main(run)


@pytest.mark.slow
def test_continued_exactly(tmp_path):
    """4 = 2 + resume + 2, also where sides are small."""
    glas(tmp_path / "data")
    run = ["--data", str(tmp_path / "data"), "--dataset", "glas", *SMALL, "--warmup-iterations", "1"]
    run += ["--iterations", "4", "--milestones", "3", "--save-every", "2"]
    finetune_detection.main([*run, "--output", str(tmp_path / "whole")])
    real, steps = Detector.forward, []

    def stop_after_two(method, *inputs):
        if len(steps) == 2:
            raise KeyboardInterrupt
        steps.append(1)
        return real(method, *inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Detector, "forward", stop_after_two)
        with pytest.raises(KeyboardInterrupt):
            finetune_detection.main([*run, "--output", str(tmp_path / "cut")])
    finetune_detection.main([*run, "--output", str(tmp_path / "cut")])
    whole, cut = (torch.load(tmp_path / name / "best.pt", weights_only=True)["state_dict"] for name in ("whole", "cut"))
    assert all(torch.equal(cut[key], value) for key, value in whole.items())


class Oracle(torch.nn.Module):
    """Finds the true instances of the images that it is shown, in their order, each image's last one twice."""

    def __init__(self, data):
        super().__init__()
        self.backbone, self.data, self.calls = torch.nn.Identity(), data, 0

    def forward(self, images):
        assert tuple(images[0].shape[1:]) == self.data.instances(self.calls).shape
        target = instance_targets(torch.from_numpy(self.data.instances(self.calls).astype(np.int32)))
        self.calls += 1
        count = len(target["boxes"])
        order = torch.tensor([*range(count), count - 1])
        scores = torch.linspace(0.9, 0.6, count + 1)
        scores[-1] = 0.1  # the second time, with less trust than anything else
        masks = target["masks"][order, None].float()
        return [{"boxes": target["boxes"][order].float(), "scores": scores, "masks": 0.2 + 0.6 * masks}]


def test_true_instances_have_full_precision(tmp_path):
    """From the network's answer to the written files: boxes, images, scores and masks are where they belong."""
    glas(tmp_path / "data")
    data = open_splits(Request("glas", str(tmp_path / "data")), ["test"])["test"]
    data.detected, data.labels = True, None
    assert len(data) > 1
    args = finetune_detection.get_parser().parse_args(["--workers", "0", "--output", str(tmp_path / "out")])
    found = evaluate(Oracle(data), DetectionViews(**IMAGENET), data, args, setup(None, "cpu", True), write=True)
    assert (found["ap_box"], found["ap_mask"]) == (100, 100)
    truth = json.loads((tmp_path / "out" / "predictions" / "truth.json").read_text())
    written = json.loads((tmp_path / "out" / "predictions" / "instances.json").read_text())
    for each in truth["annotations"]:
        own = [f for f in written if f["image_id"] == each["image_id"] and f["bbox"] == each["bbox"]]
        assert any(f["segmentation"] == each["segmentation"] and f["score"] > 0.5 for f in own)
    assert len(written) == len(truth["annotations"]) + len(data)


def test_a_network_that_gives_no_numbers(tmp_path):
    glas(tmp_path / "data")
    run = ["--data", str(tmp_path / "data"), "--dataset", "glas", *SMALL, "--iterations", "2", "--milestones", "1"]
    with pytest.raises(InputError, match="not finite"):
        finetune_detection.main([*run, "--lr", "1e30", "--warmup-iterations", "0", "--output", str(tmp_path / "out")])


def test_glands_are_segmented_too(tmp_path):
    crag(tmp_path / "data")
    finetune_segmentation.main(
        ["--data", str(tmp_path / "data"), "--dataset", "crag", "--image-size", "32", "--b", "2", "--epoch-steps", "1",
         "--steps", "1", "--workers", "0", "--device", "cpu", "--no-tensorboard", "--output", str(tmp_path / "out")]
    )  # fmt: skip
    assert list(json.loads((tmp_path / "out" / "results.json").read_text())["per_class"]) == ["gland"]


def test_defaults_and_bad_input(tmp_path):
    args = finetune_detection.get_parser().parse_args([])
    assert (args.b, args.lr, args.momentum, args.weight_decay, args.schedule) == (16, 0.02, 0.9, 1e-4, "step")
    protocol = finetune_detection.PROTOCOLS["crag"]
    assert (protocol["iterations"], protocol["milestones"], protocol["test_side"]) == (15000, [10000, 13000], 768)
    for command, message in (
        (["--dataset", "chest"], "--dataset chest: has no instances; known are crag, glas, tissue2d"),
        (["--dataset", "glas"], "--dataset glas needs --data"),
        (["--dataset", "glas", "--cache", "x"], "--cache x: holds images of one size"),
        (["--dataset", "glas", "--texture-size", "64"], "--texture-size 64: detection reads images at their own size"),
        (["--epochs", "3"], "--epochs: schedules of detection are in steps; give --iterations"),
        (["--texture-size", "64", "--sides", "90", "80"], "--sides 90 80: the first number must not be above"),
        (["--texture-size", "64", "--arch", "unet3d"], "a 3-dimensional encoder"),
        (["--init", str(tmp_path / "gone.pt")], "no such checkpoint file"),
    ):
        with pytest.raises(InputError, match=message):
            finetune_detection.main([*command, "--device", "cpu", "--output", str(tmp_path / "out")])


def test_annotations_that_are_all_empty_are_refused(tmp_path):
    glas(tmp_path / "data")
    for pattern, split in (("test*_anno.bmp", "test"), ("*_anno.bmp", "train")):
        for path in (tmp_path / "data").rglob(pattern):
            Image.fromarray(np.zeros_like(np.asarray(Image.open(path)))).save(path)
        with pytest.raises(InputError, match=f"no image of the {split} split has an instance"):
            finetune_detection.main(
                ["--data", str(tmp_path / "data"), "--dataset", "glas", *SMALL, "--output", str(tmp_path / "out")]
            )


def test_a_refused_command_leaves_the_way_free(tmp_path):
    glas(tmp_path / "data")
    run = ["--data", str(tmp_path / "data"), "--dataset", "glas", *SMALL, "--iterations", "2", "--milestones", "1"]
    run += ["--warmup-iterations", "0", "--output", str(tmp_path / "out")]
    torch.save({"state_dict": {"x": torch.zeros(1)}}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="no entry fits"):
        finetune_detection.main([*run, "--init", str(tmp_path / "other.pt")])
    finetune_detection.main(run)


def test_schedules_hold_their_rate():
    for name, protocol in finetune_detection.PROTOCOLS.items():
        assert protocol["warmup_iterations"] < protocol["milestones"][0] < protocol["iterations"], name
    with pytest.raises(InputError, match=r"--warmup-iterations 5: the rate falls at 4 \(--milestones\)"):
        finetune_detection.main(["--warmup-iterations", "5", "--milestones", "4", "--texture-size", "64"])


def test_strides_do_not_depend_on_the_first_image(small):
    _, network = small
    for pool in (network.roi_heads.box_roi_pool, network.roi_heads.mask_roi_pool):
        assert pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]
        areas = [torch.tensor([[0.0, 0, side, side]]) for side in (50, 112, 224, 448, 2000)]
        assert pool.map_levels([torch.cat(areas)]).tolist() == [0, 1, 2, 3, 3]


def test_sizes_of_masks_are_their_own():
    """A thin mask in a large box is a small one, whatever its box."""
    truth, found = perfect()
    diagonal = np.eye(400, 480, dtype=bool)
    thin = {**found[0], "bbox": [0, 0, 400, 400], "segmentation": encode(diagonal), "score": 0.99}
    precision = average_precision(truth, [*found, thin])
    large = [key for key in ("ap_medium", "ap_large") if precision["mask"][key] is not None]
    assert all(precision["mask"][key] == 100 for key in large)


def test_gpus_share_batch_statistics_under_torchrun(monkeypatch):
    # torch has SyncBatchNorm for GPUs alone: what is wrapped there can be seen here, not run.
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", lambda method, **options: method)
    network = make_detector(make_encoder("resnet18"), IMAGENET, 1, (64,), 96, 200, proposals=20, samples=16)
    before = network.state_dict()
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    gpu = Devices(torch.device("cuda", 0), [], rank=0, world=2)
    wrapped = wrap(Detector(network), gpu, Detector.find_unused, Detector.sync_batch_norm)
    synchronised = [module for module in wrapped.modules() if isinstance(module, torch.nn.SyncBatchNorm)]
    assert len(synchronised) == len(norms) > 20
    assert not any(type(module) is torch.nn.BatchNorm2d for module in network.modules())  # which evaluation uses
    after = network.state_dict()
    assert before.keys() == after.keys()
    assert all(after[key].data_ptr() == before[key].data_ptr() for key in before)  # the optimiser's own tensors
