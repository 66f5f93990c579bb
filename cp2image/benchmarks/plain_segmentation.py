"""The plain way to find the cell in a patch: scikit-image and centrosome, one patch at a time.

What a user would write without `cp2image.metrics`, of which nothing is used here: the opponent of
the benchmark and the oracle of the tests. Above numpy, scipy, scikit-image, centrosome.
"""

from collections.abc import Sequence

import numpy as np
from centrosome.propagate import propagate
from numpy.typing import NDArray
from scipy import ndimage
from skimage.feature import peak_local_max
from skimage.filters import threshold_li
from skimage.segmentation import watershed


def segment_plain(
    image: NDArray[np.float64], nucleus_channel: int, cell_channels: Sequence[int]
) -> NDArray[np.bool_]:
    """Return nucleus, cell and cytoplasm of one patch, as CellProfiler's Identify modules do.

    Parameters
    ----------
    image
        Shape (channels, height, width), floats in [0, 1].
    nucleus_channel, cell_channels
        Indices of channels.

    Returns
    -------
    numpy.ndarray
        Shape (3, height, width); all False where no nucleus covers the centre.
    """
    masks = np.zeros((3, *image.shape[1:]), np.bool_)
    smooth = ndimage.gaussian_filter(image[nucleus_channel], 1)
    foreground = ndimage.binary_fill_holes(smooth > threshold_li(smooth))
    if not foreground.any():
        return masks
    depth = ndimage.gaussian_filter(ndimage.distance_transform_edt(foreground), 2)
    peaks = peak_local_max(
        depth, min_distance=7, labels=foreground.astype(int), exclude_border=False
    )
    seeds = np.zeros(foreground.shape, int)
    seeds[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    nuclei = watershed(-depth, seeds, mask=foreground)
    centre = nuclei[nuclei.shape[0] // 2, nuclei.shape[1] // 2]
    if centre == 0:
        return masks
    body = image[list(cell_channels)].sum(axis=0)
    smooth = ndimage.gaussian_filter(body, 1)
    allowed = (smooth > threshold_li(smooth)) | (nuclei > 0)
    cells, _ = propagate(body, nuclei, allowed, 0.05)
    nucleus = nuclei == centre
    cell = ndimage.binary_fill_holes(cells == centre) | nucleus
    masks[:] = nucleus, cell, cell & ~ndimage.binary_erosion(nucleus, np.ones((3, 3)))
    return masks
