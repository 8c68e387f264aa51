"""`plan.py table FILE`: every shipped recipe on the GPUs that its header states, as a table of Markdown."""

import multiprocessing
import re
import signal
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Final

from visionloom.common.atomic import replacing
from visionloom.common.errors import UserError
from visionloom.common.quiet import quiet_libraries
from visionloom.common.text import one_line, say, warn
from visionloom.forecast.machine import GIB, machine
from visionloom.forecast.request import PlanRequest
from visionloom.forecast.results import PhaseForecast, RunForecast
from visionloom.forecast.show.tables import gibibytes, peak_bytes
from visionloom.launch.composing.explain import available
from visionloom.launch.configure import compose
from visionloom.launch.environment import check_home
from visionloom.launch.guarding.claim import check_writable
from visionloom.launch.guarding.exit import CANNOT_RUN

GPU: Final = "h100"
RANKS: Final = re.compile(r"^# Ranks: (\d+)", re.MULTILINE)
COLUMNS: Final = (
    "recipe",
    "phase",
    "GPUs",
    "layout",
    "peak, GiB",
    "step, s",
    "tokens/s",
    "MFU",
    "bubble",
    "days",
    "GPU-hours",
    "",
)
type Row = tuple[str, ...]
HEAD: Final = """# Every shipped recipe, planned

Made by `make plans`: each recipe on as many {gpu} (recipes/gpu/{gpu}.yaml) as its header states, of which tensors can have
{gib:.1f} GiB each. Every number is predicted: steps on one H100 took 4 to 11 % longer, and nothing was
measured on more than one. Of phases with rewards (rl) it is the training on the longest answers, not their writing.
[planning.md](planning.md) says what is assumed.

"""


def write_table(words: Sequence[str]) -> int:
    """Plan all recipes, write the table into the file that the words name, and return the exit code.

    A recipe that cannot be built, or does not fit, is named; the others are planned all the same.
    """
    if len(words) != 1:
        raise UserError(
            "plan.py table takes one word, the file to write: plan.py table docs/plans.md"
        )
    (name,) = words
    check_home("table", name)
    file = Path(name)
    # Before minutes of work: a folder that cannot be written is known at once.
    check_writable(file.parent, "table")

    rows, faults = plan_recipes()
    with replacing(file, durable=False) as written:
        written.write(page_of(rows).encode())
    say(f"plans: {file}")
    for fault in faults:
        warn(f"wrong: {one_line(fault)}")
    return CANNOT_RUN if faults else 0


@dataclass
class PlannedRecipe:
    """What the table has of a recipe."""

    rows: list[Row] = field(default_factory=list)
    """One for each phase."""
    faults: list[str] = field(default_factory=list)
    """Why it cannot be built, or does not fit."""


def processes() -> Executor:
    """Return a process for each core: recipes have nothing in common, and a trace keeps one core busy."""
    # Not forked, for threads of torch may hold locks.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(mp_context=context, initializer=begin_process)


def begin_process() -> None:
    """Let Ctrl-C end this process without a traceback, and libraries be silent."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    quiet_libraries()


def plan_recipes() -> tuple[list[Row], list[str]]:
    """Return the rows of all shipped recipes, and a line for whatever is wrong with one."""
    rows, faults = list[Row](), list[str]()
    recipes = available("recipe")
    with processes() as workers:
        for recipe, planned in zip(recipes, workers.map(plan_recipe, recipes), strict=True):
            say(f"{recipe}: {len(planned.rows)} phases")
            rows += planned.rows
            faults += [f"{recipe}: {line}" for line in planned.faults]
    return rows, faults


def plan_recipe(recipe: str) -> PlannedRecipe:
    """Return the rows of a recipe and what is wrong with it."""
    try:
        forecast = forecast_recipe(recipe)
    except UserError as error:
        return PlannedRecipe(faults=error.lines)
    rows = [row_of(recipe, forecast, phase) for phase in forecast.phases]
    return PlannedRecipe(rows, [] if forecast.can_run else list(forecast.faults))


def page_of(rows: Sequence[Row]) -> str:
    """Return the page with the table."""
    head = HEAD.format(gpu=GPU, gib=machine(GPU).usable_bytes / GIB)
    rule = ("---",) * len(COLUMNS)
    lines = []
    for cells in (COLUMNS, rule, *rows):
        lines.append(f"| {' | '.join(cells)} |\n")
    return head + "".join(lines)


def forecast_recipe(recipe: str) -> RunForecast:
    """Return the forecast of a shipped recipe; UserError if it cannot be built on the GPUs that its header states."""
    # torch is imported only here, when the file is known to be writable.
    from visionloom.forecast.run import forecast_run

    gpus = stated_ranks(recipe)
    config = compose([f"+recipe={recipe}"], gpus)
    assert config is not None
    request = PlanRequest(config, gpus, GPU, machine(GPU), 1.0, tuple(config.phases))
    # Bars of several processes would write over each other.
    return forecast_run(request, lambda *_: None, is_brief=True)


def stated_ranks(recipe: str) -> int:
    """Return the number of ranks that the header of a shipped recipe states; UserError if it states none."""
    text = files("visionloom.recipes").joinpath(f"recipe/{recipe}.yaml").read_text()
    stated = RANKS.search(text)
    if stated is None:
        raise UserError("its header has no line `# Ranks: N`")
    return int(stated[1])


def row_of(recipe: str, forecast: RunForecast, phase: PhaseForecast) -> Row:
    """Return the cells of COLUMNS."""
    peak = peak_bytes(phase)
    return (
        recipe,
        phase.phase,
        str(forecast.world_size),
        phase.layout,
        gibibytes(peak),
        f"{phase.step_seconds:.3f}",
        f"{phase.tokens_per_second:,.0f}",
        f"{phase.mfu:.1%}",
        f"{phase.bubble:.1%}",
        f"{phase.days:,.2f}",
        f"{phase.days * 24 * forecast.world_size:,.0f}",
        "fits" if peak <= forecast.gpu_bytes else "does not fit",
    )
