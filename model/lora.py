"""LoRA: low-rank adapters beside the frozen linear layers, in any layout.

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
import zlib
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

from visionloom.model.experts import Stack, grouped_linear
from visionloom.model.lora_config import LinearLayer, LoraConfig, adapted_layers
from visionloom.model.sharding import canonical_name, canonical_parameters, cut, full_shape
from visionloom.model.trainable import is_adapter
from visionloom.parallel.topology import Topology


class Adapter(nn.Module):
    """Adds scaling * B A x to a layer's output, part by part."""

    def __init__(
        self,
        layer: LinearLayer,
        lora: LoraConfig,
        shape: dict[str, tuple[int, ...]],
        inputs: int,
        like: Tensor,
    ):
        """`shape` and `inputs`: what this rank holds of B (without the rank's dim) and A."""
        super().__init__()
        experts = tuple(like.shape[:1]) if layer.experts else ()
        # ParameterDict would sort a dict by its keys: queries come before keys.
        self.lora_A = nn.ParameterDict(
            [(part, _empty(like, *experts, lora.rank, inputs)) for part in shape]
        )
        self.lora_B = nn.ParameterDict(
            [(part, _empty(like, *experts, *rows, lora.rank)) for part, rows in shape.items()]
        )
        self.scaling, self.dropout = lora.scaling, lora.dropout

    def down(self, x: Tensor, own_mask: bool) -> Tensor:
        """A x of all parts, [..., in] -> [..., parts * r]; `own_mask`: ranks that share the layer see different inputs."""
        if self.dropout and self.training:
            with get_cuda_rng_tracker().fork() if own_mask else nullcontext():
                x = F.dropout(x, self.dropout)
        return F.linear(x, torch.cat(list(self.lora_A.values())))

    def up(self, inner: Tensor, heads: int = 1) -> Tensor:
        """B of each part times its r columns, [..., parts * r] -> [..., out]; the parts alternate `heads` times."""
        parts = zip(inner.chunk(len(self.lora_B), dim=-1), self.lora_B.values(), strict=True)
        outputs = [F.linear(x, b) for x, b in parts]
        if len(outputs) > 1:
            outputs = [
                torch.cat([y.unflatten(-1, (heads, -1)) for y in outputs], dim=-1).flatten(-2)
            ]
        return outputs[0] * self.scaling

    def delta(self, heads: int = 1) -> Tensor:
        """What the adapter adds to this rank's weight, fp32 in the weight's own order of rows."""
        return (
            low_rank_product(list(self.lora_A.values()), list(self.lora_B.values()), heads)
            * self.scaling
        )


def _empty(like: Tensor, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=like.dtype, device=like.device))


def low_rank_product(a: list[Tensor], b: list[Tensor], heads: int) -> Tensor:
    """B A of all parts, fp32 [out, in] or [experts, out, in], the rows of the parts alternating `heads` times."""
    rows = [y.flatten(1, -2) if y.dim() > 2 else y for y in b]
    parts = [y.float() @ x.float() for y, x in zip(rows, a, strict=True)]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.unflatten(0, (heads, -1)) for part in parts], dim=1).flatten(0, 1)


class AdaptedLinear(nn.Linear):
    """A linear layer that every rank holds whole, with an adapter."""

    adapter: Adapter

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return super().forward(x) + self.adapter.up(self.adapter.down(x, own_mask=False))


