"""Triton kernel of linear.py. Importing this file needs Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 64, 64
"""Of a tile: 4 warps read 128 bytes of bf16 in a row, and keep 32 sums a thread."""
PROGRAMS = 1056
"""Eight for each multiprocessor of an H100; a number of the device in use would make sums depend on it."""


@triton.jit
def sums_kernel(
    x: tl.tensor,
    sums: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    stride: tl.tensor,
    share: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Add up `share` rows of some columns."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1).to(tl.int64) * share
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, share, ROWS):
        row = first + start + tl.arange(0, ROWS)
        is_row = row < tl.minimum(rows, first + share)
        inside = is_row[:, None] & (column < columns)[None, :]
        places = row[:, None] * stride + column[None, :]
        total += tl.load(x + places, inside, other=0.0)
    own = sums + tl.program_id(1) * columns + column
    tl.store(own, tl.sum(total, 0), column < columns)


def column_sums(x: Tensor) -> Tensor:
    """Return the sum over the rows; see linear.column_sums."""
    rows, columns = x.shape
    across = triton.cdiv(columns, COLUMNS)
    parts = max(1, min(PROGRAMS // across, triton.cdiv(rows, ROWS)))
    share = triton.cdiv(triton.cdiv(rows, parts), ROWS) * ROWS
    sums = torch.empty(parts, columns, dtype=torch.float32, device=x.device)
    sums_kernel[(across, parts)](
        x, sums, rows, columns, x.stride(0), share, ROWS, COLUMNS, num_warps=4
    )
    return sums.sum(0).to(x.dtype)
