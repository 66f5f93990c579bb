"""One checked row per cell, from any of CellProfiler's tables. Floor 1: pandas, pyarrow.

`open_table` finds out the format; a `Table` lists image sets cheaply and reads plate by plate.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, Protocol, Self

import numpy as np
import pandas as pd
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
    nearest,
    require_columns,
)
from cp2image.data.cell_files import CellFileReader
from cp2image.data.compartments import IMAGE_ROW
from cp2image.data.databases import DatabaseReader
from cp2image.data.metadata_files import MetadataFile
from cp2image.data.naming import FILE_COLUMN, name_metadata, names_of
from cp2image.data.sources import is_file, read_start
from cp2image.data.spreadsheets import SpreadsheetReader, find_image_tables
from cp2image.errors import ColumnError, StorageError, TableError

Format = Literal["auto", "spreadsheet", "database", "cells"]
DEFAULT_PLATE, DEFAULT_WELL = "plate", "well"
"""Plate and well of a table that names none at all; its site is then the image number."""
_POSITIONS = ("Location_Center", "AreaShape_Center")


class Reader(Protocol):
    """What a format has to offer: image sets, and the cells of some of them."""

    uri: str
    ignored: tuple[str, ...]

    def images(self) -> pd.DataFrame:
        """Return one row per image set, under the file's own names."""

    def cells(self, images: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, Any]]:
        """Return `IMAGE_ROW`, object number and measurements of the cells of some images."""


class Table:
    """A feature table of any format. Cheap to pickle: it holds names, no cells.

    Parameters
    ----------
    reader
        The format.
    metadata
        Canonical metadata name → the file's name, where the usual variants do not find it.
    joins
        Further metadata, see `join_metadata`.
    """

    def __init__(
        self,
        reader: Reader,
        metadata: Mapping[str, str] | None = None,
        joins: tuple[MetadataFile, ...] = (),
    ) -> None:
        self._reader, self._metadata, self._joins = reader, dict(metadata or {}), joins

    @property
    def uri(self) -> str:
        """Where the table lies."""
        return self._reader.uri

    @property
    def ignored(self) -> tuple[str, ...]:
        """Files or tables beside it that are not read, such as objects that are no cells."""
        return self._reader.ignored

    @property
    def plates(self) -> list[str]:
        """Names of the plates, sorted."""
        return sorted(self.images()[PLATE].unique())

    @cached_property
    def _raw(self) -> pd.DataFrame:
        rows = self._reader.images()
        if rows.empty:
            raise TableError(f"{self.uri}: the table has no rows; nothing to read")
        return rows

    @cached_property
    def _images(self) -> pd.DataFrame:
        rows = name_metadata(self._raw, self._metadata, self.uri)
        require_columns(names_of(rows), [IMAGE_NUMBER], self.uri)
        for join in self._joins:
            rows = join.add_to(rows, self.uri)
        defaults = pd.DataFrame({PLATE: DEFAULT_PLATE, WELL: DEFAULT_WELL}, index=rows.index)
        defaults[SITE] = rows[IMAGE_NUMBER].astype("str")
        for name in names_of(defaults):
            missing = rows[name].isna() if name in rows else pd.Series(True, index=rows.index)
            if missing.all():
                rows[name] = defaults[name]
            elif missing.any():
                number = rows.loc[missing, IMAGE_NUMBER].iloc[0]
                raise TableError(
                    f"{self.uri}: {int(missing.sum())} of {len(rows)} image sets have no {name}, "
                    f"first ImageNumber {number}; fill it in or leave those images out"
                )
        key = [PLATE, WELL, SITE, IMAGE_NUMBER]
        doubled = rows.duplicated(key)
        if doubled.any():
            raise TableError(
                f"{self.uri}: {int(doubled.sum())} image sets occur more than once, first "
                f"{rows.loc[doubled, key].iloc[0].to_dict()}; give every run its own plate name "
                "or leave the copies out"
            )
        return rows[
            _metadata_order(rows) + [name for name in names_of(rows) if FILE_COLUMN.match(name)]
        ]

    def joined(self, extra: MetadataFile) -> Self:
        """Return the same table with the columns of one more metadata file."""
        return type(self)(self._reader, self._metadata, (*self._joins, extra))

    def images(self) -> pd.DataFrame:
        """Return one row per image set.

        Returns
        -------
        ``Metadata_Plate``, ``_Well``, ``_Site`` (text), ``Metadata_ImageNumber`` (int64), further
        ``Metadata_*``, and ``FileName_*``, ``PathName_*``, ``URL_*`` per channel as the table
        has them.

        Raises
        ------
        ColumnError
            If a column is missing, doubled, or of the wrong type.
        TableError
            If there are no rows, some lack a plate, well or site, or an image set occurs twice.
        """
        return self._images.copy()

    def read(self, plate: str | None = None) -> pd.DataFrame:
        """Return the cells of one plate, or of all.

        Returns
        -------
        One row per cell: the five identity columns, compound, concentration and MOA where known,
        further ``Metadata_*``, then the measurements as float32 under CellProfiler's names.
        ``attrs["account"]`` is a dict: ``objects`` and ``cells`` (rows), ``without_…`` (left out
        for want of a compartment), ``nan_values``, ``infinite_values`` (turned to NaN) and
        ``infinite_columns`` (name → count).

        Raises
        ------
        ColumnError
            If a column is missing, doubled, or a measurement holds something that is no number.
        TableError
            If there is no such plate, it has no cells, a cell occurs twice, or parts of the table
            do not belong together. Names file and row.
        """
        images = self._images
        if plate is not None:
            images = images[images[PLATE] == plate]
            if images.empty:
                raise TableError(
                    f"{self.uri}: no plate {plate!r}{nearest(plate, self.plates)}; it has "
                    f"{', '.join(self.plates[:8])}"
                )
        cells, account = self._reader.cells(self._raw.loc[images.index])
        where = self.uri if plate is None else f"{self.uri} plate {plate}"
        if cells.empty:
            raise TableError(f"{where}: {len(images)} image sets, but not one complete cell")
        metadata = images.loc[cells[IMAGE_ROW].astype("int64"), _metadata_order(images)]
        metadata = metadata.reset_index(drop=True)
        metadata.insert(len(IDENTITY) - 1, OBJECT_NUMBER, cells[OBJECT_NUMBER].astype("int64"))
        doubled = metadata.duplicated(list(IDENTITY))
        if doubled.any():
            first = metadata.loc[doubled, list(IDENTITY)].iloc[0].to_dict()
            raise TableError(
                f"{where}: {int(doubled.sum())} cells occur more than once, first {first}; "
                "was one export appended to another?"
            )
        features = cells.drop(columns=[IMAGE_ROW, OBJECT_NUMBER])
        numbers, counts = _to_float32(features, metadata, where)
        frame = pd.concat([metadata, numbers], axis=1)
        frame.attrs["account"] = {**account, "cells": len(frame), **counts}
        return frame


