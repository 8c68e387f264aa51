"""Kernels of permute.py in Triton: a stable counting sort, and rows that are moved or added up."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionloom.model.kernels.permute import LEAST_BLOCK, block_of

COMPARED = 4096
"""Pairs of a row and an expert that are compared at once: they stay in registers."""
TILE = 2048
"""Elements that a program moves."""


@triton.jit
def _count(
    experts: tl.tensor,
    counts: tl.tensor,
    rows: tl.tensor,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    columns = tl.arange(0, COLUMNS)
    block = tl.program_id(0)
    total = tl.zeros([COLUMNS], dtype=tl.int32)
    for start in range(0, BLOCK, CHUNK):
        numbers = block * BLOCK + start + tl.arange(0, CHUNK)
        expert = tl.load(experts + numbers, mask=numbers < rows, other=-1)
        hits = expert[:, None] == columns[None, :]
        total += tl.sum(hits.to(tl.int32), axis=0)
    # Each block has a row of its own: no atomic additions, and nothing to set to zero before.
    tl.store(counts + block * COUNT + columns, total, mask=columns < COUNT)


@triton.jit
def _added(
    counts: tl.tensor,
    blocks: tl.tensor,
    block: tl.tensor,
    COUNT: tl.constexpr,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> Any:
    """Return the rows of each expert in all blocks, and in those before one of them."""
    columns = tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], dtype=tl.int32)
    before = tl.zeros([COLUMNS], dtype=tl.int32)
    for first in range(0, blocks, CHUNK):
        others = first + tl.arange(0, CHUNK)
        inside = (others[:, None] < blocks) & (columns[None, :] < COUNT)
        places = others[:, None] * COUNT + columns[None, :]
        tile = tl.load(counts + places, mask=inside, other=0)
        total += tl.sum(tile, axis=0)
        earlier = tl.where(others[:, None] < block, tile, 0)
        before += tl.sum(earlier, axis=0)
    return total, before


@triton.jit
def _sort(
    experts: tl.tensor,
    counts: tl.tensor,
    order: tl.tensor,
    places: tl.tensor,
    totals: tl.tensor,
    ends: tl.tensor,
    rows: tl.tensor,
    blocks: tl.tensor,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    columns = tl.arange(0, COLUMNS)
    block = tl.program_id(0)
    # Each program adds up the counts of all blocks for itself, at most 512 of E numbers out of the cache: one launch less.
    total, before = _added(counts, blocks, block, COUNT, CHUNK, COLUMNS)
    end = tl.cumsum(total, axis=0)
    if block == 0:
        tl.store(totals + columns, total, mask=columns < COUNT)
        tl.store(ends + columns, end, mask=columns < COUNT)

    # Where the rows of each expert in this block begin.
    next_place = end - total + before
    for start in range(0, BLOCK, CHUNK):
        numbers = block * BLOCK + start + tl.arange(0, CHUNK)
        inside = numbers < rows
        expert = tl.load(experts + numbers, mask=inside, other=-1)
        hits = (expert[:, None] == columns[None, :]).to(tl.int32)
        earlier = tl.cumsum(hits, axis=0) - hits
        place = tl.sum((earlier + next_place[None, :]) * hits, axis=1)
        tl.store(places + numbers, place, mask=inside)
        tl.store(order + place, numbers, mask=inside)
        next_place += tl.sum(hits, axis=0)


@triton.jit
def _keep_first(
    keys: tl.tensor,
    result: tl.tensor,
    rows: tl.tensor,
    other: tl.tensor,
    EACH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    numbers = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = numbers < rows
    key = tl.load(keys + numbers, mask=inside, other=0)
    slot = numbers % EACH
    again = numbers < 0
    for earlier in tl.static_range(EACH):
        before = tl.load(keys + numbers - slot + earlier, mask=inside & (earlier < slot), other=-1)
        again = again | (before == key)
    tl.store(result + numbers, tl.where(again, other, key), mask=inside)


@triton.jit
def _permute(
    x: tl.tensor,
    order: tl.tensor,
    result: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    EACH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    numbers = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (numbers[:, None] < rows) & (columns[None, :] < width)
    token = tl.load(order + numbers, mask=numbers < rows, other=0) // EACH
    # 262,144 tokens with eight rows of 4,096 numbers each are more than int32 can count.
    sources = token[:, None].to(tl.int64) * width + columns[None, :]
    targets = numbers[:, None].to(tl.int64) * width + columns[None, :]
    values = tl.load(x + sources, mask=inside)
    tl.store(result + targets, values, mask=inside)


@triton.jit
def _combine(
    x: tl.tensor,
    places: tl.tensor,
    result: tl.tensor,
    tokens: tl.tensor,
    width: tl.tensor,
    rows: tl.tensor,
    EACH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    numbers = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (numbers[:, None] < tokens) & (columns[None, :] < width)
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for slot in tl.static_range(EACH):
        place = tl.load(places + numbers * EACH + slot, mask=numbers < tokens, other=0)
        sources = place[:, None].to(tl.int64) * width + columns[None, :]
        there = inside & (place[:, None] < rows)
        total += tl.load(x + sources, mask=there, other=0.0).to(tl.float32)
    targets = numbers[:, None].to(tl.int64) * width + columns[None, :]
    tl.store(result + targets, total.to(result.dtype.element_ty), mask=inside)


def _chunk(columns: int) -> int:
    """Return how many rows are compared with all columns at once."""
    return max(4, COMPARED // columns)


def _columns(count: int) -> int:
    """Return a power of two that holds a number of columns."""
    return max(16, triton.next_power_of_2(count))


def count_rows(experts: Tensor, count: int) -> Tensor:
    """Compute permute.count_rows."""
    rows = experts.numel()
    block = block_of(rows)
    blocks = max(1, triton.cdiv(rows, block))
    counts = experts.new_empty((blocks, count))
    columns = _columns(count)
    _count[blocks,](experts, counts, rows, count, block, _chunk(columns), columns)
    return counts


def sort_rows(experts: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute permute.sort_rows."""
    blocks, count = counts.shape
    rows = experts.numel()
    order, places = experts.new_empty(rows), torch.empty_like(experts)
    totals, ends = counts.new_empty(count), counts.new_empty(count)
    columns = _columns(count)
    _sort[blocks,](
        experts,
        counts,
        order,
        places,
        totals,
        ends,
        rows,
        blocks,
        count,
        block_of(rows),
        _chunk(columns),
        columns,
    )
    return order, places, totals, ends


