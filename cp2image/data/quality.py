"""Tell which patches show no usable cell, and why. Floor 1: numpy, scipy; no Ray, torch.

Thresholds were chosen on BBBC021 (68 px, three stains) so that only patches without any
recognisable cell are dropped; all are arguments.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from cp2image.errors import PatchError

NOISE, OUT_OF_FOCUS, SATURATED = "noise", "out_of_focus", "saturated"
EMPTY_CHANNEL = "empty_channel"
DROPPED = (NOISE, OUT_OF_FOCUS, SATURATED)
"""Reasons for which a patch should be left out; `EMPTY_CHANNEL` is only worth counting."""

_BLUR = 0.022
_DIMENSIONS = 4


def autocorrelation(patches: NDArray[Any]) -> NDArray[np.float32]:
    """Return the correlation of neighbouring pixels, mean of both directions, in [-1, 1].

    Camera noise has 0 to 0.3, cells under a microscope more than 0.8; a constant channel gets 1.

    Parameters
    ----------
    patches
        Shape (N, C, S, S).

    Returns
    -------
    Shape (N, C).
    """
    centered = patches.astype(np.float32)
    centered -= centered.mean(axis=(2, 3), keepdims=True)
    variance = np.square(centered).mean(axis=(2, 3))
    along_x = (centered[..., 1:] * centered[..., :-1]).mean(axis=(2, 3))
    along_y = (centered[..., 1:, :] * centered[..., :-1, :]).mean(axis=(2, 3))
    flat = variance <= 0
    ratio = (along_x + along_y) / 2 / np.where(flat, 1, variance)
    return np.where(flat, 1, np.clip(ratio, -1, 1)).astype(np.float32)


def sharpness(patches: NDArray[Any]) -> NDArray[np.float32]:
    """Return how steep the steepest edges are: channel ranges per side length of the patch.

    The 98th percentile of the gradient of the slightly smoothed channel, divided by the
    channel's range (1st to 99th percentile) and multiplied by the side. It depends neither on
    exposure nor, as long as the patch is as large as a cell, on magnification. A constant
    channel gets 0, noise without a cell a high value: judge noise first.

    Parameters
    ----------
    patches
        Shape (N, C, S, S).

    Returns
    -------
    Shape (N, C).
    """
    count, channels, side, _ = patches.shape
    sigma = _BLUR * side
    smooth = ndimage.gaussian_filter(patches.astype(np.float32), (0, 0, sigma, sigma))
    vertical = (smooth[..., 2:, 1:-1] - smooth[..., :-2, 1:-1]) / 2
    horizontal = (smooth[..., 1:-1, 2:] - smooth[..., 1:-1, :-2]) / 2
    slope = np.hypot(vertical, horizontal).reshape(count, channels, -1)
    low, high = np.quantile(smooth.reshape(count, channels, -1), (0.01, 0.99), axis=2)
    steepest = np.quantile(slope, 0.98, axis=2)
    flat = high <= low
    return np.where(flat, 0, steepest * side / np.where(flat, 1, high - low)).astype(np.float32)


def judge_patches(
    patches: NDArray[Any],
    *,
    nucleus_channel: int = 0,
    noise_below: float = 0.5,
    focus_below: float = 4.2,
    saturated_above: float = 0.25,
    full_scale: float | None = None,
) -> NDArray[np.str_]:
    """Return for each patch why it should not be used, or an empty string.

    Parameters
    ----------
    patches
        Shape (N, C, S, S), acquisition scale, before any normalisation of single patches.
    nucleus_channel
        Index of the DNA stain.
    noise_below
        ``noise``: `autocorrelation` of the nucleus channel is lower; there is no nucleus.
    focus_below
        ``out_of_focus``: `sharpness` of every channel that is no noise is lower. One sharp
        channel keeps a patch, because stains lie in different planes of a thick cell.
    saturated_above
        ``saturated``: a larger share of the pixels of a channel is at ``full_scale``.
    full_scale
        Brightest value of the camera; None takes the largest value of the integer type (12-bit
        data shifted to 16 bits, 65520, counts as full) or 1 for floats. Give 4095 for 12-bit
        data in 16-bit files.

    Returns
    -------
    Shape (N,), strings: ``""`` or one of `DROPPED` (the first that holds, in that order), else
    ``empty_channel`` where another channel is constant or pure noise.

    Raises
    ------
    PatchError
        If ``patches`` has not four axes or no such nucleus channel.
    """
    if patches.ndim != _DIMENSIONS or not 0 <= nucleus_channel < patches.shape[1]:
        raise PatchError(
            f"patches have shape {patches.shape}; expected (cells, channels, side, side) with a "
            f"nucleus channel at index {nucleus_channel}"
        )
    if not len(patches):
        return np.zeros(0, dtype=f"<U{len(EMPTY_CHANNEL)}")
    correlation = autocorrelation(patches)
    constant = patches.max(axis=(2, 3)) == patches.min(axis=(2, 3))
    noisy = correlation < noise_below
    blurred = np.where(noisy | constant, 0, sharpness(patches)).max(axis=1) < focus_below
    full = (patches >= _full_scale(patches.dtype, full_scale)).mean(axis=(2, 3))
    empty = constant | noisy
    return np.select(
        [
            noisy[:, nucleus_channel],
            blurred & ~empty.all(axis=1),
            full.max(axis=1) > saturated_above,
            empty.any(axis=1),
        ],
        [NOISE, OUT_OF_FOCUS, SATURATED, EMPTY_CHANNEL],
        default="",
    )


def _full_scale(dtype: np.dtype[Any], given: float | None) -> float:
    if given is not None:
        return given
    if not np.issubdtype(dtype, np.integer):
        return 1.0
    return float({np.dtype(np.uint16): 65520}.get(dtype, np.iinfo(dtype).max))
