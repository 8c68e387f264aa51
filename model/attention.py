"""Attend over packed sequences: no token sees another segment, on one rank or over context-parallel ranks.

Shapes: T tokens of a pack, t of them on this context rank, H query heads, G key/value heads, D head dim, L length of a segment,
n segments of the same length, c = L / 2C rows of a piece with C context ranks.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import all_to_all, gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from visionloom.parallel.context import Split, TokenRows


@dataclass(frozen=True)
class SegmentGroup:
    """All segments of one length: they are attended in one batched call."""

    length: int
    rows: Tensor | None
    """int64 [n x length], rows of the segments one after the other; None where they already are so in the pack."""
    first: int
    """First row of the group, which begins a slice where `rows` is None."""
    count: int
    """Segments of the group, n."""

    def take(self, x: Tensor) -> Tensor:
        """Take the group's rows of [T, heads, D] as [n, heads, L, D]."""
        # A slice is a view; an index copies the rows, and its backward pass scatters them.
        if self.rows is None:
            picked = x[self.first : self.first + self.count * self.length]
        else:
            picked = x[self.rows]
        return picked.unflatten(0, (self.count, self.length)).transpose(1, 2)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float | None
    ) -> Tensor:
        """Attend inside each segment of the group; see `attend`. Return its rows, [n x length, H, D]."""
        attended = F.scaled_dot_product_attention(
            self.take(query),
            self.take(key),
            self.take(value),
            is_causal=causal,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return attended.transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True)
class Segments:
    """The segments of a pack, grouped by length; made on the host, so attention never waits for the device."""

    groups: tuple[SegmentGroup, ...]
    inverse: Tensor | None
    """int64 [T], the place of each row of the pack in the concatenated groups; None if in place."""

    @classmethod
    def build(
        cls, cu_seqlens: Tensor, device: torch.device, places: TokenRows | None = None
    ) -> "Segments":
        """Group the segments between `cu_seqlens` (int [S + 1], on the host, ends at T).

        `places` (int64 [T]): the place of each row of the pack in the tensors to be attended; None: in order.
        """
        groups, order = [], [np.zeros(0, np.int64)]
        for length, starts in _by_length(cu_seqlens):
            rows = _rows_of(starts, 0, length)
            if places is not None:
                rows = places[rows]
            contiguous = bool((np.diff(rows) == 1).all())
            index = None if contiguous else _index(rows, device)
            groups.append(SegmentGroup(length, index, int(rows[0]), starts.size))
            order.append(rows)

        placed = np.concatenate(order)
        in_place = bool((placed == np.arange(placed.size)).all())
        inverse = None if in_place else _index(np.argsort(placed), device)
        return cls(tuple(groups), inverse)


def _by_length(cu_seqlens: Tensor) -> list[tuple[int, TokenRows]]:
    """Return each length that occurs, increasing, with the first rows of its segments; empty segments are left out."""
    bounds = cu_seqlens.numpy().astype(np.int64)
    starts, lengths = bounds[:-1], np.diff(bounds)
    occurring = np.unique(lengths[lengths > 0])
    return [(int(length), starts[lengths == length]) for length in occurring]


def _rows_of(starts: TokenRows, begin: int, end: int) -> TokenRows:
    """Return rows begin..end of each of the segments that begin at `starts`, one after the other."""
    return (starts[:, None] + np.arange(begin, end)).reshape(-1)


def _index(rows: TokenRows, device: torch.device) -> Tensor:
    """Return rows as int64 on the device, without waiting for it."""
    return torch.from_numpy(rows).to(device, non_blocking=True)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    *,
    causal: bool,
    scale: float | None = None,
) -> Tensor:
    """Return scaled dot-product attention inside each segment.

    Args:
        query: [T, H, D]; key, value: [T, G, D] with H a multiple of G.
        segments: of the T rows.
        causal: a token sees only itself and earlier tokens of its segment.
        scale: of the scores; None: D^-1/2.

    Returns:
        [T, H, D].
    """
    outputs = [
        group.attend(query, key, value, causal=causal, scale=scale) for group in segments.groups
    ]
    # Usual for one long sample or equal pictures: no copy.
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return joined if segments.inverse is None else joined[segments.inverse]


@dataclass(frozen=True)
class SegmentPieces:
    """One of this rank's two pieces of all segments of one length."""

    count: int
    """Segments, n."""
    queries: Tensor
    """int64 [n x c]: rows among this rank's t."""
    keys: Tensor
    """int64 [n x (start + c)]: rows of the segment up to the piece's end, among all ranks' rows one after the other."""
    mask: Tensor
    """bool [c, start + c]: True where a row of the piece may see a key."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Attend from this rank's queries to all ranks' keys and values; return the piece's rows, [n x c, H, D]."""
        shape = (self.count, -1)
        attended = F.scaled_dot_product_attention(
            query[self.queries].unflatten(0, shape).transpose(1, 2),
            key[self.keys].unflatten(0, shape).transpose(1, 2),
            value[self.keys].unflatten(0, shape).transpose(1, 2),
            # Not is_causal: that aligns the first query with the first key, here it is the last with the last.
            attn_mask=self.mask,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return attended.transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True)
