"""Imagine a rank of a run: its model, optimizer and one real step, on no device."""

from dataclasses import dataclass
from typing import Any

from visionloom.data.stream.batch import PackedBatch
from visionloom.forecast.live_teacher import HeldTeacher, ImaginedTeacher
from visionloom.forecast.trace.events import Category, RankTrace
from visionloom.forecast.trace.recorder import Recorder
from visionloom.forecast.trace.step import recording, trace_step
from visionloom.forecast.trace.values import Routing
from visionloom.model.lora import apply_lora
from visionloom.parallel import topology as topologies
from visionloom.parallel.stand_in import META
from visionloom.parallel.topology import Topology
from visionloom.train.build import build_model, build_trainer
from visionloom.train.config import RunConfig
from visionloom.train.distillation.teacher import StoredTeacher


@dataclass(frozen=True)
class _Named:
    """Something with a name, as a stream's datasets are."""

    name: str


@dataclass(frozen=True)
class _NoTokenizer:
    """A tokenizer that is not needed: packs are there."""

    fingerprint: str = ""


class ImaginedStream:
    """What a trainer asks of its stream: the names of datasets."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.datasets = [_Named(name) for name in names]
        self.tokenizer = _NoTokenizer()


def trace_rank(
    config: RunConfig,
    phase_name: str,
    world_size: int,
    rank: int,
    batches: list[PackedBatch],
    imbalance: float = 1.0,
) -> RankTrace:
    """Return the trace of one optimizer step of a rank of a run, imagined in this process.

    Args:
        config: of the run; a phase may have a layout of its own.
        phase_name: which phase.
        world_size: ranks of the run.
        rank: which of them.
        batches: its micro-batches, on the host.
        imbalance: tokens of the busiest rank of experts over the mean, 1: even.
    """
    layout = config.phases[phase_name].parallel or config.parallel
    held = HeldTeacher.of(config, phase_name, world_size, rank)
    topology = topologies.imagine(layout, world_size, rank, META)
    try:
        # Each traced rank is the busiest: what it takes is the most that one of its kind may take.
        routing = Routing(imbalance, layout.expert, topology.groups.ep.rank())
        with recording(META, routing) as recorder:
            return trace_with(recorder, config, phase_name, topology, batches, held)
    finally:
        topologies.stop()


def trace_with(
    recorder: Recorder,
    config: RunConfig,
    phase_name: str,
    topology: Topology,
    batches: list[PackedBatch],
    held: HeldTeacher | None = None,
) -> RankTrace:
    """Return the trace of one optimizer step of the rank of an imagined topology.

    Args:
        recorder: records already.
        config: of the run.
        phase_name: which phase.
        topology: of the phase.
        batches: the rank's micro-batches, on the host.
        held: the live teacher of the phase; None: it has none, or the forecast says that it is left out.
    """
    parts = build_model(config, topology, drawn=False)
    if config.lora.rank:
        apply_lora(parts, config.lora, topology, config.run.seed)
    stream: Any = ImaginedStream(batches[0].dataset_names)
    trainer = build_trainer(config, phase_name, topology, parts, stream)
    distillation = config.phases[phase_name].distillation
    if held is not None:
        teacher = ImaginedTeacher(held, config.run.precision, topology, batches)
        recorder.ledger.own([teacher.matrix, teacher.weights], Category.WEIGHTS)
        recorder.ledger.own([teacher.states], Category.ACTIVATIONS)
        trainer.teacher = teacher
    elif distillation is not None and not distillation.is_live:
        trainer.teacher = StoredTeacher(distillation, topology.device)
    return trace_step(recorder, trainer, batches)
