"""PCRLv2: the numbers of the published implementation, and the files it leaves and reads."""

import argparse
import json
import os
import re

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
import torchvision
from parity_tools import assert_close, deterministic, published
from PIL import Image

from medssl import train_pcrlv2
from medssl.datasets.base import ImageDataset, Info
from medssl.engine.checkpoint import load_safe
from medssl.engine.export import export_encoder
from medssl.engine.monitor import middle_slices, stretch
from medssl.engine.options import complete
from medssl.engine.parallel import Run
from medssl.engine.plain_pickle import Inert
from medssl.errors import InputError
from medssl.losses.contrastive import negative_cosine
from medssl.models.encoders import IMAGENET, initialise, initialise_unet, make_encoder
from medssl.models.pcrlv2_model_3d import PCRLv23d
from medssl.models.unet3d import UNet3d
from medssl.train_pcrlv2 import DEFAULTS, PCRLv2, get_parser, main
from medssl.views.of_images import MultiCropViews

PUBLISHED, PUBLISHED_3D = published("pcrlv2_2d"), published("pcrlv2_3d")


def published_key(key):
    """Our key of `PCRLv2.network` → the key in the published implementation."""
    key = re.sub(r"^heads\.(\d)\.norm\.", r"decoder.blocks.\1.bn.", key)
    key = re.sub(r"^heads\.(\d)\.predictor\.", r"decoder.blocks.\1.predictor_head.", key)
    key = re.sub(r"^heads\.(\d)\.restore\.", r"decoder.blocks.\1.deep_supervision_head.", key)
    key = re.sub(r"^output\.", "segmentation_head.0.", key)
    return "model." + key


LOSSES = {"restoration": "recon", "intermediate": "intermediate", "siamese": "siamese", "local": "local"}


def assert_published_losses(method, batch, published, rename=lambda key: key):
    """Compare losses to 1e-4 → losses, gradients by published key."""
    losses = method(batch, Run(), published["levels_drawn"]["values"])
    assert set(losses) == set(LOSSES)
    for ours, theirs in LOSSES.items():
        assert losses[ours].item() == pytest.approx(published["loss"][theirs], rel=1e-4, abs=1e-6), ours
    total = sum(losses.values())
    assert total.item() == pytest.approx(published["loss"]["total"], rel=1e-4)
    total.backward()
    gradients = {rename(key): p.grad for key, p in method.network.named_parameters()}
    assert len(published["gradients"]) == 3
    return losses, gradients


def distance(gradient, stored):
    """L2 distance from a stored gradient's entries, relative to them."""
    ours, theirs = (torch.tensor(digest["entries"]) for digest in (deterministic.digest(gradient), stored))
    return float((ours - theirs).norm() / theirs.norm())


def tolerance(restored, stored):
    """Of outputs behind batch norms over two samples, which amplify rounding: 1e-4 where this machine and torch round
    nearly as those that measured, elsewhere 5e-3. In float64 the published predictions are 2.1e-3 away, with torch 2.6
    3.1e-3."""
    ours = deterministic.digest(restored)["entries"]
    return 1e-4 if max(abs(a - b) for a, b in zip(ours, stored["entries"])) < 3e-5 * stored["std"] else 5e-3


@pytest.fixture
def method():
    method = PCRLv2()
    deterministic.fill(method.network, rename=published_key)
    return method.train()


@pytest.fixture(scope="module")
def batch():
    shapes = PUBLISHED["inputs"]
    make = {n: torch.from_numpy(deterministic.values(n, tuple(shapes[n]))) for n in ("x1", "x2", "gt")}
    local = [torch.from_numpy(deterministic.values(f"local{v}", tuple(shapes["local"]))) for v in range(6)]
    return {"view1": make["x1"], "view2": make["x2"], "target": make["gt"], "locals": torch.cat(local)}


# Parity --------------------------------------------------------------------------------------------


def test_state_dict_is_the_published_one(method):
    ours = {published_key(k): list(v.shape) for k, v in method.network.state_dict().items()}
    assert ours == PUBLISHED["state_dict"]


