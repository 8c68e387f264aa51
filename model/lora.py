"""LoRA: low-rank adapters next to the frozen linear layers, in any layout.

A layer keeps its class's name and weights and becomes a subclass that adds `adapter` to its output, so no name of the model
changes. Queries, keys and values, gate and up projection have adapters of their own, as in PEFT on transformers' model.
Source: LoRA (arXiv 2106.09685); reference implementation: peft.

Who holds what, with `out` or `in` cut over the tensor ranks as the layer's own weight is:
    column-parallel (linear_qkv, linear_fc1): A [r, in] whole, B [out / tensor, r]; A x is gathered over the tokens, r wide;
    row-parallel (linear_proj, linear_fc2): A [r, in / tensor], B [out, r] whole; A x is reduced, r wide;
    experts: A [e, r, in] and B [e, out, r] of this rank's experts, cut over the expert-tensor ranks alike;
    vision tower and mergers: both whole.
Under sequence parallelism the whole ones see a share of the tokens: `sequence_parallel` lets Megatron-core sum their gradients.
Shapes: r rank, t tokens of this rank, e experts of this rank.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from visionloom.model.experts import Matrix, Stack, grouped_linear
from visionloom.model.kernels.linear import Linear
from visionloom.model.lora_config import LinearLayer, LoraConfig, adapted_layers
from visionloom.model.sharding import (
    canonical_name,
    canonical_parameters,
    cut,
    full_shape,
    generator_of,
)
from visionloom.model.trainable import is_adapter
from visionloom.parallel.divided import shape_of, written
from visionloom.parallel.topology import Topology


class Factors(nn.ParameterDict):
    """The matrices A or B of a layer's parts, by part."""

    # torch's own has a call that only raises, instead of the one that runs hooks.
    __call__ = nn.Module.__call__

    def forward(self) -> list[Tensor]:
        """Return them in order; a call of this module is what parameter gathering waits for."""
        return list(self.values())


class Adapter(nn.Module):
    """Low-rank factors whose scaling * B A x is added to a layer's output, part by part."""

    def __init__(
        self,
        layer: LinearLayer,
        lora: LoraConfig,
        shape: dict[str, tuple[int, ...]],
        inputs: int,
        like: Tensor,
    ):
        """Allocate the factors of this rank, not drawn.

        Args:
            layer: of the whole model.
            lora: rank, scaling and dropout.
            shape: rows of B that this rank holds, by part.
            inputs: columns of A that this rank holds.
            like: the layer's weight: dtype, device, experts.
        """
        super().__init__()
        experts = tuple(shape_of(like)[:1]) if layer.experts else ()
        # ParameterDict would sort a dict by its keys: queries come before keys.
        a, b = [], []
        for part, rows in shape.items():
            a.append((part, _empty(like, *experts, lora.rank, inputs)))
            b.append((part, _empty(like, *experts, *rows, lora.rank)))
        self.lora_A = Factors(a)
        self.lora_B = Factors(b)
        self.scaling, self.dropout = lora.scaling, lora.dropout

    def down(self, x: Tensor, own_mask: bool) -> Tensor:
        """Return A x of all parts, [..., in] -> [..., parts * r].

        `own_mask`: ranks that share the layer see different inputs, so each draws a dropout mask of its own.
        """
        if self.dropout and self.training:
            # The tracker's state differs over the tensor ranks, the default one is the same on all.
            with get_cuda_rng_tracker().fork() if own_mask else nullcontext():
                x = F.dropout(x, self.dropout)
        return F.linear(x, torch.cat(self.lora_A()))

    def add_up_(self, output: Tensor, inner: Tensor, heads: int = 1) -> Tensor:
        """Add scaling times B of each part times its r columns [..., parts * r] to a layer's output [..., out].

        The parts alternate `heads` times in the output. It is written to by one product and returned: anything done to the
        whole of it costs as much as a norm does.
        """
        added: Tensor = _AddProduct.apply(
            output, inner * self.scaling, self._joined(self.lora_B(), heads)
        )
        return added

    def _joined(self, matrices: list[Tensor], heads: int) -> Tensor:
        """Return the B of all parts as one matrix [out, parts * r], zero where a row is not of a column's part."""
        if len(matrices) == 1:
            return matrices[0]
        blocks = []
        for number, matrix in enumerate(matrices):
            rank = matrix.shape[1]
            others = number * rank, (len(matrices) - 1 - number) * rank
            blocks.append(F.pad(matrix, others).unflatten(0, (heads, -1)))
        return torch.cat(blocks, dim=1).flatten(0, 1)

    def delta(self, heads: int = 1) -> Tensor:
        """Return the adapter's addition to this rank's weight, fp32 in the weight's own order of rows."""
        a, b = list(self.lora_A.values()), list(self.lora_B.values())
        return low_rank_product(a, b, heads) * self.scaling


