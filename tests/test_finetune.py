"""Fine-tuning, comparison and their numbers."""

import csv
import importlib
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.run
from sklearn.metrics import roc_auc_score

from medssl import compare, finetune_classification, finetune_segmentation, train_pcrlv2
from medssl.datasets.base import Info
from medssl.datasets.phantoms import radiograph
from medssl.engine import options
from medssl.errors import InputError
from medssl.losses.classification import classification_loss
from medssl.models.encoders import make_encoder
from medssl.models.heads import EncoderClassifier
from medssl.study import plan
from medssl.tasks import trials
from medssl.tasks.metrics import auroc_interval, score, score_with_intervals

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("few_radiographs")
SMALL = ["--dataset", "phantom2d", "--texture-size", "32", "--image-size", "32", "--workers", "0", "--no-tensorboard"]
SMALL += ["--annotation-percent", "1", "--b", "8", "--epochs", "2"]


@pytest.fixture(scope="module")
def encoder(few_radiographs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    train_pcrlv2.main([*SMALL[:8], "--b", "8", "--steps", "2", "--local-size", "32", "--output", str(folder)])
    return folder / "encoder.pt"


def test_pretrain_then_finetune_leaves_everything(encoder, tmp_path):
    finetune_classification.main([*SMALL, "--init", str(encoder), "--trials", "2", "--output", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    aurocs = [trial["auroc"] for trial in results["trials"]]
    assert results["matched_keys"] == 100  # weights, biases and statistics of ResNet-18's encoder
    assert results["mean"] == pytest.approx(np.mean(aurocs))
    assert results["std"] == pytest.approx(abs(aurocs[0] - aurocs[1]) / np.sqrt(2))
    assert results["trials"][0]["train_images"] == 20
    with open(tmp_path / "predictions.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["trial"] == "1"]
    truth = [float(row["true nodule"]) for row in rows]
    assert roc_auc_score(truth, [float(row["probability nodule"]) for row in rows]) == pytest.approx(
        aurocs[1], abs=1e-4
    )
    low, high = results["trials"][1]["per_class"]["nodule"]["interval"]
    assert low < aurocs[1] < high
    assert {"roc.png", "calibration.png", "best.pt", "config.json"} <= {path.name for path in tmp_path.iterdir()}
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    assert best["classes"] == ["clear", "nodule"]
    network = EncoderClassifier(make_encoder("resnet18"), 2)
    network.load_state_dict(best["state_dict"])  # every key
    features, logits = network.eval()(torch.zeros(1, 3, 32, 32))
    assert torch.equal(logits, network.head[1](features))


def test_a_run_that_ends_before_it_has_learnt_says_so(tmp_path, capsys):
    command = [*SMALL, "--lr", "1e-9", "--epochs", "20", "--output"]
    finetune_classification.main([*command, str(tmp_path / "short"), "--patience", "1"])
    said = re.search(r"note: stopped after (\d+) steps, too few to learn from, as 1 epochs", capsys.readouterr().err)
    trial = json.loads((tmp_path / "short" / "results.json").read_text())["trials"][0]
    assert int(said[1]) == trial["steps"] < 50
    assert trial["stopped_early"]
    finetune_classification.main([*command, str(tmp_path / "whole"), "--patience", "0"])
    assert "note: stopped" not in capsys.readouterr().err
    assert not json.loads((tmp_path / "whole" / "results.json").read_text())["trials"][0]["stopped_early"]


def test_epochs_of_few_images_may_have_more_steps(tmp_path):
    finetune_classification.main([*SMALL, "--epoch-steps", "7", "--output", str(tmp_path)])
    trial = json.loads((tmp_path / "results.json").read_text())["trials"][0]
    assert trial["train_images"] == 20
    assert trial["steps"] == 2 * 7.5  # three passes of 20 images in steps of 8
    lines = [json.loads(line) for line in (tmp_path / "trial_0" / "metrics.jsonl").read_text().splitlines()]
    assert len([line for line in lines if "score" in line or "val_auroc" in line]) == 2


def test_finished_trials_are_kept_and_changed_options_refused(encoder, tmp_path):
    command = [*SMALL, "--output", str(tmp_path)]
    finetune_classification.main(command)
    first = (tmp_path / "trial_0" / "result.json").stat().st_mtime_ns
    finetune_classification.main([*command, "--trials", "2"])
    assert (tmp_path / "trial_0" / "result.json").stat().st_mtime_ns == first
    assert len(json.loads((tmp_path / "results.json").read_text())["trials"]) == 2
    with pytest.raises(InputError, match="was started with lr 0.001, now 0.5"):
        finetune_classification.main([*command, "--lr", "0.5"])
    with pytest.raises(InputError, match="was started with init random"):
        finetune_classification.main([*command, "--init", str(encoder)])


def test_new_weights_under_an_old_name_are_noticed(encoder, tmp_path):
    weights = tmp_path / "encoder.pt"
    weights.write_bytes(encoder.read_bytes())
    command = [*SMALL, "--init", str(weights), "--output", str(tmp_path / "out")]
    finetune_classification.main(command)
    content = torch.load(weights, weights_only=True)
    content["state_dict"]["conv1.weight"] *= 2
    torch.save(content, weights)
    with pytest.raises(InputError, match="was started with init_digest"):
        finetune_classification.main(command)


def pairs(path, flip=False, shift=0):
    """A BreastMNIST file of dark and bright images."""
    arrays = {}
    for split in ("train", "val", "test"):
        labels = np.arange(8) % 2
        arrays[f"{split}_images"] = np.full((8, 28, 28), 60, np.uint8) + (90 * labels + shift)[:, None, None].astype(
            "u1"
        )
        arrays[f"{split}_labels"] = (1 - labels if flip else labels)[:, None].astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)
    return path.parent


BREAST = ["--dataset", "breastmnist", "--image-size", "28", "--workers", "0", "--no-tensorboard", "--steps", "1"]
BREAST += ["--b", "4", "--device", "cpu"]


def test_results_of_other_data_are_not_kept(tmp_path):
    command = [*BREAST, "--output", str(tmp_path / "o"), "--data"]
    finetune_classification.main([*command, str(pairs(tmp_path / "a" / "breastmnist.npz"))])
    finetune_classification.main([*command, str(pairs(tmp_path / "moved" / "breastmnist.npz"))])  # the same
    for name, change in (("labels", {"flip": True}), ("pixels", {"shift": 3})):
        data = pairs(tmp_path / name / "breastmnist.npz", **change)
        with pytest.raises(InputError, match="was started with other data: images, their order, lists or labels diff"):
            finetune_classification.main([*command, str(data)])


def test_a_new_run_leaves_no_old_results_when_it_fails(tmp_path, monkeypatch):
    command = [*BREAST, "--output", str(tmp_path / "o"), "--data", str(pairs(tmp_path / "d" / "breastmnist.npz"))]
    finetune_classification.main(command)
    assert (tmp_path / "o" / "results.json").exists()

    def fails(*_, **__):
        raise InputError("fails")

    monkeypatch.setattr(trials, "fit", fails)
    with pytest.raises(InputError, match="^fails$"):
        finetune_classification.main([*command, "--resume", "never"])
    assert {path.name for path in (tmp_path / "o").iterdir()} == {".lock", "config.json"}


def test_predictions_that_are_not_finite_are_refused(tmp_path, monkeypatch):
    command = [*BREAST, "--output", str(tmp_path / "o"), "--data", str(pairs(tmp_path / "d" / "breastmnist.npz"))]
    broken = EncoderClassifier.forward
    monkeypatch.setattr(
        EncoderClassifier,
        "forward",
        lambda self, x: tuple(y * (1 if self.training else float("nan")) for y in broken(self, x)),
    )
    with pytest.raises(InputError, match="8 of 8 predictions are not finite, such as of .*lower --lr or use --clip-gr"):
        finetune_classification.main(command)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--crop-scale", "0", "0"], "argument --crop-scale: '0' is not a number from 0.01 to 1"),
        (["--margin", "0"], "argument --margin: '0' is not a number from 0.1 to 1"),
        (["--data", ""], "argument --data: is empty; is a shell variable not set?"),
        (["--test-list", " "], "argument --test-list: is empty"),
        (["--output", ""], "argument --output: is empty"),
    ],
)
def test_bad_values(argv, message, capsys):
    with pytest.raises(SystemExit):
        finetune_classification.get_parser().parse_args(argv)
    assert message in capsys.readouterr().err


def test_ten_crops_need_a_margin(tmp_path):
    with pytest.raises(
        InputError, match="--tta tencrop: with --margin 1 its crops are all the same; give --margin 0.8"
    ):
        finetune_classification.main([*SMALL, "--tta", "tencrop", "--output", str(tmp_path / "o")])


@pytest.mark.parametrize("split", ["val", "test"])
def test_splits_without_a_known_label_are_refused(split, tmp_path):
    from PIL import Image

    argv = []
    for name in ("train", "val", "test"):
        lines = []
        for i in range(4):
            Image.new("L", (32, 32), 9 * i).save(tmp_path / f"{name}{i}.png")
            lines.append(f"{name}{i}.png {'-1 -1' if name == split else f'{i % 2} 0'}\n")
        (tmp_path / f"{name}.txt").write_text("".join(lines))
        argv += ["--list" if name == "train" else f"--{name}-list", str(tmp_path / f"{name}.txt")]
    with pytest.raises(InputError, match=f"none of the labels of the {split} split is known; see --{split}-list"):
        finetune_classification.main(["--data", str(tmp_path), *argv, "--output", str(tmp_path / "o")])


def test_processes_without_a_rank(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(InputError, match="WORLD_SIZE is 2, but RANK is not set; start with torchrun, or unset WORLD_S"):
        finetune_classification.main([*SMALL, "--output", str(tmp_path)])


def test_trials_are_paired(encoder, tmp_path, monkeypatch):
    """The same trial of two inits draws the same labelled images, order and head; another trial draws others."""
    seen = []

    def spy(method, data, views, args, *rest, **options):
        seen.append((data.ids, args.seed, method.network.head[1].weight.detach().clone()))
        return fit(method, data, views, args, *rest, **options)

    fit = trials.fit
    monkeypatch.setattr(trials, "fit", spy)
    for init in ("random", str(encoder)):
        command = [*SMALL, "--steps", "1", "--trials", "2", "--init", init, "--output", str(tmp_path / init[-6:])]
        finetune_classification.main(command)
    (ids, seed, head), other, *pair = seen
    assert (ids, seed) == pair[0][:2]
    assert torch.equal(head, pair[0][2])
    assert set(ids) != set(other[0])
    assert other[:2] == pair[1][:2]


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_result(tmp_path):
    command = [*SMALL, "--epochs", "12", "--save-every", "5", "--output"]
    finetune_classification.main([*command, str(tmp_path / "whole")])
    same = f"from medssl.datasets.phantoms import radiograph; radiograph.SPLITS = {radiograph.SPLITS}"  # of these few
    call = f"{same}; from medssl.finetune_classification import cli; cli()"
    script = [sys.executable, "-c", call, *command, str(tmp_path / "killed")]
    process = subprocess.Popen(script, stdout=subprocess.DEVNULL)
    last = tmp_path / "killed" / "trial_0" / "last.pt"
    deadline = time.monotonic() + 120
    while not last.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert last.exists() or (tmp_path / "killed" / "results.json").exists()
    finetune_classification.main([*command, str(tmp_path / "killed")])
    whole, killed = (json.loads((tmp_path / n / "results.json").read_text())["trials"] for n in ("whole", "killed"))
    for key in ("auroc", "accuracy", "val_score", "best_epoch", "steps"):
        assert whole[0][key] == killed[0][key], key


def test_bootstrap_interval():
    rng = np.random.default_rng(0)
    truth = (rng.random(300) < 0.4).astype(float)
    scores = np.round(truth + rng.normal(0, 1, 300), 1)  # with ties
    low, high = auroc_interval(scores, truth, resamples=400)
    draws = [rng.integers(300, size=300) for _ in range(400)]
    expected = np.quantile([roc_auc_score(truth[d], scores[d]) for d in draws], [0.025, 0.975])
    assert [low, high] == pytest.approx(expected, abs=0.015)
    # Ten copies of every image, of one patient each, say no more than one.
    tenfold = auroc_interval(scores.repeat(10), truth.repeat(10), 400, groups=np.arange(300).repeat(10).astype(str))
    assert tenfold == pytest.approx([low, high], abs=0.02)
    assert np.diff(auroc_interval(scores.repeat(10), truth.repeat(10), 400)) < (high - low) / 2
    assert auroc_interval(scores, np.ones(300)) is None
    # Of one patient nothing can be drawn.
    assert auroc_interval(scores, truth, groups=["p"] * 300) is None
    info = Info("x", task="binary", classes=("a", "b"))
    both = np.stack([1 - truth, truth], 1)
    values = score_with_intervals(np.stack([-scores, scores], 1), both, info, ["p"] * 300)
    assert values["per_class"]["b"] == {"auroc": roc_auc_score(truth, scores), "interval": None}


def test_scores_by_hand():
    info = Info("x", task="multi-label", classes=("a", "b"))
    targets = np.array([[1, 0], [0, np.nan], [1, 1], [0, 0]])
    values = score(np.array([[0.9, 0.2], [0.6, 0.9], [0.8, 0.7], [0.1, 0.8]]), targets, info)
    assert values["per_class"] == {"a": 1.0, "b": 0.5}
    assert values["accuracy"] == pytest.approx(5 / 7)


def test_unknown_labels_do_not_count():
    logits = torch.tensor([[0.0, 100.0], [0.0, 0.0]], requires_grad=True)
    loss = classification_loss(logits, torch.tensor([[1.0, float("nan")], [0.0, 1.0]]))
    loss.backward()
    assert loss.item() == pytest.approx(np.log(2))
    assert logits.grad[0, 1] == 0


@pytest.mark.parametrize("tta", ["none", "tencrop"])
def test_freeze_trains_the_head_alone(tta, encoder, tmp_path):
    views = ["--tta", tta, "--margin", "0.875"]
    finetune_classification.main([*SMALL, "--freeze", *views, "--init", str(encoder), "--output", str(tmp_path)])
    before = torch.load(encoder, weights_only=True)["state_dict"]
    after = torch.load(tmp_path / "best.pt", weights_only=True)["state_dict"]
    assert all(torch.equal(after[f"encoder.{key}"], value) for key, value in before.items())


def test_the_encoder_may_learn_more_slowly(encoder, tmp_path):
    before, moved = torch.load(encoder, weights_only=True)["state_dict"], {}
    key = "layer4.1.conv2.weight"
    for scale in ("0", "0.1", "1"):
        output, command = tmp_path / scale, [*SMALL, "--init", str(encoder), "--encoder-lr-scale", scale]
        finetune_classification.main([*command, "--output", str(output)])
        after = torch.load(output / "best.pt", weights_only=True)["state_dict"]
        moved[scale] = float((after[f"encoder.{key}"] - before[key]).norm())
        assert after["head.1.weight"].std() > 0
    assert moved["0"] == 0
    assert 0.02 < moved["0.1"] / moved["1"] < 0.5
    with pytest.raises(InputError, match="was started with encoder_lr_scale 1.0, now 0.5"):
        finetune_classification.main([*command[:-1], "0.5", "--output", str(output)])
    with pytest.raises(InputError, match="--encoder-lr-scale: with --freeze the encoder learns nothing"):
        finetune_classification.main(
            [*SMALL, "--freeze", "--encoder-lr-scale", "0.5", "--output", str(tmp_path / "no")]
        )


def test_unlabelled_data_is_refused(tmp_path):
    from PIL import Image

    for i in range(3):
        Image.new("L", (32, 32), i).save(tmp_path / f"{i}.png")
    with pytest.raises(InputError, match="only unlabelled"):
        finetune_classification.main(["--data", str(tmp_path), "--output", str(tmp_path / "out")])


def own_text(page: Path) -> str:
    """Without the files that a page says how to write: test_extending.py writes those, and runs them."""
    return re.sub(r"^(~~~|```)(?:markdown|python)$.*?^\1$", "", page.read_text(), flags=re.M | re.S)


def commands() -> list[str]:
    folders = ROOT / "benchmarks" / "results", ROOT / "docs"
    pages = [ROOT / "README.md", *(page for folder in folders for page in sorted(folder.rglob("*.md")))]
    text = "\n".join(own_text(page) for page in pages)
    command = r"(?:srun {0}*)?(?:python|torchrun {0}*--) (\S+\.py {0}+)"
    lines = re.findall(f"^{command.format('.')}$", text, flags=re.M)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    inline = re.findall(f"`{command.format('[^`]')}`", " ".join(prose.split()))  # which may go on in the next line
    return [line for line in [*lines, *inline] if "--help" not in line]


def texts() -> list[str]:
    """Everything that a reader copies commands from."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/results/*.md"), *ROOT.glob("*.py")]
    return [page.read_text() for page in pages]


def test_torchrun_leaves_the_scripts_options_alone():
    """torchrun takes `--n` and `--d` for beginnings of options of its own, unless they stand after `--`."""
    lines = [line for text in texts() for line in re.findall(r"^ *torchrun (.*\.py .*)$", text, flags=re.M)]
    assert len(lines) > 5
    for line in lines:
        parsed = torch.distributed.run.get_args_parser().parse_args(shlex.split(line))
        words = line.split(".py ", 1)[1].split("   ")[0].split()
        assert [word for word in parsed.training_script_args if not word.startswith("(")][: len(words)] == words


def test_links_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/results/*.md")]:
        text = re.sub(r"^```.*?^```", "", own_text(page), flags=re.M | re.S)
        for link in re.findall(r"\]\(([^)#]+)", text):
            assert "://" in link or (page.parent / link).exists(), f"{page.name}: {link}"


@pytest.mark.parametrize("command", commands())
def test_documented_commands_parse(command, monkeypatch):
    monkeypatch.setattr(options, "resolve_init", lambda init, *_: init)  # MODELS is the reader's
    script, *words = shlex.split(command.split(" > ")[0].removesuffix(" &"))
    if script == "compare.py":
        args, rest = compare.get_parser().parse_known_args(words)
        for task in args.task:
            plan.TASKS[task].script.get_parser().parse_args(rest)
    else:
        module = importlib.import_module("medssl." + script.removesuffix(".py").replace("/", "."))
        _, rest = module.get_parser().parse_known_args(words)
        if script == "benchmarks/frozen_voxels.py":  # the rest is fine-tuning's
            finetune_segmentation.get_parser().parse_args(rest)
        else:
            assert rest == []
