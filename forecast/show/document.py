"""plan.json: all of a forecast, with the unit of each number in its name. docs/planning.md has the keys."""

from typing import Any, Final

from visionloom.forecast.results import PhaseForecast, RankForecast, RunForecast, Span
from visionloom.forecast.trace.events import AliveTensors, Mixed, Wait

JSON: Final = "plan.json"
PAGE: Final = "plan.html"
"""Made by page.py."""
VERSION: Final = 1
NOTICE: Final = "predicted; steps on one H100 took 4 to 11 % longer, on more none was measured"


def document(forecast: RunForecast) -> dict[str, Any]:
    """Return a forecast as values of JSON."""
    return {
        "version": VERSION,
        "notice": NOTICE,
        "name": forecast.name,
        "world_size": forecast.world_size,
        "gpu": forecast.gpu,
        "gpu_bytes": forecast.gpu_bytes,
        "attention": forecast.attention,
        "can_run": forecast.can_run,
        "days": forecast.days,
        "gpu_hours": forecast.gpu_hours,
        "faults": forecast.faults,
        "notes": forecast.notes,
        "phases": [_phase(phase) for phase in forecast.phases],
    }


def _phase(phase: PhaseForecast) -> dict[str, Any]:
    return {
        "phase": phase.phase,
        "layout": phase.layout,
        "sequence_length_tokens": phase.sequence_length,
        "packs": phase.packs,
        "steps": phase.steps,
        "step_seconds": phase.step_seconds,
        "step_tokens": phase.tokens,
        "tokens_per_second": phase.tokens_per_second,
        "mfu_share": phase.mfu,
        "bubble_share": phase.bubble,
        "exposed_communication_seconds": phase.exposed_communication,
        "seconds_by_part": phase.seconds,
        "days": phase.days,
        "faults": list(phase.faults),
        "notes": list(phase.notes),
        "ranks": [_rank(rank) for rank in phase.ranks],
        "timeline": [_span(span) for span in phase.timeline],
    }


def _rank(rank: RankForecast) -> dict[str, Any]:
    return {
        "stage": rank.stage,
        "traced_rank": rank.rank,
        "ranks_of_this_kind": rank.ranks,
        "description": rank.description,
        "peak_bytes": rank.peak_bytes,
        "bytes_by_category": {str(name): held for name, held in rank.memory.items()},
        "alive_at_peak": [_alive(alive) for alive in rank.alive],
        "micro_batch_forward_seconds": rank.forward_seconds,
        "micro_batch_backward_seconds": rank.backward_seconds,
        "step_launches": rank.launches,
        "step_bytes": rank.moved_bytes,
        "step_flops": rank.flops,
        "waits": [_wait(wait) for wait in rank.waits],
        "mixed": [_mixed(mixed) for mixed in rank.mixed],
    }


def _alive(alive: AliveTensors) -> dict[str, Any]:
    return {
        "category": str(alive.category),
        "part": alive.part,
        "operation": alive.name,
        "bytes": alive.bytes,
        "count": alive.count,
    }


def _wait(wait: Wait) -> dict[str, Any]:
    return {
        "kind": wait.kind,
        "place": wait.place,
        "count_in_step": wait.count,
        "in_each_micro_batch": wait.per_micro_batch,
    }


def _mixed(mixed: Mixed) -> dict[str, Any]:
    return {"operation": mixed.name, "place": mixed.place, "count_in_step": mixed.count}


def _span(span: Span) -> dict[str, Any]:
    return {
        "stage": span.stage,
        "chunk": span.chunk,
        "micro_batch": span.micro_batch,
        "kind": str(span.kind),
        "start_seconds": span.start,
        "end_seconds": span.end,
    }
