"""Keep activations in host memory between the forward and the backward pass: there memory is cheap."""

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

    Parameters stay on the device. On a GPU the copies are pinned and do not wait; torch's own save_on_cpu would copy the
    parameters with each use.
    """
    if not wanted:
        yield
        return
    with torch.autograd.graph.saved_tensors_hooks(_to_host, _from_host):
        yield


def _to_host(tensor: Tensor) -> Tensor | Packed:
    """Return a saved tensor's device and its copy in host memory; parameters, views of them and small tensors as they are."""
    is_parameter = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
    if is_parameter or tensor.nbytes < LEAST_BYTES:
        return tensor
    # Pinned, or the copy would wait for the device.
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    host.copy_(tensor, non_blocking=tensor.is_cuda)
    return tensor.device, host


def _from_host(saved: Tensor | Packed) -> Tensor:
    """Return a saved tensor on its device."""
    if isinstance(saved, Tensor):
        return saved
    device, host = saved
    return host.to(device, non_blocking=True)
