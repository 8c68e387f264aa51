"""From a request to a forecast. References: topologies of imagined ranks, parameters and operations counted by formula."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest

from visionloom.common.errors import UserError
from visionloom.forecast import run as runs
from visionloom.forecast.machine import machine
from visionloom.forecast.packs import PackChoice
from visionloom.forecast.request import PlanRequest
from visionloom.forecast.results import RunForecast
from visionloom.forecast.run import (
    ImaginedPhase,
    LayoutOrder,
    as_planned,
    forecast_kernels,
    forecast_layout,
    forecast_layouts,
    forecast_run,
    fullest,
)
from visionloom.forecast.schedule import Pipeline
from visionloom.forecast.trace.events import Category, Direction, Kernel, Operation
from visionloom.launch.configure import compose
from visionloom.model.flops import step_flops
from visionloom.model.huggingface.shapes import parameter_count
from visionloom.parallel.config import ParallelConfig
from visionloom.parallel.parts import LANGUAGE
from visionloom.parallel.share import Share
from visionloom.tests.forecast.made import GIB, rank_forecast
from visionloom.tests.forecast.traces import one_step
from visionloom.tests.ranks import RankPool


def request_of(world_size: int, *words: str) -> PlanRequest:
    config = compose(words, world_size)
    assert config is not None
    phases = tuple(config.phases)
    return PlanRequest(config, world_size, "h100", machine("h100"), 1.0, phases)


def shares(cases: list[tuple[ParallelConfig, int, int]]) -> list[Share]:
    """The shares of imagined ranks; runs on a rank of the pool, which leaves its world."""
    import torch
    import torch.distributed as dist

    from visionloom.parallel import topology as topologies

    dist.destroy_process_group()
    seen = []
    for layout, world_size, rank in cases:
        topology = topologies.imagine(layout, world_size, rank, torch.device("meta"))
        seen.append(topology.share)
        topologies.stop()
    return seen


LAYOUTS = {
    "tensor 2": (["parallel.tensor=2"], 8),
    "no sequence": (
        [
            "parallel.tensor=2",
            "parallel.sequence=false",
            "parallel.context=4",
            "data.sample_token_multiple=8",
        ],
        16,
    ),
    "context 2": (["parallel.context=2", "data.sample_token_multiple=4"], 16),
    "pipeline 4": (["parallel.pipeline=4", "parallel.tensor=2"], 16),
    "virtual": (["parallel.pipeline=2", "parallel.virtual_pipeline=3"], 4),
}


@pytest.fixture(scope="module")
def imagined() -> dict[str, ImaginedPhase]:
    """The phase of a recipe in each layout."""
    phases = {}
    for name, (words, ranks) in LAYOUTS.items():
        request = request_of(ranks, "+recipe=full/qwen3vl_8b", "parallel=single", *words)
        phases[name] = ImaginedPhase.of(request, "finetune")
    return phases


def test_ranks_encode_what_their_topology_says(
    imagined: dict[str, ImaginedPhase], pool: RankPool
) -> None:
    orders = [order for phase in imagined.values() for order in phase.orders()]
    layouts = [phase.layout for phase in imagined.values() for _ in phase.orders()]
    cases = [
        (layout, order.world_size, order.rank)
        for layout, order in zip(layouts, orders, strict=True)
    ]
    (expected,) = pool.run(1, shares, cases)
    # A rank in the middle of its encoder ranks is among them.
    assert any(share.encoder_rank > 0 for share in expected)
    for order, share in zip(orders, expected, strict=True):
        assert order.share.encoder_ranks == share.encoder_ranks
        assert order.share.encoder_rank == share.encoder_rank


def test_kinds_are_traced_on_mean_packs_and_the_ends_on_their_fullest(
    imagined: dict[str, ImaginedPhase],
) -> None:
    phase = imagined["pipeline 4"]
    traced = Counter((order.rank, order.choice) for order in phase.orders())
    assert set(traced.values()) == {1}
    first, last = {order.rank for order in phase.orders() if order.rank < 4}, 12
    middle = 4
    choices = {rank: {choice for at, choice in traced if at == rank} for rank, _ in traced}
    assert all(choices[rank] == {PackChoice.MEAN, PackChoice.PATCHES} for rank in first)
    assert choices[middle] == {PackChoice.MEAN}
    assert choices[last] == {PackChoice.MEAN, PackChoice.SUPERVISED}
    assert set(choices) == {*first, middle, last}


def test_few_micro_batches_are_traced(imagined: dict[str, ImaginedPhase]) -> None:
    for order in imagined["pipeline 4"].orders():
        assert order.micro_batches == (2 if order.choice is PackChoice.MEAN else 1)
    # Interleaved stages take them only in multiples of their number.
    assert {order.micro_batches for order in imagined["virtual"].orders()} == {2}
    assert imagined["virtual"].micro_batches == 32 / 2


def test_layouts_are_ranked_by_one_kind_of_each_stage(
    imagined: dict[str, ImaginedPhase],
) -> None:
    for name in ("pipeline 4", "context 2", "virtual"):
        whole, ranking = imagined[name], imagined[name].for_ranking
        stages = [kind.stages for kind in ranking.kinds]
        assert len(set(stages)) == len(stages)
        assert set(stages) == {kind.stages for kind in whole.kinds}
        # The busiest of the first stage is the one that stays.
        assert ranking.kinds[0] == whole.kinds[0]
        mean = [order for order in ranking.orders() if order.choice is PackChoice.MEAN]
        assert {order.micro_batches for order in mean} == {2}


def test_forecasts_of_layouts_come_in_the_order_of_the_layouts() -> None:
    requests = [request_of(ranks, "+recipe=full/qwen3vl_8b", "parallel=single") for ranks in (1, 2)]
    done = []

    def last_first(work: Any, items: Iterable[Any], *_: Any) -> Iterator[tuple[Any, Any]]:
        for item in reversed(list(items)):
            yield item, [item.request.world_size] * len(item.kernels)

    with mock.patch.object(runs, "as_finished", last_first):
        forecasts: list[Any] = forecast_layouts(requests, lambda: done.append(1))
        several: list[Any] = forecast_kernels(requests, ("flash2", "flash3"), lambda: None)
    assert forecasts == [1, 2] and len(done) == 2
    assert several == [[1, 1], [2, 2]]


def test_a_layout_is_traced_once_for_all_kernels_of_attention() -> None:
    """One operation of 9.89e14, forward: a second of the peak of an H100, of which kernels reach 0.275 and 0.44."""
    attention = Operation(
        "attention", LANGUAGE, Direction.FORWARD, Kernel.ATTENTION, "bf16", 9.89e14, 9.89e14, 0
    )
    trace = one_step(Pipeline(1, 1, 1), forward=0.0, backward=0.0)
    slots = list(trace.slots)
    slots[1] = replace(slots[1], operations=((attention, 1),))
    trace = replace(trace, slots=tuple(slots))
    words = ["parallel=single", "phases.finetune.global_batch=1"]
    request = request_of(1, "+recipe=full/qwen3vl_8b", *words)
    order = LayoutOrder(0, request, (PackChoice.MEAN,), ("auto", "flash3"))
    with mock.patch.object(runs, "trace_one", return_value=trace) as traced:
        flash2, flash3 = forecast_layout(order)
    assert traced.call_count == 1
    assert flash2.step_seconds == pytest.approx(0.75 + 1 / 0.275, rel=1e-3)
    assert flash3.step_seconds == pytest.approx(0.75 + 1 / 0.44, rel=1e-3)
    assert flash3.mfu / flash2.mfu == pytest.approx(flash2.step_seconds / flash3.step_seconds)
    # The run's own are heeded where nothing else is asked.
    planned = as_planned(request.with_attention("flash3"))
    assert planned.machine.attention_forward_share == 0.44


def test_kernels_whose_speed_is_not_known_are_refused() -> None:
    request = request_of(1, "+recipe=full/qwen3vl_8b", "parallel=single", "model.attention=flash3")
    request = replace(request, gpu="b200", machine=machine("b200"))
    with pytest.raises(UserError, match=r"^model\.attention=flash3 cannot be planned: .*b200"):
        as_planned(request)


def test_memory_is_that_of_the_fullest_packs_and_time_that_of_the_mean() -> None:
    mean = rank_forecast(0)
    full = replace(rank_forecast(0, 50 * GIB), forward_seconds=9.0)
    both = fullest([mean, full])
    assert both.peak_bytes == full.peak_bytes and both.memory == full.memory
    assert both.alive == full.alive and both.forward_seconds == mean.forward_seconds
    assert fullest([full, mean]) == full


def forecast_here(request: PlanRequest) -> tuple[RunForecast, list[Any]]:
    """Forecast in this process, which is a rank of the pool and has megatron-core; it leaves its world."""
    import torch.distributed as dist

    dist.destroy_process_group()
    shown = []

    def one_by_one(
        work: Callable[[Any], Any], items: Iterable[Any], *_: Any
    ) -> Iterator[tuple[Any, Any]]:
        for item in items:
            yield item, work(item)

    with mock.patch.object(runs, "as_finished", one_by_one):
        forecast = forecast_run(request, lambda *counts: shown.append(counts))
    return forecast, shown


def test_a_tiny_run_is_forecast(pool: RankPool) -> None:
    # A tokenizer that is surely not there: `make demo` may have left the recipe's own in this folder.
    missing = "data.tokenizer=no-such-folder"
    words = [
        "+recipe=demo",
        "model=tiny",
        "~phases.language",
        "~phases.towers",
        "phases.align.global_batch=8",
        missing,
    ]
    request = request_of(2, *words)
    request = replace(request, phases=("align", "multimodal"))
    ((forecast, shown),) = pool.run(1, forecast_here, request)
    assert shown[0] == ("align", 0, 3) and shown[-1] == ("multimodal", 3, 3)
    assert (forecast.name, forecast.gpu_bytes) == ("demo", machine("h100").usable_bytes)

    align, multimodal = forecast.phases
    parameters = parameter_count(request.config.model)
    (rank,) = multimodal.ranks
    # On a GPU the model is bf16, and its gradients are fp32.
    assert rank.memory[Category.WEIGHTS] == pytest.approx(2 * parameters, rel=0.02)
    assert rank.memory[Category.GRADIENTS] == pytest.approx(4 * parameters, rel=0.02)
    assert rank.ranks == 2 and rank.peak_bytes == sum(rank.memory.values())
    (frozen,) = align.ranks
    assert frozen.memory[Category.GRADIENTS] < rank.memory[Category.GRADIENTS] / 2

    phase = ImaginedPhase.of(request, "align")
    work = phase.packs[PackChoice.MEAN].counts.work
    flops = 4 * sum(step_flops(request.config.model, work, {"merger"}).values())
    assert align.tokens == 4 * work.tokens and align.steps == 40
    assert align.mfu * align.step_seconds * 2 * machine("h100").peak == pytest.approx(flops)
    assert align.tokens_per_second == pytest.approx(align.tokens / align.step_seconds)
    assert len(align.timeline) == 2 * 2
    assert "no folder" in align.packs
