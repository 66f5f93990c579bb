"""Choose the features a model may see. Floor 1: numpy; no Ray, torch or network."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import NDArray

from cp2image.columns import CATEGORIES, nearest, parse_column
from cp2image.config_train import Scaling
from cp2image.errors import ConfigError, DatasetError

CONSTANT = 1e-6
"""A feature whose spread is at most this share of its magnitude is constant: float32 rounding."""


class FeatureStatistics:
    """Count, mean, spread and range of p features, gathered block by block.

    Merging follows Chan, Golub and LeVeque (1979), in float64: the result depends on the blocks
    only by rounding. NaN and infinite values are counted and left out of the rest.

    Attributes
    ----------
    count
        Rows seen.
    missing, infinite
        NaN and infinite values, int64, shape (p,).
    mean, m2
        Mean and sum of squared deviations of the finite values, float64, shape (p,).
    minimum, maximum
        Of the finite values, float64, shape (p,); +inf and -inf where there is none.
    """

    def __init__(self, features: int) -> None:
        self.count = 0
        self.missing = np.zeros(features, dtype=np.int64)
        self.infinite = np.zeros(features, dtype=np.int64)
        self.mean = np.zeros(features)
        self.m2 = np.zeros(features)
        self.minimum = np.full(features, np.inf)
        self.maximum = np.full(features, -np.inf)

    @property
    def finite(self) -> NDArray[np.int64]:
        """Number of finite values of each feature, shape (p,)."""
        return self.count - self.missing - self.infinite

    @property
    def deviation(self) -> NDArray[np.float64]:
        """Standard deviation (divided by n) of each feature, shape (p,); 0 without values."""
        deviation: NDArray[np.float64] = np.sqrt(self.m2 / np.maximum(self.finite, 1))
        return deviation

    def add(self, values: NDArray[np.floating]) -> None:
        """Add a block of cells.

        Parameters
        ----------
        values
            Shape (n, p), any float type.

        Raises
        ------
        DatasetError
            If the block has another number of features.
        """
        if values.ndim != 2 or values.shape[1] != len(self.mean):
            raise DatasetError(
                f"a block of shape {values.shape} does not fit statistics of "
                f"{len(self.mean)} features; give (cells, features)"
            )
        block = FeatureStatistics(len(self.mean))
        numbers = values.astype(np.float64)
        good = np.isfinite(numbers)
        block.count = len(numbers)
        block.missing = np.isnan(numbers).sum(axis=0)
        block.infinite = block.count - good.sum(axis=0) - block.missing
        block.minimum = np.where(good, numbers, np.inf).min(axis=0, initial=np.inf)
        block.maximum = np.where(good, numbers, -np.inf).max(axis=0, initial=-np.inf)
        block.mean = np.where(good, numbers, 0).sum(axis=0) / np.maximum(block.finite, 1)
        block.m2 = (np.where(good, numbers - block.mean, 0) ** 2).sum(axis=0)
        self.merge(block)

    def merge(self, other: "FeatureStatistics") -> None:
        """Take another's cells in, as if they had been added here.

        Parameters
        ----------
        other
            Statistics of the same features in the same order; it is not changed.
        """
        mine, theirs = self.finite, other.finite
        total = np.maximum(mine + theirs, 1)
        difference = other.mean - self.mean
        self.mean = self.mean + difference * (theirs / total)
        self.m2 = self.m2 + other.m2 + difference**2 * (mine * theirs / total)
        self.count += other.count
        self.missing = self.missing + other.missing
        self.infinite = self.infinite + other.infinite
        self.minimum = np.minimum(self.minimum, other.minimum)
        self.maximum = np.maximum(self.maximum, other.maximum)


@dataclass(frozen=True)
class Selection:
    """Which columns became features, and why the others did not.

    Attributes
    ----------
    kept
        Names of the features, in the table's order: the model's input, in this order.
    dropped
        Name of every other column → one line that says why.
    """

    kept: tuple[str, ...]
    dropped: dict[str, str]


def select_features(
    names: Sequence[str], statistics: FeatureStatistics, scaling: Scaling
) -> Selection:
    """Choose the columns that say how a cell looks and that vary between cells.

    Left out are identifiers, positions, categories that were not chosen, columns named in
    ``scaling.drop``, columns missing (NaN or infinite) in more than ``scaling.max_missing`` of
    the cells, and constant ones (standard deviation ≤ `CONSTANT` of the largest magnitude).

    Parameters
    ----------
    names
        The table's columns, p of them.
    statistics
        Of the training cells, in the order of ``names``.
    scaling
        The config's section.

    Raises
    ------
    ConfigError
        If ``scaling.drop`` or ``scaling.categories`` holds an unknown name.
    DatasetError
        If no cells were seen or no feature is left.
    """
    _refuse_unknown(scaling.drop, names, "scaling.drop", "column of the table")
    _refuse_unknown(scaling.categories, CATEGORIES, "scaling.categories", "category")
    if len(names) != len(statistics.mean):
        raise DatasetError(f"{len(names)} columns but statistics of {len(statistics.mean)}")
    if statistics.count == 0:
        raise DatasetError("no training cells to select features from; check the split's shares")
    kept, dropped, kinds = [], {}, Counter[str]()
    for index, name in enumerate(names):
        reason = _reason_by_name(name, scaling) or _reason_by_value(index, statistics, scaling)
        if reason is None:
            kept.append(name)
        else:
            dropped[name] = reason
            kinds[reason.partition(":")[0]] += 1
    if not kept:
        counts = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())
        raise DatasetError(
            f"none of the {len(names)} columns is left as a feature ({counts or 'no columns'}); "
            "expected CellProfiler's names such as 'Nuclei_AreaShape_Area'; check the table, "
            "scaling.categories, scaling.drop and scaling.max_missing"
        )
    return Selection(tuple(kept), dropped)


def drop_near_duplicates(
    selection: Selection, values: NDArray[np.floating], limit: float
) -> Selection:
    """Leave out features that say what one before them says.

    A feature goes when its correlation with one that is kept exceeds ``limit`` in size: table
    order decides which of two stays.

    Parameters
    ----------
    selection
        What to choose from.
    values
        Scaled training cells, (n, p) in the order of ``selection.kept``, without NaN.
    limit
        Largest |r| of two features that both stay, 0 to 1.
    """
    centred = values - values.mean(axis=0, dtype=np.float64)
    length = np.sqrt((centred**2).sum(axis=0))
    unit = np.divide(centred, length, out=np.zeros_like(centred), where=length > 0)
    related = unit.T @ unit
    kept: list[int] = []
    dropped = dict(selection.dropped)
    for index, name in enumerate(selection.kept):
        sizes = np.abs(related[index, kept])
        if len(sizes) and sizes.max() > limit:
            other = kept[int(sizes.argmax())]
            r, twin = related[index, other], selection.kept[other]
            dropped[name] = f"duplicate: r = {r:.3f} with {twin}"
        else:
            kept.append(index)
    return Selection(tuple(selection.kept[i] for i in kept), dropped)


def _reason_by_name(name: str, scaling: Scaling) -> str | None:
    column = parse_column(name)
    if column is None:
        return "identifier: not a measurement"
    for pattern in scaling.drop:
        if fnmatchcase(name, pattern):
            return f"unwanted: matches {pattern!r} in scaling.drop"
    if column.is_position:
        return "position: says where the cell is, not how it looks"
    if column.category not in scaling.categories:
        return f"category: {column.category} is not in scaling.categories"
    return None


def _reason_by_value(index: int, statistics: FeatureStatistics, scaling: Scaling) -> str | None:
    nan, infinite = statistics.missing[index], statistics.infinite[index]
    share = (nan + infinite) / statistics.count
    if share > scaling.max_missing or share == 1:
        what = "missing" if nan >= infinite else "infinite"
        return f"{what}: {nan} NaN and {infinite} infinite values in {statistics.count} cells"
    magnitude = max(abs(statistics.minimum[index]), abs(statistics.maximum[index]))
    if statistics.deviation[index] <= CONSTANT * magnitude:
        return f"constant: {statistics.mean[index]:.6g} in all cells"
    return None


def _refuse_unknown(wanted: Iterable[str], known: Sequence[str], key: str, what: str) -> None:
    for name in wanted:
        if name not in known and not any(fnmatchcase(one, name) for one in known):
            raise ConfigError(f"{key}: {name!r} is no {what}{nearest(name, known)}")
