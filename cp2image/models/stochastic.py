"""cp2image-s: a generator that draws one of the cells a profile allows. Pure torch.

Features and a noise vector shape a coarse map, with 3 × 3 convolutions at each side. Most of the
work is done at an eighth of the patch's side: a point's channels then spread over 2 × 2 points of
the map of latents (Shi et al., CVPR 2016), which one layer finishes; `PatchDecoder`, which
has learned from real patches, makes it a patch in the same pass, with noise as `Grain` says. So an
adversary only has to teach how latents lie, not how pixels do. Group norm is modulated by features
and noise (FiLM, Perez et al., AAAI 2018), noise maps enter before every activation with a learned
strength per channel (StyleGAN, Karras et al., CVPR 2019), here with a strength from the start:
where it begins at 0, a generator of many features makes its texture out of these. The discriminator
compares latents with features by projection (Miyato and Koyama, ICLR 2018) and predicts the
features (as the auxiliary classifier of Odena et al., ICML 2017, with numbers for classes). For
these it also sees how bright and how varied every stage's channels are, over the patch and within
compartments that it learns to outline, as CellProfiler's features are means over compartments,
where a point lies, and how cells lie around the middle, as `CircularHarmonics` says.
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
    pixel_shuffle,
    pixel_unshuffle,
)

from cp2image.models.autoencoder import PatchDecoder, from_log, latent_channels
from cp2image.models.circular_harmonics import CircularHarmonics
from cp2image.models.grain import Grain, brightness
from cp2image.models.keyed_noise import keyed_normal

NOISE = 64
"""Length of the noise vector."""
_SLOPE = 0.2
_MAPS, _STRENGTH = 4, 0.3
"""Noise maps that enter at a time; the standard deviation of their sum at first."""
_EMBEDDING, _STYLE = 512, 384
"""Widths of what the generator makes of the features."""
_COMPARED = 256
"""Numbers by which the discriminator compares latents with features."""
_FIRST, _WIDTH, _FINEST = 64, 128, 64
"""Channels of the coarse map, of the blocks after its first, and at the side of the latents."""
_READING = 512
"""Width of the hidden layer that features are read by."""
_COMPARTMENTS = 6
"""Soft masks at each stage, within which channels are summed up."""
_AROUND = 18
"""Maps, made of the first stage's, that are looked at around the middle."""
_SEEN = (96, 128)
"""Channels of the discriminator's first stage, and of all after it."""
_COARSEST, _LAST = 12, 5
_GROUPS = 8


