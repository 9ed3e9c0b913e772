"""Volumes are read in the patient's axes, whatever the file; what cannot be read says why, in one line."""

import gc
import gzip
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from medssl.errors import InputError, UnreadableImage
from medssl.reading import geometry, intensities
from medssl.reading.find import find_volumes
from medssl.reading.geometry import Volume, resample
from medssl.reading.intensities import to_unit
from medssl.reading.masks import wrong_label
from medssl.reading.volumes import read_volume, write_labels

sitk = pytest.importorskip("SimpleITK")
PARITY = json.loads((Path(__file__).parent / "parity" / "luna.json").read_text())
SPACING = (0.7, 0.8, 2.5)


def ramp(points):
    """A value that tells all places (…, 3) in mm apart, and is linear."""
    return points @ np.array([3.0, -5.0, 7.0]) + 20


def image_of(direction=(1, 0, 0, 0, 1, 0, 0, 0, 1), size=(7, 6, 5), spacing=SPACING, origin=(-10.0, 4.0, 30.0)):
    """An image (K, J, I) that holds `ramp` of its voxels' positions."""
    matrix = np.array(direction, float).reshape(3, 3)
    index = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), axis=-1)
    values = ramp((index * spacing) @ matrix.T + origin)
    image = sitk.GetImageFromArray(values.transpose(2, 1, 0))
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    image.SetDirection(matrix.ravel().tolist())
    return image


def positions(volume):
    index = np.stack(np.meshgrid(*map(np.arange, volume.array.shape), indexing="ij"), axis=-1)
    return index * volume.spacing + np.array(volume.origin)


def write(path, array=None, spacing=(1.0, 1.0, 1.0)):
    """An int16 volume (Z, Y, X) as a file."""
    if array is None:
        array = np.random.default_rng(0).integers(-1000, 1000, (20, 18, 16)).astype(np.int16)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    sitk.WriteImage(image, str(path))
    return array


# Reading -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extension", ["mhd", "mha", "nii", "nii.gz", "nrrd", "nhdr"])
def test_formats(tmp_path, extension):
    stored = write(tmp_path / f"a.{extension}", spacing=SPACING)
    volume = read_volume(tmp_path / f"a.{extension}")
    gc.collect()  # the array must not outlive the memory that it shows
    assert volume.array.dtype == np.float32
    np.testing.assert_array_equal(volume.array, stored.transpose(2, 1, 0))
    np.testing.assert_allclose(volume.spacing, SPACING, rtol=1e-6)
    volume.array[:] = 0  # writable
    assert read_volume(tmp_path / f"a.{extension}", dtype=None).array.dtype == np.int16


def test_all_orientations(tmp_path):
    """Every order of the axes and every sign: values stay where they are in the patient."""
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            direction = np.zeros((3, 3))
            direction[range(3), order] = signs
            sitk.WriteImage(image_of(direction.ravel()), str(tmp_path / "a.mha"))
            volume = read_volume(tmp_path / "a.mha")
            np.testing.assert_allclose(volume.array, ramp(positions(volume)), atol=1e-3)
            assert sorted(volume.spacing) == sorted(SPACING)
            assert min(volume.array.strides) > 0  # torch takes no negative ones


def rotation(degrees, axis):
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    matrix = np.eye(3)
    one, two = (i for i in range(3) if i != axis)
    matrix[[one, one, two, two], [one, two, one, two]] = c, -s, s, c
    return matrix


@pytest.mark.parametrize("degrees", [3, 30, 45, -120])
def test_oblique_is_interpolated_onto_the_axes(tmp_path, degrees):
    direction = rotation(degrees, 2) @ rotation(degrees / 2, 0)
    image = image_of(direction.ravel(), size=(20, 18, 16), spacing=(1.0, 1.2, 2.0))
    sitk.WriteImage(image, str(tmp_path / "a.mha"))
    volume = read_volume(tmp_path / "a.mha")
    place = positions(volume)
    index = ((place - image.GetOrigin()) @ direction) / (1.0, 1.2, 2.0)
    inside = ((index > 0) & (index < np.array((19, 17, 15)))).all(-1)
    assert inside.sum() > 2000
    np.testing.assert_allclose(volume.array[inside], ramp(place)[inside], atol=0.01)
    lowest = sitk.GetArrayFromImage(image).min()
    outside = ((index < -0.6) | (index > np.array((19.6, 17.6, 15.6)))).any(-1)
    np.testing.assert_allclose(volume.array[outside], lowest, atol=0.01)


def test_tiny_tilt_counts_as_straight(tmp_path):
    sitk.WriteImage(image_of(rotation(0.03, 2).ravel()), str(tmp_path / "a.mha"))
    assert read_volume(tmp_path / "a.mha").array.shape == (7, 6, 5)


