"""LSGAN: widths, the folded convolution, the step's gradients, draws by key and seed."""

import copy

import pytest
import torch
from torch.nn.functional import conv2d, interpolate

from cp2image.models.lsgan import LsganDiscriminator, LsganGenerator, _convolve_doubled
from cp2image.models.lsgan_recipe import LsganRecipe
from cp2image.models.presets import build_drawer
from cp2image.models.recipe import Batch

CHANNELS, SIZE = 2, 36


def alone(gradients):
    """One rank: nothing to average."""


def batch(seed, cells=6):
    original = torch.rand(
        cells, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)
    )
    return Batch(original, torch.zeros(cells, 0), original[:0], seed)


def test_at_96_px_the_networks_are_cytogans():
    generator = LsganGenerator(3, 96)
    assert generator.dense.weight.shape == (12 * 12 * 256, 100)
    assert [tuple(c.weight.shape[:2]) for c in generator.convolutions] == [
        (128, 256),
        (64, 128),
        (32, 64),
    ]
    discriminator = LsganDiscriminator(3, 96)
    assert [len(c.weight) for c in discriminator.convolutions] == [32, 64, 128, 256]
    assert discriminator.hidden.out_features == 100


@pytest.mark.parametrize("size", [36, 64, 68, 96])
def test_patches_of_any_size_lie_in_the_unit_interval(size):
    drawn = LsganGenerator(3, size)(5 * torch.randn(2, 100)).detach()
    assert drawn.shape == (2, 3, size, size)
    assert 0 <= float(drawn.min()) < float(drawn.max()) <= 1
    assert LsganDiscriminator(3, size)(drawn).shape == (2,)


def test_doubling_and_convolving_equals_the_plain_way():
    random = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(2, 6, 9, 9, generator=random),
        torch.randn(4, 6, 5, 5, generator=random),
    )
    plain = conv2d(interpolate(x, scale_factor=2, mode="nearest"), weight, padding=2)
    torch.testing.assert_close(_convolve_doubled(x, weight), plain, rtol=1e-4, atol=1e-4)


def test_the_generators_gradient_comes_through_the_discriminator_as_it_was():
    torch.manual_seed(0)
    tested = LsganRecipe(CHANNELS, SIZE)
    generator, discriminator = (
        copy.deepcopy(tested.generator).train(),
        copy.deepcopy(tested.discriminator),
    )
    cells, random = batch(1), torch.Generator().manual_seed(1)
    count = len(cells.original)
    drawn = generator(torch.randn((count, 100), generator=random))
    noise = 0.1 * torch.randn((2 * count, CHANNELS, SIZE, SIZE), generator=random)
    labels = 0.8 + 0.2 * torch.rand(count, generator=random)
    real = discriminator(cells.original + noise[:count])
    told = 0.5 * (real - labels).square().mean()
    told = told + 0.5 * discriminator(drawn.detach() + noise[count:]).square().mean()
    told.backward()
    expected = [p.grad.clone() for p in discriminator.parameters()]
    fooled = 0.5 * (discriminator(drawn + noise[count:]) - 1).square().mean()
    fooled.backward()
    expected += [p.grad for p in generator.parameters()]
    found = []
    losses = tested.step(cells, 0, lambda gradients: found.extend(g.clone() for g in gradients))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(losses["L_Dis"], told.detach())
    torch.testing.assert_close(losses["L_generator"], fooled.detach())


def test_training_goes_on_where_it_was():
    torch.manual_seed(0)
    recipe = LsganRecipe(CHANNELS, SIZE)
    for step in range(3):
        recipe.step(batch(step), step, alone)
    torch.manual_seed(5)
    other = LsganRecipe(CHANNELS, SIZE)
    other.load_state({name: value.clone() for name, value in recipe.state().items()})
    for one in (recipe, other):
        one.step(batch(9), 3, alone)
    assert all(torch.equal(v, other.state()[k]) for k, v in recipe.state().items())


def test_the_brightness_of_what_is_drawn_moves_to_that_of_the_cells():
    torch.manual_seed(0)
    recipe, random = (
        LsganRecipe(CHANNELS, SIZE, learning_rate=1e-3),
        torch.Generator().manual_seed(0),
    )
    keys, nothing = torch.arange(16), torch.zeros(16, 0)
    with torch.no_grad():
        before = float(recipe.draw(nothing, keys).mean())
    for step in range(12):
        dark = 0.1 * torch.rand(6, CHANNELS, SIZE, SIZE, generator=random)
        recipe.step(Batch(dark, torch.zeros(6, 0), dark[:0], step), step, alone)
    with torch.no_grad():
        after = float(recipe.draw(nothing, keys).mean())
    assert before == pytest.approx(0.5, abs=0.1)
    assert after < 0.75 * before


def test_a_key_and_a_seed_decide_a_draw_and_the_checkpoint_draws_the_same():
    torch.manual_seed(0)
    recipe = LsganRecipe(CHANNELS, SIZE)
    recipe.step(batch(0), 0, alone)
    weights = {k: v.clone() for k, v in recipe.published()[0].items()}
    drawer = build_drawer("lsgan", (9, CHANNELS, SIZE), weights)
    keys, features = torch.arange(5), torch.randn(5, 9)
    with torch.inference_mode():
        drawn = drawer(features, keys, 1)
        torch.testing.assert_close(drawn, recipe.draw(features, keys, 1))
        assert torch.equal(drawn, drawer(torch.zeros(5, 9), keys, 1))  # features are not seen
        assert not torch.equal(drawn, drawer(features, keys, 2))
        assert not torch.equal(drawn, drawer(features, keys + 1, 1))
