"""Studies: what is run, what is kept, what failed runs leave, and the numbers that compare."""

import csv
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from argparse import Namespace

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from PIL import Image
from scipy import stats

from medssl import compare, locks, train_pcrlv2
from medssl.datasets import registry
from medssl.datasets.phantoms import ct
from medssl.engine.options import Parser
from medssl.errors import InputError
from medssl.study import jobs, plan, results
from medssl.study.jobs import Job, run_beside, run_here

pytestmark = pytest.mark.usefixtures("few_radiographs")
SMALL = ["--dataset", "phantom2d", "--texture-size", "32", "--image-size", "32", "--workers", "0", "--no-tensorboard"]
SMALL += ["--b", "8", "--steps", "2", "--no-features"]
HERE = ["--jobs", "0"]


@pytest.fixture(scope="module")
def encoder(few_radiographs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    train_pcrlv2.main([*SMALL[:8], "--b", "8", "--steps", "2", "--local-size", "32", "--output", str(folder)])
    return folder / "encoder.pt"


@pytest.fixture
def few_scans(monkeypatch):
    monkeypatch.setattr(ct, "SPLITS", {"train": 4, "val": 2, "test": 2})
    ct._generated.cache_clear()
    yield
    ct._generated.cache_clear()


# Statistics ----------------------------------------------------------------------------------------


def test_paired_gain_by_hand():
    gain, error = results.paired_gain([0.9, 0.8, 0.7], [0.8, 0.8, 0.5])
    assert gain == pytest.approx(0.1)
    assert error == pytest.approx(0.1 / np.sqrt(3))
    assert results.paired_gain([0.9], [0.8]) == (pytest.approx(0.1), None)


def test_paired_t_by_hand():
    # mean .1, standard error .1/√3: t = √3 with 2 degrees of freedom.
    p = results.paired_test([0.9, 0.8, 0.7], [0.8, 0.8, 0.5])
    assert p == pytest.approx(2 * stats.t.sf(np.sqrt(3), 2))
    assert results.paired_test([0.9], [0.8]) is None
    assert results.paired_test([0.9, 0.8], [0.9, 0.8]) is None


def test_holm_by_hand():
    assert results.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert results.holm([0.5, 0.9]) == [1.0, 1.0]
    assert results.holm([]) == []


def test_interval_of_a_mean():
    low, high = results.interval([0.7, 0.8, 0.9])
    assert (low + high) / 2 == pytest.approx(0.8)
    assert high - low == pytest.approx(2 * 4.302653 * 0.1 / np.sqrt(3), rel=1e-6)  # t of 97.5 % with 2 degrees
    assert results.interval([0.7]) is None


# Whole studies -------------------------------------------------------------------------------------


def test_other_measures_by_hand():
    box, mask = {"ap": 50.0, "ap50": 70.0, "ap75": None}, {"ap": 40.0, "ap50": 60.0}
    one = {"ap_box": 50.0, "ap_mask": 40.0, "box": box, "mask": mask, "sensitivity": {"1": 0.5}, "best_epoch": 3.0}
    assert results.measures_of(one, "ap_box") == {"box.ap50": 70.0, "ap_mask": 40.0, "mask.ap50": 60.0}
    joined = results.join_measures([one, {"ap_mask": 42.0}, {"ap_mask": None}], "ap_box")
    assert joined["ap_mask"] == {"mean": 41.0, "std": pytest.approx(2**0.5)}
    assert joined["mask.ap50"] == {"mean": 60.0, "std": None}


def test_a_study_from_pretraining_to_tables(encoder, tmp_path, capsys):
    options = [*SMALL, *HERE, "--init", "random", "pcrlv2", str(encoder), "--annotation-percent", "1"]
    options += ["--epochs", "1", "--trials", "2", "--with", "pcrlv2 --local-size 32 --b 4 --steps 2", "--features"]
    rows = compare.main([*options, "--output", str(tmp_path)])
    name = encoder.parent.name
    assert [(row["percent"], row["init"], row["images"]) for row in rows] == [
        (1, "random", 20), (1, "pcrlv2", 20), (1, name, 20)
    ]  # fmt: skip
    for row in rows:
        folders = [
            tmp_path / "classification" / f"{row['percent']:g}_percent" / row["init"] / f"run_{k}" for k in (0, 1)
        ]
        trials = [json.loads((folder / "results.json").read_text())["trials"][0] for folder in folders]
        assert [trial["seed"] for trial in trials] == [0, 1]
        assert row["values"] == [trial["auroc"] for trial in trials]
        assert not list(folders[0].rglob("best.pt"))
    difference = np.subtract(rows[1]["values"], rows[0]["values"])
    assert rows[1]["gain"] == pytest.approx(difference.mean())
    assert rows[1]["standard_error"] == pytest.approx(difference.std(ddof=1) / np.sqrt(2))
    assert rows[0]["p_adjusted"] is None
    assert rows[1]["p"] <= rows[1]["p_adjusted"] <= 1
    assert f"{rows[1]['gain']:+.3f}" in capsys.readouterr().out

    # The method was pre-trained on images of the size that the task has, with its own batch, and its weights were used.
    config = json.loads((tmp_path / "pretraining" / "pcrlv2" / "config.json").read_text())
    assert (config["image_size"], config["texture_size"], config["b"], config["local_size"]) == (32, 32, 4, 32)
    assert rows[1]["file"] == str(tmp_path / "pretraining" / "pcrlv2" / "encoder.pt")
    with open(tmp_path / "results.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(row["value"]) for row in table if (row["init"], row["percent"]) == ("pcrlv2", "1.0")] == rows[1][
        "values"
    ]
    assert {row["matched_keys"] for row in table if row["init"] != "random"} == {"100"}
    assert len(table) == 6
    accuracies = [float(row["accuracy"]) for row in table if row["init"] == "random"]
    assert rows[0]["measures"]["accuracy"]["mean"] == pytest.approx(np.mean(accuracies))
    latex = (tmp_path / "comparison.tex").read_text(encoding="utf-8")
    assert latex.count(r"\textbf") == 1
    assert latex.count(r"\\") == 4
    assert r"1 \%" in latex
    assert (tmp_path / "comparison.png").stat().st_size > 5000
    report = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(f"{row['mean']:.3f}" in report for row in rows)

    # Again: nothing is run twice.
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("results.json")}
    assert compare.main([*options, "--output", str(tmp_path)]) == rows
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("results.json")}
    # Other options, or other weights behind the same name, are another study.
    with pytest.raises(InputError, match="was started with lr"):
        compare.main([*options, "--lr", "0.5", "--output", str(tmp_path)])
    with pytest.raises(InputError, match="was run with --steps 2"):
        compare.main([*options, "--steps", "3", "--output", str(tmp_path)])
    first = next(tmp_path.rglob("run_0/results.json"))
    kept = first.read_text()
    first.write_text(kept.replace(json.loads(kept)["config"]["data_digest"], "of other images"))
    with pytest.raises(InputError, match="run_0: was started with other data"):
        compare.main([*options, "--output", str(tmp_path)])
    first.write_text(kept)
    for noted in ("pretraining/pcrlv2", "features/random"):
        config = tmp_path / noted / "config.json"
        kept = config.read_text()
        config.write_text(kept.replace(json.loads(kept)["data_digest"], "of other images"))
        with pytest.raises(InputError, match=noted + r": was started with other data.*or another --output$"):
            compare.main([*options, "--output", str(tmp_path)])
        config.unlink()  # which says nothing against it
        assert compare.main([*options, "--output", str(tmp_path)]) == rows
        config.write_text(kept)
    os.utime(encoder)
    encoder.write_bytes(encoder.read_bytes() + b" ")
    with pytest.raises(InputError, match="was run from other weights"):
        compare.main([*options, "--output", str(tmp_path)])


