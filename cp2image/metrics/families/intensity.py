"""Intensity and Location: sums, spread, quantiles, edges, centres. Floor 1: numpy, numba.

CellProfiler's MeasureObjectIntensity. Quantiles are CellProfiler's own, at position n * q of the
sorted pixels. Of several brightest pixels, the one that CellProfiler's sort of the mask's pixels
puts last gives ``MaxIntensity_X``, ``_Y`` (see `ties`). Without any signal the centre of mass and
``MassDisplacement`` are NaN. Locations are pixels of the patch from 0 at the top left; the Z
columns of a single plane are 0.
"""

import numpy as np
from numpy.typing import NDArray

from cp2image.kernel import compile_kernel
from cp2image.metrics.families.batch import Batch
from cp2image.metrics.families.ties import find_last

_INTENSITY = (
    "IntegratedIntensity",
    "MeanIntensity",
    "StdIntensity",
    "MinIntensity",
    "MaxIntensity",
    "IntegratedIntensityEdge",
    "MeanIntensityEdge",
    "StdIntensityEdge",
    "MinIntensityEdge",
    "MaxIntensityEdge",
    "MassDisplacement",
    "LowerQuartileIntensity",
    "MedianIntensity",
    "MADIntensity",
    "UpperQuartileIntensity",
)
_LOCATION = (
    "CenterMassIntensity_X",
    "CenterMassIntensity_Y",
    "CenterMassIntensity_Z",
    "MaxIntensity_X",
    "MaxIntensity_Y",
    "MaxIntensity_Z",
)


def list_intensity(channels: tuple[str, ...]) -> list[str]:
    """Return the feature names of all channels."""
    return [f"Intensity_{name}_{channel}" for channel in channels for name in _INTENSITY]


def list_location(channels: tuple[str, ...]) -> list[str]:
    """Return the feature names of all channels."""
    return [f"Location_{name}_{channel}" for channel in channels for name in _LOCATION]


def measure_intensity(batch: Batch) -> NDArray[np.float64]:
    """Measure every mask in every channel; shape (images, compartments, channels * 15)."""
    n, channels = batch.images.shape[:2]
    compartments = batch.masks.shape[1]
    values = np.empty((n, compartments, channels, len(_INTENSITY)))
    _measure_levels(batch.images, batch.masks, batch.order, values)
    return values.reshape(n, compartments, -1)


def measure_location(batch: Batch) -> NDArray[np.float64]:
    """Locate every mask in every channel; shape (images, compartments, channels * 6)."""
    n, channels = batch.images.shape[:2]
    compartments = batch.masks.shape[1]
    values = np.empty((n, compartments, channels, len(_LOCATION)))
    _locate(batch.images, batch.masks, values)
    return values.reshape(n, compartments, -1)


@compile_kernel
def _locate(
    images: NDArray[np.float64], masks: NDArray[np.uint8], values: NDArray[np.float64]
) -> None:
    height, width = masks.shape[2:]
    levels = np.empty(height * width)
    pixels = np.empty(height * width, np.int64)
    for n in range(images.shape[0]):
        for k in range(masks.shape[1]):
            for c in range(images.shape[1]):
                row = values[n, k, c]
                total, centre = _find_centre(images[n, c], masks[n, k])
                brightest = _find_brightest(images[n, c], masks[n, k], levels, pixels)
                row[0], row[1] = centre[1], centre[0]
                row[2] = np.nan if total == 0 else 0.0
                row[3], row[4] = brightest % width, brightest // width
                row[5] = 0.0


@compile_kernel
def _find_centre(
    image: NDArray[np.float64], mask: NDArray[np.uint8]
) -> tuple[float, tuple[float, float]]:
    """Return the sum and its centre (row, column)."""
    total, row_sum, column_sum = 0.0, 0.0, 0.0
    for y in range(mask.shape[0]):
        for x in range(mask.shape[1]):
            if mask[y, x]:
                value = image[y, x]
                total += value
                row_sum += y * value
                column_sum += x * value
    return total, (row_sum / total, column_sum / total)


