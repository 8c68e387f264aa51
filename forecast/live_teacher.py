"""What a live teacher adds to an imagined rank: its weights, the hidden states of a step, and the divergence from it.

Its passes are not traced: their operations are counted, and what they take besides in memory is less than what the student's do.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from visionloom.data.stream.batch import PackedBatch
from visionloom.forecast.kinds import rank_number
from visionloom.model.config import ModelConfig
from visionloom.model.distillation import HiddenTeacher
from visionloom.model.distillation_config import DistillationConfig
from visionloom.parallel import topology as topologies
from visionloom.parallel.config import ParallelConfig
from visionloom.parallel.stand_in import META
from visionloom.parallel.topology import Topology
from visionloom.train.build import empty_parts, model_dtype
from visionloom.train.config import RunConfig
from visionloom.train.distillation.options import live_teacher
from visionloom.train.distillation.teacher import Distillation, Teacher


@dataclass(frozen=True)
class HeldTeacher:
    """A live teacher, as far as the memory of a rank knows of it."""

    options: DistillationConfig
    model: ModelConfig
    bytes: int
    """Of its weights on a rank."""
    micro_batches: int
    """Of the student's data rank in a step."""

    @classmethod
    def of(
        cls, config: RunConfig, phase_name: str, world_size: int, rank: int
    ) -> "HeldTeacher | None":
        """Return that of a phase, None where it has none or its folder is not there. It imagines worlds, of which none may be open.

        Of a teacher with a layout of its own, the rank with most of its weights stands for all: those that a kind of rank stands
        for have different parts of it.
        """
        phase, model = config.phases[phase_name], live_teacher(config, phase_name)
        if model is None or phase.distillation is None:
            return None
        layout = phase.parallel or config.parallel
        own = phase.distillation.teacher.parallel
        ranks = [rank]
        if own is not None:
            ranks = [rank_number(own, world_size, stage) for stage in range(own.pipeline)]
        precision = config.run.precision
        held = [weight_bytes(model, precision, own or layout, world_size, each) for each in ranks]
        packs = layout.data_parallel_size(world_size) * phase.micro_batch
        return cls(phase.distillation, model, max(held), phase.global_batch // packs)


def weight_bytes(
    model: ModelConfig, precision: str, layout: ParallelConfig, world_size: int, rank: int
) -> int:
    """Return the bytes of a model's weights on one rank of an imagined world; `precision` as run.precision."""
    topology = topologies.imagine(layout, world_size, rank, META)
    try:
        parts = empty_parts(model, precision, topology)
        parameters = [parameter for part in parts for parameter in part.parameters()]
        return sum(parameter.nbytes for parameter in parameters)
    finally:
        topologies.stop()


class ImaginedTeacher(Teacher):
    """A live teacher whose passes are done: its memory is taken, and the student is compared with it."""

    def __init__(
        self, held: HeldTeacher, precision: str, topology: Topology, batches: Sequence[PackedBatch]
    ) -> None:
        """Take the memory.

        Args:
            held: on this rank.
            precision: as run.precision.
            topology: the student's.
            batches: the student's micro-batches, whose like the step is full of.
        """
        self.options = held.options
        text, layout = held.model.text, topology.config
        dtype = model_dtype(precision, META)
        rows = tokens = 0
        if topology.is_last_stage:
            rows = text.vocab_size // layout.tensor
            tokens = max(batch.supervised_tokens for batch in batches) // layout.context
        # In the student's layout it is one of the weights.
        self.matrix = torch.empty(rows, text.hidden_size, dtype=dtype, device=META)
        others = held.bytes if held.options.teacher.parallel else held.bytes - self.matrix.nbytes
        self.weights = torch.empty(others, dtype=torch.uint8, device=META)
        size = tokens * held.micro_batches, text.hidden_size
        self.states = torch.empty(size, dtype=dtype, device=META)

    def for_rows(self, batch: PackedBatch, tokens: Tensor) -> Distillation:
        """Return rows without content; see Teacher."""
        return self.options, HiddenTeacher(self.states[: len(tokens)], self.matrix)
