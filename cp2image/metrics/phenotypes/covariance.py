"""How features move together, and how far a profile is from all known ones. Pure: numpy, scipy.

With hundreds of features and some thousand cells the sample's correlations are noisy and their
inverse is dominated by that noise; they are shrunk towards 0 as Ledoit and Wolf estimate it (J
Multivariate Analysis 88, 2004, section 3.3, on standardised columns).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import cho_solve, cholesky, solve_triangular

from cp2image.errors import EvaluationError

Values = NDArray[np.float64]
_LEAST = 1e-3
"""Least shrinkage: keeps the inverse there is, whatever columns repeat each other."""
_HELD_BACK = 5
"""Every fifth cell is held back to tell how far cells are that the covariance has not seen."""


@dataclass(frozen=True)
class ShrunkCovariance:
    """Mean and covariance of q coordinates.

    Attributes
    ----------
    mean, deviation
        (q,); the deviation of a constant column is 1.
    correlation
        (q, q), shrunk, ones on the diagonal.
    root
        Its lower Cholesky factor.
    shrinkage
        Share by which correlations were shrunk.
    cells
        Cells it was estimated from.
    """

    mean: Values
    deviation: Values
    correlation: Values
    root: Values
    shrinkage: float
    cells: int

    @classmethod
    def fit(cls, cells: ArrayLike, shrinkage: float | None = None) -> "ShrunkCovariance":
        """Estimate from cells (n, q).

        Parameters
        ----------
        cells
            Finite coordinates, one row per cell.
        shrinkage
            From 0 to 1; None: Ledoit and Wolf's. At least 0.001 is applied.

        Raises
        ------
        EvaluationError
            If there are fewer than three cells, or a value is not finite.
        """
        x = np.asarray(cells, dtype=np.float64)
        if x.ndim != 2 or len(x) < 3:
            raise EvaluationError(
                f"a covariance of cells of shape {x.shape}; expected (3 or more, coordinates)"
            )
        if not np.isfinite(x).all():
            raise EvaluationError("profiles hold NaN or infinity; scale them before (missing is 0)")
        mean = x.mean(axis=0)
        deviation = x.std(axis=0)
        constant = deviation <= 1e-9 * np.maximum(np.abs(mean), 1.0)
        deviation[constant] = 1.0
        z = (x - mean) / deviation
        correlation = z.T @ z / len(z)
        np.fill_diagonal(correlation, 1.0)
        chosen = ledoit_wolf(z, correlation) if shrinkage is None else shrinkage
        chosen = max(chosen, _LEAST)
        correlation *= 1.0 - chosen
        np.fill_diagonal(correlation, 1.0)
        root = cholesky(correlation, lower=True)
        return cls(mean, deviation, correlation, root, chosen, len(x))

    def move(self, cells: ArrayLike, columns: tuple[int, ...], targets: ArrayLike) -> Values:
        """Set some coordinates of cells and move the others along, by their conditional mean.

        With K the columns that are set, every cell x becomes x + Σ·ₖ Σₖₖ⁻¹ (target - xₖ): what is
        its own beyond the set columns stays its own.

        Parameters
        ----------
        cells
            (N, q).
        columns
            K of the coordinates.
        targets
            Their new values, (N, K).

        Returns
        -------
        ndarray
            (N, q).
        """
        x, chosen = np.asarray(cells, dtype=np.float64), list(columns)
        goal = np.asarray(targets, dtype=np.float64)
        change = (goal - x[:, chosen]) / self.deviation[chosen]
        among = self.correlation[np.ix_(chosen, chosen)]
        along = np.linalg.solve(among, self.correlation[chosen])
        moved = x + (change @ along) * self.deviation
        moved[:, chosen] = goal
        return moved

    @cached_property
    def precision(self) -> Values:
        """Inverse of the correlation, (q, q)."""
        inverse: Values = cho_solve((self.root, True), np.eye(len(self.mean)))
        return inverse

    def contradiction(self, cells: ArrayLike, columns: Sequence[int] | None = None) -> Values:
        """Return how far coordinates are from what all others of the cell say, (N, K).

        In conditional standard deviations: |x - E[x | the others]| over the deviation left when
        the others are known. Some columns, or all.
        """
        chosen = np.arange(len(self.mean)) if columns is None else np.asarray(columns)
        z = (np.asarray(cells, dtype=np.float64) - self.mean) / self.deviation
        left = self.precision[:, chosen]
        apart: Values = np.abs(z @ left) / np.sqrt(self.precision[chosen, chosen])
        return apart

    def distance(self, cells: ArrayLike) -> Values:
        """Return each cell's Mahalanobis distance from the mean, (N,)."""
        z = (np.asarray(cells, dtype=np.float64) - self.mean) / self.deviation
        whitened = solve_triangular(self.root, z.T, lower=True)
        apart: Values = np.sqrt(np.einsum("qn,qn->n", whitened, whitened))
        return apart


