"""What noise is like: filters, their spectra, how uneven it is, what is learned of them."""

import pytest
import torch

from cp2image.models.grain import (
    PLACES,
    Grain,
    brightness,
    energy,
    filtered,
    misfit,
    power,
    spectral_misfit,
)


def test_at_first_noise_stays_as_it_is():
    torch.manual_seed(0)
    weights = Grain(5, 3, 24)(torch.randn(2, 5), torch.randn(2, 4, 6, 6))
    noise = torch.randn(2, 3, 20, 21)
    for either in weights.unbind(1):
        torch.testing.assert_close(filtered(noise, either), noise)
        torch.testing.assert_close(power(either, 9), torch.ones(2, 3, 9, 5))


def test_a_cells_filter_hears_of_its_features_and_of_its_latents_however_they_lie():
    torch.manual_seed(0)
    tested = Grain(5, 3, 24)
    torch.nn.init.normal_(tested.last.weight, std=0.1)
    features, latents = torch.randn(1, 5), torch.randn(1, 4, 6, 6)
    weights = tested(features, latents)
    assert weights.shape == (1, 2, 3, len(PLACES))
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
        spectral_misfit(tested(features, latents)[:, 0], noise).backward()
        optimiser.step()
    found = tested(torch.tensor([[-1.0, 0], [1, 0], [0, 1]]), latents[:3])[:, 0, 0]
    expected = torch.zeros(3, len(PLACES))
    expected[:, :2] = torch.tensor([[0.7, 0.2], [0.9, 0.2], [0.8, 0.2]])
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)


def test_a_filter_has_every_place_within_three_pixels_once_or_mirrored():
    mirrored = [(-down, -across) for down, across in PLACES[1:]]
    everywhere = {(down, across) for down in range(-3, 4) for across in range(-3, 4)}
    assert sorted([*PLACES, *mirrored]) == sorted(everywhere)


def half_bright(side, cells=1):
    """Cells whose left half is bright."""
    bright = torch.zeros(cells, 1, side, side)
    bright[..., : side // 2] = 1
    return bright


def test_bright_places_are_those_above_a_channels_own_middle():
    torch.manual_seed(0)
    mean = torch.randn(2, 3, 9, 8)
    bright = brightness(mean)
    assert ((bright > 0) & (bright < 1)).all()
    middle = mean.mean(dim=(2, 3), keepdim=True)
    assert ((bright > 0.5) == (mean > middle)).all()
    torch.testing.assert_close(brightness(3 * mean + 1), bright, rtol=0.01, atol=1e-3)
    even = torch.full((1, 1, 4, 4), -0.7)
    torch.testing.assert_close(brightness(even), torch.full_like(even, 0.5))


def test_noise_in_bright_places_is_by_the_first_filter_and_in_dark_ones_by_the_second():
    torch.manual_seed(0)
    tested, weights = with_variances(0.0, 0.0), torch.randn(2, 2, 1, len(PLACES))
    noise = torch.randn(2, tested.noise_size)
    white = noise[:, : 24**2].view(2, 1, 24, 24)
    made = tested.drawn(weights, half_bright(24, 2), noise)
    by_first, by_second = (filtered(white, weights[:, i]) for i in (0, 1))
    torch.testing.assert_close(made[..., :12], by_first[..., :12])
    torch.testing.assert_close(made[..., 12:], by_second[..., 12:])
    blended = tested.drawn(weights, torch.full_like(white, 0.25), noise)
    torch.testing.assert_close(blended, 0.25 * by_first + 0.75 * by_second)


def test_energy_is_the_mean_square_of_what_is_drawn():
    torch.manual_seed(0)
    tested, weights = with_variances(0.0, 0.0), torch.randn(1, 2, 1, len(PLACES))
    bright = torch.rand(1, 1, 24, 24)
    noise = torch.randn(20_000, tested.noise_size)
    many = weights.expand(len(noise), -1, -1, -1)
    squares = torch.cat([tested.drawn(w, bright, n).square() for w, n in batches(many, noise)])
    torch.testing.assert_close(
        squares.mean(dim=0, keepdim=True), energy(weights, bright), rtol=0.1, atol=0
    )


def batches(*tensors):
    return zip(*(t.split(1000) for t in tensors), strict=True)


def test_each_filter_is_found_again_from_the_places_that_it_is_for():
    torch.manual_seed(0)
    true = torch.zeros(16, 2, 1, len(PLACES))
    true[:, 0, 0, :2] = torch.tensor([0.8, 0.4])
    true[:, 1, 0, 0] = 1.0
    found = torch.zeros(1, 2, 1, len(PLACES))
    found[..., 0] = 1.0
    found.requires_grad_()
    optimiser = torch.optim.Adam([found], lr=0.01)
    source, bright = with_variances(0.0, 0.0, side=32), half_bright(32, 16)
    for _ in range(150):
        noise = source.drawn(true, bright, torch.randn(16, source.noise_size))
        optimiser.zero_grad()
        misfit(found.expand(16, -1, -1, -1), bright, noise).backward()
        optimiser.step()
    torch.testing.assert_close(found.detach(), true[:1], rtol=0, atol=0.06)


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
    weights = torch.zeros(2, 2, 1, len(PLACES))
    weights[..., 0] = 1.0
    made = with_variances(-0.1, 0.0).drawn(weights, half_bright(24, 2), noise)
    torch.testing.assert_close(made, noise[:, : 24**2].view(2, 1, 24, 24))


@pytest.mark.parametrize(("whole", "local"), [(0.03, 0.0), (0.0, 0.04)])
def test_how_uneven_noise_is_is_found_again(whole, local):
    torch.manual_seed(0)
    true, tested = with_variances(whole, local, side=32), Grain(2, 1, 32)
    optimiser = torch.optim.Adam([tested.variances], lr=5e-4, betas=(0.9, 0.99))
    weights, bright = torch.zeros(8, 2, 1, len(PLACES)), half_bright(32, 8)
    weights[:, 0, 0, :2] = torch.tensor([0.9, 0.3])
    weights[:, 1, 0, 0] = 0.5
    found = []
    for _ in range(400):
        seen, made = (
            g.drawn(weights, bright, torch.randn(8, g.noise_size)) for g in (true, tested)
        )
        optimiser.zero_grad()
        tested.unevenness_misfit(weights, bright, seen, made).backward()
        optimiser.step()
        found.append(tested.variances.detach().clamp_min(0).flatten().clone())
    last = torch.stack(found[200:]).mean(dim=0)
    torch.testing.assert_close(last, torch.tensor([whole, local]), rtol=0, atol=0.008)
