"""Cut a parameter's full tensor over the ranks, and draw random weights that no layout changes.

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
from visionloom.parallel.divided import written
from visionloom.parallel.topology import Topology

GATED = "mlp.linear_fc1.weight"
"""Gate and up projection in one matrix, gate above up: each rank holds its share of both."""
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
    """The two halves along the dim are cut each for itself."""

    def take(self, full: Tensor) -> Tensor:
        """Return this rank's part of a full tensor; a view of it unless halves are joined."""
        if not self.halves:
            return full.chunk(self.size, self.dim)[self.rank]
        halves = full.chunk(2, self.dim)
        taken = [half.chunk(self.size, self.dim)[self.rank] for half in halves]
        return torch.cat(taken, self.dim)


def cuts(name: str, parameter: Tensor, topology: Topology) -> list[Cut]:
    """Return the axes that a parameter (by its canonical name, any shape) is cut over; empty if each rank holds all of it."""
    if EXPERTS in name:
        groups = topology.groups
        experts = Cut(0, groups.ep.rank(), groups.ep.size())
        dim: int = parameter.partition_dim  # type: ignore[attr-defined]
        # One factor of an adapter is on every expert-tensor rank.
        if dim < 0:
            return [experts]
        return [experts, Cut(dim, groups.expt_tp.rank(), groups.expt_tp.size())]
    if not getattr(parameter, "tensor_model_parallel", False):
        return []
    # The vision tower's linear_fc1 is no gate; it is not cut either.
    gated = name.startswith("language_model.") and name.endswith(GATED)
    return [Cut(parameter.partition_dim, topology.tensor_rank, topology.config.tensor, gated)]  # type: ignore[attr-defined]


def cut(name: str, full: Tensor, parameter: Tensor, topology: Topology) -> Tensor:
    """Return the part of a full tensor (`full_shape`) that this rank holds of `parameter`, in the full tensor's dtype."""
    for each in cuts(name, parameter, topology):
        full = each.take(full)
    return full


def full_shape(name: str, parameter: Tensor, topology: Topology) -> list[int]:
    """Return the shape of a parameter before it was cut."""
    shape = list(parameter.shape)
    for each in cuts(name, parameter, topology):
        shape[each.dim] *= each.size
    return shape


def canonical_parameters(model: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of a Qwen3VL, or of one pipeline chunk of it, by their canonical names."""
    for name, parameter in model.named_parameters():
        tied = name == OUTPUT and model.share_embeddings_and_output_weights
        yield EMBEDDING if tied else canonical_name(name, model), parameter


def canonical_name(name: str, model: Any) -> str:
    """Return the name of a parameter or module of a chunk with layers counted over all pipeline stages."""
    layer, dot, rest = name.removeprefix(LAYERS).partition(".")
    if not name.startswith(LAYERS) or not layer:
        return name
    # Megatron-core counts layers from 1.
    first = model.language_model.decoder.layers[0].layer_number - 1
    return f"{LAYERS}{first + int(layer)}{dot}{rest}"


def generator_of(name: str, seed: int) -> torch.Generator:
    """Return the generator of a parameter (by its canonical name): the same on every rank and in every layout."""
    mixed = seed * 1_000_003 + zlib.crc32(name.encode())
    # torch takes seeds of 64 bits with a sign.
    return torch.Generator().manual_seed(mixed % 2**63)


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
        part = config.vision if name.startswith("visual.") else config.text
        with written(parameter):
            draw_parameter(name, parameter, part.initializer_range, seed, topology)


def draw_parameter(
    name: str, parameter: Tensor, deviation: float, seed: int, topology: Topology
) -> None:
    """Draw one parameter; see `draw_weights`."""
    # Norms and biases.
    if parameter.dim() < 2:
        parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        return
    shape = full_shape(name, parameter, topology)
    # The whole tensor on the host, then this rank's part: no layout changes the numbers.
    full = torch.randn(shape, generator=generator_of(name, seed)) * deviation
    parameter.copy_(cut(name, full, parameter, topology))
