"""Queries, keys and values out of one joined tensor: rotated, and in the language model normalised before, by one kernel.

The rotation is in the rotate-half form, reference: transformers' apply_rotary_pos_emb and apply_rotary_pos_emb_vision; the norm
is RMSNorm over a head, with one weight for all query heads and one for all key heads. Both in fp32, rounded once.
Shapes: T tokens, G groups of n query, m key and m value heads, which alternate in memory: [T, G, n + 2 m, D]. Megatron-core has
m = 1, the vision tower G = 1 and m = n. `rotation` fp32 [T, D]: cosines of D / 2 angles, then their sines.
"""

from typing import Any

import torch
from torch import Tensor

from visionloom.model.kernels.library import define, in_triton
from visionloom.model.kernels.norm import norm_gradients
from visionloom.model.kernels.recipes import remember


def _rotated(x: Tensor, rotation: Tensor, direction: int) -> Tensor:
    """Rotate fp32 [T, G, heads, D] by [T, D], in direction 1 or backwards, -1."""
    cosine, sine = rotation[:, None, None].chunk(2, dim=-1)
    first, second = x.chunk(2, dim=-1)
    # Written half by half into place, which torch.cat would copy once more.
    turned = torch.empty(x.shape, dtype=x.dtype)
    to_first, to_second = turned.chunk(2, dim=-1)
    torch.mul(first, cosine, out=to_first).addcmul_(second, sine, value=-direction)
    torch.mul(second, cosine, out=to_second).addcmul_(first, sine, value=direction)
    return turned


def _weight_rows(weights: list[Tensor], queries: int, keys: int) -> Tensor:
    """Return the weight of each of a group's query and key heads, fp32 [n + m, D]."""
    by_query, by_key = (weight.float() for weight in weights)
    return torch.cat((by_query.expand(queries, -1), by_key.expand(keys, -1)))


