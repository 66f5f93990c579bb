"""The one table of real and generated cells: metadata, features, patch. Pure numpy and pyarrow.

A row is a cell. ``Metadata_*`` columns come first, then the features as float32 under
CellProfiler's names, then ``patch``: the pixels in C order (channel, row, column) as
fixed-size binary. Shape, dtype, channels, bit depth and normalisation stand in the Arrow schema's
metadata under ``cp2image``, so that three lines of pandas read a patch::

    cells = pd.read_parquet("cells/")
    patch = np.frombuffer(cells.patch[0], "uint16").reshape(3, 68, 68)
"""

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cp2image.columns import METADATA
from cp2image.errors import DatasetError, PatchError

PATCH = "patch"
ROW_GROUP = 2048
"""Rows of a Parquet row group: at 1,800 columns, smaller ones cost more by column than by cell."""
_KEY = b"cp2image"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class PatchFormat:
    """What the bytes of a patch mean.

    Attributes
    ----------
    channels
        Names in patch order, such as ``("DNA", "Actin", "Tubulin")``.
    size
        Side in pixels.
    dtype
        ``uint8``, ``uint16`` or ``float32`` (float patches hold intensities in [0, 1]).
    bit_depth
        Bits of the camera that carry information.
    normalisation
        ``none`` for the acquisition scale; else the model's normalisation the patch is in.
    """

    channels: tuple[str, ...]
    size: int
    dtype: str = "uint16"
    bit_depth: int = 16
    normalisation: str = "none"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return len(self.channels), self.size, self.size

    @property
    def full_scale(self) -> float:
        """The value that stands for intensity 1: the type's maximum, 1 for floats."""
        return 1.0 if self.dtype == "float32" else float(np.iinfo(self.dtype).max)

    def to_metadata(self, **extra: str) -> dict[bytes, bytes]:
        """Return the entry for an Arrow schema's metadata."""
        entry = {"version": FORMAT_VERSION, **asdict(self), **extra}
        return {_KEY: json.dumps(entry).encode()}

    @classmethod
    def of(cls, schema: pa.Schema, where: str) -> "PatchFormat":
        """Read the format back from a schema.

        Raises
        ------
        DatasetError
            If the schema carries no format or one of a later version.
        """
        entry = (schema.metadata or {}).get(_KEY)
        if entry is None:
            raise DatasetError(
                f"{where}: not a cp2image table (its schema has no 'cp2image' metadata); "
                "make one with jobs/prepare.py"
            )
        data: dict[str, Any] = json.loads(entry)
        if data["version"] > FORMAT_VERSION:
            raise DatasetError(
                f"{where}: written in format {data['version']}, this program reads up to "
                f"{FORMAT_VERSION}; update cp2image"
            )
        keys = ("size", "dtype", "bit_depth", "normalisation")
        return cls(channels=tuple(data["channels"]), **{key: data[key] for key in keys})


def build_table(
    metadata: pd.DataFrame,
    features: pd.DataFrame | pa.Table | None,
    patches: NDArray[Any],
    patch_format: PatchFormat,
) -> pa.Table:
    """Put cells together as one Arrow table.

    Parameters
    ----------
    metadata
        ``Metadata_*`` columns, N rows.
    features
        Measurements, N rows, stored as float32, a missing value as NaN; None for patches that
        have none yet.
    patches
        Shape (N, channels, size, size), of the format's dtype.
    patch_format
        What the patches are.

    Raises
    ------
    PatchError
        If patches and format differ, or the numbers of rows do.
    """
    if patches.shape[1:] != patch_format.shape or patches.dtype != patch_format.dtype:
        raise PatchError(
            f"patches are {patches.dtype} {patches.shape[1:]}, the dataset holds "
            f"{patch_format.dtype} {patch_format.shape}"
        )
    for what, part in (("metadata", metadata), ("features", features)):
        if part is not None and len(part) != len(patches):
            raise PatchError(f"{len(part)} rows of {what} for {len(patches)} patches")
    columns: dict[str, pa.Array] = {}
    for name in metadata.columns:
        columns[str(name)] = _metadata_array(metadata[name])
    if isinstance(features, pa.Table):
        for name in features.column_names:
            columns[name] = _feature_array(features.column(name))
    elif features is not None:
        for name in features.columns:
            values = features[name].to_numpy(dtype=np.float32, na_value=np.nan)
            columns[str(name)] = pa.array(values, type=pa.float32(), from_pandas=False)
    width = int(np.prod(patch_format.shape)) * np.dtype(patch_format.dtype).itemsize
    pixels = np.ascontiguousarray(patches)
    buffer = pa.py_buffer(pixels.reshape(-1).view(np.uint8))
    columns[PATCH] = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(width), len(patches), [None, buffer]
    )
    table = pa.table(columns)
    return table.replace_schema_metadata(patch_format.to_metadata())


