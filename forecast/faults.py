"""What is wrong with a layout and what slows it, a line each, with the option that cures it."""

from collections.abc import Iterable, Iterator
from typing import Final

from visionloom.forecast.machine import GIB, Machine
from visionloom.forecast.phase_traces import PhaseTraces
from visionloom.forecast.results import RankForecast
from visionloom.forecast.trace.events import Category
from visionloom.parallel.config import ParallelConfig

SHOWN: Final = 3
"""Categories that a line about memory names."""
HELD: Final = (Category.WEIGHTS, Category.GRADIENTS, Category.OPTIMIZER)
"""Categories that stay between steps: fewer tokens do not help."""


def memory_faults(
    ranks: Iterable[RankForecast], traces: PhaseTraces, gpu: str, machine: Machine
) -> Iterator[str]:
    """Yield a line for each kind of rank that does not fit; `gpu`: name of the machine."""
    for rank in ranks:
        if rank.peak_bytes <= machine.usable_bytes:
            continue
        largest = sorted(rank.memory.items(), key=lambda item: -item[1])
        shares = [f"{category} {size / GIB:.1f}" for category, size in largest[:SHOWN]]
        cures = ", ".join(cures_of(largest[0][0], traces))
        alike = "1 rank" if rank.ranks == 1 else f"{rank.ranks} ranks"
        yield (
            f"stage {rank.stage} ({alike}, {rank.description}) needs {rank.peak_bytes / GIB:.1f} GiB, {gpu} has"
            f" {machine.usable_bytes / GIB:.1f} usable: {', '.join(shares)} GiB; try {cures}"
        )


def cures_of(category: Category, traces: PhaseTraces) -> list[str]:
    """Return the settings that make a category of memory smaller, the cheapest first."""
    layout = traces.layout
    cures = [] if category in HELD else list(_cures_of_activations(layout, traces.micro_batch))
    cures.append(f"parallel.tensor={2 * layout.tensor}")
    if category is Category.OPTIMIZER:
        cures.append("more GPUs: the data ranks share the optimizer")
    # More stages hold less each, but as many activations as before.
    if category in HELD:
        cures.append(f"parallel.pipeline={2 * layout.pipeline}")
    else:
        cures.append(f"parallel.context={2 * layout.context}")
    return cures


def _cures_of_activations(layout: ParallelConfig, micro_batch: int) -> Iterator[str]:
    """Yield what makes activations fewer without more ranks."""
    if layout.recompute != "full":
        yield "parallel.recompute=full"
    if micro_batch > 1:
        yield "micro_batch=1"
    if not layout.offload_activations:
        yield "parallel.offload_activations=true"


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
