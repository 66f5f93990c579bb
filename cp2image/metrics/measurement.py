"""Measure CellProfiler features of batches of single-cell patches. Floor 1: numpy, pandas, numba.

The features, their names and their defaults are those of CellProfiler 4.2's MeasureObjectSizeShape,
MeasureObjectIntensity, MeasureTexture, MeasureObjectIntensityDistribution, MeasureGranularity and
MeasureColocalization (without Costes). Undefined features are NaN. Angles, on which Pearson's r
means nothing: ``AreaShape_Orientation`` (degrees, period 180) and
``RadialDistribution_ZernikePhase_*`` (radians, period 2 pi).
"""

from collections.abc import Callable, Sequence
from difflib import get_close_matches

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cp2image.errors import MeasurementError
from cp2image.metrics.families import (
    correlation,
    granularity,
    intensity,
    radial_distribution,
    size_shape,
    texture,
    zernike,
)
from cp2image.metrics.families.batch import Batch, scale_images
from cp2image.metrics.segmentation import segment

COMPARTMENTS = ("Nuclei", "Cells", "Cytoplasm")
FAMILIES = (
    "AreaShape",
    "Intensity",
    "Location",
    "Texture",
    "RadialDistribution",
    "Granularity",
    "Correlation",
)
_NUCLEAR_STAINS = ("dna", "dapi", "hoechst", "draq5", "nuclei", "nucleus")
_BATCH_PIXELS = 2_000_000


