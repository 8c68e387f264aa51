"""The plan of a phase: which samples share a pack, and which packs make a step.

A pure function of settings and length tables, in numpy. The stream of draws is cut into blocks that are packed on their
own, so any step can be planned from the number of packs before its block. What a step contains does not depend on ranks,
workers or layout; `deal.deal` only deals its packs out.
"""

import dataclasses
import threading
from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from visionloom.data.plan.best_fit import PackBudget, pack_samples
from visionloom.data.plan.cursor import STATE_VERSION, Origin, plan_hash
from visionloom.data.plan.deal import CostModel, PlannedPack
from visionloom.data.plan.mixture import PERIOD, Mixture, key_of
from visionloom.data.plan.partners import Sizes, is_heavy, with_light_packs
from visionloom.data.plan.parts import Parts
from visionloom.data.plan.plan_blocks import PlanBlock, PlanBlockStore, joined
from visionloom.data.plan.resumable import Rows

PLAN_VERSION: Final = 4
_PACKS_PER_BLOCK: Final = 2048
"""Packs aimed at in a block: its last packs, with few samples to choose from, then cost 0.02 to 0.03 % of fill, and planning
takes 0.1 to 0.2 s."""
_SMALLEST_BLOCK: Final = 256
_EPOCH_PER_PASSED: Final = 40
"""Of an epoch at most a 40th may be passed over: what was trained on and as much from the front of the order then differ in
at most a 20th of the epoch, half of it too early, half of it too late."""
_WORK: Final = np.array([73_728, 3, 7_373, 1])
"""Weights by which a step's heavy packs are known: those of `CostModel()` in whole numbers. Never a run's own: what a step
contains does not depend on its model or on which parts of it are frozen."""


@dataclass(frozen=True, slots=True)
class MixtureEntry:
    """An entry of the mixture as the plan sees it."""

    name: str
    weight: float
    parts: Parts
    content: str
    """Hash of the dataset's samples; entries with the same one draw from one order."""
    over_length: str = "error"

    @property
    def size(self) -> int:
        """Count the samples of the dataset, those without a part included."""
        return len(self.parts.lengths)

    def per_draw(self, field: str) -> float:
        """Return the mean `tokens` or `patches` that a draw brings."""
        return self.parts.total(field) / self.size

    @property
    def usable(self) -> float:
        """Return the share of the samples that have a part."""
        return 1 - self.parts.dropped / self.size


@dataclass(frozen=True, slots=True)
class Settings:
    """What decides the content of packs and steps, apart from the entries."""

    seed: int
    phase: str
    """Phases of different names have orders of their own; empty where a run's phases continue one order."""
    sequence_length: int
    global_batch: int
    patch_budget: int
    """Patches of one pack."""
    packing_window_samples: int
    sample_token_multiple: int = 1
    """Tokens that a sample takes up are rounded up to this multiple."""
    max_samples_per_pack: int = 0
    """Samples of one pack; 0: any number."""
    shuffle_block_samples: int = 1
    """Samples that stay together through the shuffle."""
    weights_in: str = "samples"
    tokenizer: str = ""
    """Hash of the tokenizer."""
    media: str = ""
    """Hash of the pixel and frame rules and of the chat template."""

    @property
    def pack_budget(self) -> PackBudget:
        """Return what the packs hold, and what they are chosen from."""
        return PackBudget(
            self.sequence_length,
            self.patch_budget,
            self.packing_window_samples,
            self.sample_token_multiple,
            self.max_samples_per_pack,
        )


