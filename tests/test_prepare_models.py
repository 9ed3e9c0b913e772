"""Other people's checkpoints: every format becomes the same ResNet-50, and nothing in a file runs."""

import contextlib
import io
import pickle
import re
import sys
import types
import urllib.error

import numpy as np
import pytest
import torch
import torchvision

from medssl import prepare_models
from medssl.engine import options
from medssl.engine.checkpoint import load_safe
from medssl.errors import InputError
from medssl.models.encoders import IMAGENET, initialise, make_encoder
from medssl.prepare_models import CONVERTERS, convert, files_of, from_byol, main, model_of
from medssl.reading.pickles import PlainUnpickler, read_pickle


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    made = torchvision.models.resnet50()
    with torch.no_grad():
        for name, value in made.state_dict().items():
            if "running" in name or "bn" in name:
                value.uniform_(0.5, 1.5) if value.is_floating_point() else None
    return made


@pytest.fixture(scope="module")
def state(network):
    return network.state_dict()


def body(state):
    return {key: value for key, value in state.items() if not key.startswith("fc.")}


def with_prefix(state, prefix):
    return {prefix + key: value for key, value in state.items()}


EXTRA = torch.zeros(128, 2048)
PUBLISHED = {  # what a file of each model looks like
    "barlowtwins": lambda s: body(s),
    "supervised": lambda s: dict(s),
    "simclr-v1": lambda s: {"state_dict": dict(s)},
    "swav": lambda s: with_prefix(body(s), "module.") | {"module.projection_head.0.weight": EXTRA,
                                                         "module.prototypes.weight": EXTRA},
    "deepcluster-v2": lambda s: with_prefix(body(s), "module.") | {"module.prototypes.prototypes0.weight": EXTRA},
    "sela-v2": lambda s: with_prefix(body(s), "module.") | {"module.prototypes.prototypes1.weight": EXTRA},
    "moco-v1": lambda s: {"state_dict": with_prefix(s, "module.encoder_q.") | with_prefix(s, "module.encoder_k.")
                          | {"module.queue": EXTRA, "module.queue_ptr": torch.zeros(1)}, "epoch": 200},
    "moco-v2": lambda s: {"state_dict": with_prefix(body(s), "module.encoder_q.")
                          | {"module.encoder_q.fc.0.weight": EXTRA, "module.encoder_q.fc.2.weight": EXTRA}},
    "pcl-v1": lambda s: {"state_dict": with_prefix(s, "module.encoder_q.")},
    "pcl-v2": lambda s: {"state_dict": with_prefix(s, "module.encoder_q.")},
    "infomin": lambda s: {"model": with_prefix(body(s), "module.encoder.")
                          | {"module.head.0.weight": EXTRA, "module.head_jig.fc1.weight": EXTRA}},
    "insdis": lambda s: {"model": with_prefix(s, "module.encoder.")},
    "pirl": lambda s: {"model": with_prefix(s, "module.encoder.") | {"module.jigsaw.weight": EXTRA}},
    "cmc": lambda s: {"model": with_prefix(s, "module.encoder1.") | with_prefix(s, "module.encoder2.")},
    "moco-v3": lambda s: {"state_dict": with_prefix(body(s), "module.base_encoder.")
                          | with_prefix(body(s), "module.momentum_encoder.")
                          | {"module.base_encoder.fc.0.weight": EXTRA, "module.predictor.0.weight": EXTRA}},
    "simclr-v2": lambda s: {"resnet": simclr_v2(s), "head": {}},
}  # fmt: skip


def simclr_v2(state):
    """SimCLRv2-PyTorch's names, as methods.md has them."""
    made = {}
    for key, value in body(state).items():
        parts = key.split(".")
        if parts[0] in ("conv1", "bn1"):
            made[f"net.0.{'0' if parts[0] == 'conv1' else '1.0'}.{parts[1]}"] = value
            continue
        home = f"net.{parts[0][5:]}.blocks.{parts[1]}."
        if parts[2] == "downsample":
            place = f"projection.{'shortcut' if parts[3] == '0' else 'bn.0'}.{parts[4]}"
        else:
            number = int(parts[2][-1])
            place = (f"net.{2 * number - 2}." if "conv" in parts[2] else f"net.{2 * number - 1}.0.") + parts[3]
        made[home + place] = value
    return made


