"""The benchmarks run, and report every variant. Speeds are never judged here."""

import importlib
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from medssl.benchmarks import concepts, contrast, curves, machine, methods, pipeline, step
from medssl.errors import InputError
from medssl.models.concepts import concept_means


def read(path, variants):
    content = json.loads(path.read_text())
    assert set(content["results"]) == variants
    for row in content["results"].values():
        assert 0 < row["lowest"] <= row["images_per_s"] <= row["highest"]
        assert row["ratio"] > 0
    assert content["machine"]["cpu"]
    assert torch.__version__.startswith(content["machine"]["packages"]["torch"])
    return content


@pytest.mark.parametrize("workers", [0, 1])
def test_pipeline(tmp_path, capsys, workers):
    path = tmp_path / "results" / "pipeline.json"
    small = ["--images", "4", "--size", "96", "--b", "2", "--repeats", "1", "--workers", str(workers)]
    pipeline.main([*small, "--output", str(path)])
    expected = {"plain", "ours, decoding", "ours, cache"}
    if torch.cuda.is_available():
        expected |= {"ours, decoding, GPU views", "ours, cache, GPU views"}
    content = read(path, expected)
    assert content["results"]["plain"]["ratio"] == 1
    assert content["per_core"] == (workers == 0)
    assert min(content["ours_ms_per_image"].values()) > 0
    assert "ours, cache" in capsys.readouterr().out


def test_plain_views(tmp_path):
    """The baseline makes what the network takes."""
    paths = pipeline.write_images(tmp_path, 2, 64)
    view1, view2, target, small = pipeline.PlainDataset(paths)[0]
    assert view1.shape == view2.shape == target.shape == (3, 224, 224)
    assert [view.shape for view in small] == [(3, 96, 96)] * 6
    assert 0 < float((view1 == 0).all(0).float().mean()) < 0.2  # the holes


def test_pipeline_refuses_less_than_a_batch(tmp_path):
    with pytest.raises(InputError, match="--images 2"):
        pipeline.main(["--images", "2", "--output", str(tmp_path / "x.json")])


TINY = ["--device", "cpu", "--b", "2", "--image-size", "32", "--local-size", "32", "--steps", "1", "--repeats", "1"]


TINY_3D = ["--d", "3", "--arch", "unet3d_quarter", "--cube-size", *3 * ["16"], "--local-cube-size", *3 * ["8"]]


@pytest.mark.parametrize("dims", [[], TINY_3D])
def test_step(tmp_path, dims):
    path = tmp_path / "step.json"
    step.main([*TINY, *dims, "--no-memory", "--output", str(path)])
    content = read(path, {"plain, fp32", "plain, bf16", "ours, fp32", "ours, bf16"})
    assert content["difference"] < 1e-3


def test_step_variants():
    names = [str(variant) for variant in step.choose_variants(cuda=True, compiled=True)]
    assert len(names) == len(set(names)) == 8
    assert "ours, fp16, compiled" in names


def test_step_notices_another_loss(monkeypatch, tmp_path):
    published = step.plain_losses
    monkeypatch.setattr(
        step, "plain_losses", lambda *inputs: {name: 2 * loss for name, loss in published(*inputs).items()}
    )
    with pytest.raises(RuntimeError, match="do not compute the same"):
        step.main([*TINY, "--no-memory", "--output", str(tmp_path / "step.json")])


def test_interleaved_summary():
    calls = []

    def variant(name, speeds):
        values = iter(speeds)
        return lambda: calls.append(name) or next(values)

    speeds = machine.interleave({"a": variant("a", [1, 2, 4]), "b": variant("b", [3, 4, 12])}, 3)
    assert calls == ["a", "b", "b", "a", "a", "b"]
    summary = machine.summarise(speeds, "a")
    assert summary["b"] == {"images_per_s": 4, "lowest": 3, "highest": 12, "ratio": 3}


@pytest.mark.slow
def test_contrast(tmp_path):
    """Both methods, both ways; that they compute the same is checked before anything is measured."""
    path = tmp_path / "contrast.json"
    tiny = ["--device", "cpu", "--b", "2", "--image-size", "32", "--queue", "16", "--steps", "1", "--repeats", "1"]
    contrast.main([*tiny, "--no-memory", "--output", str(path)])
    variants = [
        f"{name}: {kind}, {p}" for name in ("c2l", "pcrl") for kind in ("plain", "ours") for p in ("fp32", "bf16")
    ]
    if not torch.cuda.is_available():
        content = read(path, set(variants))
        assert max(content["differences"].values()) < 1e-3
        assert content["results"]["c2l: plain, fp32"]["ratio"] == 1


def test_concepts(tmp_path, monkeypatch):
    path, tiny = tmp_path / "concepts.json", ["--device", "cpu", "--b", "2", "--concepts", "3", "--repeats", "1"]
    concepts.main([*tiny, "--output", str(path)])
    assert read(path, {"loops", "lean loops", "ours"})["difference"] < 1e-5
    monkeypatch.setattr(concepts, "concept_means", lambda *given: (concept_means(*given)[0] + 1, None))
    with pytest.raises(RuntimeError, match="do not compute the same"):
        concepts.main([*tiny, "--output", str(path)])


