"""Import ready-made patches: image stacks and a CSV that says what is on which page.

Floor 1: pandas, tifffile; no Ray, torch. The index decides which pages are used: a stack may
hold more pages than the index names.
"""

import gzip
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import tifffile
from numpy.typing import NDArray

from cp2image import storage
from cp2image.columns import (
    COMPOUND,
    CONCENTRATION,
    IDENTITY,
    IMAGE_NUMBER,
    METADATA,
    MOA,
    OBJECT_NUMBER,
    PLATE,
    SITE,
    WELL,
    require_columns,
)
from cp2image.data.sources import read_source, refuse_truncated
from cp2image.errors import ColumnError, PatchError, TableError

FILE, PAGE = "file", "page"
DEFAULT_COLUMNS: Mapping[str, str] = {
    FILE: "file",
    PAGE: "page_index",
    PLATE: "plate",
    WELL: "well",
    SITE: "site",
    COMPOUND: "compound",
    CONCENTRATION: "concentration",
    MOA: "moa",
}
"""Name of each column in the index; `open_stacks` takes another mapping."""
_REQUIRED = (FILE, PAGE, PLATE, WELL, SITE)
_MAX_CHANNELS = 8
_GZIP_START = b"\x1f\x8b"
_DTYPES = ("uint8", "uint16", "float32")


def open_stacks(index_uri: str, columns: Mapping[str, str] = DEFAULT_COLUMNS) -> pd.DataFrame:
    """Read the index of a set of patches.

    Parameters
    ----------
    index_uri
        CSV with a header and one row per patch.
    columns
        From our names (``file``, ``page`` and ``Metadata_*``) to the CSV's. ``file``, ``page``,
        ``Metadata_Plate``, ``_Well`` and ``_Site`` are required.

    Returns
    -------
    One row per patch, in the CSV's order: the ``Metadata_*`` columns, ``file`` (URI, relative
    names resolved against the index's folder) and ``page`` (from 0). Where the mapping names no
    ``Metadata_ImageNumber``, fields (plate, well, site) are numbered from 1 in sorted order;
    where it names no ``Metadata_ObjectNumber``, it is the page + 1.

    Raises
    ------
    ColumnError
        If a column is missing, or holds something that is no number where one is needed.
    TableError
        If the index is empty, unreadable, or names one page or one cell twice.
    """
    unknown = [
        name for name in columns if name not in (FILE, PAGE) and not name.startswith(METADATA)
    ]
    missing = [name for name in _REQUIRED if name not in columns]
    if unknown or missing:
        raise ColumnError(
            f"column mapping for {index_uri}: unknown names {unknown}, missing names {missing}; "
            f"use {FILE!r}, {PAGE!r} and Metadata_* names"
        )
    index = _read_index(index_uri, columns)
    for name in {PAGE, CONCENTRATION, IMAGE_NUMBER, OBJECT_NUMBER} & set(columns):
        whole = name != CONCENTRATION
        index[name] = _to_number(index[name], f"{index_uri}: column {columns[name]!r}", whole=whole)
    if IMAGE_NUMBER not in index:
        index[IMAGE_NUMBER] = index.groupby([PLATE, WELL, SITE]).ngroup() + 1
    if OBJECT_NUMBER not in index:
        index[OBJECT_NUMBER] = index[PAGE] + 1
    folder = index_uri.rsplit("/", 1)[0] if "/" in index_uri else "."
    index[FILE] = [
        name if name.startswith("/") or "://" in name else storage.join(folder, name)
        for name in index[FILE]
    ]
    for key, meaning in (([FILE, PAGE], "page"), (list(IDENTITY), "cell")):
        doubled = index.duplicated(key, keep=False)
        if doubled.any():
            rows = [int(row) + 2 for row in np.flatnonzero(doubled)[:2]]
            raise TableError(
                f"{index_uri}: {int(doubled.sum())} rows name the same {meaning} more than once, "
                f"first lines {rows[0]} and {rows[1]}: {index.loc[doubled, key].iloc[0].to_dict()}"
            )
    others = [name for name in index if name not in (*IDENTITY, FILE, PAGE)]
    return index[[*IDENTITY, *others, FILE, PAGE]]


