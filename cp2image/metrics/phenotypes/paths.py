"""Paths between phenotypes: feature by feature, or along a line. Pure: numpy."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cp2image.errors import EvaluationError

Values = NDArray[np.float64]


def nearest_to_mean(profiles: ArrayLike) -> int:
    """Return the row of the profile (N, p) that is nearest to their mean, the first of equals.

    Raises
    ------
    EvaluationError
        If there is none.
    """
    x = np.asarray(profiles, dtype=np.float64)
    if len(x) == 0:
        raise EvaluationError("no cell to be nearest to the mean of: the group is empty")
    return int(np.square(x - x.mean(axis=0)).sum(axis=1).argmin())


@dataclass(frozen=True)
class Trajectory:
    """From one profile to another, some features at a time.

    Attributes
    ----------
    profiles
        (K + 1, p): the start, then after each step; the last is the target.
    order
        Features in the order in which they were taken over, (p,).
    swapped
        Features taken over at each profile, (K + 1,).
    similarity
        Cosine to the target, (K + 1,).
    """

    profiles: Values
    order: NDArray[np.int64]
    swapped: NDArray[np.int64]
    similarity: Values


def swap_features(start: ArrayLike, target: ArrayLike, per_step: int) -> Trajectory:
    """Walk from a profile to another, the features that differ most first.

    CP2Image, Fig. 5a: each step takes the ``per_step`` features with the largest absolute
    difference over from the target. Features that do not differ need no step.

    Parameters
    ----------
    start, target
        Scaled, (p,).
    per_step
        Features a step; the last step takes what is left.

    Raises
    ------
    EvaluationError
        If the shapes differ or ``per_step`` is below 1.
    """
    a, b = np.asarray(start, np.float64), np.asarray(target, np.float64)
    if a.shape != b.shape or a.ndim != 1 or per_step < 1:
        raise EvaluationError(
            f"a trajectory from {a.shape} to {b.shape} by {per_step} features a step; expected two "
            "profiles of one length and a step of 1 or more"
        )
    order = np.argsort(-np.abs(b - a), kind="stable")
    differing = int(np.count_nonzero(a != b))
    swapped = np.append(np.arange(0, max(differing, 1), per_step), differing)
    profiles = np.repeat(a[None], len(swapped), axis=0)
    for row, count in enumerate(swapped):
        profiles[row, order[:count]] = b[order[:count]]
    return Trajectory(profiles, order, swapped, cosine(profiles, b))


def cosine(profiles: ArrayLike, target: ArrayLike) -> Values:
    """Return the cosine similarity of profiles (N, p) to one (p,); 0 for a profile of zeros."""
    x, y = np.asarray(profiles, np.float64), np.asarray(target, np.float64)
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y)
    found: Values = (x @ y) / np.maximum(norms, 1e-300)
    return found


@dataclass(frozen=True)
class PrincipalAxes:
    """Directions of largest variance.

    Attributes
    ----------
    mean
        (q,).
    axes
        Orthonormal, (k, q), the largest first; each axis's largest entry is positive.
    explained
        Share of the variance along each, (k,).
    """

    mean: Values
    axes: Values
    explained: Values

    @classmethod
    def fit(cls, cells: ArrayLike, count: int) -> "PrincipalAxes":
        """Find up to ``count`` axes of cells (N, q)."""
        x = np.asarray(cells, dtype=np.float64)
        if len(x) < 2:
            raise EvaluationError(f"principal axes of {len(x)} cells; expected 2 or more")
        mean = x.mean(axis=0)
        centred = x - mean
        if len(x) < x.shape[1]:  # the smaller of the two products has all that is not zero
            variance, side = np.linalg.eigh(centred @ centred.T)
            axes = (side.T @ centred) / np.sqrt(np.maximum(variance, 1e-300))[:, None]
        else:
            variance, side = np.linalg.eigh(centred.T @ centred)
            axes = side.T
        total = max(float(variance.sum()), 1e-300)
        kept = [
            i for i in np.argsort(-variance, kind="stable")[:count] if variance[i] > 1e-9 * total
        ]
        axes = axes[kept]
        largest = np.abs(axes).argmax(axis=1)
        axes *= np.sign(axes[np.arange(len(axes)), largest])[:, None]
        return cls(mean, axes, variance[kept] / total)

    def project(self, cells: ArrayLike) -> Values:
        """Return the cells' places along the axes, (N, k)."""
        return (np.asarray(cells, np.float64) - self.mean) @ self.axes.T


def line(start: ArrayLike, end: ArrayLike, shares: ArrayLike) -> Values:
    """Return the points start + t · (end - start) for each share t, (T, q)."""
    a, b = np.asarray(start, np.float64), np.asarray(end, np.float64)
    return a + np.asarray(shares, np.float64)[:, None] * (b - a)


def position_on_line(cells: ArrayLike, start: ArrayLike, end: ArrayLike) -> Values:
    """Return where cells (N, q) fall on a line: 0 at its start, 1 at its end.

    Raises
    ------
    EvaluationError
        If start and end are one point.
    """
    a, b = np.asarray(start, np.float64), np.asarray(end, np.float64)
    direction = b - a
    length = float(direction @ direction)
    if length == 0:
        raise EvaluationError("start and end of the line are one point")
    return (np.asarray(cells, np.float64) - a) @ direction / length
