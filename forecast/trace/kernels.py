"""Kernels that a GPU runs as one launch, as operations that a trace sees as one.

On a CPU and on torch's meta device attention falls into small operations, with temporary tensors that no GPU makes.
`gpu_kernels` replaces it, so a trace has the launches, the saved tensors and the memory of the GPU's own kernel. On a CPU
it computes, too: by plain formulas, for the comparison of an imagined rank with a real one. The model's other operations of
this kind are in model/kernels/.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LIBRARY = torch.library.Library("visionloom", "FRAGMENT")
LIBRARY.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, bool causal, float scale) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "attention_backward(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor output, Tensor logsumexp,"
    " Tensor? mask, bool causal, float scale) -> (Tensor, Tensor, Tensor)"
)


# ---- attention


@dataclass(frozen=True)
class _Pattern:
    """Which keys a query sees, and the scale of the scores."""

    mask: Tensor | None
    causal: bool
    scale: float

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """Return scaled scores [n, H, L, S], minus infinity where a query sees no key."""
        scores = query @ key.transpose(-1, -2) * self.scale
        mask = self.mask
        if self.causal:
            whole = scores.new_ones(scores.shape[-2:], dtype=torch.bool)
            mask = whole.tril()
        return scores if mask is None else scores.masked_fill(~mask, float("-inf"))


def _repeated(x: Tensor, heads: int) -> Tensor:
    """Repeat key or value heads [n, G, S, D] for grouped queries."""
    return x.repeat_interleave(heads // x.shape[1], 1)


def _attention(query: Tensor, key: Tensor, value: Tensor, *pattern: Any) -> tuple[Tensor, Tensor]:
    heads = query.shape[1]
    scores = _Pattern(*pattern).scores(query, _repeated(key, heads))
    attended = scores.softmax(-1) @ _repeated(value, heads)
    output, logsumexp = _attention_shapes(query, key, value, *pattern)
    return output.copy_(attended), logsumexp.copy_(scores.logsumexp(-1))


def _attention_shapes(
    query: Tensor, key: Tensor, value: Tensor, *pattern: Any
) -> tuple[Tensor, Tensor]:
    """Return what a flash kernel leaves: the output with the tokens before the heads in memory, and a sum a row in fp32."""
    count, heads, length, _ = query.shape
    output = query.new_empty(count, length, heads, value.shape[-1]).transpose(1, 2)
    return output, query.new_empty(count, heads, length, dtype=torch.float32)


def _backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    output, logsumexp, *pattern = others
    heads, groups = query.shape[1], key.shape[1]
    keys, values = _repeated(key, heads), _repeated(value, heads)
    seen = _Pattern(*pattern)
    # The scores are not kept: they are made again from the sums of their rows.
    probabilities = (seen.scores(query, keys) - logsumexp.unsqueeze(-1)).exp()
    value_gradient = probabilities.transpose(-1, -2) @ gradient
    delta = (gradient * output).sum(-1, keepdim=True)
    by_score = gradient @ values.transpose(-1, -2) - delta
    score_gradient = probabilities * by_score * seen.scale
    key_gradient = score_gradient.transpose(-1, -2) @ query

    def summed(x: Tensor) -> Tensor:
        return x.unflatten(1, (groups, heads // groups)).sum(2)

    results = (score_gradient @ keys, summed(key_gradient), summed(value_gradient))
    made = _backward_shapes(gradient, query, key, value, *others)
    return tuple(target.copy_(result) for target, result in zip(made, results, strict=True))


def _backward_shapes(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    def like(x: Tensor) -> Tensor:
        return x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)

    return like(query), like(key), like(value)


LIBRARY.impl("attention", _attention, "CPU")
LIBRARY.impl("attention", _attention_shapes, "Meta")
LIBRARY.impl("attention_backward", _backward, "CPU")
LIBRARY.impl("attention_backward", _backward_shapes, "Meta")


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Tensor:
        mask, causal, scale = options
        output, logsumexp = torch.ops.visionloom.attention(query, key, value, *options)
        ctx.save_for_backward(query, key, value, output, logsumexp, mask)
        ctx.causal, ctx.scale = causal, scale
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, logsumexp, mask = ctx.saved_tensors
        made = torch.ops.visionloom.attention_backward(
            *gradients, query, key, value, output, logsumexp, mask, ctx.causal, ctx.scale
        )
        return (*made, None, None, None)


def attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """Return what F.scaled_dot_product_attention does, by one kernel; options are its own, a mask is boolean."""
    scale = options.get("scale")
    if scale is None:
        scale = query.shape[-1] ** -0.5
    mask, causal = options.get("attn_mask"), options.get("is_causal", False)
    return _Attention.apply(query, key, value, mask, causal, scale)


@contextlib.contextmanager
def gpu_kernels() -> Iterator[None]:
    """Let torch.nn.functional's attention be a single operation, as on a GPU."""
    functional: Any = F
    before = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = before
