"""Granularity: what is lost of an object as ever larger bright grains go. Floor 1: numpy, numba.

CellProfiler's MeasureGranularity: subsample the image, subtract its opening with a disc of radius
10 (taken at a quarter of that size), then 16 times erode, reconstruct under the image (Vincent
2000), scale back and take the object's mean; each step's loss is in per cent of the object's mean
intensity. It works on the whole patch, so the steps are shared by all masks of a channel.
A patch that subsamples to less than 2 pixels has NaN; a loss of less than 1e-12 per cent, mere
rounding, is 0.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cp2image.kernel import compile_kernel
from cp2image.metrics.families.batch import Batch

_STEPS = 16
_RADIUS = 10
_BACKGROUND_SUBSAMPLE = 0.25
_ROUNDING = 1e-12


def list_granularity(channels: tuple[str, ...]) -> list[str]:
    """Return the feature names of all channels."""
    return [
        f"Granularity_{step}_{channel}" for channel in channels for step in range(1, _STEPS + 1)
    ]


def measure_granularity(batch: Batch, subsample: float) -> NDArray[np.float64]:
    """Measure every mask in every channel; shape (images, compartments, channels * 16).

    ``subsample`` in (0, 1] is the side of the subsampled image relative to the patch.
    """
    n, channels, height, width = batch.images.shape
    compartments = batch.masks.shape[1]
    values = np.full((n, compartments, channels, _STEPS), np.nan)
    rows, columns = int(height * subsample), int(width * subsample)
    if min(rows, columns) >= 2:
        y, x = _make_grids(height, rows, subsample), _make_grids(width, columns, subsample)
        small = _resample(batch.images, y.down, x.down)
        background = _resample(small, y.background_down, x.background_down)
        _open_images(background)
        background = _resample(background, y.background_up, x.background_up)
        small = np.maximum(small - background, 0.0)
        weights = _spread_masks(batch.masks, y.up, x.up, rows, columns)
        _measure_spectra(small, weights, batch.images, batch.masks, values)
    return values.reshape(n, compartments, -1)


class _Points(NamedTuple):
    """Points on a line of pixels: the pixel before each, its weight and that of the next."""

    before: NDArray[np.int64]
    weight: NDArray[np.float64]
    next_weight: NDArray[np.float64]


class _Grids(NamedTuple):
    """Where the pixels of each image lie on the image that it is interpolated from."""

    down: _Points
    background_down: _Points
    background_up: _Points
    up: _Points


def _make_grids(side: int, small: int, subsample: float) -> _Grids:
    """Place the grids of one axis, as CellProfiler does, whose last points may miss the border."""
    background = small * _BACKGROUND_SUBSAMPLE
    coarse = np.arange(0, background) / _BACKGROUND_SUBSAMPLE
    shrink, grow = (background - 1) / (small - 1), (small - 1) / (side - 1)
    return _Grids(
        down=_place_points(np.arange(small) / subsample, side),
        background_down=_place_points(coarse, small),
        background_up=_place_points(np.arange(small) * shrink, len(coarse)),
        up=_place_points(np.arange(side) * grow, small),
    )


def _place_points(coordinates: NDArray[np.floating[Any]], side: int) -> _Points:
    """Split coordinates on a line of ``side`` pixels; beyond its ends all weights are 0."""
    before = np.floor(coordinates)
    part = coordinates - before
    inside = (coordinates >= 0) & (coordinates <= side - 1)
    weight = np.where(inside, 1 - part, 0.0)
    next_weight = np.where(inside & (before < side - 1), 1 - weight, 0.0)
    return _Points(np.clip(before, 0, side - 1).astype(np.int64), weight, next_weight)


@compile_kernel
def _resample(images: NDArray[np.float64], rows: _Points, columns: _Points) -> NDArray[np.float64]:
    """Interpolate every image bilinearly, adding in the order of scipy's ``map_coordinates``."""
    n, channels, height, width = images.shape
    result = np.empty((n, channels, rows.weight.size, columns.weight.size))
    for i in range(n):
        for c in range(channels):
            image = images[i, c]
            for v in range(rows.weight.size):
                y, top, bottom = rows.before[v], rows.weight[v], rows.next_weight[v]
                below = min(y + 1, height - 1)
                for u in range(columns.weight.size):
                    x, left, right = columns.before[u], columns.weight[u], columns.next_weight[u]
                    beside = min(x + 1, width - 1)
                    result[i, c, v, u] = (
                        image[y, x] * top * left
                        + image[y, beside] * top * right
                        + image[below, x] * bottom * left
                        + image[below, beside] * bottom * right
                    )
    return result


