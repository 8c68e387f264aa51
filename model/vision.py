"""The vision tower: patches of images and video frames in, one feature row for each visual token out.

Plain torch modules, replicated on every rank, with transformers' parameter names (`visual.*`), so published weights need
no conversion beyond the patch embedding's shape. Source: Qwen3-VL report section 2; reference implementation:
transformers' Qwen3VLVisionModel.
Shapes: N patches, n grids, M = N / 4 visual tokens, C tower width, O language width, K DeepStack levels.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from visionloom.model.config import VisionConfig
from visionloom.model.kernels.activation import gelu
from visionloom.model.kernels.attention import AttentionResults, Segments, attend
from visionloom.model.kernels.linear import Linear
from visionloom.model.kernels.norm import layer_norm
from visionloom.model.kernels.rotary import rotate_heads
from visionloom.model.rope import vision_rotation
from visionloom.parallel.device import to_device
from visionloom.parallel.parts import MERGER, VISION, in_part

PIECE_PATCHES: Final = 65_536
"""Patches that go through the tower together when it is recomputed, or one frame of more: 524,288 of a pack of 262,144 tokens
would need 50 GiB in the tower of 2B. A GPU is as fast with a piece as with all."""
WHOLE_BLOCKS: Final = ("all_but_attention", "full")
"""Values of parallel.recompute with which whole blocks are made again."""


@dataclass(frozen=True)
class VisionInput:
    """A batch's patches with their positions and segments, computed on the host."""

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
        """Compute positions and segments for grids of (temporal, height, width) patches, int [n, 3] on the host."""
        places: list[FramePlaces] = []
        lengths: list[int] = []
        for frames, height, width in grid_thw.tolist():
            one = frame_places(height, width, config.position_table, config.spatial_merge_size)
            # All frames of a video have the same places: time is not part of the tower's positions.
            places += [one] * frames
            lengths += [height * width] * frames
        bounds = torch.from_numpy(np.cumsum([0, *lengths]))

        def on_device(parts: list[np.ndarray]) -> Tensor:
            return to_device(torch.from_numpy(np.concatenate(parts, axis=1)), device)

        return cls(
            patches=to_device(patches, device),
            rows_columns=on_device([each.rows_columns for each in places]).T,
            table_rows=on_device([each.table_rows for each in places]),
            table_weights=on_device([each.table_weights for each in places]),
            segments=Segments.build(bounds, device),
        )

    def pieces(self) -> Iterator["VisionInput"]:
        """Yield whole frames of at most PIECE_PATCHES patches together, or one frame of more, in their order."""
        bounds = self.segments.bounds_q
        first = 0
        for last in range(1, len(bounds)):
            is_full = last + 1 == len(bounds) or bounds[last + 1] - bounds[first] > PIECE_PATCHES
            if is_full:
                yield self._frames(first, last)
                first = last

    def _frames(self, first: int, last: int) -> "VisionInput":
        """Return the frames from number `first` to before `last`: views of the tensors."""
        bounds = torch.tensor(self.segments.bounds_q[first : last + 1])
        start, end = int(bounds[0]), int(bounds[-1])
        return VisionInput(
            patches=self.patches[start:end],
            rows_columns=self.rows_columns[start:end],
            table_rows=self.table_rows[:, start:end],
            table_weights=self.table_weights[:, start:end],
            segments=Segments.build(bounds - start, self.patches.device),
        )


@dataclass(frozen=True)
class FramePlaces:
    """Places of the h w patches of one frame; see VisionInput."""

    rows_columns: np.ndarray
    """int64 [2, h w]."""
    table_rows: np.ndarray
    """int64 [4, h w]."""
    table_weights: np.ndarray
    """fp32 [4, h w]."""


