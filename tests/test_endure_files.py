"""The fuzzer of readers finds and keeps what a reader may not do; the project's readers do none of it."""

import json
import os
import signal
import tempfile
import time
from pathlib import Path
from random import Random

import pytest

from medssl.benchmarks import damage, endure_files
from medssl.benchmarks.readers import READERS, Reader
from medssl.errors import InputError, UnreadableImage


def fake(name, read):
    """A reader of one file of four bytes; `read` gets the file's path, and its number among those that were read."""

    def make(place):
        (place / "a.bin").write_bytes(b"abcd")

    def numbered(place):
        count = place.with_name("count")
        number = int(count.read_text()) if count.exists() else 0
        count.write_text(str(number + 1))
        read(place / "a.bin", number)

    return Reader(name, make, numbered, damage.any_bytes)


def mixed(path, number):
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 4:
        raise KeyError("nobody thought of it")
    if number == 6:
        path.parent.with_name("EXECUTED").mkdir()
    if number == 8:
        time.sleep(60)
    if number == 9:
        raise InputError("two\nlines")
    if number == 10:
        raise MemoryError
    if number == 11:
        raise OSError(5, "of no file")
    if number % 2:
        raise UnreadableImage("no picture")


def test_every_kind_of_fault_is_found_and_kept(tmp_path):
    found = endure_files.run(60, 0, tmp_path, [fake("mixed", mixed)], most=16, hang=1.0)
    counts = found["readers"]["mixed"]
    assert counts == {"files": 16, "headers": 6, "refused": 6, "accepted": 3, "faults": 7}
    assert [(fault["number"], fault["outcome"]) for fault in found["faults"]] == [
        (2, "signal"), (4, "traceback"), (6, "executed"), (8, "hang"), (9, "several lines"), (10, "traceback"),
        (11, "traceback"),
    ]  # fmt: skip
    assert "nobody thought of it" in found["faults"][1]["reason"]
    for fault in found["faults"]:
        why = json.loads((tmp_path / Path(fault["kept"]).name / "why.json").read_text())
        assert (why["reader"], why["number"], why["file"]) == ("mixed", fault["number"], "a.bin")
        assert (tmp_path / Path(fault["kept"]).name / "files" / "a.bin").is_file()
    assert "mixed" in endure_files.table(found)


def test_headers_that_a_change_left_as_they_were_do_not_count(tmp_path):
    reader = fake("same", lambda path, number: None)
    reader = Reader(reader.name, reader.make, reader.read, lambda data, rng, marker: data)
    counts = endure_files.run(60, 0, tmp_path, [reader], most=8)["readers"]["same"]
    assert (counts["files"], counts["headers"]) == (8, 0)


def test_seeds_make_the_same_files_and_numbers_others(tmp_path):
    (png,) = (reader for reader in READERS if reader.name == "picture png")
    made = []
    for seed, number in ((0, 1), (0, 1), (0, 3), (1, 1)):
        place = tmp_path / str(len(made))
        place.mkdir()
        png.make(place)
        made.append(endure_files.spoil(png, place, seed, number)[0].read_bytes())
    assert made[0] == made[1]
    assert len(set(made)) == 3


def test_planted_code_runs_where_a_reader_lets_it(tmp_path):
    """So that "executed" means something: the same opcodes, read by Python's own unpickler."""
    import pickle

    def read(path, number):
        pickle.loads(path.read_bytes())

    def plant(data, rng, marker):
        return damage.planted(marker, rng) + b"."

    reader = fake("pickle", read)
    reader = Reader(reader.name, reader.make, reader.read, plant)
    faults = endure_files.run(60, 0, tmp_path, [reader], most=12)["faults"]
    assert sum(fault["outcome"] == "executed" for fault in faults) == 6


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_valid_files_are_read_and_a_few_damaged_ones_refused_or_read(reader, tmp_path):
    (tmp_path / "valid").mkdir()
    reader.make(tmp_path / "valid")
    if reader.name != "BYOL pickle":  # whose network is too small
        reader.read(tmp_path / "valid")
    reader_counts = endure_files.run(60, 7, tmp_path / "kept", [reader], most=6)
    assert reader_counts["faults"] == []
    assert reader_counts["readers"][reader.name]["files"] == 6


def test_changes_change_and_are_of_their_format():
    rng = Random(0)
    with tempfile.TemporaryDirectory() as folder:
        for reader in READERS:
            place = Path(folder) / reader.name
            place.mkdir()
            reader.make(place)
            victim = min(path for path in place.rglob(reader.victims) if path.is_file())
            data = victim.read_bytes()
            changed = [reader.change(data, rng, "marker") for _ in range(20)]
            assert sum(one != data for one in changed) > 10, reader.name
