"""LSGAN as in CytoGAN (Goldsborough et al., bioRxiv 227645): noise to patch. Pure torch.

The widths are CytoGAN's. It draws 96 px (12 · 2³); here the coarse map has the side that three
doublings bring to the patch's or just above, and the rest is cropped evenly. CytoGAN's account
leaves the stride open: the discriminator's convolutions have stride 2.
"""

from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from cp2image.models.upsampling import convolve_folded, fold_kernel, spread

NOISE = 100
"""Length of the noise vector."""
_WIDTHS = (256, 128, 64, 32)
_SEEN = (32, 64, 128, 256)
_HIDDEN = 100
_SLOPE, _KERNEL = 0.2, 5


class LsganGenerator(nn.Module):
    """Noise to patch: dense, three times (double, 5 × 5, batch norm, LeakyReLU(0.2)), 5 × 5, tanh.

    Parameters
    ----------
    channels
        Channels of a patch.
    patch_size
        Side of a patch in pixels.
    """

    def __init__(self, channels: int = 3, patch_size: int = 68) -> None:
        super().__init__()
        self.patch_size, self.side = patch_size, -(-patch_size // 8)
        self.dense = nn.Linear(NOISE, _WIDTHS[0] * self.side**2, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in _WIDTHS)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(i, o, _KERNEL, padding=2, bias=False) for i, o in pairwise(_WIDTHS)
        )
        self.to_pixels = nn.Conv2d(_WIDTHS[-1], channels, _KERNEL, padding=2)

    def forward(self, noise: Tensor) -> Tensor:
        """Map standard normal noise (N, 100) to patches (N, channels, side, side) in (0, 1)."""
        x = self.dense(noise).view(-1, _WIDTHS[0], self.side, self.side)
        x = x.contiguous(memory_format=torch.channels_last)
        x = leaky_relu(self.norms[0](x), _SLOPE)
        for norm, convolution in zip(self.norms[1:], self.convolutions, strict=True):
            x = _convolve_doubled(x, cast(Tensor, convolution.weight))
            x = leaky_relu(norm(x), _SLOPE)
        start = (x.shape[-1] - self.patch_size) // 2
        window = slice(start, start + self.patch_size)
        return 0.5 * (1 + torch.tanh(self.to_pixels(x)[..., window, window]))


def _convolve_doubled(x: Tensor, weight: Tensor) -> Tensor:
    """Double ``x`` (nearest) and convolve it with zero padding of 2, on the small grid."""
    return spread(convolve_folded(x, fold_kernel(weight)))[..., 2:-2, 2:-2]


class LsganDiscriminator(nn.Module):
    """Patch to score: four 5 × 5 convolutions of stride 2, dense 100, dense 1; LeakyReLU(0.2).

    Parameters
    ----------
    channels
        Channels of a patch.
    patch_size
        Side of a patch in pixels.
    """

    def __init__(self, channels: int = 3, patch_size: int = 68) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(i, o, _KERNEL, stride=2, padding=2) for i, o in pairwise((channels, *_SEEN))
        )
        side = patch_size
        for _ in _SEEN:
            side = -(-side // 2)
        self.hidden = nn.Linear(_SEEN[-1] * side**2, _HIDDEN)
        self.score = nn.Linear(_HIDDEN, 1)

    def forward(self, patches: Tensor) -> Tensor:
        """Map patches (N, channels, side, side) in [0, 1] to scores, (N,): about 1 for real."""
        x = 2 * patches - 1
        for convolution in self.convolutions:
            x = leaky_relu(convolution(x), _SLOPE)
        x = leaky_relu(self.hidden(x.flatten(1)), _SLOPE)
        scores: Tensor = self.score(x)
        return scores.flatten()