def ledoit_wolf(standardised: ArrayLike, correlation: ArrayLike) -> float:
    """Return the shrinkage towards the identity that errs least, from 0 to 1.

    Parameters
    ----------
    standardised
        Cells of mean 0 and deviation 1, (n, q).
    correlation
        Their correlations, (q, q).
    """
    z, r = np.asarray(standardised, np.float64), np.asarray(correlation, np.float64)
    n, q = z.shape
    centre = np.trace(r) / q
    spread = (np.square(r).sum() - 2 * centre * np.trace(r) + q * centre**2) / q
    fourth = np.square(np.einsum("nq,nq->n", z, z)).sum() / n
    noise = (fourth - np.square(r).sum()) / (n * q)
    return float(np.clip(noise / spread, 0.0, 1.0)) if spread > 0 else 1.0


@dataclass(frozen=True)
class Guard:
    """Tells vectors that are far from the cells a model was trained on.

    A Mahalanobis distance over hundreds of features sees a vector that is odd as a whole. One
    feature that does not fit the others (a large area with a small diameter) is a small part of it;
    that is what `contradicts` looks at.

    Attributes
    ----------
    covariance
        Of four fifths of the cells.
    limit
        Mahalanobis distance that ``share`` of the other fifth are within.
    limits
        The same of each coordinate's contradiction, (q,).
    share
        As asked for.
    held_back
        Cells of that fifth.
    """

    covariance: ShrunkCovariance
    limit: float
    limits: Values
    share: float
    held_back: int

    @classmethod
    def fit(cls, cells: ArrayLike, share: float, shrinkage: float | None = None) -> "Guard":
        """Estimate the covariance from four of five cells, the limits from every fifth.

        Distances of the cells that a covariance comes from are too small to judge others by.

        Raises
        ------
        EvaluationError
            If there are fewer than 20 cells.
        """
        x = np.asarray(cells, dtype=np.float64)
        if len(x) < 20:
            raise EvaluationError(
                f"{len(x)} cells are too few to say what is far from them; expected 20 or more of "
                "the checkpoint's training split (see explore.input, explore.plates)"
            )
        held = np.arange(len(x)) % _HELD_BACK == _HELD_BACK - 1
        covariance = ShrunkCovariance.fit(x[~held], shrinkage)
        limit = float(np.quantile(covariance.distance(x[held]), share))
        limits = np.quantile(covariance.contradiction(x[held]), share, axis=0)
        return cls(covariance, limit, np.maximum(limits, 1e-9), share, int(held.sum()))

    def relative(self, cells: ArrayLike) -> Values:
        """Return distances over the limit, (N,): above 1 is outside."""
        return self.covariance.distance(cells) / self.limit

    def contradicts(self, cells: ArrayLike, columns: Sequence[int]) -> Values:
        """Return the largest contradiction among some coordinates over its limit, (N,)."""
        chosen = list(columns)
        found: Values = self.covariance.contradiction(cells, chosen) / self.limits[chosen]
        largest: Values = found.max(axis=1)
        return largest
