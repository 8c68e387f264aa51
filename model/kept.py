"""What autograd keeps between the forward and the backward pass: as it is, as the remaking of what is cheap, or in host memory.

Copies to the host and back have a stream of their own beside the computing one, and what the backward pass will need next is
fetched while it works on the layer after.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from visionloom.model.kernels.remaking import remaking_of, remembered
from visionloom.parallel.device import Arriving, CopyStream

LEAST_BYTES = 1 << 16
"""Smaller tensors stay where they are: a copy would cost more than the memory is worth."""
AHEAD_BYTES = 1 << 30
"""Fetched before it is asked for: 20 ms of PCIe, about a layer's backward pass of 8,192 tokens of 8B."""


@contextmanager
def kept(*, cheap_again: bool, in_host_memory: bool) -> Iterator[None]:
    """Choose what autograd keeps of what is computed inside.

    Args:
        cheap_again: results of norms, rotations and activations are made again from their inputs, bit for bit.
        in_host_memory: other tensors are moved to host memory, and back when they are needed. Parameters stay.
    """
    if not (cheap_again or in_host_memory):
        yield
        return
    keeper = Keeper(in_host_memory)
    hooks = torch.autograd.graph.saved_tensors_hooks(keeper.pack, keeper.unpack)
    with remembered(cheap_again), hooks:
        yield


@dataclass(frozen=True)
class Made:
    """A tensor that is made again: a view of what a remaking makes.

    It does not hold the remaking, whose inputs are on the device.
    """

    make: Callable[..., Tensor]
    inputs: tuple[Any, ...]
    """The remaking's, packed themselves."""
    shape: torch.Size
    strides: tuple[int, ...]
    offset: int


class Moved:
    """A tensor in host memory, for one or several that have saved it."""

    def __init__(self, tensor: Tensor, copies: CopyStream, number: int) -> None:
        # Pinned, or the copy would wait for the device.
        self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self.device = tensor.device
        self.number = number
        """Of tensors that were moved before."""
        self.uses = 0
        """Times that it was saved, less those that it was taken."""
        self.fetched: Arriving | None = None
        copies.to_host(tensor, self.host)

    def fetch(self, copies: CopyStream) -> None:
        """Begin to bring the tensor back."""
        if self.fetched is None:
            self.fetched = copies.to_device(self.host, self.device)

    def take(self, copies: CopyStream) -> Tensor:
        """Return the tensor on its device."""
        self.fetch(copies)
        arriving = self.fetched
        assert arriving is not None
        self.uses -= 1
        if not self.uses:
            self.fetched = None
        return arriving.wait()


Packed = Tensor | Made | Moved


@dataclass
class Keeper:
    """Packs the tensors that autograd saves, and unpacks them."""

    in_host_memory: bool
    copies: CopyStream = field(default_factory=CopyStream)
    moved: list[Moved] = field(default_factory=list)
    """In the order of the forward pass; the backward pass takes them from the end."""
    by_place: dict[tuple[Any, ...], Moved] = field(default_factory=dict)
    """Those whose tensors are still on the device, where another operation may save them too."""

    def pack(self, tensor: Tensor) -> Packed:
        """Return a tensor as it is kept."""
        if remaking := remaking_of(tensor):
            inputs = tuple(
                self.pack(each) if isinstance(each, Tensor) else each for each in remaking.inputs
            )
            return Made(
                remaking.make,
                inputs,
                tensor.shape,
                tensor.stride(),
                int(tensor.storage_offset()),
            )
        if not self.in_host_memory or stays(tensor):
            return tensor
        return self._move(tensor)

    def _move(self, tensor: Tensor) -> Moved:
        """Return a tensor in host memory, to which it is copied once."""
        storage = tensor.untyped_storage()
        place = storage._cdata, tensor.storage_offset(), tensor.shape, tensor.stride()
        if place not in self.by_place:
            moved = self.by_place[place] = Moved(tensor, self.copies, len(self.moved))
            self.moved.append(moved)
            # Another tensor may be there next.
            weakref.finalize(storage, self.by_place.pop, place, None)
        self.by_place[place].uses += 1
        return self.by_place[place]

    def unpack(self, packed: Packed) -> Tensor:
        """Return a tensor as it was."""
        if isinstance(packed, Moved):
            tensor = packed.take(self.copies)
            self._fetch_before(packed)
            return tensor
        if isinstance(packed, Made):
            inputs = [
                self.unpack(each) if isinstance(each, Tensor | Made | Moved) else each
                for each in packed.inputs
            ]
            with torch.no_grad():
                whole = packed.make(*inputs)
            return whole.as_strided(packed.shape, packed.strides, packed.offset)
        return packed

    def _fetch_before(self, packed: Moved) -> None:
        """Fetch what was moved before a tensor: the backward pass asks for it next."""
        del self.moved[packed.number :]
        ahead = 0
        for each in reversed(self.moved):
            ahead += each.host.nbytes
            if ahead > AHEAD_BYTES:
                break
            each.fetch(self.copies)


def stays(tensor: Tensor) -> bool:
    """Return whether a tensor is not moved: parameters, views of them and small ones."""
    is_parameter = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
    return is_parameter or tensor.nbytes < LEAST_BYTES