def test_outputs_are_the_published_ones(method, batch):
    out = method.network(batch["view1"], range(5), restore=PUBLISHED["levels_drawn"]["values"][0])
    near = tolerance(out["restored"], PUBLISHED["reconstruction"])
    assert_close(out["restored"], PUBLISHED["reconstruction"], "restored", near)
    for level in range(5):
        assert_close(out[f"p{level}"], PUBLISHED["projections"][level], f"p{level}", near)
        assert_close(out[f"q{level}"], PUBLISHED["predictions"][level], f"q{level}", near)
        restored = method.network(batch["view1"], [level], restore=level)["intermediate"]
        assert_close(restored, PUBLISHED["intermediate"][level], f"intermediate {level}", near)


@pytest.fixture
def two_threads():
    """As many as the published numbers were measured with."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_losses_and_gradients_are_the_published_ones(method, batch, two_threads):
    losses, gradients = assert_published_losses(method, batch, PUBLISHED, published_key)
    # Batch norms over two samples make these gradients ill-conditioned: in float64 they are 3 % away (L2) from the
    # published ones. Where this machine rounds as the one that measured, they must agree to 1e-4; elsewhere to 8 %.
    # A forgotten stop-gradient is 19 %.
    same_rounding = all(abs(losses[a].item() - PUBLISHED["loss"][b]) < 3e-9 for a, b in LOSSES.items())
    for key, stored in PUBLISHED["gradients"].items():
        assert distance(gradients[key], stored) < 0.08, key
        if same_rounding:
            assert_close(gradients[key], stored, key)


def test_levels_matter(method, batch):
    """Other levels give other losses, so the parity above pins their order."""
    levels = list(PUBLISHED["levels_drawn"]["values"])
    levels[1], levels[2] = levels[2], levels[1]
    swapped = method(batch, Run(), levels=levels)["local"].item()
    assert swapped != pytest.approx(PUBLISHED["loss"]["local"], rel=1e-2)


def test_undrawn_levels_change_nothing(method, batch):
    """Leaving out heads that no loss needs gives the losses of computing all of them."""
    levels = [2, 0, 1, 1, 0, 2, 2, 0, 0, 1, 1, 2, 0]
    losses = method(batch, Run(), levels=levels)
    full = PCRLv2()
    deterministic.fill(full.network, rename=published_key)
    x1, x2, small = (full.train().network(batch[k], range(5), restore=2) for k in ("view1", "view2", "locals"))

    def s(a, b, level, v=None):
        b = {k: b[k] if v is None else b[k].chunk(6)[v] for k in (f"q{level}", f"p{level}")}
        return negative_cosine(a[f"q{level}"], a[f"p{level}"], b[f"q{level}"], b[f"p{level}"])

    terms = [s(x, small, levels[1 + 2 * v + i], v) for v in range(6) for i, x in enumerate((x1, x2))]
    assert losses["siamese"].item() == pytest.approx(s(x1, x2, 2).item(), abs=1e-6)
    assert losses["local"].item() == pytest.approx(sum(terms).item() / 12, abs=1e-6)
    assert losses["intermediate"].item() == pytest.approx(
        F.mse_loss(x1["intermediate"], batch["target"]).item(), rel=1e-5
    )
    sum(losses.values()).backward()
    unused = [p.grad for i in (3, 4) for p in method.network.heads[i].parameters()]
    assert unused
    assert all(g is None for g in unused)


def test_levels_are_drawn_for_every_call():
    method = PCRLv2()
    draws = [method.draw_levels(torch.Generator().manual_seed(seed)) for seed in range(200)]
    assert all(len(d) == 13 for d in draws)
    assert draws[3] == method.draw_levels(torch.Generator().manual_seed(3))
    counts = torch.bincount(torch.tensor(draws).flatten(), minlength=5) / (200 * 13)
    assert counts.shape == (5,)
    assert ((counts - 0.2).abs() < 0.05).all()
    for place in range(13):
        assert len({d[place] for d in draws}) == 5


def test_negative_cosine_by_hand():
    a, b = torch.tensor([[1.0, 0], [3, 4]]), torch.tensor([[0.0, 2], [4, 3]])
    c, d = torch.tensor([[1.0, 1], [0, 1]]), torch.tensor([[-1.0, 0], [0, 5]])
    # cos(q_a, p_b) = −1 and .8; cos(q_b, p_a) = 1/√2 and .6
    expected = -0.5 * ((-1 + 0.8) / 2 + (0.5**0.5 + 0.6) / 2)
    assert negative_cosine(a, b, c, d).item() == pytest.approx(expected, abs=1e-6)
    b.requires_grad_()
    a.requires_grad_()
    negative_cosine(a, b, c, d).backward()
    assert b.grad is None  # stop-gradient
    assert a.grad.abs().sum() > 0


def test_beta_follows_the_run(method, batch):
    levels = PUBLISHED["levels_drawn"]["values"]
    whole = PUBLISHED["loss"]["intermediate"]
    for progress, beta in ((0.25, 0.8535534), (0.5, 0.5), (1.0, 0.0)):
        method.after_step(progress)
        assert method(batch, Run(), levels)["intermediate"].item() == pytest.approx(beta * whole, rel=1e-4, abs=1e-6)


def test_without_local_views(batch):
    method = PCRLv2(locals_=0)
    losses = method({k: batch[k] for k in ("view1", "view2", "target")}, Run())
    assert set(losses) == {"restoration", "intermediate", "siamese"}


@pytest.mark.parametrize("side", [64, 50])
def test_restorations_have_the_inputs_size(side):
    method = PCRLv2().eval()
    x = torch.rand(2, 3, side, side)
    out = method.network(x, [0], restore=0)
    assert out["restored"].shape == out["intermediate"].shape == x.shape


# Parity in three dimensions ------------------------------------------------------------------------


@pytest.fixture
def method3d():
    method = PCRLv2("unet3d", dims=3)
    deterministic.fill(method.network)  # the keys are the published ones
    return method.train()


@pytest.fixture(scope="module")
def batch3d():
    shapes = {name: tuple(shape) for name, shape in PUBLISHED_3D["inputs"].items() if name not in ("names", "tag")}
    x1, x2, target = (torch.from_numpy(deterministic.values(name, shapes[name])) for name in ("x1", "x2", "gt"))
    local = [torch.from_numpy(deterministic.values(f"local{v}", shapes["local"])) for v in range(6)]
    return {"view1": x1, "view2": x2, "target": target, "locals": torch.cat(local)}


def test_3d_state_dict_is_the_published_one(method3d):
    ours = {key: list(value.shape) for key, value in method3d.network.state_dict().items()}
    assert ours == PUBLISHED_3D["state_dict"]
    assert list(PCRLv23d().state_dict()) == list(ours)
    assert method3d.encoder_state().keys() == ours.keys()


def test_3d_outputs_are_the_published_ones(method3d, batch3d):
    out = method3d.network(batch3d["view1"], restore=1)
    near = 1e-3  # as in 2D, but the network is shallow: with torch 2.6, 2e-4
    assert_close(out["restored"], PUBLISHED_3D["reconstruction"], "restored")
    for level in range(3):
        assert_close(out[f"p{level}"], PUBLISHED_3D["projections"][level], f"p{level}", near)
        assert_close(out[f"q{level}"], PUBLISHED_3D["predictions"][level], f"q{level}", near)
        restored = method3d.network(batch3d["view1"], [level], restore=level)["intermediate"]
        assert_close(restored, PUBLISHED_3D["intermediate"][level], f"intermediate {level}", near)


def test_3d_losses_and_gradients_are_the_published_ones(method3d, batch3d):
    _, gradients = assert_published_losses(method3d, batch3d, PUBLISHED_3D)
    published = dict(PUBLISHED_3D["gradients"])
    # A bias before a batch norm has no effect: what is stored of its gradient is rounding.
    del published["down_tr64.ops.0.conv1.bias"]
    bias, weight = (gradients[f"down_tr64.ops.0.conv1.{name}"] for name in ("bias", "weight"))
    assert bias.norm() < 1e-3 * weight.norm()
    for key, stored in published.items():
        # Batch norms over two samples amplify rounding: layer by layer as published they are 3e-5 away, with
        # up-sampling and convolution joined 3e-4, with torch 2.6 3e-3.
        assert distance(gradients[key], stored) < 1e-2, key


def test_3d_computes_what_is_drawn_only(batch3d):
    method = PCRLv2("unet3d_quarter", dims=3)
    sum(method(batch3d, Run(), [0] * 13).values()).backward()
    network = method.network
    undrawn = [p for block in (network.up_tr128, network.up_tr64) for p in block.predictor_head.parameters()]
    undrawn += [p for block in (network.up_tr128, network.up_tr64) for p in block.deep_supervision_head.parameters()]
    assert all(p.grad is None for p in undrawn)
    assert network.up_tr256.deep_supervision_head.conv1.weight.grad is not None
    assert network.up_tr64.ops[1].conv1.weight.grad is not None  # the full restoration needs it
    called = []
    network.up_tr128.register_forward_hook(lambda *_: called.append(1))
    network(batch3d["view2"], [0])
    assert not called
    assert {n for _ in range(50) for n in method.draw_levels(None)} == {0, 1, 2}


class Cubes(ImageDataset):
    """Prepared pairs of random cubes."""

    def load(self, i):
        generator = torch.Generator().manual_seed(i)
        shapes = {"image": (2, 16, 16, 8), "locals": (2, 8, 8, 8)}
        return {name: torch.rand(shape, generator=generator).half() for name, shape in shapes.items()}


SMALL_3D = ["--arch", "unet3d_quarter", "--b", "2", "--local-views", "2", "--cube-size", "16", "16", "8"]
SMALL_3D += ["--local-cube-size", "8", "8", "8", "--workers", "0", "--device", "cpu", "--log-every", "1"]


@pytest.fixture
def cubes(monkeypatch):
    data = Cubes(Info("cubes", dims=3), None, [f"cube{i}" for i in range(6)])
    monkeypatch.setattr(train_pcrlv2, "open_pretraining", lambda args, dims=(2, 3): data)


def test_3d_run(tmp_path, cubes):
    out = tmp_path / "out"
    main([*SMALL_3D, "--steps", "2", "--output", str(out)])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["lr"] == pytest.approx(1e-3, rel=1e-3)  # the published one of three dimensions
    assert lines[0]["loss"] == pytest.approx(sum(lines[0][key] for key in LOSSES))
    pictures = sorted((out / "samples").glob("*.png"))
    assert len(pictures) == 2
    assert np.asarray(Image.open(pictures[1]))[:, 92:].std() > 20
    content = load_safe(out / "encoder.pt")
    assert (content["arch"], content["dims"], content["channels"]) == ("unet3d_quarter", 3, 1)
    assert content["normalization"] == {"kind": "z"}
    PCRLv23d(width=16).load_state_dict(content["state_dict"], strict=True)
    # The same command continues; --init takes the export.
    main([*SMALL_3D, "--steps", "3", "--output", str(out)])
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 3
    main([*SMALL_3D, "--steps", "1", "--output", str(tmp_path / "again"), "--init", str(out / "encoder.pt")])


def test_3d_skips_make_the_network_that_of_segmentation(tmp_path, cubes):
    command = [*SMALL_3D, "--steps", "2", "--decoder-skips", "--output", str(tmp_path)]
    main(command)
    saved = load_safe(tmp_path / "encoder.pt")["state_dict"]
    PCRLv23d(width=16, skips=True).load_state_dict(saved, strict=True)
    network = UNet3d(3, width=16)
    report = initialise_unet(network, "unet3d_quarter", str(tmp_path / "encoder.pt"), "encoder+decoder")
    taken = {key: value for key, value in network.state_dict().items() if not key.startswith("out_tr.")}
    assert report["missing"] == 0
    assert all(torch.equal(saved[key], value) for key, value in taken.items())
    with pytest.raises(InputError, match="was started with decoder_skips True, now False"):
        main([word for word in command if word != "--decoder-skips"])


def test_3d_refusals(tmp_path, cubes):
    output = ["--output", str(tmp_path)]
    with pytest.raises(InputError, match="--arch resnet18: no 3-dimensional encoder"):
        main([*SMALL_3D, "--arch", "resnet18", *output])
    with pytest.raises(InputError, match="--init imagenet: there are no ImageNet weights for unet3d_quarter"):
        main([*SMALL_3D, "--init", "imagenet", *output])
    with pytest.raises(InputError, match="--local-cube-size 8 8 4: the 3D U-Net needs sides of at least 8"):
        main([*SMALL_3D, "--local-cube-size", "8", "8", "4", *output])
    with pytest.raises(InputError, match=r"--mask-ratio 0.1: hides 0 of 4 patches"):
        main([*SMALL_3D, "--mask-ratio", "0.1", *output])
    assert not list(tmp_path.iterdir())


def test_slices_are_shown_as_radiologists_look_at_them():
    """Axes point to the patient's left, back and head."""
    volume = torch.zeros(1, 1, 6, 8, 4)
    volume[0, 0, 5, 4, 2] = 0.2  # left end of the middle row
    volume[0, 0, 3, 7, 2] = 0.4  # back
    volume[0, 0, 3, 4, 3] = 0.6  # head
    picture = middle_slices(volume)[0, 0]
    assert picture.shape == (8, 2 * 6 + 8 + 2)  # axial, coronal (with the x axis across), sagittal (y across)
    axial, coronal, sagittal = picture[:, :6], picture[:, 7:13], picture[:, 14:]
    assert axial[4, 5] == pytest.approx(0.2)  # left is on the right
    assert axial[7, 3] == pytest.approx(0.4)  # back is down
    assert coronal[1, 5] == pytest.approx(0.2)  # z = 2 of 4 is the second row from the top
    assert coronal[0, 3] == sagittal[0, 4] == pytest.approx(0.6)  # the head is up
    assert sagittal[1, 7] == pytest.approx(0.4)  # the back is on the right
    assert (coronal[4:] == 1).all()  # paper below the lower slices


