"""What a machine lacks (memory, room on a disk, open files) ends a run in one line that says what to change."""

import errno
import json
import os
import resource
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from medssl import errors, files
from medssl.engine import checkpoint
from medssl.engine.monitor import Monitor
from medssl.errors import FEW_FILES, NO_SHARED_MEMORY, InputError, explain
from medssl.reading.volumes import write_image

HANDED_OVER = (
    "Caught {0} in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File x\n{0}: {1}\n"
)
SHM = "unable to allocate shared memory(shm) for file </torch_1_2_3>"
LESS = "use a smaller --b, or fewer --workers"
FULL = "No space left on device; make room on its disk, or choose another --output"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total"),
         "out of GPU memory (2.50 GiB more were asked for); use a smaller --b, or --amp"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"),
         "out of GPU memory; use a smaller --b, or --amp"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
         "out of GPU memory; use a smaller --b, or --amp"),
        (MemoryError(), f"out of memory; {LESS}"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), f"out of memory; {LESS}"),
        (RuntimeError(HANDED_OVER.format("numpy._core._exceptions.ArrayMemoryError", "Unable to allocate 8.00 PiB")),
         f"out of memory (8.00 PiB more were asked for); {LESS}"),
        (OSError(errno.ENOSPC, "No space left on device", "a/last.pt"), f"a/last.pt: {FULL}"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "a"), f"a: Disk quota exceeded; {FULL.partition('; ')[2]}"),
        (OSError(HANDED_OVER.format("OSError", "[Errno 28] No space left on device: '/c/x.npz'")), f"/c/x.npz: {FULL}"),
        (OSError(errno.EMFILE, "Too many open files", "a.png"), FEW_FILES),
        (RuntimeError("received 0 items of ancillary data"), FEW_FILES),
        (RuntimeError("unable to open shared memory object </torch_1_2> in read-write mode: Too many open files (24)"),
         FEW_FILES),
        (RuntimeError(HANDED_OVER.format("RuntimeError", f"{SHM}: No space left on device (28)")), NO_SHARED_MEMORY),
        (PermissionError(errno.EACCES, "Permission denied", "a.png"), "a.png: Permission denied"),
        (InputError("--b 0:\ntoo few"), "--b 0: too few"),
        (InputError(HANDED_OVER.format("medssl.errors.InputError", "--cache c: full")), "--cache c: full"),
    ],
)  # fmt: skip
def test_what_is_lacking_is_told(error, line):
    assert explain(error) == line
    assert explain(error, "fewer --workers") == line.replace(LESS, "use fewer --workers")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied: Expected features (12)"),
        RuntimeError(HANDED_OVER.format("KeyError", "'out of memory'").replace("File x", "raise MemoryError")[:-20]),
        ValueError("CUDA out of memory"),
        OSError("cannot identify image file"),
        OSError(HANDED_OVER.format("OSError", "broken")),
    ],
)
def test_a_fault_of_the_code_is_none(error):
    assert explain(error) is None


@pytest.mark.parametrize("allocate", [lambda: torch.empty(2**50), lambda: np.empty(2**50)])
def test_libraries_without_memory(allocate):
    """Their own words, today's."""
    with pytest.raises((RuntimeError, MemoryError)) as raised:
        allocate()
    assert explain(raised.value).startswith("out of memory (")


# Disks ---------------------------------------------------------------------------------------------


def noise(*shape, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, 250, shape).astype(dtype)


def figure():
    made = Figure()
    made.subplots().imshow(noise(300, 300))
    return made


