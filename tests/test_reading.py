"""Image files of every kind, and their damage."""

import os
import struct
import zlib

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.uid import ExplicitVRLittleEndian

from medssl.errors import InputError, UnreadableImage
from medssl.reading import intensities
from medssl.reading.find import find_images
from medssl.reading.pictures import describe, read_image

RAMP = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (48, 1))  # (H, W) = (48, 64), dark to bright


def dicom(path, pixels, photometric="MONOCHROME2", bits=16, **elements):
    """Write an uncompressed DICOM file of `pixels`, (H, W) or (H, W, 3)."""
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID, data.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1", pydicom.uid.generate_uid()
    data.Rows, data.Columns = pixels.shape[:2]
    data.SamplesPerPixel = 3 if pixels.ndim == 3 else 1
    if pixels.ndim == 3:
        data.PlanarConfiguration = 0
    data.PhotometricInterpretation = photometric
    data.BitsAllocated = pixels.dtype.itemsize * 8
    data.BitsStored, data.HighBit = bits, bits - 1
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    for name, value in elements.items():
        setattr(data, name, value)
    data.PixelData = pixels.tobytes()
    data.save_as(path, enforce_file_format=True)
    return path


def png16(path, values, colour_type):
    """Write a 16-bit PNG, which Pillow cannot for colour."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour_type, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    return path


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.pgm", "a.gif"])
def test_eight_bits_are_kept(tmp_path, name):
    Image.fromarray(RAMP).save(tmp_path / name)
    assert np.array_equal(read_image(tmp_path / name), RAMP)


def test_colour_and_jpeg(tmp_path):
    colour = np.stack([RAMP, RAMP[:, ::-1], np.full_like(RAMP, 7)], -1)
    for name in ("a.png", "a.tif", "a.ppm", "a.bmp"):
        Image.fromarray(colour).save(tmp_path / name)
        assert np.array_equal(read_image(tmp_path / name), colour)
    Image.fromarray(colour).save(tmp_path / "a.jpg", quality=95)
    assert np.abs(read_image(tmp_path / "a.jpg").astype(int) - colour).mean() < 4
    Image.fromarray(colour).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    assert np.abs(read_image(tmp_path / "cmyk.jpg").astype(int) - colour).mean() < 6


def test_bilevel_becomes_black_and_white(tmp_path):
    Image.fromarray(RAMP > 99).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png"), np.where(RAMP > 99, 255, 0))


def test_palette(tmp_path):
    image = Image.fromarray((RAMP > 99).astype(np.uint8), "L").convert("P")
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.save(tmp_path / "a.png")
    assert set(map(tuple, read_image(tmp_path / "a.png").reshape(-1, 3))) == {(10, 20, 30), (200, 100, 50)}
    image.save(tmp_path / "b.png", transparency=1)  # the transparent entry is seen on black
    assert set(map(tuple, read_image(tmp_path / "b.png").reshape(-1, 3))) == {(10, 20, 30), (0, 0, 0)}


def test_alpha_goes_onto_black_and_an_empty_alpha_is_dropped(tmp_path):
    alpha = np.where(np.arange(64) < 32, 255, 0).astype(np.uint8) * np.ones((48, 1), np.uint8)
    grey = Image.fromarray(RAMP)
    for name, base in (("la.png", grey), ("rgba.png", grey.convert("RGB"))):
        for mask, wanted in ((alpha, np.where(alpha > 0, RAMP, 0)), (alpha * 0, RAMP), (alpha * 0 + 255, RAMP)):
            image = base.copy()
            image.putalpha(Image.fromarray(mask))
            image.save(tmp_path / name)
            pixels = read_image(tmp_path / name)
            assert np.array_equal(pixels if pixels.ndim == 2 else pixels[..., 1], wanted)


@pytest.mark.parametrize("kind", ["uint16", "int32", "float32"])
def test_deep_grey_is_stretched(tmp_path, kind):
    """A 12-bit ramp uses the whole range whatever its file type, and one hot pixel does not set the contrast."""
    values = np.linspace(0, 4095, 64 * 48).reshape(48, 64).astype(kind)
    values[5, 5] = 60000
    path = tmp_path / ("a.png" if kind == "uint16" else "a.tif")
    Image.fromarray(values).save(path)
    pixels = read_image(path)
    assert pixels.dtype == np.uint8
    assert pixels[0, 0] == 0
    assert pixels[-1, -1] == 255
    assert abs(int(pixels[24, 0]) - 128) < 4


def test_big_endian_sixteen_bits_equal_little_endian(tmp_path):
    values = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)
    header = {"little": b"II*\0", "big": b"MM\0*"}
    results = []
    for order, mark in (("<", "little"), (">", "big")):
        tags = [
            (256, 64),
            (257, 48),
            (258, 16),
            (259, 1),
            (262, 1),
            (273, 8),
            (277, 1),
            (278, 48),
            (279, values.nbytes),
        ]
        body = values.astype(f"{order}u2").tobytes()
        directory = struct.pack(order + "H", len(tags)) + b"".join(
            struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags
        )
        offset = struct.pack(order + "I", 8 + len(body))
        (tmp_path / "a.tif").write_bytes(header[mark] + offset + body + directory + b"\0\0\0\0")
        results.append(read_image(tmp_path / "a.tif"))
    assert np.array_equal(*results)
    assert results[0].max() == 255


def test_sixteen_bit_colour_keeps_its_hue(tmp_path):
    values = np.stack([np.full((8, 9), v) for v in (60000, 30000, 1000)], -1)
    assert np.array_equal(read_image(png16(tmp_path / "a.png", values, 2))[0, 0], [234, 117, 3])


def test_white_is_zero_tiff_is_inverted(tmp_path):
    for values in (RAMP, RAMP.astype(np.uint16) * 16):
        Image.fromarray(values).save(tmp_path / "a.tif", tiffinfo={262: 1})
        normal = read_image(tmp_path / "a.tif")
        raw = bytearray((tmp_path / "a.tif").read_bytes())
        place = raw.index(struct.pack("<HHI", 262, 3, 1))
        raw[place + 8] = 0
        (tmp_path / "b.tif").write_bytes(raw)
        assert np.array_equal(read_image(tmp_path / "b.tif"), 255 - normal)


def test_float_with_nan_and_constants(tmp_path):
    values = np.linspace(-3, 5, 64 * 48, dtype=np.float32).reshape(48, 64)
    values[0, :3] = np.nan, np.inf, -np.inf
    Image.fromarray(values).save(tmp_path / "a.tif")
    pixels = read_image(tmp_path / "a.tif")
    assert pixels[0, :3].tolist() == [0, 0, 0]
    assert pixels[-1, -1] == 255
    Image.fromarray(np.full((4, 4), 7.5, np.float32)).save(tmp_path / "b.tif")
    assert not read_image(tmp_path / "b.tif").any()
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "c.tif")
    with pytest.raises(UnreadableImage, match="no finite value"):
        read_image(tmp_path / "c.tif")


def test_a_sparse_mask_of_many_bits_does_not_vanish(tmp_path):
    values = np.zeros((100, 100), np.uint16)
    values[3, 4] = 1
    Image.fromarray(values).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png")[3, 4] == 255


def test_exif_orientation_is_honoured(tmp_path):
    image = Image.fromarray(RAMP)
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees clockwise
    for name in ("a.jpg", "a.png"):
        image.save(tmp_path / name, exif=exif)
        pixels = read_image(tmp_path / name)
        assert pixels.shape == (64, 48)
        assert pixels[0].mean() < 5 < 250 < pixels[-1].mean()


def test_monochrome1_is_inverted(tmp_path):
    plain = read_image(dicom(tmp_path / "a.dcm", RAMP.astype(np.uint16) * 16, bits=12))
    other = read_image(dicom(tmp_path / "b.dcm", RAMP.astype(np.uint16) * 16, "MONOCHROME1", bits=12))
    assert plain[0, 0] == 0
    assert plain[0, -1] == 255
    assert np.array_equal(other, 255 - plain)
    assert describe(tmp_path / "b.dcm") == ("DICOM", "MONOCHROME1 12-bit")


def test_eight_bit_dicom_is_kept_and_colour_too(tmp_path):
    dark = RAMP // 4
    assert np.array_equal(read_image(dicom(tmp_path / "a.dcm", dark, bits=8)), dark)
    colour = np.stack([RAMP, RAMP // 2, RAMP // 3], -1)
    assert np.array_equal(read_image(dicom(tmp_path / "b.dcm", colour, "RGB", bits=8)), colour)


def test_window_counts_in_rescaled_units(tmp_path):
    stored = np.array([[0, 900, 1000, 1040, 1080, 2000]], np.uint16).repeat(4, 0)
    elements = {"RescaleSlope": 1, "RescaleIntercept": -1000, "WindowCenter": [40.5, 7], "WindowWidth": [81, 9]}
    pixels = read_image(dicom(tmp_path / "a.dcm", stored, bits=12, **elements))
    assert pixels[0].tolist() == [0, 0, 0, 128, 255, 255]
    exact = read_image(dicom(tmp_path / "b.dcm", stored, bits=12, VOILUTFunction="SIGMOID", **elements))
    assert exact[0, 1] < 3 < exact[0, 2] < 40
    # A window that lies off the values would leave one flat image: the range is measured then.
    elements["WindowCenter"] = 30000
    assert read_image(dicom(tmp_path / "c.dcm", stored, bits=12, **elements))[0, -1] == 255


def test_voi_table(tmp_path):
    table = pydicom.Dataset()
    table.LUTDescriptor, table.LUTData = [4, 0, 8], [0, 10, 100, 255]
    table["LUTDescriptor"].VR, table["LUTData"].VR = "US", "US"
    stored = np.array([[0, 1, 2, 3, 9]], np.uint16)
    pixels = read_image(dicom(tmp_path / "a.dcm", stored, bits=12, VOILUTSequence=[table]))
    assert pixels[0].tolist() == [0, 10, 100, 255, 255]


def test_signed_padding_is_black_and_out_of_the_range(tmp_path):
    values = np.linspace(-1000, 1000, 64 * 48).reshape(48, 64).astype(np.int16)
    values[:24] = -2000
    values[24, 0] = -1000
    for photometric in ("MONOCHROME2", "MONOCHROME1"):
        path = dicom(
            tmp_path / "a.dcm", values, photometric, RescaleSlope=2, RescaleIntercept=5, PixelPaddingValue=-2000
        )
        pixels = read_image(path)
        assert not pixels[:24].any()
        assert {int(pixels[24, 1]), int(pixels[-1, -1])} == {0, 255}


def test_dicom_without_extension_or_header(tmp_path):
    dicom(tmp_path / "1.2.840.99", RAMP, bits=8)
    dicom(tmp_path / "plain", RAMP, bits=8)
    (tmp_path / "notes").write_text("nothing to see")
    assert [path.name for path in find_images(tmp_path)] == ["1.2.840.99", "plain"]
    assert np.array_equal(read_image(tmp_path / "plain"), RAMP)
    headerless = tmp_path / "old.dcm"
    data = pydicom.dcmread(tmp_path / "plain")
    del data.file_meta
    data.save_as(headerless, implicit_vr=True, little_endian=True)
    assert np.array_equal(read_image(headerless), RAMP)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("CT_small.dcm", (128, 128)),
        ("MR_small_RLE.dcm", (64, 64)),
        ("MR_small_bigendian.dcm", (64, 64)),
        ("JPEG2000.dcm", (1024, 256)),
        ("examples_palette.dcm", (350, 800, 3)),
        ("SC_rgb_rle_16bit.dcm", (100, 100, 3)),
        ("SC_ybr_full_422_uncompressed.dcm", (100, 100, 3)),
        ("liver_1frame.dcm", (512, 512)),
    ],
)
def test_odd_encodings(name, shape):
    path = get_testdata_file(name, download=False)
    if path is None:
        pytest.skip(f"pydicom came without {name}")
    pixels = read_image(path)
    assert pixels.shape == shape
    assert pixels.dtype == np.uint8
    assert pixels.max() > 200


def test_luminance_chrominance_becomes_rgb():
    ybr, rgb = (
        get_testdata_file(f"SC_{name}.dcm", download=False) for name in ("ybr_full_422_uncompressed", "rgb_rle")
    )
    if ybr is None or rgb is None:
        pytest.skip("pydicom came without its test files")
    assert np.abs(read_image(ybr).astype(int) - read_image(rgb)).mean() < 6  # the same picture, subsampled


def test_a_missing_decoder_is_named():
    path = get_testdata_file("MR_small_jpeg_ls_lossless.dcm", download=False)
    if path is None:
        pytest.skip("pydicom came without its test files")
    if pydicom.pixels.decoders.JPEGLSLosslessDecoder.is_available:
        pytest.skip("a JPEG-LS decoder is installed")
    with pytest.raises(UnreadableImage, match="cannot decode JPEG-LS Lossless.*pylibjpeg") as caught:
        read_image(path)
    assert "\n" not in str(caught.value)


def test_unreadable_files_say_why(tmp_path):
    def reason(path):
        with pytest.raises(UnreadableImage) as caught:
            read_image(path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (64, 64), np.uint8)).save(tmp_path / "whole.png")
    content = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").touch()
    frames = [Image.fromarray(RAMP), Image.fromarray(RAMP[::-1]), Image.fromarray(255 - RAMP)]
    frames[0].save(tmp_path / "stack.tif", save_all=True, append_images=frames[1:])
    dicom(tmp_path / "stack.dcm", np.zeros((32, 9), np.uint8), bits=8, NumberOfFrames=4, Rows=8)
    dicom(tmp_path / "short.dcm", RAMP, bits=8, Rows=100)
    assert reason(tmp_path / "gone.png") == "no such file"
    assert "directory" in reason(tmp_path)
    assert "truncated" in reason(tmp_path / "cut.png")
    assert "not an image" in reason(tmp_path / "text.png")
    assert "not an image" in reason(tmp_path / "empty.png")
    assert "a stack of 3 frames, not one 2D image" in reason(tmp_path / "stack.tif")
    assert "a DICOM stack of 4 frames" in reason(tmp_path / "stack.dcm")
    assert "values, and holds at most" in reason(tmp_path / "short.dcm")
    (tmp_path / "fake.dcm").write_bytes(b"x" * 300)
    assert reason(tmp_path / "fake.dcm")


def test_pages_of_other_sizes_are_no_stack(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "a.tif", save_all=True, append_images=[Image.fromarray(RAMP[::2, ::2])])
    assert np.array_equal(read_image(tmp_path / "a.tif"), RAMP)


def test_find_images(tmp_path):
    for name in ("b/2.png", "b/.hidden.png", "a.JPG", "__MACOSX/a.png", ".git/x.png", "b/notes.txt", "z.nii.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    os.symlink(tmp_path, tmp_path / "b" / "loop")
    os.symlink(tmp_path / "nowhere.png", tmp_path / "broken.png")
    names = [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)]
    assert names == ["a.JPG", "b/2.png", "broken.png"]
    with pytest.raises(InputError, match="not a folder"):
        find_images(tmp_path / "gone")


def test_range_is_the_percentiles():
    values = np.arange(1001, dtype=np.int32).reshape(7, 143)
    levels = intensities.to_uint8(values)
    assert levels.ravel()[:6].tolist() == [0] * 6
    assert levels.ravel()[-6:].tolist() == [255] * 6
    assert levels.ravel()[500] == 128
