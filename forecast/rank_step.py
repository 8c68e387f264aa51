"""A rank's step with all its micro-batches, from a trace with a few of them: the later ones repeat those that were traced."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

from visionloom.forecast.costs import (
    MESSAGES,
    Streams,
    Work,
    collectives_of,
    message_seconds,
    operations_of,
)
from visionloom.forecast.machine import Machine
from visionloom.forecast.phase_traces import TracedKind
from visionloom.forecast.results import COMMUNICATION, HOST
from visionloom.forecast.schedule import Pass, Pipeline
from visionloom.forecast.trace.events import (
    AliveTensors,
    Category,
    Collective,
    Direction,
    Kernel,
    PeakMemory,
    RankTrace,
    Slot,
    SlotKind,
    Wait,
)


@dataclass(frozen=True)
class _Stretch:
    """A traced pass with what comes between it and the one before, or what is before or after all passes."""

    slots: tuple[Slot, ...]
    before: int
    """Bytes alive at its begin."""

    @property
    def rises(self) -> int:
        """Return the bytes by which its fullest moment is above its begin."""
        return max(slot.memory.peak for slot in self.slots) - self.before

    @property
    def leaves(self) -> int:
        """Return the bytes that stay after it."""
        return self.slots[-1].memory.after - self.before


@dataclass(frozen=True)
class RankStep:
    """One step of a kind of rank, on one of its stages, on a machine."""

    traced: TracedKind
    stage: int
    """Stages that hold as much share a trace; how many micro-batches each keeps follows from its number."""
    pipeline: Pipeline
    machine: Machine

    @property
    def rank(self) -> int:
        """Return the first rank of the kind on the stage."""
        per_stage = self.trace.world_size // self.pipeline.stages
        return self.trace.rank + (self.stage - self.trace.stage) * per_stage

    @property
    def trace(self) -> RankTrace:
        """Return the trace, perhaps of a rank of another stage."""
        return self.traced.trace

    @cached_property
    def _stretches(self) -> dict[Pass | SlotKind, _Stretch]:
        """Return what was traced, by pass; BEGIN and END by their kind."""
        stretches: dict[Pass | SlotKind, _Stretch] = {}
        slots: list[Slot] = []
        level = self.trace.slots[0].memory.before
        for slot in self.trace.slots:
            slots.append(slot)
            if slot.kind is SlotKind.BETWEEN:
                continue
            one = Pass(slot.kind, slot.chunk, slot.micro_batch) if slot.chunk >= 0 else slot.kind
            stretches[one] = _Stretch(tuple(slots), level)
            level = slot.memory.after
            slots = []
        assert not slots  # a step ends with its optimizer
        return stretches

    def traced_pass(self, one_pass: Pass) -> Pass:
        """Return the traced pass that a pass of the step is like."""
        traced, number = self.trace.micro_batches, one_pass.micro_batch
        if number == self.pipeline.micro_batches - 1:
            number = traced - 1
        else:
            # The first may warm something up, and the last may reduce gradients: those between are alike.
            middle = max(traced - 2, min(1, traced - 1))
            number = min(number, middle)
        return one_pass._replace(micro_batch=number)

    @cached_property
    def _work(self) -> dict[Pass | SlotKind, Work]:
        """Return what was traced on the machine."""
        return {
            one: Work.of(stretch.slots, self.trace.groups, self.machine)
            for one, stretch in self._stretches.items()
        }

    @cached_property
    def _reductions(self) -> frozenset[int]:
        """Return the numbers of the collectives that are waited for after all passes."""
        return frozenset(mark.flight for mark in self._work[SlotKind.END].marks)

    @cached_property
    def work(self) -> dict[Pass | SlotKind, Work]:
        """Return each pass of the step on the machine, and what is before and after all of them."""
        work: dict[Pass | SlotKind, Work] = {}
        for kind in (SlotKind.BEGIN, SlotKind.END):
            work[kind] = self._work[kind]
        not_traced = self.pipeline.micro_batches - self.trace.micro_batches
        made: dict[tuple[Pass, bool, Pass | None], Work] = {}
        for one in self.pipeline.passes(self.stage):
            like, after = self.traced_pass(one), one.micro_batch - not_traced
            from_end = one._replace(micro_batch=after) if after >= 0 else None
            key = like, like == one, from_end
            if key not in made:
                made[key] = self._beginning(*key)
            work[one] = made[key]
        return work

    def _beginning(self, like: Pass, is_traced: bool, from_end: Pass | None) -> Work:
        """Return a pass that begins the collectives which others wait for where a traced one of the same place does.

        Args:
            like: the traced pass whose operations it has.
            is_traced: it is as long after the step's begin as that one.
            from_end: the traced pass as long before the step's end, where gradients begin to be reduced.
        """
        work = self._work[like]
        waited = {mark.flight for mark in work.marks if mark.begins is None}
        numbers = set(work.begun) & waited
        if is_traced:
            numbers |= set(work.begun) - self._reductions
        if from_end == like:
            return work.beginning(numbers | set(work.begun) & self._reductions)
        later = self._work[from_end].begun if from_end is not None else {}
        # With several chunks they begin between two passes, which are the next one's first marks.
        first = [mark for number, mark in later.items() if number in self._reductions]
        return work.beginning(numbers, first)

    @cached_property
    def order(self) -> list[Pass | SlotKind]:
        """Return all that the rank does in a step, in order."""
        return [SlotKind.BEGIN, *self.pipeline.passes(self.stage), SlotKind.END]

    def stretches(self) -> Iterator[_Stretch]:
        """Yield the stretches of the step in order."""
        for one in self.order:
            yield self._stretches[self.traced_pass(one) if isinstance(one, Pass) else one]

    def micro_batch_seconds(self, kind: SlotKind) -> float:
        """Return the seconds of one micro-batch's forward or backward passes through all chunks."""
        number = min(1, self.pipeline.micro_batches - 1)
        chunks = range(self.pipeline.chunks)
        return sum(Streams().run(self.work[Pass(kind, chunk, number)]) for chunk in chunks)

    def message(self) -> float:
        """Return the seconds of a message to another stage; the largest that is sent counts for all."""
        messages = self.messages
        size = max((each.bytes for each in messages if each.name == "send"), default=0)
        if not size:
            return 0.0
        # With two stages Megatron-core sends one way over the group of all ranks: the smaller is the pipeline's.
        ranks = min((self.trace.groups[each.axis] for each in messages), key=len)
        following = ranks[(self.stage + 1) % len(ranks)]
        own, previous = ranks[self.stage], ranks[self.stage - 1]
        times = [message_seconds(size, own, each, self.machine) for each in (following, previous)]
        return max(times)

    @property
    def messages(self) -> list[Collective]:
        """Return the kinds of messages that are sent and received."""
        calls = [collective for collective, _ in collectives_of(self.trace.slots)]
        return [each for each in calls if each.name in MESSAGES]

    def released_later(self, one: Pass | SlotKind) -> int:
        """Return the bytes that a micro-batch which is not in the trace leaves after a backward pass.

        In a step they are released before the next pass: where the traced one was the last, that is not seen.
        """
        if not isinstance(one, Pass) or one.kind is not SlotKind.BACKWARD:
            return 0
        last_traced = self.trace.micro_batches - 1
        if not last_traced <= one.micro_batch < self.pipeline.micro_batches - 1:
            return 0
        backward = self.traced_pass(one)
        forward = backward._replace(kind=SlotKind.FORWARD)
        return self._stretches[forward].leaves + self._stretches[backward].leaves

    @cached_property
    def memory(self) -> "StepMemory":
        """Return the fullest moment of the step, with all micro-batches that are in flight."""
        level = self.trace.slots[0].memory.before
        peak = 0
        for one, stretch in zip(self.order, self.stretches(), strict=True):
            peak = max(peak, level + stretch.rises)
            level += stretch.leaves - self.released_later(one)
        return StepMemory.like(self.trace.peak, peak)

    @property
    def launches(self) -> int:
        """Return the launches of the step."""
        return sum(self.work[one].launches for one in self.order)

    @property
    def waits(self) -> tuple[Wait, ...]:
        """Return the host's waits of the step: those in micro-batches happen in each of them, and not only in the traced ones."""
        more = self.pipeline.micro_batches / self.trace.micro_batches
        waits = []
        for wait in self.trace.waits:
            count = round(wait.count * more) if wait.per_micro_batch else wait.count
            waits.append(replace(wait, count=count))
        return tuple(waits)

    @property
    def moved_bytes(self) -> int:
        """Return the bytes that the kernels of the step read and write; copies from and to the host are none."""
        moved = 0
        for stretch in self.stretches():
            for operation, count in operations_of(stretch.slots):
                if operation.kernel is not Kernel.TRANSFER:
                    moved += count * operation.bytes
        return moved

    @property
    def flops(self) -> float:
        """Return the operations of the step without those that are made again."""
        flops = 0.0
        for stretch in self.stretches():
            for operation, count in operations_of(stretch.slots):
                if operation.direction is not Direction.RECOMPUTE:
                    flops += count * operation.flops
        return flops


