"""A forecast made by hand: 8B on 16 GPUs in four stages, of which the first does not fit."""

from dataclasses import replace
from typing import Final

from visionloom.forecast.results import PhaseForecast, RankForecast, RunForecast, Span
from visionloom.forecast.trace.events import AliveTensors, Category, Mixed, SlotKind, Wait

GIB: Final = 2**30
STAGES: Final = 4
MICRO_BATCHES: Final = 8
FORWARD: Final = 0.1
BACKWARD: Final = 0.2
DESCRIPTIONS: Final = (
    "layers 0-8, all pictures",
    "layers 9-17",
    "layers 18-26",
    "layers 27-35, loss",
)


def rank_forecast(stage: int, activations: int = 20 * GIB) -> RankForecast:
    """One kind of rank, with 10 GiB of weights, 20 of gradients and 15 of optimizer."""
    memory = {
        Category.WEIGHTS: 10 * GIB,
        Category.GRADIENTS: 20 * GIB,
        Category.OPTIMIZER: 15 * GIB,
        Category.ACTIVATIONS: activations,
        Category.LOGITS: 2 * GIB if stage == STAGES - 1 else 0,
        Category.COMMUNICATION: GIB // 2,
        Category.TEMPORARY: GIB // 2,
    }
    alive = AliveTensors(Category.ACTIVATIONS, "language", "aten::mm", activations, 36)
    return RankForecast(
        stage=stage,
        rank=4 * stage,
        ranks=4,
        description=DESCRIPTIONS[stage],
        memory=memory,
        peak_bytes=sum(memory.values()),
        alive=(alive,),
        forward_seconds=FORWARD,
        backward_seconds=BACKWARD,
        launches=11_832,
        moved_bytes=3_100_000_000_000,
        flops=5.1e15,
        waits=(Wait("item", "train/step.py:120 gradient_norm", 1, False),),
        mixed=(),
    )


def timeline() -> tuple[Span, ...]:
    """All forward passes, then all backward passes: right in order, if not how a GPU would be used."""
    spans = []
    for micro_batch in range(MICRO_BATCHES):
        for stage in range(STAGES):
            start = FORWARD * (micro_batch + stage)
            spans.append(Span(stage, 0, micro_batch, SlotKind.FORWARD, start, start + FORWARD))
    half = FORWARD * (MICRO_BATCHES + STAGES - 1)
    for micro_batch in range(MICRO_BATCHES):
        for stage in range(STAGES):
            start = half + BACKWARD * (micro_batch + STAGES - 1 - stage)
            spans.append(Span(stage, 0, micro_batch, SlotKind.BACKWARD, start, start + BACKWARD))
    return tuple(spans)


def phase_forecast(name: str = "finetune") -> PhaseForecast:
    """A phase of 1,000 steps of 4 seconds; its first stage holds 90 GiB of activations."""
    ranks = tuple(rank_forecast(stage) for stage in range(1, STAGES))
    return PhaseForecast(
        phase=name,
        layout="tensor 2, pipeline 4, data 2",
        sequence_length=8192,
        packs="a stated mixture of pictures and text",
        steps=1000,
        step_seconds=4.0,
        tokens=512_000.0,
        tokens_per_second=128_000.0,
        mfu=0.31,
        bubble=0.27,
        exposed_communication=0.2,
        seconds={"language": 2.5, "vision": 0.3, "optimizer": 0.2, "bubble": 1.0},
        ranks=(rank_forecast(0, 90 * GIB), *ranks),
        timeline=timeline(),
        faults=("stage 0 takes 136.0 GiB of 79.6: parallel.recompute=full",),
        notes=("the host waits for the device in each micro-batch: item at a.py:3 f",),
    )


def run_forecast() -> RunForecast:
    """One phase that does not fit."""
    return RunForecast("mine", 16, "h100", 80 * GIB, (phase_forecast(),))


def good_forecast() -> RunForecast:
    """Two phases that fit."""
    ranks = tuple(rank_forecast(stage) for stage in range(STAGES))
    first = replace(phase_forecast("short"), ranks=ranks, faults=())
    return RunForecast("mine", 16, "h100", 80 * GIB, (first, replace(first, phase="long")))


def hostile_forecast(text: str) -> RunForecast:
    """A forecast in which every name is `text`."""
    rank = replace(
        rank_forecast(0),
        description=text,
        alive=(AliveTensors(Category.WEIGHTS, text, text, GIB, 1),),
        waits=(Wait(text, text, 1, True),),
        mixed=(Mixed(text, text, 1),),
    )
    phase = replace(
        phase_forecast(text),
        layout=text,
        packs=text,
        seconds={text: 4.0},
        ranks=(rank,),
        faults=(text,),
        notes=(text,),
    )
    return RunForecast(text, 16, text, 80 * GIB, (phase,))