class GatheredContext:
    """Causal attention with the keys and values of all context ranks gathered; for any degree."""

    pieces: tuple[SegmentPieces, ...]
    inverse: Tensor
    """int64 [t], the place of each of this rank's rows in the concatenated pieces."""
    group: Any

    @classmethod
    def build(
        cls, cu_seqlens: Tensor, split: Split, group: Any, device: torch.device
    ) -> "GatheredContext":
        """Index the pieces of this rank of a pack that is split over `group`."""
        rank, size, places = group.rank(), group.size(), split.places
        # Every rank has as many rows, so this rank's begin at a multiple of them.
        local = places - rank * len(split.ranks[rank])
        pieces, order = [], []
        for length, starts in _by_length(cu_seqlens):
            rows = length // (2 * size)
            for number in (rank, 2 * size - 1 - rank):
                begin, end = number * rows, (number + 1) * rows
                queries = local[_rows_of(starts, begin, end)]
                keys = _index(places[_rows_of(starts, 0, end)], device)
                mask = torch.ones(rows, end, dtype=torch.bool, device=device).tril(begin)
                pieces.append(SegmentPieces(starts.size, _index(queries, device), keys, mask))
                order.append(queries)
        inverse = torch.from_numpy(np.argsort(np.concatenate(order))).to(device)
        return cls(tuple(pieces), inverse, group)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
    ) -> Tensor:
        """Attend from queries [t, H, D] to keys and values [t, G, D] of every rank; return [t, H, D]."""
        key, value = self._gathered(key), self._gathered(value)
        outputs = [piece.attend(query, key, value, scale) for piece in self.pieces]
        return torch.cat(outputs)[self.inverse]

    def _gathered(self, x: Tensor) -> Tensor:
        """Gather [t, G, D] of each rank to [T, G, D]."""
        # Backward: every rank's gradient of a row goes to the rank that has it, and is summed there.
        gathered: Tensor = gather_from_sequence_parallel_region(
            x, tensor_parallel_output_grad=True, group=self.group
        )
        return gathered


@dataclass(frozen=True)
class ExchangedContext:
    """Causal attention with heads exchanged for tokens (Ulysses): each rank attends whole segments for its share of the heads."""

    segments: Segments
    group: Any

    @classmethod
    def build(
        cls, cu_seqlens: Tensor, split: Split, group: Any, device: torch.device
    ) -> "ExchangedContext":
        """Index whole segments in the order in which the ranks' rows arrive."""
        return cls(Segments.build(cu_seqlens, device, split.places), group)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
    ) -> Tensor:
        """Attend as above, from [t, H, D] and twice [t, G, D] to [t, H, D]; the group's size must divide G."""
        query = self._tokens_for_heads(query)
        key = self._tokens_for_heads(key)
        value = self._tokens_for_heads(value)
        attended = attend(query, key, value, self.segments, causal=True, scale=scale)
        return self._heads_for_tokens(attended)

    def _tokens_for_heads(self, x: Tensor) -> Tensor:
        """Exchange all heads of own tokens [t, heads, D] for own heads of all tokens [T, heads / C, D]."""
        by_rank = x.unflatten(1, (self.group.size(), -1)).transpose(0, 1)
        return all_to_all(self.group, by_rank.flatten(0, 1).contiguous())

    def _heads_for_tokens(self, x: Tensor) -> Tensor:
        """Exchange own heads of all tokens [T, heads / C, D] for all heads of own tokens [t, heads, D]."""
        parts: Tensor = all_to_all(self.group, x.contiguous())
        by_rank = parts.unflatten(0, (self.group.size(), -1))
        return by_rank.transpose(0, 1).flatten(1, 2)


@dataclass(frozen=True)
class LocalContext:
    """Causal attention on the one rank that has all tokens."""

    segments: Segments

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
    ) -> Tensor:
        """Attend from [T, H, D] and twice [T, G, D] to [T, H, D]."""
        return attend(query, key, value, self.segments, causal=True, scale=scale)


Context = LocalContext | GatheredContext | ExchangedContext


def build_context(
    cu_seqlens: Tensor, split: Split, group: Any, exchange: str, device: torch.device
) -> Context:
    """Return the attention of a pack (its segments int [S + 1], on the host) in this layout."""
    if group.size() == 1:
        return LocalContext(Segments.build(cu_seqlens, device))
    kind = ExchangedContext if exchange == "ulysses" else GatheredContext
    return kind.build(cu_seqlens, split, group, device)


class PackedAttention(MegatronModule):  # type: ignore[misc]
    """Megatron-core's core_attention for packed sequences, with torch's own kernels.

    The pack's Context rides on `packed_seq_params.context`. With qkv_format "sbhd" SelfAttention hands over [t, 1, heads, D] and
    applies the rotary embedding without a host synchronisation.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **others: Any,
    ) -> None:
        """Take what Megatron-core gives every core_attention; `others` are for its own context parallelism."""
        super().__init__(config)
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: Any = None,
        **others: Any,
    ) -> Tensor:
        """Attend from [t, 1, heads, D] each to [t, 1, H * D]; masks (in `others` too) are the context's own."""
        context = packed_seq_params.context
        query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        attended = context.attend(query, key, value, self.scale)
        return attended.flatten(1).unsqueeze(1)
