"""The vision tower: patches of images and video frames in, one feature row for each visual token out.

Plain torch modules, replicated on every rank, with transformers' parameter names (`visual.*`), so published weights need
no conversion beyond the patch embedding's shape. Source: Qwen3-VL report section 2; reference implementation:
transformers' Qwen3VLVisionModel.
Shapes: N patches, n grids, M = N / 4 visual tokens, C tower width, O language width, K DeepStack levels.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from visionloom.model.attention import Segments, attend
from visionloom.model.config import VisionConfig
from visionloom.model.rope import rotate, vision_rotation


@dataclass(frozen=True)
class VisionInput:
    """What the tower needs to know of a batch's patches, worked out on the host."""

    patches: Tensor
    """uint8 [N, 768 or 1536]: one frame, to be shown twice, or the two frames of a temporal patch."""
    rows_columns: Tensor
    """int64 [N, 2]: place of each patch in its image."""
    table_rows: Tensor
    """int64 [4, N]: the four neighbours in the position table."""
    table_weights: Tensor
    """fp32 [4, N]: their bilinear weights."""
    segments: Segments
    """One a frame: the two frames of a temporal patch see each other, other frames of a video do not."""

    @classmethod
    def build(
        cls, patches: Tensor, grid_thw: Tensor, config: VisionConfig, device: torch.device
    ) -> "VisionInput":
        """Positions and segments for grids of (temporal, height, width) patches, int [n, 3] on the host."""
        grids = grid_thw.tolist()
        places = [
            frame_places(h, w, config.position_table, config.spatial_merge_size)
            for _, h, w in grids
        ]
        repeats = [t for t, _, _ in grids]
        tiled = [
            np.concatenate(
                [np.tile(p[i], (1, t)) for p, t in zip(places, repeats, strict=True)], axis=1
            )
            for i in range(3)
        ]
        lengths = np.concatenate([np.full(t, h * w) for t, h, w in grids])
        bounds = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))
        rows_columns, table_rows, table_weights = (
            torch.from_numpy(x).to(device, non_blocking=True) for x in tiled
        )
        moved = patches.to(device, non_blocking=True)
        return cls(moved, rows_columns.T, table_rows, table_weights, Segments.build(bounds, device))


