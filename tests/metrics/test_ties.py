"""The kernel that breaks ties, against the whole sort in plain Python, and that against numpy."""

import numpy as np
import pytest
from numpy._core._multiarray_umath import __cpu_features__ as cpu_features

from cp2image.metrics.families.ties import _find_root, find_last
from tests.metrics.argsort import argsort, heapsort


def draw(random, size):
    """Draw values with ties; some sorted, or with many zeros, as the pixels around a cell are."""
    values = random.integers(0, int(np.exp(random.uniform(0.7, 8))), size).astype(float)
    if random.random() < 0.5:
        values[random.random(size) < random.random()] = 0
    if random.random() < 0.2:
        values = np.sort(values)[:: random.choice([1, -1])]
    return np.ascontiguousarray(values)


SIZES = [1, 2, 3, 8, 9, 16, 17, 31, 64, 65, 71, 72, 80, 81, 127, 256, 257, 287, 288, 1000, 4624]


@pytest.mark.parametrize("size", SIZES)
def test_the_kernel_finds_what_the_whole_sort_puts_last(size):
    random = np.random.default_rng(size)
    for _ in range(40 if size < 1000 else 15):
        values = draw(random, size)
        last = argsort(values)[-1]
        assert find_last(values) == last
        assert find_last(values.astype(np.int64)) == last


@pytest.mark.parametrize("size", [2, 40, 200, 257, 700, 4624])
def test_equal_values_alone_are_a_tie_of_all(size):
    assert find_last(np.zeros(size)) == argsort(np.zeros(size))[-1]


@pytest.mark.parametrize("size", [17, 18, 40, 41, 300])
def test_the_root_of_the_heap_is_what_a_heapsort_puts_last(size):
    random = np.random.default_rng(size)
    for _ in range(20):
        values = random.integers(0, 6, size).astype(float)
        order = random.permutation(size)
        assert _find_root(values, order.copy()) == heapsort(values, order)[-1]


def test_the_plain_sort_is_numpys_own():
    """With the form for AVX2, the one that can be checked on most machines."""
    if not cpu_features["AVX2"] or cpu_features["AVX512_SKX"]:
        pytest.skip("numpy sorts with AVX2 only where there is AVX2 and no AVX-512")
    random = np.random.default_rng(0)
    for size in random.integers(2, 4000, 200):
        values = draw(random, size)
        if (np.diff(values) < 0).any():  # numpy leaves what is sorted as it is
            assert np.argsort(values).tolist() == argsort(values, 4, 256, reverse=True)
