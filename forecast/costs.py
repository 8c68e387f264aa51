"""Seconds of operations, collectives and messages on a machine.

An operation takes the longest of its arithmetic, its bytes and a kernel's start. Collectives follow NCCL's own model
(src/graph/tuning.cc): a start, the steps of a ring or a tree, and bytes by the bus bandwidth, with the factors of nccl-tests
(doc/PERFORMANCE.md). Reduction inside a switch (NVLink SHARP), which only all_reduce on more than four ranks of a node has,
is left out. Imports no torch.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from visionloom.forecast.machine import Machine
from visionloom.forecast.trace.events import (
    Collective,
    Direction,
    FlightMark,
    Kernel,
    Operation,
    Slot,
)

MESSAGES: Final = ("send", "receive")
"""Collectives from one stage to the next: the schedule says when they take time."""
RING_ROUNDS: Final = {
    "all_reduce": 2,
    "barrier": 2,
    "all_gather": 1,
    "reduce_scatter": 1,
    "broadcast": 1,
    "reduce": 1,
}
"""Times that the steps of a ring pass all its ranks."""
TO_OR_FROM_ONE: Final = ("broadcast", "reduce")
"""Collectives that move all bytes through each link; the others move all but a rank's own."""
TREE_SHARE: Final = 0.9
"""Bus bandwidth of a tree next to a ring's, in NCCL's own model."""


def operation_seconds(operation: Operation, machine: Machine) -> float:
    """Return the seconds of one launch on the device."""
    peak = machine.bf16_tflops if operation.dtype == "bf16" else machine.fp32_tflops
    arithmetic = 0.0
    if operation.kernel is Kernel.PRODUCT:
        rate = peak * 1e12 * machine.product_share
        arithmetic = operation.work / rate + machine.product_start
    elif operation.kernel is Kernel.ATTENTION:
        backward = operation.direction is Direction.BACKWARD
        forward_share, share = machine.attention_forward_share, machine.attention_backward_share
        arithmetic = operation.work / (peak * 1e12 * (share if backward else forward_share))

    if operation.kernel is Kernel.TRANSFER:
        moved = operation.bytes / (machine.host_gbps * 1e9)
    else:
        moved = operation.bytes / (machine.memory_gbps * 1e9 * machine.memory_share)
    return max(arithmetic, moved, machine.kernel_start)


@dataclass(frozen=True)
class Links:
    """The links between the ranks of a group."""

    ranks: int
    nodes: int
    per_node: int
    """Ranks on the node that has the fewest, which has the fewest adapters as well."""

    @classmethod
    def between(cls, ranks: Sequence[int], machine: Machine) -> "Links":
        """Return those of a group."""
        nodes = Counter(machine.node(rank) for rank in ranks)
        return cls(len(ranks), len(nodes), min(nodes.values()))

    def bus_bandwidth(self, machine: Machine) -> float:
        """Return the bytes a second of the slowest link of the rings through all ranks.

        A ring leaves a node by one adapter. With several ranks on it there are as many rings, each by another adapter.
        """
        inside, adapter = machine.inside_gbps * 1e9, machine.between_gbps * 1e9
        if self.nodes == 1:
            return inside
        if self.per_node == 1:
            return adapter
        return min(inside, self.per_node * adapter)

    def ring_seconds(self, name: str, size: int, machine: Machine) -> float:
        """Return the seconds of a collective by rings."""
        steps, far = self.ranks - 1, self.nodes - 1
        latency = (steps - far) * machine.inside_hop + far * machine.between_hop
        share = 1.0 if name in TO_OR_FROM_ONE else steps / self.ranks
        return RING_ROUNDS[name] * (latency + size * share / self.bus_bandwidth(machine))

    def tree_seconds(self, size: int, machine: Machine) -> float:
        """Return the seconds of an all_reduce by NCCL's trees: a chain in each node, a binary tree of nodes."""
        chain = math.ceil(self.ranks / self.nodes) - 1
        latency = chain * machine.inside_hop + math.log2(self.nodes) * machine.between_hop
        # To the root and back.
        return 2 * (latency + size / (self.bus_bandwidth(machine) * TREE_SHARE))

    def exchange_seconds(self, size: int, machine: Machine) -> float:
        """Return the seconds in which every rank sends each other one its part of `size` bytes."""
        per_node = self.ranks / self.nodes
        near = size * (per_node - 1) / self.ranks / (machine.inside_gbps * 1e9)
        far = size * (self.ranks - per_node) / self.ranks / (machine.between_gbps * 1e9)
        near_peers = math.ceil(per_node) - 1
        far_peers = self.ranks - 1 - near_peers
        latency = near_peers * machine.inside_hop + far_peers * machine.between_hop
        # NVLink and the adapter work at the same time.
        return latency + max(near, far)


def collective_seconds(collective: Collective, ranks: Sequence[int], machine: Machine) -> float:
    """Return the seconds of one call among `ranks`; 0 where there is only one."""
    if len(ranks) == 1:
        return 0.0
    name, size = collective.name, collective.bytes
    links = Links.between(ranks, machine)
    if name == "all_to_all":
        seconds = links.exchange_seconds(size, machine)
    else:
        seconds = links.ring_seconds(name, size, machine)
    if name == "all_reduce":
        seconds = min(seconds, links.tree_seconds(size, machine))
    return machine.collective_start + seconds


