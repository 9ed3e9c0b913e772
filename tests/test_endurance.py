"""What looks for faults finds those that are planted."""

import itertools

import pytest
import torch

from medssl.benchmarks import endure_faults, endure_kills
from medssl.benchmarks.endure_kills import Laboratory, Task


def laboratory(tmp_path, **tasks):
    """One whose tasks are given."""
    return Laboratory(tasks, tmp_path / "work", tmp_path / "kept", "0")


def checkpoint(folder, step):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"step": step, "weights": torch.ones(1000)}, folder / "last.pt")


def test_lost_checkpoints_are_found(tmp_path):
    lab, folder = laboratory(tmp_path), tmp_path / "work" / "case" / "run"
    checkpoint(folder, 3)
    before = lab.look("moco", "forked", folder, {})
    assert before == {"last.pt": 3}
    checkpoint(folder, 2)
    assert lab.look("moco", "forked", folder, before) is None
    (folder / "last.pt").unlink()
    assert lab.look("moco", "forked", folder, before) is None
    (folder / "result.json").touch()  # of a trial that has ended, which needs none
    assert lab.look("moco", "forked", folder, before) == {}
    checkpoint(folder, 4)
    whole = (folder / "last.pt").read_bytes()
    (folder / "last.pt").write_bytes(whole[: len(whole) // 2])
    assert lab.look("moco", "forked", folder, before) is None
    assert lab.ledger.lost == len(lab.ledger.faults) == 3
    assert "was at step 3, now 2" in lab.ledger.faults[0]
    assert len(list((tmp_path / "kept").glob("*/run"))) == 3


@pytest.mark.slow
@pytest.mark.parametrize("way", ["forked", "writing", "shell"])
def test_a_run_is_killed_continued_and_compared(way, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    endure_kills.make_data(data)
    lab = laboratory(tmp_path, moco=endure_kills.tasks(data)["moco"])
    lab.chain("moco", way, 2)
    assert lab.ledger.faults == []
    assert lab.ledger.runs == 1
    assert lab.ledger.kills["moco", way] >= 1
    digests = itertools.count()
    task = lab.tasks["moco"]
    lab.tasks["moco"] = Task(task.module, task.words, lambda folder: str(next(digests)))
    lab.references.clear()
    lab.chain("moco", way, 1)
    assert lab.ledger.differing == 1
    assert "differs from the undisturbed run" in lab.ledger.faults[0]


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("pass", []),
        ("print('error: no'); sys.exit(2)", []),
        ("1 / 0", ["ends with 1", "leaves a traceback"]),
        ("os.kill(os.getpid(), 11)", ["ends with -11"]),
        ("print('no'); sys.exit(2)", ["its last line is not the error's"]),
        ("sys.exit(2)", ["its last line is not the error's"]),
        ("time.sleep(60)", ["hangs for 3 s"]),
        ("print('error: choose another --output'); sys.exit(2)", ["its last line names --output"]),
        ("open(sys.argv[1] + '/last.pt', 'w').write('half')", ["last.pt cannot be read"]),
    ],
)
def test_faults_of_a_run_in_an_environment_are_found(code, found, tmp_path, monkeypatch):
    monkeypatch.setattr(endure_faults, "LONGEST", 3)
    script = tmp_path / "script.py"
    script.write_text(f"import os, sys, time\n{code}\n")
    case = endure_faults.Case([str(script), str(tmp_path)], tmp_path, tmp_path, unhelpful="--output")
    wrong = endure_faults.try_case(case)
    assert [text[: len(start)] for text, start in zip(wrong, found)] == found
    assert len(wrong) == len(found)


def test_counts_are_written_as_they_come(tmp_path, monkeypatch):
    """That of hours nothing is lost where the last of them is."""
    made = {"a": Task("train_moco", (), str), "b": Task("train_moco", (), str)}
    turns = iter(("a", "b", "a"))  # then it breaks

    def chain(lab, name, way, most):
        lab.ledger.kills[next(turns), way] += 2

    monkeypatch.setattr(Laboratory, "chain", chain)
    with pytest.raises(StopIteration):
        endure_kills.lane(made, ["a", "b"], "0_0", float("inf"), tmp_path)
    found = endure_kills.read_json(tmp_path / "ledgers" / "0_0.json")
    assert (found["kills"], found["by_script"]) == (6, {"a": 4, "b": 2})


def test_counts_of_two_runs_add_up():
    first = {"kills": 3, "by": {"moco": 3}, "faults": ["a"]}
    assert endure_kills.add(None, first) == first
    more = endure_kills.add(first, {"kills": 2, "by": {"byol": 2}, "faults": ["b"]})
    assert more == {"kills": 5, "by": {"moco": 3, "byol": 2}, "faults": ["a", "b"]}