def test_every_model_of_the_table_has_a_format():
    assert set(PUBLISHED) | {"byol"} == set(CONVERTERS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_formats(name, state):
    made = CONVERTERS[name](PUBLISHED[name](state))
    wanted = body(state)
    assert made.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[key]) for key, value in made.items())


def haiku(network):
    """BYOL's parameters and state: kernels (h, w, in, out), the initial layers last."""
    params, averages = {}, {}
    last = {}
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.BatchNorm2d):
            short = "shortcut_" if "downsample" in name else ""
            kind = "conv" if isinstance(module, torch.nn.Conv2d) else "batchnorm"
            number = "" if short else f"_{int(name[-1]) - 1}"
            layer = name.split(".")
            home = f"res_net50/~/initial_{kind}"
            if len(layer) > 1:
                group, block = int(layer[0][5:]) - 1, layer[1]
                home = f"res_net50/~/block_group_{group}/~/block_{block}/~/{short}{kind}{number}"
            if kind == "conv":
                entry = {"w": module.weight.detach().numpy().transpose(2, 3, 1, 0)}
            else:
                scale, offset = (x.detach().numpy().reshape(1, 1, 1, -1) for x in (module.weight, module.bias))
                entry = {"scale": scale, "offset": offset}
                for average, x in (("mean_ema", module.running_mean), ("var_ema", module.running_var)):
                    array = x.numpy().reshape(1, 1, 1, -1)
                    averages[f"{home}/~/{average}"] = {"average": array, "counter": np.zeros(())}
            (last if len(layer) == 1 else params)[home] = entry
    params |= last
    params["projector/~/linear_0"] = {"w": np.zeros((2048, 4)), "b": np.zeros(4)}
    params["projector/~/batchnorm"] = {"scale": np.ones(4), "offset": np.zeros(4)}
    return params, averages


def test_byol(network, state, tmp_path):
    params, averages = haiku(network)
    made = from_byol({"experiment_state": {"online_params": params, "online_state": averages}})
    for key, value in made.items():
        assert torch.allclose(value, state[key]), key
    assert len(made) == len([key for key in body(state) if "num_batches" not in key])
    swapped = {key.replace("shortcut_batchnorm", "x").replace("batchnorm_0", "shortcut_batchnorm"): value
               for key, value in params.items()}  # fmt: skip
    with pytest.raises(InputError, match="is in another place than expected"):
        from_byol({"experiment_state": {"online_params": swapped, "online_state": averages}})
    with pytest.raises(InputError, match="a ResNet-50 has 53 and 53"):
        from_byol({"experiment_state": {"online_params": dict(list(params.items())[5:]), "online_state": averages}})


def test_pickles_of_named_tuples_are_read(network, tmp_path):
    """As BYOL's: a named tuple of the experiment's own module, and Haiku's mappings."""
    from typing import NamedTuple

    module, mapping = types.ModuleType("byol_experiment"), types.ModuleType("haiku._src.data_structures")

    class _ByolExperimentState(NamedTuple):
        online_params: object
        target_params: object
        online_state: object
        target_state: object
        opt_state: object

    class FlatMapping(dict):
        def __reduce__(self):
            return FlatMapping, (dict(self),)

    for home, kind in ((module, _ByolExperimentState), (mapping, FlatMapping)):
        kind.__module__, kind.__qualname__ = home.__name__, kind.__name__
        setattr(home, kind.__name__, kind)
        sys.modules[home.__name__] = home
    sys.modules["haiku"] = sys.modules["haiku._src"] = types.ModuleType("haiku")
    params, averages = haiku(network)
    state = _ByolExperimentState(FlatMapping(params), None, FlatMapping(averages), None, (1, 2))
    try:
        (tmp_path / "byol.pkl").write_bytes(pickle.dumps({"experiment_state": state, "step": 7}, protocol=2))
    finally:
        for name in ("byol_experiment", "haiku._src.data_structures", "haiku", "haiku._src"):
            del sys.modules[name]
    made = convert("byol", tmp_path / "byol.pkl")
    assert torch.allclose(made["layer4.2.bn3.running_var"], network.layer4[2].bn3.running_var)


class Attack:
    def __reduce__(self):
        import os

        return os.system, ("touch hacked",)


