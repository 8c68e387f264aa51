"""Attention over packed sequences: no token sees another segment, on one rank or over context-parallel ranks.

Shapes: T tokens of a pack, t of them on this context rank, H query heads, G key/value heads, D head dim, L length of a segment,
n segments of the same length, c = L / 2C rows of a chunk with C context ranks.
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
    """int64 [n x length], rows of the segments one after the other; None where they already lie so in the pack."""
    first: int
    count: int

    def take(self, x: Tensor) -> Tensor:
        """[T, heads, D] -> [n, heads, L, D]."""
        picked = (
            x[self.first : self.first + self.count * self.length]
            if self.rows is None
            else x[self.rows]
        )
        return picked.unflatten(0, (self.count, self.length)).transpose(1, 2)


@dataclass(frozen=True)
class Segments:
    """The segments of a pack, grouped by length; made on the host, so attention never waits for the device."""

    groups: tuple[SegmentGroup, ...]
    inverse: Tensor | None
    """int64 [T], where each row of the pack lies in the concatenated groups; None if in place."""

    @classmethod
    def build(
        cls, cu_seqlens: Tensor, device: torch.device, places: TokenRows | None = None
    ) -> "Segments":
        """Group the segments between `cu_seqlens` (int [S + 1], on the host, ends at T).

        `places` (int64 [T]) says where each row of the pack lies in the tensors to be attended; None: in order.
        """
        groups, order = [], []
        for length, own in _by_length(cu_seqlens):
            rows = (own[:, None] + np.arange(length)).reshape(-1)
            rows = rows if places is None else places[rows]
            contiguous = bool((np.diff(rows) == 1).all())
            index = None if contiguous else torch.from_numpy(rows).to(device, non_blocking=True)
            groups.append(SegmentGroup(length, index, int(rows[0]), own.size))
            order.append(rows)
        placed = np.concatenate(order) if order else np.zeros(0, np.int64)
        in_place = bool((placed == np.arange(placed.size)).all())
        inverse = (
            None if in_place else torch.from_numpy(np.argsort(placed)).to(device, non_blocking=True)
        )
        return cls(tuple(groups), inverse)


def _by_length(cu_seqlens: Tensor) -> list[tuple[int, TokenRows]]:
    """Each length that occurs, with the first rows of its segments."""
    bounds = cu_seqlens.numpy().astype(np.int64)
    starts, lengths = bounds[:-1], np.diff(bounds)
    return [(int(length), starts[lengths == length]) for length in np.unique(lengths[lengths > 0])]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    *,
    causal: bool,
    scale: float | None = None,
) -> Tensor:
    """Scaled dot-product attention inside each segment.

    Args:
        query: [T, H, D]; key, value: [T, G, D] with H a multiple of G.
        segments: of the T rows.
        causal: whether a token sees only earlier tokens of its segment.
        scale: of the scores; None: D^-1/2.

    Returns:
        [T, H, D].
    """
    grouped = query.shape[1] != key.shape[1]
    outputs = []
    for group in segments.groups:
        attended = F.scaled_dot_product_attention(
            group.take(query),
            group.take(key),
            group.take(value),
            is_causal=causal,
            scale=scale,
            enable_gqa=grouped,
        )
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return joined if segments.inverse is None else joined[segments.inverse]


@dataclass(frozen=True)
class Chunks:
    """One of this rank's two chunks of all segments of one length."""

    count: int
    length: int
    queries: Tensor
    """int64 [n x c]: rows among this rank's t."""
    keys: Tensor
    """int64 [n x (start + c)]: rows of the segment up to the chunk's end, among all ranks' rows one after the other."""
    mask: Tensor
    """bool [c, start + c]: what each row of the chunk may see."""


@dataclass(frozen=True)
class GatheredContext:
    """Causal attention with the keys and values of all context ranks gathered; for any degree."""

    chunks: tuple[Chunks, ...]
    inverse: Tensor
    """int64 [t], where each of this rank's rows lies in the concatenated chunks."""
    group: Any

    @classmethod
    def build(
        cls, cu_seqlens: Tensor, split: Split, group: Any, device: torch.device
    ) -> "GatheredContext":
        """Index the chunks of this rank of a pack that is split over `group`."""
        rank, size, places = group.rank(), group.size(), split.places
        local = places - rank * len(split.ranks[rank])
        chunks, order = [], []
        for length, starts in _by_length(cu_seqlens):
            rows = length // (2 * size)
            for number in (rank, 2 * size - 1 - rank):
                end = (number + 1) * rows
                queries = local[(starts[:, None] + np.arange(end - rows, end)).reshape(-1)]
                keys = places[(starts[:, None] + np.arange(end)).reshape(-1)]
                mask = torch.ones(rows, end, dtype=torch.bool, device=device).tril(end - rows)
                index = [
                    torch.from_numpy(each).to(device, non_blocking=True) for each in (queries, keys)
                ]
                chunks.append(Chunks(starts.size, rows, index[0], index[1], mask))
                order.append(queries)
        return cls(
            tuple(chunks), torch.from_numpy(np.argsort(np.concatenate(order))).to(device), group
        )

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """[t, H, D] and twice [t, G, D] -> [t, H, D]."""
        # Backward: every rank's gradient of a row goes to the rank that has it, and is summed there.
        key, value = (
            gather_from_sequence_parallel_region(
                x, tensor_parallel_output_grad=True, group=self.group
            )
            for x in (key, value)
        )
        grouped, outputs = query.shape[1] != key.shape[1], []
        for chunk in self.chunks:
            q, k, v = (
                x[rows].unflatten(0, (chunk.count, -1)).transpose(1, 2)
                for x, rows in ((query, chunk.queries), (key, chunk.keys), (value, chunk.keys))
            )
            attended = F.scaled_dot_product_attention(
                q, k, v, attn_mask=chunk.mask, scale=scale, enable_gqa=grouped
            )
            outputs.append(attended.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs)[self.inverse]


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

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """[t, H, D] and twice [t, G, D] -> [t, H, D]; the group's size must divide G."""
        query, key, value = (self._tokens_for_heads(x) for x in (query, key, value))
        return self._heads_for_tokens(
            attend(query, key, value, self.segments, causal=True, scale=scale)
        )

    def _tokens_for_heads(self, x: Tensor) -> Tensor:
        """[t, heads, D] -> [T, heads / C, D]."""
        parts = x.unflatten(1, (self.group.size(), -1)).transpose(0, 1).flatten(0, 1)
        return all_to_all(self.group, parts.contiguous())

    def _heads_for_tokens(self, x: Tensor) -> Tensor:
        """[T, heads / C, D] -> [t, heads, D]."""
        parts: Tensor = all_to_all(self.group, x.contiguous())
        return parts.unflatten(0, (self.group.size(), -1)).transpose(0, 1).flatten(1, 2)


@dataclass(frozen=True)
class LocalContext:
    """Causal attention on the one rank that has all tokens."""

    segments: Segments

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """[T, H, D] and twice [T, G, D] -> [T, H, D]."""
        return attend(query, key, value, self.segments, causal=True, scale=scale)


Context = LocalContext | GatheredContext | ExchangedContext


def build_context(
    cu_seqlens: Tensor, split: Split, group: Any, exchange: str, device: torch.device
) -> Context:
    """How the tokens of a pack (its segments int [S + 1], on the host) see each other in this layout."""
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
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config)
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """[t, 1, heads, D] each -> [t, 1, H * D]."""
        attended = packed_seq_params.context.attend(query[:, 0], key[:, 0], value[:, 0], self.scale)
        return attended.flatten(1).unsqueeze(1)
