"""Tables on their way to the workers: a Parquet file per plate, in units. Floor: beside dataset.

A CSV or SQLite table is parsed once, plate by plate, and laid down beside the output; workers then
read only their own rows. The files go when the job ends.
"""

from collections.abc import Sequence

import pandas as pd
import pyarrow as pa

from cp2image.data.schema import ROW_GROUP, to_parquet
from cp2image.dataset import CellRange, plate_folder
from cp2image.storage import join, write_bytes

STAGING = "_staging"


def stage_plate(
    folder: str, plate: str, cells: pd.DataFrame, size: int, together: Sequence[str] = ()
) -> list[CellRange]:
    """Store one plate's rows and cut them into units.

    Parameters
    ----------
    folder
        Where the file goes, a URI.
    plate
        Name of the plate.
    cells
        One row per cell.
    size
        Cells per unit, about.
    together
        Columns whose equal values must stay in one unit (the fields of view, so that each is read
        once); rows are sorted by them.

    Returns
    -------
    list of CellRange
        Covering all rows, in order.
    """
    if together:
        cells = cells.sort_values(list(together), kind="stable", ignore_index=True)
    uri = join(folder, f"{plate_folder(plate)}.parquet")
    table = pa.Table.from_pandas(cells, preserve_index=False).replace_schema_metadata(None)
    write_bytes(uri, to_parquet(table, row_group=max(1, min(size, ROW_GROUP))))
    if together:
        groups = cells.groupby(list(together), sort=False, dropna=False).size().tolist()
    else:
        groups = [1] * len(cells)
    units: list[CellRange] = []
    start = rows = 0
    for number, count in enumerate(groups, start=1):
        rows += int(count)
        if rows >= size or number == len(groups):
            units.append(CellRange(plate, len(units), uri, start, rows))
            start, rows = start + rows, 0
    return units