class _AddProduct(torch.autograd.Function):
    """Add x [..., r] times the transpose of a matrix [out, r] to a tensor [..., out], where it is.

    The tensor is another layer's output, which nobody has kept: autograd would refuse to write to what Megatron-core's
    functions return, and torch's own sum with a product copies it first.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, matrix: Tensor) -> Tensor:
        ctx.save_for_backward(x, matrix)
        rows = output.flatten(0, -2)
        torch.addmm(rows, x.flatten(0, -2), matrix.t(), out=rows)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, matrix = ctx.saved_tensors
        by_matrix = gradient.flatten(0, -2).t() @ x.flatten(0, -2)
        return gradient, gradient @ matrix, by_matrix


def _empty(like: Tensor, *shape: int) -> nn.Parameter:
    """Return a parameter of this shape that is not drawn yet."""
    return nn.Parameter(torch.empty(shape, dtype=like.dtype, device=like.device))


def low_rank_product(a: list[Tensor], b: list[Tensor], heads: int) -> Tensor:
    """Return B A of all parts, fp32 [out, in] or [experts, out, in], their rows alternating `heads` times.

    Args:
        a: [r, in] or [experts, r, in] of each part.
        b: [out of the part, r], [experts, out, r] or [experts, 2, F, r] of each part.
        heads: blocks of rows that each part has in the layer's weight.
    """
    parts = []
    for x, y in zip(a, b, strict=True):
        rows = y.flatten(1, -2) if y.dim() > 2 else y
        parts.append(rows.float() @ x.float())
    if len(parts) == 1:
        return parts[0]
    by_head = [part.unflatten(0, (heads, -1)) for part in parts]
    return torch.cat(by_head, dim=1).flatten(0, 1)


class AdaptedLinear(Linear):
    """A linear layer that every rank holds whole, with an adapter."""

    adapter: Adapter

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        inner = self.adapter.down(x, own_mask=False)
        return self.adapter.add_up_(super().forward(x), inner)


class AdaptedColumn(ColumnParallelLinear):  # type: ignore[misc]
    """A linear layer whose outputs are cut over the tensor ranks, with an adapter."""

    adapter: Adapter
    heads: int
    """Times that the parts alternate in this rank's rows: key/value heads of linear_qkv."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Map [t, 1, in] to [t * tensor under sequence parallelism, 1, out / tensor], and no bias."""
        output, bias = super().forward(x, *args, **kwargs)
        # Only r values a token travel, the rank's width.
        inner = self.adapter.down(x, own_mask=self.sequence_parallel)
        if self.sequence_parallel:
            inner = gather_from_sequence_parallel_region(
                inner, tensor_parallel_output_grad=True, group=self.tp_group
            )
        else:
            inner = copy_to_tensor_model_parallel_region(inner, group=self.tp_group)
        return self.adapter.add_up_(output, inner, self.heads), bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Return the layer's own sharded tensors and the adapter's."""
        own: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return own | _sharded_adapter(self, prefix, sharded_offsets, metadata)


class AdaptedRow(RowParallelLinear):  # type: ignore[misc]
    """A linear layer whose inputs are cut over the tensor ranks, with an adapter."""

    adapter: Adapter

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Map [t, 1, in / tensor] to [t, 1, out], summed over the ranks, and no bias.

        Under sequence parallelism the output is a share of the tokens.
        """
        output, bias = super().forward(x)
        inner = self.adapter.down(x, own_mask=True)
        if self.sequence_parallel:
            inner = reduce_scatter_to_sequence_parallel_region(inner, group=self.tp_group)
        else:
            inner = reduce_from_tensor_model_parallel_region(inner, group=self.tp_group)
        return self.adapter.add_up_(output, inner), bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Return the layer's own sharded tensors and the adapter's."""
        own: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return own | _sharded_adapter(self, prefix, sharded_offsets, metadata)


class AdaptedStack(Stack):
    """One matrix of all experts of this rank, with an adapter an expert."""

    adapter: Adapter
    expert_tensor_group: Any

    def forward(
        self, tokens: Tensor, ends: Tensor, matrix: Matrix | None = None, read: bool = True
    ) -> Tensor:
        """Map tokens as `Stack.forward` does."""
        (a,), (b,) = self.adapter.lora_A(), self.adapter.lora_B()
        a, b = self._summed(a), self._summed(b)
        inner = grouped_linear(tokens, Matrix(a), ends)
        added = grouped_linear(inner * self.adapter.scaling, Matrix(b.flatten(1, -2)), ends)
        return super().forward(tokens, ends, matrix, read) + added

    def _summed(self, factor: Any) -> Tensor:
        """Return a factor whose gradient is summed over the expert-tensor ranks if it is not cut.

        Each of them has a part of that gradient; Megatron-core would not sum it.
        """
        if factor.partition_dim >= 0:
            return factor
        copied: Tensor = copy_to_tensor_model_parallel_region(
            factor, group=self.expert_tensor_group
        )
        return copied


ADAPTED: dict[type, type] = {
    Linear: AdaptedLinear,
    nn.Linear: AdaptedLinear,
    ColumnParallelLinear: AdaptedColumn,
    RowParallelLinear: AdaptedRow,
    Stack: AdaptedStack,
}
"""The class that a layer becomes, by the class that it has."""


def _sharded_adapter(
    module: Any,
    prefix: str,
    offsets: Any,
    metadata: Any,
) -> dict[str, Any]:
    """Return an adapter's factors as sharded tensors, cut where they are cut over the tensor ranks."""
    state = module.adapter.state_dict(prefix="adapter.", keep_vars=True)
    dims = {
        name: weight.partition_dim
        for name, weight in state.items()
        if getattr(weight, "tensor_model_parallel", False)
    }
    sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
        state,
        prefix,
        dims,
        offsets,
        tp_group=module.tp_group,
        dp_cp_group=metadata["dp_cp_group"],
    )
    return sharded


