"""What a cell's noise is like: how alike from pixel to pixel, how uneven. Pure torch.

Optics, resampling and correction make a camera's noise alike from pixel to pixel, a cell out of
focus has less of it, and what latents cannot hold looks like noise as well: more where a patch is
bright. `Grain` tells from features and latents what white noise is to be filtered with, 7 × 7
pixels a channel, in bright places and in dark ones; it learns from the spectra of real cells' noise
by Whittle's likelihood (Arkiv för Matematik 1953), within a window each for either. How strong
noise is still differs from what is told, from cell to cell and from place to place: by as much as
was seen, drawn noise does so too.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d, interpolate, leaky_relu, pad

from cp2image.models.autoencoder import latent_channels

_SLOPE = 0.2
_WIDTH = 64
_REACH = 3
"""Pixels that a filter reaches to each side."""
_PITCH = 8
"""Pixels from one place to the next, between which strengths differ."""
_VARIANCE = 0.01
"""Of strengths' logarithms, at first."""
_STEEPNESS = 2.0
"""How fast places turn from dark to bright: per standard deviation of a patch."""
_LEAST_POWER = 0.01
"""Of any frequency, so that a filter that leaves one out does not meet an endless misfit."""


def _half_plane() -> list[tuple[int, int]]:
    """Return (down, across) of a filter's weights: the centre, then the nearest first."""
    reach = range(-_REACH, _REACH + 1)
    half = [(y, x) for y in reach for x in reach if (y, x) > (0, 0)]
    return [(0, 0), *sorted(half, key=lambda place: (max(map(abs, place)), place))]


PLACES = _half_plane()
"""Where the weights of a filter stand; each but the centre's once more, mirrored at it."""


