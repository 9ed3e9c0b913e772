"""The laboratory: what it runs, what it chooses, and that it goes on."""

import json
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from medssl.benchmarks import lab, questions
from medssl.benchmarks.lab import Laboratory, Plan, Rows, chosen, hours_left
from medssl.benchmarks.questions import Question
from medssl.errors import InputError

TOY = Question(
    name="toy", asks="Does it run?", task="classification",
    options="--data {data} --dataset pneumoniamnist --arch mobilenet_v2 --image-size 32 --b 8 --workers 0",
    inits={"random": "", "short": "moco --epochs 1 --queue 64", "long": "moco --epochs 2 --queue 64"}, percents=(50,),
    rates=(1e-3, 1e-4), length="--epochs", lengths=(1, 2), trials=2, searched=2, pretrained=2,
    tuning={"short": "--dropout 0.5"}, features=True,
)  # fmt: skip


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 24), ("val", 8), ("test", 8)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(count) % 2).astype(np.uint8)[:, None]
    np.savez(tmp_path / "pneumoniamnist.npz", **arrays)
    return tmp_path / "pneumoniamnist.npz"


def row(plan, run, value):
    """As a finished run's."""
    key = {"question": plan.question.name, **lab.key_of(run)}
    return key | {"seconds": 60.0, "val_score": value, "value": value, "options": run.job.command}


