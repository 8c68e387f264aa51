"""The recorder of a real rank on a CPU: tensors of its device are marked, since host and device are one memory."""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from visionloom.forecast.trace.operations import Call, tensors_in
from visionloom.forecast.trace.recorder import (
    COPIES,
    ITEM,
    SHAPE,
    SHAPED_BY_CONTENT,
    Recorder,
)
from visionloom.forecast.trace.values import CHOICE, StatedValues


class MarkedDevice:
    """The device of a real rank on a CPU: tensors whose storage is marked.

    Marked are parameters and what is computed from them, what a factory makes for a device that it is given, and what
    `.to(device)` returns (see `HostCopies`).
    """

    def __init__(self) -> None:
        self.marked: dict[int, Any] = {}

    def holds(self, tensor: Tensor) -> bool:
        """Return whether a tensor's storage is marked."""
        return tensor.untyped_storage()._cdata in self.marked

    def mark(self, tensor: Tensor) -> None:
        """Mark a tensor's storage for as long as it lives."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.marked:
            self.marked[key] = weakref.ref(storage, lambda _: self.marked.pop(key, None))


class RealRecorder(Recorder):
    """Records a rank that computes and sends."""

    def __init__(self, device: MarkedDevice, copies: "HostCopies", values: StatedValues) -> None:
        """Record.

        Args:
            device: knows which tensors are on it.
            copies: knows what goes to the device and comes from it.
            values: say which experts tokens choose, as on an imagined rank.
        """
        super().__init__()
        self.device, self.copies, self.values = device, copies, values

    def holds(self, tensor: Tensor) -> bool:
        """Return whether a tensor is marked."""
        return self.device.holds(tensor)

    def operation(self, call: Call, inputs: list[Tensor], hosts: list[Tensor]) -> Any:
        """Run an operation, and record it if it ran on the device."""
        result = self._run(call)
        if self.copies.copies_down:
            self.record(call, inputs, [], crosses=True)
            if not self.copies.goes_on:
                self.wait("copy to the host")
            return result
        if not self._ran_there(bool(inputs), bool(hosts)):
            return result

        outputs = tensors_in((result,))
        for tensor in outputs:
            self.device.mark(tensor)
        self.record(call, inputs, outputs, crosses=self.copies.copies_up)
        if call.name == ITEM or call.name in SHAPED_BY_CONTENT:
            self.wait("item" if call.name == ITEM else SHAPE)
        if inputs and call.name not in COPIES and any(tensor.dim() for tensor in hosts):
            self.mixes(call.name)
        return result

    def _ran_there(self, takes_device: bool, takes_hosts: bool) -> bool:
        """Return whether an operation ran on the device, by the tensors that it took."""
        if takes_device or takes_hosts:
            return takes_device or self.copies.copies_up
        # Autograd knows no host: what it makes in a backward pass is a gradient.
        return self.copies.makes_on_device or torch._C._current_autograd_node() is not None

    def _run(self, call: Call) -> Any:
        """Run an operation; the experts of tokens are stated."""
        if call.name == CHOICE:
            return self.values.choose(*call.args).clone()
        return call.run()

    def send(self, name: str, call: Call) -> Any:
        """Send what a collective sends; when it is waited for is not heard here, and taken to be at once."""
        result = call.run()
        self.land(self._flights)
        return result


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
        self.goes_on = False
        """The host does not wait for it."""

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
                with self._set("goes_on"):
                    return self._copy(args[0], "copies_down")
        if name in ("cpu", "tolist", "numpy") and self.device.holds(args[0]):
            copy = self._copy(args[0], "copies_down")
            return copy if name == "cpu" else func(copy)
        if isinstance(kwargs.get("device"), torch.device):
            with self._set("makes_on_device"):
                made = func(*args, **kwargs)
            # torch.tensor makes a tensor of the host first.
            if isinstance(made, Tensor):
                self.device.mark(made)
            return made
        return func(*args, **kwargs)

    def _copy(self, tensor: Tensor, way: str) -> Tensor:
        """Copy a tensor to the device or from it."""
        # Outside: what a copy makes is marked, and a view has the memory of what it is made of.
        source = tensor.detach()
        with self._set(way):
            return torch.clone(source)

    @contextlib.contextmanager
    def _set(self, flag: str) -> Iterator[None]:
        """Set one of the flags above for what runs inside."""
        before = getattr(self, flag)
        setattr(self, flag, True)
        try:
            yield
        finally:
            setattr(self, flag, before)


def _target(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device | None:
    """Return the device that Tensor.to is given; None for a dtype or another tensor alone."""
    for value in (kwargs.get("device"), *args[1:2]):
        if isinstance(value, torch.device):
            return value
    return None
