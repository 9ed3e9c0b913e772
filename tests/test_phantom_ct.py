"""Generated CTs: fixed, balanced, the right way round, and read back from LUNA16-like files."""

import csv

import numpy as np
import pytest
import SimpleITK as sitk
import torch
import torch.nn.functional as F
from scipy import ndimage
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from medssl.datasets.base import Request
from medssl.datasets.phantoms import ct
from medssl.datasets.phantoms.ct import LABELS, chest_ct, scan_chest, write_luna
from medssl.errors import InputError
from medssl.preprocess import make_phantom_ct

LUNGS, HEART, NODULE = 1, 2, 3


@pytest.fixture(scope="module")
def scans():
    return chest_ct(200, (32, 32, 24), (6.0, 6.0, 5.3), seed=4, radii=(9, 16))


@pytest.fixture(scope="module")
def whole():
    """One whole chest at 3 mm, with a nodule."""
    return scan_chest(np.random.default_rng(5), (120, 90, 96), (3.0, 3.0, 3.0), 1, (9, 12))


def test_a_scan_depends_on_its_number_alone():
    many, few = (chest_ct(n, (24, 24, 16), (8.0, 8.0, 8.0), seed=7) for n in (5, 2))
    for a, b in zip(many, few):
        assert np.array_equal(a[:2], b)
    assert not np.array_equal(chest_ct(2, (24, 24, 16), (8.0, 8.0, 8.0), seed=8)[0], few[0])


def test_shapes_labels_and_masks(scans):
    hu, labels, masks = scans
    assert hu.shape == masks.shape == (200, 32, 32, 24)
    assert (hu.dtype, labels.dtype, masks.dtype) == (np.int16, np.int64, np.uint8)
    assert labels.reshape(-1, 2).sum(1).tolist() == [1] * 100  # one nodule in each pair
    assert 25 < labels[::2].sum() < 75  # not always the same one of the two
    assert np.array_equal((masks == NODULE).any((1, 2, 3)), labels == 1)
    assert masks.max() == len(LABELS) - 1
    volume = (masks == NODULE).sum((1, 2, 3))[labels == 1] * 6 * 6 * 5.3
    radius = (volume * 3 / 4 / np.pi) ** (1 / 3)
    assert radius.min() > 7
    assert radius.max() < 19
    assert radius.std() > 1


def test_nodules_lie_in_lungs_and_are_dense(scans):
    hu, labels, masks = scans
    for image, mask in zip(hu[labels == 1][:40], masks[labels == 1][:40]):
        inside = mask == NODULE
        ring = ndimage.binary_dilation(inside) & ~inside
        assert (mask[ring] == LUNGS).mean() > 0.9
        assert np.median(image[inside]) > -300
        assert np.median(image[ring]) < np.median(image[inside]) - 150


def test_which_way_round(whole):
    """x to the left, y to the back, z to the head."""
    heart = np.array(ndimage.center_of_mass(whole.mask == HEART))
    lungs = whole.mask == LUNGS
    middle = np.array(ndimage.center_of_mass(lungs))
    assert heart[0] > 60 + 3  # to the left of the middle
    assert heart[1] < middle[1] - 5  # in front of the lungs' middle
    assert heart[2] < middle[2] - 3  # and below it
    bone = whole.hu > 230
    spine = np.array(ndimage.center_of_mass(bone[56:64]))
    assert spine[1] > middle[1] + 10
    area = lungs.sum((0, 1))
    levels = np.flatnonzero(area)
    assert area[levels[-4]] < 0.5 * area.max()  # the apex
    windpipe = (whole.hu[54:66, 40:56, 90] < -800).sum()
    assert windpipe > 5  # air between the lungs, only above
    assert (whole.hu[54:66, 40:56, 10] < -800).sum() == 0
    # The right diaphragm stands higher.
    right, left = (
        np.median([lungs[x, 60].argmax() for x in columns if lungs[x, 60].any()])
        for columns in (range(25, 45), range(75, 95))
    )
    assert right > left


def test_hounsfield_units(whole):
    hu, mask = whole.hu, whole.mask
    assert -1000 - 3 < np.median(hu[:4, :4]) < -1000 + 3
    lungs = hu[ndimage.binary_erosion(mask == LUNGS, iterations=2)]
    assert -920 < np.median(lungs) < -720
    assert 0.005 < (lungs > -400).mean() < 0.12  # vessels
    assert 15 < np.median(hu[mask == HEART]) < 75
    assert 0.01 < (hu > 230).mean() < 0.1  # bone
    assert 0.03 < ((hu > -140) & (hu < -60)).mean() < 0.3  # fat
    assert hu.max() < 1500


