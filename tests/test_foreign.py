"""Other people's checkpoints: an encoder is found by its entries' names and shapes, whatever the file is made of."""

import argparse
import collections
import datetime
import json
import os
import pathlib
import pickle
import re
import shutil
import struct
import zipfile

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from medssl import evaluate_features, export_encoder
from medssl.engine import options
from medssl.engine.checkpoint import load_safe, weights_digest
from medssl.engine.entries import DEEPEST, places_of, tables_of
from medssl.engine.plain_pickle import STAND_INS, Entries, Inert
from medssl.errors import InputError
from medssl.files import split_init
from medssl.models.encoders import IMAGENET, arch_of, check_weights, initialise, make_encoder, read_encoder
from medssl.study.plan import labels_of

SPLITS = ("train", "val", "test")


def marked(encoder, first=1.0):
    """A state dict of one number an entry, which differs from entry to entry; files of it are small, as only one
    number of each is saved."""
    out = {}
    for i, (key, value) in enumerate(encoder.state_dict().items()):
        one = torch.full((1,), first + i / 64) if value.is_floating_point() else torch.tensor([7])
        out[key] = one.expand(value.shape) if value.ndim else one[0]
    return out


@pytest.fixture(scope="module")
def encoder():
    return make_encoder("resnet18")


@pytest.fixture(scope="module")
def state(encoder):
    return marked(encoder)


@pytest.fixture(scope="module")
def twin(encoder):
    """Other weights."""
    return marked(encoder, first=100.0)