def test_curves(tmp_path, capsys):
    run, other = tmp_path / "run", tmp_path / "other"
    for folder in (run, other):
        folder.mkdir()
    with pytest.raises(InputError, match="no config.json and metrics.jsonl"):
        curves.main([str(run)])
    (run / "config.json").write_text(json.dumps({"method": "C2L", "queue": 2048, "loss": "infonce"}))
    lines = [{"step": i, "epoch": i / 4, "loss": 5, "contrast": 2.5 - i / 50, "mixed_images": 2.5} for i in range(20)]
    lines = [{**line, "lr": 9, "similarity": 1} for line in lines]
    lines.insert(9, {"step": 9, "val_restoration": 0.5})
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config, epochs, losses = curves.read_run(run)
    assert epochs == [i / 4 for i in range(4, 20)]
    assert list(losses) == ["contrast", "mixed_images"]
    assert losses["contrast"] == pytest.approx([2.5 - (i - 2) / 50 for i in range(4, 20)])
    assert curves.chance(config) == pytest.approx(math.log(2049))
    assert curves.chance(config | {"loss": "nce"}) is None
    assert curves.chance({"method": "BYOL"}) is None
    assert curves.chance({"method": "SimCLR", "b": 32}) == pytest.approx(math.log(63))

    # ConCL's loss is another after the warm-up, and its options have no --loss.
    (other / "config.json").write_text(json.dumps({"method": "ConCL", "queue": 2048}))
    both = [{"step": i, "epoch": i, "loss": 5, "instance" if i < 9 else "concept": 5.0, "lr": 9} for i in range(20)]
    (other / "metrics.jsonl").write_text("\n".join(map(json.dumps, both)))
    losses = curves.read_run(other)[2]
    assert [math.isnan(value) for value in losses["instance"]] == [False] * 5 + [True] * 11
    assert losses["concept"][9:].tolist() == [5.0] * 7
    assert curves.weight({"method": "ConCL", "concept_weight": 0.5}, "concept") == 0.5
    assert curves.weight({"method": "DenseCL", "dense_weight": 0.25}, "contrast") == 0.75
    assert curves.weight({"method": "C2L", "mixup": False}, "contrast") == 1
    assert curves.weight({"method": "PCRLv2"}, "restoration") is None
    (other / "samples").mkdir()
    machine_made = Image.new("RGB", (300, 100), "red")
    machine_made.save(other / "samples" / "step_0000020.png")
    curves.main([str(other), "--output", str(tmp_path / "one.png")])
    drawn = np.asarray(Image.open(tmp_path / "one.png").convert("RGB")).astype(int)
    red = (drawn[..., 0] > 240) & (drawn[..., 1] < 15) & (drawn[..., 2] < 15)
    assert 0.2 < red.mean() < 0.6  # the samples below the curves
    with pytest.raises(InputError, match="other: no whole contrast among its losses, instance, concept"):
        curves.main([str(run), str(other)])
    curves.main([str(run), str(run), "--output", str(tmp_path / "curves.png")])
    assert (tmp_path / "curves.png").stat().st_size > 5000
    (run / "metrics.jsonl").write_text('{"step": 1, "epoch": 1, "loss": 2, "contrast": 2, "lr": 1}')
    with pytest.raises(InputError, match="fewer than 5 logged lines with losses"):
        curves.main([str(run)])


@pytest.mark.parametrize(
    ("config", "log", "message"),
    [
        ("[]", "", "its config.json is not that of a pre-training"),
        ('{"b": 2}', "", "its config.json is not that of a pre-training"),
        ('{"method": "BYOL"}', '7\n{"epoch": 1, "lr": 1}\n{"cut', "fewer than 5 logged lines with losses"),
        ('{"method": "BYOL"}', '{"epoch": 1, "loss": null, "prediction": null, "lr": 1}\n' * 9, "fewer than 5"),
        ('{"method": "BYOL"}', '{"epoch": 1, "loss": 0, "lr": 1}\n' * 9, "fewer than 5"),
    ],
)
def test_curves_of_damaged_runs(tmp_path, config, log, message):
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "metrics.jsonl").write_text(log)
    with pytest.raises(InputError, match=message):
        curves.main([str(tmp_path), "--output", str(tmp_path / "x.png")])


def test_curves_at_zero(tmp_path):
    (tmp_path / "config.json").write_text('{"method": "BYOL"}')
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1, "loss": 0.0, "prediction": 0.0, "lr": 1}\n' * 9)
    assert curves.read_run(tmp_path)[2]["prediction"].tolist() == [0.0] * 5
    with pytest.raises(InputError, match=r"--output .*x.what: Format 'what' is not supported"):
        curves.main([str(tmp_path), "--output", str(tmp_path / "x.what")])
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "step_1.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="step_1.png: cannot identify"):
        curves.main([str(tmp_path), "--output", str(tmp_path / "x.png")])


SMALL = ["--b", "2", "--image-size", "64", "--steps", "1", "--repeats", "1", "--device", "cpu"]


@pytest.mark.slow
def test_methods(tmp_path):
    path = tmp_path / "methods.json"
    methods.main(["--methods", "concl", *SMALL, "--output", str(path)])
    assert read(path, {"moco", "concl"})["results"]["moco"]["ratio"] == 1


def test_every_method_takes_what_the_benchmark_gives_it(tmp_path):
    args = methods.get_parser().parse_args(SMALL)
    assert len(methods.METHODS) >= 11
    assert {method for method in methods.METHODS if 3 in methods.dims_of(method)} >= {"pcrl", "pcrlv2"}
    for method, dims in [(name, dims) for name in methods.METHODS for dims in methods.dims_of(name)]:
        words = methods.command(method, dims, args, tmp_path / "run")[2:]
        importlib.import_module(f"medssl.train_{method}").get_parser().parse_args(words)


@pytest.mark.slow
def test_methods_that_cannot_be_measured(tmp_path):
    for words, message in (["--b", "65"], "--b 65"), (["--cubes", "1"], "--cubes 1"), (["--arch", "nothing"], "--arch"):
        with pytest.raises(InputError, match=message):
            methods.main(["--methods", "moco", *words, "--output", str(tmp_path / "x.json")])