def test_normalised_volumes_are_stretched():
    unit = torch.rand(1, 1, 8, 8, 8).repeat(2, 1, 1, 1, 1)
    assert stretch(unit) is unit
    normalised = (unit - 0.5) * torch.tensor([1.0, 7.0]).view(2, 1, 1, 1, 1)
    shown = stretch(normalised)
    assert (shown.amin((1, 2, 3, 4)) == 0).all()
    assert (shown.amax((1, 2, 3, 4)) == 1).all()
    assert torch.allclose(shown[0], shown[1], atol=1e-5)
    assert stretch(torch.full((1, 1, 8, 8, 8), -2.0)).isfinite().all()


# Files ---------------------------------------------------------------------------------------------


@pytest.fixture
def exported(tmp_path, method):
    args = argparse.Namespace(arch="resnet18")
    export_encoder(method, MultiCropViews(**IMAGENET), args, Info("x"), tmp_path)
    return tmp_path / "encoder.pt"


def test_export_loads_into_other_libraries(exported, method, batch):
    content = torch.load(exported, weights_only=True)
    assert set(content) == {"state_dict", "arch", "dims", "channels", "method", "normalization", "version"}
    assert (content["arch"], content["dims"], content["method"]) == ("resnet18", 2, "PCRLv2")
    unet = smp.Unet("resnet18", encoder_weights=None)
    unet.encoder.load_state_dict(content["state_dict"], strict=True)
    resnet = torchvision.models.resnet18()
    resnet.fc = torch.nn.Identity()
    resnet.load_state_dict(content["state_dict"], strict=True)
    method.eval()
    with torch.no_grad():
        ours = method.network.encoder(batch["view1"])
        theirs = unet.encoder.eval()(batch["view1"])
        pooled = resnet.eval()(batch["view1"])
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    assert torch.allclose(ours[-1].mean((2, 3)), pooled, atol=1e-5)
    assert ours[-1].std() > 0.01


