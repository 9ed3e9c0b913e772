"""Segmentation of images: layouts and splits, fields of view, measures, decoders that are loaded, the script."""

import argparse
import csv
import gzip
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from medssl import finetune_classification, finetune_segmentation, train_magical
from medssl.datasets.base import ImageDataset, Info, Request
from medssl.datasets.masked_images import fundus_field
from medssl.datasets.phantoms import radiograph
from medssl.datasets.phantoms.fundus import field_of_view, fundi
from medssl.datasets.registry import open_splits
from medssl.engine.parallel import Run
from medssl.errors import InputError, UnreadableImage
from medssl.losses.segmentation import binary_dice_cross_entropy
from medssl.models.encoders import IMAGENET, initialise_unet
from medssl.models.unet2d import UNet2d
from medssl.preprocess import cache_images
from medssl.reading.masks import read_mask
from medssl.reading.tables import write_list
from medssl.tasks.segmentation import summarise_cases
from medssl.tasks.segmentation2d import (
    MEASURES,
    ImageSegmenter,
    centreline_dice,
    file_names,
    judge,
    label_map,
)
from medssl.tasks.trials import labelled_subset
from medssl.views.draws import Draws
from medssl.views.of_images import SegmentationViews


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if path.suffix == ".gz":
        stream = io.BytesIO()
        image.save(stream, "PPM")
        path.write_bytes(gzip.compress(stream.getvalue()))
    else:
        image.save(path, **options)


def picture(number, height=40, width=48):
    """A colour image with a bright bar, the bar's mask, and a field of view without the rim."""
    rng = np.random.default_rng(number)
    mask = np.zeros((height, width), bool)
    mask[8 + number % 5 : 20 + number % 5, 10:38] = True
    image = (rng.integers(0, 40, (height, width, 3)) + 150 * mask[..., None]).astype(np.uint8)
    field = np.zeros_like(mask)
    field[4:-4, 4:-4] = True
    return image, mask, field


def make(root, name, count=10):
    """A copy of a set with `count` patients."""
    for i in range(1, count + 1):
        image, mask, field = picture(i)
        white = mask * np.uint8(255)
        if name == "drive":
            for part, number in (("training", i + 20), ("test", i)):
                image, mask, field = picture(number)
                save(root / part / "images" / f"{number:02d}_{part}.tif", image)
                save(root / part / "1st_manual" / f"{number:02d}_manual1.gif", mask * np.uint8(255))
                save(root / part / "mask" / f"{number:02d}_{part}_mask.gif", field * np.uint8(255))
        elif name == "stare":
            end = ".gz" if i % 2 else ""
            save(root / "stare-images" / f"im{i:04d}.ppm{end}", image)
            save(root / "labels-ah" / f"im{i:04d}.ah.ppm{end}", white)
        elif name == "chase":
            for eye in "LR":
                save(root / f"Image_{i:02d}{eye}.jpg", image)
                save(root / f"Image_{i:02d}{eye}_1stHO.png", mask)
        elif name == "montgomery":
            save(root / "CXR_png" / f"MCUCXR_{i:04d}_{i % 2}.png", image[..., 0])
            left, right = mask.copy(), mask.copy()
            left[:, 24:], right[:, :24] = False, False
            for side, half in (("leftMask", left), ("rightMask", right)):
                save(root / "ManualMask" / side / f"MCUCXR_{i:04d}_{i % 2}.png", half)
        elif name == "shenzhen":
            save(root / "CXR_png" / f"CHNCXR_{i:04d}_{i % 2}.png", image[..., 0])
            if i != 1:
                save(root / "mask" / f"CHNCXR_{i:04d}_{i % 2}_mask.png", white)
        else:
            save(root / "images" / "a" / f"{i}.jpg", image, quality=95)
            save(root / "masks" / "a" / f"{i}_mask.png", white)
    return root


def opened(root, dataset, **more):
    options = {"d": None, "image_size": 32, "texture_size": 0, "protocol": "auto", **more}
    return finetune_segmentation.open_data(argparse.Namespace(dataset=dataset, data=str(root), **options))


