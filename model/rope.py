"""Compute rotary position embeddings: interleaved MRoPE of three positions for the language model, of two for the tower.

Angles are made in fp32 whatever the model's dtype: at position 262,144 a bf16 product is off by more than a full turn.
A rotation is fp32 [tokens or patches, D]: cosines of D / 2 angles, then their sines. It is made once a micro-batch.
Shapes: T tokens, N patches, D head dim.
"""

import torch
from torch import Tensor

from visionloom.parallel.device import to_device


def inverse_frequencies(dim: int, theta: float) -> Tensor:
    """Return rotary frequencies theta^(-2i/dim), fp32 [dim / 2]."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    return 1.0 / theta**exponents


def _rotation(angles: Tensor) -> Tensor:
    """Return cosines and sines [..., D] of angles [..., D / 2]."""
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def mrope_rotation(position_ids: Tensor, frequencies: Tensor, section: list[int]) -> Tensor:
    """Return the rotation of interleaved MRoPE, fp32 [T, D].

    Frequency slot i turns with the height position where i % 3 == 1 and i < 3 * section[1], with the width position where
    i % 3 == 2 and i < 3 * section[2], else with the time position.
    Source: Qwen3-VL report section 2.2; reference implementation: transformers' Qwen3VLTextRotaryEmbedding.

    Args:
        position_ids: time, height and width positions, integer [3, T].
        frequencies: fp32 [D / 2].
        section: slots of time, height and width.
    """
    # [3, T, D / 2]
    angles = position_ids.to(torch.float32).unsqueeze(-1) * frequencies
    mixed = angles[0].clone()
    for which in (1, 2):
        slots = slice(which, 3 * section[which], 3)
        mixed[:, slots] = angles[which, :, slots]
    return _rotation(mixed)


def vision_rotation(rows_columns: Tensor, head_dim: int) -> Tensor:
    """Return the rotation of the vision tower by row and column, fp32 [N, D].

    Reference implementation: transformers' Qwen3VLVisionRotaryEmbedding (theta 10,000, half of the slots for rows).

    Args:
        rows_columns: row and column of each patch in its image, integer [N, 2].
        head_dim: D.
    """
    frequencies = inverse_frequencies(head_dim // 2, 10_000.0)
    frequencies = to_device(frequencies, rows_columns.device)
    by_position = rows_columns.to(torch.float32).unsqueeze(-1) * frequencies
    # [N, D / 2], rows first.
    return _rotation(by_position.flatten(1))
