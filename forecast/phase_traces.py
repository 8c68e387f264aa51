"""What a forecast is made from: the traces of a phase, one of each kind of rank, and what of the phase is not in them."""

from dataclasses import dataclass

from visionloom.forecast.kinds import RankKind
from visionloom.forecast.trace.events import RankTrace
from visionloom.parallel.config import ParallelConfig


@dataclass(frozen=True)
class TracedKind:
    """A kind of rank with the trace of its first rank."""

    kind: RankKind
    trace: RankTrace
    """Its micro-batches may be fewer than those of a step."""


@dataclass(frozen=True)
class PhaseTraces:
    """A phase on one layout."""

    phase: str
    layout: ParallelConfig
    world_size: int
    sequence_length: int
    packs: str
    """Which packs were traced, in words."""
    kinds: tuple[TracedKind, ...]
    """At least one of each stage."""
    micro_batches: int
    """Of a data rank in a step."""
    micro_batch: int
    """Packs of a micro-batch."""
    steps: int
    flops: float
    """Operations that the model needs for a step of all ranks: real tokens, no recomputation (model/flops.py)."""
    tokens: float
    """Real tokens of a step of all ranks."""
