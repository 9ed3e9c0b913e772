"""Encoders of every family end where their network does; what runs of earlier versions left is told apart."""

import json
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import torchvision
from torch import nn

from medssl import (
    finetune_classification,
    finetune_detection,
    finetune_segmentation,
    train_magical,
    train_moco,
    train_pcrl,
    train_pcrlv2,
    train_simclr,
)
from medssl.datasets.base import Info
from medssl.engine.checkpoint import load_safe
from medssl.engine.runs import plain, refuse_changes, refuse_older
from medssl.errors import InputError
from medssl.models.context_unet import ContextUNet2d
from medssl.models.encoders import arch_of, default_arch, initialise, make_encoder, read_encoder
from medssl.models.heads import Averaged, EncoderClassifier, ScaleHead
from medssl.models.restoring_unet import EmbeddingUNet2d
from medssl.models.unet2d import UNet2d
from medssl.study.plan import TASKS, OpenedTask, with_network
from medssl.train_byol import BYOL
from medssl.train_concl import ConCL
from medssl.train_densecl import DenseCL
from medssl.train_moco import MoCo
from medssl.train_pcrlv2 import MultiScaleUNet
from medssl.train_simclr import SimCLR

SIDE = 96
GREY = Info("phantom2d", task="binary", classes=("a", "b"), channels=1)


def randomised(encoder, seed=0):
    """In evaluation mode, with statistics and weights of norms by which activations matter."""
    generator = torch.Generator().manual_seed(seed)
    for layer in encoder.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1, generator=generator)
            layer.running_var.uniform_(0.5, 1.5, generator=generator)
            layer.weight.data.uniform_(0.5, 1.5, generator=generator)
            layer.bias.data.normal_(0, 0.3, generator=generator)
    return encoder.eval()


def same_padding(network, encoder):
    """Some encoders of the library pad where their networks do not, so that every map is half of the one before."""
    ours = dict(encoder.named_modules())
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d | nn.MaxPool2d) and name in ours:
            layer.padding = ours[name].padding
            if isinstance(layer, nn.MaxPool2d):
                layer.ceil_mode = ours[name].ceil_mode


def load_all(network, encoder):
    """An encoder's weights in a published network, by name, or in their order where names are others."""
    state, wanted = encoder.state_dict(), network.state_dict()
    if not set(state) <= set(wanted):
        state = dict(zip(wanted, state.values(), strict=False))
    missing = network.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert all(key.startswith(("fc.", "classifier.", "last_linear.", "conv_head", "bn2.")) for key in
               missing.missing_keys)  # fmt: skip


def of_torchvision(name):
    network = torchvision.models.get_model(name, weights=None)
    for head in ("fc", "classifier"):
        if hasattr(network, head):
            setattr(network, head, nn.Identity())
    if name.startswith("vgg"):  # whose classifier takes the map, not its average
        network.avgpool = nn.AdaptiveAvgPool2d(1)
    return network


def of_timm(name):
    return timm.create_model(name, num_classes=0)


FAMILIES = {  # a member of each: the published network that gives the same pooled features
    "resnet18": (of_torchvision, "resnet18"),
    "resnext50_32x4d": (of_torchvision, "resnext50_32x4d"),
    "densenet121": (of_torchvision, "densenet121"),
    "vgg11_bn": (of_torchvision, "vgg11_bn"),
    "mobilenet_v2": (of_torchvision, "mobilenet_v2"),
    "se_resnet50": (of_timm, "legacy_seresnet50"),
    "se_resnext50_32x4d": (of_timm, "legacy_seresnext50_32x4d"),
    "dpn68": (of_timm, "dpn68"),
    "inceptionv4": (of_timm, "inception_v4"),
    "inceptionresnetv2": (of_timm, "inception_resnet_v2"),
    "xception": (of_timm, "legacy_xception"),
    "mobileone_s0": (of_timm, "mobileone_s0"),
}
LARGE = {"dpn68", "inceptionv4", "inceptionresnetv2", "se_resnext50_32x4d"}


