"""Amplitudes of waves around the middle of a map."""

import pytest
import torch

from cp2image.models.circular_harmonics import CircularHarmonics

SIDE = 17


@pytest.fixture
def harmonics():
    torch.manual_seed(0)
    return CircularHarmonics(2, SIDE)


def around():
    line = torch.linspace(-1, 1, SIDE)
    down, across = torch.meshgrid(line, line, indexing="ij")
    return torch.hypot(down, across), torch.atan2(down, across)


def parts(harmonics, maps):
    """Return projections, (N, M, profiles), and amplitudes, (N, M, 8, profiles)."""
    found = harmonics(maps)
    assert found.shape == (len(maps), harmonics.length)
    n, count, profiles = len(maps), maps.shape[1], harmonics.profiles.shape[-1]
    one = count * profiles
    plain, amplitudes = found.split([one, 8 * one], dim=1)
    return plain.view(n, count, profiles), amplitudes.view(n, count, 8, profiles)


def test_turning_a_map_changes_nothing(harmonics):
    maps = torch.randn(3, 2, SIDE, SIDE)
    turned = harmonics(maps.rot90(1, dims=(2, 3)))
    torch.testing.assert_close(turned, harmonics(maps), atol=1e-4, rtol=0)
    assert not torch.allclose(harmonics(maps.roll(3, dims=2)), harmonics(maps), atol=0.1)


@pytest.mark.parametrize("waves", [1, 3, 8])
def test_so_many_waves_around_the_middle_are_found_where_they_are(harmonics, waves):
    distance, angle = around()
    ring = (-0.5 * ((distance - 0.6) / 0.2).square()).exp()
    maps = torch.zeros(1, 2, SIDE, SIDE)
    maps[0, 1] = (waves * angle + 0.7).cos() * ring
    plain, amplitudes = parts(harmonics, maps)
    strength = amplitudes[0, 1].square().sum(dim=1)
    assert int(strength.argmax()) == waves - 1
    assert strength[waves - 1] > 10 * strength.sum().sub(strength[waves - 1])
    assert plain.abs().max() < 0.2 * amplitudes[0, 1, waves - 1].max()
    assert amplitudes[0, 0].max() < 0.04  # the other map is empty


def test_without_waves_the_sign_is_kept(harmonics):
    distance, _ = around()
    maps = (-8 * distance.square()).exp().expand(1, 2, -1, -1)
    plain, waves = parts(harmonics, maps)
    negative, same = parts(harmonics, -maps)
    assert plain.abs().max() > 0.1
    assert torch.allclose(negative, -plain)
    assert torch.allclose(same, waves)


def test_an_empty_map_has_a_finite_gradient(harmonics):
    maps = torch.zeros(1, 2, SIDE, SIDE, requires_grad=True)
    harmonics(maps).sum().backward()
    assert torch.isfinite(maps.grad).all()
