"""A 5 × 5 convolution after nearest 2 × upsampling, computed on the small grid. Pure torch.

Upsampling repeats pixels, so for each of the four positions within a doubled pixel the 25 taps
fall on 9 pixels only: four 3 × 3 kernels, sums of the large one's entries, then a pixel shuffle.
Equal to the plain form but for rounding, with 9 taps instead of 25, forwards and backwards.
"""

import torch
from torch import Tensor
from torch.nn.functional import conv2d, interpolate, pixel_shuffle


def fold_kernel(weight: Tensor) -> Tensor:
    """Return the four 3 × 3 kernels of a 5 × 5 one, as (4 · out, in, 3, 3), ready to shuffle.

    Tap k of the large kernel at position r within the doubled pixel reads small pixel
    ``(r + k) // 2``.
    """
    taps = weight.new_zeros(2, 3, 5)
    for position in range(2):
        for tap in range(5):
            taps[position, (position + tap) // 2, tap] = 1
    folded = torch.einsum("rak,oikl,sbl->orsiab", taps, weight, taps)
    return folded.reshape(-1, weight.shape[1], 3, 3)


def upsample_convolve(x: Tensor, weight: Tensor, grid: int) -> Tensor:
    """Double ``x``, crop it to ``grid``, and convolve it in full (zero padding of 4).

    Parameters
    ----------
    x
        (N, in, s, s).
    weight
        (out, in, 5, 5).
    grid
        Side of the upsampled map that is kept: 2 s, or 2 s − 1 (then the plain form is used).

    Returns
    -------
    Tensor
        (N, out, grid + 4, grid + 4).
    """
    if grid != 2 * x.shape[-1]:
        up = interpolate(x, scale_factor=2, mode="nearest")[..., :grid, :grid]
        return conv2d(up, weight, padding=4)
    kernel = fold_kernel(weight)
    if x.device.type == "cpu":
        kernel = kernel.contiguous(memory_format=torch.channels_last)
    return pixel_shuffle(conv2d(x, kernel, padding=2), 2)
