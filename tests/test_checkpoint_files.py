"""Checkpoints that were made to do harm, or that the machine lacks something to read: none ends the process, none ends
in a traceback, and none is blamed for what is not its fault."""

import collections
import contextlib
import errno
import gc
import io
import os
import pickle
import resource
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_hostile import outcome

from medssl import prepare_models
from medssl.benchmarks import readers
from medssl.engine import opcodes, state
from medssl.engine.checkpoint import load_safe
from medssl.engine.opcodes import DEEPEST, end_of_pickle
from medssl.errors import FEW_FILES, InputError, explain, unreadable, unusable
from medssl.models.encoders import arch_of, check_weights, initialise, initialise_unet, make_encoder, read_encoder
from medssl.models.unet2d import UNet2d


def archive(path, raw):
    """torch's archive of a pickle."""
    torch.save({"a": torch.zeros(2)}, path.with_suffix(".whole"))
    with zipfile.ZipFile(path.with_suffix(".whole")) as whole, zipfile.ZipFile(path, "w") as forged:
        for name in whole.namelist():
            forged.writestr(name, raw if name.endswith("data.pkl") else whole.read(name))


def legacy(path, raw, names=b"\x80\x02]."):
    """A file as torch wrote them before 1.6."""
    made = io.BytesIO()
    torch.save({}, made, _use_new_zipfile_serialization=False)
    first, at = made.getvalue(), 0
    for _ in range(3):
        at = end_of_pickle(first, at)
    path.write_bytes(first[:at] + raw + names)


# Tuples in tuples ----------------------------------------------------------------------------------

DEEP = b")" + b"\x85" * 200_000
KEPT = b"".join(b"h\x01\x85q\x01" for _ in range(200_000))  # each from the memo
KEPT_FAR = b"".join(b"h\x01K\x05\x86r\x01\0\0\0" for _ in range(200_000))
IN_STORAGES = b"".join(b"(h\x02h\x03X\x01\x00\x00\x000h\x01K\x02tq\x01Q" for _ in range(200_000))
IN_TENSORS = b"".join(
    b"h\x05((h\x02h\x03X\x01\x00\x00\x000h\x01K\x02tq\x01QK\0K\x02\x85K\x01\x85\x89h\x04)RtR" for _ in range(200_000)
)
CLASSES = (
    b"X\x07\0\0\0storageq\x02ctorch\nFloatStorage\nq\x03ccollections\nOrderedDict\nq\x04"
    b"ctorch._utils\n_rebuild_tensor_v2\nq\x05"
)
HASHED = {
    "a key": b"}" + DEEP + b"Ns",
    "keys": b"}(K\x01K\x02" + DEEP + b"Nu",
    "in pairs": b"})" + b"N\x86" * 200_000 + b"Ns",
    "in threes": b"})" + b"NN\x87" * 200_000 + b"Ns",
    "in any number": b"}" + b"(" * 200_000 + b"t" * 200_000 + b"Ns",
    "from the memo": b")q\x01](" + KEPT + b"e}h\x01Ns",
    "from the memo, far": b")q\x01](" + KEPT_FAR + b"e}h\x01Ns",
    "as a storage's device": CLASSES + b")q\x01](" + IN_STORAGES + b"e}h\x01Ns",
    "as a tensor's device": CLASSES + b")q\x01](" + IN_TENSORS + b"e}h\x01Ns",
    "a set": b"cbuiltins\nset\n](" + DEEP + b"e\x85R",
    "counted": b"ccollections\nCounter\n](" + DEEP + b"e\x85R",
    "an ordered key": b"ccollections\nOrderedDict\n](" + DEEP + b"N\x86e\x85R",
}


@pytest.mark.parametrize("form", HASHED)
@pytest.mark.parametrize("write", [archive, legacy])
def test_deep_tuples_are_never_hashed(write, form, tmp_path):
    write(tmp_path / "a.pt", b"\x80\x02" + HASHED[form] + b".")
    said = outcome(load_safe, tmp_path / "a.pt")
    assert said == (
        f"refused: {tmp_path}/a.pt: refused, it holds tuples more than 100 deep in one another, which no weights need; "
        "where it was made, save them anew: torch.save(model.state_dict(), FILE)"
    )


def test_deep_names_of_storages(tmp_path):
    """Which old files have behind their content."""
    legacy(tmp_path / "a.pt", b"\x80\x02}.", b"\x80\x02](" + DEEP + b"e.")
    assert "refused, it holds tuples more than 100 deep" in outcome(load_safe, tmp_path / "a.pt")