def under(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def start(encoder, path, arch="resnet18"):
    """Zero an encoder, and start it from a file."""
    with torch.no_grad():
        for value in encoder.state_dict().values():
            value.zero_()
    return initialise(encoder, arch, str(path))


def has(encoder, state, tolerance=0.0):
    """Whether an encoder has the weights of a state dict, all of them."""
    own = encoder.state_dict()
    learned = [key for key in own if not key.endswith("num_batches_tracked")]
    return all(torch.allclose(own[key], state[key].float(), rtol=tolerance, atol=0) for key in learned)


def refusal(call, *arguments):
    with pytest.raises(InputError) as error:
        call(*arguments)
    assert str(error.value).isprintable()
    return str(error.value)


# What everybody's files are called and made of ------------------------------------------------------

PREFIXES = (
    "", "module.", "backbone.", "encoder_q.", "encoder.", "model.", "net.", "module.encoder_q.", "encoder_q.0.",
    "model.backbone.", "module.backbone.", "online_network.encoder.", "resnet.", "student.backbone.", "model.encoder.",
    "features.", "img_encoder.", "base_encoder.", "module.base_encoder.", "visual.", "teacher.", "encoder_k.", "cnn.",
    "_orig_mod.", "module._orig_mod.", "_orig_mod.backbone.", "module.model.backbone.body.", "0.", "a b.c/d.",
)  # fmt: skip
KEYS = (
    "state_dict", "model", "model_state_dict", "net", "network", "encoder", "teacher", "student", "weights", "backbone",
    "params", "model_state", "state_dict_ema", "decoder", "optimizer", 3,
)  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
def test_any_prefix(encoder, state, prefix, tmp_path, capsys):
    torch.save({"state_dict": under(prefix, state) | {"fc.weight": torch.zeros(2, 512)}}, tmp_path / "a.pth")
    report = start(encoder, tmp_path / "a.pth")
    assert has(encoder, state)
    assert (report["matched"], report["missing"], report["unexpected"]) == (100, 0, 0 if prefix else 1)
    line = capsys.readouterr().out
    assert "a.pth: 100 of 100 encoder entries matched, 0 missing" in line
    assert f"unexpected in state_dict{f' under {prefix}' if prefix else ''}\n" in line


@pytest.mark.parametrize("key", KEYS)
def test_any_dictionary(encoder, state, key, tmp_path, capsys):
    torch.save({"epoch": 3, key: state}, tmp_path / "a.pth")
    assert start(encoder, tmp_path / "a.pth")["matched"] == 100
    assert has(encoder, state)
    assert f"0 unexpected in {key}\n" in capsys.readouterr().out


def adam(state):
    """As torch.optim.Adam's after a step."""
    moments = {i: {"step": torch.tensor(1.0), "exp_avg": v, "exp_avg_sq": v} for i, v in enumerate(state.values())}
    return {"state": moments, "param_groups": [{"lr": 0.1, "params": list(moments)}]}


def with_itself(state):
    content = {"model": state}
    content["self"] = content
    return content


MADE = {  # by what is special about them
    "plain": lambda s: s,
    "nested": lambda s: {"model": {"state_dict": s}},
    "nested twice": lambda s: {"state_dict": {"state_dict": s}},
    "in a list": lambda s: {"models": [{"epoch": 1}, {"net": under("module.", s)}]},
    "in a tuple": lambda s: (3, s),
    "beside Adam": lambda s: {"optimizer": adam(s), "model": s, "scaler": {"scale": torch.tensor(2.0)}},
    "beside other heads": lambda s: {"model": under("backbone.", s) | {"head.0.weight": torch.zeros(3, 3),
                                     "head.1.running_mean": torch.zeros(3), "queue": torch.zeros(128, 8)}},
    "averaged by torch": lambda s: {"swa": {"n_averaged": torch.tensor(3), **under("module.", s)}},
    "masked autoencoder": lambda s: {"model": {"mask_token": torch.zeros(1, 1, 8), **under("sparse_encoder.cnn.", s),
                                               **{f"decoder.{i}.weight": torch.zeros(8, 8) for i in range(9)}}},
    "numbered beside names": lambda s: {"state_dict": {3: torch.zeros(2), **s}},
    "twice the same": lambda s: {"state_dict": s, "model": dict(s)},
    "holds itself": with_itself,
    "a default dictionary": lambda s: {"nets": collections.defaultdict(list, s)},
    "parameters": lambda s: {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in s.items()},
    "lightning": lambda s: {
        "state_dict": under("backbone.", s), "hyper_parameters": collections.OrderedDict(lr=0.1),
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(1.0)}},
        "pytorch-lightning_version": "2.0", "loops": {"fit_loop": {"state_dict": {}}}, "optimizer_states": [adam(s)],
    },
    "numpy": lambda s: {"state_dict": s, "best": np.float64(0.9), "seen": np.int64(3), "at": np.bool_(True),
                        "history": np.zeros((3, 4)), "names": np.array(["a", "b"]), "rng": np.random.get_state(),  # noqa: NPY002
                        "kind": np.float32, "objects": np.array([{}, None], object), "g": np.random.default_rng(0)},
    "paths and dates": lambda s: {"state_dict": s, "path": pathlib.PurePosixPath("/x"), "home": pathlib.Path("."),
                                  "win": pathlib.PureWindowsPath("c:/x"), "day": datetime.datetime(2024, 1, 1)},
    "collections": lambda s: {"state_dict": s, "args": argparse.Namespace(lr=0.1, path=pathlib.PosixPath("/x")),
                              "count": collections.Counter("aab"), "last": collections.deque([1, 2], maxlen=3),
                              "set": {1, 2}, "frozen": frozenset({1}), "complex": 1j, "version": torch.__version__},
}  # fmt: skip


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("zipped", [True, False])
def test_any_layout(encoder, state, kind, zipped, tmp_path, capsys):
    torch.save(MADE[kind](state), tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    report = start(encoder, tmp_path / "a.pth")
    assert has(encoder, state)
    assert (report["matched"], report["missing"]) == (100, 0)
    assert capsys.readouterr().err == ""


def test_half_precision_and_old_files(encoder, state, tmp_path):
    for kind in (torch.float16, torch.bfloat16, torch.float64):
        torch.save({key: value.to(kind) for key, value in state.items()}, tmp_path / "a.pth")
        assert start(encoder, tmp_path / "a.pth")["unexpected"] == 0
        assert has(encoder, state, tolerance=1e-2)
        assert all(value.dtype in (torch.float32, torch.int64) for value in encoder.state_dict().values())
    torch.save({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, tmp_path / "a.pth")
    assert start(encoder, tmp_path / "a.pth")["missing"] == 0
    assert has(encoder, state)


def test_a_sequential_of_a_resnets_parts(encoder, state, tmp_path):
    """As lightly's tutorials make it; its weights are those of the network."""
    network = torchvision.models.resnet18()
    network.load_state_dict(state, strict=False)
    sequential = nn.Sequential(*list(network.children())[:-1])
    torch.save({"state_dict": under("backbone.", sequential.state_dict())}, tmp_path / "a.ckpt")
    report = start(encoder, tmp_path / "a.ckpt")
    assert has(encoder, state)
    assert (report["matched"], report["unexpected"]) == (100, 0)
    assert arch_of(str(tmp_path / "a.ckpt"), 2) == "resnet18"


@pytest.mark.parametrize("kind", ["whole", "features", "sequential", "before torchvision 0.3"])
def test_densenets(kind, tmp_path, capsys):
    encoder = make_encoder("densenet121")
    state = marked(encoder)
    names = {
        "whole": lambda key: f"module.densenet121.{key}",
        "features": lambda key: f"backbone.{key.removeprefix('features.')}",
        "sequential": lambda key: f"backbone.0.{key.removeprefix('features.')}",
        "before torchvision 0.3": lambda key: "module." + (
            re.sub(r"(norm|conv)([12])", r"\1.\2", key) if "denselayer" in key else key),
    }[kind]  # fmt: skip
    content = {names(key): value for key, value in state.items()}
    assert len(content) == len(state)
    torch.save({"state_dict": content, "epoch": 3}, tmp_path / "a.pth")
    start(encoder, tmp_path / "a.pth", "densenet121")
    assert has(encoder, state)
    assert "would fit" not in capsys.readouterr().out  # one network, however it is spelled
    assert arch_of(str(tmp_path / "a.pth"), 2) == "densenet121"


@pytest.mark.parametrize("prefix", ["module.", "net.backbone.", "student.encoder."])
def test_volumes(prefix, tmp_path):
    encoder = make_encoder("unet3d_quarter", dims=3)
    state = marked(encoder)
    torch.save({"model": {"ema_state": under(prefix, state)}, "best": np.float32(1)}, tmp_path / "a.pth")
    start(encoder, tmp_path / "a.pth", "unet3d_quarter")
    assert has(encoder, state)
    assert arch_of(str(tmp_path / "a.pth"), 3) == "unet3d_quarter"


# A first convolution of one channel -----------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("arch", ["resnet18", "densenet121", "efficientnet-b0", "mobilenet_v2"])
def test_grey_networks(arch, tmp_path, capsys):
    """Equal channels act as the one did."""
    encoder, stem = make_encoder(arch), next(iter(make_encoder(arch).state_dict()))
    grey = {key: torch.rand_like(value) if value.is_floating_point() else value
            for key, value in make_encoder(arch, channels=1).state_dict().items()}  # fmt: skip
    torch.save({"net": under("backbone.", grey)}, tmp_path / "a.pth")
    assert start(encoder, tmp_path / "a.pth", arch)["missing"] == 0
    assert (
        f"note: {tmp_path}/a.pth: {stem} takes one channel; repeated for 3, and divided by 3" in capsys.readouterr().err
    )
    kernel = encoder.state_dict()[stem]
    assert torch.allclose(kernel.sum(1, keepdim=True), grey[stem])
    assert torch.equal(kernel[:, 0], kernel[:, 2])
    assert has(encoder, grey | {stem: kernel})
    if arch == "resnet18":
        assert arch_of(str(tmp_path / "a.pth"), 2) == arch
        assert torch.equal(read_encoder(tmp_path / "a.pth")[1][stem], kernel)


@pytest.mark.parametrize("shape", [(64, 3, 3, 3), (64, 4, 7, 7), (64, 1, 3, 3), (32, 3, 7, 7)])
def test_other_stems_are_named(encoder, state, shape, tmp_path):
    torch.save(
        {"state_dict": under("backbone.", state) | {"backbone.conv1.weight": torch.ones(shape)}}, tmp_path / "a.pth"
    )
    message = refusal(start, encoder, tmp_path / "a.pth")
    assert f"conv1.weight has shape {shape}, resnet18 needs (64, 3, 7, 7); all else fits: its first conv" in message
    assert not any(value.any() for value in encoder.state_dict().values())


# Several that fit ----------------------------------------------------------------------------------

FIRST_OF_TWO = {  # dictionaries and prefixes of the weights that are taken, and of others
    "query before key": (("state_dict", "encoder_q."), ("state_dict", "encoder_k.")),
    "the same, behind modules": (("state_dict", "module.encoder_q."), ("state_dict", "module.encoder_k.")),
    "base before momentum": (("state_dict", "module.base_encoder."), ("state_dict", "module.momentum_encoder.")),
    "backbone before its momentum": (("state_dict", "backbone."), ("state_dict", "backbone_momentum.")),
    "online before target": (("model", "online_network.encoder."), ("model", "target_network.encoder.")),
    "online net before target net": ((None, "online_net.0."), (None, "target_net.0.")),
    "teacher before student": (("teacher", "backbone."), ("student", "module.backbone.")),
    "the same, as prefixes": (("state_dict", "teacher.backbone."), ("state_dict", "student.backbone.")),
    "the same, in one word": (("state_dict", "teacher_backbone."), ("state_dict", "student_backbone.")),
    "a teacher by momentum": (("state_dict", "momentum_teacher."), ("state_dict", "student.")),
    "average before what it is of": (("state_dict_ema", ""), ("state_dict", "")),
    "the same, in other words": (("modelEMA", "module."), ("model", "module.")),
    "torch's average": (("swa_model", "module."), ("model", "")),
    "our tools' names": (("state_dict", ""), ("net", "")),
}  # fmt: skip


def saved_both(mine, others, state, twin, path, mine_first):
    pairs = [(mine, state), (others, twin)]
    content = {"epoch": 3}
    for (key, prefix), weights in pairs if mine_first else reversed(pairs):
        (content if key is None else content.setdefault(key, {})).update(under(prefix, weights))
    torch.save(content, path)


@pytest.mark.parametrize("mine_first", [True, False])
@pytest.mark.parametrize("kind", FIRST_OF_TWO)
def test_what_is_judged_comes_first(encoder, state, twin, kind, mine_first, tmp_path, capsys):
    """Whichever the file has first; and the other one can be had."""
    path, (mine, others) = tmp_path / "a.pth", FIRST_OF_TWO[kind]
    saved_both(mine, others, state, twin, path, mine_first)
    start(encoder, path)
    assert has(encoder, state)
    other = ".".join(filter(None, others)).strip(".")
    printed = capsys.readouterr()
    assert printed.out.endswith(f"; {other} would fit, too\n")
    assert printed.err == "" or kind == "our tools' names"
    start(encoder, f"{path}:{other}")
    assert has(encoder, twin)


def test_a_momentum_twin_of_a_contrast_is_no_average(encoder, state, twin, tmp_path):
    """As C2L's, InsDis' and CMC's files have it, whose model_ema made the keys."""
    torch.save({"model": state, "model_ema": twin, "contrast": {"memory": torch.zeros(4, 8)}}, tmp_path / "c2l.pth")
    start(encoder, tmp_path / "c2l.pth")
    assert has(encoder, state)
    torch.save({"model": twin, "model_ema": state}, tmp_path / "timm.pth")
    start(encoder, tmp_path / "timm.pth")
    assert has(encoder, state)


def test_a_tie_that_nothing_decides_is_said(encoder, state, twin, tmp_path, capsys):
    path = tmp_path / "a.pth"
    torch.save({"fold_b": state, "fold_a": twin}, path)
    start(encoder, path)
    assert has(encoder, state)  # the file's order
    assert capsys.readouterr().err == (
        f"note: {path}: fold_b taken, and fold_a would fit as well, with other weights; "
        f"--init {path}:fold_a takes that\n"
    )
    start(encoder, f"{path}:fold_a")
    assert has(encoder, twin)
    assert capsys.readouterr().err == ""


def test_a_run_of_ours_is_judged_by_its_student(encoder, state, twin, tmp_path):
    """From last.pt, with the inputs that encoder.pt beside it knows."""
    method = under("teacher.encoder.", twin) | under("student.encoder.", state) | {"queue": torch.zeros(8, 4)}
    content = {"method": method, "optimizer": adam(state), "config": {"arch": "resnet18"}, "version": 2, "step": 3}
    torch.save(content, tmp_path / "last.pt")
    start(encoder, tmp_path / "last.pt")
    assert has(encoder, state)
    normalization = {"mean": [0.1] * 3, "std": [0.2] * 3}
    torch.save({"state_dict": state, "normalization": normalization}, tmp_path / "encoder.pt")
    assert start(encoder, tmp_path / "last.pt")["normalization"] == normalization
    start(encoder, f"{tmp_path}/last.pt:teacher.encoder.")
    assert has(encoder, twin)


# FILE:PREFIX ---------------------------------------------------------------------------------------


@pytest.fixture
def moco(state, twin, tmp_path):
    content = under("module.encoder_q.", state) | under("module.encoder_k.", twin) | {"module.queue": torch.zeros(8, 4)}
    torch.save({"state_dict": content, "epoch": 3}, tmp_path / "queries.pth")
    return tmp_path / "queries.pth"


def test_files_and_prefixes_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.pth", "C:b.pth", "a.pth:ema"):
        pathlib.Path(name).touch()
    assert split_init("a.pth") == ("a.pth", None)
    assert split_init("a.pth:module.encoder_k.") == ("a.pth", "module.encoder_k.")
    assert split_init("a.pth:") == ("a.pth", "")
    assert split_init("C:b.pth") == ("C:b.pth", None)
    assert split_init("C:b.pth:teacher") == ("C:b.pth", "teacher")
    assert split_init("a.pth:ema") == ("a.pth:ema", None)  # a file of that name
    assert split_init("a.pth:ema:x") == ("a.pth:ema", "x")
    assert split_init("gone.pth:ema") == ("gone.pth:ema", None)
    assert split_init("random") == ("random", None)


@pytest.mark.parametrize(
    "prefix",
    [
        "module.encoder_k.",
        "module.encoder_k",
        "encoder_k",
        "state_dict.module.encoder_k",
        "encoder_k.",
        "state_dict.encoder_k",
    ],
)
def test_a_prefix_decides(encoder, twin, moco, prefix):
    assert start(encoder, f"{moco}:{prefix}")["missing"] == 0
    assert has(encoder, twin)


def test_an_empty_prefix(encoder, state, twin, tmp_path):
    torch.save({**twin, **under("teacher.", state)}, tmp_path / "a.pth")
    start(encoder, tmp_path / "a.pth")
    assert has(encoder, state)
    start(encoder, f"{tmp_path}/a.pth:")
    assert has(encoder, twin)


@pytest.mark.parametrize("prefix", ["encoder_x", "encoder", "module.encoder_k.conv1.weight", "."])
def test_a_wrong_prefix_names_those_that_fit(encoder, moco, prefix):
    message = refusal(start, encoder, f"{moco}:{prefix}")
    fitting = f"{moco}:state_dict.module.encoder_q, {moco}:state_dict.module.encoder_k"
    assert message == f"{moco}:{prefix}: no such prefix in the file; {fitting} would fit"
    assert refusal(read_encoder, f"{moco}:{prefix}").startswith(f"{moco}:{prefix}: holds no encoder that is known")
    assert refusal(check_weights, f"{moco}:{prefix}", "resnet18") == message


def test_a_prefix_wherever_weights_are_named(twin, moco, tmp_path):
    wanted = f"{moco}:encoder_k"
    assert weights_digest(wanted) == weights_digest(moco)
    assert arch_of(wanted, 2) == "resnet18"
    check_weights(wanted, "resnet18")
    options.check_inits([str(moco), wanted, "random"])
    with pytest.raises(InputError, match="the same weights twice"):
        options.check_inits([wanted, wanted])
    with pytest.raises(InputError, match="gone.pth:encoder_k: no such checkpoint file"):
        options.check_inits([f"{tmp_path}/gone.pth:encoder_k"])
    (tmp_path / "zoo").mkdir()
    assert options.resolve_init(wanted, str(tmp_path / "zoo")) == wanted
    export_encoder.main([wanted, str(tmp_path / "key.pth")])
    found = load_safe(tmp_path / "key.pth")["state_dict"]
    assert all(torch.equal(value, twin[key]) for key, value in found.items())
    assert labels_of([wanted, str(moco), f"{moco}:module.encoder_q."]) == {
        wanted: "queries-encoder_k", str(moco): "queries", f"{moco}:module.encoder_q.": "queries-module.encoder_q",
    }  # fmt: skip


def test_features_of_both(twin, tmp_path, capsys):
    """Side by side, from one file."""
    torch.manual_seed(0)
    rng, query, path = np.random.default_rng(0), make_encoder("resnet18").state_dict(), tmp_path / "moco.pth"
    images = {f"{split}_images": rng.integers(0, 256, (24, 28, 28, 3)).astype(np.uint8) for split in SPLITS}
    labels = {f"{split}_labels": np.arange(24, dtype=np.uint8)[:, None] % 8 for split in SPLITS}
    np.savez(tmp_path / "bloodmnist.npz", **images, **labels)
    torch.save(under("encoder_q.", query) | under("encoder_k.", make_encoder("resnet18").state_dict()), path)
    run = ["--init", f"{path}:encoder_q", f"{path}:encoder_k", "--image-size", "32", "--workers", "0"]
    run += ["--data", str(tmp_path), "--dataset", "bloodmnist"]
    evaluate_features.main([*run, "--device", "cpu", "--output", str(tmp_path / "out")])
    results = json.loads((tmp_path / "out" / "features.json").read_text())["results"]
    assert [row["init"] for row in results] == [f"{path}:encoder_q", f"{path}:encoder_k"]
    assert results[0]["probe"] != results[1]["probe"]
    assert "under encoder_k." in capsys.readouterr().out


# safetensors ---------------------------------------------------------------------------------------


def test_safetensors(encoder, state, tmp_path):
    save_file({f"backbone.{key}": value.contiguous() for key, value in state.items()}, tmp_path / "a.safetensors")
    for name in ("a.safetensors", "renamed.bin"):
        shutil.copy(tmp_path / "a.safetensors", tmp_path / name) if name != "a.safetensors" else None
        assert start(encoder, tmp_path / name)["missing"] == 0
        assert has(encoder, state)
        assert arch_of(str(tmp_path / name), 2) == "resnet18"


def test_our_own_safetensors_come_back(encoder, state, tmp_path):
    normalization = {"mean": [0.5] * 3, "std": [0.25] * 3}
    torch.save({"state_dict": state, "arch": "resnet18", "dims": 2, "normalization": normalization}, tmp_path / "a.pt")
    export_encoder.main(["--file", str(tmp_path / "a.pt"), "--to", "safetensors", "--output", str(tmp_path)])
    path = tmp_path / "encoder.safetensors"
    assert start(encoder, path)["normalization"] == normalization
    assert has(encoder, state)
    assert arch_of(str(path), 2) == "resnet18"
    assert "holds a resnet18 encoder; add --arch resnet18" in refusal(initialise, None, "resnet50", str(path))


@pytest.mark.parametrize("said", ["imagenet", {}, {"mean": 0.5}, [0.5]])
def test_what_files_of_others_say_is_theirs(said, encoder, state, tmp_path):
    """And may mean anything; in a file of ours it is damaged."""
    fields = {"state_dict": state, "normalization": said, "dims": 512, "version": "1.0"}
    torch.save(fields, tmp_path / "a.pth")
    assert start(encoder, tmp_path / "a.pth")["normalization"] == IMAGENET
    text = said if isinstance(said, str) else json.dumps(said)
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "a.safetensors",
              {"normalization": text, "dims": "512"})  # fmt: skip
    assert start(encoder, tmp_path / "a.safetensors")["normalization"] == IMAGENET
    torch.save(fields | {"arch": "resnet18", "dims": 2, "version": 2}, tmp_path / "a.pth")
    assert "its normalization is not one of a 2-dimensional encoder" in refusal(start, encoder, tmp_path / "a.pth")


@pytest.mark.parametrize("said", [3, {"medssl": 3}, {"medssl": {}}])
def test_metadata_of_others(said, encoder, state, tmp_path):
    class Entries(collections.OrderedDict):
        def __reduce__(self):
            return collections.OrderedDict, (), {"_metadata": said}, None, iter(self.items())

    torch.save(Entries(state), tmp_path / "a.pth")
    assert start(encoder, tmp_path / "a.pth")["normalization"] == IMAGENET


@pytest.mark.parametrize("size", [1, 8, 2**20, 2**40, 2**63])
@pytest.mark.parametrize("claim", [b'{"a":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]}}', b'{"a":[', b"{" * 3000])
def test_forged_safetensors(size, claim, tmp_path):
    header = claim % (size, 4 * size) if b"%d" in claim else claim
    for length in (len(header), size):
        (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", length) + header + b"\0\0")
        message = refusal(load_safe, tmp_path / "a.safetensors")
        assert message.endswith("a.safetensors: not a checkpoint, or a truncated one")


# What is refused, and how --------------------------------------------------------------------------


def test_a_pickled_network_is_named(encoder, tmp_path):
    torch.save(torchvision.models.resnet18(), tmp_path / "a.pth")
    assert refusal(start, encoder, tmp_path / "a.pth") == (
        f"{tmp_path}/a.pth: refused, the file wants to run code on loading: it holds torchvision.models.resnet.ResNet, "
        "and not weights alone; where it was made, save them anew: torch.save(model.state_dict(), FILE)"
    )


class Planted:
    def __init__(self, function, *arguments):
        self.how = function, arguments

    def __reduce__(self):
        return self.how


@pytest.mark.parametrize("zipped", [True, False])
def test_planted_code_is_named(encoder, state, zipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for function, argument, name in (
        (os.system, "touch hacked", "posix.system"), (eval, "open('hacked', 'w')", "eval"),
        (exec, "open('hacked', 'w')", "exec"), (__import__, "os", "__import__"),
        (np.load, "hacked.npy", "numpy.load"), (torch.load, "hacked", "torch.serialization.load"),
        (pathlib.Path.touch, pathlib.Path("hacked"), "wants to run code"),  # whose name is a stand-in's, and called
    ):  # fmt: skip
        torch.save(
            {"state_dict": state, "x": Planted(function, argument)}, "a.pth", _use_new_zipfile_serialization=zipped
        )
        assert name in refusal(start, encoder, "a.pth")
        assert not os.path.exists("hacked")


@pytest.mark.parametrize("protocol", [4, 5])
def test_planted_code_is_named_in_other_protocols(encoder, state, protocol, tmp_path, monkeypatch):
    """Weights in them, which torch's own reader cannot read, are no such."""
    monkeypatch.chdir(tmp_path)
    planted = {"path": pathlib.Path("a"), "sizes": [np.zeros(3)], "x": Planted(os.system, "touch hacked")}
    pathlib.Path("a.pth").write_bytes(pickle.dumps(planted, protocol))
    assert "it holds posix.system, and not weights alone" in refusal(start, encoder, "a.pth")
    twice = b"\x80\x04\x8c\x05posix\x8c\x06system20\x93\x8c\x01a\x85R."  # a text too much, and taken away
    pathlib.Path("a.pth").write_bytes(twice)
    assert "it holds what it does not spell out" in refusal(start, encoder, "a.pth")
    for zipped in (True, False):
        more = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": zipped}
        torch.save(planted | {"state_dict": state}, "a.pth", **more)
        assert "it holds posix.system, and not weights alone" in refusal(start, encoder, "a.pth")
        torch.save({"state_dict": state, "path": pathlib.Path("a"), "half": torch.zeros(2).bfloat16()}, "a.pth", **more)
        assert "a pickle of another protocol" in refusal(start, encoder, "a.pth")
    assert not os.path.exists("hacked")


def test_stand_ins_keep_nothing(tmp_path):
    """An object array's bytes, by which numpy would be brought down, are not looked at."""
    hostile = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85c_codecs\nencode\nX\x01\x00\x00\x00b"
        b"X\x06\x00\x00\x00latin1\x86R\x87R(K\x01K\x02\x85cnumpy\ndtype\nX\x02\x00\x00\x00O8K\x00K\x01\x87R\x89"
        b"X\x10\x00\x00\x00AAAAAAAABBBBBBBBtb."
    )
    pickle_of = {"state_dict": {"x": torch.zeros(1)}}
    torch.save(pickle_of, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as whole, zipfile.ZipFile(tmp_path / "b.pth", "w") as forged:
        for name in whole.namelist():
            forged.writestr(name, hostile if name.endswith("data.pkl") else whole.read(name))
    assert type(load_safe(tmp_path / "b.pth")) is Inert
    assert all(issubclass(kind, object) and kind.__module__ == Inert.__module__ for kind in STAND_INS.values())
    assert not vars(Inert(1, 2))
    assert Entries({"a": 1}) == {}


def test_other_formats_are_named(encoder, tmp_path):
    torch.jit.script(nn.ReLU()).save(tmp_path / "script.pt")
    assert "script.pt: a TorchScript program; save its weights anew" in refusal(start, encoder, tmp_path / "script.pt")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"a": np.zeros(3)}, protocol=4))
    assert "plain.pkl: a pickle of another protocol" in refusal(start, encoder, tmp_path / "plain.pkl")
    for content in (torch.zeros(3), torch.tensor(1.0), 3, None, "text", [], {}, {"a": [1, ("b",)]}):
        torch.save(content, tmp_path / "a.pth")
        assert refusal(start, encoder, tmp_path / "a.pth").endswith("a.pth: no state dict in this file")


