"""CP2Image as published (Ji et al., MIDL 2023): generator and discriminator. Pure torch.

Widths, kernels and normalisation are the paper's; the number of features and channels and the side
of the patch are free. At 453 features, 3 channels and 68 px the generator has 439,558 parameters
and both networks together 544,744.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, max_pool2d
from torch.nn.utils.parametrizations import spectral_norm

from cp2image.models.leading_norm import LeadingBatchNorm
from cp2image.models.upsampling import (
    convolve_doubled,
    convolve_folded,
    fold_kernel,
    spread,
)

KERNEL, WIDTH, SLOPE = 5, 32, 0.01
_GROWTH = KERNEL - 1
_LAST = 2


def layer_sides(patch_size: int) -> tuple[int, int, int, int]:
    """Return the sides of the generator's four feature maps, coarse to fine.

    A full 5 × 5 convolution adds 4 pixels; between two of them the map is doubled (and cropped by
    one row and column where the side is odd).

    >>> layer_sides(68)
    (5, 14, 32, 68)

    Raises
    ------
    ValueError
        If the patch is too small for four layers (under 36 px).
    """
    sides = [patch_size]
    for _ in range(3):
        sides.append(-(-(sides[-1] - _GROWTH) // 2))
    if patch_size < 36:
        raise ValueError(f"patch_size={patch_size}: the network needs at least 36 px")
    return sides[3], sides[2], sides[1], sides[0]


class Generator(nn.Module):
    """Features to patch: four full convolutions with nearest upsampling in between.

    Every layer is convolution without bias, batch norm, LeakyReLU(0.01); a 1 × 1 layer of the same
    kind ends in the channels. The output is not limited to [0, 1]: clamp it when it is written.

    Parameters
    ----------
    features
        Number of CellProfiler features, p.
    channels
        Channels of a patch.
    patch_size
        Side of a patch in pixels.
    """

    def __init__(self, features: int, channels: int = 3, patch_size: int = 68) -> None:
        super().__init__()
        self.sides = layer_sides(patch_size)
        first = self.sides[0]
        # A full convolution of a 1 x 1 map is a linear map onto the kernel's own grid.
        self.linear = nn.Linear(features, WIDTH * first * first, bias=False)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(WIDTH, WIDTH, KERNEL, padding=_GROWTH, bias=False) for _ in range(3)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(WIDTH) for _ in range(4))
        self.to_channels = nn.Conv2d(WIDTH, channels, 1, bias=False)
        self.channel_norm = nn.BatchNorm2d(channels)

    def forward(self, features: Tensor) -> Tensor:
        """Map (N, p) scaled features to (N, channels, patch_size, patch_size) intensities."""
        first = self.sides[0]
        x = self.linear(features).view(-1, WIDTH, first, first)
        x = x.contiguous(memory_format=torch.channels_last)
        x = leaky_relu(self.norms[0](x), SLOPE, inplace=True)
        for layer, convolution in enumerate(self.convolutions):
            weight, grid = cast(Tensor, convolution.weight), self.sides[layer + 1] - _GROWTH
            folded = grid == 2 * x.shape[-1]
            if folded:
                x = convolve_folded(x, fold_kernel(weight))
            else:
                x = convolve_doubled(x, weight, grid)
            x = leaky_relu(self.norms[layer + 1](x), SLOPE, inplace=True)
            if layer == _LAST:
                x = leaky_relu(self.channel_norm(self.to_channels(x)), SLOPE, inplace=True)
            if folded:
                x = spread(x)
        return x


class Discriminator(nn.Module):
    """Patch to logit, with the four hidden layers that L_H compares.

    Valid 5 × 5 convolutions with spectral norm (one power iteration), batch norm, 2 × 2 max
    pooling, LeakyReLU(0.01); the fourth convolution covers what is left of the patch (5 × 5 at
    68 px); a 1 × 1 convolution with batch norm gives the logit.
    """

    def __init__(self, channels: int = 3, patch_size: int = 68) -> None:
        super().__init__()
        last = layer_sides(patch_size)[0]
        shapes = [(channels, WIDTH, KERNEL)] + [(WIDTH, WIDTH, KERNEL)] * 2
        shapes += [(WIDTH, 2 * WIDTH, last), (2 * WIDTH, 1, 1)]
        self.convolutions = nn.ModuleList(
            spectral_norm(nn.Conv2d(i, o, kernel, bias=False)) for i, o, kernel in shapes
        )
        self.norms = nn.ModuleList(LeadingBatchNorm(o) for _, o, _ in shapes)

    def forward(self, patches: Tensor, leading: int | None = None) -> tuple[list[Tensor], Tensor]:
        """Return the four hidden layers, each (N, c, h, w), and the logits, (N,).

        Parameters
        ----------
        patches
            Normalised patches, (N, channels, patch_size, patch_size).
        leading
            Rows whose statistics batch norm uses, see `LeadingBatchNorm`.
        """
        hidden = []
        x = patches
        for layer in range(4):
            x = self.norms[layer](self.convolutions[layer](x), leading)
            if layer < 3:
                x = max_pool2d(x, 2, ceil_mode=True)
            x = leaky_relu(x, SLOPE)
            hidden.append(x)
        logits = self.norms[4](self.convolutions[4](x), leading)
        return hidden, logits.flatten()