class AdaptedColumn(ColumnParallelLinear):  # type: ignore[misc]
    """A linear layer whose outputs are cut over the tensor ranks, with an adapter."""

    adapter: Adapter
    heads: int
    """How often the parts alternate in this rank's rows: key/value heads of linear_qkv."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """[t, 1, in] -> [t * tensor under sequence parallelism, 1, out / tensor], and no bias."""
        output, bias = super().forward(x, *args, **kwargs)
        inner = self.adapter.down(x, own_mask=self.sequence_parallel)
        if self.sequence_parallel:
            inner = gather_from_sequence_parallel_region(
                inner, tensor_parallel_output_grad=True, group=self.tp_group
            )
        else:
            inner = copy_to_tensor_model_parallel_region(inner, group=self.tp_group)
        return output + self.adapter.up(inner, self.heads), bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """The layer's own tensors and the adapter's."""
        own: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return own | _sharded_adapter(self, prefix, sharded_offsets, metadata)


class AdaptedRow(RowParallelLinear):  # type: ignore[misc]
    """A linear layer whose inputs are cut over the tensor ranks, with an adapter."""

    adapter: Adapter

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[t, 1, in / tensor] -> [t, 1, out] summed over the ranks (a share of the tokens of sequence parallelism), and no bias."""
        output, bias = super().forward(x)
        inner = self.adapter.down(x, own_mask=True)
        if self.sequence_parallel:
            inner = reduce_scatter_to_sequence_parallel_region(inner, group=self.tp_group)
        else:
            inner = reduce_from_tensor_model_parallel_region(inner, group=self.tp_group)
        return output + self.adapter.up(inner), bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """The layer's own tensors and the adapter's."""
        own: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return own | _sharded_adapter(self, prefix, sharded_offsets, metadata)


class AdaptedStack(Stack):
    """One matrix of all experts of this rank, with an adapter an expert."""

    adapter: Adapter
    expert_tensor_group: Any

    def forward(self, tokens: Tensor, ends: Tensor) -> Tensor:
        """[m, in] sorted by expert -> [m, out]."""
        (a,), (b,) = self.adapter.lora_A.values(), self.adapter.lora_B.values()
        a, b = (self._summed(factor) for factor in (a, b))
        added = grouped_linear(grouped_linear(tokens, a, ends), b.flatten(1, -2), ends)
        return super().forward(tokens, ends) + added * self.adapter.scaling

    def _summed(self, factor: Any) -> Tensor:
        """The factor that is not cut has a part of its gradient on every expert-tensor rank; Megatron-core would not sum it."""
        if factor.partition_dim >= 0:
            return factor
        copied: Tensor = copy_to_tensor_model_parallel_region(
            factor, group=self.expert_tensor_group
        )
        return copied


ADAPTED: dict[type, type] = {
    nn.Linear: AdaptedLinear,
    ColumnParallelLinear: AdaptedColumn,
    RowParallelLinear: AdaptedRow,
    Stack: AdaptedStack,
}
"""The class that a layer becomes, by the class that it has."""


def _sharded_adapter(module: Any, prefix: str, offsets: Any, metadata: Any) -> dict[str, Any]:
    state = module.adapter.state_dict(prefix="adapter.", keep_vars=True)
    axes = {
        name: weight.partition_dim
        for name, weight in state.items()
        if getattr(weight, "tensor_model_parallel", False)
    }
    groups = dict(tp_group=module.tp_group, dp_cp_group=metadata["dp_cp_group"])
    found: dict[str, Any] = make_sharded_tensors_for_checkpoint(
        state, prefix, axes, offsets, **groups
    )
    return found


def apply_lora(chunks: Iterable[Any], lora: LoraConfig, topology: Topology, seed: int) -> None:
    """Give the layers that `lora` chooses adapters that change nothing yet; weights are there, wrapping comes after.

    Args:
        chunks: the Qwen3VL chunks of this rank.
        lora: rank above 0.
        topology: says which part of each is this rank's.
        seed: of the run; A is drawn by canonical name, the same in every layout, uniform as in peft; B is zero.
    """
    for chunk in chunks:
        chunk.lora = lora
        layers = {layer.name: layer for layer in adapted_layers(chunk.model_config, lora)}
        for name, module in list(chunk.named_modules()):
            if layer := layers.get(canonical_name(name, chunk)):
                _adapt(module, layer, lora, chunk, topology)
        draw_adapters(chunk, seed, topology)
        if topology.config.recompute != "none" or topology.config.pipeline > 1:
            _keep_graph(chunk)


