"""A live teacher whose layout is another one than the student's, on the same ranks.

Its process groups are beside the student's. It reads packs of its own, which are the student's dealt anew, runs over them, and the
hidden states of supervised tokens go to the student's ranks. These have the teacher's output matrix in the student's layout, so that
the divergence is over the whole vocabulary as that from a teacher in the student's layout.
"""

import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from visionloom.common.errors import UserError
from visionloom.data.stream.batch import PackedBatch
from visionloom.model.distillation_config import DistillationConfig
from visionloom.model.qwen3vl import Qwen3VL
from visionloom.parallel.device import to_device
from visionloom.parallel.schedule import whole_rounds
from visionloom.parallel.share import Share
from visionloom.parallel.topology import Topology, close_layout
from visionloom.train.distillation.row_exchange import RowExchange
from visionloom.train.distillation.teacher import LiveTeacher
from visionloom.train.step import agree_on_unreadable


class OwnLayoutTeacher(LiveTeacher):
    """A frozen model in a layout of its own, which runs over the packs of a step before the student does."""

    def __init__(
        self,
        options: DistillationConfig,
        parts: list[Qwen3VL],
        topology: Topology,
        student: Topology,
    ) -> None:
        """Freeze the parts of the teacher on this rank and bring its output matrix to the student's ranks; all ranks call it.

        Args:
            options: of the phase.
            parts: of the teacher on this rank.
            topology: the teacher's.
            student: the student's.
        """
        super().__init__(options, parts, topology)
        self.student = student
        nothing = next(parts[0].parameters()).new_empty(0, parts[0].model_config.text.hidden_size)
        self.exchange = RowExchange.between(student, topology, nothing)
        self.matrix = matrix_of_student(parts, self.exchange, student)
        self.own: list[PackedBatch] = []
        """The teacher's micro-batches of the step."""

    def share(self, student: Share) -> Share:
        """Return the student's share and the teacher's; see Teacher."""
        return replace(student, teacher=self.topology.share)

    def take(self, batches: list[PackedBatch]) -> list[PackedBatch]:
        """Keep the teacher's micro-batches, which follow the student's; see Teacher."""
        # All copies of either together have as many.
        ours, theirs = self.student.data_size, self.topology.data_size
        count = len(batches) * theirs // (ours + theirs)
        self.own = agree_on_unreadable(batches[count:], self.topology)
        return batches[:count]

    def begin(self, batches: Sequence[PackedBatch]) -> None:
        """Run over the teacher's micro-batches, and have the states of the student's; see Teacher."""
        self._check_same(batches)
        with self.topology.entered():
            super().begin(whole_rounds(self.own, self.topology))
        # Copies that fill up a round come last, and nobody asks for them.
        said = list(self.states)[: len(self.own)]
        self.states = deque(self.exchange(said, self.own, batches))

    def output_matrix(self) -> Tensor:
        """Return the student's tensor rank's rows of the teacher's output matrix [v, H]."""
        return self.matrix

    def close(self) -> None:
        """Close the teacher's process groups; see Teacher."""
        close_layout(self.topology)

    def _check_same(self, batches: Sequence[PackedBatch]) -> None:
        """Raise UserError, on all ranks, unless both have the same text and losses in each micro-batch: rows would go astray."""
        teacher = self.topology
        sums = torch.zeros(2, len(self.own) * teacher.data_size, dtype=torch.int64)
        for row, topology, own in zip(
            sums, (self.student, teacher), (batches, self.own), strict=True
        ):
            # The ranks that share a pack have agreed on it: one of them speaks.
            if topology.is_data_leader:
                row[topology.data_rank :: topology.data_size] = torch.tensor(
                    list(map(content, own))
                )
        ours, theirs = teacher.sum_over_ranks(to_device(sums, teacher.device)).cpu()
        if not torch.equal(ours, theirs):
            raise UserError(
                "the teacher and the student have read different samples: a shard can be read by some ranks only; check the"
                " storage (python launch/data.py verify) and start the same command again"
            )


def matrix_of_student(parts: list[Qwen3VL], exchange: RowExchange, student: Topology) -> Tensor:
    """Return the rows of the teacher's output matrix that the student's tensor rank has of the vocabulary, [v, H].

    No rows before the student's last stage. All ranks call it.
    """
    teacher = exchange.teacher
    blocks = []
    for tensor_rank in range(teacher.tensor):
        block = exchange.rows(parts[0].model_config.text.vocab_size // teacher.tensor)
        # Every copy and context rank has the same: the first speaks.
        sender = teacher.ranks[0, 0, tensor_rank]
        if dist.get_rank() == sender:
            block.copy_(parts[-1].language_model.output_matrix())
        dist.broadcast(block, sender)
        blocks.append(block)
    if not student.is_last_stage:
        return exchange.nothing
    # Copied, so that the rest can be freed.
    return torch.cat(blocks).chunk(student.config.tensor)[student.tensor_rank].clone()


def content(batch: PackedBatch) -> int:
    """Return a checksum of a micro-batch's text and of its supervised tokens."""
    supervised = (batch.loss_weights > 0).numpy()
    return zlib.crc32(supervised.tobytes(), zlib.crc32(batch.input_ids.numpy().tobytes()))
