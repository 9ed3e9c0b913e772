"""Locks on folders, and what writes leave: of living processes and of dead ones."""

import fcntl
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from medssl import compare, files, finetune_classification, finetune_segmentation, locks, train_moco
from medssl.errors import InputError

HOLD = """
import sys, time
from medssl import locks
with locks.own_folder(sys.argv[1]):
    print("mine", flush=True)
    time.sleep(float(sys.argv[2]))
"""
WRITE = """
import sys, time
from pathlib import Path
from medssl import files
def slowly(part):
    part.mkdir(exist_ok=True) if sys.argv[2] == "folder" else part.write_text("half")
    print(part, flush=True)
    time.sleep(60)
{"file": files.write_atomic, "folder": files.write_folder}[sys.argv[2]](Path(sys.argv[1]) / "x.png", slowly)
"""


def start(code, *words, **more):
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)], stdout=subprocess.PIPE, text=True, **more
    )
    return process, process.stdout.readline().strip()


def test_the_second_run_waits_and_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(locks, "PATIENCE", 0.3)
    process, _ = start(HOLD, tmp_path, 60)
    try:
        with (
            pytest.raises(
                InputError, match=rf"--output {tmp_path}: process {process.pid} on .+ is at work there; wait"
            ),
            locks.own_folder(tmp_path),
        ):
            pass
        assert "waiting 0.3 s for it" in capsys.readouterr().err
        assert re.match(rf"process {process.pid} on \S", (tmp_path / locks.LOCK).read_text())  # still its own
        process.kill()  # as a crash ends it
        process.wait()
        with locks.own_folder(tmp_path):
            assert f"process {os.getpid()} on" in (tmp_path / locks.LOCK).read_text()
    finally:
        process.kill()


def test_a_run_meets_its_dying_predecessor(tmp_path):
    process, _ = start(HOLD, tmp_path, 0.5)
    with locks.own_folder(tmp_path):
        assert process.poll() is not None or process.wait(10) == 0


def test_a_child_may_use_the_folder_that_its_parent_has_locked(tmp_path):
    with locks.take_folder(tmp_path) as lock:
        own = {"pass_fds": [lock.fileno()], "env": {**os.environ, **locks.hand_over(lock)}}
        process, said = start(HOLD, tmp_path, 60, **own)
    try:
        assert said == "mine"
        assert locks.lock_folder(tmp_path, 0) is None  # the parent has let it go, the child has it still
    finally:
        process.kill()
        process.wait()
    locks.lock_folder(tmp_path, 10).close()


def test_an_environment_of_long_ago_opens_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE", 0)
    process, _ = start(HOLD, tmp_path, 60)
    try:
        for number in ("999", "0", "-1", "x"):
            monkeypatch.setenv(locks.PARENTS_LOCK, number)
            with pytest.raises(InputError, match="is at work there"), locks.own_folder(tmp_path):
                pass
    finally:
        process.kill()


