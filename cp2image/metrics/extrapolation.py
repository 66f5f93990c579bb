"""The Fréchet distance that endlessly many cells would give. Pure: numpy.

At N cells its bias is about proportional to 1/N, differently for each generator (Chong and Forsyth,
CVPR 2020: FID∞). It is computed for several N and a line over 1/N is followed to 0.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cp2image.errors import EvaluationError
from cp2image.metrics.frechet import Moments, frechet_distance

_POINTS, _MANY_DIMENSIONS, _FEW_POINTS = 12, 512, 5


@dataclass(frozen=True)
class Extrapolation:
    """A line through Fréchet distances over 1/N.

    Attributes
    ----------
    limit
        Its value at 1/N = 0; may be slightly negative, as the line has errors of its own.
    standard_error
        Of that value, from the scatter about the line. The points share cells: it is too small.
    slope
        Of the line: distance · N, the bias.
    sizes
        The N.
    """

    limit: float
    standard_error: float
    slope: float
    sizes: tuple[int, ...]


def frechet_at_infinity(real: ArrayLike, generated: ArrayLike, *, seed: int = 0) -> Extrapolation:
    """Extrapolate the Fréchet distance to sets of any size, both drawn anew at each N.

    The N lie evenly in 1/N between a quarter of the smaller set (more than D + 1) and all of it.

    Parameters
    ----------
    real, generated
        Feature vectors, (N, D) and (M, D), finite.
    seed
        Of the subsets.

    Raises
    ------
    EvaluationError
        If the sets are too small: less than 1.5 times as many cells as dimensions, or than 20.
    """
    x: NDArray[np.floating] = np.asarray(real)
    y: NDArray[np.floating] = np.asarray(generated)
    count, width = min(len(x), len(y)), x.shape[1]
    if count < max(1.5 * width, 20):
        raise EvaluationError(
            f"{count} cells in {width} dimensions: too few to extrapolate the Fréchet distance; "
            f"score at least {max(3 * width // 2 + 1, 20)}"
        )
    points = _POINTS if width <= _MANY_DIMENSIONS else _FEW_POINTS
    smallest = max(count // 4, width + 2)
    sizes = np.rint(1 / np.linspace(1 / smallest, 1 / count, points)).astype(int)
    rng = np.random.default_rng(seed)
    found = [
        frechet_distance(*(Moments.of(s[rng.permutation(len(s))[:n]]) for s in (x, y)))
        for n in sizes
    ]
    design = np.stack([np.ones(points), 1 / sizes], axis=1)
    line, *_ = np.linalg.lstsq(design, np.array(found), rcond=None)
    rest = np.array(found) - design @ line
    variance = (rest @ rest) / (points - 2) * np.linalg.inv(design.T @ design)[0, 0]
    return Extrapolation(
        float(line[0]), float(np.sqrt(variance)), float(line[1]), tuple(int(n) for n in sizes)
    )
