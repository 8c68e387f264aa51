"""Record every operation of a step on the device: launches, memory, collectives, waits of the host.

The same recorder watches an imagined rank, whose tensors are on torch's meta device, and a real one on a CPU, whose device
tensors are marked. On an imagined rank nothing is computed or sent, and what the host asks of the device is answered with
stated values.
"""

import traceback
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from visionloom.forecast.trace.axes import NAMES, Axes, group_in, moved_bytes, tensors_in
from visionloom.forecast.trace.devices import META, Device, HostCopies
from visionloom.forecast.trace.events import (
    Category,
    Collective,
    Direction,
    Kernel,
    Mixed,
    Operation,
    Slot,
    SlotKind,
    SlotMemory,
    Wait,
)
from visionloom.forecast.trace.memory import Ledger
from visionloom.forecast.trace.operations import Call, cost_of, dtype_of, kind_of
from visionloom.forecast.trace.shapes import ShapeRules
from visionloom.forecast.trace.values import StatedValues
from visionloom.parallel.parts import OTHER, PREFIX

ITEM = "aten::_local_scalar_dense"
SHAPE = "shape that depends on content"
COPIES = {"aten::_to_copy", "aten::copy_", "aten::clone"}
SHAPED_BY_CONTENT = {
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::repeat_interleave",
}
"""Operations whose result has a size that only the device knows: the host waits for it."""
FILLS = {"all_gather", "reduce_scatter", "all_to_all", "receive"}
"""Collectives that fill a tensor of their own."""
CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
QUIET = ("/parallel/stand_in.py", "/forecast/trace/")
"""Files that are never the reason of a wait."""


@dataclass
class _OpenSlot:
    """A slot that is being recorded."""

    kind: SlotKind
    chunk: int
    micro_batch: int
    before: int
    operations: Counter[Operation] = field(default_factory=Counter)
    collectives: Counter[Collective] = field(default_factory=Counter)


