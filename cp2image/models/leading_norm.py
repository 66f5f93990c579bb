"""Batch norm whose statistics come from the leading rows of a batch only. Pure torch."""

from typing import cast

import torch
from torch import Tensor, nn


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
        known = x[:leading]
        if known.dtype in (torch.bfloat16, torch.float16):
            known = known.float()  # sums over millions of pixels need more than half precision
        variance, mean = torch.var_mean(known, dim=(0, 2, 3), correction=0)
        self.remember(mean, variance, known.numel() // known.shape[1])
        scale = self.weight * torch.rsqrt(variance + self.eps)
        shift = self.bias - mean * scale
        return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)

    @torch.no_grad()
    def remember(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Move the running statistics towards those of one batch.

        Parameters
        ----------
        mean, variance
            Of each channel over ``count`` values; the variance is the biased one.
        count
            Values per channel.
        """
        rate = cast(float, self.momentum)
        cast(Tensor, self.running_mean).lerp_(mean, rate)
        cast(Tensor, self.running_var).lerp_(variance * (count / max(count - 1, 1)), rate)
        cast(Tensor, self.num_batches_tracked).add_(1)
