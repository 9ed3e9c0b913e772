"""PCRL: the numbers of the published implementation, its views, its commands and files."""

import argparse
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from parity_tools import assert_close, deterministic, published

from medssl import train_pcrl, train_pcrlv2
from medssl.datasets.base import ImageDataset, Info
from medssl.engine.checkpoint import load_safe
from medssl.engine.parallel import Run
from medssl.errors import InputError
from medssl.models.context_unet import attend, blend
from medssl.models.encoders import IMAGENET, initialise, make_encoder
from medssl.models.unet3d import UNet3d
from medssl.train_pcrl import PCRL, get_parser, main
from medssl.views.draws import Columns, Draws
from medssl.views.of_images import RestorationViews
from medssl.views.of_volumes import RestorationCubeViews
from medssl.views.ops import draw_transform, transform, transform_code
from medssl.views.ops3d import PCRL_SIZES, iou, random_boxes, z_normalise

ARCH = {2: "resnet18", 3: "unet3d"}


def published_key(key):
    """Our key of the 2D network → the key in the published implementation."""
    return "model." + re.sub(r"^output\.", "segmentation_head.0.", key) if key[:3] in ("enc", "dec", "out") else key


def rename(dims):
    return published_key if dims == 2 else lambda key: key


@pytest.fixture(params=[2, 3])
def filled(request):
    """The method with the published weights, and the published numbers."""
    dims = request.param
    method = PCRL(ARCH[dims], dims, queue=16)
    deterministic.fill(method.student, rename=rename(dims))
    deterministic.fill(method.teacher, "teacher:", rename=rename(dims))
    return dims, method.train(), published(f"pcrl_{dims}d")


# Parity --------------------------------------------------------------------------------------------


def test_state_dict_is_the_published_one(filled):
    dims, method, numbers = filled
    ours = {rename(dims)(key): list(value.shape) for key, value in method.student.state_dict().items()}
    assert ours == numbers["state_dict"]


def test_outputs_are_the_published_ones(filled):
    _, method, numbers = filled
    inputs = numbers["inputs"]
    x1, x2 = (torch.from_numpy(deterministic.values(name, tuple(inputs[name]))) for name in ("x1", "x2"))
    code1, code2 = (torch.tensor(code) for code in inputs["transform_codes"])
    with torch.no_grad():
        student, teacher = method.student(x1), method.teacher(x2)
        assert_close(student["z"], numbers["student_feature"], "student")
        assert_close(teacher["z"], numbers["teacher_feature"], "teacher")
        own = attend(student["maps"], method.student.attention(code1))
        other = attend(teacher["maps"], method.student.attention(code2))
        assert_close(method.student(*own, decode=True), numbers["restored"], "restored")
        both = blend(own, other, inputs["alpha"])
        assert_close(method.student(*both, decode=True), numbers["restored_mixed"], "restored, mixed")
        mixed = method.student(x1.flip(0))  # the published stand-in for a mixture
        assert_close(mixed["z"], numbers["mixup_feature"], "mixup")
        assert_close(method.student(*mixed["maps"], decode=True), numbers["mixup_restored"], "mixup restored")
        both = blend(mixed["maps"], teacher["maps"], inputs["mixup_alpha"])
        assert_close(method.student(*both, decode=True), numbers["mixup_restored_mixed"], "mixup restored, mixed")


