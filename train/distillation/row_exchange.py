"""The way of a teacher's hidden states to the ranks of a student whose layout is another one on the same ranks.

Micro-batches have numbers in a step: the i-th of the student's data rank d is i x copies + d, and a teacher's copy has every
number that leaves its own as remainder. With them, and the text of its own packs, each rank knows what comes from whom.
Shapes: R supervised tokens of a rank in a micro-batch, S of all ranks that share it, H hidden size, W ranks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from visionloom.data.stream.batch import PackedBatch
from visionloom.parallel.context import split_pack
from visionloom.parallel.device import to_device
from visionloom.parallel.topology import Topology

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class LastStage:
    """The last stage of a layout, as all ranks know it."""

    ranks: dict[tuple[int, int, int], int]
    """Of each place, which is data rank, context rank and tensor rank, its rank among all."""
    place: tuple[int, int, int] | None
    """Of this rank; None: it is on another stage."""
    copies: int
    context: int
    tensor: int

    @classmethod
    def of(cls, topology: Topology) -> "LastStage":
        """Ask all ranks for their places."""
        own = (topology.data_rank, topology.context_rank, topology.tensor_rank)
        place = own if topology.is_last_stage else None
        places: list[tuple[int, int, int] | None] = [None] * topology.world_size
        # Asked and not computed: the order of axes is Megatron-core's to choose.
        dist.all_gather_object(places, place)
        ranks = {each: rank for rank, each in enumerate(places) if each is not None}
        sizes = topology.data_size, topology.context_size, topology.config.tensor
        return cls(ranks, place, *sizes)

    def owners(self, batch: PackedBatch) -> Rows:
        """Return which context rank has each supervised token of a micro-batch, int64 [S] by ascending token."""
        owner = np.empty(len(batch.loss_weights), np.int64)
        for rank, tokens in enumerate(split_pack(batch.cu_seqlens.numpy(), self.context).ranks):
            owner[tokens] = rank
        return owner[batch.loss_weights.numpy() > 0]

    def order(self, batch: PackedBatch, context_rank: int) -> Rows:
        """Return the rows of a context rank's supervised tokens by ascending token, int64 [R]."""
        tokens = split_pack(batch.cu_seqlens.numpy(), self.context).ranks[context_rank]
        return np.argsort(tokens[batch.loss_weights.numpy()[tokens] > 0])


@dataclass(frozen=True)
class RowExchange:
    """Sends each supervised token's hidden state from the rank of the teacher that has it to those of the student that need it."""

    student: LastStage
    teacher: LastStage
    device: torch.device

    @classmethod
    def between(cls, student: Topology, teacher: Topology) -> "RowExchange":
        """Let all ranks learn both layouts."""
        return cls(LastStage.of(student), LastStage.of(teacher), student.device)

    def __call__(
        self,
        states: Sequence[Tensor],
        theirs: Sequence[PackedBatch],
        ours: Sequence[PackedBatch],
        like: Tensor,
    ) -> list[Tensor]:
        """Return the hidden states [R, H] of the student's micro-batches on this rank; all ranks call it.

        Args:
            states: of the teacher's micro-batches on this rank, [R, H] each; none before its last stage.
            theirs: the teacher's micro-batches, on the host.
            ours: the student's.
            like: a tensor [*, H] of the states' dtype.
        """
        sent = [list[Tensor]() for _ in range(dist.get_world_size())]
        for receiver, number, rows in self._sent(theirs):
            sent[receiver].append(states[number][self._on_device(rows)])
        received = [0] * len(sent)
        expected = sorted(self._received(ours), key=lambda each: each[:2])
        for sender, _, rows in expected:
            received[sender] += len(rows)

        nothing = like.new_empty(0, like.shape[1])
        counts = [sum(map(len, rows)) for rows in sent]
        arrived = like.new_empty(sum(received), like.shape[1])
        rows_sent = torch.cat([nothing, *(row for rows in sent for row in rows)])
        dist.all_to_all_single(arrived, rows_sent, received, counts)
        return self._sorted_in(arrived, expected, ours)

    def _sorted_in(
        self,
        arrived: Tensor,
        expected: Sequence[tuple[int, int, Rows]],
        ours: Sequence[PackedBatch],
    ) -> list[Tensor]:
        """Return what has arrived, by sender and micro-batch, as the rows of each micro-batch."""
        if self.student.place is None:
            return []
        _, context_rank, _ = self.student.place
        made = []
        for batch in ours:
            count = len(self.student.order(batch, context_rank))
            made.append(arrived.new_empty(count, arrived.shape[1]))
        parts = arrived.split([len(rows) for _, _, rows in expected])
        for (_, number, rows), part in zip(expected, parts, strict=True):
            made[number][self._on_device(rows)] = part
        return made

    def _sent(self, theirs: Sequence[PackedBatch]) -> Iterator[tuple[int, int, Rows]]:
        """Yield to whom this rank sends which rows of its micro-batches, ascending by micro-batch and token."""
        if self.teacher.place is None:
            return
        copy, context_rank, tensor_rank = self.teacher.place
        for number, batch in enumerate(theirs):
            data_rank = (number * self.teacher.copies + copy) % self.student.copies
            order = self.teacher.order(batch, context_rank)
            wanted = self.student.owners(batch)[self.teacher.owners(batch) == context_rank]
            for context in range(self.student.context):
                rows = order[wanted == context]
                # Tensor ranks have all the same rows: each serves its share of the student's.
                for tensor in range(tensor_rank, self.student.tensor, self.teacher.tensor):
                    yield self.student.ranks[data_rank, context, tensor], number, rows

    def _received(self, ours: Sequence[PackedBatch]) -> Iterator[tuple[int, int, Rows]]:
        """Yield from whom this rank gets which rows of its micro-batches, ascending by token."""
        if self.student.place is None:
            return
        data_rank, context_rank, tensor_rank = self.student.place
        for number, batch in enumerate(ours):
            copy = (number * self.student.copies + data_rank) % self.teacher.copies
            order = self.student.order(batch, context_rank)
            givers = self.teacher.owners(batch)[self.student.owners(batch) == context_rank]
            for context in range(self.teacher.context):
                sender = self.teacher.ranks[copy, context, tensor_rank % self.teacher.tensor]
                yield sender, number, order[givers == context]

    def _on_device(self, rows: Rows) -> Tensor:
        return to_device(torch.from_numpy(rows), self.device)
