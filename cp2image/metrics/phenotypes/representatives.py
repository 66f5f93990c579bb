"""The typical cells of a group: medoid, diverse prototypes, clusters. Pure: numpy, scipy."""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.cluster.vq import kmeans2
from scipy.spatial.distance import cdist

from cp2image.errors import EvaluationError


def prototypes(cells: ArrayLike, count: int) -> NDArray[np.int64]:
    """Choose cells that stand for a group, the medoid first.

    The first has the smallest sum of distances to all cells; each further one lowers the sum of
    distances from every cell to the nearest chosen one the most (the BUILD phase of k-medoids,
    Kaufman and Rousseeuw 1990). So they spread over the group and yet are no outliers.

    Parameters
    ----------
    cells
        Coordinates, (N, q).
    count
        How many; all cells if there are fewer.

    Returns
    -------
    ndarray
        Rows of ``cells``, (min(count, N),).

    Raises
    ------
    EvaluationError
        If there is no cell.
    """
    x = np.asarray(cells, dtype=np.float64)
    if x.ndim != 2 or len(x) == 0:
        raise EvaluationError(f"prototypes of cells of shape {x.shape}; expected (1 or more, q)")
    apart = cdist(x, x)
    chosen = [int(apart.sum(axis=0).argmin())]
    nearest = apart[chosen[0]].copy()
    while len(chosen) < min(count, len(x)):
        gain = np.maximum(nearest[:, None] - apart, 0).sum(axis=0)
        gain[chosen] = -1.0
        chosen.append(int(gain.argmax()))
        nearest = np.minimum(nearest, apart[chosen[-1]])
    return np.array(chosen, dtype=np.int64)


def medoid(cells: ArrayLike) -> int:
    """Return the row of the cell with the smallest sum of distances to the others."""
    return int(prototypes(cells, 1)[0])


def cluster(cells: ArrayLike, count: int, seed: int = 0) -> NDArray[np.int64]:
    """Divide cells (N, q) into ``count`` clusters by k-means, the largest being number 0.

    Starts as k-means++ does, from ``seed``; the best of five.

    Raises
    ------
    EvaluationError
        If there are fewer cells than clusters.
    """
    x = np.asarray(cells, dtype=np.float64)
    if len(x) < count:
        raise EvaluationError(f"{count} clusters of {len(x)} cells; ask for fewer")
    best, labels = np.inf, np.zeros(len(x), dtype=np.int64)
    for turn in range(5):
        centres, found = kmeans2(x, count, minit="++", rng=seed + turn, missing="warn")
        loss = float(np.square(x - centres[found]).sum())
        if loss < best:
            best, labels = loss, found
    sizes = np.bincount(labels, minlength=count)
    rank = np.empty(count, dtype=np.int64)
    rank[np.argsort(-sizes, kind="stable")] = np.arange(count)
    return rank[labels]
