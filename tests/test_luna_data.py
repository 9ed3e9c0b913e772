"""Prepared LUNA16 folders: pairs and nodules, folds, lists, `--ratio` between scans, and files that cannot be used."""

import pickle
from argparse import Namespace

import numpy as np
import pytest
import torch

from medssl.datasets import registry
from medssl.datasets.base import Request, collate
from medssl.datasets.luna import place_of
from medssl.errors import InputError
from medssl.preprocess import luna
from medssl.tests.test_luna import chest, write
from medssl.views.draws import Draws
from medssl.views.of_volumes import CubeViews

PAIR, SMALL = (2, 16, 16, 8), (6, 8, 8, 8)


def save(path, shape, seed=0, dtype=np.float16):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.random.default_rng(seed).random(shape).astype(dtype))


def make_pairs(root, scans=20, pairs=3, **changes):
    """Scan i in subset i mod 10."""
    for i in range(scans):
        for number in range(pairs):
            save(root / f"subset{i % 10}" / f"1.2.{i}_global_{number}.npy", PAIR, 100 * i + number, **changes)
            save(root / f"subset{i % 10}" / f"1.2.{i}_local_{number}.npy", SMALL, i, **changes)
    return root


def make_nodules(root, scans=20, positives=1, negatives=3, weight=4.0, side=16):
    rows = ["uid,row,class,fold,x,y,z,weight,file"]
    for i in range(scans):
        for k in range(positives + negatives):
            label = int(k < positives)
            file = f"subset{i % 10}/1.2.{i}_nodule_{100 * i + k}.npy"
            cube = np.random.default_rng(100 * i + k).random((side,) * 3) * 0.3
            cube[5:11, 5:11, 5:11] += 0.6 * label
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            np.save(root / file, cube.astype(np.float16))
            rows.append(f"1.2.{i},{100 * i + k},{label},{i % 10},1.5,2,3,{1.0 if label else weight},{file}")
    (root / "nodules.csv").write_text("\n".join(rows) + "\n")
    return root


def request(root, **more):
    return Request(name="luna", data=str(root), **more)


def open_train(root, **more):
    return registry.open_splits(request(root, **more), ["train"], 3)["train"]


def all_splits(root, **more):
    return registry.open_splits(request(root, **more), ["train", "val", "test"], 3)


def test_pairs_are_those_of_subsets_0_to_6(tmp_path):
    data = open_train(make_pairs(tmp_path))
    assert len(data) == 14 * 3
    assert {name.split("/")[0] for name in data.ids} == {f"subset{k}" for k in range(7)}
    assert (data.info.name, data.info.dims, data.info.channels, data.info.task) == ("luna", 3, 1, None)
    sample = pickle.loads(pickle.dumps(data))[4]
    stored = np.load(tmp_path / f"{data.ids[4]}.npy")
    assert sample["image"].dtype == sample["locals"].dtype == torch.float16
    assert np.array_equal(sample["image"], stored)
    assert np.array_equal(sample["locals"], np.load(tmp_path / f"{data.ids[4].replace('global', 'local')}.npy"))
    # A scan's pairs are together and in order.
    assert [name[-1] for name in data.ids] == list("012") * 14
    views = CubeViews((16, 16, 8), (8, 8, 8), 6)
    out = views(collate([data[i] for i in range(3)]), Draws((0, 0), 3))
    assert out["view1"].shape == (3, 1, 16, 16, 8)
    assert out["locals"].shape == (18, 1, 8, 8, 8)


def test_a_folder_of_cubes_is_luna(tmp_path):
    root = make_pairs(tmp_path, scans=2)
    assert registry.open_splits(Request(data=str(root)), ["train"])["train"].info.name == "luna"
    nodules = make_nodules(tmp_path / "n")
    opened = registry.open_splits(Request(name="folder", data=str(nodules)), ["train", "val", "test"])
    assert opened["test"].info.classes == ("no nodule", "nodule")