def test_nothing_in_a_pickle_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "byol.pkl").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(InputError, match="refused: it wants posix.system"):
        convert("byol", tmp_path / "byol.pkl")
    torch.save(Attack(), tmp_path / "swav.pth")
    with pytest.raises(InputError, match="refused, the file wants to run code"):
        convert("swav", tmp_path / "swav.pth")
    assert not (tmp_path / "hacked").exists()
    arrays = {"a": np.arange(3, dtype=np.float32), "b": np.float64(2), "c": [1, (2,)]}
    read = PlainUnpickler(io.BytesIO(pickle.dumps(arrays))).load()
    assert np.array_equal(read["a"], arrays["a"])
    assert read["b"] == 2
    for protocol in range(2, 6):
        again = PlainUnpickler(io.BytesIO(pickle.dumps(arrays, protocol=protocol))).load()
        assert np.array_equal(again["a"], arrays["a"])
    rng, whole = np.random.default_rng(0), pickle.dumps(arrays)
    for _ in range(300):  # damaged files are read as something else, or refused, and nothing besides
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] = rng.integers(256)
        (tmp_path / "byol.pkl").write_bytes(damaged)
        with contextlib.suppress(InputError):
            read_pickle(tmp_path / "byol.pkl")
    for content in (b"", b"junk", pickle.dumps(arrays)[:-9]):
        (tmp_path / "byol.pkl").write_bytes(content)
        with pytest.raises(InputError, match="not a pickle"):
            convert("byol", tmp_path / "byol.pkl")


def test_a_prepared_model_is_an_init_by_its_name(state, tmp_path, capsys):
    files = tmp_path / "downloads"
    files.mkdir()
    torch.save(PUBLISHED["moco-v2"](state), files / "moco_v2_800ep_pretrain.pth.tar")
    torch.save(PUBLISHED["simclr-v2"](state), files / "simclr-v2.pth")
    (files / "swav.pth").write_bytes(b"junk")  # does not keep the others from being converted
    (files / "README").write_text("")
    with pytest.raises(InputError, match="1 of 3 files could not be used: swav.pth"):
        main(["--name", "all", "--file", str(files), "--output", str(tmp_path / "zoo")])
    assert "swav.pth: not a checkpoint" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "zoo").iterdir()} == {"moco-v2.pth", "simclr-v2.pth"}
    prepared = load_safe(tmp_path / "zoo" / "moco-v2.pth")
    assert prepared.keys() == body(state).keys()
    parser = options.Parser("test")
    options.add_network(parser)
    for spelled in ("moco-v2", "MoCo_v2", "mocov2"):
        args = parser.parse_args(["--init", spelled, "--proxy_dir", str(tmp_path / "zoo")])
        assert args.init == str(tmp_path / "zoo" / "moco-v2.pth")
    encoder = make_encoder("resnet50")
    report = initialise(encoder, "resnet50", args.init)
    assert report["missing"] == 0
    assert report["normalization"] == IMAGENET
    raw = initialise(encoder, "resnet50", str(tmp_path / "zoo" / "simclr-v2.pth"))["normalization"]
    assert raw == {"mean": [0, 0, 0], "std": [1, 1, 1]}  # SimCLR's inputs are not normalised
    torchvision.models.resnet50().load_state_dict({**state, **prepared})  # flat, for everyone
    assert torch.equal(encoder.conv1.weight, state["conv1.weight"])
    with pytest.raises(InputError, match="has no effect on --init random"):
        parser.parse_args(["--init", "random", "--proxy_dir", str(tmp_path / "zoo")])
    with pytest.raises(InputError, match="--proxy-dir nowhere: no such folder"):
        parser.parse_args(["--proxy_dir", "nowhere"])
    with pytest.raises(InputError, match="no such model in .*zoo, which has moco-v2, simclr-v2"):
        parser.parse_args(["--init", "byol", "--proxy_dir", str(tmp_path / "zoo")])
    with pytest.raises(InputError, match="--proxy-dir .*gone: no such folder"):
        parser.parse_args(["--init", "byol", "--proxy_dir", str(tmp_path / "gone")])


def test_names():
    assert model_of("moco_v2_800ep_pretrain.pth.tar") == "moco-v2"
    assert model_of("SwAV_800ep.pth") == "swav"
    assert model_of("supervised.pth") == "supervised"
    assert model_of("notes.txt") is None
    assert prepare_models.get_parser().parse_args(["--name", "byol", "--file", "x"]).output == "models_zoo"


