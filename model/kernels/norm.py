"""RMSNorm and LayerNorm over the last dim, forward and backward in one kernel each.

RMSNorm is alone or with the residual stream that it branches off.
References: torch's F.rms_norm and F.layer_norm: everything is computed in fp32 and rounded once.
Shapes: [..., H], with a weight [H]; a reciprocal deviation fp32 [..., 1] is kept for the backward pass, and LayerNorm's mean.
"""

from typing import Any

import torch
from torch import Tensor

from visionloom.model.kernels.library import define, in_triton
from visionloom.model.kernels.remaking import remember


def _forward(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    wide = x.float()
    deviation = (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    output = (wide * deviation).mul_(weight)
    return output.to(x.dtype), deviation


def rms_norm_results(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return an empty output and empty deviations."""
    deviation = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    return x.new_empty(x.shape), deviation


def norm_gradients(
    gradient: Tensor, x: Tensor, deviation: Tensor, weight: Tensor, passing: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the weight by plain torch; `passing`: of x itself, where it is the residual too."""
    normalised = x.float() * deviation
    wide = gradient.float()
    # Summed in fp32 over all rows, rounded once.
    weight_gradient = (wide * normalised).flatten(0, -2).sum(0)

    # The gradient through the deviation: what of it lies along x is taken off.
    scaled = wide * weight
    along = (scaled * normalised).mean(-1, keepdim=True)
    x_gradient = scaled.sub_(normalised.mul_(along)).mul_(deviation)
    if passing is not None:
        x_gradient += passing
    return x_gradient.to(x.dtype), weight_gradient.to(weight.dtype)


def rms_norm_gradients(
    gradient: Tensor, x: Tensor, deviation: Tensor, weight: Tensor, passing: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return empty gradients of x and of the weight."""
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


_rms_norm = define(
    "rms_norm(Tensor x, Tensor weight, float epsilon) -> (Tensor, Tensor)",
    cpu=_forward,
    cuda=in_triton("norm_triton", "rms_norm"),
    meta=rms_norm_results,
)
_rms_norm_backward = define(
    "rms_norm_backward(Tensor gradient, Tensor x, Tensor deviation, Tensor weight, Tensor? passing)"
    " -> (Tensor, Tensor)",
    cpu=norm_gradients,
    cuda=in_triton("norm_triton", "rms_norm_backward"),
    meta=rms_norm_gradients,
)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        output, deviation = _rms_norm(x, weight, epsilon)
        ctx.save_for_backward(x, deviation, weight)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (*_rms_norm_backward(*gradients, *ctx.saved_tensors, None), None)


class _BranchRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        output, deviation = _rms_norm(x, weight, epsilon)
        ctx.save_for_backward(x, deviation, weight)
        # As a result of this function too, or autograd would add the two gradients in a kernel of its own.
        return output, x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient, passing = gradients
        return (*_rms_norm_backward(gradient, *ctx.saved_tensors, passing), None)


def _again(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return a norm's result once more."""
    output: Tensor = _rms_norm(x, weight, epsilon)[0]
    return output


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return [..., H] divided by the root of its mean square over the last dim, times weight [H], in its own dtype."""
    output: Tensor = _RMSNorm.apply(x, weight, epsilon)
    remember(output, _again, x, weight, epsilon)
    return output


def branch_rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return `rms_norm` and x itself, which goes on as the residual: the kernel of the backward pass adds both gradients."""
    output, residual = _BranchRMSNorm.apply(x, weight, epsilon)
    remember(output, _again, x, weight, epsilon)
    return output, residual


# ---- LayerNorm


def _layer_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    output, mean, deviation = torch.native_layer_norm(
        x.float(), weight.shape, weight.float(), bias.float(), epsilon
    )
    return output.to(x.dtype), mean, deviation


def layer_norm_results(
    x: Tensor, weight: Tensor, bias: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return an empty output, empty means and deviations."""
    output, deviation = rms_norm_results(x, weight, epsilon)
    return output, torch.empty_like(deviation), deviation


def _layer_norm_gradients(
    gradient: Tensor, x: Tensor, mean: Tensor, deviation: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    by_x, by_weight, by_bias = torch.ops.aten.native_layer_norm_backward(
        gradient.float(),
        x.float(),
        weight.shape,
        mean,
        deviation,
        weight.float(),
        bias.float(),
        [True, True, True],
    )
    return by_x.to(x.dtype), by_weight.to(weight.dtype), by_bias.to(bias.dtype)


def layer_norm_gradients(
    gradient: Tensor, x: Tensor, mean: Tensor, deviation: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return empty gradients of x, of the weight and of the bias."""
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


_layer_norm = define(
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float epsilon) -> (Tensor, Tensor, Tensor)",
    cpu=_layer_norm_forward,
    cuda=in_triton("norm_triton", "layer_norm"),
    meta=layer_norm_results,
)
_layer_norm_backward = define(
    "layer_norm_backward(Tensor gradient, Tensor x, Tensor mean, Tensor deviation, Tensor weight, Tensor bias)"
    " -> (Tensor, Tensor, Tensor)",
    cpu=_layer_norm_gradients,
    cuda=in_triton("norm_triton", "layer_norm_backward"),
    meta=layer_norm_gradients,
)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
        output, mean, deviation = _layer_norm(x, weight, bias, epsilon)
        ctx.save_for_backward(x, mean, deviation, weight, bias)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (*_layer_norm_backward(*gradients, *ctx.saved_tensors), None)


def _layer_norm_again(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """Return LayerNorm's result once more."""
    output: Tensor = _layer_norm(x, weight, bias, epsilon)[0]
    return output


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """Return x [..., H] less its mean, divided by its deviation over the last dim, times weight [H] plus bias [H].

    torch's own kernels take 2.5 times what their bytes need on an H100 (measured).
    """
    output: Tensor = _LayerNorm.apply(x, weight, bias, epsilon)
    remember(output, _layer_norm_again, x, weight, bias, epsilon)
    return output
