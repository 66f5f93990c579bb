"""Give metadata columns their one name and type. Floor 1: pandas; no Ray, torch.

CellProfiler, CytoTable, pycytominer and users' own files write the same thing as
``Metadata_Plate``, ``Image_Metadata_Plate``, ``Image_Metadata_Plate_DAPI`` or ``plate``.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from cp2image.columns import (
    COMPOUND,
    CONCENTRATION,
    IMAGE_NUMBER,
    METADATA,
    MOA,
    PLATE,
    SITE,
    WELL,
    nearest,
)
from cp2image.errors import ColumnError

TABLE_NUMBER = "Metadata_TableNumber"
FILE_COLUMN = re.compile(r"^(FileName|PathName|URL)_(?P<channel>.+)$")
_VARIANTS = {
    PLATE: ("plate", "plateid", "platename", "barcode", "platebarcode", "assayplatebarcode"),
    WELL: ("well", "wellid", "wellname", "wellposition"),
    SITE: ("site", "siteid", "field", "fieldid", "fieldofview", "fov"),
    COMPOUND: ("compound", "compoundname"),
    CONCENTRATION: ("concentration", "compoundconcentration", "conc"),
    MOA: ("moa", "mechanismofaction"),
    IMAGE_NUMBER: ("imagenumber",),
    TABLE_NUMBER: ("tablenumber",),
}


def names_of(frame: pd.DataFrame) -> list[str]:
    """Return the column names of a frame, which pandas types as anything."""
    return [str(name) for name in frame.columns]


def canonical_names(
    names: Iterable[str], given: Mapping[str, str] | None = None, where: str = "table"
) -> dict[str, str]:
    """Return the new name of every metadata and file column among ``names``.

    Parameters
    ----------
    names
        Columns as the file has them.
    given
        Explicit choices, from the canonical name to the file's: they come first.
    where
        Named in errors.

    Raises
    ------
    ColumnError
        If a given column is not there.

    Examples
    --------
    >>> canonical_names(["Image_Metadata_Plate_DAPI", "Image_FileName_DAPI", "Metadata_Dose"])
    ... # doctest: +NORMALIZE_WHITESPACE
    {'Image_Metadata_Plate_DAPI': 'Metadata_Plate', 'Image_FileName_DAPI': 'FileName_DAPI',
     'Metadata_Dose': 'Metadata_Dose'}
    """
    names = list(names)
    given = given or {}
    plain = {name: name.removeprefix("Image_") for name in names}
    channels = {match["channel"] for short in plain.values() if (match := FILE_COLUMN.match(short))}
    chosen: dict[str, str] = {}
    for target, source in given.items():
        if source not in plain:
            raise ColumnError(
                f"{where}: no column {source!r} for {target!r}{nearest(source, names)}; "
                "correct the mapping of metadata columns"
            )
        chosen[source] = target
    for target, variants in _VARIANTS.items():
        if target in given:
            continue
        ranked = [
            (rank, position, name)
            for position, name in enumerate(names)
            if name not in chosen and (rank := _rank(plain[name], target, variants, channels)) >= 0
        ]
        if ranked:
            chosen[min(ranked)[2]] = target
    taken = set(chosen.values())
    for name, short in plain.items():
        is_file = FILE_COLUMN.match(short) is not None
        if name not in chosen and (short.startswith(METADATA) or is_file) and short not in taken:
            chosen[name] = short
            taken.add(short)
    return {name: chosen[name] for name in names if name in chosen}


def _rank(short: str, target: str, variants: tuple[str, ...], channels: set[str]) -> int:
    if short == target:
        return 0
    short = short.removeprefix(METADATA)
    stems = [short] + [
        short.removesuffix(f"_{channel}") for channel in channels if short.endswith(f"_{channel}")
    ]
    for extra, stem in enumerate(stems):
        folded = stem.replace("_", "").lower()
        if folded in variants:
            return 1 + variants.index(folded) + len(variants) * min(extra, 1)
    return -1


def to_text(values: "pd.Series[Any]") -> "pd.Series[str]":
    """Return values as stripped text: 3.0 as ``3``; empty and missing as missing."""
    if pd.api.types.is_float_dtype(values.dtype) and (values.dropna() % 1 == 0).all():
        values = values.astype("Int64")
    text = values.astype("str").str.strip()
    return text.mask(values.isna() | (text == "") | (text == "<NA>"))


def to_number(values: "pd.Series[Any]", name: str, where: str) -> "pd.Series[float]":
    """Return values as float64, missing as NaN.

    Raises
    ------
    ColumnError
        If a value is no number; names the first.
    """
    text = values.astype("str").str.strip()
    numbers = pd.to_numeric(values.mask(text == ""), errors="coerce").astype("float64")
    wrong = numbers.isna() & values.notna() & ~text.isin(("", "nan", "NaN", "None", "<NA>"))
    if wrong.any():
        row = int(wrong.to_numpy().argmax())
        raise ColumnError(
            f"{where}: row {row + 1}, column {name!r}: found {values.iloc[row]!r}, expected a "
            "number; correct it, or map another column to this name"
        )
    return numbers


def name_metadata(frame: pd.DataFrame, given: Mapping[str, str] | None, where: str) -> pd.DataFrame:
    """Return the metadata and file columns of a frame, with canonical names and types.

    Plate, well, site, table number, compound, MOA and text columns become text (never a number, so
    ``007`` stays), ``Metadata_Concentration`` float64, ``Metadata_ImageNumber`` int64.

    Raises
    ------
    ColumnError
        If a given column is missing, or an image number or concentration is no number.
    """
    names = canonical_names(names_of(frame), given, where)
    named = frame[list(names)].rename(columns=names)
    for name in names_of(named):
        if name == CONCENTRATION:
            named[name] = to_number(named[name], name, where)
        elif name == IMAGE_NUMBER:
            numbers = to_number(named[name], name, where)
            if numbers.isna().any() or (numbers % 1 != 0).any():
                row = int((numbers.isna() | (numbers % 1 != 0)).to_numpy().argmax())
                raise ColumnError(
                    f"{where}: row {row + 1}, column {name!r}: found {named[name].iloc[row]!r}, "
                    "expected a whole number"
                )
            named[name] = numbers.astype("int64")
        elif name in _VARIANTS or not pd.api.types.is_numeric_dtype(named[name].dtype):
            named[name] = to_text(named[name])
    return named
