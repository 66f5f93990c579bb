"""cp2image-s: networks and training step."""

import copy
import math

import pytest
import torch
from torch.nn.functional import softplus

from cp2image.models import stochastic_recipe
from cp2image.models.autoencoder import evidence, from_log, latent_channels, to_log
from cp2image.models.energy_score import latent_energy_score
from cp2image.models.recipe import Batch
from cp2image.models.stochastic import (
    StochasticDiscriminator,
    StochasticGenerator,
    map_sides,
)
from cp2image.models.stochastic_recipe import StochasticRecipe
from cp2image.models.stochastic_setting import StochasticSetting

FEATURES, CHANNELS, SIZE = 6, 2, 20


def recipe(share=0.5, **setting):
    """Return a recipe of which this share of the training is done: at a half, the adversary's."""
    torch.manual_seed(0)
    made = StochasticRecipe(FEATURES, CHANNELS, SIZE, setting=StochasticSetting(**setting))
    made.reached(share)
    return made


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


def latents_of(tested, cells):
    """The cells as the encoder sees them."""
    return tested.encoder(to_log(cells.original))[0].detach()


@pytest.mark.parametrize(
    ("size", "sides"),
    [(16, (2, 4)), (64, (8, 16)), (68, (9, 17)), (69, (9, 18)), (128, (8, 16, 32))],
)
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_any_channels_and_sides(size, sides, channels):
    assert map_sides(size) == sides
    generator = StochasticGenerator(7, channels, size)
    features = torch.randn(2, 7)
    noise = generator.noise(torch.arange(2), 0)
    patches = generator(features, noise).detach()
    assert patches.shape == (2, channels, size, size)
    assert 0 <= float(patches.min()) < float(patches.max()) <= 1
    latents = generator.latents(features, noise[:, : generator.latents.noise_size])
    assert latents.shape == (2, latent_channels(channels), sides[-1], sides[-1])
    scores, seen = StochasticDiscriminator(7, channels, size)(latents, features)
    assert scores.shape == (2,)
    assert seen.shape == (2, 7)


def test_too_small_patches_are_refused():
    with pytest.raises(ValueError, match="patch_size=15"):
        StochasticGenerator(5, 3, 15)


def test_every_number_of_the_noise_has_its_place():
    generator = StochasticGenerator(FEATURES, CHANNELS, SIZE)
    noise = torch.randn(1, generator.noise_size, requires_grad=True)
    drawn = generator(torch.randn(1, FEATURES), noise)
    assert (drawn > 0).all()  # where it is limited to 0 noise has no say
    drawn.square().sum().backward()
    assert (noise.grad != 0).all()


