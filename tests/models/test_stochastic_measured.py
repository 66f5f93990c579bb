"""Draws that are measured while cp2image-s learns: what the recipe hands over and learns from."""

import copy

import numpy as np
import pytest
import torch

from cp2image.models.recipe import Batch
from cp2image.models.stochastic_recipe import StochasticRecipe
from cp2image.models.stochastic_setting import StochasticSetting
from tests.models.test_stochastic import CHANNELS, FEATURES, SIZE, alone, batch, equal


class Reading:
    """Measures a draw: its features are the numbers of the cell and of the measurement."""

    each = 6

    def __init__(self):
        self.calls = []

    def __call__(self, latents, patches, asked, rows):
        self.calls.append((latents.clone(), patches.clone(), rows))
        marks = torch.from_numpy(rows % 7).float() - 3 + 0.1 * len(self.calls)
        found = torch.from_numpy(rows != 1)  # that one could not be measured
        return latents[found], marks[found, None].expand(-1, FEATURES), asked[found]


def recipe(measurement, share=0.5, **setting):
    torch.manual_seed(0)
    made_of = StochasticSetting(dropout=0.0, penalty=0.0, **setting)
    made = StochasticRecipe(FEATURES, CHANNELS, SIZE, setting=made_of, measurement=measurement)
    made.reached(share)
    return made


def numbered(seed=0, cells=8):
    found = batch(seed, cells)
    rows = np.arange(cells) + 10 * seed
    return Batch(found.original, found.features, found.real, seed, None, rows)


def test_some_of_the_draws_are_handed_over_every_eight_steps_as_patches_with_their_cells():
    reading = Reading()
    tested = recipe(reading)
    for step in range(17):
        before = copy.deepcopy(tested.generator)
        tested.step(numbered(step), step, alone)
        if step % 8 == 0:
            latents, patches, rows = reading.calls[-1]
            assert rows.tolist() == list(range(10 * step, 10 * step + 6))
            random = torch.Generator().manual_seed(step)
            noise = torch.randn(16, before.latents.noise_size, generator=random)[:8]
            drawn = before.latents(numbered(step).features, noise)[:6]
            torch.testing.assert_close(latents, drawn, rtol=1e-4, atol=1e-5)
            pixels = torch.randn(6, before.grain.noise_size, generator=random)
            expected = before.decode(drawn, numbered(step).features[:6], pixels)
            torch.testing.assert_close(patches, expected, rtol=1e-3, atol=1e-4)
    assert len(reading.calls) == 3


def test_the_discriminator_reads_measured_draws_beside_cells_in_equal_parts():
    """Oracle: the mean over 8 cells and 4 measured draws of half the squared distance."""
    reading = Reading()
    tested = recipe(reading, regression=2.0)
    tested.step(numbered(), 0, alone)
    before = copy.deepcopy(tested.discriminator)
    taken = []
    seen = []

    def follow(latents, features, kept=None):
        seen.append((latents, features))
        return forward(latents, features, kept)

    forward = tested.discriminator.forward
    tested.discriminator.forward = follow
    cells = numbered(1)
    found = tested.step(cells, 1, lambda g: taken.append([v.clone() for v in g]))
    known, asked = seen[0]
    assert len(known) == 12
    measured = reading.calls[0][0]
    for latents, features in zip(known[8:], asked[8:], strict=True):
        row = int((measured - latents).abs().flatten(1).sum(dim=1).argmin())
        assert torch.equal(measured[row], latents)
        assert row != 1
        assert features.tolist() == pytest.approx([row - 3 + 0.1] * FEATURES)
    scores, read = before(known, asked)
    fake, _ = before(seen[1][0], cells.features)
    total = torch.nn.functional.softplus(fake - scores[:8]).mean()
    errors = 0.5 * (read - asked).square().mean(dim=1)
    expected = torch.autograd.grad(
        total + 2.0 * errors.sum() / 12, list(before.parameters()), allow_unused=True
    )
    for mine, theirs in zip(taken[0], expected, strict=True):
        torch.testing.assert_close(
            mine, torch.zeros_like(mine) if theirs is None else theirs, rtol=1e-3, atol=1e-6
        )
    torch.testing.assert_close(found["L_features"], errors[:8].mean().detach())
    torch.testing.assert_close(found["L_measured"], errors[8:].mean().detach())


def test_without_enough_measured_draws_only_cells_count():
    reading = Reading()
    reading.each = 3
    tested = recipe(reading)
    for step in (0, 8):
        losses = tested.step(numbered(), step, alone)
        assert ("L_measured" in losses) == (step == 8)  # 2 draws, then 4: half of the batch


def test_state_goes_on_exactly_with_measured_draws():
    tested, other = recipe(Reading()), recipe(Reading())
    for step in range(3):
        tested.step(numbered(step), step, alone)
    other.load_state({name: value.clone() for name, value in tested.state().items()})
    for one in (tested, other):
        one.step(numbered(3), 3, alone)
    assert equal(tested.state(), other.state())


def test_an_autoencoder_that_learns_on_begins_anew_with_measured_draws():
    tested = recipe(Reading())
    tested.step(numbered(), 0, alone)
    assert int(tested.state()["measured.seen"]) == 5
    tested.reached(0.1)
    tested.step(numbered(), 1, alone)
    assert int(tested.state()["measured.seen"]) == 0
    tested.reached(0.5)
    assert "L_measured" not in tested.step(numbered(), 2, alone)


def test_the_generator_is_asked_for_what_draws_lack_beside_the_features():
    """Oracle: the same step with features that are larger by the correction."""
    tested = recipe(Reading(), regression=2.0)
    tested.step(numbered(), 0, alone)
    correction = tested._measured.correction
    assert (correction != 0).all()
    read = []
    forward = tested.discriminator.forward

    def follow(latents, features, kept=None):
        read.append(forward(latents, features, kept))
        return read[-1]

    tested.discriminator.forward = follow
    cells = numbered(1)
    losses = tested.step(cells, 1, alone)
    (score, _), (fake, seen) = read[:2]
    regression = 0.5 * (seen - cells.features - correction).square().mean()
    expected = torch.nn.functional.softplus(score[:8] - fake).mean() + 2.0 * regression
    torch.testing.assert_close(losses["L_generator"], expected.detach())


def test_what_was_asked_for_is_handed_over_with_the_draws():
    reading = Reading()
    tested = recipe(reading)
    tested.step(numbered(), 0, alone)
    rows = torch.tensor([0, 2, 3, 4, 5])  # the second draw could not be measured
    marks = (rows % 7 - 3 + 0.1)[:, None]
    expected = 5e-4 * (numbered().features[rows] - marks).sum(dim=0)
    torch.testing.assert_close(tested._measured.correction, expected)
