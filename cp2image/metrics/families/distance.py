"""Squared Euclidean distance to the nearest background pixel. Floor 1: numpy, numba."""

import numpy as np
from numpy.typing import NDArray

from cp2image.kernel import compile_kernel


@compile_kernel
def measure_squared_distance(
    mask: NDArray[np.uint8],
    bordered: bool,
    columns: NDArray[np.int64],
    squared: NDArray[np.int64],
) -> None:
    """Fill ``squared`` with exact squared distances inside ``mask``, 0 outside.

    Parameters
    ----------
    mask
        Shape (height, width), 0 or 1.
    bordered
        Whether pixels beyond the crop are background. If not and there is no background at all,
        distances are those to row -1, column 0, as in ``scipy.ndimage.distance_transform_edt``.
    columns
        Scratch of the same shape: distance to the background within the column.
    squared
        Receives the result.
    """
    height, width = mask.shape
    far = height + width
    empty = True
    for x in range(width):
        distance = 0 if bordered else far
        for y in range(height):
            distance = distance + 1 if mask[y, x] else 0
            columns[y, x] = distance
            if mask[y, x] == 0:
                empty = False
        distance = 0 if bordered else far
        for y in range(height - 1, -1, -1):
            distance = distance + 1 if mask[y, x] else 0
            columns[y, x] = min(columns[y, x], distance)
    for y in range(height):
        for x in range(width):
            if mask[y, x] == 0:
                squared[y, x] = 0
                continue
            if empty and not bordered:
                squared[y, x] = (y + 1) * (y + 1) + x * x
                continue
            best = columns[y, x] * columns[y, x]
            if bordered:
                side = min(x + 1, width - x)
                best = min(best, side * side)
            step = 1
            while step < width and step * step < best:
                if x >= step:
                    reach = columns[y, x - step]
                    best = min(best, step * step + reach * reach)
                if x + step < width:
                    reach = columns[y, x + step]
                    best = min(best, step * step + reach * reach)
                step += 1
            squared[y, x] = best