# Frames of one size share their arrays, over batches too.
@lru_cache(maxsize=4096)
def frame_places(height: int, width: int, side: int, merge: int) -> FramePlaces:
    """Return the places of one frame's patches, in merge-block order (block row, block column, row, column).

    Args:
        height: of the frame in patches.
        width: of the frame in patches.
        side: of the position table, whose corners are the frame's (as F.interpolate with align_corners=True).
        merge: side in patches of the square that becomes one visual token.
    """
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    blocks = (height // merge, merge, width // merge, merge)
    row = rows.reshape(blocks).transpose(0, 2, 1, 3).reshape(-1)
    column = columns.reshape(blocks).transpose(0, 2, 1, 3).reshape(-1)

    # Each patch is at a fraction between two rows and two columns of the table.
    down = np.linspace(0, side - 1, height, dtype=np.float32)[row]
    right = np.linspace(0, side - 1, width, dtype=np.float32)[column]
    top, left = down.astype(np.int64), right.astype(np.int64)
    bottom = np.minimum(top + 1, side - 1)
    end = np.minimum(left + 1, side - 1)
    neighbours = [
        top * side + left,
        top * side + end,
        bottom * side + left,
        bottom * side + end,
    ]

    down, right = down - top, right - left
    up, before = 1 - down, 1 - right
    weights = [up * before, up * right, down * before, down * right]
    return FramePlaces(
        rows_columns=np.stack([row, column]),
        table_rows=np.stack(neighbours),
        table_weights=np.stack(weights).astype(np.float32),
    )


class PatchEmbedding(nn.Module):
    """The map from a patch's pixels to the tower's width: a Linear, which a convolution with stride = kernel is."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.channels = config.channels
        self.proj = Linear(config.patch_width, config.hidden_size)

    def forward(self, patches: Tensor) -> Tensor:
        """Embed uint8 [N, 768 or 1536] to [N, C]; pixels become x / 127.5 - 1 in fp32 first."""
        pixels = patches.to(torch.float32) / 127.5 - 1.0
        if pixels.shape[1] != self.proj.in_features:
            # One frame came over: it is shown as often as a patch has frames.
            frames = self.proj.in_features // pixels.shape[1]
            pixels = pixels.view(len(pixels), self.channels, 1, -1)
            pixels = pixels.expand(-1, -1, frames, -1).flatten(1)
        return self.proj(pixels.to(self.proj.weight.dtype))


class PositionTable(nn.Embedding):
    """The tower's learned positions, of a square of places."""

    def forward(self, rows: Tensor, weights: Tensor) -> Tensor:  # type: ignore[override]
        """Return positions fp32 [N, C]: the sum of four rows each, int64 [4, N], by their weights, fp32 [4, N]."""
        # The weighted sum is in fp32, whatever the table's dtype.
        neighbours = self.weight[rows].float()
        return (neighbours * weights.unsqueeze(-1)).sum(0)


class LayerNorm(nn.LayerNorm):
    """torch's, in kernels of our own."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., H] over its last dim."""
        return layer_norm(x, self.weight, self.bias, self.eps)


class VisionAttention(nn.Module):
    """Bidirectional attention inside each frame."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        x: Tensor,
        rotation: Tensor,
        segments: Segments,
    ) -> Tensor:
        """Attend from [N, C] to [N, C]; `rotation`: of each patch, fp32 [N, head dim]."""
        joined = self.qkv(x).unflatten(1, (1, 3 * self.heads, -1))
        query, key, value = rotate_heads(joined, rotation, keys=self.heads, weights=(), epsilon=0.0)
        attended = attend(query, key, value, segments, causal=False)
        return self.proj(attended.flatten(1))


class VisionMLP(nn.Module):
    """Two layers with tanh-approximated GELU between."""

    def __init__(self, config: VisionConfig, made_again: bool) -> None:
        """Build an MLP; `made_again`: it runs again in the backward pass."""
        super().__init__()
        self.linear_fc1 = Linear(config.hidden_size, config.ffn_hidden_size)
        # Recomputation stops where all is there that was kept: before the last product of torch's layer, after that of ours.
        last = nn.Linear if made_again else Linear
        self.linear_fc2 = last(config.ffn_hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C] to [N, C]."""
        return self.linear_fc2(gelu(self.linear_fc1(x), "tanh"))


class VisionBlock(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: VisionConfig, recompute: str) -> None:
        """Build a block; `recompute` as parallel.recompute."""
        super().__init__()
        self.recompute = recompute
        self.norm1 = LayerNorm(config.hidden_size, eps=config.norm_epsilon)
        self.norm2 = LayerNorm(config.hidden_size, eps=config.norm_epsilon)
        self.attn = VisionAttention(config)
        self.mlp = VisionMLP(config, made_again=recompute in ("mlp", *WHOLE_BLOCKS))

    def forward(
        self,
        x: Tensor,
        rotation: Tensor,
        segments: Segments,
    ) -> Tensor:
        """Map [N, C] to [N, C]; `rotation`: of each patch, fp32 [N, head dim]."""
        x = x + self.attn(self.norm1(x), rotation, segments)
        normalised = self.norm2(x)
        if self.recompute == "mlp" and torch.is_grad_enabled():
            return x + checkpoint(self.mlp, normalised, use_reentrant=False)
        return x + self.mlp(normalised)


class Merger(nn.Module):
    """The map from four neighbouring patches to one visual token of the language model's width.

    The main merger normalises each patch, a DeepStack merger the four of them together; both use the exact (erf) GELU,
    not the tower's tanh approximation.
    """

    def __init__(self, config: VisionConfig, output_size: int, norm_after_merge: bool) -> None:
        super().__init__()
        self.width = config.hidden_size * config.spatial_merge_size**2
        self.norm_after_merge = norm_after_merge
        normalised = self.width if norm_after_merge else config.hidden_size
        self.norm = LayerNorm(normalised, eps=config.norm_epsilon)
        self.linear_fc1 = Linear(self.width, self.width)
        self.linear_fc2 = Linear(self.width, output_size)

    @in_part(MERGER)
    def forward(self, x: Tensor) -> Tensor:
        """Merge [N, C] to [M, O]."""
        # The four patches of a token are neighbours in merge-block order.
        if self.norm_after_merge:
            merged = self.norm(x.view(-1, self.width))
        else:
            merged = self.norm(x).view(-1, self.width)
        return self.linear_fc2(gelu(self.linear_fc1(merged)))


def passes_of_attention() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of both passes of torch's checkpoint, between which attention's result is kept."""
    results = AttentionResults()
    return results.first_pass(), results.second_pass()


class VisionTower(nn.Module):
    """The tower from patches to features: the main merger's and, side by side, those of the DeepStack mergers."""

    def __init__(
        self,
        config: VisionConfig,
        output_size: int,
        recompute: str = "none",
        in_pieces: bool = True,
    ) -> None:
        """Build a tower.

        Args:
            config: its sizes.
            output_size: of a feature.
            recompute: as parallel.recompute, of which `block` has no part here.
            in_pieces: many pictures one after the other where whole blocks are made again. Ranks that divide the weights cannot:
                each has another number of pieces, and they gather a block's weights at each call of it.
        """
        super().__init__()
        self.config = config
        self.recompute = recompute
        self.in_pieces = in_pieces
        self.patch_embed = PatchEmbedding(config)
        self.pos_embed = PositionTable(config.position_table**2, config.hidden_size)
        self.blocks = nn.ModuleList(VisionBlock(config, recompute) for _ in range(config.depth))
        self.merger = Merger(config, output_size, norm_after_merge=False)
        self.deepstack_merger_list = nn.ModuleList(
            Merger(config, output_size, norm_after_merge=True) for _ in config.deepstack_layers
        )

    @in_part(VISION)
    def forward(self, vision: VisionInput) -> Tensor:
        """Return features [M, (1 + K) * O]: for the embeddings, then for the DeepStack levels in order of language layers."""
        if self.recompute not in WHOLE_BLOCKS or not torch.is_grad_enabled():
            return self._encode(vision)
        # Of each piece only the features are kept, and the backward pass encodes one at a time again.
        pieces = list(vision.pieces()) if self.in_pieces else [vision]
        if len(pieces) == 1:
            return self._encode(vision)
        features = [checkpoint(self._encode, piece, True, use_reentrant=False) for piece in pieces]
        return torch.cat(features)

    def _encode(self, vision: VisionInput, is_again: bool = False) -> Tensor:
        """Return the features of whole frames, as `forward` does; `is_again`: all of it is made again."""
        x = self._embed(vision)
        head_dim = self.config.hidden_size // self.config.heads
        rotation = vision_rotation(vision.rows_columns, head_dim)
        levels: dict[int, Tensor] = {}
        for index, block in enumerate(self.blocks):
            arguments = x, rotation, vision.segments
            if self.recompute not in WHOLE_BLOCKS or not torch.is_grad_enabled():
                x = block(*arguments)
            elif self.recompute == "full" or is_again:
                x = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x = checkpoint(
                    block, *arguments, use_reentrant=False, context_fn=passes_of_attention
                )
            if index in self.config.deepstack_layers:
                level = self.config.deepstack_layers.index(index)
                levels[level] = self.deepstack_merger_list[level](x)

        in_order = [levels[level] for level in sorted(levels)]
        return torch.cat([self.merger(x), *in_order], dim=1)

    def _embed(self, vision: VisionInput) -> Tensor:
        """Return patches [N, C] with their positions, interpolated from the table."""
        x = self.patch_embed(vision.patches)
        return x + self.pos_embed(vision.table_rows, vision.table_weights).to(x.dtype)
