"""Published datasets of cells: ``cells/``, ``measured/``, ``screen/``. Floor: above storage, data.

A dataset is a folder of Parquet files, one hive partition per plate, that any tool can open, with
a manifest per plate under ``_manifests/``. A plate counts as there when its manifest is. Readers
take the files the manifests name and no others.
"""

import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from hashlib import sha256
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from cp2image.columns import METADATA, nearest
from cp2image.data.schema import PATCH, ROW_GROUP, PatchFormat
from cp2image.errors import DatasetError
from cp2image.storage import attempt, exists, filesystem, join, list_files, read_bytes

MANIFESTS = "_manifests"


@dataclass(frozen=True)
class Part:
    """One Parquet file of a plate: name within the dataset, rows, size in bytes."""

    name: str
    rows: int
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """What makes one plate published: its files and the account of its cells.

    Attributes
    ----------
    plate
        Its name.
    fingerprint
        Of the settings it was written with.
    parts
        Its files, in order; none if every cell was left out.
    account
        Cells ``in`` and ``out``, and one count per reason for leaving cells out.
    input
        `identity` of what it was made from; empty where that is not known.
    """

    plate: str
    fingerprint: str
    parts: tuple[Part, ...]
    account: dict[str, int] = field(default_factory=dict)
    input: str = ""

    @property
    def rows(self) -> int:
        """Cells of the plate."""
        return sum(part.rows for part in self.parts)

    @property
    def identity(self) -> str:
        """Short hash that tells this plate's content from what an earlier run published."""
        return sha256(self.to_json()).hexdigest()[:16]

    def to_json(self) -> bytes:
        """Serialise, ready to be stored."""
        return json.dumps({**asdict(self), "rows": self.rows}, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes, where: str = "manifest") -> "Manifest":
        """Read back what `to_json` wrote.

        Raises
        ------
        DatasetError
            If it is something else; names ``where``.
        """
        try:
            entry = json.loads(data)
            parts = tuple(Part(**part) for part in entry["parts"])
            known = (entry["plate"], entry["fingerprint"], parts, entry["account"])
            return cls(*known, entry.get("input", ""))
        except (ValueError, KeyError, TypeError) as error:
            raise DatasetError(
                f"{where}: not a plate's manifest ({type(error).__name__}: {error}); remove it and "
                "publish the plate again"
            ) from error


def plate_folder(plate: str) -> str:
    """Return the hive partition of a plate, with what a path cannot hold percent-encoded."""
    return f"plate={quote(plate, safe=' ')}"


def manifest_uri(dataset: str, plate: str) -> str:
    """Return where the manifest of one plate is."""
    return join(dataset, MANIFESTS, f"{quote(plate, safe=' ')}.json")


def read_manifests(uri: str) -> dict[str, Manifest]:
    """Return the published plates of a dataset by name; empty if there are none."""
    found = [
        Manifest.from_json(read_bytes(name), name)
        for name in list_files(join(uri, MANIFESTS), ".json", recursive=False)
    ]
    return {manifest.plate: manifest for manifest in found}


@dataclass(frozen=True)
class CellRange:
    """Consecutive cells of one published file: the unit of reading, work and retry."""

    plate: str
    index: int
    uri: str
    start: int
    rows: int


@dataclass(frozen=True)
class CellDataset:
    """A published dataset, opened for reading."""

    uri: str
    patch_format: PatchFormat
    schema: pa.Schema
    manifests: dict[str, Manifest]

    @property
    def features(self) -> list[str]:
        """Names of the measurements, in table order."""
        return [
            name for name in self.schema.names if name != PATCH and not name.startswith(METADATA)
        ]

    @property
    def metadata(self) -> list[str]:
        """Names of the ``Metadata_*`` columns."""
        return [name for name in self.schema.names if name.startswith(METADATA)]

    @property
    def rows(self) -> int:
        """Cells of all plates."""
        return sum(manifest.rows for manifest in self.manifests.values())

    def ranges(self, cells: int, plates: Sequence[str] | None = None) -> list[CellRange]:
        """Cut the plates into ranges of at most ``cells`` rows, numbered within each plate.

        Raises
        ------
        DatasetError
            If a plate that was asked for is not there.
        """
        for plate in plates or ():
            if plate not in self.manifests:
                raise DatasetError(
                    f"{self.uri}: no plate {plate!r}{nearest(plate, self.manifests)}; "
                    f"it has {len(self.manifests)}: {', '.join(sorted(self.manifests)[:8])}"
                )
        found = []
        for plate in sorted(set(plates or self.manifests)):
            index = 0
            for part in self.manifests[plate].parts:
                uri = join(self.uri, part.name)
                for start in range(0, part.rows, cells):
                    rows = min(cells, part.rows - start)
                    found.append(CellRange(plate, index, uri, start, rows))
                    index += 1
        return found

    def read(
        self, columns: Sequence[str] | None = None, plates: Sequence[str] | None = None
    ) -> Iterator[pa.Table]:
        """Yield the plates' cells file by file, a row group at a time."""
        for cells in self.ranges(ROW_GROUP, plates):
            yield read_range(cells, columns)


