"""The loop: what it computes, how it continues, how it stops, and what it says to bad input."""

import argparse
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from process_tools import members
from torch import nn

from medssl import errors, train_pcrlv2, train_simclr
from medssl.datasets import registry
from medssl.datasets.base import ImageDataset, Info, to_texture
from medssl.datasets.identity import data_digest
from medssl.datasets.phantoms.radiograph import radiographs
from medssl.engine import checkpoint, guards, options, parallel
from medssl.engine.batches import evaluation_batches
from medssl.engine.guards import BadFiles, Stop
from medssl.engine.loop import fit, gradients_of
from medssl.engine.method import Method
from medssl.engine.order import Order, learning_rate, make_optimizer
from medssl.engine.parallel import Devices
from medssl.errors import InputError, UnreadableImage
from medssl.models.encoders import IMAGENET
from medssl.study import plan
from medssl.views.of_images import ClassificationViews

ROOT = Path(__file__).parents[1]
CPU = Devices(torch.device("cpu"))
SCRIPTS = [path.stem for path in sorted(ROOT.glob("*.py")) if "\ndef cli(" in path.read_text()]


# A real run, in this process and in others ---------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of ten radiographs: with 4 images a step, an epoch ends in the middle of step 3."""
    folder = tmp_path_factory.mktemp("images")
    for i, pixels in enumerate(radiographs(10, 64, seed=1)[0]):
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    return folder


def command(images, output, *more):
    size = ["--image-size", "32", "--local-size", "32", "--local-views", "2", "--b", "4", "--epochs", "8"]
    run = ["--workers", "0", "--device", "cpu", "--log-every", "1", "--data", str(images), "--output", str(output)]
    return [*size, *run, *map(str, more)]


def train(images, output, *more):
    """Run train_pcrlv2 in this process, which must not lean on earlier random states."""
    torch.manual_seed(0)
    train_pcrlv2.main(command(images, output, *more))


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """An uninterrupted run of 8 steps, and its checkpoint after 4."""
    folder = tmp_path_factory.mktemp("whole")
    train(images, folder, "--steps", 4)
    (folder / "last.pt").rename(folder / "four.pt")
    train(images, folder, "--steps", 8, "--resume", "never")
    return folder


def metrics(folder):
    """The lines of metrics.jsonl without measured times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = ("images_per_s", "data_wait", "peak_memory_mib")
    return [{k: v for k, v in line.items() if k not in times} for line in lines]


def assert_equal(a, b, where=""):
    """Bit for bit, through dicts and lists."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_equal(x, y, f"{where}.{i}")
    else:
        assert a == b, where


def assert_same_run(folder, reference, name="last.pt"):
    one, two = (checkpoint.load_safe(path) for path in (folder / "last.pt", reference / name))
    for key in ("step", "method", "optimizer", "scaler", "images"):
        assert_equal(one[key], two[key], key)
    steps = one["step"]
    assert metrics(folder) == metrics(reference)[:steps]
    assert [line["step"] for line in metrics(folder)] == list(range(1, steps + 1))


def test_a_run_learns_and_leaves_its_files(whole):
    lines = metrics(whole)
    assert len(lines) == 8
    wanted = {"step", "epoch", "loss", "restoration", "intermediate", "siamese", "local", "lr", "grad_norm"}
    assert set(lines[0]) == wanted | {"feature_std"}
    assert lines[-1]["epoch"] == 3.2
    for line in lines:
        parts = sum(line[k] for k in ("restoration", "intermediate", "siamese", "local"))
        assert line["loss"] == pytest.approx(parts, rel=1e-5)
    assert lines[-1]["restoration"] < lines[0]["restoration"]
    names = {path.name for path in whole.iterdir()}
    assert {"last.pt", "encoder.pt", "config.json", "metrics.jsonl", "samples", "tensorboard"} <= names
    config = json.loads((whole / "config.json").read_text())
    assert (config["method"], config["lr"], config["b"]) == ("PCRLv2", 0.01, 4)
    for name in ("step_0000000.png", "step_0000008.png"):
        assert np.array(Image.open(whole / "samples" / name)).std() > 20


def test_each_losss_gradient_is_logged_and_changes_nothing(images, whole, tmp_path):
    """β fades one term, whose gradient fades with it; a run without the numbers continues to the same bits."""
    train(images, tmp_path, "--steps", 2, "--log-gradients")
    lines = metrics(tmp_path)
    names = {f"gradient_{name}" for name in ("restoration", "intermediate", "siamese", "local")}
    assert all(names < set(line) and all(line[name] > 0 for name in names) for line in lines)
    train(images, tmp_path, "--steps", 4)
    one, two = (checkpoint.load_safe(path) for path in (tmp_path / "last.pt", whole / "four.pt"))
    assert_equal(one["method"], two["method"])
    assert not any(name in line for line in metrics(tmp_path)[2:] for name in names)


