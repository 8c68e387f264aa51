"""The way of a teacher's hidden states to the ranks of a student whose layout is another one on the same ranks.

Micro-batches have numbers in a step: the i-th of the student's data rank d is i x copies + d, and a teacher's copy has every
number that leaves its own as remainder. With them, and the text of its own packs, each rank knows what comes from whom.
Shapes: R supervised tokens of a rank in a micro-batch, S of all ranks that share it, H hidden size, W ranks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from visionloom.data.stream.batch import PackedBatch
from visionloom.parallel.context import TokenRows, split_pack
from visionloom.parallel.device import to_device
from visionloom.parallel.topology import Topology


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

    def owners(self, batch: PackedBatch) -> TokenRows:
        """Return which context rank has each supervised token of a micro-batch, int64 [S] by ascending token."""
        owner = np.empty(len(batch.loss_weights), np.int64)
        for rank, tokens in enumerate(split_pack(batch.cu_seqlens.numpy(), self.context).ranks):
            owner[tokens] = rank
        return owner[batch.loss_weights.numpy() > 0]

    def rows_shared_with(self, other: "LastStage", batch: PackedBatch) -> list[TokenRows]:
        """Return, for each context rank of another layout, which of this rank's R rows it has too, in order."""
        assert self.place is not None
        _, context_rank, _ = self.place
        # The tokens of a rank ascend in any layout, so that these are in one order on both sides.
        others = other.owners(batch)[self.owners(batch) == context_rank]
        return [np.flatnonzero(others == rank) for rank in range(other.context)]


class Arrival(NamedTuple):
    """Rows that come from one rank."""

    sender: int
    number: int
    """Of the student's micro-batch on this rank."""
    rows: TokenRows
    """Of the micro-batch's R."""


@dataclass(frozen=True)
class RowExchange:
    """Sends each supervised token's hidden state from the rank of the teacher that has it to those of the student that need it."""

    student: LastStage
    teacher: LastStage
    nothing: Tensor
    """[0, H], of the hidden states' dtype and device."""

    @classmethod
    def between(cls, student: Topology, teacher: Topology, nothing: Tensor) -> "RowExchange":
        """Let all ranks learn both layouts."""
        return cls(LastStage.of(student), LastStage.of(teacher), nothing)

    def __call__(
        self, states: Sequence[Tensor], theirs: Sequence[PackedBatch], ours: Sequence[PackedBatch]
    ) -> list[Tensor]:
        """Return the hidden states [R, H] of the student's micro-batches on this rank; all ranks call it.

        Args:
            states: of the teacher's micro-batches on this rank, [R, H] each; none before its last stage.
            theirs: the teacher's micro-batches, on the host.
            ours: the student's.
        """
        parts = [[self.nothing] for _ in range(dist.get_world_size())]
        for receiver, wanted in self.sent(states, theirs):
            parts[receiver].append(wanted)
        arrivals = self.arrivals(ours)
        # Sizes follow from texts that all have: none is sent, and the host does not wait for any.
        received = [0] * len(parts)
        for sender, _, rows in arrivals:
            received[sender] += len(rows)
        arrived = self._exchanged([torch.cat(each) for each in parts], received)
        return self.sorted_in(arrived, arrivals, len(ours))

    def rows(self, count: int) -> Tensor:
        """Return rows to be filled, [count, H]."""
        return self.nothing.new_empty(count, self.nothing.shape[1])

    def _exchanged(self, sent: list[Tensor], received: list[int]) -> Tensor:
        """Send rows to each rank, and return those that come from each, as many as `received` says."""
        arrived = self.rows(sum(received))
        dist.all_to_all_single(arrived, torch.cat(sent), received, list(map(len, sent)))
        return arrived

    def sent(
        self, states: Sequence[Tensor], theirs: Sequence[PackedBatch]
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield to whom this rank sends which rows, by micro-batch and token."""
        if self.teacher.place is None:
            return
        copy, _, tensor_rank = self.teacher.place
        for number, batch in enumerate(theirs):
            data_rank = (number * self.teacher.copies + copy) % self.student.copies
            for context, rows in enumerate(self.teacher.rows_shared_with(self.student, batch)):
                wanted = states[number][self._on_device(rows)]
                # Tensor ranks have all the same rows: each serves its share of the student's.
                for tensor in range(tensor_rank, self.student.tensor, self.teacher.tensor):
                    yield self.student.ranks[data_rank, context, tensor], wanted

    def arrivals(self, ours: Sequence[PackedBatch]) -> list[Arrival]:
        """Return what this rank gets, in the order in which it arrives."""
        arrivals = list[Arrival]()
        if self.student.place is None:
            return arrivals
        data_rank, _, tensor_rank = self.student.place
        for number, batch in enumerate(ours):
            copy = (number * self.student.copies + data_rank) % self.teacher.copies
            for context, rows in enumerate(self.student.rows_shared_with(self.teacher, batch)):
                sender = self.teacher.ranks[copy, context, tensor_rank % self.teacher.tensor]
                arrivals.append(Arrival(sender, number, rows))
        # By rank; what one rank sends stays in order.
        return sorted(arrivals, key=attrgetter("sender"))

    def sorted_in(self, arrived: Tensor, arrivals: Sequence[Arrival], count: int) -> list[Tensor]:
        """Return what has arrived as the rows [R, H] of each of `count` micro-batches; none before the student's last stage."""
        sizes = [0] * (count if self.student.place else 0)
        for _, number, rows in arrivals:
            sizes[number] += len(rows)
        made = [self.rows(size) for size in sizes]
        parts = arrived.split([len(rows) for _, _, rows in arrivals])
        for (_, number, rows), part in zip(arrivals, parts, strict=True):
            made[number][self._on_device(rows)] = part
        return made

    def _on_device(self, rows: TokenRows) -> Tensor:
        return to_device(torch.from_numpy(rows), self.nothing.device)
