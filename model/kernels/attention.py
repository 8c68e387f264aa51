"""Attend inside the segments of packed sequences, without a loop over lengths, padding or masks.

On a GPU one kernel does it (flash.py); on a CPU segments of equal lengths are attended together.
Shapes: T query rows, U key rows, S segments, H query heads, G key/value heads, D head dim, L and M rows of one segment.
"""

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visionloom.model.kernels import flash, library
from visionloom.parallel.device import to_device

_ARGUMENTS = (
    "Tensor cu_seqlens_q, Tensor cu_seqlens_k, int[] bounds_q, int[] bounds_k, int max_q, int max_k,"
    " bool causal, float scale"
)


@dataclass(frozen=True)
class Segments:
    """Segments of query rows and the segments of key rows that they see, on the device and on the host."""

    cu_seqlens_q: Tensor
    """int32 [S + 1] on the device: where the segments of the T query rows begin; the last is T."""
    cu_seqlens_k: Tensor
    """int32 [S + 1] on the device: the same for the U key rows."""
    bounds_q: list[int]
    """cu_seqlens_q on the host: neither a trace nor the CPU waits for the device."""
    bounds_k: list[int]
    """cu_seqlens_k on the host."""

    @classmethod
    def build(
        cls, cu_seqlens_q: Tensor, device: torch.device, cu_seqlens_k: Tensor | None = None
    ) -> "Segments":
        """Prepare segments, int [S + 1] on the host each; a segment sees itself where `cu_seqlens_k` is None."""
        queries = to_device(cu_seqlens_q.int(), device)
        bounds = cu_seqlens_q.tolist()
        if cu_seqlens_k is None:
            return cls(queries, queries, bounds, bounds)
        keys = to_device(cu_seqlens_k.int(), device)
        return cls(queries, keys, bounds, cu_seqlens_k.tolist())

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Return what the operations take of it, in their order."""
        longest = _longest(self.bounds_q), _longest(self.bounds_k)
        return self.cu_seqlens_q, self.cu_seqlens_k, self.bounds_q, self.bounds_k, *longest


def _longest(bounds: list[int]) -> int:
    return max(after - before for before, after in pairwise(bounds))


class AttentionResults:
    """What attention has returned in first passes of recomputed layers, which their second passes take and do not compute."""

    def __init__(self) -> None:
        self._results: deque[tuple[Tensor, Tensor]] = deque()
        """Of micro-batches whose backward pass is to come, which has the same order."""

    @contextlib.contextmanager
    def first_pass(self) -> Iterator[None]:
        """Let each `attend` inside leave its result here."""
        with _calls.through(self._compute):
            yield

    @contextlib.contextmanager
    def second_pass(self) -> Iterator[None]:
        """Let each `attend` inside take its result from here."""
        with _calls.through(lambda *_: self._results.popleft()):
            yield

    def _compute(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        output, logsumexp = FORWARD(*arguments)
        # Without the graph that the output will be part of, which keeps these results alive.
        self._results.append((output.detach(), logsumexp))
        return output, logsumexp


@dataclass
class _Calls:
    """The function by which `attend` comes by its results; None: by computing them."""

    function: Callable[..., tuple[Tensor, Tensor]] | None = None

    @contextlib.contextmanager
    def through(self, function: Callable[..., tuple[Tensor, Tensor]]) -> Iterator[None]:
        """Let calls inside go through a function."""
        before, self.function = self.function, function
        try:
            yield
        finally:
            self.function = before


_calls = _Calls()


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    *,
    causal: bool,
    scale: float | None = None,
) -> Tensor:
    """Return scaled dot-product attention inside each segment.

    Args:
        query: [T, H, D]; key, value: [U, G, D] with H a multiple of G.
        segments: of the T and the U rows.
        causal: the last query of a segment sees all its keys, each query before it one key less.
        scale: of the scores; None: D^-1/2.

    Returns:
        [T, H, D].
    """
    if scale is None:
        scale = query.shape[-1] ** -0.5
    options = *segments.arguments, causal, scale
    attended: Tensor = _Attention.apply(query, key, value, options)
    return attended


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, options: tuple[Any, ...]
    ) -> Tensor:
        compute = _calls.function or FORWARD
        output, logsumexp = compute(query, key, value, *options)
        # One number a row and head is kept of the scores: the backward pass computes them again, tile by tile.
        ctx.save_for_backward(query, key, value, output, logsumexp)
        ctx.options = options
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        made = BACKWARD(gradient, *ctx.saved_tensors, *ctx.options)
        return (*made, None)


# ---- the shapes of the results


def _forward_meta(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    rows, heads, _dim = query.shape
    return _packed_like(query), query.new_empty(heads, rows, dtype=torch.float32)


def _backward_meta(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _packed_like(query), _packed_like(key), _packed_like(value)


def _packed_like(x: Tensor) -> Tensor:
    """Return an empty contiguous tensor; x may be a part of the joined query, key and value."""
    return x.new_empty(x.shape)


# ---- on a CPU


@dataclass(frozen=True)
class _Group:
    """Segments of equal lengths, which one call attends to the rows of some or all keys that they see."""

    queries: "_Rows"
    keys: "_Rows"
    is_causal: bool
    """Of as many keys as queries: the kernel's own mask aligns the first of both, and skips half of the work."""
    scale: float

    def take(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take the rows of the group, [n, heads, L or M, D] each."""
        return self.queries.take(query), self.keys.take(key), self.keys.take(value)

    @property
    def options(self) -> dict[str, Any]:
        """Return the options of torch's CPU kernel."""
        return {"is_causal": self.is_causal, "scale": self.scale}

    @functools.cached_property
    def parts(self) -> "list[_Group]":
        """Return the calls that attend causally: the pieces of a context rank see more keys than they have queries.

        The keys before the square are seen by all queries. A mask in place of the two calls has a number for each
        query and key: 4 GB for a piece of 16,384 queries that sees 65,536 keys.
        """
        more = self.keys.length - self.queries.length
        if not self.is_causal or not more:
            return [self]
        if self.queries.length == 1:
            # a token that is generated
            return [replace(self, is_causal=False)]
        before = replace(self, keys=_Rows(self.keys.starts, more), is_causal=False)
        square = _Rows(self.keys.starts + more, self.queries.length)
        return [before, replace(self, keys=square)]


@dataclass(frozen=True)
class _Rows:
    """Rows of segments of one length."""

    starts: NDArray[np.int64]
    length: int

    @functools.cached_property
    def _numbers(self) -> slice | NDArray[np.int64]:
        # Nearly always a slice: then nothing is copied.
        if (np.diff(self.starts) == self.length).all():
            first = int(self.starts[0])
            return slice(first, first + self.length * len(self.starts))
        rows = self.starts[:, None] + np.arange(self.length)
        return rows.reshape(-1)

    @property
    def where(self) -> slice | Tensor:
        """Return the rows, as a slice where the segments follow one another."""
        numbers = self._numbers
        # A tensor is not kept: one of inference mode may not be used outside of it.
        return numbers if isinstance(numbers, slice) else torch.from_numpy(numbers)

    def take(self, x: Tensor) -> Tensor:
        """Take the rows of [T, heads, D] as [n, heads, L, D]."""
        rows = x[self.where].unflatten(0, self._shape)
        return rows.transpose(1, 2)

    def take_sums(self, x: Tensor) -> Tensor:
        """Take the columns of [heads, T] as [n, heads, L]."""
        columns = x[:, self.where].unflatten(1, self._shape)
        return columns.transpose(0, 1)

    @property
    def _shape(self) -> tuple[int, int]:
        return len(self.starts), self.length

    def put(self, target: Tensor, values: Tensor) -> None:
        """Write values [n, heads, L, D] into the rows of [T, heads, D]."""
        target[self.where] = values.transpose(1, 2).flatten(0, 1)

    def add(self, target: Tensor, values: Tensor) -> None:
        """Add values [n, heads, L, D] to the rows of [T, heads, D]."""
        target[self.where] += values.transpose(1, 2).flatten(0, 1)

    def put_sums(self, target: Tensor, values: Tensor) -> None:
        """Write values [n, heads, L] into the columns of [heads, T]."""
        target[:, self.where] = values.transpose(0, 1).flatten(1)


def _groups(options: Sequence[Any]) -> list[_Group]:
    """Return the groups of the segments that an operation was given."""
    *_tensors, bounds_q, bounds_k, _max_q, _max_k, causal, scale = options
    return _group_segments(tuple(bounds_q), tuple(bounds_k), causal, scale)


type _Bounds = tuple[int, ...]


# All layers of a pack ask for the same ones, in both passes: for a small model this was a tenth of a step.
@functools.lru_cache(maxsize=32)
def _group_segments(
    bounds_q: _Bounds, bounds_k: _Bounds, causal: bool, scale: float
) -> list[_Group]:
    """Return the segments that have queries, in groups of equal lengths."""
    bounds = np.array([bounds_q, bounds_k])
    lengths = np.diff(bounds).T
    groups = []
    # Pictures of a pack often have equal sizes; torch's CPU kernel takes no list of lengths.
    for pair in np.unique(lengths[lengths[:, 0] > 0], axis=0):
        mine = np.flatnonzero((lengths == pair).all(1))
        starts_q, starts_k = bounds[:, mine]
        queries, keys = _Rows(starts_q, int(pair[0])), _Rows(starts_k, int(pair[1]))
        groups.append(_Group(queries, keys, causal, scale))
    return groups


def _forward_cpu(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    # Proofs run in fp64, whose sums fp32 would round.
    sums = torch.promote_types(query.dtype, torch.float32)
    logsumexp = query.new_empty(query.shape[1], query.shape[0], dtype=sums)
    for group in _groups(options):
        attended, row_sums = _attend_parts(group.parts, query, key, value)
        group.queries.put(output, attended)
        group.queries.put_sums(logsumexp, row_sums)
    return output, logsumexp


def _attend_parts(
    parts: Sequence[_Group], query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    """Attend each part, and join them: each weighs as much as its scores have of the sum over all keys."""
    results = []
    for part in parts:
        result = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *part.take(query, key, value), **part.options
        )
        results.append(result)
    if len(results) == 1:
        return results[0]

    # The exponentials are of differences, none above 0: they do not overflow.
    (before, before_sums), (square, square_sums) = results
    sums = torch.logaddexp(before_sums, square_sums)
    weighted = before * (before_sums - sums).exp()[..., None]
    return weighted.addcmul_(square, (square_sums - sums).exp()[..., None]), sums


def _backward_cpu(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    # A query's gradient has a part from each call; keys that no query sees have none.
    by_query, by_key, by_value = [x.new_zeros(x.shape) for x in (query, key, value)]
    for group in _groups(options):
        for part in group.parts:
            gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                part.queries.take(gradient),
                *part.take(query, key, value),
                part.queries.take(output),
                part.queries.take_sums(logsumexp),
                0.0,
                **part.options,
            )
            part.queries.add(by_query, gradients[0])
            part.keys.add(by_key, gradients[1])
            part.keys.add(by_value, gradients[2])
    return by_query, by_key, by_value


FORWARD = library.define(
    f"attention(Tensor query, Tensor key, Tensor value, {_ARGUMENTS}) -> (Tensor output, Tensor logsumexp)",
    cpu=_forward_cpu,
    cuda=flash.forward,
    meta=_forward_meta,
)
BACKWARD = library.define(
    "attention_backward(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor output, Tensor logsumexp,"
    f" {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    cpu=_backward_cpu,
    cuda=flash.backward,
    meta=_backward_meta,
)
