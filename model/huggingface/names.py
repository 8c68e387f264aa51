"""Convert names and layouts of transformers' Qwen3-VL checkpoints, both ways, any part of any parameter at a time.

A parameter of ours is a region of one or a few tensors there, and the other way round. Experts come in three layouts:
`transformers`, stacked as here, [experts, 2 x width, hidden] with gate before up, and [experts, hidden, width]; `hub`, the
published one, with the last two dims the other way; `separate`, one tensor an expert and matrix.
The vision tower's names are equal but for the patch embedding, a Conv3d there and a Linear here. Source: Megatron-core's
attention layout (per key/value group: its queries, its key, its value), transformers' Qwen3VLForConditionalGeneration and
Qwen3VLMoeForConditionalGeneration and their conversion_mapping.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from visionloom.model.config import ModelConfig, TextConfig
from visionloom.model.huggingface.shapes import Shape, parameter_shapes
from visionloom.model.sharding import EMBEDDING, GATED, LAYERS, OUTPUT

LAYOUTS: Final = ("transformers", "hub", "separate")
LAYER_NAMES: Final = {
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    "mlp.router.weight": "mlp.gate.weight",
}
"""Tensors of a layer that are alike here and there."""
QKV: Final = "self_attention.linear_qkv.weight"
GATED_EXPERTS: Final = "mlp.experts.linear_fc1.weight"
DOWN_EXPERTS: Final = "mlp.experts.linear_fc2.weight"
OUTER_NAMES: Final = {
    EMBEDDING: "model.language_model.embed_tokens.weight",
    "language_model.decoder.final_layernorm.weight": "model.language_model.norm.weight",
    OUTPUT: "lm_head.weight",
}
HEAD: Final = "lm_head.weight"
PATCH_EMBEDDING: Final = "visual.patch_embed.proj.weight"
LAYERS_THERE: Final = "model.language_model.layers."


class TensorSource(Protocol):
    """Tensors of a transformers checkpoint, of which any part can be read."""

    @property
    def expert_layout(self) -> str:
        """Return one of LAYOUTS."""

    def shape(self, name: str) -> Shape:
        """Return the full shape of a tensor."""

    def read(self, name: str, region: Sequence[slice]) -> Tensor:
        """Read a part of a tensor; dims after those of the region are whole."""


@dataclass(frozen=True)
class StateSource:
    """A state dict of transformers' model in memory as a TensorSource."""

    state: Mapping[str, Tensor]
    expert_layout: str = "transformers"

    def shape(self, name: str) -> Shape:
        """Return the full shape of a tensor."""
        return tuple(self.state[name].shape)

    def read(self, name: str, region: Sequence[slice]) -> Tensor:
        """Return a view of a part."""
        return self.state[name][tuple(region)]


