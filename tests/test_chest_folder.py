"""ChestX-ray14 and folders of images: which images, labels and patients each split has."""

import gzip
import os
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image

from medssl.datasets import chest, folder, splits
from medssl.datasets.base import Request
from medssl.datasets.registry import open_labelled, open_pretraining, open_splits
from medssl.errors import InputError
from medssl.reading import tables

GREY = np.arange(64, dtype=np.uint8).reshape(8, 8)


def image(path, pixels=GREY):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def nih(tmp_path):
    """Twenty patients of two images; the last five patients are the official test set."""
    root = tmp_path / "nih"
    rows = ["Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age"]
    names = [f"{patient:08d}_{visit:03d}.png" for patient in range(1, 21) for visit in range(2)]
    for number, name in enumerate(names):
        image(root / ("images_001" if number % 2 else "images_002") / "images" / name)
        finding = ["No Finding", "Hernia", "Cardiomegaly|Effusion"][number % 3]
        rows.append(f"{name},{finding},0,{int(name[:8])},50")
    (root / "Data_Entry_2017_v2020.csv").write_text("\n".join(rows))
    (root / "train_val_list.txt").write_text("\n".join(names[:30]))
    (root / "test_list.txt").write_text("\n".join(names[30:]))
    return root


def request(root, **more):
    return Request(name="chest", data=str(root), image_size=16, **more)


def test_official_splits(nih):
    opened = open_splits(request(nih), ["train", "val", "test"])
    assert {split: len(data) for split, data in opened.items()} == {"train": 26, "val": 4, "test": 10}
    train = opened["train"]
    assert train.info.task == "multi-label"
    assert train.info.classes == chest.FINDINGS
    assert len(chest.FINDINGS) == 14
    for name, label in zip(train.ids, train.labels):
        number = (int(name[:8]) - 1) * 2 + int(name[9:12])
        positive = [chest.FINDINGS[i] for i in label.nonzero()[:, 0]]
        assert positive == [[], ["Hernia"], ["Cardiomegaly", "Effusion"]][number % 3]
    assert train.patients == [name[:8] for name in train.ids]
    sample = train[0]
    assert sample["image"].shape == (1, 32, 32)
    assert sample["size"].tolist() == [8, 8]


def test_pretraining_never_sees_validation_patients(nih):
    alone = open_splits(request(nih), ["train"])["train"]
    val = open_splits(request(nih), ["val"])["val"]
    assert not set(alone.patients) & set(val.patients)
    assert len(alone) + len(val) == 30


def test_without_any_list_all_images_train(nih):
    for name in ("train_val_list.txt", "test_list.txt"):
        (nih / name).unlink()
    assert len(open_splits(request(nih), ["train"])["train"]) == 40
    with pytest.raises(InputError, match="nothing says which images are for train; give --list"):
        open_splits(request(nih), ["train", "val"])
    (nih / "Data_Entry_2017_v2020.csv").unlink()
    bare = open_splits(request(nih), ["train"])["train"]
    assert bare.labels is None
    assert bare.info.task is None


def test_gzipped_table_and_plain_layout(nih):
    table = nih / "Data_Entry_2017_v2020.csv"
    (nih / "Data_Entry_2017.csv.gz").write_bytes(gzip.compress(table.read_bytes()))
    table.unlink()
    (nih / "images").mkdir()
    for path in sorted(nih.glob("images_00*/images/*.png")):
        os.rename(path, nih / "images" / path.name)
    assert open_splits(request(nih), ["test"])["test"].labels.sum() > 0


def test_a_partial_copy_is_used_with_a_warning(nih, capsys):
    whole = open_splits(request(nih), ["val"])["val"]
    for path in (nih / "images_001" / "images").iterdir():
        path.unlink()
    opened = open_splits(request(nih), ["val", "test"])
    assert len(opened["test"]) == 5
    assert set(opened["val"].ids) < set(whole.ids)
    assert "warning: " in capsys.readouterr().err


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def labels(*positive):
    return " ".join("1" if i in positive else "0" for i in range(14))


