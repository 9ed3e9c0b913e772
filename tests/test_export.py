"""Exports: each tool's own network gives our features, and files that do not fit are refused."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torchvision
from safetensors import safe_open

from medssl.errors import InputError
from medssl.export_encoder import TO, Exported, detectron2_name, main, torchvision_name
from medssl.files import writing
from medssl.models.encoders import initialise, make_encoder
from medssl.models.unet2d import UNet2d


def export(tmp_path, arch="resnet18", **more):
    """An encoder.pt with weights and statistics that are not the initial ones."""
    torch.manual_seed(0)
    network = UNet2d(arch, 1).train()
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(4, 3, 64, 64))
    content = {
        "state_dict": network.encoder.state_dict(),
        "arch": arch,
        "dims": 2,
        "channels": 3,
        "method": "X",
        "version": 1,
    }
    content["normalization"] = {"mean": [0.5] * 3, "std": [0.2] * 3}
    content["decoder_state_dict"] = network.decoder.state_dict()
    torch.save({**content, **more}, tmp_path / "encoder.pt")
    return tmp_path / "encoder.pt", network.eval()


def run(tmp_path, *tools, **more):
    path, network = export(tmp_path, **more)
    main(["--file", str(path), "--to", *tools, "--image-size", "64", "--output", str(tmp_path / "out")])
    return tmp_path / "out", network


X = torch.randn(3, 3, 96, 96, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def test_resnets_in_other_tools(tmp_path):
    out, network = run(tmp_path, "torchvision", "timm", "smp")
    ours = network.encoder(X)[-1].mean((2, 3))
    other = torchvision.models.resnet18()
    missing = other.load_state_dict(torch.load(out / "encoder_torchvision.pth", weights_only=True), strict=False)
    assert missing.missing_keys == ["fc.weight", "fc.bias"]
    assert missing.unexpected_keys == []
    other.fc = torch.nn.Identity()
    assert torch.allclose(other.eval()(X), ours, atol=1e-5)
    other = timm.create_model("resnet18", num_classes=0)
    other.load_state_dict(torch.load(out / "encoder_timm.pth", weights_only=True))
    assert torch.allclose(other.eval()(X), ours, atol=1e-5)
    other = smp.Unet("resnet18", encoder_weights=None)
    missing = other.load_state_dict(torch.load(out / "encoder_smp.pth", weights_only=True), strict=False)
    assert all(key.startswith("segmentation_head") for key in missing.missing_keys)
    other.segmentation_head[0].load_state_dict(network.output.state_dict())
    assert torch.allclose(other.eval()(X), network(X), atol=1e-4)  # the decoder too


@pytest.mark.parametrize(
    ("arch", "tools"), [("densenet121", ["torchvision", "timm", "smp"]), ("mobilenet_v2", ["torchvision"])]
)
def test_other_encoders(tmp_path, arch, tools):
    path, _ = export(tmp_path, arch)
    for tool in tools:
        assert TO[tool](Exported(path), tmp_path).exists()
    with pytest.raises(InputError, match=f"--to detectron2: {arch} is no ResNet"):
        TO["detectron2"](Exported(path), tmp_path)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_detectron2s_names(tmp_path, arch):
    state = make_encoder(arch).state_dict()
    names = {detectron2_name(key): key for key in state}
    assert len(names) == len(state)
    assert all(torchvision_name(name) == key for name, key in names.items())
    # Rows of the published layout (the model zoo's R-50.pkl).
    assert names["stem.conv1.norm.running_mean"] == "bn1.running_mean"
    assert names["res3.0.shortcut.norm.weight"] == "layer2.0.downsample.1.weight"
    assert names["res5.1.conv2.weight"] == "layer4.1.conv2.weight"
    assert names["res2.0.conv2.norm.bias"] == "layer1.0.bn2.bias"


def test_detectron2s_file(tmp_path):
    out, network = run(tmp_path, "detectron2")
    content = pickle.loads((out / "encoder_detectron2.pkl").read_bytes())
    assert content["matching_heuristics"] is True
    assert np.array_equal(content["model"]["stem.conv1.weight"], network.encoder.conv1.weight.detach().numpy())


def test_safetensors(tmp_path):
    out, network = run(tmp_path, "safetensors")
    with safe_open(out / "encoder.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("layer1.0.conv1.weight"), network.encoder.layer1[0].conv1.weight)
        facts = file.metadata()
    assert facts["arch"] == "resnet18"
    assert json.loads(facts["normalization"])["std"] == [0.2] * 3


@torch.no_grad()
def test_onnx(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out, network = run(tmp_path, "onnx")
    session = runtime.InferenceSession(out / "encoder.onnx", providers=["CPUExecutionProvider"])
    images = X[:, :, :64, :64]
    (features,) = session.run(None, {"image": images.numpy()})
    assert np.allclose(features, network.encoder(images)[-1].mean((2, 3)).numpy(), atol=1e-4)


def test_files_that_fail_their_check_are_not_left(tmp_path):
    path = tmp_path / "encoder.onnx"
    path.write_text("of the last export")

    def fail():
        with writing(path) as part:
            part.write_text("new")
            raise InputError("other features")

    with pytest.raises(InputError, match="other features"):
        fail()
    assert [file.name for file in tmp_path.iterdir()] == ["encoder.onnx"]
    assert path.read_text() == "of the last export"
    with writing(path) as part:
        part.write_text("new")
    assert path.read_text() == "new"


def test_bad_input(tmp_path):
    path, _ = export(tmp_path)
    for content, message in (
        ({"weights": torch.zeros(1)}, "holds no encoder that is known; give a run's encoder.pt"),
        ({**torch.load(path, weights_only=True), "dims": 3}, "of volumes"),
    ):
        torch.save(content, tmp_path / "bad.pt")
        with pytest.raises(InputError, match=message):
            main(["--file", str(tmp_path / "bad.pt"), "--output", str(tmp_path / "out")])
    whole = torch.load(path, weights_only=True)
    short = dict(list(whole["state_dict"].items())[:-3])
    for damaged, message in (
        ({**whole, "state_dict": [1]}, "no state dict in this file"),
        ({**whole, "arch": "resnet17"}, "holds no encoder that is known"),
        ({**whole, "state_dict": short}, "does not hold a whole resnet18 encoder: layer4.1.bn2"),
    ):
        torch.save(damaged, tmp_path / "bad.pt")
        with pytest.raises(InputError, match=f"bad.pt: {message}"):
            main(["--file", str(tmp_path / "bad.pt"), "--output", str(tmp_path / "out")])
    with pytest.raises(InputError, match="no such checkpoint file"):
        main(["--file", str(tmp_path / "gone.pt")])
    export(tmp_path, "mit_b0")
    with pytest.raises(InputError, match="--to torchvision: it has no mit_b0"):
        main(["--file", str(tmp_path / "encoder.pt"), "--output", str(tmp_path / "out")])


# As published -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["encoder.pt", "last.pt", "published"])
def test_an_encoder_is_extracted_from_any_checkpoint(tmp_path, kind):
    """`CHECKPOINT WEIGHT_FILE`, whose result every `--init` and the other tools' exports read."""
    torch.manual_seed(0)
    state = make_encoder("resnet50").state_dict()
    content = {
        "encoder.pt": {"state_dict": state, "arch": "resnet50", "dims": 2, "method": "X", "version": 2},
        "last.pt": {
            "method": {f"student.encoder.{key}": value for key, value in state.items()} | {"queue": torch.zeros(3)},
            "optimizer": {}, "config": {"arch": "resnet50"}, "version": 2,
        },
        "published": {"state_dict": {f"encoder_q.0.{key}": value for key, value in state.items()}
                      | {"encoder_q.1.mlp.0.weight": torch.zeros(2)}, "meta": {}},
    }[kind]  # fmt: skip
    torch.save(content, tmp_path / kind)
    main([str(tmp_path / kind), str(tmp_path / "new" / "weights.pth")])
    found = torch.load(tmp_path / "new" / "weights.pth", weights_only=True)
    assert found["arch"] == "resnet50"
    assert found["state_dict"].keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in found["state_dict"].items())
    assert initialise(make_encoder("resnet50"), "resnet50", str(tmp_path / "new" / "weights.pth"))["missing"] == 0
    torch.save({"state_dict": found["state_dict"]}, tmp_path / "flat.pth")  # as their own tool leaves it
    main(["--file", str(tmp_path / "flat.pth"), "--to", "detectron2", "--output", str(tmp_path / "out")])
    assert (tmp_path / "out" / "encoder_detectron2.pkl").exists()


@pytest.mark.parametrize("words", [[], ["a.pt"], ["a.pt", "b.pth", "c.pth"], ["--file", "a.pt", "b.pt", "c.pth"]])
def test_one_form_or_the_other(words):
    with pytest.raises(InputError, match="give --file FILE, or the two files CHECKPOINT WEIGHT_FILE"):
        main(words)


def test_the_detectron2_file_is_not_run(tmp_path, monkeypatch):
    """Another may write into the folder: what is checked is what was made."""

    class Planted:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    write = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda path, _: write(path, pickle.dumps(Planted())))
    torch.save({"state_dict": make_encoder("resnet18").state_dict(), "arch": "resnet18", "dims": 2}, tmp_path / "a.pt")
    with pytest.raises(InputError, match="does not hold what was written"):
        main(["--file", str(tmp_path / "a.pt"), "--to", "detectron2", "--output", str(tmp_path)])
    assert not (tmp_path / "ran").exists()