def test_a_lock_whose_file_was_removed_is_taken_anew(tmp_path):
    """Whoever waited for the removed file would share the folder with whoever came later."""
    old = locks.lock_folder(tmp_path, 0)
    (tmp_path / locks.LOCK).unlink()
    with old, locks.lock_folder(tmp_path, 0) as new:
        assert os.path.samestat(os.fstat(new.fileno()), os.stat(tmp_path / locks.LOCK))
        assert locks.lock_folder(tmp_path, 0) is None


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def none(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", none)
    with locks.own_folder(tmp_path):
        files.write_text(tmp_path / "x.txt", "text")
    assert (
        "this file system has no locks; two runs that write here at once are not kept apart" in capsys.readouterr().err
    )
    left = tmp_path / ".tmp.1.y.txt"
    left.touch()
    locks.remove_abandoned(tmp_path)
    assert left.exists()  # whose it is cannot be told
    os.utime(left, (0, time.time() - 2 * locks.FORGOTTEN))
    locks.remove_abandoned(tmp_path)
    assert not left.exists()
    assert (tmp_path / "x.txt").read_text() == "text"


@pytest.mark.parametrize(
    ("script", "options"),
    [
        (train_moco, ["--arch", "resnet18", "--steps", "1"]),
        (finetune_classification, ["--trials", "1", "--epochs", "1"]),
        (finetune_segmentation, ["--dataset", "phantom2d", "--trials", "1", "--epochs", "1"]),
        (compare, ["--dataset", "phantom2d", "--trials", "1"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_scripts_leave_a_folder_to_the_run_that_has_it(script, options, tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE", 0)
    process, _ = start(HOLD, tmp_path, 60)
    try:
        with pytest.raises(InputError, match="is at work there"):
            script.main([*options, "--output", str(tmp_path)])
    finally:
        process.kill()
    assert sorted(path.name for path in tmp_path.iterdir()) == [locks.LOCK]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_living_process_writes_stays_and_what_a_killed_one_left_goes(kind, tmp_path):
    folder = tmp_path / "trial_0" / "samples"
    folder.mkdir(parents=True)
    process, part = start(WRITE, folder, kind)
    try:
        locks.remove_abandoned(tmp_path)
        assert os.path.exists(part)
        files.write_folder(folder / "x.png", lambda new: (new / "y").touch())
        assert os.path.exists(part)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert os.path.exists(part)
    locks.remove_abandoned(tmp_path)
    assert not os.path.exists(part)
    assert (folder / "x.png" / "y").exists()


def test_names_of_earlier_versions_go_too(tmp_path):
    (tmp_path / ".last.pt.tmp").touch()
    (tmp_path / ".tmp.12.last.pt").touch()
    (tmp_path / ".other").touch()
    locks.remove_abandoned(tmp_path, "last.pt")
    assert [path.name for path in tmp_path.iterdir()] == [".other"]


def test_what_others_hide_in_a_folder_stays(tmp_path):
    """Their names may be like ours; and what lies behind a link is no part of the folder."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "sub").mkdir(parents=True)
    (tmp_path / "run" / "data").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "run" / ".tmp.mine").mkdir()
    theirs = [".tmp.mine/x", ".notes.tmp", "sub/.draft.tmp", "data/.tmp.7.index"]
    for name in theirs:
        (tmp_path / "run" / name).touch()
    own = locks.unfinished_name(tmp_path / "run" / "sub" / "x.png")
    own.touch()
    with locks.own_folder(tmp_path / "run"):
        assert all((tmp_path / "run" / name).exists() for name in theirs)
        assert not own.exists()


def test_a_file_that_got_its_name_meanwhile_is_not_removed_for_the_next(tmp_path, monkeypatch):
    """Between the look and the lock, one may be renamed and another begun under the same name."""
    left = locks.unfinished_name(tmp_path / "x.txt")
    left.write_text("old")
    take = fcntl.flock

    def late(file, how):
        os.rename(left, tmp_path / "x.txt")
        left.write_text("new")
        take(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    locks.remove_abandoned(tmp_path)
    assert left.read_text() == "new"


def test_processes_of_one_number_write_to_files_of_their_own(tmp_path):
    """Two containers that share a folder may each have a process 7."""
    code = "import os; os.getpid = lambda: 7; from medssl import locks; from pathlib import Path; "
    code += "print(locks.unfinished_name(Path('a')))"
    names = {subprocess.check_output([sys.executable, "-c", code], text=True) for _ in "12"}
    assert len(names) == 2
    assert all(locks.is_unfinished(locks.Path(name.strip())) for name in names)


@pytest.mark.parametrize("number", locks.TAKEN)
def test_a_lock_that_another_has_is_not_taken_for_none(number, tmp_path, monkeypatch):
    """Shares answer EACCES where disks answer EAGAIN."""

    def taken(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", taken)
    assert locks.lock_folder(tmp_path, 0) is None
    (tmp_path / ".tmp.1.x").touch()
    os.utime(tmp_path / ".tmp.1.x", (0, 0))
    locks.remove_abandoned(tmp_path)
    assert (tmp_path / ".tmp.1.x").exists()


@pytest.mark.parametrize("number", locks.BROKEN)
def test_a_disk_that_is_gone_is_no_disk_without_locks(number, tmp_path, monkeypatch):
    def gone(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", gone)
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        locks.lock_folder(tmp_path, 0)
    assert caught.value.filename == str(tmp_path / locks.LOCK)


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "victim.txt").write_text("text")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / locks.LOCK).symlink_to(tmp_path / "victim.txt")
    with pytest.raises(OSError) as caught, locks.own_folder(tmp_path / "run"):  # noqa: PT011, the text is the system's
        pass
    assert caught.value.filename == str(tmp_path / "run")
    assert (tmp_path / "victim.txt").read_text() == "text"


def test_a_part_that_is_removed_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    """Between the two steps another process may take it for abandoned."""
    real, removed = os.open, []

    def late(path, *rest):
        if not removed and rest == (os.O_RDONLY,):
            os.unlink(path)
            removed.append(path)
        return real(path, *rest)

    monkeypatch.setattr(os, "open", late)
    files.write_text(tmp_path / "x.txt", "text")
    assert removed
    assert (tmp_path / "x.txt").read_text() == "text"