def test_given_lists_and_the_leak_warning(nih, tmp_path, capsys):
    train = write(tmp_path / "t.txt", f"00000001_000.png {labels(0)}", f"images/00000002_000.png {labels(13)}")
    test = write(tmp_path / "e.txt", f"00000019_000.png {labels()}")
    opened = open_splits(request(nih, list=train, test_list=test), ["train", "test"])
    assert opened["train"].labels.nonzero().tolist() == [[0, 0], [1, 13]]
    assert opened["train"].ids[1] == "00000002_000.png"
    assert capsys.readouterr().err == ""
    leaky = write(tmp_path / "l.txt", f"00000018_000.png {labels()}", f"00000001_000.png {labels()}")
    open_splits(request(nih, list=leaky), ["train"])
    error = capsys.readouterr().err
    assert error.startswith(f"warning: {leaky}: 1 of its 2 images are in the official test set")
    assert error.count("\n") == 1


def test_names_alone_take_the_labels_of_the_table(nih, tmp_path):
    names = write(tmp_path / "names.txt", "00000001_001.png", "00000002_000.png")
    data = open_splits(request(nih, list=names), ["train"])["train"]
    assert data.labels[0].nonzero()[:, 0].tolist() == [13]


def test_a_list_without_validation_list_is_split_by_patient(nih, tmp_path, capsys):
    names = write(tmp_path / "names.txt", *(f"{p:08d}_{v:03d}.png" for p in range(1, 11) for v in range(2)))
    opened = open_splits(request(nih, list=names), ["train", "val", "test"])
    assert [len(data) for data in opened.values()] == [18, 2, 10]
    assert capsys.readouterr().err.startswith(f"note: {names}: no --val-list, so a tenth of its patients validates")
    assert len(open_splits(request(nih, list=names), ["train"])["train"]) == 20


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([f"00000001_000.png {labels()}", f"00000099_000.png {labels()}"], "line 2: 00000099_000.png is not in"),
        ([f"00000001_000.png {labels()}", "", "00000002_000.png 0 1"], "line 3: 2 labels, the lines above have 14"),
        (["00000001_000.png 0 1"], "line 1: 2 labels, the data set has 14"),
        ([f"00000001_000.png {labels()[:-1]}2"], "line 1: label 2 of 00000001_000.png is not 0 or 1"),
        ([f"00000001_000.png {labels()[:-1]}-2"], "line 1: label -2; the least is -1"),
        ([f"00000001_000.png {labels()[:-1]}x"], "line 1: labels must be whole numbers"),
        (["00000001_000.png", "00000001_000.png"], "line 2: 00000001_000.png is listed on line 1 already"),
        (["", "  "], "the list is empty"),
    ],
)
def test_bad_lists(nih, tmp_path, lines, message):
    path = write(tmp_path / "bad.txt", *lines)
    with pytest.raises(InputError, match=message) as caught:
        open_splits(request(nih, list=path), ["train"])
    assert str(caught.value).startswith(path)


def test_overlapping_lists_are_refused(nih, tmp_path):
    one = write(tmp_path / "a.txt", "00000001_000.png")
    two = write(tmp_path / "b.txt", "00000001_001.png")
    with pytest.raises(InputError, match="train and test share 1 patients, such as 00000001"):
        open_splits(request(nih, list=one, test_list=two), ["train", "test"])


def test_validating_on_the_test_list_is_refused(nih, tmp_path, capsys):
    train, test = write(tmp_path / "t.txt", "00000001_000.png"), nih / "test_list.txt"
    for more in ({}, {"test_list": str(test)}):
        with pytest.raises(InputError, match="val and test share 10 images"):
            open_splits(request(nih, list=train, val_list=str(test), **more), ["train", "val", "test"])
        error = capsys.readouterr().err
        assert error.startswith(f"warning: {test}: 10 of its 10 images are in the official test set")
        assert error.endswith("for a model that chooses models on them\n")


@pytest.mark.parametrize("source", ["official", "list", "shuffled"])
@pytest.mark.parametrize("ratio", [0.24, 0.5])
def test_the_ratio_parts_patients(nih, tmp_path, source, ratio):
    options = {"dataset": "chest", "data": str(nih), "image_size": 16, "list": None, "cache": None, "d": None}
    if source in ("list", "shuffled"):
        names = (nih / "train_val_list.txt").read_text().split()
        if source == "shuffled":
            names = np.random.default_rng(0).permutation(names)
        options["list"] = write(tmp_path / "l.txt", *names)
    before = open_pretraining(Namespace(**options, ratio=ratio))
    splits = open_labelled(Namespace(**options, ratio=ratio))
    after = splits["train"]
    assert not set(before.patients) & set(after.patients)
    whole = open_splits(request(nih, list=options["list"]), ["train"])["train"]
    assert round(ratio * len(whole)) <= len(before) <= round(ratio * len(whole)) + 1
    left_out = set(splits["val"].patients) if options["list"] else set()
    assert set(before.patients) | set(after.patients) | left_out == set(whole.patients)
    if source != "shuffled":
        assert before.ids == whole.ids[: len(before)]


