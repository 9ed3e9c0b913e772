"""Generated sets are made once, kept, shared, and known without being made."""

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from medssl import locks
from medssl.datasets.base import Request
from medssl.datasets.phantoms import ct, fundus, radiograph, store, tissue
from medssl.datasets.registry import open_splits
from medssl.errors import InputError

SETS = {"phantom2d": radiograph, "fundus2d": fundus, "tissue2d": tissue, "phantom3d": ct}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Sets of three images a split, and a cache folder of their own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for module in SETS.values():
        monkeypatch.setattr(module, "SPLITS", dict.fromkeys(module.SPLITS, 3))
        module._generated.cache_clear()
    yield tmp_path / "medssl" / "generated"
    for module in SETS.values():
        module._generated.cache_clear()


def opened(name, split="train", series=0):
    SETS[name]._generated.cache_clear()  # as another process has it
    size = 0 if name == "phantom3d" else 64
    return open_splits(Request(name, texture_size=size, series=series), [split])[split]


def everything(data):
    return [{key: value for key, value in data[i].items() if key != "bad"} for i in range(len(data))]


@pytest.mark.parametrize("name", SETS)
def test_series_are_drawn_anew_and_kept_beside_each_other(name, small):
    first, second = opened(name), opened(name, series=1)
    assert first.digest != second.digest
    assert first.ids == second.ids
    assert not np.array_equal(everything(first)[0]["image"], everything(second)[0]["image"])
    assert len(list(small.glob(f"{name}-train-3*/arrays"))) == 2
    assert opened(name, series=1).digest == second.digest
    for split in ("val", "test"):  # no split of a series is one of another
        assert not np.array_equal(opened(name, split).read(0), second.read(0))


def test_series_are_of_generated_sets(tmp_path):
    np.savez(tmp_path / "pneumoniamnist.npz", train_images=np.zeros((2, 28, 28), np.uint8))
    with pytest.raises(InputError, match="--series 2: is for generated sets, and pneumoniamnist is none"):
        open_splits(Request("pneumoniamnist", data=str(tmp_path / "pneumoniamnist.npz"), series=2), ["train"])
    with pytest.raises(InputError, match="--cache here: caches are of series 0, and tissue2d needs none"):
        open_splits(Request("tissue2d", cache="here", series=1), ["train"])


@pytest.mark.parametrize("name", SETS)
def test_kept_and_made_images_are_the_same(name, small, monkeypatch):
    data = opened(name)
    alone = [data.read(i) for i in range(3)]  # each by itself, before there are others
    assert not list(small.glob("*/arrays"))
    first = everything(data)
    (kept,) = small.glob(f"{name}-train-3*/arrays")
    assert all((data.read(i) == alone[i]).all() for i in range(3))
    monkeypatch.setattr(store.Generated, "make", None, raising=False)
    monkeypatch.setattr(SETS[name], "draw", None)  # nothing is made any more
    for one, two in zip(first, everything(opened(name))):
        assert one.keys() == two.keys()
        assert all(torch.equal(torch.as_tensor(one[key]), torch.as_tensor(two[key])) for key in one)
    assert {path.suffix for path in kept.iterdir()} == {".npy", ".json"}


@pytest.mark.parametrize("name", SETS)
def test_a_set_is_known_without_being_made(name, small, monkeypatch):
    monkeypatch.setattr(SETS[name], "SPLITS", dict.fromkeys(SETS[name].SPLITS, 200))
    made = []
    draw = SETS[name].draw

    def spy(numbers, *rest):
        made.extend(numbers)
        return draw(numbers, *rest)

    monkeypatch.setattr(SETS[name], "draw", spy)
    data = opened(name)
    assert data.digest
    assert 0 < len(made) <= 32  # for its contents, and where it has masks for them


def shorten(path):
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize("damage", [shorten, Path.unlink, lambda path: np.save(path, np.zeros((3, 8, 8), np.uint8))])
def test_a_damaged_set_is_made_again(damage, small, capsys):
    before = everything(opened("phantom2d"))
    (path,) = small.glob("*/arrays/images.npy")
    damage(path)
    after = everything(opened("phantom2d"))
    assert all(torch.equal(one["image"], two["image"]) for one, two in zip(before, after))
    assert len(np.load(path)) == 3
    assert capsys.readouterr().err == ""


OTHERS = pytest.mark.skipif(os.geteuid() == 0, reason="root may look everywhere")


@pytest.mark.parametrize("place", ["file", pytest.param("locked", marks=OTHERS)])
def test_where_nothing_can_be_kept_a_line_says_so(place, small, tmp_path, monkeypatch, capsys):
    expected = everything(opened("phantom2d"))
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "locked").mkdir(mode=0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / place))
    found = everything(opened("phantom2d"))
    assert all(torch.equal(one["image"], two["image"]) for one, two in zip(expected, found))
    assert capsys.readouterr().err.count("generated images are not kept") == 1


def test_a_full_disk_costs_no_second_making(small, monkeypatch, capsys):
    made, draw = [], radiograph.draw

    def spy(numbers, *rest):
        made.extend(numbers)
        return draw(numbers, *rest)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(radiograph, "draw", spy)
    monkeypatch.setattr(store, "write_folder", full)
    data = opened("phantom2d")
    everything(data)
    assert made.count(0) <= 2  # once to be known, once with the others
    assert "No space left on device; generated images are not kept" in capsys.readouterr().err


def test_processes_make_a_set_once(small, tmp_path):
    code = (
        "import sys, json; from medssl.datasets.phantoms import radiograph as r; r.SPLITS = {'train': 40}; made = []\n"
        "draw = r.draw\n"
        "def spy(numbers, *rest):\n    made.append(len(numbers)); return draw(numbers, *rest)\n"
        "r.draw = spy; r._generated('train', 32, 40, 101).prepare(); json.dump(made, sys.stdout)"
    )
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    runs = [subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) for _ in "12"]
    assert sorted(json.loads(run.communicate()[0]) for run in runs) == [[], [40]]


def test_a_process_that_makes_a_set_and_does_not_end_is_not_waited_for_for_ever(small, monkeypatch, capsys):
    """As one that was stopped."""
    monkeypatch.setattr(store, "SOON", 0)
    monkeypatch.setattr(store, "LONGEST", 0.3)
    generated = radiograph._generated("train", 32, 3, 101)
    generated.folder.mkdir(parents=True)
    with locks.lock_folder(generated.folder, 0):
        assert len(generated.arrays["images"]) == 3
    said = capsys.readouterr().err
    assert "is at work there; waiting 0.3 s for it" in said
    assert "another process still makes them; generated images are not kept" in said
    assert not (generated.folder / "arrays").exists()


def test_threads_make_a_set_once(small, monkeypatch):
    made = []
    draw = radiograph.draw
    monkeypatch.setattr(radiograph, "draw", lambda numbers, *rest: made.append(len(numbers)) or draw(numbers, *rest))
    generated = radiograph._generated("train", 32, 3, 101)
    threads = [threading.Thread(target=generated.prepare) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [3]