def _forward(
    heads: Tensor, rotation: Tensor, weights: list[Tensor], keys: int, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and, with weights, reciprocal deviations fp32 [T, G, n + m]; heads: [T, G, n + m, D]."""
    wide = heads.float()
    queries = heads.shape[2] - keys
    deviation = heads.new_empty(0, dtype=torch.float32)
    if weights:
        deviation = (wide.square().mean(-1) + epsilon).rsqrt()
        wide = wide * deviation.unsqueeze(-1)
        wide *= _weight_rows(weights, queries, keys)

    turned = _rotated(wide, rotation, 1).to(heads.dtype)
    query, key = turned.tensor_split([queries], dim=2)
    # One group is a view still, and a result may not share memory with another.
    return query.flatten(1, 2).contiguous(), key.flatten(1, 2).contiguous(), deviation


def rotated_heads(
    heads: Tensor, rotation: Tensor, weights: list[Tensor], keys: int, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return empty queries, keys and deviations."""
    tokens, groups, each, dim = heads.shape
    query = heads.new_empty(tokens, groups * (each - keys), dim)
    key = heads.new_empty(tokens, groups * keys, dim)
    kept = (tokens, groups, each) if weights else 0
    return query, key, heads.new_empty(kept, dtype=torch.float32)


def _backward(
    gradients: list[Tensor], rotation: Tensor, norm: list[Tensor], groups: int
) -> tuple[Tensor, Tensor]:
    """Return the gradient of the joined tensor and, with a norm, that of both weights [2, D].

    Args:
        gradients: of queries, keys and values.
        rotation: fp32 [T, D].
        norm: the forward pass's heads, reciprocal deviations and both weights; empty: there was none.
        groups: G.
    """
    query, key, value = (gradient.unflatten(1, (groups, -1)) for gradient in gradients)
    above = _rotated(torch.cat((query, key), dim=2).float(), rotation, -1)
    by_weight = value.new_empty(0)
    if norm:
        above, by_weight = _norm_backward(above, norm, key.shape[2])
    return torch.cat((above.to(value.dtype), value), dim=2), by_weight


def _norm_backward(above: Tensor, norm: list[Tensor], keys: int) -> tuple[Tensor, Tensor]:
    """Return the gradient before the norm [T, G, n + m, D], from that after it, and the weights' [2, D]."""
    heads, deviation, *weights = norm
    sizes = (heads.shape[2] - keys, keys)
    rows = (x.split(sizes, dim=2) for x in (above, heads, deviation.unsqueeze(-1)))
    pairs = map(norm_gradients, *rows, weights, (None, None))
    below, by_weight = zip(*pairs, strict=True)
    return torch.cat(below, dim=2), torch.stack(by_weight)


def rotated_gradients(
    gradients: list[Tensor], rotation: Tensor, norm: list[Tensor], groups: int
) -> tuple[Tensor, Tensor]:
    """Return empty gradients of the joined tensor and of the weights."""
    value = gradients[2]
    each = sum(gradient.shape[1] for gradient in gradients) // groups
    joined = value.new_empty(len(value), groups, each, value.shape[2])
    by_weight = norm[2].new_empty(2, value.shape[2]) if norm else value.new_empty(0)
    return joined, by_weight


_rotate_heads = define(
    "rotate_heads(Tensor heads, Tensor rotation, Tensor[] weights, int keys, float epsilon)"
    " -> (Tensor, Tensor, Tensor)",
    cpu=_forward,
    cuda=in_triton("rotary_triton", "rotate_heads"),
    meta=rotated_heads,
)
_rotate_heads_backward = define(
    "rotate_heads_backward(Tensor[] gradients, Tensor rotation, Tensor[] norm, int groups)"
    " -> (Tensor, Tensor)",
    cpu=_backward,
    cuda=in_triton("rotary_triton", "rotate_heads_backward"),
    meta=rotated_gradients,
)


class _RotatedHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, joined: Tensor, rotation: Tensor, keys: int, epsilon: float, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        # Views: the kernel reads no values, which stay where they are.
        heads, value = joined.tensor_split([joined.shape[2] - keys], dim=2)
        query, key, deviation = _rotate_heads(heads, rotation, weights, keys, epsilon)
        norm = (heads, deviation, *weights) if weights else ()
        ctx.save_for_backward(rotation, *norm)
        ctx.groups = joined.shape[1]
        return query, key, value.flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rotation, *norm = ctx.saved_tensors
        joined, by_weight = _rotate_heads_backward(gradients, rotation, norm, ctx.groups)
        return joined, None, None, None, *by_weight.unbind()


class _BothAgain:
    """Makes rotated queries and keys again: both at once, as the kernel does, though each is asked for by itself."""

    def __init__(self, keys: int, epsilon: float) -> None:
        self.keys, self.epsilon = keys, epsilon
        self._key: Tensor | None = None

    def query(self, heads: Tensor, rotation: Tensor, *weights: Tensor) -> Tensor:
        """Return the queries; attention asks for them before the keys."""
        query, self._key, _ = _rotate_heads(heads, rotation, weights, self.keys, self.epsilon)
        return query

    def key(self, heads: Tensor, rotation: Tensor, *weights: Tensor) -> Tensor:
        """Return the keys."""
        if self._key is None:
            self.query(heads, rotation, *weights)
        key, self._key = self._key, None
        assert key is not None
        return key


def rotate_heads(
    joined: Tensor, rotation: Tensor, keys: int, weights: tuple[Tensor, ...], epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries [T, G n, D] and keys [T, G m, D], rotated, and values [T, G m, D] as they are.

    Args:
        joined: [T, G, n + 2 m, D].
        rotation: fp32 [T, D].
        keys: m.
        weights: [D] of the norm of queries and of that of keys; empty: there is none.
        epsilon: of the norm.
    """
    query, key, value = _RotatedHeads.apply(joined, rotation, keys, epsilon, *weights)
    again = _BothAgain(keys, epsilon)
    heads, _ = joined.tensor_split([joined.shape[2] - keys], dim=2)
    remember(query, again.query, heads, rotation, *weights)
    remember(key, again.key, heads, rotation, *weights)
    return query, key, value
