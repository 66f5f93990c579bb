"""Read chosen columns and rows of a CSV file. Floor 1: pyarrow, pandas; no Ray, torch."""

import csv
import gzip
import io
import re
from collections.abc import Collection, Sequence

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv as arrow_csv

from cp2image.data.sources import read_source
from cp2image.errors import ColumnError, TableError

_GZIP_START = b"\x1f\x8b"
_BLOCK_BYTES = 16 << 20
_MISSING = ["", "nan", "NaN", "NAN", "-nan", "NA", "None", "NULL", "null"]
_ROW_ERROR = re.compile(r"CSV column #(\d+):(?: Row #(\d+):)?.*invalid value '(.*)'", re.DOTALL)


class CsvFile:
    """One CSV file, fetched whole; rows are parsed in blocks and filtered as they come.

    Attributes
    ----------
    uri
        Where it lies.
    header
        Names of its columns.

    Raises
    ------
    StorageError
        If the file is missing or cannot be read.
    TableError
        If it is empty, a Git LFS pointer, binary, or a damaged gzip file.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        content = read_source(uri, TableError)
        if content.startswith(_GZIP_START):
            try:
                content = gzip.decompress(content)
            except (EOFError, OSError) as error:
                raise TableError(
                    f"{uri}: found a damaged gzip file ({error}); copy it again"
                ) from error
        self._content = content
        try:
            first = content[: content.find(b"\n") + 1 or None].decode("utf-8-sig")
            self.header = next(csv.reader(io.StringIO(first)))
        except (UnicodeDecodeError, StopIteration, csv.Error) as error:
            raise TableError(
                f"{uri}: found no CSV header, the file starts with {content[:12]!r}; "
                "expected a table of text with one header line"
            ) from error

    def read(
        self,
        numbers: Sequence[str] = (),
        texts: Sequence[str] = (),
        where: tuple[str, Collection[int]] | None = None,
    ) -> pd.DataFrame:
        """Return some columns, all rows or those that belong to some images.

        Parameters
        ----------
        numbers
            Columns to read as float64; empty and ``nan`` become NaN.
        texts
            Columns to read as text; empty becomes missing.
        where
            A column of ``numbers`` and the whole numbers it must have for a row to be returned.

        Raises
        ------
        ColumnError
            If a column of numbers holds something else; names line and value.
        TableError
            If a row has too few or too many columns, as a truncated file has.
        """
        types = {name: pa.float64() for name in numbers} | {name: pa.string() for name in texts}
        wanted = None if where is None else pa.array(sorted(where[1]), pa.float64())
        batches = []
        try:
            reader = arrow_csv.open_csv(
                pa.BufferReader(self._content),
                read_options=arrow_csv.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES),
                parse_options=arrow_csv.ParseOptions(newlines_in_values=False),
                convert_options=arrow_csv.ConvertOptions(
                    include_columns=list(types),
                    column_types=types,
                    null_values=_MISSING,
                    strings_can_be_null=True,
                ),
            )
            for batch in reader:
                keep = None if where is None else pc.is_in(batch[where[0]], value_set=wanted)
                batches.append(batch if keep is None else batch.filter(keep))
            table = pa.Table.from_batches(batches, reader.schema)
        except pa.ArrowInvalid as error:
            raise self._explain(str(error)) from error
        frame: pd.DataFrame = table.to_pandas()
        return frame

    def _explain(self, message: str) -> Exception:
        found = _ROW_ERROR.search(message)
        if found is None:
            return TableError(
                f"{self.uri}: the rows cannot be read ({message[:300]}); "
                "is the file truncated or of another delimiter? Export or copy it again"
            )
        column, line, value = int(found[1]), found[2], found[3]
        place = f"line {line}" if line else "one line"
        return ColumnError(
            f"{self.uri}: {place}, column {self.header[column]!r}: found {value!r}, expected a "
            "number; correct the value or leave the column out of the table"
        )
