"""Distances between two sets of embedded images. Pure: numpy and scipy; no Ray, MLflow or torch.

The Fréchet distance (FID: Heusel et al. 2017, eq. 6; Dowson and Landau 1982) compares mean and
covariance, which are kept as mergeable sums, so a set may be embedded shard by shard on many
machines. It is biased upwards by about 1/N: compare only sets of equal size and print the
real-against-real floor. The kernel distance (KID: Bińkowski et al. 2018, section 3) is unbiased.
"""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import eigh

from cp2image.errors import EvaluationError


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and centred second moment of feature vectors; float64, mergeable.

    Attributes
    ----------
    n
        Number of vectors.
    mean
        Their mean, shape (D,).
    m2
        Sum of the outer products of their deviations from the mean, shape (D, D).
    """

    n: int
    mean: NDArray[np.float64]
    m2: NDArray[np.float64]

    @classmethod
    def empty(cls, dimension: int) -> "Moments":
        """Return the moments of no vectors at all, to start adding to."""
        return cls(0, np.zeros(dimension), np.zeros((dimension, dimension)))

    @classmethod
    def of(cls, features: ArrayLike) -> "Moments":
        """Return the moments of ``features``, shape (N, D), finite, any real type.

        Raises
        ------
        EvaluationError
            If it is no matrix or holds NaN or infinity.
        """
        x = _matrix(features)
        if len(x) == 0:
            return cls.empty(x.shape[1])
        mean = x.mean(axis=0)
        deviation = x - mean
        mean += deviation.mean(axis=0)
        deviation = x - mean
        return cls(len(x), mean, deviation.T @ deviation)

    def add(self, features: ArrayLike) -> "Moments":
        """Return the moments of these vectors and ``features`` (N, D) together."""
        return self.merge(Moments.of(features))

    def merge(self, other: "Moments") -> "Moments":
        """Return the moments of both sets together (Chan, Golub and LeVeque 1983).

        Raises
        ------
        EvaluationError
            If the dimensions differ.
        """
        _same_dimension(self.dimension, other.dimension)
        if self.n == 0 or other.n == 0:
            return other if self.n == 0 else self
        n = self.n + other.n
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.n / n)
        m2 = self.m2 + other.m2 + np.outer(delta, delta) * (self.n * other.n / n)
        return Moments(n, mean, m2)

    @property
    def dimension(self) -> int:
        """Length D of the feature vectors."""
        return len(self.mean)

    @property
    def covariance(self) -> NDArray[np.float64]:
        """Unbiased covariance, shape (D, D).

        Raises
        ------
        EvaluationError
            If there are fewer than two vectors.
        """
        if self.n < 2:
            raise EvaluationError(
                f"{self.n} feature vector(s) have no covariance; compare at least 2 cells"
            )
        return self.m2 / (self.n - 1)


def merge_moments(parts: Iterable[Moments]) -> Moments:
    """Merge the moments of any number of shards, one at a time.

    Raises
    ------
    EvaluationError
        If there is none, or their dimensions differ.
    """
    total: Moments | None = None
    for part in parts:
        total = part if total is None else total.merge(part)
    if total is None:
        raise EvaluationError("no shard to merge: the set of cells to score is empty")
    return total


def frechet_distance(a: Moments, b: Moments, *, allow_singular: bool = False) -> float:
    """Return the squared Fréchet distance of two Gaussians: ``|Δμ|² + Tr(Σa + Σb − 2√(ΣaΣb))``.

    The trace of the root is the sum of the roots of the eigenvalues of the symmetric
    ``√Σa Σb √Σa``, which has the eigenvalues of ``ΣaΣb``: faster than a matrix root, and real.

    Parameters
    ----------
    a, b
        Moments of both sets, of one dimension D.
    allow_singular
        Score sets of N ≤ D vectors all the same, with a warning: their covariance is singular and
        the value mostly tells how small they are.

    Raises
    ------
    EvaluationError
        If the dimensions differ, or N ≤ D for either set and ``allow_singular`` is false.
    """
    _same_dimension(a.dimension, b.dimension)
    _check_size(min(a.n, b.n), a.dimension, allow_singular)
    values, vectors = eigh(a.covariance)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    product = root @ b.covariance @ root
    spectrum = eigh((product + product.T) / 2, eigvals_only=True)
    overlap = np.sqrt(np.clip(spectrum, 0, None)).sum()
    shift = a.mean - b.mean
    spread = np.trace(a.covariance) + np.trace(b.covariance)
    return float(max(shift @ shift + spread - 2 * overlap, 0.0))


@dataclass(frozen=True)
class KernelDistance:
    """Squared maximum mean discrepancy with its uncertainty.

    Attributes
    ----------
    mean
        Mean over the subsets; may be slightly negative, because it is unbiased.
    standard_error
        Standard error of that mean, from the scatter of the disjoint subsets.
    subsets, subset_size
        How many pairs of subsets were compared, of how many cells each.
    """

    mean: float
    standard_error: float
    subsets: int
    subset_size: int


def kernel_distance(
    real: ArrayLike, generated: ArrayLike, *, subset_size: int | None = None, seed: int = 0
) -> KernelDistance:
    """Return the kernel distance (KID) of two sets of feature vectors.

    The kernel is ``(x·y / D + 1)³``, the estimator the unbiased MMD² (Gretton et al. 2012, eq. 3).
    Both sets are shuffled and cut into disjoint subsets, so the subsets are independent and the
    standard error is what it says; overlapping random subsets would make it too small.

    Parameters
    ----------
    real, generated
        Feature vectors, shapes (N, D) and (M, D), finite.
    subset_size
        Cells of a subset; by default a tenth of the smaller set, at most 1,000.
    seed
        Of the shuffle.

    Raises
    ------
    EvaluationError
        If the dimensions differ, or there are not two subsets of at least two cells.
    """
    x, y = _matrix(real), _matrix(generated)
    _same_dimension(x.shape[1], y.shape[1])
    n = min(len(x), len(y))
    size = max(2, min(1000, n // 10)) if subset_size is None else subset_size
    subsets = n // size if size > 0 else 0
    if size < 2 or subsets < 2:
        raise EvaluationError(
            f"{len(x)} real and {len(y)} generated cells do not give two subsets of {size} cells; "
            "set subset_size between 2 and half of the smaller set"
        )
    rng = np.random.default_rng(seed)
    rows_x = rng.permutation(len(x))[: subsets * size].reshape(subsets, size)
    rows_y = rng.permutation(len(y))[: subsets * size].reshape(subsets, size)
    values = np.array([_mmd2(x[i], y[j]) for i, j in zip(rows_x, rows_y, strict=True)])
    error = values.std(ddof=1) / np.sqrt(subsets)
    return KernelDistance(float(values.mean()), float(error), subsets, size)


def _mmd2(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    n, m = len(x), len(y)
    within_x, within_y, between = _kernel(x, x), _kernel(y, y), _kernel(x, y)
    return float(
        (within_x.sum() - np.trace(within_x)) / (n * (n - 1))
        + (within_y.sum() - np.trace(within_y)) / (m * (m - 1))
        - 2 * between.mean()
    )


def _kernel(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    result: NDArray[np.float64] = (x @ y.T / x.shape[1] + 1.0) ** 3
    return result


def _matrix(features: ArrayLike) -> NDArray[np.float64]:
    x = np.asarray(features, dtype=np.float64)
    if x.ndim != 2:
        raise EvaluationError(f"features have shape {x.shape}; expected (cells, dimensions)")
    bad = ~np.isfinite(x).all(axis=1)
    if bad.any():
        raise EvaluationError(
            f"{bad.sum()} of {len(x)} feature vectors hold NaN or infinity, the first is row "
            f"{int(bad.argmax())}; drop or impute them before scoring"
        )
    return x


def _same_dimension(a: int, b: int) -> None:
    if a != b:
        raise EvaluationError(
            f"feature vectors of {a} and {b} dimensions cannot be compared; "
            "embed both sets with the same embedding"
        )


def _check_size(n: int, dimension: int, allow_singular: bool) -> None:
    if n > dimension:
        return
    message = (
        f"{n} cells in {dimension} dimensions: the covariance is singular and the Fréchet distance "
        "mostly measures the sample size"
    )
    if not allow_singular:
        raise EvaluationError(
            f"{message}; score more than {dimension} cells, use an embedding of fewer "
            "dimensions, or allow it explicitly (allow_singular)"
        )
    warnings.warn(message, stacklevel=3)
