"""The matrices that Muon updates: which parameters they are, how a rank's parameter is made of them, and which ranks hold what.

Megatron-core joins queries, keys and values in one parameter, gate and up projection in another, and all experts of a rank in a
third. Tensor ranks cut these, and the distributed optimizer cuts the flattened parameters once more over the data ranks, anywhere.
A whole parameter is what all ranks of a pipeline stage hold of one together: its whole matrices.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from visionloom.model.config import ModelConfig
from visionloom.model.sharding import EXPERTS, GATED
from visionloom.parallel.topology import Topology

LAYERS: Final = (
    "language_model.decoder.layers.",
    "visual.blocks.",
    "visual.merger.",
    "visual.deepstack_merger_list.",
)
ROWS, COLUMNS = 1, 2
"""Dims of a batch of matrices."""


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Return whether Muon updates a parameter, by its name in the model: linear layers between hidden states.

    AdamW updates what is no map from one hidden state to another: embeddings, output matrix, position table and patch embedding,
    whose inputs are tokens, places and pixels; and routers, whose rows are scores of experts, each on its own.
    """
    return parameter.dim() > 1 and name.startswith(LAYERS) and ".router." not in name


@dataclass(frozen=True)
class Fusion:
    """How a parameter on a rank is made of parts of matrices."""

    batch: int
    """Experts, each with its own matrices; 1 without."""
    repeats: int
    """Times that rows of all matrices alternate: key/value heads of the joined queries, keys and values, else 1."""
    rows: tuple[int, ...]
    """Rows of each matrix in one repeat."""
    columns: int
    cut_dim: int
    """Dim of the matrices that tensor ranks cut: ROWS or COLUMNS."""

    def join(self, parts: list[Tensor]) -> list[Tensor]:
        """Return the whole matrices, [batch, rows, columns] each, from the flattened parameter [n] of each tensor rank."""
        by_rank = []
        for part in parts:
            shaped = part.view(self.batch, self.repeats, -1, self.columns)
            blocks = shaped.split(self.rows, dim=2)
            by_rank.append([block.flatten(1, 2) for block in blocks])
        if len(parts) == 1:
            return by_rank[0]
        return [torch.cat(blocks, self.cut_dim) for blocks in zip(*by_rank, strict=True)]

    def part(self, matrices: list[Tensor], ranks: int) -> list[Tensor]:
        """Return the flattened parameter [n] of each of the tensor ranks: the inverse of `join`."""
        by_matrix = [matrix.chunk(ranks, self.cut_dim) for matrix in matrices]
        parts = []
        for pieces in zip(*by_matrix, strict=True):
            blocks = [piece.unflatten(1, (self.repeats, -1)) for piece in pieces]
            parts.append(torch.cat(blocks, dim=2).flatten())
        return parts


