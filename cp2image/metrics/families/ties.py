"""Which of several largest values CellProfiler takes. Floor 1: numpy, numba.

CellProfiler 4.2 asks ``scipy.ndimage.maximum_position``, which takes whatever
``values.argsort()`` puts last. That sort is not stable, so among equal values the choice is an
accident of the sort, and of the processor: with numpy 1.25 or 1.26 and AVX-512 it is the
quicksort of x86-simd-sort in 8 lanes, for 32-bit and 64-bit keys alike. It is followed here
step by step, on every processor. Each partition puts what is largest to the right, so only the
rightmost one is followed: a few passes over the values.

The order of the steps is that of x86-simd-sort (Copyright (C) 2022 Intel Corporation,
BSD-3-Clause) as numpy 1.25 and 1.26 (Copyright (c) 2005-2023, NumPy Developers, BSD-3-Clause)
contain it. After too many partitions it turns to the introsort (Musser 1997) of C++'s standard
library.
"""

import numpy as np
from numpy.typing import NDArray

from cp2image.kernel import compile_kernel

_Values = NDArray[np.float64] | NDArray[np.int64]

_LANES = 8
_UNROLLED = 4  # vectors a step of the partition takes together where there are many values
_NETWORK = 64  # so many values are sorted by a network
_INSERTION = 16  # and so many by insertion, in the introsort


@compile_kernel
def find_last(values: _Values) -> int:
    """Return the index of the largest value; of several, the one that the sort puts last.

    Parameters
    ----------
    values
        Shape (n,), n > 0; int64, or float64 without NaN.
    """
    order = np.arange(values.size)
    smallest, largest = values.min(), values.max()
    start = 0
    for _ in range(2 * int(np.log2(values.size))):
        if values.size - start <= _NETWORK:
            return _sort_network(values, order[start:])
        pivot = _choose_pivot(values, order[start:])
        start += _partition(values, order[start:], pivot, pivot == smallest)
        if pivot == largest:
            return int(order[-1])
    return _sort_rest(values, order[start:])


@compile_kernel
def _choose_pivot(values: _Values, order: NDArray[np.int64]) -> float:
    """Return the fifth smallest of 8 values at equal distances."""
    step = (order.size - 1) // _LANES
    for i in range(1, _LANES + 1):
        value = values[order[step * i]]
        smaller, equal = 0, 0
        for j in range(1, _LANES + 1):
            smaller += values[order[step * j]] < value
            equal += values[order[step * j]] == value
        if smaller <= _LANES // 2 < smaller + equal:
            break
    return float(value)


@compile_kernel
def _partition(values: _Values, order: NDArray[np.int64], pivot: float, level: bool) -> int:
    """Move indices of values below the pivot to the left; return how many there are.

    Takes blocks from whichever end has less room left, after the first and the last block have
    been set aside; what fills no block is swapped one by one beforehand. ``level`` says that
    nothing is below the pivot: still the indices move, but no value needs to be looked at.
    """
    left, right = 0, order.size
    width = _LANES
    if right > 8 * _UNROLLED * _LANES:
        width *= _UNROLLED
    for _ in range(right % width):
        if values[order[left]] < pivot:
            left += 1
        else:
            right -= 1
            order[left], order[right] = order[right], order[left]
    if level:
        _turn(order[left:right], width)
        return left
    low, high = left, right
    aside = np.empty(min(2 * width, right - left), np.int64)
    aside[:width] = order[left : left + width]
    aside[width:] = order[right - (aside.size - width) : right]
    block = np.empty(width, np.int64)
    left += width
    right -= width
    while left < right:
        if high - right < left - low:
            right -= width
            block[:] = order[right : right + width]
        else:
            block[:] = order[left : left + width]
            left += width
        low, high = _distribute(values, block, pivot, order, low, high)
    low, high = _distribute(values, aside, pivot, order, low, high)
    return low


