"""Triton kernels of rotary.py. Importing this file needs Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

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
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    group, place = head // (QUERIES + KEYS), head % (QUERIES + KEYS)
    is_head = head < GROUPS * (QUERIES + KEYS)
    is_query = (place < QUERIES)[:, None]
    is_key = (place >= QUERIES)[:, None]

    column = tl.arange(0, BLOCK)
    in_half = column < HALF
    mask = is_head[:, None] & in_half[None, :]
    source = heads + token * token_stride + group * group_stride + place * 2 * HALF
    first, second = load_halves(source, column, mask, HALF)

    if NORM:
        squares = tl.sum(first * first + second * second, 1)
        scale = tl.rsqrt(squares / (2 * HALF) + epsilon)
        tl.store(deviation + token * GROUPS * (QUERIES + KEYS) + head, scale, is_head)
        query_first = tl.load(query_weight + column, in_half, other=0.0).to(tl.float32)
        query_second = tl.load(query_weight + HALF + column, in_half, other=0.0).to(tl.float32)
        key_first = tl.load(key_weight + column, in_half, other=0.0).to(tl.float32)
        key_second = tl.load(key_weight + HALF + column, in_half, other=0.0).to(tl.float32)
        first *= scale[:, None] * tl.where(is_query, query_first, key_first)
        second *= scale[:, None] * tl.where(is_query, query_second, key_second)

    angles = rotation + token * 2 * HALF + column
    cosine = tl.load(angles, in_half, other=0.0)[None, :]
    sine = tl.load(angles + HALF, in_half, other=0.0)[None, :]
    turned_first = first * cosine - second * sine
    turned_second = second * cosine + first * sine

    # Addresses chosen by tl.where would be stored two bytes at a time.
    to_query = query + ((token * GROUPS + group) * QUERIES + place) * 2 * HALF
    to_key = key + ((token * GROUPS + group) * KEYS + place - QUERIES) * 2 * HALF
    store_halves(to_query, column, turned_first, turned_second, mask & is_query, HALF)
    store_halves(to_key, column, turned_first, turned_second, mask & is_key, HALF)


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
    is_query = place < QUERIES
    is_key = (place >= QUERIES) & (place < QUERIES + KEYS)
    is_value = place >= QUERIES + KEYS
    is_turned = (is_query | is_key)[:, None]

    column = tl.arange(0, BLOCK)
    in_half = column < HALF
    mask = is_head[:, None] & in_half[None, :]
    sum_first = tl.zeros((HEADS, BLOCK), tl.float32)
    sum_second = tl.zeros((HEADS, BLOCK), tl.float32)
    if NORM:
        query_first = tl.load(query_weight + column, in_half, other=0.0).to(tl.float32)
        query_second = tl.load(query_weight + HALF + column, in_half, other=0.0).to(tl.float32)
        key_first = tl.load(key_weight + column, in_half, other=0.0).to(tl.float32)
        key_second = tl.load(key_weight + HALF + column, in_half, other=0.0).to(tl.float32)
        weight_first = tl.where(is_query[:, None], query_first, key_first)
        weight_second = tl.where(is_query[:, None], query_second, key_second)

    for number in range(tl.program_id(0), tokens, tl.num_programs(0)):
        token = tl.cast(number, tl.int64)
        from_query = query + ((token * GROUPS + group) * QUERIES + place) * 2 * HALF
        from_key = key + ((token * GROUPS + group) * KEYS + place - QUERIES) * 2 * HALF
        from_value = value + ((token * GROUPS + group) * KEYS + place - QUERIES - KEYS) * 2 * HALF
        first, second = load_halves(from_query, column, mask & is_query[:, None], HALF)
        key_halves = load_halves(from_key, column, mask & is_key[:, None], HALF)
        value_halves = load_halves(from_value, column, mask & is_value[:, None], HALF)
        first += key_halves[0] + value_halves[0]
        second += key_halves[1] + value_halves[1]

        # Backwards: the same rotation by the negative angle. Values are not turned.
        angles = rotation + token * 2 * HALF + column
        cosine = tl.load(angles, in_half, other=0.0)[None, :]
        sine = tl.load(angles + HALF, in_half, other=0.0)[None, :]
        turned_first = tl.where(is_turned, first * cosine + second * sine, first)
        turned_second = tl.where(is_turned, second * cosine - first * sine, second)

        if NORM:
            turned = mask & is_turned
            row = token * GROUPS * (QUERIES + KEYS) + group * (QUERIES + KEYS) + place
            scale = tl.load(deviation + row, is_head & (is_query | is_key), other=0.0)[:, None]
            origin = heads + token * token_stride + group * group_stride + place * 2 * HALF
            first, second = load_halves(origin, column, turned, HALF)
            first, second = first * scale, second * scale
            sum_first += turned_first * first
            sum_second += turned_second * second

            scaled_first = turned_first * weight_first
            scaled_second = turned_second * weight_second
            products = scaled_first * first + scaled_second * second
            along = tl.sum(products, 1)[:, None] / (2 * HALF)
            below_first = (scaled_first - first * along) * scale
            below_second = (scaled_second - second * along) * scale
            turned_first = tl.where(is_turned, below_first, turned_first)
            turned_second = tl.where(is_turned, below_second, turned_second)

        target = joined + (token * GROUPS * each + head) * 2 * HALF
        store_halves(target, column, turned_first, turned_second, mask, HALF)

    if NORM:
        own = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        own = partial + own * 4 * HALF + column
        is_query, is_key = is_query[:, None], is_key[:, None]
        tl.store(own, tl.sum(tl.where(is_query, sum_first, 0.0), 0), in_half)
        tl.store(own + HALF, tl.sum(tl.where(is_query, sum_second, 0.0), 0), in_half)
        tl.store(own + 2 * HALF, tl.sum(tl.where(is_key, sum_first, 0.0), 0), in_half)
        tl.store(own + 3 * HALF, tl.sum(tl.where(is_key, sum_second, 0.0), 0), in_half)


def _shape(groups: int, queries: int, keys: int, dim: int) -> dict[str, int]:
    """Return the sizes by which a kernel is compiled."""
    block = triton.next_power_of_2(dim // 2)
    return {
        "GROUPS": groups,
        "QUERIES": queries,
        "KEYS": keys,
        "HALF": dim // 2,
        "BLOCK": block,
        "HEADS": HEADS,
    }


def _with_whole_heads(heads: Tensor) -> Tensor:
    """Return [T, G, heads, D] whose heads follow one another in memory: as it is, if it is a part of a joined tensor."""
    dense = heads.stride()[2:] == (heads.shape[-1], 1)
    return heads if dense else heads.contiguous()


def rotate_heads(
    heads: Tensor,
    rotation: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    keys: int,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what rotary.py's twin does."""
    heads = _with_whole_heads(heads)
    tokens, groups, each, dim = heads.shape
    query = heads.new_empty(tokens, groups * (each - keys), dim)
    key = heads.new_empty(tokens, groups * keys, dim)
    kept = 0 if query_weight is None else (tokens, groups, each)
    deviation = heads.new_empty(kept, dtype=torch.float32)
    if tokens:
        forward_kernel[(tokens, triton.cdiv(groups * each, HEADS))](
            heads,
            rotation.contiguous(),
            rotation if query_weight is None else query_weight,
            rotation if key_weight is None else key_weight,
            query,
            key,
            deviation,
            *heads.stride()[:2],
            epsilon,
            **_shape(groups, each - keys, keys, dim),
            NORM=query_weight is not None,
        )
    return query, key, deviation


