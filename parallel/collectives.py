"""Collectives over a process group that may be one rank: then the values are those of all."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def maximum(values: Tensor, group: Any) -> Tensor:
    """Return the largest of all ranks' values, in place."""
    if group.size() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group)
    return values


def summed(values: Tensor, group: Any) -> Tensor:
    """Return the sum of all ranks' values, in place."""
    if group.size() > 1:
        dist.all_reduce(values, group=group)
    return values


def gathered(values: Tensor, group: Any) -> Tensor:
    """Return all ranks' columns [r, columns of all] of values [r, columns]."""
    if group.size() == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(group.size())]
    dist.all_gather(parts, values.contiguous(), group=group)
    return torch.cat(parts, dim=1)
