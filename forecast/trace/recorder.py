"""Record every operation of a step on the device: launches, memory, collectives, waits of the host.

What is the device, and what an operation does there, imagined.py and real.py say: the same records are made of an imagined
rank and of a real one.
"""

import traceback
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from visionloom.common.pulse import OTHER
from visionloom.forecast.trace.axes import NAMES, Axes, group_in, moved_bytes
from visionloom.forecast.trace.events import (
    Category,
    Collective,
    Direction,
    FlightMark,
    Kernel,
    Mixed,
    Operation,
    Slot,
    SlotKind,
    SlotMemory,
    Wait,
)
from visionloom.forecast.trace.memory import Ledger
from visionloom.forecast.trace.operations import (
    Call,
    Cost,
    cost_of,
    dtype_of,
    kind_of,
    size_of,
    tensors_in,
)
from visionloom.parallel.parts import PREFIX

ITEM: Final = "aten::_local_scalar_dense"
COPIES: Final = {"aten::_to_copy", "aten::copy_", "aten::clone"}
SHAPED_BY_CONTENT: Final = {
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::repeat_interleave",
}
"""Operations whose result has a size that only the device knows: the host waits for it."""
SHAPE: Final = "shape that depends on content"
CHECKPOINT: Final = "CheckpointFunctionBackward"
FILLS: Final = {"all_gather", "reduce_scatter", "all_to_all", "receive"}
"""Collectives that fill a tensor of their own."""
ROOT: Final = Path(__file__).resolve().parents[2]
QUIET: Final = ("/parallel/stand_in.py", "/forecast/trace/")
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
    marks: list[FlightMark] = field(default_factory=list)
    launched: Counter[Operation] = field(default_factory=Counter)
    """Since the last mark, as the next one."""
    awaited: Counter[Collective] = field(default_factory=Counter)

    def mark(self, flight: int, begins: Collective | None = None) -> None:
        """Note that a collective begins to run beside computation, or that the device waits for it."""
        launched, awaited = tuple(self.launched.items()), tuple(self.awaited.items())
        self.marks.append(FlightMark(launched, awaited, flight, begins))
        self.launched.clear()
        self.awaited.clear()

    def closed(self, after: SlotMemory) -> Slot:
        """Return the slot, which has ended."""
        if self.marks:
            self.mark(-1)
        operations, collectives = tuple(self.operations.items()), tuple(self.collectives.items())
        place = self.kind, self.chunk, self.micro_batch
        return Slot(*place, operations, collectives, after, tuple(self.marks))


