"""From traces to a forecast. References: sums in the head, and a trace of the whole step where a short one stands for it."""

from dataclasses import replace

import pytest

from visionloom.common.errors import UserError
from visionloom.forecast.costs import collective_seconds, message_seconds
from visionloom.forecast.estimate import estimate
from visionloom.forecast.machine import GIB, machine
from visionloom.forecast.phase_traces import PhaseTraces
from visionloom.forecast.rank_step import RankStep
from visionloom.forecast.results import BUBBLE, HOST, MESSAGES, PhaseForecast
from visionloom.forecast.schedule import Pipeline
from visionloom.forecast.trace.events import (
    AliveTensors,
    Category,
    Direction,
    FlightMark,
    Kernel,
    Mixed,
    RankTrace,
    SlotKind,
    SlotMemory,
    Wait,
)
from visionloom.parallel.config import ParallelConfig
from visionloom.parallel.parts import LANGUAGE, OPTIMIZER
from visionloom.tests.forecast.traces import (
    HELD,
    INSIDE,
    MIB,
    SAVED,
    collective,
    one_step,
    phase,
    product,
    receiving_step,
    reduction,
    traced_kind,
    with_messages,
)


def forecast_of(traces: PhaseTraces, gpu: str) -> PhaseForecast:
    """The forecast on a machine as its file says."""
    return estimate(traces, gpu, machine(gpu))


def stages_of(pipeline: Pipeline) -> list[RankTrace]:
    return [one_step(pipeline, stage) for stage in range(pipeline.stages)]


def layout_of(pipeline: Pipeline) -> ParallelConfig:
    chunks = pipeline.chunks if pipeline.chunks > 1 else None
    return ParallelConfig(pipeline=pipeline.stages, virtual_pipeline=chunks)


def test_one_rank_takes_the_sum_of_its_passes() -> None:
    forecast = forecast_of(phase(one_step(Pipeline(1, 1, 2)), micro_batches=10), "h100")
    assert forecast.step_seconds == pytest.approx(0.25 + 10 * 3.0 + 0.5)
    assert forecast.seconds == pytest.approx(
        {LANGUAGE: 30.25, OPTIMIZER: 0.5, HOST: 0, MESSAGES: 0, BUBBLE: 0}
    )
    assert forecast.tokens_per_second == pytest.approx(8000 / 30.75)
    assert forecast.mfu == pytest.approx(1e15 / 30.75 / 989e12)
    assert forecast.days == pytest.approx(100 * 30.75 / 86_400)

    (rank,) = forecast.ranks
    assert (rank.forward_seconds, rank.backward_seconds) == pytest.approx((1.0, 2.0))
    assert rank.launches == 22
    on = machine("h100")
    assert rank.moved_bytes == pytest.approx(30.75 * on.memory_gbps * 1e9 * on.memory_share)
    assert rank.peak_bytes == HELD + SAVED + INSIDE == sum(rank.memory.values())


PIPELINES = [Pipeline(2, 1, 6), Pipeline(4, 1, 9), Pipeline(4, 1, 3), Pipeline(2, 2, 8)]


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_short_trace_stands_for_the_whole_step(pipeline: Pipeline) -> None:
    """A trace of all micro-batches says its own peak, and so does one of few."""
    few = replace(pipeline, micro_batches=pipeline.stages if pipeline.chunks > 1 else 2)
    layout = layout_of(pipeline)
    forecasts = [
        forecast_of(
            phase(*stages_of(traced), micro_batches=pipeline.micro_batches, layout=layout),
            "h100",
        )
        for traced in (pipeline, few)
    ]
    whole, short = forecasts
    assert short.step_seconds == pytest.approx(whole.step_seconds)
    assert short.seconds == pytest.approx(whole.seconds)
    for stage, (one, other) in enumerate(zip(whole.ranks, short.ranks, strict=True)):
        own = one_step(pipeline, stage).peak.bytes
        assert one.peak_bytes == other.peak_bytes == own
        assert one.memory == other.memory
        assert sum(other.memory.values()) == own
        assert one.launches == other.launches
    assert other.flops == one.flops


def test_earlier_stages_hold_more_micro_batches() -> None:
    """Stage s of p has p - s of them in flight (1F1B)."""
    forecast = forecast_of(phase(*stages_of(Pipeline(12, 1, 1)), micro_batches=24), "h100")
    held = [rank.peak_bytes for rank in forecast.ranks]
    assert held == [HELD + (12 - stage) * SAVED + INSIDE for stage in range(12)]
    # Those of eleven more are now the largest.
    name = "of more micro-batches in flight"
    more = AliveTensors(Category.ACTIVATIONS, "all", name, 11 * SAVED, 1)
    assert 11 * SAVED > HELD
    assert [each.bytes for each in forecast.ranks[0].alive] == [11 * SAVED, HELD]
    assert forecast.ranks[0].alive[0] == more