@torch.no_grad()
@pytest.mark.parametrize("arch", [pytest.param(arch, marks=[pytest.mark.slow] * (arch in LARGE)) for arch in FAMILIES])
def test_pooled_features_are_the_published_networks(arch):
    encoder = randomised(make_encoder(arch))
    make, name = FAMILIES[arch]
    network = make(name).eval()
    load_all(network, encoder)
    same_padding(network, encoder)
    x = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    ours, theirs = Averaged(encoder)(x), network(x).flatten(1)
    assert ours.shape == theirs.shape == (2, encoder.out_channels[-1])
    assert float(theirs.abs().max()) > 0.1
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize(
    ("arch", "name"), [("efficientnet-b0", "tf_efficientnet_b0"), ("timm-efficientnet-b0", "efficientnet_b0")]
)
def test_efficientnets_are_pooled_before_their_last_convolution(arch, name):
    """Which goes to 1280 channels: the table of encoders says so."""
    encoder = randomised(make_encoder(arch))
    network = of_timm(name).eval()
    load_all(network, encoder)
    x = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    last = network.blocks(network.bn1(network.conv_stem(x)))
    assert torch.allclose(encoder(x)[-1], last, rtol=1e-4, atol=1e-5 * float(last.abs().max()))


@torch.no_grad()
def test_sknets_end_as_timms_do():
    encoder = randomised(make_encoder("timm-skresnet18"))
    x = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    assert torch.equal(encoder(x)[-1], encoder.forward_features(x))


@torch.no_grad()
def test_transformers_end_with_their_norm():
    """MiT's classifier averages what its last norm gives (SegFormer, arXiv 2105.15203): zero mean over the channels."""
    encoder = make_encoder("mit_b0").eval()
    last = encoder(torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)))[-1]
    assert torch.allclose(last.mean(1), torch.zeros(()), atol=1e-5)
    assert torch.allclose(last.var(1, unbiased=False), torch.ones(()), atol=1e-2)


def test_the_last_relu_has_a_gradient_and_no_entry():
    encoder = make_encoder("densenet121")
    last = encoder(torch.randn(2, 3, 64, 64))[-1]
    assert float(last.detach().min()) == 0
    last.sum().backward()
    assert encoder.features.norm5.weight.grad.abs().sum() > 0
    assert encoder.state_dict().keys() == of_torchvision("densenet121").state_dict().keys()


# Earlier versions ----------------------------------------------------------------------------------

SMALL = ["--image-size", "32", "--workers", "0", "--device", "cpu", "--b", "2", "--arch", "densenet121"]


def test_a_densenets_run_from_before_is_not_continued(tmp_path):
    run = ["--ratio", "0.002", *SMALL, "--epochs", "2", "--output", str(tmp_path)]
    train_simclr.main([*run, "--steps", "1"])
    saved = load_safe(tmp_path / "last.pt")
    old = {key: value for key, value in saved["config"].items() if key != "format"}
    torch.save({**saved, "config": old, "version": 1}, tmp_path / "last.pt")
    with pytest.raises(InputError, match="by a version whose densenet121 ended before its last ReLU; use that version, "
                       "another --output, or --resume never"):  # fmt: skip
        train_simclr.main([*run, "--steps", "2"])


def test_a_densenets_run_of_mocos_second_version_is_not_continued(tmp_path):
    """Whose `--version` is another one than that of files."""
    run = ["--ratio", "0.002", *SMALL, "--queue", "8", "--epochs", "2", "--output", str(tmp_path)]
    train_moco.main([*run, "--steps", "1"])
    saved = load_safe(tmp_path / "last.pt")
    assert (saved["config"]["version"], saved["config"]["format"], saved["version"]) == (2, 2, 2)
    old = {key: value for key, value in saved["config"].items() if key != "format"}
    torch.save({**saved, "config": old, "version": 1}, tmp_path / "last.pt")
    with pytest.raises(InputError, match="densenet121 ended before its last ReLU"):
        train_moco.main([*run, "--steps", "2"])
    assert read_encoder(tmp_path / "last.pt")[2]["version"] == 1
    assert read_encoder(tmp_path / "last.pt")[2]["normalization"]["mean"] == pytest.approx([0.485, 0.456, 0.406])


def test_a_densenets_trials_from_before_are_not_continued(tmp_path):
    run = ["--annotation-percent", "0.2", *SMALL, "--steps", "1", "--output", str(tmp_path)]
    finetune_classification.main(run)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["format"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="densenet121 ended before its last ReLU"):
        finetune_classification.main([*run, "--trials", "2"])


