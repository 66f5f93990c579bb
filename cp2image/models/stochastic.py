"""cp2image-s: a generator that draws one of the cells a profile allows. Pure torch.

Features and a noise vector shape a coarse map that is doubled by bilinear interpolation, with two
3 × 3 convolutions at each side up to half the patch's. At the patch's own side, where most of the
time would go, one thin convolution is left; pixels that come out of one point in fours (Shi et al.,
CVPR 2016) left a chequered pattern. Group norm is modulated by features and noise (FiLM, Perez et
al., AAAI 2018), a noise map enters before every activation with a learned strength per channel
(StyleGAN, Karras et al., CVPR 2019). The discriminator compares a patch with
its features by projection (Miyato and Koyama, ICLR 2018) and predicts them (as the auxiliary
classifier of Odena et al., ICML 2017, with numbers for classes).
"""

from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import (
    avg_pool2d,
    interpolate,
    leaky_relu,
    pad,
    pixel_unshuffle,
)

from cp2image.models.keyed_noise import keyed_normal

NOISE = 64
"""Length of the noise vector."""
_SLOPE = 0.2
_EMBEDDING, _STYLE = 256, 192
_WIDTHS = (64, 64, 32)
"""Channels of the coarse map, then after each doubling; the last is kept where there are more."""
_FINE = 16
"""Channels at the patch's own side."""
_SEEN = (32, 64, 128)
"""Channels of the discriminator's stages; the last is kept where there are more."""
_LOCAL = 3
"""Number of the convolution whose points are scored one by one."""
_COARSEST = 12
_GROUPS = 8


