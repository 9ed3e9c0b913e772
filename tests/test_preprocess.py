"""Lists from metadata, and the check of a folder."""

import gzip
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from medssl.datasets import chexpert as chexpert_set
from medssl.datasets.base import Request
from medssl.datasets.chest import FINDINGS
from medssl.datasets.registry import open_splits
from medssl.errors import InputError
from medssl.preprocess import cache_images, check_data, make_lists
from medssl.reading.tables import read_list

HEADER = ",".join(["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *chexpert_set.LABELS])


def chexpert(root, gz=False):
    """Thirty patients, each with a frontal and a lateral view, and two more in valid.csv."""
    rows = {"train": [HEADER], "valid": [HEADER]}
    for number in range(1, 33):
        part = "train" if number <= 30 else "valid"
        for view in ("frontal", "lateral"):
            name = f"CheXpert-v1.0-small/{part}/patient{number:05d}/study1/view1_{view}.jpg"
            # No Finding, Cardiomegaly, Support Devices; the rest is blank
            values = ["1.0", "", "-1.0" if number % 3 == 0 else "0.0", *[""] * 10, "1.0" if number % 2 else ""]
            rows[part].append(",".join([name, "Male", "60", view.title(), "AP", *values]))
    root.mkdir(exist_ok=True)
    if gz:
        (root / "chexpert_train.csv.gz").write_bytes(gzip.compress("\n".join(rows["train"]).encode()))
    else:
        for part, lines in rows.items():
            (root / f"{part}.csv").write_text("\n".join(lines))
    return root


def nih(root, images=False):
    """Twenty patients of three images; the official test set is the last five patients."""
    root.mkdir(exist_ok=True)
    names = [f"{patient:08d}_{visit:03d}.png" for patient in range(1, 21) for visit in range(3)]
    rows = [f"{name},{['No Finding', 'Mass|Nodule'][int(name[:8]) % 2]},{int(name[:8])}" for name in names]
    (root / "Data_Entry_2017.csv").write_text("\n".join(["Image Index,Finding Labels,Patient ID", *rows]))
    (root / "train_val_list.txt").write_text("\n".join(names[:45]))
    (root / "test_list.txt").write_text("\n".join(names[45:]))
    if images:
        (root / "images").mkdir()
        for i, name in enumerate(names):
            Image.fromarray(np.full((8, 8), i, np.uint8)).save(root / "images" / name)
    return root


def run(data, output, *more, dataset="chexpert"):
    make_lists.main(["--dataset", dataset, "--data", str(data), "--output", str(output), *more])
    return {split: read_list(output / f"{dataset}_{split}.txt") for split in ("train", "valid", "test")}


def patients(names):
    return {name.split("/")[1] for name in names}


def test_chexpert_official(tmp_path, capsys):
    made = run(chexpert(tmp_path / "c"), tmp_path / "lists", "--uncertain", "ones")
    assert {split: len(names) for split, (names, _) in made.items()} == {"train": 27, "valid": 3, "test": 2}
    assert made["test"][0] == [f"valid/patient{n:05d}/study1/view1_frontal.jpg" for n in (31, 32)]
    assert not patients(made["train"][0]) & patients(made["valid"][0])
    names, labels = made["train"]
    for name, label in zip(names, labels):
        number = int(name[13:18])
        wanted = torch.zeros(14)
        wanted[0], wanted[2], wanted[13] = 1, number % 3 == 0, number % 2
        assert torch.equal(label, wanted)
    out = capsys.readouterr().out
    assert "patients" in out
    assert [line.split()[1:] for line in out.splitlines() if line.startswith("images")] == [["27", "3", "2"]]


def test_chexpert_options(tmp_path):
    root = chexpert(tmp_path / "c", gz=True)
    with pytest.raises(InputError, match="no valid.csv, the official test images; use --split random"):
        run(root, tmp_path / "lists")
    made = run(root, tmp_path / "lists", "--split", "random", "--view", "all")  # uncertain labels stay
    assert {split: len(names) for split, (names, _) in made.items()} == {"train": 42, "valid": 6, "test": 12}
    groups = [patients(names) for names, _ in made.values()]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 30
    assert sum(int((labels == -1).sum()) for _, labels in made.values()) == 20
    zeros = run(root, tmp_path / "lists", "--split", "random", "--view", "lateral", "--uncertain", "zeros")
    assert sum(float(labels[:, 2].sum()) for _, labels in zeros.values()) == 0
    assert all("lateral" in name for names, _ in zeros.values() for name in names)
    again = run(root, tmp_path / "lists", "--split", "random", "--seed", "1")
    assert again["test"][0] != run(root, tmp_path / "lists", "--split", "random", "--seed", "2")["test"][0]
    assert again["test"][0] == run(root, tmp_path / "lists", "--split", "random", "--seed", "1")["test"][0]


def test_chest_lists_are_what_the_data_set_does_itself(tmp_path):
    root = nih(tmp_path / "n", images=True)
    made = run(root, tmp_path / "lists", dataset="chest")
    assert {split: len(names) for split, (names, _) in made.items()} == {"train": 39, "valid": 6, "test": 15}
    own = open_splits(Request(name="chest", data=str(root)), ["train", "val", "test"])
    files = {name: str(tmp_path / "lists" / f"chest_{split}.txt") for name, split in
             (("list", "train"), ("val_list", "valid"), ("test_list", "test"))}  # fmt: skip
    listed = open_splits(Request(name="chest", data=str(root), **files), ["train", "val", "test"])
    for split, data in own.items():
        assert data.ids == listed[split].ids
        assert torch.equal(data.labels, listed[split].labels)
    assert made["train"][1][:, FINDINGS.index("Mass")].sum() > 0


def test_chest_random(tmp_path):
    made = run(nih(tmp_path / "n"), tmp_path / "lists", "--split", "random", "--seed", "4", dataset="chest")
    groups = [{name[:8] for name in names} for names, _ in made.values()]
    assert [len(group) for group in groups] == [14, 2, 4]
    assert len(set.union(*groups)) == 20


def test_lists_bad_input(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        run(tmp_path / "gone", tmp_path / "lists")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no train.csv there"):
        run(tmp_path / "empty", tmp_path / "lists")
    with pytest.raises(InputError, match=r"no Data_Entry_2017\*.csv there"):
        run(tmp_path / "empty", tmp_path / "lists", dataset="chest")
    root = chexpert(tmp_path / "c")
    text = (root / "train.csv").read_text()
    for wrong, message in (
        (text.replace("-1.0", "7"), "train.csv, line 6: label '7'; labels must be 1, 0, -1 or blank"),
        (text.replace("patient00002", "someone"), "train.csv, line 4: no patient in the path train/someone/"),
        (text.replace("Fracture", "Break"), "line 1: no column 'Fracture'"),
        ("", "line 1: no column 'Path'"),
    ):
        (root / "train.csv").write_text(wrong)
        with pytest.raises(InputError, match=message):
            run(root, tmp_path / "lists")
    (root / "train.csv").write_text(text.replace("patient00003", "patient00031"))
    with pytest.raises(InputError, match="share 1 patients, such as patient00031"):
        run(root, tmp_path / "lists")
    with pytest.raises(InputError, match="leave nothing to train on"):
        run(root, tmp_path / "lists", "--split", "random", "--test-fraction", "0.9", "--val-fraction", "0.1")
    other = nih(tmp_path / "n")
    (other / "test_list.txt").unlink()
    with pytest.raises(InputError, match="no test_list.txt there"):
        run(other, tmp_path / "lists", dataset="chest")
    assert not (tmp_path / "lists").exists()  # nothing is written before everything is checked


@pytest.mark.parametrize("workers", ["0", "2"])
def test_check_finds_problems(tmp_path, capsys, workers):
    root = nih(tmp_path / "n", images=True) / "images"
    (root / "00000002_000.png").write_text("no")
    (root / "copy.png").write_bytes((root / "00000004_000.png").read_bytes())
    (tmp_path / "a.txt").write_text("00000001_000.png\n00000003_000.png\n00000004_000.png\n")
    (tmp_path / "b.txt").write_text("00000001_001.png\n00000099_000.png\ncopy.png\n")
    lists = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    with pytest.raises(SystemExit) as left:
        check_data.main([str(root), "--list", *lists, "--json", str(tmp_path / "r.json"), "--workers", workers])
    assert left.value.code == 1
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["images"] == 61
    assert report["formats"] == {"PNG": 60, "?": 1}
    assert report["pixels"] == {"L": 60}
    assert report["sizes"] == {"8x8": 60}
    assert list(report["unreadable"]) == ["00000002_000.png"]
    assert report["duplicates"] == [["00000004_000.png", "copy.png"]]
    assert report["missing"] == [f"{lists[1]}: 00000099_000.png"]
    assert [line.split(" share ")[1] for line in report["overlaps"]] == [
        "1 patients, such as 00000001",
        f"1 identical files, such as {check_data.examine(root / 'copy.png')['hash']}",
    ]
    out = capsys.readouterr().out
    assert "unreadable: 1\n  00000002_000.png: not an image that Pillow or pydicom can read" in out


def test_check_of_sound_data_ends_well(tmp_path, capsys):
    root = nih(tmp_path / "n", images=True)
    check_data.main(
        [str(root), "--list", str(root / "train_val_list.txt"), str(root / "test_list.txt"), "--workers", "0"]
    )
    assert "overlaps: none" in capsys.readouterr().out
    with pytest.raises(InputError, match="not a folder"):
        check_data.main([str(tmp_path / "gone")])
    with pytest.raises(InputError, match="no such list file"):
        check_data.main([str(root), "--list", "gone.txt"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no images in this folder or below it"):
        check_data.main([str(tmp_path / "empty")])


def test_chest_cache_holds_every_split(tmp_path, capsys):
    root = nih(tmp_path / "n", images=True)
    common = {"name": "chest", "data": str(root), "texture_size": 8, "cache": str(tmp_path / "cache")}
    cache_images.main(
        [
            "--dataset",
            "chest",
            "--data",
            str(root),
            "--texture-size",
            "8",
            "--workers",
            "0",
            "--output",
            common["cache"],
        ]
    )
    assert "60 images of 1 x 8 x 8, 0 of them" in capsys.readouterr().out
    opened = open_splits(Request(**common), ["train", "val", "test"])
    for data in opened.values():
        for i in (0, len(data) - 1):
            number = (int(data.ids[i][:8]) - 1) * 3 + int(data.ids[i][9:12])
            assert (data[i]["image"] == number).all()


@pytest.mark.parametrize("script", [make_lists, check_data, cache_images])
def test_help_is_complete(script):
    for action in script.get_parser()._actions:
        assert action.help, action.option_strings


def test_a_script_reports_bad_input_in_one_line(tmp_path):
    ran = subprocess.run(
        [sys.executable, check_data.__file__, str(tmp_path / "gone")], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == f"error: {tmp_path / 'gone'}: not a folder\n"
