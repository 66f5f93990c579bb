"""How far plates are from each other: the scale that other distances are seen on. Pure: numpy."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cp2image.metrics.frechet import Moments, frechet_distance, kernel_distance

_PLATES, _FEWEST = 5, 40


@dataclass(frozen=True)
class PlateDistance:
    """Medians over pairs of plates, all of the same number of cells.

    Attributes
    ----------
    pairs, n
        Pairs of plates; cells of each.
    frechet, floor
        Between two plates, and between two halves of one, n cells each.
    kernel
        Between two plates.
    """

    pairs: int
    n: int
    frechet: float
    floor: float
    kernel: float


def plate_distance(
    vectors: ArrayLike, plates: Sequence[str], chosen: NDArray[np.bool_]
) -> PlateDistance | None:
    """Compare real cells of one plate with those of another.

    Parameters
    ----------
    vectors
        Of real cells, (N, D), finite.
    plates
        N names.
    chosen
        Cells that the plates have in common, such as the negative controls, (N,).

    Returns
    -------
    PlateDistance or None
        None where fewer than two plates have 80 chosen cells.
    """
    x = np.asarray(vectors, dtype=np.float64)
    names = np.asarray(plates, dtype=str)
    own = {name: np.flatnonzero(chosen & (names == name)) for name in np.unique(names)}
    rich = sorted((rows for rows in own.values() if len(rows) >= 2 * _FEWEST), key=len)[-_PLATES:]
    if len(rich) < 2:
        return None
    rng = np.random.default_rng(0)
    count = min(len(rows) for rows in rich) // 2
    halves = [rng.permutation(rows)[: 2 * count].reshape(2, count) for rows in rich]
    small = count <= x.shape[1]

    def apart(a: NDArray[np.int64], b: NDArray[np.int64]) -> float:
        return frechet_distance(Moments.of(x[a]), Moments.of(x[b]), allow_singular=small)

    pairs = list(combinations(halves, 2))
    return PlateDistance(
        len(pairs),
        count,
        float(np.median([apart(a[0], b[0]) for a, b in pairs])),
        float(np.median([apart(first, second) for first, second in halves])),
        float(np.median([kernel_distance(x[a[0]], x[b[0]]).mean for a, b in pairs])),
    )
