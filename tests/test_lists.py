"""Lists and tables with slips: one line that says where, and nothing trained on by mistake."""

import gzip

import numpy as np
import pytest
import torch
from PIL import Image

from medssl.datasets import chest
from medssl.datasets.base import Request
from medssl.datasets.registry import open_splits
from medssl.errors import InputError
from medssl.reading import tables

HEADER = "Image Index,Finding Labels,Patient ID"
NAMES = [f"0000000{patient}_000.png" for patient in range(1, 5)]


@pytest.fixture
def nih(tmp_path):
    """Four images, all in the table."""
    root = tmp_path / "nih"
    (root / "images").mkdir(parents=True)
    for name in NAMES:
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(root / "images" / name)
    (root / "Data_Entry_2017.csv").write_text("\n".join([HEADER, *(f"{name},Hernia,{name[:8]}" for name in NAMES)]))
    return root


def written(path, *lines):
    path.write_text("\n".join(lines))
    return path


def chest_train(root, path=None):
    return open_splits(Request(name="chest", data=str(root), list=path and str(path), image_size=16), ["train"])[
        "train"
    ]


@pytest.mark.parametrize("again", ["./a/0.png", "a//0.png", "a\\0.png", "a/b/../0.png"])
def test_one_image_under_two_names_is_listed_twice(tmp_path, again):
    path = written(tmp_path / "l.txt", "a/0.png 0", f"{again} 1")
    with pytest.raises(InputError, match="line 2: a/0.png is listed on line 1 already"):
        tables.read_list(path)
    assert tables.read_list(written(path, f"{again} 1"))[0] == ["a/0.png"]
    assert tables.line_of(path, "a/0.png") == 1


def test_chest_lists_name_files_whatever_the_folder(nih, tmp_path):
    zeros = " 0" * 14
    path = written(tmp_path / "l.txt", f"images/{NAMES[0]}{zeros}", f"{NAMES[0]}{zeros[:-1]}1")
    with pytest.raises(InputError, match=f"line 2: {NAMES[0]} is listed on line 1 already"):
        chest_train(nih, path)
    written(path, f"images/{NAMES[0]}{zeros}", f"images/00000009_000.png{zeros}")
    with pytest.raises(InputError, match="l.txt, line 2: 00000009_000.png is not in"):
        chest_train(nih, path)
    written(path, f"images/{NAMES[0]}{zeros}", f"images/{NAMES[1]}{zeros[:-1]}7")
    with pytest.raises(InputError, match=f"line 2: label 7 of {NAMES[1]} is not 0 or 1"):
        chest_train(nih, path)
    assert chest_train(nih, written(path, f"images/{NAMES[0]}{zeros}")).ids == NAMES[:1]


@pytest.mark.parametrize("label", ["1_0", "1.0", "0x1", "１", "9" * 10, "9" * 5000, "--1", "nan"])
def test_labels_are_plain_digits(tmp_path, label):
    path = written(tmp_path / "l.txt", "0.png 0", f"1.png {label}")
    with pytest.raises(InputError, match="line 2: labels must be whole numbers, not"):
        tables.read_list(path)


def test_class_numbers_have_no_gaps():
    assert tables.class_count("l.txt", [torch.tensor([2, 0]), torch.tensor([1])]) == 3
    with pytest.raises(InputError, match="l.txt: class 99999 is there, but class 2 has no image; number the classes 0"):
        tables.class_count("l.txt", [torch.tensor([0, 1]), torch.tensor([99999])])
    with pytest.raises(InputError, match="class 2 is there, but class 0 has no image"):
        tables.class_count("l.txt", [torch.tensor([1, 2])])
    with pytest.raises(InputError, match="l.txt: all labels are 0; two classes are needed"):
        tables.class_count("l.txt", [torch.tensor([0, 0])])


def test_images_that_the_table_lacks(nih, capsys):
    table = nih / "Data_Entry_2017.csv"
    written(table, HEADER, *(f"{name},Hernia,{name[:8]}" for name in NAMES[:3]))
    data = chest_train(nih)
    assert data.labels[:3, -1].tolist() == [1, 1, 1]
    assert data.labels[3].isnan().all()
    error = capsys.readouterr().err
    assert error.startswith(f"warning: {nih}: 1 of its 4 images are not in {table}, such as {NAMES[3]}; their labels")
    assert error.count("\n") == 1
    written(table, HEADER, "00000009_000.png,Hernia,9")
    assert chest_train(nih).labels is None
    assert "4 of its 4 images are not in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (".csv.gz", f"{HEADER}\n".encode(), "cannot be read; is it whole"),
        (".csv.gz", gzip.compress(f"{HEADER}\n{NAMES[0]},Mass,1\n".encode())[:-9], "cannot be read; is it whole"),
        (".csv", f"{HEADER},Größe\n".encode("latin-1"), "not a table in UTF-8; is this the NIH table"),
        (".csv", f'{HEADER}\n"{"x" * 200_000}",Hernia,1\n'.encode(), "not a table in UTF-8; is this the NIH table"),
    ],
    ids=["not gzip", "cut short", "latin-1", "a field without end"],
)
def test_damaged_tables(nih, name, content, message):
    (nih / "Data_Entry_2017.csv").unlink()
    (nih / f"Data_Entry_2017{name}").write_bytes(content)
    with pytest.raises(InputError, match=f"Data_Entry_2017{name}: {message}") as caught:
        chest.read_entries(nih)
    assert "\n" not in str(caught.value)