def _feature_array(values: pa.ChunkedArray) -> pa.ChunkedArray:
    known = values if values.type == pa.float32() else values.cast(pa.float32())
    return known.fill_null(np.nan) if known.null_count else known


def _metadata_array(values: pd.Series) -> pa.Array:
    if pd.api.types.is_integer_dtype(values):
        return pa.array(values.astype("int64"), type=pa.int64())
    if pd.api.types.is_float_dtype(values):
        return pa.array(values.astype("float64"), type=pa.float64(), from_pandas=True)
    text = [None if pd.isna(value) else str(value) for value in values]
    return pa.array(text, type=pa.string())


def decode_patches(table: pa.Table, patch_format: PatchFormat) -> NDArray[Any]:
    """Return the patches of a table, shape (N, channels, size, size), without a copy if it can.

    The array is read-only where it shares memory with the table.
    """
    column = table.column(PATCH)
    chunks = [_decode_chunk(chunk, patch_format) for chunk in column.chunks if len(chunk)]
    if not chunks:
        return np.empty((0, *patch_format.shape), dtype=patch_format.dtype)
    return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)


def _decode_chunk(chunk: pa.FixedSizeBinaryArray, patch_format: PatchFormat) -> NDArray[Any]:
    width = chunk.type.byte_width
    data = np.frombuffer(chunk.buffers()[1], dtype=np.uint8)
    data = data[chunk.offset * width : (chunk.offset + len(chunk)) * width]
    return data.view(patch_format.dtype).reshape(len(chunk), *patch_format.shape)


def decode_features(
    table: pa.Table, names: Sequence[str], dtype: type[np.floating] = np.float32
) -> NDArray[Any]:
    """Return the named feature columns as a matrix, shape (N, len(names)), column by column."""
    columns = np.empty((len(names), table.num_rows), dtype=dtype)
    for line, values in zip(columns, feature_columns(table, names), strict=True):
        line[:] = values
    return columns.T


def feature_columns(table: pa.Table, names: Sequence[str]) -> list[NDArray[Any]]:
    """Return the named feature columns, N values each, without a copy if it can."""
    return [table.column(name).to_numpy() for name in names]


def decode_metadata(table: pa.Table) -> pd.DataFrame:
    """Return the ``Metadata_*`` columns as a DataFrame."""
    names = [name for name in table.column_names if name.startswith(METADATA)]
    frame: pd.DataFrame = table.select(names).to_pandas()
    return frame


def to_parquet(table: pa.Table, row_group: int = ROW_GROUP) -> bytes:
    """Serialise a table as Parquet, no dictionary for floats and pixels.

    Floats are packed by lz4 (LZ4_RAW), patches and all else by zstd: with zstd for floats, whose
    bits are close to random, the whole table takes twice as long for a size some percent smaller.
    """
    text = [f.name for f in table.schema if pa.types.is_string(f.type)]
    floats = {f.name for f in table.schema if pa.types.is_floating(f.type)}
    sink = io.BytesIO()
    pq.write_table(
        table,
        sink,
        compression={n: "lz4" if n in floats else "zstd" for n in table.column_names},
        use_dictionary=text,
        row_group_size=row_group,
        write_statistics=[n for n in table.column_names if n.startswith(METADATA)],
    )
    return sink.getvalue()
