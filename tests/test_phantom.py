"""Generated radiographs: fixed, balanced, with masks that lie where the nodules are."""

import numpy as np
import pytest
import torch

from medssl.datasets import registry
from medssl.datasets.base import Request
from medssl.datasets.phantoms.radiograph import SPLITS, radiographs
from medssl.errors import InputError


@pytest.mark.parametrize("size", [33, 64, 200])
def test_an_image_depends_on_its_number_alone(size):
    many, few = radiographs(100 if size < 100 else 12, size, 7), radiographs(9, size, 7)
    for a, b in zip(many, few):
        assert np.array_equal(a[:9], b)
    assert not np.array_equal(radiographs(9, size, 8)[0], few[0])


def test_shapes_labels_and_masks():
    images, labels, masks = radiographs(200, 64, 3)
    assert images.shape == masks.shape == (200, 64, 64)
    assert (images.dtype, labels.dtype, masks.dtype) == (np.uint8, np.int64, np.uint8)
    assert labels.reshape(-1, 2).sum(1).tolist() == [1] * 100  # one nodule in each pair
    assert 20 < labels[::2].sum() < 80  # not always the same one of the two
    assert np.array_equal(masks.any((1, 2)), labels == 1)
    assert masks.max() == 1
    share = masks[labels == 1].sum((1, 2)) / 64**2
    radius = np.sqrt(share / np.pi)  # as a part of the width
    assert radius.min() > 0.035
    assert radius.max() < 0.075


def test_smallest_size_has_every_mask():
    _, labels, masks = radiographs(400, 32, 0)
    assert np.array_equal(masks.any((1, 2)), labels == 1)


def test_nodules_are_brighter_than_what_surrounds_them():
    images, labels, masks = radiographs(120, 64, 5)
    contrast = []
    for image, mask in zip(images[labels == 1], masks[labels == 1]):
        inside = torch.from_numpy(mask)[None].float()
        ring = torch.nn.functional.max_pool2d(inside, 7, 1, 3)[0].numpy() - mask
        contrast.append(image[mask == 1].mean() - image[ring == 1].mean())
    assert np.mean(contrast) > 10
    assert np.mean(np.array(contrast) > 0) > 0.85


def test_brightness_does_not_tell_the_classes_apart():
    images, labels, _ = radiographs(400, 48, 1)
    means = images.mean((1, 2))
    difference = means[labels == 1].mean() - means[labels == 0].mean()
    assert abs(difference) < 0.3 * means.std()
    assert 40 < means.mean() < 200
    assert (images == 255).mean() < 0.1


def test_large_images():
    images, labels, masks = radiographs(2, 1024, 0)
    assert images.shape == (2, 1024, 1024)
    assert masks[labels == 1].sum() > 1000


def test_open_splits():
    opened = registry.open_splits(Request(texture_size=32), list(SPLITS), dims=2)
    assert {split: len(data) for split, data in opened.items()} == SPLITS
    data = opened["val"]
    assert (data.info.name, data.info.task, data.info.native_size) == ("phantom2d", "binary", 32)
    assert data.ids[12] == "val/00012"
    assert data.labels.float().mean() == 0.5
    assert data[0]["image"].shape == (1, 32, 32)
    assert not torch.equal(data[0]["image"], opened["test"][0]["image"])
    # Opened anew, they are the same.
    again = registry.open_splits(Request(texture_size=32), ["val"])["val"]
    assert torch.equal(again[3]["image"], data[3]["image"])


def test_bad_inputs():
    with pytest.raises(InputError, match="--texture-size 31: .* at least 32"):
        registry.open_splits(Request(name="phantom2d", texture_size=31), ["val"])
    with pytest.raises(InputError, match="--list a.txt: .* generated"):
        registry.open_splits(Request(name="phantom2d", list="a.txt"), ["val"])
    with pytest.raises(InputError, match="--data here: .* generated"):
        registry.open_splits(Request(name="phantom2d", data="here"), ["val"])
    with pytest.raises(InputError, match="splits train, val, test, not other"):
        registry.open_splits(Request(name="phantom2d"), ["other"])
    with pytest.raises(InputError, match="at least 1"):
        radiographs(0)
    with pytest.raises(InputError, match="seed -1"):
        radiographs(1, seed=-1)
