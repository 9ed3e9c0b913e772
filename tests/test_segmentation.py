"""Segmentation of volumes: data sets of cases, sliding windows, measures, and the script."""

import argparse
import csv
import json
from unittest import mock

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from medssl import finetune_segmentation
from medssl.datasets import masked_volumes, registry
from medssl.datasets.base import ImageDataset, Info
from medssl.datasets.pairs import find_volume_pairs
from medssl.datasets.phantoms import ct
from medssl.engine.parallel import Run
from medssl.errors import InputError, UnreadableImage
from medssl.models.encoders import initialise_unet
from medssl.models.pcrlv2_model_3d import PCRLv23d
from medssl.models.unet3d import UNet3d
from medssl.tasks import segmentation3d as volumes
from medssl.tasks import trials
from medssl.tasks.segmentation import (
    counts,
    dice,
    gaussian_window,
    hausdorff95,
    sliding_window,
    summarise_cases,
    window_starts,
)
from medssl.tasks.segmentation3d import judge, largest_component
from medssl.views.draws import Draws
from medssl.views.of_volumes import VolumeSegmentationViews

FLIPPED = (-1, 0, 0, 0, -1, 0, 0, 0, 1)
OBLIQUE = (0.8, -0.6, 0, 0.6, 0.8, 0, 0, 0, 1)


