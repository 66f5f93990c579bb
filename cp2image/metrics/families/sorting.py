"""Sort the pixels of many images by intensity. Floor 1: numpy, numba."""

import numpy as np
from numpy.typing import NDArray

from cp2image.kernel import compile_kernel


def sort_pixels(images: NDArray[np.float64]) -> NDArray[np.int32]:
    """Return flat pixel indices by rising value, shape (..., height * width).

    ``images`` has shape (..., height, width) and values from 0 upwards, without NaN.
    """
    *leading, height, width = images.shape
    # Non-negative floats sort as their bits do; adding 0.0 turns -0.0 into 0.0.
    bits = (images + 0.0).view(np.uint64).reshape(-1, height * width)
    return _sort_keys(bits).reshape(*leading, height * width)


@compile_kernel
def _sort_keys(keys: NDArray[np.uint64]) -> NDArray[np.int32]:
    """Argsort each row of keys: radix sort by 11 bits at a time."""
    rows, size = keys.shape
    result = np.empty((rows, size), np.int32)
    buffers = np.empty((2, size), np.int32)
    counts = np.empty(2048, np.int64)
    for row in range(rows):
        source, target = buffers[0], buffers[1]
        for i in range(size):
            source[i] = i
        for digit in range(6):
            shift = np.uint64(11 * digit)
            counts[:] = 0
            for i in range(size):
                counts[(keys[row, i] >> shift) & np.uint64(2047)] += 1
            if counts[(keys[row, 0] >> shift) & np.uint64(2047)] == size:
                continue
            total = 0
            for value in range(2048):
                count = counts[value]
                counts[value] = total
                total += count
            for i in range(size):
                pixel = source[i]
                value = (keys[row, pixel] >> shift) & np.uint64(2047)
                target[counts[value]] = pixel
                counts[value] += 1
            source, target = target, source
        for i in range(size):
            result[row, i] = source[i]
    return result
