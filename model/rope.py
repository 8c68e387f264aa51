"""Compute rotary position embeddings: interleaved MRoPE of three positions for the language model, of two for the tower.

Angles are made in fp32 whatever the model's dtype: at position 262,144 a bf16 product is off by more than a full turn.
A rotation is fp32 [tokens or patches, D]: cosines of D / 2 angles, then their sines. It is made once a micro-batch.
Shapes: T tokens, N patches, D head dim.
"""

import math

import torch
from torch import Tensor

from visionloom.model.config import TextConfig
from visionloom.parallel.device import to_device


def wavelengths(dim: int, theta: float) -> Tensor:
    """Return positions in which each rotation turns by one radian, theta^(2i/dim), fp32 [dim / 2]."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    return theta**exponents


def inverse_frequencies(dim: int, theta: float) -> Tensor:
    """Return rotary frequencies theta^(-2i/dim), fp32 [dim / 2]."""
    return 1.0 / wavelengths(dim, theta)


def slot_of_turns(turns: float, text: TextConfig) -> float:
    """Return the place among the frequencies of the rotation with so many turns in the positions of training."""
    wavelength = text.rope_scaling.original_positions / (turns * 2 * math.pi)
    return text.head_dim * math.log(wavelength) / (2 * math.log(text.rope_theta))


def text_frequencies(text: TextConfig) -> Tensor:
    """Return the rotary frequencies of the language model, fp32 [D / 2], by YaRN where it is on.

    Slow rotations, of which `original_positions` hold up to `beta_slow` turns, are slower by `factor`; fast ones stay; those
    between are mixed in a straight line. Reference implementation: transformers' _compute_yarn_parameters.
    """
    frequencies = inverse_frequencies(text.head_dim, text.rope_theta)
    # Without it the bits are those of models that never heard of it.
    scaling = text.rope_scaling
    if scaling.factor == 1:
        return frequencies

    first = max(math.floor(slot_of_turns(scaling.beta_fast, text)), 0)
    last = min(math.ceil(slot_of_turns(scaling.beta_slow, text)), text.head_dim - 1)
    slots = torch.arange(len(frequencies), dtype=torch.float32)
    # Slots that are one would divide by zero.
    kept = 1 - ((slots - first) / (last - first or 0.001)).clamp(0, 1)
    # Multiplied before the division, as transformers does, for the same bits.
    slow = 1.0 / (scaling.factor * wavelengths(text.head_dim, text.rope_theta))
    return slow * (1 - kept) + frequencies * kept


def _rotation(angles: Tensor) -> Tensor:
    """Return cosines and sines [..., D] of angles [..., D / 2]."""
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def mrope_rotation(
    position_ids: Tensor, frequencies: Tensor, section: list[int], magnitude: float = 1.0
) -> Tensor:
    """Return the rotation of interleaved MRoPE, fp32 [T, D].

    Frequency slot i turns with the height position where i % 3 == 1 and i < 3 * section[1], with the width position where
    i % 3 == 2 and i < 3 * section[2], else with the time position.
    Source: Qwen3-VL report section 2.2; reference implementation: transformers' Qwen3VLTextRotaryEmbedding.

    Args:
        position_ids: time, height and width positions, integer [3, T].
        frequencies: fp32 [D / 2].
        section: slots of time, height and width.
        magnitude: factor of cosines and sines, 1 without YaRN.
    """
    # [3, T, D / 2]
    angles = position_ids.to(torch.float32).unsqueeze(-1) * frequencies
    mixed = angles[0].clone()
    for which in (1, 2):
        slots = slice(which, 3 * section[which], 3)
        mixed[:, slots] = angles[which, :, slots]
    rotation = _rotation(mixed)
    # A kernel less where it would change nothing.
    return rotation if magnitude == 1 else rotation * magnitude


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
