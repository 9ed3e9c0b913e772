"""Volumes in folders and MedMNIST files, fine-tuning on them, and the scores of nodule detection."""

import csv
import json
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from medssl import evaluate_features, finetune_classification, train_pcrlv2
from medssl.datasets import base, folder, identity, registry
from medssl.datasets.base import Info, Request
from medssl.errors import InputError
from medssl.preprocess import check_data
from medssl.tasks import trials
from medssl.tasks.metrics import RATES, froc, froc_curve
from medssl.tests.test_luna_data import make_nodules, make_pairs

sitk = pytest.importorskip("SimpleITK")
SMALL = ["--arch", "unet3d_quarter", "--b", "4", "--workers", "0", "--device", "cpu"]
QUICK = [*SMALL, "--epochs", "1", "--no-tensorboard"]


def write(path, seed=0, size=(20, 16, 12), spacing=(1.0, 1.0, 2.0), offset=-500):
    """A CT (X, Y, Z) of noise as a file; returns what is stored."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(seed).integers(-400, 400, size).astype(np.int16) + np.int16(offset)
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.transpose(2, 1, 0)))
    image.SetSpacing(spacing)
    sitk.WriteImage(image, str(path))
    return array


def write_dicom(path, series, z=0.0):
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    path.parent.mkdir(parents=True, exist_ok=True)
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    data.Modality, data.SeriesInstanceUID, data.StudyInstanceUID = "CT", series, "1.2.3"
    data.Rows, data.Columns, data.BitsAllocated, data.BitsStored, data.HighBit = 8, 10, 16, 16, 15
    data.SamplesPerPixel, data.PixelRepresentation, data.PhotometricInterpretation = 1, 1, "MONOCHROME2"
    data.RescaleSlope, data.RescaleIntercept = 1, -1000
    data.ImagePositionPatient, data.ImageOrientationPatient = [0.0, 0.0, z], [1.0, 0, 0, 0, 1, 0]
    data.PixelSpacing, data.SliceThickness = [1.0, 1.0], 2.0
    data.PixelData = np.arange(80, dtype=np.int16).tobytes()
    pydicom.dcmwrite(path, data)


def request(root, **more):
    return Request(**{"name": "folder", "data": str(root), "cube_size": (8, 8, 8), **more})


# Folders -------------------------------------------------------------------------------------------


def test_a_folder_of_volumes(tmp_path):
    array = write(tmp_path / "b" / "scan.nii.gz")
    write(tmp_path / "a.mhd", 1, size=(40, 40, 40), spacing=(0.5, 0.5, 0.5))
    data = registry.open_splits(request(tmp_path), ["train"])["train"]
    assert data.ids == ["a", "b/scan"]
    assert data.info == Info("folder", 3, 1)
    sample = data[1]
    assert sample["image"].shape == (1, 16, 16, 16)
    assert sample["image"].dtype == torch.float16
    # NIfTI is written in the patient's axes that the file names: extents follow the axes x, y, z.
    assert sample["size"].tolist() == [20, 16, 24]
    unit = (array.clip(-1000, 1000) + 1000) / 2000
    assert sample["image"].mean().item() == pytest.approx(unit.mean(), abs=0.01)
    assert data[0]["size"].tolist() == [20, 20, 20]
    # Along y nothing is resampled, along x four voxels become three and a bit: columns keep their order.
    along_y = sample["image"][0].float().mean((0, 2)) - torch.from_numpy(unit.mean((0, 2))).float()
    assert along_y.abs().max() < 0.03
    default = registry.open_splits(Request(name="folder", data=str(tmp_path)), ["train"])["train"]
    assert default.grid == (128, 128, 64)


def test_crops_in_mm_are_cut_out_of_volumes_as_they_are(tmp_path):
    """A grid would show a large volume coarser than the crop is asked for."""
    array = write(tmp_path / "scan.nii.gz")
    asked = Request(name="folder", data=str(tmp_path), cube_size=(4, 4, 4), crop_mm=(8, 8, 8))
    data = registry.open_splits(asked, ["train"])["train"]
    image = data[0]["image"][0].float()
    assert image.shape == array.shape
    assert np.allclose(image, (array.clip(-1000, 1000) + 1000) / 2000, atol=1e-3)
    assert data[0]["size"].tolist() == [20, 16, 24]


def test_volumes_are_kept_as_they_are_read(tmp_path, monkeypatch):
    write(tmp_path / "data" / "a.nrrd")
    monkeypatch.setattr(folder, "read_volume", counted := mock.Mock(wraps=folder.read_volume))

    def volume(**more):
        asked = request(tmp_path / "data", cache=str(tmp_path / "cache"), **more)
        return registry.open_splits(asked, ["train"])["train"][0]

    first, again = volume(), volume()
    assert counted.call_count == 1
    assert all(torch.equal(first[key], again[key]) for key in ("image", "size"))
    assert volume(cube_size=(4, 4, 4))["image"].shape == (1, 8, 8, 8)  # not the kept one of another grid
    write(tmp_path / "data" / "a.nrrd", 1)  # nor that of the file that was there before
    assert not torch.equal(volume()["image"], first["image"])
    for kept in (tmp_path / "cache").iterdir():
        kept.write_bytes(kept.read_bytes()[:200])  # cut by a power failure
    assert torch.equal(volume(cube_size=(8, 8, 8))["image"], volume()["image"])
    assert not list((tmp_path / "cache").glob(".*"))
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(InputError, match=f"--cache {blocked}: .*; leave it out, or choose another"):
        registry.open_splits(request(tmp_path / "data", cache=str(blocked)), ["train"])


@pytest.mark.parametrize("header", ["a.mhd", "a.nhdr"])
def test_voxels_beside_a_header_are_known_too(tmp_path, header):
    array = write(tmp_path / "data" / header)
    asked = request(tmp_path / "data", cache=str(tmp_path / "cache"))
    first = registry.open_splits(asked, ["train"])["train"]
    image = first.load(0)["image"]
    raw = next(path for path in (tmp_path / "data").iterdir() if path.name != header)
    raw.write_bytes(bytes(array.nbytes))
    second = registry.open_splits(asked, ["train"])["train"]
    assert identity.data_digest({"train": first}) != identity.data_digest({"train": second})
    assert not torch.equal(second.load(0)["image"], image)


def test_volumes_with_lists_and_class_folders(tmp_path, capsys):
    for i in range(10):
        for name in ("sick", "well"):
            write(tmp_path / "d" / name / f"{i}.nrrd", i, size=(8, 8, 8))
    opened = registry.open_splits(request(tmp_path / "d"), ["train", "val", "test"], 3)
    assert [len(data) for data in opened.values()] == [14, 2, 4]
    assert opened["train"].info == Info("folder", 3, 1, "binary", ("sick", "well"))
    assert [name.startswith("well") for name in opened["test"].ids] == opened["test"].labels.bool().tolist()
    listed = tmp_path / "list"
    listed.write_text("sick/3.nrrd 1\nwell/0 0\n./sick/1 2\n")  # with and without extension
    data = registry.open_splits(request(tmp_path / "d", list=str(listed)), ["train"])["train"]
    assert data.ids == ["sick/3", "well/0", "sick/1"]
    assert (data.info.task, data.labels.tolist()) == ("multi-class", [1, 0, 2])
    (tmp_path / "d" / "notes").touch()
    for absent in ("sick/99.nrrd", "notes"):
        listed.write_text(f"sick/3 1\n{absent} 0\n")
        with pytest.raises(InputError, match=f"line 2: {absent} is not in"):
            registry.open_splits(request(tmp_path / "d", list=str(listed)), ["train"])


def test_folders_with_both_need_a_dimension(tmp_path):
    write(tmp_path / "a.nii.gz", size=(8, 8, 8))
    Image.new("L", (8, 8)).save(tmp_path / "b.png")
    with pytest.raises(InputError, match=r"images such as b.png and volumes such as a; choose with --d 2 or --d 3"):
        registry.open_splits(request(tmp_path), ["train"])
    assert registry.open_splits(request(tmp_path), ["train"], 2)["train"].ids == ["b.png"]
    assert registry.open_splits(request(tmp_path), ["train"], 3)["train"].ids == ["a"]
    (tmp_path / "a.nii.gz").unlink()
    with pytest.raises(InputError, match="no volumes in this folder or below it"):
        registry.open_splits(request(tmp_path), ["train"], 3)
    (tmp_path / "b.png").unlink()
    with pytest.raises(InputError, match="no images in this folder or below it, and no volumes"):
        registry.open_splits(request(tmp_path), ["train"])


def test_dicom_is_3d_where_a_series_has_slices(tmp_path):
    for i in range(4):
        write_dicom(tmp_path / "ct" / "p1" / f"{i}.dcm", "1.2.5", 2.0 * i)
        write_dicom(tmp_path / "xr" / f"{i}.dcm", f"1.2.6.{i // 2}")  # two views of each patient
    data = registry.open_splits(request(tmp_path / "ct"), ["train"])["train"]
    assert (data.info.dims, data.ids) == (3, ["p1"])
    assert data[0]["bad"] == []
    assert data[0]["size"].tolist() == [10, 8, 8]
    flat = registry.open_splits(request(tmp_path / "xr"), ["train"])["train"]
    assert (flat.info.dims, len(flat)) == (2, 4)
    assert len(registry.open_splits(request(tmp_path / "ct"), ["train"], 2)["train"]) == 4  # slices as images
    with pytest.raises(InputError, match=r"images such as xr/0.dcm and volumes such as ct/p1; choose with --d"):
        folder.open_all(request(tmp_path))


def test_an_unreadable_volume_is_replaced_and_named(tmp_path):
    for name in ("a", "b", "c"):
        write(tmp_path / f"{name}.mhd", size=(8, 8, 8))
    (tmp_path / "b.raw").write_bytes(b"short")
    sample = registry.open_splits(request(tmp_path), ["train"])["train"][1]
    assert sample["index"] == 2
    assert sample["bad"] == ["b: truncated: b.raw holds 5 of 1024 bytes"]


def test_check_data_of_volumes(tmp_path, capsys):
    write(tmp_path / "d" / "a.nii.gz")
    write(tmp_path / "d" / "copy.mhd")
    write(tmp_path / "d" / "mr.nrrd", 3, offset=500)
    write(tmp_path / "d" / "cut.mhd")
    (tmp_path / "d" / "cut.raw").unlink()
    listed = tmp_path / "list"
    listed.write_text("a.nii.gz\nmr\ngone\n")
    with pytest.raises(SystemExit) as left:
        check_data.main([str(tmp_path / "d"), "--list", str(listed), "--json", str(tmp_path / "r"), "--workers", "2"])
    assert left.value.code == 1
    report = json.loads((tmp_path / "r").read_text())
    assert report["formats"] == {".mhd": 2, ".nii.gz": 1, ".nrrd": 1}
    assert report["pixels"] == {"CT": 2, "volume": 1}
    assert report["sizes"] == {"20x16x12": 3}
    assert report["spacing, mm"] == {"1.00 x 1.00 x 2.00": 3}
    assert set(report["values"]) == {"-900 to -101", "100 to 899"}
    assert report["unreadable"] == {"cut": "its data file cut.raw is missing"}
    assert report["duplicates"] == [["a", "copy"]]
    assert report["missing"] == [f"{listed}: gone"]
    assert "1.00 x 1.00 x 2.00" in capsys.readouterr().out


# Which data set ------------------------------------------------------------------------------------


def test_the_default_data_set_follows_the_dimension(monkeypatch):
    asked = []

    def spy(name):
        asked.append(name)
        raise InputError("enough")

    monkeypatch.setattr(registry, "import_module", spy)
    for dims in (None, 2, 3):
        with pytest.raises(InputError, match="enough"):
            registry.open_splits(Request(), ["train"], dims)
    assert [name.rsplit(".", 1)[1] for name in asked] == ["radiograph", "radiograph", "ct"]


# FROC ----------------------------------------------------------------------------------------------


def test_froc_by_hand():
    """Two scans; false positives at .9, .6, .5; findings at .8, .7, .6, .1."""
    p = np.array([0.9, 0.8, 0.7, 0.6, 0.6, 0.5, 0.1])
    t = np.array([0, 1, 1, 0, 1, 0, 1.0])
    x, y = froc_curve(p, t, np.ones(7), 2)
    assert x.tolist() == [0, 0.5, 0.5, 0.5, 1, 1.5, 1.5]
    assert y.tolist() == [0, 0, 0.25, 0.5, 0.75, 0.75, 1]
    scans = list("ababaab")
    result = froc(p, t, np.ones(7), scans)
    # At ½ the curve rises: the challenge's interpolation takes the top. Beyond the last point, the last value.
    assert list(result["sensitivity"].values()) == [0, 0, 0.5, 0.75, 1, 1, 1]
    assert list(result["sensitivity"]) == ["0.125", "0.25", "0.5", "1", "2", "4", "8"]
    assert result["cpm"] == pytest.approx(4.25 / 7)
    assert (result["scans"], result["findings"], result["largest_weight"]) == (2, 4, 1)
    # Between points the line is straight: 0.75 false positives a scan.
    assert np.interp(0.75, x, y) == pytest.approx(0.625)
    # False positives that stand for four each come four times as soon.
    heavy = froc(p, t, np.where(t == 1, 1.0, 4.0), scans)
    assert list(heavy["sensitivity"].values())[:5] == [0, 0, 0, 0, 0.5]
    nothing = froc(p, np.zeros(7), np.ones(7), scans)
    assert nothing["cpm"] is None
    assert set(nothing["sensitivity"].values()) == {None}


def test_sampled_negatives_are_weighted_back():
    """A tenth of the negatives, each counted ten times, gives the CPM of all of them."""
    rng = np.random.default_rng(0)
    scans = np.repeat(np.arange(40), 205).astype(str)
    t = np.tile(np.r_[np.ones(5), np.zeros(200)], 40)
    p = rng.normal(2.2 * t)
    whole = froc(p, t, np.ones(len(t)), scans, resamples=50)
    kept = np.tile(np.r_[np.ones(5), np.tile(np.r_[1, np.zeros(9)], 20)], 40) == 1
    part = froc(p[kept], t[kept], np.where(t[kept] == 1, 1, 10.0), scans[kept], resamples=50)
    assert part["cpm"] == pytest.approx(whole["cpm"], abs=0.03)
    low, high = whole["cpm_interval"]
    assert low < whole["cpm"] < high
    unweighted = froc(p[kept], t[kept], np.ones(kept.sum()), scans[kept], resamples=50)
    assert unweighted["cpm"] > whole["cpm"] + 0.1


def test_the_interval_draws_whole_scans():
    """A scan copied under the same name says no more: the interval stays as wide."""
    rng = np.random.default_rng(1)
    scans = np.repeat(np.arange(30), 20).astype(str)
    t = (rng.random(600) < 0.2).astype(float)
    p = rng.normal(1.5 * t)
    one = froc(p, t, np.ones(600), scans, resamples=300)["cpm_interval"]
    # Four copies of each candidate for a quarter of its weight.
    four = froc(p.repeat(4), t.repeat(4), np.full(2400, 0.25), scans.repeat(4), resamples=300)["cpm_interval"]
    assert four == pytest.approx(one)


# Fine-tuning ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    root = tmp_path_factory.mktemp("luna")
    argv = [
        "--data",
        str(make_pairs(root / "pairs", scans=10, pairs=1)),
        "--n",
        "luna",
        "--d",
        "3",
        *SMALL,
        "--steps",
        "2",
    ]
    argv += ["--cube-size", "16", "16", "8", "--local-cube-size", "8", "8", "8", "--output", str(root / "out")]
    train_pcrlv2.main(argv)
    return root / "out" / "encoder.pt"


def test_nodule_classification(encoder, tmp_path, capsys):
    nodules = make_nodules(tmp_path / "n", scans=10, negatives=4)
    argv = ["--data", str(nodules), "--dataset", "luna", "--init", str(encoder), "--trials", "2", *QUICK]
    finetune_classification.main([*argv, "--output", str(tmp_path / "o")])
    assert "CPM" in capsys.readouterr().out
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    assert results["matched_keys"] == 48  # four levels of two convolutions with norm
    cpms = [trial["cpm"] for trial in results["trials"]]
    assert results["cpm"] == pytest.approx(np.mean(cpms))
    assert list(map(float, results["sensitivity"])) == list(RATES)
    assert results["sensitivity"]["8"] == pytest.approx(
        np.mean([trial["sensitivity"]["8"] for trial in results["trials"]])
    )
    assert results["false_positives"].startswith("of sampled negatives")
    assert results["config"]["positive_share"] == pytest.approx(1 / 3)
    assert results["trials"][0]["train_images"] == 35
    assert results["trials"][0]["steps"] == round((7 * 2 + 7 * 4) / 4)  # nodules twice an epoch
    assert {"froc.png", "roc.png", "best.pt"} <= {path.name for path in (tmp_path / "o").iterdir()}
    with open(tmp_path / "o" / "predictions.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["trial"] == "0"]
    assert {row["scan"] for row in rows} == {"1.2.8", "1.2.9"}
    columns = (np.array([float(row[key]) for row in rows]) for key in ("probability nodule", "true nodule", "weight"))
    assert froc(*columns, [row["scan"] for row in rows])["cpm"] == pytest.approx(cpms[0], abs=1e-6)
    best = torch.load(tmp_path / "o" / "best.pt", weights_only=True)
    assert (best["dims"], best["channels"], best["arch"]) == (3, 1, "unet3d_quarter")
    assert best["normalization"] == {"kind": "z"}


def test_oversampling():
    labels = torch.tensor([0] * 90 + [1] * 10)
    data = base.ImageDataset(Info("x", 3, 1, "binary", ("a", "b")), None, list(map(str, range(100))), labels)
    shown = trials.oversample(data, 1 / 3)
    assert (shown.labels == 1).sum() == 40  # 45 would be a third, a multiple of 10 is wanted
    assert set(shown.ids) == set(data.ids)
    assert trials.oversample(data, 0) is data
    assert len(trials.oversample(data, 0.05)) == 100  # frequent enough


def make_npz(root, flag="nodulemnist3d", side=28, classes=2):
    rng = np.random.default_rng(0)
    arrays = {}
    for split, n in (("train", 12), ("val", 6), ("test", 8)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (n, side, side, side), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(n) % classes)[:, None].astype(np.uint8)
    np.savez(root / f"{flag}.npz", **arrays)
    return arrays


def test_medmnist_volumes(tmp_path):
    make_npz(tmp_path, "fracturemnist3d", classes=3)
    argv = ["--data", str(tmp_path), "--dataset", "FractureMNIST3D", *QUICK, "--cube-size", "8", "8", "8"]
    finetune_classification.main([*argv, "--output", str(tmp_path / "o")])
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    assert (results["task"], results["dataset"], results["config"]["protocol"]) == (
        "multi-class",
        "fracturemnist3d",
        "ours",
    )
    assert "cpm" not in results
    assert not (tmp_path / "o" / "froc.png").exists()
    assert torch.load(tmp_path / "o" / "best.pt", weights_only=True)["cube_size"] == [8, 8, 8]


def test_features_of_volumes(encoder, tmp_path):
    nodules = make_nodules(tmp_path / "n")
    argv = ["--data", str(nodules), "--dataset", "luna", "--init", "random", str(encoder), "--k", "5", *SMALL]
    evaluate_features.main([*argv, "--output", str(tmp_path / "o")])
    content = json.loads((tmp_path / "o" / "features.json").read_text())
    assert content["features"] == 128
    assert content["results"][1]["matched_keys"] == 48
    assert content["results"][0]["probe"]["auroc"] > 0.9  # nodules are bright
    assert "image_size" not in content


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tta", "tencrop"], "--tta tencrop: is for images, and luna has 3 dimensions"),
        (["--crop-scale", "0.5", "1"], "--crop-scale: is for images"),
        (["--margin", "0.9"], "--margin: is for images"),
        (["--cube-size", "16", "16", "4"], "--cube-size 16 16 4: the 3D U-Net needs sides of at least 8"),
        (["--arch", "resnet18"], "--arch resnet18: no 3-dimensional encoder; there are unet3d"),
        (["--init", "imagenet"], "--init imagenet: there are no ImageNet weights for unet3d_quarter"),
        (["--d", "2"], "--d 2: data set luna has 3 dimensions"),
        (["--cache", "c"], "only 2D images are cached"),
    ],
)
def test_options_that_volumes_do_not_have(tmp_path, argv, message):
    given = ["--data", str(make_nodules(tmp_path / "n", scans=10)), "--dataset", "luna", *QUICK]
    with pytest.raises(InputError, match=message):
        finetune_classification.main([*given, *argv, "--output", str(tmp_path / "o")])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--cube-size", "8", "8", "8"], "--cube-size: is for volumes, and breastmnist has 2 dimensions"),
        (["--protocol", "luna"], "--protocol luna: is for volumes"),
        (["--arch", "unet3d"], "--arch unet3d: a 3-dimensional encoder"),
    ],
)
def test_options_that_images_do_not_have(tmp_path, argv, message):
    images = {f"{split}_images": np.zeros((4, 28, 28), np.uint8) for split in ("train", "val", "test")}
    labels = {key.replace("images", "labels"): np.array([[0], [1]] * 2, np.uint8) for key in images}
    np.savez(tmp_path / "breastmnist.npz", **images, **labels)
    given = ["--data", str(tmp_path), "--dataset", "breastmnist", "--workers", "0", "--device", "cpu"]
    with pytest.raises(InputError, match=message):
        finetune_classification.main([*given, *argv, "--output", str(tmp_path / "o")])


def test_positive_share_needs_two_classes(tmp_path):
    make_npz(tmp_path, "fracturemnist3d", classes=3)
    argv = ["--data", str(tmp_path), "--dataset", "fracturemnist3d", *QUICK, "--output", str(tmp_path / "o")]
    with pytest.raises(InputError, match="--positive-share: needs two classes, and fracturemnist3d is multi-class"):
        finetune_classification.main([*argv, "--positive-share", "0.5"])