def test_gradients_in_the_encoder_by_hand():
    class Two(Method):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 1, bias=False)

        def encoder_state(self):
            return self.encoder.state_dict()

    method = Two()
    x = torch.tensor([[3.0, 4.0]])
    losses = {"first": method.encoder(x)[:, 0].sum(), "head": (method.head.weight**2).sum(), "none": torch.zeros(())}
    found = gradients_of(method, losses)
    assert {name: float(value) for name, value in found.items()} == {"gradient_first": 5.0, "gradient_head": 0.0}


@pytest.mark.parametrize(("first", "second"), [(0, 0), (2, 0), (0, 2)])
def test_four_steps_are_two_and_two(images, whole, tmp_path, first, second):
    """Also with decoding processes in one half; the epoch ends within step 3."""
    train(images, tmp_path, "--steps", 2, "--workers", first)
    assert checkpoint.load_safe(tmp_path / "last.pt")["step"] == 2
    train(images, tmp_path, "--steps", 4, "--workers", second)
    assert_same_run(tmp_path, whole, "four.pt")


def test_logging_and_saving_change_nothing(images, whole, tmp_path):
    train(images, tmp_path, "--steps", 8, "--log-every", 3, "--save-every", 3)
    one, two = (checkpoint.load_safe(folder / "last.pt") for folder in (tmp_path, whole))
    assert_equal(one["method"], two["method"])
    assert [line["step"] for line in metrics(tmp_path)] == [3, 6, 8]
    assert metrics(tmp_path)[1] == metrics(whole)[5]


def test_seed_matters(images, whole, tmp_path):
    train(images, tmp_path, "--steps", 1, "--seed", 1)
    assert metrics(tmp_path)[0]["loss"] != metrics(whole)[0]["loss"]


def test_resume_from_a_file_into_another_folder(images, whole, tmp_path):
    train(images, tmp_path, "--steps", 6, "--resume", whole / "four.pt")
    assert [line["step"] for line in metrics(tmp_path)] == [5, 6]
    assert metrics(tmp_path) == metrics(whole)[4:6]


def test_finished_run_is_left_alone(images, tmp_path, capsys):
    train(images, tmp_path, "--steps", 1)
    before = (tmp_path / "last.pt").read_bytes()
    train(images, tmp_path, "--steps", 1)
    assert "was complete" in capsys.readouterr().out
    assert (tmp_path / "last.pt").read_bytes() == before
    assert len(metrics(tmp_path)) == 1


