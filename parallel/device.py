"""Bring tensors from the host to this rank's device."""

import torch
from torch import Tensor


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to the device; the host goes on.

    The copy is from pinned memory: from any other, CUDA first waits for all that the device has been given before.
    """
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)