@pytest.mark.parametrize("size", [16, 68])
def test_a_coarse_point_holds_four_of_the_latents_points(size):
    maps: list[torch.Tensor] = []
    latents = StochasticGenerator(FEATURES, CHANNELS, size).latents
    latents.blocks[-2].register_forward_hook(lambda *call: maps.append(call[2]))
    latents.blocks[-1].register_forward_pre_hook(lambda module, given: maps.append(given[0]))
    latents(torch.randn(2, FEATURES), torch.randn(2, latents.noise_size))
    coarse, fine = maps
    side = map_sides(size)[-1]
    assert fine.shape[2:] == (side, side)
    for row in range(side):
        for column in range(side):
            channels = slice(2 * (row % 2) + column % 2, None, 4)
            expected = coarse[:, channels, row // 2, column // 2]
            assert torch.equal(fine[:, :, row, column], expected)


def test_scores_depend_on_both_latents_and_features():
    tested, cells = recipe(), batch()
    latents = latents_of(tested, cells)
    scores, seen = tested.discriminator(latents, cells.features)
    others, same = tested.discriminator(latents, cells.features.flip(0))
    assert (scores != others).all()
    assert torch.equal(seen, same)


@pytest.mark.parametrize("size", [16, 20, 68, 128])
def test_every_number_of_the_latents_has_a_say_in_scores_and_features(size):
    torch.manual_seed(0)
    side = map_sides(size)[-1]
    latents = torch.randn(1, latent_channels(CHANNELS), side, side, requires_grad=True)
    scores, seen = StochasticDiscriminator(FEATURES, CHANNELS, size)(
        latents, torch.randn(1, FEATURES)
    )
    for said in (scores.sum(), seen.square().sum()):
        (gradient,) = torch.autograd.grad(said, latents, retain_graph=True)
        assert (gradient != 0).all()


def test_features_are_read_from_maps_as_a_whole_in_each_compartment_and_around_the_middle():
    torch.manual_seed(0)
    judge = StochasticDiscriminator(FEATURES, CHANNELS, SIZE)
    maps: list[torch.Tensor] = []
    judge.convolutions[1].register_forward_hook(lambda *call: maps.append(call[2]))
    judge.norm = judge.regression = torch.nn.Identity()
    latents = torch.randn(2, latent_channels(CHANNELS), 5, 5)
    _, summary = judge(latents, torch.zeros(2, FEATURES))
    found = torch.nn.functional.leaky_relu(maps[0], 0.2)
    masks = torch.sigmoid(judge.compartments[0](found))
    around = judge.harmonics(torch.pixel_shuffle(judge.pick(found), 2)[..., :5, :5])
    for cell in range(2):
        expected = [found[cell].mean(dim=(1, 2)), (found[cell].var(dim=(1, 2)) + 1e-4).sqrt()]
        pixels = found[cell].flatten(1)
        weights = [mask.flatten() / mask.sum() for mask in masks[cell]]
        means = [(pixels * weight).sum(dim=1) for weight in weights]
        expected += means
        for mean, weight in zip(means, weights, strict=True):
            variance = ((pixels - mean[:, None]) ** 2 * weight).sum(dim=1)
            expected.append((variance + 1e-4).sqrt())
        expected.append(around[cell])
        part = summary[cell, judge.flat.in_features :]
        torch.testing.assert_close(part, torch.cat(expected), atol=2e-3, rtol=2e-3)


def test_the_discriminator_sees_where_a_point_lies():
    judge = StochasticDiscriminator(FEATURES, CHANNELS, SIZE)
    across, down, away = judge.where[0]
    assert (across[0, 0], across[0, -1]) == (-1, 1) == (down[0, 0], down[-1, 0])
    assert away[1, 1] == 0
    assert away[0, 0] == pytest.approx(2**0.5)
    assert "where" not in judge.state_dict()


def test_dropout_leaves_out_another_share_each_time_as_the_seed_says(monkeypatch):
    kept: list[torch.Tensor] = []
    forward = StochasticDiscriminator.forward

    def follow(self, latents, features, chosen=None):
        if chosen is not None:
            kept.append(chosen)
        return forward(self, latents, features, chosen)

    monkeypatch.setattr(StochasticDiscriminator, "forward", follow)
    ended = []
    for seed in (1, 1, 2):
        tested = recipe(dropout=0.25)
        tested.step(batch(seed), 1, alone)
        ended.append(tested.state())
    assert equal(ended[0], ended[1])
    assert not equal(ended[0], ended[2])
    assert len(kept) == 6  # cells and draws
    assert kept[0].unique().tolist() == pytest.approx([0, 4 / 3])
    assert float((kept[0] == 0).float().mean()) == pytest.approx(0.25, abs=0.02)
    assert not torch.equal(kept[0], kept[1])
    torch.testing.assert_close(kept[0], kept[2])
    kept.clear()
    recipe(dropout=0.0).step(batch(), 1, alone)
    assert not kept


def test_an_even_map_has_a_finite_gradient():
    latents = torch.zeros(1, latent_channels(CHANNELS), 5, 5, requires_grad=True)
    _, seen = StochasticDiscriminator(FEATURES, CHANNELS, SIZE)(latents, torch.ones(1, FEATURES))
    seen.square().sum().backward()
    assert latents.grad is not None
    assert latents.grad.isfinite().all()


def test_first_losses_are_those_of_the_papers():
    setting = {
        "penalty": 3.0,
        "penalty_every": 4,
        "energy": 0.01,
        "regression": 0.25,
        "dropout": 0.0,
    }
    tested, cells = recipe(**setting), batch()
    original = latents_of(tested, cells)
    generator, discriminator = copy.deepcopy((tested.generator.latents, tested.discriminator))
    noise = torch.randn(16, generator.noise_size, generator=torch.Generator().manual_seed(0))
    drawn, again = generator(cells.features.repeat(2, 1), noise).chunk(2)
    real, seen = discriminator(original, cells.features)
    fake, _ = discriminator(drawn, cells.features)
    steepness = 0.0
    for latents in (original, drawn.detach()):
        latents = latents.clone().requires_grad_()
        scores, _ = discriminator(latents, cells.features)
        for i, score in enumerate(scores):  # cell by cell
            (gradient,) = torch.autograd.grad(score, latents, retain_graph=True)
            steepness += float(gradient[i].square().sum()) / 8
    found = tested.step(cells, 0, alone)
    torch.testing.assert_close(found["L_Dis"], softplus(fake - real).mean().detach())
    torch.testing.assert_close(found["L_features"], 0.5 * (seen - cells.features).square().mean())
    assert float(found["penalty"]) == pytest.approx(4 * steepness, rel=1e-4)
    energy = 2 * latent_energy_score(original, drawn, again).detach()
    torch.testing.assert_close(found["L_energy"], energy)  # every other step, as much as in two
    found = tested.step(cells, 1, alone)
    assert float(found["penalty"]) == float(found["L_energy"]) == 0


@pytest.mark.parametrize(
    ("share", "energy", "step", "draws"),
    [(0.5, 0.01, 0, 16), (0.5, 0.01, 1, 8), (0.5, 0.0, 0, 8), (1.0, 0.01, 0, 8)],
)
def test_a_cell_is_drawn_twice_only_for_an_energy_score(monkeypatch, share, energy, step, draws):
    tested, drawn = recipe(share, energy=energy), []
    draw = tested._draw
    monkeypatch.setattr(tested, "_draw", lambda f, random: drawn.append(len(f)) or draw(f, random))
    tested.step(batch(), step, alone)
    assert drawn == [draws]


@pytest.mark.parametrize(
    ("share", "energy", "regression"),
    [(0.0, 4.0, 2.0), (0.85, 4.0, 2.0), (0.8875, 3.0, 3.0), (0.9625, 1.0, 5.0)],
)
def test_near_the_end_the_energy_score_weighs_less_and_reading_features_more(
    share, energy, regression
):
    """At such a share of the adversary's time."""
    late = gradients_of(recipe(0.3 + 0.7 * share, energy=4.0, regression=2.0))
    same = gradients_of(recipe(energy=energy, regression=regression))
    for mine, theirs in zip(late, same, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    for one in ({"energy": 4.0, "regression": regression}, {"energy": energy, "regression": 2.0}):
        other = gradients_of(recipe(**one))[1]
        assert torch.equal(other, same[1]) == (share < 0.86)


def gradients_of(tested):
    """What the first step moves discriminator and generator by, each as one vector."""
    found = []
    tested.step(batch(), 0, lambda g: found.append(torch.cat([v.flatten() for v in g])))
    return found[:2]


def test_each_network_is_moved_by_the_other_as_it_was_before_the_step():
    setting = {
        "penalty": 2.0,
        "penalty_every": 1,
        "energy": 0.01,
        "regression": 0.25,
        "dropout": 0.0,
    }
    tested, cells = recipe(**setting), batch()
    original = latents_of(tested, cells)
    generator, discriminator = copy.deepcopy((tested.generator.latents, tested.discriminator))
    taken = []
    tested.step(cells, 0, lambda gradients: taken.append([g.clone() for g in gradients]))
    noise = torch.randn(16, generator.noise_size, generator=torch.Generator().manual_seed(0))
    drawn, again = generator(cells.features.repeat(2, 1), noise).chunk(2)
    real, seen = discriminator(original, cells.features)
    fake, fake_seen = discriminator(drawn, cells.features)
    total = softplus(real - fake).mean() + 0.25 * 0.5 * (fake_seen - cells.features).square().mean()
    total = total + 0.01 * 2 * latent_energy_score(original, drawn, again)
    for mine, theirs in zip(
        taken[1], torch.autograd.grad(total, list(generator.parameters())), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)
    fake, _ = discriminator(drawn.detach(), cells.features)
    total = softplus(fake - real).mean() + 0.25 * 0.5 * (seen - cells.features).square().mean()
    for latents in (original, drawn.detach()):
        latents = latents.clone().requires_grad_()
        scores, _ = discriminator(latents, cells.features)
        (gradient,) = torch.autograd.grad(scores.sum(), latents, create_graph=True)
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
    parts = ({"energy": 0.0}, {"regression": 0.0}, {})
    taken = []
    for setting in parts:
        gradients = []
        recipe(**setting).step(batch(), 0, lambda g, kept=gradients: kept.append(g[0].clone()))
        taken.append(gradients[1])
    assert all(not torch.equal(taken[i], taken[2]) for i in range(2))


def test_kl_counts_as_much_as_it_is_said_to():
    taken = []
    for divergence in (1.0, 4.0, 7.0):
        gradients = []
        one = recipe(share=0, divergence=divergence)
        one.step(batch(), 0, lambda g, kept=gradients: kept.append([v.clone() for v in g]))
        taken.append(torch.cat([v.flatten() for v in gradients[0]]))
    torch.testing.assert_close(taken[2] - taken[1], taken[1] - taken[0], rtol=1e-3, atol=1e-6)
    assert (taken[1] - taken[0]).abs().max() > 1e-4


def test_bf16_is_what_the_networks_run_in():
    for share in (0.0, 0.5):
        torch.manual_seed(0)
        low = StochasticRecipe(FEATURES, CHANNELS, SIZE, bf16=True)
        low.reached(share)
        full = recipe(share)
        found, expected = (one.step(batch(), 0, alone) for one in (low, full))
        for name, value in expected.items():
            assert float(found[name]) != float(value)
            assert float(found[name]) == pytest.approx(float(value), rel=0.05)


def test_averaged_generator_follows_slowly():
    tested = recipe(ema=0.5)
    for step in range(20):  # in the beginning it follows faster
        start = tested.averaged.latents.last.weight.clone()
        tested.step(batch(), step, alone)
    expected = 0.5 * start + 0.5 * tested.generator.latents.last.weight.detach()
    torch.testing.assert_close(tested.averaged.latents.last.weight, expected)
    assert tested.averaged.decoder is tested.generator.decoder
    assert tested.published()[0].keys() == tested.generator.state_dict().keys()


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5])
def test_state_goes_on_exactly_where_it_was(share):
    tested, other = recipe(share), recipe(share)
    for step in range(3):
        tested.step(batch(step), step, alone)
    other.load_state({name: value.clone() for name, value in tested.state().items()})
    for one in (tested, other):
        one.reached(0.6)
        one.step(batch(3), 3, alone)
    assert equal(tested.state(), other.state())


