"""Kernels of routing.py in Triton: a program takes some tokens with all their experts.

What is no number counts as the smallest logit, so that the choice of a diverged model stays among the experts.
"""

from typing import Any

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
def _real(padding: tl.tensor, rows: tl.tensor, tokens: tl.tensor, PADDED: tl.constexpr) -> Any:
    """Return which rows are tokens that are no padding."""
    real = rows < tokens
    if PADDED:
        real = real & (tl.load(padding + rows, mask=real, other=1) == 0)
    return real


@triton.jit
def _probabilities(
    logits: tl.tensor,
    rows: tl.tensor,
    tokens: tl.tensor,
    COUNT: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> Any:
    """Return the softmax over all experts and its logarithms, each zero beside the experts."""
    columns = tl.arange(0, COLUMNS)
    inside = (rows[:, None] < tokens) & (columns[None, :] < COUNT)
    places = rows[:, None] * COUNT + columns[None, :]
    scores = tl.load(logits + places, mask=inside, other=-float("inf"))
    # A row beyond the last has no score: zero and one keep its exponents numbers.
    top = tl.where(rows < tokens, tl.max(scores, axis=1), 0.0)
    scores -= top[:, None]
    exponents = tl.exp(scores)
    total = tl.where(rows < tokens, tl.sum(exponents, axis=1), 1.0)
    logarithms = scores - tl.log(total)[:, None]
    return exponents / total[:, None], tl.where(inside, logarithms, 0.0)


@triton.jit
def _add_to_tally(
    tally: tl.tensor,
    experts: tl.tensor,
    rows: tl.tensor,
    real: tl.tensor,
    entropies: tl.tensor,
    COUNT: tl.constexpr,
    EACH: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Add the real rows: atomic sums of integers do not depend on their order."""
    units = tl.where(real, entropies, 0.0) * 4294967296.0
    tl.atomic_add(tally + COUNT, tl.sum(units.to(tl.int64), axis=0))
    tl.atomic_add(tally + COUNT + 1, tl.sum(real.to(tl.int64), axis=0))

    columns = tl.arange(0, COLUMNS)
    counts = tl.zeros([COLUMNS], dtype=tl.int32)
    for slot in tl.static_range(EACH):
        expert = tl.load(experts + rows * EACH + slot, mask=real, other=-1)
        hits = expert[:, None] == columns[None, :]
        counts += tl.sum(hits.to(tl.int32), axis=0)
    tl.atomic_add(tally + columns, counts.to(tl.int64), mask=counts > 0)


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
    places = rows[:, None] * EACH + slots[None, :]
    chosen = tl.load(experts + places, mask=own, other=0)
    # A slot beyond the last has no weight.
    picked = tl.load(logits + rows[:, None] * COUNT + chosen, mask=own, other=-float("inf"))
    largest = tl.where(rows < tokens, tl.max(picked, axis=1), 0.0)
    exponents = tl.exp(picked - largest[:, None])
    total = tl.where(rows < tokens, tl.sum(exponents, axis=1), 1.0)
    tl.store(weights + places, exponents / total[:, None], mask=own)

    if TALLIED:
        real = _real(padding, rows, tokens, PADDED)
        probabilities, logarithms = _probabilities(logits, rows, tokens, COUNT, COLUMNS)
        entropies = -tl.sum(probabilities * logarithms, axis=1)
        _add_to_tally(tally, experts, rows, real, entropies, COUNT, EACH, COLUMNS)


@triton.jit
def _balance(
    probabilities: tl.tensor, load: tl.tensor, COUNT: tl.constexpr, COLUMNS: tl.constexpr
) -> Any:
    """Return the gradient by each logit of the sum of probability * load."""
    columns = tl.arange(0, COLUMNS)
    loads = tl.load(load + columns, mask=columns < COUNT, other=0.0)
    mean = tl.sum(probabilities * loads[None, :], axis=1)
    return probabilities * (loads[None, :] - mean[:, None])


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
    sums = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    if BALANCED:
        probabilities, _ = _probabilities(logits, rows, tokens, COUNT, COLUMNS)
        real = _real(padding, rows, tokens, PADDED)
        factor = tl.where(real, tl.load(scale), 0.0)
        sums = _balance(probabilities, load, COUNT, COLUMNS) * factor[:, None]

    along = tl.zeros([ROWS], dtype=tl.float32)
    for slot in range(EACH):
        place = rows * EACH + slot
        weight = tl.load(weights + place, mask=own, other=0.0)
        along += weight * tl.load(gradient + place, mask=own, other=0.0)
    for slot in range(EACH):
        place = rows * EACH + slot
        weight = tl.load(weights + place, mask=own, other=0.0)
        by_weight = tl.load(gradient + place, mask=own, other=0.0)
        hits = tl.load(experts + place, mask=own, other=-1)[:, None] == columns[None, :]
        by_score = weight * (by_weight - along)
        sums += tl.where(hits, by_score[:, None], 0.0)
    inside = own[:, None] & (columns[None, :] < COUNT)
    tl.store(result + rows[:, None] * COUNT + columns[None, :], sums, mask=inside)


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
