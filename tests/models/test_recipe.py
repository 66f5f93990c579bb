import copy

import pytest
import torch

from cp2image.models.losses import discriminator_loss, gamma_at, pixel_loss
from cp2image.models.recipe import OPTIMISERS, Batch, PaperRecipe, part_of

FEATURES, CHANNELS, SIZE = 8, 2, 36


def recipe(seed=0, **settings):
    torch.manual_seed(seed)
    return PaperRecipe(FEATURES, CHANNELS, SIZE, gamma_ramp=1, **settings)


def batch(seed, cells=5):
    random = torch.Generator().manual_seed(seed)
    original, real = torch.rand(2, cells, CHANNELS, SIZE, SIZE, generator=random)
    return Batch(original, torch.randn(cells, FEATURES, generator=random), real)


def alone(gradients):
    """One rank: nothing to average."""


def step_in_two_passes(generator, discriminator, cells, step, setting):
    """One step the slow way: each network has its own forward pass and its own backward pass."""
    before = copy.deepcopy(discriminator.state_dict())
    count = len(cells.original)

    frozen = copy.deepcopy(discriminator).requires_grad_(False)
    drawn = generator(cells.features)
    patches = torch.cat([cells.real, drawn, cells.original])
    hidden, _ = frozen(patches, leading=2 * count)
    total = pixel_loss(cells.original, drawn)
    for gamma, layer in zip(gamma_at(step, (1, 1, 1, 1), 1), hidden, strict=True):
        difference = layer[2 * count :] - layer[count : 2 * count]
        total = total + gamma * 0.5 * CHANNELS * SIZE * SIZE * difference.square().mean()
    total.backward()

    discriminator.load_state_dict(before)
    _, logits = discriminator(patches.detach(), leading=2 * count)
    discriminator_loss(logits[:count], logits[count : 2 * count]).backward()

    torch.optim.Adam(generator.parameters(), setting.generator, (0.9, 0.999), 1e-7).step()
    torch.optim.SGD(discriminator.parameters(), setting.discriminator, momentum=0.9).step()
    with torch.no_grad():
        for network in (generator, discriminator):
            for parameter in network.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(1 - 1e-4)


def turn_signs(discriminator):
    """Give every other channel a negative scale, as training may."""
    with torch.no_grad():
        for norm in discriminator.norms:
            norm.weight[::2] *= -1


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("step", [0, 3, 100], ids=["pixels alone", "ramp", "all layers"])
@pytest.mark.parametrize("negative", [False, True])
def test_one_step_equals_two_separate_passes(name, step, negative):
    found = recipe(setting=OPTIMISERS[name]).__dict__
    tested = recipe(setting=OPTIMISERS[name])
    if negative:
        turn_signs(found["discriminator"])
        turn_signs(tested.discriminator)
    generator, discriminator = found["generator"].train(), found["discriminator"].train()
    cells = batch(1)
    step_in_two_passes(generator, discriminator, cells, step, OPTIMISERS[name])
    tested.step(cells, step, alone)
    for mine, plain in ((tested.generator, generator), (tested.discriminator, discriminator)):
        for (key, one), other in zip(
            mine.state_dict().items(), plain.state_dict().values(), strict=True
        ):
            # Adam's first step is the gradient's sign: where that is rounding noise, it may turn.
            other_sign = ~torch.isclose(one, other, rtol=1e-5, atol=1e-6)
            assert other_sign.float().mean() < 2e-4, key


def gradients_of(tested, cells, step):
    seen = []
    tested.step(cells, step, lambda gradients: seen.extend(g.clone() for g in gradients))
    return seen[: len(tested._g)], seen[len(tested._g) :]


def test_generator_gets_no_gradient_from_the_discriminators_loss():
    cells, plain = batch(2), recipe().generator.train()
    pixel_loss(cells.original, plain(cells.features)).backward()
    found, _ = gradients_of(recipe(gamma=(0.0, 0.0, 0.0, 0.0)), cells, 100)
    for gradient, parameter in zip(found, plain.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=1e-4)