def test_the_autoencoder_learns_first_the_generator_next_then_all_but_the_encoder():
    tested = recipe(share=0)
    moved, named = [], []
    for share, step in ((0.0, 0), (0.2, 1), (0.25, 0), (0.31, 1), (0.9, 8)):
        before = {name: value.clone() for name, value in tested.state().items()}
        tested.reached(share)
        losses = tested.step(batch(), step, alone)
        after = tested.state()
        parts = ("encoder.", "generator.decoder.", "generator.latents.", "discriminator.")
        moved.append(
            [
                any(not torch.equal(before[n], after[n]) for n in before if n.startswith(p))
                for p in parts
            ]
        )
        named.append({"L_KL", "L_energy", "L_Dis"} & losses.keys())
        moments = any(name.startswith("alone_optimiser.") for name in after)
        assert moments == (named[-1] == {"L_energy"})
    first, next_ = [True, True, False, False], [False, False, True, False]
    assert moved == [first, first, next_, [False, False, True, True], [False, True, True, True]]
    assert named == [{"L_KL"}, {"L_KL"}, {"L_energy"}, *[{"L_energy", "L_Dis"}] * 2]


def test_before_there_is_an_adversary_the_generator_learns_by_the_energy_score():
    tested, cells = recipe(share=0.25), batch()
    generator, real = copy.deepcopy(tested.generator.latents), latents_of(tested, cells)
    noise = torch.randn(16, generator.noise_size, generator=torch.Generator().manual_seed(0))
    drawn = generator(cells.features.repeat(2, 1), noise).chunk(2)
    found = tested.step(cells, 0, alone)["L_energy"]
    torch.testing.assert_close(found, latent_energy_score(real, *drawn).detach())


