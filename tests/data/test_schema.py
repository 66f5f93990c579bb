import io

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cp2image.data.schema import (
    FORMAT_VERSION,
    PATCH,
    PatchFormat,
    build_table,
    decode_features,
    decode_metadata,
    decode_patches,
    to_parquet,
)
from cp2image.errors import DatasetError, PatchError

CHANNELS = ("DNA", "Actin", "Tubulin")
FEATURES = ["Nuclei_AreaShape_Area", "Cells_Intensity_MeanIntensity_DNA"]


def cells(count=7, dtype="uint16", size=6):
    random = np.random.default_rng(0)
    shape = PatchFormat(CHANNELS, size, dtype)
    if dtype == "float32":
        patches = random.random((count, *shape.shape), dtype=np.float32)
    else:
        top = np.iinfo(dtype).max
        patches = random.integers(0, top, (count, *shape.shape), dtype=dtype, endpoint=True)
    metadata = pd.DataFrame(
        {
            "Metadata_Plate": [f"P{i % 2}" for i in range(count)],
            "Metadata_Site": np.arange(count, dtype=np.int32),
            "Metadata_Concentration": np.linspace(0, 3, count),
            "Metadata_Compound": [None if i == 1 else "DMSO" for i in range(count)],
        }
    )
    features = pd.DataFrame(random.normal(size=(count, 2)), columns=FEATURES)
    return metadata, features, patches, shape


def read_back(table):
    return pq.read_table(io.BytesIO(to_parquet(table, row_group=3)))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_a_table_comes_back_from_parquet_as_it_was(dtype):
    metadata, features, patches, shape = cells(dtype=dtype)
    features.iloc[2, 0], features.iloc[3, 1] = np.nan, np.inf
    table = read_back(build_table(metadata, features, patches, shape))
    assert PatchFormat.of(table.schema, "cells") == shape
    np.testing.assert_array_equal(decode_patches(table, shape), patches)
    found = decode_features(table, FEATURES[::-1])
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, features[FEATURES[::-1]].to_numpy(np.float32))
    pd.testing.assert_frame_equal(
        decode_metadata(table), metadata, check_dtype=False, check_column_type=False
    )


def test_columns_are_metadata_features_patch_in_plain_types():
    table = build_table(*cells())
    assert table.column_names == [*cells()[0].columns, *FEATURES, PATCH]
    assert [str(kind) for kind in table.schema.types] == [
        "string",
        "int64",
        "double",
        "string",
        "float",
        "float",
        f"fixed_size_binary[{3 * 6 * 6 * 2}]",
    ]


@pytest.mark.parametrize(("start", "rows"), [(0, 7), (2, 3), (6, 1), (4, 0)])
def test_patches_of_a_slice_are_those_of_its_rows(start, rows):
    metadata, features, patches, shape = cells()
    table = build_table(metadata, features, patches, shape).slice(start, rows)
    expected = patches[start : start + rows]
    np.testing.assert_array_equal(decode_patches(table, shape), expected)
    np.testing.assert_array_equal(decode_patches(table.slice(0, 1), shape), expected[:1])


def test_patches_of_several_chunks_are_joined_in_order():
    metadata, features, patches, shape = cells()
    table = build_table(metadata, features, patches, shape)
    chunked = pa.concat_tables([table.slice(5), table.slice(1, 0), table.slice(1, 3)])
    np.testing.assert_array_equal(decode_patches(chunked, shape), patches[[5, 6, 1, 2, 3]])


def test_patches_in_one_chunk_are_decoded_without_a_copy():
    metadata, features, patches, shape = cells()
    table = build_table(metadata, features, patches, shape)
    assert np.shares_memory(decode_patches(table, shape), patches)


def test_three_lines_of_pandas_read_a_patch(tmp_path):
    metadata, features, patches, shape = cells(size=68)
    for plate in ("P0", "P1"):
        rows = (metadata["Metadata_Plate"] == plate).to_numpy()
        table = build_table(metadata[rows], features[rows], patches[rows], shape)
        path = tmp_path / "cells" / f"plate={plate}" / "part-00000.parquet"
        path.parent.mkdir(parents=True)
        path.write_bytes(to_parquet(table))

    cells_read = pd.read_parquet(tmp_path / "cells")
    patch = np.frombuffer(cells_read.patch[0], "uint16").reshape(3, 68, 68)
    np.testing.assert_array_equal(patch, patches[0])
    assert list(cells_read["plate"]) == list(cells_read["Metadata_Plate"])


def test_patches_without_features_have_a_table_too():
    metadata, _, patches, shape = cells()
    assert build_table(metadata, None, patches, shape).column_names[-1] == PATCH


def test_no_cells_make_an_empty_table_of_the_same_schema():
    metadata, features, patches, shape = cells()
    full = build_table(metadata, features, patches, shape)
    empty = read_back(build_table(metadata[:0], features[:0], patches[:0], shape))
    assert empty.num_rows == 0
    assert empty.schema.field(PATCH) == full.schema.field(PATCH)
    assert decode_patches(empty, shape).shape == (0, *shape.shape)


@pytest.mark.parametrize(
    "wrong", [lambda p: p[:, :2], lambda p: p.astype("uint8"), lambda p: p.byteswap().view(">u2")]
)
def test_patches_of_another_shape_type_or_byte_order_are_refused(wrong):
    metadata, features, patches, shape = cells()
    with pytest.raises(PatchError, match=r"the dataset holds uint16 \(3, 6, 6\)"):
        build_table(metadata, features, wrong(patches), shape)


def test_rows_that_do_not_fit_the_patches_are_refused():
    metadata, features, patches, shape = cells()
    with pytest.raises(PatchError, match="6 rows of metadata for 7 patches"):
        build_table(metadata[:6], features, patches, shape)
    with pytest.raises(PatchError, match="6 rows of features for 7 patches"):
        build_table(metadata, features[:6], patches, shape)


def test_foreign_and_later_tables_are_refused():
    with pytest.raises(DatasetError, match="not a cp2image table"):
        PatchFormat.of(pa.schema([("x", pa.int64())]), "there.parquet")
    later = PatchFormat(CHANNELS, 6).to_metadata(version=FORMAT_VERSION + 1)
    schema = pa.schema([("x", pa.int64())], metadata=later)
    with pytest.raises(DatasetError, match=rf"written in format {FORMAT_VERSION + 1}"):
        PatchFormat.of(schema, "there.parquet")


@pytest.mark.parametrize(("dtype", "scale"), [("uint8", 255), ("uint16", 65535), ("float32", 1)])
def test_full_scale_is_what_stands_for_intensity_one(dtype, scale):
    assert PatchFormat(CHANNELS, 6, dtype).full_scale == scale


def test_floats_are_packed_by_lz4_and_patches_by_zstd():
    table = pa.table(
        {
            "Metadata_Well": ["A01"] * 3,
            "Nuclei_AreaShape_Area": pa.array([1.0, 2.0, 3.0], pa.float32()),
            "patch": pa.array([b"abcd"] * 3, pa.binary(4)),
        }
    )
    group = pq.ParquetFile(pa.BufferReader(to_parquet(table))).metadata.row_group(0)
    packed = {group.column(i).path_in_schema: group.column(i).compression for i in range(3)}
    assert packed == {"Metadata_Well": "ZSTD", "Nuclei_AreaShape_Area": "LZ4", "patch": "ZSTD"}