@compile_kernel
def _distribute(
    values: _Values,
    block: NDArray[np.int64],
    pivot: float,
    order: NDArray[np.int64],
    low: int,
    high: int,
) -> tuple[int, int]:
    """Write a block to both ends of the room from ``low`` to ``high``, lane by lane, in order."""
    for start in range(0, block.size, _LANES):
        vector = block[start : start + _LANES]
        for index in vector:
            high -= not values[index] < pivot
        place = high
        for index in vector:
            if values[index] < pivot:
                order[low] = index
                low += 1
            else:
                order[place] = index
                place += 1
    return low, high


@compile_kernel
def _turn(order: NDArray[np.int64], width: int) -> None:
    """Partition whole blocks where nothing is below the pivot.

    The first two blocks and the last change places, and each block's vectors their order.
    """
    size = order.size
    if size >= 3 * width:
        for i in range(width):
            first = order[i]
            order[i] = order[size - width + i]
            order[size - width + i] = order[width + i]
            order[width + i] = first
    elif size == 2 * width:
        for i in range(width):
            order[i], order[width + i] = order[width + i], order[i]
    if width > _LANES:
        for start in range(0, size, width):
            for i in range(start, start + width // 2):
                j = start + ((i - start) ^ (width - _LANES))
                order[i], order[j] = order[j], order[i]


@compile_kernel
def _sort_network(values: _Values, order: NDArray[np.int64]) -> int:
    """Sort by a bitonic network and return the last index.

    The network is filled up with infinity, which never moves: it is left out here.
    """
    size = 2
    while size < 2 * order.size:
        _compare(values, order, size - 1)
        step = size // 4
        while step > 0:
            _compare(values, order, step)
            step //= 2
        size *= 2
    return int(order[-1])


@compile_kernel
def _compare(values: _Values, order: NDArray[np.int64], bits: int) -> None:
    """Swap each two entries whose places differ in these bits if the first is larger."""
    for i in range(order.size):
        j = i ^ bits
        if i < j < order.size and values[order[j]] < values[order[i]]:
            order[i], order[j] = order[j], order[i]


@compile_kernel
def _sort_rest(values: _Values, order: NDArray[np.int64]) -> int:
    """Return the index that an introsort puts last.

    Short parts are sorted by insertion, which is stable: the last of the largest stays last.
    """
    rounds = 2 * int(np.log2(order.size))
    while order.size > _INSERTION:
        if rounds == 0:
            return _find_root(values, order)
        rounds -= 1
        places = (1, order.size // 2, order.size - 1)
        middle = _order_three(values, order[places[0]], order[places[1]], order[places[2]])
        place = places[middle]
        order[0], order[place] = order[place], order[0]
        pivot = values[order[0]]
        left, right = 1, order.size
        while True:
            while values[order[left]] < pivot:
                left += 1
            right -= 1
            while pivot < values[order[right]]:
                right -= 1
            if left >= right:
                break
            order[left], order[right] = order[right], order[left]
            left += 1
        order = order[left:]
    last = order[0]
    for index in order:
        if not values[index] < values[last]:
            last = index
    return int(last)


@compile_kernel
def _order_three(values: _Values, a: int, b: int, c: int) -> int:
    """Return which of three indices, 0, 1 or 2, has the median value."""
    if values[a] < values[b]:
        if values[b] < values[c]:
            return 1
        return 2 if values[a] < values[c] else 0
    if values[a] < values[c]:
        return 0
    return 2 if values[b] < values[c] else 1


@compile_kernel
def _find_root(values: _Values, order: NDArray[np.int64]) -> int:
    """Return the root of a heap, largest first: a heapsort puts it last.

    Built from the last parent to the first: the hole sinks to a leaf, then the entry rises.
    """
    size = order.size
    for top in range(size // 2 - 1, -1, -1):
        index, hole = order[top], top
        while 2 * hole + 1 < size:
            child = 2 * hole + 1
            if child + 1 < size and not values[order[child + 1]] < values[order[child]]:
                child += 1
            order[hole] = order[child]
            hole = child
        while hole > top and values[order[(hole - 1) // 2]] < values[index]:
            order[hole] = order[(hole - 1) // 2]
            hole = (hole - 1) // 2
        order[hole] = index
    return int(order[0])