def join_metadata(
    table: Table, uri: str, on: Sequence[str], metadata: Mapping[str, str] | None = None
) -> Table:
    """Return the table with the columns of a second file added to its image sets.

    Such as a plate map, or compound → mechanism of action; see `MetadataFile` for the format and
    the errors, which are raised here or when the image sets are first listed.

    Parameters
    ----------
    table
        Table to extend.
    uri
        CSV file.
    on
        Canonical names both share, such as ``["Metadata_Plate", "Metadata_Well"]``.
    metadata
        Canonical name → the file's name, as in `open_table`.
    """
    return table.joined(MetadataFile(uri, on, metadata))


def open_table(
    uri: str,
    *,
    format: Format = "auto",  # noqa: A002
    metadata: Mapping[str, str] | None = None,
    compartments: Sequence[str] | None = None,
) -> Table:
    """Open a feature table; only names are read.

    Parameters
    ----------
    uri
        Folder of ExportToSpreadsheet (or with such folders below it), SQLite file of
        ExportToDatabase, Parquet file or folder, or CSV file with one row per cell.
    format
        ``spreadsheet``, ``database``, ``cells`` (one row per cell), or found out by name.
    metadata
        Canonical name → the table's name, such as
        ``{"Metadata_Plate": "Image_Metadata_Barcode_2"}``; usual variants are found without it.
    compartments
        Objects to join to one row, the nuclei first; by default those of Nuclei, Cells and
        Cytoplasm that there are. Not for format ``cells``.

    Raises
    ------
    StorageError
        If there is nothing at ``uri``.
    ColumnError, TableError
        If it is no such table; says what was found.
    """
    kind = _find_format(uri) if format == "auto" else format
    reader: Reader
    if kind == "spreadsheet":
        reader = SpreadsheetReader(uri, compartments)
    elif kind == "database":
        reader = DatabaseReader(uri, compartments)
    else:
        reader = CellFileReader(uri, dict(metadata or {}))
    return Table(reader, metadata)