def test_vessels_are_branching_tubes():
    """At a fine resolution most vessel voxels of a lung hang together, and thin out away from the hilum."""
    scan = scan_chest(np.random.default_rng(9), (160, 100, 120), (2.0, 2.0, 2.0), 0)
    vessels = (scan.mask == LUNGS) & (scan.hu > -450)
    inside = ndimage.binary_erosion(scan.mask == LUNGS, iterations=3)
    parts, _ = ndimage.label(vessels & inside)
    sizes = np.sort(np.bincount(parts.ravel())[1:])[::-1]
    assert len(sizes) > 20
    assert sizes[:30].sum() > 0.5 * sizes.sum()
    thickness = ndimage.distance_transform_edt(vessels)
    place = np.argwhere(vessels & inside)
    away = np.abs(place[:, 0] - 79.5) * 2
    near, far = thickness[vessels & inside][away < 60], thickness[vessels & inside][away > 90]
    assert np.quantile(near, 0.95) > 1.3 * np.quantile(far, 0.95)
    # What is said to be a vessel is one.
    index = np.round(scan.vessels / 2 + (np.array(scan.hu.shape) - 1) / 2).astype(int)
    assert np.median(scan.hu[tuple(index.T)]) > -500


def test_resolution_changes_nothing_but_detail():
    fine, coarse = (
        scan_chest(np.random.default_rng(3), shape, (s, s, s), 0).hu
        for shape, s in (((96, 96, 64), 2.0), ((48, 48, 32), 4.0))
    )
    averaged = F.avg_pool3d(torch.from_numpy(fine).float()[None], 2)[0].numpy()
    assert np.abs(averaged - coarse).mean() < 45
    shifted = np.roll(coarse, 1, 0)
    assert np.abs(averaged - shifted).mean() > 60


def test_slabs_do_not_show(monkeypatch):
    """Large scans are rendered slab by slab."""
    args = ((40, 40, 30), (6.0, 6.0, 6.0), 1, (9.0, 12.0))
    one = scan_chest(np.random.default_rng(2), *args)
    monkeypatch.setattr(ct, "VOXELS_PER_SLAB", 40 * 40 * 7)
    many = scan_chest(np.random.default_rng(2), *args)
    assert np.array_equal(one.mask, many.mask)
    noise = (one.hu.astype(int) - many.hu)[:, :, :7]
    assert np.abs(one.hu.astype(int) - many.hu).max() < 10 * max(noise.std(), 30)  # only the noise is another
    assert np.corrcoef(one.hu.ravel(), many.hu.ravel())[0, 1] > 0.99


def test_voxels_alone_do_not_tell_the_classes_apart(scans):
    hu, labels, _ = scans
    train, test = slice(0, 120), slice(120, 200)
    means = hu.mean((1, 2, 3))
    assert abs(means[labels == 1].mean() - means[labels == 0].mean()) < 0.4 * means.std()
    x = hu.reshape(len(hu), -1).astype(np.float32).clip(-1000, 1000) / 1000
    x = x - x[train].mean(0)
    model = LogisticRegression(C=1e-3, max_iter=200).fit(x[train], labels[train])
    assert roc_auc_score(labels[test], model.decision_function(x[test])) < 0.68


def test_shape_tells_the_classes_apart(scans):
    """A compact dense thing with lung all around it: what a small network has to find."""
    hu, labels, masks = scans
    score = []
    for image, mask in zip(hu, masks):
        dense = ndimage.uniform_filter((image > -500).astype(np.float32), 2)
        lung = ndimage.binary_erosion((mask == LUNGS) | (mask == NODULE), iterations=1)
        score.append((dense * lung).max() + 0.1 * ndimage.uniform_filter(dense * lung, 3).max())
    assert roc_auc_score(labels, score) > 0.75