def keep_first(keys: Tensor, other: int) -> Tensor:
    """Compute permute.keep_first."""
    result = torch.empty_like(keys)
    if rows := keys.numel():
        grid = (triton.cdiv(rows, LEAST_BLOCK),)
        _keep_first[grid](keys, result, rows, other, keys.shape[1], LEAST_BLOCK)
    return result


def permute_rows(x: Tensor, rows: Tensor, each: int) -> Tensor:
    """Compute permute.permute_rows."""
    result = x.new_empty((len(rows), x.shape[1]))
    _move(_permute, (x, rows, result), (), each)
    return result


def combine_rows(x: Tensor, places: Tensor) -> Tensor:
    """Compute permute.combine_rows."""
    result = x.new_empty((len(places), x.shape[1]))
    _move(_combine, (x, places, result), (len(x),), places.shape[1])
    return result


def _move(
    kernel: Any, tensors: tuple[Tensor, Tensor, Tensor], sizes: tuple[int, ...], each: int
) -> None:
    """Launch a kernel that makes the last of `tensors`; `sizes` are what it takes beside theirs."""
    count, width = tensors[-1].shape
    if count == 0:
        return
    columns = min(TILE, triton.next_power_of_2(width))
    rows = TILE // columns
    grid = triton.cdiv(count, rows), triton.cdiv(width, columns)
    kernel[grid](*tensors, count, width, *sizes, each, rows, columns)