def test_bad_folders_and_tables(nih, tmp_path):
    with pytest.raises(InputError, match="needs --data"):
        open_splits(Request(name="chest"), ["train"])
    with pytest.raises(InputError, match="no such file or folder"):
        open_splits(request(tmp_path / "gone"), ["train"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no images in images/"):
        open_splits(request(tmp_path / "empty"), ["train"])
    with pytest.raises(InputError, match="no such list file"):
        open_splits(request(nih, list=str(tmp_path / "gone.txt")), ["train"])
    table = nih / "Data_Entry_2017_v2020.csv"
    text = table.read_text()
    table.write_text(text.replace("Hernia", "Hernya"))
    with pytest.raises(InputError, match=r"csv, line 3: unknown finding in 'Hernya'"):
        open_splits(request(nih), ["train"])
    table.write_text(text.replace("Finding Labels", "Findings"))
    with pytest.raises(InputError, match="no column 'Finding Labels'"):
        open_splits(request(nih), ["train"])


def test_lists_round_trip(tmp_path):
    names = ["a b/c 1.png", "plain", "x.PNG", "00001"]
    values = torch.tensor([[0.0, 1], [1, 0], [torch.nan, 0], [3, 2]])
    tables.write_list(tmp_path / "l.txt", names, values)
    read, back = tables.read_list(tmp_path / "l.txt")
    assert read == names
    assert torch.equal(back, torch.nan_to_num(values, nan=-1))
    tables.write_list(tmp_path / "l.txt", names)
    assert tables.read_list(tmp_path / "l.txt") == (names, None)
    (tmp_path / "l.txt").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(InputError, match="not a text file"):
        tables.read_list(tmp_path / "l.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["l.txt"]  # no temporary file stays


def test_split_by_patient():
    patients = [f"p{i // 3}" for i in range(300)]
    rest, held = splits.split_by_patient(patients, 0.2, seed=5)
    assert (rest, held) == splits.split_by_patient(patients, 0.2, seed=5)
    assert held != splits.split_by_patient(patients, 0.2, seed=6)[1]
    assert sorted(rest + held) == list(range(300))
    assert len(held) == 60
    assert not {patients[i] for i in rest} & {patients[i] for i in held}
    assert [len(part) for part in splits.split_by_patient(["a", "b"], 0.01, 0)] == [1, 1]
    assert splits.split_by_patient(patients, 0, 0)[1] == []


def folder_request(root, **more):
    return Request(name="folder", data=str(root), image_size=16, **more)


def test_folder_is_unlabelled_and_grey_where_all_is_grey(tmp_path):
    image(tmp_path / "b" / "2.png")
    image(tmp_path / "a.png", np.repeat(GREY[..., None], 3, -1))
    data = open_splits(folder_request(tmp_path), ["train"])["train"]
    assert data.ids == ["a.png", "b/2.png"]
    assert data.info.channels == 1
    assert data.labels is None
    assert data[0]["image"].shape == (1, 32, 32)
    image(tmp_path / "c.png", np.stack([GREY, GREY, GREY * 2], -1))
    assert open_splits(folder_request(tmp_path), ["train"])["train"][0]["image"].shape == (3, 32, 32)
    with pytest.raises(InputError, match="only unlabelled training images; for train and test, give --list"):
        open_splits(folder_request(tmp_path), ["train", "test"])


@pytest.mark.parametrize(
    ("columns", "task", "classes", "kind"),
    [(["0", "1"], "binary", 2, torch.int64), (["0", "1", "2"], "multi-class", 3, torch.int64),
     (["0 1 1", "1 0 -1"], "multi-label", 3, torch.float32)],
)  # fmt: skip
def test_folder_tasks(tmp_path, columns, task, classes, kind):
    for i in range(6):
        image(tmp_path / f"{i}.png")
    path = write(tmp_path / "l.txt", *(f"{i}.png {columns[i % len(columns)]}" for i in range(6)))
    data = open_splits(folder_request(tmp_path, list=path), ["train"])["train"]
    assert (data.info.task, len(data.info.classes), data.labels.dtype) == (task, classes, kind)
    assert len(data) == 6
    assert (data.labels >= 0).all() or torch.isnan(data.labels).any()


def test_one_list_is_split_with_a_note(tmp_path, capsys):
    for i in range(20):
        image(tmp_path / f"{i}.png")
    path = write(tmp_path / "l.txt", *(f"{i}.png {i % 2}" for i in range(20)))
    opened = open_splits(folder_request(tmp_path, list=path), ["train", "val", "test"])
    assert [len(data) for data in opened.values()] == [14, 2, 4]
    assert capsys.readouterr().err.startswith("note: ")
    test = open_splits(folder_request(tmp_path, list=path), ["test"])["test"]
    assert test.ids == opened["test"].ids
    assert [int(name[:-4]) % 2 for name in test.ids] == test.labels.tolist()
    with pytest.raises(InputError, match="nothing says which images are for test; give --test-list"):
        open_splits(folder_request(tmp_path, list=path, val_list=path), ["test"])


def test_class_folders(tmp_path, capsys):
    for name in ("sick", "healthy"):
        for i in range(10):
            image(tmp_path / name / "deep" / f"{i}.png")
    opened = open_splits(folder_request(tmp_path), ["train", "val", "test"])
    assert opened["train"].info.classes == ("healthy", "sick")
    assert opened["train"].info.task == "binary"
    for data in opened.values():
        assert [name.startswith("sick") for name in data.ids] == data.labels.bool().tolist()
    assert "by image" in capsys.readouterr().err
    image(tmp_path / "stray.png")
    with pytest.raises(InputError, match="only unlabelled"):
        open_splits(folder_request(tmp_path), ["val"])


def test_split_folders(tmp_path):
    for split, count in (("train", 10), ("valid", 2), ("test", 4)):
        for name in "abc":
            for i in range(count):
                image(tmp_path / split / name / f"{i}.png")
    opened = open_splits(folder_request(tmp_path), ["train", "val", "test"])
    assert [len(data) for data in opened.values()] == [30, 6, 12]
    assert opened["val"].info.classes == ("a", "b", "c")
    assert opened["val"].info.task == "multi-class"
    assert len(open_splits(folder_request(tmp_path), ["train"])["train"]) == 30  # not the test images
    image(tmp_path / "test" / "d" / "0.png")
    with pytest.raises(InputError, match="d is none of the classes in train, a, b, c"):
        open_splits(folder_request(tmp_path), ["test"])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a.png 0", "b.png 1"], "line 2: b.png is not in"),
        (["a.png -1"], "line 1: class -1; classes count from 0"),
        (["a.png 0 2"], "line 1: label 2 of a.png is not 0 or 1"),
        (["a.png 0"], "all labels are 0"),
    ],
)
def test_bad_folder_lists(tmp_path, lines, message):
    image(tmp_path / "a.png")
    with pytest.raises(InputError, match=message):
        open_splits(folder_request(tmp_path, list=write(tmp_path / "l.txt", *lines)), ["train"])


def test_bad_folders(tmp_path):
    with pytest.raises(InputError, match="no images in this folder or below it"):
        open_splits(folder_request(tmp_path), ["train"])
    (tmp_path / "a.png").write_text("no")
    with pytest.raises(InputError, match=r"none of 1 tried images can be read, first .*a.png: not an image"):
        open_splits(folder_request(tmp_path), ["train"])
    with pytest.raises(InputError, match="not a folder"):
        folder.open_all(folder_request(tmp_path / "a.png"))


def test_an_unreadable_file_is_replaced_and_named(tmp_path):
    image(tmp_path / "a.png")
    image(tmp_path / "c.png")
    (tmp_path / "b.png").write_text("no")
    sample = open_splits(folder_request(tmp_path), ["train"])["train"][1]
    assert sample["index"] == 2
    assert sample["bad"] == ["b.png: not an image that Pillow or pydicom can read"]


def test_a_cache_keeps_the_order_that_ratio_parts(nih, tmp_path):
    from medssl.preprocess import cache_images

    common = ["--dataset", "chest", "--data", str(nih), "--texture-size", "16", "--workers", "0"]
    cache_images.main([*common, "--output", str(tmp_path / "cache")])
    options = {"dataset": "chest", "data": str(nih), "image_size": 16, "texture_size": 16, "list": None, "d": None}
    plain, cached = (
        open_pretraining(Namespace(**options, cache=cache, ratio=0.4)) for cache in (None, str(tmp_path / "cache"))
    )
    assert cached.cached is not None
    assert cached.ids == plain.ids
