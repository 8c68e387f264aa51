"""Activations in host memory: what the decoder layers save for the backward pass waits where memory is cheap."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

LEAST_BYTES = 1 << 16
"""Smaller tensors stay where they are: a copy would cost more than the memory is worth."""

Packed = tuple[torch.device, Tensor]


@contextmanager
def in_host_memory(wanted: bool) -> Iterator[None]:
    """Move the tensors that autograd saves inside to host memory, and back when they are needed.

    Parameters stay on the device, as they are there anyhow. On a GPU the copies are pinned and do not wait; torch's own
    save_on_cpu would copy the parameters with each use.
    """
    if not wanted:
        yield
        return
    with torch.autograd.graph.saved_tensors_hooks(_to_host, _from_host):
        yield


def _to_host(tensor: Tensor) -> Tensor | Packed:
    if (
        isinstance(tensor, nn.Parameter)
        or isinstance(tensor._base, nn.Parameter)
        or tensor.nbytes < LEAST_BYTES
    ):
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    host.copy_(tensor, non_blocking=tensor.is_cuda)
    return tensor.device, host


def _from_host(saved: Tensor | Packed) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    device, host = saved
    return host.to(device, non_blocking=True)
