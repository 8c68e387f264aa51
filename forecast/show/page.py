"""plan.html: a forecast on one page, a single file that needs no network."""

from collections.abc import Sequence
from html import escape
from typing import Final

from visionloom.common.text import printable
from visionloom.forecast.results import PhaseForecast, RankForecast, RunForecast
from visionloom.forecast.show.document import NOTICE
from visionloom.forecast.show.drawings import StackedBar, legend, stacked_bars, timeline
from visionloom.forecast.show.tables import (
    PHASE_COLUMNS,
    WORK_COLUMNS,
    gibibytes,
    parts_of,
    phase_cells,
    work_cells,
)
from visionloom.forecast.trace.events import Category
from visionloom.train.report.html import duration, figure, section, table, whole_page
from visionloom.train.report.style import STYLE

ALIVE_SHOWN: Final = 12
"""Origins of tensors at the peak, for each kind of rank."""
ALIVE_COLUMNS: Final = ("for", "part", "made by", "tensors", "GiB")
WAIT_COLUMNS: Final = ("line", "kind", "in a step", "in each micro-batch", "stages")
MIXED_COLUMNS: Final = ("line", "operation", "in a step")
OWN_STYLE: Final = """
:root { --c0: #2563a8; --c1: #cc6a1a; --c2: #1f7a4d; --c3: #8a5bb5; --c4: #b3382c; --c5: #0f8a8a; --c6: #a68a1a; --c7: #9aa5b1; }
@media (prefers-color-scheme: dark) { :root {
  --c0: #6ba7e5; --c1: #e59a55; --c2: #5cc28f; --c3: #b795dc; --c4: #ec8072; --c5: #56c2c2; --c6: #d4bb55; --c7: #5b6672; } }
svg text { fill: var(--ink); font-size: 12px; dominant-baseline: middle; }
svg .over { fill: var(--bad); font-weight: 650; }
svg .inside { fill: #ffffff; text-anchor: middle; font-size: 10px; }
.limit { stroke: var(--bad); stroke-width: 2; stroke-dasharray: 5 4; }
rect { stroke: var(--page); stroke-width: 0.5; }
.piece-0 { fill: var(--c0); background: var(--c0); } .piece-1 { fill: var(--c1); background: var(--c1); }
.piece-2 { fill: var(--c2); background: var(--c2); } .piece-3 { fill: var(--c3); background: var(--c3); }
.piece-4 { fill: var(--c4); background: var(--c4); } .piece-5 { fill: var(--c5); background: var(--c5); }
.piece-6 { fill: var(--c6); background: var(--c6); } .piece-7 { fill: var(--c7); background: var(--c7); }
.forward { fill: var(--one); } .backward { fill: var(--two); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 8px 0 16px; padding: 0; font-size: 13px; }
.legend i { display: inline-block; width: 11px; height: 11px; margin-right: 6px; border-radius: 2px; }
.faults li { color: var(--bad); overflow-wrap: anywhere; }
.numbers td { white-space: normal; overflow-wrap: anywhere; }
h3 { margin: 24px 0 8px; font-size: 15px; }
"""


def page_of(forecast: RunForecast) -> str:
    """Return the page as HTML; names are escaped."""
    parts = [header(forecast), faults(forecast), costs(forecast), step_time(forecast)]
    for phase in forecast.phases:
        parts.append(memory(phase, forecast.gpu_bytes))
        parts.append(work(phase))
        parts.append(pipeline(phase))
        parts.append(alive(phase))
        parts.append(host(phase))
    return printable(whole_page(f"plan of {forecast.name}", STYLE + OWN_STYLE, parts))


