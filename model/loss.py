"""Compute the cross-entropy of the next token without the full matrix of logits.

Shapes: R supervised tokens, H hidden size, V vocabulary (v of it on this rank).
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from visionloom.model.kernels.cross_entropy import row_sums, to_gradient_
from visionloom.model.kernels.product import add_product_

BLOCK_BYTES = 5 << 28
"""Memory of the logits that are alive at once, 1.25 GiB: 4,416 rows of 151,936 in bf16, whatever the sequence length."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    group: Any,
    block_bytes: int = BLOCK_BYTES,
) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of the cross-entropies of `hidden @ weight.T`, in fp32 and in blocks of rows.

    The gradients are made together with the loss, so each block of logits is computed once and dropped. The vocabulary
    may be split over the ranks of `group`; the gradient of `hidden` is then this rank's part of a sum over the group.
    Source: Megatron-core's vocab_parallel_cross_entropy for the split, torch's cross_entropy as reference.

    Args:
        hidden: [R, H].
        weight: this rank's rows of the output matrix [v, H].
        targets: token ids in 0..V, int64 [R].
        token_weights: fp32 [R].
        group: process group that the vocabulary is split over.
        block_bytes: memory of the logits that are alive at once.

    Returns:
        the sum, an fp32 scalar, and the unweighted loss of each token, fp32 [R] without gradient.
    """
    # ctx.needs_input_grad stays true under no_grad: evaluation would make gradients too.
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
    blocks = _Blocks(group, block_bytes)
    total, losses = _LinearCrossEntropy.apply(hidden, weight, targets, token_weights, blocks)
    return total, losses


@dataclass(frozen=True)
class _Blocks:
    """How the logits are cut."""

    group: Any
    """Process group that the vocabulary is split over."""
    bytes: int
    """Memory of a block."""

    def cut(self, hidden: Tensor, weight: Tensor) -> list[slice]:
        """Return the rows of the blocks, of nearly the same number each."""
        row_bytes = weight.shape[0] * hidden.element_size()
        rows = max(1, self.bytes // row_bytes)
        count = -(-len(hidden) // rows)
        bounds = [number * len(hidden) // count for number in range(count + 1)] if count else []
        return [slice(start, end) for start, end in pairwise(bounds)]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        token_weights: Tensor,
        blocks: _Blocks,
    ) -> tuple[Tensor, Tensor]:
        group = blocks.group
        local = targets - weight.shape[0] * group.rank()
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        hidden_grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        weight_grad = (
            torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        )
        for rows in blocks.cut(hidden, weight):
            logits = hidden[rows] @ weight.t()
            losses[rows], largest, total = _losses(logits, local[rows], group)
            if hidden_grad is None and weight_grad is None:
                continue

            # In place: a second block would be as large.
            to_gradient_(logits, local[rows], largest, total, token_weights[rows])
            if hidden_grad is not None:
                torch.mm(logits, weight, out=hidden_grad[rows])
            if weight_grad is not None:
                # Summed in fp32 over the blocks, in the weight's dtype only at the end.
                add_product_(weight_grad, logits, hidden[rows])

        ctx.hidden_grad, ctx.weight_grad, ctx.dtype = hidden_grad, weight_grad, weight.dtype
        ctx.mark_non_differentiable(losses)
        return (losses * token_weights).sum(), losses

    @staticmethod
    def backward(
        ctx: Any,
        total_grad: Tensor,
        _losses_grad: Tensor,
    ) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.hidden_grad, ctx.weight_grad
        # Released at once: autograd keeps ctx until the whole graph is gone.
        ctx.hidden_grad = ctx.weight_grad = None
        if hidden_grad is not None:
            hidden_grad.mul_(total_grad)
        if weight_grad is not None:
            # Scaled and rounded in one kernel.
            scaled = torch.empty_like(weight_grad, dtype=ctx.dtype)
            weight_grad = torch.mul(weight_grad, total_grad, out=scaled)
        return hidden_grad, weight_grad, None, None, None


def _losses(logits: Tensor, local_targets: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses of a block of logits [r, v], the largest logit of each row and the sum of exp(logit - largest), fp32 [r]."""
    largest, total, target = row_sums(logits, local_targets).unbind()
    if group.size() > 1:
        # The largest of the whole vocabulary, or the exponentials of the ranks would not add up.
        own = largest.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        sums = torch.stack([total * (own - largest).exp(), target])
        dist.all_reduce(sums, group=group)
        total, target = sums.unbind()
    return total.log() + largest - target, largest, total