# The loss ------------------------------------------------------------------------------------------


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_loss_is_the_papers(filled):
    """Recomputed from the definition, with an independent order of draws."""
    dims, _, _ = filled
    arch = {2: "resnet18", 3: "unet3d_quarter"}[dims]
    torch.manual_seed(2)
    method, reference = (PCRL(arch, dims, queue=16).train() for _ in range(2))
    with torch.no_grad():
        for p in method.teacher.parameters():
            p.add_(0.02 * torch.randn(p.shape))
    reference.load_state_dict(method.state_dict())
    shape = (4, 3, 32, 32) if dims == 2 else (4, 1, 16, 16, 16)
    names = ("view1", "view2", "target", "target2", "turned1", "turned2")
    batch = {name: torch.rand(shape, generator=seeded(i)) for i, name in enumerate(names)}
    batch |= {f"code{i}": (torch.rand(4, dims + 4, generator=seeded(9 + i)) < 0.5).float() for i in (1, 2)}
    losses = method(batch, Run(generator=seeded(5)))

    generator = seeded(5)

    def folded():
        value = torch.rand((), generator=generator).item()
        return max(value, 1 - value)

    lam, order = folded(), torch.randperm(4, generator=generator)
    alpha1, alpha2 = folded(), folded()

    def mix(a):
        return lam * a + (1 - lam) * a[order]

    net, teacher = reference.student, reference.teacher
    f, f_mix = net(batch["view1"]), net(mix(batch["view1"]))
    t, t_mix = teacher(batch["view2"]), teacher(mix(batch["view2"]))

    def coded(maps, code):
        a = torch.sigmoid(net.aug_fc2(torch.relu(net.aug_fc1(code)))).reshape(4, -1, *[1] * dims)
        return [*maps[:-1], maps[-1] * a]

    def between(one, two, alpha):
        return [alpha * a + (1 - alpha) * b for a, b in zip(one, two)]

    def error(maps, target):
        return (net(*maps, decode=True) - target).square().mean()

    own, other = coded(f["maps"], batch["code1"]), coded(t["maps"], batch["code2"])
    gt1, gt2 = mix(batch["target"]), mix(batch["target2"])
    errors = [
        error(own, batch["turned1"]),
        error(f_mix["maps"], gt1),
        error(between(own, other, alpha1), alpha1 * batch["turned1"] + (1 - alpha1) * batch["turned2"]),
        error(between(f_mix["maps"], t_mix["maps"], alpha2), alpha2 * gt1 + (1 - alpha2) * gt2),
    ]
    assert losses["restoration"].item() == pytest.approx(sum(errors).item() / 4, rel=1e-4)

    def contrast(q, k):
        q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
        s = torch.cat([(q * k).sum(1, keepdim=True), q @ method.contrast.queue.keys.T], 1) / 0.2
        return F.cross_entropy(s, torch.zeros(4).long())

    terms = [(f["z"], t["z"]), (f_mix["z"], t_mix["z"]), (f_mix["z"], mix(t["z"]))]
    assert losses["contrast"].item() == pytest.approx(sum(contrast(*pair) for pair in terms).item() / 3, rel=1e-4)
    assert set(losses) == {"contrast", "restoration"}


# Views ---------------------------------------------------------------------------------------------


def test_transforms_are_numpys():
    generator = seeded(0)
    for axes, shape in ((2, (16, 3, 8, 8)), (3, (16, 1, 6, 6, 4))):
        x = torch.rand(shape, generator=generator)
        flips, turns = draw_transform(Columns(torch.rand(16, axes + 1, generator=generator)), axes)
        assert len(set(turns.tolist())) == 4
        code, out = transform_code(flips, turns), transform(x, flips, turns)
        assert code.shape == (16, axes + 4)
        for i in range(16):
            expected = x[i].numpy()
            for axis in range(axes):
                if code[i, axis] == 1:
                    expected = np.flip(expected, 1 + axis)
            k = int(code[i, axes:].argmax())
            assert code[i, axes:].sum() == 1
            np.testing.assert_array_equal(out[i].numpy(), np.rot90(expected, k, (1, 2)))


def check_codes(out, dims):
    for i in ("1", "2"):
        code = out[f"code{i}"]
        flips, turns = code[:, :dims] == 1, code[:, dims:].argmax(1)
        assert torch.equal(transform(out[f"view{i}"], flips, turns), out[f"turned{i}"])
    assert not torch.equal(out["code1"], out["code2"])


def test_2d_views():
    views = RestorationViews(**IMAGENET, size=64, hole=9, degrees=0.0, scale=(0.2, 1.0))
    image = torch.randint(0, 256, (6, 1, 96, 96), dtype=torch.uint8, generator=seeded(0))
    batch = {"image": image, "size": torch.full((6, 2), 96.0)}
    out = views(batch, Draws((0,), 6))
    assert set(out) == {f"{name}{i}" for name in ("view", "code", "turned") for i in (1, 2)} | {"target", "target2"}
    assert {out[name].shape for name in out if "code" not in name} == {(6, 3, 64, 64)}
    check_codes(out, 2)
    # The targets are the views' crops, unchanged in colour; and a process sees its rows of the same batch.
    plain = RestorationViews(**IMAGENET, size=64, hole=0, degrees=0.0, scale=(0.2, 1.0), jitter=(0, 0, 0, 0), blur=0.0)
    still = plain(batch, Draws((0,), 6))
    assert torch.allclose(still["view1"], still["target"], atol=1e-4)
    assert torch.allclose(still["view2"], still["target2"], atol=1e-4)
    assert torch.equal(still["target2"], out["target2"])
    half = views({key: value[3:] for key, value in batch.items()}, Draws((0,), 6, 3, 3))
    assert torch.allclose(half["turned2"], out["turned2"][3:], atol=1e-6)
    assert torch.equal(half["code1"], out["code1"][3:])