def fusion_of(name: str, parameter: Any, model: ModelConfig) -> Fusion:
    """Return how a parameter, by its name in the model, is made of matrices."""
    columns = parameter.shape[-1]
    batch = len(parameter) if EXPERTS in name else 1
    count = parameter.numel() // (batch * columns)
    rows: tuple[int, ...] = (count,)
    if name.endswith("attn.qkv.weight"):
        rows = (count // 3,) * 3
    elif name.endswith("linear_qkv.weight"):
        text = model.text
        # The queries of a key/value head, its keys and its values follow each other.
        rows = (text.heads // text.kv_heads * text.head_dim, text.head_dim, text.head_dim)
    elif name.startswith("language_model.") and (
        name.endswith(GATED) or "experts.linear_fc1" in name
    ):
        rows = (count // 2,) * 2

    cut = getattr(parameter, "partition_dim", 0)
    is_last = cut == parameter.dim() - 1
    return Fusion(batch, count // sum(rows), rows, columns, COLUMNS if is_last else ROWS)


@dataclass(frozen=True)
class Holder:
    """A rank whose optimizer has a stretch of a whole parameter."""

    rank: int
    """Its place in the group of the stage."""
    part: int
    """Which of the parts that tensor ranks cut the stretch is of."""
    begin: int
    """First number, in the flattened parameter."""
    end: int

    @property
    def size(self) -> int:
        """Return the count of numbers."""
        return self.end - self.begin


@dataclass(frozen=True)
class WholeParameter:
    """A parameter as the ranks of a stage hold it together."""

    fusion: Fusion
    parts: int
    """Ranks that cut its matrices."""
    senders: tuple[Holder, ...]
    """Holders of all its numbers, each once, in the order of their ranks."""
    holders: tuple[Holder, ...]
    """All holders, in the order of their ranks: more than the senders where tensor ranks have copies."""
    shard: Tensor | None
    """This rank's stretch, which its optimizer updates, fp32 [n]; None without."""

    @property
    def size(self) -> int:
        """Return the numbers of its matrices."""
        return sum(holder.size for holder in self.senders)


def whole_parameters(
    inner: Any, names: dict[Any, str], topology: Topology, model: ModelConfig
) -> list[WholeParameter]:
    """Return the whole parameters of one of Megatron's distributed optimizers, the same on all ranks of a stage, the largest first.

    Args:
        inner: the optimizer.
        names: of the model's parameters on this rank.
        topology: of the model: the places of ranks follow from it, so they need not ask each other.
        model: says how parameters are fused.
    """
    wholes: list[WholeParameter] = []
    for buffer in inner.buffers:
        for parameter in buffer.param_index_map:
            name = names[parameter]
            if is_matrix(name, parameter):
                fusion = fusion_of(name, parameter, model)
                shard = shard_of(inner, parameter)
                for holders, is_own in holders_of(buffer, parameter, name, topology):
                    own = shard if is_own else None
                    wholes.append(whole_parameter(fusion, holders, own, len(wholes)))
    # A stable order: those of one size stay as all ranks have them.
    return sorted(wholes, key=lambda whole: -whole.size)


def whole_parameter(
    fusion: Fusion, holders: list[Holder], shard: Tensor | None, number: int
) -> WholeParameter:
    """Return a whole parameter; of copies of a part, its `number` chooses which one is sent."""
    copies: dict[tuple[int, int], list[Holder]] = {}
    for holder in holders:
        copies.setdefault((holder.part, holder.begin), []).append(holder)
    senders = [same[number % len(same)] for same in copies.values()]
    parts = 1 + max(holder.part for holder in holders)
    return WholeParameter(fusion, parts, tuple(senders), tuple(holders), shard)


def holders_of(
    buffer: Any, parameter: Any, name: str, topology: Topology
) -> Iterator[tuple[list[Holder], bool]]:
    """Yield the holders of a parameter in the order of their ranks, and whether they are those of this rank's experts.

    A parameter of experts has other numbers on each expert rank: it is as many whole parameters.
    """
    tensor, experts, own = topology.config.tensor, 1, 0
    is_cut = getattr(parameter, "tensor_model_parallel", False)
    if EXPERTS in name:
        groups, is_cut = topology.groups, True
        tensor, experts, own = groups.expt_tp.size(), groups.ep.size(), groups.ep.rank()
    for expert in range(experts):
        holders = []
        for data, begin, end in stretches_of(buffer, parameter):
            # Megatron-core counts ranks of a stage by tensor rank, then expert rank, then data rank.
            first = tensor * (expert + experts * data)
            for place in range(tensor):
                holders.append(Holder(first + place, place if is_cut else 0, begin, end))
        yield holders, expert == own


def stretches_of(buffer: Any, parameter: Any) -> Iterator[tuple[int, int, int]]:
    """Yield the data ranks that update a part of a parameter, and where it begins and ends in the flattened parameter."""
    first, last, number = buffer.param_index_map[parameter]
    bucket = buffer.buckets[number]
    ranks = buffer.data_parallel_group.size()
    size = bucket.grad_data.numel() // ranks
    for rank in range(ranks):
        # Each has an equal share of the bucket.
        begin = max(first, bucket.offset + rank * size)
        end = min(last, bucket.offset + (rank + 1) * size)
        if begin < end:
            yield rank, begin - first, end - first


def shard_of(inner: Any, parameter: Any) -> Tensor | None:
    """Return the fp32 numbers of a parameter that this rank updates; None if it updates none."""
    if parameter not in inner.model_param_group_index_map:
        return None
    group, place = inner.model_param_group_index_map[parameter]
    shard: Tensor = inner.optimizer.param_groups[group]["params"][place]
    return shard