def test_a_smaller_networks_weights_are_not_half_a_larger_ones(state, tmp_path):
    """A ResNet-18 has 100 of a ResNet-34's 180 entries, names and shapes."""
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    larger = make_encoder("resnet34")
    assert refusal(start, larger, tmp_path / "a.pth", "resnet34") == (
        f"--init {tmp_path}/a.pth: only 100 of 180 entries fit resnet34, layer1.2.conv1.weight is missing; another "
        "architecture? see --arch: it holds all of resnet18"
    )
    assert not any(value.any() for value in larger.state_dict().values())
    message = refusal(start, make_encoder("resnet50"), tmp_path / "a.pth", "resnet50")
    assert "layer1.0.conv1.weight has shape (64, 64, 3, 3), resnet50 needs (64, 64, 1, 1); another arch" in message


@pytest.mark.parametrize(("lost", "taken"), [(5, True), (6, False)])
def test_up_to_a_twentieth_may_be_missing(encoder, state, lost, taken, tmp_path, capsys):
    learned = [key for key in state if not key.endswith("num_batches_tracked")]
    torch.save({key: state[key] for key in learned[:-lost]}, tmp_path / "a.pth")
    if not taken:
        message = refusal(start, encoder, tmp_path / "a.pth")
        assert "only 94 of 100 entries fit resnet18, layer4.1.bn1.running_var is missing" in message
        return
    assert start(encoder, tmp_path / "a.pth")["missing"] == 5
    assert "(missing: layer4.1.conv2.weight" in capsys.readouterr().out


