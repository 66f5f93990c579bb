"""SQLite files of CellProfiler's ExportToDatabase and of cytominer-database.

Floor 1: pandas, sqlite3; no Ray, torch. Files are opened read-only; a remote one is first copied
to this machine, once per process.
"""

import re
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd
from pyarrow import fs as arrow_fs

from cp2image import storage
from cp2image.columns import IMAGE_NUMBER, OBJECT_NUMBER, nearest, parse_column, require_columns
from cp2image.data.compartments import (
    IMAGE_ROW,
    STANDARD,
    join_compartments,
    refuse_other_counts,
)
from cp2image.data.sources import read_source, read_start
from cp2image.errors import TableError

_IMAGE, _OBJECT, _TABLE = "ImageNumber", "ObjectNumber", "TableNumber"
_CHUNK = 30_000
_SQLITE_START = b"SQLite format 3\0"


class DatabaseReader:
    """Reads ``Per_Image`` and ``Per_Object`` (or one table per compartment) of a SQLite file.

    Table names may carry a prefix (``MyExpt_Per_Object``, ``supplement_Object``) or be
    cytominer-database's plain ``Image``, ``Cells``, ``Cytoplasm``, ``Nuclei``.

    Attributes
    ----------
    uri
        The file.
    compartments
        Objects that are joined to one row; the first gives ``Metadata_ObjectNumber``.
    ignored
        Tables left out.
    """

    def __init__(self, uri: str, compartments: Sequence[str] | None = None) -> None:
        self.uri = uri
        if read_start(uri, TableError)[:16] != _SQLITE_START:
            raise TableError(f"{uri}: found no SQLite file; expected ExportToDatabase's output")
        tables = self._tables()
        self._image = self._pick(tables, "Image")
        prefix = self._image.removesuffix("Per_Image").removesuffix("Image")
        combined = {f"{prefix}Per_Object".lower(), f"{prefix}Object".lower()}
        single = next((name for name in tables if name.lower() in combined), None)
        objects = self._objects_in(tables, prefix, single)
        chosen = list(compartments or [name for name in STANDARD if name in objects])
        missing = [name for name in chosen if name not in objects]
        if missing or not chosen:
            wanted = missing[0] if missing else " or ".join(STANDARD)
            raise TableError(
                f"{uri}: no measurements of {wanted}{nearest(wanted, objects)}; it has "
                f"{sorted(objects) or 'none'}. Name the compartments in the config, nuclei first"
            )
        self._source = {name: objects[name] for name in chosen}
        self.compartments = tuple(chosen)
        used = {self._image, *self._source.values()}
        self.ignored = tuple(name for name in tables if name not in used)
        self._columns = {name: self._columns_of(name) for name in used}
        require_columns(self._columns[self._image], [_IMAGE], f"{uri} table {self._image}")

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            path = quote(_local_path(self.uri))
            with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
                yield connection
        except sqlite3.Error as error:
            raise TableError(
                f"{self.uri}: the SQLite file cannot be read ({error}); is it truncated or still "
                "being written? Copy it again"
            ) from error

    def _tables(self) -> list[str]:
        with self._open() as connection:
            rows = connection.execute(
                "SELECT name FROM sqlite_master WHERE type IN ('table', 'view') ORDER BY name"
            ).fetchall()
        return [str(name) for (name,) in rows if not name.startswith("sqlite_")]

    def _pick(self, tables: list[str], kind: str) -> str:
        found = [name for name in tables if re.search(rf"(^|_)(Per_)?{kind}$", name)]
        if len(found) != 1:
            raise TableError(
                f"{self.uri}: found {len(found)} tables of images {found} among {tables}; expected "
                "exactly one, such as MyExpt_Per_Image"
            )
        return found[0]

    def _columns_of(self, table: str) -> list[str]:
        with self._open() as connection:
            rows = connection.execute(f"PRAGMA table_info({_quote(table)})").fetchall()
        return [str(row[1]) for row in rows]

    def _objects_in(self, tables: list[str], prefix: str, single: str | None) -> dict[str, str]:
        if single is not None:
            parsed = [parse_column(name) for name in self._columns_of(single)]
            return {column.compartment: single for column in parsed if column is not None}
        objects = {}
        for table in tables:
            name = table.removeprefix(prefix).removeprefix("Per_")
            columns = self._columns_of(table)
            if name != "Image" and any(
                (column := parse_column(text)) and column.compartment == name for text in columns
            ):
                objects[name] = table
        return objects

    def images(self) -> pd.DataFrame:
        """Return the rows of the image table."""
        with self._open() as connection:
            return pd.read_sql_query(f"SELECT * FROM {_quote(self._image)}", connection)

    def cells(self, images: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, Any]]:
        """Return the joined cells of some rows of `images`, and what was left out.

        Raises
        ------
        ColumnError
            If a column is missing.
        TableError
            If the tables do not belong together; names table and row.
        """
        frames = {name: self._objects(name, images) for name in self.compartments}
        return join_compartments(frames, self.uri)

    def _objects(self, name: str, images: pd.DataFrame) -> pd.DataFrame:
        table = self._source[name]
        where = f"{self.uri} table {table}"
        columns = self._columns[table]
        keys = [_IMAGE, _TABLE] if _TABLE in columns and _TABLE in images else [_IMAGE]
        numbers = (f"{name}_Number_Object_Number", f"{name}_{_OBJECT}", _OBJECT)
        number = next((text for text in numbers if text in columns), _OBJECT)
        require_columns(columns, [*keys, number], where)
        measured = [
            text
            for text in columns
            if (column := parse_column(text)) is not None and column.compartment == name
        ]
        parents = [text for text in columns if text.startswith(f"{name}_Parent_")]
        self._refuse_unknown_images(table, keys)
        frame = self._select([*keys, number, *parents, *measured], table, images[_IMAGE])
        frame = frame[frame[number].notna()]
        rows = images[keys].assign(**{IMAGE_ROW: images.index})
        frame = frame.merge(rows, on=keys, how="inner")
        refuse_other_counts(frame[IMAGE_ROW], images, name, where)
        return frame.rename(columns={_IMAGE: IMAGE_NUMBER, number: OBJECT_NUMBER})

    def _select(self, columns: list[str], table: str, images: "pd.Series[int]") -> pd.DataFrame:
        wanted = [int(number) for number in images.unique()]
        listed = ", ".join(map(_quote, columns))
        parts = []
        with self._open() as connection:
            for start in range(0, len(wanted), _CHUNK):
                some = wanted[start : start + _CHUNK]
                marks = ", ".join("?" * len(some))
                query = f"SELECT {listed} FROM {_quote(table)} WHERE {_IMAGE} IN ({marks})"
                parts.append(pd.read_sql_query(query, connection, params=some))
        return pd.concat(parts, ignore_index=True)

    def _refuse_unknown_images(self, table: str, keys: list[str]) -> None:
        same = " AND ".join(f"i.{key} = o.{key}" for key in keys)
        query = (
            f"SELECT o.{_IMAGE} FROM (SELECT DISTINCT {', '.join(keys)} FROM {_quote(table)}) o "
            f"WHERE NOT EXISTS (SELECT 1 FROM {_quote(self._image)} i WHERE {same}) LIMIT 1"
        )
        with self._open() as connection:
            found = connection.execute(query).fetchone()
        if found is not None:
            raise TableError(
                f"{self.uri}: table {table} has cells of ImageNumber {found[0]}, which table "
                f"{self._image} does not list; the tables are of different runs. Export them again"
            )


def _quote(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _local_path(uri: str) -> str:
    files, path = storage.filesystem(uri)
    if isinstance(files, arrow_fs.LocalFileSystem):
        return path
    info = files.get_file_info(path)
    return str(Path(_fetch(uri, info.size, info.mtime_ns).name, "table.sqlite"))


@lru_cache(maxsize=1)
def _fetch(uri: str, size: int, mtime_ns: int) -> "tempfile.TemporaryDirectory[str]":
    folder = tempfile.TemporaryDirectory(prefix="cp2image-")
    Path(folder.name, "table.sqlite").write_bytes(read_source(uri, TableError))
    return folder
