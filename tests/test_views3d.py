"""Views of volumes against scipy, SimpleITK and loops over single volumes."""

import numpy as np
import pytest
import SimpleITK as sitk
import torch
import torch.nn.functional as F
from scipy import ndimage

from medssl import train_genesis, train_mae, train_pcrl, train_pcrlv2
from medssl.engine import options
from medssl.errors import InputError
from medssl.views.draws import Columns, Draws, seeds_of
from medssl.views.of_volumes import CubeViews, VolumeClassificationViews, VolumeSegmentationViews
from medssl.views.ops import local_shuffling, painting, shuffle_map
from medssl.views.ops3d import (
    GLOBAL_SIZES,
    add_noise_,
    affine,
    blur,
    crop_resize,
    gamma_,
    iou,
    random_boxes,
    resize,
    sample,
    swap_patches,
    windows,
    z_normalise,
)


def smooth(n, shape, seed=0):
    """(n, 1, *shape) in [0, 1] without detail below three voxels."""
    coarse = torch.rand(n, 1, *(max(2, s // 4) for s in shape), generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size=shape, mode="trilinear", align_corners=True)


def no_flip(n):
    return torch.zeros(n, 3, dtype=torch.bool)


# Geometry ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.7, 0.9, 2.0)])
def test_affine_is_scaling_after_rotation_as_simpleitks(spacing):
    """The published map: torchio's composite of a scale and an Euler transform about the centre, inverted."""
    volume, shape = smooth(1, (40, 36, 24)), (40, 36, 24)
    scales, degrees = (1.1, 0.92, 1.05), (9.0, -6.0, 10.0)
    extent = [n * s for n, s in zip(shape, spacing)]
    ours = sample(volume, affine(extent, no_flip(1), torch.tensor([scales]), torch.tensor([degrees])))[0, 0].numpy()
    image = sitk.GetImageFromArray(volume[0, 0].numpy().transpose(2, 1, 0))
    image.SetSpacing(spacing)
    centre = image.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in shape])
    scaling = sitk.ScaleTransform(3, scales)
    scaling.SetCenter(centre)
    turn = sitk.Euler3DTransform()
    turn.SetCenter(centre)
    turn.SetRotation(*np.radians(degrees).tolist())
    inverse = sitk.CompositeTransform([scaling, turn]).GetInverse()
    theirs = sitk.GetArrayFromImage(sitk.Resample(image, image, inverse, sitk.sitkLinear, 0.0)).transpose(2, 1, 0)
    inner = (slice(6, -6),) * 3
    assert np.abs(ours[inner] - theirs[inner]).max() < 1e-4
    assert np.abs(ours[inner] - volume[0, 0].numpy()[inner]).max() > 0.1


def test_flips_and_turns_are_exact():
    volume = smooth(4, (12, 12, 6))
    flip = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 1], [1, 0, 1]]).bool()
    turns = torch.tensor([1, 2, 3, 0])
    ours = sample(volume, affine((12, 12, 6), flip, turns=turns))
    for i in range(4):
        expected = volume[i, 0].flip([axis for axis in range(3) if flip[i, axis]])
        expected = torch.rot90(expected, int(turns[i]), (0, 1))
        assert torch.allclose(ours[i, 0], expected, atol=1e-5), i


def test_outside_is_zero_and_labels_stay_labels():
    mask = torch.zeros(1, 1, 16, 16, 16)
    mask[..., 4:12, 4:12, 4:12] = 5.0
    theta = affine((16, 16, 16), no_flip(1), torch.full((1, 3), 0.5))
    shrunk = sample(mask, theta, nearest=True)
    assert shrunk.unique().tolist() == [0, 5]
    assert (shrunk == 5).sum() == 4**3
    assert sample(torch.ones(1, 1, 16, 16, 16), theta)[0, 0, 0].max() == 0


