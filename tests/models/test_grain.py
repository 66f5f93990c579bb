"""How alike neighbouring pixels' noise is: filters, their spectra, what is learned of them."""

import pytest
import torch

from cp2image.models.grain import Grain, filtered, power, spectral_misfit


def test_at_first_noise_stays_as_it_is():
    torch.manual_seed(0)
    weights = Grain(5, 3)(torch.randn(2, 5), torch.randn(2, 4, 6, 6))
    noise = torch.randn(2, 3, 20, 21)
    torch.testing.assert_close(filtered(noise, weights), noise)
    torch.testing.assert_close(power(weights, 9), torch.ones(2, 3, 9, 5))


def test_a_cells_filter_hears_of_its_features_and_of_its_latents_however_they_lie():
    torch.manual_seed(0)
    tested = Grain(5, 3)
    torch.nn.init.normal_(tested.last.weight, std=0.1)
    features, latents = torch.randn(1, 5), torch.randn(1, 4, 6, 6)
    weights = tested(features, latents)
    assert weights.shape == (1, 3, 5)
    assert (tested(features + 1, latents) != weights).any()
    assert (tested(features, 2 * latents) != weights).any()
    torch.testing.assert_close(tested(features, latents.rot90(1, (2, 3))), weights)


def test_the_filter_is_the_sum_of_neighbours_that_its_weights_say():
    """Oracle: moved copies, one after another; each cell and channel has its own filter."""
    torch.manual_seed(0)
    noise, weights = torch.randn(3, 2, 8, 9), torch.randn(3, 2, 5)
    moves = [[(0, 0)], [(0, 1), (0, -1)], [(1, 0), (-1, 0)], [(1, 1), (-1, -1)], [(1, -1), (-1, 1)]]
    expected = sum(
        weights[:, :, i, None, None] * noise.roll(move, dims=(2, 3))
        for i, places in enumerate(moves)
        for move in places
    )
    torch.testing.assert_close(filtered(noise, weights), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", [8, 9])
def test_power_is_that_of_the_filters_transform(side):
    """Oracle: the Fourier transform of one filtered point."""
    torch.manual_seed(0)
    weights = torch.randn(2, 3, 5)
    point = torch.zeros(2, 3, side, side)
    point[:, :, 0, 0] = 1
    expected = torch.fft.rfft2(filtered(point, weights)).abs().square()
    torch.testing.assert_close(power(weights, side), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("side", [8, 9])
def test_misfit_counts_every_frequency_but_0_once(side):
    """Oracle: the whole transform, its mirrored half included."""
    torch.manual_seed(0)
    noise, weights = torch.randn(3, 2, side, side), torch.randn(3, 2, 5)
    point = torch.zeros(3, 2, side, side)
    point[:, :, 0, 0] = 1
    expected = torch.fft.fft2(filtered(point, weights)).abs().square() + 0.01
    seen = torch.fft.fft2(noise).abs().square() / side**2
    misfit = expected.log() + seen / expected
    misfit[:, :, 0, 0] = 0
    torch.testing.assert_close(
        spectral_misfit(weights, noise), misfit.sum() / 3 / side**2, rtol=1e-3, atol=1e-4
    )


def test_each_cells_noise_is_found_again_by_what_its_features_say():
    torch.manual_seed(0)
    tested = Grain(2, 1)
    optimiser = torch.optim.Adam(tested.parameters(), lr=0.01)
    latents = torch.zeros(16, 2, 3, 3)
    for _ in range(300):
        features = torch.randn(16, 2)
        true = torch.zeros(16, 1, 5)
        true[:, 0, 0] = 0.8 + 0.1 * features[:, 0]
        true[:, 0, 1] = 0.2
        noise = filtered(torch.randn(16, 1, 20, 20), true)
        optimiser.zero_grad()
        spectral_misfit(tested(features, latents), noise).backward()
        optimiser.step()
    found = tested(torch.tensor([[-1.0, 0], [1, 0], [0, 1]]), latents[:3])[:, 0]
    expected = [[0.7, 0.2, 0, 0, 0], [0.9, 0.2, 0, 0, 0], [0.8, 0.2, 0, 0, 0]]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=0.05)
