"""Views against torchvision's operations on single images."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.stats import ks_2samp
from torchvision import transforms
from torchvision.transforms.v2 import functional as tv

from medssl.datasets.base import to_texture
from medssl.datasets.phantoms.radiograph import radiographs
from medssl.models.encoders import IMAGENET
from medssl.views.draws import Columns, Draws
from medssl.views.of_images import ClassificationViews, MultiCropViews
from medssl.views.ops2d import (
    Pyramid,
    affine,
    color_jitter,
    cutout,
    denormalise,
    erase_mask,
    erase_slices,
    luminance,
    normalise,
    pyramid_levels,
    random_blur,
    random_gray,
    random_resized_crop,
    sample,
)

DATA = Path(os.environ.get("MEDSSL_TEST_DATA", Path(__file__).parents[1] / "../shared/data"))
RADIOGRAPHS = sorted((DATA / "cxr").glob("*.png"))
STRENGTH = (0.4, 0.4, 0.4, 0.4)


def psnr(a, b):
    return -10 * torch.log10(((a - b) ** 2).mean()).item()


def phantom(side):
    """A generated radiograph of side `side` with detail down to two pixels, (1, 1, S, S) uint8."""
    image = torch.from_numpy(radiographs(1, 256, seed=3)[0])[None].float()
    image = F.interpolate(image, size=(side, side), mode="bicubic")
    generator = torch.Generator().manual_seed(0)
    for cells in (side // 8, side // 4, side // 2):
        grain = torch.randn(1, 1, cells, cells, generator=generator)
        image = image + 4 * F.interpolate(grain, size=(side, side), mode="bilinear")
    return image.round().clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def fine():
    return phantom(1024)


@pytest.fixture(scope="module")
def smooth():
    return F.avg_pool2d(phantom(256).float() / 255, 5, 1, 2)


def color_images(n, side=64, seed=0):
    """(n, 3, side, side) in [0, 1], smooth and colourful, with black and white places."""
    coarse = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 1.6 - 0.3
    return F.interpolate(coarse, size=(side, side), mode="bilinear").clamp(0, 1)


def pixel_boxes(side, count, seed, scales=(0.05, 1.0), aspects=(3 / 4, 4 / 3)):
    """Crops (top, left, height, width) in whole pixels of a square image."""
    rng = np.random.default_rng(seed)
    boxes = []
    for scale in np.linspace(*scales, count):
        aspect = np.exp(rng.uniform(*np.log(aspects)))
        w = min(side, round(side * np.sqrt(scale * aspect)))
        h = min(side, round(side * np.sqrt(scale / aspect)))
        boxes.append((int(rng.integers(side - h + 1)), int(rng.integers(side - w + 1)), h, w))
    return boxes


def as_boxes(pixels, height, width):
    """(top, left, h, w) in pixels → (N, 4) boxes in [−1, 1]² units."""
    top, left, h, w = torch.tensor(pixels, dtype=torch.float32).unbind(1)
    return torch.stack([(2 * left + w) / width - 1, (2 * top + h) / height - 1, w / width, h / height], 1)


def crops_psnr(image, out, seed=0, count=10):
    boxes = pixel_boxes(image.shape[-1], count, seed)
    ours = sample(image, affine(as_boxes(boxes, *image.shape[-2:]))[None], out)
    theirs = [tv.resized_crop(image.float() / 255, *box, size=[out, out], antialias=True)[0] for box in boxes]
    return [psnr(a, b) for a, b in zip(ours, theirs)]


# Geometry ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", [224, 96])
def test_crops_match_antialiased_resize(fine, out):
    assert min(crops_psnr(fine, out)) >= 40


@pytest.mark.parametrize("side", [510, 511, 513, 700])
def test_any_side_is_antialiased(side):
    for out in (224, 96):
        assert min(crops_psnr(phantom(side), out)) >= 40
    assert min(crops_psnr(phantom(97), 20)) >= 30  # its column of levels is higher than its first level


@pytest.mark.skipif(not RADIOGRAPHS, reason="no real radiographs; set MEDSSL_TEST_DATA")
@pytest.mark.parametrize("out", [224, 96])
def test_crops_of_real_radiographs(out):
    for path in RADIOGRAPHS:
        pixels = to_texture(np.array(Image.open(path).convert("L")), 1024, 1)
        assert min(crops_psnr(torch.from_numpy(pixels)[None], out)) >= 40, path.name


def test_plain_bilinear_sampling_would_fail(fine):
    """What the bar above is for: aliasing is far below it."""
    aliased = F.interpolate(fine.float() / 255, size=96, mode="bilinear", antialias=False)
    proper = tv.resize(fine.float() / 255, [96, 96], antialias=True)
    assert psnr(aliased, proper) < 37
    assert psnr(sample(fine, affine(torch.tensor([[0, 0, 1.0, 1]]))[None], 96), proper) > 45


def test_whole_image_at_its_size_is_exact():
    image = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    theta = affine(torch.tensor([[0, 0, 1.0, 1]] * 2))[:, None]
    assert torch.allclose(sample(image, theta, 64), image.float() / 255, atol=1e-6)
    assert torch.equal(sample(image, theta, 64), sample(image.float() / 255, theta, 64))
    halved = sample(image, theta, 32)
    assert torch.allclose(halved, F.avg_pool2d(image.float() / 255, 2), atol=1e-5)


def test_flips_are_exact(fine):
    boxes = as_boxes(pixel_boxes(1024, 4, 1), 1024, 1024)
    plain = sample(fine, affine(boxes, flip=torch.zeros(4, dtype=torch.bool))[None], 96)
    flipped = sample(fine, affine(boxes, flip=torch.tensor([True, True, False, True]))[None], 96)
    for i, turned in enumerate([True, True, False, True]):
        assert torch.allclose(flipped[i], plain[i].flip(-1) if turned else plain[i], atol=2e-5)


@pytest.mark.parametrize("angle", [10.0, -7.5, 3.0, 90.0])
@pytest.mark.parametrize("flip", [False, True])
def test_rotation_direction_and_order(smooth, angle, flip):
    theta = affine(torch.tensor([[0, 0, 1.0, 1]]), torch.tensor([angle]), torch.tensor([flip]))[None]
    ours = sample(smooth, theta, 256)
    theirs = tv.rotate(smooth, angle, interpolation=transforms.InterpolationMode.BILINEAR)
    theirs = tv.horizontal_flip(theirs) if flip else theirs
    inner = (..., slice(48, -48), slice(48, -48))
    assert psnr(ours[inner], theirs[inner]) > 50
    wrong = tv.rotate(smooth, -angle, interpolation=transforms.InterpolationMode.BILINEAR)
    wrong = tv.horizontal_flip(wrong) if flip else wrong
    assert psnr(ours[inner], wrong[inner]) < 45


def test_rotated_crop_of_wide_image(smooth):
    """Rotation turns the resized view, not the image before its sides were made equal."""
    boxes = [(60, 40, 100, 130)]
    ours = sample(smooth, affine(as_boxes(boxes, 256, 256), torch.tensor([10.0]))[None], 96)
    theirs = tv.resized_crop(smooth, *boxes[0], size=[96, 96], antialias=True)
    theirs = tv.rotate(theirs, 10.0, interpolation=transforms.InterpolationMode.BILINEAR)
    assert psnr(ours[..., 16:-16, 16:-16], theirs[..., 16:-16, 16:-16]) > 38


def test_outside_is_black_or_border():
    white = torch.full((1, 1, 64, 64), 255, dtype=torch.uint8)
    theta = affine(torch.tensor([[0, 0, 1.0, 1]]), torch.tensor([10.0]))[None]
    black = sample(white, theta, 64, black_outside=True)
    turned = tv.rotate(white.float() / 255, 10.0)
    assert ((black > 0.5) != (turned > 0.5)).float().mean() < 0.01
    assert 0.01 < (black == 0).float().mean() < 0.2
    assert torch.allclose(sample(white, theta, 64), torch.ones(1, 1, 64, 64))


def test_every_level_of_one_call(fine):
    """Views of different pyramid levels in one call are those of calls of their own."""
    halves = torch.tensor([0.06, 0.12, 0.25, 0.5, 1.0])
    boxes = torch.stack([torch.zeros(5), torch.zeros(5), halves, halves], 1)
    theta = affine(boxes)[None]
    assert pyramid_levels(theta[0], 1024, 64).tolist() == [0, 1, 2, 3, 4]
    together = sample(fine, theta, 64)
    for i in range(5):
        assert torch.allclose(together[i], sample(fine, theta[:, i : i + 1], 64)[0], atol=1e-4)


def test_memory_between_the_levels_is_never_seen():
    """Crops at the image's border touch the gaps of the pyramid's atlas, which must not hold NaN."""
    image = torch.full((1, 1, 128, 128), 100, dtype=torch.uint8)
    boxes = torch.tensor([[0, 0, 1.0, 1], [0, 0, 0.5, 0.5], [0.75, 0.75, 0.25, 0.25], [-0.5, 0.5, 0.5, 0.5]])
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        views = [sample(image, affine(boxes)[None], out) for out in (16, 32)]
    finally:
        torch.use_deterministic_algorithms(False)
    for view in views:
        assert torch.allclose(view, torch.tensor(100 / 255), atol=1e-3)


@pytest.mark.parametrize(("box", "level"), [((0.875, -0.5, 0.125, 0.125), 0), ((0.0, 0.625, 0.375, 0.375), 1)])
def test_borders_of_a_level_keep_its_neighbours_out(box, level):
    """Crops at white borders that lie, in the atlas, beside the black border of the next level."""
    image = torch.zeros(1, 1, 64, 64, dtype=torch.uint8)
    image[(..., slice(32, 64)) if level == 0 else (..., slice(32, 64), slice(None))] = 255
    theta = affine(torch.tensor([box, (0, 0, 1.0, 1), (0, 0, 0.25, 0.25)]))
    assert pyramid_levels(theta, 64, 16).tolist() == [level, 2, 0]
    white = sample(image, theta[None], 16)[0, 0]
    assert torch.allclose(white if level == 0 else white[8:], torch.ones(()), atol=1e-5)


def test_views_are_view_major():
    images = torch.arange(3).view(3, 1, 1, 1).expand(3, 1, 32, 32).to(torch.uint8) * 50
    theta = affine(torch.tensor([[0, 0, 1.0, 1]] * 6)).view(3, 2, 2, 3)
    means = sample(images, theta, 16).mean((1, 2, 3)) * 255
    assert torch.allclose(means, torch.tensor([0.0, 50, 100, 0, 50, 100]), atol=1e-3)


@pytest.mark.parametrize(("height", "width"), [(300, 600), (640, 400)])
def test_original_geometry_of_oblong_images(height, width):
    """A square texture of an oblong image gives the crops of the image itself."""
    image = F.interpolate(phantom(512).float(), size=(height, width), mode="bilinear").round().to(torch.uint8)
    texture = torch.from_numpy(to_texture(image[0, 0].numpy(), 512, 1))[None]
    boxes = [(30, 90, 200, 240), (100, 10, 150, 120), (0, 0, height, width)]
    ours = sample(texture, affine(as_boxes(boxes, height, width))[None], 64)
    for view, box in zip(ours, boxes):
        theirs = tv.resized_crop(image.float() / 255, *box, size=[64, 64], antialias=True)[0]
        assert psnr(view, theirs) > 35


@pytest.mark.parametrize(("height", "width"), [(4096, 4096), (3000, 6000), (8000, 2000)])
@pytest.mark.parametrize("scale", [(0.05, 0.3), (0.3, 1.0)])
def test_crops_are_distributed_as_torchvisions(height, width, scale):
    n = 3000
    size = torch.tensor([[height, width]] * n, dtype=torch.float32)
    box = random_resized_crop(Columns(Draws((5,), n).uniform(0, 22)), size, scale)
    assert (box[:, :2].abs() + box[:, 2:] <= 1 + 1e-5).all()
    torch.manual_seed(1)
    image = torch.empty(1, 1, 1).expand(1, height, width)
    draw = transforms.RandomResizedCrop.get_params
    pixels = [draw(image, list(scale), [3 / 4, 4 / 3]) for _ in range(n)]
    theirs = as_boxes(pixels, height, width)
    quantities = {
        "area": lambda b: b[:, 2] * b[:, 3],
        "aspect": lambda b: (b[:, 2] * width).log() - (b[:, 3] * height).log(),
        "x": lambda b: b[:, 0],
        "y": lambda b: b[:, 1],
    }
    for name, quantity in quantities.items():
        # Rounded, as ties at the bounds and at the centred fall-back must be ties in both samples.
        a, b = (np.round(quantity(t).numpy() + 1e-9, 2) + 0.0 for t in (box, theirs))
        assert ks_2samp(a, b).pvalue > 0.001, name


# Colour --------------------------------------------------------------------------------------------


def jitter_numbers(orders, factors):
    """The 9 columns that make `color_jitter` (strengths .4) use these orders and factors (b, c, s, h)."""
    numbers = torch.zeros(len(orders), 9)
    for row, (order, (b, c, s, h)) in enumerate(zip(orders, factors)):
        for place, operation in enumerate(order):
            numbers[row, operation] = place / 4
        numbers[row, 4:8] = torch.tensor([(b - 0.6) / 0.8, (c - 0.6) / 0.8, (s - 0.6) / 0.8, (h + 0.4) / 0.8])
    return Columns(numbers)


def torchvision_jitter(x, order, factors):
    kinds = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    for operation in order:
        x = kinds[operation](x, factors[operation])
    return x


@pytest.mark.parametrize(
    "factors",
    [
        *[(f, 1.0, 1.0, 0.0) for f in (0.6, 0.85, 1.39)],
        *[(1.0, f, 1.0, 0.0) for f in (0.6, 0.85, 1.39)],
        *[(1.0, 1.0, f, 0.0) for f in (0.6, 0.85, 1.39)],
        *[(1.0, 1.0, 1.0, f) for f in (-0.4, -0.1, 0.25, 0.39)],
        (0.7, 1.3, 0.8, 0.1),
    ],
)
def test_jitter_matches_torchvision(factors):
    x, order = color_images(2), (0, 1, 2, 3)
    ours = color_jitter(x, jitter_numbers([order] * 2, [factors] * 2), *STRENGTH)
    theirs = torchvision_jitter(x, order, factors)
    assert (ours - theirs).abs().max() < 5e-4  # their luminance weights are rounded to four digits
    assert (theirs - x).abs().max() > 0.02


def test_jitter_order_is_each_images_own():
    orders = [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2), (2, 0, 3, 1)]
    factors = [(1.35, 0.65, 1.3, 0.2), (1.35, 0.65, 1.3, 0.2), (0.7, 1.3, 0.7, -0.3), (1.0, 1.3, 1.3, 0.1)]
    x = color_images(1).repeat(4, 1, 1, 1)
    ours = color_jitter(x, jitter_numbers(orders, factors), *STRENGTH)
    for i in range(4):
        assert (ours[i] - torchvision_jitter(x[i], orders[i], factors[i])).abs().max() < 1e-3, i
    assert (ours[0] - ours[1]).abs().max() > 0.05


def test_jitter_chance():
    x = color_images(1).repeat(64, 1, 1, 1)
    numbers = Draws((0,), 64).uniform(0, 9)
    ours = color_jitter(x, Columns(numbers), *STRENGTH, p=0.5)
    same = (ours - x).flatten(1).abs().amax(1) < 1e-6
    assert torch.equal(same, numbers[:, 8] >= 0.5)
    assert 10 < same.sum() < 54


def test_grey_images_are_jittered_as_three_equal_channels():
    grey = color_images(16)[:, :1]
    numbers = Draws((3,), 16).uniform(0, 9)
    one = color_jitter(grey, Columns(numbers), *STRENGTH)
    three = color_jitter(grey.expand(-1, 3, -1, -1).contiguous(), Columns(numbers), *STRENGTH)
    assert one.shape[1] == 1
    assert torch.allclose(one.expand_as(three), three, atol=1e-5)
    assert ((one - grey).flatten(1).abs().amax(1) > 0.01).sum() > 12


def test_gray():
    x = color_images(4)
    ours = random_gray(x, Columns(torch.tensor([[0.1], [0.3], [0.19], [0.9]])), 0.2)
    theirs = tv.rgb_to_grayscale(x, num_output_channels=3)
    expected = torch.where(torch.tensor([1, 0, 1, 0]).bool().view(4, 1, 1, 1), theirs, x)
    assert (ours - expected).abs().max() < 2e-4


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.0])
def test_blur(sigma):
    x = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    numbers = torch.tensor([[0.2, (sigma - 0.1) / 1.9], [0.8, 0.5], [0.49, (sigma - 0.1) / 1.9]])
    ours = random_blur(x, Columns(numbers), 0.5, (0.1, 2.0))
    theirs = tv.gaussian_blur(x, [31, 31], [sigma, sigma])
    inner = (..., slice(16, -16), slice(16, -16))
    assert (ours[[0, 2]][inner] - theirs[[0, 2]][inner]).abs().max() < 1e-4
    assert torch.equal(ours[1], x[1])
    flat = random_blur(torch.ones(3, 1, 64, 64), Columns(numbers), 0.5, (0.1, 2.0))
    assert torch.allclose(flat, torch.ones(()), atol=1e-5)  # borders neither darken nor brighten


@pytest.mark.parametrize("side", [8, 9])
def test_cutout(side):
    x = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) + 1
    centres = [[(0, 0), (10, 20), (31, 47)], [(16, 2), (17, 3), (5, 40)]]  # (row, column)
    numbers = torch.tensor([[v for r, c in image for v in ((r + 0.5) / 32, (c + 0.5) / 48)] for image in centres])
    ours = cutout(x.clone(), Columns(numbers), 3, side)
    corners = torch.tensor(centres) - side // 2
    assert torch.equal(erase_mask(x.clone(), corners, side), ours)  # what other devices do
    assert torch.equal(erase_slices(x.clone(), corners, side), ours)
    for i, image in enumerate(centres):
        expected = x[i]
        for r, c in image:
            top, left = r - side // 2, c - side // 2
            i0, j0, i1, j1 = max(0, top), max(0, left), min(32, top + side), min(48, left + side)
            expected = tv.erase(expected, i0, j0, i1 - i0, j1 - j0, torch.zeros(3, 1, 1))
        assert torch.equal(ours[i], expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_normalisation_round_trip(channels):
    x = color_images(2)[:, :channels]
    normal = normalise(x, **IMAGENET)
    assert normal.shape == (2, 3, 64, 64)
    assert torch.allclose(normal, tv.normalize(x.expand(-1, 3, -1, -1), **IMAGENET), atol=1e-6)
    assert torch.allclose(denormalise(normal, **IMAGENET), x.expand(-1, 3, -1, -1), atol=1e-6)


# Random numbers ------------------------------------------------------------------------------------


def test_rows_of_a_process_are_rows_of_the_batch():
    whole = Draws((7, 12), 8).uniform(2, 5)
    parts = [Draws((7, 12), 8, start, count).uniform(2, 5) for start, count in ((0, 2), (2, 2), (4, 4))]
    assert torch.equal(torch.cat(parts), whole)
    assert 0 <= whole.min() < 0.2 < 0.8 < whole.max() < 1
    for other in (Draws((7, 13), 8), Draws((8, 12), 8)):
        assert not torch.equal(other.uniform(2, 5), whole)
    assert not torch.equal(Draws((7, 12), 8).uniform(3, 5), whole)


def test_columns_run_out_loudly():
    columns = Columns(torch.rand(2, 5))
    assert columns.take(3, 2, 4).min() >= 2
    with pytest.raises(ValueError, match="6 random columns wanted, 5 drawn"):
        columns.take(3)


def batch_of(n, channels):
    generator = torch.Generator().manual_seed(1)
    image = F.interpolate(torch.rand(n, channels, 16, 16, generator=generator), size=(128, 128), mode="bilinear")
    size = torch.tensor([[128.0, 128], [100, 300], [256, 128], [90, 91]]).repeat(2, 1)[:n]
    return {"image": (image * 255).to(torch.uint8), "size": size, "index": torch.arange(n), "bad": []}


@pytest.mark.parametrize("channels", [1, 3])
def test_two_halves_make_the_views_of_the_whole(channels):
    views = MultiCropViews(**IMAGENET, size=64, local_size=32, locals_=3, hole=9)
    batch = batch_of(8, channels)
    whole = views(batch, Draws((0, 4), 8))
    half = {k: v[4:] for k, v in batch.items() if isinstance(v, torch.Tensor)}
    second = views(half, Draws((0, 4), 8, 4, 4))
    assert {k: tuple(v.shape) for k, v in whole.items()} == {
        "view1": (8, 3, 64, 64),
        "view2": (8, 3, 64, 64),
        "target": (8, 3, 64, 64),
        "locals": (24, 3, 32, 32),
        "index": (8,),
    }
    for name in ("view1", "view2", "target"):
        assert torch.allclose(second[name], whole[name][4:], atol=1e-3), name
    locals_ = whole["locals"].view(3, 8, 3, 32, 32)[:, 4:].flatten(0, 1)
    assert torch.allclose(second["locals"], locals_, atol=1e-3)
    first = views({k: v[:4] for k, v in half.items()}, Draws((0, 4), 8, 0, 4))
    assert not torch.allclose(first["view1"], second["view1"], atol=0.1)


def test_target_is_view1_before_colour():
    """Same geometry, no colour change, no hole: what remains where jitter, blur and cutout do nothing."""
    plain = MultiCropViews(**IMAGENET, size=64, locals_=0, jitter=(0, 0, 0, 0), blur_sigma=(0.01, 0.011), hole=0)
    batch = batch_of(8, 1)
    out = plain(batch, Draws((1, 1), 8))
    assert set(out) == {"view1", "view2", "target", "index"}
    assert torch.allclose(out["view1"], out["target"], atol=1e-4)
    changed = MultiCropViews(**IMAGENET, size=64, locals_=0, hole=9)(batch, Draws((1, 1), 8))
    assert torch.equal(changed["target"], out["target"])
    assert ((changed["view1"] - changed["target"]).flatten(1).abs().amax(1) > 0.05).all()
    assert not torch.allclose(out["view2"], out["target"], atol=0.1)


@pytest.mark.parametrize("channels", [1, 3])
def test_views_are_their_documented_operations(channels):
    """Every view of image 5, made by itself from the unit operations and its columns of the random numbers."""
    views = MultiCropViews(**IMAGENET, size=64, local_size=32, locals_=3, hole=9, degrees=10.0)
    batch, draws, i = batch_of(8, channels), Draws((2, 9), 8), 5
    ours = views(batch, draws)
    spatial, color, local_color = (draws.uniform(stream, n)[i : i + 1] for stream, n in ((0, 5 * 24), (1, 36), (2, 36)))

    def crop(view, out, scale):
        columns = Columns(spatial[:, 24 * view : 24 * view + 24])
        box = random_resized_crop(columns, batch["size"][i : i + 1], scale)
        angle, flip = columns.take(1, -10, 10)[0], columns.take(1)[0] < 0.5
        return sample(batch["image"][i : i + 1], affine(box, angle, flip)[None], out, black_outside=True)

    def recolor(x, numbers):
        columns = Columns(numbers)
        x = random_blur(random_gray(x, columns, 0.2), columns, 0.5, (0.1, 2.0))
        return normalise(color_jitter(x, columns, 0.4, 0.4, 0.4, 0.4), **IMAGENET)

    for name, view in (("view1", 0), ("view2", 1)):
        numbers = color[:, 18 * view : 18 * view + 18]
        plain = crop(view, 64, (0.3, 1.0))
        expected = cutout(recolor(plain, numbers[:, :12]), Columns(numbers[:, 12:]), 3, 9)
        assert torch.allclose(ours[name][i], expected[0], atol=1e-3), name
        if view == 0:
            assert torch.allclose(ours["target"][i], normalise(plain, **IMAGENET)[0], atol=1e-3)
    for view in range(3):
        expected = recolor(crop(2 + view, 32, (0.05, 0.3)), local_color[:, 12 * view : 12 * view + 12])
        assert torch.allclose(ours["locals"][8 * view + i], expected[0], atol=1e-3), view


@pytest.mark.parametrize("scale", [(0.3, 1.0), (0.05, 0.3)])
def test_frequencies_of_geometry(scale):
    n, degrees = 500, 10.0
    size = torch.full((n, 2), 2048.0)
    columns = Columns(Draws((6,), n).uniform(0, 48))
    maps = MultiCropViews(**IMAGENET).random_crops(size, columns, 2, scale, degrees)
    assert columns.used == 48
    linear = maps[..., :2]
    area = linear.det().abs()
    assert (area.min() > scale[0] - 1e-3, area.max() < scale[1] + 1e-3) == (True, True)
    assert abs(area.mean() - sum(scale) / 2) < 0.1 * (scale[1] - scale[0])  # the largest often do not fit
    for view in range(2):
        assert 0.43 < (linear[:, view].det() < 0).float().mean() < 0.57  # mirrored
    half = linear.norm(dim=3)  # half width and height of the crop
    angle = torch.rad2deg(torch.asin((linear[..., 1, 0] / half[..., 1]) * linear.det().sign())).abs()
    assert 9.8 < angle.max() < degrees + 1e-3
    assert abs(angle.mean() - degrees / 2) < 0.4
    assert (maps[:, 0] - maps[:, 1]).flatten(1).abs().amax(1).min() > 1e-3  # views of an image differ


def test_frequencies_of_colour():
    """On 512 images: what is grey, what is blurred, and that the rest is jittered."""
    n = 512
    image = color_images(8, 16).repeat(n // 8, 1, 1, 1)
    image[:, :, ::2] *= 0.5  # stripes, which blur weakens
    views = MultiCropViews(**IMAGENET)
    still = MultiCropViews(**IMAGENET, jitter=(0, 0, 0, 0), blur_sigma=(1.0, 2.0))
    numbers = Draws((8,), n).uniform(0, 12)
    out = still.color(image, Columns(numbers))
    grey = (out - out.mean(1, keepdim=True)).flatten(1).abs().amax(1) < 1e-5
    assert 0.14 < grey.float().mean() < 0.26

    def roughness(x):
        return luminance(x).diff(dim=2).abs().mean((1, 2, 3))

    blurred = roughness(out) < 0.5 * roughness(image)
    assert 0.43 < blurred.float().mean() < 0.57
    assert 0.05 < (grey & blurred).float().mean() < 0.15  # independent
    jittered = (views.color(image, Columns(numbers)) - out).flatten(1).abs().amax(1)
    assert (jittered > 0.01).float().mean() > 0.97


def test_outside_is_black_in_views_that_are_rotated():
    batch = {"image": torch.full((32, 1, 64, 64), 255, dtype=torch.uint8), "size": torch.full((32, 2), 64.0)}
    for degrees in (0.0, 30.0):
        multi = MultiCropViews(**IMAGENET, size=32, local_size=32, locals_=1, scale=(1, 1), degrees=degrees, hole=0)
        out = multi(batch, Draws((0,), 32))
        single = ClassificationViews(**IMAGENET, size=32, scale=(1, 1), degrees=degrees).train()
        for x in (out["target"], single(batch, Draws((0,), 32))["view"]):
            black = (denormalise(x, **IMAGENET) < 0.02).float().mean()
            assert black > 0.05 if degrees else black == 0


def test_pictures_are_clamped():
    x = torch.tensor([-9.0, 9.0]).view(2, 1, 1, 1).expand(2, 3, 2, 2)
    assert denormalise(x, **IMAGENET).flatten(1).unique(dim=1).tolist() == [[0], [1]]


# Evaluation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(512, 512), (400, 560)])
def test_evaluation_crops(height, width):
    image = F.interpolate(phantom(512).float(), size=(height, width), mode="bilinear").round().to(torch.uint8)
    texture = torch.from_numpy(to_texture(image[0, 0].numpy(), 512, 1))[None]
    batch = {"image": texture, "size": torch.tensor([[float(height), width]])}
    views = ClassificationViews(**IMAGENET, size=224).eval()
    resized = tv.resize(image.float() / 255, [256], antialias=True)
    centre = denormalise(views(batch)["view"], **IMAGENET)[:, :1]
    assert psnr(centre, tv.center_crop(resized, [224])) > 35
    theirs = torch.cat(tv.ten_crop(resized, [224]))
    theirs = theirs[[0, 1, 2, 3, 4, 6, 5, 8, 7, 9]]  # torchvision mirrors before it cuts
    ours = denormalise(views.ten_crops(batch), **IMAGENET)[:, :1]
    assert min(psnr(a, b) for a, b in zip(ours, theirs)) > 35


def test_training_view_is_random_and_keeps_the_batch():
    views = ClassificationViews(**IMAGENET, size=32).train()
    batch = batch_of(4, 3) | {"label": torch.arange(4)}
    one, same, other = (views(batch, Draws((0, step), 4)) for step in (0, 0, 1))
    assert torch.equal(one["view"], same["view"])
    assert not torch.allclose(one["view"], other["view"], atol=0.1)
    assert torch.equal(one["label"], batch["label"])


def test_levels_of_an_odd_side_fit_into_the_atlas():
    # 17 + 9 + 5 + 3 rows of smaller levels stand higher than the 33 of the first.
    pyramid = Pyramid(torch.rand(2, 1, 33, 33), 0, 4)
    assert pyramid.atlas.shape[-2:] == (34, 50)
    assert torch.isfinite(pyramid.atlas).all()
