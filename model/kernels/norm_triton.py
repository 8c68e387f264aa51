"""Triton kernels of norm.py. Importing this file needs Triton.

CENTRED is LayerNorm, which takes the mean off and adds a bias; what it alone reads or writes is not touched otherwise.

Sizes of a program follow from the shapes alone, without trying out: results are the same in every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionloom.model.kernels.norm import (
    layer_norm_gradients,
    layer_norm_results,
    rms_norm_gradients,
    rms_norm_results,
)

TILE = 2048
"""Elements of a program's rows, if a row is shorter."""
MULTIPROCESSORS = 132
"""Of an H100. A number of the device in use would make sums depend on it."""


@triton.jit
def forward_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    output: tl.tensor,
    mean: tl.tensor,
    deviation: tl.tensor,
    rows: tl.tensor,
    row_stride: tl.tensor,
    epsilon: tl.tensor,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    CENTRED: tl.constexpr,
) -> None:
    """Normalise ROWS rows."""
    # 262,144 rows of 12,288 are 3.2e9 elements: more than int32 counts.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    is_row = row < rows
    mask = is_row[:, None] & (column < SIZE)[None, :]
    packed = row[:, None] * SIZE + column[None, :]

    place = row[:, None] * row_stride + column[None, :]
    wide = tl.load(x + place, mask, other=0.0).to(tl.float32)
    if CENTRED:
        centre = tl.sum(wide, 1) / SIZE
        tl.store(mean + row, centre, is_row)
        # Columns past the end of a row count for nothing.
        wide = tl.where(mask, wide - centre[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(wide * wide, 1) / SIZE + epsilon)
    tl.store(deviation + row, scale, is_row)
    weights = tl.load(weight + column, column < SIZE, other=0.0).to(tl.float32)
    result = wide * scale[:, None] * weights[None, :]
    if CENTRED:
        result += tl.load(bias + column, column < SIZE, other=0.0).to(tl.float32)[None, :]
    tl.store(output + packed, result.to(output.dtype.element_ty), mask)


@triton.jit
def backward_kernel(
    gradient: tl.tensor,
    x: tl.tensor,
    mean: tl.tensor,
    deviation: tl.tensor,
    weight: tl.tensor,
    passing: tl.tensor,
    x_gradient: tl.tensor,
    partial: tl.tensor,
    rows: tl.tensor,
    row_stride: tl.tensor,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PASSES: tl.constexpr,
    CENTRED: tl.constexpr,
) -> None:
    """Write the gradient of every ROWS-th block of rows, and the sums over them of the weight's and the bias's, fp32."""
    column = tl.arange(0, BLOCK)
    in_row = column < SIZE
    weights = tl.load(weight + column, in_row, other=0.0).to(tl.float32)
    by_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    by_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    step = tl.num_programs(0) * ROWS

    for first in range(tl.program_id(0) * ROWS, rows, step):
        row = first + tl.arange(0, ROWS).to(tl.int64)
        is_row = row < rows
        mask = is_row[:, None] & in_row[None, :]
        packed = row[:, None] * SIZE + column[None, :]
        place = row[:, None] * row_stride + column[None, :]

        scale = tl.load(deviation + row, is_row, other=0.0)[:, None]
        wide = tl.load(x + place, mask, other=0.0).to(tl.float32)
        if CENTRED:
            wide -= tl.load(mean + row, is_row, other=0.0)[:, None]
        normalised = wide * scale
        above = tl.load(gradient + packed, mask, other=0.0).to(tl.float32)
        by_weight += above * normalised

        scaled = above * weights[None, :]
        along = tl.sum(scaled * normalised, 1)[:, None] / SIZE
        rest = scaled - normalised * along
        if CENTRED:
            by_bias += above
            rest -= tl.sum(scaled, 1)[:, None] / SIZE
        below = rest * scale
        if PASSES:
            below += tl.load(passing + packed, mask, other=0.0).to(tl.float32)
        tl.store(x_gradient + packed, below.to(x_gradient.dtype.element_ty), mask)

    own = partial + tl.program_id(0) * SIZE + column
    tl.store(own, tl.sum(by_weight, 0), in_row)
    if CENTRED:
        # After the sums of all programs for the weight.
        tl.store(own + tl.num_programs(0) * SIZE, tl.sum(by_bias, 0), in_row)


def sizes(size: int) -> tuple[int, int, int]:
    """Return columns and rows of a program, and its warps, for rows of this many elements."""
    block = triton.next_power_of_2(size)
    rows = max(1, TILE // block)
    # At most 32 elements of a row a thread.
    warps = min(max(block * rows // 512, 4), 16)
    return block, rows, warps


def rows_of(x: Tensor) -> Tensor:
    """Return [..., H] as [rows, H] whose rows are contiguous: a view where strides allow it."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return what norm.py's twin does."""
    output, deviation = rms_norm_results(x, weight, epsilon)
    _forward(x, (weight, weight), (output, deviation, deviation), epsilon, centred=False)
    return output, deviation


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what norm.py's twin does."""
    results = layer_norm_results(x, weight, bias, epsilon)
    _forward(x, (weight, bias), results, epsilon, centred=True)
    return results


def _forward(
    x: Tensor,
    weights: tuple[Tensor, Tensor],
    results: tuple[Tensor, Tensor, Tensor],
    epsilon: float,
    centred: bool,
) -> None:
    """Write output, mean and deviation; `weights`: weight and bias."""
    size, flat = x.shape[-1], rows_of(x)
    block, rows, warps = sizes(size)
    if len(flat):
        forward_kernel[(triton.cdiv(len(flat), rows),)](
            flat,
            *weights,
            *results,
            len(flat),
            flat.stride(0),
            epsilon,
            SIZE=size,
            BLOCK=block,
            ROWS=rows,
            CENTRED=centred,
            num_warps=warps,
        )


def rms_norm_backward(
    gradient: Tensor, x: Tensor, deviation: Tensor, weight: Tensor, passing: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return what norm.py's twin does: one kernel, then the sum of its programs' shares of the weight's gradient."""
    x_gradient, _ = rms_norm_gradients(gradient, x, deviation, weight, passing)
    saved = x, deviation, deviation, weight
    (by_weight,) = _backward(gradient, saved, passing, x_gradient, centred=False)
    return x_gradient, by_weight.to(weight.dtype)


def layer_norm_backward(
    gradient: Tensor, x: Tensor, mean: Tensor, deviation: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what norm.py's twin does: one kernel, then the sum of its programs' shares of both weights' gradients."""
    x_gradient, *_ = layer_norm_gradients(gradient, x, mean, deviation, weight, bias)
    saved = x, mean, deviation, weight
    by_weight, by_bias = _backward(gradient, saved, None, x_gradient, centred=True)
    return x_gradient, by_weight.to(weight.dtype), by_bias.to(bias.dtype)


def _backward(
    gradient: Tensor,
    saved: tuple[Tensor, Tensor, Tensor, Tensor],
    passing: Tensor | None,
    x_gradient: Tensor,
    centred: bool,
) -> Tensor:
    """Write the gradient of x, and return those of the weight and, centred, of the bias: fp32 [1 or 2, H].

    `saved`: x, mean, deviation and weight.
    """
    x, *statistics = saved
    size, flat = x.shape[-1], rows_of(x)
    block, rows, warps = sizes(size)
    # Each has rows of its own: two of 4,096 elements a multiprocessor, or four of 2,048, are there at a time.
    most = MULTIPROCESSORS * max(2, 4 * TILE // (block * rows))
    programs = min(triton.cdiv(len(flat), rows), most)
    # Sums of programs, not atomic additions: their order is the same in every run.
    partial = x.new_empty(1 + centred, programs, size, dtype=torch.float32)
    if programs:
        backward_kernel[(programs,)](
            gradient.contiguous(),
            flat,
            *statistics,
            x if passing is None else passing.contiguous(),
            x_gradient,
            partial,
            len(flat),
            flat.stride(0),
            SIZE=size,
            BLOCK=block,
            ROWS=rows,
            PASSES=passing is not None,
            CENTRED=centred,
            num_warps=warps,
        )
    return partial.sum(1)
