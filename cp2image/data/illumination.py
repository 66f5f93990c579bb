"""Estimate and remove uneven illumination, per plate and channel. Floor 1: numpy, scipy.

Retrospective correction after Singh, Bray, Jones and Carpenter, "Pipeline for illumination
correction of images for high-throughput microscopy", J. Microscopy 256 (2014): average all
fields of a plate, smooth, rescale (CellProfiler's ``CorrectIlluminationCalculate``, "All" images,
median filter), then divide every field by the result (``CorrectIlluminationApply``).
"""

from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from cp2image.errors import FieldError

SMOOTHING_PX = 500
"""Side of the median window at the scale of a usual field (Singh et al. 2014)."""
_ROBUST_MINIMUM = 0.02
_COARSE_WINDOW = 25

_Pixel = TypeVar("_Pixel", bound=np.generic)


class IlluminationSum:
    """Running sum of a plate's fields; sums of different workers merge in any order.

    Sums are float64, so they are exact for integer images whatever the order.

    Attributes
    ----------
    total
        Sum of the fields, shape (channels, height, width); None before the first.
    count
        Number of fields added.
    """

    def __init__(self) -> None:
        self.total: NDArray[np.float64] | None = None
        self.count = 0

    def add(self, field: NDArray[Any]) -> Self:
        """Add one field, shape (channels, height, width); returns the sum itself."""
        return self._include(field.astype(np.float64), 1)

    def merge(self, other: "IlluminationSum") -> Self:
        """Add another worker's sum of the same plate; returns the sum itself."""
        return self if other.total is None else self._include(other.total, other.count)

    def _include(self, total: NDArray[np.float64], count: int) -> Self:
        if self.total is not None and self.total.shape != total.shape:
            raise FieldError(
                f"fields of one plate differ in shape: {self.total.shape} and {total.shape} "
                "(channels, height, width); correct plates of one size and binning together"
            )
        self.total = total.copy() if self.total is None else self.total + total
        self.count += count
        return self

    def function(self, smoothing_px: int = SMOOTHING_PX) -> NDArray[np.float32]:
        """Return the illumination function, shape (channels, height, width), at least 1.

        The mean field is median-filtered with a window of ``smoothing_px`` and divided by its
        2nd percentile; what lies below is set to 1. A channel that is 0 throughout gets 1.
        The median runs on block means: illumination varies far more slowly than the window.

        Raises
        ------
        FieldError
            If no field was added.
        """
        if self.total is None:
            raise FieldError("no field to estimate the illumination from; add the plate's fields")
        planes = [_smooth(plane, smoothing_px) for plane in self.total / self.count]
        return np.stack(planes)


def _smooth(mean: NDArray[np.float64], smoothing_px: int) -> NDArray[np.float32]:
    step = max(1, smoothing_px // _COARSE_WINDOW)
    height, width = mean.shape
    padded = np.pad(mean, ((0, -height % step), (0, -width % step)), mode="edge")
    rows, columns = padded.shape[0] // step, padded.shape[1] // step
    coarse = padded.reshape(rows, step, columns, step).mean(axis=(1, 3))
    coarse = ndimage.median_filter(coarse, size=max(1, smoothing_px // step), mode="nearest")
    smooth = ndimage.zoom(coarse, step, order=1, mode="nearest", grid_mode=True)[:height, :width]
    floor = np.quantile(smooth, _ROBUST_MINIMUM)
    if floor <= 0:
        return np.ones(mean.shape, dtype=np.float32)
    function: NDArray[np.float32] = np.maximum(smooth / floor, 1).astype(np.float32)
    return function


def correct(field: NDArray[_Pixel], function: NDArray[np.float32]) -> NDArray[_Pixel]:
    """Divide a field by its plate's illumination function.

    Parameters
    ----------
    field
        Shape (channels, height, width), integer or float.
    function
        Same shape, from `IlluminationSum.function`.

    Returns
    -------
    Field of the same shape and dtype; integers are rounded, and clipped to the type's range.

    Raises
    ------
    FieldError
        If the shapes differ.
    """
    if field.shape != function.shape:
        raise FieldError(
            f"field of shape {field.shape} and illumination function of shape {function.shape} "
            "differ; estimate the function on fields of the same plate"
        )
    pixels: NDArray[Any] = field
    corrected = pixels / function
    if np.issubdtype(pixels.dtype, np.integer):
        limits = np.iinfo(pixels.dtype)
        corrected = np.clip(np.rint(corrected), limits.min, limits.max)
    return corrected.astype(field.dtype)