class Plan:
    """Plans steps on demand. Safe in threads; the next block is made while one is used."""

    def __init__(
        self,
        entries: list[MixtureEntry],
        settings: Settings,
        cost: CostModel | None = None,
        origin: Origin | None = None,
        cache: Path | None = None,
    ) -> None:
        """`cache`: a folder for blocks, shared by the processes of a machine."""
        self.entries, self.settings, self.origin = entries, settings, origin or Origin()
        self.cost = cost or CostModel()
        weights = self._draw_weights()
        self.draws_per_block = self._draws_per_block(weights)
        # phases of one run must not draw the same samples first
        self._seed = int(key_of(settings.seed, f"phase {settings.phase}"))
        self.mixture = Mixture(
            [entry.content for entry in entries],
            [entry.size for entry in entries],
            weights,
            self._seed,
            settings.shuffle_block_samples,
            self.origin.draws,
        )
        self.limits = [self._limit(content) for content in self.mixture.contents]
        """Of each content, how many samples a pack may at most pass over."""
        # grows with each block that was met: how many packs a block has is known only once it is made
        self._first_packs = {0: 0}
        self._blocks = PlanBlockStore(
            self._make_block, cache / "plan" / self.hash if cache else None
        )
        self._lock = threading.Lock()

    def _draw_weights(self) -> list[float]:
        """Return how often each entry is drawn.

        Draws without a part do not count, and tokens are turned into draws by their mean.
        """
        if self.settings.weights_in == "tokens":
            return [entry.weight / entry.per_draw("tokens") for entry in self.entries]
        return [entry.weight / entry.usable for entry in self.entries]

    def _draws_per_block(self, weights: list[float]) -> int:
        """Return a power of two up to PERIOD that makes about _PACKS_PER_BLOCK packs."""

        def mean(field: str) -> float:
            values = [entry.per_draw(field) for entry in self.entries]
            return float(np.dot(weights, values) / np.sum(weights))

        tokens = mean("tokens") / self.settings.sequence_length
        patches = mean("patches") / self.settings.patch_budget
        # of whichever fills a pack first
        draws = int(_PACKS_PER_BLOCK / max(tokens, patches))
        power = 1 << (draws - 1).bit_length()
        return min(PERIOD, max(_SMALLEST_BLOCK, power))

    def _limit(self, content: str) -> int:
        """Return how many samples of a content a pack may pass over.

        At most the window and a 40th of its usable ones.
        """
        usable = []
        for entry in self.entries:
            if entry.content == content:
                usable.append(entry.size - entry.parts.dropped)
        return min(self.settings.packing_window_samples, min(usable) // _EPOCH_PER_PASSED)

    @property
    def facts(self) -> dict[str, Any]:
        """Return everything the plan depends on, apart from its origin, by the name of its option."""
        datasets = {
            entry.name: [entry.content, entry.weight, entry.over_length] for entry in self.entries
        }
        return {
            "version": PLAN_VERSION,
            **dataclasses.asdict(self.settings),
            "draws_per_block": self.draws_per_block,
            "datasets": datasets,
        }

    @property
    def hash(self) -> str:
        """Return 32 hexadecimal digits over everything that decides what a step contains."""
        return plan_hash(self.facts, self.origin)

    def step(self, step: int) -> list[PlannedPack]:
        """Return the packs of an optimizer step, counted from 0 in the phase: `global_batch` of them."""
        first, wanted = self._first_pack_of(step), self.settings.global_batch
        excerpts: list[PlanBlock] = []
        with self._lock:
            number = self._block_of(first)
            while wanted:
                block = self._block(number)
                start = max(0, first - self._first_packs[number])
                excerpts.append(block.excerpt(start, min(len(block), start + wanted)))
                wanted -= len(excerpts[-1])
                number += 1
            # the next block is made while the steps of this one train
            self._blocks.ahead(number)
        whole = self._with_light_packs(joined(excerpts))
        costs = self.cost.of(whole.work()).tolist()
        return [PlannedPack(whole.places(place), cost) for place, cost in enumerate(costs)]

    def _with_light_packs(self, step: PlanBlock) -> PlanBlock:
        """Return the packs of a step, some of them made light if others are heavy."""
        costs = (step.work() @ _WORK).tolist()
        mean = sum(costs) // len(costs)
        if not is_heavy(max(costs), mean):
            return step
        budget = self.settings.pack_budget
        sizes = Sizes(
            budget.taken_up(step.tokens.tolist()),
            step.patches.tolist(),
            (step.sample_work() @ _WORK).tolist(),
        )
        packs = [list(range(*borders)) for borders in pairwise(step.borders.tolist())]
        return step.regrouped(with_light_packs(packs, sizes, budget))

    def state(self, step: int) -> dict[str, Any]:
        """Return where the stream stands before a step: JSON, the same on every rank, whatever the layout; see cursor.py."""
        first = self._first_pack_of(step)
        with self._lock:
            number = self._block_of(first)
            before = self._first_packs[number]
            block = self._block(number)
        counters = self._counters(number, block, first - before)
        names = self._names
        return {
            "version": STATE_VERSION,
            "plan_hash": self.hash,
            "step": step,
            "block": number,
            "first_pack": before,
            "draws": {names[content]: count for content, count in counters.items()},
            "origin": {"step": self.origin.step, "draws": dict(self.origin.draws)},
            "plan": self.facts,
        }

    @property
    def _names(self) -> dict[str, str]:
        """Return the name of each content: the first of its entries speaks for the others."""
        return {entry.content: entry.name for entry in reversed(self.entries)}

    def _counters(
        self,
        number: int,
        block: PlanBlock,
        packs: int,
    ) -> dict[str, int]:
        """Count the draws of each content up to the last one that the first packs of a block hold."""
        here = slice(0, block.borders[packs])
        start = number * self.draws_per_block
        counters = self.mixture.counters(start)
        contents = np.array([entry.content for entry in self.entries])[block.entries[here]]
        for content in set(contents.tolist()):
            last = int(block.draws[here][contents == content].max())
            after = self.mixture.counters(start + last + 1)
            counters[content] = after[content]
        return counters

    def jump(self, block: int, first_pack: int) -> None:
        """Note how many packs lie before a block, as a checkpoint knows, so that those before it need not be planned."""
        with self._lock:
            self._first_packs[block] = first_pack

    @property
    def known_starts(self) -> dict[int, int]:
        """Return the number of packs before each block that was met so far."""
        with self._lock:
            return dict(self._first_packs)

    def block(self, number: int) -> PlanBlock:
        """Return a block by its number."""
        with self._lock:
            return self._blocks.get(number)

    def _first_pack_of(self, step: int) -> int:
        if step < self.origin.step:
            raise ValueError(
                f"step {step} lies before this plan, which begins at step {self.origin.step}"
            )
        # a plan that continues another one begins with block 0 at its own first step
        return (step - self.origin.step) * self.settings.global_batch

    def _block_of(self, pack: int) -> int:
        """Return the block that holds a pack of the phase: from the last known block before it, one after the other."""
        known = sorted(self._first_packs.items())
        place = bisect_right([first for _, first in known], pack) - 1
        number, _ = known[place]
        while self._first_packs[number] + len(self._block(number)) <= pack:
            number += 1
        return number

    def _block(self, number: int) -> PlanBlock:
        """Return a block whose number of packs before it is known, and note how many lie before the next."""
        block = self._blocks.get(number)
        self._first_packs[number + 1] = self._first_packs[number] + len(block)
        return block

    def _make_block(self, number: int) -> PlanBlock:
        """Draw, cut and pack the samples of a block."""
        rows, entries, draws = self._rows(number)
        packs = pack_samples(
            rows["tokens"].tolist(),
            rows["patches"].tolist(),
            self.settings.pack_budget,
            self.mixture.groups[entries].tolist(),
            self.limits,
        )
        drawn = PlanBlock(
            borders=np.arange(len(rows) + 1, dtype=np.int32),
            entries=entries.astype(np.int16),
            samples=rows["sample"],
            part_numbers=rows["part_number"],
            draws=draws.astype(np.uint32),
            tokens=rows["tokens"],
            patches=rows["patches"],
            patch_pairs=rows["patch_pairs"],
        )
        return drawn.regrouped(packs)

    def _rows(
        self,
        number: int,
    ) -> tuple[Rows, NDArray[np.int32], NDArray[np.int64]]:
        """Return the parts of a block's draws in order (dtype PART), the entry of each, and the number of its draw."""
        drawn = self.mixture.draws(number * self.draws_per_block, self.draws_per_block)
        rows: list[Rows] = []
        draws: list[NDArray[np.int64]] = []
        entries: list[NDArray[np.int32]] = []
        for place, entry in enumerate(self.entries):
            mine = np.flatnonzero(drawn.datasets == place)
            parts, draw_numbers = entry.parts.of(drawn.samples[mine])
            rows.append(parts)
            draws.append(mine[draw_numbers])
            entries.append(np.full(len(parts), place, np.int32))
        numbers = np.concatenate(draws)
        # stable: the parts of a draw keep their order
        order = np.argsort(numbers, kind="stable")
        return np.concatenate(rows)[order], np.concatenate(entries)[order], numbers[order]
