"""Names and full shapes of all parameters of a model, from its configuration alone.

Names are the canonical ones of sharding.py. Shapes of linear layers are [out, in].
"""

import math

from visionloom.model.config import ModelConfig, TextConfig, VisionConfig

Shape = tuple[int, ...]


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Full shape of every parameter by its canonical name; a tied output matrix is the embedding."""
    text = config.text
    shapes = {
        f"visual.{name}": shape for name, shape in _vision(config.vision, text.hidden_size).items()
    }
    shapes["language_model.embedding.word_embeddings.weight"] = (text.vocab_size, text.hidden_size)
    for layer in range(text.layers):
        shapes |= {
            f"language_model.decoder.layers.{layer}.{name}": shape
            for name, shape in _layer(text).items()
        }
    shapes["language_model.decoder.final_layernorm.weight"] = (text.hidden_size,)
    if not text.tie_embeddings:
        shapes["language_model.output_layer.weight"] = (text.vocab_size, text.hidden_size)
    return shapes


def parameter_count(config: ModelConfig) -> int:
    """Parameters of the whole model."""
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())


def _layer(text: TextConfig) -> dict[str, Shape]:
    hidden, head, inner = text.hidden_size, text.head_dim, text.expert_ffn_hidden_size
    shapes: dict[str, Shape] = {
        "input_layernorm.weight": (hidden,),
        "self_attention.linear_qkv.weight": ((text.heads + 2 * text.kv_heads) * head, hidden),
        "self_attention.q_layernorm.weight": (head,),
        "self_attention.k_layernorm.weight": (head,),
        "self_attention.linear_proj.weight": (hidden, text.heads * head),
        "pre_mlp_layernorm.weight": (hidden,),
    }
    if text.experts:
        return shapes | {
            "mlp.router.weight": (text.experts, hidden),
            "mlp.experts.linear_fc1.weight": (text.experts, 2, inner, hidden),
            "mlp.experts.linear_fc2.weight": (text.experts, hidden, inner),
        }
    return shapes | {
        "mlp.linear_fc1.weight": (2 * text.ffn_hidden_size, hidden),
        "mlp.linear_fc2.weight": (hidden, text.ffn_hidden_size),
    }


def _vision(vision: VisionConfig, output: int) -> dict[str, Shape]:
    width = vision.hidden_size
    shapes = _linear("patch_embed.proj", width, vision.patch_width) | {
        "pos_embed.weight": (vision.position_table**2, width)
    }
    for block in range(vision.depth):
        at = f"blocks.{block}."
        shapes |= _norm(f"{at}norm1", width) | _norm(f"{at}norm2", width)
        shapes |= _linear(f"{at}attn.qkv", 3 * width, width) | _linear(
            f"{at}attn.proj", width, width
        )
        shapes |= _linear(f"{at}mlp.linear_fc1", vision.ffn_hidden_size, width)
        shapes |= _linear(f"{at}mlp.linear_fc2", width, vision.ffn_hidden_size)
    merged = width * vision.spatial_merge_size**2
    mergers = {"merger": width} | {
        f"deepstack_merger_list.{level}": merged for level in range(len(vision.deepstack_layers))
    }
    for merger, normalised in mergers.items():
        shapes |= _norm(f"{merger}.norm", normalised) | _linear(
            f"{merger}.linear_fc1", merged, merged
        )
        shapes |= _linear(f"{merger}.linear_fc2", output, merged)
    return shapes


def _linear(name: str, outputs: int, inputs: int) -> dict[str, Shape]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str, width: int) -> dict[str, Shape]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}