# Data ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["drive", "stare", "chase", "montgomery", "shenzhen", "folder"])
def test_layouts(tmp_path, name, capsys):
    splits = opened(make(tmp_path, name), name)
    sizes = {"drive": [9, 1, 10], "chase": [14, 2, 4], "shenzhen": [6, 1, 2]}.get(name, [7, 1, 2])
    assert [len(data) for data in splits.values()] == sizes
    assert ("1 images for train have no mask" in capsys.readouterr().err) == (name == "shenzhen")
    for data in splits.values():
        assert data.info.channels == (1 if name in ("montgomery", "shenzhen") else 3)
        assert data.labels is None
        for i, identity in enumerate(data.ids):
            number = int(re.search(r"\d+", identity.split("/")[-1])[0])
            image, mask, field = picture(number)
            masks, seen = data.truth(i)
            assert np.array_equal(masks[0], mask)
            if name in ("stare", "chase"):  # the noise of these pictures is dark, so that the bar is all there is
                field = fundus_field(data.read(data.positions[i]))
                assert (field[mask]).mean() > 0.9
                assert not field[:4].any()
            assert np.array_equal(seen, field if data.tubular else np.ones_like(field))
            item = data[i]
            assert item["image"].shape == (data.info.channels, 32, 32)
            assert item["mask"].shape == item["field"].shape == (1, 32, 32)
            assert item["size"].tolist() == [40, 48]
            small = np.asarray(Image.fromarray(mask * np.uint8(255)).resize((32, 32), Image.Resampling.BILINEAR))
            assert np.abs(item["mask"][0].numpy().astype(int) - small).max() <= 1
    if name == "chase":
        assert all(len(set(data.patients)) == len(data) / 2 for data in splits.values())


def test_pre_training_sees_what_fine_tuning_trains_on(tmp_path):
    for name in ("drive", "stare", "montgomery", "shenzhen"):
        root = make(tmp_path / name, name)
        own = open_splits(Request(name, str(root), image_size=32), ["train"])["train"]
        assert set(opened(root, name)["train"].ids) <= set(own.ids)
        assert not set(opened(root, name)["test"].ids) & set(own.ids)
        assert "mask" not in own[0]


def test_radiographs_are_classified_too(tmp_path):
    for name in ("montgomery", "shenzhen"):
        data = open_splits(Request(name, str(make(tmp_path / name, name)), image_size=32), ["train"])["train"]
        assert data.info.task == "binary"
        assert data.info.classes == ("normal", "tuberculosis")
        assert data.labels.tolist() == [int(identity[-5]) for identity in data.ids]


def test_radiographs_are_fine_tuned(tmp_path):
    root = make(tmp_path / "data", "shenzhen", 20)
    run = ["--dataset", "shenzhen", "--data", str(root), "--image-size", "32", "--steps", "1", "--b", "4"]
    finetune_classification.main(
        [*run, "--workers", "0", "--device", "cpu", "--no-tensorboard", "--output", str(tmp_path / "out")]
    )
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (results["config"]["protocol"], results["config"]["select"]) == ("ours", "loss")
    assert list(results["per_class"]) == ["normal", "tuberculosis"]


def test_without_test_masks_drive_is_split(tmp_path):
    root = make(tmp_path, "drive", 20)
    for path in (root / "test" / "1st_manual").iterdir():
        path.unlink()
    (root / "test" / "1st_manual").rmdir()
    splits = opened(root, "drive")
    assert [len(data) for data in splits.values()] == [14, 2, 4]
    assert all(identity.startswith("training/") for data in splits.values() for identity in data.ids)


def test_lists(tmp_path):
    root = make(tmp_path / "data", "stare")
    for split, names in (("train", ["stare-images/im0002.ppm"]), ("val", ["im0004.ppm"]), ("test", ["im0006.ppm"])):
        write_list(tmp_path / f"{split}.txt", names)
    given = {"list": "train", "val_list": "val", "test_list": "test"}
    given = {option: str(tmp_path / f"{split}.txt") for option, split in given.items()}
    splits = opened(root, "stare", **given)
    assert [data.ids for data in splits.values()] == [[f"stare-images/im000{i}.ppm"] for i in (2, 4, 6)]
    write_list(tmp_path / "val.txt", ["im9999.ppm"])
    with pytest.raises(InputError, match=r"val.txt, line 1: im9999.ppm is not in --data"):
        opened(root, "stare", **given)


def test_alpha_is_no_label(tmp_path):
    mask = np.zeros((6, 6), np.uint8)
    mask[2:4, 2:4] = 255
    for mode in ("L", "LA", "RGBA", "1", "P"):
        Image.fromarray(mask).convert(mode).save(tmp_path / f"{mode}.png")
        assert np.array_equal(read_mask(tmp_path / f"{mode}.png") > 0, mask > 0), mode