def test_windows_are_padded():
    volumes = [torch.arange(24.0).view(2, 3, 4), torch.ones(5, 5, 5)]
    cut = windows(volumes, torch.tensor([[-1, 1, 2], [4, -3, 9]]), (3, 2, 3))
    expected = torch.zeros(3, 2, 3)
    expected[1:, :, :2] = volumes[0][:, 1:, 2:]
    assert torch.equal(cut[0], expected)
    assert cut[1].abs().max() == 0


def test_resize_is_interpolate_with_antialiasing():
    volumes = [smooth(1, (20, 31, 18), 1)[0, 0], smooth(1, (9, 40, 25), 2)[0, 0]]
    ours = resize(volumes, (7, 12, 30))
    for x, volume in zip(ours[:, 0], volumes):
        planes = F.interpolate(volume[None], size=(12, 30), mode="bilinear", antialias=True)[0]  # y, z
        planes = F.interpolate(planes.permute(1, 0, 2)[None], size=(7, 30), mode="bilinear", antialias=True)[0]
        assert torch.allclose(x, planes.permute(1, 0, 2), atol=1e-5)
    # Without the filter, 40 → 12 voxels would be another result.
    plain = F.interpolate(volumes[1][None, None], size=(7, 12, 30), mode="trilinear")[0, 0]
    assert (ours[1, 0] - plain).abs().max() > 0.02


def test_crops_at_voxel_size_are_slices():
    volumes = list(torch.rand(2, 20, 20, 20, generator=torch.Generator().manual_seed(0)))
    boxes = torch.tensor([[3.0, 0, 12, 8, 8, 8], [12, 5, 0, 8, 8, 8]])
    ours = crop_resize(volumes, boxes, (8, 8, 8))
    assert torch.allclose(ours[0, 0], volumes[0][3:11, :8, 12:], atol=1e-6)
    assert torch.allclose(ours[1, 0], volumes[1][12:, 5:13, :8], atol=1e-6)
    # A crop does not depend on the others of its batch, whose windows may be larger.
    mixed = crop_resize(volumes, torch.tensor([[3.0, 0, 12, 8, 8, 8], [0, 0, 0, 20, 20, 20]]), (8, 8, 8))
    assert torch.allclose(mixed[0], ours[0], atol=1e-6)
    enlarged = crop_resize(volumes[:1], torch.tensor([[4.0, 4, 4, 6, 6, 6]]), (12, 12, 12))[0, 0]
    plain = F.interpolate(volumes[0][None, None], scale_factor=2, mode="trilinear")[0, 0, 8:20, 8:20, 8:20]
    assert torch.allclose(enlarged, plain, atol=1e-5)


def test_iou():
    a = torch.tensor([[0.0, 0, 0, 4, 4, 4], [0, 0, 0, 2, 2, 2], [0, 0, 0, 1, 1, 1]])
    b = torch.tensor([[2.0, 0, 0, 4, 4, 4], [0, 0, 0, 2, 2, 2], [5, 0, 0, 1, 1, 1]])
    assert torch.allclose(iou(a, b), torch.tensor([1 / 3, 1, 0]))


def boxes_of(n, size, spacing, locals_=6):
    extent = torch.tensor([size] * n, dtype=torch.float32)
    numbers = Columns(Draws((3,), n).uniform(0, 8 * 32 + 4 * locals_))
    large, small = random_boxes(numbers, extent, extent / spacing, locals_)
    assert large.shape == (n, 2, 6)
    assert small.shape == (n, locals_, 6)
    return large * spacing, small * spacing, extent


@pytest.mark.parametrize("size", [(320, 300, 260), (112, 200, 64), (28, 28, 28)])
@pytest.mark.parametrize("spacing", [1.0, 2.0])
def test_boxes_overlap_and_lie_in_the_volume(size, spacing):
    large, small, extent = boxes_of(2000, size, spacing)
    assert (iou(large[:, 0], large[:, 1]) > 0.3).float().mean() > 0.99
    for boxes in (large, small):
        assert boxes[..., :3].min() >= 0
        assert (boxes[..., :3] + boxes[..., 3:] <= extent[:, None] + 1e-3).all()
        assert (boxes[..., 3:] >= torch.minimum(torch.tensor(4 * spacing), extent[:, None]) - 1e-4).all()
    hull_low = large[..., :3].amin(1, keepdim=True) - 3
    hull_high = (large[..., :3] + large[..., 3:]).amax(1, keepdim=True) + 3
    start = small[..., :3]
    pushed = start + small[..., 3:] >= extent[:, None] - 1e-3  # the volume's border moves boxes inwards
    assert ((start >= hull_low - 1e-3) | pushed).all()
    assert (start <= hull_high + 1e-3).all()


