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
    """A message to the ranks of a group; its gradients take the same way back.

    Where rows have landed in the forward pass, their gradients begin to travel in the backward pass, and are waited for where the rows began.
    """

    group: Any
    sent: list[int]
    """Rows to each rank."""
    received: list[int]
    """Rows from each rank."""
    read: bool = True
    """Without it rows have no content and nothing is sent: only gradients pass."""
    work: Any = None
    """Of what was sent last."""
    gradient: Tensor | None = None
    """Of the rows that were sent, while it is on its way."""

    def begin(self, rows: Tensor) -> Tensor:
        """Begin to send rows [sum of sent, ...]; return those that come, which nobody may read before they have landed."""
        begun: Tensor = _Begun.apply(rows.contiguous(), self)
        return begun

    def land(self, rows: Tensor) -> Tensor:
        """Let the device wait for rows that `begin` has returned, [sum of received, ...]."""
        landed: Tensor = _Landed.apply(rows, self)
        return landed

    def take_off(self, rows: Tensor, back: bool) -> Tensor:
        """Send rows, or with `back` their gradients."""
        sent, received = (self.received, self.sent) if back else (self.sent, self.received)
        coming = rows.new_empty((sum(received), *rows.shape[1:]))
        # Nobody reads the second forward pass of what is recomputed: its message can be saved.
        if self.read or back:
            self.work = dist.all_to_all_single(
                coming, rows, received, sent, group=self.group, async_op=True
            )
        return coming

    def wait(self) -> None:
        """Let the device wait for what was sent last."""
        work, self.work = self.work, None
        if work is not None:
            work.wait()


class _Begun(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        return flight.take_off(rows, back=False)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        flight = ctx.flight
        flight.wait()
        gradient, flight.gradient = flight.gradient, None
        return gradient, None


class _Landed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        flight.wait()
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous()
        ctx.flight.gradient = ctx.flight.take_off(gradient, back=True)
        # Autograd wants a tensor of this shape to go on, which takes no memory.
        return gradient.new_empty(()).expand_as(gradient), None


@dataclass(frozen=True)
class Travelling:
    """Rows on their way to other ranks."""

    rows: Tensor
    flight: Flight | None = None
    """None: they are here."""

    def land(self) -> Tensor:
        """Return them once the device has waited for them."""
        return self.rows if self.flight is None else self.flight.land(self.rows)


@dataclass(frozen=True)
class Leaving:
    """What is sent to the experts of a layer's tokens."""

    rows: Travelling
    """[s, H]; [n, H] where all experts are here."""
    weights: Travelling
    """Of all experts of each, fp32 [s, k] or [n, k]."""
    experts: Travelling | None
    """Their numbers; None: those who get them know them."""


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
        """Begin to send tokens to the ranks of their experts.

        What follows in the forward pass before `arrive` comes, in the backward pass, while gradients travel back.

        Args:
            tokens: [n, H].
            weights: of the tokens' experts, fp32 [n, k].
        """
        if self.alone:
            return Leaving(Travelling(tokens), Travelling(weights), None)
        order, experts = self.exchange.order, None
        if self._arrived is None:
            experts = self._begun(order.copies(self.experts))
        rows, weights = order.copies(tokens), order.copies(weights)
        # The rows last: a message that waits for them would let all that is launched later wait, products too, where a
        # device has one queue of launches (CUDA_DEVICE_MAX_CONNECTIONS=1, which tensor ranks need).
        begun = self._begun(weights)
        return Leaving(self._begun(rows), begun, experts)

    def arrive(self, leaving: Leaving) -> tuple[Tensor, Tensor, Tensor]:
        """Bring rows to their experts.

        Returns:
            rows [m, H] sorted by expert, their weights [m], and where each expert's rows end, int32 [e].
        """
        if leaving.experts is not None:
            self._arrived = self._order_here(self._gathered(leaving.experts))
        assert self._arrived is not None
        rows, weights = self._gathered(leaving.rows), self._gathered(leaving.weights)
        return self._arrived.copies(rows), self._arrived.picks(weights), self._arrived.ends

    def _order_here(self, experts: Tensor) -> RowOrder:
        """Return the order of arrived rows by this rank's experts; `experts` int32 [M, k]: those of each row."""
        _, _, each = self.groups.shape
        keys = experts - self.groups.ranks.rank() * each
        # Experts of other ranks have the last key.
        keys.clamp_(-1, each).remainder_(each + 1)
        return RowOrder.by_key(keys, each + 1).first(self.exchange.rows)

    def _begun(self, rows: Tensor, back: bool = False, read: bool = True) -> Travelling:
        """Begin to send rows [s, ...] to the ranks of the experts, or `back` from there."""
        if self.groups.ranks.size() == 1:
            return Travelling(rows)
        sent, received = self.exchange.sent, self.exchange.received
        if back:
            sent, received = received, sent
        flight = Flight(self.groups.ranks, sent, received, read)
        return Travelling(flight.begin(rows), flight)

    def _gathered(self, travelling: Travelling) -> Tensor:
        """Return the rows that have come [M, ...], with those of the other tensor ranks."""
        rows = travelling.land()
        if self.groups.tensor.size() == 1:
            return rows
        gathered: Tensor = gather_from_sequence_parallel_region(
            rows, group=self.groups.tensor, output_split_sizes=self.exchange.gathered
        )
        return gathered

    def send_back(self, rows: Tensor, read: bool = True) -> Travelling:
        """Begin to send the experts' results [m, H], sorted by expert, back to the ranks of their tokens.

        Without `read` they have no content: only gradients pass.
        """
        assert self._arrived is not None
        rows = self._arrived.sums(rows, read)
        if self.groups.tensor.size() > 1:
            # Parts of a sum over the tensor ranks, added in fp32.
            summed = reduce_scatter_to_sequence_parallel_region(
                rows.float(), group=self.groups.tensor, input_split_sizes=self.exchange.gathered
            )
            rows = summed.to(rows.dtype)
        return self._begun(rows, back=True, read=read)

    def come_back(self, travelling: Travelling, read: bool = True) -> Tensor:
        """Return the sum of the results of each token, [n, H]; without `read` it has no content."""
        rows = travelling.land()
        return rows if self.alone else self.exchange.order.sums(rows, read)
