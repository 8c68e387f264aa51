"""How a parameter's full tensor is cut over the tensor-parallel ranks, and random weights that no layout changes."""

import zlib

import torch
from torch import Tensor, nn

from visionloom.model.config import ModelConfig
from visionloom.model.trainable import group_of

GATED = "mlp.linear_fc1.weight"
"""Gate and up projection lie one above the other: each rank holds its share of both."""


def full_shape(parameter: Tensor, tensor_size: int) -> list[int]:
    """Shape of a parameter before it was cut over `tensor_size` ranks."""
    shape = list(parameter.shape)
    if getattr(parameter, "tensor_model_parallel", False):
        shape[parameter.partition_dim] *= tensor_size  # type: ignore[attr-defined]
    return shape


def cut(name: str, full: Tensor, parameter: Tensor, rank: int, size: int) -> Tensor:
    """The part of a full tensor that rank `rank` of `size` holds of `parameter`."""
    if size == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return full
    dim: int = parameter.partition_dim  # type: ignore[attr-defined]
    if name.startswith("language_model.") and name.endswith(GATED):
        return torch.cat([half.chunk(size, dim)[rank] for half in full.chunk(2, dim)], dim)
    return full.chunk(size, dim)[rank]


def join(name: str, parts: list[Tensor], parameter: Tensor) -> Tensor:
    """The full tensor from the parts of all tensor-parallel ranks: the inverse of `cut`."""
    if len(parts) == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return parts[0]
    dim: int = parameter.partition_dim  # type: ignore[attr-defined]
    if name.startswith("language_model.") and name.endswith(GATED):
        halves = zip(*(part.chunk(2, dim) for part in parts), strict=True)
        return torch.cat([piece for half in halves for piece in half], dim)
    return torch.cat(parts, dim)


@torch.no_grad()
def draw_weights(
    model: nn.Module, config: ModelConfig, seed: int, rank: int, size: int, groups: set[str] | None = None
) -> None:
    """Draw random weights: normal with the configuration's deviation, norms one, biases zero.

    Every parameter has a generator of its own, seeded by its name: the same weights in every layout.

    Args:
        model: a Qwen3VL.
        config: gives the deviations.
        seed: of the run.
        rank: of the tensor-parallel group; size: its size.
        groups: parameter groups to draw; None: all.
    """
    for name, parameter in model.named_parameters():
        if groups is not None and group_of(name) not in groups:
            continue
        if parameter.dim() < 2:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        deviation = (config.vision if name.startswith("visual.") else config.text).initializer_range
        generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
        full = torch.randn(full_shape(parameter, size), generator=generator) * deviation
        parameter.copy_(cut(name, full, parameter, rank, size))
