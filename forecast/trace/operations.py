"""What an operation costs: its launches, floating-point operations and bytes, from its name and the shapes of its tensors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from visionloom.forecast.trace.events import Kernel

DTYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.uint8: "uint8",
    torch.int8: "int8",
    torch.bool: "bool",
}
VIEWS = {
    "aten::_unsafe_view",
    "aten::_reshape_alias",
    "aten::lift_fresh",
    "aten::set_",
    "aten::alias",
}
"""Operations that launch nothing, though their schemas do not say that their result is their input's memory."""
SILENT = {
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::record_stream",
    "aten::_local_scalar_dense",
    "aten::resize_",
}
"""Operations that launch nothing: memory is taken, or the host waits."""
READS_ROWS = {"aten::embedding", "aten::index", "aten::index_select", "aten::gather"}
"""Operations that read of their first input only what they return."""
ADDS_ROWS = {
    "aten::index_add_",
    "aten::scatter_add_",
    "aten::index_put_",
    "aten::_index_put_impl_",
    "aten::index_copy_",
}
"""Operations that read and write of their first input only the rows that others are added to."""
OVERWRITES = {
    "aten::zero_",
    "aten::fill_",
    "aten::copy_",
    "aten::_foreach_zero_",
    "aten::_foreach_copy_",
}
"""Operations that write their first input, or all of that list, without reading it."""
ONLY_READ = {"grads"}
"""Arguments that fused optimizers may change by their schemas, and do only where they take a scale of the loss."""

ADDS_PRODUCT = {"visionloom::add_product_", "visionloom::add_grouped_product_"}
"""Operations that add products of rows [m, O] and columns [m, I] to their first input, the latter in parts and for each group."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one launch; see events.Operation."""

    kernel: Kernel
    flops: float
    work: float
    bytes: int


@dataclass(frozen=True, slots=True)
class Kind:
    """What is known of an operation by its schema alone."""

    name: str
    launches: bool
    is_view: bool
    """Its result is its input's memory."""
    writes: bool
    """It changes an input in place."""
    product: Callable[..., Any] | None
    """torch's count of a matrix product's operations."""


@cache
def kind_of(func: Any) -> Kind:
    """Return what the schema of an operation says."""
    schema = func._schema
    aliases = [value.alias_info for value in schema.returns if value.alias_info is not None]
    name = schema.name
    is_view = name in VIEWS or any(not alias.is_write for alias in aliases)
    launches = not is_view and name not in SILENT and not name.startswith("profiler::")
    return Kind(name, launches, is_view, schema.is_mutable, flop_registry.get(func.overloadpacket))


@dataclass(frozen=True, slots=True)
class Call:
    """One call of an operation, as torch's dispatcher makes it."""

    kind: Kind
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        """Return the operation's name without its overload, such as `aten::mm`."""
        return self.kind.name

    @property
    def blocks(self) -> bool:
        """Return whether the host waits for a copy: it is not asked to go on."""
        in_place = self.name == "aten::copy_" and len(self.args) > 2 and self.args[2]
        return not (self.kwargs.get("non_blocking") or in_place)

    def run(self) -> Any:
        """Run it."""
        return self.func(*self.args, **self.kwargs)


def cost_of(call: Call, inputs: list[Tensor], outputs: list[Tensor]) -> Cost:
    """Return what one launch costs, with the tensors of the device that it takes and returns."""
    kind = call.kind
    moved = bytes_of(call, inputs, outputs)
    if kind.name in ATTENTION:
        return Cost(Kernel.ATTENTION, *ATTENTION[kind.name](call.args), moved)
    if kind.name == "aten::_grouped_mm":
        flops = grouped_product(inputs[0], inputs[1])
        return Cost(Kernel.PRODUCT, flops, flops, moved)
    if kind.name in ADDS_PRODUCT:
        _total, *factors = (each for each in inputs if each.is_floating_point())
        parts = len(factors) // 2
        pairs = zip(factors[:parts], factors[parts:], strict=True)
        flops = sum(2.0 * rows.numel() * columns.shape[1] for rows, columns in pairs)
        return Cost(Kernel.PRODUCT, flops, flops, moved)
    if kind.product is not None:
        result = outputs[0] if len(outputs) == 1 else tuple(outputs)
        flops = float(kind.product(*call.args, **call.kwargs, out_val=result))
        return Cost(Kernel.PRODUCT, flops, flops, moved)
    return Cost(Kernel.OTHER, 0.0, 0.0, moved)