def test_a_failed_run_is_shown_and_the_rest_goes_on(encoder, tmp_path, capsys):
    options = [*SMALL, *HERE, "--init", "random", str(encoder), "concl", "--annotation-percent", "1", "--trials", "2"]
    options += ["--with", "concl --lr 1e30 --b 4 --steps 4", "--arch", "resnet34", "--output", str(tmp_path)]
    with pytest.raises(SystemExit) as stopped:
        compare.main(options)
    assert stopped.value.code == 1
    random, other, concl = json.loads((tmp_path / "comparison.json").read_text())
    assert random["trials"] == 2
    assert other["trials"] == concl["trials"] == 0
    assert all("resnet18" in reason for reason in other["failures"].values())
    assert all("pre-training of concl: " in reason for reason in concl["failures"].values())
    text = (tmp_path / "comparison.md").read_text(encoding="utf-8")
    assert text.count("| failed |") == 2
    told = capsys.readouterr()
    assert "failed: pre-training of concl: " in told.err
    with open(tmp_path / "results.csv", newline="") as file:
        assert [row["status"] for row in csv.DictReader(file)] == ["finished"] * 2 + ["failed"] * 4


def test_where_all_runs_fail_alike_the_reason_is_the_answer(tmp_path):
    torch.save({"odd": torch.zeros(3)}, tmp_path / "weights.pt")
    options = [*SMALL, *HERE, "--init", str(tmp_path / "weights.pt"), "--annotation-percent", "1"]
    with pytest.raises(InputError, match=r"weights\.pt: "):
        compare.main([*options, "--trials", "2", "--output", str(tmp_path / "out")])


