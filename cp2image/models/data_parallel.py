"""Averages and collections over the ranks of a data-parallel run. Pure torch."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def average_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their means over all ranks, in one all-reduce.

    The process group must be up; every rank calls this with the same shapes. Of none, nothing is
    asked of the others.
    """
    if not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    start = 0
    for tensor in tensors:
        tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
        start += tensor.numel()


def gather_over_ranks(tensor: Tensor) -> Tensor:
    """Return the tensors of all ranks, one after another along the first axis.

    The process group must be up; every rank calls this with the same shape.
    """
    found = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(found, tensor.contiguous())
    return torch.cat(found)
