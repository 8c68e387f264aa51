"""The recorder of an imagined rank: its device is torch's meta device.

Nothing is computed or sent, and what the host asks of the device is answered with stated values.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch.utils._pytree import tree_map_only

from visionloom.forecast.trace.operations import Call, tensors_in
from visionloom.forecast.trace.recorder import (
    COPIES,
    ITEM,
    SHAPE,
    SHAPED_BY_CONTENT,
    Recorder,
    place,
)
from visionloom.forecast.trace.shapes import ShapeRules
from visionloom.forecast.trace.values import CHOICE, StatedValues
from visionloom.parallel.stand_in import CPU, META


class ImaginedRecorder(Recorder):
    """Records a rank on no device."""

    def __init__(self, values: StatedValues) -> None:
        """Record; `values` are what the host gets where it asks."""
        super().__init__()
        self.values = values
        self._shapes = ShapeRules()
        self._works: dict[int, tuple[Any, int]] = {}
        """Collectives that nobody has waited for, with their numbers; kept, so that torch hands out the same objects."""

    def holds(self, tensor: Tensor) -> bool:
        """Return whether a tensor is on the imagined device."""
        return tensor.is_meta

    def operation(self, call: Call, inputs: list[Tensor], hosts: list[Tensor]) -> Any:
        """Work out the shapes of an operation, or answer what the host asks by it."""
        if inputs and self._asks(call):
            return self._answer(call)
        # A number on the host is an argument of the launch.
        takes_hosts = any(tensor.dim() for tensor in hosts)
        copies = call.name in COPIES
        if takes_hosts and inputs and not copies:
            # A GPU would refuse it; the trace goes on, so as to name all that is wrong.
            self.mixes(call.name)
            result = self._run(self.all_there(call))
        else:
            result = self._run(call)

        outputs = tensors_in((result,))
        if inputs or any(map(self.holds, outputs)):
            self.values.follow(call, outputs)
            if takes_hosts and copies and call.blocks:
                self.wait("copy to the device")
            self.record(call, inputs, outputs, crosses=copies and bool(hosts))
        return result

    def _answer(self, call: Call) -> Any:
        """Give the host the stated value of a tensor, and record that it waits."""
        if call.name in SHAPED_BY_CONTENT or call.name == "aten::index":
            return self._shaped(call)
        tensor = call.args[1] if call.name == "aten::copy_" else call.args[0]
        if call.blocks:
            self.wait("item" if call.name == ITEM else "copy to the host")
        value = self.values.of(tensor)
        if call.name in COPIES:
            self.record(call, [tensor], [], crosses=True)
        if value is None and call.name == "aten::copy_":
            # Nobody reads it: offloaded activations come back as they are.
            return call.args[0]
        if value is None:
            # What a step reads of its sums: finite, and above zero.
            value = torch.ones((), dtype=tensor.dtype).expand(tensor.shape)
        if call.name == ITEM:
            return value.item()
        if call.name == "aten::copy_":
            return call.func(call.args[0], value)
        dtype = call.kwargs.get("dtype") or tensor.dtype
        return value.to(dtype, copy=True).contiguous()

    def _shaped(self, call: Call) -> Any:
        """Return a tensor whose size depends on content, from stated values.

        Raises:
            NotImplementedError: if nothing is stated.
        """
        self.wait(SHAPE)
        selects = call.name == "aten::masked_select"
        stated = self.values.of(call.args[1] if selects else call.args[0])
        if stated is None or call.name == "aten::index":
            raise NotImplementedError(
                f"{call.name} asks for a value that is not stated, at {place()}"
            )
        if selects:
            whole = self.values.of(call.args[0])
            mask = stated.expand(torch.broadcast_shapes(call.args[0].shape, stated.shape))
            result: Tensor = call.args[0].new_empty(int(mask.sum()))
            value = None if whole is None else whole.masked_select(mask)
        else:
            value = call.func(stated, *call.args[1:], **call.kwargs)
            result = torch.empty_like(value, device=call.args[0].device)
        if value is not None:
            self.values.state(result, value)
        self.record(call, tensors_in(call.args), [result])
        return result

    def _run(self, call: Call) -> Any:
        """Work out the shapes of a result; the experts of tokens are stated."""
        result = self.shaped(call)
        if call.name == CHOICE:
            self.values.state(result, self.values.choose(*call.args))
        return result

    def shaped(self, call: Call) -> Any:
        """Return the result of an operation without content."""
        return self._shapes.run(call)

    def all_there(self, call: Call) -> Call:
        """Return a call with all its tensors on the imagined device."""
        moved = tree_map_only(Tensor, lambda tensor: tensor.to(META), (call.args, call.kwargs))
        return Call(call.kind, call.func, *moved)

    def _asks(self, call: Call) -> bool:
        """Return whether the host asks for the content of a tensor on the device."""
        if call.name == ITEM or call.name in SHAPED_BY_CONTENT:
            return True
        if call.name == "aten::index":
            return any(index is not None and index.dtype == torch.bool for index in call.args[1])
        if call.name == "aten::copy_":
            return not self.holds(call.args[0])
        return call.name in COPIES and call.kwargs.get("device") == CPU

    def send(self, name: str, call: Call) -> Any:
        """Send nothing; what is received has a value where what is sent has one."""
        if name != "send":
            for tensor in tensors_in(call.args[0]):
                self.values.forget(tensor)
        self._exchange_values(name, call.args)
        result, work = finished(call.func, call.args)
        if work is not None:
            self._works[id(work)] = work, self._flights
        return result

    def _waited(self, work: Any, *_: Any) -> bool:
        """Record that the device waits for a collective; in place of `FakeWork.wait`."""
        if kept := self._works.pop(id(work), None):
            self.land(kept[1])
        return True

    @contextlib.contextmanager
    def heard_works(self) -> Iterator[None]:
        """Hear of the waits for collectives inside."""
        with mock.patch.object(FakeWork, "wait", lambda work, *others: self._waited(work, *others)):
            yield

    def _exchange_values(self, name: str, args: Any) -> None:
        """State what is received, where what is sent has a value: the other ranks route as this one does."""
        if name != "all_gather":
            return
        (output, *_), (own, *_) = tensors_in(args[0]), tensors_in(args[1])
        value = self.values.of(own)
        if value is not None and output.numel() % own.numel() == 0:
            repeated = value.reshape(-1).repeat(output.numel() // own.numel())
            self.values.state(output, repeated.view(output.shape))


def finished(func: Any, args: Any) -> tuple[Any, Any]:
    """Return what a collective returns that is done at once, its tensors unchanged, and its work, None if it has none."""
    results: list[Any] = []
    work = None
    for value in func._schema.returns:
        if "Work" in str(value.type):
            work = FakeWork()
            results.append(work.boxed())
        else:
            results.append(next(arg for arg in args if isinstance(arg, list | tuple | Tensor)))
    return (results[0] if len(results) == 1 else tuple(results)), work
