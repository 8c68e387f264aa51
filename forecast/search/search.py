"""The best layouts of a phase on a number of GPUs: all that are possible, cut down by arithmetic, the best of them traced.

Recomputation is a cure: a layout is tried with as little as its estimate allows, and with more where it does not fit.
Offloading is the last one, for where nothing else fits.

Layouts are traced on mean packs, some at a time. What the fullest packs take on top of them is estimated, and only of the best
traced too.
"""

import heapq
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Final, NoReturn, Protocol

from visionloom.common.errors import UserError
from visionloom.forecast.machine import GIB, Machine
from visionloom.forecast.packs import packs_for
from visionloom.forecast.results import PhaseForecast
from visionloom.forecast.run import CHOICES
from visionloom.forecast.search.bounds import RestBounds, expert_ranks
from visionloom.forecast.search.estimates import Estimates
from visionloom.forecast.search.layouts import LegalLayouts, with_layout, yaml_of
from visionloom.forecast.search.stages import balanced
from visionloom.parallel.config import RECOMPUTATIONS, ParallelConfig
from visionloom.train.config import RunConfig

SIBLING: Final = 1.1
"""Layouts with the same degrees, but for virtual stages and exchanges, differ by little: each further one waits as if it were
a tenth slower than its elder."""
OFFLOADED: Final = 5
"""Layouts that are tried with offloading, where none fits without."""
BATCH: Final = 4
"""Layouts that are traced at a time. The same on any machine, so that what is learnt from them, and the result, is too."""
LEVELS: Final = tuple(each for each in RECOMPUTATIONS if each != "block")
"""Recomputation that is tried, from the least to the most: `block` needs a number of layers too."""
CONFIRMED: Final = 3
"""Layouts that are traced on their fullest packs."""


class Forecasts(Protocol):
    """Traces the one phase of a run in the run's layout."""

    def ranking(self, runs: Sequence[RunConfig]) -> Sequence[PhaseForecast]:
        """Return the forecasts of several on mean packs."""

    def full(self, run: RunConfig) -> PhaseForecast:
        """Return the forecast of one with the memory of its fullest packs."""


@dataclass(frozen=True)
class SearchGoal:
    """The question: a phase of a run, on so many of these GPUs."""

    config: RunConfig
    phase: str
    world_size: int
    machine: Machine
    tries: int = 20
    """Layouts that are traced."""


@dataclass(frozen=True)
class TriedLayout:
    """A layout that was traced."""

    config: RunConfig
    """The run in this layout."""
    forecast: PhaseForecast
    usable_bytes: int
    """Of the GPU."""
    more_bytes: int | None
    """Estimate of what its fullest packs take on top of the forecast's mean ones; None: the forecast is of the fullest."""

    @property
    def fits(self) -> bool:
        """Return whether the fullest rank has room."""
        return self.peak_bytes <= self.usable_bytes

    @property
    def peak_bytes(self) -> int:
        """Return what the fullest rank needs."""
        return max(rank.peak_bytes for rank in self.forecast.ranks) + (self.more_bytes or 0)

    @property
    def yaml(self) -> str:
        """Return the layout as text to paste."""
        return yaml_of(self.config)

    @property
    def costs(self) -> dict[str, float]:
        """Return where the seconds of a step go, in words."""
        forecast = self.forecast
        waits = forecast.bubble * forecast.step_seconds
        talks = forecast.exposed_communication
        works = forecast.step_seconds - waits - talks
        return {"computes": works, "waits for other stages": waits, "only communicates": talks}


@dataclass(frozen=True)
class SearchResult:
    """What was tried, the best first."""

    tried: tuple[TriedLayout, ...]
    """Those that fit by tokens a second, then the others by memory."""
    legal: int
    """Layouts that the run's checks let pass, recomputation left out."""
    too_large: int
    """Those of them of which weights, gradients and optimizer alone fill the GPU."""

    def reason(self, row: TriedLayout) -> str:
        """Say why a layout wins or loses."""
        best = self.tried[0]
        if not row.fits:
            needs = f"{row.peak_bytes / GIB:.1f} of {row.usable_bytes / GIB:.1f} GiB"
            fullest = max(row.forecast.ranks, key=lambda rank: rank.peak_bytes)
            return f"does not fit: needs {needs} ({fullest.description})"
        if row is best:
            spare = (row.usable_bytes - row.peak_bytes) / GIB
            return f"the fastest that fits, {spare:.1f} GiB to spare"

        slower = best.forecast.tokens_per_second / row.forecast.tokens_per_second - 1
        more = {name: seconds - best.costs[name] for name, seconds in row.costs.items()}
        most = max(more, key=more.__getitem__)
        seconds = f"{row.costs[most]:.2f} s a step, the best {best.costs[most]:.2f} s"
        return f"{slower:.0%} slower: it {most} {seconds}"


