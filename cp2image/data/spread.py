"""Robust spreads of features, and what stands in where they are unknown. Floor 1: numpy."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.floating]

_NORMAL = 1.4826
_NO_SPREAD = 1e-6


@dataclass(frozen=True)
class Spread:
    """Cells, and per feature: number of finite values, median, MAD · 1.4826 (NaN without any)."""

    cells: int
    count: NDArray[np.int64]
    median: NDArray[np.float64]
    mad: NDArray[np.float64]


def spread_of(values: Values) -> Spread:
    """Return the spread of each column of (n, p) values, of those that are finite."""
    finite = np.where(np.isfinite(values), values, np.nan).astype(np.float64)
    count = np.isfinite(finite).sum(axis=0)
    median = _median(finite, count)
    return Spread(len(values), count, median, _NORMAL * _median(np.abs(finite - median), count))


def _median(values: NDArray[np.float64], count: NDArray[np.int64]) -> NDArray[np.float64]:
    """Median of each column's ``count`` values that are not NaN; NaN where there are none."""
    if not len(values):
        return np.full(values.shape[1], np.nan)
    ordered = np.sort(values, axis=0)
    columns = np.arange(values.shape[1])
    below, above = np.maximum(count - 1, 0) // 2, np.minimum(count // 2, len(values) - 1)
    middle: NDArray[np.float64] = (ordered[below, columns] + ordered[above, columns]) / 2
    return middle


def plate_row(
    plate: str,
    spread: Spread,
    center: NDArray[np.float64],
    scale: NDArray[np.float64],
    min_controls: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64], list[str]]:
    """Take the plate's own centre and scale where they are sound, else the global ones."""
    known = spread.count >= min_controls
    spreads = known & _has_spread(spread.mad, spread.median)
    notes = []
    if not known.any():
        notes.append(
            f"plate {plate}: {spread.cells} control cells, fewer than {min_controls}: "
            "scaled by the global row"
        )
    return np.where(known, spread.median, center), np.where(spreads, spread.mad, scale), notes


def global_row(
    features: Sequence[str], sample: Values, cells: Values
) -> tuple[NDArray[np.float64], NDArray[np.float64], list[str]]:
    """Median and MAD; where that is 0 the deviation, of the sample or else of all cells, else 1."""
    spread = spread_of(sample)
    center = spread.median
    if not spread.count.all():
        center = np.nan_to_num(np.where(spread.count > 0, center, spread_of(cells).median))
    candidates = [spread.mad, _deviation(sample), _deviation(cells)]
    scale = np.ones(len(features))
    for candidate in reversed(candidates):
        scale = np.where(_has_spread(candidate, center), candidate, scale)
    flat = ~np.any([_has_spread(candidate, center) for candidate in candidates], axis=0)
    notes = [
        f"{name}: no spread in any training cell, scale 1"
        for name in np.array(features, dtype=object)[flat]
    ]
    return center, scale, notes


def _deviation(values: Values) -> NDArray[np.float64]:
    good = np.isfinite(values)
    count = np.maximum(good.sum(axis=0), 1)
    numbers = values.astype(np.float64)
    mean = np.where(good, numbers, 0).sum(axis=0) / count
    deviation: NDArray[np.float64] = np.sqrt(
        (np.where(good, numbers - mean, 0) ** 2).sum(axis=0) / count
    )
    return deviation


def _has_spread(spread: NDArray[np.float64], center: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Tell real spread from float32 rounding, relative to the size of the values."""
    return spread > _NO_SPREAD * np.abs(center)
