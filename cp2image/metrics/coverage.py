"""How much of the real cells' variety is drawn, and whether cells were copied. Pure numpy.

Precision and recall follow Kynkäänniemi et al. (NeurIPS 2019), density and coverage Naeem et al.
(ICML 2020): both look at balls around cells that reach to the k-th neighbour of the same set.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cp2image.errors import EvaluationError

_ROWS = 1_024
"""Rows of a block of distances: memory grows with the cells, not with their square."""


@dataclass(frozen=True)
class Coverage:
    """Shares in [0, 1], but for ``density``, which may exceed 1.

    Attributes
    ----------
    precision
        Generated cells within a ball of a real one.
    recall
        Real cells within a ball of a generated one: variety that is drawn.
    density
        Real balls that a generated cell lies in, over k, the mean.
    coverage
        Real cells whose ball holds a generated one.
    neighbours
        k.
    """

    precision: float
    recall: float
    density: float
    coverage: float
    neighbours: int


def coverage(real: ArrayLike, generated: ArrayLike, neighbours: int = 5) -> Coverage:
    """Compare two sets of feature vectors by their neighbourhoods.

    Parameters
    ----------
    real, generated
        (N, D) and (M, D), finite; N and M should be alike, for balls shrink as sets grow.
    neighbours
        k.

    Raises
    ------
    EvaluationError
        If the dimensions differ or a set has no k other cells.
    """
    x, y = np.asarray(real, dtype=np.float64), np.asarray(generated, dtype=np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise EvaluationError(f"sets of shapes {x.shape} and {y.shape} cannot be compared")
    if min(len(x), len(y)) <= neighbours:
        raise EvaluationError(
            f"{len(x)} real and {len(y)} generated cells: each set needs more than {neighbours}"
        )
    around_x, around_y = _radii(x, neighbours), _radii(y, neighbours)
    precise, dense = np.zeros(len(y), dtype=bool), np.zeros(len(y))
    recalled, covered = np.zeros(len(x), dtype=bool), np.zeros(len(x), dtype=bool)
    for start in range(0, len(x), _ROWS):
        rows = slice(start, start + _ROWS)
        distance = _squared(x[rows], y)
        inside = distance <= around_x[rows, None]
        precise |= inside.any(axis=0)
        dense += inside.sum(axis=0)
        covered[rows] = inside.any(axis=1)
        recalled[rows] = (distance <= around_y[None, :]).any(axis=1)
    return Coverage(
        float(precise.mean()),
        float(recalled.mean()),
        float(dense.mean() / neighbours),
        float(covered.mean()),
        neighbours,
    )


def nearest(cells: ArrayLike, others: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the row of the nearest of ``others`` (M, D) for each of ``cells`` (N, D).

    Returns
    -------
    rows, distances
        (N,) int64 and (N,) float64, Euclidean.
    """
    x, y = np.asarray(cells, dtype=np.float64), np.asarray(others, dtype=np.float64)
    rows, distances = np.empty(len(x), dtype=np.int64), np.empty(len(x))
    for start in range(0, len(x), _ROWS):
        part = slice(start, start + _ROWS)
        squared = _squared(x[part], y)
        rows[part] = squared.argmin(axis=1)
        distances[part] = np.sqrt(squared.min(axis=1))
    return rows, distances


def _radii(x: NDArray[np.float64], neighbours: int) -> NDArray[np.float64]:
    """Squared distance of each cell to its k-th neighbour in the same set."""
    found = np.empty(len(x))
    for start in range(0, len(x), _ROWS):
        part = _squared(x[start : start + _ROWS], x)
        found[start : start + _ROWS] = np.partition(part, neighbours, axis=1)[:, neighbours]
    return found


def _squared(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    distance: NDArray[np.float64] = (
        (x**2).sum(axis=1)[:, None] + (y**2).sum(axis=1)[None, :] - 2 * x @ y.T
    )
    return np.maximum(distance, 0.0)
