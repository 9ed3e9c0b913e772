"""One policy for splits: by patient wherever a table, a name or a folder tells the patient, each class by itself."""

import json
import re
from argparse import Namespace

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from medssl import finetune_classification, train_moco
from medssl.datasets import folder, registry, splits
from medssl.datasets.base import Request
from medssl.datasets.registry import open_splits
from medssl.datasets.splits import SPLITS, patient_of, split_all, split_classes
from medssl.errors import InputError


def save(path, number=0, shape=(40, 40)):
    """A picture, or a volume where there are three sides."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(1, 3 if "masks" in path.parts else 255, shape, dtype=np.uint8)
    if len(shape) == 3:
        sitk.WriteImage(sitk.GetImageFromArray(pixels), str(path))
    else:
        Image.fromarray(pixels).save(path)


@pytest.mark.parametrize(
    ("name", "patient"),
    [
        ("images/00000013_005.png", "00000013"),
        ("train/patient00001/study1/view1_frontal.jpg", "patient00001"),
        ("images/patient0001/study2.nii.gz", "patient0001"),
        ("patient12_slice3.png", "patient12"),
        ("sub-01/anat/sub-01_T1w.nii.gz", "sub-01"),
        ("sub-NDAR007/anat/T1w.nii.gz", "sub-ndar007"),
        ("ill/Subject_7.png", "subject_7"),
        ("patient02-study0.png", "patient02"),
        ("Patient 2/s0.png", "patient 2"),
        ("Patient02/s0.png", "patient02"),
        ("pat3/1.dcm", "pat3"),
        ("subset0/1.png", None),
        ("patients/1.png", None),
        ("dispatch3/1.png", None),
        ("case1.png", None),
        ("1.png", None),
    ],
)
def test_what_a_name_tells(name, patient):
    assert patient_of(name) == patient


def patients_of(opened):
    return {split: {patient_of(name) for name in data.ids} for split, data in opened.items()}


def disjoint(groups):
    groups = list(groups)
    return sum(map(len, groups)) == len(set().union(*groups))


@pytest.mark.parametrize("masks", [True, False])
def test_scans_of_a_patient_stay_together(tmp_path, capsys, masks):
    for number in range(8):
        for study in (1, 2):
            name = f"patient{number:04}/study{study}.nii.gz"
            for part in ("images", "masks") if masks else ("ill" if number % 2 else "well",):
                save(tmp_path / part / name, number, (6, 6, 6))
    opened = open_splits(Request(None, str(tmp_path), masks=masks), SPLITS)
    groups = patients_of(opened)
    assert disjoint(groups.values())
    assert all(groups.values())
    assert sum(map(len, opened.values())) == 16
    assert all({*data.patients} == groups[split] for split, data in opened.items())
    said = capsys.readouterr().err
    if masks:
        assert "note: 16 cases of 8 patients split 70/10/20 by patient" in said
        assert "earlier versions parted the cases of a patient" in said
        pretraining = open_splits(Request(None, str(tmp_path)), ["train"])["train"]
        assert pretraining.ids == opened["train"].ids
    # So lists that part a patient are refused.
    name = "" if masks else "well/"
    for split, study in (("train", 1), ("val", 2)):
        lines = [f"{name}patient{number:04}/study{study}" for number in (0, 2)]
        lines = [line if masks else f"{line} {i}" for i, line in enumerate(lines)]
        (tmp_path / f"{split}.txt").write_text("\n".join(lines))
    lists = {"list": str(tmp_path / "train.txt"), "val_list": str(tmp_path / "val.txt")}
    lists["test_list"] = lists["val_list"]
    with pytest.raises(InputError, match="train and val share 2 patients, such as patient0000"):
        open_splits(Request(None, str(tmp_path), masks=masks, **lists), SPLITS)


@pytest.mark.parametrize("shape", [(40, 40), (6, 6, 6)])
@pytest.mark.parametrize("written", ["images/sub/{}", "images\\sub\\{}", "./images/sub/{}", " {} "])
def test_a_table_tells_patients(tmp_path, shape, written):
    end, lines = "png" if len(shape) == 2 else "nii.gz", ["file,patient"]
    for i in range(12):
        for part in ("images", "masks"):
            save(tmp_path / part / "sub" / f"{i}.{end}", i % 2, shape)
        lines.append(f'{written.format(f"{i}.{end}")},"{" " * (i % 2)}P {i // 3}"')
    (tmp_path / "patients.csv").write_text("\n".join(lines))
    opened = open_splits(Request(None, str(tmp_path), masks=True), SPLITS)
    assert {patient for data in opened.values() for patient in data.patients} == {f"P {i}" for i in range(4)}
    assert all(len(data) == 3 * len(set(data.patients)) for data in opened.values())
    if len(shape) == 3:
        pretraining = open_splits(Request(None, str(tmp_path)), ["train"])["train"]
        assert (pretraining.ids, pretraining.patients) == (opened["train"].ids, opened["train"].patients)
    below = open_splits(Request(None, str(tmp_path / "images")), ["train"])["train"]
    assert sorted(set(below.patients)) == [f"P {i}" for i in range(4)]
    (tmp_path / "patients.csv").write_text("name,patient\n1.png,a\n")
    with pytest.raises(InputError, match="patients.csv, line 1: no column 'file'"):
        open_splits(Request(None, str(tmp_path), masks=True), SPLITS)
    (tmp_path / "patients.csv").write_text("file,patient\n1.png,\n")
    with pytest.raises(InputError, match="patients.csv, line 2: has no file or no patient"):
        open_splits(Request(None, str(tmp_path), masks=True), SPLITS)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["0.png,a", "1.png,a", "0.png,b"], "patients.csv, line 4: 0.png is of a and of b"),
        (["0.PNG,a", "x/1.png,a"], "patients.csv: has none of the 9 images, such as ill/0.png"),
        (["0.png"], "patients.csv, line 2: has no file or no patient"),
    ],
)
def test_a_table_that_does_not_fit(tmp_path, rows, message):
    for i in range(9):
        save(tmp_path / ("ill" if i % 2 == 0 else "well") / f"{i}.png", i)
    (tmp_path / "patients.csv").write_text("\r\n".join(["\ufefffile,patient", *rows]))
    with pytest.raises(InputError, match=re.escape(message)):
        open_splits(Request(None, str(tmp_path)), SPLITS)


def test_images_that_a_table_lacks_are_told(tmp_path, capsys):
    for i in range(9):
        save(tmp_path / ("ill" if i % 2 == 0 else "well") / f"{i}.png", i)
    (tmp_path / "patients.csv").write_text("file,patient\n0.png,a\n2.png,a\n")
    opened = open_splits(Request(None, str(tmp_path)), SPLITS)
    assert disjoint(set(data.patients or data.ids) for data in opened.values())
    said = capsys.readouterr().err
    assert "patients.csv: 7 of the 9 images are not in it, such as ill/4.png" in said
    assert "has seen the others, too" in said


def test_classes_of_too_few_images(tmp_path, capsys):
    for i in range(4):
        save(tmp_path / ("ill" if i % 2 == 0 else "well") / f"{i}.png", i)
    with pytest.raises(InputError, match="no class has 3 patients or images of its own to be split"):
        open_splits(Request(None, str(tmp_path)), SPLITS)
    save(tmp_path / "well" / "5.png", 5)
    registry.open_labelled(Namespace(data=str(tmp_path), dataset="folder", d=2, list=None, cache=None))
    assert "warning: all test images are of one class; their AUROC is undefined" in capsys.readouterr().err


def classes_in(opened):
    return {split: sorted({name.split("/")[0] for name in data.ids}) for split, data in opened.items()}


def test_every_class_is_in_every_split(tmp_path, capsys):
    counts = {"common": 60, "rare": 4, "three": 3}
    for name, count in counts.items():
        for i in range(count):
            save(tmp_path / name / f"{i}.png", i)
    opened = open_splits(Request(None, str(tmp_path)), SPLITS)
    assert classes_in(opened) == dict.fromkeys(SPLITS, ["common", "rare", "three"])
    assert [len(data) for data in opened.values()] == [42 + 2 + 1, 6 + 1 + 1, 12 + 1 + 1]
    said = capsys.readouterr().err
    assert "split 70/10/20 by image, each class by itself (earlier versions: all together)" in said
    assert "not in" not in said
    save(tmp_path / "two" / "1.png")
    save(tmp_path / "two" / "2.png")
    opened = open_splits(Request(None, str(tmp_path)), SPLITS)
    assert classes_in(opened)["train"] == ["common", "rare", "three", "two"]
    assert classes_in(opened)["test"] == ["common", "rare", "three"]
    said = capsys.readouterr().err
    assert "note: two: not in val; two has fewer than 3 patients or images of its own" in said
    assert "note: two: not in test" in said


def test_classes_and_patients(tmp_path):
    """A patient with images of two classes is in one split."""
    for number in range(12):
        for name in ("ill", "well")[: 1 + (number < 3)]:
            save(tmp_path / name / f"patient{number}" / "1.png", number)
        if number > 5:
            save(tmp_path / "well" / f"patient{number + 20}" / "1.png", number)
    opened = open_splits(Request(None, str(tmp_path)), SPLITS)
    groups = patients_of(opened)
    assert disjoint(groups.values())
    assert classes_in(opened) == dict.fromkeys(SPLITS, ["ill", "well"])


def test_split_classes_by_hand():
    patients = ["a", "a", "b", "c", "d", "e", "f", "g"]
    parts = split_classes(patients, [0, 1, 0, 0, 1, 1, 1, 0])
    assert sorted(i for rows in parts.values() for i in rows) == list(range(8))
    where = {patients[i]: split for split, rows in parts.items() for i in rows}
    assert len({where[patients[i]] for i in (0, 1)}) == 1
    for stratum in ("abcg", "def"):  # class 0 has four patients and so has class 1: of a tie the first
        assert {where[patient] for patient in stratum} == set(SPLITS)
    alone = split_all(list("def"))
    assert {split: ["def"[i] for i in rows] for split, rows in alone.items()} == {
        split: [patients[i] for i in rows if patients[i] in "def"] for split, rows in parts.items()
    }
    assert split_classes(["x", "y"], [0, 1]) == {"train": [0, 1], "val": [], "test": []}


def test_a_run_of_another_split_is_not_continued(tmp_path, monkeypatch, capsys):
    """As one that an earlier version began."""
    for name in ("ill", "well"):
        for i in range(20):
            save(tmp_path / "data" / name / f"{i}.png", i + 100 * (name == "ill"))
    words = ["--data", str(tmp_path / "data"), "--image-size", "32", "--b", "4", "--workers", "0", "--device", "cpu"]
    words += ["--no-tensorboard", "--output", str(tmp_path / "out"), "--steps", "1", "--save-every", "1"]
    with monkeypatch.context() as earlier:
        earlier.setattr(folder, "split_classes", lambda groups, _: splits.split_all(groups))
        finetune_classification.main(words)
    capsys.readouterr()
    with pytest.raises(InputError, match="was started with other data: images, their order, lists or labels differ"):
        finetune_classification.main(words)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["trials"]  # what was there stays
    # Pre-training on all images of class folders is not split, and goes on.
    more = ["--data", str(tmp_path / "data"), "--image-size", "32", "--b", "4", "--workers", "0", "--queue", "8"]
    for steps in ("1", "2"):
        train_moco.main([*more, "--device", "cpu", "--steps", steps, "--output", str(tmp_path / "moco")])