def loads(path, arch="resnet18"):
    """An encoder initialised from a file, and the report."""
    encoder = make_encoder(arch)
    return encoder, initialise(encoder, arch, str(path))


def same(encoder, method):
    theirs = method.network.encoder.state_dict()
    return all(torch.equal(v, theirs[k]) for k, v in encoder.state_dict().items())


def test_init_from_the_export(exported, method, capsys):
    encoder, report = loads(exported)
    assert same(encoder, method)
    assert (report["missing"], report["unexpected"]) == (0, 0)
    assert report["matched"] == 100
    assert report["normalization"] == IMAGENET
    assert "100 of 100 encoder entries matched, 0 missing, 0 unexpected" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "prefix"),
    [
        ("state_dict", ""),
        ("state_dict", "encoder."),
        ("state_dict", "module.encoder."),
        ("model", "encoder.module."),
        ("state_dict", "module."),
        ("model", "model.encoder."),
        ("state_dict", "module.model.encoder."),
        ("state_dict", "backbone."),
        (None, ""),
        (None, "module.encoder."),
    ],
)
def test_published_files_load(tmp_path, method, prefix, key):
    state = {prefix + k: v for k, v in method.network.encoder.state_dict().items()}
    state["decoder.blocks.0.conv1.0.weight"] = torch.zeros(3)
    content = state if key is None else {key: state, "opt": argparse.Namespace(lr=0.01, gpus="0,1"), "epoch": 3}
    torch.save(content, tmp_path / "published.pt")
    encoder, report = loads(tmp_path / "published.pt")
    assert same(encoder, method)
    assert (report["matched"], report["missing"]) == (100, 0)


