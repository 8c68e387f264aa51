"""A forecast on the screen: memory and work of each kind of rank, a row for each phase, and where the time goes."""

from rich.table import Table

from visionloom.forecast.machine import GIB
from visionloom.forecast.results import PhaseForecast, RankForecast, RunForecast
from visionloom.forecast.show.document import NOTICE
from visionloom.forecast.trace.events import Category

LEAST_SECONDS = 5e-4
"""Of a part that has a row: less would be shown as 0.000."""
WORK_COLUMNS = (
    "stage",
    "ranks",
    "holds",
    "forward, ms",
    "backward, ms",
    "TFLOP a step",
    "launches a step",
    "waits a step",
)
PHASE_COLUMNS = (
    "phase",
    "length",
    "steps",
    "step, s",
    "tokens/s",
    "MFU",
    "bubble",
    "only communicates, s",
    "peak, GiB",
    "days",
    "GPU-hours",
)


def tables_of(forecast: RunForecast) -> list[Table | str]:
    """Return all tables of a forecast and the lines between them, in the order in which they are shown."""
    shown: list[Table | str] = []
    for phase in forecast.phases:
        shown.append(f"{phase.phase}: {phase.layout}; packs: {phase.packs}")
        shown.append(memory_table(phase, forecast.gpu_bytes))
        shown.append(work_table(phase))
    shown.append(time_table(forecast))
    shown.append(phase_table(forecast))
    return shown


def memory_table(phase: PhaseForecast, gpu_bytes: int) -> Table:
    """Return a row for each kind of rank: what its memory holds at the fullest moment, beside that of the card."""
    title = f"{phase.phase}: memory of a rank in GiB at its fullest moment"
    categories = [str(category) for category in Category]
    share = f"of {gpu_bytes / GIB:.1f}"
    table = _table(title, "stage", "ranks", "holds", *categories, "peak", share)
    for rank in phase.ranks:
        cells = [gibibytes(rank.memory.get(category, 0)) for category in Category]
        table.add_row(
            *_names(rank),
            *cells,
            gibibytes(rank.peak_bytes),
            f"{rank.peak_bytes / gpu_bytes:.0%}",
        )
    return table


def work_table(phase: PhaseForecast) -> Table:
    """Return a row for each kind of rank: times of a micro-batch, launches and waits of a step."""
    table = _table(
        f"{phase.phase}: work of a rank; forward and backward of a micro-batch", *WORK_COLUMNS
    )
    for rank in phase.ranks:
        table.add_row(*work_cells(rank))
    return table


def work_cells(rank: RankForecast) -> list[str]:
    """Return the cells of WORK_COLUMNS."""
    waits = sum(wait.count for wait in rank.waits)
    return [
        *_names(rank),
        f"{rank.forward_seconds * 1e3:,.1f}",
        f"{rank.backward_seconds * 1e3:,.1f}",
        f"{rank.flops / 1e12:,.0f}",
        f"{rank.launches:,}",
        f"{waits:,}",
    ]


def time_table(forecast: RunForecast) -> Table:
    """Return a column for each phase: seconds of a step by part, on the slowest stage."""
    names = [phase.phase for phase in forecast.phases]
    table = _table("seconds of a step on the slowest stage, by part", "", *names)
    for part in parts_of(forecast):
        seconds = [phase.seconds.get(part, 0.0) for phase in forecast.phases]
        table.add_row(part, *(f"{each:.3f}" for each in seconds))
    table.add_section()
    table.add_row("step", *(f"{phase.step_seconds:.3f}" for phase in forecast.phases))
    return table


def phase_table(forecast: RunForecast) -> Table:
    """Return a row for each phase, and one for the run."""
    title = f"{forecast.name} on {forecast.gpus}"
    table = _table(title, *PHASE_COLUMNS)
    for phase in forecast.phases:
        table.add_row(*phase_cells(phase, forecast.world_size))
    if len(forecast.phases) > 1:
        table.add_section()
        table.add_row(*run_cells(forecast))
    return table


def run_cells(forecast: RunForecast) -> list[str]:
    """Return the cells of PHASE_COLUMNS for all phases together."""
    together = {
        "phase": "all",
        "steps": f"{sum(phase.steps for phase in forecast.phases):,}",
        "peak, GiB": gibibytes(max(map(peak_bytes, forecast.phases))),
        "days": f"{forecast.days:,.2f}",
        "GPU-hours": f"{forecast.gpu_hours:,.0f}",
    }
    return [together.get(column, "") for column in PHASE_COLUMNS]


def phase_cells(phase: PhaseForecast, world_size: int) -> list[str]:
    """Return the cells of PHASE_COLUMNS."""
    return [
        phase.phase,
        f"{phase.sequence_length:,}",
        f"{phase.steps:,}",
        f"{phase.step_seconds:.3f}",
        f"{phase.tokens_per_second:,.0f}",
        f"{phase.mfu:.1%}",
        f"{phase.bubble:.1%}",
        f"{phase.exposed_communication:.3f}",
        gibibytes(peak_bytes(phase)),
        f"{phase.days:,.2f}",
        f"{phase.days * 24 * world_size:,.0f}",
    ]


def parts_of(forecast: RunForecast) -> list[str]:
    """Return the parts that take at least LEAST_SECONDS in any phase, in their order."""
    parts: dict[str, float] = {}
    for phase in forecast.phases:
        for part, seconds in phase.seconds.items():
            parts[part] = max(parts.get(part, 0.0), seconds)
    return [part for part, seconds in parts.items() if seconds >= LEAST_SECONDS]


def peak_bytes(phase: PhaseForecast) -> int:
    """Return the bytes that the fullest kind of rank holds."""
    return max(rank.peak_bytes for rank in phase.ranks)


def gibibytes(held: int) -> str:
    """Return bytes as GiB with one decimal."""
    return f"{held / GIB:.1f}"


def _table(title: str, *columns: str) -> Table:
    # Beside every number stands that it is no measurement.
    return Table(*columns, title=f"{title} ({NOTICE})", title_justify="left")


def _names(rank: RankForecast) -> tuple[str, str, str]:
    """Return the cells that say which kind of rank a row is about."""
    return f"{rank.stage}", f"{rank.ranks:,}", rank.description
