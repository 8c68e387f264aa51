"""Queries, keys and values out of one joined tensor: rotated, and in the language model normalised before, by one kernel.

The rotation is in the rotate-half form, reference: transformers' apply_rotary_pos_emb and apply_rotary_pos_emb_vision; the norm
is RMSNorm over a head, with one weight for all query heads and one for all key heads. Both in fp32, rounded once.
Shapes: T tokens, G groups of n query, m key and m value heads, which alternate in memory: [T, G, n + 2 m, D]. Megatron-core has
m = 1, the vision tower G = 1 and m = n. `rotation` fp32 [T, D]: cosines of D / 2 angles, then their sines.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visionloom.model.kernels.library import define, in_triton


@dataclass(frozen=True)
class HeadNorm:
    """RMSNorm of the query and key heads."""

    query_weight: Tensor
    """[D]."""
    key_weight: Tensor
    """[D]."""
    epsilon: float


def _rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate fp32 [T, G, heads, D] by [T, 1, 1, D / 2]."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.empty(x.shape, dtype=x.dtype)
    torch.mul(first, cosine, out=turned[..., : first.shape[-1]]).addcmul_(second, sine, value=-1)
    torch.mul(second, cosine, out=turned[..., first.shape[-1] :]).addcmul_(first, sine)
    return turned


def _weights(query_weight: Tensor, key_weight: Tensor, heads: int, keys: int) -> Tensor:
    """Return the weight of each of a group's query and key heads, fp32 [n + m, D]."""
    queries = query_weight.float().expand(heads - keys, -1)
    return torch.cat((queries, key_weight.float().expand(keys, -1)))


def _forward(
    heads: Tensor,
    rotation: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    keys: int,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = heads.float()
    deviation = heads.new_empty(0, dtype=torch.float32)
    if query_weight is not None and key_weight is not None:
        deviation = (wide.square().mean(-1) + epsilon).rsqrt()
        wide = wide * deviation.unsqueeze(-1)
        wide *= _weights(query_weight, key_weight, heads.shape[2], keys)
    cosine, sine = rotation[:, None, None].chunk(2, dim=-1)
    turned = _rotated(wide, cosine, sine).to(heads.dtype)
    query, key = turned.tensor_split([heads.shape[2] - keys], dim=2)
    return query.flatten(1, 2).contiguous(), key.flatten(1, 2).contiguous(), deviation


def _forward_shapes(
    heads: Tensor,
    rotation: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    keys: int,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, groups, each, dim = heads.shape
    query = heads.new_empty(tokens, groups * (each - keys), dim)
    key = heads.new_empty(tokens, groups * keys, dim)
    kept = 0 if query_weight is None else (tokens, groups, each)
    return query, key, heads.new_empty(kept, dtype=torch.float32)


def _joined(query: Tensor, key: Tensor, groups: int) -> Tensor:
    """Return [T, G n, D] and [T, G m, D] as fp32 [T, G, n + m, D]."""
    parts = [x.unflatten(1, (groups, -1)) for x in (query, key)]
    return torch.cat(parts, dim=2).float()


def _backward(query: Tensor, key: Tensor, value: Tensor, rotation: Tensor, groups: int) -> Tensor:
    cosine, sine = rotation[:, None, None].chunk(2, dim=-1)
    turned = _rotated(_joined(query, key, groups), cosine, -sine)
    return torch.cat((turned.to(value.dtype), value.unflatten(1, (groups, -1))), dim=2)


def _backward_shapes(
    query: Tensor, key: Tensor, value: Tensor, rotation: Tensor, groups: int
) -> Tensor:
    tokens, values, dim = value.shape
    heads = (query.shape[1] + key.shape[1] + values) // groups
    return value.new_empty(tokens, groups, heads, dim)


def _norm_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotation: Tensor,
    heads: Tensor,
    deviation: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
) -> tuple[Tensor, Tensor]:
    groups, each = heads.shape[1:3]
    cosine, sine = rotation[:, None, None].chunk(2, dim=-1)
    turned = _rotated(_joined(query, key, groups), cosine, -sine)
    normalised = heads.float() * deviation.unsqueeze(-1)

    by_head = (turned * normalised).sum((0, 1))
    keys = key.shape[1] // groups
    by_weight = torch.stack((by_head[: each - keys].sum(0), by_head[each - keys :].sum(0)))

    scaled = turned.mul_(_weights(query_weight, key_weight, each, keys))
    along = (scaled * normalised).mean(-1, keepdim=True)
    below = scaled.sub_(normalised.mul_(along)).mul_(deviation.unsqueeze(-1))
    joined = torch.cat((below.to(value.dtype), value.unflatten(1, (groups, -1))), dim=2)
    return joined, by_weight.to(query_weight.dtype)


def _norm_backward_shapes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotation: Tensor,
    heads: Tensor,
    deviation: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
) -> tuple[Tensor, Tensor]:
    joined = _backward_shapes(query, key, value, rotation, heads.shape[1])
    return joined, query_weight.new_empty(2, *query_weight.shape)