def test_an_archive_behind_a_file_hides_nothing(tmp_path):
    """torch goes by the first bytes, and other readers by the last; of a name, by the first entry or the last."""
    archive(tmp_path / "good.pt", b"\x80\x02}.")
    legacy(tmp_path / "a.pt", b"\x80\x02}" + DEEP + b"Ns.")
    with open(tmp_path / "a.pt", "ab") as file:
        file.write((tmp_path / "good.pt").read_bytes())
    assert "refused, it holds tuples more than 100 deep" in outcome(load_safe, tmp_path / "a.pt")
    torch.save({}, tmp_path / "whole.pt")
    for deep_first in (True, False):
        with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(tmp_path / "b.pt", "w") as forged:
            for name in whole.namelist():
                forged.writestr(name, whole.read(name))
            deep, plain = b"\x80\x02}" + DEEP + b"Ns.", b"\x80\x02}."
            forged.writestr("other/data.pkl", deep if deep_first else plain)
            forged.writestr("other/deep/data.pkl", plain if deep_first else deep)
        assert outcome(load_safe, tmp_path / "b.pt") == "read" or "refused" in outcome(load_safe, tmp_path / "b.pt")


@pytest.mark.parametrize("form", [b"]" + b"]" * 200_000 + b"a" * 200_000, b"}" + b"K\1}" * 200_000 + b"s" * 200_000])
def test_other_deep_things_are_read(form, tmp_path):
    archive(tmp_path / "a.pt", b"\x80\x02" + form + b".")
    assert outcome(load_safe, tmp_path / "a.pt") == "read"


def nested(levels):
    made = ()
    for _ in range(levels - 1):
        made = (made, 1)
    return made


def test_depths_are_counted(tmp_path):
    for zipped in (True, False):
        torch.save({nested(DEEPEST): 1}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
        assert load_safe(tmp_path / "a.pt") == {nested(DEEPEST): 1}
        torch.save({"a": [nested(DEEPEST + 2)]}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
        assert "deep" in outcome(load_safe, tmp_path / "a.pt")


def test_every_opcode_that_torch_reads_is_known():
    """Where a pickle ends tells that each was passed by its length."""
    weight = torch.arange(6.0).reshape(2, 3)
    numbers = [1, 300, 2**20, 2**40, -5, 1.5, None, True, False, (), (1,), (1, 2), (1, 2, 3), (1,) * 9]
    content = {
        "numbers": numbers, "text": "x" * 300, "set": {3, 4}, b"b": b"bytes",
        "whole": weight, "view": weight[1], "double": torch.nn.Parameter(weight.double()),
    }  # fmt: skip
    for zipped in (True, False):
        made = io.BytesIO()
        torch.save(content | {str(i): torch.zeros(i % 7 + 1) for i in range(400)}, made,
                   _use_new_zipfile_serialization=zipped)  # fmt: skip
        data = zipfile.ZipFile(made).read("archive/data.pkl") if zipped else made.getvalue()
        at = 0
        for _ in range(1 if zipped else 5):
            at = end_of_pickle(data, at)
            assert data[at - 1 : at] == pickle.STOP
        assert not zipped or at == len(data)


def test_tensors_are_passed_at_once(monkeypatch):
    """Else files of many thousands would take seconds."""
    looked = []

    class Counted(bytes):
        def __getitem__(self, where):
            looked.append(where)
            return super().__getitem__(where)

    monkeypatch.setattr(opcodes, "_key", lambda operation: bytes(operation[1:]).rstrip(b"\0"))
    for zipped in (True, False):
        made = io.BytesIO()
        torch.save({str(i): torch.zeros(2, 3) for i in range(1000)}, made, _use_new_zipfile_serialization=zipped)
        data, at = zipfile.ZipFile(made).read("archive/data.pkl") if zipped else made.getvalue(), 0
        looked.clear()
        for _ in range(1 if zipped else 4):
            at = end_of_pickle(Counted(data), at)
        assert len(looked) < 8 * 1000


# What the machine lacks ----------------------------------------------------------------------------


def told(path, more=2**24):
    """Read with 16 MB more of memory than there is in use, and say what a script would."""
    gc.collect()  # else what earlier tests left may be freed later, and makes room
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + more,) * 2)
    try:
        load_safe(path)
    except Exception as error:
        raise InputError(explain(error)) from None


