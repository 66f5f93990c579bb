import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from cp2image.models.cp2image import Discriminator, Generator, LeadingBatchNorm, layer_sides
from cp2image.models.upsampling import (
    convolve_doubled,
    convolve_folded,
    fold_kernel,
    spread,
)

SIZES = [36, 64, 68, 81, 96, 128]


def parameters(*networks):
    return sum(p.numel() for network in networks for p in network.parameters())


def kernels(*networks):
    return sum(p.numel() for network in networks for p in network.parameters() if p.ndim > 1)


def vaeplus_encoder(features=453):
    """What completes the graph of the VAEplus code that CP2Image was built from.

    This is our reading of the paper's "1.32 M parameters": an encoder of 5 x 5 convolutions
    3 → 32 → 32 → 32 with batch norm, one more to mean and log-variance (2 p channels), also with
    batch norm, and three further 1 x 1 heads 32 → 3 with batch norm, one on each coarser level of
    the decoder. CP2Image uses none of these. Both published-size counts come out exactly.
    """
    body = [
        layer
        for width_in, width_out in ((3, 32), (32, 32), (32, 32), (32, 2 * features))
        for layer in (nn.Conv2d(width_in, width_out, 5, bias=False), nn.BatchNorm2d(width_out))
    ]
    heads = [
        layer for _ in range(3) for layer in (nn.Conv2d(32, 3, 1, bias=False), nn.BatchNorm2d(3))
    ]
    return nn.Sequential(*body), nn.ModuleList(heads)


def test_generator_has_439558_parameters():
    assert parameters(Generator(453)) == 439_558


def test_generator_and_discriminator_have_544744_parameters():
    assert parameters(Generator(453), Discriminator()) == 544_744


def test_whole_vaeplus_graph_has_1322848_convolution_weights_and_1325454_parameters():
    graph = (Generator(453), Discriminator(), *vaeplus_encoder())
    assert kernels(*graph) == 1_322_848
    assert parameters(*graph) == 1_325_454


@pytest.mark.parametrize("size", SIZES)
def test_generator_draws_patches_of_any_size_for_any_features_and_channels(size):
    for features, channels in ((7, 1), (20, 5)):
        patches = Generator(features, channels, size)(torch.randn(2, features))
        assert patches.shape == (2, channels, size, size)


@pytest.mark.parametrize("size", SIZES)
def test_discriminator_sees_patches_of_any_size(size):
    hidden, logits = Discriminator(2, size)(torch.rand(3, 2, size, size))
    sides = layer_sides(size)
    assert [h.shape for h in hidden] == [
        (3, 32, sides[2], sides[2]),
        (3, 32, sides[1], sides[1]),
        (3, 32, sides[0], sides[0]),
        (3, 64, 1, 1),
    ]
    assert logits.shape == (3,)


def test_discriminator_halves_68_pixels_to_32_14_5_1():
    hidden, _ = Discriminator()(torch.rand(2, 3, 68, 68))
    assert [h.shape[1:] for h in hidden] == [(32, 32, 32), (32, 14, 14), (32, 5, 5), (64, 1, 1)]


@pytest.mark.parametrize("size", [1, 24, 35])
def test_patches_too_small_for_four_layers_are_refused(size):
    with pytest.raises(ValueError, match=f"patch_size={size}: .* at least 36 px"):
        Generator(5, 3, size)


def plain_generator(generator, features):
    """The paper's layers one by one: pad, convolve, normalise, upsample; nothing folded."""
    side = generator.sides[0]
    kernel = generator.linear.weight.view(32, side, side, -1).permute(0, 3, 1, 2).flip(2, 3)
    x = functional.pad(features[:, :, None, None], (side - 1,) * 4)
    x = functional.conv2d(x, kernel)
    x = functional.leaky_relu(generator.norms[0](x), 0.01)
    for layer in range(3):
        x = functional.interpolate(x, scale_factor=2, mode="nearest")
        grid = generator.sides[layer + 1] - 4
        x = functional.pad(x[..., :grid, :grid], (4,) * 4)
        x = functional.conv2d(x, generator.convolutions[layer].weight)
        x = functional.leaky_relu(generator.norms[layer + 1](x), 0.01)
    x = functional.conv2d(x, generator.to_channels.weight)
    return functional.leaky_relu(generator.channel_norm(x), 0.01)


@pytest.mark.parametrize("size", [36, 64, 68, 81])
def test_generator_equals_the_papers_layers_written_out(size):
    torch.manual_seed(1)
    generator = Generator(9, 3, size).double()
    features = torch.randn(4, 9, dtype=torch.float64)
    expected = plain_generator(generator, features)
    torch.testing.assert_close(generator(features), expected, rtol=0, atol=1e-10)