def test_draws_of_the_energy_score_come_to_differ_as_cells_do():
    """Cells of the same features are dark or bright: draws spread as far, not about the mean."""
    tested = recipe(share=0.25)
    levels = torch.tensor([0.02, 0.3]).repeat(8)[:, None, None, None]
    original = levels.expand(-1, CHANNELS, SIZE, SIZE).contiguous()
    features = torch.zeros(16, FEATURES)
    for step in range(150):
        tested.step(Batch(original, features, original[:0], step), step, alone)
    real = latents_of(tested, Batch(original, features, original[:0]))
    noise = torch.randn(200, tested.generator.latents.noise_size)
    with torch.no_grad():
        drawn = tested.generator.latents(features[:1].expand(200, -1), noise)
    axis = real[1] - real[0]  # 0 on it is a dark cell, 1 a bright one
    places = ((drawn - real[0]) * axis).sum(dim=(1, 2, 3)) / axis.square().sum()
    assert 0.25 < places.mean() < 0.75
    assert 0.3 < places.std() < 0.75  # 0.5 are the cells'


def test_the_decoder_goes_on_to_learn_cells_whose_latents_stay():
    tested, cells = recipe(), batch(cells=8)
    values = to_log(cells.original)
    with torch.no_grad():
        mean, log_variance = tested.encoder(values)
    random = torch.Generator().manual_seed(0)
    noise = torch.zeros_like(mean)

    def missed():
        with torch.no_grad():
            misfit, divergence, _ = evidence(
                tested.encoder, tested.generator.decoder, values, noise
            )
        return float(misfit), float(divergence)

    before, unsure = missed()
    for _ in range(20):
        tested._learn_to_decode(values, mean, log_variance, random, alone)
    after, still = missed()
    assert after < before - 50
    assert still == unsure