def rotate_heads_backward(
    query: Tensor, key: Tensor, value: Tensor, rotation: Tensor, groups: int
) -> Tensor:
    """Return what rotary.py's twin does."""
    joined, _ = _launch_backward((query, key, value), rotation, groups, None)
    return joined


def norm_rotate_heads_backward(
    query: Tensor, key: Tensor, value: Tensor, rotation: Tensor, heads: Tensor, *norm: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what rotary.py's twin does: one kernel, then the sum of its programs' shares of the weights' gradients."""
    gradients = (query, key, value)
    joined, partial = _launch_backward(gradients, rotation, heads.shape[1], (heads, *norm))
    by_weight = partial.sum((0, 1)).view(2, -1)
    return joined, by_weight.to(norm[-1].dtype)


def _launch_backward(
    gradients: tuple[Tensor, ...],
    rotation: Tensor,
    groups: int,
    norm: tuple[Tensor, ...] | None,
) -> tuple[Tensor, Tensor]:
    """Return the joined gradient and the programs' shares; `norm`: heads, deviations and both weights."""
    query, key, value = (gradient.contiguous() for gradient in gradients)
    tokens, keys, dim = key.shape
    keys //= groups
    queries = query.shape[1] // groups
    each = queries + 2 * keys
    joined = value.new_empty(tokens, groups, each, dim)
    blocks = triton.cdiv(groups * each, HEADS)
    programs = min(tokens, PROGRAMS)
    size = 0 if norm is None else 2 * dim
    partial = value.new_empty(programs, blocks, size, dtype=torch.float32)
    # Without a norm the kernel reads none of these.
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
            **_shape(groups, queries, keys, dim),
            NORM=norm is not None,
        )
    return joined, partial