def test_bad_input(state, tmp_path):
    for name, given, message in (
        ("nothing", tmp_path, "--name nothing: unknown; known are barlowtwins, byol"),
        ("swav", tmp_path / "gone.pth", "--file .*gone.pth: no such file"),
        ("swav", tmp_path, "a folder; give the model's file, or --name all"),
        ("all", tmp_path, "no file there is named after a model"),
    ):
        with pytest.raises(InputError, match=message):
            files_of(name, given)
    torch.save(PUBLISHED["cmc"](state), tmp_path / "x.pth")
    with pytest.raises(InputError, match="x.pth: has no conv1.weight; is it swav's ResNet-50"):
        convert("swav", tmp_path / "x.pth")
    with pytest.raises(InputError, match="not a folder, which --name all wants"):
        files_of("all", tmp_path / "x.pth")
    small = {"state_dict": with_prefix(torchvision.models.resnet18().state_dict(), "module.encoder_q.")}
    torch.save(small, tmp_path / "moco-v2.pth")
    with pytest.raises(InputError, match="moco-v2.pth: (has no layer1.0.conv3.weight|layer1.0.conv1.weight has shape)"):
        convert("moco-v2", tmp_path / "moco-v2.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "x.pth").read_bytes()[:-1000])
    with pytest.raises(InputError, match="not a checkpoint, or a truncated one"):
        convert("cmc", tmp_path / "cut.pth")
    torch.save({**state, "conv1.weight": torch.full_like(state["conv1.weight"], torch.nan)}, tmp_path / "nan.pth")
    with pytest.raises(InputError, match="its features are not finite"):
        convert("supervised", tmp_path / "nan.pth")
    torch.save({**body(state), "extra.weight": EXTRA}, tmp_path / "more.pth")
    with pytest.raises(InputError, match="has extra.weight, which ResNet-50 has not"):
        convert("barlowtwins", tmp_path / "more.pth")
    for name, content in (
        ("swav", {1: EXTRA}), ("byol", {"experiment_state": {"online_params": [], "online_state": []}}),
        ("byol", {"experiment_state": {"online_params": {3: {}}, "online_state": {}}}),
        ("supervised", {**state, "conv1.weight": state["conv1.weight"].to_sparse()}),
        ("supervised", {**state, "conv1.weight": state["conv1.weight"].to(torch.complex64)}),
    ):  # fmt: skip
        path = tmp_path / f"odd_{name}"
        path.write_bytes(pickle.dumps(content)) if name == "byol" else torch.save(content, path)
        with pytest.raises(InputError, match="odd_.*(not laid out as|holds no plain numbers)"):
            convert(name, path)
    torch.save({key: value.half() if value.is_floating_point() else value for key, value in state.items()}, path)
    assert convert("supervised", path)["conv1.weight"].dtype == torch.float32


# Downloads -----------------------------------------------------------------------------------------


def test_without_a_name_what_can_be_downloaded_is(state, tmp_path, monkeypatch, capsys):
    """Once: what is there stays, also after a failure, which names what to do."""
    asked, names = [], ("moco-v1", "moco-v2", "swav")

    def fetch(url, path, progress):
        asked.append(url)
        if "moco_v2" in url and asked.count(url) == 1:
            raise urllib.error.URLError("no route to host")
        torch.save(PUBLISHED[next(name for name in names if prepare_models.URLS[name] == url)](state), path)

    monkeypatch.setattr(prepare_models, "URLS", {name: prepare_models.URLS[name] for name in names})
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    with pytest.raises(InputError, match="1 of 3 files could not be used: moco-v2"):
        main(["--output", str(tmp_path)])
    assert {path.stem for path in tmp_path.glob("*.pth")} == {"moco-v1", "swav"}
    assert re.search("moco-v2: could not be downloaded from https.* give --name moco-v2", capsys.readouterr().err)
    main(["--output", str(tmp_path)])
    assert len(asked) == 4  # the first once, the second twice, the third
    assert {path.stem for path in tmp_path.glob("*.pth")} == set(names)
    for words in (["--name", "byol"], ["--file", "x.pth"]):
        with pytest.raises(InputError, match="--name and --file belong together"):
            main(words)
