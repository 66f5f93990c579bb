"""Noise that keys and seeds decide."""

import pytest
import torch

from cp2image.models.keyed_noise import keyed_normal


def test_numbers_are_standard_normal_and_unrelated():
    noise = keyed_normal(torch.arange(4000), 500, seed=3)
    assert noise.dtype == torch.float32
    assert abs(float(noise.mean())) < 0.003
    assert float(noise.std()) == pytest.approx(1, abs=0.003)
    assert float((noise**4).mean()) == pytest.approx(3, abs=0.03)
    limit = 6 / 4000**0.5
    between = torch.corrcoef(noise.T) - torch.eye(500)
    assert float(between.abs().max()) < limit
    neighbours = torch.corrcoef(noise[:50]) - torch.eye(50)
    assert float(neighbours.abs().max()) < 6 / 500**0.5


def test_a_cell_has_its_noise_in_any_batch():
    keys = torch.tensor([5, -7, 2**62, -(2**63)])
    together = keyed_normal(keys, 11, seed=1)
    for row, key in enumerate(keys):
        assert torch.equal(keyed_normal(key[None], 11, seed=1)[0], together[row])
    assert torch.equal(keyed_normal(keys.flip(0), 11, seed=1), together.flip(0))


def test_other_seeds_and_keys_give_other_noise():
    keys = torch.arange(1000)
    one, other = (keyed_normal(keys, 200, seed=seed).flatten() for seed in (0, 1))
    assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.01
    assert len(torch.unique(keyed_normal(keys, 2, seed=0), dim=0)) == 1000
    shifted = keyed_normal(keys + 1, 200, seed=0).flatten()
    assert abs(float(torch.corrcoef(torch.stack([one, shifted]))[0, 1])) < 0.01
