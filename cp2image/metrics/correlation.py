"""Do generated cells have the features they were asked for? Pure: numpy and pandas; no Ray.

One correlation per CellProfiler feature between paired cells (the paper's Fig. 4a): Pearson's r,
or for angles a circular correlation, since 179° and 1° are neighbours. All sums are centred and
mergeable (Chan, Golub and LeVeque 1983), so shards and plates are added up in any order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cp2image.columns import Column, measurements, parse_column, require_columns
from cp2image.errors import EvaluationError

CONSTANT = 1e-6
"""A feature whose standard deviation is below this part of its mean is called constant."""
FAITHFUL = 0.5
"""The paper's threshold of r for a feature that is well kept."""
LINEAR, CIRCULAR = "linear", "circular"
_BLOCK = 2**17
"""Numbers of a table that are summed up at once."""


@dataclass(frozen=True, eq=False)
class PairedMoments:
    """Centred sums over paired cells, one entry per feature; mergeable.

    Attributes
    ----------
    names
        Features, F of them.
    n
        Pairs in which both values are finite, shape (F,).
    mean
        Means of original and generated, shape (2, F).
    m2
        Sums of squared deviations of both, and of their products, shape (3, F).
    resultants
        For angles a, b on the unit circle, the sums of e^i(a−b), e^i(a+b), e^i2a, e^i2b, shape
        (4, F), complex; 0 elsewhere.
    """

    names: tuple[str, ...]
    n: NDArray[np.float64]
    mean: NDArray[np.float64]
    m2: NDArray[np.float64]
    resultants: NDArray[np.complex128]

    @classmethod
    def of(
        cls,
        original: pd.DataFrame,
        generated: pd.DataFrame,
        features: Sequence[str] | None = None,
    ) -> "PairedMoments":
        """Sum up paired tables: row i of both is the same cell.

        Parameters
        ----------
        original, generated
            Tables with one row per cell; indexes are ignored.
        features
            Columns to compare; by default all measurements of ``original`` but positions.

        Raises
        ------
        EvaluationError
            If the tables differ in length or there is no feature.
        ColumnError
            If a feature is missing in either.
        """
        return cls._of(*_pair(original, generated, features))

    @classmethod
    def _of(
        cls, names: tuple[str, ...], x: NDArray[np.float64], y: NDArray[np.float64]
    ) -> "PairedMoments":
        """Sum up matrices (N, F), few columns at a time: what is in between stays in the cache."""
        resultants = np.zeros((4, len(names)), dtype=np.complex128)
        periods = _periods(names)
        angles = [index for index, period in enumerate(periods) if period is not None]
        if angles:
            turn = np.array([periods[index] for index in angles], dtype=np.float64)
            resultants[:, angles] = _add_turns(x[:, angles], y[:, angles], turn)
        step = max(1, _BLOCK // max(1, len(x)))
        cuts = [slice(start, start + step) for start in range(0, len(names), step)]
        n, mean, m2 = zip(*(_sum_up(x[:, cut], y[:, cut]) for cut in cuts), strict=True)
        return cls(
            names,
            np.concatenate(n),
            np.concatenate(mean, axis=1),
            np.concatenate(m2, axis=1),
            resultants,
        )

    def merge(self, other: "PairedMoments") -> "PairedMoments":
        """Return the sums over both sets of pairs.

        Raises
        ------
        EvaluationError
            If the features differ.
        """
        if self.names != other.names:
            raise EvaluationError(
                f"shards of {len(self.names)} and {len(other.names)} features, or in another "
                "order, cannot be merged; correlate every shard with the same feature list"
            )
        n = self.n + other.n
        some = np.where(n > 0, n, 1.0)
        delta = other.mean - self.mean
        mean = np.where(self.n == 0, other.mean, self.mean + delta * (other.n / some))
        products = np.stack([delta[0] ** 2, delta[1] ** 2, delta[0] * delta[1]])
        m2 = self.m2 + other.m2 + products * (self.n * other.n / some)
        return PairedMoments(self.names, n, mean, m2, self.resultants + other.resultants)

    def correlation(self) -> NDArray[np.float64]:
        """Return r of each feature, shape (F,); NaN for constants and fewer than 3 pairs."""
        periods = np.array([period is not None for period in _periods(self.names)])
        linear = _pearson(self.n, self.mean, self.m2)
        return np.where(periods, _circular(self.n, self.resultants), linear)

    def table(self) -> pd.DataFrame:
        """Return one row per feature: feature, compartment, category, kind, n, r."""
        parsed = [_parse(name) for name in self.names]
        return pd.DataFrame(
            {
                "feature": list(self.names),
                "compartment": [column.compartment for column in parsed],
                "category": [column.category for column in parsed],
                "kind": [LINEAR if column.period is None else CIRCULAR for column in parsed],
                "n": self.n.astype(np.int64),
                "r": self.correlation(),
            }
        )


def compared_features(table: pd.DataFrame) -> tuple[str, ...]:
    """Return the measurements of a table that say how a cell looks: all but positions."""
    found = measurements(str(name) for name in table.columns)
    return tuple(column.name for column in found if not column.is_position)


def feature_correlation(
    original: pd.DataFrame, generated: pd.DataFrame, features: Sequence[str] | None = None
) -> pd.DataFrame:
    """Correlate every feature of the generated cells with the original's, row by row.

    Parameters
    ----------
    original, generated
        Tables with one row per cell, in the same order.
    features
        Columns to compare; by default all measurements of ``original`` but positions.

    Returns
    -------
    DataFrame
        One row per feature: feature, compartment, category, kind (``linear`` is Pearson's r,
        ``circular`` that of Jammalamadaka and SenGupta 2001, section 8.2), n pairs, r in [−1, 1]
        or NaN.

    Raises
    ------
    EvaluationError, ColumnError
        As `PairedMoments.of`.
    """
    return PairedMoments.of(original, generated, features).table()


def group_moments(
    original: pd.DataFrame,
    generated: pd.DataFrame,
    groups: Sequence[Any],
    features: Sequence[str] | None = None,
) -> dict[str, PairedMoments]:
    """Sum up paired cells group by group (by well, say), for `bootstrap_correlation`.

    ``groups`` has one label per row; the result is keyed by the labels as strings. Errors are those
    of `PairedMoments.of`.
    """
    if len(groups) != len(original):
        raise EvaluationError(f"{len(groups)} group labels for {len(original)} rows")
    names, x, y = _pair(original, generated, features)
    labels = pd.Series([str(group) for group in groups])
    return {
        str(label): PairedMoments._of(names, x[rows], y[rows])
        for label, rows in labels.groupby(labels).indices.items()
    }


def summarise_correlation(table: pd.DataFrame) -> dict[str, Any]:
    """Reduce a correlation table to the numbers of a report.

    Returns
    -------
    dict
        ``features``, ``undefined`` (r is NaN: not counted in what follows), ``share_above_half``,
        ``mean_r``, ``median_r`` (None if all are undefined), and the same under
        ``by_compartment`` and ``by_category``.
    """
    summary: dict[str, Any] = _summary(table["r"].to_numpy(dtype=np.float64))
    for key in ("compartment", "category"):
        summary[f"by_{key}"] = {
            str(name): _summary(part["r"].to_numpy(dtype=np.float64))
            for name, part in table.groupby(key, sort=True)
        }
    return summary


@dataclass(frozen=True, eq=False)
class BootstrapInterval:
    """Percentile intervals from resampling whole groups.

    Attributes
    ----------
    r
        Lower and upper bound per feature, shape (2, F).
    summary
        Lower and upper bound of ``share_above_half``, ``mean_r`` and ``median_r``.
    groups, resamples
        How many groups there are, and how often they were drawn.
    """

    r: NDArray[np.float64]
    summary: dict[str, tuple[float, float]]
    groups: int
    resamples: int


def bootstrap_correlation(
    parts: Mapping[str, PairedMoments],
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> BootstrapInterval:
    """Return the interval of every r when wells, not cells, are drawn with replacement.

    Cells of a well share stain, focus and treatment: with thousands of cells everything would be
    significant. Only the groups' sums are needed, not the cells.

    Parameters
    ----------
    parts
        Sums per group, such as `group_moments` returns.
    resamples
        How often the groups are drawn.
    level
        Probability inside the interval.
    seed
        Of the draws.

    Raises
    ------
    EvaluationError
        With fewer than two groups, or groups of different features.
    """
    if len(parts) < 2:
        raise EvaluationError(f"{len(parts)} group(s) cannot be resampled; at least 2 are needed")
    groups = [parts[key] for key in sorted(parts)]
    total = groups[0]
    for part in groups[1:]:
        total = total.merge(part)
    n = np.stack([part.n for part in groups])
    shift = np.stack([part.mean for part in groups]) - total.mean
    shift = np.where(n[:, None] > 0, shift, 0.0)
    products = np.stack([shift[:, 0] ** 2, shift[:, 1] ** 2, shift[:, 0] * shift[:, 1]], axis=1)
    m2 = np.stack([part.m2 for part in groups]) + n[:, None] * products
    sums = n[:, None] * shift
    resultants = np.stack([part.resultants for part in groups])
    angular = np.array([period is not None for period in _periods(total.names)])
    rng = np.random.default_rng(seed)
    r = np.empty((resamples, len(total.names)))
    for draw in range(resamples):
        weight = np.bincount(rng.integers(len(groups), size=len(groups)), minlength=len(groups))
        count = weight @ n
        mean = np.tensordot(weight, sums, 1) / np.where(count > 0, count, 1.0)
        about = np.stack([mean[0] ** 2, mean[1] ** 2, mean[0] * mean[1]])
        linear = _pearson(count, mean + total.mean, np.tensordot(weight, m2, 1) - count * about)
        circular = _circular(count, np.tensordot(weight, resultants, 1))
        r[draw] = np.where(angular, circular, linear)
    tails = [(1 - level) / 2, (1 + level) / 2]
    bounds = np.full((2, r.shape[1]), np.nan)
    some = ~np.isnan(r).all(axis=0)
    bounds[:, some] = np.nanquantile(r[:, some], tails, axis=0)
    drawn = [_summary(row) for row in r]
    summary = {}
    for key in ("share_above_half", "mean_r", "median_r"):
        values = [row[key] for row in drawn if row[key] is not None]
        low, high = np.quantile(values, tails) if values else (np.nan, np.nan)
        summary[key] = (float(low), float(high))
    return BootstrapInterval(bounds, summary, len(groups), resamples)


def _summary(r: NDArray[np.float64]) -> dict[str, Any]:
    defined = r[~np.isnan(r)]
    some = len(defined) > 0
    return {
        "features": len(r),
        "undefined": len(r) - len(defined),
        "share_above_half": float((defined > FAITHFUL).mean()) if some else None,
        "mean_r": float(defined.mean()) if some else None,
        "median_r": float(np.median(defined)) if some else None,
    }


def _pearson(
    n: NDArray[np.float64], mean: NDArray[np.float64], m2: NDArray[np.float64]
) -> NDArray[np.float64]:
    deviation = np.sqrt(np.clip(m2[:2], 0, None) / np.where(n > 0, n, 1.0))
    varies = (deviation > CONSTANT * np.abs(mean)).all(axis=0) & (n >= 3)
    bottom = np.sqrt(np.where(varies, m2[0], 1.0)) * np.sqrt(np.where(varies, m2[1], 1.0))
    return np.where(varies, np.clip(m2[2] / bottom, -1, 1), np.nan)


def _circular(n: NDArray[np.float64], resultants: NDArray[np.complex128]) -> NDArray[np.float64]:
    """Correlate angles by their sines about reference directions μ, ν.

    The usual choice, the mean directions, is arbitrary for angles spread evenly over the circle, as
    orientations are. Here μ ∓ ν are the directions of the mean of e^i(a∓b), which is the same thing
    for concentrated angles and stays defined for even ones (Jammalamadaka and SenGupta 2001, eq.
    8.2.4 and the remark on uniform marginals).
    """
    difference, total, twice_a, twice_b = resultants / np.where(n > 0, n, 1.0)
    minus, plus = np.angle(difference), np.angle(total)
    sine_a = (1 - (twice_a * np.exp(-1j * (plus + minus))).real) / 2
    sine_b = (1 - (twice_b * np.exp(-1j * (plus - minus))).real) / 2
    varies = (sine_a > CONSTANT**2) & (sine_b > CONSTANT**2) & (n >= 3)
    bottom = np.sqrt(np.where(varies, sine_a * sine_b, 1.0))
    top = (np.abs(difference) - np.abs(total)) / 2
    return np.where(varies, np.clip(top / bottom, -1, 1), np.nan)


def _pair(
    original: pd.DataFrame, generated: pd.DataFrame, features: Sequence[str] | None
) -> tuple[tuple[str, ...], NDArray[np.float64], NDArray[np.float64]]:
    """Return the compared features and their values in both tables, (N, F) each."""
    if len(original) != len(generated):
        raise EvaluationError(
            f"{len(original)} original and {len(generated)} generated rows cannot be paired; "
            "select the same cells in the same order"
        )
    names = compared_features(original) if features is None else tuple(features)
    if not names:
        raise EvaluationError("no CellProfiler measurement to correlate in the original table")
    require_columns([str(c) for c in original.columns], names, "original features")
    require_columns([str(c) for c in generated.columns], names, "generated features")
    return names, _numbers(original, names), _numbers(generated, names)


def _sum_up(
    x: NDArray[np.float64], y: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return count (F,), means (2, F) and centred sums of squares and products (3, F)."""
    valid = np.isfinite(x) & np.isfinite(y)
    n = valid.sum(axis=0).astype(np.float64)
    dx, mean_x = _centre(x, valid, n)
    dy, mean_y = _centre(y, valid, n)
    m2 = np.stack([(dx * dx).sum(0), (dy * dy).sum(0), (dx * dy).sum(0)])
    return n, np.stack([mean_x, mean_y]), m2


def _add_turns(
    x: NDArray[np.float64], y: NDArray[np.float64], periods: NDArray[np.float64]
) -> NDArray[np.complex128]:
    """Return the resultants (4, F) of angles (N, F), as `PairedMoments` has them."""
    valid = np.isfinite(x) & np.isfinite(y)
    angles = (2 * np.pi / periods * np.where(valid, v, 0.0) for v in (x, y))
    a, b = (np.where(valid, np.exp(1j * angle), 0.0) for angle in angles)
    return np.stack([(p * q).sum(axis=0) for p, q in ((a, b.conj()), (a, b), (a, a), (b, b))])


def _centre(
    x: NDArray[np.float64], valid: NDArray[np.bool_], n: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    some = np.where(n > 0, n, 1.0)
    mean = np.where(valid, x, 0.0).sum(axis=0) / some
    mean += np.where(valid, x - mean, 0.0).sum(axis=0) / some
    return np.where(valid, x - mean, 0.0), mean


def _numbers(table: pd.DataFrame, names: Sequence[str]) -> NDArray[np.float64]:
    return table.loc[:, list(names)].to_numpy(dtype=np.float64, na_value=np.nan)


def _parse(name: str) -> Column:
    column = parse_column(name)
    return column if column is not None else Column(name, "", "", name)


@lru_cache(maxsize=8)
def _periods(names: tuple[str, ...]) -> tuple[float | None, ...]:
    return tuple(_parse(name).period for name in names)
