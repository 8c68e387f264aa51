"""Operations that sort a mixture's rows by expert, and bring them back: no sum depends on what runs first.

A token has k rows, one for each of its experts; row i is the one of token i // k. Rows are sorted by expert, those of an expert
in order of their numbers. Shapes: n tokens, m = n * k rows, E experts, H hidden size.
"""

from typing import Any

import torch
from torch import Tensor

from visionloom.model.kernels.library import define, in_triton

LEAST_BLOCK, MOST_BLOCKS = 256, 512
"""Rows that one program of the sort takes, and programs: each of them reads the counts of all."""


def block_of(rows: int) -> int:
    """Return how many rows a program of the sort takes: a power of two."""
    block = LEAST_BLOCK
    while block * MOST_BLOCKS < rows:
        block *= 2
    return block


def _count(experts: Tensor, count: int) -> Tensor:
    flat = experts.flatten().long()
    block = block_of(len(flat))
    numbers = torch.arange(len(flat), device=flat.device) // block
    counts = _count_shapes(experts, count)
    return counts.copy_(
        torch.bincount(numbers * count + flat, minlength=counts.numel()).view_as(counts)
    )


def _count_shapes(experts: Tensor, count: int) -> Tensor:
    rows = experts.numel()
    block = block_of(rows)
    blocks = max(1, (rows + block - 1) // block)
    return experts.new_empty((blocks, count))


count_rows = define(
    "count_rows(Tensor experts, int count) -> Tensor",
    cpu=_count,
    cuda=in_triton("permute_triton", "count_rows"),
    meta=_count_shapes,
)
"""Return the rows of each expert in each block of rows, int32 [blocks, E], from the experts of the rows, int32 [n, k]."""


def _sort(experts: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    order = experts.flatten().argsort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    totals = counts.sum(0, dtype=torch.int32)
    ends = totals.cumsum(0, dtype=torch.int32)
    return order.int(), places.int().view_as(experts), totals, ends


def _sort_shapes(experts: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    totals = counts.new_empty(counts.shape[1])
    return experts.new_empty(experts.numel()), torch.empty_like(experts), totals, totals.clone()


sort_rows = define(
    "sort_rows(Tensor experts, Tensor counts) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=_sort,
    cuda=in_triton("permute_triton", "sort_rows"),
    meta=_sort_shapes,
)
"""Sort rows by expert, all int32.

Args: experts of the rows [n, k]; `counts` of `count_rows`.
Returns: the row that is at each sorted place [m]; the sorted place of each row [n, k]; rows of each expert [E], and the place
where they end [E].
"""


def _sort_chunks(counts: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    experts = torch.arange(counts.shape[-1], dtype=torch.int32, device=counts.device)
    by_rank = counts.flatten().long()
    of_rows = experts.repeat(by_rank.numel() // len(experts)).repeat_interleave(by_rank)
    assert len(of_rows) == rows, "the counts are those of the rows"
    order = of_rows.argsort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(rows, device=order.device)
    ends = counts.sum((0, 1)).cumsum(0, dtype=torch.int32)
    return order.int(), places.int().view(rows, 1), ends


def _sort_chunks_shapes(counts: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    ends = counts.new_empty(counts.shape[-1])
    return counts.new_empty(rows), counts.new_empty((rows, 1)), ends


sort_chunks = define(
    "sort_chunks(Tensor counts, int rows) -> (Tensor, Tensor, Tensor)",
    cpu=_sort_chunks,
    cuda=in_triton("permute_triton", "sort_chunks"),
    meta=_sort_chunks_shapes,
)
"""Sort rows that have come from several ranks by expert, where those of each rank are sorted already; all int32.

Args: rows of each expert of this rank from each rank [tensor, ranks, e], in the order in which they came; their sum.
Returns: the row that is at each sorted place [m]; the sorted place of each row [m, 1]; where the rows of each expert end [e].
"""


def _permute(x: Tensor, rows: Tensor, each: int) -> Tensor:
    return x.index_select(0, rows // each if each > 1 else rows)


def _permute_shapes(x: Tensor, rows: Tensor, each: int) -> Tensor:
    return x.new_empty((len(rows), x.shape[1]))


_permute_rows = define(
    "permute_rows(Tensor x, Tensor rows, int each) -> Tensor",
    cpu=_permute,
    cuda=in_triton("permute_triton", "permute_rows"),
    meta=_permute_shapes,
)


def _combine(x: Tensor, places: Tensor) -> Tensor:
    first, *others = places.unbind(1)
    total = x.index_select(0, first).float()
    for place in others:
        total += x.index_select(0, place)
    return total.to(x.dtype)


def _combine_shapes(x: Tensor, places: Tensor) -> Tensor:
    return x.new_empty((len(places), x.shape[1]))


_combine_rows = define(
    "combine_rows(Tensor x, Tensor places) -> Tensor",
    cpu=_combine,
    cuda=in_triton("permute_triton", "combine_rows"),
    meta=_combine_shapes,
)


class _PermuteRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        permuted: Tensor = _permute_rows(x, rows, places.shape[1])
        return permuted

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (places,) = gradients, ctx.saved_tensors
        return _combine_rows(gradient.contiguous(), places), None, None


class _CombineRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, places: Tensor, read: bool) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.each = places.shape[1]
        combined: Tensor = (_combine_rows if read else _combine_shapes)(x, places)
        return combined

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (rows,) = gradients, ctx.saved_tensors
        return _permute_rows(gradient.contiguous(), rows, ctx.each), None, None, None


def permute_rows(x: Tensor, rows: Tensor, places: Tensor) -> Tensor:
    """Return each token's row at its sorted places: [n, H] to [m, H].

    Args:
        x: of the tokens.
        rows: int32 [m], the row at each sorted place.
        places: int32 [n, k], the sorted place of each row.
    """
    permuted: Tensor = _PermuteRows.apply(x.contiguous(), rows, places)
    return permuted


def combine_rows(x: Tensor, rows: Tensor, places: Tensor, read: bool = True) -> Tensor:
    """Return the sum of each token's rows, added one after the other in fp32: [m, H] to [n, H].

    Arguments are those of `permute_rows`, of which this is the way back and the backward pass. Without `read` the result has
    no content: only gradients pass.
    """
    combined: Tensor = _CombineRows.apply(x.contiguous(), rows, places, read)
    return combined
