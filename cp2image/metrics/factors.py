"""Factor analysis by maximum likelihood. Pure: numpy.

x = W f + ε with f ~ N(0, 1) and ε ~ N(0, Ψ), Ψ diagonal: what features share is told apart from
what each has for itself. Ljosa et al. (J Biomol Screen 18, 2013) fit it on control cells and take
the expected factors as a profile. Fitted by expectation maximisation with W from a singular value
decomposition in each round (Barber, Bayesian Reasoning and Machine Learning, 2012, algorithm 21.1).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cp2image.errors import EvaluationError

_ROUNDS, _TOLERANCE, _SMALL = 1_000, 1e-2, 1e-12


@dataclass(frozen=True, eq=False)
class Factors:
    """A fitted model.

    Attributes
    ----------
    mean
        Of the features, (D,).
    loadings
        W, (D, K).
    noise
        The diagonal of Ψ, (D,).
    log_likelihood
        Of the data it was fitted on.
    """

    mean: NDArray[np.float64]
    loadings: NDArray[np.float64]
    noise: NDArray[np.float64]
    log_likelihood: float

    @classmethod
    def fit(cls, x: NDArray[np.floating], factors: int) -> "Factors":
        """Fit on rows of ``x``, (N, D), finite.

        Raises
        ------
        EvaluationError
            If there are fewer rows or columns than factors, or values that are not finite.
        """
        x = np.asarray(x, np.float64)
        if x.ndim != 2 or min(x.shape) < factors or not np.isfinite(x).all():
            raise EvaluationError(
                f"{factors} factors of a table of shape {x.shape}: expected finite values and at "
                "least as many rows and columns as factors; ask for fewer"
            )
        mean: NDArray[np.float64] = x.mean(axis=0)
        count, width = x.shape
        centred = (x - mean) / np.sqrt(count)
        variance = centred.var(axis=0) * count
        noise: NDArray[Any] = np.ones(width)
        before = -np.inf
        loadings: NDArray[Any] = np.zeros((width, factors))
        for _ in range(_ROUNDS):
            root = np.sqrt(noise) + _SMALL
            _, values, axes = np.linalg.svd(centred / root, full_matrices=False)
            values, axes, rest = values[:factors] ** 2, axes[:factors], values[factors:]
            scaled = np.sqrt(np.maximum(values - 1, 0))[:, None] * axes * root
            loadings = np.asarray(scaled.T, dtype=np.float64)
            likelihood = np.log(np.maximum(values, _SMALL)).sum() + (rest**2).sum()
            likelihood += factors + np.log(2 * np.pi) * width + np.log(noise + _SMALL).sum()
            likelihood *= -count / 2
            if likelihood - before < _TOLERANCE:
                break
            before = likelihood
            noise = np.maximum(variance - (loadings**2).sum(axis=1), _SMALL)
        return cls(mean, loadings, noise, float(likelihood))

    def expected(self, x: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return the expected factors of rows, (N, D) to (N, K)."""
        weighted = self.loadings / self.noise[:, None]
        precision = np.eye(self.loadings.shape[1]) + self.loadings.T @ weighted
        deviation = np.asarray(x, dtype=np.float64) - self.mean
        return np.asarray(np.linalg.solve(precision, weighted.T @ deviation.T).T, dtype=np.float64)
