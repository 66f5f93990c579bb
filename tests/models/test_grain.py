"""What noise is like: filters, their spectra, how uneven it is, what is learned of them."""

import pytest
import torch

from cp2image.models.grain import PLACES, Grain, filter_energy, filtered, power, spectral_misfit


def test_at_first_noise_stays_as_it_is():
    torch.manual_seed(0)
    weights = Grain(5, 3, 24)(torch.randn(2, 5), torch.randn(2, 4, 6, 6))
    noise = torch.randn(2, 3, 20, 21)
    torch.testing.assert_close(filtered(noise, weights), noise)
    torch.testing.assert_close(power(weights, 9), torch.ones(2, 3, 9, 5))


def test_a_cells_filter_hears_of_its_features_and_of_its_latents_however_they_lie():
    torch.manual_seed(0)
    tested = Grain(5, 3, 24)
    torch.nn.init.normal_(tested.last.weight, std=0.1)
    features, latents = torch.randn(1, 5), torch.randn(1, 4, 6, 6)
    weights = tested(features, latents)
    assert weights.shape == (1, 3, len(PLACES))
    assert (tested(features + 1, latents) != weights).any()
    assert (tested(features, 2 * latents) != weights).any()
    torch.testing.assert_close(tested(features, latents.rot90(1, (2, 3))), weights)


def test_the_filter_is_the_sum_of_neighbours_that_its_weights_say():
    """Oracle: moved copies, one after another; each cell and channel has its own filter."""
    torch.manual_seed(0)
    noise, weights = torch.randn(3, 2, 8, 9), torch.randn(3, 2, len(PLACES))
    expected = weights[:, :, 0, None, None] * noise
    for i, (down, across) in enumerate(PLACES[1:], start=1):
        both = noise.roll((down, across), (2, 3)) + noise.roll((-down, -across), (2, 3))
        expected = expected + weights[:, :, i, None, None] * both
    torch.testing.assert_close(filtered(noise, weights), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", [8, 9])
def test_power_is_that_of_the_filters_transform(side):
    """Oracle: the Fourier transform of one filtered point."""
    torch.manual_seed(0)
    weights = torch.randn(2, 3, len(PLACES))
    point = torch.zeros(2, 3, side, side)
    point[:, :, 0, 0] = 1
    expected = torch.fft.rfft2(filtered(point, weights)).abs().square()
    torch.testing.assert_close(power(weights, side), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("side", [8, 9])
def test_misfit_counts_every_frequency_but_0_once(side):
    """Oracle: the whole transform, its mirrored half included."""
    torch.manual_seed(0)
    noise, weights = torch.randn(3, 2, side, side), torch.randn(3, 2, len(PLACES))
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
    tested = Grain(2, 1, 20)
    optimiser = torch.optim.Adam(tested.parameters(), lr=1e-3)
    latents = torch.zeros(16, 2, 3, 3)
    for _ in range(500):
        features = torch.randn(16, 2)
        true = torch.zeros(16, 1, len(PLACES))
        true[:, 0, 0] = 0.8 + 0.1 * features[:, 0]
        true[:, 0, 1] = 0.2
        noise = filtered(torch.randn(16, 1, 20, 20), true)
        optimiser.zero_grad()
        spectral_misfit(tested(features, latents), noise).backward()
        optimiser.step()
    found = tested(torch.tensor([[-1.0, 0], [1, 0], [0, 1]]), latents[:3])[:, 0]
    expected = torch.zeros(3, len(PLACES))
    expected[:, :2] = torch.tensor([[0.7, 0.2], [0.9, 0.2], [0.8, 0.2]])
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)


def test_a_filter_has_every_place_within_three_pixels_once_or_mirrored():
    mirrored = [(-down, -across) for down, across in PLACES[1:]]
    everywhere = {(down, across) for down in range(-3, 4) for across in range(-3, 4)}
    assert sorted([*PLACES, *mirrored]) == sorted(everywhere)


def test_energy_is_the_mean_of_the_power():
    torch.manual_seed(0)
    weights = torch.randn(2, 3, len(PLACES))
    white = torch.randn(2, 3, 256, 256)
    made = filtered(white, weights).square().mean(dim=(2, 3))
    torch.testing.assert_close(made, filter_energy(weights), rtol=0.1, atol=0)


def with_variances(whole, local, *, side=24):
    made = Grain(2, 1, side)
    made.variances.data = torch.tensor([[whole], [local]])
    return made


def test_uneven_noise_has_the_filters_power_everywhere():
    torch.manual_seed(0)
    tested = with_variances(0.02, 0.03)
    noise = torch.randn(20000, tested.noise_size)
    squares = tested.strength(noise[:, 24**2 :]).square().mean(dim=0).detach()
    torch.testing.assert_close(squares, torch.ones(1, 24, 24), rtol=0.03, atol=0)


def test_strength_is_a_cells_and_its_places():
    torch.manual_seed(0)
    noise = torch.randn(4000, 1 + 9)
    whole = with_variances(0.04, 0.0).strength(noise).log().detach()
    torch.testing.assert_close(whole, whole[..., :1, :1].expand_as(whole))
    assert float(whole.var()) == pytest.approx(0.04, rel=0.1)
    local = with_variances(0.0, 0.04).strength(noise).log().detach()[:, 0]
    assert float(local.var()) == pytest.approx(0.04, rel=0.1)
    across = [float(torch.corrcoef(local[:, 12, [0, x]].T)[0, 1]) for x in (1, 6, 23)]
    assert across[0] > 0.98
    assert 0.5 < across[1] < 0.9
    assert abs(across[2]) < 0.1


def test_variances_below_0_are_none():
    noise = torch.randn(2, with_variances(0.0, 0.0).noise_size)
    weights = torch.zeros(2, 1, len(PLACES))
    weights[..., 0] = 1.0
    made = with_variances(-0.1, 0.0).drawn(weights, noise)
    torch.testing.assert_close(made, noise[:, : 24**2].view(2, 1, 24, 24))


@pytest.mark.parametrize(("whole", "local"), [(0.03, 0.0), (0.0, 0.04)])
def test_how_uneven_noise_is_is_found_again(whole, local):
    torch.manual_seed(0)
    true, tested = with_variances(whole, local, side=32), Grain(2, 1, 32)
    optimiser = torch.optim.Adam([tested.variances], lr=5e-4, betas=(0.9, 0.99))
    weights = torch.zeros(8, 1, len(PLACES))
    weights[..., 0], weights[..., 1] = 0.9, 0.3
    found = []
    for _ in range(400):
        seen, made = (g.drawn(weights, torch.randn(8, g.noise_size)) for g in (true, tested))
        optimiser.zero_grad()
        tested.unevenness_misfit(weights, seen, made).backward()
        optimiser.step()
        found.append(tested.variances.detach().clamp_min(0).flatten().clone())
    last = torch.stack(found[200:]).mean(dim=0)
    torch.testing.assert_close(last, torch.tensor([whole, local]), rtol=0, atol=0.008)