def test_segmentation_is_compared_by_dice(few_scans, tmp_path):
    quick = ["--d", "3", "--arch", "unet3d_quarter", "--steps", "2", "--epoch-steps", "2", "--workers", "0", "--b", "2"]
    task = ["--task", "segmentation", "--annotation-percent", "50", "100", "--trials", "1", "--overlays", "0", *HERE]
    rows = compare.main([*quick, *task, "--no-tensorboard", "--output", str(tmp_path)])
    assert [(row["percent"], row["images"], row["metric"]) for row in rows] == [(50, 2, "dice"), (100, 4, "dice")]
    for row in rows:
        folder = tmp_path / "segmentation" / f"{row['percent']:g}_percent" / "random" / "run_0"
        trial = json.loads((folder / "results.json").read_text())["trials"][0]
        assert row["values"] == [trial["dice"]]
        assert row["per_class"] == {name: value["dice"] for name, value in trial["per_class"].items()}
    assert "| test Dice (mean ± std) |" in (tmp_path / "comparison.md").read_text(encoding="utf-8")


def test_bad_input_is_found_before_the_work(tmp_path):
    for options, message in (
        (["--init", "random", str(tmp_path / "none.pt")], "no such checkpoint file"),
        (["--init", "random", str(tmp_path)], "a folder; give the encoder.pt in it"),
        (["--init", "random", __file__], "test_compare.py: not a checkpoint"),
        (["--init", "random", "random"], "--init: the same weights twice"),
        (["--epochs", "1", "2"], "2 numbers for 3 percentages"),
        (["--annotation-percent", "1", "1"], "--annotation-percent: the same value twice"),
        (["--with", "pcrlv3 --lr 1"], "--with pcrlv3: no method, no task"),
        (["--with", "pcrlv2 --lr '1"], "--with .*: No closing quotation"),
        (["--with", "concl --lr 1"], "--with concl: this study has no such run"),
        (["--with", "segmentation --overlays 1"], "--with segmentation: this study has no such run"),
        (["--with", "classification --trials 3"], "--trials: the study chooses it"),
        (["--with", "classification --resume never"], "--resume: the study chooses it"),
        (["--gpus", "99"], "--gpus 99: this machine has"),
        (["--run", "3"], "--run: the study chooses it"),
        (["--run", "3", "--slurm"], "--run: the study chooses it"),
        (["--run", "3", "--job", "0"], "--run: the study chooses it"),
        (["--resume", "never"], "--resume: the study chooses it"),
        (["--data", str(tmp_path / "none"), "--dataset", "chest"], "none"),
        (["--job", "99"], "--job 99: the study has the runs 0 to"),
    ):
        with pytest.raises(InputError, match=message):
            compare.main([*options, *HERE, "--output", str(tmp_path / "out")])
    assert not list((tmp_path / "out").rglob("results.json"))
    for options in (
        ["--lr", "x"],
        ["--no-such-option"],
        ["--with", "classification --nonsense"],
        ["--with", "features --no"],
    ):
        with pytest.raises(SystemExit) as stopped:
            compare.main([*options, *HERE, "--output", str(tmp_path / "out")])
        assert stopped.value.code == 2


