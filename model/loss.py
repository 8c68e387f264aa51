"""Compute the cross-entropy of the next token without the full matrix of logits.

Shapes: R supervised tokens, H hidden size, V vocabulary (v of it on this rank).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BLOCK_ROWS = 1024
"""Rows of logits alive at once: 1,024 x 151,936 in fp32 are 0.6 GiB, whatever the sequence length."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    group: Any,
    block: int = BLOCK_ROWS,
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
        block: rows of logits at a time.

    Returns:
        the sum, an fp32 scalar, and the unweighted loss of each token, fp32 [R] without gradient.
    """
    # ctx.needs_input_grad stays true under no_grad: evaluation would make gradients too.
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
    blocks = _Blocks(group, block)
    total, losses = _LinearCrossEntropy.apply(hidden, weight, targets, token_weights, blocks)
    return total, losses


@dataclass(frozen=True)
class _Blocks:
    """How the logits are cut."""

    group: Any
    """Process group that the vocabulary is split over."""
    rows: int
    """Rows at a time."""


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
        for start in range(0, len(hidden), blocks.rows):
            rows = slice(start, start + blocks.rows)
            losses[rows], probabilities = _block_loss(hidden[rows], weight, local[rows], group)
            if hidden_grad is None and weight_grad is None:
                continue

            # In place: a block of probabilities in fp32 has 0.6 GiB.
            logit_grad = probabilities.mul_(token_weights[rows].unsqueeze(1)).to(hidden.dtype)
            if hidden_grad is not None:
                torch.mm(logit_grad, weight, out=hidden_grad[rows])
            if weight_grad is not None:
                # Summed in fp32 over the blocks, in the weight's dtype only at the end.
                weight_grad += logit_grad.t() @ hidden[rows]

        ctx.hidden_grad = hidden_grad
        ctx.weight_grad = None if weight_grad is None else weight_grad.to(weight.dtype)
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
        for gradient in (hidden_grad, weight_grad):
            if gradient is not None:
                gradient.mul_(total_grad)
        return hidden_grad, weight_grad, None, None, None


def _shifted_logits(hidden: Tensor, weight: Tensor, group: Any) -> Tensor:
    """Return the logits fp32 [r, v] of a block less the largest of each row, so that no exponential overflows."""
    logits = (hidden @ weight.t()).float()
    # The largest logit of the whole vocabulary, or the exponentials of the ranks would not add up.
    largest = logits.amax(dim=1)
    if group.size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    logits -= largest.unsqueeze(1)
    return logits


def _block_loss(
    hidden: Tensor, weight: Tensor, local_targets: Tensor, group: Any
) -> tuple[Tensor, Tensor]:
    """Return the losses fp32 [r] of a block, and softmax minus one-hot fp32 [r, v]: the gradient of their sum by the logits."""
    logits = _shifted_logits(hidden, weight, group)

    # Targets of other ranks' rows take any column and count zero.
    mine = (local_targets >= 0) & (local_targets < weight.shape[0])
    columns = torch.where(mine, local_targets, 0).unsqueeze(1)
    target_logit = logits.gather(1, columns).squeeze(1) * mine

    exponentials = logits.exp_()
    sums = torch.stack([exponentials.sum(dim=1), target_logit])
    if group.size() > 1:
        dist.all_reduce(sums, group=group)
    probabilities = exponentials.div_(sums[0].unsqueeze(1))
    probabilities.scatter_add_(1, columns, -mine.to(probabilities.dtype).unsqueeze(1))
    return sums[0].log() - sums[1], probabilities
