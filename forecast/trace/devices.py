"""Tell tensors of the device from those of the host: by torch's `meta` device, or on a CPU, where both look alike, by marks."""

import weakref
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

META = torch.device("meta")


class Device(Protocol):
    """What a recorder asks about the device whose operations it records."""

    imagined: bool
    """Tensors have no content: nothing is computed and nothing is sent."""

    def holds(self, tensor: Tensor) -> bool:
        """Return whether a tensor is on the device."""

    def made(self, outputs: Iterable[Tensor], on_device: bool) -> None:
        """Take note of new tensors."""


class MetaDevice:
    """The device of an imagined rank: torch's meta device."""

    imagined = True

    def holds(self, tensor: Tensor) -> bool:
        """Return whether a tensor is on the meta device."""
        return tensor.is_meta

    def made(self, outputs: Iterable[Tensor], on_device: bool) -> None:
        """Do nothing: a tensor knows its device."""


class MarkedDevice:
    """The device of a real rank on a CPU: tensors whose storage is marked.

    Marked are parameters and what is computed from them, what a factory makes for a device that it is given, and what
    `.to(device)` returns (see `HostCopies`).
    """

    imagined = False

    def __init__(self) -> None:
        self.marked: dict[int, Any] = {}

    def holds(self, tensor: Tensor) -> bool:
        """Return whether a tensor's storage is marked."""
        return tensor.untyped_storage()._cdata in self.marked

    def made(self, outputs: Iterable[Tensor], on_device: bool) -> None:
        """Mark tensors of the device."""
        if on_device:
            for tensor in outputs:
                self.mark(tensor)

    def mark(self, tensor: Tensor) -> None:
        """Mark a tensor's storage for as long as it lives."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.marked:
            self.marked[key] = weakref.ref(storage, lambda _: self.marked.pop(key, None))


class HostCopies(TorchFunctionMode):
    """Make the copies between host and device that a CPU would leave out, where both are the same memory.

    torch calls its backward pass without function modes: copies that recomputation makes there are left out.
    """

    def __init__(self, device: MarkedDevice) -> None:
        super().__init__()
        self.device = device
        self.makes_on_device = False
        """The factory that runs now was given a device."""
        self.copies_up = self.copies_down = False
        """The copy that runs now goes to the device, or from it to the host."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run a function, with the copies that a device of its own would need."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "to" and _target(args, kwargs) is not None:
            if not self.device.holds(args[0]):
                return self._copy(args[0], "copies_up")
            # Device and host have one name: what is there already and is sent without a wait goes to the host.
            if kwargs.get("non_blocking"):
                return self._copy(args[0], "copies_down")
        if name in ("cpu", "tolist", "numpy") and self.device.holds(args[0]):
            copy = self._copy(args[0], "copies_down")
            return copy if name == "cpu" else func(copy)
        if isinstance(kwargs.get("device"), torch.device):
            made = self._with("makes_on_device", func, args, kwargs)
            # torch.tensor makes a tensor of the host first.
            self.device.made([made] if isinstance(made, Tensor) else [], on_device=True)
            return made
        return func(*args, **kwargs)

    def _copy(self, tensor: Tensor, way: str) -> Any:
        return self._with(way, torch.clone, (tensor.detach(),), {})

    def _with(self, flag: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        before = getattr(self, flag)
        setattr(self, flag, True)
        try:
            return func(*args, **kwargs)
        finally:
            setattr(self, flag, before)


def _target(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device | None:
    """Return the device that Tensor.to is given; None for a dtype or another tensor alone."""
    for value in (kwargs.get("device"), *args[1:2]):
        if isinstance(value, torch.device):
            return value
    return None