def start(images, output, *more):
    """A process group of its own, killed after three logged steps by the caller."""
    line = [sys.executable, str(ROOT / "train_pcrlv2.py"), *command(images, output, "--steps", 8, *more)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        line, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def after_lines(process, output, count):
    """Wait until `count` steps are logged."""
    path, deadline = output / "metrics.jsonl", time.monotonic() + 300
    while not path.exists() or path.read_text().count("\n") < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_killed_run_continues_bit_for_bit(images, whole, tmp_path):
    process = start(images, tmp_path, "--save-every", 2)
    after_lines(process, tmp_path, 3)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    saved = checkpoint.load_safe(tmp_path / "last.pt")["step"]
    assert 2 <= saved < 8
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')  # a line that the kill has cut
    train(images, tmp_path, "--steps", 8)
    assert_same_run(tmp_path, whole)


@pytest.mark.slow
def test_sigterm_saves_and_continues(images, whole, tmp_path):
    """The signal goes to all processes of the run, decoding ones too, as schedulers send it."""
    process = start(images, tmp_path, "--workers", 2)
    after_lines(process, tmp_path, 3)
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    done = checkpoint.load_safe(tmp_path / "last.pt")["step"]
    assert 3 <= done < 8
    assert f"stopped after step {done}; state saved, the same command continues" in out
    assert "Traceback" not in err
    assert len(metrics(tmp_path)) == done
    assert not (tmp_path / "encoder.pt").exists()
    deadline = time.monotonic() + 10
    while members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert members(process.pid) == []
    train(images, tmp_path, "--steps", 8)
    assert_same_run(tmp_path, whole)


def test_second_signal_acts_as_usual():
    # A shell starts its background jobs with SIGINT ignored; this process shall act as in the foreground.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.signal == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, previous)


# Bad input -----------------------------------------------------------------------------------------


def refused(capsys, images, output, *more):
    """Exit code 2 and one line on standard error → that line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        errors.run_script(lambda: train(images, output, *more))
    assert error.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def test_changed_options_are_refused(images, whole, tmp_path, capsys):
    (tmp_path / "last.pt").write_bytes((whole / "four.pt").read_bytes())
    before = (tmp_path / "last.pt").read_bytes()
    message = refused(capsys, images, tmp_path, "--lr", 0.5)
    assert f"{tmp_path}/last.pt: was started with lr 0.01, now 0.5; use the same value" in message
    assert "--resume never" in message
    assert "was started with arch resnet18, now resnet34" in refused(capsys, images, tmp_path, "--arch", "resnet34")
    assert "started with jitter" in refused(capsys, images, tmp_path, "--jitter", 0, 0, 0, 0)
    assert (tmp_path / "last.pt").read_bytes() == before
    assert not (tmp_path / "config.json").exists()


def test_other_data_is_refused(images, whole, tmp_path, capsys):
    (tmp_path / "last.pt").write_bytes((whole / "four.pt").read_bytes())
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    for i in range(9):
        (fewer / f"{i:02d}.png").write_bytes((images / f"{i:02d}.png").read_bytes())
    message = refused(capsys, fewer, tmp_path, "--steps", 6)
    assert "last.pt: was started with other data: images, their order, lists or labels differ, or an" in message
    # As many images of the same names, of which one has another content; and the same images elsewhere.
    moved = tmp_path / "moved"
    shutil.copytree(images, moved)
    train(moved, tmp_path, "--steps", 5)
    Image.new("L", (64, 64)).save(moved / "03.png")
    assert "was started with other data" in refused(capsys, moved, tmp_path, "--steps", 6)
    content = checkpoint.load_safe(tmp_path / "last.pt")
    del content["config"]["data_digest"]  # as runs of older versions
    checkpoint.save_atomic(content, tmp_path / "last.pt")
    train(moved, tmp_path, "--steps", 6)


def test_data_digests():
    def digest(names=("a", "b"), labels=(0, 1), level=0):
        def read(i):
            return np.full((4, 4), level + i, np.uint8)

        return data_digest({"train": ImageDataset(Info("x"), read, names, torch.tensor(labels))})

    assert digest() == digest()
    assert len({digest(), digest(names="ac"), digest(names="ba"), digest(labels=(1, 0)), digest(level=1)}) == 5


def test_other_methods_checkpoint_is_refused(images, whole, tmp_path, capsys):
    content = checkpoint.load_safe(whole / "four.pt") | {"name": "C2L"}
    checkpoint.save_atomic(content, tmp_path / "last.pt")
    message = refused(capsys, images, tmp_path)
    assert "last.pt: a run of C2L, not PCRLv2; choose another --output" in message
    assert checkpoint.load_safe(tmp_path / "last.pt")["name"] == "C2L"


def test_truncated_checkpoint_is_refused(images, whole, tmp_path, capsys):
    whole_file = (whole / "four.pt").read_bytes()
    for share in (0.0005, 0.6):
        (tmp_path / "last.pt").write_bytes(whole_file[: int(share * len(whole_file))])
        message = refused(capsys, images, tmp_path)
        assert f"{tmp_path}/last.pt: not a checkpoint, or a truncated one" in message


def test_encoder_is_no_run(images, whole, tmp_path, capsys):
    assert "not a checkpoint that can be continued" in refused(
        capsys, images, tmp_path, "--resume", whole / "encoder.pt"
    )
    assert "no such checkpoint file" in refused(capsys, images, tmp_path, "--resume", tmp_path / "absent.pt")


def test_output_that_cannot_be_written(images, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    message = refused(capsys, images, tmp_path / "file" / "run")
    assert str(tmp_path / "file") in message
    assert str(tmp_path / "file") in refused(capsys, images, tmp_path / "file")


def test_empty_and_missing_folders(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "no images" in refused(capsys, tmp_path / "empty", tmp_path / "run")
    assert "no such file or folder" in refused(capsys, tmp_path / "absent", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_ratio_and_dimension(images, tmp_path, capsys):
    assert "--ratio 0.01: leaves none of 10 images" in refused(capsys, images, tmp_path / "run", "--ratio", 0.01)
    assert "no volumes in this folder" in refused(capsys, images, tmp_path / "run", "--d", 3)


@pytest.fixture
def four_gpus(monkeypatch):
    """A stand-in: torch counts four, and nothing is put on them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *_, **__: None)