def map_sides(patch_size: int) -> tuple[int, ...]:
    """Return the sides of the maps of latents, coarse to fine; the last is the decoder's.

    >>> map_sides(20), map_sides(68), map_sides(128)
    ((3, 5), (9, 17), (8, 16, 32))

    Raises
    ------
    ValueError
        If the patch is under 16 px.
    """
    if patch_size < 16:
        raise ValueError(f"patch_size={patch_size}: the network needs at least 16 px")
    half = -(-patch_size // 2)
    sides = [-(-half // 2)]
    while len(sides) == 1 or sides[-1] > _COARSEST:
        sides.append(-(-sides[-1] // 2))
    return tuple(reversed(sides))


class _Block(nn.Module):
    """A 3 × 3 convolution, noise, group norm modulated by the style, LeakyReLU(0.2)."""

    def __init__(self, inputs: int, outputs: int, style: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.strength = nn.Conv2d(_MAPS, outputs, 1, bias=False)
        nn.init.normal_(self.strength.weight, std=_STRENGTH / _MAPS**0.5)
        self.norm = nn.GroupNorm(_GROUPS, outputs, affine=False)
        self.film = nn.Linear(style, 2 * outputs)

    def forward(self, x: Tensor, style: Tensor, noise: Tensor) -> Tensor:
        x = self.convolution(x) + self.strength(noise)
        scale, shift = self.film(style)[:, :, None, None].chunk(2, dim=1)
        return leaky_relu(torch.addcmul(shift, self.norm(x), 1 + scale), _SLOPE)


class LatentGenerator(nn.Module):
    """Features and noise to a map of latents: the part that the adversary teaches.

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
        *coarse, finest = map_sides(patch_size)
        self.sides = (coarse[0], *(side for side in coarse for _ in range(2)), finest)
        self.embedding = nn.Sequential(
            nn.Linear(features, _EMBEDDING),
            nn.LeakyReLU(_SLOPE),
            nn.Linear(_EMBEDDING, _STYLE),
            nn.LeakyReLU(_SLOPE),
        )
        style = _STYLE + NOISE
        self.coarse = nn.Linear(style, _FIRST * coarse[0] ** 2)
        widths = [_FIRST, _FIRST, *([_WIDTH] * (len(self.sides) - 2))]
        self.blocks = nn.ModuleList(_Block(a, b, style) for a, b in pairwise(widths))
        self.blocks.append(_Block(_WIDTH // 4, _FINEST, style))
        self.last = nn.Conv2d(_FINEST, latent_channels(channels), 3, padding=1)

    @property
    def noise_size(self) -> int:
        """Numbers of noise that one map takes: the vector, and the maps of each block."""
        return NOISE + _MAPS * sum(side**2 for side in self.sides)

    def forward(self, features: Tensor, noise: Tensor) -> Tensor:
        """Draw latents.

        Parameters
        ----------
        features
            Scaled, (N, p).
        noise
            Standard normal, (N, noise_size).

        Returns
        -------
        Tensor
            (N, latents, side, side), the side the last of `map_sides`.
        """
        side, start = self.sides[0], NOISE
        style = torch.cat([self.embedding(features), noise[:, :NOISE]], dim=1)
        x = self.coarse(style).view(-1, _FIRST, side, side)
        x = x.contiguous(memory_format=torch.channels_last)
        for side, block in zip(self.sides, self.blocks, strict=True):
            if block is self.blocks[-1]:
                x = pixel_shuffle(x, 2)[..., :side, :side]
            elif side != x.shape[-1]:
                x = interpolate(x, size=(side, side), mode="bilinear", align_corners=False)
            end = start + _MAPS * side * side
            maps = noise[:, start:end].reshape(-1, _MAPS, side, side)
            x = block(x, style, maps.contiguous(memory_format=torch.channels_last))
            start = end
        drawn: Tensor = self.last(x)
        return drawn


class StochasticGenerator(nn.Module):
    """Features and noise to a patch, in one pass: latents, then the decoder; see the module.

    Parameters
    ----------
    features, channels, patch_size
        As of `LatentGenerator`.
    """

    def __init__(self, features: int, channels: int = 3, patch_size: int = 68) -> None:
        super().__init__()
        self.latents = LatentGenerator(features, channels, patch_size)
        self.decoder = PatchDecoder(channels, patch_size)
        self.grain = Grain(features, channels, patch_size)

    @property
    def noise_size(self) -> int:
        """Numbers of noise that one patch takes: those of its latents and those of its grain."""
        return self.latents.noise_size + self.grain.noise_size

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
            (N, channels, patch_size, patch_size) in [0, 1], float32.
        """
        own = self.latents.noise_size
        latents = self.latents(features, noise[:, :own])
        return self.decode(latents, features, noise[:, own:])

    def decode(self, latents: Tensor, features: Tensor, noise: Tensor) -> Tensor:
        """Make patches of latents and of the noise that `Grain.drawn` takes, see `forward`."""
        mean, log_deviation = self.decoder(latents)
        mean = mean.float()
        with torch.autocast(latents.device.type, enabled=False):
            filters = self.grain(features.float(), latents)
            grain = self.grain.drawn(filters, brightness(mean), noise)
        return from_log(mean + log_deviation.float().exp() * grain)


class StochasticDiscriminator(nn.Module):
    """Latents and features to a score, and the features as they are seen in the latents.

    Latents are seen 2 × 2 points at a time, as channels of one. Stages of two 3 × 3 convolutions
    with LeakyReLU(0.2) and average pooling between them, without batch norm: gradient penalties are
    taken cell by cell. Beside the latents they see where a point lies: across, down, and how far
    from the centre. The score is that of the whole map, plus how well features match, plus the
    means of scores at the points of every stage, which see texture only. Features are read from the
    last map and from mean and standard deviation of every stage's channels, over the patch and
    within the stage's compartments, and from harmonics around the middle of maps that are made of
    the first stage's, 2 × 2 points of each.
    """

    where: Tensor

    def __init__(self, features: int, channels: int = 3, patch_size: int = 68) -> None:
        super().__init__()
        whole = map_sides(patch_size)[-1]
        side = -(-whole // 2)
        self.register_buffer("where", _where(side), persistent=False)
        widths = [4 * latent_channels(channels) + 3, _SEEN[0]]
        while side > _LAST:
            widths.append(_SEEN[1])
            side //= 2
        self.convolutions, self.local = nn.ModuleList(), nn.ModuleList()
        self.compartments = nn.ModuleList()
        for inputs, outputs in pairwise(widths):
            self.convolutions.append(nn.Conv2d(inputs, outputs, 3, padding=1))
            self.convolutions.append(nn.Conv2d(outputs, outputs, 3, padding=1))
            self.local.append(nn.Conv2d(outputs, 1, 1))
            self.compartments.append(nn.Conv2d(outputs, _COMPARTMENTS, 1))
        self.flat = nn.Linear(widths[-1] * side**2, _COMPARED)
        self.score = nn.Linear(_COMPARED, 1)
        self.embedding = nn.Sequential(
            nn.Linear(features, _COMPARED),
            nn.LeakyReLU(_SLOPE),
            nn.Linear(_COMPARED, _COMPARED),
        )
        self.pick = nn.Conv2d(widths[1], 4 * _AROUND, 1)
        self.harmonics = CircularHarmonics(_AROUND, whole)
        self.summed_up = widths[-1] * side**2 + 2 * (1 + _COMPARTMENTS) * sum(widths[1:])
        self.summed_up += self.harmonics.length
        self.norm = nn.LayerNorm(self.summed_up)
        self.regression = nn.Sequential(
            nn.Linear(self.summed_up, _READING),
            nn.LeakyReLU(_SLOPE),
            nn.Linear(_READING, features),
        )

    def forward(
        self, latents: Tensor, features: Tensor, kept: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Judge latents.

        Parameters
        ----------
        latents
            (N, latents, side, side).
        features
            Scaled, (N, p).
        kept
            Factors for what features are read from, (N, summed_up): dropout; None: all is kept.

        Returns
        -------
        tuple of Tensor
            Scores, (N,), and the features as predicted from the latents alone, (N, p).
        """
        side = latents.shape[-1]
        points = pixel_unshuffle(pad(latents, (0, side % 2, 0, side % 2)), 2)
        x = torch.cat([points, self.where.expand(len(latents), -1, -1, -1)], dim=1)
        x = x.contiguous(memory_format=torch.channels_last)
        texture = torch.zeros(len(latents), device=latents.device)
        summary: list[Tensor] = []
        for stage, (local, outline) in enumerate(zip(self.local, self.compartments, strict=True)):
            if stage:
                x = avg_pool2d(x, 2)
            for convolution in self.convolutions[2 * stage : 2 * stage + 2]:
                x = leaky_relu(cast(Tensor, convolution(x)), _SLOPE)
            texture = texture + local(x).mean(dim=(1, 2, 3))
            masks = outline(x).sigmoid()
            summary += [x.mean(dim=(2, 3)), _deviation(x), _within(masks, x)]
            if not stage:
                around = pixel_shuffle(self.pick(x), 2)[..., :side, :side]
                summary.append(self.harmonics(around))
        flat = x.flatten(1)
        seen = leaky_relu(self.flat(flat), _SLOPE)
        match = (seen * self.embedding(features)).sum(dim=1) / _COMPARED**0.5
        summed_up = self.norm(torch.cat([flat, *summary], dim=1))
        read: Tensor = self.regression(summed_up if kept is None else summed_up * kept)
        return self.score(seen).flatten() + match + texture, read


def _deviation(maps: Tensor) -> Tensor:
    """Return the standard deviation of each channel over its points, (N, C), smooth at 0."""
    return (maps.var(dim=(2, 3)) + 1e-4).sqrt()


def _within(masks: Tensor, maps: Tensor) -> Tensor:
    """Return mean and deviation of each channel within each soft mask, (N, 2 · M · C), float32."""
    with torch.autocast(maps.device.type, enabled=False):  # a difference of squares follows
        weights, values = masks.float().flatten(2), maps.float().flatten(2).transpose(1, 2)
        weights = weights / (weights.sum(dim=2, keepdim=True) + 1e-3)
        mean = weights @ values
        variance = (weights @ values.square() - mean.square()).clamp_min(0)
        return torch.cat([mean, (variance + 1e-4).sqrt()], dim=1).flatten(1)


def _where(side: int) -> Tensor:
    """Return where points lie, −1 to 1 across and down, and how far from the centre, (1, 3, …)."""
    line = torch.linspace(-1, 1, side)
    down, across = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([across, down, torch.hypot(across, down)])[None]
