"""Linear layers whose weights' gradients are added to their fp32 sums in the product: with a bias, or with results in fp32.

Megatron-core's layers do so by themselves (product.py); these are for the vision tower, its mergers, and a mixture's router.
Shapes: N rows, I and O widths of input and output.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionloom.model.kernels.library import define, in_triton
from visionloom.model.kernels.product import add_product_

column_sums = define(
    "column_sums(Tensor x) -> Tensor",
    cpu=lambda x: x.sum(0),
    cuda=in_triton("linear_triton", "column_sums"),
    meta=lambda x: x.new_empty(x.shape[1]),
)
"""Return the sum over the rows of [N, O], added up in fp32.

torch's own kernel took 7.4 ms of a micro-batch of 2B on an H100, 2.8 times what its bytes need (measured)."""


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        # Not saved as x is: where what is saved is kept in another form (model/kept.py), an alias without `main_grad` comes back.
        ctx.weight = weight
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        weight = ctx.weight
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        # That of a plain sum is one number with strides of 0.
        gradient = gradient.contiguous()
        by_x = gradient @ weight if needs_x else None
        by_weight = _weight_gradient([gradient], x, weight) if needs_weight else None
        return by_x, by_weight, column_sums(gradient) if needs_bias else None


def _weight_gradient(gradients: Sequence[Tensor], x: Tensor, weight: Any) -> Tensor:
    """Return the gradient of a weight; one without content where it is in `main_grad` of Megatron-core's DDP already.

    Args:
        gradients: parts [N, O] of the result's, which are to be added.
        x: [N, I].
        weight: [O, I].
    """
    total = getattr(weight, "main_grad", None)
    if total is None:
        first, *others = (gradient.t() @ x for gradient in gradients)
        return sum(others, first)
    for gradient in gradients:
        add_product_(total, gradient, x)
    # DDP's hook reads this, and runs only for a gradient that is there.
    weight.grad_added_to_main_grad = True
    return torch.empty_like(weight)


class Linear(nn.Linear):
    """torch's layer with a bias, on rows [N, I]."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, I] to [N, O]."""
        mapped: Tensor = _Linear.apply(x, self.weight, self.bias)
        return mapped


def wide_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Map [..., I] by a weight [O, I] of the same dtype to fp32 [..., O]; neither products nor sums are rounded to bf16.

    Two numbers of bf16 have an exact product in fp32, which tensor cores add up in fp32: a product of the numbers in fp32, as
    Megatron-core's router makes it, gives no other result and took 3 % of a step of 30B-A3B (estimated).
    """
    mapped: Tensor = _WideLinear.apply(x, weight)
    return mapped


class _WideLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight = weight
        rows = x.flatten(0, -2)
        mapped = rows.new_zeros((len(rows), len(weight)), dtype=torch.float32)
        add_product_(mapped, rows.t(), weight.t())
        return mapped.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,), weight = ctx.saved_tensors, ctx.weight
        needs_x, needs_weight = ctx.needs_input_grad
        parts = _in_parts(gradient.flatten(0, -2), weight.dtype)
        by_x = by_weight = None
        if needs_x:
            by_x = (torch.cat(parts, 1) @ weight.repeat(len(parts), 1)).view_as(x)
        if needs_weight:
            by_weight = _weight_gradient(parts, x.flatten(0, -2), weight)
        return by_x, by_weight


def _in_parts(numbers: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return fp32 numbers as sums of others: two of bf16 keep 16 bits of 24, where one would keep 8."""
    high = numbers.to(dtype)
    return [high] if dtype == numbers.dtype else [high, (numbers - high).to(dtype)]