def map_sides(patch_size: int) -> tuple[int, ...]:
    """Return the sides of the generator's maps, coarse to fine.

    >>> map_sides(68)
    (9, 17, 34, 68)

    Raises
    ------
    ValueError
        If the patch is under 16 px.
    """
    if patch_size < 16:
        raise ValueError(f"patch_size={patch_size}: the network needs at least 16 px")
    sides = [patch_size]
    while sides[-1] > _COARSEST or len(sides) < 3:
        sides.append(-(-sides[-1] // 2))
    return tuple(reversed(sides))


def _width(table: tuple[int, ...], stage: int) -> int:
    return table[min(stage, len(table) - 1)]


class _Block(nn.Module):
    """A 3 × 3 convolution, noise, group norm modulated by the style, LeakyReLU(0.2)."""

    def __init__(self, inputs: int, outputs: int, style: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.strength = nn.Parameter(torch.zeros(outputs))
        self.norm = nn.GroupNorm(_GROUPS, outputs, affine=False)
        self.film = nn.Linear(style, 2 * outputs)

    def forward(self, x: Tensor, style: Tensor, noise: Tensor) -> Tensor:
        x = self.convolution(x)
        x = x + self.strength.view(1, -1, 1, 1) * noise
        scale, shift = self.film(style)[:, :, None, None].chunk(2, dim=1)
        return leaky_relu(torch.addcmul(shift, self.norm(x), 1 + scale), _SLOPE)


class StochasticGenerator(nn.Module):
    """Features and noise to a patch, in one pass.

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
        self.sides = map_sides(patch_size)
        self.embedding = nn.Sequential(
            nn.Linear(features, _EMBEDDING),
            nn.LeakyReLU(_SLOPE),
            nn.Linear(_EMBEDDING, _STYLE),
            nn.LeakyReLU(_SLOPE),
        )
        style, first = _STYLE + NOISE, self.sides[0]
        self.coarse = nn.Linear(style, _WIDTHS[0] * first * first)
        blocks = []
        for stage in range(1, len(self.sides) - 1):
            inputs, outputs = _width(_WIDTHS, stage - 1), _width(_WIDTHS, stage)
            blocks += [_Block(inputs, outputs, style), _Block(outputs, outputs, style)]
        self.blocks = nn.ModuleList(blocks)
        last = _width(_WIDTHS, len(self.sides) - 2)
        self.fine = nn.Conv2d(last, _FINE, 3, padding=1)
        self.strength = nn.Parameter(torch.zeros(_FINE))
        self.to_pixels = nn.Conv2d(_FINE, channels, 3, padding=1)

    @property
    def noise_size(self) -> int:
        """Numbers of noise that one patch takes: the vector, two maps a side, one at the last."""
        return NOISE + 2 * sum(side**2 for side in self.sides[1:-1]) + self.sides[-1] ** 2

    def noise(self, keys: Tensor, seed: int) -> Tensor:
        """Return the noise of cells by their keys, (N, noise_size), see `keyed_normal`."""
        return keyed_normal(keys, self.noise_size, seed)

    def forward(self, features: Tensor, noise: Tensor) -> Tensor:
        """Draw patches.

        Parameters
        ----------
        features
            Scaled, (N, p).
        noise
            Standard normal, (N, noise_size).

        Returns
        -------
        Tensor
            (N, channels, patch_size, patch_size) in (0, 1).
        """
        first, start = self.sides[0], NOISE
        style = torch.cat([self.embedding(features), noise[:, :NOISE]], dim=1)
        x = self.coarse(style).view(-1, _WIDTHS[0], first, first)
        x = x.contiguous(memory_format=torch.channels_last)
        for stage, side in enumerate(self.sides[1:-1]):
            x = _resized(x, side)
            for block in self.blocks[2 * stage : 2 * stage + 2]:
                end = start + side * side
                x = block(x, style, noise[:, start:end].reshape(-1, 1, side, side))
                start = end
        side = self.sides[-1]
        x = _resized(self.fine(x), side)
        x = x + self.strength.view(1, -1, 1, 1) * noise[:, start:].reshape(-1, 1, side, side)
        return torch.sigmoid(self.to_pixels(leaky_relu(x, _SLOPE)))


def _resized(x: Tensor, side: int) -> Tensor:
    return interpolate(x, size=(side, side), mode="bilinear", align_corners=False)


class StochasticDiscriminator(nn.Module):
    """A patch and its features to a score, and the features as they are seen in the patch.

    From 2 × 2 pixels as channels of one point, stages of two 3 × 3 convolutions with
    LeakyReLU(0.2) and average pooling, without batch norm: gradient penalties are taken cell by
    cell. The score is that of the whole patch, plus how well features match, plus the mean of
    scores at the points of the second stage, which see texture only.
    """

    def __init__(self, features: int, channels: int = 3, patch_size: int = 68) -> None:
        super().__init__()
        stages = len(map_sides(patch_size)) - 1
        widths = [4 * channels, *(_width(_SEEN, stage) for stage in range(stages))]
        self.convolutions = nn.ModuleList()
        for inputs, outputs in pairwise(widths):
            self.convolutions.append(nn.Conv2d(inputs, outputs, 3, padding=1))
            self.convolutions.append(nn.Conv2d(outputs, outputs, 3, padding=1))
        side = -(-patch_size // 2) // 2**stages
        self.local = nn.Conv2d(widths[2], 1, 1)
        self.flat = nn.Linear(widths[-1] * side**2, _EMBEDDING)
        self.score = nn.Linear(_EMBEDDING, 1)
        self.embedding = nn.Sequential(
            nn.Linear(features, _EMBEDDING),
            nn.LeakyReLU(_SLOPE),
            nn.Linear(_EMBEDDING, _EMBEDDING),
        )
        self.regression = nn.Linear(_EMBEDDING, features)

    def forward(self, patches: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores, (N,), and the features predicted from the patches alone, (N, p)."""
        odd = patches.shape[-1] % 2
        x = pixel_unshuffle(pad(2 * patches - 1, (0, odd, 0, odd)), 2)
        texture = torch.zeros(len(x), device=x.device)
        for layer, convolution in enumerate(self.convolutions):
            x = leaky_relu(cast(Tensor, convolution(x)), _SLOPE)
            if layer == _LOCAL:
                texture = self.local(x).mean(dim=(1, 2, 3))
            if layer % 2:
                x = avg_pool2d(x, 2)
        seen = leaky_relu(self.flat(x.flatten(1)), _SLOPE)
        match = (seen * self.embedding(features)).sum(dim=1) / _EMBEDDING**0.5
        return self.score(seen).flatten() + match + texture, self.regression(seen)
