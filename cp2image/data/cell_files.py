"""Files that already hold one row per cell: Parquet of CytoTable, pycytominer or our own, or CSV.

Floor 1: pandas, pyarrow; no Ray, torch.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds

from cp2image import storage
from cp2image.columns import (
    IMAGE_NUMBER,
    METADATA,
    OBJECT_NUMBER,
    PLATE,
    SITE,
    WELL,
    parse_column,
    require_columns,
)
from cp2image.data.compartments import IMAGE_ROW
from cp2image.data.csv_rows import CsvFile
from cp2image.data.naming import TABLE_NUMBER, canonical_names
from cp2image.data.sources import is_file, read_start
from cp2image.errors import ColumnError, TableError

_T = TypeVar("_T")

_OBJECT_NUMBERS = (
    OBJECT_NUMBER,
    "ObjectNumber",
    *(
        f"{prefix}{name}_{suffix}"
        for name in ("Nuclei", "Cells", "Cytoplasm")
        for prefix in (METADATA, "")
        for suffix in ("Number_Object_Number", "ObjectNumber")
    ),
)
_PER_OBJECT = re.compile(
    r"Object_?Number|_Parent_|Children_|Location_|AreaShape_|[Cc]ell_?[Ii][Dd]"
)
_KEYS = (PLATE, WELL, SITE, IMAGE_NUMBER, TABLE_NUMBER)


class CellFileReader:
    """Reads a Parquet file or folder, or a CSV file, with one row per cell.

    Attributes
    ----------
    uri
        The file or folder; folders may be partitioned (``Metadata_Plate=P1/``).
    ignored
        Always empty.
    """

    def __init__(self, uri: str, metadata: dict[str, str] | None = None) -> None:
        self.uri = uri
        self.ignored: tuple[str, ...] = ()
        self._is_csv = uri.endswith((".csv", ".csv.gz"))
        columns = CsvFile(uri).header if self._is_csv else self._dataset().schema.names
        require_columns(columns, [], uri)
        names = canonical_names(columns, metadata, uri)
        self._keys = [raw for raw, name in names.items() if name in _KEYS]
        image = next((raw for raw, name in names.items() if name == IMAGE_NUMBER), None)
        number = next((name for name in _OBJECT_NUMBERS if name in columns), None)
        if image is None or number is None:
            missing = [IMAGE_NUMBER] * (image is None) + [OBJECT_NUMBER] * (number is None)
            require_columns(columns, missing, uri)
        self._image, self._number = str(image), str(number)
        self._per_image = [raw for raw in names if not _PER_OBJECT.search(raw)]
        self._features = _features(columns)
        if not self._features:
            raise ColumnError(
                f"{uri}: none of its {len(columns)} columns is a CellProfiler measurement, such as "
                "Nuclei_AreaShape_Area; expected one row per cell with a compartment in each name"
            )

    def _dataset(self) -> ds.Dataset:
        files, path = storage.filesystem(self.uri)
        parts = [self.uri] if is_file(self.uri) else storage.list_files(self.uri, ".parquet")
        for part in parts or [self.uri]:
            read_start(part, TableError)
        return self._attempt(
            lambda: ds.dataset(path, format="parquet", filesystem=files, partitioning="hive")
        )

    def _attempt(self, call: Callable[[], _T]) -> _T:
        """Call, again where a store may mend; tell a damaged file from a failing store."""

        def read() -> _T:
            try:
                return call()
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
                if isinstance(error, OSError) and "AWS Error" in str(error):
                    raise
                raise TableError(
                    f"{self.uri}: found no readable Parquet ({error}); the file is truncated or of "
                    "another format. Copy it again"
                ) from error

        return storage.attempt(self.uri, "read", read)

    def _read(self, columns: Sequence[str], images: pd.DataFrame | None) -> pd.DataFrame:
        if self._is_csv:
            texts = [name for name in columns if name in self._per_image and name != self._image]
            numbers = [name for name in columns if name not in texts]
            where = None if images is None else (self._image, set(images[self._image]))
            return CsvFile(self.uri).read(numbers, texts, where)[list(columns)]
        condition = None
        if images is not None:
            for key in self._keys:
                if images[key].notna().all():
                    part = ds.field(key).isin(pa.array(images[key].unique()))
                    condition = part if condition is None else condition & part
        dataset = self._dataset()
        table = self._attempt(lambda: dataset.to_table(columns=list(columns), filter=condition))
        frame: pd.DataFrame = table.to_pandas()
        return frame

    def images(self) -> pd.DataFrame:
        """Return one row per image set; columns that vary between its cells are left out.

        Raises
        ------
        TableError
            If the file has no rows.
        """
        rows = self._read(self._per_image, None).drop_duplicates(ignore_index=True)
        if rows.duplicated(self._keys).any():
            varying = rows.groupby(self._keys, dropna=False).nunique(dropna=False).max() > 1
            rows = rows.drop(columns=list(varying.index[varying])).drop_duplicates()
        return rows.reset_index(drop=True)

    def cells(self, images: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, Any]]:
        """Return the cells of some rows of `images`, and their number.

        Raises
        ------
        ColumnError
            If a cell has no number or, in a CSV file, a measurement is none.
        TableError
            If the file is unreadable.
        """
        wanted = [*self._keys, self._number, *self._features.values()]
        frame = self._read(list(dict.fromkeys(wanted)), images)
        rows = images[self._keys].assign(**{IMAGE_ROW: images.index})
        frame = frame.merge(rows, on=self._keys, how="inner")
        numbers = pd.to_numeric(frame[self._number], errors="coerce")
        if numbers.isna().any():
            row = int(numbers.isna().to_numpy().argmax())
            raise ColumnError(
                f"{self.uri}: a cell of {frame[self._keys].iloc[row].to_dict()} has "
                f"{self._number} {frame[self._number].iloc[row]!r}; expected a whole number"
            )
        features = frame[list(self._features.values())]
        features.columns = pd.Index(self._features)
        first = pd.DataFrame({IMAGE_ROW: frame[IMAGE_ROW], OBJECT_NUMBER: numbers.astype("int64")})
        return pd.concat([first, features], axis=1), {"objects": len(frame)}


def _features(columns: Sequence[str]) -> dict[str, str]:
    named = {name: name for name in columns if parse_column(name) is not None}
    for name in columns:
        short = name.removeprefix(METADATA)
        if short != name and short not in named and parse_column(short) is not None:
            named[short] = name
    return named
