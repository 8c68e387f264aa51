"""What a trace holds: the operations, collectives, memory and waits of one rank in one optimizer step.

A step is a list of slots in the order of time: what comes before the first micro-batch, a forward or backward pass of one
micro-batch through one part of the model, what comes between two passes, and what comes after the last.
"""

from dataclasses import dataclass, field
from enum import StrEnum


class SlotKind(StrEnum):
    """What a slot of a step is."""

    BEGIN = "begin"
    """Before the first pass."""
    FORWARD = "forward"
    BACKWARD = "backward"
    BETWEEN = "between"
    """Between two passes: messages of the pipeline."""
    END = "end"
    """After the last pass: reduction of gradients, optimizer."""


class Direction(StrEnum):
    """Of an operation inside a slot: a backward pass holds recomputed forward operations too."""

    FORWARD = "forward"
    RECOMPUTE = "recompute"
    BACKWARD = "backward"


class Kernel(StrEnum):
    """Of an operation, by what bounds its time."""

    PRODUCT = "product"
    """A matrix product."""
    ATTENTION = "attention"
    TRANSFER = "transfer"
    """A copy between host and device."""
    OTHER = "other"
    """Elementwise operations, copies, reductions: moves bytes."""


class Category(StrEnum):
    """Of memory, by what it is for."""

    WEIGHTS = "weights"
    GRADIENTS = "gradients"
    OPTIMIZER = "optimizer"
    ACTIVATIONS = "activations"
    LOGITS = "logits"
    COMMUNICATION = "communication"
    TEMPORARY = "temporary"


@dataclass(frozen=True, slots=True)
class Operation:
    """One kind of kernel launch: all launches of the same work in the same part of the model."""

    name: str
    """As torch's dispatcher calls it, for example `aten::mm`."""
    part: str
    """Part of the step, a name of parallel/parts.py."""
    direction: Direction
    kernel: Kernel
    dtype: str
    """Of its largest input: bf16, fp32, fp64, int64, ..."""
    flops: float
    """Of one launch, as the model's arithmetic needs them: a causal score matrix counts half."""
    work: float
    """Of one launch, as the kernel executes them: attention's backward pass makes the scores again."""
    bytes: int
    """Of one launch: read and written, or sent between host and device."""


@dataclass(frozen=True, slots=True)
class Collective:
    """One kind of collective or message."""

    name: str
    """all_reduce, all_gather, reduce_scatter, all_to_all, broadcast, send or receive."""
    axis: str
    """Whose ranks take part: a key of RankTrace.groups."""
    part: str
    direction: Direction
    bytes: int
    """Of one call on this rank: all that is gathered, reduced, scattered, exchanged or sent."""


@dataclass(frozen=True, slots=True)
class FlightMark:
    """A moment of a slot at which a collective begins to run beside computation, or at which the device waits for one."""

    operations: tuple[tuple[Operation, int], ...]
    """Launches since the mark before, or since the slot's begin."""
    collectives: tuple[tuple[Collective, int], ...]
    """Those since then that the device has waited for at once."""
    flight: int = -1
    """Number of the collective in the step; -1 at the end of a slot."""
    begins: Collective | None = None
    """The collective that begins; None: the device waits for it."""


@dataclass(frozen=True, slots=True)
class SlotMemory:
    """Bytes alive on the device around a slot."""

    before: int
    peak: int
    after: int


@dataclass(frozen=True, slots=True)
class Slot:
    """A stretch of a step."""

    kind: SlotKind
    chunk: int
    """Part of the model on this stage that passes; -1 where none does."""
    micro_batch: int
    """Its number in the step; -1 where none passes."""
    operations: tuple[tuple[Operation, int], ...]
    """Kinds of launches and how often each was launched."""
    collectives: tuple[tuple[Collective, int], ...]
    memory: SlotMemory
    marks: tuple[FlightMark, ...] = field(default=(), compare=False)
    """In order, up to the end of the slot; none where no collective runs beside computation."""


@dataclass(frozen=True, slots=True)
class Wait:
    """A line that lets the host wait for the device."""

    kind: str
    """item, copy to the host, copy to the device, data-dependent shape, synchronize."""
    place: str
    """file:line function."""
    count: int
    """In a step, of which a trace has only its own micro-batches."""
    per_micro_batch: bool
    """The line is passed in each micro-batch."""


@dataclass(frozen=True, slots=True)
class Mixed:
    """An operation with tensors of the host and of the device, which is an error on a GPU."""

    name: str
    place: str
    count: int


@dataclass(frozen=True, slots=True)
class AliveTensors:
    """Tensors of one origin that were alive at the peak."""

    category: Category
    part: str
    name: str
    """The operation that made them."""
    bytes: int
    count: int


@dataclass(frozen=True, slots=True)
class PeakMemory:
    """The fullest moment of a step."""

    bytes: int
    by_category: dict[Category, int]
    alive: tuple[AliveTensors, ...]
    """The largest origins first."""
    slot: int
    """In which slot it was."""


@dataclass(frozen=True)
class RankTrace:
    """One optimizer step of one rank."""

    rank: int
    world_size: int
    stage: int
    micro_batches: int
    """In the traced step; those of the run repeat them."""
    groups: dict[str, tuple[int, ...]]
    """Ranks of the whole run that this rank meets in collectives, by axis."""
    slots: tuple[Slot, ...]
    waits: tuple[Wait, ...]
    mixed: tuple[Mixed, ...]
    allocated: int
    """Bytes that were taken in the step, all allocations together."""
    at_rest: dict[Category, int]
    """Bytes alive between steps: weights, gradients, optimizer."""
    peak: PeakMemory