@compile_kernel
def _find_brightest(
    image: NDArray[np.float64],
    mask: NDArray[np.uint8],
    levels: NDArray[np.float64],
    pixels: NDArray[np.int64],
) -> int:
    """Return the flat index of the brightest pixel, 0 where the mask is empty.

    ``levels`` and ``pixels`` are scratch, shape (height * width,).
    """
    flat_image, flat_mask = image.ravel(), mask.ravel()
    size, best, place, count = 0, -np.inf, 0, 0
    for i in range(flat_mask.size):
        if flat_mask[i]:
            level = flat_image[i]
            levels[size], pixels[size] = level, i
            size += 1
            if level > best:
                best, place, count = level, i, 1
            elif level == best:
                count += 1
    if count > 1:
        place = pixels[find_last(levels[:size])]
    return place


@compile_kernel
def _measure_levels(
    images: NDArray[np.float64],
    masks: NDArray[np.uint8],
    order: NDArray[np.int32],
    values: NDArray[np.float64],
) -> None:
    height, width = masks.shape[2:]
    sorted_values = np.empty(height * width)
    for n in range(images.shape[0]):
        for k in range(masks.shape[1]):
            mask = masks[n, k]
            flat_mask = mask.ravel()
            for c in range(images.shape[1]):
                image, row = images[n, c], values[n, k, c]
                flat_image = image.ravel()
                count = 0
                for pixel in order[n, c]:
                    if flat_mask[pixel]:
                        sorted_values[count] = flat_image[pixel]
                        count += 1
                if count == 0:
                    row[:] = np.nan
                    continue
                levels = sorted_values[:count]
                total, centre = _find_centre(image, mask)
                mean = total / count
                spread = 0.0
                for value in levels:
                    spread += (value - mean) ** 2
                rows, columns = 0.0, 0.0
                for y in range(height):
                    for x in range(width):
                        if mask[y, x]:
                            rows += y
                            columns += x
                median = _interpolate(levels, count * 0.5)
                row[0] = total
                row[1] = mean
                row[2] = np.sqrt(spread / count)
                row[3] = levels[0]
                row[4] = levels[count - 1]
                _measure_edge(image, mask, row)
                row[10] = np.sqrt(
                    (centre[0] - rows / count) ** 2 + (centre[1] - columns / count) ** 2
                )
                row[11] = _interpolate(levels, count * 0.25)
                row[12] = median
                row[13] = _measure_deviation(levels, median)
                row[14] = _interpolate(levels, count * 0.75)


@compile_kernel
def _interpolate(levels: NDArray[np.float64], position: float) -> float:
    """Return the value at a fractional position of the sorted levels, clamped at the last."""
    last = levels.size - 1
    low = min(int(position), last)
    part = position - low
    return float(levels[low] * (1.0 - part) + levels[min(low + 1, last)] * part)


@compile_kernel
def _measure_deviation(levels: NDArray[np.float64], median: float) -> float:
    """Return the median absolute deviation: merge both sides of the median, nearest first."""
    count = levels.size
    above = np.searchsorted(levels, median)
    below = above - 1
    position = count * 0.5
    low = min(int(position), count - 1)
    high = min(low + 1, count - 1)
    first, second = 0.0, 0.0
    for rank in range(high + 1):
        if below >= 0 and (above >= count or median - levels[below] <= levels[above] - median):
            deviation = median - levels[below]
            below -= 1
        else:
            deviation = levels[above] - median
            above += 1
        if rank == low:
            first = deviation
        if rank == high:
            second = deviation
    part = position - low
    return first * (1.0 - part) + second * part


@compile_kernel
def _measure_edge(
    image: NDArray[np.float64], mask: NDArray[np.uint8], row: NDArray[np.float64]
) -> None:
    """Fill the five edge features: pixels with a 4-neighbour outside; the crop's rim is no edge.

    A mask that fills the crop has no edge: zeros, as in CellProfiler.
    """
    height, width = mask.shape
    count, total, smallest, largest = 0, 0.0, np.inf, -np.inf
    mean, spread = 0.0, 0.0
    for turn in range(2):
        for y in range(height):
            for x in range(width):
                if mask[y, x] and (
                    (y > 0 and not mask[y - 1, x])
                    or (y < height - 1 and not mask[y + 1, x])
                    or (x > 0 and not mask[y, x - 1])
                    or (x < width - 1 and not mask[y, x + 1])
                ):
                    value = image[y, x]
                    if turn == 0:
                        count += 1
                        total += value
                        smallest = min(smallest, value)
                        largest = max(largest, value)
                    else:
                        spread += (value - mean) ** 2
        if count == 0:
            row[5:10] = 0.0
            return
        mean = total / count
    row[5] = total
    row[6] = mean
    row[7] = np.sqrt(spread / count)
    row[8] = smallest
    row[9] = largest
