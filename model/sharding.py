"""How a parameter's full tensor is cut over the ranks, and random weights that no layout changes.

A parameter has one canonical name in every layout: layers count over all pipeline stages, a tied output matrix is the
embedding, and the experts of a layer are one tensor.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visionloom.model.config import ModelConfig
from visionloom.model.trainable import group_of
from visionloom.parallel.topology import Topology

GATED = "mlp.linear_fc1.weight"
"""Gate and up projection lie one above the other: each rank holds its share of both."""
EXPERTS = ".mlp.experts."
LAYERS = "language_model.decoder.layers."
EMBEDDING = "language_model.embedding.word_embeddings.weight"
OUTPUT = "language_model.output_layer.weight"


@dataclass(frozen=True)
class Cut:
    """One axis of ranks that a parameter is cut over."""

    dim: int
    rank: int
    size: int
    halves: bool = False
    """Whether the two halves along the dim are cut each for itself."""

    def take(self, full: Tensor) -> Tensor:
        """This rank's part."""
        parts = full.chunk(2, self.dim) if self.halves else (full,)
        taken = [part.chunk(self.size, self.dim)[self.rank] for part in parts]
        return taken[0] if len(taken) == 1 else torch.cat(taken, self.dim)


def cuts(name: str, parameter: Tensor, topology: Topology) -> list[Cut]:
    """The axes that a parameter (by its canonical name) is cut over; empty if each rank holds all of it."""
    if EXPERTS in name:
        groups = topology.groups
        dim: int = parameter.partition_dim  # type: ignore[attr-defined]
        experts = Cut(0, groups.ep.rank(), groups.ep.size())
        # One factor of an adapter is on every expert-tensor rank.
        return (
            [experts, Cut(dim, groups.expt_tp.rank(), groups.expt_tp.size())]
            if dim >= 0
            else [experts]
        )
    if not getattr(parameter, "tensor_model_parallel", False):
        return []
    gated = name.startswith("language_model.") and name.endswith(GATED)
    return [Cut(parameter.partition_dim, topology.tensor_rank, topology.config.tensor, gated)]  # type: ignore[attr-defined]


def cut(name: str, full: Tensor, parameter: Tensor, topology: Topology) -> Tensor:
    """The part of a full tensor that this rank holds of `parameter`."""
    for each in cuts(name, parameter, topology):
        full = each.take(full)
    return full


def full_shape(name: str, parameter: Tensor, topology: Topology) -> list[int]:
    """Shape of a parameter before it was cut."""
    shape = list(parameter.shape)
    for each in cuts(name, parameter, topology):
        shape[each.dim] *= each.size
    return shape


def canonical_parameters(model: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of a Qwen3VL, or of one pipeline chunk of it, by their canonical names."""
    for name, parameter in model.named_parameters():
        tied = name == OUTPUT and model.share_embeddings_and_output_weights
        yield EMBEDDING if tied else canonical_name(name, model), parameter


def canonical_name(name: str, model: Any) -> str:
    """The name of a parameter or module of a chunk with layers counted over all pipeline stages."""
    layer, dot, rest = name.removeprefix(LAYERS).partition(".")
    if not name.startswith(LAYERS) or not layer:
        return name
    return (
        f"{LAYERS}{int(layer) + model.language_model.decoder.layers[0].layer_number - 1}{dot}{rest}"
    )


@torch.no_grad()
def draw_weights(
    model: nn.Module,
    config: ModelConfig,
    seed: int,
    topology: Topology,
    groups: set[str] | None = None,
) -> None:
    """Draw random weights: normal with the configuration's deviation, norms one, biases zero.

    Every parameter has a generator of its own, seeded by its canonical name: the same weights in every layout.

    Args:
        model: a Qwen3VL, or a chunk of it.
        config: gives the deviations.
        seed: of the run.
        topology: says which part is this rank's.
        groups: parameter groups to draw; None: all.
    """
    for name, parameter in canonical_parameters(model):
        if groups is not None and group_of(name) not in groups:
            continue
        if parameter.dim() < 2:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        deviation = (config.vision if name.startswith("visual.") else config.text).initializer_range
        generator = torch.Generator().manual_seed(
            (seed * 1_000_003 + zlib.crc32(name.encode())) % 2**63
        )
        full = torch.randn(full_shape(name, parameter, topology), generator=generator) * deviation
        parameter.copy_(cut(name, full, parameter, topology))