@pytest.mark.parametrize("published", ["float64", "channel axis", "pcrl"])
def test_published_variants(tmp_path, published):
    root = make_pairs(tmp_path, scans=2, dtype=np.float64)
    for path in root.glob("subset*/*.npy"):
        cubes = np.load(path)
        if published == "channel axis":
            np.save(path, cubes[:, None])
        if published == "pcrl":
            path.unlink()
            if "global" in path.name:
                np.save(path.with_name(path.name.replace("global", "img")), cubes)
    sample = open_train(root)[0]
    assert sample["image"].shape == PAIR
    assert sample["image"].dtype == torch.float16
    assert ("locals" in sample) == (published != "pcrl")


def test_nodules(tmp_path):
    opened = all_splits(make_nodules(tmp_path))
    assert [len(data) for data in opened.values()] == [14 * 4, 2 * 4, 4 * 4]
    test = opened["test"]
    assert {name[:7] for name in test.ids} == {"subset8", "subset9"}
    assert set(test.patients) == {"1.2.8", "1.2.18", "1.2.9", "1.2.19"}
    assert test.labels.dtype == torch.int64
    assert test.labels.tolist() == [int(int(name.split("_")[-1]) % 100 < 1) for name in test.ids]
    assert test.weights.tolist() == [1.0 if label else 4.0 for label in test.labels]
    sample = test[5]
    assert sample["image"].shape == (1, 16, 16, 16)
    assert sample["size"].tolist() == [16, 16, 16]
    assert np.array_equal(sample["image"][0], np.load(tmp_path / f"{test.ids[5]}.npy"))
    # Cubes around nodules can be pre-trained on as well.
    assert len(open_train(tmp_path)) == 56


def test_the_ratio_parts_scans_alike_in_pairs_and_nodules(tmp_path):
    """Neither the number of cubes in a scan, nor scans that only one of the two folders has, move the boundary."""
    pairs, nodules = make_pairs(tmp_path / "p", scans=60, pairs=2), make_nodules(tmp_path / "n", scans=60)
    for path in pairs.glob("subset3/1.2.3_*"):
        path.unlink()
    options = {"dataset": "luna", "d": 3, "ratio": 0.6, "list": None, "cache": None, "seed": 0}
    before = registry.open_pretraining(Namespace(data=str(pairs), **options))
    after = registry.open_labelled(Namespace(data=str(nodules), **options))["train"]
    seen, held = set(before.patients), set(after.patients)
    assert not seen & held
    assert seen | held | {"1.2.3"} == {f"1.2.{i}" for i in range(60) if i % 10 < 7}
    assert max(map(place_of, seen)) < 0.6 <= min(map(place_of, held))
    with pytest.raises(InputError, match="--ratio 1: leaves no image"):
        registry.open_labelled(Namespace(data=str(nodules), **{**options, "ratio": 1.0}))
    # In subsets of a data set too.
    half = open_train(nodules).subset(range(0, 168, 2))
    assert half.leading(0.5) == sum(place_of(uid) < 0.5 for uid in half.patients)


def test_scans_of_a_patient_stay_together(tmp_path):
    """A uid tells the patient, or a table; candidates still are of scans."""
    root = make_nodules(tmp_path, scans=40)
    index = (tmp_path / "nodules.csv").read_text()
    (tmp_path / "patients.csv").write_text(
        "file,patient\n" + "".join(f"1.2.{i},P{i % 10}{i // 20}\n" for i in range(40))
    )
    opened = all_splits(root)
    assert set(opened["train"].patients) == {f"P{i}{k}" for i in range(7) for k in range(2)}
    assert len(set(opened["train"].scans)) == 28
    for ratio in (0.2, 0.5, 0.8):
        seen, held = ({opened["train"].patients[i] for i in part} for part in opened["train"].parted(ratio))
        assert seen
        assert not seen & held
    (tmp_path / "list").write_text("1.2.0\n1.2.1\n1.2.2\n1.2.10\n")  # the first and the last are of P00
    train = all_splits(root, list=str(tmp_path / "list"))["train"]
    assert list(dict.fromkeys(train.scans)) == ["1.2.0", "1.2.10", "1.2.1", "1.2.2"]
    (tmp_path / "patients.csv").unlink()
    (tmp_path / "nodules.csv").write_text(
        index.replace("\n1.2.0,", "\npatient3_a,").replace("\n1.2.10,", "\npatient3_b,")
    )
    assert "patient3" in all_splits(root)["train"].patients


