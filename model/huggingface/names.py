"""Names and layouts of transformers' Qwen3-VL checkpoints, both ways: any part of any parameter, read as it is needed.

A parameter of ours is a region of one or a few tensors there, and the other way round. Experts come in three layouts:
`transformers`, stacked as here, [experts, 2 x width, hidden] with gate before up, and [experts, hidden, width]; `hub`, the
published one, with the last two dims the other way; `separate`, one tensor an expert and matrix.
The vision tower's names are equal but for the patch embedding, a Conv3d there and a Linear here. Source: Megatron-core's
attention layout (per key/value group: its queries, its key, its value), transformers' Qwen3VLForConditionalGeneration and
Qwen3VLMoeForConditionalGeneration and their conversion_mapping.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from visionloom.model.config import ModelConfig, TextConfig
from visionloom.model.huggingface.shapes import Shape, parameter_shapes

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
GATED: Final = "mlp.linear_fc1.weight"
GATED_EXPERTS: Final = "mlp.experts.linear_fc1.weight"
DOWN_EXPERTS: Final = "mlp.experts.linear_fc2.weight"
EMBEDDING: Final = "language_model.embedding.word_embeddings.weight"
OUTER_NAMES: Final = {
    EMBEDDING: "model.language_model.embed_tokens.weight",
    "language_model.decoder.final_layernorm.weight": "model.language_model.norm.weight",
    "language_model.output_layer.weight": "lm_head.weight",
}
HEAD: Final = "lm_head.weight"
PATCH_EMBEDDING: Final = "visual.patch_embed.proj.weight"
LAYERS_HERE, LAYERS_THERE = "language_model.decoder.layers.", "model.language_model.layers."


class TensorSource(Protocol):
    """Tensors of a transformers checkpoint, of which any part can be read."""

    @property
    def expert_layout(self) -> str:
        """One of LAYOUTS."""

    def shape(self, name: str) -> Shape:
        """Full shape of a tensor."""

    def read(self, name: str, region: Sequence[slice]) -> Tensor:
        """Part of a tensor; dims behind the region are whole."""


@dataclass(frozen=True)
class StateSource:
    """A state dict of transformers' model in memory as a Source."""

    state: Mapping[str, Tensor]
    expert_layout: str = "transformers"

    def shape(self, name: str) -> Shape:
        """Full shape of a tensor."""
        return tuple(self.state[name].shape)

    def read(self, name: str, region: Sequence[slice]) -> Tensor:
        """A view of a part."""
        return self.state[name][tuple(region)]