@dataclass
class PlayedRank:
    """A rank while its step is played."""

    step: RankStep
    streams: Streams = field(default_factory=Streams)

    def run(self, one: Pass | SlotKind, clock: float) -> float:
        """Let a pass begin at `clock`; return when it is done."""
        return self.streams.run(self.step.work[one], clock)

    @property
    def shares(self) -> dict[str, float]:
        """Return where the time went in which the rank neither waited for other stages nor sent them messages."""
        shares: dict[str, float] = defaultdict(float)
        for one in self.step.order:
            for part, seconds in self.step.work[one].parts.items():
                shares[part] += seconds
        for axis, seconds in self.streams.communication.items():
            if seconds:
                shares[axis + COMMUNICATION] = seconds
        shares[HOST] = self.streams.waits_for_host
        return dict(shares)


@dataclass(frozen=True)
class StepMemory:
    """The fullest moment of a step."""

    bytes: int
    by_category: dict[Category, int]
    """Their sum is `bytes`."""
    alive: tuple[AliveTensors, ...]
    """The largest first."""

    @classmethod
    def like(cls, traced: PeakMemory, size: int) -> "StepMemory":
        """Return a peak of `size` bytes that has more or fewer micro-batches in flight than a traced one: their activations."""
        more = size - traced.bytes
        by_category = dict(traced.by_category)
        by_category[Category.ACTIVATIONS] = by_category.get(Category.ACTIVATIONS, 0) + more
        alive = list(traced.alive)
        if more > 0:
            name = "of more micro-batches in flight"
            alive.append(AliveTensors(Category.ACTIVATIONS, "all", name, more, 1))
            alive.sort(key=lambda each: -each.bytes)
        return cls(size, by_category, tuple(alive))
