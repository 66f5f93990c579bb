"""CP2Image's generator for drawing: batch norm folded into the kernels. Pure torch.

In evaluation mode batch norm is an affine map per channel, so it can be multiplied into the kernel
before it; what is left is four matrix-like products and their activations. Equal to the module it
is made from but for rounding.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, leaky_relu_, linear

from cp2image.models.cp2image import SLOPE, WIDTH, Generator
from cp2image.models.upsampling import convolve_doubled, convolve_folded, fold_kernel, spread


class FoldedGenerator(nn.Module):
    """Draws what a trained `Generator` draws, several times faster; cannot be trained.

    Parameters
    ----------
    generator
        The trained network; it is not changed.
    dtype
        Of weights and activations; patches come out in float32.
    """

    def __init__(self, generator: Generator, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self._sides = generator.sides
        first = generator.sides[0]
        scale, shift = _affine(generator.norms[0])
        weight = generator.linear.weight.detach().view(WIDTH, first * first, -1)
        # Channels come last in the rows of the matrix, as in the map that it fills.
        weight = (weight * scale.view(-1, 1, 1)).transpose(0, 1)
        self._keep("linear", weight.reshape(WIDTH * first * first, -1), dtype)
        self._keep("linear_bias", shift.repeat(first * first), dtype)
        for layer, convolution in enumerate(generator.convolutions):
            scale, shift = _affine(generator.norms[layer + 1])
            kernel = cast(Tensor, convolution.weight).detach() * scale.view(-1, 1, 1, 1)
            if self._is_folded(layer):
                kernel, shift = fold_kernel(kernel), shift.repeat(4)
            self._keep(f"kernel_{layer}", kernel, dtype)
            self._keep(f"bias_{layer}", shift, dtype)
        scale, shift = _affine(generator.channel_norm)
        to_channels = generator.to_channels.weight.detach() * scale.view(-1, 1, 1, 1)
        self._keep("to_channels", to_channels, dtype)
        self._keep("channel_bias", shift, dtype)

    def _is_folded(self, layer: int) -> bool:
        return self._sides[layer + 1] == 2 * self._sides[layer] + 4

    def _keep(self, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
        layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
        self.register_buffer(name, tensor.to(dtype).contiguous(memory_format=layout))

    @torch.inference_mode()
    def forward(self, features: Tensor) -> Tensor:
        """Map (N, p) scaled features to (N, channels, patch_size, patch_size), float32.

        As with `Generator`, intensities are not limited to [0, 1].
        """
        known = cast(dict[str, Tensor], self._buffers)
        first = self._sides[0]
        x = leaky_relu_(
            linear(features.to(known["linear"].dtype), known["linear"], known["linear_bias"]), SLOPE
        )
        x = x.view(-1, first, first, WIDTH).permute(0, 3, 1, 2)
        last = len(self._sides) - 2
        for layer in range(last + 1):
            kernel, bias = known[f"kernel_{layer}"], known[f"bias_{layer}"]
            if self._is_folded(layer):
                x = convolve_folded(x, kernel, bias)
            else:
                x = convolve_doubled(x, kernel, self._sides[layer + 1] - 4, bias)
            x = leaky_relu_(x, SLOPE)
            if layer == last:
                x = leaky_relu_(conv2d(x, known["to_channels"], known["channel_bias"]), SLOPE)
            if self._is_folded(layer):
                x = spread(x)
        return x.float()


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return scale and shift of a batch norm in evaluation mode."""
    known = cast(nn.BatchNorm2d, norm)
    mean, variance = cast(Tensor, known.running_mean), cast(Tensor, known.running_var)
    scale = known.weight.detach() * torch.rsqrt(variance + known.eps)
    return scale, known.bias.detach() - mean * scale