@pytest.mark.parametrize(
    ("files", "labels"),
    [
        (["a/pcrlv2/encoder.pt", "b/pcrlv2/encoder.pt", "weights.pth"], ["a_pcrlv2", "b_pcrlv2", "weights"]),
        (["w.pt", "w.pth", "v/w.pt"], ["ROOT_w", "ROOT_w-2", "v_w"]),
        (["A/encoder.pt", "A.pt"], ["ROOT_A", "ROOT_A-2"]),
        (["x/a_b.pt", "y/a/b.pt", "z/b.pt"], ["a_b", "y_a_b", "z_b"]),
        (["random/encoder.pt", "pcrlv2.pt"], ["ROOT_random", "ROOT_pcrlv2"]),
        (["a|b $x$.pt"], ["a-b--x-"]),
    ],
)
def test_names_tell_inits_apart(tmp_path, files, labels):
    inits = ["random", "pcrlv2", *(str(tmp_path / name) for name in files)]
    found = plan.labels_of(inits)
    assert list(found) == inits
    root = "_".join(tmp_path.parts[1:])
    expected = [name.replace("ROOT", tmp_path.name) for name in labels]
    values = [value.replace(root, tmp_path.name) for value in found.values()]
    assert values == ["random", "pcrlv2", *expected]


def test_a_studys_pretraining_sees_no_image_that_judges(tmp_path):
    """Class folders are all training images to a pre-training by itself."""
    for name in ("ill", "well"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(20):
            pixels = np.random.default_rng(i).integers(0, 255, (8, 8), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i} {name} 1.png")
    (tmp_path / "images" / "list.txt").write_text(
        "\n".join(f"{name}/{i} {name} 1.png {name == 'ill':d}" for i in range(20) for name in ("ill", "well"))
    )
    words = ["--data", str(tmp_path / "images"), "--dataset", "folder", "--init", "random", "pcrlv2", "--trials", "1"]
    words += ["--annotation-percent", "100", "--image-size", "32", "--output", str(tmp_path / "out")]
    for given in ([], ["--list", str(tmp_path / "images" / "list.txt")]):
        args, rest = compare.get_parser().parse_known_args([*words, *given])
        args.epochs, args.jobs = [None], 1
        opened = plan.open_tasks(args, rest)
        pretraining = plan.plan(args, rest, opened).jobs[0]
        pretraining.write_lists()
        seen = registry.open_pretraining(pretraining.options()).ids
        assert sorted(seen) == sorted(opened["classification"].data["train"].ids)
        assert len(seen) == 28
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "images", other)
    args.extra = [f"pretraining --data {shlex.quote(str(other))}"]
    assert len(registry.open_pretraining(plan.plan(args, rest, opened).jobs[0].options())) == 40