def test_a_draws_pixels_differ_by_the_grain():
    torch.manual_seed(0)
    generator = StochasticGenerator(FEATURES, CHANNELS, SIZE)
    noise = torch.randn(2, generator.noise_size)
    noise[1, : generator.latents.noise_size] = noise[0, : generator.latents.noise_size]
    features = torch.zeros(2, FEATURES)
    one, other = generator(features, noise)
    assert not torch.allclose(one, other)
    torch.nn.init.zeros_(generator.grain.last.bias)
    one, other = generator(features, noise)
    torch.testing.assert_close(one, other)


def smeared(cells, share):
    """Noise that is alike from left to right."""
    white = torch.randn(cells, CHANNELS, SIZE, SIZE)
    return white + share * (white.roll(1, dims=3) + white.roll(-1, dims=3))


def test_draws_learn_the_noise_of_cells_that_lie_as_they_were_taken(monkeypatch):
    monkeypatch.setattr(stochastic_recipe, "_GRAIN_RATE", 0.001)
    tested = recipe(cooldown=0.0)
    torch.manual_seed(0)  # noise by which steps of any size lead one channel astray
    for layer in (tested.generator.decoder.smooth, tested.generator.decoder.sharp):
        torch.nn.init.zeros_(layer.weight)  # the decoder expects 0: all of a patch is noise
        torch.nn.init.zeros_(layer.bias)
    torch.nn.init.zeros_(tested.generator.decoder.noise.weight)
    torch.nn.init.constant_(tested.generator.decoder.noise.bias, math.log(0.1))
    random = torch.Generator().manual_seed(0)
    for seed in range(400):
        cells = batch(seed, 16)
        noise = 0.1 * smeared(16, 0.4)  # no frequency is lost, or other filters explain it too
        upright = torch.arange(16) % 4 == 1
        noise = torch.where(upright[:, None, None, None], noise, noise.transpose(2, 3))
        orientations = torch.where(upright, 0, 1).to(torch.uint8)
        given = Batch(from_log(noise), cells.features, cells.real, seed, orientations)
        latents = torch.zeros(16, latent_channels(CHANNELS), 5, 5)
        tested._learn_grain(to_log(given.original), latents, given, random, alone)
    for weights in tested.generator.grain(torch.zeros(1, FEATURES), latents[:1])[0]:
        centre, across, *others = weights.T
        assert centre.tolist() == pytest.approx([1.0, 1.0], abs=0.1)
        assert across.tolist() == pytest.approx([0.4, 0.4], abs=0.1)
        assert torch.stack(others).abs().max() < 0.1
    variances = tested.generator.grain.variances.detach()
    assert not torch.equal(variances, torch.full_like(variances, 0.01))  # they learn as well
    assert tested.averaged.grain is tested.generator.grain
    assert torch.equal(tested.published()[0]["grain.last.bias"], tested.generator.grain.last.bias)


