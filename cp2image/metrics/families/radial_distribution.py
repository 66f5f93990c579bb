"""RadialDistribution: intensity in four rings from the centre to the edge. Floor 1: numpy, numba.

CellProfiler's MeasureObjectIntensityDistribution with scaled bins. The centre is the pixel
farthest from the mask's edge (the patch's border is no edge); of several at the same distance, the
one that CellProfiler's sort of the whole patch puts last (see `ties`): there the rings change with
the cell's place in the patch. Distances from the centre run through the mask, in steps of 1 and
sqrt(2); parts of the mask that cannot be reached from the centre do not count. FracAtD and MeanFrac
of an object without signal are NaN, RadialCV is 0.
"""

import numpy as np
from numpy.typing import NDArray

from cp2image.kernel import compile_kernel
from cp2image.metrics.families.batch import Batch
from cp2image.metrics.families.distance import measure_squared_distance
from cp2image.metrics.families.ties import find_last

_FEATURES = ("FracAtD", "MeanFrac", "RadialCV")
_BINS = 4
_WEDGES = 8


def list_radial_distribution(channels: tuple[str, ...]) -> list[str]:
    """Return the feature names of all channels: per feature, from the centre outwards."""
    return [
        f"RadialDistribution_{name}_{channel}_{ring}of{_BINS}"
        for channel in channels
        for name in _FEATURES
        for ring in range(1, _BINS + 1)
    ]


def measure_radial_distribution(batch: Batch) -> NDArray[np.float64]:
    """Measure every mask in every channel; shape (images, compartments, channels * 12)."""
    n, channels = batch.images.shape[:2]
    compartments = batch.masks.shape[1]
    values = np.empty((n, compartments, channels, len(_FEATURES), _BINS))
    _measure_rings(batch.images, batch.masks, values)
    return values.reshape(n, compartments, -1)


@compile_kernel
def _measure_rings(
    images: NDArray[np.float64], masks: NDArray[np.uint8], values: NDArray[np.float64]
) -> None:
    height, width = masks.shape[2:]
    columns = np.empty((height, width), np.int64)
    squared = np.empty((height, width), np.int64)
    travelled = np.empty((height, width))
    places = np.empty((height, width), np.int64)
    for n in range(masks.shape[0]):
        for k in range(masks.shape[1]):
            mask = masks[n, k]
            measure_squared_distance(mask, False, columns, squared)
            row, column = _find_centre(squared)
            if squared[row, column] == 0:
                values[n, k] = np.nan
                continue
            _travel(mask, row, column, travelled)
            _place_pixels(squared, travelled, row, column, places)
            for c in range(images.shape[1]):
                _summarise_rings(images[n, c], places, values[n, k, c])


@compile_kernel
def _find_centre(squared: NDArray[np.int64]) -> tuple[int, int]:
    levels = squared.ravel()
    best, place, count = 0, 0, 0
    for i in range(levels.size):
        if levels[i] > best:
            best, place, count = levels[i], i, 1
        elif levels[i] == best:
            count += 1
    if best > 0 and count > 1:
        place = find_last(levels)
    return place // squared.shape[1], place % squared.shape[1]


@compile_kernel
def _travel(mask: NDArray[np.uint8], row: int, column: int, travelled: NDArray[np.float64]) -> None:
    """Fill the shortest 8-connected way from the centre inside the mask, inf where there is none.

    Sweeps forwards and backwards until nothing gets shorter.
    """
    height, width = mask.shape
    diagonal = np.sqrt(2.0)
    travelled[:] = np.inf
    travelled[row, column] = 0.0
    changed = True
    while changed:
        changed = False
        for y in range(height):
            for x in range(width):
                if mask[y, x]:
                    best = travelled[y, x]
                    if x > 0:
                        best = min(best, travelled[y, x - 1] + 1)
                    if y > 0:
                        best = min(best, travelled[y - 1, x] + 1)
                        if x > 0:
                            best = min(best, travelled[y - 1, x - 1] + diagonal)
                        if x < width - 1:
                            best = min(best, travelled[y - 1, x + 1] + diagonal)
                    if best < travelled[y, x]:
                        travelled[y, x] = best
                        changed = True
        for y in range(height - 1, -1, -1):
            for x in range(width - 1, -1, -1):
                if mask[y, x]:
                    best = travelled[y, x]
                    if x < width - 1:
                        best = min(best, travelled[y, x + 1] + 1)
                    if y < height - 1:
                        best = min(best, travelled[y + 1, x] + 1)
                        if x < width - 1:
                            best = min(best, travelled[y + 1, x + 1] + diagonal)
                        if x > 0:
                            best = min(best, travelled[y + 1, x - 1] + diagonal)
                    if best < travelled[y, x]:
                        travelled[y, x] = best
                        changed = True


@compile_kernel
def _place_pixels(
    squared: NDArray[np.int64],
    travelled: NDArray[np.float64],
    row: int,
    column: int,
    places: NDArray[np.int64],
) -> None:
    """Give every reached pixel its ring * 8 + wedge, -1 to all others."""
    for y in range(squared.shape[0]):
        for x in range(squared.shape[1]):
            places[y, x] = -1
            if travelled[y, x] < np.inf:
                total = travelled[y, x] + np.sqrt(squared[y, x])
                ring = min(int(travelled[y, x] / (total + 0.001) * _BINS), _BINS)
                wedge = int(y > row) + 2 * int(x > column)
                wedge += 4 * int(abs(y - row) > abs(x - column))
                places[y, x] = ring * _WEDGES + wedge


@compile_kernel
def _summarise_rings(
    image: NDArray[np.float64], places: NDArray[np.int64], values: NDArray[np.float64]
) -> None:
    sums = np.zeros((_BINS + 1) * _WEDGES)
    counts = np.zeros((_BINS + 1) * _WEDGES)
    total, area = 0.0, 0.0
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            place = places[y, x]
            if place >= 0:
                sums[place] += image[y, x]
                counts[place] += 1
                total += image[y, x]
                area += 1
    for ring in range(_BINS):
        signal, pixels = 0.0, 0.0
        for place in range(ring * _WEDGES, (ring + 1) * _WEDGES):
            signal += sums[place]
            pixels += counts[place]
        values[0, ring] = signal / total
        values[1, ring] = signal / total / (pixels / area + np.finfo(np.float64).eps)
        values[2, ring] = _measure_variation(sums, counts, ring * _WEDGES)


@compile_kernel
def _measure_variation(sums: NDArray[np.float64], counts: NDArray[np.float64], start: int) -> float:
    """Coefficient of variation of the means of 8 wedges; 0 without wedges or signal."""
    wedges, mean, spread = 0, 0.0, 0.0
    for i in range(start, start + _WEDGES):
        if counts[i] > 0:
            wedges += 1
            mean += sums[i] / counts[i]
    if mean == 0:
        return 0.0
    mean /= wedges
    for i in range(start, start + _WEDGES):
        if counts[i] > 0:
            spread += (sums[i] / counts[i] - mean) ** 2
    return float(np.sqrt(spread / wedges) / mean)
