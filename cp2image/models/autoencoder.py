"""Patches to a small map of latents and back, with a camera's noise of its own. Pure torch.

A variational autoencoder (Kingma and Welling, ICLR 2014) whose decoder says for each pixel how
much of it is noise (the learned variance of Rybkin et al., ICML 2021, here pixel by pixel). All is
done on a logarithmic scale of intensity, where a dark background counts as much as a bright cell.
Convolutions see 2 × 2 pixels as channels of one point; maps of latents have a quarter of the
patch's side.
"""

import math
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

_SLOPE = 0.2
_FINE, _COARSE = 32, 64
"""Channels at half and at a quarter of the patch's side."""
_DARK = 0.02
"""Intensity where the scale turns from linear to logarithmic."""
_SPAN = math.log1p(1 / _DARK) / 2


def latent_channels(channels: int) -> int:
    """Return how many numbers a point of the map has: one to spare, which stays empty if unused."""
    return channels + 1


def to_log(patches: Tensor) -> Tensor:
    """Map intensities in [0, 1] to [-1, 1]: ``log(1 + x / 0.02)``, scaled."""
    return torch.log1p(patches / _DARK) / _SPAN - 1


def from_log(values: Tensor) -> Tensor:
    """Undo `to_log`, limited to [0, 1]."""
    return (_DARK * torch.expm1((values + 1) * _SPAN)).clamp(0, 1)


class PatchEncoder(nn.Module):
    """A patch on the log scale to its latents' mean and log variance."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(4 * channels, _FINE, 3, padding=1)
        self.second = nn.Conv2d(_FINE, _FINE, 3, padding=1)
        self.third = nn.Conv2d(_FINE, _COARSE, 3, padding=1)
        self.fourth = nn.Conv2d(_COARSE, _COARSE, 3, padding=1)
        self.last = nn.Conv2d(_COARSE, 2 * latent_channels(channels), 1)

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Map (N, channels, side, side) to two (N, latents, ⌈side / 4⌉, ⌈side / 4⌉)."""
        odd = values.shape[-1] % 2
        x = pixel_unshuffle(pad(values, (0, odd, 0, odd), value=-1.0), 2)
        x = leaky_relu(self.second(leaky_relu(self.first(x), _SLOPE)), _SLOPE)
        x = leaky_relu(self.third(avg_pool2d(x, 2, ceil_mode=True)), _SLOPE)
        x = x + leaky_relu(self.fourth(x), _SLOPE)
        mean, log_variance = self.last(x).chunk(2, dim=1)
        return mean, log_variance.clamp(-8, 2)


class PatchDecoder(nn.Module):
    """Latents to a patch on the log scale: each pixel's mean and log standard deviation.

    Parameters
    ----------
    channels
        Channels of a patch.
    patch_size
        Its side in pixels.
    """

    def __init__(self, channels: int, patch_size: int) -> None:
        super().__init__()
        self._side, self._half = patch_size, -(-patch_size // 2)
        self.first = nn.Conv2d(latent_channels(channels), _COARSE, 3, padding=1)
        self.second = nn.Conv2d(_COARSE, _COARSE, 3, padding=1)
        self.third = nn.Conv2d(_COARSE, _FINE, 3, padding=1)
        self.fourth = nn.Conv2d(_FINE, _FINE, 3, padding=1)
        self.smooth = nn.Conv2d(_FINE, channels, 3, padding=1)
        self.sharp = nn.Conv2d(_FINE, 4 * channels, 3, padding=1)
        self.noise = nn.Conv2d(_FINE, channels, 3, padding=1)
        with torch.no_grad():
            self.noise.weight.mul_(0.1)
            cast(Tensor, self.noise.bias).fill_(-2.0)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Map (N, latents, …) to two (N, channels, side, side)."""
        side, half = self._side, self._half
        x = leaky_relu(self.first(latents), _SLOPE)
        x = x + leaky_relu(self.second(x), _SLOPE)
        x = _resized(x, half)
        x = leaky_relu(self.third(x), _SLOPE)
        x = x + leaky_relu(self.fourth(x), _SLOPE)
        sharp = pixel_shuffle(self.sharp(x), 2)[..., :side, :side]
        log_deviation = _resized(self.noise(x).clamp(-5, 0), side)
        return _resized(self.smooth(x), side) + sharp, log_deviation


def evidence(
    encoder: PatchEncoder, decoder: PatchDecoder, values: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return both parts of the negative evidence bound, and the mean that was decoded.

    Parameters
    ----------
    encoder, decoder
        The networks.
    values
        Patches on the log scale, (N, C, H, W).
    noise
        Standard normal, of the latents' shape.

    Returns
    -------
    tuple of Tensor
        −log p(patch | latents) up to a constant and KL from the standard normal, both summed over
        a cell and averaged over cells; the decoded mean on the log scale.
    """
    mean, log_variance = encoder(values)
    mean, log_variance = mean.float(), log_variance.float()
    misfit, decoded = decoding_misfit(decoder, sampled(mean, log_variance, noise), values)
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
    return misfit, divergence.sum(dim=(1, 2, 3)).mean(), decoded


def sampled(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    """Return latents as the encoder is unsure of them, all of one shape."""
    return mean + (0.5 * log_variance).exp() * noise


def decoding_misfit(
    decoder: PatchDecoder, latents: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """Return −log p(patch | latents) and the decoded mean, see `evidence`."""
    decoded, log_deviation = decoder(latents)
    decoded, log_deviation = decoded.float(), log_deviation.float()
    misfit = 0.5 * ((values - decoded) * (-log_deviation).exp()).square() + log_deviation
    return misfit.sum(dim=(1, 2, 3)).mean(), decoded


def _resized(x: Tensor, side: int) -> Tensor:
    return interpolate(x, size=(side, side), mode="bilinear", align_corners=False)