class Recorder(TorchDispatchMode):
    """Sees each operation of this process; `start` begins a step, `slot` a stretch of it, `finish` ends it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.axes: Axes | None = None
        self.ledger = Ledger()
        self.slots: list[Slot] = []
        self.waits: Counter[tuple[str, str, bool]] = Counter()
        self.mixed: Counter[tuple[str, str]] = Counter()
        self.recomputing = 0
        """Calls of modules that a backward pass has begun and that have not ended."""
        self._open: _OpenSlot | None = None
        self._flights = 0
        """Collectives that have begun."""
        self._begun: Collective | None = None
        """The last of them, while nothing has followed it."""
        self._ranges: list[tuple[str, bool]] = []
        """Ranges that are open: the part of the step, and whether a backward pass has opened it."""
        self._starts: list[int] = [0]
        self._parts: list[str] = [OTHER]
        """From which sequence number of autograd's nodes on they belong to which part."""

    # ---- what a device is

    def holds(self, tensor: Tensor) -> bool:
        """Return whether a tensor is on the device."""
        raise NotImplementedError

    def operation(self, call: Call, inputs: list[Tensor], hosts: list[Tensor]) -> Any:
        """Run an operation and record it; `inputs`: its tensors on the device, `hosts`: others."""
        raise NotImplementedError

    def send(self, name: str, call: Call) -> Any:
        """Run a collective that has been recorded."""
        raise NotImplementedError

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
        self._take_off()
        highest = self.ledger.next_slot(len(self.slots) + 1)
        memory = SlotMemory(opened.before, highest, self.ledger.bytes)
        self.slots.append(opened.closed(memory))

    # ---- where an operation belongs

    def _place(self) -> tuple[str, Direction]:
        """Return the part of the step and the direction of what runs now."""
        node = torch._C._current_autograd_node()
        if node is None:
            return (self._ranges[-1][0] if self._ranges else OTHER), Direction.FORWARD
        part = self._parts[bisect_right(self._starts, node._sequence_nr()) - 1]
        # torch's and Megatron-core's checkpoints run the forward pass again inside a node of their own.
        if not self.recomputing and node.name() != CHECKPOINT:
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

        inputs: list[Tensor] = []
        hosts: list[Tensor] = []
        for tensor in tensors_in((*args, *call.kwargs.values())):
            (inputs if self.holds(tensor) else hosts).append(tensor)
        return self.operation(call, inputs, hosts)

    def _range(self, call: Call) -> Any:
        """Follow the ranges that torch's profiler is told of."""
        if call.name == "profiler::_record_function_exit":
            self._exit()
        else:
            self._enter(str(call.args[0]))
        return call.run()

    def record(
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
        if crosses:
            # On the device it is only read or only written.
            cost = Cost(Kernel.TRANSFER, 0.0, 0.0, sum(map(size_of, outputs or inputs)))
        else:
            cost = cost_of(call, inputs, outputs)
        operation = Operation(
            name,
            part,
            direction,
            cost.kernel,
            dtype_of(inputs, outputs),
            cost.flops,
            cost.work,
            cost.bytes,
        )
        self._take_off()
        self._open.operations[operation] += 1
        self._open.launched[operation] += 1

    def wait(self, kind: str) -> None:
        """Record that the host waits for the device."""
        if self._open is not None:
            inside = self._open.kind in (SlotKind.FORWARD, SlotKind.BACKWARD)
            self.waits[kind, place(), inside] += 1

    def mixes(self, name: str) -> None:
        """Record an operation with tensors of both sides."""
        self.mixed[name, place()] += 1

    def synchronized(self) -> None:
        """Record that the host waits for a stream or an event."""
        self.wait("synchronize")

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
        """Record a collective of tensors on the device."""
        values = (*call.args, *call.kwargs.values())
        if not any(map(self.holds, tensors_in(values))):
            return call.run()
        operator = call.name.removeprefix("c10d::")
        name = NAMES.get(operator, operator)
        part, direction = self._place()
        if self._open is not None and self.axes is not None:
            axis = self.axes.name(group_in(values))
            moved = moved_bytes(values)
            collective = Collective(name, axis, part, direction, moved)
            self._open.collectives[collective] += 1
            self._take_off()
            self._flights += 1
            self._begun = collective
        if name in FILLS:
            self.ledger.own(tensors_in(call.args[0]), Category.COMMUNICATION)
        return self.send(name, call)

    def _take_off(self) -> None:
        """Note that the collective which began last was not waited for before anything else."""
        if self._begun is not None and self._open is not None:
            self._open.mark(self._flights, self._begun)
        self._begun = None

    def land(self, flight: int) -> None:
        """Record that the device waits for a collective, by its number."""
        if self._open is None:
            return
        if flight == self._flights and self._begun is not None:
            self._open.awaited[self._begun] += 1
            self._begun = None
        else:
            self._open.mark(flight)


def place() -> str:
    """Return the line of ours, or of Megatron-core, that runs now, as `file:line function`."""
    for frame in reversed(traceback.extract_stack()):
        name = frame.filename
        ours = name.startswith(str(ROOT)) and "/.venv/" not in name
        if ("/megatron/" in name or ours) and not any(quiet in name for quiet in QUIET):
            short = name.split("site-packages/")[-1].removeprefix(f"{ROOT}/")
            return f"{short.removeprefix('.link/visionloom/')}:{frame.lineno} {frame.name}"
    return "elsewhere"