def test_half_of_a_3d_network_is_taken_with_a_note(tmp_path, capsys):
    encoder = make_encoder("unet3d_quarter", dims=3)
    state = marked(encoder)
    torch.save({key: value for key, value in state.items() if "down_tr512" not in key}, tmp_path / "a.pth")
    report = start(encoder, tmp_path / "a.pth", "unet3d_quarter")
    assert 0 < report["missing"] < report["matched"]
    assert f"holds a part of unet3d_quarter; the missing {report['missing']} start at" in capsys.readouterr().err


def test_numbers_that_are_no_weights_are_left(encoder, state, tmp_path):
    for odd in (torch.zeros(64, 3, 7, 7, dtype=torch.int8), torch.zeros(64, 3, 7, 7, dtype=torch.complex64),
                torch.zeros(64, 3, 7, 7).to_sparse(), torch.empty(64, 3, 7, 7, device="meta")):  # fmt: skip
        torch.save({**state, "conv1.weight": odd}, tmp_path / "a.pth")
        assert start(encoder, tmp_path / "a.pth")["missing"] == 1


def test_names_of_a_file_do_not_break_lines(encoder, state, tmp_path, capsys):
    torch.save({"a\nb": under("c\x1b[2J.", state), "d\r": under("e\n.", marked(encoder, 5.0))}, tmp_path / "a.pth")
    start(encoder, tmp_path / "a.pth")
    printed = capsys.readouterr()
    assert all(line.isprintable() for line in (printed.out[:-1], printed.err[:-1]))
    torch.save({"odd\nname": torch.zeros(2)}, tmp_path / "a.pth")
    assert "first key is odd?name" in refusal(start, encoder, tmp_path / "a.pth")