def test_stages_that_hold_as_much_share_a_trace() -> None:
    """Stage 1's trace stands for stage 2 as well, which keeps one micro-batch less."""
    first, second, third, last = stages_of(Pipeline(4, 1, 6))
    apart = phase(first, second, third, last, micro_batches=12)
    shared = traced_kind(second, (1, 2))
    together = replace(apart, kinds=(traced_kind(last), shared, traced_kind(first)))
    one, other = forecast_of(apart, "h100"), forecast_of(together, "h100")
    assert other.step_seconds == pytest.approx(one.step_seconds)
    assert other.timeline == one.timeline
    for alone, sharing in zip(one.ranks, other.ranks, strict=True):
        assert (sharing.stage, sharing.rank, sharing.ranks) == (alone.stage, alone.rank, 1)
        assert sharing.peak_bytes == alone.peak_bytes == sum(sharing.memory.values())
        assert sharing.memory == alone.memory
        assert sharing.description == alone.description


def test_stages_that_are_too_full_are_one_line() -> None:
    first, second, _, last = stages_of(Pipeline(4, 1, 6))
    full = traced_kind(fuller(second, Category.LOGITS, 80 * GIB), (1, 2))
    traces = phase(first, last, micro_batches=12, layout=ParallelConfig(pipeline=4))
    traces = replace(traces, kinds=(*traces.kinds, full))
    (fault,) = forecast_of(traces, "h100").faults
    assert fault.startswith(
        "stages 1, 2 (stage 1: rank 1) need up to 81.3 GiB, h100 has 77.0 usable: logits 80"
    )


@pytest.mark.parametrize("traced", [1, 2, 3, 4])
@pytest.mark.parametrize("stage", range(4))
def test_what_is_released_late_does_not_pile_up(stage: int, traced: int) -> None:
    """The trace of a few micro-batches ends before all that was received is released: four messages at most are left."""
    pipeline, received = Pipeline(4, 1, 100), 16 * MIB
    few = replace(pipeline, micro_batches=traced)
    steps = [
        RankStep(
            traced_kind(receiving_step(own, stage, received)),
            stage,
            pipeline,
            machine("h100"),
        )
        for own in (pipeline, few)
    ]
    whole, short = (step.memory.bytes for step in steps)
    assert abs(whole - short) <= 4 * received


def test_the_bubble_is_a_share_of_the_step() -> None:
    forecast = forecast_of(phase(*stages_of(Pipeline(4, 1, 1)), micro_batches=12), "h100")
    assert forecast.step_seconds == pytest.approx(0.25 + (12 + 3) * 3.0 + 0.5)
    assert forecast.bubble == pytest.approx(3 * 3.0 / forecast.step_seconds)
    assert sum(forecast.seconds.values()) == pytest.approx(forecast.step_seconds)
    assert len(forecast.timeline) == 4 * 12 * 2


def test_the_slowest_rank_sets_the_pace_of_its_stage() -> None:
    pipeline = Pipeline(1, 1, 1)
    kinds = phase(one_step(pipeline), one_step(pipeline, forward=4.0), micro_batches=2)
    forecast = forecast_of(replace(kinds, layout=ParallelConfig()), "h100")
    assert forecast.step_seconds == pytest.approx(0.25 + 2 * 6.0 + 0.5)
    assert forecast.seconds[LANGUAGE] == pytest.approx(12.25)


def test_a_stage_begins_and_ends_with_its_slowest_rank() -> None:
    pipeline = Pipeline(1, 1, 1)
    quick, slow = one_step(pipeline), one_step(pipeline)
    begin, *passes, end = slow.slots
    begin, end = (replace(slot, operations=((slot.operations[0][0], 4),)) for slot in (begin, end))
    slow = replace(slow, slots=(begin, *passes, end))
    for kinds in ((quick, slow), (slow, quick)):
        traces = replace(phase(*kinds, micro_batches=2), layout=ParallelConfig())
        assert forecast_of(traces, "h100").step_seconds == pytest.approx(1.0 + 2 * 3.0 + 2.0)


def test_operations_that_are_made_again_are_no_work() -> None:
    trace = one_step(Pipeline(1, 1, 1))
    counts = {Direction.FORWARD: 1, Direction.RECOMPUTE: 10, Direction.BACKWARD: 100}
    products = tuple((product(1e12, direction), count) for direction, count in counts.items())
    slots = tuple(
        replace(slot, operations=products) if slot.kind is SlotKind.BACKWARD else slot
        for slot in trace.slots
    )
    forecast = forecast_of(phase(replace(trace, slots=slots), micro_batches=3), "h100")
    assert forecast.ranks[0].flops == 3 * 101e12