def test_missing_and_unexpected_are_said(tmp_path, method, capsys):
    state = method.network.encoder.state_dict()
    del state["conv1.weight"]
    state["fc.weight"] = torch.zeros(2, 2)
    torch.save(state, tmp_path / "part.pt")
    _, report = loads(tmp_path / "part.pt")
    assert (report["matched"], report["missing"], report["unexpected"]) == (99, 1, 1)
    assert "missing: conv1.weight" in capsys.readouterr().out


class Malicious:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def refuse(path, arch="resnet18"):
    """The message with which a file is refused, after checking that nothing was loaded."""
    encoder = make_encoder(arch)
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    with pytest.raises(InputError) as error:
        initialise(encoder, arch, str(path))
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_malicious_pickle_is_refused(tmp_path, method):
    witness = tmp_path / "witness"
    state = method.network.encoder.state_dict()
    for legacy in (False, True):
        path = tmp_path / f"malicious{legacy}.pt"
        content = {"state_dict": state, "opt": Malicious(f"touch {witness}")}
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        assert "wants to run code" in refuse(path)
        assert not witness.exists()
    torch.load(path, weights_only=False)
    assert witness.exists()  # the file is really malicious


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_truncated_files_are_refused(tmp_path, method, legacy, share):
    path = tmp_path / "cut.pt"
    torch.save(method.network.encoder.state_dict(), path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    assert "not a checkpoint, or a truncated one" in refuse(path)


def test_other_files_are_refused(tmp_path, method, exported):
    text = tmp_path / "notes.txt"
    text.write_text("not a checkpoint\n" * 100)
    assert "not a checkpoint" in refuse(text)
    assert "no such checkpoint" in refuse(tmp_path / "absent.pt")
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    assert "no state dict" in refuse(tmp_path / "empty.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    assert "no state dict" in refuse(tmp_path / "list.pt")
    torch.save({"a.weight": torch.zeros(3)}, tmp_path / "other.pt")
    assert "no entry fits resnet18; first key is a.weight" in refuse(tmp_path / "other.pt")
    assert "holds a resnet18 encoder; add --arch resnet18" in refuse(exported, "resnet50")
    volume = load_safe(exported) | {"dims": 3}
    torch.save(volume, tmp_path / "volume.pt")
    assert "3-dimensional encoder, 2 are needed" in refuse(tmp_path / "volume.pt")
    torch.save(method.network.encoder.state_dict(), tmp_path / "bare.pt")
    assert "another architecture? see --arch" in refuse(tmp_path / "bare.pt", "resnet50")


def test_unknown_architecture():
    with pytest.raises(InputError, match="--arch resnet19: not an encoder .* did you mean one of .*resnet18"):
        make_encoder("resnet19")


def test_namespace_is_the_only_class_made(tmp_path):
    torch.save({"opt": argparse.Namespace(lr=0.1), "path": tmp_path, "x": torch.ones(2)}, tmp_path / "a.pt")
    content = load_safe(tmp_path / "a.pt")
    assert content["opt"].lr == 0.1
    assert type(content["path"]) is Inert
    torch.save({"opt": torch.nn.ReLU(), "x": torch.ones(2)}, tmp_path / "b.pt")
    with pytest.raises(InputError, match="wants to run code on loading: it holds torch.nn.modules.activation.ReLU"):
        load_safe(tmp_path / "b.pt")


def test_published_defaults():
    args = complete(get_parser().parse_args([]), DEFAULTS[2])
    recipe = (args.lr, args.momentum, args.weight_decay, args.b, args.epochs, args.schedule, args.optimizer)
    assert recipe == (1e-2, 0.9, 1e-4, 64, 240, "cosine", "sgd")
    assert (args.arch, args.init, args.local_views) == ("resnet18", "random", 6)
    volumes = complete(get_parser().parse_args([]), DEFAULTS[3])
    assert (volumes.arch, volumes.b, volumes.lr, volumes.epochs) == ("unet3d", 32, 1e-3, 240)
    assert (volumes.cube_size, volumes.local_cube_size) == ([64, 64, 32], [16, 16, 16])
    given = complete(get_parser().parse_args(["--lr", "0.5", "--b", "7"]), DEFAULTS[3])
    assert (given.lr, given.b, given.arch) == (0.5, 7, "unet3d")