def test_all_visible_gpus_are_used(four_gpus, capsys):
    devices = parallel.setup(None, "auto", False)
    assert (devices.device, devices.device_ids, devices.parts) == (torch.device("cuda", 0), [0, 1, 2, 3], 4)
    assert capsys.readouterr().out.startswith("4 GPUs: each batch is split over all of them; --gpus 0 uses one")
    assert parallel.setup([0], "auto", False).device_ids == [0]
    assert parallel.setup([1, 3], "auto", False).device_ids == [1, 3]
    assert parallel.setup(None, "auto", False, several=False).device_ids == [0]
    assert parallel.setup(None, "cpu", False).device_ids == []
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("b", "views", "compiled", "count"),
    [(8, 1, False, 4), (12, 1, False, 4), (6, 1, False, 3), (4, 1, False, 2), (4, 4, False, 4), (7, 1, False, 1),
     (2, 1, False, 1), (64, 1, True, 1)],
)  # fmt: skip
def test_a_batch_is_split_over_as_many_as_it_can(four_gpus, capsys, b, views, compiled, count):
    devices = parallel.setup(None, "auto", False)
    capsys.readouterr()
    devices.narrow(b, views, compiled)
    assert devices.device_ids == list(range(count))
    assert (f"{count} of the 4 GPUs" in capsys.readouterr().out) == (count < 4)
    if not compiled:
        devices.own_rows(b, views)  # which refuses what cannot be split
    asked = parallel.setup([0, 1, 2, 3], "auto", False)
    asked.narrow(b, views, compiled)
    assert asked.device_ids == [0, 1, 2, 3]


def test_runs_of_a_study_keep_one_gpu_each(four_gpus):
    args = argparse.Namespace(gpus=None, jobs=1, extra=[])
    assert plan.Draft(args, [], {}).devices == ["--gpus", "0"]
    args.gpus = [0, 1]
    assert plan.Draft(args, [], {}).devices == ["--device", "cuda"]  # of the one that it sees


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_absent_gpus(images, tmp_path):
    """Through a real process: exit code, one line, nothing written."""
    line = [sys.executable, "train_pcrlv2.py", "--data", images, "--gpus", "0,1", "--output", tmp_path / "run"]
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "error: --gpus 0,1: this machine has no GPU that PyTorch can use; leave --gpus out to use what is there"
    ]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (
            ["--b", "0"],
            "argument -b/--b/--batch-size/--batch_size/--train_batch_size: '0' is not a whole number above 0",
        ),
        (["--lr", "-1"], "'-1' is not a finite number of at least 0"),
        (["--lr", "nan"], "'nan' is not a finite number"),
        (["--lr", "inf"], "'inf' is not a finite number"),
        (["--data", ""], "argument --data: is empty; is a shell variable not set?"),
        (["--gpus", "a"], "'a' is not a list of GPU numbers such as 0,1"),
        (["--epoch", "3"], "unrecognized arguments: --epoch 3"),
        (["--ratio", "1.5"], "'1.5' is not a number from 0 to 1"),
    ],
)
def test_bad_options(argv, part, capsys):
    with pytest.raises(SystemExit) as error:
        train_pcrlv2.get_parser().parse_args(argv)
    assert error.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert part in lines[0]


# The loop with a small method ----------------------------------------------------------------------


class Tiny(Method):
    """One linear layer; `break_at` makes the loss of that step infinite."""

    def __init__(self, break_at=None):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 2)
        self.break_at = break_at
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.seen = []

    def forward(self, batch, run):
        self.seen.append(batch["index"].tolist())
        x = batch["view"].mean((2, 3))
        loss = ((self.layer(x) - 5) ** 2).mean()
        return {"square": loss / 0 if self.steps == self.break_at else loss, "zero": 0 * loss}

    def after_step(self, progress):
        self.steps += 1


def arguments(output, **changes):
    parser = options.Parser("test")
    options.add_data(parser)
    options.add_training(parser)
    options.add_runtime(parser)
    options.add_output(parser, default=str(output))
    usual = {"b": 4, "epochs": 10, "workers": 0, "lr": 0.1, "log_every": 1, "patience": 0, "schedule": "constant"}
    parser.set_defaults(**(usual | changes))
    return parser.parse_args([])


def tiny_data(n=10, broken=()):
    pixels = radiographs(n, 32, seed=2)[0]

    def read(i):
        if i in broken:
            raise UnreadableImage("cut short")
        return pixels[i]

    return ImageDataset(Info("tiny"), read, [f"image{i}" for i in range(n)], texture_size=32)


def fit_tiny(output, data=None, method=None, evaluate=None, tensorboard=False, **changes):
    method = method or Tiny()
    views = ClassificationViews(**IMAGENET, size=16)
    args = arguments(output, **changes)
    return method, fit(method, data or tiny_data(), views, args, CPU, evaluate, tensorboard=tensorboard)


def test_length_of_a_run(tmp_path):
    method, report = fit_tiny(tmp_path, epochs=2)
    assert report["step"] == 5  # 2 × 10 images in steps of 4
    assert report["epoch"] == 2
    counts = np.bincount(np.concatenate(method.seen))
    assert counts.tolist() == [2] * 10


def test_after_step_gets_the_share_done(tmp_path):
    method = Tiny()
    shares = []
    method.after_step = shares.append
    fit_tiny(tmp_path, method=method, epochs=2, steps=3)
    assert shares == pytest.approx([0.2, 0.4, 0.6])  # of the whole run, not of --steps