def test_values_that_are_not_finite(tmp_path):
    array = np.linspace(-5, 5, 60, dtype=np.float32).reshape(3, 4, 5)
    array[0, 0, 1], array[1, 1, 1] = np.nan, np.inf
    write(tmp_path / "a.mha", array)
    read = read_volume(tmp_path / "a.mha").array
    assert read[1, 0, 0] == read[1, 1, 1] == -5
    write(tmp_path / "b.mha", np.full((3, 4, 5), np.nan, np.float32))
    with pytest.raises(UnreadableImage, match="no finite value"):
        read_volume(tmp_path / "b.mha")


def truncated(path, share=0.6):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def bad_files(folder):
    """Files that must not be read, with a part of the reason."""
    for name in ("short.mhd", "short.mha", "short.nii", "short.nii.gz", "short.nrrd", "gone.mhd"):
        write(folder / name)
    for name in ("short.raw", "short.mha", "short.nii", "short.nii.gz", "short.nrrd"):
        truncated(folder / name)
    yield "short.mhd", "truncated: short.raw holds 6912 of 11520 bytes"
    yield "short.mha", "truncated"
    yield "short.nii", "truncated"
    yield "short.nii.gz", "truncated"
    yield "short.nrrd", "truncated: short.nrrd holds"
    (folder / "gone.raw").unlink()
    yield "gone.mhd", "data file gone.raw is missing"
    yield "nowhere.mhd", "No such file"
    yield "nowhere", "No such file"
    (folder / "empty").mkdir()
    yield "empty", "without DICOM"
    for name in ("noise.mhd", "noise.nii", "noise.nii.gz", "noise.nrrd", "noise.mha"):
        (folder / name).write_bytes(b"this is no volume at all\n" * 40)
        yield name, "header|not a NIfTI|cannot be read|SimpleITK can read"
    (folder / "letters.mhd").write_text(
        "NDims = 3\nDimSize = a b c\nElementType = MET_SHORT\nElementDataFile = gone.x\n"
    )
    yield "letters.mhd", "missing"
    (folder / "letters.mha").write_text("NDims = 3\nDimSize = a b\nElementType = MET_SHORT\nElementDataFile = LOCAL\n")
    yield "letters.mha", "damaged"
    sitk.WriteImage(sitk.Image(8, 9, sitk.sitkInt16), str(folder / "flat.mha"))
    yield "flat.mha", r"a 2D image \(8 x 9\)"
    write(folder / "slice.nii", np.zeros((1, 8, 9), np.int16))
    yield "slice.nii", r"a 2D image \(9 x 8( x 1)?\)"
    sitk.WriteImage(sitk.Image([4, 5, 6, 2], sitk.sitkInt16), str(folder / "time.nii"))
    yield "time.nii", "2 volumes in one file"
    sitk.WriteImage(sitk.Image([4, 5, 6], sitk.sitkVectorUInt8, 3), str(folder / "colour.mha"))
    yield "colour.mha", "3 numbers a voxel"


def test_bad_files_say_why_and_print_nothing(tmp_path, capfd):
    count = 0
    for name, reason in bad_files(tmp_path):
        with pytest.raises(UnreadableImage, match=reason) as caught:
            read_volume(tmp_path / name)
        assert "\n" not in str(caught.value), name
        count += 1
    assert count == 20
    assert capfd.readouterr() == ("", "")


def test_fourth_axis_of_one_is_a_volume(tmp_path):
    sitk.WriteImage(sitk.Image([4, 5, 6, 1], sitk.sitkInt16), str(tmp_path / "a.nii"))
    assert read_volume(tmp_path / "a.nii").array.shape == (4, 5, 6)


def test_whole_nifti_written_in_parts_is_read(tmp_path):
    """The length noted at a gzip file's end is that of its last part alone."""
    stored = write(tmp_path / "a.nii")
    data = (tmp_path / "a.nii").read_bytes()
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(data[:3000]) + gzip.compress(data[3000:]))
    np.testing.assert_array_equal(read_volume(tmp_path / "b.nii.gz").array, stored.transpose(2, 1, 0))


# DICOM ---------------------------------------------------------------------------------------------


