"""cp2image-s: networks and training step."""

import copy

import pytest
import torch
from torch.nn.functional import softplus

from cp2image.models.recipe import Batch
from cp2image.models.stochastic import (
    StochasticDiscriminator,
    StochasticGenerator,
    map_sides,
)
from cp2image.models.stochastic_recipe import StochasticRecipe, StochasticSetting

FEATURES, CHANNELS, SIZE = 6, 2, 20


def recipe(**setting):
    torch.manual_seed(0)
    return StochasticRecipe(FEATURES, CHANNELS, SIZE, setting=StochasticSetting(**setting))


def batch(seed=0, cells=8):
    """Discs whose brightness the first feature tells."""
    random = torch.Generator().manual_seed(seed)
    features = torch.randn(cells, FEATURES, generator=random)
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    disc = ((rows - 9.5) ** 2 + (columns - 9.5) ** 2 < 36).float()
    level = (0.5 + 0.15 * features[:, :1, None, None]).clamp(0.1, 0.9)
    original = (level * disc).expand(-1, CHANNELS, -1, -1).contiguous()
    return Batch(original, features, original[:0], seed)


def alone(gradients):
    """One rank: nothing to average."""


def equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one | other)


@pytest.mark.parametrize(
    ("size", "sides"),
    [
        (16, (4, 8, 16)),
        (64, (8, 16, 32, 64)),
        (68, (9, 17, 34, 68)),
        (69, (9, 18, 35, 69)),
        (128, (8, 16, 32, 64, 128)),
    ],
)
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_any_channels_and_sides(size, sides, channels):
    assert map_sides(size) == sides
    generator = StochasticGenerator(7, channels, size)
    features = torch.randn(2, 7)
    patches = generator(features, generator.noise(torch.arange(2), 0)).detach()
    assert patches.shape == (2, channels, size, size)
    assert 0 < float(patches.min()) < float(patches.max()) < 1
    scores, seen = StochasticDiscriminator(7, channels, size)(patches, features)
    assert scores.shape == (2,)
    assert seen.shape == (2, 7)


def test_too_small_patches_are_refused():
    with pytest.raises(ValueError, match="patch_size=15"):
        StochasticGenerator(5, 3, 15)


def test_every_number_of_the_noise_has_its_place():
    generator = StochasticGenerator(FEATURES, CHANNELS, SIZE)
    with torch.no_grad():
        for block in generator.blocks:
            block.strength.fill_(0.5)
        generator.strength.fill_(0.5)
    noise = torch.randn(1, generator.noise_size, requires_grad=True)
    generator(torch.randn(1, FEATURES), noise).square().sum().backward()
    assert (noise.grad != 0).all()


def test_scores_depend_on_both_patch_and_features():
    torch.manual_seed(0)
    discriminator = StochasticDiscriminator(FEATURES, CHANNELS, SIZE)
    cells = batch()
    scores, seen = discriminator(cells.original, cells.features)
    others, same = discriminator(cells.original, cells.features.flip(0))
    assert (scores != others).all()
    assert torch.equal(seen, same)


def test_first_losses_are_those_of_the_papers():
    setting = {"penalty": 3.0, "penalty_every": 4, "pixel": 0.01, "regression": 0.25}
    tested, cells = recipe(**setting), batch()
    generator, discriminator = copy.deepcopy((tested.generator, tested.discriminator))
    noise = torch.randn(8, generator.noise_size, generator=torch.Generator().manual_seed(0))
    drawn = generator(cells.features, noise)
    real, seen = discriminator(cells.original, cells.features)
    fake, _ = discriminator(drawn, cells.features)
    steepness = 0.0
    for patches in (cells.original, drawn.detach()):
        patches = patches.clone().requires_grad_()
        scores, _ = discriminator(patches, cells.features)
        for i, score in enumerate(scores):  # cell by cell
            (gradient,) = torch.autograd.grad(score, patches, retain_graph=True)
            steepness += float(gradient[i].square().sum()) / 8
    found = tested.step(cells, 0, alone)
    torch.testing.assert_close(found["L_Dis"], softplus(fake - real).mean().detach())
    torch.testing.assert_close(found["L_features"], 0.5 * (seen - cells.features).square().mean())
    assert float(found["penalty"]) == pytest.approx(4 * steepness, rel=1e-4)
    torch.testing.assert_close(
        found["L_MSE"], 0.5 * (drawn - cells.original).square().sum().detach() / 8
    )
    assert float(tested.step(cells, 1, alone)["penalty"]) == 0


def test_each_network_is_moved_by_the_other_as_it_was_before_the_step():
    setting = {"penalty": 2.0, "penalty_every": 1, "pixel": 0.01, "regression": 0.25}
    tested, cells = recipe(**setting), batch()
    generator, discriminator = copy.deepcopy((tested.generator, tested.discriminator))
    taken = []
    tested.step(cells, 0, lambda gradients: taken.append([g.clone() for g in gradients]))
    noise = torch.randn(8, generator.noise_size, generator=torch.Generator().manual_seed(0))
    drawn = generator(cells.features, noise)
    real, seen = discriminator(cells.original, cells.features)
    fake, fake_seen = discriminator(drawn, cells.features)
    total = softplus(real - fake).mean() + 0.25 * 0.5 * (fake_seen - cells.features).square().mean()
    total = total + 0.01 * 0.5 * (drawn - cells.original).square().sum() / 8
    for mine, theirs in zip(
        taken[1], torch.autograd.grad(total, list(generator.parameters())), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)
    fake, _ = discriminator(drawn.detach(), cells.features)
    total = softplus(fake - real).mean() + 0.25 * 0.5 * (seen - cells.features).square().mean()
    for patches in (cells.original, drawn.detach()):
        patches = patches.clone().requires_grad_()
        scores, _ = discriminator(patches, cells.features)
        (gradient,) = torch.autograd.grad(scores.sum(), patches, create_graph=True)
        total = total + gradient.square().sum() / 8
    own = torch.autograd.grad(total, list(discriminator.parameters()), allow_unused=True)
    for mine, theirs in zip(taken[0], own, strict=True):
        torch.testing.assert_close(
            mine, torch.zeros_like(mine) if theirs is None else theirs, rtol=1e-3, atol=1e-6
        )


