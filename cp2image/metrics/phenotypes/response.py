"""What was asked for against what is measured: does a knob work? Pure: numpy and scipy."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from cp2image.errors import EvaluationError

Values = NDArray[np.float64]
_CHANCE = 0.01
"""Rayleigh's p below which the angles of a step have a common direction."""


@dataclass(frozen=True)
class Response:
    """One feature, requested in S steps of N cells.

    Attributes
    ----------
    requested
        (S,), rising, in the feature's own units.
    mean, deviation
        Of what was measured at each step, over cells, (S,). Of angles the circular mean, unrolled
        from step to step so that it does not jump by a turn; NaN if they are not ``directed``.
    cells
        Cells at each step in which the feature is defined, (S,).
    spearman
        Rank correlation of requested and measured over all cells and steps; NaN if constant, or if
        fewer than three values are defined.
    spearman_of_means
        The same over the steps' means.
    slope
        Of the means against what was requested, least squares: 1 where measured follows requested.
    rises
        Whether the mean rises with every step.
    directed
        False for angles of which some step has no common direction, or too few cells to have one: a
        mean of such angles says where the circle was cut and nothing else, so there is none, and
        nothing made of it.
    measured
        The cells' own values, (N, S); angles as the mean takes them.
    """

    requested: Values
    mean: Values
    deviation: Values
    cells: NDArray[np.int64]
    spearman: float
    spearman_of_means: float
    slope: float
    rises: bool
    directed: bool = True
    measured: Values = field(default_factory=lambda: np.empty((0, 0)))


def summarise_response(
    requested: ArrayLike, measured: ArrayLike, period: float | None = None
) -> Response:
    """Sum up what was measured on cells whose feature was set.

    Parameters
    ----------
    requested
        (S,), rising.
    measured
        (N, S), NaN where undefined.
    period
        Full circle of an angle, in the same units; None for others. Where angles of a step's cells
        lie is told from their own mean, never from what was requested.

    Raises
    ------
    EvaluationError
        If the shapes do not fit.
    """
    asked, x = np.asarray(requested, np.float64), np.array(measured, dtype=np.float64)
    if x.ndim != 2 or asked.shape != x.shape[1:] or len(asked) < 2:
        raise EvaluationError(
            f"measured has shape {x.shape} for {asked.shape} requested values; expected (cells, "
            "steps), two steps or more"
        )
    known = np.isfinite(x)
    directed = True
    if period is not None:
        directed = _have_direction(x, known, period)
        x = _unroll(x, known, period, asked) if directed else _cut(x, period, asked)
    counts = known.sum(axis=0)
    some = np.maximum(counts, 1)
    mean = np.where(counts > 0, np.where(known, x, 0).sum(axis=0) / some, np.nan)
    squares = np.where(known, (x - mean) ** 2, 0).sum(axis=0)
    deviation = np.where(counts > 1, np.sqrt(squares / np.maximum(counts - 1, 1)), np.nan)
    if not directed:
        mean, deviation = np.full_like(mean, np.nan), np.full_like(deviation, np.nan)
    steps = np.broadcast_to(asked, x.shape)
    there = np.isfinite(mean)
    slope = np.nan
    if there.sum() > 1:
        slope = float(np.polyfit(asked[there], mean[there], 1)[0])
    rises = bool(there.all() and (np.diff(mean) > 0).all())
    pooled = _spearman(steps[known], x[known])
    over_means = _spearman(asked[there], mean[there])
    return Response(asked, mean, deviation, counts, pooled, over_means, slope, rises, directed, x)


def circular_mean(values: ArrayLike, period: float, axis: int = 0) -> Values:
    """Return the mean direction of angles along an axis, in ± half a period; NaN are left out."""
    x = np.asarray(values, dtype=np.float64)
    turns = np.where(np.isfinite(x), np.exp(2j * np.pi * np.nan_to_num(x) / period), 0)
    total = np.asarray(turns.sum(axis=axis))
    found: Values = np.angle(total) * period / (2 * np.pi)
    return np.where(np.abs(total) > 0, found, np.nan)


def _have_direction(x: Values, known: NDArray[np.bool_], period: float) -> bool:
    """Tell whether the angles of every step have a common direction (Rayleigh's test).

    Four cells or fewer never have: chance alone turns them alike too often.
    """
    there = known.any(axis=0)
    turns = np.where(known, np.exp(2j * np.pi * np.nan_to_num(x) / period), 0)
    counts = np.maximum(known.sum(axis=0), 1)
    length = np.abs(turns.sum(axis=0)) / counts
    return bool((length[there] > np.sqrt(-np.log(_CHANCE) / counts[there])).all())


def _cut(x: Values, period: float, asked: Values) -> Values:
    """Cut the circle opposite the requested values, for ranks: means would say where it is cut."""
    middle = asked.mean()
    cut: Values = (x - middle + period / 2) % period - period / 2 + middle
    return cut


def _unroll(x: Values, known: NDArray[np.bool_], period: float, asked: Values) -> Values:
    """Put each step's angles within half a turn of their mean, and the means in a row."""
    means = circular_mean(x, period)
    there = known.any(axis=0)
    row = np.unwrap(means[there], period=period)
    row += period * np.round((asked[there].mean() - row.mean()) / period)
    means[there] = row
    aside = (x - means + period / 2) % period - period / 2
    return np.where(known, means + aside, np.nan)


def _spearman(x: Values, y: Values) -> float:
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])
