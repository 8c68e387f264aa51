"""Compute names and full shapes of all parameters of a model, from its configuration alone.

Names are the canonical ones of sharding.py. Shapes of linear layers are [out, in].
"""

import math

from visionloom.model.config import ModelConfig, TextConfig, VisionConfig

Shape = tuple[int, ...]


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Return the full shape of every parameter by its canonical name; a tied output matrix is the embedding."""
    text, vision = config.text, config.vision
    shapes = _linear("visual.patch_embed.proj", vision.hidden_size, vision.patch_width)
    shapes["visual.pos_embed.weight"] = (vision.position_table**2, vision.hidden_size)
    for block in range(vision.depth):
        shapes |= _vision_block(f"visual.blocks.{block}.", vision)
    shapes |= _merger("visual.merger.", config, norm_after_merge=False)
    for level in range(len(vision.deepstack_layers)):
        prefix = f"visual.deepstack_merger_list.{level}."
        shapes |= _merger(prefix, config, norm_after_merge=True)

    shapes["language_model.embedding.word_embeddings.weight"] = (text.vocab_size, text.hidden_size)
    for layer in range(text.layers):
        shapes |= _decoder_layer(f"language_model.decoder.layers.{layer}.", text)
    shapes["language_model.decoder.final_layernorm.weight"] = (text.hidden_size,)
    if not text.tie_embeddings:
        shapes["language_model.output_layer.weight"] = (text.vocab_size, text.hidden_size)
    return shapes


def parameter_count(config: ModelConfig) -> int:
    """Return the number of parameters of the whole model."""
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())


def _decoder_layer(prefix: str, text: TextConfig) -> dict[str, Shape]:
    """Return the shapes of a decoder layer; `prefix` goes before each name."""
    hidden, head = text.hidden_size, text.head_dim
    shapes: dict[str, Shape] = {
        "input_layernorm.weight": (hidden,),
        "self_attention.linear_qkv.weight": ((text.heads + 2 * text.kv_heads) * head, hidden),
        "self_attention.q_layernorm.weight": (head,),
        "self_attention.k_layernorm.weight": (head,),
        "self_attention.linear_proj.weight": (hidden, text.heads * head),
        "pre_mlp_layernorm.weight": (hidden,),
    }
    for name, shape in feed_forward_shapes(text).items():
        shapes[f"mlp.{name}.weight"] = shape
    return {prefix + name: shape for name, shape in shapes.items()}


def feed_forward_shapes(text: TextConfig) -> dict[str, Shape]:
    """Return the shapes of a decoder layer's MLP, or of its router and experts."""
    hidden, inner = text.hidden_size, text.ffn_hidden_size
    if not text.experts:
        return {"linear_fc1": (2 * inner, hidden), "linear_fc2": (hidden, inner)}

    inner = text.expert_ffn_hidden_size
    return {
        "router": (text.experts, hidden),
        # Gate and up in a dim of their own, see model/experts.py.
        "experts.linear_fc1": (text.experts, 2, inner, hidden),
        "experts.linear_fc2": (text.experts, hidden, inner),
    }


def _vision_block(prefix: str, vision: VisionConfig) -> dict[str, Shape]:
    """Return the shapes of a block of the tower; `prefix` goes before each name."""
    width, inner = vision.hidden_size, vision.ffn_hidden_size
    shapes = _norm(f"{prefix}norm1", width) | _norm(f"{prefix}norm2", width)
    shapes |= _linear(f"{prefix}attn.qkv", 3 * width, width)
    shapes |= _linear(f"{prefix}attn.proj", width, width)
    shapes |= _linear(f"{prefix}mlp.linear_fc1", inner, width)
    return shapes | _linear(f"{prefix}mlp.linear_fc2", width, inner)


def _merger(prefix: str, config: ModelConfig, norm_after_merge: bool) -> dict[str, Shape]:
    """Return the shapes of a merger; `prefix` goes before each name."""
    width = config.vision.hidden_size
    merged = width * config.vision.spatial_merge_size**2
    shapes = _norm(f"{prefix}norm", merged if norm_after_merge else width)
    shapes |= _linear(f"{prefix}linear_fc1", merged, merged)
    return shapes | _linear(f"{prefix}linear_fc2", config.text.hidden_size, merged)


def _linear(name: str, outputs: int, inputs: int) -> dict[str, Shape]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str, width: int) -> dict[str, Shape]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}
