import math

import pytest
import torch

from cp2image.models.losses import discriminator_loss, gamma_at, hidden_gradients, pixel_loss


def test_pixel_loss_is_half_the_squared_difference_of_a_patch_averaged_over_the_batch():
    torch.manual_seed(0)
    original, generated = torch.rand(2, 3, 4, 2, 2)
    total = 0.0
    for one, other in zip(original.tolist(), generated.tolist(), strict=True):
        for plane, other_plane in zip(one, other, strict=True):
            for row, other_row in zip(plane, other_plane, strict=True):
                for a, b in zip(row, other_row, strict=True):
                    total += 0.5 * (a - b) ** 2
    assert float(pixel_loss(original, generated)) == pytest.approx(total / 3, rel=1e-6)


def test_hidden_losses_are_half_the_patchs_values_times_the_mean_squared_difference():
    torch.manual_seed(1)
    original = [torch.randn(3, 4, 2, 2), torch.randn(3, 6, 1, 1)]
    generated = [torch.randn_like(layer) for layer in original]
    expected = []
    for one, other in zip(original, generated, strict=True):
        squares = [(a - b) ** 2 for a, b in zip(one.flatten(), other.flatten(), strict=True)]
        expected.append(0.5 * (3 * 68 * 68) * sum(squares) / len(squares))
    real = [torch.randn_like(layer) for layer in original]
    hidden = [
        torch.cat(three).requires_grad_() for three in zip(real, generated, original, strict=True)
    ]
    with torch.no_grad():
        found, towards = hidden_gradients(hidden, (0.0, 2.0), 3 * 68 * 68)
    torch.testing.assert_close(found, torch.stack(expected))
    assert towards[0] is None
    difference = hidden[1][3:6] - hidden[1][6:]
    loss = 2.0 * 0.5 * (3 * 68 * 68) * difference.square().mean()
    torch.testing.assert_close(towards[1], torch.autograd.grad(loss, hidden[1])[0])


def test_discriminator_loss_is_the_cross_entropy_of_its_probabilities():
    real, generated = torch.tensor([0.3, -2.0, 4.0]), torch.tensor([1.5, -0.7, 0.0])
    expected = 0.0
    for a, b in zip(real.tolist(), generated.tolist(), strict=True):
        expected -= math.log(1 / (1 + math.exp(-a))) + math.log(1 - 1 / (1 + math.exp(-b)))
    assert float(discriminator_loss(real, generated)) == pytest.approx(expected / 3, rel=1e-6)


def test_discriminator_loss_stays_finite_for_a_certain_discriminator():
    loss = discriminator_loss(torch.tensor([-300.0]), torch.tensor([300.0]))
    assert float(loss) == 600


SCHEDULE = [
    (0, [0, 0, 0, 0]),
    (2500, [0, 0, 0, 0]),
    (2501, [0.0004, 0, 0, 0]),
    (3750, [0.5, 0, 0, 0]),
    (5000, [1, 0, 0, 0]),
    (6250, [1, 0.5, 0, 0]),
    (7500, [1, 1, 0, 0]),
    (10_000, [1, 1, 1, 0]),
    (11_250, [1, 1, 1, 0.5]),
    (12_500, [1, 1, 1, 1]),
    (680_000, [1, 1, 1, 1]),
]


@pytest.mark.parametrize(("step", "gamma"), SCHEDULE)
def test_gammas_rise_one_after_another_to_one_at_step_12500(step, gamma):
    assert gamma_at(step, (1, 1, 1, 1)) == pytest.approx(gamma)


def test_gammas_rise_to_their_own_final_values_over_any_ramp():
    assert gamma_at(25, (2.0, 0.5, 0.0, 3.0), ramp=10) == pytest.approx([2, 0.25, 0, 0])
    assert gamma_at(50, (2.0, 0.5, 0.0, 3.0), ramp=10) == pytest.approx([2, 0.5, 0, 3])
