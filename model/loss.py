"""Compute losses of the next token without the full matrix of logits.

Shapes: R supervised tokens, H hidden size, V vocabulary (v of it on this rank), n kinds of loss.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from visionloom.model.kernels.cross_entropy import row_sums, to_gradient_
from visionloom.model.kernels.product import add_product_

BLOCK_BYTES = 5 << 28
"""Memory of the logits that are alive at once, 1.25 GiB: 4,416 rows of 151,936 in bf16, whatever the sequence length."""


class RowLoss(Protocol):
    """Losses of rows of logits whose columns may be split over ranks."""

    @property
    def scales(self) -> tuple[float, ...]:
        """Factors with which the n kinds of loss are added up."""

    @property
    def token_weights(self) -> Tensor:
        """fp32 [R]."""

    @property
    def copies(self) -> int:
        """Blocks of logits that a call needs beside the one it is given, counted in the dtype of the logits."""

    def __call__(self, logits: Tensor, rows: slice, gradient: bool) -> Tensor:
        """Return the unweighted losses of a block, and make its logits into their gradient.

        Args:
            logits: [r, v], overwritten by the gradient of the scaled and weighted sum.
            rows: where the block stands among the R.
            gradient: False: only the losses are wanted.

        Returns:
            fp32 [n, r].
        """


RowLossMaker = Callable[[Tensor, Tensor, Any], RowLoss]
"""Makes the losses of R rows from their targets [R], token weights [R] and the process group that the vocabulary is split over."""


def linear_loss(
    hidden: Tensor, weight: Tensor, row_loss: RowLoss, block_bytes: int = BLOCK_BYTES
) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of the losses of `hidden @ weight.T`, in fp32 and in blocks of rows.

    The gradients are made together with the loss, so each block of logits is computed once and dropped. The vocabulary
    may be split over ranks; the gradient of `hidden` is then this rank's part of a sum over them.

    Args:
        hidden: [R, H].
        weight: this rank's rows of the output matrix [v, H].
        row_loss: of the R rows.
        block_bytes: memory of the logits that are alive at once.

    Returns:
        the sum, an fp32 scalar, and the unweighted losses of each token, fp32 [n, R] without gradient.
    """
    # ctx.needs_input_grad stays true under no_grad: evaluation would make gradients too.
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
    total, losses = _LinearLoss.apply(hidden, weight, row_loss, block_bytes)
    return total, losses


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    group: Any,
    block_bytes: int = BLOCK_BYTES,
) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of the cross-entropies of `hidden @ weight.T`; see `linear_loss`.

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
    row_loss = CrossEntropyLoss(targets, token_weights, group)
    total, losses = linear_loss(hidden, weight, row_loss, block_bytes)
    return total, losses[0]


@dataclass(frozen=True)
class CrossEntropyLoss:
    """The cross-entropy with given tokens.

    Source: Megatron-core's vocab_parallel_cross_entropy for the split, torch's cross_entropy as reference.
    """

    targets: Tensor
    """Token ids in 0..V, int64 [R]."""
    token_weights: Tensor
    """fp32 [R]."""
    group: Any
    """Process group that the vocabulary is split over."""
    scales: tuple[float, ...] = (1.0,)
    copies: int = 0

    def __call__(self, logits: Tensor, rows: slice, gradient: bool) -> Tensor:
        """Return the losses of a block [1, r]; see RowLoss."""
        targets = local_targets(self.targets[rows], logits, self.group)
        losses, largest, total = row_losses(logits, targets, self.group)
        if gradient:
            # In place: a second block would be as large.
            to_gradient_(logits, targets, largest, total, self.token_weights[rows])
        return losses.unsqueeze(0)


def local_targets(targets: Tensor, logits: Tensor, group: Any) -> Tensor:
    """Return token ids as columns of this rank's logits; other ranks' are below 0 or beyond the last."""
    return targets - logits.shape[1] * group.rank()


def blocks_of(count: int, row_bytes: int, block_bytes: int) -> list[slice]:
    """Return `count` rows in blocks of nearly the same number each, none above `block_bytes` if a row is not."""
    rows = max(1, block_bytes // row_bytes)
    blocks = -(-count // rows)
    bounds = [number * count // blocks for number in range(blocks + 1)] if blocks else []
    return [slice(start, end) for start, end in pairwise(bounds)]


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, row_loss: RowLoss, block_bytes: int
    ) -> tuple[Tensor, Tensor]:
        kinds = len(row_loss.scales)
        losses = torch.empty(kinds, len(hidden), dtype=torch.float32, device=hidden.device)
        hidden_grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        weight_grad = (
            torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        )
        gradient = hidden_grad is not None or weight_grad is not None
        row_bytes = weight.shape[0] * hidden.element_size() * (1 + row_loss.copies)
        for rows in blocks_of(len(hidden), row_bytes, block_bytes):
            logits = hidden[rows] @ weight.t()
            losses[:, rows] = row_loss(logits, rows, gradient)
            if hidden_grad is not None:
                torch.mm(logits, weight, out=hidden_grad[rows])
            if weight_grad is not None:
                # Summed in fp32 over the blocks, in the weight's dtype only at the end.
                add_product_(weight_grad, logits, hidden[rows])

        ctx.hidden_grad, ctx.weight_grad, ctx.dtype = hidden_grad, weight_grad, weight.dtype
        ctx.mark_non_differentiable(losses)
        # Each kind alone: one product of all would be a matrix-vector kernel for as little.
        total = (losses[0] * row_loss.token_weights).sum() * row_loss.scales[0]
        for kind in range(1, kinds):
            total = total + (losses[kind] * row_loss.token_weights).sum() * row_loss.scales[kind]
        return total, losses

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
        return hidden_grad, weight_grad, None, None


def row_losses(logits: Tensor, targets: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses of a block of logits [r, v], the largest logit of each row and the sum of exp(logit - largest), fp32 [r]."""
    largest, total, target = row_sums(logits, targets).unbind()
    if group.size() > 1:
        # The largest of the whole vocabulary, or the exponentials of the ranks would not add up.
        own = largest.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        sums = torch.stack([total * (own - largest).exp(), target])
        dist.all_reduce(sums, group=group)
        total, target = sums.unbind()
    return total.log() + largest - target, largest, total
