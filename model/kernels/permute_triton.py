"""Kernels of permute.py in Triton: a stable counting sort, and rows that are moved or added up."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionloom.model.kernels.permute import block_of

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
    total, before = _added(counts, blocks, block, COUNT, CHUNK, COLUMNS)
    end = tl.cumsum(total, axis=0)
    if block == 0:
        tl.store(totals + columns, total, mask=columns < COUNT)
        tl.store(ends + columns, end, mask=columns < COUNT)

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
def _sum_before(lengths: tl.tensor, chunk: tl.tensor, CHUNKS: tl.constexpr) -> Any:
    """Return the sum of the lengths before each of some chunks."""
    chunks = tl.arange(0, CHUNKS)
    counted = tl.where(chunks[None, :] < chunk[:, None], lengths[None, :], 0)
    return tl.sum(counted, axis=1)


@triton.jit
def _sort_chunks(
    counts: tl.tensor,
    order: tl.tensor,
    places: tl.tensor,
    ends: tl.tensor,
    rows: tl.tensor,
    by_tensor: tl.tensor,
    by_rank: tl.tensor,
    RANKS: tl.constexpr,
    SOURCES: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
) -> None:
    chunks = tl.arange(0, CHUNKS)
    inside = chunks < SOURCES * EXPERTS
    # How the rows will be: by expert, then by source. How they came: by source, then by expert.
    source, expert = chunks % SOURCES, chunks // SOURCES
    address = counts + source // RANKS * by_tensor + source % RANKS * by_rank
    after = tl.load(address + expert, mask=inside, other=0)
    source_before, expert_before = chunks // EXPERTS, chunks % EXPERTS
    address = counts + source_before // RANKS * by_tensor + source_before % RANKS * by_rank
    came = tl.load(address + expert_before, mask=inside, other=0)

    end = tl.cumsum(after, axis=0)
    if tl.program_id(0) == 0:
        tl.store(ends + expert, end, mask=inside & (source == SOURCES - 1))
    numbers = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    # Beside the chunks all is zero, so that their ends are the last one.
    passed = end[None, :] <= numbers[:, None]
    chunk = tl.sum(passed.to(tl.int32), axis=1)
    start = _sum_before(after, chunk, CHUNKS)
    start_before = _sum_before(came, chunk % SOURCES * EXPERTS + chunk // SOURCES, CHUNKS)
    row = start_before + numbers - start
    tl.store(order + numbers, row, mask=numbers < rows)
    tl.store(places + row, numbers, mask=numbers < rows)


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
        total += tl.load(x + sources, mask=inside, other=0.0).to(tl.float32)
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


def sort_chunks(counts: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute permute.sort_chunks."""
    tensor, ranks, experts = counts.shape
    order, places = counts.new_empty(rows), counts.new_empty((rows, 1))
    ends = counts.new_empty(experts)
    chunks = _columns(counts.numel())
    block = _chunk(chunks)
    by_tensor, by_rank, _ = counts.stride()
    _sort_chunks[max(1, triton.cdiv(rows, block)),](
        counts,
        order,
        places,
        ends,
        rows,
        by_tensor,
        by_rank,
        ranks,
        tensor * ranks,
        experts,
        block,
        chunks,
    )
    return order, places, ends


def permute_rows(x: Tensor, rows: Tensor, each: int) -> Tensor:
    """Compute permute.permute_rows."""
    result = x.new_empty((len(rows), x.shape[1]))
    _move(_permute, (x, rows, result), each)
    return result


def combine_rows(x: Tensor, places: Tensor) -> Tensor:
    """Compute permute.combine_rows."""
    result = x.new_empty((len(places), x.shape[1]))
    _move(_combine, (x, places, result), places.shape[1])
    return result


def _move(kernel: Any, tensors: tuple[Tensor, Tensor, Tensor], each: int) -> None:
    """Launch a kernel that makes the last of `tensors`."""
    count, width = tensors[-1].shape
    if count == 0:
        return
    columns = min(TILE, triton.next_power_of_2(width))
    rows = TILE // columns
    grid = triton.cdiv(count, rows), triton.cdiv(width, columns)
    kernel[grid](*tensors, count, width, each, rows, columns)
