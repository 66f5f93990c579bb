"""numpy's vectorised argsort in plain Python: the oracle of the ties that CellProfiler breaks.

The quicksort of x86-simd-sort: with 8 lanes and networks of 64 as numpy 1.25 and 1.26 have it for
AVX-512, with 4 lanes, networks of 256 and the reversed right side as numpy 2 has it for AVX2.
"""

from functools import cache
from unittest.mock import patch

import numpy as np
from cp_measure.core import measureobjectintensitydistribution

from cp2image.benchmarks.plain_measurement import COMPARTMENTS, measure_plain

UNROLLED = 4


def argsort(values, lanes=8, network=64, reverse=False):
    """Return the order as a list; 64-bit keys, no NaN."""
    values = [float(value) for value in values]
    order = list(range(len(values)))
    if len(values) > 1:
        rounds = 2 * (len(values).bit_length() - 1)
        sort_part(values, order, 0, len(values), rounds, (lanes, network, reverse))
    return order


def sort_part(values, order, start, stop, rounds, form):
    lanes, network, reverse = form
    if rounds == 0:
        order[start:stop] = introsort(values, order[start:stop])
        return
    if stop - start <= network:
        order[start:stop] = sort_network(values, order[start:stop], lanes)
        return
    step = (stop - start - 1) // lanes
    pivot = sorted(values[order[start + step * i]] for i in range(1, lanes + 1))[lanes // 2]
    keys = [values[index] for index in order[start:stop]]
    split = partition(values, order, start, stop, pivot, lanes, reverse)
    if pivot != min(keys):
        sort_part(values, order, start, split, rounds - 1, form)
    if pivot != max(keys):
        sort_part(values, order, split, stop, rounds - 1, form)


def partition(values, order, left, right, pivot, lanes, reverse):
    width = lanes if right - left <= 8 * UNROLLED * lanes else lanes * UNROLLED
    for _ in range((right - left) % width):
        if values[order[left]] < pivot:
            left += 1
        else:
            right -= 1
            order[left], order[right] = order[right], order[left]
    low, high = left, right
    aside = [order[left : left + width]]
    if right - left > width:
        aside.append(order[right - width : right])
    left, right = left + width, right - width

    def store(block):
        nonlocal low, high
        for i in range(0, width, lanes):
            vector = block[i : i + lanes]
            small = [index for index in vector if values[index] < pivot]
            large = [index for index in vector if not values[index] < pivot]
            order[low : low + len(small)] = small
            order[high - len(large) : high] = large[::-1] if reverse else large
            low, high = low + len(small), high - len(large)

    while left < right:
        if high - right < left - low:
            right -= width
            store(order[right : right + width])
        else:
            left += width
            store(order[left - width : left])
    for block in aside:
        store(block)
    return low


def sort_network(values, order, lanes):
    """Sort whole vectors, filled up with infinity, by a bitonic network."""
    size = lanes
    while size < len(order):
        size *= 2
    entries = [(values[index], index) for index in order]
    entries += [(np.inf, None)] * (size - len(order))

    def compare(bits):
        for i in range(size):
            j = i ^ bits
            if i < j and entries[j][0] < entries[i][0]:
                entries[i], entries[j] = entries[j], entries[i]

    run = 2
    while run <= size:
        compare(run - 1)
        step = run // 4
        while step:
            compare(step)
            step //= 2
        run *= 2
    return [index for _, index in entries[: len(order)]]


def introsort(values, order):
    """Sort as std::sort of GNU's library does."""
    order = list(order)

    def key(place):
        return values[order[place]]

    def split(start, stop, rounds):
        while stop - start > 16:
            if rounds == 0:
                order[start:stop] = heapsort(values, order[start:stop])
                return
            rounds -= 1
            places = (start + 1, start + (stop - start) // 2, stop - 1)
            a, b, c = (key(place) for place in places)
            if a < b:
                middle = 1 if b < c else 2 if a < c else 0
            else:
                middle = 0 if a < c else 2 if b < c else 1
            place = places[middle]
            order[start], order[place] = order[place], order[start]
            pivot, left, right = key(start), start + 1, stop
            while True:
                while key(left) < pivot:
                    left += 1
                right -= 1
                while pivot < key(right):
                    right -= 1
                if left >= right:
                    break
                order[left], order[right] = order[right], order[left]
                left += 1
            split(left, stop, rounds)
            stop = left

    split(0, len(order), 2 * (len(order).bit_length() - 1))
    return sorted(order, key=lambda index: values[index])


def heapsort(values, order):
    order = list(order)

    def sift(hole, size, index):
        top = hole
        while 2 * hole + 2 < size:
            child = 2 * hole + 2
            if values[order[child]] < values[order[child - 1]]:
                child -= 1
            order[hole], hole = order[child], child
        if 2 * hole + 2 == size:
            order[hole], hole = order[size - 1], size - 1
        while hole > top and values[order[(hole - 1) // 2]] < values[index]:
            order[hole], hole = order[(hole - 1) // 2], (hole - 1) // 2
        order[hole] = index

    for hole in range((len(order) - 2) // 2, -1, -1):
        sift(hole, len(order), order[hole])
    for last in range(len(order) - 1, 0, -1):
        index, order[last] = order[last], order[0]
        sift(0, last, index)
    return order


@cache
def find_last(data):
    """Return where the largest of these float64 bytes is; of several, the last of the sort."""
    values = np.frombuffer(data)
    places = np.flatnonzero(values == values.max())
    return int(places[0]) if len(places) == 1 else argsort(values)[-1]


def measure_with_ties(images, masks, channels, compartments=COMPARTMENTS):
    """Measure with cp_measure, its choices among equal pixels replaced by CellProfiler's."""

    def find_centre(depth, labels, count):
        return np.unravel_index([find_last(depth.tobytes())], depth.shape)

    with patch.object(
        measureobjectintensitydistribution, "_maximum_position_of_labels", find_centre
    ):
        table = measure_plain(images, masks, channels, compartments=compartments)
    for i, stack in enumerate(masks):
        for compartment, mask in zip(COMPARTMENTS, stack, strict=True):
            if compartment in compartments and mask.any():
                pixels = np.argwhere(mask)
                for image, channel in zip(images[i], channels, strict=True):
                    y, x = pixels[find_last(image[mask != 0].astype(np.float64).tobytes())]
                    name = f"{compartment}_Location_MaxIntensity"
                    table.loc[i, [f"{name}_Y_{channel}", f"{name}_X_{channel}"]] = (
                        float(y),
                        float(x),
                    )
    return table