def test_first_layer_is_the_padded_convolution_of_a_one_pixel_map():
    torch.manual_seed(2)
    generator = Generator(453)
    features = torch.randn(3, 453)
    convolution = nn.Conv2d(453, 32, 5, padding=4, bias=False)
    assert convolution.weight.numel() == generator.linear.weight.numel() == 362_400
    with torch.no_grad():
        kernel = generator.linear.weight.view(32, 5, 5, 453).permute(0, 3, 1, 2).flip(2, 3)
        convolution.weight.copy_(kernel)
    found = generator.linear(features).view(3, 32, 5, 5)
    torch.testing.assert_close(found, convolution(features[:, :, None, None]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", [1, 2, 5, 14])
@pytest.mark.parametrize("cropped", [0, 1])
def test_folded_upsampling_convolution_equals_the_plain_one_forwards_and_backwards(side, cropped):
    torch.manual_seed(3)
    grid = 2 * side - cropped
    x = torch.randn(2, 4, side, side, requires_grad=True)
    weight = torch.randn(6, 4, 5, 5, requires_grad=True)
    doubled = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)[..., :grid, :grid]
    expected = functional.conv2d(doubled, weight, padding=4)
    if cropped:
        found = convolve_doubled(x, weight, grid)
    else:
        found = spread(convolve_folded(x, fold_kernel(weight)))
    assert found.shape == (2, 6, grid + 4, grid + 4)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    towards = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(found, (x, weight), towards),
        torch.autograd.grad(expected, (x, weight), towards),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


def test_folded_kernels_hold_every_tap_once():
    weight = torch.rand(2, 3, 5, 5)
    folded = fold_kernel(weight).reshape(4, 2, 3, 3, 3)
    torch.testing.assert_close(
        folded.sum((3, 4)), weight.sum((2, 3))[None].expand(4, 2, 3), rtol=1e-6, atol=1e-5
    )


def plain_leading_norm(x, norm, leading):
    known = x[:leading].transpose(0, 1).flatten(1)
    mean, variance = known.mean(1), known.var(1, unbiased=False)
    scaled = (x - mean[:, None, None]) / torch.sqrt(variance[:, None, None] + norm.eps)
    return scaled * norm.weight[:, None, None] + norm.bias[:, None, None]


@pytest.mark.parametrize("leading", [1, 4, 6])
def test_leading_norm_applies_the_first_rows_statistics_to_all_rows(leading):
    torch.manual_seed(4)
    norm = LeadingBatchNorm(3).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = (torch.randn(6, 3, 5, 4, dtype=torch.float64) * 3 + 7).requires_grad_()
    found, expected = norm(x, leading), plain_leading_norm(x, norm, leading)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    towards = torch.randn_like(found)
    wanted = (x, norm.weight, norm.bias)
    for one, other in zip(
        torch.autograd.grad(found, wanted, towards),
        torch.autograd.grad(expected, wanted, towards),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_leading_norms_running_statistics_are_batch_norms_of_the_leading_rows():
    torch.manual_seed(5)
    norm, reference = LeadingBatchNorm(3), nn.BatchNorm2d(3)
    for _ in range(3):
        x = torch.randn(6, 3, 5, 4) * 2 - 1
        norm(x, 4)
        reference(x[:4])
    torch.testing.assert_close(norm.running_mean, reference.running_mean)
    torch.testing.assert_close(norm.running_var, reference.running_var)
    assert norm.num_batches_tracked == reference.num_batches_tracked == 3
    x = torch.randn(2, 3, 5, 4)
    torch.testing.assert_close(norm.eval()(x, 1), reference.eval()(x))


def test_leading_norm_of_all_rows_is_batch_norm():
    x = torch.randn(6, 3, 5, 4)
    torch.testing.assert_close(LeadingBatchNorm(3)(x), nn.BatchNorm2d(3)(x))


def test_discriminator_draws_statistics_from_real_and_generated_rows_only():
    torch.manual_seed(6)
    discriminator = Discriminator(2, 36)
    patches = torch.rand(6, 2, 36, 36)
    changed = torch.cat([patches[:4], 5 * torch.rand(2, 2, 36, 36)])
    before = {name: value.clone() for name, value in discriminator.state_dict().items()}
    hidden, logits = discriminator(patches, leading=4)
    discriminator.load_state_dict(before)
    hidden_changed, logits_changed = discriminator(changed, leading=4)
    torch.testing.assert_close(logits[:4], logits_changed[:4])
    assert not torch.allclose(logits[4:], logits_changed[4:])
    for one, other in zip(hidden, hidden_changed, strict=True):
        torch.testing.assert_close(one[:4], other[:4])


def test_spectral_norm_brings_every_kernels_largest_singular_value_to_one():
    torch.manual_seed(7)
    discriminator = Discriminator(3, 36)
    with torch.no_grad():
        for convolution in discriminator.convolutions:
            convolution.parametrizations.weight.original.mul_(20)
    patches = torch.rand(2, 3, 36, 36)
    for _ in range(40):
        discriminator(patches)
    for convolution in discriminator.eval().convolutions:
        matrix = convolution.weight.detach().flatten(1).numpy()
        largest = np.linalg.svd(matrix, compute_uv=False)[0]
        assert largest == pytest.approx(1, abs=0.03)


def test_spectral_norm_takes_one_power_iteration_a_step():
    torch.manual_seed(8)
    convolution = Discriminator(3, 36).convolutions[0]
    norm = convolution.parametrizations.weight[0]
    matrix = convolution.parametrizations.weight.original.detach().flatten(1)
    u, v = norm._u.clone(), norm._v.clone()
    u = functional.normalize(matrix @ v, dim=0)
    v = functional.normalize(matrix.T @ u, dim=0)
    weight = convolution.weight
    torch.testing.assert_close(norm._u, u)
    torch.testing.assert_close(norm._v, v)
    torch.testing.assert_close(weight.flatten(1), matrix / (u @ matrix @ v))
