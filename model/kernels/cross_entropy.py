"""Softmax cross-entropy of logits whose columns may be split over ranks: sums of each row, then the gradient in place.

Two operations, so that ranks can add up the sums between them. Logits are read twice and written once.
Shapes: r rows, v columns of the vocabulary on this rank.
"""

from typing import Any

import torch
from torch import Tensor

from visionloom.model.kernels import library


def row_sums(logits: Tensor, targets: Tensor) -> Tensor:
    """Return what the losses are made of, fp32 [3, r].

    Args:
        logits: [r, v].
        targets: columns int64 [r]; those below 0 or from v on are other ranks'.

    Returns:
        the largest logit of each row, the sum of exp(logit - largest), and the logit of the target, 0 if it is not here.
    """
    return _ROW_SUMS(logits, targets)


def to_gradient_(
    logits: Tensor, targets: Tensor, largest: Tensor, total: Tensor, weights: Tensor
) -> None:
    """Make logits into the gradient of the weighted losses: (softmax - one-hot of the target) x weight.

    Args:
        logits: [r, v], overwritten.
        targets: int64 [r], as above.
        largest: fp32 [r], the largest logit of a row over all ranks.
        total: fp32 [r], the sum of exp(logit - largest) over all ranks.
        weights: fp32 [r].
    """
    _TO_GRADIENT(logits, targets, largest, total, weights)


# ---- on a CPU


def _row_sums_cpu(logits: Tensor, targets: Tensor) -> Tensor:
    wide = logits.float()
    # Less the largest, no exponential is beyond fp32.
    largest = wide.amax(1)
    total = (wide - largest.unsqueeze(1)).exp_().sum(1)
    columns, mine = _here(targets, logits)
    target = wide.gather(1, columns).squeeze(1) * mine
    return torch.stack([largest, total, target])


def _to_gradient_cpu(
    logits: Tensor, targets: Tensor, largest: Tensor, total: Tensor, weights: Tensor
) -> Tensor:
    # A second exponential instead of a kept one: [r, v] in fp32 would be twice the logits.
    probabilities = (logits.float() - largest.unsqueeze(1)).exp_()
    probabilities.mul_((weights / total).unsqueeze(1))
    columns, mine = _here(targets, logits)
    probabilities.scatter_add_(1, columns, (-weights * mine).unsqueeze(1))
    return logits.copy_(probabilities)


def _here(targets: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the targets as columns [r, 1], any column for other ranks', and which are this rank's."""
    # Another rank's target adds zero to a column, any, of this one: rows are not picked out, which would make shapes depend on data.
    mine = (targets >= 0) & (targets < logits.shape[1])
    return torch.where(mine, targets, 0).unsqueeze(1), mine


# ---- shapes


def _row_sums_meta(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.new_empty(3, len(logits), dtype=torch.float32)


def _to_gradient_meta(logits: Tensor, *others: Any) -> Tensor:
    return logits


_ROW_SUMS = library.define(
    "cross_entropy_sums(Tensor logits, Tensor targets) -> Tensor",
    cpu=_row_sums_cpu,
    cuda=library.in_triton("cross_entropy_triton", "row_sums"),
    meta=_row_sums_meta,
)
_TO_GRADIENT = library.define(
    "cross_entropy_gradient_(Tensor(a!) logits, Tensor targets, Tensor largest, Tensor total, Tensor weights)"
    " -> Tensor(a!)",
    cpu=_to_gradient_cpu,
    cuda=library.in_triton("cross_entropy_triton", "to_gradient_"),
    meta=_to_gradient_meta,
)
