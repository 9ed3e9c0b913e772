"""Masked autoencoding: what is hidden stays unseen, batch statistics of what is visible, the loss, options, runs."""

import copy
import json
import threading

import pytest
import torch
from torch import nn

from medssl.engine.checkpoint import load_safe
from medssl.engine.parallel import Run
from medssl.errors import InputError
from medssl.losses.patches import cut_patches, hidden_patch_error, join_patches, patch_scale
from medssl.models.encoders import make_encoder
from medssl.models.sparse import make_sparse, seeing
from medssl.models.unet3d import UNet3dEncoder
from medssl.train_mae import MAE, choose_patch, main
from medssl.views.draws import Draws
from medssl.views.of_images import HiddenPatchViews
from medssl.views.of_volumes import HiddenPatchCubes

IMAGENET_HALF = {"mean": [0.5] * 3, "std": [0.25] * 3}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def chessboard(images, grid):
    """Every second patch is visible, of the second image the others."""
    places = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij")).sum(0)
    return torch.stack([(places + i) % 2 == 0 for i in range(images)])[:, None]


def on_pixels(visible, sides):
    return nn.functional.interpolate(visible.float(), size=sides) > 0


ENCODERS = {
    "resnet18": ((2, 3, 128, 128), (4, 4)),
    "resnet50": ((2, 3, 64, 64), (2, 2)),
    "densenet121": ((2, 3, 64, 64), (2, 2)),
    "unet3d_quarter": ((2, 1, 16, 16, 24), (2, 2, 3)),
}


@pytest.fixture(params=ENCODERS)
def masked(request):
    """A name, its sparse encoder, images, and what is visible of them."""
    torch.manual_seed(0)
    shape, grid = ENCODERS[request.param]
    encoder = make_sparse(make_encoder(request.param, dims=len(grid)), request.param)
    return request.param, encoder, torch.randn(shape, generator=seeded()), chessboard(2, grid)


@pytest.mark.parametrize("training", [True, False])
def test_hidden_pixels_have_no_influence(masked, training):
    """And hidden places are zero in every map, so that the mask does not erode from layer to layer."""
    _, encoder, x, visible = masked
    encoder.train(training)
    hidden = ~on_pixels(visible, x.shape[2:])
    maps = []
    for other in (x, x + 9 * hidden * torch.randn(x.shape, generator=seeded(1))):
        with seeing(visible, x.shape[2:]) as seen, torch.no_grad():
            maps.append(encoder(seen.hide(other)))
    for a, b in zip(*maps):
        assert torch.equal(a, b)
        there = on_pixels(visible, a.shape[2:]).expand_as(a)
        assert (a[~there] == 0).all()
        assert a[there].std() > 0


def test_a_patch_alone_gives_the_same_wherever_others_are_hidden():
    """Evaluation: what a visible patch becomes depends on visible patches alone, here on itself."""
    torch.manual_seed(0)
    encoder = make_sparse(make_encoder("resnet18"), "resnet18").eval()
    x = torch.randn(1, 3, 96, 96, generator=seeded())
    visible = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    visible[..., 1, 1] = True
    with torch.no_grad():
        with seeing(visible, (96, 96)) as seen:
            among = encoder(seen.hide(x))[-1][..., 1, 1]
        with seeing(visible[..., 1:2, 1:2], (32, 32)):
            alone = encoder(x[..., 32:64, 32:64])[-1][..., 0, 0]
    assert torch.allclose(among, alone, atol=1e-5)


def test_entries_and_dense_results_are_those_of_the_plain_encoder(masked):
    arch, encoder, x, _ = masked
    plain = make_encoder(arch, dims=x.ndim - 2)
    assert plain.state_dict().keys() == encoder.state_dict().keys()
    plain.load_state_dict({key: value.clone() for key, value in encoder.state_dict().items()})
    for a, b in zip(plain.train()(x), encoder.train()(x)):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(("shape", "grid"), [((4, 5, 8, 8), (2, 4)), ((3, 2, 4, 8, 6), (2, 2, 3))])
