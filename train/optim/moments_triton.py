"""Triton kernels of moments.py. Importing this file needs Triton."""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Numbers of a program: eight a thread."""


@triton.jit
def hashed(values: tl.tensor) -> tl.tensor:
    """Return what the twin does, uint32 in and out."""
    values ^= values >> 16
    values *= 0x7FEB352D
    values ^= values >> 15
    values *= 0x846CA68B
    return values ^ (values >> 16)


@triton.jit
def stored(values: tl.tensor, bits: tl.tensor, STOCHASTIC: tl.constexpr) -> tl.tensor:
    """Return fp32 values in bf16, rounded to the nearest or by 16 random bits."""
    if STOCHASTIC:
        lifted = (values.to(tl.uint32, bitcast=True) + bits) & 0xFFFF0000
        values = lifted.to(tl.float32, bitcast=True)
    return values.to(tl.bfloat16)


@triton.jit
def adamw_kernel(
    weights: tl.tensor,
    gradient: tl.tensor,
    mean: tl.tensor,
    square: tl.tensor,
    count: tl.tensor,
    beta1: tl.tensor,
    beta2: tl.tensor,
    epsilon: tl.tensor,
    kept: tl.tensor,
    rate: tl.tensor,
    root: tl.tensor,
    key: tl.tensor,
    begin: tl.tensor,
    run: tl.tensor,
    distance: tl.tensor,
    first: tl.tensor,
    BLOCK: tl.constexpr,
    STOCHASTIC: tl.constexpr,
) -> None:
    """Update BLOCK numbers."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    weight = tl.load(weights + index, mask, other=0.0)
    step = tl.load(gradient + index, mask, other=0.0)
    old_mean = tl.load(mean + index, mask, other=0.0).to(tl.float32)
    old_square = tl.load(square + index, mask, other=0.0).to(tl.float32)

    new_mean = old_mean * beta1 + step * (1.0 - beta1)
    new_square = old_square * beta2 + step * step * (1.0 - beta2)
    change = new_mean / (tl.sqrt(new_square) * root + epsilon) * rate
    tl.store(weights + index, weight * kept - change, mask)

    bits = tl.zeros((BLOCK,), tl.uint32)
    if STOCHASTIC:
        place = begin + index
        whole = place // run * distance + first + place % run
        # A key of 1 would be a constant, which has no type of its own.
        keys = (key + tl.zeros_like(whole)).to(tl.uint32)
        bits = hashed(hashed(whole.to(tl.uint32)) ^ keys)
    tl.store(mean + index, stored(new_mean, bits & 0xFFFF, STOCHASTIC), mask)
    tl.store(square + index, stored(new_square, bits >> 16, STOCHASTIC), mask)


def adamw_bf16_(
    weights: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    factors: list[float],
    place: list[int],
) -> None:
    """Do what moments.py's twin does."""
    count = weights.numel()
    if not count:
        return
    # Sizes of no place, which no program reads.
    where = place or [0, 0, 1, 1, 0]
    adamw_kernel[(triton.cdiv(count, BLOCK),)](
        weights,
        gradient,
        mean,
        square,
        count,
        *factors,
        *where,
        BLOCK=BLOCK,
        STOCHASTIC=bool(place),
    )
