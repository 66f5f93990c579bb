"""The energy score of latents against its definition."""

import itertools

import pytest
import torch

from cp2image.models.energy_score import latent_energy_score


def plain(real, first, second):
    """Return the score window by window, in Python's own loops."""

    def fine(maps):
        side, found = maps.shape[-1], torch.empty_like(maps)
        for y, x in itertools.product(range(side), repeat=2):
            near = [
                maps[..., min(max(y + b, 0), side - 1), min(max(x + a, 0), side - 1)]
                for a, b in itertools.product((-1, 0, 1), repeat=2)
            ]
            found[..., y, x] = maps[..., y, x] - sum(near) / 9
        return found

    def score(maps, window):
        starts = range(maps[0].shape[-1] - window + 1)
        found = []
        for cell, y, x in itertools.product(range(len(real)), starts, starts):
            a, b, c = (one[cell, :, y : y + window, x : x + window] for one in maps)
            far = [((p - q).square().sum() + 1e-3).sqrt() for p, q in ((a, b), (a, c), (b, c))]
            found.append(0.5 * (far[0] + far[1] - far[2]) / window)
        return sum(found) / len(found)

    side, maps = real.shape[-1], (real, first, second)
    parts = [score(maps, min(k, side)) for k in (1, 5, side)]
    parts += [score([fine(one) for one in maps], min(k, side)) for k in (1, 3, 7)]
    return side**2 * sum(parts) / 6


@pytest.mark.parametrize("side", [4, 9])
def test_it_is_what_its_definition_says(side):
    maps = torch.randn(3, 2, 3, side, side, dtype=torch.float64)
    torch.testing.assert_close(latent_energy_score(*maps), plain(*maps))


def waves(cells, seed, strength=1.0, white=0.0):
    """Maps of smooth structure, with white noise beside it."""
    random = torch.Generator().manual_seed(seed)
    rough = torch.randn(cells, 4, 19, 19, generator=random)
    smooth = torch.nn.functional.avg_pool2d(rough, 3, stride=1) * 3
    return strength * smooth + white * torch.randn(cells, 4, 17, 17, generator=random)


@pytest.mark.parametrize(
    "other",
    [{"strength": 0.7}, {"strength": 1.4}, {"strength": 0.0}, {"white": 0.5}],
    ids=["too alike", "too different", "the mean", "too rough"],
)
def test_draws_that_are_spread_as_cells_are_score_best(other):
    real = waves(600, 0)
    alike = latent_energy_score(real, waves(600, 1), waves(600, 2))
    assert alike < latent_energy_score(real, waves(600, 3, **other), waves(600, 4, **other))


def test_fine_structure_alone_is_told():
    """The same power in the same points, but every point for itself."""
    real, white = waves(600, 0), {"strength": 0.0, "white": 1.0}
    alike = latent_energy_score(real, waves(600, 1), waves(600, 2))
    assert alike < latent_energy_score(real, waves(600, 3, **white), waves(600, 4, **white)) - 1


def test_equal_draws_have_a_finite_gradient():
    draws = torch.zeros(2, 4, 9, 9, requires_grad=True)
    latent_energy_score(torch.zeros(2, 4, 9, 9), draws, draws).backward()
    assert draws.grad is not None
    assert draws.grad.isfinite().all()