def test_non_finite_loss_stops(tmp_path):
    with pytest.raises(InputError, match="the loss is not finite at step 2 .*lower --lr or use --clip-grad"):
        fit_tiny(tmp_path, method=Tiny(break_at=2), save_every=1)
    report = json.loads((tmp_path / "non_finite_0.json").read_text())
    order = list(Order(10, 4, slice(0, 4), 0, 0, 3))
    assert report["ids"] == [f"image{i}" for i in order[2]]
    assert report["losses"] == {"square": "inf", "zero": "0.0"}
    saved = checkpoint.load_safe(tmp_path / "last.pt")
    assert saved["step"] == 2
    assert all(torch.isfinite(v).all() for v in saved["method"].values())


def test_bad_files_are_named_and_replaced(tmp_path):
    method, report = fit_tiny(tmp_path, tiny_data(broken={3, 4}), max_bad=0.5)
    assert report["step"] == 25
    named = (tmp_path / "bad_files.txt").read_text().splitlines()
    assert sorted(named) == ["image3: cut short", "image4: cut short"]
    counts = np.bincount(np.concatenate(method.seen), minlength=10)
    assert counts[[3, 4]].tolist() == [0, 0]
    assert counts[5] == 30  # its own ten epochs, and those of its two unreadable neighbours
    assert counts.sum() == 100


def test_too_many_bad_files_stop(tmp_path):
    with pytest.raises(
        InputError, match=r"1 of 10 files cannot be read, more than --max-bad 0.01 allows; see .*bad_fi"
    ):
        fit_tiny(tmp_path, tiny_data(broken={3}))
    assert (tmp_path / "bad_files.txt").read_text() == "image3: cut short\n"
    fine = tmp_path / "fine"
    _, report = fit_tiny(fine, tiny_data(broken={3}), max_bad=0.15)
    assert report["step"] == 25


@pytest.mark.parametrize(("limit", "count", "allowed"), [(0.01, 200, 2), (0.29, 100, 29), (0.07, 100, 7), (0, 50, 0)])
def test_exactly_max_bad_is_allowed(limit, count, allowed, tmp_path):
    """Of all files, however often and in whatever part of a pass they are read."""
    bad = BadFiles(tmp_path, limit, count)
    lines = [f"image{i}: cut short" for i in range(allowed + 1)]
    for _ in range(30):
        for line in lines[:allowed]:
            bad.note([line])
            bad.note([])
    with pytest.raises(InputError, match=f"{allowed + 1} of {count} files"):
        bad.note([lines[allowed], lines[allowed]])
    assert (tmp_path / "bad_files.txt").read_text().splitlines() == lines


def test_a_file_that_is_bad_for_several_reasons_is_one(tmp_path):
    bad = BadFiles(tmp_path, 0.01, 100)
    bad.note(["a.png: truncated"])
    bad.note(["a.png: no such file"])
    assert (tmp_path / "bad_files.txt").read_text().splitlines() == ["a.png: truncated", "a.png: no such file"]
    with pytest.raises(InputError, match="2 of 100 files cannot be read"):
        bad.note(["b.png: truncated"])


def test_processes_of_a_run_count_bad_files_together_and_mended_ones_no_more(tmp_path):
    first, second = BadFiles(tmp_path, 0.01, 200), BadFiles(tmp_path, 0.01, 200)
    first.note(["a: cut"])
    second.note(["b: cut", "a: cut"])
    with pytest.raises(InputError, match="3 of 200"):
        first.note(["c: cut"])
    guards._lines_at_start.cache_clear()  # as in another process
    later = BadFiles(tmp_path, 0.01, 200)  # the user mended b
    later.note(["a: cut"])
    later.note(["c: cut"])
    assert (tmp_path / "bad_files.txt").read_text().splitlines() == ["a: cut", "b: cut", "c: cut"]


def test_splits_are_judged_together(tmp_path):
    """Two damaged files of two hundred are one in a hundred, wherever they are; three are more."""
    parts = {"train": range(160), "val": range(160, 180), "test": range(180, 200)}

    def splits(broken):
        def read(i):
            if i in broken:
                raise UnreadableImage("cut short")
            return np.zeros((8, 8), np.uint8)

        whole = ImageDataset(Info("tiny"), read, [f"image{i}" for i in range(200)], texture_size=8)
        return registry.known({name: whole.subset(part) for name, part in parts.items()})

    def judge(broken, output):
        for data in splits(broken).values():
            list(evaluation_batches(data, 20, arguments(output), CPU))

    judge({170, 185}, tmp_path / "two")
    assert len((tmp_path / "two" / "bad_files.txt").read_text().splitlines()) == 2
    with pytest.raises(InputError, match="3 of 200 files cannot be read"):
        judge({5, 170, 185}, tmp_path / "three")


