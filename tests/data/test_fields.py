import io

import numpy as np
import pytest
import tifffile
from PIL import Image

from cp2image.data.fields import read_field
from cp2image.errors import FieldError, StorageError


def planes(count=3, dtype=np.uint16, size=(24, 30), top=4095):
    return np.random.default_rng(3).integers(0, top, (count, *size)).astype(dtype)


def write_each(folder, field, suffix="tif", **options):
    names = []
    for number, plane in enumerate(field):
        names.append(str(folder / f"c{number}.{suffix}"))
        if suffix == "tif":
            tifffile.imwrite(names[-1], plane, **options)
        else:
            Image.fromarray(plane).save(names[-1])
    return names


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize(
    "options", [{}, {"compression": "lzw"}, {"bigtiff": True}, {"byteorder": ">"}]
)
def test_one_tiff_per_channel_keeps_values_and_type(dtype, options, tmp_path):
    field = planes(dtype=dtype, top=250)
    found = read_field(write_each(tmp_path, field, **options), expected_channels=3)
    np.testing.assert_array_equal(found, field)
    assert found.dtype == field.dtype


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_png_keeps_8_and_16_bits(dtype, tmp_path):
    field = planes(dtype=dtype, top=250 if dtype == "uint8" else 65535)
    found = read_field(write_each(tmp_path, field, "png"), expected_channels=3)
    np.testing.assert_array_equal(found, field)
    assert found.dtype == field.dtype


def test_grey_jpeg_is_read(tmp_path):
    field = np.full((1, 16, 16), 77, np.uint8)
    found = read_field(write_each(tmp_path, field, "jpg"), expected_channels=1)
    np.testing.assert_allclose(found, field, atol=2)


@pytest.mark.parametrize("count", [2, 3, 5, 8])
@pytest.mark.parametrize(
    "options",
    [
        {"photometric": "minisblack"},
        {"photometric": "minisblack", "metadata": None},
        {"photometric": "minisblack", "metadata": {"axes": "CYX"}, "ome": True},
        {"photometric": "minisblack", "imagej": True},
        {"photometric": "minisblack", "planarconfig": "separate"},
    ],
    ids=["pages", "bare pages", "OME", "ImageJ", "planar"],
)
def test_one_file_with_all_channels_is_read_in_its_order(count, options, tmp_path):
    field = planes(count)
    name = str(tmp_path / "all.tif")
    tifffile.imwrite(name, field, **options)
    np.testing.assert_array_equal(read_field([name], expected_channels=count), field)
    np.testing.assert_array_equal(read_field([name] * count, expected_channels=count), field)


@pytest.mark.parametrize(
    "options", [{"planarconfig": "contig"}, {}], ids=["contiguous", "pages of rows"]
)
def test_a_trailing_channel_axis_is_moved_to_the_front(options, tmp_path):
    field = planes(4)
    name = str(tmp_path / "all.tif")
    tifffile.imwrite(name, np.moveaxis(field, 0, -1), photometric="minisblack", **options)
    np.testing.assert_array_equal(read_field([name], expected_channels=4), field)


def test_one_plane_of_a_multi_file_ome_set_is_read_alone(tmp_path):
    field = planes(1)
    name = str(tmp_path / "c0.ome.tif")
    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer, planes(3), ome=True, metadata={"axes": "CYX"}, photometric="minisblack"
    )
    buffer.seek(0)
    with tifffile.TiffFile(buffer) as tiff:
        description = tiff.ome_metadata
    tifffile.imwrite(name, field[0], description=description, metadata=None)
    np.testing.assert_array_equal(read_field([name], expected_channels=1), field)


def test_a_colour_file_is_three_channels_only_when_asked_for(tmp_path):
    field = planes(3, np.uint8, top=255)
    for suffix in ("png", "tif"):
        name = str(tmp_path / f"rgb.{suffix}")
        if suffix == "png":
            Image.fromarray(np.moveaxis(field, 0, -1)).save(name)
        else:
            tifffile.imwrite(name, np.moveaxis(field, 0, -1), photometric="rgb")
        np.testing.assert_array_equal(read_field([name], expected_channels=3, rgb=True), field)
        with pytest.raises(
            FieldError, match=rf"rgb\.{suffix}: found a colour.*24 x 30 px.*one grey plane"
        ):
            read_field([name], expected_channels=3)
        with pytest.raises(FieldError, match=r"found 3 channels .* expected 1"):
            read_field([name], expected_channels=1, rgb=True)


def test_wrong_numbers_of_files_or_channels_are_refused(tmp_path):
    names = write_each(tmp_path, planes(3))
    with pytest.raises(FieldError, match="2 files for 3 channels"):
        read_field(names[:2], expected_channels=3)
    with pytest.raises(FieldError, match=r"c0\.tif: found 1 channels of 24 x 30 px, expected 3"):
        read_field(names[:1], expected_channels=3)
    with pytest.raises(FieldError, match="9 channels"):
        read_field(names, expected_channels=9)


