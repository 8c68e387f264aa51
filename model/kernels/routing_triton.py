"""Kernels of routing.py in Triton: a program takes some tokens with all their experts.

What is no number counts as the smallest logit, so that the choice of a diverged model stays among the experts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024
"""Logits of a program: 8 tokens of 128 experts. With 16 the backward kernel has more numbers than registers."""


@triton.jit
def _choose(
    logits: tl.tensor,
    experts: tl.tensor,
    tokens: tl.tensor,
    COUNT: tl.constexpr,
    EACH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = (rows[:, None] < tokens) & (columns[None, :] < COUNT)
    places = rows[:, None] * COUNT + columns[None, :]
    scores = tl.load(logits + places, mask=inside, other=-float("inf"))
    scores = tl.where(scores == scores, scores, -float("inf"))

    for slot in tl.static_range(EACH):
        best = tl.argmax(scores, axis=1)
        tl.store(experts + rows * EACH + slot, best, mask=rows < tokens)
        scores = tl.where(columns[None, :] == best[:, None], -float("inf"), scores)


@triton.jit
def _weigh(
    logits: tl.tensor,
    experts: tl.tensor,
    padding: tl.tensor,
    weights: tl.tensor,
    tally: tl.tensor,
    tokens: tl.tensor,
    COUNT: tl.constexpr,
    EACH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr,
    PADDED: tl.constexpr,
    TALLIED: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slots = tl.arange(0, SLOTS)
    own = (rows[:, None] < tokens) & (slots[None, :] < EACH)
    chosen = tl.load(experts + rows[:, None] * EACH + slots[None, :], mask=own, other=0)
    picked = tl.load(logits + rows[:, None] * COUNT + chosen, mask=own, other=-float("inf"))
    # A row beyond the last has no score: zero keeps its exponents numbers.
    largest = tl.where(rows < tokens, tl.max(picked, axis=1), 0.0)
    exponents = tl.exp(picked - largest[:, None])
    sums = tl.where(rows < tokens, tl.sum(exponents, axis=1), 1.0)
    shares = exponents / sums[:, None]
    tl.store(weights + rows[:, None] * EACH + slots[None, :], shares, mask=own)

    if TALLIED:
        real = rows < tokens
        if PADDED:
            real = real & (tl.load(padding + rows, mask=real, other=1) == 0)
        columns = tl.arange(0, COLUMNS)
        inside = real[:, None] & (columns[None, :] < COUNT)
        places = rows[:, None] * COUNT + columns[None, :]
        scores = tl.load(logits + places, mask=inside, other=-float("inf"))
        top = tl.where(real, tl.max(scores, axis=1), 0.0)
        exponents = tl.exp(scores - top[:, None])
        total = tl.where(real, tl.sum(exponents, axis=1), 1.0)
        logarithms = tl.where(inside, scores - top[:, None] - tl.log(total)[:, None], 0.0)
        entropies = -tl.sum(exponents / total[:, None] * logarithms, axis=1)
        # Whole units: atomic sums of integers do not depend on their order.
        units = (tl.where(real, entropies, 0.0) * 4294967296.0).to(tl.int64)
        tl.atomic_add(tally + COUNT, tl.sum(units, axis=0))
        tl.atomic_add(tally + COUNT + 1, tl.sum(real.to(tl.int64), axis=0))

        counts = tl.zeros([COLUMNS], dtype=tl.int32)
        for slot in tl.static_range(EACH):
            expert = tl.load(experts + rows * EACH + slot, mask=real, other=-1)
            counts += tl.sum((expert[:, None] == columns[None, :]).to(tl.int32), axis=0)
        tl.atomic_add(tally + columns, counts.to(tl.int64), mask=counts > 0)


@triton.jit
def _weigh_backward(
    gradient: tl.tensor,
    logits: tl.tensor,
    experts: tl.tensor,
    weights: tl.tensor,
    padding: tl.tensor,
    load: tl.tensor,
    scale: tl.tensor,
    result: tl.tensor,
    tokens: tl.tensor,
    COUNT: tl.constexpr,
    EACH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED: tl.constexpr,
    BALANCED: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    own = rows < tokens
    along = tl.zeros([ROWS], dtype=tl.float32)
    for slot in tl.static_range(EACH):
        weight = tl.load(weights + rows * EACH + slot, mask=own, other=0.0)
        along += weight * tl.load(gradient + rows * EACH + slot, mask=own, other=0.0)

    inside = own[:, None] & (columns[None, :] < COUNT)
    places = rows[:, None] * COUNT + columns[None, :]
    sums = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    if BALANCED:
        real = own
        if PADDED:
            real = own & (tl.load(padding + rows, mask=own, other=1) == 0)
        scores = tl.load(logits + places, mask=inside, other=-float("inf"))
        top = tl.where(own, tl.max(scores, axis=1), 0.0)
        exponents = tl.exp(scores - top[:, None])
        total = tl.where(own, tl.sum(exponents, axis=1), 1.0)
        probabilities = exponents / total[:, None]
        loads = tl.load(load + columns, mask=columns < COUNT, other=0.0)
        mean = tl.sum(probabilities * loads[None, :], axis=1)
        factor = tl.where(real, tl.load(scale), 0.0)
        sums = probabilities * (loads[None, :] - mean[:, None]) * factor[:, None]

    for slot in tl.static_range(EACH):
        weight = tl.load(weights + rows * EACH + slot, mask=own, other=0.0)
        by_weight = tl.load(gradient + rows * EACH + slot, mask=own, other=0.0)
        expert = tl.load(experts + rows * EACH + slot, mask=own, other=-1)
        by_score = weight * (by_weight - along)
        sums += tl.where(expert[:, None] == columns[None, :], by_score[:, None], 0.0)
    tl.store(result + places, sums, mask=inside)


def _tile(count: int) -> tuple[int, int]:
    """Return the tokens of a program, and the columns that hold all experts."""
    columns = max(16, triton.next_power_of_2(count))
    return max(1, TILE // columns), columns


def choose(logits: Tensor, each: int) -> Tensor:
    """Compute routing.choose_experts."""
    tokens, count = logits.shape
    experts = logits.new_empty((tokens, each), dtype=torch.int32)
    rows, columns = _tile(count)
    _choose[triton.cdiv(tokens, rows),](
        logits.contiguous(), experts, tokens, count, each, rows, columns
    )
    return experts


def weigh(logits: Tensor, experts: Tensor, padding: Tensor | None, tally: Tensor | None) -> Tensor:
    """Compute routing.weigh_experts."""
    (tokens, count), each = logits.shape, experts.shape[1]
    weights = torch.empty_like(experts, dtype=logits.dtype)
    rows, columns = _tile(count)
    slots = triton.next_power_of_2(each)
    _weigh[triton.cdiv(tokens, rows),](
        logits.contiguous(),
        experts,
        padding,
        weights,
        tally,
        tokens,
        count,
        each,
        rows,
        columns,
        slots,
        padding is not None,
        tally is not None,
    )
    return weights


def weigh_backward(
    gradient: Tensor,
    logits: Tensor,
    experts: Tensor,
    weights: Tensor,
    padding: Tensor | None,
    *balance: Tensor | None,
) -> Tensor:
    """Compute routing.weigh_experts_backward; `balance` is load and scale."""
    load, scale = balance
    (tokens, count), each = logits.shape, experts.shape[1]
    result = logits.new_empty(logits.shape)
    rows, columns = _tile(count)
    _weigh_backward[triton.cdiv(tokens, rows),](
        gradient,
        logits.contiguous(),
        experts,
        weights,
        padding,
        load,
        scale,
        result,
        tokens,
        count,
        each,
        rows,
        columns,
        padding is not None,
        load is not None,
    )
    return result