def write_series(folder, numbers=range(6), series="1.2.3", gap=2.5, name="IM{:03d}"):
    """CT slices of 4 x 3 pixels; slice n holds n everywhere, after the rescale slope and intercept."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    folder.mkdir(parents=True, exist_ok=True)
    for n in numbers:
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = f"{series}.{n + 1}"
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, f"{series}.{n + 1}"
        data.Modality, data.SeriesInstanceUID, data.StudyInstanceUID = "CT", series, "1.2"
        data.ImagePositionPatient, data.ImageOrientationPatient = [5, -7, n * gap], [1, 0, 0, 0, 1, 0]
        data.PixelSpacing, data.SliceThickness, data.InstanceNumber = [0.8, 0.7], gap, 99 - n
        data.Rows, data.Columns, data.SamplesPerPixel, data.PhotometricInterpretation = 3, 4, 1, "MONOCHROME2"
        data.BitsAllocated = data.BitsStored = 16
        data.HighBit, data.PixelRepresentation = 15, 0
        data.RescaleSlope, data.RescaleIntercept = 1, -1000
        data.PixelData = np.full((3, 4), n + 1000, np.uint16).tobytes()
        data.save_as(folder / name.format(n), enforce_file_format=True)


def test_dicom_series(tmp_path, capfd):
    write_series(tmp_path / "a" / "scan")
    ((name, path),) = find_volumes(tmp_path)
    assert name == "a/scan"
    volume = read_volume(path)
    assert volume.array.shape == (4, 3, 6)
    np.testing.assert_array_equal(volume.array[0, 0], range(6))  # ordered by position, not by name or number
    np.testing.assert_allclose(volume.spacing, (0.7, 0.8, 2.5))
    np.testing.assert_allclose(volume.origin, (5, -7, 0))
    write_series(tmp_path / "a" / "scan", range(2), series="1.2.4", name="SCOUT{}")  # does not count
    assert read_volume(path).array.shape == (4, 3, 6)
    assert capfd.readouterr() == ("", "")


def test_dicom_series_that_cannot_be_used(tmp_path):
    write_series(tmp_path / "gap", [0, 1, 2, 4, 5])
    with pytest.raises(UnreadableImage, match="2.5 to 5 mm apart"):
        read_volume(tmp_path / "gap")
    write_series(tmp_path / "two")
    write_series(tmp_path / "two", series="1.2.9", name="Y{}")
    with pytest.raises(UnreadableImage, match="2 DICOM series"):
        read_volume(tmp_path / "two")


# Finding -------------------------------------------------------------------------------------------


def test_a_series_in_the_working_folder_has_its_name(tmp_path, monkeypatch):
    write_series(tmp_path / "dcm")
    monkeypatch.chdir(tmp_path / "dcm")
    assert find_volumes(".") == [("dcm", Path("."))]


def test_find_volumes(tmp_path):
    for name in (
        "b.mhd",
        "x.y/a.nii.gz",
        "x.y/a.nii",
        "x.y/ct.nrrd",
        ".hidden.nii",
        "__MACOSX/c.nii",
        "D.MHA",
        "e.png",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    write_series(tmp_path / "dcm")
    write_series(tmp_path / "one", range(1))  # a radiograph
    (tmp_path / "loop").symlink_to(tmp_path)
    found = find_volumes(tmp_path)
    assert found == sorted(found)
    assert [name for name, _ in found] == ["D", "b", "dcm", "x.y/a.nii", "x.y/a.nii.gz", "x.y/ct"]
    assert find_volumes(tmp_path / "b.mhd") == [("b", tmp_path / "b.mhd")]
    with pytest.raises(InputError, match="not a folder"):
        find_volumes(tmp_path / "nowhere")


# Resampling and scaling ----------------------------------------------------------------------------


def parity_volume():
    x, y, z = np.meshgrid(np.arange(28), np.arange(30), np.arange(24), indexing="ij")
    values = np.round(300 * np.sin(x / 5 + len(PARITY["tag"])) + 200 * np.cos(y / 4) - 20 * z)
    return Volume(values.astype(np.int16), SPACING)


def test_resample_parity():
    made, wanted = resample(parity_volume()).array, PARITY["resample"]
    assert list(made.shape) == wanted["shape"]
    np.testing.assert_array_equal(made.ravel()[:: made.size // 256][:256], wanted["entries"])
    assert made.mean() == pytest.approx(wanted["mean"], rel=1e-9)
    assert made.std(ddof=1) == pytest.approx(wanted["std"], rel=1e-9)


@pytest.mark.parametrize("slab", [100, 2000])
def test_slabs_and_boxes_are_parts_of_the_whole(monkeypatch, slab):
    whole = resample(parity_volume())
    monkeypatch.setattr(geometry, "SLAB_VOXELS", slab)
    # Sums in another order may fall on the other side of a whole number.
    assert np.abs(resample(parity_volume()).array - whole.array).max() <= 1
    box = ((3, 17), (0, 24), (11, 60))
    part = resample(parity_volume(), box=box)
    assert np.abs(part.array - whole.array[3:17, :, 11:]).max() <= 1
    np.testing.assert_allclose(part.origin, (3, 0, 11))
    unchanged = resample(Volume(whole.array, (1, 1, 1), (5, 5, 5)), box=box)
    np.testing.assert_array_equal(unchanged.array, whole.array[3:17, :, 11:])
    assert unchanged.origin == (8, 5, 16)


def test_resample_float_labels_and_outside():
    values = np.arange(4, dtype=np.float32) * 10 + np.zeros((5, 5, 1), np.float32)
    made = resample(Volume(values, (1, 1, 2.5)), outside=-7.0).array
    np.testing.assert_allclose(made[2, 2], [0, 4, 8, 12, 16, 20, 24, 28, 30, -7], atol=1e-5)
    nearest = resample(Volume(values, (1, 1, 2.5)), nearest=True).array
    assert set(np.unique(nearest)) == {0, 10, 20, 30}
    np.testing.assert_array_equal(nearest[2, 2, :8], [0, 0, 10, 10, 20, 20, 20, 30])
    with pytest.raises(UnreadableImage, match="voxels at 1 x 1 x 1 mm"):
        resample(Volume(values, (1e4, 1e4, 1e4)))


def test_unit_range():
    ct = np.array([-3024, -1000, -500, 0, 1000, 3071], np.int16).reshape(1, 2, 3)
    np.testing.assert_allclose(to_unit(ct).ravel(), [0, 0, 0.25, 0.5, 1, 1])
    np.testing.assert_array_equal(to_unit(ct), intensities.scale(ct, *intensities.WINDOW))
    mri = np.zeros((20, 20, 20), np.float32)
    mri[5:15] = np.linspace(100, 200, 4000).reshape(10, 20, 20)
    mri[7, 7, 7] = 1e6  # one hot voxel does not set the contrast
    low, high = intensities.unit_range(mri)
    assert 100 < low < 101
    assert 199 < high < 200
    unit = to_unit(mri)
    assert unit.dtype == np.float32
    assert (unit[0] == 0).all()
    assert unit[7, 7, 7] == 1
    assert not to_unit(np.full((2, 2, 2), 7, np.int16)).any()
    np.testing.assert_array_equal(np.unique(to_unit(np.eye(4, dtype=np.uint8)[None])), [0, 1])


# Writing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turn", ["straight", "swapped", "oblique"])
def test_labels_lie_where_the_scan_does(tmp_path, turn):
    direction = {
        "straight": (-1, 0, 0, 0, 1, 0, 0, 0, -1),
        "swapped": (0, 0, -1, -1, 0, 0, 0, 1, 0),
        "oblique": rotation(20, 2).ravel(),
    }[turn]
    image = image_of(direction, size=(20, 18, 16), spacing=(1.0, 1.2, 2.0))
    sitk.WriteImage(image, str(tmp_path / "scan.nii.gz"))
    middle = np.median(sitk.GetArrayFromImage(image))
    volume = read_volume(tmp_path / "scan.nii.gz")
    write_labels(tmp_path / "out" / "mask.nii.gz", (volume.array > middle).astype(np.uint8), tmp_path / "scan.nii.gz")
    scan, mask = (sitk.ReadImage(str(tmp_path / name)) for name in ("scan.nii.gz", "out/mask.nii.gz"))
    assert mask.GetSize() == scan.GetSize()
    assert mask.GetPixelID() == sitk.sitkUInt8
    for what in ("GetOrigin", "GetSpacing", "GetDirection"):
        np.testing.assert_allclose(getattr(mask, what)(), getattr(scan, what)(), atol=1e-5)
    same = (sitk.GetArrayFromImage(scan) > middle) == sitk.GetArrayFromImage(mask)
    assert same.mean() > (0.97 if turn == "oblique" else 0.9999)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mask.nii.gz"]


def test_labels_on_another_grid_and_wrong_ones(tmp_path):
    stored = write(tmp_path / "scan.mha", spacing=(1.0, 1.0, 2.0))
    fine = resample(read_volume(tmp_path / "scan.mha"), outside=-1000)
    write_labels(tmp_path / "m.nii", (fine.array > 0).astype(np.uint8), tmp_path / "scan.mha", fine)
    np.testing.assert_array_equal(read_volume(tmp_path / "m.nii").array > 0, stored.transpose(2, 1, 0) > 0)
    with pytest.raises(ValueError, match="16 x 18 x 39 voxels for a volume of 16 x 18 x 20"):
        write_labels(tmp_path / "m.nii", np.zeros((16, 18, 39), np.uint8), tmp_path / "scan.mha")
    with pytest.raises(ValueError, match=r"\.nii"):
        write_labels(tmp_path / "m.png", np.zeros((16, 18, 20), np.uint8), tmp_path / "scan.mha")


def test_labels_are_whole_numbers_to_255():
    assert wrong_label(np.array([0, 1, 255])) is None
    for value in (256, 300, -1, 0.5):
        assert wrong_label(np.array([0, value, 1])) == value