_rotate_heads = define(
    "rotate_heads(Tensor heads, Tensor rotation, Tensor? query_weight, Tensor? key_weight, int keys, float epsilon)"
    " -> (Tensor, Tensor, Tensor)",
    cpu=_forward,
    cuda=in_triton("rotary_triton", "rotate_heads"),
    meta=_forward_shapes,
)
_rotate_heads_backward = define(
    "rotate_heads_backward(Tensor query, Tensor key, Tensor value, Tensor rotation, int groups) -> Tensor",
    cpu=_backward,
    cuda=in_triton("rotary_triton", "rotate_heads_backward"),
    meta=_backward_shapes,
)
_norm_rotate_heads_backward = define(
    "norm_rotate_heads_backward(Tensor query, Tensor key, Tensor value, Tensor rotation, Tensor heads, Tensor deviation,"
    " Tensor query_weight, Tensor key_weight) -> (Tensor, Tensor)",
    cpu=_norm_backward,
    cuda=in_triton("rotary_triton", "norm_rotate_heads_backward"),
    meta=_norm_backward_shapes,
)


def _split(joined: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    """Return the query and key heads [T, G, n + m, D], which the kernels read, and the value heads [T, G m, D]: views."""
    heads, value = joined.tensor_split([joined.shape[2] - keys], dim=2)
    return heads, value.flatten(1, 2)


class _RotatedHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, joined: Tensor, rotation: Tensor, keys: int) -> tuple[Tensor, ...]:
        heads, value = _split(joined, keys)
        query, key, _ = _rotate_heads(heads, rotation, None, None, keys, 0.0)
        ctx.save_for_backward(rotation)
        ctx.groups = joined.shape[1]
        return query, key, value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _rotate_heads_backward(*gradients, *ctx.saved_tensors, ctx.groups), None, None


class _NormRotatedHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, joined: Tensor, rotation: Tensor, keys: int, epsilon: float, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        heads, value = _split(joined, keys)
        query, key, deviation = _rotate_heads(heads, rotation, *weights, keys, epsilon)
        ctx.save_for_backward(rotation, heads, deviation, *weights)
        return query, key, value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        joined, by_weight = _norm_rotate_heads_backward(*gradients, *ctx.saved_tensors)
        return joined, None, None, None, *by_weight.unbind()


def rotate_heads(
    joined: Tensor, rotation: Tensor, keys: int, norm: HeadNorm | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries [T, G n, D] and keys [T, G m, D], rotated, and values [T, G m, D] as they are.

    Args:
        joined: [T, G, n + 2 m, D].
        rotation: fp32 [T, D].
        keys: m.
        norm: of the queries and keys before the rotation; None: none.
    """
    if norm is None:
        query, key, value = _RotatedHeads.apply(joined, rotation, keys)
    else:
        query, key, value = _NormRotatedHeads.apply(
            joined, rotation, keys, norm.epsilon, norm.query_weight, norm.key_weight
        )
    return query, key, value
