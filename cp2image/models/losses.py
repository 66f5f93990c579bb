"""CP2Image's losses and schedule (Ji et al., MIDL 2023, section 2). Pure torch."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import softplus


def pixel_loss(original: Tensor, generated: Tensor) -> Tensor:
    """Return L_MSE = ½ Σ (x_orig − x_gen)², summed per patch, mean over the batch."""
    return 0.5 * (original - generated).square().sum() / len(original)


def gamma_at(step: int, final: Sequence[float], ramp: int = 2500) -> list[float]:
    """Return γ_i(t) = γ_i · clip((t − ramp·i) / ramp, 0, 1) for i = 1 … len(final).

    With the paper's ramp of 2,500 steps all weights are final from step 12,500.

    >>> gamma_at(3750, (1, 1, 1, 1))
    [0.5, 0.0, 0.0, 0.0]
    """
    return [
        weight * min(max((step - ramp * i) / ramp, 0.0), 1.0)
        for i, weight in enumerate(final, start=1)
    ]


def discriminator_loss(real: Tensor, generated: Tensor) -> Tensor:
    """Return L_Dis = −log D(x_real) − log(1 − D(x_gen)) from logits, mean over the batch."""
    return softplus(-real).mean() + softplus(generated).mean()


def discriminator_gradient(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return L_Dis and its gradient with respect to the logits of [real, generated], (2 n,)."""
    real, generated = logits.chunk(2)
    towards = torch.cat([-torch.sigmoid(-real), torch.sigmoid(generated)]) / len(real)
    return discriminator_loss(real, generated), towards


def hidden_gradients(
    hidden: Sequence[Tensor], gamma: Sequence[float], values_per_patch: int
) -> tuple[Tensor, list[Tensor | None]]:
    """Return all L_H,i, and the gradient of Σ γ_i L_H,i with respect to each hidden layer.

    L_H,i = ½ · values · mean (h_i(x_orig) − h_i(x_gen))².

    Parameters
    ----------
    hidden
        Layers of [real, generated, original], each (3 n, c, h, w).
    gamma
        γ_i of each layer.
    values_per_patch
        Channels × height × width of a patch: brings the layers to the scale of `pixel_loss`.

    Returns
    -------
    tuple
        The losses without γ, (layers,); per layer a gradient of the layer's own shape, or None
        where γ_i is 0.
    """
    losses = []
    towards: list[Tensor | None] = []
    for layer, weight in zip(hidden, gamma, strict=True):
        count = len(layer) // 3
        difference = layer[count : 2 * count] - layer[2 * count :]
        losses.append(0.5 * values_per_patch * difference.float().square().mean())
        if weight == 0:
            towards.append(None)
            continue
        difference *= weight * values_per_patch / difference.numel()
        gradient = torch.zeros_like(layer)
        gradient[count : 2 * count] = difference
        gradient[2 * count :] = -difference
        towards.append(gradient)
    return torch.stack(losses), towards
