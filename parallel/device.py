"""Copy tensors between the host and this rank's device, beside the computation."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Arriving:
    """A tensor on its way to the device."""

    tensor: Tensor
    event: Any
    """Of its arrival; None where copies are done at once."""

    def wait(self) -> Tensor:
        """Return the tensor, whose arrival the computation waits for; the host goes on."""
        if self.event is not None:
            computing = torch.cuda.current_stream()
            computing.wait_event(self.event)
            # Its memory is nobody else's while the computation reads it.
            self.tensor.record_stream(computing)
        return self.tensor


class CopyStream:
    """Copies from pinned memory and into it, on a stream of their own where there are streams."""

    def __init__(self) -> None:
        self._stream: Any = None

    def to_host(self, tensor: Tensor, host: Tensor) -> None:
        """Begin to copy a tensor of the device, after all that has been launched so far."""
        if not tensor.is_cuda:
            host.copy_(tensor)
            return
        stream = self._own()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            host.copy_(tensor, non_blocking=True)
        # Its memory is nobody else's before the copy is done.
        tensor.record_stream(stream)

    def to_device(self, host: Tensor, device: torch.device) -> Arriving:
        """Begin to copy a tensor of the host."""
        if device.type != "cuda":
            return Arriving(host.to(device, non_blocking=True), None)
        stream = self._own()
        with torch.cuda.stream(stream):
            return Arriving(host.to(device, non_blocking=True), stream.record_event())

    def _own(self) -> Any:
        self._stream = self._stream or torch.cuda.Stream()
        return self._stream


_BATCHES = CopyStream()
"""Brings the next micro-batch while the device works on this one."""


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to the device; the host goes on.

    The copy is from pinned memory: from any other, CUDA first waits for all that the device has been given before.
    """
    if device.type == "cuda":
        host = host.pin_memory()
    return _BATCHES.to_device(host, device).wait()
