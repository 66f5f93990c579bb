"""AreaShape: size, moments, radii, hull and Feret diameters of masks. Floor 1: numpy, numba.

CellProfiler's MeasureObjectSizeShape, which takes most of it from scikit-image's ``regionprops``
and the Feret diameters from centrosome. Moments are taken in the mask's bounding box. Angles:
``Orientation`` in degrees, -90 to 90. ``CentralMoment_0_1`` and ``_1_0`` are 0 by definition.
"""

import numpy as np
from centrosome.cpmorphology import feret_diameter
from numpy.typing import NDArray

from cp2image.kernel import compile_kernel
from cp2image.metrics.families.batch import Batch
from cp2image.metrics.families.distance import measure_squared_distance

_SIZES = (
    "Area",
    "BoundingBoxArea",
    "BoundingBoxMaximum_X",
    "BoundingBoxMaximum_Y",
    "BoundingBoxMinimum_X",
    "BoundingBoxMinimum_Y",
    "Center_X",
    "Center_Y",
    "Compactness",
    "ConvexArea",
    "Eccentricity",
    "EquivalentDiameter",
    "EulerNumber",
    "Extent",
    "FormFactor",
    "MajorAxisLength",
    "MaximumRadius",
    "MeanRadius",
    "MedianRadius",
    "MinorAxisLength",
    "Orientation",
    "Perimeter",
    "Solidity",
    "InertiaTensorEigenvalues_0",
    "InertiaTensorEigenvalues_1",
    "InertiaTensor_0_0",
    "InertiaTensor_0_1",
    "InertiaTensor_1_0",
    "InertiaTensor_1_1",
)
_MOMENTS = (
    *(f"SpatialMoment_{p}_{q}" for p in range(3) for q in range(4)),
    *(f"CentralMoment_{p}_{q}" for p in range(3) for q in range(4)),
    *(f"NormalizedMoment_{p}_{q}" for p in range(4) for q in range(4)),
    *(f"HuMoment_{k}" for k in range(7)),
)
_FERET = ("MinFeretDiameter", "MaxFeretDiameter")


def list_size_shape() -> list[str]:
    """Return the feature names, the same for any channels."""
    return [f"AreaShape_{name}" for name in (*_SIZES, *_MOMENTS, *_FERET)]


def measure_size_shape(batch: Batch) -> NDArray[np.float64]:
    """Measure every mask; shape (images, compartments, features)."""
    n, compartments, height, width = batch.masks.shape
    values = np.empty((batch.objects, len(_SIZES) + len(_MOMENTS) + len(_FERET)))
    _measure_masks(batch.masks.reshape(batch.objects, height, width), values)
    vertices, counts = batch.hulls
    present = np.flatnonzero(counts > 0)
    if len(present):
        smallest, largest = feret_diameter(vertices, counts[present], present + 1)
        values[present, -2] = smallest
        values[present, -1] = largest
    return values.reshape(n, compartments, -1)


