"""Linear layers with a bias whose gradients take two kernels less: the weight's is added to its fp32 sum in the product.

Megatron-core's layers do so by themselves (product.py); this is for the vision tower and its mergers.
Shapes: N rows, I and O widths of input and output.
"""

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
        by_weight = _weight_gradient(gradient, x, weight) if needs_weight else None
        return by_x, by_weight, column_sums(gradient) if needs_bias else None


def _weight_gradient(gradient: Tensor, x: Tensor, weight: Any) -> Tensor:
    """Return the gradient of a weight; one without content where it is in `main_grad` of Megatron-core's DDP already."""
    total = getattr(weight, "main_grad", None)
    if total is None:
        return gradient.t() @ x
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
