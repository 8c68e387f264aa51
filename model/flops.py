"""Floating-point operations of a step, counted honestly: real tokens only, frozen parts only where gradients pass.

A multiplication and an addition are two operations. Only matrix products count, as in torch's FlopCounterMode, which is
the reference of the tests. Padding and recomputation never count.
"""

from dataclasses import dataclass

from visionloom.model.config import ModelConfig, TextConfig, VisionConfig
from visionloom.model.lora_config import LinearLayer, LoraConfig, adapted_layers, linear_layers
from visionloom.model.trainable import group_of


@dataclass(frozen=True)
class StepWork:
    """What a step has to process, summed over its packs."""

    tokens: int
    """Real tokens."""
    supervised_tokens: int
    """Tokens that the output layer sees."""
    token_pairs: int
    """Sum of the squared lengths of the samples."""
    patches: int
    patch_pairs: int
    """Sum of the squared patch counts of the frames."""


def language_flops(text: TextConfig, work: StepWork) -> float:
    """Forward operations of the decoder layers; a causal score matrix counts half, and of experts those that a token takes."""
    projections = text.hidden_size * text.head_dim * (2 * text.heads + 2 * text.kv_heads)
    width = text.ffn_hidden_size
    if text.experts:
        projections += text.hidden_size * text.experts  # the router
        width = text.experts_per_token * text.expert_ffn_hidden_size
    per_token = 2 * text.layers * (projections + 3 * text.hidden_size * width)
    attention = 2 * text.layers * text.heads * text.head_dim * work.token_pairs
    return float(per_token * work.tokens + attention)


def output_flops(text: TextConfig, work: StepWork) -> float:
    """Forward operations of the output layer, which runs on supervised tokens alone."""
    return 2.0 * text.hidden_size * text.vocab_size * work.supervised_tokens


def vision_flops(vision: VisionConfig, work: StepWork) -> float:
    """Forward operations of the vision tower without its mergers."""
    block = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.ffn_hidden_size
    attention = 4 * vision.depth * vision.hidden_size * work.patch_pairs
    return patch_embedding_flops(vision, work) + 2 * vision.depth * block * work.patches + attention


def patch_embedding_flops(vision: VisionConfig, work: StepWork) -> float:
    """The part of vision_flops that turns pixels into the first hidden states."""
    return 2.0 * vision.patch_width * vision.hidden_size * work.patches


def merger_flops(config: ModelConfig, work: StepWork) -> float:
    """Forward operations of the main and the DeepStack mergers."""
    merged = config.vision.spatial_merge_size**2
    width = config.vision.hidden_size * merged
    one = 2.0 * width * (width + config.text.hidden_size) * (work.patches // merged)
    return one * (1 + len(config.vision.deepstack_layers))


def step_flops(
    config: ModelConfig, work: StepWork, trainable: set[str], lora: LoraConfig | None = None
) -> dict[str, float]:
    """Operations of forward and backward by part: language, output, merger, vision.

    A part costs its forward once; once more for the gradient of its weights if it trains; and once more for the gradient of
    its input if something before it trains. Embeddings come before the language layers and train with them, norms before the
    mergers' products with the mergers. With `lora` only the adapters of the trainable groups train.
    """
    if lora is not None:
        return adapted_flops(config, work, trainable, lora)
    vision, merger, language = (group in trainable for group in ("vision", "merger", "language"))
    attention = (
        2.0 * config.text.layers * config.text.heads * config.text.head_dim * work.token_pairs
    )
    passes = {
        "language": (language_flops(config.text, work), 1 + language, language or merger or vision),
        "output": (output_flops(config.text, work), 1 + language, True),
        "merger": (merger_flops(config, work), 1 + merger, merger or vision),
        "vision": (vision_flops(config.vision, work), 1 + vision, vision),
    }
    flops = {part: cost * (weights + inputs) for part, (cost, weights, inputs) in passes.items()}
    if vision:
        # Pixels have no gradient.
        flops["vision"] -= patch_embedding_flops(config.vision, work)
    if not language:
        # Attention has no weights of its own: its backward is twice its forward whether or not the layers train.
        flops["language"] += attention * (merger or vision)
    return flops


def adapted_flops(
    config: ModelConfig, work: StepWork, trainable: set[str], lora: LoraConfig
) -> dict[str, float]:
    """As `step_flops` where adapters alone train: no gradient of weights, and none of inputs before the first adapter.

    An adapter's two factors cost their forward, the gradient of each, and what passes through them.
    """
    text, vision, merged = config.text, config.vision, config.vision.spatial_merge_size**2
    adapted = {layer.name for layer in adapted_layers(config, lora)}
    flops = dict.fromkeys(("language", "output", "merger", "vision"), 0.0)
    flops["vision"] = patch_embedding_flops(vision, work)
    reached, at_block = False, list[bool]()
    for layer in linear_layers(config):
        group, leaf = group_of(layer.name), layer.name.rpartition(".")[2]
        if (
            group == "merger" and leaf == "linear_fc1"
        ):  # the main merger sees the last block, the others each a block of theirs
            reached = _sees_adapter(layer, at_block, vision)
        elif group == "language" and layer.name.endswith("layers.0.self_attention.linear_qkv"):
            reached = any(group_of(name) in trainable - {"language"} for name in adapted)
        rows = {"vision": work.patches, "merger": work.patches // merged}.get(group, work.tokens)
        rows *= text.experts_per_token if layer.experts else 1
        own = group in trainable and layer.name in adapted
        flops[group] += 2.0 * rows * layer.inputs * layer.outputs * (1 + reached)
        if layer.name in adapted:
            down, up = lora.rank * len(layer.parts) * layer.inputs, lora.rank * layer.outputs
            flops[group] += (
                2.0 * rows * (down * (1 + own + reached) + up * (1 + own + (own or reached)))
            )
        reached = reached or own
        if leaf in ("qkv", "linear_qkv"):
            causal = 2 * text.heads * text.head_dim * work.token_pairs
            flops[group] += (
                causal if group == "language" else 4 * vision.hidden_size * work.patch_pairs
            ) * (1 + 2.0 * reached)
        if leaf == "linear_proj" and text.experts:
            flops[group] += (
                2.0 * work.tokens * text.hidden_size * text.experts * (1 + reached)
            )  # the router
        if group == "vision" and leaf == "linear_fc2":
            at_block.append(reached)
    flops["output"] = output_flops(text, work) * (1 + reached)
    return flops


def _sees_adapter(layer: LinearLayer, at_block: list[bool], vision: VisionConfig) -> bool:
    """Whether a trained adapter lies before a merger: `at_block` says so for the output of each block."""
    level = layer.name.removeprefix("visual.deepstack_merger_list.").partition(".")[0]
    return at_block[vision.deepstack_layers[int(level)] if level.isdigit() else -1]
