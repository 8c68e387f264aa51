"""Operations that sort a mixture's rows by expert, and bring them back: no sum depends on what runs first.

A token has k slots, one for each of its experts; slot i is one of token i // k. Slots are sorted by a key, an expert or a rank,
those of a key in order of their numbers. The last key may be that of slots without a row: the rows of all others are then the
first m places. Shapes: n tokens, m rows, E keys, H hidden size.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from visionloom.model.kernels.library import define, in_triton
from visionloom.model.kernels.remaking import remember

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
    # A block at least, which writes the zeros of a rank without tokens.
    blocks = max(1, (rows + block - 1) // block)
    return experts.new_empty((blocks, count))


count_rows = define(
    "count_rows(Tensor experts, int count) -> Tensor",
    cpu=_count,
    cuda=in_triton("permute_triton", "count_rows"),
    meta=_count_shapes,
)
"""Return the slots of each key in each block of slots, int32 [blocks, E], from the keys of the slots, int32 [n, k]."""


def _sort(experts: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # Stable: rows of an expert keep their order, so that its sums over rows are the same bits each time.
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
"""Sort slots by their keys, all int32.

Args: keys of the slots [n, k]; `counts` of `count_rows`.
Returns: the slot that is at each sorted place [n * k]; the sorted place of each slot [n, k]; slots of each key [E], and the place
where they end [E].
"""


def _keep_first(keys: Tensor, other: int) -> Tensor:
    equal = keys.unsqueeze(2) == keys.unsqueeze(1)
    return keys.masked_fill(equal.tril(-1).any(2), other)


def _keep_first_shapes(keys: Tensor, other: int) -> Tensor:
    return torch.empty_like(keys)


keep_first = define(
    "keep_first(Tensor keys, int other) -> Tensor",
    cpu=_keep_first,
    cuda=in_triton("permute_triton", "keep_first"),
    meta=_keep_first_shapes,
)
"""Return keys int32 [n, k] in which each one is left at its first place in a row; `other` stands where it comes again."""


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
    total = x.new_zeros((len(places), x.shape[1]), dtype=torch.float32)
    all_there = len(x) == places.numel()
    # One after the other, as the kernel adds them: the results are the same bits.
    for place in places.unbind(1):
        if all_there:
            total += x.index_select(0, place)
        else:
            tokens = (place < len(x)).nonzero().squeeze(1)
            total.index_add_(0, tokens, x.index_select(0, place[tokens]).float())
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
        # The order of sums is the tokens' own: no atomic addition, whose order would differ from run to run.
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
        rows: int32 [m], the slot at each sorted place that has a row.
        places: int32 [n, k], the sorted place of each slot; those from m on have no row.
    """
    x, each = x.contiguous(), places.shape[1]
    permuted: Tensor = _PermuteRows.apply(x, rows, places)
    # Copies are made again from what was copied, if that is less.
    if len(rows) > len(x):
        remember(permuted, partial(_permute_rows, each=each), x, rows)
    return permuted


def combine_rows(x: Tensor, rows: Tensor, places: Tensor, read: bool = True) -> Tensor:
    """Return the sum of each token's rows, added one after the other in fp32: [m, H] to [n, H].

    Arguments are those of `permute_rows`, of which this is the way back and the backward pass. Without `read` the result has
    no content: only gradients pass.
    """
    combined: Tensor = _CombineRows.apply(x.contiguous(), rows, places, read)
    return combined