def message_seconds(size: int, sender: int, receiver: int, machine: Machine) -> float:
    """Return the seconds of `size` bytes from one rank to another."""
    if machine.node(sender) == machine.node(receiver):
        bandwidth, hop = machine.inside_gbps, machine.inside_hop
    else:
        bandwidth, hop = machine.between_gbps, machine.between_hop
    return machine.collective_start + hop + size / (bandwidth * 1e9)


@dataclass(frozen=True)
class TimedMark:
    """A FlightMark on a machine; collectives by axis with their seconds."""

    work: float
    """Seconds of the operations before it."""
    awaited: tuple[tuple[str, float], ...]
    flight: int
    begins: tuple[str, float] | None


@dataclass(frozen=True)
class Work:
    """A stretch of a step on a machine; messages of the pipeline take no time in it."""

    parts: dict[str, float]
    """Seconds of operations on the device, by part of the step."""
    launches: int
    launch_seconds: float
    """Of one on the host: a stretch takes as long as its launches at least."""
    marks: tuple[TimedMark, ...]

    @classmethod
    def of(
        cls, slots: Sequence[Slot], groups: Mapping[str, Sequence[int]], machine: Machine
    ) -> "Work":
        """Return that of slots which follow each other; `groups`: ranks by axis, as in RankTrace."""
        parts: dict[str, float] = defaultdict(float)
        launches = 0
        for operation, count in operations_of(slots):
            parts[operation.part] += count * operation_seconds(operation, machine)
            launches += count
        launches += sum(count for _, count in collectives_of(slots))

        def timed(collective: Collective, count: int = 1) -> list[tuple[str, float]]:
            ranks = groups[collective.axis]
            if collective.name in MESSAGES or len(ranks) == 1:
                return []
            return [(collective.axis, collective_seconds(collective, ranks, machine))] * count

        marks = []
        for slot in slots:
            for mark in slot.marks or (FlightMark(slot.operations, slot.collectives),):
                work = sum(
                    count * operation_seconds(each, machine) for each, count in mark.operations
                )
                awaited = [one for call in mark.collectives for one in timed(*call)]
                begins = timed(mark.begins) if mark.begins is not None else []
                marks.append(
                    TimedMark(work, tuple(awaited), mark.flight, begins[0] if begins else None)
                )
        return cls(dict(parts), launches, machine.launch, tuple(marks))

    @property
    def begun(self) -> dict[int, TimedMark]:
        """Return the marks at which collectives begin, by the collectives' numbers."""
        return {mark.flight: mark for mark in self.marks if mark.begins is not None}

    def beginning(self, numbers: Container[int], first: Iterable[TimedMark] = ()) -> "Work":
        """Return the stretch with the collectives of these numbers only, after those that begin at its `first` marks."""
        marks = [replace(mark, work=0.0, awaited=()) for mark in first]
        for mark in self.marks:
            begins = mark.begins if mark.flight in numbers else None
            marks.append(replace(mark, begins=begins))
        begun = sum(mark.begins is not None for mark in marks)
        launches = self.launches - len(self.begun) + begun
        return replace(self, launches=launches, marks=tuple(marks))


@dataclass
class Streams:
    """What runs at once on a rank while a step is played: computation, and the collectives of each axis one after the other.

    Collectives of different axes run side by side, and none slows computation: a real GPU's share its memory, its links and
    some of its multiprocessors. They also run while the rank stands still because another stage has not sent yet.
    """

    now: float = 0.0
    """Seconds since the step's begin."""
    communication: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Seconds in which the device only waited for collectives, by axis."""
    waits_for_host: float = 0.0
    """Seconds by which the host was slower with its launches than the device with its work."""
    _ends: dict[str, float] = field(default_factory=dict)
    """When the last collective of an axis is done."""
    _flights: dict[int, tuple[str, float]] = field(default_factory=dict)
    """Axis and end of the collectives that nobody has waited for yet, by number."""

    def run(self, work: Work, clock: float = 0.0) -> float:
        """Let a stretch pass at `clock`, or once the one before is done; return when it is done."""
        begin = self.now = max(self.now, clock)
        for mark in work.marks:
            self.now += mark.work
            for axis, seconds in mark.awaited:
                self._wait(axis, self._begin(axis, seconds))
            if mark.begins is not None:
                axis, seconds = mark.begins
                self._flights[mark.flight] = axis, self._begin(axis, seconds)
            elif mark.flight in self._flights:
                self._wait(*self._flights.pop(mark.flight))

        # The host runs ahead of the device, so that only all launches together can be too slow.
        late = max(0.0, begin + work.launches * work.launch_seconds - self.now)
        self.waits_for_host += late
        self.now += late
        return self.now

    def _begin(self, axis: str, seconds: float) -> float:
        """Begin a collective once the one before on its axis is done; return when it ends itself."""
        end = max(self.now, self._ends.get(axis, 0.0)) + seconds
        self._ends[axis] = end
        return end

    def _wait(self, axis: str, end: float) -> None:
        """Wait until a collective of an axis has ended."""
        waited = max(0.0, end - self.now)
        self.communication[axis] += waited
        self.now += waited


def operations_of(slots: Iterable[Slot]) -> Iterator[tuple[Operation, int]]:
    """Yield the operations of slots with their counts."""
    for slot in slots:
        yield from slot.operations


def collectives_of(slots: Iterable[Slot]) -> Iterator[tuple[Collective, int]]:
    """Yield the collectives and messages of slots with their counts."""
    for slot in slots:
        yield from slot.collectives