def bytes_of(call: Call, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Return the bytes that a launch reads and writes."""
    name = call.name
    # Of operations in place the output is the first input, which is read and written; those of lists return nothing.
    written = sum(map(size_of, outputs or changed_by(call)))
    if name in READS_ROWS:
        return written * 2 + sum(map(size_of, inputs[1:]))
    if name in ADDS_ROWS:
        # The rows that are added are read; those below them are read and written.
        return sum(map(size_of, inputs[1:])) + 2 * size_of(inputs[-1])
    if name in OVERWRITES:
        inputs = inputs[len(tensors_in(call.args[0])) :]
    return sum(map(size_of, inputs)) + written


def changed_by(call: Call) -> list[Tensor]:
    """Return the tensors that an operation changes by its schema."""
    changed = []
    for argument, value in zip(call.func._schema.arguments, call.args, strict=False):
        writes = argument.alias_info is not None and argument.alias_info.is_write
        if writes and argument.name not in ONLY_READ:
            changed += tensors_in(value)
    return changed


def size_of(tensor: Tensor) -> int:
    """Return the bytes of a tensor; those of an expanded one count once."""
    if 0 in tensor.stride():
        return min(tensor.nbytes, tensor.untyped_storage().nbytes())
    return tensor.nbytes


def grouped_product(first: Tensor, second: Tensor) -> float:
    """Return operations of torch's grouped product of rows [m, A] by [e, A, B], or of columns [A, m] by [m, B]."""
    rows, columns = first.shape[-2:]
    return 2.0 * rows * columns * second.shape[-1]


def dtype_of(inputs: list[Tensor], outputs: list[Tensor]) -> str:
    """Return the narrowest dtype of numbers that are computed with, or of the output where there is no input.

    A product of bf16 that is added to an fp32 sum has the speed of bf16.
    """
    tensors = inputs or outputs
    tensors = [tensor for tensor in tensors if tensor.is_floating_point()] or tensors
    narrowest = min(tensors, key=lambda tensor: tensor.element_size()).dtype
    return DTYPES.get(narrowest, str(narrowest).removeprefix("torch."))


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors among arguments or results, however deep."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []


# ---- attention

TILE = 128
"""Rows and columns of scores that a program of FlashAttention computes together. Measured on an H100 (torch 2.11, head dim 128):
segments of 683 and 273 tokens take 1.51 and 2.73 times as long as one of 8,192 for their operations, by tiles 1.48 and 2.64."""
HEAD_DIMS = (32, 64, 96, 128, 192, 256)
"""Head dims of FlashAttention-2's kernels; others take the next one."""


def forward_attention(args: Sequence[Any]) -> tuple[float, float]:
    """Return operations that attention inside segments needs and that its kernel executes.

    Of a causal segment the last query sees all keys, and each one before it a key less: half of a square counts.
    """
    query, _key, _value, *_, bounds_q, bounds_k, _max_q, _max_k, causal, _scale = args
    heads, dim = query.shape[1:]
    queries, keys = np.diff(bounds_q), np.diff(bounds_k)
    pairs = float((queries * (keys - queries / 2 if causal else keys)).sum())

    # A kernel computes whole tiles of scores, those on the diagonal too, and rounds the head dim up.
    rows, columns = (-(-lengths // TILE) * TILE for lengths in (queries, keys))
    tiled = float((rows * (columns - (rows - TILE) / 2 if causal else columns)).sum())
    padded = next(each for each in HEAD_DIMS if each >= dim)
    # Two products of two operations for each pair.
    return 4.0 * heads * dim * pairs, 4.0 * heads * padded * tiled


def backward_attention(args: Sequence[Any]) -> tuple[float, float]:
    """Return operations of the backward pass: twice the forward's, and once more the scores, which are not kept."""
    _gradient, query, key, value, _output, _logsumexp, *options = args
    needed, executed = forward_attention((query, key, value, *options))
    return 2 * needed, 2.5 * executed


ATTENTION: dict[str, Callable[[Sequence[Any]], tuple[float, float]]] = {
    "visionloom::attention": forward_attention,
    "visionloom::attention_backward": backward_attention,
}