def test_noise_is_learned_in_the_second_part():
    learned = []
    for share, step in ((0.1, 4), (0.5, 4), (0.5, 5), (0.5, 6)):
        tested = recipe(share)
        before = tested.generator.grain.last.bias.clone()
        tested.step(batch(), step, alone)
        learned.append(not torch.equal(before, tested.generator.grain.last.bias))
    assert learned == [False, True, False, True]


def test_a_rank_without_upright_cells_takes_part_in_learning_noise():
    tested, cells = recipe(), batch()
    turned = torch.ones(8, dtype=torch.uint8)
    taken = []
    given = Batch(cells.original, cells.features, cells.real, 0, turned)
    tested.step(given, 4, lambda g: taken.append([v.clone() for v in g]))
    assert [v.shape for v in taken[2]] == [p.shape for p in tested.generator.grain.parameters()]
    assert all((v == 0).all() for v in taken[2])


def test_another_seed_is_another_step():
    one, other = recipe(), recipe()
    cells = batch()
    one.step(cells, 0, alone)
    other.step(Batch(cells.original, cells.features, cells.real, 99), 0, alone)
    assert not equal(one.state(), other.state())


def test_draws_learn_what_the_features_say_and_stay_different():
    tested = recipe(learning_rate=1e-3, ema=0.9, autoencoder_rate=3e-3)
    for step in range(350):
        tested.reached(0.25 * step / 200 if step < 200 else 0.25 + 0.75 * (step - 200) / 150)
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


def rates(tested):
    return [
        group["lr"]
        for one in (
            tested.autoencoder_optimiser,
            tested.alone_optimiser,
            tested.generator_optimiser,
            tested.discriminator_optimiser,
            tested.grain_optimiser,
        )
        for group in one.param_groups
    ]


def test_learning_rates_rise_and_fall_in_a_line_in_their_shares_of_each_part():
    tested = recipe(
        learning_rate=0.1,
        warmup=0.25,
        cooldown=0.25,
        autoencoder=0.2,
        autoencoder_rate=0.3,
        alone=0.2,
    )
    for share, first, next_, rate, grain in [
        (0, 0.3, 1e-3, 0, 3e-4),
        (0.12, 0.3, 1e-3, 0, 3e-4),
        (0.16, 0.15, 1e-3, 0, 3e-4),
        (0.199, 0.00375, 1e-3, 0, 3e-4),
        (0.2, 0.15, 1e-3, 0, 3e-4),
        (0.3, 0.15, 1e-3, 0, 3e-4),
        (0.35, 0.15, 5e-4, 0, 3e-4),
        (0.4, 0.15, 0, 0, 3e-4),
        (0.475, 0.15, 0, 0.05, 3e-4),
        (0.55, 0.15, 0, 0.1, 3e-4),
        (0.82, 0.15, 0, 0.1, 3e-4),
        (0.85, 0.125, 0, 0.1, 2.5e-4),
        (0.925, 0.0625, 0, 0.05, 1.25e-4),
        (1, 0, 0, 0, 0),
        (1.2, 0, 0, 0, 0),
        (0.55, 0.15, 0, 0.1, 3e-4),
    ]:
        tested.reached(share)
        expected = [first, next_, rate, rate, grain]
        assert rates(tested) == pytest.approx(expected, abs=1e-12), share


def test_without_warmup_and_cooldown_the_rate_stays():
    tested = recipe(warmup=0, cooldown=0)
    for share in (0.31, 1):
        tested.reached(share)
        assert rates(tested)[2:4] == [StochasticSetting().learning_rate] * 2
