"""What is known of a run before it starts: memory and time of each kind of rank, of a step, of each phase and of the run."""

from dataclasses import dataclass
from typing import Final

from visionloom.forecast.machine import DEFAULT_ATTENTION
from visionloom.forecast.trace.events import AliveTensors, Category, Mixed, SlotKind, Wait

COMMUNICATION: Final = " communication"
"""After the name of an axis: time of its collectives that hide under nothing."""
HOST: Final = "host launches"
"""Time in which the device waits because the host launches too slowly."""
MESSAGES: Final = "pipeline messages"
"""Time in which a stage waits for messages on their way."""
BUBBLE: Final = "bubble"
"""Time in which a stage waits for the work of others."""


@dataclass(frozen=True)
class RankForecast:
    """One kind of rank, on one GPU."""

    stage: int
    rank: int
    """The first of its kind on this stage."""
    ranks: int
    """Ranks of its kind."""
    description: str
    """What sets it apart, for example `layers 0-11, all pictures`."""
    memory: dict[Category, int]
    """Bytes at the fullest moment of a step with all its micro-batches."""
    peak_bytes: int
    alive: tuple[AliveTensors, ...]
    forward_seconds: float
    """Of one micro-batch, communication inside it included."""
    backward_seconds: float
    """Of one micro-batch, recomputation included."""
    launches: int
    """In a step."""
    moved_bytes: int
    """Read and written by the kernels of a step."""
    flops: float
    """In a step, without recomputation."""
    waits: tuple[Wait, ...]
    mixed: tuple[Mixed, ...]


@dataclass(frozen=True)
class Span:
    """A pass of one micro-batch through a chunk in the pipeline's timeline; seconds from the begin of the step."""

    stage: int
    chunk: int
    micro_batch: int
    kind: SlotKind
    start: float
    end: float


@dataclass(frozen=True)
class PhaseForecast:
    """A phase on one layout."""

    phase: str
    layout: str
    """Degrees in words, for example `tensor 4, pipeline 8, expert 32, data 4`."""
    sequence_length: int
    packs: str
    """Which packs were assumed, in words."""
    steps: int
    step_seconds: float
    tokens: float
    """Real tokens of a step."""
    tokens_per_second: float
    mfu: float
    """Of the peak of all ranks: operations that the model needs, real tokens only, without recomputation."""
    bubble: float
    """Share of the step in which the slowest stage waits for others."""
    exposed_communication: float
    """Seconds of a step in which ranks only communicate."""
    seconds: dict[str, float]
    """Where the time of a step goes on the slowest stage; their sum is step_seconds.

    By part of the step what the device works, by axis its COMMUNICATION, then HOST, MESSAGES and BUBBLE.
    """
    ranks: tuple[RankForecast, ...]
    timeline: tuple[Span, ...]
    faults: tuple[str, ...]
    """What is wrong with the layout, a line each: what does not fit, what is mixed."""
    notes: tuple[str, ...] = ()
    """What slows it without being wrong, a line each: what lets the host wait in each micro-batch."""

    @property
    def days(self) -> float:
        """Return the days that the phase takes, without saves and evaluations."""
        return self.steps * self.step_seconds / 86_400


@dataclass(frozen=True)
class RunForecast:
    """A run on a number of GPUs."""

    name: str
    world_size: int
    gpu: str
    gpu_bytes: int
    phases: tuple[PhaseForecast, ...]
    attention: str = DEFAULT_ATTENTION
    """Kernels whose speed is assumed."""

    @property
    def gpus(self) -> str:
        """Return, in words, how many of which, and what kernels of attention run on them where they are not the default."""
        return gpus_in_words(self.world_size, self.gpu, self.attention)

    @property
    def days(self) -> float:
        """Return the days of all phases."""
        return sum(phase.days for phase in self.phases)

    @property
    def gpu_hours(self) -> float:
        """Return the hours of all GPUs together."""
        return self.days * 24 * self.world_size

    @property
    def can_run(self) -> bool:
        """Return whether every kind of rank fits on its card, and no operation mixes the host's and the device's tensors."""
        for phase in self.phases:
            for rank in phase.ranks:
                if rank.peak_bytes > self.gpu_bytes or rank.mixed:
                    return False
        return True

    @property
    def faults(self) -> list[str]:
        """Return what is wrong, of all phases, each line with the name of its phase."""
        return [f"{phase.phase}: {fault}" for phase in self.phases for fault in phase.faults]

    @property
    def notes(self) -> list[str]:
        """Return what slows the run, of all phases; phases mostly have the same."""
        return list(dict.fromkeys(note for phase in self.phases for note in phase.notes))


def gpus_in_words(world_size: int, gpu: str, attention: str) -> str:
    """Return for example `16 x h100`, or `16 x h100 with flash3` where kernels of attention are not the default."""
    kernels = "" if attention == DEFAULT_ATTENTION else f" with {attention}"
    return f"{world_size:,} x {gpu}{kernels}"