def test_exact_boxes_do_not_shrink_in_small_volumes():
    """Patches of a fine-tuning have so many mm a voxel."""
    size, sizes = torch.tensor([[35.0, 50, 30]] * 500), ((32.0, 32, 32), (16.0, 24, 16))
    numbers = Columns(Draws((3,), 500).uniform(0, 8 * 32 + 4 * 2))
    large, small = random_boxes(numbers, size, size / 0.5, 2, sizes, 0.3, ((16.0, 16, 16),), exact=True)
    found = {tuple(side) for side in (large[..., 3:] * 0.5).flatten(0, 1).tolist()}
    assert found == {(32, 32, 30), (16, 24, 16)}  # the volume's own length where that is less
    assert {tuple(side) for side in (small[..., 3:] * 0.5).flatten(0, 1).tolist()} == {(16, 16, 16)}
    assert (iou(large[:, 0], large[:, 1]) > 0.3).all()


def test_cubes_of_as_many_mm_a_voxel_are_the_volume_itself():
    """Cut at a volume's own spacing, a cube is a part of it: nothing is resampled but the fractions of its start."""
    ramp = torch.arange(40.0)[:, None, None] / 40 + torch.zeros(40, 48, 40)
    batch = {"image": [ramp[None]] * 6, "size": torch.tensor([[40.0, 48, 40]] * 6)}
    views = CubeViews((32, 32, 32), (16, 16, 16), 3, crop_mm=[(32, 32, 32)])
    large, small = views.cut(batch, Draws((0,), 6))
    assert torch.allclose(large.diff(dim=2), torch.tensor(1 / 40), atol=1e-5)
    assert torch.allclose(small.diff(dim=2)[:, :, 1:-1], torch.tensor(1 / 40), atol=1e-5)
    published = CubeViews((32, 32, 32), (16, 16, 16), 3)
    assert published.cut(batch, Draws((0,), 6))[0].diff(dim=2).mean() * 40 < 0.95  # 32 mm at most, in 32 voxels


@pytest.mark.parametrize("script", [train_genesis, train_mae, train_pcrl, train_pcrlv2])
def test_every_method_of_volumes_cuts_what_is_asked(script):
    def views(*words):
        patch = ["--patch", "8"] if script is train_mae else []
        words = ["--d", "3", "--cube-size", "16", "16", "16", *patch, *words]
        args = options.complete(script.get_parser().parse_args(words), script.DEFAULTS[3])
        return script.make_views(args, 3, {})

    exact = views("--crop-mm", "12", "12", "12", "14", "16", "18")
    assert (exact.exact, exact.crops) == (True, [(12, 12, 12), (14, 16, 18)])
    assert not views().exact


