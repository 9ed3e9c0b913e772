"""LUNA16 preprocessing: published numbers, the same cubes however they are made, and scans that cannot be used."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from medssl.errors import InputError
from medssl.preprocess import luna
from medssl.reading.geometry import resample
from medssl.reading.intensities import WINDOW, scale
from medssl.reading.tables import read_patients
from medssl.reading.volumes import read_volume

sitk = pytest.importorskip("SimpleITK")
PARITY = json.loads((Path(__file__).parent / "parity" / "luna.json").read_text())
SIZE = (110, 110, 62)  # voxels of the small scans, 2 x 2 x 2.5 mm: 220 x 220 x 155 mm


def chest(seed=0, size=SIZE, lung=0.24):
    """HU (X, Y, Z): a body of noise with air-filled lungs, so that some crops pass the tissue filter and some not."""
    rng = np.random.default_rng(seed)
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in size), indexing="ij")
    volume = np.full(size, -1000.0)
    volume[x**2 + y**2 < 0.9] = 40
    for side in (-0.35, 0.35):
        volume[((x - side) / lung) ** 2 + (y / (2 * lung)) ** 2 + (z / 1.2) ** 2 < 1] = -850
    return (volume + rng.normal(0, 30, size)).round().astype(np.int16)


def write(path, volume, spacing=(2.0, 2.0, 2.5), **geometry):
    """A volume (X, Y, Z) as a file; `origin` and `direction` where given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(np.ascontiguousarray(volume.transpose(2, 1, 0)))
    image.SetSpacing(spacing)
    image.SetOrigin(geometry.get("origin", (0, 0, 0)))
    image.SetDirection(geometry.get("direction", (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    sitk.WriteImage(image, str(path))


def run(data, save, *more, workers=0):
    luna.main(["--data", str(data), "--save", str(save), "--scale", "2", "--workers", str(workers), *map(str, more)])
    return json.loads((save / "luna.json").read_text())


def cubes(save):
    """Contents of all cube files by path."""
    return {path.relative_to(save).as_posix(): path.read_bytes() for path in sorted(save.rglob("*.npy"))}


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Three scans in LUNA16's layout, and something that is no scan."""
    root = tmp_path_factory.mktemp("raw")
    for seed, name in enumerate(("subset0/1.2.3.100", "subset0/1.2.3.200", "subset4/1.2.3.300")):
        write(root / f"{name}.mhd", chest(seed))
    write(root / "seg-lungs-LUNA16" / "1.2.3.100.mhd", chest(9))
    return root


@pytest.fixture(scope="module")
def made(scans, tmp_path_factory):
    save = tmp_path_factory.mktemp("cubes")
    return save, run(scans, save)


# The published numbers -----------------------------------------------------------------------------


def parity_crop():
    return np.abs(np.sin(0.001 * np.arange(96 * 96 * 67) + len(PARITY["tag"]))).reshape(96, 96, 67)


def test_iou_parity():
    boxes = np.array([case["boxes"] for case in PARITY["iou"]])
    wanted = [case["value"] for case in PARITY["iou"]]
    np.testing.assert_array_equal(luna.iou_of_corners(boxes[:, 0], boxes[:, 1]), wanted)


def test_resize_parity():
    made, wanted = luna.resize(parity_crop(), PARITY["resize"]["to"]), PARITY["resize"]
    assert list(made.shape) == wanted["shape"]
    assert made.dtype == np.float32
    np.testing.assert_allclose(made.ravel()[:: made.size // 256][:256], wanted["entries"], atol=2e-6)
    assert made.mean(dtype=float) == pytest.approx(wanted["mean"], rel=1e-6)
    assert made.std(dtype=float) == pytest.approx(wanted["std"], rel=1e-5)


def test_tissue_parity():
    for case in PARITY["tissue"]["cases"]:
        crop = case["scale"] * parity_crop()[:64, :64, :35]
        for kind in (np.float64, np.float32):
            score = luna.tissue_score(crop.astype(kind), 32)
            assert score == case["score"]
            assert (score <= luna.MOST_TISSUE * 64 * 64 * 32) == case["kept"]
    assert PARITY["tissue"]["hu_threshold_normalised"] == luna.TISSUE
    assert PARITY["tissue"]["limit_fraction"] == luna.MOST_TISSUE


def test_tissue_by_hand():
    crop = np.zeros((1, 1, 5))
    crop[..., 2] = 0.425  # slice 2 counts 1; 1 sees it one slice on, ½; 0 two slices on, 0
    assert luna.tissue_score(crop, 2) == 0.5
    assert luna.tissue_score(crop, 3) == 1.5


@pytest.mark.parametrize("old", [(1, 2, 3), (8, 16, 17), (112, 64, 99), (5, 40, 16)])
def test_resize_is_scikit_images(old):
    transform = pytest.importorskip("skimage.transform")
    crop = np.random.default_rng(0).random(old)
    if old[0] == 1:  # scikit-image cannot mirror a single voxel
        wanted = np.repeat(transform.resize(crop[0], (16, 16), order=1, anti_aliasing=True)[None], 16, axis=0)
    else:
        wanted = transform.resize(crop, (16, 16, 16), order=1, anti_aliasing=True)
    np.testing.assert_allclose(luna.resize(crop, (16, 16, 16)), wanted, atol=1e-5)


# Crops ---------------------------------------------------------------------------------------------


def sizes_of(shape, method="pcrlv2"):
    sizes, border = luna.fitting_sizes(shape, luna.CROPS[method][0])
    return sorted(map(tuple, sizes.tolist())), tuple(border)


def test_sizes_where_a_scan_is_small():
    assert sizes_of((360, 360, 300)) == (sorted(luna.CROPS["pcrlv2"][0]), (70, 70, 15))
    # 112 needs 252 and gives 80; 96 needs 236 and gives 64; 64 fits
    assert sizes_of((220, 300, 200))[0] == [(64, 64, 32), (64, 64, 64), (64, 64, 96), (80, 80, 64)]
    assert sizes_of((360, 360, 100))[0] == [(64, 64, 32), (96, 96, 64), (112, 112, 64)]  # 96 deep needs 129
    assert sizes_of((360, 360, 64)) == ([(64, 64, 32)], (70, 70, 0))
    assert sizes_of((90, 360, 300))[1] == (0, 70, 15)
    assert sizes_of((200, 200, 70), "pcrl")[0] == [(32, 32, 16), (32, 32, 32)]  # 32 shrinks no more
    for shape in ((31, 300, 300), (300, 300, 34)):
        with pytest.raises(luna.Unusable, match="too small"):
            sizes_of(shape)


@pytest.mark.parametrize("method", ["pcrlv2", "pcrl"])
@pytest.mark.parametrize("shape", [(360, 340, 300), (220, 230, 120), (40, 180, 36)])
def test_drawn_boxes(method, shape):
    rng = np.random.default_rng(0)
    drawing = luna.draw_pairs(shape, method, rng)
    pairs = np.array([next(drawing) for _ in range(400)])
    sizes, border = sizes_of(shape, method)
    low, high = pairs[..., ::2], pairs[..., 1::2]
    assert (low >= border).all()
    assert (high + (0, 0, luna.EXTRA) <= np.array(shape) - border).all()
    drawn = {tuple(size) for size in (high - low).reshape(-1, 3).tolist()}
    assert drawn <= set(sizes)
    assert len(drawn) >= min(3, len(sizes))  # small ones overlap seldom in a large scan
    assert (luna.iou_of_corners(pairs[:, 0], pairs[:, 1]) > luna.CROPS[method][1]).all()
    reach = np.array(luna.reachable(shape, method))
    for pair in pairs[:100]:
        boxes = luna.draw_locals(shape, pair, rng)
        start, stop = boxes[:, ::2], boxes[:, 1::2]
        inside = [((start >= a - 3) & (start < b + 3)).all(-1) for a, b in zip(pair[:, ::2], pair[:, 1::2])]
        assert (inside[0] | inside[1]).all()
        assert (stop > start).all()
        assert (start >= reach[:, 0]).all()
        assert (stop <= reach[:, 1]).all()
    assert (reach[:, 0] >= 0).all()
    assert (reach[:, 1] <= shape).all()


def test_pairs_are_random_enough():
    drawing = luna.draw_pairs((360, 360, 300), "pcrlv2", np.random.default_rng(1))
    pairs = np.array([next(drawing) for _ in range(2000)])
    start = pairs[:, 0, 0]
    assert start.min() < 75
    assert (pairs[:, 0, 1] > 285).any()
    assert len({box.tobytes() for box in pairs[:, 0]}) > 1500


# Files ---------------------------------------------------------------------------------------------


def test_layout_and_summary(made):
    save, summary = made
    names = [
        f"subset{k}/1.2.3.{n}_{part}_{i}.npy"
        for k, n in ((0, 100), (0, 200), (4, 300))
        for part in ("global", "local")
        for i in range(2)
    ]
    assert sorted(cubes(save)) == sorted(names)
    for name in names:
        array = np.load(save / name)
        assert array.dtype == np.float16
        assert array.shape == ((2, 64, 64, 32) if "global" in name else (6, 16, 16, 16))
        assert 0 <= array.min() < array.max() <= 1
    assert summary["settings"]["size"] == [64, 64, 32]
    assert set(summary["scans"]) == {"subset0/1.2.3.100", "subset0/1.2.3.200", "subset4/1.2.3.300"}
    for scan in summary["scans"].values():
        assert scan["pairs"] == 2
        assert scan["seconds"] > 0
    assert summary["totals"]["pairs"] == 6
    assert summary["totals"]["rejected"] == sum(scan["rejected"] for scan in summary["scans"].values()) > 0
    assert len(set(cubes(save).values())) == 12  # no two alike: scans have random numbers of their own


def test_cubes_hold_what_was_drawn(scans, made):
    """The first pair, made again step by step from the whole scan at 1 mm."""
    save, summary = made
    scan = summary["scans"]["subset0/1.2.3.100"]
    whole = scale(resample(read_volume(scans / "subset0/1.2.3.100.mhd")).array, *WINDOW)
    drawing = luna.draw_pairs(whole.shape, "pcrlv2", luna.generator_of("1.2.3.100", 0))
    first = np.load(save / "subset0/1.2.3.100_global_0.npy")
    for _ in range(scan["rejected"] + 1):
        crops, limits = [], []
        for x0, x1, y0, y1, z0, z1 in next(drawing):
            crops.append(luna.resize(whole[x0:x1, y0:y1, z0 : z1 + 3], (64, 64, 35)))
            limits.append(0.15 * (x1 - x0) * (y1 - y0) * (z1 - z0))
        if all(luna.tissue_score(crop, 32) <= limit for crop, limit in zip(crops, limits)):
            break
    np.testing.assert_allclose(first, np.stack(crops)[..., :32], atol=2e-3)


def test_same_cubes_for_any_workers_order_and_folds(scans, made, tmp_path):
    assert len(run(scans, tmp_path / "a", workers=2)["scans"]) == 3
    assert cubes(tmp_path / "a") == cubes(made[0])
    run(scans, tmp_path / "b", "--fold", 4)
    assert {name.split("/")[0] for name in cubes(tmp_path / "b")} == {"subset4"}
    run(scans, tmp_path / "b", "--fold", 4, 0)
    assert cubes(tmp_path / "b") == cubes(made[0])
    run(scans / "subset4", tmp_path / "c", "--seed", 1)
    assert not set(cubes(tmp_path / "c").values()) & set(cubes(made[0]).values())


def test_subsets_unpacked_into_folders_of_their_own(scans, made, tmp_path):
    for path in (*scans.glob("subset*/*.mhd"), *scans.glob("subset*/*.raw")):
        nested = tmp_path / "raw" / path.parent.name / path.parent.name
        nested.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, nested)
    run(tmp_path / "raw", tmp_path / "cubes")
    assert cubes(tmp_path / "cubes") == cubes(made[0])


def test_finished_scans_are_left_alone_and_others_redone(scans, made, tmp_path):
    run(scans, tmp_path)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    folder = tmp_path / "subset0"
    (folder / "1.2.3.100.pairs.json").write_text("{")  # cut by a kill
    (folder / "1.2.3.100_global_1.npy").write_bytes(b"half")
    (folder / ".1.2.3.100_local_1.npy.tmp").write_bytes(b"half")
    (tmp_path / "subset4" / "1.2.3.300_local_0.npy").unlink()
    run(scans, tmp_path)
    assert cubes(tmp_path) == cubes(made[0])
    assert not list(tmp_path.rglob("*.tmp"))
    kept = {path for path, stamp in stamps.items() if path.stat().st_mtime_ns == stamp}
    assert {path.name.split("_")[0] for path in kept} == {"1.2.3.200"}
    with pytest.raises(InputError, match="made with seed 0, not 3; choose another --save"):
        run(scans, tmp_path, "--seed", 3)
    with pytest.raises(InputError, match="made with method pcrlv2, not pcrl"):
        run(scans, tmp_path, "--method", "pcrl")
    assert cubes(tmp_path) == cubes(made[0])


def test_what_a_kill_inside_a_write_left_is_removed(scans, made, tmp_path):
    """A cube under the name that it has until it is whole, which nobody writes under again."""
    save = tmp_path / "cubes"
    shutil.copytree(made[0], save)
    (cube,) = sorted(save.glob("subset*/*_global_0.npy"))[:1]
    part = cube.with_name(f".tmp.1.0a1b2c3d.{cube.name}")
    part.write_bytes(cube.read_bytes()[:99])
    cube.unlink()
    run(scans, save)
    assert not part.exists()
    assert cube.exists()


def test_what_a_killed_run_with_other_options_left_is_removed(scans, made, tmp_path):
    run(scans, tmp_path, "--scale", 4)
    for record in tmp_path.rglob("*.pairs.json"):
        record.unlink()  # as if it had been killed in all scans
    folder = tmp_path / "subset0"
    (folder / ".1.2.3.100_global_9.npy.tmp").write_bytes(b"half")
    for other in ("1.2.3.1001_global_3.npy", "x1.2.3.100_global_3.npy", "1.2.3.100_nodule_3.npy"):
        (folder / other).write_bytes(b"of another scan or run")
    run(scans, tmp_path)
    assert {Path(name).name for name in set(cubes(tmp_path)) - set(cubes(made[0]))} == {
        "1.2.3.1001_global_3.npy", "x1.2.3.100_global_3.npy", "1.2.3.100_nodule_3.npy",
    }  # fmt: skip
    assert not list(tmp_path.rglob("*.tmp"))


def test_damaged_records_are_redone(scans, made, tmp_path):
    run(scans, tmp_path)
    for text in ("", "[]", '{"settings": 5}', '{"settings": null}'):
        (tmp_path / "subset0" / "1.2.3.100.pairs.json").write_text(text)
        run(scans, tmp_path)
        assert cubes(tmp_path) == cubes(made[0])


def children_of(pid):
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.is_file() else []


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("number", [pytest.param(signal.SIGKILL, marks=pytest.mark.slow), signal.SIGTERM])
def test_interrupted_run_continues(tmp_path, number):
    data, save = tmp_path / "raw", tmp_path / "cubes"
    for n in range(6):
        write(data / f"ct{n}.mha", chest(n))
    command = [sys.executable, "-m", "medssl.preprocess.luna", "--data", data, "--save", save, "--workers", "2"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([*command, "--scale", "40"], **quiet, start_new_session=True)
    started = time.monotonic()
    while not list(save.glob("subset0/*_global_3.npy")):
        assert process.poll() is None
        assert time.monotonic() - started < 120
        time.sleep(0.01)
    workers = children_of(process.pid)
    if number == signal.SIGKILL:
        process.kill()
    else:
        os.killpg(process.pid, number)  # to the workers too, as terminals and schedulers send it
    code = process.wait(timeout=240)  # seconds; a busy machine takes long over two scans
    assert code == (-number if number == signal.SIGKILL else 128 + number)
    while any(map(is_running, workers)):  # nobody is left behind
        assert time.monotonic() - started < 400
        time.sleep(0.05)
    done = len(list(save.glob("subset0/*.pairs.json")))
    assert done < 6
    if number != signal.SIGKILL:
        assert done >= 1  # what was in progress is finished
        assert len(json.loads((save / "luna.json").read_text())["scans"]) == done
        assert not list(save.rglob("*.tmp"))
        return
    arguments = ["--data", str(data), "--scale", "40", "--workers", "0"]
    luna.main([*arguments, "--save", str(save)])
    luna.main([*arguments, "--save", str(tmp_path / "whole")])
    assert cubes(save) == cubes(tmp_path / "whole")
    assert not list(save.rglob("*.tmp"))


# Scans of other kinds ------------------------------------------------------------------------------


def test_scans_that_cannot_be_used(tmp_path, capsys):
    """Each is reported with its reason; the others are made all the same."""
    data = tmp_path / "raw"
    write(data / "good" / "ct.nii.gz", chest())
    write(data / "short.mhd", chest())
    (data / "short.raw").write_bytes((data / "short.raw").read_bytes()[:1000])
    write(data / "gone.mhd", chest())
    (data / "gone.raw").unlink()
    sitk.WriteImage(sitk.Image(64, 64, sitk.sitkInt16), str(data / "flat.mha"))
    write(data / "constant.mha", np.full(SIZE, -1000, np.int16))
    write(data / "vacuum.mha", np.random.default_rng(0).integers(-3000, -1000, SIZE, dtype=np.int16))
    write(data / "tiny.mha", chest(size=(60, 60, 12)))
    solid = np.full(SIZE, 50, np.int16)
    solid[0] = -1000
    write(data / "solid.mha", solid)
    summary = run(data, tmp_path / "cubes", workers=2)
    scans = {name: scan.get("failed") for name, scan in summary["scans"].items()}
    expected = {
        "good_ct": None,
        "short": "truncated: short.raw holds 1000 of 1500400 bytes",
        "gone": "its data file gone.raw is missing",
        "flat": "a 2D image (64 x 64), not a volume",
        "constant": "constant: all voxels are -1000",
        "vacuum": "no value in -1000 … 1000",
        "tiny": "too small: 120 x 120 x 30 mm, the smallest crop takes 32 x 32 x 35 mm",
        "solid": "too much tissue in all of 200 drawn pairs",
    }
    assert scans == {f"subset0/{name}": reason for name, reason in expected.items()}
    assert summary["totals"]["failed"] == 7
    out = capsys.readouterr().out
    assert "2 pairs from 1 scans, 7 scans failed" in out
    assert "subset0/gone: its data file gone.raw is missing" in out
    # A scan that was mended is made by the next run.
    write(data / "gone.mhd", chest(3))
    assert run(data, tmp_path / "cubes")["scans"]["subset0/gone"]["pairs"] == 2


def test_padding_far_below_air_is_air(tmp_path):
    ct = chest()
    outside = np.hypot(*np.meshgrid(*(np.linspace(-1, 1, n) for n in SIZE[:2]), indexing="ij")) > 0.3
    for name, padding in (("a", -1024), ("b", -3024)):
        padded = np.where(outside[..., None], padding, ct.clip(-1024, None)).astype(np.int16)
        write(tmp_path / name / "ct.mha", padded)
        run(tmp_path / name, tmp_path / f"cubes_{name}")
    assert cubes(tmp_path / "cubes_a") == cubes(tmp_path / "cubes_b")


def test_oblique_thick_and_flipped_scans(tmp_path):
    c, s = np.cos(0.2), np.sin(0.2)
    write(tmp_path / "raw" / "oblique.nrrd", chest(lung=0.33), direction=(c, -s, 0, s, c, 0, 0, 0, 1))
    write(tmp_path / "raw" / "thick.nrrd", chest(size=(110, 110, 40), lung=0.33), spacing=(2, 2, 5))
    write(tmp_path / "raw" / "flat.nrrd", chest(size=(110, 110, 12), lung=0.33), spacing=(2, 2, 5))
    summary = run(tmp_path / "raw", tmp_path / "cubes")
    assert {name: scan.get("pairs", scan) for name, scan in summary["scans"].items()} == {
        "subset0/oblique": 2,
        "subset0/thick": 2,
        "subset0/flat": 2,
    }
    # A scan stored backwards is the same scan.
    ct = chest()
    end = tuple(-(n - 1) * step for n, step in zip(SIZE, (2, 2, 2.5)))
    write(tmp_path / "forward" / "ct.mha", ct, origin=end)
    write(tmp_path / "backward" / "ct.mha", ct[::-1, ::-1, ::-1], direction=(-1, 0, 0, 0, -1, 0, 0, 0, -1))
    for name in ("forward", "backward"):
        run(tmp_path / name, tmp_path / f"cubes_{name}")
    assert cubes(tmp_path / "cubes_forward") == cubes(tmp_path / "cubes_backward")


def test_scan_without_hounsfield_units(tmp_path):
    """Values of a magnetic resonance image fill [0, 1] by their percentiles."""
    write(tmp_path / "raw" / "mri.nii", (chest().astype(np.int32) + 1100).clip(0, None).astype(np.uint16))
    run(tmp_path / "raw", tmp_path / "cubes", "--scale", 3)
    values = np.load(tmp_path / "cubes/subset0/mri_global_0.npy")
    assert values.max() > 0.9


def test_pcrl(scans, tmp_path):
    run(scans, tmp_path, "--method", "pcrl", "--fold", 4, "--input_rows", 32, "--input_cols", 48, "--input_deps", 16)
    assert sorted(cubes(tmp_path)) == [f"subset4/1.2.3.300_img_{i}.npy" for i in range(2)]
    assert np.load(tmp_path / "subset4/1.2.3.300_img_0.npy").shape == (2, 32, 48, 16)


def test_input_that_cannot_be_used(scans, tmp_path):
    with pytest.raises(InputError, match="--fold 7: no folder .*subset7; there are 0, 4"):
        run(scans, tmp_path, "--fold", 0, 7)
    with pytest.raises(InputError, match="no subset folders at all"):
        run(scans / "subset0", tmp_path, "--fold", 0)
    with pytest.raises(InputError, match="no such folder"):
        run(tmp_path / "nowhere", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no volumes there"):
        run(tmp_path / "empty", tmp_path)
    write(tmp_path / "same" / "a" / "ct.mha", chest())
    write(tmp_path / "same" / "a_ct.mha", chest())
    with pytest.raises(InputError, match="rename one"):
        run(tmp_path / "same", tmp_path / "x")
    with pytest.raises(InputError, match="holds the volumes themselves; choose another folder"):
        run(tmp_path / "same" / "a", tmp_path / "same" / "x" / ".." / "a")
    write(tmp_path / "bad" / "ct.mha", np.full(SIZE, 5, np.int16))
    with pytest.raises(InputError, match="no scan gave cubes; subset0/ct: constant"):
        run(tmp_path / "bad", tmp_path / "y")
    assert (tmp_path / "y" / "luna.json").is_file()


# Nodules -------------------------------------------------------------------------------------------


def ball(centre, direction, origin, radius=6.0):
    """HU (X, Y, Z) of a scan with one ball at a place in mm."""
    index = np.stack(np.meshgrid(*map(np.arange, SIZE), indexing="ij"), axis=-1)
    place = (index * (2, 2, 2.5)) @ np.array(direction).reshape(3, 3).T + origin
    distance = np.linalg.norm(place - centre, axis=-1)
    return np.where(distance < radius, 100, -900).astype(np.int16)


def write_table(path, rows):
    path.write_text("\n".join(["seriesuid,coordX,coordY,coordZ,class", *(",".join(map(str, row)) for row in rows)]))


@pytest.fixture
def nodules(tmp_path):
    """Two scans, one of them flipped; the nodule's row is in the middle of ten others, one outside of the scan."""
    rows = []
    geometries = {
        "1.5": ((1, 0, 0, 0, 1, 0, 0, 0, 1), (-100, -90, 10)),
        "1.6": ((-1, 0, 0, 0, -1, 0, 0, 0, 1), (90, 80, -30)),
    }
    for uid, (direction, origin) in geometries.items():
        matrix = np.array(direction).reshape(3, 3)
        centre = matrix @ (100.4, 120.2, 70.3) + origin
        write(
            tmp_path / "raw" / "subset3" / f"{uid}.mhd",
            ball(centre, direction, origin),
            origin=origin,
            direction=direction,
        )
        for n in range(10):
            rows.append((uid, *(centre + np.array((40, 10, 3)) + n), 0))
            if n == 4:
                rows.append((uid, *centre, 1))
        rows.append((uid, 1e4, 0, 0, 1))
    rows.append(("9.9", 0, 0, 0, 1))
    write_table(tmp_path / "candidates.csv", rows)
    return tmp_path


def run_nodules(folder, save, *more):
    table = folder / "candidates.csv"
    luna.main(["--data", str(folder / "raw"), "--save", str(save), "--nodules", str(table), "--workers", "0", *more])
    with open(save / "nodules.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_nodule_cubes(nodules, capsys):
    save = nodules / "cubes"
    index = run_nodules(nodules, save, "--negatives", "4")
    assert "10 cubes from 2 scans, 0 scans failed" in capsys.readouterr().out
    assert sorted(row["file"] for row in index) == sorted(cubes(save))
    summary = json.loads((save / "nodules.json").read_text())
    assert summary["scans"]["subset3/1.5"]["outside"] == 1
    for uid, number in (("1.5", 5), ("1.6", 17)):
        (positive,) = [row for row in index if row["uid"] == uid and row["class"] == "1"]
        assert (positive["row"], positive["fold"], positive["file"]) == (
            str(number),
            "3",
            f"subset3/{uid}_nodule_{number}.npy",
        )
        cube = np.load(save / positive["file"])
        assert cube.dtype == np.float16
        assert cube.shape == (48, 48, 48)
        assert cube.min() == pytest.approx(0.05, abs=1e-3)
        inside = np.argwhere(cube > 0.3)
        np.testing.assert_allclose(inside.mean(0), 23.5, atol=0.5)  # the ball is in the middle
        np.testing.assert_allclose(np.ptp(inside, axis=0), 12, atol=2.5)  # 12 mm across, so voxels are 1 mm
        negatives = [row for row in index if row["uid"] == uid and row["class"] == "0"]
        assert len(negatives) == 4
        assert all(float(row["weight"]) == 2.5 for row in negatives)
        assert float(positive["weight"]) == 1


def test_negatives_are_drawn_by_uid_and_seed(nodules):
    def drawn(name, *more):
        return [row["row"] for row in run_nodules(nodules, nodules / name, *more) if row["class"] == "0"]

    few = drawn("a", "--negatives", "3")
    assert few == drawn("a", "--negatives", "3")  # finished, so read back
    assert few == drawn("b", "--negatives", "3")
    assert few != drawn("c", "--negatives", "3", "--seed", "1")
    assert len(drawn("d", "--negatives", "all")) == 20
    assert drawn("e", "--negatives", "0") == []
    with pytest.raises(InputError, match="made with negatives 3, not 4"):
        drawn("a", "--negatives", "4")


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([("1.5", 1, 2, 3, 2)], "line 2: not a uid, three coordinates and class 0 or 1"),
        ([("1.5", 1, 2, 3, 1), ("1.5", 1, "x", 3, 1)], "line 3: not a uid"),
        ([("1.5", 1, 2)], "line 2: not a uid"),
        ([("1.5", "nan", 2, 3, 1)], "line 2: coordinates must be numbers"),
        ([("7", 1, 2, 3, 1)], "none of the 2 scans in --data is in this table"),
    ],
)
def test_bad_tables(nodules, rows, reason):
    write_table(nodules / "candidates.csv", rows)
    with pytest.raises(InputError, match=reason):
        run_nodules(nodules, nodules / "cubes")


def test_table_without_columns_or_file(nodules):
    (nodules / "candidates.csv").write_text("a,b\n")
    with pytest.raises(InputError, match="line 1: no column 'seriesuid'"):
        run_nodules(nodules, nodules / "cubes")
    (nodules / "candidates.csv").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(InputError, match="candidates.csv: not a text file"):
        run_nodules(nodules, nodules / "cubes")
    (nodules / "candidates.csv").unlink()
    with pytest.raises(InputError, match="no such file"):
        run_nodules(nodules, nodules / "cubes")


@pytest.mark.parametrize("table", [False, True])
def test_cubes_know_the_patient(tmp_path, table):
    """Of the volume's path, or of a table; a later call for other scans adds to what is noted."""
    data, save = tmp_path / "raw", tmp_path / "cubes"
    for name in ("patient0/a", "patient0/b", "other/a"):
        write(data / f"{name}.mha", np.zeros((4, 4, 4), np.int16))
    if table:
        (data / "patients.csv").write_text("file,patient\npatient0/a.mha,P\npatient0/b.mha,Q\nother/a.mha,Q\n")
    scans = luna.find_scans(data, None, save)
    luna.write_patients(save, scans[:2])
    luna.write_patients(save, scans[2:])
    expected = {"other_a": "other_a", "patient0_a": "patient0", "patient0_b": "patient0"}
    if table:
        expected = {"other_a": "Q", "patient0_a": "P", "patient0_b": "Q"}
    assert read_patients(save) == expected
    luna.write_patients(tmp_path, [luna.Scan("1.2.3", 0, data, save)])
    assert not (tmp_path / "patients.csv").exists()  # nothing is told


@pytest.mark.slow
def test_benchmark(tmp_path, capsys):
    from medssl.benchmarks import luna as benchmark
    from medssl.benchmarks.machine import STATUS

    path = tmp_path / "luna.json"
    small = [
        "--side",
        "120",
        "--slices",
        "110",
        "--cts",
        "1",
        "--scale",
        "1",
        "--repeats",
        "1",
        "--memory-slices",
        "130",
    ]
    benchmark.main([*small, "--output", str(path)])
    content = json.loads(path.read_text())
    assert set(content["results"]) == {benchmark.PLAIN, benchmark.LEAN, benchmark.OURS}
    assert all(0 < row["lowest"] <= row["seconds_per_pair"] <= row["highest"] for row in content["results"].values())
    assert content["results"][benchmark.PLAIN]["ratio"] == 1
    if STATUS.exists():
        peaks = {variant: row["peak_mb"] for variant, row in content["results"].items() if "peak_mb" in row}
        assert set(peaks) == {benchmark.PLAIN, benchmark.OURS}
        assert min(peaks.values()) > 50  # the interpreter alone takes as much
    assert content["machine"]["cpu"]
    assert "published loops" in capsys.readouterr().out


def test_benchmarks_baseline_computes_the_same():
    from medssl.benchmarks import luna as benchmark

    crop = parity_crop()[:20, :24, :35]
    np.testing.assert_allclose(benchmark.plain_resize(crop, (16, 16, 35)), luna.resize(crop, (16, 16, 35)), atol=1e-5)
    assert benchmark.plain_score(crop) == luna.tissue_score(crop, 32)
    for case in PARITY["iou"]:
        assert benchmark.plain_iou(*case["boxes"]) == pytest.approx(case["value"])


def test_a_short_row_of_a_table_that_ends_with_the_uid(tmp_path):
    table = tmp_path / "candidates.csv"
    table.write_text("coordX,coordY,coordZ,class,seriesuid\n1,2,3,1\n")
    with pytest.raises(InputError, match="line 2: not a uid"):
        luna.read_candidates(table)