SCAN = sitk.GetImageFromArray(noise(64, 64, 64, dtype=np.int16))
PICTURE = Image.fromarray(noise(500, 500, 3))
WRITES = {
    "a.pt": partial(checkpoint.save_atomic, {"x": torch.rand(2**18), "y": torch.rand(3)}),
    "a.png": lambda path: files.write_atomic(path, PICTURE.save),
    "a.tif": lambda path: files.write_atomic(path, PICTURE.save),
    "b.png": lambda path: files.write_atomic(path, partial(figure().savefig, dpi=200)),
    "a.npy": lambda path: files.write_atomic(path, partial(np.save, arr=noise(10**6))),
    "a.npz": lambda path: files.write_atomic(path, lambda file: np.savez(file, x=noise(10**6))),
    **dict.fromkeys(("a.nii", "a.nii.gz", "a.mha", "a.nrrd", "a.mhd"), partial(write_image, SCAN)),
    "a.json": lambda path: files.write_json(path, [*range(10**5)]),
    "a.jsonl": lambda path: files.append_text(path, "x" * 10**6),
    "b.nii": lambda path: files.copy_file(__file__, path) or write_image(SCAN, path),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_full_disk_is_told_whatever_writes(name, tmp_path):
    """The old file stays, and nothing else; NIfTI's writer, of a full disk, reports success."""
    path = tmp_path / name
    atomic = name not in ("a.jsonl", "a.mhd")
    if atomic:
        path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as raised:
            WRITES[name](path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert raised.value.filename == str(path)
    assert explain(raised.value) == f"{path}: File too large; make room on its disk, or choose another --output"
    if atomic and name != "b.nii":
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {name: b"old"}


@pytest.mark.parametrize("name", WRITES)
def test_where_there_is_room_all_is_written(name, tmp_path):
    WRITES[name](tmp_path / name)
    beside = {"a.mhd": {"a.raw"}}.get(name, set())
    assert {file.name for file in tmp_path.iterdir()} == {name} | beside


def test_a_folder_on_a_full_disk(tmp_path):
    def fill(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    files.write_folder(tmp_path / "a", lambda folder: (folder / "old").touch())
    with pytest.raises(OSError) as raised:  # noqa: PT011, what it names is compared
        files.write_folder(tmp_path / "a", fill)
    assert explain(raised.value) == f"{tmp_path}/a: {FULL}"
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["a", "a/old"]


def test_errors_of_others_stay(tmp_path):
    """A bug in what writes, and a file that is read while another is written."""
    with pytest.raises(ZeroDivisionError):
        files.write_atomic(tmp_path / "a", lambda _: 1 / 0)
    with pytest.raises(FileNotFoundError) as raised:
        files.copy_file(tmp_path / "gone", tmp_path / "a")
    assert raised.value.filename == str(tmp_path / "gone")
    assert list(tmp_path.iterdir()) == []


def test_numbers_on_a_full_disk(tmp_path):
    """/dev/full takes nothing."""
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    monitor = Monitor.__new__(Monitor)
    monitor.folder, monitor.events, monitor.wrote = tmp_path, None, False
    with pytest.raises(OSError) as raised:  # noqa: PT011, what it names is compared
        monitor.write({"step": 1})
    assert explain(raised.value) == f"{tmp_path}/metrics.jsonl: {FULL}"


def test_events(tmp_path):
    """As TensorBoard reads them, those of a continued run too."""
    for done in (0, 2):
        monitor = Monitor(tmp_path, 4, done, 1, "test")
        for step in (done + 1, done + 2):
            monitor.write({"step": step, "epoch": 0.5 * step, "loss": float("inf") if step == 4 else 1.0})
        monitor.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    one, two = (list(EventFileLoader(str(path)).Load()) for path in sorted((tmp_path / "tensorboard").iterdir()))
    assert one[0].file_version == two[0].file_version == "brain.Event:2"
    assert (two[1].session_log.status, two[1].step) == (two[1].session_log.START, 3)
    found = {(each.step, value.tag) for each in one[1:] + two[2:] for value in each.summary.value}
    assert found == {(step, tag) for step in (1, 2, 3, 4) for tag in ("epoch", "loss")}


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of its own, of 256 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder]).returncode:
        pytest.skip("only root may mount a disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("filled", [120, 160, 200, 230])
def test_a_run_fills_its_disk(filled, small_disk, capsys):
    """Whatever it is that finds no room: one line, code 2, and a checkpoint that can be continued where one was."""
    from test_processes import Tiny, train  # noqa: PLC0415

    (small_disk / "other").write_bytes(bytes(filled * 1024))
    method = Tiny()
    method.more = torch.nn.Parameter(torch.zeros(6000))  # last.pt has 30 KB
    with pytest.raises(SystemExit) as ended:
        errors.run_script(lambda: train(small_disk / "run", method=method, workers=0, epochs=10**5, log_every=1))
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {small_disk}/run/")
    assert line.endswith(FULL)
    last = small_disk / "run" / "last.pt"
    if filled < 200:
        assert checkpoint.load_safe(last)["step"] > 5
    assert not list(small_disk.rglob(".tmp*"))


@pytest.mark.parametrize("options", [[], ["-u"]], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("printed", [1, 10**6], ids=["at the end", "before"])
def test_standard_output_on_a_full_disk(printed, options, monkeypatch):
    """What could not be written is said of it, as another `--output` mends nothing; the end leaves no trace."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    code = f"from medssl import errors; errors.run_script(lambda: print('a' * {printed}))"
    with open("/dev/full", "w") as full:
        ran = subprocess.run([sys.executable, *options, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)
    line = "error: standard output: No space left on device; send it elsewhere\n"
    assert (ran.returncode, ran.stderr) == (2, line)
