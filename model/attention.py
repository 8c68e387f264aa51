"""Attend over packed sequences: no token sees another segment, on one rank or over context-parallel ranks.

Shapes: T tokens of a pack, t of them on this context rank, H query heads, G key/value heads, D head dim, L length of a segment,
C context ranks, c = L / 2C rows of a piece.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel.mappings import all_to_all, gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from visionloom.model.kernels.attention import Segments, attend
from visionloom.parallel.context import Split, TokenRows
from visionloom.parallel.device import to_device


def _on_device(rows: TokenRows, device: torch.device) -> Tensor:
    """Return rows as int64 on the device, without waiting for it."""
    return to_device(torch.from_numpy(rows), device)


@dataclass(frozen=True)
class GatheredContext:
    """Causal attention with the keys and values of all context ranks gathered; for any degree."""

    segments: Segments
    """The pieces of this rank, two of each segment, and the keys that each sees."""
    keys: Tensor
    """int64 [U]: for each piece the rows of its segment up to its end, among all ranks' rows one after the other."""
    group: Any

    @classmethod
    def build(
        cls, cu_seqlens: Tensor, split: Split, group: Any, device: torch.device
    ) -> "GatheredContext":
        """Find the pieces of this rank of a pack that is split over `group`."""
        bounds = np.unique(cu_seqlens.numpy().astype(np.int64))
        starts = bounds[:-1].repeat(2)
        rows = np.diff(bounds).repeat(2) // (2 * group.size())
        # A rank has the n-th piece from either end of a segment: all ranks attend to equally many keys.
        first = group.rank()
        last = 2 * group.size() - 1 - first
        number = np.tile([first, last], len(bounds) - 1)
        # A piece sees its segment up to its own last row: the last query all keys, as the kernel has it.
        seen = (number + 1) * rows
        cu_seqlens_q = torch.from_numpy(np.concatenate([[0], rows.cumsum()]))
        cu_seqlens_k = torch.from_numpy(np.concatenate([[0], seen.cumsum()]))

        each = [np.arange(start, start + count) for start, count in zip(starts, seen, strict=True)]
        keys = split.places[np.concatenate(each)]
        segments = Segments.build(cu_seqlens_q, device, cu_seqlens_k)
        return cls(segments, _on_device(keys, device), group)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
    ) -> Tensor:
        """Attend from queries [t, H, D] to keys and values [t, G, D] of every rank; return [t, H, D]."""
        # Two pieces of a segment see its beginning: the backward pass adds two gradients a row, in any order the same.
        key = self._gathered(key).index_select(0, self.keys)
        value = self._gathered(value).index_select(0, self.keys)
        return attend(query, key, value, self.segments, causal=True, scale=scale)

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
    places: Tensor
    """int64 [T]: the place of each row of the pack when the ranks' rows are one after the other."""
    order: Tensor
    """int64 [T]: the inverse, rows of the pack in the order of the ranks."""
    group: Any

    @classmethod
    def build(
        cls, cu_seqlens: Tensor, split: Split, group: Any, device: torch.device
    ) -> "ExchangedContext":
        """Find whole segments among the rows as they arrive."""
        places, order = split.places, np.concatenate(split.ranks)
        return cls(
            Segments.build(cu_seqlens, device),
            _on_device(places, device),
            _on_device(order, device),
            group,
        )

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
        rows = all_to_all(self.group, by_rank.flatten(0, 1).contiguous())
        return _Permuted.apply(rows, self.places, self.order)

    def _heads_for_tokens(self, x: Tensor) -> Tensor:
        """Exchange own heads of all tokens [T, heads / C, D] for all heads of own tokens [t, heads, D]."""
        parts: Tensor = all_to_all(self.group, _Permuted.apply(x, self.order, self.places))
        by_rank = parts.unflatten(0, (self.group.size(), -1))
        return by_rank.transpose(0, 1).flatten(1, 2)


class _Permuted(torch.autograd.Function):
    """Take rows in another order; the backward pass takes them back, where an index alone would add them to zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradient.index_select(0, inverse), None, None


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
    """Megatron-core's core_attention for packed sequences.

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