def test_lists_of_scans(tmp_path):
    root = make_nodules(tmp_path / "n")
    lists = {}
    for name, scans in (("list", (15, 3, 1, 8)), ("val_list", (8,)), ("test_list", (0, 17))):
        lists[name] = str(tmp_path / name)
        (tmp_path / name).write_text("".join(f"1.2.{i}\n" for i in scans))
    opened = all_splits(root, **lists)
    # In the list's order; a scan of a subset that does not train is left out.
    assert list(dict.fromkeys(opened["train"].patients)) == ["1.2.15", "1.2.3", "1.2.1"]
    assert opened["train"].leading(0.5) == 8  # two of four scans
    assert set(opened["test"].patients) == {"1.2.0", "1.2.17"}
    (tmp_path / "val_list").write_text("1.2.3\n")
    with pytest.raises(InputError, match="train and val share 4 images, such as subset3/1.2.3_nodule_300"):
        all_splits(root, **lists)
    (tmp_path / "list").write_text("9.9\n")
    with pytest.raises(InputError, match="none of the scans of .*list has candidates in subset 0-6, the train split"):
        all_splits(root, **lists)


def damage(path, how):
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-50])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "objects":
        np.save(path, np.array([None]), allow_pickle=True)
    elif how == "integers":
        np.save(path, np.zeros(PAIR, np.int16))
    elif how == "shape":
        np.save(path, np.zeros((2, 16, 16, 9), np.float16))
    elif how == "units":
        np.save(path, np.full(PAIR, 40.0))
    elif how == "nan":
        np.save(path, np.full(PAIR, np.nan))


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("missing", "is missing"),
        ("truncated", "or a truncated one"),
        ("empty", "or a truncated one"),
        ("objects", "not an .npy file of numbers"),
        ("integers", "not an array of floats"),
        ("shape", r"has shape \(2, 16, 16, 9\), not \(2, 16, 16, 8\) like the others"),
        ("units", "holds values outside of 0 to 1"),
        ("nan", "holds values outside of 0 to 1"),
    ],
)
def test_a_bad_file_is_replaced_and_named(tmp_path, how, reason):
    data = open_train(make_pairs(tmp_path, scans=2))
    damage(tmp_path / f"{data.ids[2]}.npy", how)
    sample = data[2]
    assert sample["index"] == 3
    (bad,) = sample["bad"]
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(bad)
    assert bad.startswith(f"{data.ids[2]}: ")


def test_bad_local_cubes_and_no_readable_pair(tmp_path):
    data = open_train(make_pairs(tmp_path, scans=1))
    (tmp_path / "subset0" / "1.2.0_local_1.npy").unlink()
    assert data[1]["bad"] == ["subset0/1.2.0_global_1: 1.2.0_local_1.npy is missing"]
    for path in tmp_path.glob("subset0/*global*"):
        path.write_bytes(b"no")
    with pytest.raises(InputError, match=r"luna: none of 3 tried files can be read, first .*1.2.0_global_0.npy"):
        open_train(tmp_path)
    for path in tmp_path.glob("subset0/*global*"):
        np.save(path, np.zeros((3, 8, 8, 8), np.float16))
    with pytest.raises(InputError, match="a pair's first axis has length 2"):
        open_train(tmp_path)


