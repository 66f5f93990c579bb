"""Grow nuclei into cells: centrosome's ``propagate``. Floor 1: numpy, numba."""

import numpy as np
from numpy.typing import NDArray

from cp2image.kernel import compile_kernel
from cp2image.metrics.families.heap import pop, push

_DY = (-1, -1, -1, 0, 0, 1, 1, 1)
_DX = (-1, 0, 1, -1, 1, -1, 0, 1)


@compile_kernel
def propagate_label(
    image: NDArray[np.float64],
    seeds: NDArray[np.int32],
    mask: NDArray[np.bool_],
    weight: float,
    wanted: int,
    region: NDArray[np.bool_],
) -> None:
    """Fill ``region`` with the pixels that seed ``wanted`` reaches first inside ``mask``.

    All seeds grow over 8 neighbours by the distance of Jones, Carpenter and Golland (2005),
    ``sqrt(difference^2 + steps * weight^2)``: the difference is that of the two pixels'
    3 x 3 surroundings, steps are 1 along an axis and 2 on a diagonal. Ties go as in centrosome:
    last bit of the distance ignored, then lower seed, then row, then column.
    """
    height, width = image.shape
    size = height * width
    costs = np.empty((4, height, width))
    _measure_steps(image, weight, costs)
    distances = np.full(size, np.inf)
    key = np.empty(1)
    labels = np.zeros(size, np.int32)
    keys, entries = np.empty(9 * size), np.empty(9 * size, np.int64)
    count, waiting = 0, 0
    number = 0
    for y in range(height):
        for x in range(width):
            if seeds[y, x]:
                distances[y * width + x] = 0.0
                labels[y * width + x] = seeds[y, x]
                number = max(number, seeds[y, x])
            region[y, x] = seeds[y, x] == wanted
    for label in range(1, number + 1):
        for pixel in range(size):
            if labels[pixel] == label and mask[pixel // width, pixel % width]:
                count, added = _relax(
                    pixel, label, costs, mask, labels, distances, key, keys, entries, count
                )
                if label == wanted:
                    waiting += added
    while count and waiting:
        label, pixel = entries[0] // size, entries[0] % size
        count = pop(keys, entries, count)
        if label == wanted:
            waiting -= 1
        if labels[pixel] == 0:
            labels[pixel] = label
            count, added = _relax(
                pixel, label, costs, mask, labels, distances, key, keys, entries, count
            )
            if label == wanted:
                waiting += added
                region[pixel // width, pixel % width] = True


@compile_kernel
def _relax(
    pixel: int,
    label: int,
    costs: NDArray[np.float64],
    mask: NDArray[np.bool_],
    labels: NDArray[np.int32],
    distances: NDArray[np.float64],
    key: NDArray[np.float64],
    keys: NDArray[np.float64],
    entries: NDArray[np.int64],
    count: int,
) -> tuple[int, int]:
    """Queue the neighbours that this pixel brings nearer; return the queue's size and how many."""
    height, width = mask.shape
    y, x = pixel // width, pixel % width
    added = 0
    for step in range(8):
        v, u = y + _DY[step], x + _DX[step]
        if not (0 <= v < height and 0 <= u < width) or not mask[v, u]:
            continue
        other = v * width + u
        if labels[other] > 0:
            continue
        # A step's cost is kept at its upper, or left, pixel.
        direction = step if step < 4 else 7 - step
        cost = costs[direction, v, u] if step < 4 else costs[direction, y, x]
        distance = cost + distances[pixel]
        if distance < distances[other]:
            distances[other] = distance
            key[0] = distance
            key.view(np.int64)[0] &= -2
            count = push(keys, entries, count, key[0], label * height * width + other)
            added += 1
    return count, added


@compile_kernel
def _measure_steps(image: NDArray[np.float64], weight: float, costs: NDArray[np.float64]) -> None:
    """Cost of the step from each pixel to its neighbour opposite to direction 0 … 3."""
    height, width = image.shape
    padded = np.empty((height + 4, width + 4))
    for y in range(height + 4):
        for x in range(width + 4):
            padded[y, x] = image[min(max(y - 2, 0), height - 1), min(max(x - 2, 0), width - 1)]
    for direction in range(4):
        dy, dx = -_DY[direction], -_DX[direction]
        spread = (abs(dy) + abs(dx)) * weight * weight
        for y in range(height):
            for x in range(width):
                difference = 0.0
                for v in range(y + 1, y + 4):
                    for u in range(x + 1, x + 4):
                        difference += abs(padded[v, u] - padded[v + dy, u + dx])
                costs[direction, y, x] = np.sqrt(difference * difference + spread)