def search(goal: SearchGoal, forecasts: Forecasts) -> SearchResult:
    """Trace the most promising layouts and return them, the best first.

    Raises:
        UserError: if no layout is possible, or none can hold the model.
    """
    return _Search(goal, forecasts).run()


@dataclass(frozen=True, order=True)
class _Waiting:
    """A layout that waits for its trace; the first in order comes first."""

    seems_too_large: bool
    turn: float
    """Seconds of a step, longer by the delay of a sibling."""
    number: int
    """Breaks ties: layouts themselves have no order."""
    seconds: float = field(compare=False)
    """Of a step, by estimate."""
    layout: ParallelConfig = field(compare=False)
    rest_bytes: float = field(compare=False)


class _Search:
    """A search while it runs."""

    def __init__(self, goal: SearchGoal, forecasts: Forecasts) -> None:
        self.goal, self.forecasts = goal, forecasts
        config, phase, machine = goal.config, goal.phase, goal.machine
        self.usable = machine.usable_bytes
        self.bounds = RestBounds.of(config, phase, goal.world_size)
        # A micro-batch is about the same in any layout: one rank gets them all here.
        alone = with_layout(config, phase, ParallelConfig())
        packs = packs_for(alone, phase, 1, CHOICES)
        mean, patches, supervised = (packs[choice].counts.work for choice in CHOICES)
        fullest = replace(
            mean, patches=patches.patches, supervised_tokens=supervised.supervised_tokens
        )
        self.estimates = Estimates(config, phase, goal.world_size, machine, mean)
        self.on_fullest = replace(self.estimates, work=fullest)
        self.waiting: list[_Waiting] = []
        self.tried: list[TriedLayout] = []
        self.numbers = count()
        self.errors: defaultdict[str, list[float]] = defaultdict(list)
        """Of each kind of recomputation, traced memory of activations over the estimate."""

    def run(self) -> SearchResult:
        """Return what was tried, in order."""
        goal = self.goal
        most_tensor = goal.machine.node_ranks
        legal = list(LegalLayouts(goal.config, goal.phase, goal.world_size, most_tensor))
        if not legal:
            self._refuse_all()
        rest = [self.bounds.of_fullest_rank(layout) for layout in legal]
        if min(rest) > self.usable:
            self._refuse_all_sizes(min(rest))

        held = [pair for pair in zip(legal, rest, strict=True) if pair[1] <= self.usable]
        self._propose_all([self._lightest(layout, bytes_held) for layout, bytes_held in held])
        self._trace(goal.tries)
        if not any(row.fits for row in self.tried):
            self._offload()
        self._balance()
        self._confirm()
        rows = sorted(self.tried, key=self._order)
        return SearchResult(tuple(rows), len(legal), len(legal) - len(held))

    def _lightest(self, layout: ParallelConfig, rest_bytes: float) -> _Waiting:
        """Return a layout with as little more recomputation as seems to fit, or with all."""
        error = 1.0
        for recompute in LEVELS:
            # Estimates of what was never traced are as wrong as those of the next less, or each level would cost traces.
            if errors := self.errors[recompute]:
                error = statistics.median(errors)
            if LEVELS.index(recompute) < LEVELS.index(layout.recompute):
                continue
            layout = replace(layout, recompute=recompute)
            activations = error * self.on_fullest.activation_bytes(layout)
            too_large = rest_bytes + activations > self.usable
            if not too_large:
                break
        seconds = self.estimates.step_seconds(layout, rest_bytes)
        return _Waiting(too_large, seconds, next(self.numbers), seconds, layout, rest_bytes)

    def _propose_all(self, layouts: list[_Waiting]) -> None:
        """Let layouts wait, those of a family one after the other, so that the first to be tried differ."""
        siblings: Counter[tuple[int, ...]] = Counter()
        for one in sorted(layouts):
            layout = one.layout
            experts = expert_ranks(layout)
            family = layout.tensor, layout.pipeline, layout.context, experts
            turn = one.seconds * SIBLING ** siblings[family]
            siblings[family] += 1
            heapq.heappush(self.waiting, replace(one, turn=turn))

    def _trace(self, tries: int) -> None:
        """Trace layouts in their order, a batch at a time; those that do not fit wait again, with more recomputation."""
        while tries > 0 and (batch := self._next(min(BATCH, tries))):
            tries -= len(batch)
            runs = [self._run_in(one.layout) for one in batch]
            forecasts = self.forecasts.ranking(runs)
            for one, run, forecast in zip(batch, runs, forecasts, strict=True):
                self._learn(one, run, forecast)

    def _next(self, most: int) -> list[_Waiting]:
        """Take the next layouts; those that seem too large by what was learnt wait again, with more recomputation."""
        batch = list[_Waiting]()
        while self.waiting and len(batch) < most:
            one = heapq.heappop(self.waiting)
            lighter = self._lightest(one.layout, one.rest_bytes)
            if lighter.layout != one.layout or lighter.seems_too_large > one.seems_too_large:
                heapq.heappush(self.waiting, lighter)
            else:
                batch.append(one)
        return batch

    def _run_in(self, layout: ParallelConfig) -> RunConfig:
        return with_layout(self.goal.config, self.goal.phase, layout)

    def _learn(self, one: _Waiting, run: RunConfig, forecast: PhaseForecast) -> None:
        """Note a traced layout, and how much its activations take."""
        activations = self.estimates.activation_bytes(one.layout)
        more = max(0.0, self.on_fullest.activation_bytes(one.layout) - activations)
        row = TriedLayout(run, forecast, self.usable, round(more))
        self.tried.append(row)
        if activations:
            error = (row.peak_bytes - more - one.rest_bytes) / activations
            self.errors[one.layout.recompute].append(error)
        if not row.fits:
            self._recompute_more(row)

    def _recompute_more(self, row: TriedLayout) -> None:
        """Let a layout that does not fit wait again with more recomputation, where there is more."""
        layout = row.config.parallel
        more = LEVELS.index(layout.recompute) + 1
        if more < len(LEVELS):
            self._wait(replace(layout, recompute=LEVELS[more]))

    def _wait(self, layout: ParallelConfig) -> None:
        rest = self.bounds.of_fullest_rank(layout)
        heapq.heappush(self.waiting, self._lightest(layout, rest))

    def _balance(self) -> None:
        """Trace the best with their layers dealt to the stages by their own times, where that seems faster."""
        self.waiting = []
        layers = self.goal.config.model.text.layers
        for row in sorted(self.tried, key=self._order)[:CONFIRMED]:
            if row.fits:
                layout = balanced(row.config.parallel, layers, row.forecast.timeline)
                if layout != row.config.parallel:
                    self._wait(layout)
        self._trace(CONFIRMED)

    def _confirm(self) -> None:
        """Trace the best on their fullest packs; in place of one that does not fit there, it is tried with more recomputation."""
        self.waiting = []
        # Where estimates of what they take are always too low, there is an end too.
        for _ in range(self.goal.tries):
            best = sorted(self.tried, key=self._order)[:CONFIRMED]
            open_rows = [row for row in best if row.fits and row.more_bytes is not None]
            if not open_rows:
                return
            row = open_rows[0]
            forecast = self.forecasts.full(row.config)
            confirmed = replace(row, forecast=forecast, more_bytes=None)
            self.tried[self.tried.index(row)] = confirmed
            if not confirmed.fits:
                self._recompute_more(confirmed)
                self._trace(1)

    def _offload(self) -> None:
        """Trace those that came nearest with activations in host memory."""
        self.waiting = []
        for row in sorted(self.tried, key=lambda row: row.peak_bytes)[:OFFLOADED]:
            self._wait(replace(row.config.parallel, offload_activations=True))
        self._trace(OFFLOADED)

    def _order(self, row: TriedLayout) -> tuple[bool, float]:
        """Return the key by which rows are sorted."""
        speed = -row.forecast.tokens_per_second
        return not row.fits, speed if row.fits else row.peak_bytes

    def _refuse_all(self) -> NoReturn:
        goal = self.goal
        one = with_layout(goal.config, goal.phase, ParallelConfig())
        fault = one.layout_problems(goal.world_size)[0]
        raise UserError(
            f"no layout is possible on world={goal.world_size} ranks; with a model on each: {fault}"
        )

    def _refuse_all_sizes(self, least: float) -> NoReturn:
        goal = self.goal
        raise UserError(
            f"world={goal.world_size} GPUs cannot hold {goal.config.model.name} in any layout: weights, gradients and optimizer"
            f" take {least / GIB:.1f} GiB of the fullest one, {self.usable / GIB:.1f} GiB are usable: use more or larger GPUs"
        )
