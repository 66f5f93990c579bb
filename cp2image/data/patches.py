"""Cut single-cell patches out of fields of view. Floor 1: numpy; no Ray, torch or network."""

from typing import Any, Literal, TypeVar

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike, NDArray

from cp2image.errors import FieldError

_Pixel = TypeVar("_Pixel", bound=np.generic)


def crop_patch(
    field: NDArray[_Pixel], center_yx: tuple[float, float], size: int
) -> NDArray[_Pixel]:
    """Return the ``size`` x ``size`` window of ``field`` around one nucleus.

    Pixels beyond the border of the field are 0.

    Parameters
    ----------
    field
        Field of view, shape (channels, height, width), any dtype.
    center_yx
        ``Nuclei_Location_Center_Y`` and ``_X``: pixels, from 0 at the top left.
    size
        Side of the patch in pixels.

    Returns
    -------
    Patch of shape (channels, size, size), the field's dtype.

    Raises
    ------
    FieldError
        If the centre is outside the field: table and image do not belong together.

    Examples
    --------
    >>> crop_patch(np.arange(16, dtype=np.float32).reshape(1, 4, 4), (1, 1), size=2)
    array([[[0., 1.],
            [4., 5.]]], dtype=float32)
    """
    patch: NDArray[_Pixel] = crop_patches(field, [center_yx], size)[0][0]
    return patch


def crop_patches(
    field: NDArray[_Pixel],
    centers_yx: ArrayLike,
    size: int,
    border: Literal["pad", "drop"] = "pad",
) -> tuple[NDArray[_Pixel], NDArray[np.bool_]]:
    """Return the windows of ``field`` around all its nuclei.

    Parameters
    ----------
    field
        Field of view, shape (channels, height, width), any dtype.
    centers_yx
        Centres (y, x) of N nuclei in pixels, shape (N, 2), from 0 at the top left.
    size
        Side of the patch in pixels.
    border
        What becomes of a window that reaches beyond the field: ``pad`` fills it with 0 and keeps
        it, ``drop`` marks it as not kept.

    Returns
    -------
    patches
        Shape (N, channels, size, size), one per centre whether kept or not.
    kept
        Shape (N,), False where ``border`` is ``drop`` and the window leaves the field.

    Raises
    ------
    FieldError
        If a centre is outside the field or not a number.
    """
    height, width = field.shape[1:]
    centers = np.asarray(centers_yx, dtype=np.float64).reshape(-1, 2)
    y, x = centers.T
    outside = np.flatnonzero(~((y >= 0) & (y < height) & (x >= 0) & (x < width)))
    if outside.size:
        first = outside[0]
        more = f" ({outside.size} of {len(centers)} nuclei are)" if len(centers) > 1 else ""
        raise FieldError(
            f"nucleus at y={y[first]:.1f}, x={x[first]:.1f} is outside its {height} x {width} px "
            f"field{more}; check that the table and the images share one plate and one binning"
        )
    top = np.rint(y).astype(np.int64) - size // 2
    left = np.rint(x).astype(np.int64) - size // 2
    inside = (top >= 0) & (left >= 0) & (top + size <= height) & (left + size <= width)
    padded: NDArray[Any] = np.pad(field, ((0, 0), (size, size), (size, size)))
    windows = sliding_window_view(padded, (size, size), axis=(1, 2))
    patches = np.ascontiguousarray(windows[:, top + size, left + size].swapaxes(0, 1))
    return patches, inside if border == "drop" else np.ones(len(centers), dtype=bool)