def test_open_splits():
    data = ct.open_splits(Request(name="phantom3d"), ["val"])["val"]
    assert len(data) == 64
    assert (data.info.name, data.info.dims, data.info.channels, data.info.task) == ("phantom3d", 3, 1, "binary")
    assert data.ids[12] == "val/00012"
    assert data.labels.float().mean() == 0.5
    item = data.load(3)
    assert item["image"].shape == (1, 48, 48, 32)
    assert item["image"].dtype == torch.float16
    assert 0 <= item["image"].min() < 0.1
    assert 0.5 < item["image"].max() <= 1
    assert item["size"].tolist() == [192, 192, 128]
    assert item["mask"].shape == (48, 48, 32)
    assert item["mask"].dtype == torch.uint8
    assert (item["mask"] == NODULE).any() == bool(data.labels[3])
    part = data.subset([5, 3])
    assert torch.equal(part.load(1)["image"], item["image"])
    assert torch.equal(part.load(1)["mask"], item["mask"])
    assert part[0]["label"] == data.labels[5]
    # Opened anew, they are the same.
    again = ct.open_splits(Request(name="phantom3d"), ["val"])["val"]
    assert torch.equal(again.load(3)["image"], item["image"])


def test_bad_inputs():
    for request, words in (
        (Request(name="phantom3d", list="a.txt"), "--list a.txt: .* generated"),
        (Request(name="phantom3d", data="here"), "--data here: .* generated"),
    ):
        with pytest.raises(InputError, match=words):
            ct.open_splits(request, ["val"])
    with pytest.raises(InputError, match="splits train, val, test, not other"):
        ct.open_splits(Request(name="phantom3d"), ["other"])
    with pytest.raises(InputError, match="at least 1"):
        chest_ct(0)
    with pytest.raises(InputError, match="seed -1"):
        chest_ct(1, seed=-1)
    with pytest.raises(InputError, match="make the scan larger"):
        chest_ct(1, (8, 8, 8), (1.0, 1.0, 1.0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("luna") / "scans"
    make_phantom_ct.main(["--save", str(path), "--count", "3", "--shape", "72", "72", "60", "--seed", "1"])
    return path


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_luna_files(folder):
    headers = sorted(folder.glob("subset*/*.mhd"))
    assert [p.parent.name for p in headers] == ["subset0", "subset1", "subset2"]
    assert all(p.with_suffix(".raw").exists() for p in headers)
    candidates, annotations = rows_of(folder / "candidates.csv"), rows_of(folder / "annotations.csv")
    assert list(candidates[0]) == ["seriesuid", "coordX", "coordY", "coordZ", "class"]
    assert {row["seriesuid"] for row in candidates} <= {p.stem for p in headers}
    true = [row for row in candidates if row["class"] == "1"]
    assert len(true) == len(annotations) > 0
    origins = set()
    for header in headers:
        image = sitk.ReadImage(str(header))
        hu = sitk.GetArrayFromImage(image).transpose(2, 1, 0)
        assert hu.shape == (72, 72, 60)
        assert image.GetDirection() == (1, 0, 0, 0, 1, 0, 0, 0, 1)
        assert hu[0, 0, 30] == -3024
        assert hu[36, 36].min() > -1100
        assert image.GetSpacing()[0] == pytest.approx(5.0, abs=0.3)
        origins.add(image.GetOrigin())
        own = [row for row in candidates if row["seriesuid"] == header.stem]
        for row in own:
            index = image.TransformPhysicalPointToIndex([float(row[f"coord{axis}"]) for axis in "XYZ"])
            around = hu[tuple(slice(i - 1, i + 2) for i in index)]
            assert around.max() > -600, row  # on a nodule or on a vessel, thinner than these voxels
        assert sum(row["class"] == "0" for row in own) == 12
    assert len(origins) == 3


def test_luna_nodules_have_their_size(folder):
    for row in rows_of(folder / "annotations.csv"):
        image = sitk.ReadImage(str(next(folder.glob(f"*/{row['seriesuid']}.mhd"))))
        index = image.TransformPhysicalPointToIndex([float(row[f"coord{axis}"]) for axis in "XYZ"])
        assert image[index] > -450
        assert 8 <= float(row["diameter_mm"]) <= 30


def test_luna_folder_is_not_overwritten(folder):
    before = (folder / "candidates.csv").read_bytes()
    with pytest.raises(InputError, match="candidates.csv already; choose a new folder"):
        write_luna(folder, 1, (40, 40, 40))
    assert (folder / "candidates.csv").read_bytes() == before
    with pytest.raises(InputError, match="--shape 8 40 40: at least 32"):
        make_phantom_ct.main(["--save", str(folder / "other"), "--shape", "8", "40", "40"])
