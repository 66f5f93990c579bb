"""Join CellProfiler's objects to one row per cell. Floor 1: numpy, pandas; no Ray, torch."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cp2image.columns import IMAGE_NUMBER, OBJECT_NUMBER, parse_column
from cp2image.errors import TableError

STANDARD = ("Nuclei", "Cells", "Cytoplasm")
IMAGE_ROW = "image_row"
"""Column that says to which row of the image table a cell belongs."""
_OBJECTS_PER_IMAGE = 1 << 32


def join_compartments(
    frames: Mapping[str, pd.DataFrame], where: str
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Put the measurements of all compartments of a cell in one row.

    An object is linked to the first compartment by its ``Parent_`` column, directly or through a
    compartment linked before; without one, by its object number, and then the numbers must match
    completely. A first object without partner in some compartment (filtered, for instance) is
    left out and counted, as is an object whose parent is 0.

    Parameters
    ----------
    frames
        Compartment → one row per object: `IMAGE_ROW`, ``Metadata_ImageNumber``,
        ``Metadata_ObjectNumber``, ``{compartment}_Parent_{other}`` and measurements.
    where
        Table the frames come from, for errors.

    Returns
    -------
    cells
        One row per complete cell: `IMAGE_ROW`, ``Metadata_ObjectNumber`` (of the first
        compartment) and all measurements.
    account
        ``objects``: rows of the first compartment; ``without_{compartment}``: those left out
        for want of a partner; ``{compartment}_without_parent``.

    Raises
    ------
    TableError
        If an object number or link occurs twice, a parent does not exist, or rows do not match.
    """
    base, *others = frames
    first = frames[base]
    keys = {name: _unique_keys(frame, name, where) for name, frame in frames.items()}
    to_base: dict[str, NDArray[np.int64]] = {base: np.arange(len(first))}
    partner: dict[str, NDArray[np.int64]] = {base: np.arange(len(first))}
    account: dict[str, Any] = {"objects": len(first)}
    for name in others:
        frame = frames[name]
        reverse = f"{base}_Parent_{name}"
        parents = [known for known in to_base if f"{name}_Parent_{known}" in frame]
        if reverse in first and not parents:
            partner[name] = keys[name].get_indexer(pd.Index(_keys(first, reverse)))
            continue
        if parents:
            parent = parents[0]
            link = f"{name}_Parent_{parent}"
            found = keys[parent].get_indexer(pd.Index(_keys(frame, link)))
            orphan = frame[link].fillna(0).to_numpy() == 0
            _refuse_dangling(frame, link, parent, (found < 0) & ~orphan, where)
            target = np.where(orphan, -1, to_base[parent][found])
            account[f"{name}_without_parent"] = int((target < 0).sum())
        else:
            target = keys[base].get_indexer(keys[name])
            _refuse_unmatched(frames, base, name, target, where)
        _refuse_shared(frame, base, name, target, where)
        to_base[name] = target
        partner[name] = np.full(len(first), -1)
        partner[name][target[target >= 0]] = np.flatnonzero(target >= 0)
    for name in others:
        account[f"without_{name}"] = int((partner[name] < 0).sum())
    complete = np.all([rows >= 0 for rows in partner.values()], axis=0)
    parts = [first.loc[complete, [IMAGE_ROW, OBJECT_NUMBER]].reset_index(drop=True)]
    for name, frame in frames.items():
        features = [column for column in frame if parse_column(str(column)) is not None]
        parts.append(frame[features].take(partner[name][complete]).reset_index(drop=True))
    return pd.concat(parts, axis=1), account


def refuse_other_counts(
    image_rows: "pd.Series[int]", images: pd.DataFrame, compartment: str, where: str
) -> None:
    """Check the number of objects of every image against CellProfiler's own count.

    Parameters
    ----------
    image_rows
        `IMAGE_ROW` of every object that was read.
    images
        Image sets that were read, with ``ImageNumber`` and, where the pipeline wrote it,
        ``Count_{compartment}`` (in databases ``Image_Count_{compartment}``).
    compartment
        Which objects.
    where
        Table the objects come from, for the message.

    Raises
    ------
    TableError
        If an image has more or fewer objects than its count says.
    """
    for count in (f"Count_{compartment}", f"Image_Count_{compartment}"):
        if count not in images:
            continue
        expected = pd.to_numeric(images[count], errors="coerce")
        found = image_rows.value_counts().reindex(images.index, fill_value=0)
        wrong = (expected.notna() & (expected != found)).to_numpy()
        if wrong.any():
            row = int(wrong.argmax())
            raise TableError(
                f"{where}: ImageNumber {images['ImageNumber'].iloc[row]} has {found.iloc[row]} "
                f"rows of {compartment}, but the image table counts {expected.iloc[row]:g} "
                f"({int(wrong.sum())} such images); one file is truncated or of another run. "
                "Export or copy it again"
            )


def _keys(frame: pd.DataFrame, column: str) -> NDArray[np.int64]:
    numbers = frame[column].fillna(0).to_numpy().astype(np.int64)
    keys: NDArray[np.int64] = frame[IMAGE_ROW].to_numpy(np.int64) * _OBJECTS_PER_IMAGE + numbers
    return keys


def _unique_keys(frame: pd.DataFrame, name: str, where: str) -> pd.Index:
    keys = pd.Index(_keys(frame, OBJECT_NUMBER))
    doubled = keys.duplicated()
    if doubled.any():
        raise TableError(
            f"{where}: {name}: {int(doubled.sum())} rows repeat {_say(frame, doubled)}; every "
            "object may occur once. Was one export appended to another?"
        )
    return keys


def _say(frame: pd.DataFrame, rows: NDArray[np.bool_]) -> str:
    row = frame.iloc[int(np.argmax(rows))]
    return f"ImageNumber {row[IMAGE_NUMBER]:.0f}, ObjectNumber {row[OBJECT_NUMBER]:.0f}"


def _refuse_dangling(
    frame: pd.DataFrame, link: str, parent: str, dangling: NDArray[np.bool_], where: str
) -> None:
    if dangling.any():
        value = frame[link].iloc[int(np.argmax(dangling))]
        raise TableError(
            f"{where}: {int(dangling.sum())} rows of {link} name an object that {parent} has not, "
            f"first {_say(frame, dangling)} ({link} {value:.0f}); the tables are of different "
            "runs or one is truncated. Export them together again"
        )


def _refuse_unmatched(
    frames: Mapping[str, pd.DataFrame], base: str, name: str, target: NDArray[np.int64], where: str
) -> None:
    unknown = target < 0
    missing = np.ones(len(frames[base]), dtype=bool)
    missing[target[~unknown]] = False
    if unknown.any() or missing.any():
        example = _say(frames[name], unknown) if unknown.any() else _say(frames[base], missing)
        raise TableError(
            f"{where}: {base} has {len(frames[base])} rows and {name} {len(target)}, and they do "
            f"not match (first: {example}); without a Parent_ column they must be the same "
            "objects. Export them together again, or leave one compartment out"
        )


def _refuse_shared(
    frame: pd.DataFrame, base: str, name: str, target: NDArray[np.int64], where: str
) -> None:
    linked = pd.Series(target)
    shared = (linked.duplicated() & (linked >= 0)).to_numpy()
    if shared.any():
        raise TableError(
            f"{where}: {int(shared.sum())} {name} share one of the {base} with another, first "
            f"{_say(frame, shared)}; one row per cell needs one to one. Leave {name} out of the "
            "compartments"
        )
