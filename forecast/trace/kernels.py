"""Kernels that a GPU runs as one launch, as operations that a trace sees as one.

On a CPU and on torch's meta device RMSNorm falls into small operations, with temporary tensors that no GPU makes.
`gpu_kernels` replaces it, so a trace has the launches, the saved tensors and the memory of the GPU's own kernels. On a CPU
they compute, too: by plain formulas, for the comparison of an imagined rank with a real one.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LIBRARY = torch.library.Library("visionloom", "FRAGMENT")
LIBRARY.define("rms_norm(Tensor x, Tensor weight, float epsilon) -> (Tensor, Tensor)")
LIBRARY.define(
    "rms_norm_backward(Tensor gradient, Tensor x, Tensor deviation, Tensor weight) -> (Tensor, Tensor)"
)


# ---- RMSNorm


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    wide = x.float()
    deviation = (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    normalised = (wide * deviation).to(x.dtype)
    return normalised * weight, deviation


def _rms_norm_shapes(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return what the kernel leaves: the output and a reciprocal deviation a row in fp32."""
    rows = (*x.shape[:-1], 1)
    return torch.empty_like(x), x.new_empty(rows, dtype=torch.float32)


def _rms_norm_backward(
    gradient: Tensor, x: Tensor, deviation: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    wide, scaled = x.float() * deviation, (gradient * weight).float()
    along = (scaled * wide).mean(-1, keepdim=True)
    weight_gradient = (gradient.float() * wide).flatten(0, -2).sum(0)
    return ((scaled - wide * along) * deviation).to(x.dtype), weight_gradient.to(weight.dtype)


def _rms_norm_backward_shapes(
    gradient: Tensor, x: Tensor, deviation: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


LIBRARY.impl("rms_norm", _rms_norm, "CPU")
LIBRARY.impl("rms_norm", _rms_norm_shapes, "Meta")
LIBRARY.impl("rms_norm_backward", _rms_norm_backward, "CPU")
LIBRARY.impl("rms_norm_backward", _rms_norm_backward_shapes, "Meta")


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        output, deviation = torch.ops.visionloom.rms_norm(x, weight, epsilon)
        ctx.save_for_backward(x, deviation, weight)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        made = torch.ops.visionloom.rms_norm_backward(*gradients, *ctx.saved_tensors)
        return (*made, None)


def rms_norm(x: Tensor, normalized_shape: tuple[int, ...], weight: Tensor, eps: float) -> Tensor:
    """Return what F.rms_norm does over the last dim, by the one kernel that it has on a GPU."""
    assert len(normalized_shape) == 1, "the model normalises its last dim"
    return _RmsNorm.apply(x, weight, eps)


@contextlib.contextmanager
def gpu_kernels() -> Iterator[None]:
    """Let torch.nn.functional's RMSNorm be a single operation, as on a GPU."""
    functional: Any = F
    before = functional.rms_norm
    functional.rms_norm = rms_norm
    try:
        yield
    finally:
        functional.rms_norm = before
