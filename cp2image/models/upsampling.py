"""A 5 × 5 convolution after nearest 2 × upsampling, computed on the small grid. Pure torch.

Upsampling repeats pixels, so for each of the four positions within a doubled pixel the 25 taps
fall on 9 pixels only: four 3 × 3 kernels, sums of the large one's entries. Equal to the plain form
but for rounding, with 9 taps instead of 25, forwards and backwards.

The four positions stay side by side in a map of shape (N, channels, h, 4 w) until `spread` puts
them where they belong: what treats all pixels alike (normalisation, activation, 1 × 1 convolution)
can be done before, and then fewer values are moved.
"""

import torch
from torch import Tensor
from torch.nn.functional import conv2d, interpolate


def fold_kernel(weight: Tensor) -> Tensor:
    """Return the four 3 × 3 kernels of a 5 × 5 one, as (4 · out, in, 3, 3), position by position.

    Tap k of the large kernel at position r within the doubled pixel reads small pixel
    ``(r + k) // 2``.
    """
    taps = weight.new_zeros(2, 3, 5)
    for position in range(2):
        for tap in range(5):
            taps[position, (position + tap) // 2, tap] = 1
    folded = torch.einsum("rak,oikl,sbl->rsoiab", taps, weight, taps)
    return folded.reshape(-1, weight.shape[1], 3, 3).contiguous(memory_format=torch.channels_last)


def convolve_folded(x: Tensor, folded: Tensor, bias: Tensor | None = None) -> Tensor:
    """Double ``x`` and convolve it in full with the kernel that was folded.

    Parameters
    ----------
    x
        (N, in, s, s), channels last.
    folded
        What `fold_kernel` made, (4 · out, in, 3, 3).
    bias
        (4 · out,).

    Returns
    -------
    Tensor
        (N, out, s + 2, 4 (s + 2)), channels last; `spread` makes (N, out, 2 s + 4, 2 s + 4) of it.
    """
    y = conv2d(x, folded, bias, padding=2).contiguous(memory_format=torch.channels_last)
    n, channels, height, width = y.shape
    return y.permute(0, 2, 3, 1).view(n, height, 4 * width, channels // 4).permute(0, 3, 1, 2)


def spread(x: Tensor) -> Tensor:
    """Put the positions of (N, c, h, 4 w) where they belong: (N, c, 2 h, 2 w), channels last."""
    n, channels, height, width = x.shape
    pairs = x.permute(0, 2, 3, 1).reshape(n, height, width // 4, 2, 2 * channels)
    rows = pairs.permute(0, 1, 3, 2, 4).reshape(n, 2 * height, width // 2, channels)
    return rows.permute(0, 3, 1, 2)


def convolve_doubled(x: Tensor, weight: Tensor, grid: int, bias: Tensor | None = None) -> Tensor:
    """Double ``x``, crop it to ``grid``, convolve it in full (zero padding of 4): the plain form.

    Returns
    -------
    Tensor
        (N, out, grid + 4, grid + 4).
    """
    doubled = interpolate(x, scale_factor=2, mode="nearest")[..., :grid, :grid]
    return conv2d(doubled, weight, bias, padding=4)
