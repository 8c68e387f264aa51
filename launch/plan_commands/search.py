"""`plan.py search`: the layouts that are possible, the fastest first."""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from visionloom.common.errors import UserError
from visionloom.common.progress import PartProgress
from visionloom.common.screen import PlainConsole
from visionloom.common.text import one_line, say
from visionloom.forecast.machine import planned_attention
from visionloom.forecast.request import PlanRequest
from visionloom.forecast.results import PhaseForecast, gpus_in_words
from visionloom.forecast.search.layouts import cut_evenly
from visionloom.forecast.show.document import NOTICE
from visionloom.forecast.show.tables import gibibytes
from visionloom.launch.configure import compose
from visionloom.launch.data_commands.progress import bars
from visionloom.launch.guarding.exit import CANNOT_RUN
from visionloom.launch.plan_commands.words import PlanWords, read_plan_words
from visionloom.train.config import RunConfig

if TYPE_CHECKING:
    from rich.table import Table

    from visionloom.forecast.search.search import SearchResult, TriedLayout

TRIES: Final = 20
"""Layouts that are traced."""
TRACED, FULL = "traced", "traced on their fullest packs"
"""Bars."""
ESTIMATED: Final = "~"
"""Before a peak of which not all is traced."""
PASTED: Final = 3
"""Layouts whose YAML is shown."""
COLUMNS: Final = ("", "layout", "tokens/s", "step, s", "MFU", "peak, GiB", "reason")
ANY_LAYOUT: Final = "parallel=single"
"""Word that takes the place of the recipe's layout, which these GPUs may not hold."""


def search_layouts(argv: Sequence[str]) -> int:
    """Print the layouts of a phase of the command line's run, the fastest first, and return the exit code."""
    own, words = read_plan_words(argv)
    if faults := without_effect(own, words):
        raise UserError(*faults)
    # On one rank each layout is possible that says nothing; what N can hold the search finds out.
    config = compose([*words, ANY_LAYOUT], 1)
    if config is None:
        return 0
    request = own.request(config)

    # Only now, when the words are known to be good: it takes a moment.
    from visionloom.forecast.search.search import SearchGoal, search

    request = replace(request, phases=request.phases[:1])
    goal = SearchGoal(config, request.phases[0], own.world, request.machine, TRIES)
    with bars("layouts") as progress:
        result = search(goal, TracedLayouts(request, progress))
    show(request, result)
    return 0 if result.tried[0].fits else CANNOT_RUN


def without_effect(own: PlanWords, words: Sequence[str]) -> list[str]:
    """Return a line for each word that a search would not heed: a folder, since it writes nothing, and layouts, which it chooses."""
    faults = []
    if own.out:
        faults.append("out= is for a plan: a search writes no files, it prints; leave the word out")
    for word in words:
        name = word.lstrip("+~").partition("=")[0]
        if name.partition(".")[0] == "parallel":
            faults.append(f"{one_line(name)}: a search chooses layouts itself; leave the word out")
    return faults


class TracedLayouts:
    """Traces layouts for a search, and shows how many are done."""

    def __init__(self, request: PlanRequest, progress: PartProgress) -> None:
        self.request, self.progress = request, progress
        self.done = Counter[str]()
        progress(TRACED, 0, TRIES)

    def ranking(self, runs: Sequence[RunConfig]) -> list[PhaseForecast]:
        """Return the forecasts of several layouts on mean packs."""
        from visionloom.forecast.run import forecast_layouts

        requests = [replace(self.request, config=run) for run in runs]
        return forecast_layouts(requests, lambda: self._finished(TRACED, TRIES))

    def full(self, run: RunConfig) -> PhaseForecast:
        """Return the forecast of a layout with the memory of its fullest packs."""
        from visionloom.forecast.run import forecast_run

        # The layouts have a bar, and not the ranks of each.
        answer = forecast_run(replace(self.request, config=run), lambda *_: None)
        self._finished(FULL, PASTED)
        return answer.phases[0]

    def _finished(self, part: str, most: int) -> None:
        self.done[part] += 1
        # Cures of layouts that do not fit come on top of those that were asked for.
        if self.done[part] <= most:
            self.progress(part, self.done[part], most)


def show(request: PlanRequest, result: "SearchResult") -> None:
    """Print the layouts as a table, and the best as text to paste."""
    # A pipe has no width; 160 columns hold the table without breaking most of its cells.
    console = PlainConsole(width=None if sys.stdout.isatty() else 160)
    console.print(table_of(request, result))
    say(
        f"{result.legal:,} layouts are possible, {result.too_large:,} of them are too large without any activation,"
        f" {len(result.tried)} were traced",
        f"{ESTIMATED} what the fullest packs take on top of the mean ones is estimated, not traced",
    )
    for number, row in enumerate(result.tried[:PASTED], 1):
        if row.fits:
            say("", f"# layout {number}", row.yaml.rstrip())


def table_of(request: PlanRequest, result: "SearchResult") -> "Table":
    """Return a row for each layout that was traced."""
    # rich takes a tenth of a second to import, which help need not wait for.
    from rich.table import Table

    phase, kernels = request.phases[0], planned_attention(request.config.model.attention)
    gpus = gpus_in_words(request.world_size, request.gpu, kernels)
    title = f"{request.config.run.name}, {phase}, on {gpus} ({NOTICE})"
    table = Table(*COLUMNS, title=title, title_justify="left")
    for number, row in enumerate(result.tried, 1):
        table.add_row(*cells(number, row), result.reason(row))
    return table


def cells(number: int, row: "TriedLayout") -> list[str]:
    """Return the cells of COLUMNS but for the reason."""
    forecast, layout, layers = row.forecast, row.config.parallel, row.config.model.text.layers
    # Two may differ in this alone.
    by_time = ", layers by their times" if cut_evenly(layout, layers) != layout else ""
    mark = "" if row.more_bytes is None else ESTIMATED
    return [
        f"{number}",
        forecast.layout + by_time,
        f"{forecast.tokens_per_second:,.0f}",
        f"{forecast.step_seconds:.3f}",
        f"{forecast.mfu:.1%}",
        mark + gibibytes(row.peak_bytes),
    ]
