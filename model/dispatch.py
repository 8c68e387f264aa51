"""Rows of a mixture on their way to the experts and back, over the ranks that share the experts.

A rank sorts its tokens' rows by expert; what goes to one rank is then one stretch. Received rows are sorted by expert again.
Without expert ranks nothing is read by the host. With them it reads once a layer how many rows each rank sends, while the device
permutes; the backward pass and recomputation use the same plan.
Shapes: n tokens of this rank, k experts a token, m rows on the device of the experts, E experts, e of them on this rank, H
hidden size.
"""

from dataclasses import dataclass
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
    permute_rows,
    sort_chunks,
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
class Exchange:
    """How rows get from the ranks of their tokens to those of their experts."""

    sent: list[int]
    """Rows to each expert rank."""
    received: list[int]
    """Rows from each expert rank."""
    gathered: list[int]
    """Rows of each tensor rank after that; all of them have all."""
    order: Tensor
    """int32 [m]: the row that is at each place when rows are sorted by expert."""
    places: Tensor
    """int32 [m, 1]: the sorted place of each row."""
    ends: Tensor
    """int32 [e]: where the rows of each expert end."""


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
        counts = count_rows(experts, groups.experts)
        self.order, self.places, totals, self.ends = sort_rows(experts, counts)
        self.alone = groups.both.size() == 1
        if self.alone:
            return

        ranks, tensor, _ = groups.shape
        gathered = totals.new_empty(ranks * tensor * groups.experts)
        dist.all_gather_into_tensor(gathered, totals, group=groups.both)
        counts = gathered.view(ranks, tensor, groups.experts)
        self._counts = counts
        # torch gives a copy that does not block a page-locked place on the host.
        self._on_host = counts.to(HOST, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()

    @cached_property
    def exchange(self) -> Exchange:
        """Return the sizes of the exchange and the order after it; the first call waits for the host's copy."""
        self._copied.synchronize()
        ranks, _, experts = self.groups.shape
        own, tensor_rank = self.groups.ranks.rank(), self.groups.tensor.rank()
        by_rank = self._on_host.unflatten(2, (ranks, experts)).sum(3)
        received = by_rank[:, :, own]
        gathered = received.sum(0).tolist()
        here = self._counts[:, :, own * experts : (own + 1) * experts].transpose(0, 1)
        order, places, ends = sort_chunks(here, sum(gathered))
        del self._counts, self._on_host
        return Exchange(
            by_rank[own, tensor_rank].tolist(),
            received[:, tensor_rank].tolist(),
            gathered,
            order,
            places,
            ends,
        )

    def to_experts(self, tokens: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Bring rows to their experts.

        Args:
            tokens: [n, H].
            weights: of the tokens' experts, fp32 [n, k].

        Returns:
            rows [m, H] sorted by expert, their weights [m], and where each expert's rows end, int32 [e].
        """
        rows = permute_rows(tokens, self.order, self.places)
        scalars = permute_rows(weights.view(-1, 1), self.order, self.places.view(-1, 1))
        if self.alone:
            return rows, scalars.squeeze(1), self.ends
        exchange = self.exchange
        arrived = [self._to_experts(x, exchange) for x in (rows, scalars)]
        return arrived[0], arrived[1].squeeze(1), exchange.ends

    def _to_experts(self, rows: Tensor, exchange: Exchange) -> Tensor:
        """Send rows [n * k, ...] and return those that have come, sorted by expert [m, ...]."""
        rows = exchanged(rows, self.groups.ranks, exchange.sent, exchange.received)
        rows = gather_from_sequence_parallel_region(
            rows, group=self.groups.tensor, output_split_sizes=exchange.gathered
        )
        return permute_rows(rows, exchange.order, exchange.places)

    def from_experts(self, rows: Tensor, read: bool = True) -> Tensor:
        """Bring the experts' results [m, H], sorted by expert, back and add those of each token: [n, H].

        Without `read` they have no content, and neither has the sum: only gradients pass.
        """
        if not self.alone:
            rows = self._from_experts(rows, self.exchange, read)
        return combine_rows(rows, self.order, self.places, read)

    def _from_experts(self, rows: Tensor, exchange: Exchange, read: bool) -> Tensor:
        """Send results [m, H] back to the ranks of their tokens: [n * k, H], sorted by expert of all."""
        rows = combine_rows(rows, exchange.order, exchange.places, read)
        if self.groups.tensor.size() > 1:
            # Parts of a sum over the tensor ranks, added in fp32.
            summed = reduce_scatter_to_sequence_parallel_region(
                rows.float(), group=self.groups.tensor, input_split_sizes=exchange.gathered
            )
            rows = summed.to(rows.dtype)
        return exchanged(rows, self.groups.ranks, exchange.received, exchange.sent, read)


class _Exchanged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Any, *sizes: Any) -> Tensor:
        sent, received, read = sizes
        ctx.group, ctx.sent, ctx.received = group, sent, received
        arrived = rows.new_empty((sum(received), *rows.shape[1:]))
        if read:
            dist.all_to_all_single(arrived, rows, received, sent, group=group)
        return arrived

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        returned = gradient.new_empty((sum(ctx.sent), *gradient.shape[1:]))
        dist.all_to_all_single(
            returned, gradient.contiguous(), ctx.sent, ctx.received, group=ctx.group
        )
        return returned, None, None, None, None


def exchanged(
    rows: Tensor, group: Any, sent: list[int], received: list[int], read: bool = True
) -> Tensor:
    """Send stretches of rows [sum of sent, ...] to the ranks of a group, and return theirs [sum of received, ...].

    Without `read` nothing is sent, and the result has no content: only gradients pass.
    """
    if group.size() == 1:
        return rows
    arrived: Tensor = _Exchanged.apply(rows.contiguous(), group, sent, received, read)
    return arrived
