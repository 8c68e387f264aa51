"""What a plan holds, in numbers: fill, tokens by dataset and kind, and how even the work of ranks is. Lengths only."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visionloom.data.encode.geometry import MERGE_SIZE
from visionloom.data.plan.deal import PlannedPack, deal
from visionloom.data.plan.plan import Plan
from visionloom.data.plan.plan_blocks import PlanBlock


def _none() -> NDArray[np.int64]:
    return np.zeros(0, np.int64)


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
    tokens: NDArray[np.int64] = field(default_factory=_none)
    """int64 [datasets]: tokens of each dataset in the packs."""
    visual_tokens: NDArray[np.int64] = field(default_factory=_none)
    """int64 [datasets]"""
    samples: NDArray[np.int64] = field(default_factory=_none)
    """int64 [datasets]; one in parts counts with its first."""
    mean_cost: float = 0.0
    """Sum over steps of the mean work of a rank."""
    largest_cost: float = 0.0
    """Sum over steps of the most work of a rank: the time of a step."""
    worst: float = 1.0
    """Largest ratio of the two in a step."""

    @property
    def fill(self) -> float:
        """Return the share of the packs' tokens that is not padding."""
        return float(self.tokens.sum() / max(1, self.packs * self.sequence_length))

    @property
    def patch_fill(self) -> float:
        """Return the share of the packs' patch budget that is used."""
        patches = MERGE_SIZE**2 * self.visual_tokens.sum()
        return float(patches / max(1, self.packs * self.patch_budget))

    @property
    def useful(self) -> float:
        """Return the share of all ranks' time that is work: the rest waits for the rank with the most."""
        return self.mean_cost / self.largest_cost if self.largest_cost else 1.0

    @property
    def seconds_per_sample(self) -> float:
        """Return the planning time of a sample, in seconds."""
        return self.seconds / max(1, self.planned)

    def add_step(self, dealt: list[list[list[PlannedPack]]]) -> None:
        """Count the work of a step whose packs are dealt to the ranks."""
        costs = []
        for rank in dealt:
            costs.append(sum(pack.cost for micro in rank for pack in micro))
        self.steps += 1
        self.mean_cost += sum(costs) / self.ranks
        # a step takes as long as its slowest rank
        self.largest_cost += max(costs)
        self.worst = max(self.worst, max(costs) * self.ranks / max(sum(costs), 1e-9))

    def add_block(self, block: PlanBlock, packs: int) -> None:
        """Count the samples of a block's first packs."""
        here = slice(0, block.borders[packs])
        entries = block.entries[here]
        self.tokens = self._added(self.tokens, entries, block.tokens[here])
        visual_tokens = block.patches[here] // MERGE_SIZE**2
        self.visual_tokens = self._added(self.visual_tokens, entries, visual_tokens)
        # a sample in parts counts once
        is_first = block.part_numbers[here] == 0
        self.samples = self._added(self.samples, entries, is_first)
        self.packs += packs
        self.planned += len(block.tokens)

    def _added(
        self,
        before: NDArray[np.int64],
        entries: NDArray[np.int16],
        counts: NDArray[Any],
    ) -> NDArray[np.int64]:
        """Add the counts of samples to the sums of their datasets, int64 [datasets]."""
        sums = np.bincount(entries, counts, len(self.names)).astype(np.int64)
        return sums + before if len(before) else sums


def facts_of(plan: Plan, steps: int, ranks: int, micro_batch: int) -> PlanFacts:
    """Plan the first steps and add them up. Raises UserError if packs cannot be dealt evenly to the ranks."""
    settings = plan.settings
    names = [entry.name for entry in plan.entries]
    facts = PlanFacts(settings.sequence_length, settings.patch_budget, names, ranks)
    started = time.perf_counter()
    for block, packs in _blocks(plan, steps * settings.global_batch):
        facts.add_block(block, packs)
    facts.seconds = time.perf_counter() - started

    first = plan.origin.step
    for step in range(first, first + steps):
        facts.add_step(deal(plan.step(step), ranks, micro_batch))
    return facts


def _blocks(plan: Plan, packs: int) -> Iterator[tuple[PlanBlock, int]]:
    """Yield blocks from the first on, and how many of each one's packs belong to the first `packs`."""
    number = 0
    while packs > 0:
        block = plan.block(number)
        taken = min(packs, len(block))
        yield block, taken
        packs, number = packs - taken, number + 1