def measure(
    images: NDArray[np.generic],
    masks: NDArray[np.generic] | None = None,
    *,
    channels: Sequence[str],
    families: Sequence[str] | None = None,
    compartments: Sequence[str] = COMPARTMENTS,
    nucleus_channel: str | None = None,
    cell_channels: Sequence[str] | None = None,
    granularity_subsample: float = 0.25,
) -> pd.DataFrame:
    """Return one row of CellProfiler features per image.

    Parameters
    ----------
    images
        Shape (images, channels, height, width). Floats in [0, 1], or integers, which are divided
        by the largest value of their type. Texture and segmentation depend on this scale.
    masks
        Shape (images, 3, height, width), 0 or not 0: nucleus, cell and cytoplasm. Segmented from
        the images when None.
    channels
        Names of the channels, used in the columns.
    families
        Some of `FAMILIES`; all when None.
    compartments
        Some of `COMPARTMENTS`.
    nucleus_channel, cell_channels
        Channels to segment by: by default the one named after a nuclear stain (DNA, DAPI,
        Hoechst …), and all others. Unused when masks are given.
    granularity_subsample
        Side of the image in which granularity is measured, relative to the patch; CellProfiler's
        default of 0.25 leaves 17 of 68 pixels.

    Returns
    -------
    pandas.DataFrame
        float64, the columns of `feature_names`. Features of an empty mask are NaN, so a patch
        without a nucleus at its centre is a row of NaN.

    Raises
    ------
    MeasurementError
        If shapes do not fit, a pixel is NaN or outside [0, 1], or a name is unknown.

    Examples
    --------
    >>> patches = np.zeros((1, 2, 8, 8)); mask = np.zeros((1, 3, 8, 8), bool)
    >>> mask[:, :, 2:5, 2:6] = True
    >>> table = measure(patches, mask, channels=("DNA", "Actin"), families=["AreaShape"])
    >>> float(table["Nuclei_AreaShape_Area"][0])
    12.0
    """
    names = feature_names(channels, compartments, families)
    chosen = tuple(FAMILIES if families is None else families)
    channels, compartments = tuple(channels), tuple(compartments)
    _check_images(images, channels)
    if not 0 < granularity_subsample <= 1:
        raise MeasurementError(
            f"granularity_subsample is {granularity_subsample}; expected more than 0, at most 1"
        )
    kept = [COMPARTMENTS.index(name) for name in compartments]
    if masks is None:
        nucleus, cell = _choose_channels(channels, nucleus_channel, cell_channels)
    else:
        _check_masks(masks, images)
    n = len(images)
    rows = max(1, _BATCH_PIXELS // max(1, images[0].size)) if n else 1
    values = np.empty((n, len(names)))
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        scaled = scale_images(images[part], start)
        stack = segment(scaled, nucleus, cell) if masks is None else masks[part] != 0
        batch = Batch(scaled, np.ascontiguousarray(stack[:, kept], dtype=np.uint8))
        values[part] = _measure_batch(batch, chosen, granularity_subsample)
    return pd.DataFrame(values, columns=names)


def feature_names(
    channels: Sequence[str],
    compartments: Sequence[str] = COMPARTMENTS,
    families: Sequence[str] | None = None,
) -> list[str]:
    """Return the columns of `measure`, in order: by compartment, then by family.

    Raises
    ------
    MeasurementError
        If a family or compartment is unknown or doubled, or a channel is doubled or unnamed.
    """
    chosen = tuple(FAMILIES if families is None else families)
    _check_names(chosen, FAMILIES, "family")
    _check_names(tuple(compartments), COMPARTMENTS, "compartment")
    channels = tuple(channels)
    if not channels or len(set(channels)) != len(channels) or not all(channels):
        raise MeasurementError(f"channels are {channels}; expected at least one, with unique names")
    names = [name for family in chosen for name in _LISTS[family](channels)]
    return [f"{compartment}_{name}" for compartment in compartments for name in names]


_LISTS: dict[str, Callable[[tuple[str, ...]], list[str]]] = {
    "AreaShape": lambda _: size_shape.list_size_shape() + zernike.list_shape_zernikes(),
    "Intensity": intensity.list_intensity,
    "Location": intensity.list_location,
    "Texture": texture.list_texture,
    "RadialDistribution": lambda channels: (
        radial_distribution.list_radial_distribution(channels)
        + zernike.list_intensity_zernikes(channels)
    ),
    "Granularity": granularity.list_granularity,
    "Correlation": correlation.list_correlation,
}
_MEASURES: dict[str, tuple[Callable[[Batch], NDArray[np.float64]], ...]] = {
    "AreaShape": (size_shape.measure_size_shape, zernike.measure_shape_zernikes),
    "Intensity": (intensity.measure_intensity,),
    "Location": (intensity.measure_location,),
    "Texture": (texture.measure_texture,),
    "RadialDistribution": (
        radial_distribution.measure_radial_distribution,
        zernike.measure_intensity_zernikes,
    ),
    "Correlation": (correlation.measure_correlation,),
}


def _measure_batch(
    batch: Batch, families: tuple[str, ...], granularity_subsample: float
) -> NDArray[np.float64]:
    blocks = []
    for family in families:
        if family == "Granularity":
            blocks.append(granularity.measure_granularity(batch, granularity_subsample))
        else:
            blocks += [measure_block(batch) for measure_block in _MEASURES[family]]
    values = np.concatenate(blocks, axis=2)
    values[~batch.masks.any(axis=(2, 3))] = np.nan
    return values.reshape(len(values), -1)


def _check_images(images: NDArray[np.generic], channels: tuple[str, ...]) -> None:
    kinds = (np.floating, np.integer)
    if not isinstance(images, np.ndarray) or not any(np.issubdtype(images.dtype, k) for k in kinds):
        found = getattr(images, "dtype", type(images).__name__)
        raise MeasurementError(f"images are {found}; expected an array of floats or integers")
    if images.ndim != 4 or min(images.shape[1:]) < 1:
        raise MeasurementError(
            f"images have shape {images.shape}; expected (images, channels, height, width)"
        )
    if images.shape[1] != len(channels):
        raise MeasurementError(
            f"images of shape {images.shape} have {images.shape[1]} channels, but {len(channels)} "
            f"are named: {', '.join(channels)}"
        )


def _check_masks(masks: NDArray[np.generic], images: NDArray[np.generic]) -> None:
    expected = (len(images), len(COMPARTMENTS), *images.shape[2:])
    if np.shape(masks) != expected:
        raise MeasurementError(
            f"masks have shape {np.shape(masks)}; expected {expected} for images of shape "
            f"{images.shape}: one mask each of {', '.join(COMPARTMENTS)}"
        )


def _check_names(names: tuple[str, ...], known: tuple[str, ...], kind: str) -> None:
    for name in names:
        if name not in known:
            near = get_close_matches(str(name), known, n=1, cutoff=0.3)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise MeasurementError(f"unknown {kind} {name!r}{hint} Known: {', '.join(known)}")
    if not names or len(set(names)) != len(names):
        raise MeasurementError(f"expected at least one {kind}, each once; found {names}")


def _choose_channels(
    channels: tuple[str, ...], nucleus: str | None, cell: Sequence[str] | None
) -> tuple[int, tuple[int, ...]]:
    """Return the indices of the channels to segment nuclei and cells by."""
    if nucleus is None:
        stained = [name for name in channels if any(s in name.lower() for s in _NUCLEAR_STAINS)]
        if len(stained) != 1:
            raise MeasurementError(
                f"cannot tell which of {', '.join(channels)} shows nuclei; give nucleus_channel"
            )
        nucleus = stained[0]
    _check_names((nucleus,), channels, "channel")
    if cell is None:
        cell = tuple(name for name in channels if name != nucleus) or (nucleus,)
    _check_names(tuple(cell), channels, "channel")
    return channels.index(nucleus), tuple(channels.index(name) for name in cell)