def test_3d_views():
    views = RestorationCubeViews((16, 16, 8))
    batch = {"image": torch.rand(6, 2, 16, 16, 8, generator=seeded(0)).half()}
    out = views(batch, Draws((0,), 6))
    assert {out[name].shape for name in out if "code" not in name} == {(6, 1, 16, 16, 8)}
    assert out["code1"].shape == (6, 7)
    check_codes(out, 3)
    assert min(out[name].min() for name in out) >= 0
    assert max(out[name].max() for name in out) <= 1
    clean = RestorationCubeViews((16, 16, 8), scale=0, degrees=0, blur=0, shuffle=0, paint=0)(batch, Draws((0,), 6))
    for i, (view, target) in enumerate((("view1", "target"), ("view2", "target2"))):
        assert torch.allclose(clean[view], clean[target], atol=1e-5)
        cube = batch["image"][:, i : i + 1].float()
        same = [torch.allclose(a, b, atol=1e-3) for a, b in zip(clean[target], cube)]
        mirrored = [torch.allclose(a, b, atol=1e-3) for a, b in zip(clean[target], cube.flip(2))]
        assert all(a or b for a, b in zip(same, mirrored))
        assert any(mirrored)
    half = views({"image": batch["image"][3:]}, Draws((0,), 6, 3, 3))
    assert torch.allclose(half["view2"], out["view2"][3:], atol=1e-6)


def test_3d_views_are_shuffled_and_painted():
    batch = {"image": torch.rand(6, 2, 32, 32, 32, generator=seeded(0)).half()}
    still = {"scale": 0, "degrees": 0, "blur": 0}
    shuffled = RestorationCubeViews((32, 32, 32), **still, shuffle=1, paint=0)(batch, Draws((0,), 6))
    changed = shuffled["view1"] != shuffled["target"]
    assert (changed.flatten(1).float().mean(1) > 0.3).all()
    for view, target in zip(shuffled["view1"], shuffled["target"]):  # values come from near by, none is new
        assert torch.isin(view, target).all()
    for inner, least, most in ((1.0, 0.005, 0.35), (0.0, 0.3, 1.0)):
        painted = RestorationCubeViews((32, 32, 32), **still, shuffle=0, paint=1, inner=inner)(batch, Draws((0,), 6))
        share = (painted["view1"] != painted["target"]).flatten(1).float().mean(1)
        assert ((share >= least) & (share <= most)).sum() >= 5, share
    none = RestorationCubeViews((32, 32, 32), **still, shuffle=0, paint=0)(batch, Draws((0,), 6))
    assert torch.equal(none["view1"], none["target"])
    default = RestorationCubeViews()
    assert (default.shuffle, default.paint, default.inner) == (0.5, 0.9, 0.2)
    assert (default.crops, default.min_iou) == (PCRL_SIZES, 0.25)


