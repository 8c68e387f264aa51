"""Operations of a mixture's router: each token's experts, their weights, and what is counted of them.

A token takes the k experts with the largest logits; its weights are the softmax over these k in fp32 (Qwen3 technical report,
arXiv 2505.09388, which divides the softmax over all experts by the sum of the chosen ones: the same numbers).
Shapes: n tokens, E experts, k experts a token.
"""

from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from visionloom.model.kernels.library import define, in_triton

ENTROPY_UNIT = 2.0**-32
"""Nats; sums of whole units do not depend on their order, and 400 million tokens of 128 experts fit into int64."""


def _choose(logits: Tensor, each: int) -> Tensor:
    return logits.topk(each, dim=1).indices.int()


def _choose_shapes(logits: Tensor, each: int) -> Tensor:
    return logits.new_empty((len(logits), each), dtype=torch.int32)


choose_experts = define(
    "choose_experts(Tensor logits, int each) -> Tensor",
    cpu=_choose,
    cuda=in_triton("routing_triton", "choose"),
    meta=_choose_shapes,
)
"""Return the experts of each token, int32 [n, k], from logits fp32 [n, E], the largest first."""


def _weigh(logits: Tensor, experts: Tensor, padding: Tensor | None, tally: Tensor | None) -> Tensor:
    chosen = experts.long()
    if tally is not None:
        real = slice(None) if padding is None else ~padding
        probabilities = logits[real].softmax(1)
        entropies = torch.special.entr(probabilities).sum(1) / ENTROPY_UNIT
        count = logits.shape[1]
        tally[:count] += torch.bincount(chosen[real].flatten(), minlength=count)
        tally[count] += entropies.long().sum()
        tally[count + 1] += len(probabilities)
    return logits.gather(1, chosen).softmax(1)


def _weigh_shapes(
    logits: Tensor, experts: Tensor, padding: Tensor | None, tally: Tensor | None
) -> Tensor:
    return torch.empty_like(experts, dtype=logits.dtype)


_weigh_experts = define(
    "weigh_experts(Tensor logits, Tensor experts, Tensor? padding, Tensor(a!)? tally) -> Tensor",
    cpu=_weigh,
    cuda=in_triton("routing_triton", "weigh"),
    meta=_weigh_shapes,
)


def _weigh_backward(
    gradient: Tensor,
    logits: Tensor,
    experts: Tensor,
    weights: Tensor,
    padding: Tensor | None,
    load: Tensor | None,
    scale: Tensor | None,
) -> Tensor:
    along = (gradient * weights).sum(1, keepdim=True)
    by_score = weights * (gradient - along)
    result = torch.zeros_like(logits).scatter_(1, experts.long(), by_score)
    if load is not None:
        assert scale is not None, "a load has a scale"
        probabilities = logits.softmax(1)
        mean = (probabilities * load).sum(1, keepdim=True)
        balance = probabilities * (load - mean) * scale
        if padding is not None:
            balance.masked_fill_(padding.unsqueeze(1), 0.0)
        result += balance
    return result


def _weigh_backward_shapes(gradient: Tensor, logits: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(logits)


_weigh_experts_backward = define(
    "weigh_experts_backward(Tensor gradient, Tensor logits, Tensor experts, Tensor weights, Tensor? padding,"
    " Tensor? load, Tensor? scale) -> Tensor",
    cpu=_weigh_backward,
    cuda=in_triton("routing_triton", "weigh_backward"),
    meta=_weigh_backward_shapes,
)


class _Weigh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, experts: Tensor, *options: Any) -> Tensor:
        padding, tally, load, coefficient = options
        weights: Tensor = _weigh_experts(logits, experts, padding, tally)
        ctx.save_for_backward(logits, experts, weights, padding, load)
        ctx.coefficient = coefficient
        return weights

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        *tensors, load = ctx.saved_tensors
        scale = None
        if load is not None:
            # Megatron-core's schedule sets it: by it the main loss is multiplied.
            loss_scale = MoEAuxLossAutoScaler.main_loss_backward_scale
            scale = gradient.new_full((1,), ctx.coefficient)
            if loss_scale is not None:
                scale *= loss_scale
        made = _weigh_experts_backward(gradient.contiguous(), *tensors, load, scale)
        return made, None, None, None, None, None


def weigh_experts(
    logits: Tensor,
    experts: Tensor,
    padding: Tensor | None,
    tally: Tensor | None = None,
    balance: tuple[Tensor, float] | None = None,
) -> Tensor:
    """Return the weights fp32 [n, k] of each token's experts.

    Args:
        logits: fp32 [n, E].
        experts: int32 [n, k].
        padding: bool [n], True in padding; None: all tokens are real.
        tally: int64 [E + 2], to which real tokens are added: assignments of each expert, entropies of the softmax over all
            experts in ENTROPY_UNIT, tokens.
        balance: load fp32 [E] and c, for c * sum over real tokens and experts of probability * load: this loss is in no
            number, only in the gradient.
    """
    load, coefficient = balance or (None, 0.0)
    weights: Tensor = _Weigh.apply(logits, experts, padding, tally, load, coefficient)
    return weights
