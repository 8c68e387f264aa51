"""The best layouts of a phase on a number of GPUs: all that are possible, cut down by arithmetic, the best of them traced.

Recomputation is a cure: a layout is tried with as little as its estimate allows, and with more where it does not fit.
Offloading is the last one, for where nothing else fits.
"""

import heapq
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Final, NoReturn

from visionloom.common.errors import UserError
from visionloom.forecast.machine import Machine
from visionloom.forecast.packs import PackChoice, packs_for
from visionloom.forecast.results import PhaseForecast
from visionloom.forecast.search.bounds import RestBounds, expert_ranks
from visionloom.forecast.search.estimates import Estimates
from visionloom.forecast.search.layouts import LegalLayouts, with_layout, yaml_of
from visionloom.parallel.config import RECOMPUTATIONS, ParallelConfig
from visionloom.train.config import RunConfig

GIB: Final = 1 << 30
SIBLING: Final = 1.1
"""Layouts with the same degrees, but for virtual stages and exchanges, differ by little: each further one waits as if it were
a tenth slower than its elder."""
OFFLOADED: Final = 5
"""Layouts that are tried with offloading, where none fits without."""
Forecast = Callable[[RunConfig], PhaseForecast]
"""Trace the one phase of a run in the run's layout."""


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
    estimated_seconds: float
    """Of a step, by which it was chosen."""
    usable_bytes: int
    """Of the GPU."""

    @property
    def fits(self) -> bool:
        """Return whether the fullest rank has room."""
        return self.peak_bytes <= self.usable_bytes

    @property
    def peak_bytes(self) -> int:
        """Return what the fullest rank needs."""
        return max(rank.peak_bytes for rank in self.forecast.ranks)

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


def search(goal: SearchGoal, forecast: Forecast) -> SearchResult:
    """Trace the most promising layouts and return them, the best first.

    Raises:
        UserError: if no layout is possible, or none can hold the model.
    """
    return _Search(goal, forecast).run()


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

    def __init__(self, goal: SearchGoal, forecast: Forecast) -> None:
        self.goal, self.forecast = goal, forecast
        config, phase, machine = goal.config, goal.phase, goal.machine
        self.usable = machine.usable_bytes
        self.bounds = RestBounds.of(config, phase, goal.world_size)
        # A micro-batch is about the same in any layout: one rank gets them all here.
        alone = with_layout(config, phase, ParallelConfig())
        work = packs_for(alone, phase, 1, PackChoice.MEAN).counts.work
        self.estimates = Estimates(config, phase, goal.world_size, machine, work)
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
        rows = sorted(self.tried, key=self._order)
        return SearchResult(tuple(rows), len(legal), len(legal) - len(held))

    def _lightest(self, layout: ParallelConfig, rest_bytes: float) -> _Waiting:
        """Return a layout with as little more recomputation as seems to fit, or with all."""
        levels = RECOMPUTATIONS[RECOMPUTATIONS.index(layout.recompute) :]
        for recompute in levels:
            layout = replace(layout, recompute=recompute)
            error = statistics.median(self.errors[recompute] or [1.0])
            activations = error * self.estimates.activation_bytes(layout)
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
        """Trace layouts in their order; what is learnt of memory makes others wait again, with more recomputation."""
        while self.waiting and tries > 0:
            one = heapq.heappop(self.waiting)
            lighter = self._lightest(one.layout, one.rest_bytes)
            if lighter.layout != one.layout or lighter.seems_too_large > one.seems_too_large:
                heapq.heappush(self.waiting, lighter)
                continue
            row = self._tried(one)
            tries -= 1
            more = RECOMPUTATIONS.index(one.layout.recompute) + 1
            if not row.fits and more < len(RECOMPUTATIONS):
                layout = replace(one.layout, recompute=RECOMPUTATIONS[more])
                heapq.heappush(self.waiting, self._lightest(layout, one.rest_bytes))

    def _tried(self, one: _Waiting) -> TriedLayout:
        """Trace a layout, and learn from it how much its activations take."""
        config = with_layout(self.goal.config, self.goal.phase, one.layout)
        row = TriedLayout(config, self.forecast(config), one.seconds, self.usable)
        self.tried.append(row)
        activations = self.estimates.activation_bytes(one.layout)
        if activations:
            error = (row.peak_bytes - one.rest_bytes) / activations
            self.errors[one.layout.recompute].append(error)
        return row

    def _offload(self) -> None:
        """Trace those that came nearest with activations in host memory."""
        self.waiting = []
        for row in sorted(self.tried, key=lambda row: row.peak_bytes)[:OFFLOADED]:
            layout = replace(row.config.parallel, offload_activations=True)
            rest = self.bounds.of_fullest_rank(layout)
            heapq.heappush(self.waiting, self._lightest(layout, rest))
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