def test_copies_from_the_host_are_no_bytes_that_kernels_move() -> None:
    trace = one_step(Pipeline(1, 1, 1))
    begin, *others = trace.slots
    ((operation, count),) = begin.operations
    copied = replace(operation, kernel=Kernel.TRANSFER)
    slots = (replace(begin, operations=((copied, count),)), *others)
    moved = []
    for one in (trace, replace(trace, slots=slots)):
        (rank,) = forecast_of(phase(one, micro_batches=1), "h100").ranks
        moved.append(rank.moved_bytes)
    assert moved[0] - moved[1] == count * operation.bytes > 0


def test_a_message_goes_to_the_pipeline_s_neighbours() -> None:
    """With two stages one way goes over the group of all ranks, where a rank has others beside it."""
    size = 1 << 30
    trace = with_messages(one_step(Pipeline(2, 1, 1), 1), size)
    received = (collective("receive", "pipeline", 1), collective("send", "all", size))
    slots = tuple(
        replace(slot, collectives=received) if slot.kind is SlotKind.BETWEEN else slot
        for slot in trace.slots
    )
    groups = trace.groups | {"pipeline": (4, 12), "all": tuple(range(16))}
    trace = replace(trace, rank=12, slots=slots, groups=groups)
    step = RankStep(traced_kind(trace), 1, Pipeline(2, 1, 1), machine("h100"))
    assert step.message() == message_seconds(size, 12, 4, machine("h100"))


@pytest.mark.parametrize(("ranks", "slowest"), [((0, 7, 8), 8), ((0, 8, 9), 0), ((0, 1, 2), 2)])
def test_the_slower_link_of_a_stage_counts(ranks: tuple[int, int, int], slowest: int) -> None:
    """Nodes of eight ranks: between 7 and 8 is a network."""
    size = 1 << 30
    trace = with_messages(one_step(Pipeline(3, 1, 1), 1), size)
    trace = replace(trace, groups={"pipeline": ranks})
    step = RankStep(traced_kind(trace), 1, Pipeline(3, 1, 1), machine("h100"))
    assert step.message() == message_seconds(size, ranks[1], slowest, machine("h100"))


def test_messages_cost_what_is_missing_without_them() -> None:
    size = 1 << 30
    # The last message follows the last pass.
    end = (collective("send", "pipeline", size),)
    steps = [one_step(Pipeline(2, 1, 1), stage, end=end) for stage in (0, 1)]
    traces = [with_messages(trace, size) for trace in steps]
    forecast = forecast_of(phase(*traces, micro_batches=1), "h100")
    # Two stages of a node: one message forward, one backward, and nothing to do meanwhile.
    message = message_seconds(size, 0, 1, machine("h100"))
    assert forecast.seconds[MESSAGES] == pytest.approx(2 * message)
    assert forecast.exposed_communication == pytest.approx(2 * message)
    assert forecast.step_seconds == pytest.approx(0.25 + 6 + 0.5 + 2 * message)


def test_a_collective_hides_under_the_passes_until_it_is_waited_for() -> None:
    """Reduced from the backward pass on, waited for after the step's own 0.5 s of the optimizer."""
    scatter, _ = reduction(800 << 30)[0]
    alone = collective_seconds(scatter, range(8), machine("h100"))
    trace = one_step(Pipeline(1, 1, 1), ranks=8)
    begin, forward, backward, end = trace.slots
    (work,) = backward.operations
    marks = (FlightMark((work,), (), 1, scatter), FlightMark((work,), ()))
    backward = replace(backward, operations=((work[0], 2),), marks=marks)
    end = replace(end, marks=(FlightMark(end.operations, (), 1), FlightMark((), ())))

    slots = (begin, forward, replace(backward, collectives=((scatter, 1),)), end)
    forecast = forecast_of(phase(replace(trace, slots=slots), micro_batches=1), "h100")
    assert alone > 2.5
    assert forecast.seconds["data communication"] == pytest.approx(alone - 2.5)
    assert forecast.step_seconds == pytest.approx(0.25 + 1 + 4 + 0.5 + alone - 2.5)


def fuller(trace: RankTrace, category: Category, more: int) -> RankTrace:
    """The same step with so many bytes more at each moment."""
    slots = []
    for slot in trace.slots:
        memory = slot.memory
        raised = [size + more for size in (memory.before, memory.peak, memory.after)]
        slots.append(replace(slot, memory=SlotMemory(*raised)))
    by_category = trace.peak.by_category | {category: more}
    peak = replace(trace.peak, bytes=trace.peak.bytes + more, by_category=by_category)
    return replace(trace, slots=tuple(slots), peak=peak)


