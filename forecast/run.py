"""From the question of a plan to its answer: packs, kinds of ranks, their traces by worker processes, estimates."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from visionloom.common.processes import as_finished
from visionloom.common.progress import PartProgress
from visionloom.forecast.estimate import estimate
from visionloom.forecast.faults import memory_faults, mixed_faults
from visionloom.forecast.kinds import RankKind, rank_kinds
from visionloom.forecast.machine import planned_attention
from visionloom.forecast.packs import (
    ImaginedPacks,
    PackChoice,
    packs_for,
    with_stored_teacher,
)
from visionloom.forecast.phase_traces import PhaseTraces, TracedKind
from visionloom.forecast.request import PlanRequest
from visionloom.forecast.results import PhaseForecast, RankForecast, RunForecast
from visionloom.forecast.trace.events import RankTrace
from visionloom.model.flops import step_flops
from visionloom.parallel.config import ParallelConfig
from visionloom.parallel.share import Share
from visionloom.train.config import RunConfig
from visionloom.train.distillation.options import live_teacher
from visionloom.train.phase.config import PhaseConfig

PRELOAD: Final = ("visionloom.forecast.worker",)
"""Imports torch and megatron-core, once for all workers."""
CHOICES: Final = (PackChoice.MEAN, PackChoice.PATCHES, PackChoice.SUPERVISED)
"""For times, for the memory of the first stage, and for that of the last."""


@dataclass(frozen=True)
class LayoutOrder:
    """What a worker that traces whole layouts is given."""

    number: int
    request: PlanRequest
    choices: Sequence[PackChoice]
    kernels: Sequence[str]
    """Of attention, as model.attention has them: one forecast for each, of the same traces."""


@dataclass(frozen=True)
class TraceOrder:
    """What a worker is given: a rank, and the packs that it trains on."""

    config: RunConfig
    phase: str
    world_size: int
    rank: int
    choice: PackChoice
    packs: ImaginedPacks
    share: Share
    micro_batches: int
    imbalance: float


type Traces = dict[tuple[int, PackChoice], RankTrace]
"""By rank and choice of packs."""


def forecast_run(
    request: PlanRequest, progress: PartProgress, is_brief: bool = False
) -> RunForecast:
    """Forecast the phases of a run.

    Args:
        request: which run on which GPUs; its layouts are possible there.
        progress: called with a phase, its traces that are done, and all of them.
        is_brief: leave out kinds of ranks with fewer pictures than others of their stage, which neither slow a step nor
            take more memory.

    Raises:
        UserError: for what its data would be refused for, and for packs too short for any sample of a mixture.
    """
    request = as_planned(request)
    phases = {name: ImaginedPhase.of(request, name) for name in request.phases}
    if is_brief:
        phases = {name: phase.for_ranking for name, phase in phases.items()}
    orders = [order for phase in phases.values() for order in phase.orders()]
    traces = trace_all(orders, progress)
    return RunForecast(
        name=request.config.run.name,
        world_size=request.world_size,
        gpu=request.gpu,
        gpu_bytes=request.machine.usable_bytes,
        attention=planned_attention(request.config.model.attention),
        phases=tuple(phase.forecast(traces[name]) for name, phase in phases.items()),
    )


def forecast_layouts(
    requests: Sequence[PlanRequest],
    finished: Callable[[], None],
    choices: Sequence[PackChoice] = (PackChoice.MEAN,),
) -> list[PhaseForecast]:
    """Forecast the first phase of each request by one kind of rank of each stage.

    Args:
        requests: each is one worker's work: it begins no other layout before it has traced all kinds of ranks of one.
        finished: called as each is done.
        choices: packs that are traced, the mean ones first; they alone are enough to rank layouts.
    """
    orders = [
        LayoutOrder(number, each, choices, (each.config.model.attention,))
        for number, each in enumerate(requests)
    ]
    return [only for (only,) in _forecast_orders(orders, finished)]


def forecast_kernels(
    requests: Sequence[PlanRequest],
    kernels: Sequence[str],
    finished: Callable[[], None],
    choices: Sequence[PackChoice] = (PackChoice.MEAN,),
) -> list[list[PhaseForecast]]:
    """Forecast as `forecast_layouts` for each of several kernels of attention, in the place of those that the runs ask for.

    A layout is traced once: only the time of its attention differs.
    """
    orders = [LayoutOrder(number, each, choices, kernels) for number, each in enumerate(requests)]
    return _forecast_orders(orders, finished)


def _forecast_orders(
    orders: Sequence[LayoutOrder], finished: Callable[[], None]
) -> list[list[PhaseForecast]]:
    """Return for each order, whose number is its place, a forecast for each of its kernels."""
    forecasts = dict[int, list[PhaseForecast]]()
    workers = min(len(orders), len(os.sched_getaffinity(0)))
    for order, done in as_finished(forecast_layout, orders, workers, PRELOAD):
        forecasts[order.number] = done
        finished()
    return [forecasts[number] for number in range(len(orders))]


def forecast_layout(order: LayoutOrder) -> list[PhaseForecast]:
    """Forecast the first phase of a request for each of the kernels; runs in a worker, as `trace_one`."""
    first, *others = (as_planned(order.request.with_attention(name)) for name in order.kernels)
    phase = ImaginedPhase.of(first, first.phases[0], order.choices).for_ranking
    traces = {(order.rank, order.choice): trace_one(order) for order in phase.orders()}
    return [replace(phase, request=each).forecast(traces) for each in (first, *others)]


def as_planned(request: PlanRequest) -> PlanRequest:
    """Return the request with its precision on a GPU, the speed of its attention, and the packs that answers with rewards fill.

    Raises:
        UserError: for kernels of attention whose speed the machine's file does not say.
    """
    config, phases = request.config, dict(request.config.phases)
    machine = request.machine.with_attention(config.model.attention, request.gpu)
    precision = "bf16" if config.run.precision == "auto" else config.run.precision
    for name, phase in phases.items():
        if phase.rl is not None:
            layout = phase.parallel or config.parallel
            copies = layout.data_parallel_size(request.world_size)
            rounds = layout.pipeline if layout.chunks > 1 else 1
            multiple = copies * phase.micro_batch * rounds
            # Answers seldom are as long as they may be: a bound, as the forecast says.
            needed = -(-phase.rl.most_tokens_of_step // phase.sequence_length)
            phases[name] = replace(phase, global_batch=needed + -needed % multiple)
    config = replace(config, run=replace(config.run, precision=precision), phases=phases)
    return replace(request, config=config, machine=machine)


def trace_all(orders: Sequence[TraceOrder], progress: PartProgress) -> dict[str, Traces]:
    """Trace ranks by worker processes; return the traces of each phase."""
    waiting = Counter(order.phase for order in orders)
    for phase, count in waiting.items():
        progress(phase, 0, count)

    traces: dict[str, Traces] = {phase: {} for phase in waiting}
    workers = min(len(orders), len(os.sched_getaffinity(0)))
    for order, trace in as_finished(trace_one, orders, workers, PRELOAD):
        ready = traces[order.phase]
        ready[order.rank, order.choice] = trace
        progress(order.phase, len(ready), waiting[order.phase])
    return traces


def trace_one(order: TraceOrder) -> RankTrace:
    """Return the trace of a rank; runs in a worker, since it replaces parts of torch."""
    from visionloom.forecast.imagine import trace_rank

    batch = order.packs.batch(order.share)
    distillation = order.config.phases[order.phase].distillation
    if distillation is not None and distillation.stored:
        batch = with_stored_teacher(batch, distillation)
    batches = [batch] * order.micro_batches
    return trace_rank(
        order.config, order.phase, order.world_size, order.rank, batches, order.imbalance
    )


@dataclass(frozen=True)
class ImaginedPhase:
    """A phase on its layout: its packs, and the kinds of its ranks."""

    request: PlanRequest
    name: str
    packs: dict[PackChoice, ImaginedPacks]
    kinds: list[RankKind]

    @classmethod
    def of(
        cls, request: PlanRequest, name: str, choices: Sequence[PackChoice] = CHOICES
    ) -> "ImaginedPhase":
        """Choose the packs of a phase, the mean ones first, and find the kinds of its ranks."""
        config, world_size = request.config, request.world_size
        layout = config.phases[name].parallel or config.parallel
        packs = packs_for(config, name, world_size, choices)
        patches = packs[PackChoice.MEAN].encoder_patches(layout.encoder_ranks)
        kinds = rank_kinds(layout, world_size, config.model, patches)
        return cls(request, name, packs, kinds)

    @property
    def for_ranking(self) -> "ImaginedPhase":
        """Return the phase with what compares layouts: one kind of each stage, as others are neither slower nor fuller."""
        kinds = dict[tuple[int, ...], RankKind]()
        for kind in self.kinds:
            # Those with most pictures come first.
            kinds.setdefault(kind.stages, kind)
        return replace(self, kinds=list(kinds.values()))

    @property
    def settings(self) -> PhaseConfig:
        """Return the phase's own configuration."""
        return self.request.config.phases[self.name]

    @property
    def layout(self) -> ParallelConfig:
        """Return its own layout, or the run's."""
        return self.settings.parallel or self.request.config.parallel

    @property
    def micro_batches(self) -> int:
        """Return the micro-batches of a data rank in a step."""
        ranks = self.layout.data_parallel_size(self.request.world_size)
        return self.settings.global_batch // (ranks * self.settings.micro_batch)

    def orders(self) -> Iterator[TraceOrder]:
        """Yield what is to be traced: each kind of rank on mean packs, and the first and last stage on their fullest."""
        request = self.request
        for kind in self.kinds:
            for choice in self.choices_of(kind):
                yield TraceOrder(
                    config=request.config,
                    phase=self.name,
                    world_size=request.world_size,
                    rank=kind.rank,
                    choice=choice,
                    packs=self.packs[choice],
                    share=self.share_of(kind),
                    micro_batches=self.traced_micro_batches(choice),
                    imbalance=request.imbalance,
                )

    def traced_micro_batches(self, choice: PackChoice) -> int:
        """Return how many micro-batches are traced; memory is known from one."""
        # Interleaved stages take micro-batches only in multiples of their number.
        if self.layout.chunks > 1:
            return self.layout.pipeline
        # Those after the second repeat it, but a first one alone would reduce gradients as the last does.
        most = 2 if choice is PackChoice.MEAN else 1
        return min(most, self.micro_batches)

    def choices_of(self, kind: RankKind) -> list[PackChoice]:
        """Return on which packs a kind is traced: the memory of stages between the first and the last depends on none."""
        choices = [PackChoice.MEAN]
        if 0 in kind.stages:
            choices.append(PackChoice.PATCHES)
        if self.layout.pipeline - 1 in kind.stages:
            choices.append(PackChoice.SUPERVISED)
        return [choice for choice in choices if choice in self.packs]

    def share_of(self, kind: RankKind) -> Share:
        """Return which pictures a kind of rank encodes."""
        ranks = self.layout.encoder_ranks
        if 0 not in kind.stages:
            return Share(encoder_rank=-1, encoder_ranks=ranks)
        # Tensor ranks are counted first; without sequence parallelism all of them encode the same.
        alike = self.layout.tensor * self.layout.context // ranks
        place = kind.rank % (self.layout.tensor * self.layout.context)
        return Share(encoder_rank=place // alike, encoder_ranks=ranks)

    def forecast(self, traces: Traces) -> PhaseForecast:
        """Return the forecast: times on mean packs, memory on the fullest that were traced."""
        gpu, machine = self.request.gpu, self.request.machine
        inputs = [self.inputs(choice, traces) for choice in self.packs]
        mean, *others = (estimate(each, gpu, machine) for each in inputs)
        ranks = []
        for number, rank in enumerate(mean.ranks):
            ranks.append(fullest([rank, *(other.ranks[number] for other in others)]))
        faults = (*memory_faults(ranks, inputs[0], gpu, machine), *mixed_faults(ranks))
        return replace(mean, ranks=tuple(ranks), faults=faults)

    def inputs(self, choice: PackChoice, traces: Traces) -> PhaseTraces:
        """Return what a forecast is made from; kinds that were not traced on these packs stand as on mean ones."""
        kinds = list[TracedKind]()
        for kind in self.kinds:
            trace = traces.get((kind.rank, choice)) or traces[kind.rank, PackChoice.MEAN]
            kinds.append(TracedKind(kind, trace))
        phase, mean = self.settings, self.packs[PackChoice.MEAN]
        # Of one micro-batch, while the forecast is about a step of all ranks.
        times = phase.global_batch // phase.micro_batch
        return PhaseTraces(
            phase=self.name,
            layout=self.layout,
            world_size=self.request.world_size,
            sequence_length=phase.sequence_length,
            packs=mean.assumed + self.not_covered,
            kinds=tuple(kinds),
            micro_batches=self.micro_batches,
            micro_batch=phase.micro_batch,
            steps=phase.total_steps,
            flops=times * self.flops,
            tokens=float(times * mean.counts.tokens),
        )

    @property
    def not_covered(self) -> str:
        """Return, in words, what a step of the phase has that is not traced; empty where it is all."""
        distillation, written = self.settings.distillation, ""
        if self.settings.rl is not None:
            written = (
                "; answers are taken as long as they may be, and without their prompts; the time to write and to score them is NOT in this"
                " forecast"
            )
        if distillation is None or not distillation.is_live:
            return written
        model = live_teacher(self.request.config, self.name)
        if model is None:
            return written + (
                "; the folder of the live teacher is not here: its memory and time, and the divergence from it, are NOT in this"
                " forecast"
            )
        work = self.packs[PackChoice.MEAN].counts.work
        parts = step_flops(model, work, set())
        # Its logits are made beside the student's, and are in the trace.
        passes = (sum(parts.values()) - parts["output"]) / self.flops
        return written + (
            f"; the passes of the live teacher, {passes:.2f} times the student's operations, are NOT in the time of this forecast;"
            " its weights, its hidden states and the divergence from it are"
        )

    @property
    def flops(self) -> float:
        """Return the operations that the model needs for a mean micro-batch, on all ranks that share it."""
        config, work = self.request.config, self.packs[PackChoice.MEAN].counts.work
        lora = config.lora if config.lora.rank else None
        parts = step_flops(config.model, work, set(self.settings.trainable), lora)
        return sum(parts.values())


def fullest(ranks: Sequence[RankForecast]) -> RankForecast:
    """Return the first of several forecasts of a rank with the memory of the one that takes most."""
    most = max(ranks, key=lambda rank: rank.peak_bytes)
    return replace(ranks[0], memory=most.memory, peak_bytes=most.peak_bytes, alive=most.alive)