def test_folders_that_are_not_prepared(tmp_path):
    (tmp_path / "raw" / "subset0").mkdir(parents=True)
    (tmp_path / "raw" / "subset0" / "1.2.mhd").touch()
    with pytest.raises(InputError, match=r"raw CTs such as subset0/1.2.mhd, not cubes; .* preprocess/luna.py --data"):
        open_train(tmp_path / "raw")
    with pytest.raises(InputError, match="raw CTs .* --nodules candidates_V2.csv"):
        all_splits(tmp_path / "raw")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no cubes .* python preprocess/luna.py"):
        open_train(tmp_path / "empty")
    make_pairs(tmp_path / "p", scans=1)
    with pytest.raises(InputError, match="holds pairs for pre-training, no labelled nodules"):
        all_splits(tmp_path / "p")
    with pytest.raises(InputError, match="luna needs --data"):
        registry.open_splits(Request(name="luna"), ["train"])
    with pytest.raises(InputError, match="not a folder"):
        open_train(tmp_path / "raw" / "subset0" / "1.2.mhd")
    with pytest.raises(InputError, match="--d 2: data set luna has 3 dimensions"):
        registry.open_splits(request(tmp_path / "p"), ["train"], 2)


def test_missing_subsets(tmp_path):
    root = make_nodules(tmp_path, scans=8)
    with pytest.raises(InputError, match="no candidates in subset 8-9, the test split; prepare these subsets"):
        all_splits(root)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("uid,row,class\n", "line 1: no column 'fold'"),
        ("uid,class,fold,weight,file\n", "no candidates in it"),
        ("uid,class,fold,weight,file\na,1,0,1,x.npy\na,one,0,1,y.npy\n", "line 3: class, fold and weight"),
        ("uid,class,fold,weight,file\na,2,0,1,x.npy\n", "line 2: class must be 0 or 1"),
        ("uid,class,fold,weight,file\na,1,0,0,x.npy\n", "line 2: class must be 0 or 1, weight at least 1"),
        ("uid,class,fold,weight,file\na,1\n", "line 2: class, fold and weight"),
    ],
)
def test_bad_tables(tmp_path, text, message):
    (tmp_path / "nodules.csv").write_text(text)
    with pytest.raises(InputError, match=f"nodules.csv.*{message}"):
        all_splits(tmp_path)


def test_table_that_is_no_text(tmp_path):
    (tmp_path / "nodules.csv").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(InputError, match="nodules.csv: not a text file"):
        all_splits(tmp_path)


def test_no_cache_for_volumes(tmp_path):
    with pytest.raises(InputError, match="those of luna are read as fast without it"):
        open_train(make_pairs(tmp_path, scans=1), cache=str(tmp_path / "cache"))


def test_what_preprocessing_leaves_is_what_is_opened(tmp_path):
    write(tmp_path / "raw" / "subset0" / "1.2.mhd", chest())
    luna.main(["--data", str(tmp_path / "raw"), "--save", str(tmp_path / "p"), "--scale", "2", "--workers", "0"])
    sample = open_train(tmp_path / "p")[1]
    assert sample["image"].shape == (2, 64, 64, 32)
    assert sample["locals"].shape == (6, 16, 16, 16)
    table = tmp_path / "candidates.csv"
    rows = [f"1.2,{40 + 20 * i},110,80,{int(i == 2)}" for i in range(6)]
    table.write_text("\n".join(["seriesuid,coordX,coordY,coordZ,class", *rows]))
    argv = ["--data", str(tmp_path / "raw"), "--save", str(tmp_path / "n"), "--nodules", str(table), "--workers", "0"]
    luna.main([*argv, "--negatives", "2"])
    data = open_train(tmp_path / "n")
    assert len(data) == 3
    assert data.weights[data.labels == 0].tolist() == [2.5, 2.5]
    assert data.weights[data.labels == 1].tolist() == [1]
    assert data[0]["image"].shape == (1, 48, 48, 48)
    assert data[0]["size"].tolist() == [48, 48, 48]
