"""Work on large activations in blocks that stay in the processor's cache. Pure torch.

A feature map of a whole batch is tens of megabytes: every operation on it is a trip to main
memory. Done block by block, a convolution's output is summed, pooled and normalised while it is
still in the cache. On a GPU one block holds everything.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_CACHED = 1 << 19
"""Values of one block, 2 MiB in float32: what a core keeps near it."""


def blocks(rows: int, values: int, device: torch.device) -> Iterator[slice]:
    """Cut ``rows`` rows of ``values`` values each into slices that fit the cache."""
    size = rows if device.type != "cpu" else max(1, _CACHED // max(1, values))
    for start in range(0, rows, max(1, size)):
        yield slice(start, min(start + size, rows))


def empty_map(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return an uninitialised (rows, channels, height, width) map, channels last."""
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


class Moments:
    """Sum and sum of squares of each channel, collected block by block.

    On a CPU the squares come from a matrix product, which is several times faster there than
    `torch.var_mean`; sums of blocks are added up in float64.
    """

    def __init__(self, channels: int, device: torch.device) -> None:
        kind = torch.float64 if device.type == "cpu" else torch.float32
        self._sums = torch.zeros(channels, dtype=kind, device=device)
        self._squares = torch.zeros(channels, dtype=kind, device=device)
        self.count = 0

    def add(self, x: Tensor) -> None:
        """Take in a block, (N, C, H, W)."""
        values = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).float()
        self._sums += values.sum(dim=0)
        if values.device.type == "cpu":
            self._squares += (values.T @ values).diagonal()
        else:
            self._squares += values.square().sum(dim=0)
        self.count += len(values)

    def mean_and_variance(self) -> tuple[Tensor, Tensor]:
        """Return each channel's mean and (biased) variance, float32, (C,)."""
        mean = self._sums / self.count
        variance = (self._squares / self.count - mean.square()).clamp_(min=0)
        return mean.float(), variance.float()
