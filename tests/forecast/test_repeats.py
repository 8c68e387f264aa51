"""A step of many micro-batches is known from a trace of few. Reference: the trace of all, of the same rank on the same pack."""

from typing import Any

import pytest

from visionloom.forecast.estimate import estimate
from visionloom.forecast.kinds import RankKind
from visionloom.forecast.machine import machine
from visionloom.forecast.phase_traces import PhaseTraces, TracedKind
from visionloom.forecast.results import PhaseForecast
from visionloom.forecast.trace.events import RankTrace
from visionloom.tests.forecast.imagined import imagined
from visionloom.tests.ranks import RankPool
from visionloom.tests.train.layouts import Case, Layout, packs_of

ALL = 8
FEW = 2
"""Interleaved stages take no fewer: a micro-batch for each stage."""
COPIES = 3
"""Launches between passes in which a micro-batch of virtual stages may differ from the traced ones."""
PREPARES = 8
"""Launches before the gradients of a stage are reduced: one a bucket."""
LAYOUTS: dict[str, dict[str, Any]] = {
    "one stage": {},
    "pipeline": {"pipeline": 2, "pipeline_layout": "Et|tttL"},
    "virtual stages": {"pipeline": 2, "virtual_pipeline": 2},
}


def forecast(layout: Layout, traces: list[RankTrace]) -> PhaseForecast:
    """The forecast of a step of ALL micro-batches; `traces`: one of each stage."""
    kinds = []
    for trace in traces:
        kind = RankKind(trace.rank, 1, (trace.stage,), f"stage {trace.stage}")
        kinds.append(TracedKind(kind, trace))
    phase = PhaseTraces(
        phase="align",
        layout=layout.config,
        world_size=layout.ranks,
        sequence_length=128,
        packs="the same one again and again",
        kinds=tuple(kinds),
        micro_batches=ALL,
        micro_batch=1,
        steps=1,
        flops=1.0,
        tokens=1.0,
    )
    return estimate(phase, "h100", machine("h100"))


@pytest.mark.parametrize("experts", [0, 8], ids=["dense", "mixture"])
@pytest.mark.parametrize("data", [1, 2])
@pytest.mark.parametrize("name", LAYOUTS)
def test_few_micro_batches_stand_for_all(
    name: str, data: int, experts: int, pool: RankPool
) -> None:
    """With two data ranks weights are gathered and gradients reduced beside passes, once a step."""
    parallel = LAYOUTS[name]
    stages = parallel.get("pipeline", 1)
    layout = Layout(stages * data, parallel, Case(experts=experts))
    pack, ranks = packs_of("everything")[0], [stage * data for stage in range(stages)]
    few, every = (
        forecast(layout, pool.run(1, imagined, layout, [pack] * count * data, ranks)[0])
        for count in (FEW, ALL)
    )

    # Of two traced micro-batches the second stands for the others, with what prepares a reduction.
    more = PREPARES * (ALL - FEW) if data > 1 else 0
    late = more * machine("h100").launch
    assert every.step_seconds * 0.99 <= few.step_seconds <= every.step_seconds * 1.01 + late
    assert [rank.flops for rank in few.ranks] == [rank.flops for rank in every.ranks]
    for own, reference in zip(few.ranks, every.ranks, strict=True):
        # Where no pass comes any more, nothing is received, of which each chunk makes copies.
        copies = COPIES * (ALL - FEW) if name == "virtual stages" else 0
        assert reference.launches - copies <= own.launches <= reference.launches + more
    peaks = [rank.peak_bytes for rank in every.ranks]
    assert [rank.peak_bytes for rank in few.ranks] == pytest.approx(peaks, rel=0.02)