def apply_lora(
    chunks: Iterable[Any],
    lora: LoraConfig,
    topology: Topology,
    seed: int,
) -> None:
    """Give the layers that `lora` chooses adapters that change nothing yet; weights are there, wrapping comes after.

    Args:
        chunks: the Qwen3VL chunks of this rank.
        lora: rank above 0.
        topology: the layout, which decides this rank's part of each.
        seed: of the run; A is drawn by canonical name, the same in every layout, uniform as in peft; B is zero.
    """
    for chunk in chunks:
        chunk.lora = lora
        layers = {layer.name: layer for layer in adapted_layers(chunk.model_config, lora)}
        for name, module in list(chunk.named_modules()):
            if layer := layers.get(canonical_name(name, chunk)):
                _adapt(module, layer, lora, chunk, topology)
        draw_adapters(chunk, seed, topology)

        # Megatron-core's recomputation and stages pass no gradient on to layers whose input has none.
        needs_graph = topology.config.recompute != "none" or topology.config.pipeline > 1
        if needs_graph and chunk.pre_process:
            chunk.language_model.embedding.register_forward_hook(_require_gradient)


def _adapt(
    module: Any,
    layer: LinearLayer,
    lora: LoraConfig,
    chunk: Any,
    topology: Topology,
) -> None:
    """Give one layer an adapter of this rank's size and make it an object of the adapted class."""
    tensor = topology.config.tensor
    weight = module.weight
    shapes = _part_shapes(module, layer, tensor)
    module.adapter = Adapter(layer, lora, shapes, shape_of(weight)[-1], weight)
    # The object stays, so its name and weights are those that checkpoints and the optimizer know.
    module.__class__ = ADAPTED[type(module)]

    a, b = module.adapter.lora_A.values(), module.adapter.lora_B.values()
    if isinstance(module, AdaptedStack):
        module.expert_tensor_group = topology.groups.expt_tp
        _mark_experts(module, topology)
    elif isinstance(module, AdaptedColumn):
        is_joint = "q_proj" in layer.parts
        module.heads = chunk.model_config.text.kv_heads // tensor if is_joint else 1
        _mark_whole(a, topology)
        _mark_cut(b, dim=0)
    elif isinstance(module, AdaptedRow):
        _mark_cut(a, dim=1)
        _mark_whole(b, topology)
    else:
        _mark_whole(a, topology)
        _mark_whole(b, topology)


