"""A slide is cut into tiles; splits share no pixel, and labels are what they say."""

import numpy as np
import pytest
from PIL import Image

from medssl.datasets.base import Request
from medssl.datasets.registry import open_splits
from medssl.errors import InputError
from medssl.preprocess import tiles
from medssl.reading.tables import read_list


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    """400 × 120 pixels: background at the left, pink in the middle, purple at the right."""
    rng = np.random.default_rng(0)
    pixels = np.full((400, 120, 3), 245.0)
    pixels[:, 40:80] = (230, 150, 190)
    pixels[:, 80:] = (110, 70, 150)
    pixels += rng.normal(0, 4, pixels.shape)
    path = tmp_path_factory.mktemp("slide") / "slide.tif"
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return path


def test_tiles(slide, tmp_path, capsys):
    tiles.main(["--slide", str(slide), "--output", str(tmp_path), "--side", "20", "--stride", "10"])
    pixels = np.asarray(Image.open(slide))
    places: dict[str, set] = {}
    for task in ("tissue", "stain"):
        for split in tiles.SPLITS:
            names, labels = read_list(tmp_path / f"{task}_{split}.txt")
            for name, label in zip(names, labels[:, 0].tolist()):
                y, x = (int(part) for part in name[len("tiles/") : -len(".png")].split("_"))
                assert np.array_equal(np.asarray(Image.open(tmp_path / name)), pixels[y : y + 20, x : x + 20])
                if task == "tissue":
                    assert label == (x > 30) or x == 30  # half of it is tissue
                    assert label or x + 20 <= 41
                else:
                    assert x >= 30
                    assert label == (x >= 70) or x == 60  # tiles of both colours lie in between
                places.setdefault(split, set()).update((y + i, x + j) for i in range(20) for j in range(20))
            assert len(names) > 0
    assert not places["train"] & places["test"]
    assert not places["train"] & places["valid"]
    assert not places["valid"] & places["test"]
    names, labels = read_list(tmp_path / "train.txt")
    assert labels is None
    assert all(int(name[-10:-4]) > 20 for name in names)
    assert f"{len(names)} tiles" in capsys.readouterr().out
    lists = {key: str(tmp_path / f"stain_{split}.txt") for key, split in
             (("list", "train"), ("val_list", "valid"), ("test_list", "test"))}  # fmt: skip
    splits = open_splits(Request("folder", str(tmp_path), image_size=20, **lists), ["train", "val", "test"])
    assert splits["train"].info.task == "binary"


def test_a_tile_has_tissue_where_it_has_colour():
    grey, pink = np.full((8, 8, 3), 200, np.uint8), np.full((8, 8, 3), (230, 150, 190), np.uint8)
    assert tiles.measure(grey) == (0.0, 0.0, 0.0)
    half = np.concatenate([grey[:4], pink[:4]])
    share, stain, _ = tiles.measure(half)
    assert share == 0.5
    assert stain == pytest.approx(tiles.measure(pink)[1])


def test_texture_is_what_is_as_large_as_nuclei():
    y, x = np.mgrid[:96, :96]
    pink, purple = np.array((230, 150, 190)), np.array((110, 70, 150))

    def tile(weight):
        return (pink + weight[..., None] * (purple - pink)).astype(np.uint8)

    plain, slope = tile(np.full((96, 96), 0.5)), tile(x / 95)
    spots = tile(((y % 24 - 12) ** 2 + (x % 24 - 12) ** 2 < 64) * 1.0)
    grain = tile((x + y) % 2 * 1.0)
    textures = [tiles.measure(t)[2] for t in (plain, grain, slope, spots)]
    assert textures[0] < 1e-6
    assert all(texture < 0.3 * textures[3] for texture in textures[:3])


def test_texture_is_compared_between_tiles_of_like_stain():
    rng = np.random.default_rng(0)
    stains = rng.random(180)
    textures = 10 * stains + rng.random(180)  # of all tiles, those with much stain have the most
    lists = tiles.lists_of(["train"] * 180, np.ones(180), stains, textures)
    known = dict(lists["texture_train"])
    assert len(known) == 120
    for group in np.array_split(np.argsort(stains), tiles.GROUPS):
        ranked = group[np.argsort(textures[group])]
        assert [known.get(i) for i in ranked] == [0] * 10 + [None] * 10 + [1] * 10
    assert not tiles.lists_of(["train"], np.array([0.8]), np.ones(1), np.ones(1))["texture_train"]  # not full of tissue


def test_bad_input(slide, tmp_path):
    (tmp_path / "text.svs").write_text("no image")
    (tmp_path / "cut.tif").write_bytes(slide.read_bytes()[:3000])
    for path, message in (("gone.svs", "no such file"), ("text.svs", "not an image"), ("cut.tif", "not an image")):
        with pytest.raises(InputError, match=message):
            tiles.main(["--slide", str(tmp_path / path), "--output", str(tmp_path / "out")])
    with pytest.raises(InputError, match="--side 60: bands of 40 pixels hold no tile of it"):
        tiles.main(["--slide", str(slide), "--side", "60", "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