def test_discriminator_gets_no_gradient_from_the_generators_losses():
    cells = batch(2)
    to_generator, to_discriminator = gradients_of(recipe(gamma=(9.0,) * 4), cells, 100)
    without_hidden, same = gradients_of(recipe(gamma=(0.0,) * 4), cells, 100)
    assert all(map(torch.equal, to_discriminator, same))
    assert not any(map(torch.equal, to_generator, without_hidden))


def test_kernels_shrink_by_one_in_ten_thousand_each_step_and_norms_do_not():
    slow = OPTIMISERS["as_run"].__class__(generator=1e-30, discriminator=1e-30)
    tested = recipe(setting=slow)
    before = [(p, p.detach().clone()) for p in tested._g + tested._d]
    for step in range(3):
        tested.step(batch(step), step, alone)
    for parameter, was in before:
        expected = was * (1 - 1e-4) ** 3 if parameter.ndim > 1 else was
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=1e-9)
    assert sum(parameter.ndim > 1 for parameter, _ in before) == 5 + 5


@pytest.mark.parametrize(
    ("name", "generator", "discriminator"), [("as_run", 0.01, 0.001), ("as_named", 0.001, 0.01)]
)
def test_optimisers_are_the_papers_in_both_settings(name, generator, discriminator):
    tested = recipe(setting=OPTIMISERS[name])
    adam, sgd = tested.generator_optimiser, tested.discriminator_optimiser
    assert isinstance(adam, torch.optim.Adam)
    assert isinstance(sgd, torch.optim.SGD)
    assert adam.defaults["lr"] == generator
    assert (adam.defaults["betas"], adam.defaults["eps"]) == ((0.9, 0.999), 1e-7)
    assert (sgd.defaults["lr"], sgd.defaults["momentum"]) == (discriminator, 0.9)
    assert adam.defaults["weight_decay"] == sgd.defaults["weight_decay"] == 0


def test_what_the_average_makes_of_the_gradients_is_what_the_optimisers_take():
    tested, still = recipe(), recipe()

    def nothing(gradients):
        for gradient in gradients:
            gradient.zero_()

    tested.step(batch(3), 0, nothing)
    for one, other in zip(tested._g + tested._d, still._g + still._d, strict=True):
        expected = other * (1 - 1e-4) if other.ndim > 1 else other
        torch.testing.assert_close(one, expected)


def test_state_taken_back_goes_on_bit_by_bit():
    first = recipe()
    for step in range(3):
        first.step(batch(step), step, alone)
    state = {name: value.clone() for name, value in first.state().items()}
    second = recipe(seed=9)
    second.load_state(state)
    for step in range(3, 6):
        one, other = (r.step(batch(step), step, alone) for r in (first, second))
        assert {k: float(v) for k, v in one.items()} == {k: float(v) for k, v in other.items()}
    ends = first.state(), second.state()
    assert ends[0].keys() == ends[1].keys() == state.keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in state)


def test_untrained_state_can_be_taken_back():
    first, second = recipe(), recipe(seed=9)
    second.load_state(first.state())
    first.step(batch(0), 0, alone)
    second.step(batch(0), 0, alone)
    pairs = zip(first._g + first._d, second._g + second._d, strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_part_of_a_state_loses_its_prefix():
    assert part_of({"a.x": 1, "a.y.z": 2, "ab.x": 3}, "a") == {"x": 1, "y.z": 2}


def test_half_precision_follows_the_full_precision_losses():
    full, half = recipe(), recipe(bf16=True)
    for step in range(2):
        one, other = (r.step(batch(step), step, alone) for r in (full, half))
        for name, value in one.items():
            assert float(other[name]) == pytest.approx(float(value), rel=0.1), name
    assert all(p.dtype == torch.float32 for p in half._g + half._d)
