"""Intervals of distances by bootstrap over wells. Pure: numpy.

Cells of a well share its treatment, its place on the plate and its neighbours: they are no
independent draws, and an interval over cells is too narrow. So whole wells are drawn anew, the same
ones in both sets, since they are paired. Bounds are those of the basic bootstrap (Davison and
Hinkley 1997, section 5.2), which takes off what drawing again adds to a biased distance.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cp2image.errors import EvaluationError
from cp2image.metrics.frechet import Moments, frechet_distance, merge_moments

_ROWS = 1_024


def bootstrap_frechet(
    real: ArrayLike,
    generated: ArrayLike,
    wells: Sequence[str],
    *,
    resamples: int = 100,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the 95 % interval of the Fréchet distance of paired sets.

    Parameters
    ----------
    real, generated
        Feature vectors, (N, D), finite; row i of both is the same cell.
    wells
        N names.
    resamples
        Number of bootstrap samples; each takes one eigenvalue problem of D dimensions twice.
    seed
        Of the samples.

    Raises
    ------
    EvaluationError
        If there are fewer than two wells, or the lengths differ.
    """
    x, y, groups = _paired(real, generated, wells)
    parts = [(Moments.of(x[rows]), Moments.of(y[rows])) for rows in groups]
    whole = frechet_distance(
        *_merged(parts, range(len(parts))), allow_singular=len(x) <= x.shape[1]
    )
    rng, found = np.random.default_rng(seed), []
    for _ in range(resamples):
        a, b = _merged(parts, rng.integers(len(parts), size=len(parts)))
        found.append(frechet_distance(a, b, allow_singular=a.n <= a.dimension))
    low, high = np.percentile(found, [2.5, 97.5])
    return max(0.0, float(2 * whole - high)), max(0.0, float(2 * whole - low))


def bootstrap_kernel(
    real: ArrayLike,
    generated: ArrayLike,
    wells: Sequence[str],
    *,
    resamples: int = 1_000,
    seed: int = 0,
) -> tuple[float, tuple[float, float]]:
    """Return the kernel distance between cells of different wells, and its 95 % interval.

    The kernel is KID's, ``(x·y / D + 1)³``. Only pairs of cells from different wells count, within
    and between the sets: so a well that is drawn twice is not compared with itself.

    Parameters
    ----------
    real, generated, wells, resamples, seed
        As in `bootstrap_frechet`.

    Raises
    ------
    EvaluationError
        If there are fewer than three wells, or the lengths differ.
    """
    x, y, groups = _paired(real, generated, wells)
    if len(groups) < 3:
        raise EvaluationError(f"{len(groups)} wells: an interval over wells needs at least three")
    order = np.concatenate(groups)
    starts = np.cumsum([0, *(len(rows) for rows in groups[:-1])])
    x, y = x[order], y[order]
    sums = _kernel_sums(x, x, starts) + _kernel_sums(y, y, starts)
    crossed = _kernel_sums(x, y, starts)
    sums -= crossed + crossed.T
    sizes = np.array([len(rows) for rows in groups], dtype=np.float64)
    pairs = np.outer(sizes, sizes)
    for table in (sums, pairs):
        np.fill_diagonal(table, 0)

    def distance(times: NDArray[np.float64]) -> float:
        return float(times @ sums @ times / (times @ pairs @ times))

    whole = distance(np.ones(len(groups)))
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(groups), np.full(len(groups), 1 / len(groups)), size=resamples)
    found = [distance(t) for t in drawn.astype(np.float64) if np.count_nonzero(t) > 1]
    low, high = np.percentile(found, [2.5, 97.5])
    return whole, (float(2 * whole - high), float(2 * whole - low))


def _paired(
    real: ArrayLike, generated: ArrayLike, wells: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.float64], list[NDArray[np.int64]]]:
    x, y = np.asarray(real, dtype=np.float64), np.asarray(generated, dtype=np.float64)
    if x.shape != y.shape or len(x) != len(wells):
        raise EvaluationError(
            f"sets of shapes {x.shape} and {y.shape} with {len(wells)} wells: expected pairs of "
            "cells and a well for each"
        )
    names, number = np.unique(np.asarray(wells, dtype=str), return_inverse=True)
    if len(names) < 2:
        raise EvaluationError("one well alone has no interval over wells; score several")
    return x, y, [np.flatnonzero(number == i) for i in range(len(names))]


def _merged(
    parts: Sequence[tuple[Moments, Moments]], chosen: Sequence[int] | NDArray[np.int64] | range
) -> tuple[Moments, Moments]:
    return merge_moments(parts[i][0] for i in chosen), merge_moments(parts[i][1] for i in chosen)


def _kernel_sums(
    x: NDArray[np.float64], y: NDArray[np.float64], starts: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Sum the kernel over the cells of each pair of wells; rows are in the wells' order."""
    columns = np.empty((len(x), len(starts)))
    for start in range(0, len(x), _ROWS):
        block = (x[start : start + _ROWS] @ y.T / x.shape[1] + 1.0) ** 3
        columns[start : start + _ROWS] = np.add.reduceat(block, starts, axis=1)
    found: NDArray[np.float64] = np.add.reduceat(columns, starts, axis=0)
    return found