@pytest.mark.parametrize(
    ("d", "option", "kind"), [("3", ["--blur", "1"], "images"), ("2", ["--cube-size", "8", "8", "8"], "volumes")]
)
def test_options_of_the_other_dimension_are_refused(d, option, kind, tmp_path):
    for module in (train_pcrl, train_pcrlv2):
        with pytest.raises(InputError, match=f"{option[0]}: is for {kind}, and phantom{d}d has {d} dimensions"):
            module.main(["--d", d, *option, "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_3d_crops_of_whole_volumes():
    numbers = Columns(torch.rand(40, 256, generator=seeded(0)))
    size = torch.full((40, 3), 200.0)
    large, small = random_boxes(numbers, size, size, 0, PCRL_SIZES, 0.25)
    assert small.shape[1] == 0
    assert iou(large[:, 0], large[:, 1]).min() > 0.25
    assert {tuple(box) for box in large[..., 3:].reshape(-1, 3).tolist()} <= {tuple(map(float, s)) for s in PCRL_SIZES}
    volume = torch.rand(2, 1, 40, 40, 30)
    out = RestorationCubeViews((16, 16, 8))({"image": volume, "size": torch.full((2, 3), 160.0)}, Draws((1,), 2))
    assert out["view1"].shape == (2, 1, 16, 16, 8)


# Commands and files --------------------------------------------------------------------------------

SMALL = ["--b", "2", "--workers", "0", "--device", "cpu", "--queue", "8", "--steps", "1"]
PUBLISHED_2D = (
    "--data chest14_data_path --phase pretask --model pcrl --b 64 --epochs 240 --lr 1e-3 --output pretrained_model "
    "--optimizer sgd --outchannel 3 --n chest --d 2 --gpus 0,1,2,3 --inchannel 3 --ratio 1.0"
)


def test_published_commands_parse():
    args = get_parser().parse_args(PUBLISHED_2D.split())
    assert (args.arch, args.b, args.lr, args.gpus, args.dataset) == (None, 64, 1e-3, [0, 1, 2, 3], "chest")
    volumes = PUBLISHED_2D.replace("--n chest --d 2", "--n luna --d 3").replace("channel 3", "channel 1")
    assert get_parser().parse_args(volumes.split()).inchannel == 1
    defaults = get_parser().parse_args([])
    assert (defaults.temperature, defaults.ema, defaults.queue, defaults.schedule) == (0.2, 0.999, 16384, "cosine")
    assert (train_pcrl.DEFAULTS[2]["b"], train_pcrl.DEFAULTS[3]["b"]) == (64, 16)


def test_published_options_run(tmp_path):
    command = [*SMALL, "--image-size", "32", "--model", "pcrl", "--phase", "pretask", "--optimizer", "sgd", "--d", "2"]
    main([*command, "--inchannel", "3", "--outchannel", "3", "--output", str(tmp_path)])
    content = load_safe(tmp_path / "encoder.pt")
    assert (content["arch"], content["method"], content["channels"]) == ("resnet18", "PCRL", 3)
    assert content["normalization"] == IMAGENET


def test_refusals(tmp_path):
    command = [*SMALL, "--image-size", "32", "--output", str(tmp_path / "out")]
    with pytest.raises(InputError, match="--inchannel 1: data set phantom2d has 2 dimensions, which take 3"):
        main([*command, "--inchannel", "1"])
    with pytest.raises(InputError, match="--outchannel 3: data set phantom3d has 3 dimensions, which take 1"):
        main([*command, "--d", "3", "--outchannel", "3"])
    with pytest.raises(InputError, match="X and Y must be the same"):
        main([*command, "--d", "3", "--cube-size", "16", "32", "16"])
    with pytest.raises(InputError, match="sides of at least 8"):
        main([*command, "--d", "3", "--cube-size", "16", "16", "4"])
    assert not (tmp_path / "out").exists()


class Pairs(ImageDataset):
    """Prepared pairs of random cubes, as `luna` has them."""

    def load(self, i):
        return {"image": torch.rand((2, 16, 16, 8), generator=seeded(i)).half()}


@pytest.fixture
def exported_3d(tmp_path, monkeypatch):
    data = Pairs(Info("cubes", dims=3), None, [f"cube{i}" for i in range(4)])
    monkeypatch.setattr(train_pcrl, "open_pretraining", lambda args, dims=(2, 3): data)
    cube = ["--cube-size", "16", "16", "8", "--arch", "unet3d_quarter"]
    main([*SMALL, *cube, "--output", str(tmp_path)])
    return tmp_path / "encoder.pt"


def test_3d_inputs_stay_in_the_unit_range_downstream(exported_3d):
    content = load_safe(exported_3d)
    assert content["normalization"] == {"kind": "unit"}
    assert {"down_tr64.ops.0.conv1.weight", "fc1.weight", "out_tr.final_conv.weight"} <= content["state_dict"].keys()
    encoder = make_encoder("unet3d_quarter", dims=3)
    report = initialise(encoder, "unet3d_quarter", str(exported_3d))
    assert (report["missing"], report["normalization"]) == (0, {"kind": "unit"})
    x = torch.rand(2, 1, 8, 8, 8)
    views = {kind: RestorationCubeViews((8, 8, 8)) for kind in ("unit", "z")}
    views["z"].kind = "z"
    assert torch.equal(views["unit"].normalise(x), x)
    assert torch.equal(views["z"].normalise(x), z_normalise(x))


@pytest.mark.parametrize("dims", [2, 3])
def test_published_files_load(tmp_path, dims):
    """As the published scripts save them; the 3D one also gives a segmentation network its decoder."""
    torch.manual_seed(0)
    arch = ARCH[dims] if dims == 2 else "unet3d_quarter"
    network = PCRL(arch, dims, queue=8).student
    content = {"opt": argparse.Namespace(lr=1e-3), "epoch": 240, "contrast": {"memory": torch.zeros(4, 128)}}
    if dims == 2:
        content |= {"state_dict": network.encoder.state_dict(), "decoder_state_dict": network.decoder.state_dict()}
    else:
        content["state_dict"] = network.state_dict()
    torch.save(content, tmp_path / "pcrl.pt")
    encoder = make_encoder(arch, dims=dims)
    report = initialise(encoder, arch, str(tmp_path / "pcrl.pt"))
    assert report["missing"] == 0
    assert all(torch.equal(value, encoder.state_dict()[key]) for key, value in network.encoder.state_dict().items())
    if dims == 3:
        assert report["normalization"] == {"kind": "unit"}
        whole = UNet3d(1, width=16)
        missing, _ = whole.load_state_dict(content["state_dict"], strict=False)
        assert not missing
