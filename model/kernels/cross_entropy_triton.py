"""Triton kernels of cross_entropy.py. Importing this file needs Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 4096
"""Columns of a row at a time: 8 KB of bf16 for 8 warps, 16 values a thread."""
WARPS = 8


@triton.jit
def sums_kernel(
    logits: tl.tensor,
    targets: tl.tensor,
    sums: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One program a row: the largest logit and the sum of exponentials in one pass, rescaled where a larger one comes."""
    # 16,384 rows of 151,936 columns are more than int32 can count.
    row = tl.program_id(0).to(tl.int64)
    begin = logits + row * stride
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        places = start + tl.arange(0, BLOCK)
        x = tl.load(begin + places, mask=places < columns, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, x)
        # Minus infinity less itself is no number: of a lane without a value nothing counts.
        known = larger > float("-inf")
        rescaled = tl.where(largest > float("-inf"), total * tl.exp(largest - larger), 0.0)
        total = tl.where(known, rescaled + tl.exp(x - larger), 0.0)
        largest = larger
    # Each lane has a largest of its own so far: one reduction over lanes at the end, none in the loop.
    row_largest = tl.max(largest, 0)
    lanes = tl.where(largest > float("-inf"), total * tl.exp(largest - row_largest), 0.0)
    row_total = tl.sum(lanes, 0)

    # In ranks' own columns: other ranks' targets are outside.
    target = tl.load(targets + row)
    mine = (target >= 0) & (target < columns)
    target_logit = tl.load(begin + target, mask=mine, other=0.0).to(tl.float32)
    tl.store(sums + row, row_largest)
    tl.store(sums + rows + row, row_total)
    tl.store(sums + 2 * rows + row, target_logit)


@triton.jit
def gradient_kernel(
    logits: tl.tensor,
    targets: tl.tensor,
    largest: tl.tensor,
    total: tl.tensor,
    weights: tl.tensor,
    columns: tl.tensor,
    stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One program a block of a row."""
    row = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = places < columns
    begin = logits + row * stride + places
    x = tl.load(begin, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weights + row)
    probability = tl.exp(x - tl.load(largest + row)) / tl.load(total + row)
    one_hot = tl.where(places == tl.load(targets + row), 1.0, 0.0)
    # Nobody else reads or writes these columns: the gradient takes the place of the logits.
    tl.store(begin, (probability - one_hot) * weight, mask=inside)


def row_sums(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the sums of each row; see cross_entropy.row_sums."""
    rows, columns = logits.shape
    sums = torch.empty(3, rows, dtype=torch.float32, device=logits.device)
    sums_kernel[(rows,)](
        logits, targets, sums, rows, columns, logits.stride(0), BLOCK=COLUMNS, num_warps=WARPS
    )
    return sums


def to_gradient_(
    logits: Tensor, targets: Tensor, largest: Tensor, total: Tensor, weights: Tensor
) -> Tensor:
    """Make logits into the gradient; see cross_entropy.to_gradient_."""
    rows, columns = logits.shape
    grid = (rows, triton.cdiv(columns, COLUMNS))
    gradient_kernel[grid](
        logits,
        targets,
        largest,
        total,
        weights,
        columns,
        logits.stride(0),
        BLOCK=COLUMNS,
        num_warps=WARPS,
    )
    return logits
