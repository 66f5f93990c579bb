"""Batch norm whose statistics come from the leading rows of a batch only. Pure torch."""

from typing import Any, cast

import torch
from torch import Tensor, nn


class _Normalise(torch.autograd.Function):
    """Normalise all rows by the leading rows' mean and variance, in few passes over memory.

    With x̂ = (x − mean) / sd, n leading values per channel and sums over *all* rows, the gradient
    is w / sd · (g − [leading] · (Σ g + x̂ · Σ g x̂) / n): batch norm's own, with the two sums
    collected from more rows than they are handed back to.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, leading: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        variance, mean = torch.var_mean(_wide(x[:leading]), dim=(0, 2, 3), correction=0)
        inverse = torch.rsqrt(variance + eps)
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.leading = leading
        ctx.mark_non_differentiable(mean, variance)
        scale = (weight * inverse).to(x.dtype)
        shift = (bias - mean * weight * inverse).to(x.dtype)
        return torch.addcmul(_column(shift), x, _column(scale)), mean, variance

    @staticmethod
    def backward(
        ctx: Any, gradient: Tensor, *_: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight, mean, inverse = ctx.saved_tensors
        leading: int = ctx.leading
        values = leading * x.shape[2] * x.shape[3]
        total = _wide(gradient).sum(dim=(0, 2, 3))
        product = _wide(gradient * x).sum(dim=(0, 2, 3))
        along = inverse * (product - mean * total)
        scale = weight * inverse
        result = gradient * _column(scale.to(x.dtype))
        slope = scale * inverse * along / values
        level = scale * total / values - slope * mean
        result[:leading].addcmul_(x[:leading], _column(slope.to(x.dtype)), value=-1)
        result[:leading].sub_(_column(level.to(x.dtype)))
        return result, along, total, None, None


def _wide(x: Tensor) -> Tensor:
    """Return at least float32: sums over millions of pixels need more than half precision."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _column(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)


class LeadingBatchNorm(nn.BatchNorm2d):
    """Batch norm whose statistics come from the leading rows of a batch only.

    CP2Image's discriminator sees [real, fake, original] at once; the statistics are those of
    [real, fake] and are applied to all three.
    """

    def forward(self, x: Tensor, leading: int | None = None) -> Tensor:
        """Normalise (N, C, H, W) by the mean and variance of the first ``leading`` rows.

        ``leading`` None takes all rows. In evaluation mode the running statistics are used.
        """
        if not self.training or leading is None:
            return super().forward(x)
        normalise = cast(Any, _Normalise.apply)  # torch does not type it
        y, mean, variance = normalise(x, self.weight, self.bias, leading, self.eps)
        if self.track_running_stats:
            count = leading * x.shape[2] * x.shape[3]
            rate = cast(float, self.momentum)
            with torch.no_grad():
                unbiased = variance * (count / max(count - 1, 1))
                cast(Tensor, self.running_mean).lerp_(mean, rate)
                cast(Tensor, self.running_var).lerp_(unbiased, rate)
                cast(Tensor, self.num_batches_tracked).add_(1)
        return cast(Tensor, y)