def from_huggingface(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Full tensors by this project's names, from a transformers state dict."""
    source = StateSource(state)
    return {
        name: read_parameter(name, [slice(0, size) for size in shape], source, config)
        for name, shape in parameter_shapes(config).items()
    }


def to_huggingface(ours: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """A transformers state dict from full tensors by this project's names: the inverse of `from_huggingface`."""
    names = parameter_shapes(config)
    return {
        k: v
        for name, full in ours.items()
        if name in names
        for k, v in convert_parameter(name, full, config).items()
    }


def read_parameter(
    name: str, region: Sequence[slice], source: TensorSource, config: ModelConfig
) -> Tensor:
    """A region of one of our full parameters, by its canonical name.

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
        return source.read(f"model.{name}", region[:1]).flatten(1)[:, region[1]]
    if name.startswith("visual."):
        return source.read(f"model.{name}", region)
    layer, _, rest = name.removeprefix(LAYERS_HERE).partition(".")
    there = f"{LAYERS_THERE}{layer}."
    if rest == QKV:
        return _read_qkv(there, region, source, config.text)
    if rest == GATED:
        return _read_gated(there, region, source, config.text.ffn_hidden_size)
    if rest in (GATED_EXPERTS, DOWN_EXPERTS):
        return _read_experts(
            f"{there}mlp.experts.", rest == GATED_EXPERTS, region, source, config.text
        )
    return source.read(there + LAYER_NAMES[rest], region)


def _rows(theirs: str, region: Sequence[slice], source: TensorSource) -> Tensor:
    """Rows of a matrix of the vocabulary, zeros behind its end."""
    end = source.shape(theirs)[0]
    begin, stop = region[0].start, region[0].stop
    held = source.read(theirs, [slice(min(begin, end), min(stop, end)), *region[1:]])
    missing = stop - begin - len(held)
    return torch.cat([held, held.new_zeros(missing, *held.shape[1:])]) if missing else held


def _read_qkv(
    there: str, region: Sequence[slice], source: TensorSource, text: TextConfig
) -> Tensor:
    queries = text.heads // text.kv_heads * text.head_dim
    group = queries + 2 * text.head_dim
    first, last = region[0].start // group, region[0].stop // group
    parts = [
        source.read(
            f"{there}self_attn.{x}_proj.weight", [slice(first * rows, last * rows), region[1]]
        )
        for x, rows in zip("qkv", (queries, text.head_dim, text.head_dim), strict=True)
    ]
    return torch.cat([part.unflatten(0, (last - first, -1)) for part in parts], dim=1).flatten(0, 1)


def _read_gated(there: str, region: Sequence[slice], source: TensorSource, width: int) -> Tensor:
    """Rows of gate and up projection, one above the other."""
    begin, stop, parts = region[0].start, region[0].stop, []
    for offset, x in ((0, "gate"), (width, "up")):
        rows = slice(max(begin - offset, 0), min(stop - offset, width))
        if rows.start < rows.stop:
            parts.append(source.read(f"{there}mlp.{x}_proj.weight", [rows, region[1]]))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _read_experts(
    there: str, gated: bool, region: Sequence[slice], source: TensorSource, text: TextConfig
) -> Tensor:
    """Experts one by one, so that no more than one is held twice."""
    halves = range(region[1].start, region[1].stop) if gated else [None]
    first, last, out = region[0].start, region[0].stop, None
    for expert in range(first, last):
        parts = [
            _read_expert(there, expert, half, region[-2], region[-1], source, text)
            for half in halves
        ]
        out = parts[0].new_empty(last - first, len(parts), *parts[0].shape) if out is None else out
        out[expert - first] = torch.stack(parts)
    assert out is not None
    return out if gated else out.squeeze(1)


def _read_expert(
    there: str,
    expert: int,
    half: int | None,
    rows: slice,
    columns: slice,
    source: TensorSource,
    text: TextConfig,
) -> Tensor:
    """A region of one matrix of one expert as it lies here: gate (half 0), up (1), or down projection (None)."""
    if source.expert_layout == "separate":
        x = "down" if half is None else ("gate", "up")[half]
        return source.read(f"{there}{expert}.{x}_proj.weight", [rows, columns])
    shift = (half or 0) * text.expert_ffn_hidden_size
    rows = slice(rows.start + shift, rows.stop + shift)
    name, one = there + ("down_proj" if half is None else "gate_up_proj"), slice(expert, expert + 1)
    if source.expert_layout == "hub":
        return source.read(name, [one, columns, rows])[0].T
    return source.read(name, [one, rows, columns])[0]


def convert_parameter(
    name: str, full: Tensor, config: ModelConfig, layout: str = "transformers"
) -> dict[str, Tensor]:
    """One of our full parameters as transformers' tensors; views of it where the layout allows.

    Args:
        name: canonical name.
        full: the parameter; on the meta device for the shapes alone.
        config: the model.
        layout: of the experts, one of LAYOUTS.
    """
    text, vision = config.text, config.vision
    if name in OUTER_NAMES:
        return {OUTER_NAMES[name]: full}
    if name.startswith("visual."):
        frames = (vision.channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
        return {f"model.{name}": full.unflatten(1, frames) if name == PATCH_EMBEDDING else full}
    layer, _, rest = name.removeprefix(LAYERS_HERE).partition(".")
    there = f"{LAYERS_THERE}{layer}."
    if rest == QKV:
        return {
            f"{there}self_attn.{x}_proj.weight": part
            for x, part in zip("qkv", split_qkv(full, text), strict=True)
        }
    if rest == GATED:
        return {
            f"{there}mlp.{x}_proj.weight": part
            for x, part in zip(("gate", "up"), full.chunk(2), strict=True)
        }
    if rest in (GATED_EXPERTS, DOWN_EXPERTS):
        return _convert_experts(f"{there}mlp.experts.", rest == GATED_EXPERTS, full, layout)
    return {there + LAYER_NAMES[rest]: full}


def _convert_experts(there: str, gated: bool, full: Tensor, layout: str) -> dict[str, Tensor]:
    if layout == "separate":
        matrices = {"gate": full[:, 0], "up": full[:, 1]} if gated else {"down": full}
        return {
            f"{there}{e}.{x}_proj.weight": each
            for x, stack in matrices.items()
            for e, each in enumerate(stack)
        }
    stack = full.flatten(1, 2) if gated else full
    name = there + ("gate_up_proj" if gated else "down_proj")
    return {name: stack.transpose(1, 2) if layout == "hub" else stack}


def huggingface_shapes(config: ModelConfig, layout: str = "transformers") -> dict[str, Shape]:
    """Shape of every tensor of a transformers checkpoint of this model."""
    shapes: dict[str, Shape] = {}
    for name, shape in parameter_shapes(config).items():
        made = convert_parameter(name, torch.empty(shape, device="meta"), config, layout)
        shapes |= {theirs: tuple(tensor.shape) for theirs, tensor in made.items()}
    return shapes


def split_qkv(joined: Tensor, text: TextConfig) -> list[Tensor]:
    """Megatron-core's joint matrix to query, key and value."""
    queries = text.heads // text.kv_heads * text.head_dim
    parts = joined.unflatten(0, (text.kv_heads, -1)).split(
        [queries, text.head_dim, text.head_dim], dim=1
    )
    return [part.flatten(0, 1) for part in parts]