def test_a_studys_pretraining_sees_no_patient_that_judges(tmp_path):
    """Also where it is given other images of those patients."""
    names = {split: [] for split in ("train", "val", "test")}
    for number in range(6):
        split = list(names)[number // 2]
        for study in (1, 2):
            name = f"patient{number}/{study}.png"
            (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(number).integers(0, 255, (8, 8), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name)
        names[split].append(f"patient{number}/1.png {number % 2}")
    words = ["--data", str(tmp_path / "images"), "--image-size", "32", "--init", "random", "pcrlv2", "--trials", "1"]
    for split, lines in names.items():
        (tmp_path / f"{split}.txt").write_text("\n".join(lines))
        words += ["--list" if split == "train" else f"--{split}-list", str(tmp_path / f"{split}.txt")]
    (tmp_path / "all.txt").write_text("\n".join(f"patient{i}/{study}.png" for i in range(6) for study in (1, 2)))
    words += ["--with", f"pretraining --list {tmp_path}/all.txt", "--output", str(tmp_path / "out")]
    args, rest = compare.get_parser().parse_known_args(words)
    args.epochs, args.jobs = [None] * 3, 1
    pretraining = plan.plan(args, rest, plan.open_tasks(args, rest)).jobs[0]
    assert not (tmp_path / "out").exists()  # a plan writes nothing
    pretraining.write_lists()
    seen = registry.open_pretraining(pretraining.options()).ids
    assert seen == [f"patient{number}/{study}.png" for number in (0, 1) for study in (1, 2)]
    # What a run was given is not changed under it.
    jobs.note(pretraining, "finished", 0.0, None)
    pretraining.check()
    ((path, text),) = pretraining.lists
    path.write_text(text.partition("\n")[2])
    with pytest.raises(InputError, match="was started with other data: the images that it may see are not those of"):
        pretraining.check()
    assert path.read_text() != text


def test_pretraining_on_scans_with_masks_sees_what_segmentation_trains_on(tmp_path):
    names = [f"case{i}" for i in range(10)]
    for masks, end in (("masks", ""), ("images", "_seg")):
        root = tmp_path / masks
        for folder in ("images", masks):
            (root / folder).mkdir(parents=True, exist_ok=True)
        for name in names:
            scan = np.random.default_rng(0).normal(size=(6, 6, 6))
            for path, array in ((f"images/{name}", scan), (f"{masks}/{name}{end}", scan > 0)):
                sitk.WriteImage(sitk.GetImageFromArray(array.astype(np.int16)), str(root / f"{path}.nii.gz"))
        root = root / "images" if end else root
        words = ["--data", str(root), "--dataset", "folder", "--task", "segmentation", "--init", "random", "pcrlv2"]
        args, rest = compare.get_parser().parse_known_args([*words, "--output", str(tmp_path / "out")])
        args.epochs, args.jobs = [None] * 3, 1
        opened = plan.open_tasks(args, rest)
        pretraining = plan.plan(args, rest, opened).jobs[0]
        pretraining.write_lists()
        seen = registry.open_pretraining(pretraining.options()).ids
        assert seen == opened["segmentation"].data["train"].ids
        assert len(seen) == 7
        (tmp_path / "list.txt").write_text("case1\ncase3\n")
        by_list = Namespace(**{**vars(opened["segmentation"].args), "list": str(tmp_path / "list.txt"), "ratio": 1.0})
        assert registry.open_pretraining(by_list).ids == ["case1", "case3"]


def test_options_go_where_they_belong(tmp_path):
    words = ["--dataset", "drive", "--data", "DIR", "--image-size", "96", "--amp", "--workers", "0", "--lr", "0.5"]
    words += ["--patch", "64", "--flip", "none"]
    words += ["--no-deterministic", "--task", "segmentation", "--init", "random", "magical", "--trials", "1"]
    words += ["--annotation-percent", "100", "--with", "pretraining --epochs 7", "--with", "magical --lr 0.25"]
    words += ["--with", "segmentation --overlays 1", "--output", str(tmp_path)]
    args, rest = compare.get_parser().parse_known_args(words)
    args.epochs, args.jobs = [None], 1
    pretraining, random, magical = plan.plan(args, rest, {}).jobs
    words = "--data DIR --dataset drive --workers 0 --amp --no-deterministic --image-size 96 --epochs 7 --lr 0.25"
    assert sorted(pretraining.argv) == sorted([*words.split(), "--arch", "resnet18"])
    assert (pretraining.options().epochs, pretraining.options().lr) == (7, 0.25)
    assert (magical.options().lr, magical.options().patch, magical.options().overlays) == (0.5, [64], 1)
    assert magical.needs is pretraining
    assert magical.options().init == str(tmp_path / "pretraining" / "magical" / "encoder.pt")
    assert random.needs is None
    assert random.weights is None


def test_all_methods_are_of_one_architecture(tmp_path):
    """Each pre-training makes what is fine-tuned, whatever its script's own default."""
    words = ["--image-size", "32", "--annotation-percent", "1", "--trials", "1", "--no-features"]
    words += ["--init", "random", *plan.METHODS, "--output", str(tmp_path)]
    for given, arch in (([], "resnet18"), (["--arch", "resnet34"], "resnet34")):
        args, rest = compare.get_parser().parse_known_args([*words, *given])
        args.epochs, args.jobs = [None], 1
        opened = plan.open_tasks(args, rest)
        results = plan.plan(args, rest, opened)
        assert len(results.jobs) == 2 * len(plan.METHODS) + 1
        assert {job.options().arch or "resnet18" for job in results.jobs} == {arch}
        plan.check(results, opened)
    detection = ["--task", "detection", "--dataset", "tissue2d", "--init", "magical", "--trials", "1"]
    args, rest = compare.get_parser().parse_known_args([*detection, "--output", str(tmp_path)])
    args.epochs, args.jobs = [None] * 3, 1
    assert plan.plan(args, rest, {}).jobs[0].options().arch == "resnet18"
    with pytest.raises(InputError, match="^pre-training of magical: --arch resnet50, but classification has resnet18"):
        compare.main([*words, "--with", "magical --arch resnet50"])
    with pytest.raises(InputError, match="^pre-training of pcrlv2: --arch resnet50, but classification has resnet18"):
        compare.main([*words, "--with", "pcrlv2 --arch resnet50"])
    assert not list(tmp_path.rglob("job.json"))


# Jobs ----------------------------------------------------------------------------------------------


@pytest.fixture
def script(monkeypatch):
    """A script `fake` with the option `--code TEXT`, whose processes run TEXT as Python with `folder`, its output."""
    module = types.ModuleType("medssl.fake")

    def get_parser():
        parser = Parser("")
        parser.add_argument("--code")
        parser.add_argument("--output")
        return parser

    module.get_parser = get_parser
    monkeypatch.setitem(sys.modules, "medssl.fake", module)

    def start(job, place):
        job.folder.mkdir(parents=True, exist_ok=True)
        code = f"import os, sys, time\nfolder = {str(job.folder)!r}\n{job.argv[1]}"
        with open(job.folder / "log.txt", "w") as log:
            return subprocess.Popen([sys.executable, "-c", code], stdout=log, stderr=log, env={**os.environ, **place})

    monkeypatch.setattr(jobs, "start", start)
    proof = "open(folder + '/proof', 'w').close()"

    def job(folder, code, **more):
        return Job(folder.name, "fake", ("--code", code.replace("PROVE", proof)), folder, "proof", **more)

    return job


def test_jobs_run_beside_each_other_and_wait_for_what_they_need(script, tmp_path):
    first = script(tmp_path / "first", "time.sleep(1); PROVE; print(time.time())")
    second = script(tmp_path / "second", "assert os.path.exists(folder + '/../first/proof'); PROVE", needs=first)
    meanwhile = script(tmp_path / "meanwhile", "assert not os.path.exists(folder + '/../first/proof'); PROVE")
    ended = []
    run_beside([first, second, meanwhile], [{}, {}], lambda job, reason: ended.append((job.name, reason)))
    assert ended == [("meanwhile", None), ("first", None), ("second", None)]
    assert all(job.finished() for job in (first, second, meanwhile))


def test_a_folder_that_another_has_is_waited_for_while_others_run(script, tmp_path, monkeypatch, capsys):
    """And no longer than is patient."""
    made, begin = [script(tmp_path / name, "PROVE") for name in ("taken", "never", "free")], jobs.start
    since, ended = time.monotonic(), []

    def start(job, place):
        free = {"taken": "free" in dict(ended), "never": False, "free": True}[job.name]
        job.folder.mkdir(exist_ok=True)
        (job.folder / ".lock").write_text("process 1 on a")
        return begin(job, place) if free else None

    monkeypatch.setattr(jobs, "start", start)
    monkeypatch.setattr(jobs, "PATIENCE", 2)
    run_beside(made, [{}], lambda job, reason: ended.append((job.name, reason)))
    line = "process 1 on a is at work there; wait for it, or choose another --output"
    assert ended == [("free", None), ("taken", None), ("never", f"--output {tmp_path}/never: {line}")]
    assert capsys.readouterr().err.count("waiting 60 s for it") == 2
    assert time.monotonic() - since < 30


def test_a_folder_that_another_has_is_not_waited_for_in_start(tmp_path):
    job = Job("a", "train_moco", (), tmp_path / "a", "proof")
    job.folder.mkdir()
    with locks.take_folder(job.folder):
        assert jobs.start(job, {}) is None


def test_a_failed_run_that_another_continues_stays_where_it_is(script, tmp_path, monkeypatch):
    """With other options it would be moved aside, with all that the other still writes."""
    monkeypatch.setattr(jobs, "PATIENCE", 0)
    before, now = script(tmp_path / "a", "raise SystemExit('no')"), script(tmp_path / "a", "PROVE")
    before.folder.mkdir()
    jobs.note(before, "failed", time.time(), "no")
    with locks.take_folder(before.folder):
        assert now.claim() is None
        assert "is at work there" in run_here(now)
        assert not (tmp_path / "a.failed").exists()
    with now.claim():
        assert (tmp_path / "a.failed" / "job.json").exists()
        assert [path.name for path in now.folder.iterdir()] == [locks.LOCK]
        assert now.claim() is None


@pytest.mark.parametrize("words", [["--jobs", "0"], ["--job", "0"]])
def test_what_another_finished_meanwhile_is_not_run_again(words, script, tmp_path, monkeypatch):
    job = script(tmp_path / "a", "")
    study, args = Namespace(jobs=[job], cells=[], metrics=[]), compare.get_parser().parse_args(words)
    args.output = str(tmp_path)
    take = locks.lock_folder

    def wait_for_another(folder, *more):
        lock = take(folder, *more)
        if not job.finished():
            (job.folder / "proof").touch()
            jobs.note(job, "finished", time.time())
        return lock

    job.folder.mkdir()
    monkeypatch.setattr(locks, "lock_folder", wait_for_another)
    monkeypatch.setattr(jobs, "lock_folder", wait_for_another)
    monkeypatch.setattr(compare, "write_tables", lambda *_: None)
    sys.modules["medssl.fake"].main = lambda argv: pytest.fail("run again")
    (compare.run_one if args.job == 0 else compare.run)(study, args)
    assert job.finished()


def test_each_place_has_its_environment(script, tmp_path):
    code = "time.sleep(.3); print(os.environ['CUDA_VISIBLE_DEVICES']); PROVE"
    made = [script(tmp_path / str(k), code) for k in range(4)]
    args = compare.get_parser().parse_args(["--gpus", "3,5"])
    args.jobs = 2
    run_beside(made, jobs.places(args), lambda *_: None)
    assert sorted((tmp_path / str(k) / "log.txt").read_text().strip() for k in range(4)) == ["3", "3", "5", "5"]


def test_reasons_of_failures(script, tmp_path):
    for name, code, reason in (
        ("input", "sys.exit('error: --lr 7: too much')", "--lr 7: too much"),
        ("crash", "raise ValueError('two\\nlines')", "lines"),
        ("killed", "os.kill(os.getpid(), 9)", "ended by SIGKILL; was there too little memory?"),
        ("silent", "sys.exit(7)", "exit code 7"),
        ("term", "sys.exit(143)", "was interrupted; the same command continues"),
    ):
        bad = script(tmp_path / name, code)
        after = script(tmp_path / f"after_{name}", "PROVE", needs=bad)
        ended = {}
        run_beside([bad, after], [{}], lambda job, why: ended.update({job.name: why}))  # noqa: B023
        assert ended == {name: reason, f"after_{name}": f"{name}: {reason}"}
        assert bad.record()["status"] == "failed"
        assert not bad.finished()


def test_a_run_in_this_process_fails_for_itself(script, tmp_path):
    job = script(tmp_path / "job", "")

    def fail(argv):
        raise RuntimeError("of a job\nmore")

    sys.modules["medssl.fake"].main = fail
    assert run_here(job) == "RuntimeError: of a job more"
    assert "Traceback" in (job.folder / "log.txt").read_text()
    sys.modules["medssl.fake"].main = lambda argv: (job.folder / "proof").touch()
    assert run_here(job) is None
    assert job.finished()


def test_a_run_that_failed_is_tried_with_other_options(script, tmp_path):
    failing = script(tmp_path / "job", "raise SystemExit('error: too large')")
    sys.modules["medssl.fake"].main = lambda argv: (_ for _ in ()).throw(InputError("too large"))
    assert run_here(failing) == "too large"
    (failing.folder / "last.pt").touch()
    other = script(tmp_path / "job", "PROVE")
    failing.check()
    other.check()
    sys.modules["medssl.fake"].main = lambda argv: (other.folder / "proof").touch()
    assert run_here(failing) is None  # the same options: what there is is continued
    assert (failing.folder / "last.pt").exists()
    with pytest.raises(InputError, match="was started with code"):
        other.check()  # it is finished now
    jobs.note(failing, "failed", time.time(), "again too large")
    assert run_here(other) is None
    assert not (other.folder / "last.pt").exists()
    assert (tmp_path / "job.failed" / "last.pt").exists()
    jobs.note(other, "failed", time.time() - 5, jobs.INTERRUPTION)
    with pytest.raises(InputError, match="was started with code"):
        failing.check()
    jobs.note(other, "finished", time.time() - 2)
    assert other.record()["seconds"] == pytest.approx(7, abs=0.5)


def test_a_script_that_stops_is_a_failed_run(script, tmp_path):
    job = script(tmp_path / "job", "")

    def stop(code):
        raise SystemExit(code)

    sys.modules["medssl.fake"].main = lambda argv: stop(2)
    assert run_here(job) == "exit code 2"
    sys.modules["medssl.fake"].main = lambda argv: stop(128 + signal.SIGTERM)
    with pytest.raises(SystemExit):
        run_here(job)


@pytest.mark.slow
def test_a_killed_study_goes_on(tmp_path):
    """kill -9: what runs saves its state and ends with its parent; the same command does the rest."""
    words = [*SMALL[:-3], "--no-features", "--init", "random", "--annotation-percent", "1", "--epochs", "8"]
    command = [sys.executable, "-m", "medssl.compare", *words, "--trials", "2", "--output", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folders = [tmp_path / "classification" / "1_percent" / "random" / f"run_{k}" for k in (0, 1)]
    deadline = time.monotonic() + 300
    while not (folders[1] / "trial_0" / "metrics.jsonl").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = (folders[0] / "results.json").stat().st_mtime_ns
    # At once: a run that still saves its state is waited for, and goes on.
    again = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    if sys.platform == "linux":
        assert subprocess.run(["pgrep", "-f", str(folders[1])], capture_output=True, text=True).stdout == ""
        steps = [
            json.loads(line)["step"] for line in (folders[1] / "trial_0" / "metrics.jsonl").read_text().splitlines()
        ]
        assert steps == sorted(steps)
    (row,) = json.loads((tmp_path / "comparison.json").read_text())
    assert row["trials"] == 2
    assert (folders[0] / "results.json").stat().st_mtime_ns == first


@pytest.mark.slow
def test_on_a_cluster(encoder, tmp_path, capsys, monkeypatch):
    """The printed script submits arrays that cover all runs; each run of them works by itself."""
    options = [*SMALL, "--init", "random", "pcrlv2", "--annotation-percent", "1", "--trials", "1"]
    options += ["--with", "pcrlv2 --local-size 32 --b 4 --steps 2", "--output", str(tmp_path / "out of space")]
    compare.main([*options, "--slurm"])
    script = tmp_path / "submit.sh"
    script.write_text(capsys.readouterr().out)
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(
        f'#!/bin/bash\nn=$(ls {tmp_path} | grep -c call_)\necho "$@" > {tmp_path}/call_$n\n'
        f"cat > {tmp_path}/script_$n\necho 10$n\n"
    )
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    subprocess.run(["bash", str(script)], check=True, capture_output=True)
    calls = [(tmp_path / f"call_{n}").read_text().split() for n in range(3)]
    assert calls[0][-1] == "--array=0-0"
    assert calls[1][-2:] == ["--array=0-1", "--dependency=afterany:100"]
    assert calls[2][-1] == "--dependency=afterany:101"
    assert "--gpus=1" in calls[1]
    assert "--gpus=1" not in calls[2]
    for n, end in enumerate(
        ("--job $((0 + $SLURM_ARRAY_TASK_ID))", "--job $((1 + $SLURM_ARRAY_TASK_ID))", "--tables-only")
    ):
        first, line = (tmp_path / f"script_{n}").read_text().strip().splitlines()
        assert first == "#!/bin/bash"
        assert line.endswith(end)
        words = shlex.split(line.split("exec ")[1])
        assert words[2 : 2 + len(options)] == options
    assert (tmp_path / "out of space" / "slurm").is_dir()
    assert all("out of space/slurm/%A_%a.txt" in (tmp_path / f"call_{n}").read_text() for n in range(3))

    with pytest.raises(InputError, match="pcrlv2, trial 0: pre-training of pcrlv2: has not been run"):
        compare.main([*options, "--job", "2"])
    for k in range(3):
        compare.main([*options, "--job", str(k)])
    rows = compare.main([*options, "--tables-only"])
    assert [row["trials"] for row in rows] == [1, 1]
