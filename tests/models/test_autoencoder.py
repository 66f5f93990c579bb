"""Patches to latents and back: the scale, the bound, the noise that a decoder learns."""

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from cp2image.models.autoencoder import (
    PatchDecoder,
    PatchEncoder,
    evidence,
    from_log,
    latent_channels,
    to_log,
)


def test_the_log_scale_is_undone_and_limited():
    values = torch.linspace(0, 1, 1001)
    scaled = to_log(values)
    assert (float(scaled[0]), float(scaled[-1])) == pytest.approx((-1, 1), abs=1e-6)
    np.testing.assert_allclose(
        scaled, 2 * np.log1p(values.numpy() / 0.02) / np.log(51) - 1, atol=1e-6
    )
    torch.testing.assert_close(from_log(scaled), values, rtol=1e-5, atol=1e-6)
    assert from_log(torch.tensor([-1.5, 1.5])).tolist() == [0, 1]


@pytest.mark.parametrize(("size", "side"), [(16, 4), (64, 16), (68, 17), (69, 18), (128, 32)])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_any_channels_and_sides_come_back(size, side, channels):
    mean, log_variance = PatchEncoder(channels)(torch.rand(2, channels, size, size))
    assert mean.shape == log_variance.shape == (2, latent_channels(channels), side, side)
    decoded, log_deviation = PatchDecoder(channels, size)(mean)
    assert decoded.shape == log_deviation.shape == (2, channels, size, size)


def test_the_bound_is_that_of_normal_distributions():
    torch.manual_seed(0)
    encoder, decoder = PatchEncoder(2), PatchDecoder(2, 20)
    values, noise = torch.rand(4, 2, 20, 20), torch.randn(4, 3, 5, 5)
    misfit, divergence, decoded = evidence(encoder, decoder, values, noise)
    mean, log_variance = encoder(values)
    posterior = Normal(mean, (0.5 * log_variance).exp())
    expected, log_deviation = decoder(posterior.mean + posterior.stddev * noise)
    likelihood = Normal(expected, log_deviation.exp()).log_prob(values)
    constant = 0.5 * np.log(2 * np.pi) * values[0].numel()
    torch.testing.assert_close(-misfit, likelihood.sum() / 4 + constant, rtol=1e-4, atol=1e-2)
    standard = Normal(torch.zeros_like(mean), torch.ones_like(mean))
    torch.testing.assert_close(divergence, kl_divergence(posterior, standard).sum() / 4)
    torch.testing.assert_close(decoded, expected)


def test_the_decoder_learns_how_wide_the_noise_is():
    """Level by the cell, noise by the channel: neither is known before."""
    torch.manual_seed(0)
    encoder, decoder = PatchEncoder(2), PatchDecoder(2, 20)
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=3e-3)
    widths = torch.tensor([0.15, 0.5]).view(1, 2, 1, 1)
    for _ in range(800):
        level = torch.rand(8, 1, 1, 1) - 0.5
        values = level + widths * torch.randn(8, 2, 20, 20)
        misfit, divergence, _ = evidence(encoder, decoder, values, torch.randn(8, 3, 5, 5))
        optimiser.zero_grad()
        ((misfit + divergence) / 800).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
    with torch.no_grad():
        values = torch.tensor([-0.4, 0.4]).view(2, 1, 1, 1) + widths * torch.randn(2, 2, 20, 20)
        mean, log_deviation = decoder(encoder(values)[0])
    found = log_deviation.exp().mean(dim=(0, 2, 3))
    assert found.tolist() == pytest.approx([0.15, 0.5], rel=0.3)
    assert mean.mean(dim=(1, 2, 3)).tolist() == pytest.approx([-0.4, 0.4], abs=0.2)
