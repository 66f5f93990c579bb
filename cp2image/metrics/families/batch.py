"""A batch of single-cell crops and what several feature families need of it. Floor 1: numpy."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from centrosome.cpmorphology import convex_hull_ijv, minimum_enclosing_circle
from numpy.typing import NDArray

from cp2image.errors import MeasurementError
from cp2image.kernel import compile_kernel
from cp2image.metrics.families.sorting import sort_pixels


@dataclass(frozen=True)
class Batch:
    """Images and one binary mask per compartment, with derived arrays computed once.

    Parameters
    ----------
    images
        float64, shape (images, channels, height, width), in [0, 1], C-contiguous.
    masks
        uint8, shape (images, compartments, height, width), 0 or 1, C-contiguous.
    """

    images: NDArray[np.float64]
    masks: NDArray[np.uint8]

    @property
    def objects(self) -> int:
        """Number of (image, compartment) pairs, empty masks included."""
        return int(self.masks.shape[0] * self.masks.shape[1])

    @cached_property
    def order(self) -> NDArray[np.int32]:
        """Pixels of every channel by rising intensity: flat indices, (images, channels, H * W)."""
        return sort_pixels(self.images)

    @cached_property
    def hulls(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Vertices (object + 1, row, column) of all convex hulls, and their number per object."""
        height, width = self.masks.shape[2:]
        outline = _column_ends(self.masks.reshape(self.objects, height, width))
        indexes = np.arange(1, self.objects + 1)
        if not len(outline):
            return np.zeros((0, 3), np.int32), np.zeros(self.objects, np.int32)
        vertices, counts = convex_hull_ijv(outline, indexes)
        return vertices, counts

    @cached_property
    def circles(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Centres (row, column), shape (objects, 2), and radii of the minimum enclosing circles.

        centrosome's own (after Chrystal 1885): a pixel on the circle counts or not by the last
        bit of its centre and radius, and CellProfiler's Zernikes follow that bit.
        """
        vertices, counts = self.hulls
        present = np.flatnonzero(counts > 0)
        centres = np.full((self.objects, 2), np.nan)
        radii = np.full(self.objects, np.nan)
        if len(present):
            found = minimum_enclosing_circle(None, present + 1, (vertices, counts[present]))
            centres[present], radii[present] = found
        return centres, radii


def scale_images(images: NDArray[np.generic], first: int = 0) -> NDArray[np.float64]:
    """Return images as float64 in [0, 1]; integers are divided by their type's largest value.

    ``images`` has shape (images, channels, height, width); ``first`` is the number of the first
    one, for the message.

    Raises
    ------
    MeasurementError
        If a pixel is NaN or outside [0, 1].
    """
    scaled = np.ascontiguousarray(images, dtype=np.float64)
    if np.issubdtype(images.dtype, np.integer):
        scaled = scaled / np.iinfo(str(images.dtype)).max
    fine = (scaled >= 0) & (scaled <= 1)
    if not fine.all():
        n, c, y, x = np.argwhere(~fine)[0]
        raise MeasurementError(
            f"image {first + n}, channel {c} has {images[n, c, y, x]} at y={y}, x={x}; expected "
            "floats in [0, 1] without NaN, or integers from 0 upwards"
        )
    return scaled


@compile_kernel
def _column_ends(masks: NDArray[np.uint8]) -> NDArray[np.int32]:
    """First and last row of every column of every mask, as rows (row, column, object + 1)."""
    objects, height, width = masks.shape
    ends = np.empty((objects * width * 2, 3), np.int32)
    size = 0
    for n in range(objects):
        for x in range(width):
            first, last = -1, -1
            for y in range(height):
                if masks[n, y, x]:
                    if first < 0:
                        first = y
                    last = y
            if first >= 0:
                ends[size, 0], ends[size, 1], ends[size, 2] = first, x, n + 1
                size += 1
            if last > first:
                ends[size, 0], ends[size, 1], ends[size, 2] = last, x, n + 1
                size += 1
    return ends[:size].copy()
