"""Tables that CellProfiler's ExportToSpreadsheet writes: Image.csv and a CSV per compartment.

Floor 1: pandas, pyarrow; no Ray, torch.
"""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from cp2image import storage
from cp2image.columns import (
    IMAGE_NUMBER,
    OBJECT_NUMBER,
    nearest,
    parse_column,
    require_columns,
)
from cp2image.data.compartments import (
    IMAGE_ROW,
    STANDARD,
    join_compartments,
    refuse_other_counts,
)
from cp2image.data.csv_rows import CsvFile
from cp2image.errors import TableError

_IMAGE, _OBJECT = "ImageNumber", "ObjectNumber"
_SUFFIXES = (".csv", ".csv.gz")
_NO_OBJECTS = ("Experiment", "Image", "Object relationships")
_RUN = "run"


def find_image_tables(uris: Sequence[str]) -> dict[str, str]:
    """Return the URI of each ``Image.csv`` and its prefix, such as ``MyExpt_``."""
    found = {}
    for uri in uris:
        name = storage.name_of(uri)
        stem = name.removesuffix(".gz").removesuffix(".csv")
        if stem != name and (stem == "Image" or stem.endswith("_Image")):
            found[uri] = stem.removesuffix("Image")
    return found


class SpreadsheetReader:
    """Reads one or more ExportToSpreadsheet folders below ``uri``, one per CellProfiler run.

    Attributes
    ----------
    uri
        Folder with ``Image.csv``, or with one such folder per run below it.
    compartments
        Objects that are joined to one row; the first gives ``Metadata_ObjectNumber``.
    ignored
        Files of other objects and of the experiment, left out.
    """

    def __init__(self, uri: str, compartments: Sequence[str] | None = None) -> None:
        self.uri = uri
        files = storage.list_files(uri)
        self._runs: list[dict[str, str]] = []
        ignored: list[str] = []
        for image_uri, prefix in sorted(find_image_tables(files).items()):
            folder = image_uri.rsplit("/", 1)[0]
            objects = {
                stem: file
                for file in files
                if file.rsplit("/", 1)[0] == folder and (stem := _stem(file, prefix))
            }
            chosen = self._choose(folder, objects, compartments)
            self._runs.append({"Image": image_uri} | {name: objects[name] for name in chosen})
            ignored += [file for name, file in objects.items() if name not in ("Image", *chosen)]
        self.compartments = tuple(name for name in self._runs[0] if name != "Image")
        for run in self._runs[1:]:
            if tuple(run)[1:] != self.compartments:
                raise TableError(
                    f"{run['Image']}: found compartments {list(run)[1:]}, the first run has "
                    f"{list(self.compartments)}; give only runs of one pipeline"
                )
        self.ignored = tuple(ignored)

    @staticmethod
    def _choose(
        folder: str, objects: dict[str, str], compartments: Sequence[str] | None
    ) -> list[str]:
        there = [name for name in objects if name not in _NO_OBJECTS]
        chosen = list(compartments or [name for name in STANDARD if name in objects])
        missing = [name for name in chosen if name not in there]
        if missing or not chosen:
            wanted = missing[0] if missing else " or ".join(STANDARD)
            raise TableError(
                f"{folder}: no table of {wanted}{nearest(wanted, there)}; it has "
                f"{', '.join(there) or 'none'}. Name the compartments in the config, nuclei first"
            )
        return chosen

    def images(self) -> pd.DataFrame:
        """Return the rows of all ``Image.csv``, as text, with the number of their run."""
        frames = []
        for number, run in enumerate(self._runs):
            table = CsvFile(run["Image"])
            require_columns(table.header, [_IMAGE], run["Image"])
            frames.append(table.read(texts=table.header).assign(**{_RUN: number}))
            if len(self._runs) > 1:
                folder = run["Image"][len(self.uri) :].strip("/").rsplit("/", 1)[0]
                frames[-1]["TableNumber"] = folder
        return pd.concat(frames, ignore_index=True)

    def cells(self, images: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, Any]]:
        """Return the joined cells of some rows of `images`, and what was left out.

        Raises
        ------
        ColumnError
            If a column is missing or doubled, or a measurement is no number.
        TableError
            If the files do not belong together; names file and row.
        """
        parts: list[pd.DataFrame] = []
        account: dict[str, Any] = {}
        for number, rows in images.groupby(_RUN, sort=True):
            run = self._runs[int(str(number))]
            frames = {name: self._objects(run, name, rows) for name in self.compartments}
            cells, counts = join_compartments(frames, run["Image"].rsplit("/", 1)[0])
            parts.append(cells)
            account = {key: account.get(key, 0) + count for key, count in counts.items()}
        return pd.concat(parts, ignore_index=True), account

    def _objects(self, run: dict[str, str], name: str, images: pd.DataFrame) -> pd.DataFrame:
        uri = run[name]
        table = CsvFile(uri)
        require_columns(table.header, [_IMAGE, _OBJECT], uri)
        measured = [column for column in table.header if parse_column(f"{name}_{column}")]
        parents = [column for column in table.header if column.startswith("Parent_")]
        if not measured:
            raise TableError(
                f"{uri}: none of its {len(table.header)} columns is a measurement, such as "
                "AreaShape_Area; expected one CSV per compartment as ExportToSpreadsheet writes it"
            )
        self._refuse_unknown_images(run, table)
        row_of = pd.Series(images.index, index=images[_IMAGE].astype("float64"))
        frame = table.read([_IMAGE, _OBJECT, *parents, *measured], where=(_IMAGE, row_of.index))
        frame = frame.rename(columns={column: f"{name}_{column}" for column in parents + measured})
        frame = frame.rename(columns={_IMAGE: IMAGE_NUMBER, _OBJECT: OBJECT_NUMBER})
        frame[IMAGE_ROW] = frame[IMAGE_NUMBER].map(row_of)
        refuse_other_counts(frame[IMAGE_ROW], images, name, uri)
        return frame

    def _refuse_unknown_images(self, run: dict[str, str], table: CsvFile) -> None:
        known = CsvFile(run["Image"]).read([_IMAGE])[_IMAGE]
        cells = table.read([_IMAGE, _OBJECT])
        blank = cells.isna().any(axis=1)
        unknown = ~cells[_IMAGE].isin(known) | blank
        if unknown.any():
            line = int(unknown.to_numpy().argmax())
            raise TableError(
                f"{table.uri}: line {line + 2} has ImageNumber {cells[_IMAGE].iloc[line]:g}, "
                f"ObjectNumber {cells[_OBJECT].iloc[line]:g}, which {run['Image']} does not list "
                f"({int(unknown.sum())} such rows); the files are of different runs. "
                "Export them together again"
            )


def _stem(uri: str, prefix: str) -> str:
    name = storage.name_of(uri)
    for suffix in _SUFFIXES:
        if name.endswith(suffix) and name.startswith(prefix):
            return name[len(prefix) : -len(suffix)]
    return ""
