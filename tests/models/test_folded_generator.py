import pytest
import torch
from torch import nn

from cp2image.benchmarks.plain_networks import PlainGenerator, copy_generator
from cp2image.models.cp2image import Generator
from cp2image.models.folded_generator import FoldedGenerator


def trained_generator(size=68, features=9, channels=3):
    """A generator whose norms have seen data and whose scales have both signs."""
    torch.manual_seed(size)
    generator = Generator(features, channels, size).train()
    for norm in [*generator.norms, generator.channel_norm]:
        nn.init.normal_(norm.weight, 0, 1)
        nn.init.normal_(norm.bias, 0, 0.3)
    with torch.no_grad():
        for _ in range(3):
            generator(torch.randn(16, features))
    return generator.eval()


@pytest.mark.parametrize("size", [36, 64, 68, 81, 96])
def test_folded_generator_draws_what_the_plain_layers_draw(size):
    generator = trained_generator(size)
    plain = PlainGenerator(9, 3, size)
    copy_generator(plain, generator.state_dict())
    features = torch.randn(5, 9)
    with torch.no_grad():
        expected = plain.eval()(features)
    torch.testing.assert_close(FoldedGenerator(generator)(features), expected, rtol=0, atol=1e-5)


def test_folding_leaves_the_generator_as_it_was():
    generator = trained_generator()
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    FoldedGenerator(generator)
    assert all(torch.equal(before[name], value) for name, value in generator.state_dict().items())


def test_half_precision_draws_the_same_to_two_digits():
    generator = trained_generator()
    features = torch.randn(4, 9)
    full, half = (
        FoldedGenerator(generator, kind)(features) for kind in (torch.float32, torch.bfloat16)
    )
    assert half.dtype == torch.float32
    assert float((full - half).abs().max()) < 0.05 * float(full.abs().max())
    assert not torch.equal(full, half)
