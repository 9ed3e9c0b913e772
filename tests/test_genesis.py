"""Models Genesis: its changes in two and three dimensions, its views, and what it leaves for fine-tuning."""

import math

import numpy as np
import pytest
import torch

from medssl import finetune_segmentation, train_genesis
from medssl.engine.checkpoint import load_safe
from medssl.errors import InputError
from medssl.models.encoders import IMAGENET, initialise_unet
from medssl.models.unet2d import UNet2d
from medssl.models.unet3d import UNet3d
from medssl.train_genesis import main
from medssl.views.draws import Columns, Draws
from medssl.views.of_images import GenesisViews
from medssl.views.of_volumes import GenesisCubeViews
from medssl.views.ops import (
    GenesisChanges,
    apply_tones,
    local_shuffling,
    painting,
    random_tones,
    shuffle_map,
    window_count,
)
from medssl.views.ops2d import normalise

NOTHING = GenesisChanges(tones=0, shuffle=0, paint=0)
SMALL = ["--b", "2", "--workers", "0", "--device", "cpu"]
SIZES = {2: ["--image-size", "32"], 3: ["--d", "3", "--arch", "unet3d_quarter", "--cube-size", "16", "16", "8"]}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# Changes -------------------------------------------------------------------------------------------


def bezier(points, x, falling):
    """A cubic Bézier curve from (0, 0) to (1, 1) through numpy, at x."""
    t = np.linspace(0, 1, 20_000)
    weights = np.stack([(1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3])
    xs, ys = (np.sort(np.array([0, *values, 1]) @ weights) for values in points)
    return np.interp(1 - x if falling else x, xs, ys)


def test_random_tones_are_bezier_curves():
    x = torch.linspace(0, 1, 101).view(1, 1, 101).repeat(40, 2, 1)
    numbers = torch.rand(40, 6, generator=seeded(1))
    ours = random_tones(x, Columns(numbers))
    assert torch.equal(ours[:, 0], ours[:, 1])
    for row, (changed, falling, *points) in zip(ours[:, 0].numpy(), numbers.tolist()):
        expected = bezier((points[:2], points[2:]), x[0, 0].numpy(), falling < 0.5) if changed < 0.9 else x[0, 0]
        assert np.abs(row - np.asarray(expected)).max() < 0.01
    unchanged = numbers[:, 0] >= 0.9
    assert 0 < unchanged.sum() < 20
    steps = ours[~unchanged, 0].diff(dim=1)
    rising = (numbers[~unchanged, 1] >= 0.5)[:, None]
    assert torch.where(rising, steps, -steps).min() >= -1e-6
    assert random_tones(x, Columns(numbers), falling=0.0)[:, 0].diff(dim=1).min() >= -1e-6
    assert torch.equal(random_tones(x, Columns(numbers), p=0.0), apply_tones(x, torch.linspace(0, 1, 2).repeat(40, 1)))


def test_tones_of_images_and_of_volumes_are_the_same():
    x = torch.rand(3, 1, 4, 4, 4, generator=seeded(2))
    numbers = torch.rand(3, 6, generator=seeded(3))
    ours = random_tones(x, Columns(numbers))
    assert torch.equal(ours, random_tones(x.view(3, 1, 8, 8), Columns(numbers)).view_as(x))
    assert ours.min() >= 0
    assert ours.max() <= 1


def test_images_are_shuffled_within_windows():
    source = shuffle_map((40, 60), seeded(4), 10_000).view(40, 60)
    index = torch.arange(40 * 60).view(40, 60)
    assert (source != index).float().mean() > 0.6
    assert (source // 60 - index // 60).abs().max() == 3  # windows of up to 4 × 6
    assert (source % 60 - index % 60).abs().max() == 5
    # Unless given, as many windows are over a pixel as over a voxel of a published volume.
    assert (window_count((64, 64, 32)), window_count((32, 32, 32))) == (10_000, 10_000)
    moved = [
        (shuffle_map(s, seeded(4)) != torch.arange(math.prod(s))).double().mean() for s in ((96, 96), (64, 64, 32))
    ]
    assert abs(moved[0] - moved[1]) < 0.05
    x = torch.rand(2, 3, 40, 60, generator=seeded(5))
    ours = local_shuffling(x, Columns(torch.tensor([[0.6], [0.4]])), [1, 2])
    assert torch.equal(ours[0], x[0])
    mapped = x[1].flatten(1)[:, shuffle_map((40, 60), seeded(2))].view(3, 40, 60)
    assert torch.equal(ours[1], mapped)  # all channels alike


def test_images_are_painted():
    x = torch.full((300, 1, 30, 42), 2.0)
    numbers = torch.rand(300, 27, generator=seeded(6))
    ours = painting(x, Columns(numbers), list(range(300)))
    noise = (ours < 1.5)[:, 0]
    painted, inner = numbers[:, 0] < 0.9, numbers[:, 1] < 0.2
    assert not noise[~painted].any()
    rim = torch.ones(30, 42, dtype=torch.bool)
    rim[3:-3, 3:-3] = False
    assert not noise[painted & inner][:, rim].any()
    assert noise[painted & ~inner][:, rim].all()
    numbers[:, 0], numbers[:, 1], numbers[:, 3] = 0, 1, 1  # one window of each image stays
    kept = painting(x, Columns(numbers), list(range(300)))[:, 0] > 1.5
    for axis, n in ((1, 30), (2, 42)):
        side = kept.any(3 - axis).sum(1)
        assert {int(side.min()), int(side.max())} == {n - 4 * n // 7, n - 3 * n // 7}
        assert torch.equal(kept.sum((1, 2)), kept.any(1).sum(1) * kept.any(2).sum(1))  # a rectangle


# Views ---------------------------------------------------------------------------------------------


def test_views_of_images():
    image = torch.randint(0, 256, (6, 1, 96, 96), dtype=torch.uint8, generator=seeded(0))
    batch = {"image": image, "size": torch.full((6, 2), 96.0)}
    views = GenesisViews(**IMAGENET, size=64)
    out = views(batch, Draws((0,), 6))
    assert {name: x.shape for name, x in out.items()} == {"changed": (6, 3, 64, 64), "target": (6, 1, 64, 64)}
    assert out["target"].min() >= 0
    assert out["target"].max() <= 1
    assert (normalise(out["target"], **IMAGENET) != out["changed"]).float().mean() > 0.5
    still = GenesisViews(**IMAGENET, size=64, changes=NOTHING)(batch, Draws((0,), 6))
    assert torch.equal(still["target"], out["target"])
    assert torch.allclose(still["changed"], normalise(still["target"], **IMAGENET), atol=1e-5)
    half = views({key: value[3:] for key, value in batch.items()}, Draws((0,), 6, 3, 3))
    assert torch.allclose(half["changed"], out["changed"][3:], atol=1e-5)


def test_views_of_volumes():
    pairs = torch.rand(8, 2, 16, 16, 8, generator=seeded(0)).half()
    views = GenesisCubeViews((16, 16, 8))
    out = views({"image": pairs}, Draws((0,), 8))
    assert {name: x.shape for name, x in out.items()} == dict.fromkeys(("changed", "target"), (8, 1, 16, 16, 8))
    assert all(x.min() >= 0 and x.max() <= 1 for x in out.values())
    plain = GenesisCubeViews((16, 16, 8), (), NOTHING)({"image": pairs}, Draws((0,), 8))
    assert torch.allclose(plain["changed"], plain["target"], atol=1e-5)
    taken = [[bool(torch.allclose(t, c.float(), atol=1e-3)) for c in pair] for t, pair in zip(plain["target"], pairs)]
    assert all(sum(row) == 1 for row in taken)  # one of the pair
    assert {row.index(True) for row in taken} == {0, 1}
    half = views({"image": pairs[4:]}, Draws((0,), 8, 4, 4))
    assert torch.allclose(half["changed"], out["changed"][4:], atol=1e-5)
    whole = {"image": torch.rand(2, 1, 40, 40, 30), "size": torch.full((2, 3), 160.0)}
    assert views(whole, Draws((1,), 2))["changed"].shape == (2, 1, 16, 16, 8)


# Runs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [2, 3])
def test_run_continues_and_gives_encoder_and_decoder(dims, tmp_path):
    words = [*SMALL, *SIZES[dims], "--epochs", "1", "--save-every", "1"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    main([*words, "--steps", "4", "--output", str(whole)])
    for steps in ("2", "4"):
        main([*words, "--steps", steps, "--output", str(halves)])
    content, continued = (load_safe(folder / "encoder.pt") for folder in (whole, halves))
    for part in ("state_dict", "decoder_state_dict")[: 4 - dims]:
        assert content[part].keys() == continued[part].keys()
        assert all(torch.equal(value, continued[part][key]) for key, value in content[part].items())
    assert content["method"] == "Genesis"
    network = UNet2d("resnet18", 2) if dims == 2 else UNet3d(3, width=16)
    arch = "resnet18" if dims == 2 else "unet3d_quarter"
    before = {key: value.clone() for key, value in network.state_dict().items()}
    report = initialise_unet(network, arch, str(whole / "encoder.pt"), "encoder+decoder")
    assert report["missing"] == 0
    kernels = [key for key, value in network.state_dict().items() if value.ndim == dims + 2]
    last = ("output.weight", "out_tr.final_conv.weight")
    same = {key for key in kernels if torch.equal(network.state_dict()[key], before[key])}
    assert same <= set(last)
    assert report["normalization"] == ({"kind": "unit"} if dims == 3 else IMAGENET)


@pytest.mark.parametrize(("labels", "skips", "kind"), [(1, True, "unit"), (3, True, "z"), (1, False, "z")])
def test_published_files_expect_the_unit_range(labels, skips, kind, tmp_path):
    """A file that says nothing: a whole network with skips and one output is Models Genesis', others are not."""
    state = UNet3d(labels, skips, width=16).state_dict()
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "genesis.pt")
    report = initialise_unet(UNet3d(2, width=16), "unet3d_quarter", str(tmp_path / "genesis.pt"), "encoder")
    assert (report["missing"], report["normalization"]) == (0, {"kind": kind})


@pytest.mark.parametrize("dims", [2, 3])
def test_options_reach_the_views(dims):
    words = ["--tones", ".1", "--falling", ".2", "--shuffle", ".3", "--paint", ".4", "--inner", ".6"]
    args = train_genesis.get_parser().parse_args(words)
    views = train_genesis.make_views(args, dims, IMAGENET if dims == 2 else {"kind": "unit"})
    assert views.changes == GenesisChanges(tones=0.1, falling=0.2, shuffle=0.3, paint=0.4, inner=0.6)
    if dims == 3:
        args.mirror = "xz"
        assert train_genesis.make_views(args, dims, {}).flips == (0, 2)


def test_decoder_is_taken_by_segmentation(tmp_path):
    main([*SMALL, *SIZES[3], "--steps", "1", "--output", str(tmp_path / "genesis")])
    words = ["--init", str(tmp_path / "genesis" / "encoder.pt"), "--load", "encoder+decoder", "--workers", "0"]
    words += ["--dataset", "phantom3d", "--steps", "1", "--trials", "1", "--annotation-percent", "5", "--device", "cpu"]
    finetune_segmentation.main([*words, "--no-tensorboard", "--output", str(tmp_path / "tuned")])
    assert (tmp_path / "tuned" / "results.json").exists()


def test_refusals(tmp_path):
    words = [*SMALL, "--output", str(tmp_path / "out")]
    with pytest.raises(InputError, match="sides of at least 8"):
        main([*words, "--d", "3", "--cube-size", "16", "16", "4"])
    with pytest.raises(InputError, match="--cube-size: is for volumes, and phantom2d has 2 dimensions"):
        main([*words, "--d", "2", "--cube-size", "8", "8", "8"])
    with pytest.raises(InputError, match="--mirror: is for volumes, and phantom2d has 2 dimensions"):
        main([*words, "--d", "2", "--mirror", "x"])
    with pytest.raises(InputError, match="--crop-scale: is for images, and phantom3d has 3 dimensions"):
        main([*words, "--d", "3", "--crop-scale", "0.5"])
    assert not (tmp_path / "out").exists()
    assert (train_genesis.DEFAULTS[2]["b"], train_genesis.DEFAULTS[3]["b"]) == (64, 6)
