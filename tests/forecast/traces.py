"""Small traces that are written by hand: their times and bytes can be added up in the head."""

from dataclasses import replace

from visionloom.forecast.kinds import RankKind
from visionloom.forecast.machine import Machine, machine
from visionloom.forecast.phase_traces import PhaseTraces, TracedKind
from visionloom.forecast.schedule import Pass, Pipeline
from visionloom.forecast.trace.events import (
    AliveTensors,
    Category,
    Collective,
    Direction,
    Kernel,
    Operation,
    PeakMemory,
    RankTrace,
    Slot,
    SlotKind,
    SlotMemory,
)
from visionloom.parallel.config import ParallelConfig
from visionloom.parallel.parts import LANGUAGE, OPTIMIZER, REDUCTION

MIB = 1 << 20
HELD, SAVED, INSIDE = 1000 * MIB, 100 * MIB, 30 * MIB
"""Bytes between steps, saved by a forward pass, and more of it at the fullest moment inside a pass."""


def moving(seconds: float, gpu: Machine, part: str = LANGUAGE) -> Operation:
    """An operation that takes these seconds on a GPU, for its bytes."""
    size = round(seconds * gpu.memory_gbps * 1e9 * gpu.memory_share)
    return Operation("aten::copy_", part, Direction.FORWARD, Kernel.OTHER, "bf16", 0.0, 0.0, size)


def product(flops: float, direction: Direction) -> Operation:
    """A matrix product."""
    return Operation("aten::mm", LANGUAGE, direction, Kernel.PRODUCT, "bf16", flops, flops, 0)


def collective(name: str, axis: str, size: int, part: str = LANGUAGE) -> tuple[Collective, int]:
    """One call."""
    return Collective(name, axis, part, Direction.FORWARD, size), 1


class TraceWriter:
    """Writes the slots of a step one after the other."""

    def __init__(self, pipeline: Pipeline, stage: int, gpu: str = "h100") -> None:
        self.pipeline, self.stage, self.gpu = pipeline, stage, machine(gpu)
        self.level = self.peak = HELD
        self.slots: list[Slot] = []

    def add(
        self,
        one: Pass | SlotKind,
        seconds: float,
        collectives: tuple[tuple[Collective, int], ...] = (),
        part: str = LANGUAGE,
    ) -> None:
        """Add a slot with one operation of these seconds; passes save activations and free them."""
        change = {SlotKind.FORWARD: SAVED, SlotKind.BACKWARD: -SAVED}
        kind, chunk, number = one if isinstance(one, Pass) else (one, -1, -1)
        kept = change.get(kind, 0)
        memory = SlotMemory(self.level, self.level + max(kept, 0) + INSIDE, self.level + kept)
        self.level = memory.after
        self.peak = max(self.peak, memory.peak)
        operations = ((moving(seconds, self.gpu, part), 1),)
        self.slots.append(Slot(kind, chunk, number, operations, collectives, memory))

    def change(self, kept: int) -> None:
        """Add a slot between passes that takes or releases memory."""
        memory = SlotMemory(self.level, max(self.level, self.level + kept), self.level + kept)
        self.level = memory.after
        self.peak = max(self.peak, memory.peak)
        self.slots.append(Slot(SlotKind.BETWEEN, -1, -1, (), (), memory))

    def trace(self, ranks: int = 1) -> RankTrace:
        """The step that was written, of the first rank of the stage; `ranks`: of a stage."""
        rank = self.stage * ranks
        stages = self.pipeline.stages
        alive = AliveTensors(Category.WEIGHTS, LANGUAGE, "parameters", HELD, 1)
        rest = {Category.WEIGHTS: HELD, Category.ACTIVATIONS: self.peak - HELD}
        return RankTrace(
            rank=rank,
            world_size=stages * ranks,
            stage=self.stage,
            micro_batches=self.pipeline.micro_batches,
            groups={
                "tensor": tuple(range(rank, rank + ranks)),
                "data": tuple(range(rank, rank + ranks)),
                "pipeline": tuple(range(rank % ranks, stages * ranks, ranks)),
            },
            slots=tuple(self.slots),
            waits=(),
            mixed=(),
            allocated=0,
            at_rest={Category.WEIGHTS: HELD},
            peak=PeakMemory(self.peak, rest, (alive,), 0),
        )


def one_step(
    pipeline: Pipeline,
    stage: int = 0,
    forward: float = 1.0,
    backward: float = 2.0,
    end: tuple[tuple[Collective, int], ...] = (),
    ranks: int = 1,
) -> RankTrace:
    """A step whose passes take these seconds each, with 0.25 s before and 0.5 s after them."""
    writer = TraceWriter(pipeline, stage)
    writer.add(SlotKind.BEGIN, 0.25)
    seconds = {SlotKind.FORWARD: forward, SlotKind.BACKWARD: backward}
    for each in pipeline.passes(stage):
        writer.add(each, seconds[each.kind])
    writer.add(SlotKind.END, 0.5, end, OPTIMIZER)
    return writer.trace(ranks)


def receiving_step(pipeline: Pipeline, stage: int, received: int) -> RankTrace:
    """A step that takes this many bytes before each pass, and releases both after a backward pass, before the next one."""
    writer = TraceWriter(pipeline, stage)
    writer.add(SlotKind.BEGIN, 0.25)
    late = 0
    for each in pipeline.passes(stage):
        writer.change(received - late)
        writer.add(each, 1.0)
        late = 2 * received if each.kind is SlotKind.BACKWARD else 0
    writer.change(-late)
    writer.add(SlotKind.END, 0.5)
    return writer.trace()


def traced_kind(trace: RankTrace, stages: tuple[int, ...] = ()) -> TracedKind:
    """A kind of one rank on each of its stages; by default that of the trace."""
    stages = stages or (trace.stage,)
    descriptions = tuple(f"rank {trace.rank + stage - trace.stage}" for stage in stages)
    kind = RankKind(trace.rank, len(stages), stages, descriptions)
    return TracedKind(kind, trace)


def phase(
    *traces: RankTrace,
    micro_batches: int,
    layout: ParallelConfig | None = None,
) -> PhaseTraces:
    """A phase of these kinds of rank, one rank each."""
    kinds = tuple(traced_kind(trace) for trace in traces)
    return PhaseTraces(
        phase="align",
        layout=layout or ParallelConfig(pipeline=len(traces)),
        world_size=len(traces),
        sequence_length=8192,
        packs="the mean of the plan",
        kinds=kinds,
        micro_batches=micro_batches,
        micro_batch=1,
        steps=100,
        flops=1e15,
        tokens=8000.0,
    )


def reduction(size: int) -> tuple[tuple[Collective, int], ...]:
    """Collectives after the last pass: gradients are scattered, weights gathered."""
    return (
        collective("reduce_scatter", "data", 2 * size, REDUCTION),
        collective("all_gather", "data", size, OPTIMIZER),
    )


def with_messages(trace: RankTrace, size: int) -> RankTrace:
    """The same step with a message before each pass."""
    slots = []
    for slot in trace.slots:
        if slot.kind in (SlotKind.FORWARD, SlotKind.BACKWARD):
            level = slot.memory.before
            sent = (collective("send", "pipeline", size),)
            memory = SlotMemory(level, level, level)
            slots.append(Slot(SlotKind.BETWEEN, -1, -1, (), sent, memory))
        slots.append(slot)
    return replace(trace, slots=tuple(slots))