def _part_shapes(module: Any, layer: LinearLayer, tensor: int) -> dict[str, tuple[int, ...]]:
    """Return the output dims of each part on this rank, one of `tensor` that share a cut layer."""
    shapes: dict[str, tuple[int, ...]] = {}
    for part, width in layer.parts.items():
        if isinstance(module, Stack):
            shapes[part] = tuple(shape_of(module.weight)[1:-1])
        elif isinstance(module, ColumnParallelLinear):
            shapes[part] = (width // tensor,)
        else:
            shapes[part] = (width,)
    return shapes


def _mark_cut(factors: Iterable[Any], dim: int) -> None:
    """Set Megatron-core's attributes of parameters that are cut over the tensor ranks along `dim`."""
    for parameter in factors:
        parameter.tensor_model_parallel = True
        parameter.partition_dim = dim
        parameter.partition_stride = 1


def _mark_whole(factors: Iterable[Any], topology: Topology) -> None:
    """Let Megatron-core sum the gradients of whole factors where each rank sees a share of the tokens."""
    for parameter in factors:
        parameter.sequence_parallel = topology.config.sequence_parallel


def _mark_experts(module: AdaptedStack, topology: Topology) -> None:
    """Set the attributes as model/experts.py Stack does; the factor that touches F is cut along it, dim 2 in both."""
    weight: Any = module.weight
    (a,), (b,) = module.adapter.lora_A.values(), module.adapter.lora_B.values()
    # [e, 2, F, r]: B of gate and up; of the down projection A [e, r, F] touches F.
    first = len(shape_of(b)) == 4
    for factor, is_cut in ((a, not first), (b, first)):
        parameter: Any = factor
        parameter.partition_dim = 2 if is_cut else -1
        parameter.partition_stride = 1
        parameter.tensor_model_parallel = True
        parameter.allreduce = weight.allreduce
        # Counted once in the gradient norm though every expert-tensor rank holds it.
        parameter.shared = not is_cut and topology.groups.expt_tp.rank() > 0


def _require_gradient(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """Let a frozen embedding's output have a gradient; a forward hook."""
    # A leaf only while the embedding is frozen and nothing was added to it.
    return output.requires_grad_() if torch.is_grad_enabled() and output.is_leaf else output


@torch.no_grad()
def draw_adapters(chunk: Any, seed: int, topology: Topology) -> None:
    """Draw new adapters: A uniform in +-1 / sqrt(in), B zero; see `apply_lora`."""
    for name, parameter in canonical_parameters(chunk):
        if not is_adapter(name):
            continue
        with written(parameter):
            # B zero: a new adapter changes nothing.
            if ".lora_B." in name:
                parameter.zero_()
                continue
            shape = full_shape(name, parameter, topology)
            uniform = torch.rand(shape, generator=generator_of(name, seed))
            full = (uniform * 2 - 1) / math.sqrt(shape[-1])
            parameter.copy_(cut(name, full, parameter, topology))


def adapted_modules(chunks: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Yield the layers of this rank that have an adapter, by canonical name."""
    for chunk in chunks:
        for name, module in chunk.named_modules():
            if type(module) in ADAPTED.values():
                yield canonical_name(name, chunk), module


@torch.no_grad()
def merge(chunks: Iterable[Any]) -> None:
    """Add every adapter to its layer's weight, shard by shard, and take it away; sums in fp32."""
    # A list: classes change on the way.
    for _, module in list(adapted_modules(chunks)):
        weight = module.weight
        delta = module.adapter.delta(getattr(module, "heads", 1))
        merged = weight.float() + delta.view(weight.shape)
        weight.copy_(merged.to(weight.dtype))
        del module.adapter
        module.__class__ = type(module).__bases__[0]