def _adapt(
    module: Any, layer: LinearLayer, lora: LoraConfig, chunk: Any, topology: Topology
) -> None:
    tensor = topology.config.tensor
    weight = module.weight
    cut_out, cut_in = (
        isinstance(module, ColumnParallelLinear),
        isinstance(module, RowParallelLinear),
    )
    shape: dict[str, tuple[int, ...]]
    if isinstance(module, Stack):
        shape = {part: tuple(weight.shape[1:-1]) for part in layer.parts}
    else:
        shape = {
            part: (width // (tensor if cut_out else 1),) for part, width in layer.parts.items()
        }
    module.adapter = Adapter(layer, lora, shape, weight.shape[-1], weight)
    module.__class__ = ADAPTED[type(module)]
    if isinstance(module, AdaptedStack):
        module.expert_tensor_group = topology.groups.expt_tp
        _mark_experts(module, topology)
        return
    if isinstance(module, AdaptedColumn):
        module.heads = chunk.model_config.text.kv_heads // tensor if "q_proj" in layer.parts else 1
    for factors, is_cut, dim in (
        (module.adapter.lora_A, cut_in, 1),
        (module.adapter.lora_B, cut_out, 0),
    ):
        for parameter in factors.values():
            if is_cut:
                (
                    parameter.tensor_model_parallel,
                    parameter.partition_dim,
                    parameter.partition_stride,
                ) = True, dim, 1
            else:
                parameter.sequence_parallel = topology.config.sequence_parallel


def _mark_experts(module: AdaptedStack, topology: Topology) -> None:
    """The rules of model/experts.py Stack; what is cut along F is the factor that touches it, along dim 2 in both."""
    base: Any = module.weight
    (a,), (b,) = module.adapter.lora_A.values(), module.adapter.lora_B.values()
    first = b.dim() == 4  # [e, 2, F, r]: gate and up
    for parameter, is_cut in ((a, not first), (b, first)):
        told: Any = parameter
        told.partition_dim, told.partition_stride, told.tensor_model_parallel = (
            2 if is_cut else -1,
            1,
            True,
        )
        told.allreduce = base.allreduce
        # Counted once in the gradient norm though every expert-tensor rank holds it.
        told.shared = not is_cut and topology.groups.expt_tp.rank() > 0


def _keep_graph(chunk: Any) -> None:
    """Let the embeddings have a gradient: Megatron-core's recomputation and stages pass none on to layers without such input."""
    if chunk.pre_process:
        chunk.language_model.embedding.register_forward_hook(_require_gradient)


def _require_gradient(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() and output.is_leaf else output


@torch.no_grad()
def draw_adapters(chunk: Any, seed: int, topology: Topology) -> None:
    """New adapters: A uniform in +-1 / sqrt(in), B zero; see `apply_lora`."""
    for name, parameter in canonical_parameters(chunk):
        if not is_adapter(name):
            continue
        if ".lora_B." in name:
            parameter.zero_()
            continue
        shape = full_shape(name, parameter, topology)
        generator = torch.Generator().manual_seed(
            (seed * 1_000_003 + zlib.crc32(name.encode())) % 2**63
        )
        full = (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(shape[-1])
        parameter.copy_(cut(name, full, parameter, topology))


def adapted_modules(chunks: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """The layers of this rank that have an adapter, by canonical name."""
    for chunk in chunks:
        for name, module in chunk.named_modules():
            if type(module) in ADAPTED.values():
                yield canonical_name(name, chunk), module


@torch.no_grad()
def merge(chunks: Iterable[Any]) -> None:
    """Add every adapter to its layer's weight, shard by shard, and take it away; sums in fp32."""
    for _, module in list(adapted_modules(chunks)):
        delta = module.adapter.delta(getattr(module, "heads", 1))
        weight = module.weight
        weight.copy_((weight.float() + delta.view(weight.shape)).to(weight.dtype))
        del module.adapter
        module.__class__ = type(module).__bases__[0]
