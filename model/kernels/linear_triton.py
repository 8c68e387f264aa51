"""Triton kernels of linear.py and product.py. Importing this file needs Triton."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 64, 64
"""Of a tile: 4 warps read 128 bytes of bf16 in a row, and keep 32 sums a thread."""
PROGRAMS = 1056
"""Eight for each multiprocessor of an H100; a number of the device in use would make sums depend on it."""

TILES = {
    torch.bfloat16: ({"HIGH": 128, "WIDE": 256, "DEEP": 64}, 8),
    torch.float32: ({"HIGH": 64, "WIDE": 64, "DEEP": 32}, 8),
}
"""Of a grouped product's program: its part of a sum, the rows that it takes at a time, and its warps."""
STAGES = 3
"""Rows of so many turns are in shared memory or on the way: in bf16 144 KiB of 227 that an H100's multiprocessor has, 96 of an A100's 163."""
AT_ONCE = 2
"""Parts of the rows that a grouped product's kernel takes: the sums are read and written once for both."""
NEIGHBOURS = 8
"""Tiles one below the other whose programs run together."""


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


@triton.jit
def _halves(tile: tl.tensor) -> Any:
    """Return the left and the right half of a tile."""
    parts = tl.reshape(tile, [tile.shape[0], 2, tile.shape[1] // 2])
    return tl.split(tl.permute(parts, (0, 2, 1)))


@triton.jit
def _add(
    total: tl.tensor,
    sums: tl.tensor,
    y: tl.tensor,
    x: tl.tensor,
    OUT: tl.constexpr,
    IN: tl.constexpr,
) -> None:
    """Add sums to a part of a matrix."""
    places = total + (y[:, None] * IN + x[None, :])
    inside = (y < OUT)[:, None] & (x < IN)[None, :]
    tl.store(places, tl.load(places, inside, other=0.0) + sums, inside)


@triton.jit
def _stretch(ends: tl.tensor, group: tl.tensor) -> Any:
    """Return where a group begins, and how many rows it has."""
    begin = tl.load(ends + group - 1, group > 0, other=0).to(tl.int64)
    return begin, tl.load(ends + group) - begin.to(tl.int32)


@triton.jit
def _product(
    rows: tl.tensor,
    columns: tl.tensor,
    count: tl.tensor,
    more_rows: tl.tensor,
    more_columns: tl.tensor,
    more: tl.tensor,
    y: tl.tensor,
    x: tl.tensor,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    DEEP: tl.constexpr,
) -> Any:
    """Return one tile of the product of `count` rows from the first on, and of `more` others."""
    deep = tl.arange(0, DEEP)
    across, down = deep[None, :], deep[:, None]
    in_rows, in_columns = (y < OUT)[:, None], (x < IN)[None, :]
    # What moves is one address, not those of a tile, which would take registers. Rows are read as their transpose: of a tile
    # that is transposed after it was read, an A100 would have no turn under way.
    row_places, column_places = across * OUT + y[:, None], down * IN + x[None, :]
    sums = tl.zeros([y.shape[0], x.shape[0]], tl.float32)
    turns = tl.cdiv(count, DEEP)
    # One loop for both, so that loads under way go on from one to the other.
    for turn in range(turns + tl.cdiv(more, DEEP)):
        if turn == turns:
            rows, columns, count = more_rows, more_columns, more
        # Both are masked: what is behind a group may be no number, which times zero is none.
        left = tl.load(rows + row_places, (across < count) & in_rows, other=0.0)
        right = tl.load(columns + column_places, (down < count) & in_columns, other=0.0)
        sums = tl.dot(left, right, sums, input_precision="ieee")
        rows += DEEP * OUT
        columns += DEEP * IN
        count -= DEEP
    return sums


@triton.jit
def _place_of(
    tile: tl.tensor, high: tl.constexpr, wide: tl.constexpr, NEIGHBOURS: tl.constexpr
) -> Any:
    """Return the place of a tile among those of a matrix: programs that run together read the same rows and columns out of the cache.

    Triton's own `swizzle2d` takes no constants in 3.6.
    """
    first = tile // (NEIGHBOURS * wide) * NEIGHBOURS
    within = tile % (NEIGHBOURS * wide)
    together = tl.minimum(high - first, NEIGHBOURS)
    return first + within % together, within // together


@triton.jit
def grouped_product_kernel(
    total: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    ends: tl.tensor,
    more_rows: tl.tensor,
    more_columns: tl.tensor,
    more_ends: tl.tensor,
    TWICE: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
    DEEP: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
) -> None:
    """Add one tile of the product of one group; with `TWICE` of its rows in both parts."""
    group, tile = tl.program_id(1).to(tl.int64), tl.program_id(0)
    begin, count = _stretch(ends, group)
    more_begin, more = begin, count * 0
    if TWICE:
        more_begin, more = _stretch(more_ends, group)
    # A group without rows leaves its sum as it is, and reads nothing of it.
    if count + more > 0:
        down, across = _place_of(tile, tl.cdiv(OUT, HIGH), tl.cdiv(IN, WIDE), NEIGHBOURS)
        y, x = down * HIGH + tl.arange(0, HIGH), across * WIDE + tl.arange(0, WIDE)
        rows, columns = rows + begin * OUT, columns + begin * IN
        more_rows, more_columns = more_rows + more_begin * OUT, more_columns + more_begin * IN
        sums = _product(rows, columns, count, more_rows, more_columns, more, y, x, OUT, IN, DEEP)
        # Half by half: with the sums as they were, all of a tile are more than a thread has registers.
        first, second = _halves(sums)
        total += group * (OUT * IN)
        x = across * WIDE + tl.arange(0, WIDE // 2)
        _add(total, first, y, x, OUT, IN)
        _add(total, second, y, x + WIDE // 2, OUT, IN)


def add_grouped_product_(
    total: Tensor, rows: list[Tensor], columns: list[Tensor], ends: list[Tensor]
) -> Tensor:
    """Add the product of each group to its sum, two parts at a time; see product.add_grouped_product_."""
    groups, height, width = total.shape
    sizes, warps = TILES[rows[0].dtype]
    tiles = triton.cdiv(height, sizes["HIGH"]) * triton.cdiv(width, sizes["WIDE"])
    parts = list(zip(rows, columns, ends, strict=True))
    for pair in (parts[first : first + AT_ONCE] for first in range(0, len(parts), AT_ONCE)):
        grouped_product_kernel[(tiles, groups)](
            total,
            *pair[0],
            *pair[-1],
            TWICE=len(pair) == AT_ONCE,
            OUT=height,
            IN=width,
            **sizes,
            NEIGHBOURS=NEIGHBOURS,
            num_warps=warps,
            num_stages=STAGES,
        )
    return total