def test_weights_of_a_densenet_from_before_are_used_with_a_note(tmp_path, capsys):
    state = make_encoder("densenet121").state_dict()
    content = {"state_dict": state, "arch": "densenet121", "dims": 2, "version": 1}
    torch.save(content, tmp_path / "old.pt")
    network = EncoderClassifier(make_encoder("densenet121"), 2)
    initialise(network.encoder, "densenet121", str(tmp_path / "old.pt"))
    assert capsys.readouterr().err.count("before its last ReLU") == 1
    torch.save({**content, "version": 2}, tmp_path / "new.pt")
    torch.save({"state_dict": state}, tmp_path / "foreign.pt")
    torch.save({"state_dict": state, "version": "1.2", "arch": "DN121"}, tmp_path / "odd.pt")
    for name in ("new.pt", "foreign.pt", "odd.pt"):
        initialise(network.encoder, "densenet121", str(tmp_path / name))
    assert capsys.readouterr().err == ""


# Starting weights ----------------------------------------------------------------------------------


def uniform_up_to(weight, bound):
    return float(weight.detach().abs().max()) == pytest.approx(bound, rel=0.02)


@pytest.mark.parametrize(
    "make",
    [
        lambda: UNet2d("resnet18", 1),
        lambda: MultiScaleUNet("resnet18"),
        lambda: ContextUNet2d("resnet18"),
        lambda: EmbeddingUNet2d("resnet18", 3),
    ],
)
def test_decoders_begin_as_the_librarys(make):
    """He's uniform distribution: √(6 / inputs); torch's default is √(1 / inputs)."""
    torch.manual_seed(0)
    network = make()
    for layer in network.decoder.modules():
        if isinstance(layer, nn.Conv2d):
            assert uniform_up_to(layer.weight, (6 / layer.weight[0].numel()) ** 0.5)
    output = network.output
    shared = 9 * (output.in_channels + output.out_channels)
    assert uniform_up_to(output.weight, (6 / shared) ** 0.5)
    assert not output.bias.any()


def test_pcrlv2s_heads_begin_as_published():
    torch.manual_seed(0)
    head = ScaleHead(256, 3)
    assert uniform_up_to(head.predictor[0].weight, (6 / (256 + 512)) ** 0.5)
    assert uniform_up_to(head.restore[0].weight, (6 / (9 * 256)) ** 0.5)
    for layer in (head.predictor[0], head.predictor[-1], head.restore[0], head.restore[-1]):
        assert not layer.bias.any()


@pytest.mark.parametrize("make", [MoCo, lambda: MoCo(version=1), ConCL, DenseCL, SimCLR, BYOL])
def test_necks_begin_as_concls(make):
    """He's normal distribution, √(2 / inputs), and no bias; torch's default has a deviation of √(1 / 3 inputs)."""
    torch.manual_seed(0)
    layers = [layer for layer in make().student.head.modules() if isinstance(layer, nn.Linear)]
    assert layers
    for layer in layers:
        assert float(layer.weight.detach().std()) == pytest.approx((2 / layer.in_features) ** 0.5, rel=0.03)
        assert not layer.bias.any()


def test_byols_predictor_begins_small():
    torch.manual_seed(0)
    predictor = BYOL().predictor
    for layer in (predictor[0], predictor[-1]):
        assert float(layer.weight.detach().std()) == pytest.approx(0.01, rel=0.03)
        assert not layer.bias.any()


def test_trials_of_other_starting_weights_are_not_mixed(tmp_path):
    run = ["--dataset", "phantom2d", "--annotation-percent", "0.2", "--image-size", "32", "--workers", "0"]
    run += ["--device", "cpu", "--b", "2", "--steps", "1", "--epoch-steps", "1", "--output", str(tmp_path)]
    finetune_segmentation.main(run)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "format": 1}))
    with pytest.raises(InputError, match="by a version whose networks began with other random weights; use that"):
        finetune_segmentation.main([*run, "--trials", "2"])


# The network of a file -----------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "dims"), [("resnet18", 2), ("resnet50", 2), ("densenet121", 2), ("unet3d_half", 3)])
def test_a_files_encoder_is_known(arch, dims, tmp_path):
    """By what it says, or else by its entries, under any prefix."""
    state = make_encoder(arch, dims=dims).state_dict()
    for name, content in {
        "own.pt": {"state_dict": state, "arch": arch, "dims": dims},
        "flat.pth": {f"module.encoder_q.{key}": value for key, value in state.items()},
    }.items():
        torch.save(content, tmp_path / name)
        assert arch_of(str(tmp_path / name), dims) == arch
        assert arch_of(str(tmp_path / name), 5 - dims) is None
        assert default_arch(["random", str(tmp_path / name)], dims) == arch
    torch.save({"state_dict": {"x": torch.zeros(1)}}, tmp_path / "other.pth")
    assert arch_of(str(tmp_path / "other.pth"), 2) is None
    assert (arch_of("random", 2), arch_of("imagenet", 2)) == (None, None)
    assert (default_arch(["random"], 2), default_arch(["random"], 2, "resnet50")) == ("resnet18", "resnet50")