class Recorder(TorchDispatchMode):
    """Sees each operation of this process; `start` begins a step, `slot` a stretch of it, `finish` ends it."""

    def __init__(
        self, device: Device, values: StatedValues | None = None, copies: HostCopies | None = None
    ) -> None:
        """Record operations on a device.

        Args:
            device: which tensors are on it.
            values: those of an imagined rank, and the choice of experts, which a real rank is given too where it is stated.
            copies: of a real rank: tells what goes to the device and comes from it.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.device, self.values, self.copies = device, values, copies
        self.axes: Axes | None = None
        self.ledger = Ledger()
        self.slots: list[Slot] = []
        self.waits: Counter[tuple[str, str, bool]] = Counter()
        self.mixed: Counter[tuple[str, str]] = Counter()
        self.recomputing = 0
        """Calls of modules that a backward pass has begun and that have not ended."""
        self._shapes = ShapeRules()
        self._open: _OpenSlot | None = None
        self._ranges: list[tuple[str, bool]] = []
        """Ranges that are open: the part of the step, and whether a backward pass has opened it."""
        self._starts: list[int] = [0]
        self._parts: list[str] = [OTHER]
        """From which sequence number of autograd's nodes on they belong to which part."""

    # ---- the stretches of a step

    def start(self) -> dict[Category, int]:
        """Begin a step; return the bytes at rest."""
        self.slots.clear()
        self.waits.clear()
        self.mixed.clear()
        at_rest = self.ledger.begin()
        self.ledger.slot = 0
        self._open = _OpenSlot(SlotKind.BEGIN, -1, -1, self.ledger.bytes)
        return at_rest

    def slot(self, kind: SlotKind, chunk: int = -1, micro_batch: int = -1) -> None:
        """Begin the next stretch of the step."""
        self._close()
        self._open = _OpenSlot(kind, chunk, micro_batch, self.ledger.bytes)

    def finish(self) -> None:
        """End the step."""
        self._close()
        self._open = None

    def _close(self) -> None:
        opened = self._open
        assert opened is not None, "a step has begun"
        highest = self.ledger.next_slot(len(self.slots) + 1)
        memory = SlotMemory(opened.before, highest, self.ledger.bytes)
        # Between two passes without messages nothing happens.
        self.slots.append(
            Slot(
                opened.kind,
                opened.chunk,
                opened.micro_batch,
                tuple(opened.operations.items()),
                tuple(opened.collectives.items()),
                memory,
            )
        )

    # ---- where an operation belongs

    def _place(self) -> tuple[str, Direction]:
        """Return the part of the step and the direction of what runs now."""
        node = torch._C._current_autograd_node()
        if node is None:
            return (self._ranges[-1][0] if self._ranges else OTHER), Direction.FORWARD
        part = self._parts[bisect_right(self._starts, node._sequence_nr()) - 1]
        if not self.recomputing:
            return part, Direction.BACKWARD
        # What is recomputed may mark a part by itself.
        if self._ranges and self._ranges[-1][1]:
            part = self._ranges[-1][0]
        self._remember(part, torch._C._autograd._get_sequence_nr() - 1)
        return part, Direction.RECOMPUTE

    def _remember(self, part: str, sequence: int) -> None:
        """Take note that autograd's nodes from a sequence number on belong to a part."""
        if self._parts[-1] != part:
            self._starts.append(sequence)
            self._parts.append(part)

    def _enter(self, name: str) -> None:
        """Begin a range of torch's profiler, which may be a part of the step."""
        inside = torch._C._current_autograd_node() is not None
        if name.startswith(PREFIX):
            self._ranges.append((name.removeprefix(PREFIX), inside))
        else:
            self._ranges.append(self._ranges[-1] if self._ranges else (OTHER, inside))
        self._remember(self._ranges[-1][0], torch._C._autograd._get_sequence_nr())

    def _exit(self) -> None:
        """End the range that was begun last."""
        self._ranges.pop()
        outer = self._ranges[-1][0] if self._ranges else OTHER
        self._remember(outer, torch._C._autograd._get_sequence_nr())

    # ---- operations

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, or answer it, and record it."""
        call = Call(kind_of(func), func, args, kwargs or {})
        if func.namespace == "profiler":
            return self._range(call)
        if func.namespace == "c10d":
            return self._collective(call)

        tensors = tensors_of((*args, *call.kwargs.values()))
        inputs: list[Tensor] = []
        others: list[Tensor] = []
        for tensor in tensors:
            (inputs if self.device.holds(tensor) else others).append(tensor)
        if inputs and self.device.imagined and asks(call):
            return self._answer(call)
        mixes = bool(inputs) and any(tensor.dim() for tensor in others)
        # A GPU would refuse it here; the trace goes on, so as to name all that is wrong.
        sent = mixes and self.device.imagined and call.name not in COPIES
        result = self._run(on_device(call) if sent else call)
        if self.copies is not None and self.copies.copies_down:
            self._record(call, inputs, [], crosses=True)
            self._wait("copy to the host")
            return result
        outputs = tensors_of((result,))
        if not self._stays(bool(tensors), bool(inputs), outputs):
            return result

        self.device.made(outputs, True)
        if self.device.imagined and self.values is not None:
            self.values.follow(func, args, call.kwargs, outputs)
        up = self.copies is not None and self.copies.copies_up
        self._record(call, inputs, outputs, crosses=up or (call.name in COPIES and bool(others)))
        if not self.device.imagined and (call.name == ITEM or call.name in SHAPED_BY_CONTENT):
            self._wait("item" if call.name == ITEM else SHAPE)
        # A number on the host is an argument of the launch.
        if any(tensor.dim() for tensor in others):
            self._check_hosts(call, bool(inputs))
        return result

    def _range(self, call: Call) -> Any:
        """Follow the ranges that torch's profiler is told of."""
        if call.name == "profiler::_record_function_exit":
            self._exit()
        else:
            self._enter(str(call.args[0]))
        return call.run()

    def _stays(self, takes: bool, takes_device: bool, outputs: list[Tensor]) -> bool:
        """Return whether an operation ran on the device.

        Args:
            takes: it has tensors among its arguments.
            takes_device: some of them are on the device.
            outputs: what it returned.
        """
        if self.device.imagined:
            return takes_device or any(map(self.device.holds, outputs))
        assert self.copies is not None
        if not takes:
            # Autograd knows no host: what it makes in a backward pass is a gradient.
            return self.copies.makes_on_device or torch._C._current_autograd_node() is not None
        return takes_device or self.copies.copies_up

    def _answer(self, call: Call) -> Any:
        """Give the host the stated value of a tensor, and record that it waits."""
        assert self.values is not None
        if call.name in SHAPED_BY_CONTENT or call.name == "aten::index":
            return self._shaped(call)
        tensor = call.args[1] if call.name == "aten::copy_" else call.args[0]
        if call.blocks:
            self._wait("item" if call.name == ITEM else "copy to the host")
        value = self.values.of(tensor)
        if call.name in COPIES:
            self._record(call, [tensor], [], crosses=True)
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
        assert self.values is not None
        self._wait(SHAPE)
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
        self._record(call, tensors_of(call.args), [result])
        return result

    def _run(self, call: Call) -> Any:
        """Run an operation, with the experts that are stated."""
        if self.values is None or call.name != "aten::topk" or call.args[0].dim() != 2:
            return self._shapes.run(call) if self.device.imagined else call.run()
        scores, each = call.args[:2]
        choice = self.values.choose(scores, each)
        if not self.device.imagined:
            return scores.gather(1, choice), choice.clone()
        largest, indices = call.run()
        self.values.state(indices, choice)
        return largest, indices

    def _record(
        self, call: Call, inputs: list[Tensor], outputs: list[Tensor], crosses: bool = False
    ) -> None:
        """Add an operation to the slot, and its tensors to the memory; `crosses`: between host and device."""
        part, direction = self._place()
        # A CPU copies by clone what goes to a device by `to`.
        name = "aten::_to_copy" if crosses and call.name == "aten::clone" else call.name
        if not call.kind.is_view:
            for tensor in outputs:
                self.ledger.see(tensor, part, direction, name)
        if self._open is None or not call.kind.launches:
            return
        cost = cost_of(call, inputs, outputs)
        operation = Operation(
            name,
            part,
            direction,
            Kernel.TRANSFER if crosses else cost.kernel,
            dtype_of(inputs, outputs),
            cost.flops,
            cost.work,
            cost.bytes,
        )
        self._open.operations[operation] += 1

    def _check_hosts(self, call: Call, takes_device: bool) -> None:
        """Record a copy from the host that is waited for, or an operation with tensors of both sides."""
        if call.name not in COPIES:
            if takes_device:
                self.mixed[call.name, place()] += 1
        elif call.blocks and self.device.imagined:
            self._wait("copy to the device")

    def _wait(self, kind: str) -> None:
        if self._open is not None:
            inside = self._open.kind in (SlotKind.FORWARD, SlotKind.BACKWARD)
            self.waits[kind, place(), inside] += 1

    def synchronized(self) -> None:
        """Record that the host waits for a stream or an event."""
        self._wait("synchronize")

    def take_waits(self) -> tuple[Wait, ...]:
        """Return the waits of the step, the most frequent first."""
        return tuple(
            Wait(kind, where, count, inside)
            for (kind, where, inside), count in self.waits.most_common()
        )

    def take_mixed(self) -> tuple[Mixed, ...]:
        """Return the operations with tensors of both sides."""
        return tuple(Mixed(name, where, count) for (name, where), count in self.mixed.most_common())

    # ---- collectives

    def _collective(self, call: Call) -> Any:
        """Send what a collective sends, or on an imagined rank nothing, and record it."""
        values = (*call.args, *call.kwargs.values())
        tensors = tensors_in(values)
        if not any(map(self.device.holds, tensors)):
            return call.run()
        operator = call.name.removeprefix("c10d::")
        name = NAMES.get(operator, operator)
        part, direction = self._place()
        if self._open is not None and self.axes is not None:
            axis = self.axes.name(group_in(values))
            moved = moved_bytes(values)
            self._open.collectives[Collective(name, axis, part, direction, moved)] += 1
        if name in FILLS:
            self.ledger.own(tensors_in(call.args[0]), Category.COMMUNICATION)
        if not self.device.imagined:
            return call.run()
        self._exchange_values(name, call.args)
        return finished(call.func, call.args)

    def _exchange_values(self, name: str, args: Any) -> None:
        """State what is received, where what is sent has a value: the other ranks route as this one does."""
        if self.values is None or name != "all_gather":
            return
        (output, *_), (own, *_) = tensors_in(args[0]), tensors_in(args[1])
        value = self.values.of(own)
        if value is not None and output.numel() % own.numel() == 0:
            repeated = value.reshape(-1).repeat(output.numel() // own.numel())
            self.values.state(output, repeated.view(output.shape))


def finished(func: Any, args: Any) -> Any:
    """Return what a collective returns that is done at once, its tensors unchanged."""
    from torch._C._distributed_c10d import FakeWork

    results = []
    for value in func._schema.returns:
        tensors = next(arg for arg in args if isinstance(arg, list | tuple | Tensor))
        results.append(FakeWork().boxed() if "Work" in str(value.type) else tensors)
    return results[0] if len(results) == 1 else tuple(results)


def tensors_of(values: Sequence[Any]) -> list[Tensor]:
    """Return the tensors among arguments or results, and in lists among them."""
    tensors = []
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, list | tuple):
            tensors += [item for item in value if isinstance(item, Tensor)]
    return tensors