@pytest.mark.parametrize("kind", ["zipped", "old", "safetensors"])
def test_memory_for_a_good_file(kind, tmp_path):
    """It was called damaged, and who follows that line loses the run."""
    weights, path = {"a": torch.zeros(2**24)}, tmp_path / "last.pt"
    if kind == "safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=kind == "zipped")
    assert outcome(told, path).startswith("refused: out of memory")
    path.write_bytes(path.read_bytes()[:-1000])  # is damaged with any memory
    assert outcome(load_safe, path) == f"refused: {path}: not a checkpoint, or a truncated one"


CLAIMS = {
    "a tensor": b"ctorch\nTensor\n\x8a\x06\0\0\0\0\0\x20\x85R",
    "bytes": b"cbuiltins\nbytearray\n\x8a\x06\0\0\0\0\0\x20\x85R",
    "a view": CLASSES + b"h\x05((h\x02h\x03X\x01\x00\x00\x000X\x03\0\0\0cpuK\x02tQK\0"
    b"\x8a\x06\0\0\0\0\0\x20\x85K\x01\x85\x89h\x04)RtR",
}  # fmt: skip


@pytest.mark.parametrize("claim", CLAIMS)
def test_terabytes_that_a_small_file_claims_are_its_fault(claim, tmp_path):
    archive(tmp_path / "a.pt", b"\x80\x02" + CLAIMS[claim] + b".")
    said = outcome(partial(told, more=2**26), tmp_path / "a.pt")
    assert said == f"refused: {tmp_path}/a.pt: not a checkpoint, or a truncated one"


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_a_disk_that_fails_is_not_the_files_fault(number, tmp_path, monkeypatch):
    """Its error names no file."""

    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    torch.save({"a": torch.zeros(2)}, tmp_path / "a.pt")
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(OSError, match=os.strerror(number)) as raised:
        load_safe(tmp_path / "a.pt")
    lines = {errno.ENOMEM: "out of memory; use a smaller --b, or fewer --workers"}
    lines |= dict.fromkeys((errno.EMFILE, errno.ENFILE), FEW_FILES)
    assert explain(raised.value) == lines.get(number, f"{tmp_path}/a.pt: {os.strerror(number)}")


def no_memory(*_):
    torch.empty(2**50)


def no_gpu_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has")


@pytest.mark.parametrize("fail", [no_memory, no_gpu_memory])
def test_memory_is_no_files_fault(fail, tmp_path, monkeypatch):
    for blaming in (unreadable(), unusable("a", "is damaged")):
        with pytest.raises(RuntimeError) as raised, blaming:
            fail()
        assert explain(raised.value).startswith("out of ")
    torch.save({"a": torch.zeros(2)}, tmp_path / "a.pt")
    if fail is no_gpu_memory:
        monkeypatch.setattr(torch, "load", lambda *_, **__: fail())
        with pytest.raises(torch.OutOfMemoryError):
            load_safe(tmp_path / "a.pt")
        monkeypatch.undo()
    readers.make_run(tmp_path)
    monkeypatch.setattr(state, "load_optimizer", fail)
    with pytest.raises(RuntimeError) as raised:
        readers.read_run(tmp_path)
    assert explain(raised.value).startswith("out of ")


def test_moments_that_claim_terabytes_are_the_files_fault(tmp_path):
    readers.make_run(tmp_path)
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    saved["optimizer"]["state"][0]["exp_avg"] = torch.zeros(1, dtype=torch.float64).expand(2**50)
    torch.save(saved, tmp_path / "last.pt")
    with pytest.raises(InputError, match="its checkpoint does not fit: the optimizer's exp_avg has shape"):
        readers.read_run(tmp_path)


# Laid out as no checkpoint is ----------------------------------------------------------------------


class Shadowed(dict):
    """Becomes an OrderedDict whose pickle gives it attributes that stand before its methods."""

    def __reduce__(self):
        before = dict.fromkeys(("items", "get", "keys", "values", "copy", "__iter__"), 5)
        return collections.OrderedDict, (), {**before, "_metadata": {"": 5}}, None, iter(dict.items(self))


def shadowed_tensor(value):
    made = torch.nn.Parameter(value, requires_grad=False)
    vars(made).update(dict.fromkeys(("is_floating_point", "to", "expand", "detach", "is_complex"), 5))
    return made


@pytest.fixture(scope="module")
def weights():
    return {key: value.clone() for key, value in make_encoder("resnet18").state_dict().items()}