def from_huggingface(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return full tensors by this project's names, from a transformers state dict."""
    source = StateSource(state)
    ours = {}
    for name, shape in parameter_shapes(config).items():
        whole = [slice(0, size) for size in shape]
        ours[name] = read_parameter(name, whole, source, config)
    return ours


def to_huggingface(ours: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return a transformers state dict from full tensors by this project's names: the inverse of `from_huggingface`."""
    names = parameter_shapes(config)
    state: dict[str, Tensor] = {}
    for name, full in ours.items():
        # Others are buffers of training, such as the routers' loads.
        if name in names:
            state |= convert_parameter(name, full, config)
    return state


def read_parameter(
    name: str, region: Sequence[slice], source: TensorSource, config: ModelConfig
) -> Tensor:
    """Read a region of one of our full parameters, by its canonical name.

    Args:
        name: canonical name.
        region: begin and end in every dim. Of joint queries, keys and values it begins and ends between groups.
        source: where to read; only what the region needs is read.
        config: the model.

    Returns:
        a tensor of the region's shape, in the source's dtype. Rows of the vocabulary that the source lacks are zeros.
    """
    if name in OUTER_NAMES:
        return _rows(OUTER_NAMES[name], region, source)
    if name == PATCH_EMBEDDING:
        # A Conv3d there: [width, channels, frames, height, width of a patch].
        rows = source.read(f"model.{name}", region[:1])
        return rows.flatten(1)[:, region[1]]
    if name.startswith("visual."):
        return source.read(f"model.{name}", region)

    layer, _, rest = name.removeprefix(LAYERS).partition(".")
    reader = _LayerReader(f"{LAYERS_THERE}{layer}.", source, config.text)
    if rest == QKV:
        return reader.qkv(region)
    if rest == GATED:
        return reader.gated(region)
    if rest == GATED_EXPERTS:
        return reader.gated_experts(region)
    if rest == DOWN_EXPERTS:
        return reader.down_experts(region)
    return source.read(reader.prefix + LAYER_NAMES[rest], region)


def _rows(theirs: str, region: Sequence[slice], source: TensorSource) -> Tensor:
    """Read rows of a matrix of the vocabulary, zeros after its end."""
    end = source.shape(theirs)[0]
    begin, stop = region[0].start, region[0].stop
    rows = slice(min(begin, end), min(stop, end))
    held = source.read(theirs, [rows, *region[1:]])
    missing = stop - begin - len(held)
    if not missing:
        return held
    # Zeros: a recipe may have a larger vocabulary, which its tensor ranks divide.
    zeros = held.new_zeros(missing, *held.shape[1:])
    return torch.cat([held, zeros])


@dataclass(frozen=True)
class _LayerReader:
    """A reader of the parameters of one decoder layer that are laid out in another way there."""

    prefix: str
    """Of the layer's names there, with a dot at its end."""
    source: TensorSource
    text: TextConfig

    def qkv(self, region: Sequence[slice]) -> Tensor:
        """Return rows of joint queries, keys and values, group by group as Megatron-core has them."""
        text = self.text
        queries = text.heads // text.kv_heads * text.head_dim
        group = queries + 2 * text.head_dim
        first = region[0].start // group
        last = region[0].stop // group

        parts = []
        heights = {"q": queries, "k": text.head_dim, "v": text.head_dim}
        for letter, height in heights.items():
            rows = slice(first * height, last * height)
            name = f"{self.prefix}self_attn.{letter}_proj.weight"
            part = self.source.read(name, [rows, region[1]])
            parts.append(part.unflatten(0, (last - first, -1)))
        return torch.cat(parts, dim=1).flatten(0, 1)

    def gated(self, region: Sequence[slice]) -> Tensor:
        """Return rows of gate and up projection, one above the other."""
        begin, stop = region[0].start, region[0].stop
        width = self.text.ffn_hidden_size
        parts = []
        for offset, half in ((0, "gate"), (width, "up")):
            first, end = max(begin - offset, 0), min(stop - offset, width)
            if first < end:
                name = f"{self.prefix}mlp.{half}_proj.weight"
                parts.append(self.source.read(name, [slice(first, end), region[1]]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def gated_experts(self, region: Sequence[slice]) -> Tensor:
        """Return gate and up projection of experts, of a region [experts, halves, rows, columns]."""
        experts, halves, rows, columns = region

        def both(expert: int) -> Tensor:
            chosen = range(halves.start, halves.stop)
            matrices = [self._expert(expert, half, rows, columns) for half in chosen]
            return torch.stack(matrices)

        return _stacked(both, experts)

    def down_experts(self, region: Sequence[slice]) -> Tensor:
        """Return the down projection of experts, of a region [experts, rows, columns]."""
        experts, rows, columns = region
        return _stacked(lambda expert: self._expert(expert, None, rows, columns), experts)

    def _expert(
        self,
        expert: int,
        half: int | None,
        rows: slice,
        columns: slice,
    ) -> Tensor:
        """Return a region of one matrix of one expert: gate (half 0), up (1), or down projection (None)."""
        if self.source.expert_layout == "separate":
            matrix = "down" if half is None else ("gate", "up")[half]
            name = f"{self.prefix}mlp.experts.{expert}.{matrix}_proj.weight"
            return self.source.read(name, [rows, columns])
        return self._stacked_expert(expert, half, rows, columns)

    def _stacked_expert(self, expert: int, half: int | None, rows: slice, columns: slice) -> Tensor:
        """Return the same of a checkpoint with all experts in one tensor."""
        # Gate and up are one matrix there, gate above up.
        shift = (half or 0) * self.text.expert_ffn_hidden_size
        rows = slice(rows.start + shift, rows.stop + shift)
        matrix = "down_proj" if half is None else "gate_up_proj"
        name = f"{self.prefix}mlp.experts.{matrix}"
        one = slice(expert, expert + 1)
        if self.source.expert_layout == "hub":
            return self.source.read(name, [one, columns, rows])[0].T
        return self.source.read(name, [one, rows, columns])[0]


def _stacked(read: Callable[[int], Tensor], experts: slice) -> Tensor:
    """Return the experts that `read` gives one by one, so that no more than one is held twice."""
    first = read(experts.start)
    stack = first.new_empty(experts.stop - experts.start, *first.shape)
    stack[0] = first
    for expert in range(experts.start + 1, experts.stop):
        stack[expert - experts.start] = read(expert)
    return stack


def convert_parameter(
    name: str, full: Tensor, config: ModelConfig, layout: str = "transformers"
) -> dict[str, Tensor]:
    """Return one of our full parameters as transformers' tensors; views of it where the layout allows.

    Args:
        name: canonical name.
        full: the parameter; on the meta device for the shapes alone.
        config: the model.
        layout: of the experts, one of LAYOUTS.
    """
    if name in OUTER_NAMES:
        return {OUTER_NAMES[name]: full}
    if name == PATCH_EMBEDDING:
        vision = config.vision
        frames = (vision.channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
        return {f"model.{name}": full.unflatten(1, frames)}
    if name.startswith("visual."):
        return {f"model.{name}": full}

    layer, _, rest = name.removeprefix(LAYERS).partition(".")
    there = f"{LAYERS_THERE}{layer}."
    if rest in (GATED_EXPERTS, DOWN_EXPERTS):
        return _convert_experts(f"{there}mlp.experts.", rest == GATED_EXPERTS, full, layout)

    parts: Sequence[str]
    tensors: Sequence[Tensor]
    if rest == QKV:
        parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        tensors = split_qkv(full, config.text)
    elif rest == GATED:
        parts = ("mlp.gate_proj", "mlp.up_proj")
        tensors = full.chunk(2)
    else:
        return {there + LAYER_NAMES[rest]: full}
    return {f"{there}{part}.weight": t for part, t in zip(parts, tensors, strict=True)}


def _convert_experts(
    there: str,
    gated: bool,
    full: Tensor,
    layout: str,
) -> dict[str, Tensor]:
    """Return gate and up projection of all experts, or their down projection, in a layout."""
    if layout == "separate":
        matrices = {"gate": full[:, 0], "up": full[:, 1]} if gated else {"down": full}
        state = {}
        for matrix, stack in matrices.items():
            for expert, weight in enumerate(stack):
                state[f"{there}{expert}.{matrix}_proj.weight"] = weight
        return state

    stack = full.flatten(1, 2) if gated else full
    matrix = "gate_up" if gated else "down"
    return {f"{there}{matrix}_proj": stack.mT if layout == "hub" else stack}


def huggingface_shapes(
    config: ModelConfig,
    layout: str = "transformers",
    covers: Callable[[str], bool] = lambda name: True,
) -> dict[str, Shape]:
    """Return the shape of every tensor of a transformers checkpoint of this model.

    Args:
        config: the model.
        layout: of the experts, one of LAYOUTS.
        covers: whether the checkpoint has one of our parameters, by its canonical name.
    """
    shapes: dict[str, Shape] = {}
    for name, shape in parameter_shapes(config).items():
        if not covers(name):
            continue
        # The meta device: shapes without memory.
        full = torch.empty(shape, device="meta")
        made = convert_parameter(name, full, config, layout)
        shapes |= {theirs: tuple(tensor.shape) for theirs, tensor in made.items()}
    return shapes


def split_qkv(joined: Tensor, text: TextConfig) -> list[Tensor]:
    """Split Megatron-core's joint matrix into those of query, key and value."""
    queries = text.heads // text.kv_heads * text.head_dim
    parts = joined.unflatten(0, (text.kv_heads, -1)).split(
        [queries, text.head_dim, text.head_dim], dim=1
    )
    return [part.flatten(0, 1) for part in parts]