def test_a_study_has_one_network(tmp_path):
    """That of its files, or of its protocol, also in pre-trainings and from random weights."""
    for arch in ("resnet18", "resnet34", "resnet50"):
        torch.save(make_encoder(arch).state_dict(), tmp_path / f"{arch}.pth")
    files = {arch: str(tmp_path / f"{arch}.pth") for arch in ("resnet18", "resnet34", "resnet50")}

    def network(*words, inits=("random",)):
        rest = list(words)
        args = finetune_classification.get_parser().parse_args(rest)
        opened = {"classification": OpenedTask(args, SimpleNamespace(info=GREY))}
        return with_network(rest, Namespace(init=[*inits], task=["classification"], extra=[], features=True), opened)

    assert network("--b", "8", inits=("random", files["resnet50"])) == ["--b", "8", "--arch", "resnet50"]
    assert network(inits=("random", "pcrlv2", files["resnet18"])) == []
    assert network("--arch", "resnet34", inits=(files["resnet34"],)) == ["--arch", "resnet34"]
    with pytest.raises(InputError, match="--init: encoders of resnet.. and resnet..; a study compares one of them"):
        network(inits=(files["resnet34"], files["resnet50"]))
    paper = ["--protocol", "magical-medmnist"]
    assert network(*paper, inits=("random", "magical")) == [*paper, "--arch", "resnet50", "--image-size", "28"]
    own = [*paper, "--image-size", "64"]
    assert network(*own, inits=("random", files["resnet18"])) == [*own, "--arch", "resnet18"]


@pytest.mark.parametrize("script", [finetune_classification, finetune_segmentation, finetune_detection])
def test_options_of_a_study_from_before_are_as_they_were(script):
    """Those that runs of before do not know, and defaults, are no change; what is typed is."""
    now = plain(script.get_parser().parse_args([]))
    newer = ("augment", "normalization", "precise_bn", "all_train", "protocol", "phase", "format")
    before = {key: value for key, value in now.items() if key not in newer}
    refuse_changes(before, now, Path("x"))
    if script is not finetune_detection:
        words = ["--augment", "none"]
    else:
        assert before["arch"] == "resnet18"
        words = ["--precise-bn", "200"]
    with pytest.raises(InputError, match="x: was started with (augment full, now none|precise_bn 0, now 200)"):
        refuse_changes(before, plain(script.get_parser().parse_args(words)), Path("x"))


@pytest.mark.parametrize(
    ("script", "newer"),
    [(train_pcrlv2, {"restoration_weight": "20", "decoder_skips": "--decoder-skips", "mask_ratio": "0.5"}),
     (finetune_segmentation, {"mirror": "x", "encoder_lr_scale": "0.5"}),
     (finetune_detection, {"encoder_lr_scale": "0.5"}),
     (train_magical, {"skips": "--no-skips", "projector": "norm", "joint_norm": "--no-joint-norm", "crop_scale": "0.2",
                      "mask": "stripes"}),
     (train_pcrl, {"crop_mm": "32 32 32", "series": "2"}),
     (finetune_classification, {"epoch_steps": "20", "series": "1"})],
)  # fmt: skip
def test_runs_from_before_an_option_go_on_as_they_were(script, newer):
    now = plain(script.get_parser().parse_args([]))
    before = {key: value for key, value in now.items() if key not in newer}
    refuse_changes(before, now, Path("x"))
    for name, value in newer.items():
        words = [value] if value.startswith("--") else [f"--{name.replace('_', '-')}", *value.split()]
        with pytest.raises(InputError, match=f"x: was started with {name} "):
            refuse_changes(before, plain(script.get_parser().parse_args(words)), Path("x"))


def test_results_of_other_starting_weights_are_not_in_a_study():
    """Of images alone: the 3D U-Net begins as ever."""
    assert [TASKS["segmentation"].since(dims) for dims in (2, 3)] == [2, 1]
    assert TASKS["classification"].since(2) == TASKS["detection"].since(2) == 1
    refuse_older({"format": 2}, 2, Path("x"))
    refuse_older({}, 1, Path("x"))
    with pytest.raises(InputError, match="x: was started by a version whose networks began with other random weights"):
        refuse_older({}, 2, Path("x"))