def test_penalty_is_in_the_discriminators_gradient():
    with_penalty, without = recipe(penalty=100.0), recipe(penalty=0.0)
    taken = []
    for one in (with_penalty, without):
        one.step(batch(), 0, lambda gradients: taken.append([g.clone() for g in gradients]))
    assert not torch.equal(taken[0][0], taken[2][0])
    assert float(without.step(batch(), 8, alone)["penalty"]) == 0


def test_generator_is_pulled_towards_cells_features_and_reality_by_its_parts():
    parts = ({"pixel": 0.0}, {"regression": 0.0}, {"draws": 2}, {})
    taken = []
    for setting in parts:
        gradients = []
        recipe(**setting).step(batch(), 0, lambda g, kept=gradients: kept.append(g[0].clone()))
        taken.append(gradients[1])
    assert all(not torch.equal(taken[i], taken[3]) for i in range(3))


def test_averaged_generator_follows_slowly():
    tested = recipe(ema=0.5)
    start = tested.averaged.to_pixels.weight.clone()
    tested.step(batch(), 1000, alone)
    expected = 0.5 * start + 0.5 * tested.generator.to_pixels.weight.detach()
    torch.testing.assert_close(tested.averaged.to_pixels.weight, expected)
    assert tested.published()[0].keys() == tested.generator.state_dict().keys()


def test_state_goes_on_exactly_where_it_was():
    tested, other = recipe(), recipe()
    for step in range(3):
        tested.step(batch(step), step, alone)
    other.load_state({name: value.clone() for name, value in tested.state().items()})
    for one in (tested, other):
        one.step(batch(3), 3, alone)
    assert equal(tested.state(), other.state())


def test_another_seed_is_another_step():
    one, other = recipe(), recipe()
    cells = batch()
    one.step(cells, 0, alone)
    other.step(Batch(cells.original, cells.features, cells.real, 99), 0, alone)
    assert not equal(one.state(), other.state())


def test_draws_learn_what_the_features_say_and_stay_different():
    tested = recipe(learning_rate=1e-3, ema=0.9)
    for step in range(150):
        tested.step(batch(step, 16), step, alone)
    features = torch.zeros(2, FEATURES)
    features[0, 0], features[1, 0] = -2, 2
    with torch.no_grad():
        many = features.repeat_interleave(20, dim=0)
        drawn = tested.draw(many, torch.arange(40))
    brightness = drawn[:, :, 7:13, 7:13].mean(dim=(1, 2, 3)).view(2, 20)
    assert brightness[1].mean() - brightness[0].mean() > 0.2
    assert (drawn[0] - drawn[1]).abs().max() > 0.005
    alone_drawn = tested.draw(many[3:4], torch.tensor([3])).detach()[0]
    torch.testing.assert_close(drawn[3], alone_drawn, rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_noise_and_draws_are_the_same_on_a_gpu():
    tested = recipe()
    features, keys = torch.randn(4, FEATURES), torch.arange(4)
    expected = tested.draw(features, keys)
    tested.averaged.to("cuda")
    found = tested.draw(features.to("cuda"), keys.to("cuda")).cpu()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-2)


def test_learning_rates_fall_in_a_line_over_the_last_share_of_the_training():
    tested = recipe(learning_rate=0.1, cooldown=0.25)

    def rates():
        optimisers = (tested.generator_optimiser, tested.discriminator_optimiser)
        return [group["lr"] for one in optimisers for group in one.param_groups]

    for share, rate in [(0, 0.1), (0.75, 0.1), (0.875, 0.05), (1, 0), (1.2, 0), (0.5, 0.1)]:
        tested.reached(share)
        assert rates() == pytest.approx([rate, rate])


def test_without_a_cooldown_the_rate_stays():
    tested = recipe(cooldown=0)
    tested.reached(1)
    assert tested.generator_optimiser.param_groups[0]["lr"] == StochasticSetting().learning_rate


def test_neighbouring_pixels_start_without_a_pattern_of_fours():
    """Pixels of the four phases of a 2 × 2 grid are alike in the mean over many cells."""
    torch.manual_seed(0)
    generator = StochasticGenerator(FEATURES, 1, 68)
    noise = torch.randn(64, generator.noise_size)
    with torch.no_grad():
        drawn = generator(torch.randn(64, FEATURES), noise)[:, 0, 8:60, 8:60].mean(dim=0)
    phases = torch.stack([drawn[i::2, j::2].mean() for i in (0, 1) for j in (0, 1)])
    assert float(phases.std()) < 0.02 * float(drawn.std())
