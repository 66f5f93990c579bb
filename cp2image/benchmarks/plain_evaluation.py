"""The plain way to compare real and generated cells: pandas and scipy, one call after another.

What a user would write without `cp2image.metrics`, of which nothing is used here: the opponent of
the benchmark. Angles are correlated as if they were lengths. Above numpy, pandas, scipy.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.linalg import sqrtm

from cp2image.benchmarks.plain_measurement import measure_plain
from cp2image.benchmarks.plain_segmentation import segment_plain


def measure_set_plain(
    pixels: NDArray[np.uint8], channels: Sequence[str], nucleus: int, body: Sequence[int]
) -> pd.DataFrame:
    """Segment and measure patches, one at a time.

    Parameters
    ----------
    pixels
        Shape (N, C, H, W), 8 bit.
    channels
        Names of the channels.
    nucleus, body
        Indices of the channels to find nuclei and cells by.

    Returns
    -------
    pandas.DataFrame
        N rows, float64, under CellProfiler's names.
    """
    images = pixels / 255
    masks = np.stack([segment_plain(image, nucleus, body) for image in images])
    return measure_plain(images, masks, channels, accelerated=True)


def correlate_plain(real: pd.DataFrame, drawn: pd.DataFrame) -> "pd.Series[float]":
    """Return Pearson's r of each column between paired rows."""
    found: pd.Series[float] = real.corrwith(drawn)
    return found


def bootstrap_plain(
    real: pd.DataFrame, drawn: pd.DataFrame, wells: Sequence[str], resamples: int
) -> tuple[float, float]:
    """Return the 95 % interval of the mean r when whole wells are drawn with replacement."""
    names = pd.Series(list(wells))
    rows = list(names.groupby(names).indices.values())
    random = np.random.default_rng(0)
    means = []
    for _ in range(resamples):
        chosen = np.concatenate([rows[k] for k in random.integers(len(rows), size=len(rows))])
        parts = [part.iloc[chosen].reset_index(drop=True) for part in (real, drawn)]
        means.append(correlate_plain(*parts).mean())
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def embed_plain(
    real: pd.DataFrame, drawn: pd.DataFrame, dimensions: int = 64
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scale by median and MAD of the real cells, clip, project on their principal axes.

    Returns
    -------
    tuple of NDArray
        Real and generated, (N, ``dimensions``) each.
    """
    centre = real.median()
    scale = 1.4826 * (real - centre).abs().median()
    kept = scale[scale > 0].index
    x, y = (
        ((part[kept] - centre[kept]) / scale[kept]).clip(-5, 5).fillna(0).to_numpy(np.float64)
        for part in (real, drawn)
    )
    mean = x.mean(axis=0)
    axes = np.linalg.eigh(np.cov(x, rowvar=False))[1].T[::-1][:dimensions]
    return (x - mean) @ axes.T, (y - mean) @ axes.T


def frechet_plain(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Return the Fréchet distance with a matrix root, as the common implementations do."""
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    shift = x.mean(axis=0) - y.mean(axis=0)
    return float(shift @ shift + np.trace(a + b - 2 * np.real(sqrtm(a @ b))))


def kernel_plain(x: NDArray[np.float64], y: NDArray[np.float64], subset: int = 1000) -> float:
    """Return the kernel distance, the mean over ten random subsets of at most this many cells."""
    random = np.random.default_rng(0)
    size = min(subset, len(x), len(y))
    found = []
    for _ in range(10):
        p = x[random.choice(len(x), size, replace=False)]
        q = y[random.choice(len(y), size, replace=False)]
        pp, qq, pq = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((p, p), (q, q), (p, q)))
        pairs = size * (size - 1)
        within = (pp.sum() - np.trace(pp) + qq.sum() - np.trace(qq)) / pairs
        found.append(within - 2 * pq.mean())
    return float(np.mean(found))