ACTIVATION_CURES = "parallel.recompute=full, parallel.offload_activations=true, parallel.tensor=2"
HELD_CURES = (
    "parallel.tensor=2, parallel.pipeline=4, more GPUs, whose data ranks share the optimizer"
)


@pytest.mark.parametrize(
    ("category", "gib", "shares", "cures"),
    [
        (Category.LOGITS, 80, "logits 80.0, weights 1.0, activations 0.1", f"{ACTIVATION_CURES}, parallel.context=2"),
        (Category.OPTIMIZER, 80, "optimizer 80.0, weights 1.0, activations 0.1", HELD_CURES),
    ],
)  # fmt: skip
def test_what_does_not_fit_says_how_it_could(
    category: Category, gib: int, shares: str, cures: str
) -> None:
    first, last = stages_of(Pipeline(2, 1, 1))
    traces = phase(fuller(first, category, gib * GIB), last, micro_batches=1)
    assert forecast_of(traces, "h100").faults == (
        f"stage 0 (rank 0) needs 81.1 GiB, h100 has 77.0 usable: {shares} GiB; try {cures}",
    )
    assert forecast_of(traces, "h200").faults == ()


def test_cures_that_are_there_already_are_not_named() -> None:
    layout = ParallelConfig(pipeline=2, recompute="full", offload_activations=True)
    first, last = stages_of(Pipeline(2, 1, 1))
    full = fuller(first, Category.ACTIVATIONS, 80 * GIB)
    traces = replace(phase(full, last, micro_batches=1, layout=layout), micro_batch=2)
    (fault,) = forecast_of(traces, "h100").faults
    assert fault.endswith("; try phases.align.micro_batch=1, parallel.tensor=2, parallel.context=2")


def test_mixed_operations_are_faults_and_waits_are_notes() -> None:
    waits = (
        Wait("item", "train/step.py:12 forward_losses", 4, True),
        Wait("item", "train/step.py:99 gradient_norm", 1, False),
    )
    mixed = (Mixed("aten::add", "model/loss.py:3 losses", 1),)
    first, second = (
        replace(trace, waits=waits, mixed=mixed) for trace in stages_of(Pipeline(2, 1, 1))
    )
    forecast = forecast_of(phase(first, second, micro_batches=1), "h100")
    assert forecast.faults == (
        "aten::add mixes tensors of the host and of the device at model/loss.py:3 losses: it fails on a GPU",
    )
    assert forecast.notes == (
        "the host waits for the device in each micro-batch: item at train/step.py:12 forward_losses",
    )
    assert forecast.ranks[0].waits == waits


def test_waits_in_micro_batches_are_those_of_the_whole_step() -> None:
    waits = (Wait("item", "model/loss.py:3 losses", 4, True), Wait("item", "a.py:9 norm", 3, False))
    trace = replace(one_step(Pipeline(1, 1, 2)), waits=waits)
    (rank,) = forecast_of(phase(trace, micro_batches=64), "h100").ranks
    assert [wait.count for wait in rank.waits] == [4 * 32, 3]


def test_a_layout_in_words() -> None:
    layout = ParallelConfig(
        pipeline=2,
        virtual_pipeline=2,
        recompute="block",
        recompute_layers=3,
        offload_activations=True,
    )
    traces = phase(*stages_of(Pipeline(2, 2, 2)), micro_batches=4, layout=layout)
    assert forecast_of(replace(traces, world_size=16), "h100").layout == (
        "pipeline 2, chunks 2, data 8, recompute block of 3 layers, activations offloaded"
    )


def test_an_unknown_gpu_is_refused() -> None:
    with pytest.raises(UserError, match=r"gpu=h10 is unknown \(did you mean h100\?\)"):
        forecast_of(phase(one_step(Pipeline(1, 1, 1)), micro_batches=1), "h10")


def test_the_first_and_the_last_micro_batch_stand_for_themselves() -> None:
    """Three traced passes of 1, 2 and 4 s: the middle one is repeated."""
    trace = one_step(Pipeline(1, 1, 3))
    lengths = iter([1.0, 2.0, 4.0])
    slots = tuple(
        replace(slot, operations=((slot.operations[0][0], int(next(lengths))),))
        if slot.kind is SlotKind.FORWARD
        else slot
        for slot in trace.slots
    )
    forecast = forecast_of(phase(replace(trace, slots=slots), micro_batches=7), "h100")
    assert forecast.step_seconds == pytest.approx(0.75 + 7 * 2.0 + 1 + 5 * 2 + 4)