def test_mixed_sizes_and_types_are_refused_naming_both_files(tmp_path):
    names = write_each(tmp_path, planes(3))
    tifffile.imwrite(names[1], planes(1, size=(24, 31))[0])
    with pytest.raises(FieldError, match=r"c1\.tif: 24 x 31 px uint16, but .*c0\.tif.*24 x 30"):
        read_field(names, expected_channels=3)
    tifffile.imwrite(names[1], planes(1, np.uint8, top=9)[0])
    with pytest.raises(FieldError, match=r"c1\.tif: 24 x 30 px uint8, but .*uint16"):
        read_field(names, expected_channels=3)
    tifffile.imwrite(names[0], planes(1)[0])
    tifffile.imwrite(names[0], planes(1, size=(9, 9))[0], append=True)
    with pytest.raises(FieldError, match=r"c0\.tif: found 2 images of different shape"):
        read_field(names, expected_channels=3)


@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"bigtiff": True}])
def test_a_tiff_cut_anywhere_is_refused(options, tmp_path):
    name = tmp_path / "all.tif"
    tifffile.imwrite(name, planes(3), photometric="minisblack", **options)
    content = name.read_bytes()
    for share in (0.01, 0.1, 0.3, 0.5, 0.9, 0.98):
        name.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(FieldError, match=r"all\.tif: found a (truncated|damaged)"):
            read_field([str(name)], expected_channels=3)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_cut_png_or_jpeg_is_refused(suffix, tmp_path):
    name = write_each(tmp_path, planes(1, np.uint8, top=255, size=(64, 64)), suffix)[0]
    with open(name, "r+b") as file:
        file.truncate(len(file.read()) // 2)
    with pytest.raises(FieldError, match=rf"c0\.{suffix}: found a damaged image"):
        read_field([name], expected_channels=1)


@pytest.mark.parametrize(
    ("array", "options", "says"),
    [
        (np.ones((8, 8), bool), {}, "1-bit TIFF of 8 x 8"),
        (np.ones((8, 8), np.int32), {}, "pixels of type int32"),
        (np.full((8, 8), np.nan, np.float32), {}, "64 of 64 pixels are NaN"),
        (np.ones((8, 8), np.uint8), {"photometric": "miniswhite"}, "MINISWHITE TIFF"),
        (
            np.ones((8, 8), np.uint8),
            {"photometric": "palette", "colormap": np.zeros((3, 256), np.uint16)},
            "PALETTE TIFF",
        ),
        (np.ones((4, 8, 8), np.uint8), {"ome": True, "metadata": {"axes": "ZYX"}}, "axes Z=4"),
        (
            np.ones((2, 4, 8, 8), np.uint8),
            {"ome": True, "metadata": {"axes": "TCYX"}},
            "axes T=2, C=4",
        ),
    ],
)
def test_what_holds_no_intensities_is_named(array, options, says, tmp_path):
    options.setdefault("photometric", "minisblack")
    tifffile.imwrite(tmp_path / "odd.tif", array, **options)
    with pytest.raises(FieldError, match=rf"odd\.tif: .*{says}"):
        read_field([str(tmp_path / "odd.tif")], expected_channels=1)


def test_missing_and_empty_files_are_named(tmp_path):
    with pytest.raises(StorageError, match=r"gone\.tif: .*not found"):
        read_field([str(tmp_path / "gone.tif")], expected_channels=1)
    (tmp_path / "empty.tif").touch()
    with pytest.raises(FieldError, match=r"empty\.tif: the file is empty"):
        read_field([str(tmp_path / "empty.tif")], expected_channels=1)


@pytest.mark.real_data
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("1bit_shapes.png", r"1-bit \(black and white\) PNG"),
        ("NikonTIF.tif", r"colour \(RGB\) TIFF of 731 x 805 px"),
        ("rgb_brightfield_like_tumor.jpg", "colour image of 1200 x 1600 px with 3 colour planes"),
        ("lfs_pointer_metadata.csv", "Git LFS pointer"),
        ("lfs_pointer_metadata.parquet", "Git LFS pointer"),
    ],
)
def test_every_hostile_file_is_named_with_what_was_found_in_it(name, says, channels, shared_data):
    with pytest.raises(FieldError, match=rf"{name}: found an? {says}"):
        read_field([str(shared_data / "hostile" / name)], expected_channels=channels)


@pytest.mark.real_data
def test_the_field_of_examplehuman_is_read_as_tifffile_reads_it(shared_data):
    names = sorted(map(str, (shared_data / "examplehuman").glob("*d?.tif")))
    field = read_field(names, expected_channels=3)
    assert field.dtype == np.uint8
    np.testing.assert_array_equal(field, [tifffile.imread(name) for name in names])