def write(path, array, spacing=(1.0, 1.0, 1.0), direction=(1, 0, 0, 0, 1, 0, 0, 0, 1), origin=(5.0, -7.0, 11.0)):
    """Write (X, Y, Z) voxels in a file's own order of axes."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(np.asarray(array).transpose(2, 1, 0)))
    image.SetSpacing(spacing)
    image.SetDirection(direction)
    image.SetOrigin(origin)
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))


def ball(shape, seed, value=1):
    """A bright ball on a dark ground, and its mask."""
    rng = np.random.default_rng(seed)
    centre = [rng.uniform(0.35, 0.65) * n for n in shape]
    grid = np.ogrid[tuple(slice(n) for n in shape)]
    mask = sum((x - c) ** 2 for x, c in zip(grid, centre)) < (0.3 * min(shape)) ** 2
    image = np.where(mask, 80, 10) + rng.normal(0, 3, shape)
    return image.astype(np.float32), (mask * value).astype(np.uint8)


def write_pairs(root, count=5, shapes=((16, 16, 16),), value=1, **geometry):
    for i in range(count):
        image, mask = ball(shapes[i % len(shapes)], i, value)
        write(root / "images" / f"case{i}.nii.gz", image, **geometry)
        write(root / "masks" / f"case{i}.nii.gz", mask, **geometry)
    return root


def opened(root, dataset="folder", d=None, **more):
    options = {"image_size": None, "protocol": "auto", **more}
    return finetune_segmentation.open_data(argparse.Namespace(dataset=dataset, data=str(root), d=d, **options))


def everything(splits):
    return {data.ids[i]: data[i] for data in splits.values() for i in range(len(data))}


# Data ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("images/a/{}.nii.gz", "masks/a/{}.nii.gz"), ("images/{}.mha", "labels/{}_seg.nii"),
        ("imagesTr/{}.nii.gz", "labelsTr/{}.nii.gz"), ("{}.nrrd", "{}_mask.nrrd"), ("{0}/{0}.nii", "{0}/{0}_label.nii"),
    ],
)  # fmt: skip
def test_layouts_of_a_folder(tmp_path, image, mask):
    for i in range(3):
        voxels, truth = ball((8, 9, 10), i)
        write(tmp_path / image.format(f"c{i}"), voxels)
        write(tmp_path / mask.format(f"c{i}"), truth)
    items = everything(opened(tmp_path))
    assert sorted(name.rpartition("/")[2] for name in items) == ["c0", "c1", "c2"]
    for name, item in items.items():
        voxels, truth = ball((8, 9, 10), int(name[-1]))
        assert np.array_equal(item["mask"], truth)
        assert np.corrcoef(item["image"][0].float().ravel(), voxels.ravel())[0, 1] > 0.95


def test_lits_window_spacing_and_labels(tmp_path):
    for i in range(3):
        hu = np.full((6, 8, 10), -1000.0, np.float32)
        hu[2:5, 3:6, 4:8], hu[0, 0, 0] = 100, 1500
        labels = np.zeros(hu.shape, np.uint8)
        labels[2:5, 3:6, 4:8] = 1
        labels[3, 4, 5] = 2
        write(tmp_path / "part" / f"volume-{i}.nii", hu, (0.7, 0.7, 2.5), FLIPPED)
        write(tmp_path / "part" / f"segmentation-{i}.nii.gz", labels, (0.7, 0.7, 2.5), FLIPPED)
    data = opened(tmp_path, "lits")["test"]
    item = data[0]
    assert item["image"].shape == (1, 6, 8, 25)  # 10 slices of 2.5 mm
    assert item["image"].dtype == torch.float16
    assert item["size"].tolist() == pytest.approx([4.2, 5.6, 25])
    assert item["image"][0, 5, 7, 0] == 1
    assert item["image"][0, 2, 3, 14].item() == pytest.approx((100 + 200) / 400, abs=1e-3)
    assert item["image"][0, 0, 0, 0] == 0
    assert data.regions == {"liver": (1, 2), "tumour": (2,)}
    labels, true, spacing = data.restore(0, item["mask"].numpy())
    assert spacing == pytest.approx((0.7, 0.7, 2.5))
    assert np.array_equal(labels, true)  # to 1 mm and back changes no label
    assert (true == 2).sum() == 1


def test_brats_modalities_and_values(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.uniform(1, 1000, (4, 8, 8, 8)).astype(np.float32)
    labels = rng.choice([0, 1, 2, 4], (8, 8, 8)).astype(np.uint8)
    for i in range(3):
        folder = tmp_path / "HGG" / f"p{i}"
        for name, image in zip(("t1", "t1ce", "t2", "flair"), images):
            write(folder / f"p{i}_{name}.nii.gz", image)
        write(folder / f"p{i}_seg.nii.gz", labels)
    data = opened(tmp_path, "brats")["train"]
    item = data[0]
    assert data.ids[0].startswith("HGG/p")
    assert item["image"].shape == (4, 8, 8, 8)
    for channel, image in zip(item["image"], images):
        assert np.corrcoef(channel.float().ravel(), image.ravel())[0, 1] > 0.99
    assert np.array_equal(item["mask"], np.where(labels == 4, 3, labels))
    data.write(tmp_path / "out.nii.gz", 0, item["mask"].numpy())
    assert np.array_equal(
        sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out.nii.gz"))).transpose(2, 1, 0), labels
    )
    rows = judge("x", item["mask"].numpy(), np.where(item["mask"].numpy() == 3, 1, item["mask"].numpy()), data.regions)
    assert [row["dice"] for row in rows] == [1, 1, 0]  # whole tumour, core, enhancing
    (tmp_path / "HGG" / "p1" / "p1_t2.nii.gz").unlink()
    with pytest.raises(InputError, match=r"p1_t2.nii\[.gz\]: missing"):
        opened(tmp_path, "brats")


def test_masks_follow_their_image_in_any_orientation(tmp_path):
    """The same patient, stored in other directions: the mask of an oblique scan keeps whole labels."""
    for i, direction in enumerate((FLIPPED, OBLIQUE, (0, 0, 1, 1, 0, 0, 0, 1, 0))):
        image, mask = ball((12, 14, 16), i, value=7)
        write(tmp_path / "images" / f"c{i}.nii.gz", image, (1.0, 1.5, 2.0), direction)
        write(tmp_path / "masks" / f"c{i}.nii.gz", mask, (1.0, 1.5, 2.0), direction)
    for split, data in opened(tmp_path).items():
        for i in range(len(data)):
            item = data[i]
            inside = item["mask"] == 1
            assert item["mask"].max() == 1, split
            assert item["image"][0][inside].float().mean() > item["image"][0][~inside].float().mean() + 0.5
            labels, true, _ = data.restore(i, item["mask"].numpy())
            assert np.array_equal(labels, true)
            data.write(tmp_path / "back.nii.gz", i, labels)
            written = sitk.ReadImage(str(tmp_path / "back.nii.gz"))
            original = sitk.ReadImage(str(tmp_path / "masks" / f"{data.ids[i]}.nii.gz"))
            assert written.GetSize() == original.GetSize()
            assert written.GetDirection() == pytest.approx(original.GetDirection(), abs=1e-5)
            a, b = (sitk.GetArrayFromImage(each) == 7 for each in (written, original))
            assert dice(counts(a, b)) > (0.9 if data.ids[i] == "c1" else 0.9999)


def test_splits_by_lists_and_at_random(tmp_path):
    write_pairs(tmp_path, 6, shapes=((4, 4, 4),))
    parts = {split: data.ids for split, data in opened(tmp_path).items()}
    assert {split: sorted(ids) for split, ids in parts.items()} == {
        "train": ["case0", "case1", "case4", "case5"], "val": ["case2"], "test": ["case3"]
    }  # fmt: skip
    assert sorted(sum(parts.values(), [])) == [f"case{i}" for i in range(6)]
    for name, text in {"a": "case5\ncase1.nii.gz\n", "b": "case2", "c": "case0\ncase3"}.items():
        (tmp_path / name).write_text(text)
    lists = {key: str(tmp_path / name) for key, name in {"list": "a", "val_list": "b", "test_list": "c"}.items()}
    listed = opened(tmp_path, **lists)
    assert [data.ids for data in listed.values()] == [["case5", "case1"], ["case2"], ["case0", "case3"]]
    with pytest.raises(InputError, match="nothing says which cases are for test; give --test-list"):
        opened(tmp_path, list=lists["list"], val_list=lists["val_list"])
    (tmp_path / "b").write_text("case1")
    with pytest.raises(InputError, match="train and val share 1 images, such as case1"):
        opened(tmp_path, **lists)
    (tmp_path / "c").write_text("nobody")
    with pytest.raises(InputError, match="c: nobody is no case of --data"):
        opened(tmp_path, **lists)


def test_chosen_labels_and_others(tmp_path):
    write_pairs(tmp_path, 5, value=3)
    data = opened(tmp_path)["train"]
    assert data.mask_labels == ("background", "label 3")
    _, extra = ball((16, 16, 16), 0, value=3)
    extra[0, 0, 0] = 9
    test_case = opened(tmp_path)["test"].ids[0]
    write(tmp_path / "masks" / f"{test_case}.nii.gz", extra)
    with pytest.raises(InputError, match=f"{test_case}.nii.gz: label 9 is in no training mask; .* --labels 3"):
        opened(tmp_path)
    chosen = opened(tmp_path, labels=[3])
    assert everything(chosen)[test_case]["mask"].max() == 1
    with pytest.raises(InputError, match="--labels 4: no training mask has it; there are 3"):
        opened(tmp_path, labels=[4])


def test_bad_cases_in_one_line(tmp_path):
    root = write_pairs(tmp_path / "one", 1)
    with pytest.raises(InputError, match="1 case cannot be split"):
        opened(root)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no volumes with masks"):
        opened(tmp_path / "empty")

    root = write_pairs(tmp_path / "many", 4)
    image, mask = ball((16, 16, 16), 1)
    broken = {
        "no mask of that name": lambda: (root / "masks" / "case1.nii.gz").unlink(),
        "16 x 16 x 15 voxels, and its image case1.nii.gz has 16 x 16 x 16": lambda: write(
            root / "masks" / "case1.nii.gz", mask[:, :, :15]
        ),
        "voxels of 0.5 x 0.5 x 0.5 mm, and those of its image case1.nii.gz have 1 x 1 x 1": lambda: write(
            root / "masks" / "case1.nii.gz", mask, spacing=(0.5, 0.5, 0.5), origin=(8.75, -3.25, 14.75)
        ),
        "places it 40 mm from its image": lambda: write(root / "masks" / "case1.nii.gz", mask, origin=(45, -7, 11)),
        "has the value 0.5; the labels of masks are whole": lambda: write(
            root / "masks" / "case1.nii.gz", mask.astype(np.float32) / 2
        ),
        "stray.nii.gz: a mask without an image": lambda: (
            write(root / "masks" / "case1.nii.gz", mask),
            write(root / "masks" / "stray.nii.gz", mask),
        ),
    }
    for message, damage in broken.items():
        damage()
        with pytest.raises(InputError, match=message) as error:
            opened(root)
        assert "\n" not in str(error.value)
    (root / "masks" / "stray.nii.gz").unlink()
    with pytest.raises(InputError, match="no images in images/"):
        opened(root, d=2)
    for i in range(4):
        write(root / "masks" / f"case{i}.nii.gz", 0 * mask)
    with pytest.raises(InputError, match="neither this nor any other training mask has a label"):
        opened(root)


def test_a_damaged_file_is_named(tmp_path):
    root = write_pairs(tmp_path, 6)
    path = root / "masks" / "case0.nii.gz"
    path.write_bytes(path.read_bytes()[:-40])
    data = next(data for data in opened(root).values() if "case0" in data.ids)
    with pytest.raises(UnreadableImage, match=r"its mask case0.nii.gz: "):
        data.load(data.ids.index("case0"))


def test_cache_keeps_what_was_read(tmp_path, monkeypatch):
    root = write_pairs(tmp_path / "data", 3)
    data = opened(root, cache=str(tmp_path / "cache"))["train"]
    monkeypatch.setattr(masked_volumes, "read_volume", counted := mock.Mock(wraps=masked_volumes.read_volume))
    fresh, kept = data[0], data[0]
    assert counted.call_count == 1
    assert len(list((tmp_path / "cache").iterdir())) == 1
    for key in ("image", "mask", "size"):
        assert torch.equal(fresh[key], kept[key])
    other = opened(root, cache=str(tmp_path / "cache"), window=(0.0, 10.0))["train"]
    assert not torch.equal(other[0]["image"], fresh["image"])


# Patches and windows -------------------------------------------------------------------------------


def test_several_patches_of_each_volume():
    image = torch.stack([torch.zeros(1, 12, 12, 12), torch.rand(1, 12, 12, 12)])
    mask = torch.stack([torch.zeros(12, 12, 12), torch.ones(12, 12, 12)]).byte()
    views = VolumeSegmentationViews((8, 8, 8), scale=0, degrees=0, noise=0, blur=0, patches=3)
    batch = {"image": image, "mask": mask, "size": torch.full((2, 3), 12.0), "label": torch.zeros(2)}
    made = views(batch, Draws((0, 1), 2))
    assert made["view"].shape == (6, 1, 8, 8, 8)
    assert made["target"].flatten(1).float().mean(1).tolist() == [0, 0, 0, 1, 1, 1]
    assert not torch.equal(made["view"][3], made["view"][4])
    # Two processes with a volume each make the same patches as one.
    halves = [
        views({k: v[i : i + 1] for k, v in batch.items()}, Draws((0, 1), 2, start=i, count=1))["view"] for i in (0, 1)
    ]
    assert torch.equal(torch.cat(halves), made["view"])


@pytest.mark.parametrize(("length", "window", "overlap"), [(10, 10, 0.5), (33, 10, 0.5), (64, 16, 0.25), (17, 16, 0.9)])
def test_windows_reach_both_ends_and_overlap(length, window, overlap):
    starts = window_starts(length, window, overlap)
    assert (starts[0], starts[-1]) == (0, length - window)
    assert all(0 < b - a <= max(1, window * (1 - overlap)) for a, b in zip(starts, starts[1:]))


@pytest.mark.parametrize("shape", [(40,), (17, 23), (19, 5, 12)])
def test_sliding_windows_join_without_a_seam(shape):
    """What each voxel gives by itself comes back unchanged, also where the volume is smaller than the window."""
    volume = torch.rand(2, *shape)
    joined = sliding_window(lambda x: torch.cat([2 * x, x[:, :1]], 1), volume, (8,) * len(shape), b=3)
    assert torch.allclose(joined, torch.cat([2 * volume, volume[:1]]), atol=1e-5)


def test_windows_are_weighted_by_a_gaussian():
    seen = []

    def predict(x):  # the first window says 0, the second 1
        seen.append(len(x))
        return torch.arange(len(seen) - 1, len(seen)).view(1, 1, 1).expand(1, 1, 8).float()

    joined = sliding_window(predict, torch.zeros(1, 12), (8,), 0.5, b=1)[0]
    weights = np.exp(-0.5 * (np.arange(8) - 3.5) ** 2)
    expected = [0] * 4 + [weights[i] / (weights[i] + weights[i + 4]) for i in range(4)] + [1] * 4
    assert joined.tolist() == pytest.approx(expected, abs=1e-6)
    assert gaussian_window((8, 16)).shape == (8, 16)
    assert gaussian_window((9,))[4] == 1


# Measures ------------------------------------------------------------------------------------------


def test_hausdorff_by_hand():
    a, b = np.zeros((2, 20, 10, 10), bool)
    a[2, 3, 4] = b[5, 3, 8] = True
    assert hausdorff95(a, b, (2.0, 1.0, 0.5)) == pytest.approx(np.hypot(6, 2))
    a[:], b[:] = False, False
    a[2:12, 2:8, 2:8] = b[2:14, 2:8, 2:8] = True  # one face is 2 voxels further
    assert hausdorff95(a, b, (1.5, 1.0, 1.0)) == pytest.approx(3.0)
    assert hausdorff95(a, a, (1.5, 1.0, 1.0)) == 0
    whole = np.ones((6, 6, 6), bool)  # touches the border everywhere: the border is its surface
    assert hausdorff95(whole, np.pad(whole[1:-1, 1:-1, 1:-1], 1), (1, 1, 1)) == pytest.approx(3**0.5, abs=0.8)


def test_hausdorff_agrees_with_monai():
    """Values of monai 1.6.1: compute_hausdorff_distance(…, percentile=95, spacing=…)."""
    x, y, z = np.ogrid[:40, :36, :30]
    a = ((x - 18) / 12) ** 2 + ((y - 17) / 10) ** 2 + ((z - 14) / 9) ** 2 < 1
    b = ((x - 20) / 11) ** 2 + ((y - 16) / 11) ** 2 + ((z - 15) / 7) ** 2 < 1
    assert (a.sum(), b.sum()) == (4481, 3505)
    assert hausdorff95(a, b, (1, 1, 1)) == pytest.approx(3.1622777, rel=1e-6)
    assert hausdorff95(a, b, (0.7, 0.8, 2.5)) == pytest.approx(7.5, rel=1e-6)


def test_empty_masks():
    empty, some = np.zeros((2, 3, 4, 12), bool)
    some[1, 1, 1] = True
    assert dice(counts(empty, empty)) is None
    assert hausdorff95(empty, empty, (1, 1, 1)) is None
    assert dice(counts(empty, some)) == dice(counts(some, empty)) == 0
    assert hausdorff95(empty, some, (1, 1, 1)) == hausdorff95(some, empty, (1, 1, 1)) == 13  # the diagonal


def test_means_over_cases_and_pooled_voxels():
    regions = {"all": (1, 2), "two": (2,), "never": (3,)}
    rows = judge("a", np.array([1, 2, 2, 0]), np.array([1, 2, 0, 0]), regions)
    rows += judge("b", np.array([0, 1, 1, 1]), np.array([1, 1, 0, 0]), regions)
    values = summarise_cases(rows, regions, volumes.MEASURES)
    assert values["per_class"]["all"]["dice"] == pytest.approx((4 / 5 + 2 / 5) / 2)
    assert values["per_class"]["all"]["pooled_dice"] == pytest.approx(100 * 2 * 3 / 10)
    assert values["per_class"]["two"] == {
        "dice": pytest.approx(2 / 3), "hd95": None, "pooled_dice": pytest.approx(200 / 3), "cases": 1,
    }  # fmt: skip
    assert values["per_class"]["never"]["dice"] is None
    assert values["dice"] == pytest.approx((0.6 + 2 / 3) / 2)


def test_largest_component_keeps_what_hangs_together():
    labels = np.zeros((8, 8, 8), np.uint8)
    labels[1:4, 1:4, 1:4], labels[3, 3, 3] = 1, 2
    labels[4, 4, 4] = labels[6, 6, 1:7] = 2  # touches by a corner; lies apart
    kept = largest_component(labels)
    assert kept[1:4, 1:4, 1:4].tolist() == labels[1:4, 1:4, 1:4].tolist()
    assert (kept > 0).sum() == 27


# The script ----------------------------------------------------------------------------------------

SMALL = ["--arch", "unet3d_quarter", "--patch", "16", "16", "16", "--patches", "1", "--b", "2", "--epoch-steps", "2"]
SMALL += ["--epochs", "2", "--workers", "0", "--no-tensorboard", "--overlays", "1", "--dataset", "folder"]


def script(root, output, *more):
    finetune_segmentation.main([*SMALL, "--data", str(root), "--output", str(output), *more])
    return json.loads((output / "results.json").read_text())


def test_a_run_leaves_masks_numbers_and_weights(tmp_path):
    """Volumes of different shapes, resampled for the network, judged and written on their own voxels."""
    shapes = ((16, 16, 8), (18, 14, 9), (12, 20, 8))
    root = write_pairs(tmp_path / "data", 6, shapes, 5, spacing=(1.0, 1.0, 2.0), direction=FLIPPED)
    output = tmp_path / "out"
    results = script(root, output, "--spacing", "0", "0", "1", "--trials", "2", "--lr", "1e-2")
    assert results["metric"] == "dice"
    assert results["mean"] == pytest.approx(np.mean([trial["dice"] for trial in results["trials"]]))
    assert results["trials"][0]["steps"] == 4
    with open(output / "predictions" / "cases.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    best = max(results["trials"], key=lambda trial: trial["val_score"])["trial"]
    own = [row for row in rows if row["trial"] == str(best)]
    assert sorted({row["trial"] for row in rows}) == ["0", "1"]
    assert {row["region"] for row in rows} == {"label 5"}
    for row in own:  # the numbers are those of the files
        truth = sitk.ReadImage(str(root / "masks" / f"{row['case']}.nii.gz"))
        written = sitk.ReadImage(str(output / "predictions" / f"{row['case']}.nii.gz"))
        assert written.GetSize() == truth.GetSize()
        assert written.GetDirection() == truth.GetDirection()
        assert written.GetOrigin() == pytest.approx(truth.GetOrigin())
        p, t = (sitk.GetArrayFromImage(each) == 5 for each in (written, truth))
        assert float(row["dice"]) == pytest.approx(dice(counts(p, t)))
        assert float(row["hd95"]) == pytest.approx(hausdorff95(p, t, (2, 1, 1)))
    assert len(list((output / "overlays").iterdir())) == 1
    content = torch.load(output / "best.pt", weights_only=True)
    UNet3d(2, width=16).load_state_dict(content["state_dict"])
    assert (content["labels"], content["dims"]) == (["background", "label 5"], 3)


def test_starting_weights(tmp_path):
    torch.manual_seed(0)
    published, ours = PCRLv23d(width=16), UNet3d(3, width=16)
    torch.save({"state_dict": published.state_dict()}, tmp_path / "pcrlv2.pt")
    torch.save({"state_dict": ours.state_dict()}, tmp_path / "unet.pt")
    torch.save({"state_dict": {"conv1.weight": torch.zeros(64, 3, 7, 7)}}, tmp_path / "flat.pt")
    torch.save({"state_dict": ours.encoder.state_dict()}, tmp_path / "encoder.pt")

    def start(name, load, channels=1):
        network = UNet3d(2, channels=channels, width=16)
        return network, initialise_unet(network, "unet3d_quarter", str(tmp_path / name), load)

    network, report = start("pcrlv2.pt", "encoder")
    assert report["matched"] == 48  # 8 convolutions and norms: weight, bias; weight, bias, mean, variance
    assert torch.equal(network.down_tr512.ops[1].conv1.weight, published.down_tr512.ops[1].conv1.weight)
    network, _ = start("pcrlv2.pt", "encoder", channels=4)
    x = torch.rand(1, 1, 16, 16, 16)
    repeated, single = network.eval().encode(x.expand(-1, 4, -1, -1, -1)), published.eval().encode(x)
    assert torch.allclose(repeated[-1], single[-1], atol=1e-4)
    network, report = start("unet.pt", "encoder+decoder")
    assert report["matched"] == 48 + 3 * (2 + 12)
    assert torch.equal(network.up_tr64.ops[1].conv1.weight, ours.up_tr64.ops[1].conv1.weight)
    fresh, (network, report) = UNet3d(2, width=16), start("pcrlv2.pt", "encoder+decoder")  # without skips
    assert report["matched"] == 48 + 3 * (2 + 12)
    assert torch.equal(network.up_tr128.up_conv.weight, published.up_tr128.up_conv.weight)
    assert torch.equal(network.up_tr64.ops[1].conv1.weight, published.up_tr64.ops[1].conv1.weight)
    joined, below = network.up_tr128.ops[0].conv1.weight, published.up_tr128.ops[0].conv1.weight
    assert torch.equal(joined[:, : below.shape[1]], below)
    skipped = joined[:, below.shape[1] :]
    assert 0.5 < skipped.std() / fresh.up_tr128.ops[0].conv1.weight.std() < 2  # as they began
    with pytest.raises(InputError, match="another architecture"):
        initialise_unet(UNet3d(2, width=32), "unet3d_half", str(tmp_path / "pcrlv2.pt"), "encoder+decoder")
    odd = {**published.state_dict(), "up_tr64.up_conv.weight": torch.zeros(3, 3, 2, 2, 2)}
    torch.save({"state_dict": odd}, tmp_path / "odd.pt")
    with pytest.raises(InputError, match="odd.pt: its decoder has other shapes; use --load encoder"):
        start("odd.pt", "encoder+decoder")
    with pytest.raises(InputError, match="holds no whole decoder; use --load encoder"):
        start("encoder.pt", "encoder+decoder")
    with pytest.raises(InputError, match="a 2-dimensional encoder, 3 are needed"):
        start("flat.pt", "encoder")


def test_interrupted_runs_end_with_the_same_numbers(tmp_path, monkeypatch):
    root = write_pairs(tmp_path / "data", 5)
    more = ["--save-every", "1", "--epochs", "4", "--annotation-percent", "40", "--encoder-lr-scale", "0.5"]
    whole = script(root, tmp_path / "whole", *more)
    validate, test = volumes.VolumeSegmentation.validate, volumes.VolumeSegmentation.test
    calls = []

    class Killed(BaseException):
        pass

    def dies(real, at):
        def call(*args):
            calls.append(real)
            if calls.count(real) == at:
                raise Killed
            return real(*args)

        return call

    # In the middle of training, after a checkpoint that the step before had left; then while testing.
    monkeypatch.setattr(volumes.VolumeSegmentation, "validate", dies(validate, 2))
    monkeypatch.setattr(volumes.VolumeSegmentation, "test", dies(test, 1))
    for _ in range(2):
        with pytest.raises(Killed):
            script(root, tmp_path / "killed", *more)
    killed = script(root, tmp_path / "killed", *more)
    assert len(calls) == calls.count(validate) + calls.count(test) == 5 + 2
    for key in ("dice", "hd95", "val_score", "best_epoch", "steps", "per_class"):
        assert whole["trials"][0][key] == killed["trials"][0][key], key
    with pytest.raises(InputError, match="was started with overlap 0.5, now 0.25"):
        script(root, tmp_path / "killed", *more, "--overlap", "0.25")


def test_the_encoder_may_stay_as_it_is(tmp_path):
    before, root = UNet3d(3, width=16), write_pairs(tmp_path / "data", 5)
    torch.save({"state_dict": before.state_dict()}, tmp_path / "unet.pt")
    more = ["--init", str(tmp_path / "unet.pt"), "--load", "encoder+decoder", "--encoder-lr-scale", "0"]
    script(root, tmp_path / "out", *more)
    after = torch.load(tmp_path / "out" / "best.pt", weights_only=True)["state_dict"]
    for key, value in before.state_dict().items():
        if key.endswith("conv1.weight"):
            assert torch.equal(after[key], value) == key.startswith("down"), key


def test_trials_are_paired(tmp_path, monkeypatch):
    root = write_pairs(tmp_path / "data", 12, shapes=((8, 8, 8),))
    torch.save({"state_dict": UNet3d(3, width=16).state_dict()}, tmp_path / "unet.pt")
    seen = []

    def spy(method, data, views, args, *rest, **options):
        seen.append((data.ids, args.seed, method.network.out_tr.final_conv.weight.detach().clone()))
        return fit(method, data, views, args, *rest, **options)

    fit = trials.fit
    monkeypatch.setattr(trials, "fit", spy)
    for init in ("random", str(tmp_path / "unet.pt")):
        more = ["--steps", "1", "--trials", "2", "--annotation-percent", "40", "--patch", "8", "8", "8"]
        script(root, tmp_path / init[-6:], *more, "--init", init)
    (ids, seed, last), other, *pair = seen
    assert (ids, seed) == pair[0][:2]
    assert torch.equal(last, pair[0][2])
    assert other[:2] == pair[1][:2]
    assert set(ids) != set(other[0])


def test_the_loss_falls_on_one_batch():
    torch.manual_seed(0)
    method = volumes.VolumeSegmenter(UNet3d(2, width=16), 2)
    image, mask = zip(*(ball((16, 16, 16), i) for i in range(2)))
    view = torch.from_numpy(np.stack(image))[:, None] / 40 - 1
    batch = {"view": view, "target": torch.from_numpy(np.stack(mask)).long()}
    optimizer = torch.optim.Adam(method.parameters(), 1e-3)
    totals = []
    for _ in range(12):
        losses = method(batch, Run())
        assert set(losses) == {"dice", "cross_entropy"}
        totals.append(sum(losses.values()))
        optimizer.zero_grad()
        totals[-1].backward()
        optimizer.step()
    assert totals[-1] < 0.6 * totals[0]
    shown = method.pictures(batch)
    assert all(shown[key].min() >= 0 and shown[key].max() <= 1 for key in ("true", "predicted"))


def test_generated_volumes(tmp_path, monkeypatch):
    monkeypatch.setattr(ct, "SPLITS", dict.fromkeys(ct.SPLITS, 4))
    arguments = ["--arch", "unet3d_quarter", "--steps", "1", "--b", "2", "--workers", "0", "--no-tensorboard"]
    finetune_segmentation.main([*arguments, "--patch", "16", "16", "16", "--overlap", "0", "--output", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["per_class"]) == ["lungs", "heart", "nodule"]
    assert results["trials"][0]["per_class"]["nodule"]["cases"] >= 2
    written = sitk.ReadImage(str(tmp_path / "predictions" / "test" / "00000.nii.gz"))
    assert written.GetSize() == (48, 48, 32)
    assert written.GetSpacing() == (4, 4, 4)
    with pytest.raises(InputError, match="--spacing: phantom3d has its own; leave it out"):
        finetune_segmentation.main(["--spacing", "1", "1", "1", "--output", str(tmp_path / "other")])


def test_bad_options(tmp_path, monkeypatch):
    root = write_pairs(tmp_path / "data", 3, shapes=((8, 8, 8),))
    for more, message in {
        ("--arch", "resnet18"): "--arch resnet18: no 3-dimensional encoder",
        ("--init", str(tmp_path / "none.pt")): "no such checkpoint file",
        ("--patch", "16", "16", "4"): "--patch 16 16 4: the 3D U-Net needs sides of at least 8 voxels",
        ("--window", "200", "-200"): "--window 200 -200: the first number must be below the second",
        ("--patch", "8", "8", "8", "--norm", "instance"): "--norm instance: one voxel is left",
        ("--resume", "last.pt"): "use auto or never",
    }.items():
        with pytest.raises(InputError, match=message):
            script(root, tmp_path / "out", *more)
    with pytest.raises(SystemExit, match="2"):
        script(root, tmp_path / "out", "--window", "nan", "1")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(registry, "open_splits", lambda *_: {"train": ImageDataset(Info("phantom2d"), None, ["a"])})
    with pytest.raises(InputError, match="--dataset phantom2d: has no masks"):
        opened("", "phantom2d")


def test_two_images_of_one_name_are_refused(tmp_path):
    root = write_pairs(tmp_path / "pairs", 3)
    image, _ = ball((16, 16, 16), 1)
    write(root / "images" / "case1.nrrd", image)
    with pytest.raises(InputError, match=r"case1.n.*the same name as case1.n.*rename"):
        find_volume_pairs(root)