def open_dataset(uri: str) -> CellDataset:
    """Open a published dataset.

    Raises
    ------
    DatasetError
        If nothing is published there, or no cell.
    """
    manifests = read_manifests(uri)
    if not manifests:
        there = "the folder is there but no plate in it is finished"
        hint = there if exists(uri) else "no such folder"
        raise DatasetError(f"{uri}: not a dataset of cells ({hint}); run the step that writes it")
    filled = [manifest for manifest in manifests.values() if manifest.parts]
    if not filled:
        raise DatasetError(f"{uri}: every published plate is empty; see {uri}/_account.json")
    schema = read_schema(uri, filled[0])
    return CellDataset(uri, PatchFormat.of(schema, uri), schema, manifests)


def read_schema(uri: str, manifest: Manifest) -> pa.Schema:
    """Return the Arrow schema of one published plate that has cells."""
    name = join(uri, manifest.parts[0].name)
    return attempt(name, "read", lambda: _parquet(name).schema_arrow)


def columns_of(cells: CellRange) -> list[str]:
    """Return the names of the columns of the file a range of cells is in."""
    names: list[str] = attempt(cells.uri, "read", lambda: _parquet(cells.uri).schema_arrow.names)
    return names


def read_range(
    cells: CellRange, columns: Sequence[str] | None = None, *, threads: bool = True
) -> pa.Table:
    """Read a range of cells, only the named columns (None: all), as one Arrow table.

    ``threads``: decode columns side by side; where other ranges are read beside this one that
    only takes more CPU time.

    Raises
    ------
    DatasetError
        If the file is gone, damaged or shorter than its manifest says.
    StorageError
        If the store keeps failing.
    """
    return attempt(cells.uri, "read", lambda: _read_range(cells, columns, threads))


def _read_range(cells: CellRange, columns: Sequence[str] | None, threads: bool) -> pa.Table:
    file = _parquet(cells.uri)
    groups: list[int] = []
    first = seen = 0
    for number in range(file.metadata.num_row_groups):
        rows = file.metadata.row_group(number).num_rows
        if seen + rows > cells.start and seen < cells.start + cells.rows:
            if not groups:
                first = seen
            groups.append(number)
        seen += rows
    if seen < cells.start + cells.rows:
        raise DatasetError(
            f"{cells.uri}: {seen} rows, its manifest says at least {cells.start + cells.rows}; "
            "the file was changed after it was published"
        )
    names = None if columns is None else list(columns)
    table = file.read_row_groups(groups, columns=names, use_threads=threads)
    return table.slice(cells.start - first, cells.rows)


def _version(uri: str) -> tuple[Any, Any]:
    """Tell a file from another that was at the same place before."""
    files, path = filesystem(uri)
    info = files.get_file_info(path)
    if not info.is_file:
        raise DatasetError(f"{uri}: a published file is gone; publish the plate again")
    return info.size, info.mtime_ns


class _OpenFiles(threading.local):
    """The Parquet files a thread has open: pyarrow's readers are for one thread each."""

    def __init__(self) -> None:
        self.open = lru_cache(maxsize=2)(_open)


def _parquet(uri: str) -> pq.ParquetFile:
    return _open_files.open(uri, _version(uri))


def _open(uri: str, version: tuple[Any, Any]) -> pq.ParquetFile:
    files, path = filesystem(uri)
    try:  # pre_buffer joins the reads of neighbouring columns into few large ones
        return pq.ParquetFile(files.open_input_file(path), pre_buffer=True)
    except pa.ArrowInvalid as error:
        raise DatasetError(
            f"{uri}: damaged Parquet file ({error}); remove the plate's manifest and publish it "
            "again"
        ) from error


_open_files = _OpenFiles()
