"""The 3D U-Net: shapes, key names, the joined up-sampling, odd sizes, and what `--arch` and `--init` make of it."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from medssl.errors import InputError
from medssl.models import unet3d
from medssl.models.encoders import initialise, initialise_unet, make_encoder
from medssl.models.pcrlv2_model_3d import PCRLv23d
from medssl.models.unet3d import UNet3d, UNet3dEncoder, joining_pays, up_and_convolve

PUBLISHED = json.loads((Path(__file__).parent / "parity" / "pcrlv2_3d.json").read_text())["state_dict"]


def test_encoder_has_the_published_names():
    ours = {key: list(value.shape) for key, value in UNet3dEncoder().state_dict().items()}
    assert ours == {key: shape for key, shape in PUBLISHED.items() if key.startswith("down_tr")}


def test_skips_change_one_kernel_a_level():
    shapes = {key: list(value.shape) for key, value in UNet3d().state_dict().items()}
    assert shapes.keys() < PUBLISHED.keys()
    changed = {key: shape for key, shape in shapes.items() if shape != PUBLISHED[key]}
    assert changed == {  # as 3D PCRL and Models Genesis have them
        "up_tr256.ops.0.conv1.weight": [256, 768, 3, 3, 3],
        "up_tr128.ops.0.conv1.weight": [128, 384, 3, 3, 3],
        "up_tr64.ops.0.conv1.weight": [64, 192, 3, 3, 3],
    }


@pytest.mark.parametrize(("arch", "width"), [("unet3d", 64), ("unet3d_half", 32), ("unet3d_quarter", 16)])
def test_encoder_protocol(arch, width):
    encoder = make_encoder(arch, dims=3)
    assert encoder.out_channels == (width, 2 * width, 4 * width, 8 * width)
    maps = encoder(torch.rand(2, 1, 16, 16, 8))
    assert [tuple(m.shape) for m in maps] == [(2, width << i, 16 >> i, 16 >> i, 8 >> i) for i in range(4)]


@pytest.mark.parametrize("norm", ["batch", "group", "instance"])
@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("size", [(16, 16, 8), (13, 18, 11)])
def test_output_has_the_inputs_size(norm, skips, size):
    torch.manual_seed(0)
    network = UNet3d(labels=3, skips=skips, channels=2, width=16, norm=norm)
    kinds = {type(module) for module in network.modules()}
    wanted = {"batch": nn.BatchNorm3d, "group": nn.GroupNorm, "instance": nn.InstanceNorm3d}
    assert kinds & set(wanted.values()) == {wanted[norm]}
    y = network(torch.randn(2, 2, *size))
    assert y.shape == (2, 3, *size)
    y.square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in network.parameters())


def test_skips_matter():
    torch.manual_seed(0)
    network = UNet3d(width=16).eval()
    features = network.encode(torch.randn(1, 1, 16, 16, 16))
    level = network.decode(features)[-1]
    features[0] = features[0] + 1
    assert not torch.allclose(network.decode(features)[-1], level, atol=1e-3)
    network.skips = False
    assert len(UNet3d(skips=False, width=16).decode(features, depth=2)) == 2


@pytest.mark.parametrize("skip_channels", [0, 4])
def test_joined_is_one_after_the_other(skip_channels):
    """Value and gradients, in float64, of the interior and of the border, where the padding cuts the first bias off."""
    torch.manual_seed(0)
    up = nn.ConvTranspose3d(6, 5, 2, stride=2).double()
    conv = nn.Conv3d(5 + skip_channels, 3, 3, padding=1).double()
    x = torch.randn(2, 6, 4, 3, 2, dtype=torch.double, requires_grad=True)
    skip = torch.randn(2, skip_channels, 8, 6, 4, dtype=torch.double) if skip_channels else None
    inputs = [x, *up.parameters(), *conv.parameters()]
    joined = up_and_convolve(x, up, conv, skip)
    plain = conv(up(x) if skip is None else torch.cat([up(x), skip], 1))
    assert torch.allclose(joined, plain, atol=1e-12)
    weights = torch.randn_like(plain)
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), inputs) for y in (joined, plain))):
        assert torch.allclose(a, b, atol=1e-11)


@pytest.mark.parametrize("skips", [True, False])
def test_network_is_the_same_joined_or_not(monkeypatch, skips):
    torch.manual_seed(0)
    network = UNet3d(skips=skips, width=16).double()
    x = torch.randn(2, 1, 16, 16, 8, dtype=torch.double)
    outputs = []
    for cost, joins in ((0, True), (float("inf"), False)):
        monkeypatch.setattr(unet3d, "JOINING_COST", cost)
        block = network.up_tr64
        assert joining_pays(block.up_conv, block.ops[0].conv1, 2, (16, 16, 8)) is joins
        outputs.append(network(x))
    assert torch.allclose(*outputs, atol=1e-10)


def test_joining_pays_where_maps_are_large():
    network = UNet3d(skips=False)
    deep, shallow = network.up_tr256, network.up_tr64
    assert joining_pays(shallow.up_conv, shallow.ops[0].conv1, 2, (64, 64, 32))
    assert not joining_pays(deep.up_conv, deep.ops[0].conv1, 2, (16, 16, 8))
    assert joining_pays(deep.up_conv, deep.ops[0].conv1, 32, (16, 16, 8))


@pytest.mark.parametrize("size", [(2, 2, 2), (2, 5, 3), (4, 2, 2)])
def test_small_maps_have_a_gradient_in_bfloat16(size):
    """oneDNN leaves parts of it as the memory was, so the memory is filled with NaN first."""
    torch.manual_seed(0)
    layer = unet3d.Conv3d(16, 32).to(memory_format=torch.channels_last_3d)
    x, weights = torch.randn(3, 16, *size), torch.randn(3, 32, *size)
    (layer(x) * weights).sum().backward()
    exact = layer.weight.grad.clone()
    for _ in range(5):
        layer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        unset = [torch.full((2**k,), torch.nan, dtype=t) for t in (torch.float, torch.bfloat16) for k in range(6, 18)]
        del unset
        (y * weights).sum().backward()
        assert (layer.weight.grad - exact).norm() < 0.02 * exact.norm()


def test_encoder_shares_the_layers():
    network = PCRLv23d(width=16)
    encoder = network.encoder
    assert type(encoder) is UNet3dEncoder
    assert {id(p) for p in encoder.parameters()} < {id(p) for p in network.parameters()}
    x = torch.randn(2, 1, 16, 16, 8)
    assert all(torch.equal(a, b) for a, b in zip(encoder(x), network.encode(x)))


# --arch and --init ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(1)
    return PCRLv23d(width=16)


def saved(tmp_path, content):
    torch.save(content, tmp_path / "weights.pt")
    return str(tmp_path / "weights.pt")


def loads(path, arch="unet3d_quarter", channels=None):
    encoder = make_encoder(arch, channels, dims=3)
    return encoder, initialise(encoder, arch, path)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("bare", [True, False])
def test_published_files_load(tmp_path, network, prefix, bare):
    state = {prefix + key: value for key, value in network.state_dict().items()}
    encoder, report = loads(saved(tmp_path, state if bare else {"state_dict": state, "epoch": 3}))
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in encoder.state_dict().items())
    assert (report["matched"], report["missing"]) == (48, 0)
    assert report["normalization"] == {"kind": "z"}


def test_whole_networks_load_too(tmp_path, network):
    """A network without skips takes the way up from a pre-trained one too."""
    whole = UNet3d(skips=False, width=16)
    path = saved(tmp_path, {"state_dict": network.state_dict()})
    report = initialise_unet(whole, "unet3d_quarter", path, "encoder+decoder")
    assert report["missing"] == 0
    assert torch.equal(whole.up_tr64.up_conv.weight, network.up_tr64.up_conv.weight)


def test_several_channels_repeat_the_first_kernel(tmp_path, network):
    encoder, report = loads(saved(tmp_path, network.state_dict()), channels=4)
    assert report["missing"] == 0
    x = torch.randn(2, 1, 8, 8, 8)
    one = network.down_tr64.ops[0].conv1(x)
    assert torch.allclose(encoder.down_tr64.ops[0].conv1(x.expand(-1, 4, -1, -1, -1)), one, atol=1e-5)


def refusal(function, *arguments):
    with pytest.raises(InputError) as error:
        function(*arguments)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_wrong_dimensions_are_refused(tmp_path, network):
    flat = make_encoder("resnet18")
    published = saved(tmp_path, {"state_dict": network.state_dict()})
    assert "a 3-dimensional encoder, 2 are needed" in refusal(initialise, flat, "resnet18", published)
    ours = {"state_dict": network.state_dict(), "arch": "unet3d_quarter", "dims": 3}
    assert "a 3-dimensional encoder, 2 are needed" in refusal(initialise, flat, "resnet18", saved(tmp_path, ours))
    assert "a 2-dimensional encoder, 3 are needed" in refusal(loads, saved(tmp_path, flat.state_dict()))
    assert "--arch unet3d: a 3-dimensional encoder" in refusal(make_encoder, "unet3d")
    assert "--arch resnet18: no 3-dimensional encoder; there are unet3d" in refusal(make_encoder, "resnet18", None, 3)
    assert "no ImageNet weights for unet3d" in refusal(loads, "imagenet", "unet3d")


def test_another_width_is_refused(tmp_path, network):
    bare = saved(tmp_path, network.state_dict())
    assert "unet3d_half needs (16, 1, 3, 3, 3); another architecture" in refusal(loads, bare, "unet3d_half")
    ours = {"state_dict": network.state_dict(), "arch": "unet3d_quarter", "dims": 3}
    assert "holds a unet3d_quarter encoder; add --arch unet3d_quarter" in refusal(
        loads, saved(tmp_path, ours), "unet3d_half"
    )


def test_random_needs_no_file():
    _, report = loads("random")
    assert report["normalization"] == {"kind": "z"}
    assert report["matched"] == 0
