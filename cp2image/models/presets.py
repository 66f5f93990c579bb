"""The models by name: what draws a checkpoint's patches. Pure torch."""

from collections.abc import Callable

import torch
from torch import Tensor

from cp2image.models.cp2image import Generator
from cp2image.models.folded_generator import FoldedGenerator
from cp2image.models.stochastic import StochasticGenerator

PAPER, STOCHASTIC = "paper", "cp2image-s"
PRESETS = (PAPER, STOCHASTIC)
"""Networks that a checkpoint's weights can belong to."""

Drawer = Callable[[Tensor, Tensor, int], Tensor]
"""Scaled features (N, p), keys (N,) int64 and a seed to patches (N, C, H, W), about [0, 1]."""


def build_drawer(
    preset: str,
    sizes: tuple[int, int, int],
    weights: dict[str, Tensor],
    *,
    device: str = "cpu",
    bf16: bool = False,
) -> Drawer:
    """Return what draws patches from trained weights.

    Parameters
    ----------
    preset
        One of `PRESETS`.
    sizes
        Features, channels, side of a patch.
    weights
        State dict of the preset's generator.
    device
        Where it draws.
    bf16
        Draw in bfloat16.
    """
    if preset == PAPER:
        trained = Generator(*sizes)
        trained.load_state_dict(weights)
        kind = torch.bfloat16 if bf16 else torch.float32
        folded = FoldedGenerator(trained.eval(), kind).to(device)
        return lambda features, keys, seed: folded(features)
    generator = StochasticGenerator(*sizes)
    generator.load_state_dict(weights)
    generator.eval().to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def draw(features: Tensor, keys: Tensor, seed: int) -> Tensor:
        noise = generator.noise(keys, seed)
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=bf16):
            drawn: Tensor = generator(features, noise)
        return drawn.float()

    return draw