@pytest.mark.parametrize("script", [train_genesis, train_mae, train_pcrl, train_pcrlv2])
def test_crops_that_cannot_be_cut_are_refused_before_anything_is_written(script, tmp_path):
    for words, reason in (
        (["--d", "3", "--crop-mm", "12", "12"], "--crop-mm: 2 numbers; each size has three, X Y Z"),
        (["--dataset", "phantom2d", "--crop-mm", "12", "12", "12"], "--crop-mm"),
    ):
        with pytest.raises(InputError, match=reason):
            script.main([*words, "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_box_sizes():
    large, small, _ = boxes_of(2000, (320, 300, 260), 1.0)
    found = {tuple(side) for side in large[..., 3:].flatten(0, 1).round().tolist()}
    assert found == set(GLOBAL_SIZES)
    assert {tuple(side) for side in small[..., 3:].flatten(0, 1).round().tolist()} == {
        (32, 32, 16),
        (16, 16, 16),
        (32, 32, 32),
        (8, 8, 8),
    }
    # Everywhere in the volume, and the second box is like the first.
    centres = large[..., :3] + large[..., 3:] / 2
    assert centres.amin((0, 1))[0] < 45
    assert centres.amax((0, 1))[0] > 275
    means = centres.mean(0)
    assert (means[0] - means[1]).abs().max() < 6
    # Small volumes: the same shapes in proportion, not always the whole.
    large, _, _ = boxes_of(500, (28, 28, 28), 1.0)
    assert large[..., 3].max() == pytest.approx(112 * 28 / 140, abs=1e-3)
    assert large[..., 3].min() == pytest.approx(64 * 28 / 140, abs=1e-3)


# Intensities ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(20, 14, 9), (5, 32, 16)])
def test_blur_is_scipys(shape):
    x = torch.rand(3, 1, *shape, generator=torch.Generator().manual_seed(0))
    sigmas = torch.tensor([[2.0, 0.3, 1.1], [0.0, 1.7, 0.6], [0.0, 0.0, 0.0]])
    ours = blur(x, sigmas)
    for i in range(3):
        theirs = ndimage.gaussian_filter(x[i, 0].numpy(), sigmas[i].tolist(), mode="reflect")
        assert np.abs(ours[i, 0].numpy() - theirs).max() < 1e-5, i
    assert torch.allclose(ours[2], x[2])


def test_noise_depends_on_the_images_seed_alone():
    x = torch.zeros(6, 1, 16, 16, 16)  # two views of three images
    std = torch.tensor([[0.1], [0.2], [0.0], [0.1], [0.25], [0.1]])
    seeds = [5, 7, 9]
    whole = add_noise_(x.clone(), std, seeds)
    part = add_noise_(x[:2].clone(), std[[1, 4]], seeds[1:2])
    assert torch.equal(part, whole[[1, 4]])
    assert torch.allclose(whole.std((1, 2, 3, 4)), std[:, 0], rtol=0.05)
    assert (whole[0] / 0.1 - whole[3] / 0.1).abs().mean() > 0.5  # views have noise of their own
    assert not torch.equal(whole[0] / 0.1, whole[1] / 0.2)
    seeds = seeds_of(Draws((1, 2), 8), 3)
    assert len(set(seeds)) == 8
    assert seeds_of(Draws((1, 2), 8, 4, 2), 3) == seeds[4:6]


def test_gamma_keeps_signs():
    x = torch.tensor([-0.5, 0.0, 0.25, 1.0]).view(1, 1, 1, 2, 2).repeat(2, 1, 1, 1, 1)
    ours = gamma_(x, torch.tensor([[np.log(2)], [0.0]], dtype=torch.float32))
    assert torch.allclose(ours[0].flatten(), torch.tensor([-0.25, 0, 0.0625, 1]))
    assert torch.allclose(ours[1].flatten(), torch.tensor([-0.5, 0, 0.25, 1]))


def test_z_normalisation():
    x = torch.rand(2, 2, 8, 8, 8, generator=torch.Generator().manual_seed(0)) * 3 + 1
    ours = z_normalise(x)
    expected = (x[1, 0] - x[1, 0].mean()) / x[1, 0].std()
    assert torch.allclose(ours[1, 0], expected, atol=1e-5)
    assert z_normalise(torch.full((1, 1, 64, 64, 32), 0.3)).abs().max() < 1e-2


def test_swaps_happen_one_after_the_other():
    shape, patch, swaps = (13, 9, 8), (4, 3, 2), 60
    x = torch.rand(3, 1, *shape, generator=torch.Generator().manual_seed(0))
    numbers = Draws((1,), 3).uniform(0, 6 * swaps)
    ours = swap_patches(x.clone(), Columns(numbers), swaps, patch)
    room = [s - p + 1 for s, p in zip(shape, patch)]
    for i in range(3):
        expected = x[i, 0].clone()
        for pair in numbers[i].view(swaps, 2, 3):
            one, two = (
                tuple(slice(int(u * r), int(u * r) + p) for u, r, p in zip(corner, room, patch)) for corner in pair
            )
            first, second = expected[one].clone(), expected[two].clone()
            expected[two] = first
            expected[one] = second
        assert torch.equal(ours[i, 0], expected), i
        assert (expected != x[i, 0]).float().mean() > 0.3


# PCRL ----------------------------------------------------------------------------------------------


def test_shuffling_is_a_loop_over_windows():
    shape, count = (40, 30, 20), 400
    source = shuffle_map(shape, torch.Generator().manual_seed(3), count).view(shape)
    generator = torch.Generator().manual_seed(3)
    numbers = torch.rand(count, 6, generator=generator)
    index = torch.arange(40 * 30 * 20).view(shape)
    side = [[1 + int(u * (n // 10)) for u, n in zip(row[:3], shape)] for row in numbers]
    keys = torch.rand(sum(a * b * c for a, b, c in side), generator=generator, dtype=torch.float64)
    expected, used = index.clone(), 0
    for row, size in zip(numbers, side):
        box = tuple(slice(b := int(u * (n - s + 1)), b + s) for u, n, s in zip(row[3:], shape, size))
        window = index[box].flatten()  # always of the original
        order = keys[used : used + len(window)].argsort()
        used += len(window)
        expected[box] = window[order].view(size)
    assert torch.equal(source, expected)
    moved = source != index
    assert 0.05 < moved.float().mean() < 0.5


def test_shuffling_at_full_strength_stays_local():
    x = torch.arange(64 * 64 * 32).view(1, 1, 64, 64, 32).float().repeat(2, 1, 1, 1, 1)
    ours = local_shuffling(x, Columns(torch.tensor([[0.49], [0.51]])), [1, 2])
    assert torch.equal(ours[1], x[1])
    source = ours[0, 0].long()
    assert (source != x[0, 0].long()).float().mean() > 0.6  # the windows cover nearly everything
    for axis, (stride, n, reach) in enumerate(((2048, 64, 6), (32, 64, 6), (1, 32, 3))):
        here = torch.arange(n).view([-1 if a == axis else 1 for a in range(3)])
        assert (source // stride % n - here).abs().max() == reach - 1, axis


def test_painting():
    x = smooth(300, (24, 24, 16)) * 0.5 + 2  # no value of the noise
    numbers = Draws((4,), 300).uniform(0, 37)
    ours = painting(x, Columns(numbers), list(range(300)))
    noise = ours < 1.5
    assert torch.equal(ours[~noise], x[~noise])
    assert (ours[noise] >= 0).all()
    assert (ours[noise] < 1).all()
    assert ours[noise].mean() == pytest.approx(0.5, abs=0.01)
    share = noise.float().mean((1, 2, 3, 4))
    painted, inner = numbers[:, 0] < 0.9, numbers[:, 1] < 0.2
    assert (share[~painted] == 0).all()
    small, large = share[painted & inner], share[painted & ~inner]
    assert small.max() < 0.25
    assert 0.01 < small.mean() < 0.15
    # Noise never reaches the border inside, and fills it outside.
    rim = torch.ones(24, 24, 16, dtype=torch.bool)
    rim[3:-3, 3:-3, 3:-3] = False
    assert not noise[painted & inner][:, 0, rim].any()
    assert noise[painted & ~inner][:, 0, rim].all()
    assert large.max() < 0.95
    assert large.min() > 0.3
    # One window alone: its sides are n − U[3n//7, 4n//7].
    numbers[:, 0], numbers[:, 1], numbers[:, 3] = 0, 1, 1
    kept = painting(x, Columns(numbers), list(range(300)))[:, 0] > 1.5
    for axis, n in enumerate((24, 24, 16)):
        side = kept.any(tuple(a for a in (1, 2, 3) if a != axis + 1)).sum(1)
        assert {int(side.min()), int(side.max())} == {n - 4 * n // 7, n - 3 * n // 7}


# Views ---------------------------------------------------------------------------------------------


def prepared(n, locals_=4):
    pairs = torch.cat([smooth(n, (32, 32, 16), 1), smooth(n, (32, 32, 16), 2)], 1)
    small = smooth(n * locals_, (8, 8, 8), 3).view(n, locals_, 8, 8, 8)
    return {"image": pairs.half(), "locals": small.half(), "index": torch.arange(n)}


def whole(n):
    image = smooth(n, (40, 36, 28), 4).half()
    return {"image": image, "size": torch.tensor([[80.0, 72, 70]] * n), "index": torch.arange(n)}


def rows(batch, start, count):
    return {k: v[start : start + count] for k, v in batch.items()}


@pytest.mark.parametrize("make", [prepared, whole])
def test_two_halves_make_the_cubes_of_the_whole(make):
    views = CubeViews(size=(32, 32, 16), local_size=(8, 8, 8), locals_=3)
    batch = make(6)
    all_ = views(batch, Draws((0, 4), 6))
    second = views(rows(batch, 4, 2), Draws((0, 4), 6, 4, 2))
    assert {k: tuple(v.shape) for k, v in all_.items()} == {
        "view1": (6, 1, 32, 32, 16),
        "view2": (6, 1, 32, 32, 16),
        "target": (6, 1, 32, 32, 16),
        "locals": (18, 1, 8, 8, 8),
    }
    for name in ("view1", "view2", "target"):
        assert torch.allclose(second[name], all_[name][4:], atol=1e-3), name
    assert torch.allclose(second["locals"], all_["locals"].view(3, 6, 1, 8, 8, 8)[:, 4:].flatten(0, 1), atol=1e-3)
    assert all_["target"].min() >= 0
    assert all_["target"].max() <= 1
    for name in ("view1", "view2", "locals"):
        assert all_[name].mean((1, 2, 3, 4)).abs().max() < 1e-4
        assert (all_[name].std((1, 2, 3, 4)) - 1).abs().max() < 1e-2
    other = views(batch, Draws((0, 5), 6))
    assert (other["view1"] - all_["view1"]).abs().mean() > 0.3


def test_target_is_view1_before_its_intensities_change():
    plain = CubeViews((32, 32, 16), (8, 8, 8), 2, blur=0, noise=0, log_gamma=0, swaps=0)
    batch = prepared(6)
    out = plain(batch, Draws((1, 1), 6))
    assert torch.allclose(out["view1"], z_normalise(out["target"]), atol=1e-4)
    full = CubeViews((32, 32, 16), (8, 8, 8), 2)(batch, Draws((1, 1), 6))
    assert full["target"].shape == out["target"].shape
    assert ((full["view1"] - z_normalise(full["target"])).flatten(1).abs().mean(1) > 0.1).all()
    # Nothing but flips of the first axis: the stored cubes themselves.
    still = CubeViews((32, 32, 16), (8, 8, 8), 0, scale=0, degrees=0)(batch, Draws((1, 1), 6))
    assert set(still) == {"view1", "view2", "target"}
    flipped = 0
    for target, cube in zip(still["target"][:, 0], batch["image"][:, 0].float()):
        same, mirrored = (torch.allclose(target, c, atol=1e-4) for c in (cube, cube.flip(0)))
        assert same != mirrored
        flipped += mirrored
    assert 0 < flipped < 6


def test_cubes_of_another_shape_are_resized_and_too_few_refused():
    out = CubeViews((16, 16, 16), (16, 16, 16), 1)(prepared(2), Draws((0,), 2))
    assert out["view1"].shape == (2, 1, 16, 16, 16)
    assert out["locals"].shape == (2, 1, 16, 16, 16)
    with pytest.raises(InputError, match="--local-views 6: the prepared cubes have 4"):
        CubeViews((16, 16, 16))(prepared(2), Draws((0,), 2))


def test_whole_volumes_give_views_of_one_place():
    """The two large cubes show overlapping parts: a ramp's values agree, and grow along its axis."""
    n = 12
    ramp = torch.linspace(0, 1, 60).view(-1, 1, 1).expand(60, 50, 40)
    batch = {"image": ramp.expand(n, 1, 60, 50, 40), "size": torch.tensor([[300.0, 250, 200]] * n)}
    views = CubeViews((16, 16, 8), (8, 8, 8), 2, flips=(), scale=0, degrees=0)
    large, small = views.cut(batch, Draws((2,), n))
    assert (large.diff(dim=2) > 0).all()
    assert large.diff(dim=3).abs().max() < 1e-4
    one, two = large.chunk(2)
    shared = torch.minimum(one.amax((1, 2, 3, 4)), two.amax((1, 2, 3, 4)))
    shared = shared - torch.maximum(one.amin((1, 2, 3, 4)), two.amin((1, 2, 3, 4)))
    assert (shared > 0).all()
    assert (one - two).abs().amax((1, 2, 3, 4)).max() > 0.02
    length = large[:, 0, -1, 0, 0] - large[:, 0, 0, 0, 0]
    assert length.max() < 112 / 300
    assert length.max() > 0.9 * 96 / 300 * 15 / 16
    assert (small[:, 0, -1, 0, 0] - small[:, 0, 0, 0, 0]).max() < 32 / 300
    # Volumes of different shapes come as a list.
    ragged = {
        "image": [ramp[None], ramp[None, :, :40, :30]],
        "size": torch.tensor([[300.0, 250, 200], [300, 200, 150]]),
    }
    assert views(ragged, Draws((2,), 2))["view2"].shape == (2, 1, 16, 16, 8)


def test_classification_views():
    batch = whole(4) | {"label": torch.tensor([0, 1, 1, 0])}
    views = VolumeClassificationViews().eval()
    out = views(batch)
    assert torch.equal(out["view"], z_normalise(batch["image"].float()))
    assert out["label"] is batch["label"]
    small = VolumeClassificationViews(size=(20, 20, 14)).eval()(batch)["view"]
    expected = resize(list(batch["image"][:, 0]), (20, 20, 14))
    assert torch.allclose(small, z_normalise(expected), atol=1e-4)
    random = VolumeClassificationViews(size=(20, 20, 14)).train()
    one, again, other = (random(batch, Draws((step,), 4))["view"] for step in (0, 0, 1))
    assert torch.equal(one, again)
    assert ((one - other).abs().mean((1, 2, 3, 4)) > 0.1).all()
    half = random(rows(batch, 2, 2), Draws((0,), 4, 2, 2))["view"]
    assert torch.allclose(half, one[2:], atol=1e-4)
    # Right-angle turns and flips alone move whole voxels.
    exact = VolumeClassificationViews(size=(20, 20, 14), scale=0, degrees=0).train()(batch, Draws((0,), 4))["view"]
    for x, y in zip(exact, small):
        assert torch.allclose(x.flatten().sort()[0], y.flatten().sort()[0], atol=1e-3)
    assert (exact - small).abs().amax((1, 2, 3, 4)).gt(0.1).sum() >= 3


def labelled(n, shape=(30, 28, 20)):
    """Bright balls, label 1, and one small brighter cube, label 2."""
    mask = torch.zeros(n, *shape, dtype=torch.uint8)
    grid = torch.stack(torch.meshgrid(*map(torch.arange, shape), indexing="ij"), 3)
    mask[:, ((grid - torch.tensor([12, 12, 9])) ** 2).sum(3) < 36] = 1
    mask[:, 24:27, 22:25, 14:17] = 2
    image = mask.float()[:, None] * 0.4
    return {"image": image.half(), "mask": mask, "size": torch.tensor([[30.0, 28, 40]] * n)}


def test_segmentation_patches_keep_image_and_mask_together():
    batch = labelled(16)
    views = VolumeSegmentationViews((16, 16, 12), blur=0, noise=0, log_gamma=0, contrast=0)
    views.normalise = lambda x: x
    out = views(batch, Draws((0,), 16))
    assert out["view"].shape == (16, 1, 16, 16, 12)
    assert out["target"].shape == (16, 16, 16, 12)
    assert out["target"].dtype == torch.int64
    read = (out["view"][:, 0] / 0.4).round().long()
    assert (read == out["target"]).float().mean() > 0.97  # they differ where edges are interpolated
    assert set(out["target"].unique().tolist()) == {0, 1, 2}
    half = views(rows(batch, 8, 8), Draws((0,), 16, 8, 8))
    assert torch.equal(half["target"], out["target"][8:])


def test_share_of_foreground_patches():
    batch = labelled(64)
    draws = Draws((1,), 64)
    found = {}
    for share in (0.0, 0.5, 1.0):
        views = VolumeSegmentationViews((9, 9, 7), foreground=share, scale=0, degrees=0)
        middle = views(batch, draws)["target"][:, 4, 4, 3]
        found[share] = [(middle == label).float().mean().item() for label in (1, 2)]
    assert found[0.0][1] < 0.1
    assert found[1.0][0] > 0.35  # both labels alike, though one is thirty times larger
    assert found[1.0][1] > 0.3
    assert found[0.0][1] < found[0.5][1] < found[1.0][1]
    empty = {**batch, "mask": torch.zeros_like(batch["mask"])}
    assert VolumeSegmentationViews((9, 9, 7), foreground=1.0)(empty, draws)["target"].max() == 0


def test_segmentation_of_small_ragged_and_multichannel_volumes():
    small = labelled(2, (27, 25, 17))
    views = VolumeSegmentationViews((40, 40, 24), scale=0, degrees=0, flips=())
    out = views(small, Draws((0,), 2))
    assert out["view"].shape == (2, 1, 40, 40, 24)
    assert (out["target"][:, 7:34, 8:33, 4:21] == small["mask"]).all()
    assert out["target"].sum() == small["mask"].sum()
    ragged = {k: [*labelled(1)[k], *small[k][:1]] for k in ("image", "mask")}
    ragged["image"] = [image.repeat(2, 1, 1, 1) for image in ragged["image"]]
    out = VolumeSegmentationViews((16, 16, 12))(ragged, Draws((0,), 2))
    assert out["view"].shape == (2, 2, 16, 16, 12)
    assert torch.allclose(out["view"][:, 0].std((1, 2, 3)), torch.ones(2), atol=1e-3)


def test_segmentation_evaluation_keeps_the_volume():
    batch = labelled(2)
    out = VolumeSegmentationViews().eval()(batch)
    assert torch.equal(out["view"], batch["image"].float())
    assert torch.equal(out["target"], batch["mask"].long())


def test_patches_of_large_cubes_are_hidden():
    cubes = {"image": torch.rand(3, 2, 32, 32, 16), "locals": torch.rand(3, 2, 8, 8, 8)}
    shape = ((32, 32, 16), (8, 8, 8), 2)
    plain, masked = (CubeViews(*shape, mask_ratio=ratio)(cubes, Draws((3,), 3)) for ratio in (0.0, 0.25))
    assert torch.equal(plain["target"], masked["target"])
    assert torch.equal(plain["locals"], masked["locals"])
    seen = [masked[name] == plain[name] for name in ("view1", "view2")]
    for name, where in zip(("view1", "view2"), seen):
        patches = where.view(3, 4, 8, 4, 8, 2, 8).movedim((2, 4, 6), (4, 5, 6)).flatten(4).float().mean(-1)
        assert set(patches.unique().tolist()) <= {0.0, 1.0}  # wholly seen or wholly hidden
        assert [int(n) for n in (patches == 0).flatten(1).sum(1)] == [8, 8, 8]  # a quarter of 32
        assert (masked[name][~where] == 0).all()
    assert not torch.equal(*seen)


def test_small_cubes_are_not_swapped_to_pieces():
    assert CubeViews().swaps == 100
    assert CubeViews(size=(32, 32, 16)).swaps == 12  # as many per voxel
    assert CubeViews(size=(128, 128, 32)).swaps == 400