# The work ------------------------------------------------------------------------------------------


def test_a_search_looks_at_each_name_a_few_times(encoder):
    """However many names, and dots in them, a file has."""
    wanted, looked = encoder.state_dict(), []

    class Counted(dict):
        def items(self):
            looked.append(len(self))
            return super().items()

    zero = torch.zeros(1)
    entries = Counted({f"{'a.' * 200}{i}.conv1.weight": zero for i in range(2000)})
    tables = tables_of({"a": entries, "b": entries}, "x")
    assert looked == [2000]  # once, though it is there twice
    places = places_of(tables, wanted, [{key: key for key in wanted}])
    assert sum(len(place.names) for place in places) == 2000
    deep = entries
    for _ in range(DEEPEST + 1):
        deep = {"x": deep}
    assert "no state dict" in refusal(tables_of, deep, "x")


# What is like weights, and what is more ------------------------------------------------------------


@pytest.mark.parametrize(
    "place", [("optimizer", "state", "exp_avg"), ("grads",), ("optim_state", "ema"), ("opt", "avg")]
)
def test_moments_and_gradients_come_last(encoder, state, twin, place, tmp_path, capsys):
    """Though they have the weights' names and shapes, and `avg` is a part of one's name."""
    beside = twin
    for key in reversed(place):
        beside = {key: beside}
    for content in (beside | {"weights": state}, {"weights": state} | beside):
        torch.save(content, tmp_path / "a.pth")
        start(encoder, tmp_path / "a.pth")
        assert has(encoder, state)
        assert capsys.readouterr().err == ""
    start(encoder, f"{tmp_path}/a.pth:{'.'.join(place)}")
    assert has(encoder, twin)


