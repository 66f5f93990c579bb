"""Correlation: how two channels go together within a mask. Floor 1: numpy, numba.

CellProfiler's MeasureColocalization without Costes (which it defines per image): Pearson's
Correlation and the Slope of the second channel on the first, and above 15 % of each channel's
maximum Overlap, K, Manders and rank-weighted colocalisation RWC (Singan et al. 2011). Correlation
is NaN where a channel is constant or the mask has one pixel.
"""

from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from cp2image.kernel import compile_kernel
from cp2image.metrics.families.batch import Batch

_THRESHOLD = 0.15
_PER_PAIR = 9


def list_correlation(channels: tuple[str, ...]) -> list[str]:
    """Return the feature names of all pairs of channels."""
    names = []
    for a, b in combinations(channels, 2):
        names += [f"Correlation_{name}_{a}_{b}" for name in ("Correlation", "Slope", "Overlap")]
        for name in ("K", "Manders", "RWC"):
            names += [f"Correlation_{name}_{a}_{b}", f"Correlation_{name}_{b}_{a}"]
    return names


def measure_correlation(batch: Batch) -> NDArray[np.float64]:
    """Measure every mask in every pair of channels; shape (images, compartments, pairs * 9)."""
    n, channels = batch.images.shape[:2]
    compartments = batch.masks.shape[1]
    pairs = np.array(list(combinations(range(channels), 2)), np.int64).reshape(-1, 2)
    values = np.empty((n, compartments, len(pairs), _PER_PAIR))
    _measure_pairs(batch.images, batch.masks, batch.order, pairs, values)
    return values.reshape(n, compartments, -1)


@compile_kernel
def _measure_pairs(
    images: NDArray[np.float64],
    masks: NDArray[np.uint8],
    order: NDArray[np.int32],
    pairs: NDArray[np.int64],
    values: NDArray[np.float64],
) -> None:
    channels, height, width = images.shape[1:]
    pixels = np.empty((channels, height * width))
    ranks = np.empty((channels, height * width), np.int64)
    places = np.empty(height * width, np.int64)
    for n in range(images.shape[0]):
        for k in range(masks.shape[1]):
            mask = masks[n, k].ravel()
            count = 0
            for pixel in range(height * width):
                if mask[pixel]:
                    places[pixel] = count
                    count += 1
            if count == 0:
                values[n, k] = np.nan
                continue
            for c in range(channels):
                image = images[n, c].ravel()
                _rank_pixels(image, mask, order[n, c], places, pixels[c], ranks[c])
            for p in range(pairs.shape[0]):
                a, b = pairs[p]
                first, second = pixels[a, :count], pixels[b, :count]
                row = values[n, k, p]
                row[0], row[1] = _fit_line(first, second)
                _measure_overlap(first, second, ranks[a, :count], ranks[b, :count], row)


@compile_kernel
def _rank_pixels(
    image: NDArray[np.float64],
    mask: NDArray[np.uint8],
    order: NDArray[np.int32],
    places: NDArray[np.int64],
    pixels: NDArray[np.float64],
    ranks: NDArray[np.int64],
) -> None:
    """List the mask's pixels and their ranks from 0 upwards; equal pixels have equal ranks."""
    rank, previous = -1, -1.0
    for pixel in order:
        if mask[pixel]:
            value = image[pixel]
            if value != previous:
                rank += 1
                previous = value
            pixels[places[pixel]] = value
            ranks[places[pixel]] = rank


@compile_kernel
def _fit_line(first: NDArray[np.float64], second: NDArray[np.float64]) -> tuple[float, float]:
    """Return Pearson's r and the least-squares slope of the second channel on the first."""
    first_sum, second_sum, first_varies, second_varies = 0.0, 0.0, False, False
    for i in range(first.size):
        first_sum += first[i]
        second_sum += second[i]
        first_varies = first_varies or first[i] != first[0]
        second_varies = second_varies or second[i] != second[0]
    if not first_varies:
        return np.nan, np.nan
    first_mean, second_mean = first_sum / first.size, second_sum / first.size
    xx, yy, xy = 0.0, 0.0, 0.0
    for i in range(first.size):
        x, y = first[i] - first_mean, second[i] - second_mean
        xx += x * x
        yy += y * y
        xy += x * y
    if not second_varies:
        return np.nan, 0.0
    return min(max(xy / np.sqrt(xx) / np.sqrt(yy), -1.0), 1.0), xy / xx


@compile_kernel
def _measure_overlap(
    first: NDArray[np.float64],
    second: NDArray[np.float64],
    first_ranks: NDArray[np.int64],
    second_ranks: NDArray[np.int64],
    row: NDArray[np.float64],
) -> None:
    """Fill Overlap, K, Manders and RWC; all 0 if no pixel is above both thresholds."""
    first_largest, second_largest, levels = 0.0, 0.0, 0
    for i in range(first.size):
        first_largest = max(first_largest, first[i])
        second_largest = max(second_largest, second[i])
        levels = max(levels, first_ranks[i] + 1, second_ranks[i] + 1)
    first_threshold, second_threshold = _THRESHOLD * first_largest, _THRESHOLD * second_largest
    first_total, second_total = 0.0, 0.0
    xx, yy, xy, x_sum, y_sum, x_weighted, y_weighted = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    together = False
    for i in range(first.size):
        x, y = first[i], second[i]
        if x >= first_threshold:
            first_total += x
        if y >= second_threshold:
            second_total += y
        if x >= first_threshold and y >= second_threshold:
            together = True
            weight = (levels - abs(first_ranks[i] - second_ranks[i])) / levels
            xx += x * x
            yy += y * y
            xy += x * y
            x_sum += x
            y_sum += y
            x_weighted += x * weight
            y_weighted += y * weight
    if not together:
        row[2:] = 0.0
        return
    row[2] = xy / np.sqrt(xx * yy)
    row[3] = xy / xx
    row[4] = xy / yy
    row[5] = x_sum / first_total
    row[6] = y_sum / second_total
    row[7] = x_weighted / first_total
    row[8] = y_weighted / second_total