def on_device(call: Call) -> Call:
    """Return a call with all its tensors on the imagined device."""

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(META)
        if isinstance(value, list | tuple):
            return type(value)(map(moved, value))
        return value

    kwargs = {name: moved(value) for name, value in call.kwargs.items()}
    return Call(call.kind, call.func, moved(call.args), kwargs)


def asks(call: Call) -> bool:
    """Return whether the host asks for the content of a tensor on the device."""
    if call.name == ITEM or call.name in SHAPED_BY_CONTENT:
        return True
    if call.name == "aten::index":
        return any(index is not None and index.dtype == torch.bool for index in call.args[1])
    if call.name == "aten::copy_":
        return not call.args[0].is_meta
    return call.name in COPIES and call.kwargs.get("device") == CPU


def place() -> str:
    """Return the line of ours, or of Megatron-core, that runs now, as `file:line function`."""
    for frame in reversed(traceback.extract_stack()):
        name = frame.filename
        ours = name.startswith(str(ROOT)) and "/.venv/" not in name
        if ("/megatron/" in name or ours) and not any(quiet in name for quiet in QUIET):
            short = name.split("site-packages/")[-1].removeprefix(f"{ROOT}/")
            return f"{short.removeprefix('.link/visionloom/')}:{frame.lineno} {frame.name}"
    return "elsewhere"