@pytest.mark.parametrize(("small", "large"), [("resnet18", "resnet34"), ("resnet50", "resnet152")])
def test_a_part_of_a_larger_network_is_said(small, large, tmp_path, capsys):
    torch.save({"state_dict": under("module.", marked(make_encoder(large)))}, tmp_path / "a.pth")
    start(make_encoder(small), tmp_path / "a.pth", small)
    assert capsys.readouterr().err == (
        f"note: {tmp_path}/a.pth: it is all of a {large}, of which {small} takes a part; "
        f"--arch {large} takes it whole\n"
    )
    start(make_encoder(large), tmp_path / "a.pth", large)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("infix", ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model._fsdp_wrapped_module."])
def test_wrappers_inside_of_names(encoder, state, infix, prefix, tmp_path, capsys):
    names = {key: re.sub(r"^(layer\d\.)(\d\.)", rf"\1{infix}\2{infix}", key) for key in state}
    torch.save({"state_dict": {prefix + names[key]: value for key, value in state.items()}}, tmp_path / "a.pth")
    report = start(encoder, tmp_path / "a.pth")
    assert has(encoder, state)
    assert (report["matched"], report["missing"], report["unexpected"]) == (100, 0, 0)
    assert "would fit" not in capsys.readouterr().out
    assert arch_of(str(tmp_path / "a.pth"), 2) == "resnet18"


def test_the_outermost_that_was_asked_for_is_the_only_one(encoder, state, twin, tmp_path, capsys):
    torch.save({**state, "inner": twin}, tmp_path / "a.pth")
    start(encoder, f"{tmp_path}/a.pth:")
    assert has(encoder, state)
    printed = capsys.readouterr()
    assert "would fit" not in printed.out + printed.err
