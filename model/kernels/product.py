"""Add matrix products to fp32 sums in the products' own kernel: no product is written and read again.

Gradients of weights are summed over micro-batches in fp32 (`main_grad` of Megatron-core's DDP).
Shapes: t tokens, e groups of them, O and I widths of output and input.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel import layers
from torch import Tensor, nn

from visionloom.model.kernels import library


def _on_cpu(total: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    # torch's CPU product has one dtype: in that of the sum nothing is rounded to bf16, as on a GPU.
    return total.addmm_(rows.t().to(total.dtype), columns.to(total.dtype))


def _on_cuda(total: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    if total.dtype == rows.dtype:
        return total.addmm_(rows.t(), columns)
    # cuBLAS sums in fp32 anyhow: it reads the total, adds and writes it, and rounds nothing to bf16.
    return torch.addmm(total, rows.t(), columns, out_dtype=total.dtype, out=total)


def _on_meta(total: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return total


_ADD_PRODUCT = library.define(
    "add_product_(Tensor(a!) total, Tensor rows, Tensor columns) -> Tensor(a!)",
    cpu=_on_cpu,
    cuda=_on_cuda,
    meta=_on_meta,
)


def add_product_(total: Tensor, rows: Tensor, columns: Tensor) -> None:
    """Add rows^T columns to `total` [O, I], fp32 or of their dtype; rows [t, O], columns [t, I]."""
    _ADD_PRODUCT(total, rows, columns)


def _groups_on_cpu(
    total: Tensor, rows: list[Tensor], columns: list[Tensor], ends: list[Tensor]
) -> Tensor:
    for left, right, stops in zip(rows, columns, ends, strict=True):
        begin = 0
        for each, end in zip(total, stops.tolist(), strict=True):
            _on_cpu(each, left[begin:end], right[begin:end])
            begin = end
    return total


_ADD_GROUPED_PRODUCT = library.define(
    "add_grouped_product_(Tensor(a!) total, Tensor[] rows, Tensor[] columns, Tensor[] ends) -> Tensor(a!)",
    cpu=_groups_on_cpu,
    cuda=library.in_triton("linear_triton", "add_grouped_product_"),
    meta=lambda total, rows, columns, ends: total,
)


def add_grouped_product_(total: Tensor, parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Add rows^T columns of each group of tokens to a sum of its own; the host reads nothing of the device.

    Args:
        total: [e, O, I], fp32 or of their dtype.
        parts: of the tokens, each with rows [t, O] and columns [t, I] sorted by group, bf16 or fp32, and where each group ends,
            int32 [e]; what is behind the last one counts nowhere.
    """
    rows, columns, ends = zip(*parts, strict=True)
    contiguous = ([each.contiguous() for each in factors] for factors in (rows, columns))
    _ADD_GROUPED_PRODUCT(total, *contiguous, list(ends))


class _InPlaceOfApex:
    """Megatron-core's name for the kernel, which Apex would bring."""

    @staticmethod
    def wgrad_gemm_accum_fp32(columns: Tensor, rows: Tensor, total: Tensor) -> None:
        """Add the gradient of a weight to its fp32 sum."""
        add_product_(total, rows, columns)


def accumulate_in_products(model: nn.Module) -> None:
    """Let Megatron-core's linear layers add the gradients of their weights to `main_grad` in the product itself.

    The model is in Megatron-core's DDP, which gives every weight that trains its `main_grad`.
    """
    # Megatron-core looks for it as a global of its module when a backward pass runs.
    module: Any = layers
    module.fused_weight_gradient_mlp_cuda = _InPlaceOfApex
    layer: Any
    for layer in model.modules():
        # Frozen layers have no sum to add to.
        if hasattr(layer, "gradient_accumulation_fusion"):
            layer.gradient_accumulation_fusion = hasattr(layer.weight, "main_grad")
