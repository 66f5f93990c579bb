"""Split foreground at its distance peaks, as scikit-image does. Floor 1: numpy, numba."""

import numpy as np
from numpy.typing import NDArray

from cp2image.kernel import compile_kernel
from cp2image.metrics.families.heap import pop, push


@compile_kernel
def mark_peaks(
    heights: NDArray[np.float64],
    foreground: NDArray[np.bool_],
    spacing: int,
    labels: NDArray[np.int32],
) -> int:
    """Return the number of local maxima of the foreground, numbered from the highest.

    A peak is the highest foreground pixel within ``spacing`` rows and columns; of two that are
    closer than ``spacing`` the lower, or the later, goes (``skimage.feature.peak_local_max``).
    ``labels`` receives the numbers from 1, 0 elsewhere.
    """
    height, width = heights.shape
    labels[:] = 0
    floor = np.inf
    for y in range(height):
        for x in range(width):
            floor = min(floor, heights[y, x])
    peaks = np.empty(height * width, np.int64)
    found = 0
    for y in range(height):
        for x in range(width):
            value = heights[y, x]
            if (
                foreground[y, x]
                and value > floor
                and _is_highest(heights, foreground, y, x, 1)
                and _is_highest(heights, foreground, y, x, spacing)
            ):
                place = found
                while place > 0:
                    before = peaks[place - 1]
                    if heights[before // width, before % width] >= value:
                        break
                    peaks[place] = before
                    place -= 1
                peaks[place] = y * width + x
                found += 1
    kept = 0
    for i in range(found):
        y, x = peaks[i] // width, peaks[i] % width
        free = True
        for v in range(max(0, y - spacing + 1), min(height, y + spacing)):
            for u in range(max(0, x - spacing + 1), min(width, x + spacing)):
                if labels[v, u]:
                    free = False
        if free:
            kept += 1
            labels[y, x] = kept
    return kept


@compile_kernel
def _is_highest(
    heights: NDArray[np.float64], foreground: NDArray[np.bool_], y: int, x: int, reach: int
) -> bool:
    for v in range(max(0, y - reach), min(heights.shape[0], y + reach + 1)):
        for u in range(max(0, x - reach), min(heights.shape[1], x + reach + 1)):
            if foreground[v, u] and heights[v, u] > heights[y, x]:
                return False
    return True


@compile_kernel
def flood_watershed(
    heights: NDArray[np.float64], foreground: NDArray[np.bool_], labels: NDArray[np.int32]
) -> None:
    """Grow the numbered peaks downhill over 4 neighbours, in place.

    In the order of ``skimage.segmentation.watershed``: highest first, then first come.
    """
    height, width = heights.shape
    size = height * width
    levels, entries = np.empty(size), np.empty(size, np.int64)
    count, age = 0, 0
    for y in range(height):
        for x in range(width):
            if labels[y, x]:
                count = push(levels, entries, count, -heights[y, x], y * width + x)
    while count:
        level, pixel = levels[0], entries[0] % size
        count = pop(levels, entries, count)
        y, x = pixel // width, pixel % width
        for step in range(4):
            v = y + (-1, 0, 0, 1)[step]
            u = x + (0, -1, 1, 0)[step]
            if 0 <= v < height and 0 <= u < width and foreground[v, u] and not labels[v, u]:
                labels[v, u] = labels[y, x]
                age += 1
                entry = age * size + v * width + u
                count = push(levels, entries, count, max(-heights[v, u], level), entry)
