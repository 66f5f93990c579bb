"""Zernike moments of shapes and of intensities, up to order 9. Floor 1: numpy, numba.

CellProfiler's MeasureObjectSizeShape (``AreaShape_Zernike_n_m``, after Boland et al. 1998) and
MeasureObjectIntensityDistribution (``RadialDistribution_ZernikeMagnitude`` and ``…Phase``). The
unit disc is the mask's minimum enclosing circle. Phases are angles in radians, -pi to pi, taken
as ``arctan2(real, imaginary)`` as CellProfiler does. A single pixel has no disc: NaN.
"""

from math import factorial

import numpy as np
from numpy.typing import NDArray

from cp2image.kernel import compile_kernel, compile_reduction
from cp2image.metrics.families.batch import Batch

_BLOCK = 128
ORDERS = tuple((n, m) for n in range(10) for m in range(n % 2, n + 1, 2))


def list_shape_zernikes() -> list[str]:
    """Return the names of the shape's moments, the same for any channels."""
    return [f"AreaShape_Zernike_{n}_{m}" for n, m in ORDERS]


def list_intensity_zernikes(channels: tuple[str, ...]) -> list[str]:
    """Return the names of the intensities' moments: per channel, magnitudes, then phases."""
    return [
        f"RadialDistribution_Zernike{kind}_{channel}_{n}_{m}"
        for channel in channels
        for kind in ("Magnitude", "Phase")
        for n, m in ORDERS
    ]


def measure_shape_zernikes(batch: Batch) -> NDArray[np.float64]:
    """Measure every mask; shape (images, compartments, 30)."""
    n, compartments, height, width = batch.masks.shape
    sums = _sum_moments(batch, np.ones((n, 1, height, width)))[:, 0]
    radii = batch.circles[1]
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.hypot(sums[..., 0], sums[..., 1]) / (np.pi * radii**2)[:, None]
    return values.reshape(n, compartments, len(ORDERS))


def measure_intensity_zernikes(batch: Batch) -> NDArray[np.float64]:
    """Measure every mask in every channel; shape (images, compartments, channels * 60)."""
    n, compartments = batch.masks.shape[:2]
    sums = _sum_moments(batch, batch.images)
    areas = batch.masks.sum(axis=(2, 3), dtype=np.float64).reshape(-1, 1, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        magnitudes = np.hypot(sums[..., 0], sums[..., 1]) / areas
    phases = np.arctan2(sums[..., 0], sums[..., 1])
    return np.stack([magnitudes, phases], axis=2).reshape(n, compartments, -1)


def _sum_moments(batch: Batch, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum weighted polynomials; shape (objects, channels, 30, 2), real and imaginary parts."""
    centres, radii = batch.circles
    coefficients = np.zeros((len(ORDERS), 5))
    for i, (n, m) in enumerate(ORDERS):
        for k in range((n - m) // 2 + 1):
            coefficients[i, k] = (-1) ** k * (
                factorial(n - k)
                / (factorial(k) * factorial((n + m) // 2 - k) * factorial((n - m) // 2 - k))
            )
    sums = np.empty((batch.objects, weights.shape[1], len(ORDERS), 2))
    _sum_polynomials(weights, batch.masks, centres, radii, np.array(ORDERS), coefficients, sums)
    return sums


@compile_kernel
def _sum_polynomials(
    weights: NDArray[np.float64],
    masks: NDArray[np.uint8],
    centres: NDArray[np.float64],
    radii: NDArray[np.float64],
    orders: NDArray[np.int64],
    coefficients: NDArray[np.float64],
    sums: NDArray[np.float64],
) -> None:
    """Add ``weight * R_nm(r) * (y + ix)^m`` over the pixels of each mask, in blocks of pixels."""
    images, compartments, height, width = masks.shape
    channels = weights.shape[1]
    powers = np.zeros((2, 10, _BLOCK))
    squared = np.zeros(_BLOCK)
    values = np.empty((channels, _BLOCK))
    for n in range(images):
        for k in range(compartments):
            item = n * compartments + k
            if not radii[item] > 0:
                sums[item] = np.nan
                continue
            sums[item] = 0.0
            filled = 0
            for y in range(height):
                for x in range(width):
                    if masks[n, k, y, x]:
                        # Both roundings matter: they decide whether a pixel lies on the circle.
                        real = (y - centres[item, 0]) / radii[item]
                        imaginary = (x - centres[item, 1]) / radii[item]
                        squared[filled] = imaginary * imaginary + real * real
                        if squared[filled] <= 1:
                            powers[0, 1, filled] = real
                            powers[1, 1, filled] = imaginary
                            for c in range(channels):
                                values[c, filled] = weights[n, c, y, x]
                            filled += 1
                    if filled == _BLOCK:
                        _add_block(values, powers, squared, orders, coefficients, sums[item])
                        filled = 0
            if filled:
                values[:, filled:] = 0.0
                _add_block(values, powers, squared, orders, coefficients, sums[item])


@compile_reduction
def _add_block(
    values: NDArray[np.float64],
    powers: NDArray[np.float64],
    squared: NDArray[np.float64],
    orders: NDArray[np.int64],
    coefficients: NDArray[np.float64],
    sums: NDArray[np.float64],
) -> None:
    """Add one full block of pixels to the sums of one mask."""
    radial = np.empty(_BLOCK)
    for i in range(_BLOCK):
        powers[0, 0, i] = 1.0
        powers[1, 0, i] = 0.0
    for m in range(2, 10):
        for i in range(_BLOCK):
            a, b = powers[0, m - 1, i], powers[1, m - 1, i]
            powers[0, m, i] = a * powers[0, 1, i] - b * powers[1, 1, i]
            powers[1, m, i] = a * powers[1, 1, i] + b * powers[0, 1, i]
    for j in range(orders.shape[0]):
        m = orders[j, 1]
        radial[:] = coefficients[j, 0]
        for term in range(1, (orders[j, 0] - m) // 2 + 1):
            for i in range(_BLOCK):
                radial[i] = radial[i] * squared[i] + coefficients[j, term]
        for c in range(values.shape[0]):
            real, imaginary = 0.0, 0.0
            for i in range(_BLOCK):
                weighted = radial[i] * values[c, i]
                real += weighted * powers[0, m, i]
                imaginary += weighted * powers[1, m, i]
            sums[c, j, 0] += real
            sums[c, j, 1] += imaginary
