"""benchmarks/gpu.py at toy size on the CPU: it runs, goes on, says what was not run, and finds planted faults."""

import json
import math
import shlex
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from process_tools import sends_and_dies, sends_and_hangs

from medssl import compare, train_moco
from medssl.benchmarks import gpu, gpu_parts
from medssl.benchmarks.gpu_parts import Cell, Place, Sizes
from medssl.engine.state import State
from medssl.errors import InputError
from medssl.study import plan

QUICK = ["--device", "cpu", "--quick", "--workers", "0", "--minutes", "30"]
IMAGES, VOLUMES = Cell("split", "moco", 2), Cell("split", "pcrlv2", 3)


@pytest.fixture
def place(tmp_path):
    sizes = Sizes(**{**gpu.QUICK, "side": 32})
    return Place("cpu", tmp_path, 0, sizes, sizes, radiograph=64)


def read(folder):
    rows = json.loads((folder / "gpu_cpu.json").read_text())["rows"]
    return {(row["part"], row["method"], row["dims"]): row for row in rows}, (folder / "gpu_cpu.md").read_text()


def test_every_method_has_its_cells():
    cells = gpu_parts.cells()
    assert len(set(cells)) == len(cells)
    assert [*dict.fromkeys(cell.part for cell in cells)] == list(gpu_parts.PARTS)
    for part in ("split", "cpu", "amp", "resume", "compile", "methods"):
        cases = {(cell.method, cell.dims) for cell in cells if cell.part == part}
        assert {method for method, _ in cases} == set(gpu.METHODS)
        assert cases >= {("pcrl", 3), ("pcrlv2", 3), ("pcrl", 2), ("magical", 2)}
    assert sum(part.share for part in gpu_parts.PARTS.values()) == pytest.approx(1)
    assert gpu_parts.takes_arch("magical")


def test_it_runs_and_goes_on(tmp_path, monkeypatch, capsys):
    cells = [IMAGES, VOLUMES, Cell("cpu", "moco", 2), Cell("resume", "pcrlv2", 3), Cell("methods", "pcrlv2", 3)]
    monkeypatch.setattr(gpu_parts, "cells", lambda: cells)
    argv = [*QUICK, "--output", str(tmp_path)]
    gpu.main([*argv, "--parts", "split"])
    rows, page = read(tmp_path)
    assert {key: row["passed"] for key, row in rows.items()} == {
        ("split", "moco", 2): True,
        ("split", "pcrlv2", 3): True,
    }
    assert page.partition("## Not run")[2].split("\n* ")[1:] == [
        "cpu: moco 2D",
        "resume: pcrlv2 3D",
        "methods: pcrlv2 3D\n",
    ]
    assert "| moco 2D | passed |" in page
    assert f"python benchmarks/gpu.py {shlex.join(argv)} --parts split\n" in page
    assert "2 rows, 0 failed; 0 of what was asked for not run" in capsys.readouterr().out

    gpu.main(argv)
    more, page = read(tmp_path)
    assert {key: more[key] for key in rows} == rows  # which were not run again
    assert len(more) == 5
    assert more["resume", "pcrlv2", 3]["numbers"]["that differ"] == 0
    assert more["resume", "pcrlv2", 3]["numbers"]["tensors"] > 100
    assert more["methods", "pcrlv2", 3]["numbers"]["images_per_s"] > 0
    assert more["cpu", "moco", 2]["passed"] is None
    assert page.endswith("## Not run\n\n* cpu: moco 2D (the device is the CPU itself)\n")

    with pytest.raises(InputError, match="of other code, options or machine"):
        gpu.main([*argv, "--b", "64"])
    monkeypatch.setattr(gpu, "run", lambda *_: None)  # there is no time
    gpu.main([*argv, "--anew"])
    assert read(tmp_path)[0] == {}
    assert "5 of what was asked for not run" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["pcl", pytest.param("magical", marks=pytest.mark.slow)])
def test_what_comes_before_an_epoch_is_done(place, method):
    assert gpu_parts.outcome(Cell("split", method, 2), place)["passed"]


def depends_on_parts(monkeypatch):
    forward = train_moco.MoCo.forward

    def changed(method, batch, run):
        return {name: value * (1 + 0.01 * (run.parts - 1)) for name, value in forward(method, batch, run).items()}

    monkeypatch.setattr(train_moco.MoCo, "forward", changed)


def has_batch_statistics(monkeypatch):
    monkeypatch.setattr(gpu_parts, "batch_norm_eval", lambda method: method.train())


@pytest.mark.parametrize("plant", [depends_on_parts, has_batch_statistics])
def test_a_loss_that_depends_on_the_split_is_found(place, monkeypatch, plant):
    assert gpu_parts.outcome(IMAGES, place)["passed"]
    plant(monkeypatch)
    row = gpu_parts.outcome(IMAGES, place)
    assert row["passed"] is False
    assert row["numbers"]["losses"] > gpu_parts.SPLIT


def test_a_run_that_does_not_continue_is_found(place, monkeypatch):
    restore = State.restore

    def forgetful(state, *given):
        restore(state, *given)
        state.optimizer.state.clear()

    monkeypatch.setattr(State, "restore", forgetful)
    row = gpu_parts.outcome(Cell("resume", "pcrlv2", 3), place)
    assert row["passed"] is False
    assert row["numbers"]["that differ"] > 10
    assert row["numbers"]["that differ without a stop"] == 0


def test_an_error_is_a_row(place, monkeypatch):
    monkeypatch.setattr(train_moco.MoCo, "forward", lambda *_: 1 / 0)
    row = gpu_parts.outcome(IMAGES, place)
    assert (row["passed"], row["reason"]) == (False, "ZeroDivisionError: division by zero")


