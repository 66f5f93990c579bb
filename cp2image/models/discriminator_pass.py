"""One pass of the discriminator over a training batch, and the two gradients taken from it.

Training wants, of one forward pass over [real, generated, original]: the gradient of L_Dis with
respect to the discriminator's weights, and the gradient of Σ γ_i L_H,i with respect to the
generated patches. Both are written out here by hand, because a general automatic derivative does
several times the work: it keeps and revisits feature maps before pooling, walks through the
original patches for L_Dis, which they do not enter, and computes gradients of real pixels.

Two identities make the forward pass short. Batch norm followed by max pooling is max pooling
followed by batch norm where the scale is positive; a negative scale's sign is moved into the
kernel. And the statistics are collected while the convolution's output is in the cache.
Pure torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import conv2d, leaky_relu_

from cp2image.models.cache_blocks import Moments, blocks, empty_map
from cp2image.models.cp2image import SLOPE, Discriminator
from cp2image.models.leading_norm import LeadingBatchNorm

_aten = torch.ops.aten
_POOL = ([2, 2], [2, 2], [0, 0], [1, 1], True)


@dataclass
class _Layer:
    """What the way back needs of one layer; maps are (rows, channels, height, width).

    Attributes
    ----------
    x
        What went in.
    spectral
        The kernel, with its graph back to the parameters.
    kernel
        The same as applied: channels whose scale is negative are negated.
    z
        Convolved.
    pooled, places
        The largest value of each 2 × 2 window and where it was; ``z`` and None without pooling.
    y
        What came out: the hidden layer.
    mean, inverse, scale
        Of the normalisation: mean, 1 / sd, and what ``pooled`` was multiplied with, (channels,).
    """

    norm: LeadingBatchNorm
    x: Tensor
    spectral: Tensor
    kernel: Tensor
    sign: Tensor
    z: Tensor
    pooled: Tensor
    places: Tensor | None
    y: Tensor
    mean: Tensor
    inverse: Tensor
    scale: Tensor
    activated: bool


class DiscriminatorPass:
    """Hidden layers and logits of [real, generated, original], ready to go back.

    Parameters
    ----------
    discriminator
        In training mode; its spectral norms take one power iteration and its batch norms update
        their running statistics.
    patches
        (3 n, channels, side, side): n real, n generated, n original ones.
    """

    def __init__(self, discriminator: Discriminator, patches: Tensor) -> None:
        self._count = len(patches) // 3
        self._parameters = list(discriminator.parameters())
        self._layers: list[_Layer] = []
        x = patches.contiguous(memory_format=torch.channels_last)
        modules = zip(discriminator.convolutions, discriminator.norms, strict=True)
        for depth, (convolution, norm) in enumerate(modules):
            spectral = cast(Tensor, convolution.weight)
            with torch.no_grad():
                layer = self._forward(x, spectral, cast(LeadingBatchNorm, norm), depth)
            self._layers.append(layer)
            x = layer.y

    @property
    def hidden(self) -> list[Tensor]:
        """The four hidden layers, each (3 n, c, h, w)."""
        return [layer.y for layer in self._layers[:4]]

    @property
    def logits(self) -> Tensor:
        """One logit per patch, float32, (3 n,)."""
        return self._layers[4].y.flatten().float()

    def _forward(self, x: Tensor, spectral: Tensor, norm: LeadingBatchNorm, depth: int) -> _Layer:
        rows, leading = len(x), 2 * self._count
        weight, bias = cast(Tensor, norm.weight), cast(Tensor, norm.bias)
        sign = torch.where(weight < 0, -1.0, 1.0)
        kernel = (spectral * sign.view(-1, 1, 1, 1)).to(x.dtype)
        kernel = kernel.contiguous(memory_format=torch.channels_last)
        channels, reach = len(kernel), kernel.shape[-1] - 1
        height, width = x.shape[2] - reach, x.shape[3] - reach
        pools = depth < 3
        z = empty_map((rows, channels, height, width), x)
        half = (-(-height // 2), -(-width // 2)) if pools else (height, width)
        pooled = empty_map((rows, channels, *half), x) if pools else z
        places = torch.empty_like(pooled, dtype=torch.int64) if pools else None
        moments = Moments(channels, x.device)
        for part in blocks(rows, channels * height * width, x.device):
            convolved = conv2d(x[part], kernel)
            z[part] = convolved
            known = min(part.stop, leading) - part.start
            if known > 0:
                moments.add(convolved[:known])
            if places is not None:
                pooled[part], places[part] = _aten.max_pool2d_with_indices(convolved, *_POOL)
        mean, variance = moments.mean_and_variance()
        norm.remember(mean * sign, variance, moments.count)
        inverse = torch.rsqrt(variance + norm.eps)
        scale = weight.abs() * inverse
        shift = bias - mean * scale
        y = torch.addcmul(_column(shift, x), pooled, _column(scale, x))
        if depth < 4:
            leaky_relu_(y, SLOPE)
        return _Layer(
            norm, x, spectral, kernel, sign, z, pooled, places, y, mean, inverse, scale, depth < 4
        )

    def generated_gradient(self, towards: Sequence[Tensor | None]) -> Tensor:
        """Return the gradient with respect to the generated patches, (n, channels, side, side).

        Parameters
        ----------
        towards
            For each hidden layer the gradient of a loss with respect to it, (3 n, c, h, w); None
            where the loss does not depend on it.
        """
        n = self._count
        gradient: Tensor | None = None
        for depth in range(3, -1, -1):
            layer, given = self._layers[depth], towards[depth]
            if given is not None:
                gradient = given if gradient is None else gradient.add_(given)
            if gradient is None:
                continue
            rows = slice(n, 2 * n) if depth == 0 else slice(0, 3 * n)
            back = self._normalise_back(layer, gradient)[0]
            gradient = empty_map((rows.stop - rows.start, *layer.x.shape[1:]), layer.x)
            for part in self._blocks(layer, rows):
                convolved = self._unpool(layer, back, part)
                shifted = slice(part.start - rows.start, part.stop - rows.start)
                gradient[shifted] = _convolve_back(layer, convolved, part, (True, False))[0]
        if gradient is None:
            return torch.zeros_like(self._layers[0].x[n : 2 * n])
        return gradient

    def weight_gradients(self, towards: Tensor) -> list[Tensor]:
        """Return the gradients of all parameters, in the discriminator's own order.

        Parameters
        ----------
        towards
            Gradient of a loss with respect to the logits of real and generated patches, (2 n,).
        """
        rows = slice(0, 2 * self._count)
        last = self._layers[4]
        gradient = towards.to(last.y.dtype).view(-1, 1, 1, 1)
        kernels: list[Tensor] = []
        norms: dict[int, Tensor] = {}
        for depth in range(4, -1, -1):
            layer = self._layers[depth]
            back, along, total = self._normalise_back(layer, gradient)
            norms[id(layer.norm.weight)] = along * layer.sign
            norms[id(layer.norm.bias)] = total
            lower = depth > 0
            if lower:
                gradient = empty_map((rows.stop, *layer.x.shape[1:]), layer.x)
            kernel = torch.zeros_like(layer.kernel, dtype=torch.float32)
            for part in self._blocks(layer, rows):
                convolved = self._unpool(layer, back, part)
                to_x, to_kernel = _convolve_back(layer, convolved, part, (lower, True))
                kernel += to_kernel
                if lower:
                    gradient[part] = to_x
            kernels.append(kernel * layer.sign.view(-1, 1, 1, 1))
        known = iter(kernels[::-1])
        spectral = [layer.spectral for layer in self._layers]
        originals = [p for p in self._parameters if id(p) not in norms]
        found = iter(torch.autograd.grad(spectral, originals, list(known)))
        return [norms[id(p)] if id(p) in norms else next(found) for p in self._parameters]

    def _blocks(self, layer: _Layer, rows: slice) -> list[slice]:
        found = blocks(rows.stop - rows.start, layer.z[0].numel(), layer.z.device)
        return [slice(rows.start + part.start, rows.start + part.stop) for part in found]

    def _normalise_back(
        self, layer: _Layer, gradient: Tensor
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
        """Go back through activation and normalisation.

        With x̂ = (x − mean) / sd, m leading values per channel and sums over all rows, batch norm's
        gradient is w / sd · (g − [leading] · (Σ g + x̂ Σ g x̂) / m).

        Returns
        -------
        tuple
            First what `_unpool` needs: the gradient by ``pooled`` but for the statistics, and by
            how much the leading rows of ``z`` shift it, (channels,) each: − slope · z − level;
            then the gradients of the norm's |weight| and bias.
        """
        pooled = layer.pooled[: len(gradient)]
        if layer.activated:
            out = layer.y[: len(gradient)]
            gradient = _aten.leaky_relu_backward(gradient, out, SLOPE, True)
        total = _sum(gradient)
        product = _sum(gradient * pooled)
        along = layer.inverse * (product - layer.mean * total)
        values = 2 * self._count * layer.z.shape[2] * layer.z.shape[3]
        slope = layer.scale * layer.inverse * along / values
        level = layer.scale * total / values - slope * layer.mean
        gradient = gradient * _column(layer.scale, gradient)
        return (gradient, slope, level), along, total

    def _unpool(self, layer: _Layer, back: tuple[Tensor, Tensor, Tensor], part: slice) -> Tensor:
        """Return the gradient by ``z`` for some rows."""
        gradient, slope, level = back
        found, z = gradient[part], layer.z[part]
        if layer.places is not None:
            found = _aten.max_pool2d_with_indices_backward(found, z, *_POOL, layer.places[part])
        known = min(part.stop, 2 * self._count) - part.start
        if known > 0:
            found[:known].addcmul_(z[:known], _column(slope, z), value=-1)
            found[:known].sub_(_column(level, z))
        return found


def _convolve_back(
    layer: _Layer, gradient: Tensor, part: slice, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Return the gradients by input and kernel, each only where wanted."""
    mask = [*wanted, False]
    found = _aten.convolution_backward(
        gradient, layer.x[part], layer.kernel, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, mask
    )
    return found[0], found[1]


def _sum(x: Tensor) -> Tensor:
    return x.sum(dim=(0, 2, 3), dtype=torch.float32)


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).view(1, -1, 1, 1)