def test_batch_statistics_are_of_visible_positions(shape, grid):
    """Values, gradients and running averages are those of torch's norm of the visible positions as a list."""
    visible = chessboard(shape[0], grid)
    mask = on_pixels(visible, shape[2:])
    x = 3 + 2 * torch.randn(shape, generator=seeded()) * mask
    x = x * mask
    kind = nn.BatchNorm2d if len(grid) == 2 else nn.BatchNorm3d
    norm, listed = make_sparse(kind(shape[1]), "resnet18"), nn.BatchNorm1d(shape[1])
    with torch.no_grad():
        for layer in (norm, listed):
            layer.weight.copy_(torch.linspace(0.5, 2, shape[1]))
            layer.bias.copy_(torch.linspace(-1, 1, shape[1]))
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    with seeing(visible, shape[2:]):
        y = norm(one)
    rows = listed(two.movedim(1, -1)[mask[:, 0]])  # (visible positions, C)
    assert torch.allclose(y.movedim(1, -1)[mask[:, 0]], rows, atol=1e-5)
    assert (y * ~mask == 0).all()
    weights = torch.randn(rows.shape, generator=seeded(2))
    (y.movedim(1, -1)[mask[:, 0]] * weights).sum().backward()
    (rows * weights).sum().backward()
    assert torch.allclose(one.grad, two.grad, atol=1e-5)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.allclose(getattr(norm, name), getattr(listed, name), atol=1e-6), name
    by_hand = torch.stack([x[:, c][mask[:, 0]].mean() for c in range(shape[1])])
    assert torch.allclose(norm.running_mean, 0.1 * by_hand, atol=1e-6)


def test_statistics_keep_float32_under_autocast():
    norm = make_sparse(nn.BatchNorm2d(3), "resnet18")
    with torch.autocast("cpu", torch.bfloat16), seeing(torch.ones(2, 1, 2, 2, dtype=torch.bool), (8, 8)):
        assert norm(torch.randn(2, 3, 8, 8, dtype=torch.bfloat16, generator=seeded())).dtype == torch.bfloat16
    assert norm.running_mean.dtype == torch.float32


