"""Texture: Haralick's features of grey-level co-occurrence. Floor 1: numpy, numba.

CellProfiler's MeasureTexture (Haralick, Shanmugam, Dinstein 1973, as mahotas computes them): 256
grey levels on the absolute scale 0 to 1, pairs 3 pixels apart in four directions, 00 (0, 3),
01 (3, 3), 02 (3, 0), 03 (3, -3) as (rows, columns). Pairs with a grey level of 0 do not count; an
object without any pair in some direction has NaN in all its features of that channel.

The matrices stay sparse: only the cells that hold a pair are visited, and sums of counts are
integers, so that variances do not lose digits.
"""

import numpy as np
from numpy.typing import NDArray

from cp2image.kernel import compile_kernel
from cp2image.metrics.families.batch import Batch

_FEATURES = (
    "AngularSecondMoment",
    "Contrast",
    "Correlation",
    "Variance",
    "InverseDifferenceMoment",
    "SumAverage",
    "SumVariance",
    "SumEntropy",
    "Entropy",
    "DifferenceVariance",
    "DifferenceEntropy",
    "InfoMeas1",
    "InfoMeas2",
)
_SCALE = 3
_LEVELS = 256


def list_texture(channels: tuple[str, ...]) -> list[str]:
    """Return the feature names of all channels: per direction, the 13 features."""
    return [
        f"Texture_{name}_{channel}_{_SCALE}_{direction:02d}_{_LEVELS}"
        for channel in channels
        for direction in range(4)
        for name in _FEATURES
    ]


def measure_texture(batch: Batch) -> NDArray[np.float64]:
    """Measure every mask in every channel; shape (images, compartments, channels * 52)."""
    n, channels, height, width = batch.images.shape
    compartments = batch.masks.shape[1]
    values = np.empty((n, compartments, channels, 4, len(_FEATURES)))
    counts = np.arange(1, 2 * height * width + 1)
    products = np.concatenate([[0.0], counts * np.log2(counts)])
    _measure_objects(batch.images, batch.masks, products, values)
    return values.reshape(n, compartments, -1)


@compile_kernel
def _measure_objects(
    images: NDArray[np.float64],
    masks: NDArray[np.uint8],
    products: NDArray[np.float64],
    values: NDArray[np.float64],
) -> None:
    height, width = masks.shape[2:]
    grey = np.empty((height, width), np.int64)
    matrix = np.zeros(_LEVELS * _LEVELS, np.int64)
    touched = np.empty(height * width, np.int64)
    for n in range(images.shape[0]):
        for c in range(images.shape[1]):
            for k in range(masks.shape[1]):
                largest = 0
                for y in range(height):
                    for x in range(width):
                        grey[y, x] = 0
                        if masks[n, k, y, x]:
                            grey[y, x] = int(np.rint(images[n, c, y, x] * (_LEVELS - 1)))
                            largest = max(largest, grey[y, x])
                for direction in range(4):
                    dy = 0 if direction == 0 else _SCALE
                    dx = (_SCALE, _SCALE, 0, -_SCALE)[direction]
                    size = _count_pairs(grey, dy, dx, matrix, touched)
                    if size == 0:
                        values[n, k, c] = np.nan
                        break
                    _summarise_pairs(
                        matrix, touched[:size], largest + 1, products, values[n, k, c, direction]
                    )


@compile_kernel
def _count_pairs(
    grey: NDArray[np.int64],
    dy: int,
    dx: int,
    matrix: NDArray[np.int64],
    touched: NDArray[np.int64],
) -> int:
    """Count pairs into the upper triangle of ``matrix``; list its cells; return their number."""
    height, width = grey.shape
    size = 0
    for y in range(height - dy):
        for x in range(max(0, -dx), min(width, width - dx)):
            a, b = grey[y, x], grey[y + dy, x + dx]
            if a and b:
                cell = min(a, b) * _LEVELS + max(a, b)
                if matrix[cell] == 0:
                    touched[size] = cell
                    size += 1
                matrix[cell] += 1
    return size


@compile_kernel
def _summarise_pairs(
    matrix: NDArray[np.int64],
    touched: NDArray[np.int64],
    levels: int,
    products: NDArray[np.float64],
    row: NDArray[np.float64],
) -> None:
    """Fill the 13 features from the counts, and clear the counts.

    With counts c of a matrix that sums to T, an entropy is (T log2(T) - sum(c log2(c))) / T;
    ``products`` holds c * log2(c).
    """
    marginal = np.zeros(levels, np.int64)
    sums = np.zeros(2 * levels, np.int64)
    differences = np.zeros(levels, np.int64)
    squares, cross, total = 0, 0, 0
    homogeneity, logs = 0.0, 0.0
    for cell in touched:
        count = matrix[cell]
        matrix[cell] = 0
        i, j = cell // _LEVELS, cell % _LEVELS
        gap = j - i
        if gap == 0:
            count *= 2
            squares += count * count
            logs += products[count]
            marginal[i] += count
        else:
            squares += 2 * count * count
            logs += 2 * products[count]
            marginal[i] += count
            marginal[j] += count
            count *= 2
        total += count
        cross += count * i * j
        homogeneity += count / (gap * gap + 1)
        sums[i + j] += count
        differences[gap] += count
    first, second, marginal_logs, difference_logs, sum_logs = 0, 0, 0.0, 0.0, 0.0
    contrast, difference_squares = 0, 0.0
    mean_difference = 1.0 / levels
    for level in range(levels):
        first += level * marginal[level]
        second += level * level * marginal[level]
        contrast += level * level * differences[level]
        marginal_logs += products[marginal[level]]
        difference_logs += products[differences[level]]
        difference_squares += (differences[level] / total - mean_difference) ** 2
    sum_squares = 0
    for level in range(2 * levels):
        sum_logs += products[sums[level]]
        sum_squares += level * level * sums[level]
    scale = float(total) * total
    variance = (total * second - first * first) / scale
    entropy = (products[total] - logs) / total
    marginal_entropy = (products[total] - marginal_logs) / total
    information = 2 * marginal_entropy - entropy
    row[0] = squares / scale
    row[1] = contrast / total
    row[2] = 1.0
    if variance > 0:
        row[2] = (total * cross - first * first) / scale / variance
    row[3] = variance
    row[4] = homogeneity / total
    row[5] = 2 * first / total
    row[6] = (total * sum_squares - 4 * first * first) / scale
    row[7] = (products[total] - sum_logs) / total
    row[8] = entropy
    row[9] = difference_squares / levels
    row[10] = (products[total] - difference_logs) / total
    row[11] = -information / marginal_entropy if marginal_entropy != 0 else -information
    row[12] = np.sqrt(max(0.0, 1 - np.exp(-2 * information)))
