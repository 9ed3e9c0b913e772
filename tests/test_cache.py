"""Caches: the same images as decoding gives, for any number of workers and any interruption."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from medssl.datasets import cache
from medssl.datasets.base import ImageDataset, Info, Request, collate
from medssl.datasets.registry import open_splits
from medssl.errors import InputError, UnreadableImage
from medssl.preprocess import cache_images


@pytest.fixture
def images(tmp_path):
    """A folder of eleven images of several sizes, the fourth of which is damaged."""
    root = tmp_path / "images"
    root.mkdir()
    rng = np.random.default_rng(0)
    for i in range(11):
        Image.fromarray(rng.integers(0, 255, (20 + i, 40), np.uint8)).save(root / f"{i:02d}.png")
    (root / "03.png").write_text("no")
    return root


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(cache, "BLOCK_BYTES", 32 * 32 * 2)  # two images


def opened(images, **more):
    return open_splits(Request(name="folder", data=str(images), image_size=16, **more), ["train"])["train"]


def same(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(
        torch.equal(one[key], two[key]) if torch.is_tensor(one[key]) else one[key] == two[key] for key in one
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_cached_equals_decoded(images, tmp_path, workers):
    index = cache.build(opened(images), tmp_path / "cache", workers)
    assert index["finished"]
    assert index["bad"] == {"3": "not an image that Pillow or pydicom can read"}
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["images.u8", "index.json"]
    plain, cached = opened(images), opened(images, cache=str(tmp_path / "cache"))
    assert isinstance(cached.cached, cache.Cached)
    for i in range(11):
        assert same(plain[i], cached[i])
    assert cached[3]["index"] == 4
    assert cached[3]["bad"] == plain[3]["bad"] != []


def test_subsets_labels_and_loaders(images, tmp_path):
    cache.build(opened(images), tmp_path / "cache")
    names = [f"{i:02d}.png" for i in (9, 2, 5, 6)]
    (tmp_path / "l.txt").write_text("".join(f"{name} {i % 2}\n" for i, name in enumerate(names)))
    plain, cached = opened(images, list=str(tmp_path / "l.txt")), None
    cached = opened(images, list=str(tmp_path / "l.txt"), cache=str(tmp_path / "cache"))
    assert cached.ids == names
    picked = cached.subset([3, 0]).subset([1, 0])
    assert picked.ids == ["09.png", "06.png"]
    for i, j in ((0, 0), (1, 3)):
        assert torch.equal(picked[i]["image"], plain[j]["image"])
        assert picked[i]["label"] == plain[j]["label"]
        assert torch.equal(picked[i]["size"], plain[j]["size"])
    cached[0]  # maps the file in this process, which must not travel to the workers
    assert len(pickle.dumps(cached)) < 5000
    loader = torch.utils.data.DataLoader(cached, batch_size=4, num_workers=1, collate_fn=collate)
    batch = next(iter(loader))
    assert torch.equal(batch["image"], torch.stack([plain[i]["image"] for i in range(4)]))


def test_colour(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    cache.build(opened(tmp_path), tmp_path / "cache")
    cached = opened(tmp_path, cache=str(tmp_path / "cache"))
    assert np.array_equal(cached[0]["image"].permute(1, 2, 0), pixels)
    assert np.array_equal(cached.read(0), pixels)


def test_an_interrupted_build_continues(images, tmp_path):
    whole = cache.build(opened(images), tmp_path / "whole")
    data, reads = opened(images), []
    decode = data.read

    def dying(position):
        reads.append(position)
        if len(reads) == 8:
            raise KeyboardInterrupt
        return decode(position)

    dying.fingerprint = decode.fingerprint
    data.read = dying
    with pytest.raises(KeyboardInterrupt):
        cache.build(data, tmp_path / "cache")
    with pytest.raises(InputError, match="not finished; run: python preprocess/cache_images.py --dataset folder"):
        opened(images, cache=str(tmp_path / "cache"))
    with open(tmp_path / "cache" / "progress.jsonl", "a") as file:
        file.write('{"block": 5, "si')  # what a kill in the middle of a line leaves
    assert cache.build(data, tmp_path / "cache") == whole
    assert sorted(reads[8:]) == list(range(6, 11))  # the three finished blocks are not decoded again
    for name in ("images.u8", "index.json"):
        assert (tmp_path / "cache" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    reads.clear()
    assert cache.build(data, tmp_path / "cache") == whole
    assert reads == []


def test_caches_that_do_not_fit(images, tmp_path):
    folder = str(tmp_path / "cache")
    with pytest.raises(InputError, match="no cache there; run: python preprocess/cache_images.py"):
        opened(images, cache=folder)
    cache.build(opened(images), folder)
    with pytest.raises(InputError, match="its texture size is 32, not 64; run: .* --texture-size 64"):
        opened(images, cache=folder, texture_size=64)
    with pytest.raises(InputError, match="holds a cache of other images .size differs"):
        cache.build(opened(images, texture_size=64), folder)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(images / "new.png")
    with pytest.raises(InputError, match="1 of 12 images are not in it, such as new.png; run: "):
        opened(images, cache=folder)
    (images / "new.png").unlink()
    other = ImageDataset(Info("folder", channels=3), None, ["00.png"], texture_size=32)
    with pytest.raises(InputError, match="its channels is 1, not 3"):
        cache.attach(other, folder)
    (tmp_path / "cache" / "images.u8").write_bytes(b"short")
    with pytest.raises(InputError, match="not of the size of its index"):
        opened(images, cache=folder)
    for text in ("no", "[1, 2]", "3", '{"version": 2}'):
        (tmp_path / "cache" / "index.json").write_text(text)
        with pytest.raises(InputError, match="not the index of a cache"):
            opened(images, cache=folder)
        with pytest.raises(InputError, match="not the index of a cache"):
            cache.build(opened(images), folder)
    volumes = ImageDataset(Info("x", dims=3), None, ["a"])
    with pytest.raises(InputError, match="only 2D images are cached"):
        cache.build(volumes, tmp_path / "other")
    with pytest.raises(InputError, match="--cache .*other: only 2D images .* those of x are read as fast .*; leave it"):
        cache.attach(volumes, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def noise(path, seed, shape=(20, 40)):
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, shape, np.uint8)).save(path, compress_level=0)


def test_another_folder_with_the_same_names_is_refused(tmp_path):
    for seed, name in enumerate(("one", "two")):
        (tmp_path / name).mkdir()
        for i in range(3):
            noise(tmp_path / name / f"{i}.png", 10 * seed + i)  # uncompressed: all files have one size
    folder = str(tmp_path / "cache")
    cache.build(opened(tmp_path / "one"), folder)
    with pytest.raises(InputError, match=r"--cache .*: 0.png is not the image that was cached: it has changed, or"):
        opened(tmp_path / "two", cache=folder)
    with pytest.raises(InputError, match="3 images changed after they were cached, such as 0.png; remove the folder"):
        cache.build(opened(tmp_path / "two"), folder)
    (tmp_path / "one").rename(tmp_path / "moved")
    assert cache.build(opened(tmp_path / "moved"), folder)["finished"]
    assert len(opened(tmp_path / "moved", cache=folder)) == 3


def test_changed_files_are_refused(images, tmp_path, monkeypatch):
    folder = str(tmp_path / "cache")
    cache.build(opened(images), folder, workers=2)
    monkeypatch.setattr(cache, "SAMPLED", 2)  # the first and the last
    noise(images / "05.png", 5, (26, 40))  # of another size in bytes
    with pytest.raises(InputError, match="05.png is not the image that was cached"):
        opened(images, cache=folder)
    with pytest.raises(InputError, match="1 images changed .* such as 05.png"):
        cache.build(opened(images), folder, workers=2)


@pytest.mark.parametrize("row", [0, 7])
def test_changes_that_keep_the_size_of_a_file(tmp_path, monkeypatch, row):
    for i in range(11):
        noise(tmp_path / f"{i:02d}.png", i)
    folder = str(tmp_path / "cache")
    cache.build(opened(tmp_path), folder)
    noise(tmp_path / f"{row:02d}.png", 99)
    monkeypatch.setattr(cache, "SAMPLED", 2)
    if row == 0:  # in the sample
        with pytest.raises(InputError, match="00.png is not the image that was cached"):
            opened(tmp_path, cache=folder)
    else:
        assert len(opened(tmp_path, cache=folder)) == 11
    with pytest.raises(InputError, match=f"such as {row:02d}.png"):
        cache.build(opened(tmp_path), folder)


def test_files_that_change_during_an_interruption(images, tmp_path):
    data = opened(images)
    decode, reads = data.read, []

    class Dying:
        fingerprint = decode.fingerprint

        def __call__(self, position):
            reads.append(position)
            if len(reads) == 5:
                raise KeyboardInterrupt
            return decode(position)

    data.read = Dying()
    with pytest.raises(KeyboardInterrupt):
        cache.build(data, tmp_path / "cache")
    noise(images / "00.png", 50)
    with pytest.raises(InputError, match="1 images changed after they were cached, such as 00.png"):
        cache.build(data, tmp_path / "cache")


def arrays(pixels, splits=2):
    """Splits whose pixels are in memory, as MedMNIST's and the phantoms'."""
    info = Info("pneumoniamnist", native_size=8)
    rows = np.array_split(pixels, splits)
    names = ("train", "val")
    return [
        ImageDataset(info, part.__getitem__, [f"{name}/{i}" for i in range(len(part))], texture_size=8)
        for name, part in zip(names, rows)
    ]


def test_replaced_arrays_are_refused(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (9, 8, 8), np.uint8)
    cache.build(cache.union(arrays(pixels)), tmp_path / "cache")
    for part in arrays(pixels.copy()):
        assert torch.equal(cache.attach(part, tmp_path / "cache")[1]["image"], part[1]["image"])
    other = pixels.copy()
    other[6, 3, 3] ^= 1
    train, val = arrays(other)
    cache.attach(train, tmp_path / "cache")
    with pytest.raises(InputError, match="val/1 is not the image that was cached"):
        cache.attach(val, tmp_path / "cache")
    with pytest.raises(InputError, match="1 images changed .* such as val/1"):
        cache.build(cache.union(arrays(other)), tmp_path / "cache")


def test_caches_of_older_versions_are_refused(images, tmp_path):
    index = cache.build(opened(images), tmp_path / "cache")
    old = {key: value for key, value in index.items() if key != "fingerprints"} | {"version": 1}
    (tmp_path / "cache" / "index.json").write_text(json.dumps(old))
    with pytest.raises(InputError, match="made by another version; remove it and run: python preprocess/cache_im"):
        opened(images, cache=str(tmp_path / "cache"))
    with pytest.raises(InputError, match="a cache by another version; remove it and run this again"):
        cache.build(opened(images), tmp_path / "cache")


def test_two_builds_at_once(images, tmp_path):
    data, messages = opened(images), []
    decode = data.read

    class Meanwhile:
        fingerprint = decode.fingerprint

        def __call__(self, position):
            with pytest.raises(InputError, match="another process is making this cache; wait for it") as caught:
                cache.build(opened(images), tmp_path / "cache")
            messages.append(str(caught.value))
            return decode(position)

    data.read = Meanwhile()
    cache.build(data, tmp_path / "cache")
    assert messages == [f"{tmp_path / 'cache'}: another process is making this cache; wait for it"] * 11
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["images.u8", "index.json"]


def test_a_full_disk_is_said_before_the_work(images, tmp_path, monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(InputError, match="the cache needs 0.0 GB"):
        cache.build(opened(images), tmp_path / "cache")
    assert not (tmp_path / "cache" / "images.u8").exists()


def test_script(images, tmp_path, capsys):
    command = ["--data", str(images), "--image-size", "16", "--workers", "0", "--output", str(tmp_path / "cache")]
    cache_images.main(command)
    assert "11 images of 1 x 32 x 32, 1 of them unreadable" in capsys.readouterr().out
    cache_images.main(command)
    assert len(opened(images, cache=str(tmp_path / "cache"))) == 11


def test_union_of_splits(tmp_path):
    parts = [
        ImageDataset(Info("x"), lambda i, k=k: np.full((4, 4), 10 * k + i, np.uint8), [f"{k}/{i}" for i in range(3)])
        for k in range(3)
    ]
    both = cache.union([parts[0].subset([2, 0]), parts[1], parts[2]])
    assert both.ids == ["0/2", "0/0", "1/0", "1/1", "1/2", "2/0", "2/1", "2/2"]
    assert [int(both.read(i)[0, 0]) for i in range(8)] == [2, 0, 10, 11, 12, 20, 21, 22]
    with pytest.raises(InputError, match="two splits share images"):
        cache.union([parts[0], parts[0]])


class Volumes(ImageDataset):
    """A 3D set, whose items and extra attribute are its own."""

    def __init__(self, info, ids, labels):
        super().__init__(info, None, ids, labels)
        self.heights = [10.0 * i for i in range(len(ids))]

    def load(self, i):
        number = self.positions[i]
        if number == 2:
            raise UnreadableImage("cut short")
        return {
            "image": torch.full((1, 4, 4, 2), number),
            "locals": torch.zeros(3, 2, 2, 2),
            "size": self.heights[number],
        }


def test_a_subclass_overrides_load_alone():
    data = Volumes(Info("x", dims=3), ["a", "b", "c", "d"], torch.tensor([5, 6, 7, 8]))
    part = data.subset([3, 1, 2, 0]).subset([2, 0, 1])  # c, d, b
    assert isinstance(part, Volumes)
    assert part.ids == ["c", "d", "b"]
    batch = collate([part[i] for i in range(3)])
    assert batch["bad"] == ["c: cut short"]
    assert batch["index"].tolist() == [1, 1, 2]
    assert batch["image"][:, 0, 0, 0, 0].tolist() == [3, 3, 1]
    assert batch["size"].tolist() == [30, 30, 10]
    assert batch["label"].tolist() == [8, 8, 6]
    assert batch["locals"].shape == (3, 3, 2, 2, 2)
    assert (data.ids, data[0]["label"]) == (["a", "b", "c", "d"], 5)  # the whole is as it was
    with pytest.raises(InputError, match="none of its 4 images is left"):
        data.subset([])


def test_index_is_plain_json(images, tmp_path):
    cache.build(opened(images), tmp_path / "cache")
    index = json.loads((tmp_path / "cache" / "index.json").read_text())
    assert index["ids"][0] == "00.png"
    assert index["sizes"][:2] == [[20, 40], [21, 40]]
    assert (index["size"], index["channels"], index["set"]) == (32, 1, "folder")
