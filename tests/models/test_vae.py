"""VAE and VAEplus: the networks beside CP2Image's, and their training steps beside a plain one."""

import copy

import pytest
import torch

from cp2image.models.cp2image import Discriminator, Generator
from cp2image.models.losses import discriminator_loss, gamma_at, pixel_loss
from cp2image.models.presets import build_drawer, reconstructs, sees
from cp2image.models.recipe import OPTIMISERS, Batch
from cp2image.models.vae import LATENT, Encoder, Vae, divergence
from cp2image.models.vae_recipe import VaePlusRecipe, VaeRecipe, latent_noise

CHANNELS, SIZE = 2, 36


def alone(gradients):
    """One rank: nothing to average."""


def batch(seed, cells=5):
    random = torch.Generator().manual_seed(seed)
    original, real = torch.rand(2, cells, CHANNELS, SIZE, SIZE, generator=random)
    return Batch(original, torch.zeros(cells, 0), real, seed)


def test_the_encoder_has_the_published_widths():
    counted = sum(p.numel() for p in Encoder().parameters() if p.ndim > 1)
    assert counted == 25 * (3 * 32 + 32 * 32 + 32 * 32 + 32 * 2 * 256)
    assert sum(p.numel() for p in Vae().decoder.parameters()) == sum(
        p.numel() for p in Generator(256).parameters()
    )


@pytest.mark.parametrize("size", [36, 64, 68, 81])
def test_patches_of_any_size_come_back_in_it(size):
    drawn, kl = Vae(2, size)(torch.rand(3, 2, size, size), torch.randn(3, LATENT))
    assert drawn.shape == (3, 2, size, size)
    assert kl.ndim == 0


def test_divergence_equals_torchs_own():
    mean, log_variance = torch.randn(2, 7, 11, generator=torch.Generator().manual_seed(1))
    own = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    expected = torch.distributions.kl_divergence(own, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(divergence(mean, log_variance), expected.sum(dim=1))


@pytest.mark.parametrize("step", [0, 3, 100], ids=["pixels alone", "ramp", "all layers"])
def test_a_step_of_vaeplus_equals_two_separate_passes(step):
    """The slow way: each network has its own forward pass and its own backward pass."""
    torch.manual_seed(0)
    tested = VaePlusRecipe(CHANNELS, SIZE, gamma_ramp=1, setting=OPTIMISERS["as_named"])
    network = copy.deepcopy(tested.generator).train()
    discriminator = copy.deepcopy(tested.discriminator).train()
    frozen = copy.deepcopy(discriminator).requires_grad_(False)
    cells = batch(1)
    count = len(cells.original)

    mean, log_variance = network.encoder(cells.original)
    latent = mean + latent_noise(cells) * (0.5 * log_variance).exp()
    drawn = network.decoder(latent)
    patches = torch.cat([cells.real, drawn, cells.original])
    hidden, _ = frozen(patches, leading=2 * count)
    total = pixel_loss(cells.original, drawn) + 2.0 * divergence(mean, log_variance).mean()
    for gamma, layer in zip(gamma_at(step, (1, 1, 1, 1), 1), hidden, strict=True):
        difference = layer[2 * count :] - layer[count : 2 * count]
        total = total + gamma * 0.5 * CHANNELS * SIZE * SIZE * difference.square().mean()
    total.backward()
    _, logits = discriminator(patches.detach(), leading=2 * count)
    discriminator_loss(logits[:count], logits[count : 2 * count]).backward()
    expected = [p.grad for p in network.parameters()]
    expected_of_discriminator = [p.grad for p in discriminator.parameters()]

    found = []
    losses = tested.step(cells, step, lambda gradients: found.extend(g.clone() for g in gradients))
    for one, other in zip(found, expected + expected_of_discriminator, strict=True):
        assert float((one - other).norm()) <= 1e-4 * float(other.norm()) + 1e-5
    torch.testing.assert_close(losses["L_generator"], total.detach())
    torch.testing.assert_close(losses["L_KL"], 2 * divergence(mean, log_variance).mean().detach())


def test_a_step_of_vae_is_the_gradient_of_its_bound():
    torch.manual_seed(0)
    tested = VaeRecipe(CHANNELS, SIZE, beta=0.5)
    network, cells = copy.deepcopy(tested.generator).train(), batch(2)
    drawn, kl = network(cells.original, latent_noise(cells))
    (pixel_loss(cells.original, drawn) + 0.5 * kl).backward()
    found = []
    losses = tested.step(cells, 0, lambda gradients: found.extend(g.clone() for g in gradients))
    for one, other in zip(found, [p.grad for p in network.parameters()], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses["L_KL"], 0.5 * kl.detach())
    assert tested.published()[1] == {}


@pytest.mark.parametrize("kind", [VaeRecipe, VaePlusRecipe])
def test_training_brings_reconstructions_near_and_resumes_where_it_was(kind):
    torch.manual_seed(0)
    recipe, cells = kind(CHANNELS, SIZE, setting=OPTIMISERS["as_named"]), batch(3, cells=8)
    losses = [float(recipe.step(cells, step, alone)["L_MSE"]) for step in range(25)]
    assert losses[-1] < 0.7 * losses[0]
    torch.manual_seed(5)
    other = kind(CHANNELS, SIZE, setting=OPTIMISERS["as_named"])
    other.load_state({name: value.clone() for name, value in recipe.state().items()})
    for one in (recipe, other):
        one.step(batch(4), 25, alone)
    assert all(torch.equal(v, other.state()[k]) for k, v in recipe.state().items())


@pytest.mark.parametrize("kind", [VaeRecipe, VaePlusRecipe])
def test_a_checkpoint_draws_what_the_recipe_draws_from_images_and_from_the_prior(kind):
    torch.manual_seed(0)
    recipe = kind(CHANNELS, SIZE, setting=OPTIMISERS["as_named"])
    for step in range(3):
        recipe.step(batch(step), step, alone)
    weights = {k: v.clone() for k, v in recipe.published()[0].items()}
    drawer = build_drawer("vaeplus", (9, CHANNELS, SIZE), weights)
    images, keys, nothing = batch(8).original, torch.arange(5), torch.zeros(5, 9)
    with torch.inference_mode():
        for given in (images, None):
            expected = recipe.draw(nothing, keys, 1, given)
            found = drawer(nothing, keys, 1, given).clamp(0, 1)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        shown = drawer(nothing, keys, 1, images)
        assert torch.equal(shown, drawer(nothing, keys + 7, 2, images))  # no noise
        prior = drawer(nothing, keys, 1, None)
        assert not torch.equal(prior, drawer(nothing, keys, 2, None))
        assert torch.equal(prior[[3]], drawer(nothing[:1], keys[[3]], 1, None)) or torch.allclose(
            prior[[3]], drawer(nothing[:1], keys[[3]], 1, None), atol=1e-5
        )


def test_each_model_says_what_it_sees():
    assert [sees(name, image=True) for name in ("paper", "cp2image-s", "lsgan", "vae")] == [
        ("features",),
        ("features", "noise"),
        ("noise",),
        ("image",),
    ]
    assert sees("vaeplus", image=False) == ("noise",)
    assert [name for name in ("paper", "lsgan", "vae", "vaeplus") if reconstructs(name)] == [
        "vae",
        "vaeplus",
    ]


def test_vaeplus_learns_with_cp2images_own_discriminator():
    recipe = VaePlusRecipe(CHANNELS, SIZE)
    assert isinstance(recipe.discriminator, Discriminator)
    assert recipe.needs_real
