"""Metadata that stand in a file of their own: plate maps, compound lists. Floor 1: pandas."""

from collections.abc import Mapping, Sequence

import pandas as pd

from cp2image.columns import CONCENTRATION, IMAGE_NUMBER, METADATA, require_columns
from cp2image.data.csv_rows import CsvFile
from cp2image.data.naming import FILE_COLUMN, TABLE_NUMBER, name_metadata, names_of, to_text
from cp2image.errors import ColumnError, TableError


class MetadataFile:
    """Columns of a CSV file that are added to image sets with the same key.

    Columns get the prefix ``Metadata_`` where they lack it; image numbers, file and path names
    are left out unless they are in the key. Identical rows count once.

    Parameters
    ----------
    uri
        CSV or CSV.gz with a header.
    on
        Canonical names of the key, such as ``["Metadata_Plate", "Metadata_Well"]``.
    metadata
        Canonical name → the file's name, where the usual variants do not find it.

    Raises
    ------
    ColumnError
        If a column is missing or doubled.
    TableError
        If one key has two different rows, or the file is unreadable.
    """

    def __init__(
        self, uri: str, on: Sequence[str], metadata: Mapping[str, str] | None = None
    ) -> None:
        self.uri, self.on = uri, list(on)
        source = CsvFile(uri)
        require_columns(source.header, [], uri)
        raw = source.read(texts=source.header)
        rename = {
            name: METADATA + name
            for name in source.header
            if not name.startswith((METADATA, "Image_"))
            and not FILE_COLUMN.match(name)
            and METADATA + name not in raw
        }
        chosen = {target: rename.get(name, name) for target, name in (metadata or {}).items()}
        rows = name_metadata(raw.rename(columns=rename), chosen, uri)
        names = names_of(rows)
        require_columns(names, self.on, uri)
        of_images = [
            name
            for name in names
            if name in (IMAGE_NUMBER, TABLE_NUMBER) or FILE_COLUMN.match(name)
        ]
        rows = rows.drop(columns=[name for name in of_images if name not in self.on])
        rows = rows.drop_duplicates(ignore_index=True)
        doubled = rows.duplicated(self.on, keep=False)
        if doubled.any():
            key = rows.loc[doubled, self.on].iloc[0]
            pair = rows[(rows[self.on] == key).all(axis=1)]
            differing = [name for name in names_of(pair) if pair[name].nunique(dropna=False) > 1]
            raise TableError(
                f"{uri}: {key.to_dict()} has {len(pair)} different rows (they differ in "
                f"{', '.join(differing)}); join on more columns, or leave those out of the file"
            )
        self.rows = rows

    def add_to(self, images: pd.DataFrame, where: str) -> pd.DataFrame:
        """Return image sets with the file's columns; missing values where no key fits.

        Raises
        ------
        ColumnError
            If the image sets lack a column of the key, or have a column of the file already.
        TableError
            If not one image set finds a row.
        """
        require_columns(names_of(images), self.on, where)
        added = [name for name in names_of(self.rows) if name not in self.on]
        both = [name for name in added if name in images]
        if both:
            raise ColumnError(
                f"{self.uri}: column {both[0]!r} is in {where} too; join on it or take it out"
            )
        keys = images[self.on].copy()
        for name in self.on:
            if name not in (IMAGE_NUMBER, CONCENTRATION):
                keys[name] = to_text(keys[name])
        found = keys.merge(self.rows, on=self.on, how="left", indicator=True)
        if not (found["_merge"] == "both").any():
            raise TableError(
                f"{self.uri}: no image set of {where} finds a row by {self.on}: the table has "
                f"{keys.iloc[0].to_dict()}, the file {self.rows[self.on].iloc[0].to_dict()}; "
                "check spelling and columns"
            )
        return pd.concat([images, found[added].set_axis(images.index)], axis=1)
