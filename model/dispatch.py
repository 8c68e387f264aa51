"""Rows of a mixture on their way to the experts and back, over the ranks that share the experts.

A token goes once to each rank that has some of its experts, however many they are, with its weights and the numbers of all its
experts; that rank copies it for each of its own, and sends back the sum of their results. With 8 of 128 experts a token and
eight ranks that is a third less than a row for each expert (DeepSeek-V3, arXiv 2412.19437, section 3.2.2, cuts traffic in
this way between nodes).
Without expert ranks nothing is read by the host. With them it reads once a layer how many rows each rank sends; the backward
pass and recomputation use the same plan.
Shapes: n tokens of this rank, k experts a token, s rows that it sends, M that arrive here, m that its experts work on, E
experts, e of them on this rank, H hidden size.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

from visionloom.model.kernels.permute import (
    combine_rows,
    count_rows,
    keep_first,
    permute_rows,
    sort_rows,
)

HOST = torch.device("cpu")


@dataclass(frozen=True)
class ExpertGroups:
    """The ranks that share the experts of a layer, and each of them."""

    experts: int
    """In all."""
    ranks: Any
    """Process group over which the experts are dealt."""
    tensor: Any
    """Process group over which each expert is cut."""
    both: Any
    """Process group of these together, the tensor ranks next to each other."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return expert ranks, tensor ranks, and experts of a rank."""
        ranks = self.ranks.size()
        return ranks, self.tensor.size(), self.experts // ranks


@dataclass(frozen=True)
class RowOrder:
    """Rows sorted by a key: a token has one row for each of its k keys; those with the last key may be left out."""

    slots: Tensor
    """int32 [rows]: the slot of a token, of n * k, that is at each place."""
    places: Tensor
    """int32 [n, k]: the place of each slot; from `rows` on, it has no row."""
    counts: Tensor
    """int32: rows of each key."""
    ends: Tensor
    """int32: where they end."""

    @classmethod
    def by_key(cls, keys: Tensor, count: int) -> "RowOrder":
        """Sort slots by their keys int32 [n, k], of which there are `count`."""
        return cls(*sort_rows(keys, count_rows(keys, count)))

    def first(self, rows: int) -> "RowOrder":
        """Return the order of the first rows alone: the last key is that of slots without a row."""
        counts, ends = self.counts[:-1], self.ends[:-1]
        return RowOrder(self.slots[:rows], self.places, counts, ends)

    def copies(self, tokens: Tensor) -> Tensor:
        """Return a row for each place: [n, H] to [rows, H]."""
        return permute_rows(tokens, self.slots, self.places)

    def picks(self, values: Tensor) -> Tensor:
        """Return the value of each place: [n, k] to [rows]."""
        by_slot = values.view(-1, 1)
        picked = permute_rows(by_slot, self.slots, self.places.view(-1, 1))
        return picked.squeeze(1)

    def sums(self, rows: Tensor, read: bool = True) -> Tensor:
        """Return the sum of each token's rows: [rows, H] to [n, H]; without `read` only gradients pass."""
        return combine_rows(rows, self.slots, self.places, read)


@dataclass(frozen=True)
class Exchange:
    """How rows get from the ranks of their tokens to those of their experts."""

    order: RowOrder
    """Of the rows that this rank sends, by expert rank."""
    sent: list[int]
    """Rows to each expert rank."""
    received: list[int]
    """Rows from each expert rank."""
    gathered: list[int]
    """Rows of each tensor rank after that; all of them have all."""
    rows: int
    """Of the experts of this rank, m."""


@dataclass
class Flight:
    """Messages of a backward pass that nobody has waited for yet."""

    works: list[Any] = field(default_factory=list)

    def land(self, _: Tensor) -> None:
        """Let the device wait for them: a hook of a tensor whose gradient they bring."""
        while self.works:
            self.works.pop().wait()


@dataclass(frozen=True)
class Leaving:
    """What is sent to the experts of a layer's tokens."""

    rows: Tensor
    """[s, H]; [n, H] where all experts are here."""
    weights: Tensor
    """Of all experts of each, fp32 [s, k] or [n, k]."""
    flight: Flight | None = None
    """Of their gradients, on the way back."""