def test_threads_see_their_own_patches():
    """As DataParallel's replicas, which share hooks."""
    torch.manual_seed(0)
    encoder = make_sparse(make_encoder("resnet18"), "resnet18").eval()
    x, visible = torch.randn(2, 3, 64, 64, generator=seeded()), chessboard(2, (2, 2))
    both, out = threading.Barrier(2), {}

    def one(i):
        with seeing(visible[i : i + 1], (64, 64)) as seen, torch.no_grad():
            both.wait(60)  # each has set its own before either is used
            out[i] = encoder(seen.hide(x[i : i + 1]))[-1]

    threads = [threading.Thread(target=one, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with seeing(visible, (64, 64)) as seen, torch.no_grad():
        together = encoder(seen.hide(x))[-1]
    assert torch.allclose(torch.cat([out[0], out[1]]), together, atol=1e-5)


def test_small_patches_share_deep_positions():
    """A position is visible where any pixel under it is."""
    visible = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    visible[0, 0, 0, 1] = visible[0, 0, 3, 2] = True
    with seeing(visible, (64, 64)) as seen:
        assert seen.at((2, 2))[0, 0].tolist() == [[True, False], [False, True]]
        assert torch.equal(seen.at((4, 4)), visible)
        assert int(seen.at((64, 64)).sum()) == 2 * 16 * 16


@pytest.mark.parametrize("arch", ["timm-efficientnet-b0", "se_resnet50", "timm-skresnet18", "vgg11", "mit_b0"])
def test_other_encoders_are_refused(arch):
    with pytest.raises(InputError, match=rf"^--arch {arch}: its layers cannot leave hidden patches out; .*densenet121"):
        MAE(arch)


@pytest.mark.parametrize("norm", ["group", "instance"])
def test_other_norms_are_refused(norm):
    with pytest.raises(InputError, match="--arch unet3d: its layers cannot"):
        make_sparse(UNet3dEncoder(1, 16, norm), "unet3d")


# Loss ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sides", "grid"), [((6, 8), (3, 2)), ((4, 6, 2), (2, 3, 1))])
def test_patches_are_cut_and_joined(sides, grid):
    x = torch.randn(2, 3, *sides, generator=seeded())
    patches = cut_patches(x, grid)
    first = x[(slice(None), slice(None), *(slice(0, side // n) for side, n in zip(sides, grid)))]
    assert torch.equal(patches[:, :, 0], first.flatten(2))
    assert torch.equal(join_patches(patches, grid, sides), x)


def test_patches_are_normalised_one_by_one():
    patches = cut_patches(5 + 3 * torch.randn(2, 3, 8, 8, generator=seeded()), (2, 2))
    mean, deviation = patch_scale(patches)
    normal = (patches - mean) / deviation
    assert torch.allclose(normal.mean(3), torch.zeros(2, 3, 4), atol=1e-5)
    assert torch.allclose(normal.square().mean(3), torch.ones(2, 3, 4), atol=1e-4)
    flat = torch.full((1, 1, 1, 16), 7.0)
    assert torch.equal((flat - patch_scale(flat)[0]) / patch_scale(flat)[1], torch.zeros(1, 1, 1, 16))


def test_loss_by_hand():
    """An image of two patches, (0, 2) and (5, 5): the first is −1, 1 when normalised, the second 0, 0."""
    image = torch.tensor([[[[0.0, 2.0, 5.0, 5.0]]]])
    restored = torch.tensor([[[[0.0, 3.0, 4.0, 0.0]]]])
    errors = [((0 + 1) ** 2 + (3 - 1) ** 2) / 2, (4**2 + 0) / 2]
    for hidden, error in enumerate(errors):
        visible = torch.tensor([[[[hidden != 0, hidden != 1]]]])
        assert hidden_patch_error(restored, image, visible).item() == pytest.approx(error, rel=1e-4)
    zeros = hidden_patch_error(torch.zeros(2, 1, 8, 8), torch.randn(2, 1, 8, 8), chessboard(2, (2, 2)))
    assert zeros.item() == pytest.approx(1, rel=1e-4)


def test_visible_places_do_not_count():
    image, visible = torch.randn(2, 3, 8, 8, generator=seeded()), chessboard(2, (2, 2))
    restored = torch.randn(2, 3, 8, 8, generator=seeded(1))
    elsewhere = restored + 9 * on_pixels(visible, (8, 8))
    assert hidden_patch_error(restored, image, visible) == hidden_patch_error(elsewhere, image, visible)


def batch_of(dims, channels=3):
    shape = (2, channels, 64, 64) if dims == 2 else (2, 1, 16, 16, 16)
    return {"image": torch.randn(shape, generator=seeded()), "visible": chessboard(2, (2,) * dims)}


@pytest.mark.parametrize(("arch", "dims"), [("resnet18", 2), ("unet3d_quarter", 3)])
def test_restorations_do_not_know_hidden_pixels(arch, dims):
    torch.manual_seed(0)
    network, batch = MAE(arch, dims, 1).network.train(), batch_of(dims)
    hidden = ~on_pixels(batch["visible"], batch["image"].shape[2:])
    one = network(batch["image"], batch["visible"])
    two = copy.deepcopy(network)(batch["image"] + 5 * hidden, batch["visible"])
    assert torch.equal(one["restored"], two["restored"])
    assert one["restored"].shape == (2, 1, *batch["image"].shape[2:])


def test_features_are_means_over_visible_positions():
    torch.manual_seed(0)
    method, batch = MAE().eval(), batch_of(2)
    method(batch, Run())
    with seeing(batch["visible"], (64, 64)) as seen, torch.no_grad():
        deepest = method.network.encoder(seen.hide(batch["image"]))[-1]
    means = torch.stack([m[:, v[0]].mean(1) for m, v in zip(deepest, batch["visible"])])
    assert torch.allclose(method.features, means, atol=1e-6)


def test_every_parameter_learns():
    torch.manual_seed(0)
    for arch, dims in (("resnet18", 2), ("unet3d_quarter", 3)):
        method = MAE(arch, dims, 1)
        sum(method(batch_of(dims), Run()).values()).backward()
        assert all(p.grad is not None for p in method.parameters())


def test_pictures_paste_what_is_restored_in_hidden_places():
    torch.manual_seed(0)
    method, batch = MAE(channels=1).eval(), batch_of(2)
    with torch.no_grad():
        rows = method.pictures(batch)
    there = on_pixels(batch["visible"], (64, 64)).expand(-1, 3, -1, -1)
    assert list(rows) == ["image", "masked", "restored"]
    for name in ("masked", "restored"):
        assert torch.equal(rows[name][there], batch["image"][there])
    assert (rows["masked"][~there] == 0).all()
    assert (rows["restored"][~there] != batch["image"][~there]).float().mean() > 0.99


# Views and options ---------------------------------------------------------------------------------


def test_views_of_images():
    views = HiddenPatchViews(**IMAGENET_HALF, size=64, patch=16, mask_ratio=0.6)
    images = torch.randint(0, 256, (6, 1, 80, 80), dtype=torch.uint8, generator=seeded())
    batch = {"image": images, "size": torch.tensor([[80.0, 80.0]] * 6)}
    whole = views(batch, Draws((0, 1), 6))
    assert whole["image"].shape == (6, 3, 64, 64)
    assert whole["visible"].shape == (6, 1, 4, 4)
    assert whole["visible"].dtype == torch.bool
    assert whole["visible"].flatten(1).sum(1).tolist() == [6] * 6  # 10 of 16 are hidden
    assert len({tuple(row.tolist()) for row in whole["visible"].flatten(1)}) == 6
    part = views({key: value[2:4] for key, value in batch.items()}, Draws((0, 1), 6, 2, 2))
    for key, value in part.items():
        assert torch.equal(value, whole[key][2:4]), key  # the same, whatever the number of processes
    other = views(batch, Draws((0, 2), 6))
    assert not torch.equal(other["visible"], whole["visible"])


def test_views_of_volumes():
    """One of two prepared cubes, both of which are met, mirrored along every axis."""
    pairs = torch.rand(32, 2, 8, 8, 16, generator=seeded())
    views = HiddenPatchCubes((8, 8, 16), 4, 0.5, kind="unit")
    out = views({"image": pairs}, Draws((0, 1), 32))
    assert out["image"].shape == (32, 1, 8, 8, 16)
    assert out["visible"].shape == (32, 1, 2, 2, 4)
    assert out["visible"].flatten(1).sum(1).tolist() == [8] * 32
    found = set()
    for i in range(32):
        for which in (0, 1):
            for code in range(8):
                axes = [axis for axis in range(3) if code >> axis & 1]
                if torch.equal(out["image"][i, 0], pairs[i, which].flip(axes)):
                    found.add((which, code))
    assert {which for which, _ in found} == {0, 1}
    assert {axis for _, code in found for axis in range(3) if code >> axis & 1} == {0, 1, 2}
    normal = HiddenPatchCubes((8, 8, 16), 4, 0.5)({"image": pairs}, Draws((0, 1), 32))["image"]
    assert torch.allclose(normal.mean((1, 2, 3, 4)), torch.zeros(32), atol=1e-5)


@pytest.mark.parametrize(
    ("sides", "patch"), [((224, 224), 32), ((128, 128), 32), ((64, 64), 16), ((32, 32), 8), ((64, 64, 32), 8),
                         ((16, 16, 8), 4)],
)  # fmt: skip
def test_patches_fit_the_image(sides, patch):
    assert choose_patch("--image-size", sides, None, 0.6) == patch


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--image-size", "100"], "--image-size 100: sides must be multiples of 32, the encoder's stride"),
        (["--d", "3", "--cube-size", "16", "16", "12"], "--cube-size 16 16 12: sides must be multiples of 8, the"),
        (["--image-size", "64", "--patch", "24"], "--patch 24: give 2 or more that divide --image-size 64, such as"),
        (["--image-size", "64", "--patch", "1"], "--patch 1: give 2 or more"),
        (["--mask-ratio", "0"], "--mask-ratio 0: hides 0 of 49 patches; give a share that leaves both kinds"),
        (["--mask-ratio", "1"], "--mask-ratio 1: hides 49 of 49 patches"),
        (["--d", "3", "--image-size", "64"], "--image-size: is for images, and phantom3d has 3 dimensions"),
        (["--arch", "timm-efficientnet-b0"], "--arch timm-efficientnet-b0: its layers cannot leave hidden patches out"),
    ],
)
def test_refusals(words, message, tmp_path):
    with pytest.raises(InputError) as error:
        main([*words, "--device", "cpu", "--output", str(tmp_path / "out")])
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


RUNS = {
    2: ["--arch", "resnet18", "--image-size", "32", "--b", "8", "--texture-size", "32"],
    3: ["--d", "3", "--arch", "unet3d_quarter", "--cube-size", "16", "16", "8", "--b", "4"],
}


@pytest.mark.parametrize("dims", RUNS)
def test_a_run_continues(dims, tmp_path, capsys):
    """Stopped after one step of two: the same as without a stop."""
    words = [*RUNS[dims], "--device", "cpu", "--workers", "0", "--log-every", "1", "--epochs", "5"]
    for name, steps in (("whole", ["2"]), ("halves", ["1", "2"])):
        for count in steps:
            main([*words, "--steps", count, "--output", str(tmp_path / name)])
    size = {2: "--image-size: too small for patches of 32; hiding patches of 8; deep layers",
            3: "--cube-size: too small for patches of 8; hiding patches of 4; deep layers"}[dims]  # fmt: skip
    assert f"note: {size}" in capsys.readouterr().err
    one, two = (load_safe(tmp_path / name / "last.pt")["method"] for name in ("whole", "halves"))
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    saved = load_safe(tmp_path / "whole" / "encoder.pt")
    plain = make_encoder(saved["arch"], dims=dims)
    assert saved["state_dict"].keys() == plain.state_dict().keys()
    assert saved["method"] == "MAE"
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["restoration"] > 0 for line in lines)
    assert (tmp_path / "whole" / "samples" / "step_0000002.png").exists()


def test_grey_images_are_restored_in_one_channel(tmp_path):
    main([*RUNS[2], "--device", "cpu", "--workers", "0", "--steps", "1", "--output", str(tmp_path)])
    state = load_safe(tmp_path / "last.pt")["method"]
    assert len(state["network.output.weight"]) == 1
