"""How alike neighbouring pixels' noise is, cell by cell. Pure torch.

Optics, resampling and correction make a camera's noise alike from pixel to pixel, and a cell out of
focus has less of it. `Grain` tells from features and latents what white noise is to be filtered
with, 3 × 3 pixels a channel; it learns from the spectra of real cells' noise by Whittle's
likelihood (Arkiv för Matematik 1953).
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, leaky_relu, pad

from cp2image.models.autoencoder import latent_channels

_SLOPE = 0.2
_WIDTH = 64
_WEIGHTS = 5
"""Of a filter that is the same under a half turn: centre, across, down, falling, rising."""
_PLACES = torch.tensor([[3, 2, 4], [1, 0, 1], [4, 2, 3]])
"""Which of the weights stands where in 3 × 3 pixels."""
_LEAST_POWER = 0.01
"""Of any frequency, so that a filter that leaves one out does not meet an endless misfit."""


class Grain(nn.Module):
    """Features and latents to a filter for each channel; at first it leaves noise as it is.

    Parameters
    ----------
    features
        Number of CellProfiler features, p.
    channels
        Channels of a patch.
    """

    def __init__(self, features: int, channels: int) -> None:
        super().__init__()
        self._channels = channels
        self.features = nn.Linear(features, _WIDTH)
        self.latents = nn.Linear(2 * latent_channels(channels), _WIDTH)
        self.last = nn.Linear(_WIDTH, channels * _WEIGHTS)
        with torch.no_grad():
            self.last.weight.zero_()
            self.last.bias.copy_(torch.tensor([1.0, 0, 0, 0, 0]).repeat(channels))

    def forward(self, features: Tensor, latents: Tensor) -> Tensor:
        """Return filters.

        Parameters
        ----------
        features
            Scaled, (N, p).
        latents
            (N, latents, side, side); how they lie does not matter.

        Returns
        -------
        Tensor
            Weights, (N, channels, 5), for `filtered`.
        """
        maps = latents.float().flatten(2)
        summary = torch.cat([maps.mean(dim=2), (maps.var(dim=2) + 1e-4).sqrt()], dim=1)
        hidden = leaky_relu(self.features(features) + self.latents(summary), _SLOPE)
        weights: Tensor = self.last(hidden)
        return weights.view(-1, self._channels, _WEIGHTS)


def filtered(noise: Tensor, weights: Tensor) -> Tensor:
    """Filter white noise; edges meet the other side.

    Parameters
    ----------
    noise
        (N, channels, side, side).
    weights
        Each cell's filters, (N, channels, 5), as of `Grain`.
    """
    around = pad(noise, (1, 1, 1, 1), mode="circular").flatten(0, 1)
    kernels = weights.flatten(0, 1)[:, _PLACES.to(weights.device)].unsqueeze(1)
    made = conv2d(around.unsqueeze(0), kernels, groups=len(kernels))
    return made.view_as(noise)


def power(weights: Tensor, side: int) -> Tensor:
    """Return the power of filtered white noise by frequency, (N, channels, side, side // 2 + 1).

    White noise that is left as it is has 1 everywhere.
    """
    down = 2 * torch.pi * torch.fft.fftfreq(side, device=weights.device)[:, None]
    across = 2 * torch.pi * torch.fft.rfftfreq(side, device=weights.device)[None]
    flat = torch.zeros_like(down + across)
    waves = torch.stack([across + flat, down + flat, across + down, across - down]).cos()
    gain = weights[..., :1, None] + 2 * torch.einsum("nck,kyx->ncyx", weights[..., 1:], waves)
    return gain.square()


def spectral_misfit(weights: Tensor, noise: Tensor) -> Tensor:
    """Return how badly filters explain noise: −log likelihood of its spectrum, up to a constant.

    Parameters
    ----------
    weights
        As of `Grain`, (N, channels, 5).
    noise
        What the decoder takes for noise, divided by its deviation, (N, channels, side, side).

    Returns
    -------
    Tensor
        Σ log power + periodogram / power over all frequencies but 0 and over channels, per pixel;
        the mean over cells.
    """
    side = noise.shape[-1]
    seen = torch.fft.rfft2(noise).abs().square() / side**2
    expected = power(weights, side) + _LEAST_POWER
    counts = torch.full_like(expected[0, 0], 2.0)  # each frequency's mirror image is not stored
    counts[:, 0] = 1.0
    if side % 2 == 0:
        counts[:, -1] = 1.0
    counts[0, 0] = 0.0
    misfit = (expected.log() + seen / expected) * counts
    total: Tensor = misfit.sum(dim=(1, 2, 3)).mean() / side**2
    return total