def test_all_files_bad(tmp_path):
    with pytest.raises(InputError, match="files in a row are unreadable, first image"):
        fit_tiny(tmp_path, tiny_data(broken=set(range(10))), max_bad=1.0)


def test_a_run_whose_folder_is_removed_goes_on_and_says_what_is_lost(tmp_path, capfd):
    class Removed(Tiny):
        def after_step(self, progress):
            super().after_step(progress)
            if self.steps == 5:
                shutil.rmtree(tmp_path / "run")

    fit_tiny(tmp_path / "run", method=Removed(), tensorboard=True)
    said = capfd.readouterr().err
    assert f"warning: step 5: {tmp_path / 'run' / 'metrics.jsonl'} was removed while the run goes on" in said
    assert said.count("\n") == 1  # no trace of a thread
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(5, 26))
    assert checkpoint.load_safe(tmp_path / "run" / "last.pt")["step"] == 25


def test_clipping(tmp_path):
    """One step of plain SGD moves the parameters by the learning rate times the gradient, cut to the limit."""
    moves = {}
    for limit in (0.0, 0.05, 1e6):
        before = torch.cat([p.detach().flatten() for p in Tiny().parameters()])
        changes = {"clip_grad": limit, "momentum": 0.0, "weight_decay": 0.0, "steps": 1}
        method, _ = fit_tiny(tmp_path / str(limit), **changes)
        moves[limit] = torch.cat([p.detach().flatten() for p in method.parameters()]) - before
        norm = metrics(tmp_path / str(limit))[0]["grad_norm"]
        assert norm == pytest.approx(float(moves[0.0].norm()) / 0.1, rel=1e-4)  # logged before it is cut
    assert float(moves[0.0].norm()) > 0.1
    assert float(moves[0.05].norm()) == pytest.approx(0.1 * 0.05, rel=1e-3)
    assert torch.equal(moves[0.0], moves[1e6])
    assert torch.nn.functional.cosine_similarity(moves[0.0], moves[0.05], dim=0) > 0.9999


def test_evaluation_best_state_and_patience(tmp_path):
    scores = [0.1, 0.5, 0.3, 0.4, 0.9]
    changes = {"b": 5, "patience": 2}
    evaluations = []

    def evaluate():
        evaluations.append(int(method.steps))
        assert not method.training
        return {"score": scores[len(evaluations) - 1]}

    method = Tiny()
    # Interrupted after epoch 3, then continued: patience and best state go on.
    fit_tiny(tmp_path, method=method, evaluate=evaluate, steps=6, **changes)
    assert evaluations == [2, 4, 6]
    method = Tiny()
    _, report = fit_tiny(tmp_path, method=method, evaluate=evaluate, **changes)
    assert evaluations == [2, 4, 6, 8]  # two epochs without gain
    assert report["best"]["score"] == 0.5
    assert report["best"]["epoch"] == 2
    assert int(report["best"]["state"]["steps"]) == 4
    assert report["step"] == 8
    _, again = fit_tiny(tmp_path, method=Tiny(), evaluate=evaluate, **changes)
    assert (again["step"], len(evaluations)) == (8, 4)
    assert [line["score"] for line in metrics(tmp_path) if "score" in line] == scores[:4]


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])  # slow on CPUs
def test_mixed_precision_on_a_cpu(images, tmp_path, dtype):
    train(images, tmp_path, "--steps", 2, "--amp", "--amp-dtype", dtype)
    saved = checkpoint.load_safe(tmp_path / "last.pt")
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        # fp16 finds its loss scale in the first steps, and has no gradient norm where a step is skipped.
        assert all(v is not None for k, v in values.items() if k != "grad_norm" or dtype == "bf16")
    assert all(v.dtype in (torch.float32, torch.int64) for v in saved["method"].values())
    assert all(torch.isfinite(v).all() for v in saved["method"].values())


def test_fp16_finds_its_loss_scale(tmp_path):
    """Steps that overflow are skipped and halve the scale; the others learn."""
    fit_tiny(tmp_path, amp=True, amp_dtype="fp16")
    lines = metrics(tmp_path)
    skipped = sum(line["grad_norm"] is None for line in lines)
    assert 0 < skipped < 12
    assert checkpoint.load_safe(tmp_path / "last.pt")["scaler"]["scale"] == 65536 / 2**skipped
    assert all(line["grad_norm"] is not None for line in lines[skipped:])
    assert lines[-1]["loss"] < lines[0]["loss"] / 4


# Parts ---------------------------------------------------------------------------------------------