def test_every_init_is_searched_alike_and_trials_are_pairs(data, tmp_path):
    plan, rows = Plan(TOY, str(data), tmp_path / "runs", 1), Rows(tmp_path / "rows.jsonl")
    assert len(plan.pretrainings) == 2 * 2
    searches = plan.searches()
    assert {init: sum(run.init == init for run in searches) for init in TOY.inits} == dict.fromkeys(TOY.inits, 8)
    with pytest.raises(InputError, match="the search of random at 50 % is not finished"):
        plan.trials(rows)
    for run in searches:
        best = {"random": (1e-4, 1), "short": (1e-3, 2), "long": (1e-4, 2)}[run.init]
        rows.add(row(plan, run, 0.9 if (run.rate, run.length) == best else 0.5 + run.run % 2 / 10))
    assert chosen(TOY, Rows(rows.path), "long", 50) == (1e-4, 2)
    trials = plan.trials(rows)
    assert len(trials) == 3 * 4
    assert {run.run for run in trials}.isdisjoint({run.run for run in searches})
    for number in range(4):
        pair = [run for run in trials if run.run == number]
        assert [run.init for run in pair] == list(TOY.inits)
        assert {run.seed for run in pair} == {None, number // 2}
        words = {run.init: " ".join(run.job.argv) for run in pair}
        assert "--init random" in words["random"]
        assert f"pretraining/short_{number // 2}/encoder.pt" in words["short"]
        assert "--lr 0.001 --epochs 2" in words["short"]
        assert [init for init in words if "--dropout 0.5" in words[init]] == ["short"]
    assert [cell.init for cell in plan.cells(trials)] == ["random"] * 4 + ["short"] * 4 + ["long"] * 4


def test_inits_of_the_same_words_share_a_pretraining(data, tmp_path):
    """They differ in fine-tuning alone, such as in what is loaded."""
    plan = Plan(replace(TOY, inits=TOY.inits | {"same": TOY.inits["short"]}), str(data), tmp_path / "runs", 1)
    assert plan.pretrainings["same", 1] is plan.pretrainings["short", 1]
    run = plan.tuning("trial", "same", 50, 1e-3, 1, 0, 1)
    assert (run.init, run.job.needs) == ("same", plan.pretrainings["short", 1].job)
    assert "short_1" in str(run.job.weights)
    assert "same_1" in str(run.job.folder)


def test_hours_are_told_from_rows(data, tmp_path):
    plan, rows = Plan(TOY, str(data), tmp_path / "runs", 2), Rows(tmp_path / "rows.jsonl")
    searches = plan.searches()
    assert hours_left(rows, searches, 2) == "nobody knows how long"
    for run in searches[:2]:
        rows.add(row(plan, run, 0.5) | {"seconds": 3600.0})
    assert hours_left(rows, searches[2:6], 2) == "about 2.0 hours left"
    assert hours_left(rows, [], 2) == "none left"


def test_features_alone_may_be_asked_for(data, tmp_path, capsys):
    own = replace(TOY, inits={"random": ""}, rates=(), lengths=(), trials=0, pretrained=1, tuning={})
    (tmp_path / "mine.py").write_text(f"from medssl.benchmarks.questions import Question\nQUESTIONS = [{own!r}]\n")
    command = ["--questions", str(tmp_path / "mine.py"), "--data", str(data), "--output", str(tmp_path / "runs")]
    lab.main([*command, "--rows", str(tmp_path / "rows.jsonl"), "--jobs", "1"])
    (line,) = (json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines())
    assert all(0 <= line[name] <= 1 for name in ("validation", "probe", "knn"))
    said = " | ".join(f"{line[name]:.4f} ± 0.0000 | " for name in ("validation", "probe", "knn"))
    assert f"| random | {said} |" in capsys.readouterr().out


@pytest.mark.slow
def test_a_question_is_answered_and_goes_on(data, tmp_path, capsys):
    words = f"QUESTIONS = [{TOY!r}]"
    (tmp_path / "mine.py").write_text(f"from medssl.benchmarks.questions import Question\n{words}\n")
    command = ["--questions", str(tmp_path / "mine.py"), "--data", str(data), "--output", str(tmp_path / "runs")]
    command += ["--rows", str(tmp_path / "rows.jsonl"), "--jobs", "2"]
    with pytest.raises(SystemExit, match="the time is over; .*; the same command continues"):
        lab.main([*command, "--hours", "0"])
    assert (tmp_path / "rows.jsonl").read_text().count("\n") >= 1
    lab.main(command)
    out = capsys.readouterr().out
    assert "| 50 % | 12 | short |" in out
    assert re.search(r"\| short \| 0\.\d{4} ± 0\.\d{4} \| [+-]0\.\d{4} ± ", out)  # frozen features
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    stages = {"pretraining": 4, "features": 6, "search": 24, "trial": 12}
    assert Counter(line["stage"] for line in lines) == stages
    assert all(("value" in line) == (line["stage"] == "trial") for line in lines)  # a search sees no test case
    lab.main(command)
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == len(lines)
    assert "toy: 0 runs, none left" in capsys.readouterr().out


def test_a_run_that_has_its_row_is_not_run_again(data, tmp_path, monkeypatch):
    """Also where its folder is gone; a pre-training then is run for what needs it alone."""
    plan, rows = Plan(TOY, str(data), tmp_path / "runs", 1), Rows(tmp_path / "rows.jsonl")
    begun = []
    monkeypatch.setattr(lab, "run_beside", lambda jobs, places, say: begun.extend(jobs))
    for run in (*plan.pretrainings.values(), *plan.searches()):
        rows.add(row(plan, run, 0.5))
    Laboratory(rows, 1).run_those(plan, [*plan.pretrainings.values(), *plan.searches()])
    assert begun == []
    trials = plan.trials(rows)
    for run in trials[:6]:
        rows.add(row(plan, run, 0.5))
    Laboratory(rows, 1).run_those(plan, trials)
    assert len(begun) == 2 + 6
    assert {job.name for job in begun} >= {"short, pre-training 1", "long, pre-training 1"}
    assert all(job.needs in begun[:i] for i, job in enumerate(begun) if job.needs)


def test_an_init_is_finished_before_the_next_begins(data, tmp_path, monkeypatch):
    """Weights may be gone the next day; rows are not."""
    plan, begun = Plan(TOY, str(data), tmp_path / "runs", 1), []
    monkeypatch.setattr(lab, "run_beside", lambda jobs, places, say: begun.append([job.name for job in jobs]))
    monkeypatch.setattr(plan, "trials", lambda rows: [])
    Laboratory(Rows(tmp_path / "rows.jsonl"), 1).run(plan)
    places = [next(i for i, init in enumerate(TOY.inits) if init in name) for name in begun[0]]
    assert places == sorted(places)
    assert [name for name in begun[0] if "pre-training" in name and "long" in name] == begun[0][places.index(2) :][:2]


def test_files_of_questions_that_are_none(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        lab.main(["--questions", str(tmp_path / "q.py")])
    (tmp_path / "q.py").write_text("QUESTIONS = [1]")
    with pytest.raises(InputError, match="makes no QUESTIONS"):
        lab.main(["--questions", str(tmp_path / "q.py")])
    with pytest.raises(InputError, match="--only other: no such question"):
        lab.main(["--only", "other"])
    names = [question.name for question in questions.QUESTIONS]
    assert len(set(names)) == len(names)


def test_what_is_known_so_far_is_told(data, tmp_path):
    """Rows of one init without another's, also without those of random weights."""
    plan, rows = Plan(TOY, str(data), tmp_path / "runs", 1), Rows(tmp_path / "rows.jsonl")
    feature = {"question": "toy", "stage": "features", "percent": None, "rate": None, "length": None, "run": None}
    rows.add(feature | {"init": "short", "seed": 0, "validation": 0.8, "probe": 0.7, "knn": 0.6})
    assert "| short | 0.8000 ± 0.0000 |  | 0.7000 ± 0.0000 |  | 0.6000 ± 0.0000 |  |" in lab.answer(plan, rows)
    for run in plan.searches():
        if run.init == "random":
            rows.add(row(plan, run, 0.5))
    text = lab.answer(plan, rows)
    assert "| 50 % | random | 0.001 | 1 |" in text
    assert "| 50 % | short | | | not finished | |" in text
    assert text.endswith("the search of short at 50 % is not finished: (0.001, 1)")


def test_rows_of_other_options_are_no_rows_of_a_question(data, tmp_path):
    """Its folders may be elsewhere."""
    plan, rows = Plan(TOY, str(data), tmp_path / "runs", 1), Rows(tmp_path / "rows.jsonl")
    (run, *_) = plan.searches()
    rows.add(row(plan, run, 0.5))
    elsewhere = Plan(TOY, str(data), tmp_path / "others", 1)
    assert rows.of("toy", elsewhere.searches()[0])["val_score"] == 0.5
    other = Plan(replace(TOY, options=f"{TOY.options} --weight-decay 0.1"), str(data), tmp_path / "runs", 1)
    with pytest.raises(InputError, match="toy: search, 50 %, random.*: was run with other options; rename the"):
        Laboratory(rows, 1).run_those(other, other.searches())