def header(forecast: RunForecast) -> str:
    """Return the name of the run and its facts."""
    facts = {
        "GPUs": forecast.gpus,
        "memory of each": f"{gibibytes(forecast.gpu_bytes)} GiB",
        "verdict": "can run" if forecast.can_run else "cannot run",
        "time": duration(forecast.days * 86_400),
        "GPU-hours": f"{forecast.gpu_hours:,.0f}",
    }
    items = []
    for name, value in facts.items():
        items.append(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>")
    return (
        f'<header class="top"><p>visionloom plan, {NOTICE}</p><h1>{escape(forecast.name)}</h1>'
        f"<dl>{''.join(items)}</dl></header>"
    )


def faults(forecast: RunForecast) -> str:
    """Return what is wrong and what slows the run, of all phases."""
    parts = ""
    for title, kind, lines in (
        ("What is wrong", "faults", forecast.faults),
        ("What slows it", "notes", forecast.notes),
    ):
        items = "".join(f"<li>{escape(line)}</li>" for line in lines)
        if items:
            parts += section(title, f'<ul class="{kind}">{items}</ul>')
    return parts


def costs(forecast: RunForecast) -> str:
    """Return a table of the phases."""
    rows = []
    for phase in forecast.phases:
        cells = phase_cells(phase, forecast.world_size)
        rows.append([escape(cell) for cell in cells])
    return section("Phases", table(PHASE_COLUMNS, rows), NOTICE)


def step_time(forecast: RunForecast) -> str:
    """Return a bar for each phase: where the time of a step goes on the slowest stage."""
    parts = parts_of(forecast)
    bars = []
    for phase in forecast.phases:
        pieces = [phase.seconds.get(part, 0.0) for part in parts]
        bars.append(StackedBar(phase.phase, pieces, f"{phase.step_seconds:.3f} s"))
    drawn = figure(stacked_bars(parts, bars), "Seconds of a step on the slowest stage")
    return section("Where the time goes", legend(parts) + drawn, NOTICE)


def memory(phase: PhaseForecast, gpu_bytes: int) -> str:
    """Return a bar for each kind of rank: what its memory holds at the fullest moment, against the card."""
    names = [str(category) for category in Category]
    bars = []
    for rank in phase.ranks:
        bars.append(memory_bar(rank, gpu_bytes))
    caption = f"Memory of a rank at its fullest moment; the dashed line is the card, {gibibytes(gpu_bytes)} GiB"
    drawn = figure(stacked_bars(names, bars, gpu_bytes), caption)
    note = (
        f"{escape(phase.layout)}; packs of {phase.sequence_length:,} tokens: {escape(phase.packs)}"
    )
    return section(f"{escape(phase.phase)}: memory", legend(names) + drawn, note)


def memory_bar(rank: RankForecast, gpu_bytes: int) -> StackedBar:
    """Return the bar of a kind of rank, a piece for each category of memory."""
    pieces = [float(rank.memory.get(category, 0)) for category in Category]
    total = f"{gibibytes(rank.peak_bytes)} GiB"
    return StackedBar(kind_of_rank(rank), pieces, total, rank.peak_bytes > gpu_bytes)


def work(phase: PhaseForecast) -> str:
    """Return a table of the kinds of rank: times, launches, waits."""
    rows = []
    for rank in phase.ranks:
        rows.append([escape(cell) for cell in work_cells(rank)])
    note = f"Forward and backward: one micro-batch, its communication included. {NOTICE[0].upper()}{NOTICE[1:]}."
    return section(f"{escape(phase.phase)}: work", table(WORK_COLUMNS, rows), note)


def pipeline(phase: PhaseForecast) -> str:
    """Return the timeline of the stages; empty for a phase without passes."""
    if not phase.timeline:
        return ""
    drawn = figure(timeline(phase.timeline, phase.step_seconds))
    key = (
        '<ul class="legend"><li><i style="background: var(--one)"></i>forward</li>'
        '<li><i style="background: var(--two)"></i>backward, recomputation included</li></ul>'
    )
    note = "One step from left to right, with the number of each micro-batch. Bare at the end: gradient reduction and optimizer."
    return section(
        f"{escape(phase.phase)}: pipeline", key + f'<div class="wide">{drawn}</div>', note
    )


def alive(phase: PhaseForecast) -> str:
    """Return the tensors that are alive at the fullest moment of each kind of rank, the largest first."""
    tables = []
    for rank in phase.ranks:
        if rows := alive_rows(rank):
            name = escape(kind_of_rank(rank))
            tables.append(table(ALIVE_COLUMNS, rows, name, "numbers"))
    if not tables:
        return ""
    body = f'<div class="two">{"".join(tables)}</div>'
    return section(f"{escape(phase.phase)}: alive at the fullest moment", body, NOTICE)


def alive_rows(rank: RankForecast) -> list[list[str]]:
    """Return the cells of ALIVE_COLUMNS, the largest tensors first."""
    rows = []
    for tensors in rank.alive[:ALIVE_SHOWN]:
        names = (str(tensors.category), tensors.part, tensors.name)
        row = [escape(name) for name in names]
        rows.append([*row, f"{tensors.count:,}", gibibytes(tensors.bytes)])
    return rows


def host(phase: PhaseForecast) -> str:
    """Return the lines at which the host waits for the device, and operations that mix both."""
    waits = merged_rows(phase.ranks)
    body = ""
    if waits:
        body += table(WAIT_COLUMNS, waits, "The host waits for the device", "numbers")
    mixed = []
    for rank in phase.ranks:
        for each in rank.mixed:
            mixed.append([escape(each.place), escape(each.name), f"{each.count:,}"])
    if mixed:
        body += table(
            MIXED_COLUMNS, mixed, "Tensors of host and device in one operation", "numbers"
        )
    return section(f"{escape(phase.phase)}: the host", body) if body else ""


def merged_rows(ranks: Sequence[RankForecast]) -> list[list[str]]:
    """Return a row for each line that waits: the cells of the stages that have the same are joined."""
    stages: dict[tuple[str, ...], list[int]] = {}
    for rank in ranks:
        for wait in rank.waits:
            often = "yes" if wait.per_micro_batch else "no"
            row = (wait.place, wait.kind, f"{wait.count:,}", often)
            stages.setdefault(row, []).append(rank.stage)
    rows = []
    for cells, places in stages.items():
        joined = ", ".join(map(str, dict.fromkeys(places)))
        rows.append([*map(escape, cells), joined])
    return rows


def kind_of_rank(rank: RankForecast) -> str:
    """Return what tells a kind of rank from others."""
    return f"stage {rank.stage}: {rank.description}"
