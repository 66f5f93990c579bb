"""The plain way to measure patches: cp_measure, one object, channel and family at a time.

What a user would write without `cp2image.metrics`, of which nothing is used here: the opponent of
the benchmark and the oracle of the tests. Values are cp_measure's (Munoz et al. 2025,
arXiv:2507.01163) with CellProfiler's own quantiles (``legacy``). Where several pixels lie deepest
in a mask, its rings are around the first of them, not CellProfiler's. Above numpy, pandas,
cp_measure.
"""

import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import cp_measure
import numpy as np
import pandas as pd
from cp_measure.bulk import get_core_measurements
from cp_measure.core import measurecolocalization as colocalization
from numpy.typing import NDArray

COMPARTMENTS = ("Nuclei", "Cells", "Cytoplasm")
NOT_IN_CELLPROFILER = {"FilledArea", "PerimeterCrofton"}

Labels = NDArray[np.int64]
Pixels = NDArray[np.float64]
Row = dict[str, float]
_Functions = dict[str, Callable[..., dict[str, Any]]]


def measure_plain(
    images: NDArray[np.floating],
    masks: NDArray[np.generic],
    channels: Sequence[str],
    granularity_subsample: float = 0.25,
    compartments: Sequence[str] = COMPARTMENTS,
    *,
    accelerated: bool = False,
) -> pd.DataFrame:
    """Return one row of features per image, under CellProfiler's names.

    Parameters
    ----------
    images
        Shape (images, channels, height, width), floats in [0, 1].
    masks
        Shape (images, 3, height, width), 0 or not 0: nucleus, cell and cytoplasm.
    channels
        Names of the channels.
    granularity_subsample
        Side of the image in which granularity is measured, relative to the patch.
    compartments
        Some of `COMPARTMENTS`.
    accelerated
        Take cp_measure's numba backend where it has one (intensity, texture, Feret): faster, with
        the same values, except that of several brightest pixels it names the last, not the first.

    Returns
    -------
    pandas.DataFrame
        float64; NaN where a mask is empty.
    """
    functions = _choose_functions(accelerated)
    rows = []
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        for image, stack in zip(np.asarray(images, dtype=np.float64), masks, strict=True):
            row: Row = {}
            for compartment, mask in zip(COMPARTMENTS, stack, strict=True):
                if compartment not in compartments or not mask.any():
                    continue
                labels = (mask != 0).astype(np.int64)
                found = _measure_object(functions, image, labels, channels, granularity_subsample)
                row |= {f"{compartment}_{name}": value for name, value in found.items()}
            rows.append(row)
    return pd.DataFrame(rows, dtype=np.float64)


def _choose_functions(accelerated: bool) -> _Functions:
    """Return cp_measure's functions of one backend, which is a setting of its whole module."""
    cp_measure.set_accelerator("numba" if accelerated else None)
    try:  # labels are 0 and 1 already: nothing to sanitise
        functions: _Functions = get_core_measurements(legacy=True, sanitize=False)
    finally:
        cp_measure.set_accelerator(None)
    return functions


def _measure_object(
    functions: _Functions,
    image: Pixels,
    labels: Labels,
    channels: Sequence[str],
    granularity_subsample: float,
) -> Row:
    """Measure one object in every channel and every pair of channels."""
    row = _measure_area_shape(functions, labels)
    for pixels, channel in zip(image, channels, strict=True):
        row |= _measure_channel(functions, labels, pixels, channel, granularity_subsample)
    for first, second in itertools.combinations(range(len(channels)), 2):
        row |= _measure_correlation(
            labels, image[first], image[second], channels[first], channels[second]
        )
    return row


def _measure_area_shape(functions: _Functions, labels: Labels) -> Row:
    found: dict[str, Any] = {}
    for family in ("sizeshape", "zernike", "feret"):
        found |= functions[family](labels, None)
    return {
        f"AreaShape_{name}": float(np.asarray(values).ravel()[0])
        for name, values in found.items()
        if name not in NOT_IN_CELLPROFILER
    }


def _measure_channel(
    functions: _Functions,
    labels: Labels,
    pixels: Pixels,
    channel: str,
    granularity_subsample: float,
) -> Row:
    row: Row = {}
    granularity = functions["granularity"](labels, pixels, subsample_size=granularity_subsample)
    for name, value in (functions["intensity"](labels, pixels) | granularity).items():
        row[f"{name}_{channel}"] = float(value[0])
    for name, value in functions["texture"](labels, pixels).items():
        feature, rest = name.split("_", 1)
        row[f"Texture_{feature}_{channel}_{rest}"] = float(value[0])
    for family in ("radial_distribution", "radial_zernikes"):
        for name, value in functions[family](labels, pixels).items():
            start, feature, rest = name.split("_", 2)
            row[f"{start}_{feature}_{channel}_{rest}"] = float(value[0])
    return row


def _measure_correlation(labels: Labels, first: Pixels, second: Pixels, a: str, b: str) -> Row:
    pearson = colocalization.get_correlation_pearson(first, second, labels)
    manders = colocalization.get_correlation_manders_fold(first, second, labels)
    rwc = colocalization.get_correlation_rwc(first, second, labels)
    overlap = _measure_overlap(labels, first, second)
    return {
        f"Correlation_Correlation_{a}_{b}": pearson["Correlation_Pearson"][0],
        f"Correlation_Slope_{a}_{b}": pearson["Correlation_Slope"][0],
        f"Correlation_Overlap_{a}_{b}": overlap["Correlation_Overlap"][0],
        f"Correlation_K_{a}_{b}": overlap["Correlation_K_1"][0],
        f"Correlation_K_{b}_{a}": overlap["Correlation_K_2"][0],
        f"Correlation_Manders_{a}_{b}": manders["Correlation_Manders_1"][0],
        f"Correlation_Manders_{b}_{a}": manders["Correlation_Manders_2"][0],
        f"Correlation_RWC_{a}_{b}": rwc["Correlation_RWC_1"][0],
        f"Correlation_RWC_{b}_{a}": rwc["Correlation_RWC_2"][0],
    }


def _measure_overlap(labels: Labels, first: Pixels, second: Pixels) -> dict[str, Any]:
    try:
        found: dict[str, Any] = colocalization.get_correlation_overlap(first, second, labels)
    except ZeroDivisionError:  # it divides plain floats; CellProfiler's numpy gives NaN or inf
        x, y = first[labels > 0], second[labels > 0]
        above = (x >= 0.15 * x.max()) & (y >= 0.15 * y.max())
        xx, yy, xy = (x * x)[above].sum(), (y * y)[above].sum(), (x * y)[above].sum()
        values = xy / np.sqrt(xx * yy), xy / xx, xy / yy
        names = "Correlation_Overlap", "Correlation_K_1", "Correlation_K_2"
        found = {name: [value] for name, value in zip(names, values, strict=True)}
    return found