class Dispatch:
    """Where the rows of one pass of a layer go; recomputation uses it again. It holds no number with a gradient."""

    def __init__(self, experts: Tensor, groups: ExpertGroups) -> None:
        """Sort the rows, and begin to tell the host how many there are for each rank; it does not wait.

        Args:
            experts: int32 [n, k].
            groups: the ranks that share the experts.
        """
        self.experts = experts
        self.groups = groups
        self._arrived: RowOrder | None = None
        """Of the rows that have come, by this rank's experts."""
        self.alone = groups.both.size() == 1
        if self.alone:
            self._arrived = RowOrder.by_key(experts, groups.experts)
            return

        ranks, tensor, each = groups.shape
        homes = experts // each
        # The first of a token's experts on a rank brings it there.
        self._order = RowOrder.by_key(keep_first(homes, ranks), ranks + 1)
        assigned = count_rows(homes, ranks).sum(0, dtype=torch.int32)
        counts = torch.cat((self._order.counts[:ranks], assigned))
        gathered = counts.new_empty(groups.both.size() * len(counts))
        dist.all_gather_into_tensor(gathered, counts, group=groups.both)
        # torch gives a copy that does not block a page-locked place on the host.
        self._on_host = gathered.view(ranks, tensor, 2, ranks).to(HOST, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()

    @cached_property
    def exchange(self) -> Exchange:
        """Return the sizes and the order of the exchange; the first call waits for the host's copy."""
        self._copied.synchronize()
        own, tensor_rank = self.groups.ranks.rank(), self.groups.tensor.rank()
        # All ranks see all counts, so that none has to ask another.
        rows, assigned = self._on_host.unbind(2)
        sent, received = rows[own, tensor_rank].tolist(), rows[:, :, own]
        order = self._order.first(sum(sent))
        # A plan lives as long as its backward pass is to come.
        del self._on_host, self._order
        return Exchange(
            order,
            sent,
            received[:, tensor_rank].tolist(),
            received.sum(0).tolist(),
            int(assigned[:, :, own].sum()),
        )

    def leave(self, tokens: Tensor, weights: Tensor) -> Leaving:
        """Copy tokens for the ranks of their experts.

        What follows in the forward pass before `arrive` comes, in the backward pass, while gradients travel back.

        Args:
            tokens: [n, H].
            weights: of the tokens' experts, fp32 [n, k].
        """
        if self.alone:
            return Leaving(tokens, weights)
        order = self.exchange.order
        rows, weights = order.copies(tokens), order.copies(weights)
        if self.groups.ranks.size() == 1:
            return Leaving(rows, weights)
        flight = Flight()
        for each in (rows, weights):
            if each.requires_grad:
                # Called when autograd comes to the copies, after what was done since.
                each.register_hook(flight.land)
        return Leaving(rows, weights, flight)

    def arrive(self, leaving: Leaving) -> tuple[Tensor, Tensor, Tensor]:
        """Bring rows to their experts.

        Returns:
            rows [m, H] sorted by expert, their weights [m], and where each expert's rows end, int32 [e].
        """
        order = self._order_here()
        rows, weights = leaving.rows, leaving.weights
        if not self.alone:
            rows, weights = (self._brought(each, leaving.flight) for each in (rows, weights))
        return order.copies(rows), order.picks(weights), order.ends

    def _order_here(self) -> RowOrder:
        """Return the order of arrived rows by this rank's experts; the first call asks for the experts' numbers."""
        if self._arrived is None:
            _, _, each = self.groups.shape
            experts = self._brought(self.exchange.order.copies(self.experts))
            keys = experts - self.groups.ranks.rank() * each
            # Experts of other ranks have the last key.
            keys.clamp_(-1, each).remainder_(each + 1)
            self._arrived = RowOrder.by_key(keys, each + 1).first(self.exchange.rows)
        return self._arrived

    def _brought(self, rows: Tensor, flight: Flight | None = None) -> Tensor:
        """Send rows [s, ...] and return those that have come [M, ...]."""
        sent, received = self.exchange.sent, self.exchange.received
        rows = exchanged(rows, self.groups.ranks, sent, received, flight=flight)
        gathered: Tensor = gather_from_sequence_parallel_region(
            rows, group=self.groups.tensor, output_split_sizes=self.exchange.gathered
        )
        return gathered

    def from_experts(self, rows: Tensor, read: bool = True) -> Tensor:
        """Bring the experts' results [m, H], sorted by expert, back and add those of each token: [n, H].

        Without `read` they have no content, and neither has the sum: only gradients pass.
        """
        rows = self._order_here().sums(rows, read)
        if self.alone:
            return rows
        if self.groups.tensor.size() > 1:
            # Parts of a sum over the tensor ranks, added in fp32.
            summed = reduce_scatter_to_sequence_parallel_region(
                rows.float(), group=self.groups.tensor, input_split_sizes=self.exchange.gathered
            )
            rows = summed.to(rows.dtype)
        sent, received = self.exchange.sent, self.exchange.received
        rows = exchanged(rows, self.groups.ranks, received, sent, read)
        return self.exchange.order.sums(rows, read)


class _Exchanged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Any, *options: Any) -> Tensor:
        sent, received, read, flight = options
        ctx.group, ctx.sent, ctx.received, ctx.flight = group, sent, received, flight
        arrived = rows.new_empty((sum(received), *rows.shape[1:]))
        # Nobody reads the second forward pass of what is recomputed: its message can be saved.
        if read:
            dist.all_to_all_single(arrived, rows, received, sent, group=group)
        return arrived

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0].contiguous()
        returned = gradient.new_empty((sum(ctx.sent), *gradient.shape[1:]))
        begun = dist.all_to_all_single(
            returned,
            gradient,
            ctx.sent,
            ctx.received,
            group=ctx.group,
            async_op=ctx.flight is not None,
        )
        if ctx.flight is not None:
            ctx.flight.works.append(begun)
        return returned, *[None] * 5


def exchanged(
    rows: Tensor,
    group: Any,
    sent: list[int],
    received: list[int],
    read: bool = True,
    flight: Flight | None = None,
) -> Tensor:
    """Send stretches of rows [sum of sent, ...] to the ranks of a group, and return theirs [sum of received, ...].

    Without `read` nothing is sent, and the result has no content: only gradients pass. Their way back is waited for at once, or
    where `flight` lands.
    """
    if group.size() == 1:
        return rows
    arrived: Tensor = _Exchanged.apply(rows.contiguous(), group, sent, received, read, flight)
    return arrived
