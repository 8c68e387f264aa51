"""What a plan holds, in numbers: fill, tokens by dataset and kind, and how even the work of ranks is. Lengths only."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from visionloom.data.encode.geometry import MERGE_SIZE
from visionloom.data.plan.deal import deal
from visionloom.data.plan.plan import Plan
from visionloom.data.plan.plan_blocks import PlanBlock


@dataclass
class PlanFacts:
    """Sums over the first steps of a plan, for one number of data-parallel ranks."""

    sequence_length: int
    patch_budget: int
    names: list[str]
    ranks: int
    packs: int = 0
    steps: int = 0
    seconds: float = 0.0
    """Time spent planning, or reading plans that were made before."""
    planned: int = 0
    """Samples of all blocks that the steps touch."""
    tokens: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """Of each dataset."""
    visual_tokens: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    samples: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    mean_cost: float = 0.0
    """Sum over steps of the mean work of a rank."""
    largest_cost: float = 0.0
    """Sum over steps of the most work of a rank: the time of a step."""
    worst: float = 1.0
    """Largest ratio of the two in a step."""

    @property
    def fill(self) -> float:
        """Share of the packs' tokens that is not padding."""
        return float(self.tokens.sum() / max(1, self.packs * self.sequence_length))

    @property
    def patch_fill(self) -> float:
        """Share of the packs' patch budget that is used."""
        return float(
            MERGE_SIZE**2 * self.visual_tokens.sum() / max(1, self.packs * self.patch_budget)
        )

    @property
    def useful(self) -> float:
        """Share of all ranks' time that is work: the rest waits for the rank with the most."""
        return self.mean_cost / self.largest_cost if self.largest_cost else 1.0

    @property
    def seconds_per_sample(self) -> float:
        """Planning time of a sample."""
        return self.seconds / max(1, self.planned)


def facts_of(plan: Plan, steps: int, ranks: int, micro_batch: int) -> PlanFacts:
    """Plan the first steps and add them up. Raises UserError if packs cannot be dealt evenly to the ranks."""
    settings = plan.settings
    found = PlanFacts(
        settings.sequence_length,
        settings.patch_budget,
        [entry.name for entry in plan.entries],
        ranks,
    )
    started = time.perf_counter()
    for block, packs in _blocks(plan, steps * settings.global_batch):
        _add(found, block, packs)
    found.seconds = time.perf_counter() - started
    for step in range(plan.origin.step, plan.origin.step + steps):
        costs = [
            sum(pack.cost for micro in rank for pack in micro)
            for rank in deal(plan.step(step), ranks, micro_batch)
        ]
        found.steps += 1
        found.mean_cost += sum(costs) / ranks
        found.largest_cost += max(costs)
        found.worst = max(found.worst, max(costs) * ranks / max(sum(costs), 1e-9))
    return found


def _blocks(plan: Plan, packs: int) -> Iterator[tuple[PlanBlock, int]]:
    """Blocks from the first on, and how many of each one's packs belong to the first `packs`."""
    number = 0
    while packs > 0:
        block = plan.block(number)
        taken = min(packs, len(block))
        yield block, taken
        packs, number = packs - taken, number + 1


def _add(found: PlanFacts, block: PlanBlock, packs: int) -> None:
    here = slice(0, block.borders[packs])
    entries, count = block.entries[here], len(found.names)
    visual = block.patches[here] // MERGE_SIZE**2
    sums = [
        np.bincount(entries, weights, count).astype(np.int64)
        for weights in (block.tokens[here], visual, block.part_numbers[here] == 0)
    ]
    old = [found.tokens, found.visual_tokens, found.samples]
    found.tokens, found.visual_tokens, found.samples = (
        new + before if len(before) else new for new, before in zip(sums, old, strict=True)
    )
    found.packs += packs
    found.planned += len(block.tokens)
