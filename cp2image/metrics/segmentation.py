"""Find nucleus, cell and cytoplasm in single-cell patches. Floor 1: numpy, scipy, numba.

After CellProfiler's IdentifyPrimaryObjects (Li's threshold, shape, shape), IdentifySecondaryObjects
(Propagation, Li's threshold, regularisation 0.05) and IdentifyTertiaryObjects, with scikit-image's
threshold, peaks and watershed and centrosome's propagation rewritten for batches of small crops.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from cp2image.errors import MeasurementError
from cp2image.kernel import compile_kernel
from cp2image.metrics.families.batch import scale_images
from cp2image.metrics.families.distance import measure_squared_distance
from cp2image.metrics.families.propagation import propagate_label
from cp2image.metrics.families.sorting import sort_pixels
from cp2image.metrics.families.watershed import flood_watershed, mark_peaks

_SMOOTHING = 1.0
_DISTANCE_SMOOTHING = 2.0
_PEAK_SPACING = 7
_REGULARISATION = 0.05
_BATCH = 64


def segment(
    images: NDArray[np.generic], nucleus_channel: int, cell_channels: Sequence[int]
) -> NDArray[np.uint8]:
    """Return the masks of the cell at the centre of each patch.

    Nuclei: Gaussian (sigma 1) on the nucleus channel, Li's threshold, holes filled, split at the
    peaks of the smoothed distance transform that are at least 7 pixels apart; the one on pixel
    (height // 2, width // 2). Cell: all nuclei propagated on the sum of the cell channels within
    Li's threshold of that sum, holes filled. Cytoplasm: the cell less the nucleus, whose
    8-connected outline belongs to both.

    Parameters
    ----------
    images
        Shape (images, channels, height, width), floats in [0, 1], or integers, which are divided
        by the largest value of their type. Propagation depends on this scale.
    nucleus_channel, cell_channels
        Indices of channels.

    Returns
    -------
    numpy.ndarray
        uint8, shape (images, 3, height, width), 0 or 1: nucleus, cell, cytoplasm. All 0 where no
        nucleus covers the centre.

    Raises
    ------
    MeasurementError
        If a pixel is NaN or outside [0, 1], or a channel does not exist.
    """
    n, channels, height, width = images.shape
    cell_channels = list(cell_channels)
    for channel in (nucleus_channel, *cell_channels):
        if not 0 <= channel < channels:
            raise MeasurementError(f"channel {channel} does not exist: images have {channels}")
    if not cell_channels:
        raise MeasurementError("no channel to find the cell by; expected at least one")
    masks = np.zeros((n, 3, height, width), np.uint8)
    for start in range(0, n, _BATCH):
        part = slice(start, start + _BATCH)
        scaled = scale_images(images[part], start)
        stain = scaled[:, nucleus_channel]
        foreground, distances = _separate_foreground(_smooth(stain, _SMOOTHING))
        labels = _split_nuclei(foreground, _smooth(distances, _DISTANCE_SMOOTHING))
        body = np.ascontiguousarray(scaled[:, cell_channels].sum(axis=1))
        smooth_body = _smooth(body, _SMOOTHING)
        _outline_cells(labels, body, smooth_body, sort_pixels(smooth_body), masks[part])
    return masks


def _smooth(images: NDArray[np.float64], sigma: float) -> NDArray[np.float64]:
    smoothed: NDArray[np.float64] = gaussian_filter(images, (0, sigma, sigma))
    return smoothed


def _separate_foreground(
    images: NDArray[np.float64],
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Return the thresholded, filled foreground and its distance to the background."""
    foreground = np.empty(images.shape, np.bool_)
    distances = np.empty(images.shape)
    _fill_foreground(images, sort_pixels(images), foreground, distances)
    return foreground, distances


@compile_kernel
def _fill_foreground(
    images: NDArray[np.float64],
    order: NDArray[np.int32],
    foreground: NDArray[np.bool_],
    distances: NDArray[np.float64],
) -> None:
    height, width = images.shape[1:]
    columns = np.empty((height, width), np.int64)
    squared = np.empty((height, width), np.int64)
    for n in range(images.shape[0]):
        threshold = _find_li_threshold(images[n].ravel()[order[n]])
        for y in range(height):
            for x in range(width):
                foreground[n, y, x] = images[n, y, x] > threshold
        _fill_holes(foreground[n])
        measure_squared_distance(foreground[n].view(np.uint8), False, columns, squared)
        for y in range(height):
            for x in range(width):
                distances[n, y, x] = np.sqrt(squared[y, x])


@compile_kernel
def _find_li_threshold(levels: NDArray[np.float64]) -> float:
    """Li and Tam's (1998) minimum cross entropy threshold of sorted pixels.

    Starts at the mean and stops within half the least gap between two levels, as
    ``skimage.filters.threshold_li``; a constant image is its own threshold.
    """
    size, smallest = levels.size, levels[0]
    if levels[size - 1] == smallest:
        return float(smallest)
    sums = np.empty(size + 1)
    sums[0] = 0.0
    gap = np.inf
    for i in range(size):
        sums[i + 1] = sums[i] + (levels[i] - smallest)
        if i > 0:
            step = (levels[i] - smallest) - (levels[i - 1] - smallest)
            if 0 < step < gap:
                gap = step
    tolerance = gap / 2
    threshold, previous = sums[size] / size, -gap
    while abs(threshold - previous) > tolerance:
        previous = threshold
        below = _count_up_to(levels, smallest, threshold)
        back = sums[below] / below
        fore = (sums[size] - sums[below]) / (size - below)
        if back == 0:
            break
        threshold = (back - fore) / (np.log(back) - np.log(fore))
    return float(threshold + smallest)


@compile_kernel
def _count_up_to(levels: NDArray[np.float64], smallest: float, threshold: float) -> int:
    """Count the sorted levels that are at most ``threshold`` above the smallest."""
    low, high = 0, levels.size
    while low < high:
        middle = (low + high) // 2
        if levels[middle] - smallest <= threshold:
            low = middle + 1
        else:
            high = middle
    return low


@compile_kernel
def _fill_holes(mask: NDArray[np.bool_]) -> None:
    """Fill background that is not 4-connected to the border, in place."""
    height, width = mask.shape
    outside = np.zeros((height, width), np.bool_)
    stack = np.empty(height * width, np.int64)
    count = 0
    for y in range(height):
        for x in range(width):
            border = y == 0 or x == 0 or y == height - 1 or x == width - 1
            if border and not mask[y, x]:
                outside[y, x] = True
                stack[count] = y * width + x
                count += 1
    while count:
        count -= 1
        y, x = stack[count] // width, stack[count] % width
        for step in range(4):
            v, u = y + (-1, 0, 0, 1)[step], x + (0, -1, 1, 0)[step]
            if 0 <= v < height and 0 <= u < width and not mask[v, u] and not outside[v, u]:
                outside[v, u] = True
                stack[count] = v * width + u
                count += 1
    for y in range(height):
        for x in range(width):
            mask[y, x] = not outside[y, x]


@compile_kernel
def _split_nuclei(
    foreground: NDArray[np.bool_], distances: NDArray[np.float64]
) -> NDArray[np.int32]:
    labels = np.empty(distances.shape, np.int32)
    for n in range(distances.shape[0]):
        mark_peaks(distances[n], foreground[n], _PEAK_SPACING, labels[n])
        flood_watershed(distances[n], foreground[n], labels[n])
    return labels


@compile_kernel
def _outline_cells(
    labels: NDArray[np.int32],
    body: NDArray[np.float64],
    smooth_body: NDArray[np.float64],
    order: NDArray[np.int32],
    masks: NDArray[np.uint8],
) -> None:
    height, width = body.shape[1:]
    allowed = np.empty((height, width), np.bool_)
    cell = np.empty((height, width), np.bool_)
    for n in range(body.shape[0]):
        wanted = labels[n, height // 2, width // 2]
        if wanted == 0:
            continue
        threshold = _find_li_threshold(smooth_body[n].ravel()[order[n]])
        for y in range(height):
            for x in range(width):
                allowed[y, x] = smooth_body[n, y, x] > threshold or labels[n, y, x] > 0
        propagate_label(body[n], labels[n], allowed, _REGULARISATION, wanted, cell)
        _fill_holes(cell)
        for y in range(height):
            for x in range(width):
                nucleus = labels[n, y, x] == wanted
                inner = nucleus and 0 < y < height - 1 and 0 < x < width - 1
                if inner:
                    for v in range(y - 1, y + 2):
                        for u in range(x - 1, x + 2):
                            inner = inner and labels[n, v, u] == wanted
                masks[n, 0, y, x] = nucleus
                masks[n, 1, y, x] = cell[y, x] or nucleus
                masks[n, 2, y, x] = masks[n, 1, y, x] and not inner