SAID = {"arch": "resnet18", "dims": 2, "version": 2}
NORMAL = {"mean": [0.5] * 3, "std": [0.5] * 3}
NESTED = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
READ = {  # as what they are without what is odd
    "dimensions of two numbers": lambda w: {"state_dict": w, **SAID, "dims": torch.tensor([1, 2])},
    "a nested tensor beside": lambda w: {"state_dict": w, "other": {"a": NESTED}, "list": [NESTED]},
    "a dictionary's methods": lambda w: {"state_dict": Shadowed(w)},
    "all dictionaries' methods": lambda w: Shadowed({**SAID, "state_dict": Shadowed(w), "normalization": NORMAL}),
    "a tensor's methods": lambda w: {key: shadowed_tensor(value) for key, value in w.items()},
    "odd keys": lambda w: {"state_dict": w, torch.zeros(2): w["conv1.weight"], (1, (2,)): {3: w["conv1.weight"]}},
}
REFUSED = {
    "a nested tensor": lambda w: {"state_dict": {**dict.fromkeys(w, NESTED)}},
    "endless numbers": lambda w: {"state_dict": w, **SAID, "normalization": {**NORMAL, "mean": [10**400] * 3}},
    "a tensor as architecture": lambda w: {"state_dict": w, **SAID, "arch": NESTED, "normalization": {"mean": NESTED}},
    "a key of many digits": lambda w: {"state_dict": w, 10**5000: {"a": torch.zeros(2)}},
    "tensors for the rest": lambda w: {"state_dict": NESTED, **dict.fromkeys(SAID, NESTED), "normalization": NESTED},
}  # fmt: skip


def uses(path, network):
    """Every way by which scripts read a file of weights; each reads or refuses it."""
    for use in (
        lambda: initialise(network.encoder, "resnet18", str(path)),
        lambda: initialise_unet(network, "resnet18", str(path), "encoder+decoder"),
        lambda: arch_of(str(path), 2), lambda: read_encoder(path), lambda: check_weights(f"{path}:x", "resnet18"),
        lambda: prepare_models.convert("supervised", path),
    ):  # fmt: skip
        with contextlib.suppress(InputError):
            use()


@pytest.mark.parametrize("kind", [*READ, *REFUSED])
def test_what_is_laid_out_oddly(kind, weights, tmp_path):
    path = tmp_path / "a.pt"
    torch.save({**READ, **REFUSED}[kind](weights), path)
    network = UNet2d("resnet18", 1)
    encoder = network.encoder
    if kind in READ:
        assert initialise(encoder, "resnet18", str(path))["missing"] == 0
        assert all(torch.equal(value, weights[key]) for key, value in encoder.state_dict().items())
    else:
        with pytest.raises(InputError, match="a.pt"):
            initialise(encoder, "resnet18", str(path))
    uses(path, network)


@pytest.mark.parametrize("fault", [AttributeError, RecursionError, OverflowError, TypeError])
def test_whatever_looking_ends_in_is_refused(fault, weights, tmp_path, monkeypatch):
    """The kinds above are those that were met; others are told alike."""

    def fail(*_):
        raise fault("of something else")

    torch.save(weights, tmp_path / "a.pt")
    monkeypatch.setattr("medssl.models.weights.tables_of", fail)
    for use in (lambda path: initialise(make_encoder("resnet18"), "resnet18", path), read_encoder,
                lambda path: arch_of(path, 2), lambda path: check_weights(path, "resnet18")):  # fmt: skip
        with pytest.raises(InputError, match="a.pt: not laid out as a checkpoint; where it was made, save them anew"):
            use(str(tmp_path / "a.pt"))


@pytest.mark.parametrize(
    "change",
    [{"name": NESTED}, {"config": NESTED}, {"method": Shadowed(a=5)}, {"optimizer": Shadowed(state=Shadowed())}],
)
def test_a_run_that_is_laid_out_oddly(change, tmp_path):
    readers.make_run(tmp_path)
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    torch.save(Shadowed({**saved, **change}), tmp_path / "last.pt")
    with pytest.raises(InputError, match=str(tmp_path)):
        readers.read_run(tmp_path)
    torch.save(Shadowed(saved), tmp_path / "last.pt")
    readers.read_run(tmp_path)


def test_metadata_nested_without_end(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors", {"deep": "[" * 10**5, "plain": "3"})
    assert load_safe(tmp_path / "a.safetensors")["plain"] == 3
