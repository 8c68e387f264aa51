"""What a live teacher adds to an imagined rank: its weights, the hidden states of a step, and the divergence from it.

Its passes are not traced: their operations are counted, and what they take besides in memory is less than what the student's do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from visionloom.data.stream.batch import PackedBatch
from visionloom.forecast.kinds import rank_number
from visionloom.model.config import ModelConfig
from visionloom.model.distillation import DistillationLoss, HiddenTeacher
from visionloom.model.distillation_config import DistillationConfig
from visionloom.model.loss import RowLossMaker
from visionloom.parallel import topology as topologies
from visionloom.parallel.config import ParallelConfig
from visionloom.parallel.stand_in import META
from visionloom.parallel.topology import Topology
from visionloom.train.build import empty_parts, model_dtype
from visionloom.train.config import RunConfig
from visionloom.train.distillation.options import live_teacher
from visionloom.train.distillation.teacher import DIVERGENCE, Teacher


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
        layout, own = phase.parallel or config.parallel, phase.distillation.teacher.parallel
        ranks = [rank]
        if own is not None:
            # One of each stage: its tensor and context ranks hold as much.
            ranks = [rank_number(own, world_size, stage) for stage in range(own.pipeline)]
        held = most_bytes(model, config.run.precision, own or layout, world_size, ranks)
        packs = layout.data_parallel_size(world_size) * phase.micro_batch
        return cls(phase.distillation, model, held, phase.global_batch // packs)


def most_bytes(
    model: ModelConfig,
    precision: str,
    layout: ParallelConfig,
    world_size: int,
    ranks: Sequence[int],
) -> int:
    """Return the bytes of a model's weights on the rank of an imagined world that has most; `precision` as run.precision."""
    held = []
    for rank in ranks:
        topology = topologies.imagine(layout, world_size, rank, META)
        try:
            parts = empty_parts(model, precision, topology)
        finally:
            topologies.stop()
        held.append(sum(each.nbytes for part in parts for each in part.parameters()))
    return max(held)


class ImaginedTeacher(Teacher):
    """A live teacher whose passes are done: its memory is taken, and the student is compared with it."""

    measures = DIVERGENCE

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
        like = torch.empty(0, dtype=model_dtype(precision, META), device=META)
        # Stages before the last have neither.
        is_last = int(topology.is_last_stage)
        self.matrix = like.new_empty(is_last * text.vocab_size // layout.tensor, text.hidden_size)
        tokens = is_last * max(batch.supervised_tokens for batch in batches) // layout.context
        # All micro-batches of a step have theirs at once, though one or two are traced.
        self.states = like.new_empty(tokens * held.micro_batches, text.hidden_size)
        # In the student's layout the matrix is one of the weights.
        others = held.bytes if held.options.teacher.parallel else held.bytes - self.matrix.nbytes
        self.weights = like.new_empty(others, dtype=torch.uint8)

    def for_rows(self, batch: PackedBatch, tokens: Tensor) -> RowLossMaker:
        """Return rows without content; see Teacher."""
        teacher = HiddenTeacher(self.states[: len(tokens)], self.matrix)
        return partial(DistillationLoss, self.options, teacher)
