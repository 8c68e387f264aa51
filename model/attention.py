"""Attention over packed sequences: no token sees another segment.

Shapes: T tokens, H query heads, G key/value heads, D head dim, L length of a segment, n segments of the same length.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor


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
        picked = x[self.first : self.first + self.count * self.length] if self.rows is None else x[self.rows]
        return picked.unflatten(0, (self.count, self.length)).transpose(1, 2)


@dataclass(frozen=True)
class Segments:
    """The segments of a pack, grouped by length; made on the host, so attention never waits for the device."""

    groups: tuple[SegmentGroup, ...]
    inverse: Tensor | None
    """int64 [T], where each row of the pack lies in the concatenated groups; None if in place."""

    @classmethod
    def build(cls, cu_seqlens: Tensor, device: torch.device) -> "Segments":
        """Group the segments between `cu_seqlens` (int [S + 1], on the host, ends at T)."""
        bounds = cu_seqlens.numpy().astype(np.int64)
        starts, lengths = bounds[:-1], np.diff(bounds)
        groups, order = [], []
        for length in np.unique(lengths[lengths > 0]):
            own = starts[lengths == length]
            rows = (own[:, None] + np.arange(length)).reshape(-1)
            contiguous = bool(rows[-1] - rows[0] + 1 == rows.size)
            index = None if contiguous else torch.from_numpy(rows).to(device, non_blocking=True)
            groups.append(SegmentGroup(int(length), index, int(rows[0]), own.size))
            order.append(rows)
        placed = np.concatenate(order) if order else np.zeros(0, np.int64)
        in_place = bool((placed == np.arange(placed.size)).all())
        inverse = None if in_place else torch.from_numpy(np.argsort(placed)).to(device, non_blocking=True)
        return cls(tuple(groups), inverse)


def attend(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, *, causal: bool, scale: float | None = None
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
            group.take(query), group.take(key), group.take(value), is_causal=causal, scale=scale, enable_gqa=grouped
        )
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return joined if segments.inverse is None else joined[segments.inverse]


class PackedAttention(MegatronModule):  # type: ignore[misc]
    """Megatron-core's core_attention for packed sequences, with torch's own kernels.

    The segments ride on `packed_seq_params.segments`. With qkv_format "sbhd" SelfAttention hands over [T, 1, heads, D] and
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
        self.causal = attn_mask_type == AttnMaskType.causal
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
        """[T, 1, heads, D] each -> [T, 1, H * D]."""
        attended = attend(query[:, 0], key[:, 0], value[:, 0], packed_seq_params.segments, causal=self.causal, scale=self.scale)
        return attended.flatten(1).unsqueeze(1)