@lru_cache(maxsize=4096)
def frame_places(
    height: int, width: int, side: int, merge: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the patches of one height x width frame lie, in merge-block order (block row, block column, row, column).

    Returns:
        rows and columns int64 [2, h w]; the four nearest rows of the side x side position table int64 [4, h w] and their
        bilinear weights fp32 [4, h w], corners aligned (as F.interpolate with align_corners=True).
    """
    places = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    block = (height // merge, merge, width // merge, merge)
    row, column = (x.reshape(block).transpose(0, 2, 1, 3).reshape(-1) for x in places)
    down, right = (
        np.linspace(0, side - 1, n, dtype=np.float32)[x]
        for n, x in ((height, row), (width, column))
    )
    top, left = down.astype(np.int64), right.astype(np.int64)
    bottom, end = np.minimum(top + 1, side - 1), np.minimum(left + 1, side - 1)
    down, right = down - top, right - left
    neighbours = np.stack(
        [top * side + left, top * side + end, bottom * side + left, bottom * side + end]
    )
    weights = np.stack(
        [(1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right]
    )
    return np.stack([row, column]), neighbours, weights.astype(np.float32)


class PatchEmbedding(nn.Module):
    """A patch's pixels to the tower's width: a Linear, which a convolution with stride = kernel is."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.channels = config.channels
        self.proj = nn.Linear(config.patch_width, config.hidden_size)

    def forward(self, patches: Tensor) -> Tensor:
        """uint8 [N, 768 or 1536] -> [N, C]; pixels become x / 127.5 - 1 in fp32 first."""
        pixels = patches.to(torch.float32) / 127.5 - 1.0
        if pixels.shape[1] != self.proj.in_features:
            pixels = pixels.view(len(pixels), self.channels, 1, -1)
            pixels = pixels.expand(
                -1, -1, self.proj.in_features // (self.channels * pixels.shape[-1]), -1
            ).flatten(1)
        return self.proj(pixels.to(self.proj.weight.dtype))


class VisionAttention(nn.Module):
    """Bidirectional attention inside each frame."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], segments: Segments) -> Tensor:
        """[N, C] -> [N, C]."""
        query, key, value = self.qkv(x).unflatten(1, (3, self.heads, -1)).unbind(1)
        attended = attend(
            rotate(query, *rotation), rotate(key, *rotation), value, segments, causal=False
        )
        return self.proj(attended.flatten(1))


class VisionMLP(nn.Module):
    """Two layers with tanh-approximated GELU between."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(config.hidden_size, config.ffn_hidden_size)
        self.linear_fc2 = nn.Linear(config.ffn_hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C] -> [N, C]."""
        return self.linear_fc2(F.gelu(self.linear_fc1(x), approximate="tanh"))


class VisionBlock(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.norm_epsilon)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.norm_epsilon)
        self.attn = VisionAttention(config)
        self.mlp = VisionMLP(config)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], segments: Segments) -> Tensor:
        """[N, C] -> [N, C]."""
        x = x + self.attn(self.norm1(x), rotation, segments)
        return x + self.mlp(self.norm2(x))


class Merger(nn.Module):
    """Four neighbouring patches to one visual token of the language model's width.

    The main merger normalises each patch, a DeepStack merger the four of them together; both use the exact (erf) GELU,
    not the tower's tanh approximation.
    """

    def __init__(self, config: VisionConfig, output_size: int, norm_after_merge: bool) -> None:
        super().__init__()
        self.width = config.hidden_size * config.spatial_merge_size**2
        self.norm_after_merge = norm_after_merge
        self.norm = nn.LayerNorm(
            self.width if norm_after_merge else config.hidden_size, eps=config.norm_epsilon
        )
        self.linear_fc1 = nn.Linear(self.width, self.width)
        self.linear_fc2 = nn.Linear(self.width, output_size)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C] -> [M, O]."""
        merged = (
            self.norm(x.view(-1, self.width))
            if self.norm_after_merge
            else self.norm(x).view(-1, self.width)
        )
        return self.linear_fc2(F.gelu(self.linear_fc1(merged)))


class VisionTower(nn.Module):
    """Patches to features: the main merger's and, side by side, those of the DeepStack mergers."""

    def __init__(self, config: VisionConfig, output_size: int, recompute: bool = False) -> None:
        """`recompute`: make the blocks' activations again in the backward pass instead of keeping them."""
        super().__init__()
        self.config = config
        self.recompute = recompute
        self.patch_embed = PatchEmbedding(config)
        self.pos_embed = nn.Embedding(config.position_table**2, config.hidden_size)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = Merger(config, output_size, norm_after_merge=False)
        self.deepstack_merger_list = nn.ModuleList(
            Merger(config, output_size, norm_after_merge=True) for _ in config.deepstack_layers
        )

    def forward(self, vision: VisionInput) -> Tensor:
        """Features [M, (1 + K) * O]: for the embeddings, then for the DeepStack levels in order of language layers."""
        x = self.patch_embed(vision.patches)
        positions = self.pos_embed.weight[
            vision.table_rows
        ].float() * vision.table_weights.unsqueeze(-1)
        x = x + positions.sum(0).to(x.dtype)
        rotation = vision_rotation(
            vision.rows_columns, self.config.hidden_size // self.config.heads
        )
        levels: dict[int, Tensor] = {}
        for index, block in enumerate(self.blocks):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, rotation, vision.segments, use_reentrant=False)
            else:
                x = block(x, rotation, vision.segments)
            if index in self.config.deepstack_layers:
                level = self.config.deepstack_layers.index(index)
                levels[level] = self.deepstack_merger_list[level](x)
        return torch.cat([self.merger(x), *(levels[k] for k in sorted(levels))], dim=1)
