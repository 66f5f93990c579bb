"""A binary heap in two arrays, smallest first. Floor 1: numpy, numba."""

import numpy as np
from numpy.typing import NDArray

from cp2image.kernel import compile_kernel


@compile_kernel
def push(
    levels: NDArray[np.float64],
    entries: NDArray[np.int64],
    count: int,
    level: float,
    entry: int,
) -> int:
    """Add to a heap ordered by level, then entry; return its new size."""
    child = count
    while child > 0:
        parent = (child - 1) // 2
        if levels[parent] < level or (levels[parent] == level and entries[parent] < entry):
            break
        levels[child], entries[child] = levels[parent], entries[parent]
        child = parent
    levels[child], entries[child] = level, entry
    return count + 1


@compile_kernel
def pop(levels: NDArray[np.float64], entries: NDArray[np.int64], count: int) -> int:
    """Remove the first of the heap; return its new size."""
    count -= 1
    level, entry = levels[count], entries[count]
    place = 0
    while 2 * place + 1 < count:
        child = 2 * place + 1
        other = child + 1
        if other < count and (
            levels[other] < levels[child]
            or (levels[other] == levels[child] and entries[other] < entries[child])
        ):
            child = other
        if level < levels[child] or (level == levels[child] and entry < entries[child]):
            break
        levels[place], entries[place] = levels[child], entries[child]
        place = child
    levels[place], entries[place] = level, entry
    return count