def _read_index(uri: str, columns: Mapping[str, str]) -> pd.DataFrame:
    content = read_source(uri, TableError)
    try:
        if content.startswith(_GZIP_START):
            content = gzip.decompress(content)
        raw = pd.read_csv(io.BytesIO(content), dtype=str, keep_default_na=False)
    except Exception as error:  # pandas and the decompressor raise errors of many kinds
        raise TableError(f"{uri}: found no readable CSV ({error}); expected an index") from error
    require_columns(list(raw.columns), columns.values(), uri)
    if raw.empty:
        raise TableError(f"{uri}: the index has a header but no rows")
    index = pd.DataFrame({name: raw[source] for name, source in columns.items()})
    for name in _REQUIRED:
        blank = np.flatnonzero(index[name] == "")
        if blank.size:
            raise TableError(f"{uri}: line {blank[0] + 2} has no {columns[name]!r}; fill it in")
    return index


def _to_number(values: pd.Series, where: str, *, whole: bool) -> pd.Series:
    numbers = pd.to_numeric(values, errors="coerce")
    bad = numbers.isna() & (values != "") if not whole else numbers.isna() | (numbers % 1 != 0)
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        kind = "a whole number" if whole else "a number"
        raise ColumnError(f"{where}, line {row + 2}: found {values.iloc[row]!r}, expected {kind}")
    return numbers.astype(np.int64 if whole else np.float64)


def read_stack(
    uri: str, pages: Sequence[int] | NDArray[np.int64], channels: int | None = None
) -> NDArray[Any]:
    """Return some pages of one stack.

    Parameters
    ----------
    uri
        TIFF of N patches: (N, C, S, S), (N, S, S, C), (N, S, S) or, as (N · C, S, S), with all
        channels of a patch after one another.
    pages
        Numbers of the patches wanted, from 0, in the order wanted.
    channels
        Number of channels expected; needed where the file does not say how its planes divide.

    Returns
    -------
    Shape (len(pages), C, S, S), the file's own type (uint8, uint16 or float32).

    Raises
    ------
    StorageError
        If the file is missing.
    PatchError
        If it is no TIFF, damaged, of mixed sizes or types, not square, has other
        channels, or no such page.
    """
    content = read_source(uri, PatchError)
    try:
        with tifffile.TiffFile(io.BytesIO(content)) as tiff:
            if len(tiff.series) != 1:
                found = ", ".join(f"{part.shape} {part.dtype}" for part in tiff.series[:3])
                raise PatchError(
                    f"{uri}: found pages of {len(tiff.series)} kinds ({found}); "
                    "expected patches of one shape and type"
                )
            refuse_truncated(uri, tiff, content, PatchError)
            series = tiff.series[0]
            axes, stack = series.axes, series.asarray()
    except PatchError:
        raise
    except Exception as error:  # tifffile and its codecs raise errors of many kinds
        raise PatchError(
            f"{uri}: found no readable TIFF stack in its {len(content)} bytes "
            f"({type(error).__name__}: {error}); copy it again"
        ) from error
    stack = _arrange(uri, stack, axes, channels)
    wanted = np.asarray(pages, dtype=np.int64)
    outside = wanted[(wanted < 0) | (wanted >= len(stack))]
    if outside.size:
        raise PatchError(
            f"{uri}: page {outside[0]} asked for, the stack holds {len(stack)} (0 to "
            f"{len(stack) - 1}); the index belongs to another file"
        )
    return stack[wanted]


def _arrange(uri: str, stack: NDArray[Any], axes: str, channels: int | None) -> NDArray[Any]:
    named = zip(axes, stack.shape, strict=True)
    kept = [(name, length) for name, length in named if name in "YX" or length > 1]
    names, shape = [name for name, _ in kept], [length for _, length in kept]
    stack = stack.reshape(shape)
    if stack.ndim > 2 and shape[-1] <= _MAX_CHANNELS < shape[-2]:
        stack = np.moveaxis(stack, -1, -3)
        names = [*names[:-3], "C", "Y", "X"]
    divided = len(names) == 4 or (len(names) == 3 and names[0] in "CS")
    depth = stack.shape[-3] if divided else channels or 1
    height, width = stack.shape[-2:]
    planes = stack.reshape(-1, height, width)
    if (
        len(names) > 4
        or height != width
        or depth != (channels or depth)
        or len(planes) % depth
        or stack.dtype.name not in _DTYPES
    ):
        raise PatchError(
            f"{uri}: found axes {', '.join(f'{name}={length}' for name, length in kept)} of "
            f"{stack.dtype}; expected square patches (cell, channel, row, column) of 8 or 16 bit "
            f"unsigned integers or float32" + (f" with {channels} channels" if channels else "")
        )
    return planes.reshape(-1, depth, height, width)
