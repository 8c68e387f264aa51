"""From the traces of a phase to its forecast on a machine: memory and time of each kind of rank, of the step and of the phase."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from visionloom.forecast.faults import memory_faults, mixed_faults, wait_notes
from visionloom.forecast.machine import Machine
from visionloom.forecast.phase_traces import PhaseTraces
from visionloom.forecast.rank_step import PlayedRank, RankStep
from visionloom.forecast.results import (
    BUBBLE,
    COMMUNICATION,
    MESSAGES,
    PhaseForecast,
    RankForecast,
)
from visionloom.forecast.schedule import Pass, Pipeline
from visionloom.forecast.timeline import Timeline, play
from visionloom.forecast.trace.events import SlotKind
from visionloom.parallel.config import ParallelConfig


def estimate(traces: PhaseTraces, gpu: str, on: Machine) -> PhaseForecast:
    """Return the forecast of a phase on a machine; `gpu`: its name."""
    layout = traces.layout
    pipeline = Pipeline(layout.pipeline, layout.chunks, traces.micro_batches)
    steps = rank_steps(traces, pipeline, on)
    step = StepTime.of(pipeline, steps)

    ranks = tuple(rank_forecast(each) for each in steps)
    peak = on.peak * traces.world_size
    return PhaseForecast(
        phase=traces.phase,
        layout=layout_words(layout, traces.world_size),
        sequence_length=traces.sequence_length,
        packs=traces.packs,
        steps=traces.steps,
        step_seconds=step.seconds,
        tokens=traces.tokens,
        tokens_per_second=traces.tokens / step.seconds,
        mfu=traces.flops / (step.seconds * peak),
        bubble=step.shares[BUBBLE] / step.seconds,
        exposed_communication=step.communication,
        seconds=step.shares,
        ranks=ranks,
        timeline=step.timeline.spans,
        faults=(*memory_faults(ranks, traces, gpu, on), *mixed_faults(ranks)),
        notes=tuple(wait_notes(ranks)),
    )


def rank_steps(traces: PhaseTraces, pipeline: Pipeline, on: Machine) -> list[RankStep]:
    """Return the step of each kind of rank on each of its stages, in the order of stages."""
    steps = []
    for traced in traces.kinds:
        for stage in traced.kind.stages:
            steps.append(RankStep(traced, stage, pipeline, on))
    return sorted(steps, key=lambda step: step.stage)


def layout_words(layout: ParallelConfig, world_size: int) -> str:
    """Return the degrees of a layout, for example `tensor 4, pipeline 8, expert 32, data 4`; those of 1 are left out."""
    degrees = {
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "chunks": layout.chunks,
        "context": layout.context,
        "expert": layout.expert,
        "expert tensor": layout.expert_tensor or 1,
    }
    words = [f"{axis} {degree}" for axis, degree in degrees.items() if degree > 1]
    if layout.context > 1:
        words.append(f"exchange {layout.context_exchange}")
    if layout.expert_parts > 1:
        words.append(f"tokens of experts in {layout.expert_parts} parts")
    words.append(f"data {layout.data_parallel_size(world_size)}")
    if layout.recompute != "none":
        layers = f" of {layout.recompute_layers} layers" if layout.recompute_layers else ""
        words.append(f"recompute {layout.recompute}{layers}")
    if layout.offload_activations:
        words.append("activations offloaded")
    return ", ".join(words)


def rank_forecast(step: RankStep) -> RankForecast:
    """Return what is known of a kind of rank."""
    kind, trace, memory = step.traced.kind, step.trace, step.memory
    return RankForecast(
        stage=step.stage,
        rank=step.rank,
        ranks=kind.ranks // len(kind.stages),
        description=kind.descriptions[kind.stages.index(step.stage)],
        memory=memory.by_category,
        peak_bytes=memory.bytes,
        alive=memory.alive,
        forward_seconds=step.micro_batch_seconds(SlotKind.FORWARD),
        backward_seconds=step.micro_batch_seconds(SlotKind.BACKWARD),
        launches=step.launches,
        moved_bytes=step.moved_bytes,
        flops=step.flops,
        waits=step.waits,
        mixed=trace.mixed,
    )


@dataclass(frozen=True)
class StepTime:
    """The time of a step: every stage goes at the pace of its slowest rank, and the step ends with the last stage."""

    seconds: float
    shares: dict[str, float]
    """Where it goes on the slowest rank, as PhaseForecast.seconds."""
    timeline: Timeline

    @classmethod
    def of(cls, pipeline: Pipeline, steps: Sequence[RankStep]) -> "StepTime":
        """Play a step; `steps`: of each kind of rank, at least one of each stage."""
        stages = PlayedStage.of(pipeline, steps)
        timeline = play(pipeline, stages)
        seconds = max(timeline.ends)
        # Played again without them: what is then missing they have cost.
        silent = [replace(each, message=0.0) for each in PlayedStage.of(pipeline, steps)]
        messages = seconds - max(play(pipeline, silent).ends)

        shares = max(
            (rank.shares for stage in stages for rank in stage.ranks),
            key=lambda shares: sum(shares.values()),
        )
        # Rounding may leave less than nothing.
        bubble = max(0.0, seconds - sum(shares.values()) - messages)
        return cls(seconds, shares | {MESSAGES: messages, BUBBLE: bubble}, timeline)

    @property
    def communication(self) -> float:
        """Return the seconds in which ranks only communicate."""
        alone = self.shares[MESSAGES]
        for name, seconds in self.shares.items():
            if name.endswith(COMMUNICATION):
                alone += seconds
        return alone


@dataclass(frozen=True)
class PlayedStage:
    """A stage while a step is played: it goes at the pace of its slowest ranks."""

    ranks: tuple[PlayedRank, ...]
    message: float
    """Seconds of one to either side."""

    @classmethod
    def of(cls, pipeline: Pipeline, steps: Sequence[RankStep]) -> "list[PlayedStage]":
        """Return the stages at a step's begin; `steps`: of each kind of rank, at least one of each stage."""
        stages = []
        for stage in range(pipeline.stages):
            own = [step for step in steps if step.stage == stage]
            message = max(step.message() for step in own)
            stages.append(cls(tuple(PlayedRank(step) for step in own), message))
        return stages

    @property
    def send_next(self) -> float:
        """Return the seconds of a message to the next stage."""
        return self.message

    @property
    def send_previous(self) -> float:
        """Return the seconds of a message to the stage before."""
        return self.message

    def run(self, one: Pass | SlotKind, clock: float) -> float:
        """Let a pass begin at `clock` on all ranks; return when the last is done."""
        return max(rank.run(one, clock) for rank in self.ranks)
