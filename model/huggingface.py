"""Names and layouts of transformers' Qwen3-VL checkpoints, both ways, on full (uncut) tensors.

Experts are stacked alike here and there: [experts, 2 x width, hidden] with gate before up, and [experts, hidden, width].
The vision tower's names are equal but for the patch embedding, a Conv3d there and a Linear here. Source: Megatron-core's
attention layout (per key/value group: its queries, its key, its value), transformers' Qwen3VLForConditionalGeneration and
Qwen3VLMoeForConditionalGeneration.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from visionloom.model.config import ModelConfig, TextConfig

LAYER_NAMES = {
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
}
DENSE_NAMES = {"mlp.linear_fc2.weight": "mlp.down_proj.weight"}
EXPERT_NAMES = {"mlp.router.weight": "mlp.gate.weight", "mlp.experts.linear_fc2.weight": "mlp.experts.down_proj"}
OUTER_NAMES = {
    "language_model.embedding.word_embeddings.weight": "model.language_model.embed_tokens.weight",
    "language_model.decoder.final_layernorm.weight": "model.language_model.norm.weight",
    "language_model.output_layer.weight": "lm_head.weight",
}
PATCH_EMBEDDING = "visual.patch_embed.proj.weight"


def from_huggingface(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Full tensors by this project's names, from a transformers state dict."""
    text, ours = config.text, {}
    for name, theirs in OUTER_NAMES.items():
        if not (text.tie_embeddings and theirs == "lm_head.weight"):
            ours[name] = state[theirs]
    for layer in range(text.layers):
        here, there = f"language_model.decoder.layers.{layer}.", f"model.language_model.layers.{layer}."
        for name, theirs in _layer_names(text).items():
            ours[here + name] = state[there + theirs]
        ours[here + "self_attention.linear_qkv.weight"] = join_qkv(
            [state[f"{there}self_attn.{x}_proj.weight"] for x in "qkv"], text
        )
        if text.experts:
            ours[here + "mlp.experts.linear_fc1.weight"] = state[there + "mlp.experts.gate_up_proj"].unflatten(1, (2, -1))
        else:
            gate, up = (state[f"{there}mlp.{x}_proj.weight"] for x in ("gate", "up"))
            ours[here + "mlp.linear_fc1.weight"] = torch.cat([gate, up])
    for theirs, tensor in state.items():
        if theirs.startswith("model.visual."):
            name = theirs.removeprefix("model.")
            ours[name] = tensor.flatten(1) if name == PATCH_EMBEDDING else tensor
    return ours


def to_huggingface(ours: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """A transformers state dict from full tensors by this project's names: the inverse of `from_huggingface`."""
    text, vision, state = config.text, config.vision, {}
    for name, theirs in OUTER_NAMES.items():
        if name in ours:
            state[theirs] = ours[name]
    for layer in range(text.layers):
        here, there = f"language_model.decoder.layers.{layer}.", f"model.language_model.layers.{layer}."
        for name, theirs in _layer_names(text).items():
            state[there + theirs] = ours[here + name]
        for x, part in zip("qkv", split_qkv(ours[here + "self_attention.linear_qkv.weight"], text), strict=True):
            state[f"{there}self_attn.{x}_proj.weight"] = part
        if text.experts:
            state[there + "mlp.experts.gate_up_proj"] = ours[here + "mlp.experts.linear_fc1.weight"].flatten(1, 2)
        else:
            gate, up = ours[here + "mlp.linear_fc1.weight"].chunk(2)
            state[there + "mlp.gate_proj.weight"], state[there + "mlp.up_proj.weight"] = gate, up
    frames = (vision.channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    for name, tensor in ours.items():
        if name.startswith("visual."):
            state["model." + name] = tensor.unflatten(1, frames) if name == PATCH_EMBEDDING else tensor
    return state


def _layer_names(text: TextConfig) -> dict[str, str]:
    """Names of a layer's tensors that are alike here and there."""
    return LAYER_NAMES | (EXPERT_NAMES if text.experts else DENSE_NAMES)


def join_qkv(parts: list[Tensor], text: TextConfig) -> Tensor:
    """Query, key and value matrices to Megatron-core's one, grouped by key/value head."""
    return torch.cat([part.unflatten(0, (text.kv_heads, -1)) for part in parts], dim=1).flatten(0, 1)


def split_qkv(joined: Tensor, text: TextConfig) -> list[Tensor]:
    """Megatron-core's joint matrix to query, key and value: the inverse of `join_qkv`."""
    queries = text.heads // text.kv_heads * text.head_dim
    parts = joined.unflatten(0, (text.kv_heads, -1)).split([queries, text.head_dim, text.head_dim], dim=1)
    return [part.flatten(0, 1) for part in parts]
