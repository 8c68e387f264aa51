"""Triton kernels of activation.py. Importing this file needs Triton."""

import triton
import triton.language as tl
from torch import Tensor

from visionloom.model.kernels.activation import swiglu_gradients, swiglu_result
from visionloom.model.kernels.norm_triton import rows_of

BLOCK = 1024
"""Columns that a program takes at a time: eight elements a thread."""


@triton.jit
def swiglu_kernel(
    gate_up: tl.tensor,
    row_weights: tl.tensor,
    output: tl.tensor,
    row_stride: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHTED: tl.constexpr,
) -> None:
    """Write BLOCK columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < WIDTH
    source = gate_up + row * row_stride + column
    gate = tl.load(source, mask, other=0.0).to(tl.float32)
    up = tl.load(source + WIDTH, mask, other=0.0).to(tl.float32)
    result = gate * tl.sigmoid(gate) * up
    if WEIGHTED:
        result *= tl.load(row_weights + row).to(tl.float32)
    tl.store(output + row * WIDTH + column, result.to(output.dtype.element_ty), mask)


@triton.jit
def swiglu_backward_kernel(
    gradient: tl.tensor,
    gate_up: tl.tensor,
    row_weights: tl.tensor,
    both: tl.tensor,
    by_weight: tl.tensor,
    row_stride: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHTED: tl.constexpr,
) -> None:
    """Write the gradients of one row: of its gates and ups, and with WEIGHTED of its weight."""
    row = tl.program_id(0).to(tl.int64)
    weight = 1.0
    if WEIGHTED:
        weight = tl.load(row_weights + row).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    # A whole row a program: the gradient of its weight is a sum over all of it.
    for first in range(0, WIDTH, BLOCK):
        column = first + tl.arange(0, BLOCK)
        mask = column < WIDTH
        source = gate_up + row * row_stride + column
        gate = tl.load(source, mask, other=0.0).to(tl.float32)
        up = tl.load(source + WIDTH, mask, other=0.0).to(tl.float32)
        above = tl.load(gradient + row * WIDTH + column, mask, other=0.0).to(tl.float32)

        # Made again from the inputs, which is cheaper than to keep it: 2 bytes an element.
        share = tl.sigmoid(gate)
        active = gate * share
        if WEIGHTED:
            total += above * active * up
            above *= weight
        by_gate = above * up * (share + active * (1.0 - share))
        target = both + row * 2 * WIDTH + column
        tl.store(target, by_gate.to(both.dtype.element_ty), mask)
        tl.store(target + WIDTH, (above * active).to(both.dtype.element_ty), mask)
    if WEIGHTED:
        tl.store(by_weight + row, tl.sum(total, 0).to(by_weight.dtype.element_ty))


def swiglu(gate_up: Tensor, row_weights: Tensor | None) -> Tensor:
    """Return what activation.py's twin does."""
    rows, width = rows_of(gate_up), gate_up.shape[-1] // 2
    output = swiglu_result(gate_up, row_weights)
    block = min(BLOCK, triton.next_power_of_2(width))
    if len(rows):
        swiglu_kernel[(len(rows), triton.cdiv(width, block))](
            rows,
            rows if row_weights is None else row_weights.contiguous(),
            output,
            rows.stride(0),
            WIDTH=width,
            BLOCK=block,
            WEIGHTED=row_weights is not None,
        )
    return output


def swiglu_backward(
    gradient: Tensor, gate_up: Tensor, row_weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return what activation.py's twin does."""
    rows, width = rows_of(gate_up), gate_up.shape[-1] // 2
    both, by_weight = swiglu_gradients(gradient, gate_up, row_weights)
    if len(rows):
        swiglu_backward_kernel[(len(rows),)](
            gradient.contiguous(),
            rows,
            rows if row_weights is None else row_weights.contiguous(),
            both,
            by_weight,
            rows.stride(0),
            WIDTH=width,
            BLOCK=min(BLOCK, triton.next_power_of_2(width)),
            WEIGHTED=row_weights is not None,
        )
    return both, by_weight