def _find_format(uri: str) -> Format:
    if uri.endswith((".sqlite", ".sqlite3", ".db")):
        return "database"
    if uri.endswith((".csv", ".csv.gz", ".parquet", ".pq")):
        return "cells"
    if is_file(uri):
        start = read_start(uri, TableError)
        known: dict[bytes, Format] = {b"SQLite": "database", b"PAR1": "cells"}
        for magic, kind in known.items():
            if start.startswith(magic):
                return kind
        raise TableError(
            f"{uri}: found a file that starts with {start[:8]!r}; expected a table: SQLite, "
            "Parquet, CSV (.csv, .csv.gz) or a folder of ExportToSpreadsheet"
        )
    files = storage.list_files(uri)
    if find_image_tables(files):
        return "spreadsheet"
    if any(file.endswith(".parquet") for file in files):
        return "cells"
    if not files:
        raise StorageError(f"{uri}: nothing there; check the path, the bucket and its region")
    names = ", ".join(storage.name_of(file) for file in files[:6])
    raise TableError(
        f"{uri}: found {names}; expected a folder with Image.csv or Parquet files, or a file "
        "named .sqlite, .db, .parquet, .csv or .csv.gz"
    )


def _metadata_order(rows: pd.DataFrame) -> list[str]:
    first = [name for name in (*IDENTITY, COMPOUND, CONCENTRATION, MOA) if name in rows]
    return first + [
        name for name in names_of(rows) if name.startswith(METADATA) and name not in first
    ]


def _to_float32(
    features: pd.DataFrame, metadata: pd.DataFrame, where: str
) -> tuple[pd.DataFrame, dict[str, Any]]:
    columns, infinite, missing = {}, {}, 0
    for name in names_of(features):
        values = features[name]
        numbers = pd.to_numeric(values, errors="coerce").to_numpy(np.float64, na_value=np.nan)
        wrong = np.isnan(numbers) & values.notna().to_numpy()
        if not pd.api.types.is_numeric_dtype(values.dtype) and wrong.any():
            row = int(wrong.argmax())
            cell = metadata.iloc[row]
            raise ColumnError(
                f"{where}: column {name!r}, ImageNumber {cell[IMAGE_NUMBER]}, ObjectNumber "
                f"{cell[OBJECT_NUMBER]}: found {values.iloc[row]!r}, expected a number; correct "
                f"the value or leave the column out ({int(wrong.sum())} such cells)"
            )
        with np.errstate(over="ignore"):
            numbers = numbers.astype(np.float32)
        unbounded = np.isinf(numbers)
        if unbounded.any():
            infinite[name] = int(unbounded.sum())
            numbers[unbounded] = np.nan
        missing += int(np.isnan(numbers).sum())
        columns[name] = numbers
    counts = {
        "nan_values": missing - sum(infinite.values()),
        "infinite_values": sum(infinite.values()),
        "infinite_columns": infinite,
    }
    return pd.DataFrame(columns), counts


def nucleus_centers(frame: pd.DataFrame, compartment: str = "Nuclei") -> NDArray[np.float64]:
    """Return where the nuclei lie: (y, x) in pixels from 0 at the top left, shape (N, 2).

    From ``{compartment}_Location_Center_*`` or ``{compartment}_AreaShape_Center_*``; NaN where
    the table has none.

    Raises
    ------
    ColumnError
        If the table has neither pair of columns.
    """
    for position in _POSITIONS:
        pair = [f"{compartment}_{position}_{axis}" for axis in "YX"]
        if all(name in frame for name in pair):
            return frame[pair].to_numpy(np.float64)
    wanted = f"{compartment}_{_POSITIONS[0]}_X"
    raise ColumnError(
        f"no column {wanted!r} or {compartment}_{_POSITIONS[1]}_X with its Y"
        f"{nearest(wanted, names_of(frame))}; patches need the nucleus centre: add "
        "MeasureObjectSizeShape of the nuclei to the pipeline, or name their compartment"
    )
