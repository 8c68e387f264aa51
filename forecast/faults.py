"""What is wrong with a layout and what slows it, a line each, with the option that cures it."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from visionloom.forecast.machine import GIB, Machine
from visionloom.forecast.phase_traces import PhaseTraces
from visionloom.forecast.results import RankForecast
from visionloom.forecast.trace.events import Category

SHOWN: Final = 3
"""Categories that a line about memory names."""
HELD: Final = (Category.WEIGHTS, Category.GRADIENTS, Category.OPTIMIZER)
"""Categories that stay between steps: fewer tokens do not help."""


def memory_faults(
    ranks: Iterable[RankForecast], traces: PhaseTraces, gpu: str, machine: Machine
) -> Iterator[str]:
    """Yield a line for each kind of rank that does not fit; `gpu`: name of the machine."""
    kinds: dict[str, int] = {}
    for number, traced in enumerate(traces.kinds):
        kinds |= dict.fromkeys(traced.kind.descriptions, number)

    alike: dict[int, list[RankForecast]] = defaultdict(list)
    for rank in ranks:
        if rank.peak_bytes > machine.usable_bytes:
            alike[kinds[rank.description]].append(rank)

    # Stages of one kind are one line, with the memory of the one that keeps most micro-batches.
    for stages in alike.values():
        fullest = max(stages, key=lambda rank: rank.peak_bytes)
        needed, usable = _gib(fullest.peak_bytes), _gib(machine.usable_bytes)
        cures = ", ".join(cures_of(fullest, traces, machine))
        yield (
            f"{_named(stages, fullest)} {needed} GiB, {gpu} has {usable} usable:"
            f" {largest_of(fullest)} GiB; try {cures}"
        )


def _named(stages: Sequence[RankForecast], fullest: RankForecast) -> str:
    """Return the begin of a line about stages of one kind: which they are, and what the fullest holds."""
    if len(stages) == 1:
        return f"stage {fullest.stage} ({fullest.description}) needs"
    numbers = ", ".join(str(rank.stage) for rank in stages)
    return f"stages {numbers} (stage {fullest.stage}: {fullest.description}) need up to"


def largest_of(rank: RankForecast) -> str:
    """Return the largest categories of a rank's memory with their GiB: `logits 80.0, weights 1.0`."""
    largest = sorted(rank.memory.items(), key=lambda item: -item[1])
    return ", ".join(f"{category} {_gib(size)}" for category, size in largest[:SHOWN])


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"


def cures_of(rank: RankForecast, traces: PhaseTraces, machine: Machine) -> Iterator[str]:
    """Yield the settings that make a rank's memory smaller, those that ask for no more ranks first."""
    layout = traces.layout
    held = sum(size for category, size in rank.memory.items() if category in HELD)
    # Where even a step without activations would not fit, fewer of them are no cure.
    if held < machine.usable_bytes:
        if layout.recompute != "full":
            yield "parallel.recompute=full"
        if traces.micro_batch > 1:
            yield f"phases.{traces.phase}.micro_batch=1"
        if not layout.offload_activations:
            yield "parallel.offload_activations=true"

    yield f"parallel.tensor={2 * layout.tensor}"
    # More stages hold fewer layers each, but as many activations as before.
    if 2 * held > rank.peak_bytes:
        yield f"parallel.pipeline={2 * layout.pipeline}"
        yield "more GPUs, whose data ranks share the optimizer"
    else:
        yield f"parallel.context={2 * layout.context}"


def mixed_faults(ranks: Iterable[RankForecast]) -> list[str]:
    """Return a line for each operation that mixes tensors of the host and of the device."""
    lines = [
        f"{mixed.name} mixes tensors of the host and of the device at {mixed.place}: it fails on a GPU"
        for rank in ranks
        for mixed in rank.mixed
    ]
    return list(dict.fromkeys(lines))


def wait_notes(ranks: Iterable[RankForecast]) -> list[str]:
    """Return a line for each place at which the host waits for the device in every micro-batch."""
    lines = [
        f"the host waits for the device in each micro-batch: {wait.kind} at {wait.place}"
        for rank in ranks
        for wait in rank.waits
        if wait.per_micro_batch
    ]
    return list(dict.fromkeys(lines))