@compile_kernel
def _measure_masks(masks: NDArray[np.uint8], values: NDArray[np.float64]) -> None:
    objects, height, width = masks.shape
    columns = np.empty((height, width), np.int64)
    squared = np.empty((height, width), np.int64)
    histogram = np.zeros((min(height, width) // 2 + 1) ** 2 + 1, np.int64)
    raw, central, normalized = np.empty((4, 4)), np.empty((4, 4)), np.empty((4, 4))
    hu = np.empty(7)
    for n in range(objects):
        mask, row = masks[n], values[n]
        top, bottom, left, right = _find_box(mask)
        if bottom <= top:
            row[:] = np.nan
            continue
        crop = mask[top:bottom, left:right]
        _sum_moments(crop, raw, central, normalized, hu)
        area = raw[0, 0]
        box = float((bottom - top) * (right - left))
        convex = _measure_convex_area(crop)
        perimeter = _measure_perimeter(crop)
        measure_squared_distance(mask, True, columns, squared)
        radii = _summarise_radii(mask, squared, histogram)
        inertia = (
            central[0, 2] / area,
            -central[1, 1] / area,
            central[2, 0] / area,
        )
        half_trace = (inertia[0] + inertia[2]) / 2
        half_gap = np.sqrt(((inertia[0] - inertia[2]) / 2) ** 2 + inertia[1] ** 2)
        large = max(half_trace + half_gap, 0.0)
        small = max(half_trace - half_gap, 0.0)
        row[0] = area
        row[1] = box
        row[2] = right
        row[3] = bottom
        row[4] = left
        row[5] = top
        row[6] = left + raw[0, 1] / area
        row[7] = top + raw[1, 0] / area
        row[8] = perimeter**2 / max(4 * np.pi * area, 1.0)
        row[9] = convex
        row[10] = 0.0 if large == 0 else np.sqrt(1 - small / large)
        row[11] = np.sqrt(4 * area / np.pi)
        row[12] = _count_euler(crop)
        row[13] = area / box
        row[14] = 4 * np.pi * area / perimeter**2
        row[15] = 4 * np.sqrt(large)
        row[16], row[17], row[18] = radii
        row[19] = 4 * np.sqrt(small)
        row[20] = np.degrees(_find_orientation(inertia))
        row[21] = perimeter
        row[22] = area / convex
        row[23] = large
        row[24] = small
        row[25] = inertia[0]
        row[26] = inertia[1]
        row[27] = inertia[1]
        row[28] = inertia[2]
        for i in range(16):
            if i < 12:
                row[29 + i] = raw[i // 4, i % 4]
                row[41 + i] = central[i // 4, i % 4]
            row[53 + i] = normalized[i // 4, i % 4]
            if i < 7:
                row[69 + i] = hu[i]


@compile_kernel
def _find_box(mask: NDArray[np.uint8]) -> tuple[int, int, int, int]:
    """Return top, bottom, left, right of the mask, the ends exclusive; top == bottom if empty."""
    height, width = mask.shape
    top, bottom, left, right = height, 0, width, 0
    for y in range(height):
        for x in range(width):
            if mask[y, x]:
                top = min(top, y)
                bottom = y + 1
                left = min(left, x)
                right = max(right, x + 1)
    return min(top, bottom), bottom, left, right


@compile_kernel
def _sum_moments(
    crop: NDArray[np.uint8],
    raw: NDArray[np.float64],
    central: NDArray[np.float64],
    normalized: NDArray[np.float64],
    hu: NDArray[np.float64],
) -> None:
    """Raw, central and normalised moments [row power, column power], and Hu's invariants (1962)."""
    _sum_powers(crop, 0.0, 0.0, raw)
    area = raw[0, 0]
    _sum_powers(crop, raw[1, 0] / area, raw[0, 1] / area, central)
    central[1, 0] = 0.0
    central[0, 1] = 0.0
    for p in range(4):
        for q in range(4):
            order = p + q
            normalized[p, q] = np.nan
            if order >= 2:
                normalized[p, q] = central[p, q] / area ** (order / 2 + 1)
    n20, n02, n11 = normalized[2, 0], normalized[0, 2], normalized[1, 1]
    n30, n03, n21, n12 = normalized[3, 0], normalized[0, 3], normalized[2, 1], normalized[1, 2]
    a, b = n30 + n12, n21 + n03
    c, d = n30 - 3 * n12, 3 * n21 - n03
    hu[0] = n20 + n02
    hu[1] = (n20 - n02) ** 2 + 4 * n11**2
    hu[2] = c**2 + d**2
    hu[3] = a**2 + b**2
    hu[4] = c * a * (a**2 - 3 * b**2) + d * b * (3 * a**2 - b**2)
    hu[5] = (n20 - n02) * (a**2 - b**2) + 4 * n11 * a * b
    hu[6] = d * a * (a**2 - 3 * b**2) - c * b * (3 * a**2 - b**2)


@compile_kernel
def _sum_powers(
    crop: NDArray[np.uint8], row_centre: float, column_centre: float, sums: NDArray[np.float64]
) -> None:
    sums[:] = 0.0
    for y in range(crop.shape[0]):
        s0, s1, s2, s3 = 0.0, 0.0, 0.0, 0.0
        for x in range(crop.shape[1]):
            if crop[y, x]:
                d = x - column_centre
                s0 += 1.0
                s1 += d
                s2 += d * d
                s3 += d * d * d
        power, d = 1.0, y - row_centre
        for p in range(4):
            sums[p, 0] += power * s0
            sums[p, 1] += power * s1
            sums[p, 2] += power * s2
            sums[p, 3] += power * s3
            power *= d


@compile_kernel
def _find_orientation(inertia: tuple[float, float, float]) -> float:
    """Angle of the major axis in radians, as scikit-image defines it."""
    if inertia[0] == inertia[2]:
        return np.pi / 4 if inertia[1] < 0 else -np.pi / 4
    return float(0.5 * np.arctan2(-2 * inertia[1], inertia[2] - inertia[0]))


@compile_kernel
def _measure_convex_area(crop: NDArray[np.uint8]) -> float:
    """Count the pixels in the hull of the pixels' edge midpoints, in exact integers.

    Coordinates are doubled, so that midpoints are integers too.
    """
    height, width = crop.shape
    lows = np.full(2 * height + 1, 4 * width, np.int64)
    highs = np.full(2 * height + 1, -2, np.int64)
    for y in range(height):
        for x in range(width):
            if crop[y, x]:
                middle = 2 * y + 1
                lows[middle] = min(lows[middle], 2 * x - 1)
                highs[middle] = max(highs[middle], 2 * x + 1)
                for edge in (middle - 1, middle + 1):
                    lows[edge] = min(lows[edge], 2 * x)
                    highs[edge] = max(highs[edge], 2 * x)
    rows = np.empty(2 * height + 1, np.int64)
    left = _stretch_chain(lows, highs, 1, rows)
    right = _stretch_chain(highs, highs, -1, rows)
    area = 0
    for y in range(height):
        area += right[y] - left[y] + 1
    return float(area)


@compile_kernel
def _stretch_chain(
    ends: NDArray[np.int64], highs: NDArray[np.int64], side: int, rows: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the hull's first (``side`` 1) or last (-1) pixel column in every pixel row."""
    size = 0
    for y in range(ends.shape[0]):
        if highs[y] < -1:
            continue
        while size >= 2:
            a, b = rows[size - 2], rows[size - 1]
            cross = (ends[b] - ends[a]) * (y - a) - (ends[y] - ends[a]) * (b - a)
            if side * cross < 0:
                break
            size -= 1
        rows[size] = y
        size += 1
    columns = np.empty(ends.shape[0] // 2, np.int64)
    k = 0
    for y in range(1, ends.shape[0], 2):
        while rows[k + 1] < y:
            k += 1
        a, b = rows[k], rows[k + 1]
        # The doubled column at row y is ends[a] + slope / (b - a), rounded inwards to a pixel.
        numerator = ends[a] * (b - a) + (ends[b] - ends[a]) * (y - a)
        denominator = 2 * (b - a)
        if side > 0:
            columns[y // 2] = -((-numerator) // denominator)
        else:
            columns[y // 2] = numerator // denominator
    return columns


@compile_kernel
def _measure_perimeter(crop: NDArray[np.uint8]) -> float:
    """Benkrid and Crookes' perimeter of the 4-connected border, as in scikit-image."""
    height, width = crop.shape
    border = np.zeros((height + 2, width + 2), np.uint8)
    for y in range(height):
        for x in range(width):
            if crop[y, x] and not (
                0 < y < height - 1
                and 0 < x < width - 1
                and crop[y - 1, x]
                and crop[y + 1, x]
                and crop[y, x - 1]
                and crop[y, x + 1]
            ):
                border[y + 1, x + 1] = 1
    straight, diagonal, mixed = 0, 0, 0
    for y in range(1, height + 1):
        for x in range(1, width + 1):
            if border[y, x]:
                sides = border[y - 1, x] + border[y + 1, x] + border[y, x - 1] + border[y, x + 1]
                corners = (
                    border[y - 1, x - 1]
                    + border[y - 1, x + 1]
                    + border[y + 1, x - 1]
                    + border[y + 1, x + 1]
                )
                if 2 <= sides <= 3 and corners <= 2:
                    straight += 1
                elif sides == 0 and corners == 2:
                    diagonal += 1
                elif sides == 1 and 1 <= corners <= 2:
                    mixed += 1
                elif sides == 1 and corners == 3:
                    diagonal += 1
    return float(straight + diagonal * np.sqrt(2.0) + mixed * (1 + np.sqrt(2.0)) / 2)


@compile_kernel
def _count_euler(crop: NDArray[np.uint8]) -> float:
    """Objects less holes at 8-connectivity, from the 2 x 2 windows of the crop."""
    height, width = crop.shape
    number = 0
    for y in range(height + 1):
        for x in range(width + 1):
            a = crop[y - 1, x - 1] if y > 0 and x > 0 else np.uint8(0)
            b = crop[y - 1, x] if y > 0 and x < width else np.uint8(0)
            c = crop[y, x - 1] if y < height and x > 0 else np.uint8(0)
            d = crop[y, x] if y < height and x < width else np.uint8(0)
            if d:
                continue
            if a and not b and not c:
                number += 1
            elif b and c:
                number -= 1
    return float(number)


@compile_kernel
def _summarise_radii(
    mask: NDArray[np.uint8], squared: NDArray[np.int64], histogram: NDArray[np.int64]
) -> tuple[float, float, float]:
    """Return maximum, mean and median distance to the outside, counting squared distances."""
    height, width = mask.shape
    largest, count = 0, 0
    for y in range(height):
        for x in range(width):
            if mask[y, x]:
                histogram[squared[y, x]] += 1
                largest = max(largest, squared[y, x])
                count += 1
    lower, upper = (count - 1) // 2, count // 2
    total, seen, median = 0.0, 0, 0.0
    for value in range(1, largest + 1):
        number = histogram[value]
        if number == 0:
            continue
        distance = np.sqrt(value)
        total += number * distance
        if seen <= lower < seen + number:
            median += distance / 2
        if seen <= upper < seen + number:
            median += distance / 2
        seen += number
        histogram[value] = 0
    return np.sqrt(largest), total / count, median