class Grain(nn.Module):
    """Features and latents to two filters for each channel; at first they leave noise as it is.

    Parameters
    ----------
    features
        Number of CellProfiler features, p.
    channels
        Channels of a patch.
    patch_size
        Its side in pixels.
    """

    def __init__(self, features: int, channels: int, patch_size: int) -> None:
        super().__init__()
        self._channels, self._side = channels, patch_size
        self._places = -(-patch_size // _PITCH)
        self.features = nn.Linear(features, _WIDTH)
        self.latents = nn.Linear(2 * latent_channels(channels), _WIDTH)
        self.last = nn.Linear(_WIDTH, 2 * channels * len(PLACES))
        self.variances = nn.Parameter(torch.full((2, channels), _VARIANCE))
        with torch.no_grad():
            self.last.weight.zero_()
            self.last.bias.zero_()
            self.last.bias[:: len(PLACES)] = 1

    @property
    def noise_size(self) -> int:
        """Numbers of white noise that one patch takes: pixels', the cell's and places' strength."""
        return self._channels * (self._side**2 + 1 + self._places**2)

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
            Weights, (N, 2, channels, 25), each as `filtered` takes them: of bright places, of dark.
        """
        maps = latents.float().flatten(2)
        summary = torch.cat([maps.mean(dim=2), (maps.var(dim=2) + 1e-4).sqrt()], dim=1)
        hidden = leaky_relu(self.features(features) + self.latents(summary), _SLOPE)
        weights: Tensor = self.last(hidden)
        return weights.view(-1, 2, self._channels, len(PLACES))

    def drawn(self, weights: Tensor, bright: Tensor, noise: Tensor) -> Tensor:
        """Filter white noise and make it uneven.

        Parameters
        ----------
        weights
            Each cell's filters, (N, 2, channels, 25).
        bright
            How far a pixel counts as bright, see `brightness`.
        noise
            Standard normal, (N, noise_size).

        Returns
        -------
        Tensor
            (N, channels, patch_size, patch_size), of the power that the filters give.
        """
        pixels = self._channels * self._side**2
        white = noise[:, :pixels].reshape(-1, self._channels, self._side, self._side)
        made = torch.lerp(filtered(white, weights[:, 1]), filtered(white, weights[:, 0]), bright)
        return made * self.strength(noise[:, pixels:])

    def strength(self, noise: Tensor) -> Tensor:
        """Return factors, (N, channels, side, side), whose squares are 1 in the mean.

        Parameters
        ----------
        noise
            Standard normal, (N, channels · (1 + places²)): a number for the cell and one for each
            place, `_PITCH` px apart, between which it is interpolated at a variance of 1.
        """
        whole, local = self.variances.clamp_min(0)[:, :, None, None]
        count = self._places
        noise = noise.view(len(noise), self._channels, 1 + count**2)
        places = noise[..., 1:].reshape(-1, self._channels, count, count)
        spread = torch.eye(count, device=noise.device)[None]
        spread = interpolate(spread, size=self._side, mode="linear", align_corners=True)[0]
        spread = spread / spread.norm(dim=0)
        field = spread.T @ places @ spread
        uneven = whole.sqrt() * noise[..., :1, None] + local.sqrt() * field
        factors: Tensor = (uneven - (whole + local)).exp()
        return factors

    def unevenness_misfit(
        self, weights: Tensor, bright: Tensor, seen: Tensor, made: Tensor
    ) -> Tensor:
        """Return what has the gradient by which the variances learn, and no meaning beside.

        Energies' logarithms, less what the filters say, are squared: the whole patch's, and those
        of places less the patch's. Where seen noise has more of these than made noise, the
        variance grows, until they are the same.

        Parameters
        ----------
        weights, bright
            As `drawn` takes them.
        seen
            What the decoder takes for noise, divided by its deviation, (N, channels, side, side).
        made
            Noise that was drawn by the same filters.
        """
        told = energy(weights, bright)
        more = _unevenness(seen, told) - _unevenness(made, told)
        return -(self.variances * more.detach()).sum()


def brightness(mean: Tensor) -> Tensor:
    """Return how far each pixel counts as bright, 0 to 1, of patches on the log scale.

    Parameters
    ----------
    mean
        (N, channels, H, W); a channel's pixels are compared with its own mean and deviation.
    """
    variance, middle = torch.var_mean(mean, dim=(2, 3), keepdim=True)
    return (_STEEPNESS * (mean - middle) / (variance + 1e-3).sqrt()).sigmoid()


def energy(weights: Tensor, bright: Tensor) -> Tensor:
    """Return the mean square at each pixel of white noise that `Grain.drawn` has filtered.

    Parameters
    ----------
    weights, bright
        As `Grain.drawn` takes them.
    """
    twice = torch.full((len(PLACES),), 2.0, device=weights.device)
    twice[0] = 1.0
    own = (weights.square() * twice).sum(dim=-1)[..., None, None]
    both = (weights[:, 0] * weights[:, 1] * twice).sum(dim=-1)[..., None, None]
    dark = 1 - bright
    return bright.square() * own[:, 0] + 2 * bright * dark * both + dark.square() * own[:, 1]


def _unevenness(noise: Tensor, told: Tensor) -> Tensor:
    """Return the mean squares of log energies, (2, channels): of patches, of places in them."""
    places = avg_pool2d(noise.square() / (told + 1e-6), _PITCH) + 1e-6
    whole = places.mean(dim=(2, 3))
    local = (places / whole[:, :, None, None]).log().square().mean(dim=(0, 2, 3))
    return torch.stack([whole.log().square().mean(dim=0), local])


def filtered(noise: Tensor, weights: Tensor) -> Tensor:
    """Filter white noise; edges meet the other side.

    Parameters
    ----------
    noise
        (N, channels, side, side).
    weights
        Each cell's filters, (N, channels, 25).
    """
    around = pad(noise, (_REACH,) * 4, mode="circular").flatten(0, 1)
    side = 2 * _REACH + 1
    flat = torch.tensor([(y + _REACH) * side + x + _REACH for y, x in PLACES])
    which = torch.empty(side**2, dtype=torch.int64)
    which[flat] = which[side**2 - 1 - flat] = torch.arange(len(PLACES))
    kernels = weights.flatten(0, 1)[:, which.to(weights.device)].view(-1, 1, side, side)
    made = conv2d(around.unsqueeze(0), kernels, groups=len(kernels))
    return made.view_as(noise)


def power(weights: Tensor, side: int) -> Tensor:
    """Return the power of filtered white noise by frequency, (N, channels, side, side // 2 + 1).

    White noise that is left as it is has 1 everywhere.
    """
    down = 2 * torch.pi * torch.fft.fftfreq(side, device=weights.device)[:, None]
    across = 2 * torch.pi * torch.fft.rfftfreq(side, device=weights.device)[None]
    waves = torch.stack([(y * down + x * across).cos() for y, x in PLACES[1:]])
    gain = weights[..., :1, None] + 2 * torch.einsum("nck,kyx->ncyx", weights[..., 1:], waves)
    return gain.square()


def misfit(weights: Tensor, bright: Tensor, noise: Tensor) -> Tensor:
    """Return the mean `spectral_misfit` of noise in bright places and in dark ones.

    Parameters
    ----------
    weights, bright
        As `Grain.drawn` takes them.
    noise
        As of `spectral_misfit`.
    """
    within = (noise * _of_mean_square_1(share) for share in (bright, 1 - bright))
    light, dark = (spectral_misfit(weights[:, i], seen) for i, seen in enumerate(within))
    return 0.5 * (light + dark)


def _of_mean_square_1(window: Tensor) -> Tensor:
    return window / (window.square().mean(dim=(2, 3), keepdim=True) + 1e-6).sqrt()


def spectral_misfit(weights: Tensor, noise: Tensor) -> Tensor:
    """Return how badly filters explain noise: −log likelihood of its spectrum, up to a constant.

    Parameters
    ----------
    weights
        (N, channels, 25).
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