@compile_kernel
def _spread_masks(
    masks: NDArray[np.uint8], rows: _Points, columns: _Points, height: int, width: int
) -> NDArray[np.float64]:
    """Weights of a small image's pixels in the mean of a mask over the image scaled back up."""
    n, compartments, full_height, full_width = masks.shape
    weights = np.zeros((n, compartments, height, width))
    for i in range(n):
        for k in range(compartments):
            target = weights[i, k]
            area = 0
            for v in range(full_height):
                y, top, bottom = rows.before[v], rows.weight[v], rows.next_weight[v]
                below = min(y + 1, height - 1)
                for u in range(full_width):
                    if masks[i, k, v, u]:
                        x = columns.before[u]
                        left, right = columns.weight[u], columns.next_weight[u]
                        beside = min(x + 1, width - 1)
                        area += 1
                        target[y, x] += top * left
                        target[y, beside] += top * right
                        target[below, x] += bottom * left
                        target[below, beside] += bottom * right
            target /= area
    return weights


@compile_kernel
def _open_images(images: NDArray[np.float64]) -> None:
    """Erode, then dilate every image by the disc, in place; beyond the border nothing counts."""
    height, width = images.shape[2:]
    reach = np.empty(_RADIUS + 1, np.int64)
    for dy in range(_RADIUS + 1):
        reach[dy] = int(np.sqrt(_RADIUS * _RADIUS - dy * dy))
    result = np.empty((height, width))
    for n in range(images.shape[0]):
        for c in range(images.shape[1]):
            image = images[n, c]
            for sign in (1.0, -1.0):
                for y in range(height):
                    for x in range(width):
                        best = np.inf
                        for v in range(max(0, y - _RADIUS), min(height, y + _RADIUS + 1)):
                            half = reach[abs(v - y)]
                            for u in range(max(0, x - half), min(width, x + half + 1)):
                                best = min(best, sign * image[v, u])
                        result[y, x] = sign * best
                _copy_pixels(result, image)


@compile_kernel
def _measure_spectra(
    small: NDArray[np.float64],
    weights: NDArray[np.float64],
    images: NDArray[np.float64],
    masks: NDArray[np.uint8],
    values: NDArray[np.float64],
) -> None:
    compartments = masks.shape[1]
    height, width = small.shape[2:]
    eroded, next_eroded = np.empty((height, width)), np.empty((height, width))
    rebuilt = np.empty((height, width))
    start, current = np.empty(compartments), np.empty(compartments)
    for n in range(small.shape[0]):
        for c in range(small.shape[1]):
            image = small[n, c]
            for k in range(compartments):
                current[k] = _find_mean(images[n, c], masks[n, k])
                start[k] = max(current[k], np.finfo(np.float64).eps)
            _copy_pixels(image, eroded)
            for step in range(_STEPS):
                if not _erode(eroded, next_eroded):
                    values[n, :, c, step:] = 0.0
                    if step > 0:
                        break
                _copy_pixels(next_eroded, eroded)
                _copy_pixels(next_eroded, rebuilt)
                _rebuild(rebuilt, image)
                for k in range(compartments):
                    mean = 0.0
                    for y in range(height):
                        for x in range(width):
                            mean += weights[n, k, y, x] * rebuilt[y, x]
                    loss = (current[k] - mean) * 100 / start[k]
                    values[n, k, c, step] = loss if abs(loss) > _ROUNDING else 0.0
                    current[k] = mean


@compile_kernel
def _copy_pixels(image: NDArray[np.float64], result: NDArray[np.float64]) -> None:
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            result[y, x] = image[y, x]


@compile_kernel
def _find_mean(image: NDArray[np.float64], mask: NDArray[np.uint8]) -> float:
    total, count = 0.0, 0
    for y in range(mask.shape[0]):
        for x in range(mask.shape[1]):
            if mask[y, x]:
                total += image[y, x]
                count += 1
    return total / count


@compile_kernel
def _erode(image: NDArray[np.float64], result: NDArray[np.float64]) -> bool:
    """Take the least of each pixel and its 4 neighbours; return whether anything changed."""
    height, width = image.shape
    changed = False
    for y in range(height):
        for x in range(width):
            least = image[y, x]
            if y > 0:
                least = min(least, image[y - 1, x])
            if y < height - 1:
                least = min(least, image[y + 1, x])
            if x > 0:
                least = min(least, image[y, x - 1])
            if x < width - 1:
                least = min(least, image[y, x + 1])
            if least != image[y, x]:
                changed = True
            result[y, x] = least
    return changed


@compile_kernel
def _rebuild(seed: NDArray[np.float64], limit: NDArray[np.float64]) -> None:
    """Grow ``seed`` under ``limit`` to 4 neighbours: sweep both ways until nothing changes."""
    height, width = seed.shape
    changed = True
    while changed:
        changed = False
        for y in range(height):
            for x in range(width):
                most = seed[y, x]
                if y > 0:
                    most = max(most, seed[y - 1, x])
                if x > 0:
                    most = max(most, seed[y, x - 1])
                most = min(most, limit[y, x])
                if most > seed[y, x]:
                    seed[y, x] = most
                    changed = True
        for y in range(height - 1, -1, -1):
            for x in range(width - 1, -1, -1):
                most = seed[y, x]
                if y < height - 1:
                    most = max(most, seed[y + 1, x])
                if x < width - 1:
                    most = max(most, seed[y, x + 1])
                most = min(most, limit[y, x])
                if most > seed[y, x]:
                    seed[y, x] = most
                    changed = True
