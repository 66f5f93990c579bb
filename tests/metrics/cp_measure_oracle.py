"""The plain way to measure patches: cp_measure, one object, channel and family at a time.

Slow (about a quarter of a second a cell) and independent of ``cp2image.metrics``; the oracle
that the batch kernels are compared with. ``legacy=True`` takes CellProfiler's quantiles.
"""

import itertools
import warnings

import numpy as np
import pandas as pd
from cp_measure.core import (
    measurecolocalization,
    measuregranularity,
    measureobjectintensity,
    measureobjectintensitydistribution,
    measureobjectsizeshape,
    measuretexture,
)

COMPARTMENTS = ("Nuclei", "Cells", "Cytoplasm")
NOT_IN_CELLPROFILER = {"FilledArea", "PerimeterCrofton"}


def measure_plain(images, masks, channels, granularity_subsample=0.25, compartments=COMPARTMENTS):
    """Return one row per image under CellProfiler's names; images are floats in [0, 1]."""
    rows = []
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        for image, stack in zip(np.asarray(images, dtype=np.float64), masks, strict=True):
            row = {}
            for compartment, mask in zip(COMPARTMENTS, stack, strict=True):
                if compartment not in compartments or not mask.any():
                    continue
                labels = (mask != 0).astype(np.int64)
                object_row = measure_object(image, labels, channels, granularity_subsample)
                row |= {f"{compartment}_{name}": value for name, value in object_row.items()}
            rows.append(row)
    return pd.DataFrame(rows, dtype=np.float64)


def measure_object(image, labels, channels, granularity_subsample=0.25):
    """Measure one object in every channel and every pair of channels."""
    row = measure_area_shape(labels)
    for pixels, channel in zip(image, channels, strict=True):
        for measure_family in (
            measure_intensity,
            measure_texture,
            measure_radial_distribution,
        ):
            row |= measure_family(labels, pixels, channel)
        row |= measure_granularity(labels, pixels, channel, granularity_subsample)
    for first, second in itertools.combinations(range(len(channels)), 2):
        row |= measure_correlation(
            labels, image[first], image[second], channels[first], channels[second]
        )
    return row


def measure_area_shape(labels):
    shape = measureobjectsizeshape.get_sizeshape(labels, None)
    zernike = measureobjectsizeshape.get_zernike(labels, None)
    feret = measureobjectsizeshape.get_feret(labels, None)
    return {
        f"AreaShape_{name}": float(np.asarray(values).ravel()[0])
        for name, values in (shape | zernike | feret).items()
        if name not in NOT_IN_CELLPROFILER
    }


def measure_intensity(labels, pixels, channel):
    values = measureobjectintensity.get_intensity(labels, pixels, legacy=True)
    return {f"{name}_{channel}": float(value[0]) for name, value in values.items()}


def measure_texture(labels, pixels, channel):
    values = measuretexture.get_texture(labels, pixels)
    return {
        "Texture_{}_{}_{}".format(name.split("_")[0], channel, name.split("_", 1)[1]): float(
            value[0]
        )
        for name, value in values.items()
    }


def measure_radial_distribution(labels, pixels, channel):
    rings = measureobjectintensitydistribution.get_radial_distribution(labels, pixels)
    zernikes = measureobjectintensitydistribution.get_radial_zernikes(labels, pixels)
    row = {}
    for name, value in (rings | zernikes).items():
        family, feature, rest = name.split("_", 2)
        row[f"{family}_{feature}_{channel}_{rest}"] = float(value[0])
    return row


def measure_granularity(labels, pixels, channel, subsample):
    values = measuregranularity.get_granularity(labels, pixels, subsample_size=subsample)
    return {f"{name}_{channel}": float(value[0]) for name, value in values.items()}


def measure_correlation(labels, first, second, a, b):
    pearson = measurecolocalization.get_correlation_pearson(first, second, labels)
    manders = measurecolocalization.get_correlation_manders_fold(first, second, labels)
    rwc = measurecolocalization.get_correlation_rwc(first, second, labels)
    overlap = measure_overlap(labels, first, second)
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


def measure_overlap(labels, first, second):
    try:
        return measurecolocalization.get_correlation_overlap(first, second, labels)
    except ZeroDivisionError:  # it divides plain floats; CellProfiler's numpy gives NaN or inf
        x, y = first[labels > 0], second[labels > 0]
        above = (x >= 0.15 * x.max()) & (y >= 0.15 * y.max())
        xx, yy, xy = (x * x)[above].sum(), (y * y)[above].sum(), (x * y)[above].sum()
        values = xy / np.sqrt(xx * yy), xy / xx, xy / yy
        names = "Correlation_Overlap", "Correlation_K_1", "Correlation_K_2"
        return {name: [value] for name, value in zip(names, values, strict=True)}
