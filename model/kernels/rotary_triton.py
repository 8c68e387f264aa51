"""Triton kernels of rotary.py. Importing this file needs Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionloom.model.kernels.rotary import rotated_gradients, rotated_heads

HEADS = 16
"""Heads of a token in a program: 4 KiB of 128 bf16 each."""
PROGRAMS = 512
"""Shares of the tokens in the backward pass, each with a sum of the weights' gradients of its own."""


@triton.jit
def load_halves(
    heads: tl.tensor, column: tl.tensor, mask: tl.tensor, HALF: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Return both halves of the heads at these addresses, fp32; zeros where they are masked."""
    source = heads[:, None] + column[None, :]
    first = tl.load(source, mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def store_halves(
    heads: tl.tensor,
    column: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    mask: tl.tensor,
    HALF: tl.constexpr,
) -> None:
    """Write both halves of the heads at these addresses."""
    target = heads[:, None] + column[None, :]
    tl.store(target, first.to(target.dtype.element_ty), mask)
    tl.store(target + HALF, second.to(target.dtype.element_ty), mask)


@triton.jit
def load_row(
    row: tl.tensor, column: tl.tensor, in_half: tl.tensor, HALF: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Return both halves of one row, fp32 [1, BLOCK] each."""
    first = tl.load(row + column, in_half, other=0.0).to(tl.float32)
    second = tl.load(row + HALF + column, in_half, other=0.0).to(tl.float32)
    return first[None, :], second[None, :]


@triton.jit
def load_weights(
    query_weight: tl.tensor,
    key_weight: tl.tensor,
    is_query: tl.tensor,
    column: tl.tensor,
    in_half: tl.tensor,
    HALF: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return both halves of the norm's weight of each head, fp32 [HEADS, BLOCK]."""
    query_first, query_second = load_row(query_weight, column, in_half, HALF)
    key_first, key_second = load_row(key_weight, column, in_half, HALF)
    first = tl.where(is_query, query_first, key_first)
    second = tl.where(is_query, query_second, key_second)
    return first, second


@triton.jit
def forward_kernel(
    heads: tl.tensor,
    rotation: tl.tensor,
    query_weight: tl.tensor,
    key_weight: tl.tensor,
    query: tl.tensor,
    key: tl.tensor,
    deviation: tl.tensor,
    token_stride: tl.tensor,
    group_stride: tl.tensor,
    epsilon: tl.tensor,
    GROUPS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    NORM: tl.constexpr,
) -> None:
    """Rotate HEADS of the query and key heads of one token; with NORM normalise them before."""
    # 262,144 tokens of 72 heads of 128 are 2.4e9 elements: more than int32 counts.
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    group, place = head // (QUERIES + KEYS), head % (QUERIES + KEYS)
    is_head = head < GROUPS * (QUERIES + KEYS)
    is_query = (place < QUERIES)[:, None]
    column = tl.arange(0, BLOCK)
    in_half = column < HALF
    mask = is_head[:, None] & in_half[None, :]

    source = heads + token * token_stride + group * group_stride + place * 2 * HALF
    first, second = load_halves(source, column, mask, HALF)
    if NORM:
        squares = tl.sum(first * first + second * second, 1)
        scale = tl.rsqrt(squares / (2 * HALF) + epsilon)
        tl.store(deviation + token * GROUPS * (QUERIES + KEYS) + head, scale, is_head)
        weight_first, weight_second = load_weights(
            query_weight, key_weight, is_query, column, in_half, HALF
        )
        first *= scale[:, None] * weight_first
        second *= scale[:, None] * weight_second

    cosine, sine = load_row(rotation + token * 2 * HALF, column, in_half, HALF)
    turned_first = first * cosine - second * sine
    turned_second = second * cosine + first * sine

    # Two masked stores: one to addresses that tl.where chooses would write two bytes at a time.
    group += token * GROUPS
    to_query = query + (group * QUERIES + place) * 2 * HALF
    to_key = key + (group * KEYS + place - QUERIES) * 2 * HALF
    store_halves(to_query, column, turned_first, turned_second, mask & is_query, HALF)
    store_halves(to_key, column, turned_first, turned_second, mask & ~is_query, HALF)


@triton.jit
def load_gradients(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    group: tl.tensor,
    place: tl.tensor,
    column: tl.tensor,
    mask: tl.tensor,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    HALF: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return both halves of the gradients of a token's heads, each from its own tensor; `group` counts over tokens."""
    from_query = query + (group * QUERIES + place) * 2 * HALF
    from_key = key + (group * KEYS + place - QUERIES) * 2 * HALF
    from_value = value + (group * KEYS + place - QUERIES - KEYS) * 2 * HALF
    is_query = (place < QUERIES)[:, None]
    is_value = (place >= QUERIES + KEYS)[:, None]

    # Two of three are masked: nothing is read for them.
    first, second = load_halves(from_query, column, mask & is_query, HALF)
    key_first, key_second = load_halves(from_key, column, mask & ~is_query & ~is_value, HALF)
    value_first, value_second = load_halves(from_value, column, mask & is_value, HALF)
    return first + key_first + value_first, second + key_second + value_second


@triton.jit
def before_norm(
    above_first: tl.tensor,
    above_second: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    scale: tl.tensor,
    HALF: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return the gradient before the norm of both halves, from the weighted one after it and the normalised halves."""
    products = above_first * first + above_second * second
    along = tl.sum(products, 1)[:, None] / (2 * HALF)
    below_first = (above_first - first * along) * scale
    below_second = (above_second - second * along) * scale
    return below_first, below_second


@triton.jit
def store_sums(
    row: tl.tensor,
    column: tl.tensor,
    sum_first: tl.tensor,
    sum_second: tl.tensor,
    chosen: tl.tensor,
    HALF: tl.constexpr,
) -> None:
    """Write both halves of the sum over the chosen heads."""
    first = tl.sum(tl.where(chosen, sum_first, 0.0), 0)
    second = tl.sum(tl.where(chosen, sum_second, 0.0), 0)
    tl.store(row + column, first, column < HALF)
    tl.store(row + HALF + column, second, column < HALF)


@triton.jit
def backward_kernel(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    rotation: tl.tensor,
    heads: tl.tensor,
    deviation: tl.tensor,
    query_weight: tl.tensor,
    key_weight: tl.tensor,
    joined: tl.tensor,
    partial: tl.tensor,
    tokens: tl.tensor,
    token_stride: tl.tensor,
    group_stride: tl.tensor,
    GROUPS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    NORM: tl.constexpr,
) -> None:
    """Write the joined gradient of HEADS heads of every n-th token; with NORM also the sums for both weights, fp32."""
    each: tl.constexpr = QUERIES + 2 * KEYS
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    group, place = head // each, head % each
    is_head = head < GROUPS * each
    is_query = (place < QUERIES)[:, None]
    is_value = (place >= QUERIES + KEYS)[:, None]
    column = tl.arange(0, BLOCK)
    in_half = column < HALF
    mask = is_head[:, None] & in_half[None, :]
    if NORM:
        sum_first = tl.zeros((HEADS, BLOCK), tl.float32)
        sum_second = tl.zeros((HEADS, BLOCK), tl.float32)
        weight_first, weight_second = load_weights(
            query_weight, key_weight, is_query, column, in_half, HALF
        )

    for number in range(tl.program_id(0), tokens, tl.num_programs(0)):
        token = tl.cast(number, tl.int64)
        own_group = token * GROUPS + group
        above_first, above_second = load_gradients(
            query, key, value, own_group, place, column, mask, QUERIES, KEYS, HALF
        )
        # Backwards: the same rotation by the negative angle.
        cosine, sine = load_row(rotation + token * 2 * HALF, column, in_half, HALF)
        first = above_first * cosine + above_second * sine
        second = above_second * cosine - above_first * sine

        if NORM:
            row = deviation + own_group * (QUERIES + KEYS) + place
            scale = tl.load(row, is_head & (place < QUERIES + KEYS), other=0.0)[:, None]
            source = heads + token * token_stride + group * group_stride + place * 2 * HALF
            x_first, x_second = load_halves(source, column, mask & ~is_value, HALF)
            x_first, x_second = x_first * scale, x_second * scale
            sum_first += first * x_first
            sum_second += second * x_second
            first, second = first * weight_first, second * weight_second
            first, second = before_norm(first, second, x_first, x_second, scale, HALF)

        # Values are neither turned nor normalised.
        first = tl.where(is_value, above_first, first)
        second = tl.where(is_value, above_second, second)
        target = joined + (token * GROUPS * each + head) * 2 * HALF
        store_halves(target, column, first, second, mask, HALF)

    if NORM:
        program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        sums = partial + program * 4 * HALF
        store_sums(sums, column, sum_first, sum_second, is_query, HALF)
        store_sums(sums + 2 * HALF, column, sum_first, sum_second, ~is_query & ~is_value, HALF)


def sizes(groups: int, queries: int, keys: int, dim: int) -> dict[str, int]:
    """Return the sizes for which a kernel is compiled."""
    return {
        "GROUPS": groups,
        "QUERIES": queries,
        "KEYS": keys,
        "HALF": dim // 2,
        "BLOCK": triton.next_power_of_2(dim // 2),
        "HEADS": HEADS,
    }


def _with_whole_heads(heads: Tensor) -> Tensor:
    """Return [T, G, heads, D] whose heads follow one another in memory: as it is, if it is a part of a joined tensor."""
    dense = heads.stride()[2:] == (heads.shape[-1], 1)
    return heads if dense else heads.contiguous()


def rotate_heads(
    heads: Tensor, rotation: Tensor, weights: list[Tensor], keys: int, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what rotary.py's twin does."""
    heads = _with_whole_heads(heads)
    tokens, groups, each, dim = heads.shape
    results = rotated_heads(heads, rotation, weights, keys, epsilon)
    # No launch of zero programs: CUDA refuses it.
    if tokens:
        forward_kernel[(tokens, triton.cdiv(groups * each, HEADS))](
            heads,
            rotation.contiguous(),
            # Without a norm the kernel reads no weights.
            *(weights or (rotation, rotation)),
            *results,
            *heads.stride()[:2],
            epsilon,
            **sizes(groups, each - keys, keys, dim),
            NORM=bool(weights),
        )
    return results


def rotate_heads_backward(
    gradients: list[Tensor], rotation: Tensor, norm: list[Tensor], groups: int
) -> tuple[Tensor, Tensor]:
    """Return what rotary.py's twin does: one kernel, then the sum of its programs' shares of the weights' gradients."""
    # What attention returns is contiguous; a sum's gradient is expanded.
    query, key, value = (gradient.contiguous() for gradient in gradients)
    tokens, keys, dim = len(key), key.shape[1] // groups, key.shape[2]
    queries = query.shape[1] // groups
    each = queries + 2 * keys
    joined, by_weight = rotated_gradients([query, key, value], rotation, norm, groups)
    blocks, programs = triton.cdiv(groups * each, HEADS), min(tokens, PROGRAMS)
    partial = value.new_empty((programs, blocks, *by_weight.shape), dtype=torch.float32)
    heads, *others = norm or (joined, rotation, rotation, rotation)
    heads = _with_whole_heads(heads)
    if programs:
        backward_kernel[(programs, blocks)](
            query,
            key,
            value,
            rotation.contiguous(),
            heads,
            *others,
            joined,
            partial,
            tokens,
            *heads.stride()[:2],
            **sizes(groups, queries, keys, dim),
            NORM=bool(norm),
        )
    return joined, partial.sum((0, 1)).to(by_weight.dtype)
