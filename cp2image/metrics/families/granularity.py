"""Granularity: what is lost of an object as ever larger bright grains go. Floor 1: numpy, numba.

CellProfiler's MeasureGranularity: subsample the image, subtract its opening with a disc of radius
10 (taken at a quarter of that size), then 16 times erode, reconstruct under the image (Vincent
2000), scale back and take the object's mean; each step's loss is in per cent of the object's mean
intensity. It works on the whole patch, so the steps are shared by all masks of a channel.
A patch that subsamples to less than 2 pixels has NaN.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cp2image.metrics.families.batch import Batch
from cp2image.metrics.families.kernel import compile_kernel

_STEPS = 16
_RADIUS = 10
_BACKGROUND_SUBSAMPLE = 0.25


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
        y, x = _make_scalings(height, rows, subsample), _make_scalings(width, columns, subsample)
        small = y.down @ batch.images @ x.down.T
        background = np.ascontiguousarray(y.background_down @ small @ x.background_down.T)
        _open_images(background)
        small = np.maximum(small - y.background_up @ background @ x.background_up.T, 0.0)
        areas = batch.masks.sum(axis=(2, 3), dtype=np.float64)[:, :, None, None]
        with np.errstate(invalid="ignore", divide="ignore"):
            weights = (y.up.T @ batch.masks.astype(np.float64) @ x.up) / areas
        _measure_spectra(small, np.ascontiguousarray(weights), batch.images, batch.masks, values)
    return values.reshape(n, compartments, -1)


class _Scalings(NamedTuple):
    """Linear interpolations along one axis, as matrices that take the old grid to the new."""

    down: NDArray[np.float64]
    background_down: NDArray[np.float64]
    background_up: NDArray[np.float64]
    up: NDArray[np.float64]


def _make_scalings(side: int, small: int, subsample: float) -> _Scalings:
    background = small * _BACKGROUND_SUBSAMPLE
    coarse = np.arange(0, background) / _BACKGROUND_SUBSAMPLE
    return _Scalings(
        down=_interpolate(np.arange(small) / subsample, side),
        background_down=_interpolate(coarse, small),
        background_up=_interpolate(
            np.arange(small) * ((background - 1) / (small - 1)), len(coarse)
        ),
        up=_interpolate(np.arange(side) * ((small - 1) / (side - 1)), small),
    )


def _interpolate(coordinates: NDArray[np.float64], side: int) -> NDArray[np.float64]:
    """Weights of the pixels of a line of ``side`` at ``coordinates``; 0 beyond its ends."""
    matrix = np.zeros((len(coordinates), side))
    for row, coordinate in enumerate(coordinates):
        if 0 <= coordinate <= side - 1:
            low = int(coordinate)
            matrix[row, low] = 1 - (coordinate - low)
            if low + 1 < side:
                matrix[row, low + 1] = coordinate - low
    return matrix


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
                image[:] = result


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
            eroded[:] = image
            for step in range(_STEPS):
                if not _erode(eroded, next_eroded):
                    values[n, :, c, step:] = 0.0
                    if step > 0:
                        break
                eroded[:] = next_eroded
                rebuilt[:] = eroded
                _rebuild(rebuilt, image)
                for k in range(compartments):
                    mean = 0.0
                    for y in range(height):
                        for x in range(width):
                            mean += weights[n, k, y, x] * rebuilt[y, x]
                    values[n, k, c, step] = (current[k] - mean) * 100 / start[k]
                    current[k] = mean


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
