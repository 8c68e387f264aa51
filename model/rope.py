"""Compute rotary position embeddings: interleaved MRoPE of three positions for the language model, of two for the tower.

Angles are made in fp32 whatever the model's dtype: at position 262,144 a bf16 product is off by more than a full turn.
Shapes: T tokens, N patches, D head dim.
"""

import torch
from torch import Tensor


def inverse_frequencies(dim: int, theta: float) -> Tensor:
    """Return rotary frequencies theta^(-2i/dim), fp32 [dim / 2]."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    return 1.0 / theta**exponents


def mrope_angles(position_ids: Tensor, frequencies: Tensor, section: list[int]) -> Tensor:
    """Return angles of interleaved MRoPE for Megatron-core's rotary_pos_emb, fp32 [T, 1, 1, D].

    Frequency slot i turns with the height position where i % 3 == 1 and i < 3 * section[1], with the width position where
    i % 3 == 2 and i < 3 * section[2], else with the time position; the D / 2 slots are repeated for the rotate-half form.
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
    return torch.cat((mixed, mixed), dim=-1)[:, None, None, :]


def vision_rotation(rows_columns: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of the vision tower's rotary embedding by row and column, fp32 [N, 1, D] each.

    Reference implementation: transformers' Qwen3VLVisionRotaryEmbedding (theta 10,000, half of the slots for rows).

    Args:
        rows_columns: row and column of each patch in its image, integer [N, 2].
        head_dim: D.
    """
    frequencies = inverse_frequencies(head_dim // 2, 10_000.0)
    frequencies = frequencies.to(rows_columns.device, non_blocking=True)
    by_position = rows_columns.to(torch.float32).unsqueeze(-1) * frequencies
    # [N, D / 2], rows first.
    angles = by_position.flatten(1)
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate [N, heads, D] in fp32 by [N, 1, D] in the rotate-half form and return it in its own dtype."""
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (wide * cosine + turned * sine).to(x.dtype)
