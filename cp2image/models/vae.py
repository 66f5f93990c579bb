"""VAE and VAEplus (Lafarge et al., MIDL 2019): an encoder before CP2Image's generator. Pure torch.

The decoder is the paper's generator with a latent vector in the place of the features; the encoder
mirrors its discriminator.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, max_pool2d

from cp2image.models.cp2image import KERNEL, SLOPE, WIDTH, Generator, layer_sides

LATENT = 256
"""Length of the latent vector."""


class Encoder(nn.Module):
    """Patch to mean and log-variance of its latent vector.

    Valid 5 × 5 convolutions without bias, batch norm, 2 × 2 max pooling, LeakyReLU(0.01), three
    times with 32 channels; a last convolution covers what is left of the patch (5 × 5 at 68 px),
    with batch norm.

    Parameters
    ----------
    channels
        Channels of a patch.
    patch_size
        Side of a patch in pixels.
    """

    def __init__(self, channels: int = 3, patch_size: int = 68) -> None:
        super().__init__()
        last = layer_sides(patch_size)[0]
        shapes = [(channels, WIDTH, KERNEL), (WIDTH, WIDTH, KERNEL), (WIDTH, WIDTH, KERNEL)]
        shapes.append((WIDTH, 2 * LATENT, last))
        self.convolutions = nn.ModuleList(nn.Conv2d(i, o, k, bias=False) for i, o, k in shapes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o, _ in shapes)

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Map (N, channels, patch_size, patch_size) to means and log-variances, (N, 256) each."""
        x = patches
        for layer in range(3):
            x = self.norms[layer](self.convolutions[layer](x))
            x = leaky_relu(max_pool2d(x, 2, ceil_mode=True), SLOPE)
        x = self.norms[3](self.convolutions[3](x)).flatten(1)
        mean, log_variance = x.chunk(2, dim=1)
        return mean, log_variance


class Vae(nn.Module):
    """Encoder and decoder.

    Parameters
    ----------
    channels
        Channels of a patch.
    patch_size
        Side of a patch in pixels.
    """

    def __init__(self, channels: int = 3, patch_size: int = 68) -> None:
        super().__init__()
        self.encoder = Encoder(channels, patch_size)
        self.decoder = Generator(LATENT, channels, patch_size)

    def forward(self, patches: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Encode patches, draw their latent vectors and decode them.

        Parameters
        ----------
        patches
            In [0, 1], (N, channels, patch_size, patch_size).
        noise
            Standard normal, (N, 256).

        Returns
        -------
        drawn, divergence
            Patches of the same shape, not limited to [0, 1]; the mean of `divergence`.
        """
        mean, log_variance = self.encoder(patches)
        latent = mean + noise * torch.exp(0.5 * log_variance)
        return self.decoder(latent), divergence(mean, log_variance).mean()


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return KL = ½ Σ (eˢ + μ² − 1 − s) of N(μ, eˢ) from the standard normal, cell by cell, (N,).

    >>> divergence(torch.tensor([[0.0, 2.0]]), torch.zeros(1, 2))
    tensor([2.])
    """
    terms = log_variance.exp() + mean.square() - 1 - log_variance
    return 0.5 * terms.float().sum(dim=1)
