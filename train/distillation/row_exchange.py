"""The way of a teacher's hidden states to the ranks of a student whose layout is another one on the same ranks.

Micro-batches have numbers in a step: the i-th of the student's data rank d is i x copies + d, and a teacher's copy has every
number that leaves its own as remainder. With them, and the text of its own packs, each rank knows what comes from whom.
Shapes: R supervised tokens of a rank in a micro-batch, S of all ranks that share it, H hidden size, W ranks.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

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

    def rows_shared_with(self, other: "LastStage", batch: PackedBatch) -> list[Rows]:
        """Return, for each context rank of another layout, which of this rank's R rows it has too, in order."""
        assert self.place is not None
        _, context_rank, _ = self.place
        # The tokens of a rank ascend in any layout, so that these are in one order on both sides.
        others = other.owners(batch)[self.owners(batch) == context_rank]
        return [np.flatnonzero(others == rank) for rank in range(other.context)]


class Place(NamedTuple):
    """Rows that come from one rank."""

    sender: int
    number: int
    """Of the student's micro-batch on this rank."""
    rows: Rows
    """Of the micro-batch's R."""


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
        sent = [like.new_empty(0, like.shape[1])] * dist.get_world_size()
        for receiver, parts in self.sent(states, theirs).items():
            sent[receiver] = torch.cat(parts)
        places = self.places(ours)
        received = [0] * len(sent)
        for place in places:
            received[place.sender] += len(place.rows)
        arrived = like.new_empty(sum(received), like.shape[1])
        dist.all_to_all_single(arrived, torch.cat(sent), received, list(map(len, sent)))
        return self.sorted_in(arrived, places, len(ours))

    def sent(
        self, states: Sequence[Tensor], theirs: Sequence[PackedBatch]
    ) -> dict[int, list[Tensor]]:
        """Return what this rank sends to each other, by micro-batch and token."""
        sent = defaultdict[int, list[Tensor]](list)
        if self.teacher.place is None:
            return sent
        copy, _, tensor_rank = self.teacher.place
        for number, batch in enumerate(theirs):
            data_rank = (number * self.teacher.copies + copy) % self.student.copies
            for context, rows in enumerate(self.teacher.rows_shared_with(self.student, batch)):
                wanted = states[number][self._on_device(rows)]
                # Tensor ranks have all the same rows: each serves its share of the student's.
                for tensor in range(tensor_rank, self.student.tensor, self.teacher.tensor):
                    sent[self.student.ranks[data_rank, context, tensor]].append(wanted)
        return sent

    def places(self, ours: Sequence[PackedBatch]) -> list[Place]:
        """Return where this rank puts what it gets, in the order in which that arrives."""
        places = list[Place]()
        if self.student.place is None:
            return places
        data_rank, _, tensor_rank = self.student.place
        for number, batch in enumerate(ours):
            copy = (number * self.student.copies + data_rank) % self.teacher.copies
            for context, rows in enumerate(self.student.rows_shared_with(self.teacher, batch)):
                sender = self.teacher.ranks[copy, context, tensor_rank % self.teacher.tensor]
                places.append(Place(sender, number, rows))
        # By rank; what one rank sends stays in order.
        return sorted(places, key=attrgetter("sender"))

    def sorted_in(self, arrived: Tensor, places: Sequence[Place], count: int) -> list[Tensor]:
        """Return what has arrived as the rows [R, H] of each of `count` micro-batches; none before the student's last stage."""
        sizes = [0] * (count if self.student.place else 0)
        for place in places:
            sizes[place.number] += len(place.rows)
        made = [arrived.new_empty(size, arrived.shape[1]) for size in sizes]
        parts = arrived.split([len(place.rows) for place in places])
        for place, part in zip(places, parts, strict=True):
            made[place.number][self._on_device(place.rows)] = part
        return made

    def _on_device(self, rows: Rows) -> Tensor:
        return to_device(torch.from_numpy(rows), self.device)
