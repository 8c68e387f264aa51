"""Activations of the MLPs, forward and backward in one kernel each: SwiGLU of gate and up side by side, and torch's GELU.

`swiglu` serves the dense MLP and, with a weight a row, the experts: the weight goes in before their second product.
Reference: torch's F.silu. Computed in fp32 and rounded once.
Shapes: [..., 2 F] holds F gates, then F ups (Megatron-core's order); the result is [..., F].
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visionloom.model.kernels.library import define, in_triton
from visionloom.model.kernels.remaking import remember


def _swiglu(gate_up: Tensor, row_weights: Tensor | None) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    output = F.silu(gate).mul_(up)
    if row_weights is not None:
        output *= row_weights.unsqueeze(-1)
    return output.to(gate_up.dtype)


def swiglu_result(gate_up: Tensor, row_weights: Tensor | None) -> Tensor:
    """Return an empty result."""
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


def _swiglu_backward(
    gradient: Tensor, gate_up: Tensor, row_weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    wide = gradient.float()
    gate, up = gate_up.float().chunk(2, dim=-1)
    active = F.silu(gate)
    by_weight = gate_up.new_empty(0)
    if row_weights is not None:
        by_weight = (wide * active).mul_(up).sum(-1).to(row_weights.dtype)
        wide = wide * row_weights.unsqueeze(-1)

    # Written in place: a gradient a half would be joined by another pass.
    both = torch.empty(gate_up.shape, dtype=torch.float32)
    by_gate, by_up = both.chunk(2, dim=-1)
    torch.ops.aten.silu_backward.grad_input(wide * up, gate, grad_input=by_gate)
    torch.mul(wide, active, out=by_up)
    return both.to(gate_up.dtype), by_weight


def swiglu_gradients(
    gradient: Tensor, gate_up: Tensor, row_weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return empty gradients of gates and ups, and of the weights of rows; of none an empty tensor."""
    if row_weights is None:
        by_weight = gate_up.new_empty(0)
    else:
        by_weight = row_weights.new_empty(row_weights.shape)
    return gate_up.new_empty(gate_up.shape), by_weight


_swiglu_forward = define(
    "swiglu(Tensor gate_up, Tensor? row_weights) -> Tensor",
    cpu=_swiglu,
    cuda=in_triton("activation_triton", "swiglu"),
    meta=swiglu_result,
)
_swiglu_gradients = define(
    "swiglu_backward(Tensor gradient, Tensor gate_up, Tensor? row_weights) -> (Tensor, Tensor)",
    cpu=_swiglu_backward,
    cuda=in_triton("activation_triton", "swiglu_backward"),
    meta=swiglu_gradients,
)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, row_weights: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate_up, row_weights)
        output: Tensor = _swiglu_forward(gate_up, row_weights)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gate_up, row_weights = ctx.saved_tensors
        both, by_weight = _swiglu_gradients(*gradients, gate_up, row_weights)
        return both, None if row_weights is None else by_weight


def swiglu(gate_up: Tensor, row_weights: Tensor | None = None) -> Tensor:
    """Return silu(gate) * up, [..., F] of [..., 2 F], times a weight a row [...], whose gradient it has too."""
    output: Tensor = _SwiGLU.apply(gate_up, row_weights)
    remember(output, _swiglu_forward, gate_up, row_weights)
    return output


def _gelu(x: Tensor, approximate: str) -> Tensor:
    return F.gelu(x, approximate=approximate)


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """Return F.gelu, whose result need not be kept; the product before it adds the bias."""
    output = _gelu(x, approximate)
    remember(output, _gelu, x, approximate)
    return output