def test_order_is_permutations():
    whole = np.concatenate(list(Order(10, 4, slice(0, 4), 3, 0, 10)))
    epochs = whole.reshape(4, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    other = np.concatenate(list(Order(10, 4, slice(0, 4), 4, 0, 10)))
    assert not np.array_equal(whole, other)


def test_order_of_processes_and_continuations():
    whole = list(Order(10, 4, slice(0, 4), 3, 0, 10))
    ranks = [list(Order(10, 4, slice(r * 2, r * 2 + 2), 3, 0, 10)) for r in range(2)]
    assert [a + b for a, b in zip(*ranks)] == whole
    late = Order(10, 4, slice(0, 4), 3, 6, 10)
    assert list(late) == whole[6:]
    assert len(late) == 4
    large = list(Order(3, 8, slice(0, 8), 3, 0, 3))  # more images a step than there are
    assert np.bincount(np.concatenate(large)).tolist() == [8, 8, 8]


def test_shares_of_processes():
    devices = [Devices(torch.device("cpu"), rank=r, world=3) for r in range(3)]
    assert [list(range(9))[d.own_rows(9)] for d in devices] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    with pytest.raises(InputError, match="--b 8: not a multiple of the 3 devices"):
        devices[0].own_rows(8)


OLD = "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040). Please update"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with a driver: a function sets what torch says of its GPUs."""
    (tmp_path / "version").write_text("NVRM version: NVIDIA")
    monkeypatch.setattr(parallel, "NVIDIA_DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def says(usable, warning=None, capability=(9, 0)):
        def is_available():
            if warning and len(warnings.filters) and warnings.filters[0][0] == "always":  # else the tests would show it
                warnings.warn(warning, stacklevel=1)
            return usable

        monkeypatch.setattr(torch.cuda, "is_available", is_available)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: int(usable))
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90", "sm_120a"])
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "Tesla P100")

    return says


def test_a_driver_that_is_too_old_is_said(machine, capsys):
    machine(False, OLD)
    assert parallel.setup(None, "auto", False).device.type == "cpu"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"note: torch {torch.__version__} with CUDA 13.0 cannot use this machine's GPUs: its driver is"
    )
    assert "install a torch for an older CUDA" in line
    for given in ({"gpus": [0], "device": "auto"}, {"gpus": None, "device": "cuda"}):
        with pytest.raises(InputError, match="its driver is too old"):
            parallel.setup(**given, deterministic=False)
    machine(True, capability=(6, 0))
    with pytest.raises(InputError, match=r"has no code for Tesla P100 \(compute capability 6.0\); update the driver"):
        parallel.setup([0], "auto", False)


def test_no_line_where_all_is_well(machine, monkeypatch, capsys):
    machine(True)
    assert parallel.gpu_trouble() is None
    machine(False)  # as where CUDA_VISIBLE_DEVICES hides them
    assert parallel.gpu_trouble() is None
    machine(False, OLD)
    assert parallel.setup(None, "cpu", False).device.type == "cpu"  # which asked for no GPU
    monkeypatch.setattr(parallel, "NVIDIA_DRIVER", Path("/nowhere"))
    assert parallel.setup(None, "auto", False).device.type == "cpu"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert parallel.gpu_trouble() is None
    assert capsys.readouterr().err == ""


def test_step_seeds():
    shared = [Devices(torch.device("cpu"), rank=rank, world=2).seed_step(1, 5).initial_seed() for rank in range(2)]
    assert shared[0] == shared[1]
    numbers = []
    for seed, step, rank in ((1, 5, 0), (1, 5, 0), (1, 5, 1), (1, 6, 0), (2, 5, 0)):
        Devices(torch.device("cpu"), rank=rank, world=9).seed_step(seed, step)
        numbers.append(float(torch.rand(())))
    assert numbers[0] == numbers[1]
    assert len(set(numbers)) == 4


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"schedule": "cosine"}, {0: 1.0, 25: 0.8535534, 50: 0.5, 100: 0.0, 110: 0.0}),
        ({"schedule": "cosine", "warmup_epochs": 20}, {0: 0.0, 5: 0.25, 20: 1.0, 60: 0.5, 100: 0.0}),
        (
            {"schedule": "step", "milestones": [60, 80], "gamma": 0.1},
            {0: 1.0, 59.9: 1.0, 60: 0.1, 79.9: 0.1, 80: 0.01, 99: 0.01},
        ),
        ({"schedule": "constant", "warmup_epochs": 2}, {1: 0.5, 2: 1.0, 99: 1.0}),
    ],
)
def test_learning_rates(changes, expected):
    args = argparse.Namespace(lr=0.3, epochs=100, warmup_epochs=0, milestones=[], gamma=1.0)
    vars(args).update(changes)
    for epoch, factor in expected.items():
        assert learning_rate(args, epoch) == pytest.approx(0.3 * factor, abs=1e-7), epoch


def test_learning_rate_reaches_the_optimiser(tmp_path):
    fit_tiny(tmp_path, epochs=2, warmup_epochs=1)
    assert [line["lr"] for line in metrics(tmp_path)] == pytest.approx([0.0, 0.04, 0.08, 0.1, 0.1])


def test_optimisers():
    p = [{"params": [torch.nn.Parameter(torch.ones(2))]}]
    args = argparse.Namespace(lr=0.3, momentum=0.8, betas=[0.7, 0.95], weight_decay=0.01)
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    for name, kind in kinds.items():
        args.optimizer = name
        optimizer = make_optimizer(p, args)
        assert type(optimizer) is kind
        group = optimizer.param_groups[0]
        assert (group["lr"], group["weight_decay"]) == (0.3, 0.01)
        assert group.get("momentum", 0.8) == 0.8
        assert tuple(group.get("betas", (0.7, 0.95))) == (0.7, 0.95)


@pytest.mark.parametrize("where", ["torch.save", "os.fsync", "os.replace"])
def test_failed_save_keeps_the_old_file(tmp_path, monkeypatch, where):
    path = tmp_path / "last.pt"
    checkpoint.save_atomic({"x": torch.ones(3)}, path)
    before = path.read_bytes()

    def fail(*args, **_):
        if where == "torch.save":
            args[1].write(b"half a fi")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(where, fail)
        with pytest.raises(OSError, match="No space left"):
            checkpoint.save_atomic({"x": torch.zeros(300)}, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]
    checkpoint.save_atomic({"x": torch.zeros(3)}, path)
    assert torch.equal(checkpoint.load_safe(path)["x"], torch.zeros(3))


def test_compiled_parts_compute_the_same(tmp_path, monkeypatch, few_radiographs):
    """The code is traced as ever, and run without the C++ compiler, which takes a minute."""
    plain, compiled = nn.Module.compile, []

    def trace(module):
        compiled.append(module)
        plain(module, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", trace)
    small = [
        "--texture-size",
        "32",
        "--image-size",
        "32",
        "--b",
        "4",
        "--steps",
        "2",
        "--workers",
        "0",
        "--device",
        "cpu",
    ]
    for words in ([], ["--compile"]):
        train_simclr.main([*small, *words, "--output", str(tmp_path / f"out{len(words)}")])
    assert compiled
    one, two = (checkpoint.load_safe(tmp_path / name / "encoder.pt")["state_dict"] for name in ("out0", "out1"))
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[key].float(), two[key].float(), rtol=1e-3, atol=1e-5) for key in one)


def test_a_full_disk_is_the_disks_error(tmp_path):
    """torch's own writer says something else."""
    path = tmp_path / "last.pt"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as raised:
            checkpoint.save_atomic({"x": torch.zeros(2**18)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert raised.value.filename == str(path)
    assert not list(tmp_path.iterdir())


# Command lines -------------------------------------------------------------------------------------


def test_published_command():
    line = "--data DIR --n chest --d 2 --b 64 --epochs 240 --lr 1e-2 --output OUT --gpus 0,1,2,3 --ratio 1.0 --amp"
    args = train_pcrlv2.get_parser().parse_args(line.split())
    assert (args.data, args.dataset, args.d, args.b, args.epochs) == ("DIR", "chest", 2, 64, 240)
    assert (args.lr, args.output, args.gpus, args.ratio, args.amp) == (0.01, "OUT", [0, 1, 2, 3], 1.0, True)


def test_aliases():
    line = "--data_set chest --batch_size 32 --learning_rate 0.1 --weight_decay 0.2 --num_workers 3 --model resnet50"
    args = train_pcrlv2.get_parser().parse_args(line.split())
    assert (args.dataset, args.b, args.lr, args.weight_decay, args.workers) == ("chest", 32, 0.1, 0.2, 3)
    assert args.arch == "resnet50"


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_is_explained(script):
    module = importlib.import_module(f"medssl.{script}")
    parser = module.get_parser()
    assert callable(module.cli)
    assert parser.allow_abbrev is False
    actions = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    assert len(actions) > 1
    for action in actions:
        name = "/".join(action.option_strings) or action.dest
        assert action.help, f"{script} {name} has no help"
        assert action.help != argparse.SUPPRESS, f"{script} {name} is hidden"
    text = parser.format_help()
    assert all(action.option_strings[0] in text for action in actions if action.option_strings)
    assert parser.description in text


def test_textures_are_near_a_lanczos_filters():
    """Also where they shrink by little, where a box filter is 6 dB worse."""
    for side in (584, 1024):
        film = radiographs(1, side, seed=3)[0][0]
        wanted = np.asarray(Image.fromarray(film).resize((512, 512), Image.Resampling.LANCZOS), float)
        error = np.square(to_texture(film, 512, 1)[0] - wanted).mean()
        assert 10 * np.log10(255**2 / error) > 48, side


def test_batch_norm_needs_two_views_on_each_device():
    with pytest.raises(InputError, match="batch norm needs at least 2 images"):
        CPU.own_rows(1)
    assert CPU.own_rows(1, views=4) == slice(0, 1)  # four patches of one volume