def test_losses_are_compared(tmp_path):
    def written(name, *values):
        (tmp_path / name).mkdir()
        lines = [{"step": i, "epoch": 0, "loss": value, "contrast": value, "lr": 1} for i, value in enumerate(values)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return tmp_path / name

    plain = written("plain", 4, 3, 2, 1)
    assert gpu_parts.compare_losses(plain, written("near", 4.001, 3.01, 2, 1))[0]
    for name, values in {"first": (4.1, 3, 2, 1), "later": (4, 3, 2, 1.1), "short": (4, 3, 2)}.items():
        assert not gpu_parts.compare_losses(plain, written(name, *values))[0]
    good, numbers = gpu_parts.compare_losses(plain, written("infinite", 4, None, 2, 1))
    assert not good
    assert math.isinf(numbers["largest"])
    assert math.isinf(gpu_parts.difference({"a": 1.0}, {"b": 1.0}))


@pytest.mark.parametrize(("work", "second"), [(sends_and_dies, "exit code 3"), (sends_and_hangs, None)])
def test_a_process_that_dies_or_hangs_does_not_end_the_rest(tmp_path, monkeypatch, work, second):
    (tmp_path / "log.txt").write_text("CUDA error\n\n")
    monkeypatch.setattr(gpu_parts, "work", work)
    cells = [SimpleNamespace(part="split"), SimpleNamespace(part="split"), SimpleNamespace(part="compile")]
    found = []
    minutes = 2.0 if second else 0.4  # of which the split has less than half
    gpu.run(cells, SimpleNamespace(folder=tmp_path), minutes, lambda cell, row: found.append((cell.part, row)))
    assert [part for part, _ in found] == ["split", "split", "compile"][not second :]
    assert [row["passed"] for _, row in found] == ([True, False, True] if second else [True, True])
    if second:
        assert found[1][1]["reason"] == "its process ended with exit code 3: CUDA error"


def test_a_missing_package_is_one_line(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name="segmentation_models_pytorch")

    monkeypatch.setattr(gpu.importlib, "import_module", missing)
    gpu.parts.cache_clear()
    try:
        with pytest.raises(InputError, match=r"^segmentation_models_pytorch is not installed; pip install -r"):
            gpu.main(QUICK)
    finally:
        gpu.parts.cache_clear()


# Studies -------------------------------------------------------------------------------------------


def study_data(folder):
    rng, arrays = np.random.default_rng(0), {}
    for split, count in (("train", 200), ("val", 20), ("test", 20)):
        labels = np.arange(count) % 2
        images = rng.integers(0, 200, (count, 28, 28)) + 40 * labels[:, None, None]
        arrays |= {f"{split}_images": images.astype(np.uint8), f"{split}_labels": labels[:, None].astype(np.uint8)}
    folder.mkdir(exist_ok=True)
    np.savez(folder / "pneumoniamnist.npz", **arrays)
    for name in ("images", "masks"):
        (folder / "hippocampus" / name).mkdir(parents=True)
    return folder


def test_studies_are_commands_of_compare(tmp_path):
    with pytest.raises(InputError, match="has neither hippocampus/images"):
        gpu.main([*QUICK, "--study", str(tmp_path)])
    for quick in ([], ["--quick"]):
        args = gpu.get_parser().parse_args(["--study", str(study_data(tmp_path / f"data{len(quick)}")), *quick])
        args.device = "cuda"
        made = gpu.studies(args)
        assert list(made) == ["hippocampus", "pneumoniamnist"]
        for words in made.values():
            known, rest = compare.get_parser().parse_known_args(words)
            assert known.init[0] == "random"
            assert {"pcrl", "pcrlv2"} <= set(known.init)
            assert len(known.annotation_percent) == 2
            extra = plan.extra_options(known)
            plan.TASKS[known.task[0]].script.get_parser().parse_args([*rest, *extra.get(known.task[0], [])])
            for method in known.init[1:]:
                gpu.parser_of(method).parse_args(extra["pretraining"])


def test_a_command_is_stopped():
    code, said = gpu.stopped_after([sys.executable, "-c", "import time; time.sleep(60)"], 1.0)
    assert (code, said) == (-15, "nothing said")
    assert gpu.stopped_after([sys.executable, "-c", "import sys; sys.exit('a\\nb')"], 60) == (1, "b")


@pytest.mark.slow
def test_a_study_is_stopped_and_goes_on(tmp_path, capsys):
    data = study_data(tmp_path / "data")
    (data / "hippocampus" / "masks").rmdir()
    argv = [*QUICK, "--study", str(data), "--methods", "moco", "--output", str(tmp_path / "out")]
    gpu.main([*argv, "--minutes", "0.2"])
    assert "pneumoniamnist: stopped by --minutes" in capsys.readouterr().out
    gpu.main([*argv, "--minutes", "20"])
    assert "pneumoniamnist: finished" in capsys.readouterr().out
    page = (tmp_path / "out" / "study.md").read_text()
    assert (tmp_path / "out" / "pneumoniamnist" / "comparison.md").read_text().strip() in page


@pytest.mark.slow
def test_the_other_parts(place):
    cells = [Cell("amp", "moco", 2), Cell("amp", "pcrlv2", 3), Cell("data", "moco", 2, "cache")]
    cells += [Cell("plain", "pcrlv2", 2, "pipeline"), Cell("plain", "pcrlv2", 3, "step"), Cell("compile", "moco", 2)]
    for cell in cells:
        row = gpu_parts.outcome(cell, place)
        assert row["passed"], row