def test_pre_training_on_a_folder_with_masks(tmp_path, capsys):
    """Neither masks nor held-out images are seen; of a list, all images, which fine-tuning on it alone says."""
    root = make(tmp_path, "folder", 16)
    own = open_splits(Request(None, str(root), image_size=32), ["train"])["train"]
    splits = opened(root, "folder")
    assert own.ids == splits["train"].ids
    assert all(identity.startswith("images/") for identity in own.ids)
    names = tmp_path / "all.txt"
    write_list(names, sorted(name for data in splits.values() for name in data.ids))
    listed = open_splits(Request(None, str(root), list=str(names), image_size=32), ["train"])["train"]
    assert len(listed) == sum(map(len, splits.values()))
    assert "has seen all" not in capsys.readouterr().err
    again = opened(root, "folder", list=str(names))
    assert {split: sorted(data.ids) for split, data in again.items()} == {k: sorted(v.ids) for k, v in splits.items()}
    assert "pre-training on this list has seen all of its images" in capsys.readouterr().err


def slices(root, values):
    """Three volumes of four slices, masks with these values."""
    for volume in range(10):
        for i in range(4):
            mask = np.zeros((32, 32), np.uint8)
            mask[4:20, 4:20], mask[8:12, 8:12] = values
            save(root / "images" / f"volume-{volume}" / f"{i:04d}.png", mask // 3 + 9)
            save(root / "masks" / f"volume-{volume}" / f"{i:04d}.png", mask)
    return root


def test_labelled_slices_are_of_whole_volumes(tmp_path):
    data = opened(slices(tmp_path, (1, 2)), "lits")["train"]
    part = labelled_subset(data, 30, 0)
    assert len(part) == 4 * len(set(part.patients)) == 8
    assert labelled_subset(data, 0.1, 0).patients == 4 * labelled_subset(data, 0.1, 0).patients[:1]


def test_values_that_are_no_labels(tmp_path):
    data = opened(slices(tmp_path / "lits", (127, 255)), "lits")["train"]
    with pytest.raises(UnreadableImage, match="its mask has the value 127, and labels are 0, 1, 2"):
        data.load(0)
    root = make(tmp_path / "folder", "folder")
    for path in (root / "masks").rglob("*.png"):
        Image.open(path).convert("L").save(path.with_suffix(".jpg"))
        path.unlink()
    with pytest.raises(InputError, match="a mask in JPEG, which changes values; save masks as PNG"):
        opened(root, "folder")


def test_a_network_that_gives_no_numbers(tmp_path):
    with pytest.raises(InputError, match="outputs are not finite in evaluation"):
        finetune_segmentation.main(
            ["--dataset", "fundus2d", "--image-size", "64", "--b", "2", "--epoch-steps", "1", "--steps", "1", "--lr",
             "1e30", "--workers", "0", "--device", "cpu", "--no-tensorboard", "--output", str(tmp_path)]
        )  # fmt: skip


def test_damaged_decoders_and_normalizations(tmp_path):
    network = UNet2d("resnet18", 1)
    whole = {"state_dict": network.encoder.state_dict(), "arch": "resnet18", "dims": 2,
             "decoder_state_dict": network.decoder.state_dict()}  # fmt: skip
    for more, message in (
        ({"decoder_state_dict": [1]}, "its decoder is"),
        ({"normalization": {"kind": "z"}}, "its normalization is not one of a 2-dimensional encoder"),
        ({"normalization": {"mean": [0.5], "std": [0.5]}}, "its normalization is not"),
        ({"normalization": {"mean": [0.5] * 3, "std": [0.0] * 3}}, "its normalization is not"),
        ({"normalization": {"mean": "abc", "std": [1.0] * 3}}, "its normalization is not"),
        ({"normalization": [1]}, "its normalization is not"),
    ):
        torch.save(whole | more, tmp_path / "x.pt")
        with pytest.raises(InputError, match=message):
            initialise_unet(UNet2d("resnet18", 1), "resnet18", str(tmp_path / "x.pt"), "encoder+decoder")


def test_patients_in_names_are_kept_together(tmp_path):
    for patient in range(8):
        for number in range(3):
            image, mask, _ = picture(patient)
            save(tmp_path / "images" / f"{patient:08d}_{number:03d}.png", image)
            save(tmp_path / "masks" / f"{patient:08d}_{number:03d}.png", mask)
    patients = [set(data.patients) for data in opened(tmp_path, "folder").values()]
    assert sum(map(len, patients)) == 8


@pytest.mark.parametrize("name", ["drive", "folder", "phantom2d"])
def test_masks_beside_cached_images(tmp_path, name):
    root = None if name == "phantom2d" else str(make(tmp_path / "data", name))
    data = [] if root is None else ["--data", root]
    cache_images.main(
        ["--dataset", name, *data, "--texture-size", "32", "--workers", "0", "--output", str(tmp_path / "c")]
    )
    options = {"dataset": name, "data": root, "d": None, "image_size": 32, "texture_size": 0, "protocol": "auto"}
    plain, cached = (finetune_segmentation.open_data(argparse.Namespace(**options, cache=cache))
                     for cache in (None, str(tmp_path / "c")))  # fmt: skip
    for split, own in plain.items():
        for i in range(min(3, len(own))):
            for key in ("image", "mask", "field"):
                assert torch.equal(cached[split][i][key], own[i][key])


def test_label_maps_of_a_folder(tmp_path):
    for i in range(6):
        image, mask, _ = picture(i)
        labels = np.where(mask, 3, 0).astype(np.uint8)
        labels[30:36, 20:30] = 7
        stored = Image.fromarray(labels, "P")
        stored.putpalette([n % 256 for n in range(768)])
        save(tmp_path / "images" / f"{i}.png", image)
        (tmp_path / "masks").mkdir(exist_ok=True)
        stored.save(tmp_path / "masks" / f"{i}.png")
    data = opened(tmp_path, "folder")["train"]
    assert data.mask_labels == ("label 3", "label 7")
    masks, _ = data.truth(0)
    assert np.array_equal(masks[0], picture(int(data.ids[0][7]))[1])
    assert masks[1].sum() == 60
    assert opened(tmp_path, "folder", labels=[7])["train"].mask_labels == ("label 7",)
    with pytest.raises(InputError, match="--labels 5: no mask has it; they have 3, 7"):
        opened(tmp_path, "folder", labels=[5])


def test_bad_data(tmp_path):
    root = make(tmp_path / "drive", "drive")
    (root / "training" / "1st_manual" / "23_manual1.gif").unlink()
    with pytest.raises(InputError, match="23_training.tif: its mask .*23_manual1.gif is missing"):
        opened(root, "drive")
    with pytest.raises(InputError, match="no training/images"):
        opened(make(tmp_path / "other", "stare"), "drive")
    with pytest.raises(InputError, match="wanted are the folders images and masks"):
        opened(make(tmp_path / "stare", "stare"), "folder")
    with pytest.raises(InputError, match="at least 3 patients are needed"):
        opened(make(tmp_path / "few", "stare", 2), "stare")
    for option, value in (("spacing", [1, 1, 1]), ("window", [0, 1])):
        with pytest.raises(InputError, match=f"--{option}: folder has its own"):
            opened(make(tmp_path / "pairs", "folder"), "folder", **{option: value})
    root = make(tmp_path / "sizes", "stare")
    save(root / "labels-ah" / "im0002.ah.ppm", np.zeros((10, 10), np.uint8))
    splits = opened(root, "stare")
    data, i = next((data, data.ids.index(n)) for data in splits.values() for n in data.ids if "0002" in n)
    with pytest.raises(UnreadableImage, match="its mask has 10 × 10 pixels, it has 48 × 40"):
        data.load(i)
    for path in (tmp_path / "pairs" / "masks" / "a").iterdir():
        save(path, np.zeros((40, 48), np.uint8))
    with pytest.raises(InputError, match="has a value above 0"):
        opened(tmp_path / "pairs", "folder")


def test_phantoms_have_masks():
    images, masks = fundi(3, 96, 5)
    assert images.shape == (3, 96, 96, 3)
    assert masks.shape == (3, 96, 96)
    assert all(0.04 < mask.mean() < 0.3 for mask in masks)
    for image, mask in zip(images, masks):  # vessels are darker than what surrounds them
        green, inside = image[..., 1].astype(float), np.hypot(*np.mgrid[-1:1:96j, -1:1:96j]) < 0.8
        assert green[inside & (mask == 1)].mean() < 0.9 * green[inside & (mask == 0)].mean()
    again, _ = fundi(2, 96, 5)
    assert np.array_equal(again, images[:2])
    with pytest.raises(InputError, match="phantom fundi of 32 pixels: at least 64 are needed"):
        fundi(1, 32)
    data = opened_phantom("phantom2d")
    found = [data.truth(i)[0].any() for i in range(20)]
    assert found == [bool(label) for label in radiograph.radiographs(20, 32, radiograph.SPLIT_SEEDS["train"])[1]]


def opened_phantom(name):
    options = argparse.Namespace(dataset=name, data=None, d=None, image_size=32, texture_size=0, protocol="auto")
    return finetune_segmentation.open_data(options)["train"]


# Views and losses ----------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", [None, 24])
def test_image_mask_and_field_move_together(patch):
    mask = torch.zeros(6, 1, 64, 64, dtype=torch.uint8)
    for i in range(6):
        mask[i, 0, 5 * i : 5 * i + 30, 10 : 40 + i] = 255
    batch = {"image": mask.expand(-1, 3, -1, -1).clone(), "mask": mask, "field": torch.full_like(mask, 255)}
    batch["size"] = torch.full((6, 2), 64.0)
    views = SegmentationViews([0, 0, 0], [1, 1, 1], 64, patch, degrees=20, flips=(True, True), jitter=(0, 0))
    out = views(batch, Draws((1,), 6))
    side = patch or 64
    assert out["view"].shape == (6, 3, side, side)
    assert ((out["view"][:, :1] > 0.5) == (out["target"] == 1)).all()
    assert out["target"].unique().tolist() == [0, 1]
    assert out["view"][out["field"].expand(-1, 3, -1, -1) == 0].abs().max() <= 0.5  # what is beside is black
    assert not torch.equal(out["target"][0], views(batch, Draws((2,), 6))["target"][0])
    plain = views.eval()(batch)
    assert torch.equal(plain["target"], mask / 255)
    assert torch.allclose(plain["view"], batch["image"] / 255, atol=1e-6)


def test_flips_are_the_ones_asked_for():
    views = SegmentationViews(**IMAGENET, size=64, degrees=0, flips=(False, True), zoom=(1, 1))
    from medssl.views.draws import Columns

    theta = views.random_parts(400, Columns(Draws((0,), 400).uniform(0, 6)))
    assert (theta[:, 0, 0] == 1).all()
    assert 150 < (theta[:, 1, 1] == -1).sum() < 250
    assert (theta[:, :, 2] == 0).all()


def test_losses_count_the_field_alone():
    logits = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    target = (torch.rand(2, 2, 8, 8, generator=torch.Generator().manual_seed(1)) < 0.4).float()
    field = torch.zeros(2, 1, 8, 8)
    field[:, :, :4] = 1
    losses = binary_dice_cross_entropy(logits, target, field, "bce+dice")
    p, t = logits.sigmoid()[:, :, :4], target[:, :, :4]
    assert torch.allclose(losses["cross_entropy"], -(t * p.log() + (1 - t) * (1 - p).log()).mean(), atol=1e-6)
    overlap = 2 * (p * t).sum((2, 3)) / (p.sum((2, 3)) + t.sum((2, 3)))
    assert torch.allclose(losses["dice"], 1 - overlap.mean(), atol=1e-5)
    sum(losses.values()).backward()
    assert logits.grad[:, :, 4:].abs().max() == 0
    for kind, names in (("bce", {"cross_entropy"}), ("dice", {"dice"})):
        assert set(binary_dice_cross_entropy(logits, target, field, kind)) == names


# Measures ------------------------------------------------------------------------------------------


def test_measures_by_hand():
    true, field = np.zeros((10, 10), bool), np.ones((10, 10), bool)
    true[2:4, :], field[:, 8:] = True, False  # 16 of 80 pixels inside the field
    p = np.zeros((10, 10), np.float32)
    p[2, :], p[9, :4], p[:, 9] = 0.9, 0.8, 1.0  # 8 right, 4 wrong, and some outside of the field
    (row,) = judge("a", "a", p[None], true[None], field, ["x"])
    assert row["dice"] == 2 * 8 / (12 + 16)
    assert row["sensitivity"] == 0.5
    assert row["specificity"] == pytest.approx(60 / 64)
    # Of 16 × 64 pairs, 8 × 64 are won by the row that was found, 8 × 60 are ties.
    assert row["auroc"] == pytest.approx((8 * 64 + 8 * 60 / 2) / (16 * 64))
    assert row["cldice"] is None
    assert row["hd95"] == 6  # a third of the predicted pixels lies so far from the true ones
    (missed,) = judge("c", "c", p[None] * 0, true[None], field, ["x"])
    assert missed["hd95"] == pytest.approx(10 * 2**0.5)
    (empty,) = judge("b", "b", p[None] * 0, true[None] & False, field, ["x"], tubular=True)
    assert [empty[key] for key in ("dice", "auroc", "sensitivity", "cldice", "hd95")] == [None] * 5
    assert empty["specificity"] == 1
    summary = summarise_cases([row, empty], ["x"], MEASURES)
    assert summary["dice"] == row["dice"]
    assert summary["specificity"] == pytest.approx((60 / 64 + 1) / 2)
    assert summary["pooled_dice"] == pytest.approx(100 * row["dice"])


def test_slices_of_a_case_are_judged_together():
    field = np.ones((4, 4), bool)
    rows = []
    for image, (true, found) in enumerate([(4, 4), (8, 0), (0, 0)]):
        t, p = np.zeros((2, 16), np.float32)
        t[:true], p[:found] = 1, 1
        rows += judge(str(image), "volume", p.reshape(1, 4, 4), t.reshape(1, 4, 4) > 0, field, ["x"])
    rows += judge("3", "other", np.ones((1, 4, 4)), np.ones((1, 4, 4), bool), field, ["x"])
    assert summarise_cases(rows, ["x"], MEASURES)["dice"] == (2 * 4 / (4 + 12) + 1) / 2


def test_the_field_of_a_fundus_is_what_is_not_black():
    images, _ = fundi(4, 128, 3)
    for image in images:
        wrong = fundus_field(image) ^ field_of_view(128)
        assert wrong.mean() < 0.02
    assert fundus_field(np.zeros((8, 8, 3), np.uint8)).all()


def test_centreline_dice():
    line = np.zeros((20, 40), bool)
    line[8:13, 2:38] = True
    thin = np.zeros_like(line)
    thin[10, 2:38] = True
    assert centreline_dice(line, line) == 1
    assert centreline_dice(thin, line) == pytest.approx(1, abs=0.05)  # of the right course, though too thin
    half = line.copy()
    half[:, 20:] = False
    assert centreline_dice(half, line) == pytest.approx(2 / 3, abs=0.05)
    assert centreline_dice(line & False, line) == 0
    assert centreline_dice(line & False, line & False) is None


def test_label_maps():
    found = np.array([[[True, True, False]], [[False, True, False]]])
    assert label_map(found).tolist() == [[1, 2, 0]]
    assert label_map(found[:1]).tolist() == [[255, 255, 0]]


def test_files_of_one_name_stay_apart():
    assert file_names(["images/1.png", "images/2.png"]) == ["images_1", "images_2"]
    assert len(set(file_names(["images/1.png", "images/1.jpg", "a/b_c.png", "a_b/c.png"]))) == 4


# The script ----------------------------------------------------------------------------------------


def script(root, output, *more, dataset="drive"):
    data = ["--dataset", dataset, *(["--data", str(root)] if root else [])]
    small = ["--image-size", "32", "--b", "2", "--epoch-steps", "1", "--workers", "0", "--device", "cpu"]
    finetune_segmentation.main([*data, *small, "--no-tensorboard", "--output", str(output), *more])
    return json.loads((output / "results.json").read_text())


def test_the_bars_are_found_at_full_size(tmp_path):
    root = make(tmp_path / "data", "drive", 6)
    more = ["--epochs", "12", "--lr", "3e-3", "--patch", "24", "--epoch-steps", "5", "--loss", "bce+dice"]
    results = script(root, tmp_path / "out", *more)
    assert results["mean"] > 0.8
    assert results["per_class"]["vessels"]["auroc"] > 0.95
    assert 0 < results["cldice"] <= 1
    rows = list(csv.DictReader((tmp_path / "out" / "predictions" / "cases.csv").open()))
    assert len(rows) == 6
    for i, row in enumerate(rows, 1):
        _, mask, field = picture(i)
        found = np.asarray(Image.open(tmp_path / "out" / "predictions" / f"test_images_{i:02d}_test.png"))
        assert found.shape == mask.shape
        assert set(np.unique(found)) <= {0, 255}
        assert not found[~field].any()
        shared = (mask & field & (found > 0)).sum()
        assert float(row["dice"]) == pytest.approx(2 * shared / ((mask & field).sum() + (found > 0).sum()))
        overlay = np.asarray(Image.open(tmp_path / "out" / "overlays" / f"test_images_{i:02d}_test.png"))
        assert overlay.shape == (40, 144, 3)
    kept = torch.load(tmp_path / "out" / "best.pt", weights_only=True)
    UNet2d("resnet18", 1).load_state_dict(kept["state_dict"])
    assert kept["patch"] == [24]


def test_trials_continue_and_differ(tmp_path):
    root = make(tmp_path / "data", "montgomery")
    more = ["--steps", "1", "--trials", "2", "--annotation-percent", "50"]
    first = script(root, tmp_path / "out", *more, dataset="montgomery")
    (tmp_path / "out" / "trial_1" / "result.json").unlink()
    again = script(root, tmp_path / "out", *more, dataset="montgomery")
    for one, two in zip(first["trials"], again["trials"]):
        assert one["dice"] == two["dice"]
        assert one["train_images"] == 4
    assert first["trials"][0]["auroc"] != first["trials"][1]["auroc"]
    published = ["--steps", "1", "--annotation_percent", "50", "--run", "1", "--trial", "1"]
    second = script(root, tmp_path / "second", *published, dataset="montgomery")
    assert second["trials"][0]["auroc"] == first["trials"][1]["auroc"]


def test_pre_training_is_loaded_with_and_without_its_decoder(tmp_path, capsys):
    small = ["--image-size", "32", "-b", "4", "--steps", "1", "--workers", "0", "--device", "cpu", "--arch", "resnet18"]
    train_magical.main(
        [*small, "--dataset", "fundus2d", "--ratio", "0.1", "--texture-size", "64", "--output", str(tmp_path)]
    )
    weights = str(tmp_path / "encoder.pt")
    state = torch.load(weights, weights_only=True)
    for load, same in (("encoder", False), ("encoder+decoder", True)):
        network = UNet2d("resnet18", 1)
        report = initialise_unet(network, "resnet18", weights, load)
        assert torch.equal(network.encoder.conv1.weight, state["state_dict"]["conv1.weight"])
        key = "blocks.0.conv1.0.weight"
        assert torch.equal(network.decoder.state_dict()[key], state["decoder_state_dict"][key]) == same
        assert report["matched"] == 100 + same * len(state["decoder_state_dict"])
    del state["decoder_state_dict"]
    torch.save(state, tmp_path / "alone.pt")
    with pytest.raises(InputError, match="its decoder is not there; use --load encoder"):
        initialise_unet(UNet2d("resnet18", 1), "resnet18", str(tmp_path / "alone.pt"), "encoder+decoder")
    root = make(tmp_path / "data", "folder", 4)
    results = script(
        root, tmp_path / "out", "--init", weights, "--load", "encoder+decoder", "--steps", "1", dataset="folder"
    )
    assert results["load"] == "encoder+decoder"


def test_bad_options(tmp_path):
    root = make(tmp_path / "data", "drive", 3)
    for more, message in {
        ("--norm", "group"): "--norm: is for volumes, and drive has 2 dimensions",
        ("--largest-component",): "--largest-component: is for volumes",
        ("--patch", "16", "16", "16"): "--patch 16 16 16: drive wants one side",
        ("--patch", "64"): "--patch 64: larger than --image-size 32",
        ("--arch", "unet3d"): "--arch unet3d: a 3-dimensional encoder",
        ("--arch", "nothing"): "--arch nothing: not an encoder",
        ("--init", str(tmp_path / "none.pt")): "no such checkpoint file",
        ("--d", "3"): "--d 3: data set drive has 2 dimensions",
    }.items():
        with pytest.raises(InputError, match=message):
            script(root, tmp_path / "out", *more)
    args = finetune_segmentation.get_parser().parse_args(["--loss", "bce"])
    volumes = ImageDataset(Info("phantom3d", 3), None, ["a"])
    with pytest.raises(InputError, match="--loss bce: not for volumes, as phantom3d has; use one of ce.dice, bce"):
        finetune_segmentation.complete(args, volumes)


def test_the_loss_falls_on_one_batch():
    torch.manual_seed(0)
    method = ImageSegmenter(UNet2d("resnet18", 1), "bce+dice")
    images, masks, fields = (torch.from_numpy(np.stack(parts)) for parts in zip(picture(1), picture(2)))
    view = images.permute(0, 3, 1, 2) / 127.5 - 1
    batch = {"view": view, "target": masks[:, None].float(), "field": fields[:, None].float()}
    optimizer = torch.optim.Adam(method.parameters(), 3e-3)
    totals = []
    for _ in range(25):
        totals.append(sum(method(batch, Run()).values()))
        optimizer.zero_grad()
        totals[-1].backward()
        optimizer.step()
    assert totals[-1] < 0.6 * totals[0]
    assert {name: x.shape[1] for name, x in method.pictures(batch).items()} == dict.fromkeys(
        ("view", "true", "predicted"), 3
    )


# Slices of volumes ---------------------------------------------------------------------------------


def test_slices_of_lits(tmp_path, capsys):
    import SimpleITK as sitk

    from medssl.preprocess import make_lists, slices

    root, cut = tmp_path / "lits", tmp_path / "slices"
    root.mkdir()
    for i in range(4):
        hu = np.full((6, 8, 10), -1000, np.int16)  # z, y, x
        hu[2:4, 1:4, 2:9], hu[3, 2, 3:5] = 100 + i, 0
        labels = np.zeros(hu.shape, np.uint8)
        labels[2:4, 1:4, 2:9], labels[3, 2, 3:5] = 1, 2
        for name, array in (("volume", hu), ("segmentation", labels)):
            sitk.WriteImage(sitk.GetImageFromArray(array), str(root / f"{name}-{i}.nii"))
    command = ["--data", str(root), "--output", str(cut)]
    slices.main(command)
    assert "volume-3: 6 slices" in capsys.readouterr().out
    splits = opened(cut, "lits")
    assert [len(data) for data in splits.values()] == [12, 6, 6]
    assert all(len(set(data.patients)) == len(data) / 6 for data in splits.values())
    for data in splits.values():
        assert data.mask_labels == ("liver", "tumour")
        for i, identity in enumerate(data.ids):
            volume, z = int(identity.split("/")[1][-1]), int(identity[-8:-4])
            masks, _ = data.truth(i)
            assert (masks[0].sum(), masks[1].sum()) == ((21, 2 if z == 3 else 0) if z in (2, 3) else (0, 0))
            assert (masks[0][1:4, 2:9] == (z in (2, 3))).all()
            grey = data.read(data.positions[i])
            assert grey[1, 2] == (round((100 + volume + 200) / 400 * 255) if z in (2, 3) else 0)
    for folder in (root, cut):  # lists name volumes, for both
        make_lists.main(["--dataset", "lits", "--data", str(folder), "--output", str(tmp_path / folder.name / "l")])
    names = {"list": "train", "val_list": "valid", "test_list": "test"}
    lists = {option: str(tmp_path / "lits" / "l" / f"lits_{part}.txt") for option, part in names.items()}
    assert {k: d.ids for k, d in opened(cut, "lits", **lists).items()} == {k: d.ids for k, d in splits.items()}
    # What is finished stays as it is; what is not is made anew.
    (cut / "images" / "volume-0" / "0000.png").write_bytes(b"")
    (cut / "masks" / "volume-1").rename(cut / "masks" / ".volume-1.tmp")
    slices.main(command)
    assert (cut / "images" / "volume-0" / "0000.png").read_bytes() == b""
    assert len(list((cut / "masks" / "volume-1").iterdir())) == 6
    assert not list(cut.glob("*/.*"))
    with pytest.raises(InputError, match="slices there have the window -200 200"):
        slices.main([*command, "--window", "0", "100"])
    with pytest.raises(InputError, match=r"--d 2: .* has volumes; cut them with preprocess/slices.py"):
        opened(root, "lits", d=2)
    with pytest.raises(InputError, match="takes images of 2; cut it with preprocess/slices.py"):
        train_magical.main(
            ["--dataset", "lits", "--data", str(root), "--arch", "resnet18", "--output", str(tmp_path / "o")]
        )
    (root / "volume-2.nii").write_bytes((root / "volume-2.nii").read_bytes()[:400])
    with pytest.raises(InputError, match="1 of 4 volumes could not be read"):
        slices.main(["--data", str(root), "--output", str(tmp_path / "again")])
    assert len(list((tmp_path / "again" / "images").iterdir())) == 3


@pytest.mark.parametrize("name", ["drive", "chase", "montgomery", "shenzhen"])
def test_made_lists(tmp_path, name):
    from medssl.preprocess import make_lists

    root = make(tmp_path / "data", name, 20)
    for split, more in (("official", []), ("random", ["--seed", "3", "--test-fraction", "0.25"])):
        out = tmp_path / split
        make_lists.main(["--dataset", name, "--data", str(root), "--split", split, *more, "--output", str(out)])
        files = {"list": "train", "val_list": "valid", "test_list": "test"}
        lists = {option: str(out / f"{name}_{part}.txt") for option, part in files.items()}
        listed = open_splits(Request(name, str(root), image_size=32, **lists), ["train", "val", "test"])
        if split == "official":
            own = open_splits(Request(name, str(root), image_size=32), ["train", "val", "test"])
            assert {part: data.ids for part, data in listed.items()} == {part: data.ids for part, data in own.items()}
        else:
            patients = [set(data.patients) for data in listed.values()]
            assert sum(map(len, patients)) == len(set.union(*patients))
            assert len(patients[2]) == (10 if name == "drive" else 5)
    with pytest.raises(InputError, match="--seed: .*own split is fixed; leave it out"):
        make_lists.main(["--dataset", name, "--data", str(root), "--seed", "3", "--output", str(tmp_path / "o")])
    text = (tmp_path / "official" / f"{name}_train.txt").read_text().splitlines()
    assert all(len(line.split()) == (2 if name in ("montgomery", "shenzhen") else 1) for line in text)
