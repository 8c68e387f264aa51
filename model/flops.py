"""Count the floating-point operations of a step: real tokens only, frozen parts only where gradients pass.

A multiplication and an addition are two operations. Only matrix products count, as in torch's FlopCounterMode, which is
the reference of the tests. Padding and recomputation never count.
"""

from dataclasses import dataclass

from visionloom.model.config import ModelConfig, TextConfig, VisionConfig
from visionloom.model.lora_config import LinearLayer, LoraConfig, adapted_layers, linear_layers
from visionloom.model.trainable import group_of


@dataclass(frozen=True)
class StepWork:
    """Sizes of a step's input, summed over its packs."""

    tokens: int
    """Real tokens."""
    supervised_tokens: int
    """Tokens with a target, which alone go through the output layer."""
    token_pairs: int
    """Sum of the squared lengths of the samples."""
    patches: int
    """Patches of all images and frames."""
    patch_pairs: int
    """Sum of the squared patch counts of the frames."""


def language_flops(text: TextConfig, work: StepWork) -> float:
    """Return forward operations of the decoder layers.

    A causal score matrix counts half, and of experts those that a token takes.
    """
    projections = text.hidden_size * text.head_dim * (2 * text.heads + 2 * text.kv_heads)
    width = text.ffn_hidden_size
    if text.experts:
        # The router.
        projections += text.hidden_size * text.experts
        width = text.experts_per_token * text.expert_ffn_hidden_size
    # The MLP has three matrices: gate, up, down.
    per_token = 2 * text.layers * (projections + 3 * text.hidden_size * width)
    # Two products of two operations, for half of the pairs.
    attention = 2 * text.layers * text.heads * text.head_dim * work.token_pairs
    return float(per_token * work.tokens + attention)


def output_flops(text: TextConfig, work: StepWork) -> float:
    """Return forward operations of the output layer, which runs on supervised tokens alone."""
    return 2.0 * text.hidden_size * text.vocab_size * work.supervised_tokens


def vision_flops(vision: VisionConfig, work: StepWork) -> float:
    """Return forward operations of the vision tower without its mergers."""
    # Query, key, value and output; two matrices of the MLP, which has no gate.
    block = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.ffn_hidden_size
    # All patches of a frame see each other.
    attention = 4 * vision.depth * vision.hidden_size * work.patch_pairs
    return patch_embedding_flops(vision, work) + 2 * vision.depth * block * work.patches + attention


def patch_embedding_flops(vision: VisionConfig, work: StepWork) -> float:
    """Return the part of vision_flops that turns pixels into the first hidden states."""
    return 2.0 * vision.patch_width * vision.hidden_size * work.patches


def merger_flops(config: ModelConfig, work: StepWork) -> float:
    """Return forward operations of the main and the DeepStack mergers."""
    merged = config.vision.spatial_merge_size**2
    width = config.vision.hidden_size * merged
    one = 2.0 * width * (width + config.text.hidden_size) * (work.patches // merged)
    return one * (1 + len(config.vision.deepstack_layers))


def step_flops(
    config: ModelConfig, work: StepWork, trainable: set[str], lora: LoraConfig | None = None
) -> dict[str, float]:
    """Return operations of forward and backward by part: language, output, merger, vision.

    A part costs its forward once; once more for the gradient of its weights if it trains; and once more for the gradient of
    its input if something before it trains. Embeddings come before the language layers and train with them, norms before the
    mergers' products with the mergers. With `lora` only the adapters of the trainable groups train.
    """
    if lora is not None:
        return adapted_flops(config, work, trainable, lora)
    text = config.text
    vision = "vision" in trainable
    merger = "merger" in trainable
    language = "language" in trainable
    before_language = merger or vision

    # Passes: the forward, the gradient of the weights, the gradient of the input.
    flops = {
        "language": language_flops(text, work) * (1 + language + (language or before_language)),
        "output": output_flops(text, work) * (1 + language + 1),
        "merger": merger_flops(config, work) * (1 + merger + (merger or vision)),
        "vision": vision_flops(config.vision, work) * (1 + vision + vision),
    }
    if vision:
        # Pixels have no gradient.
        flops["vision"] -= patch_embedding_flops(config.vision, work)
    if not language:
        # Attention has no weights of its own: its backward is twice its forward whether or not the layers train.
        attention = 2.0 * text.layers * text.heads * text.head_dim * work.token_pairs
        flops["language"] += attention * before_language
    return flops


def adapted_flops(
    config: ModelConfig, work: StepWork, trainable: set[str], lora: LoraConfig
) -> dict[str, float]:
    """Return operations as `step_flops` where adapters train, and the weights of lora.full.

    There is no gradient of other weights, and none of inputs before the first adapter. An adapter's two factors cost their
    forward, the gradient of each, and the gradients that pass through them.
    """
    walk = _AdapterWalk(config, work, trainable, lora)
    for layer in linear_layers(config):
        walk.visit(layer)
    return walk.flops | {"output": output_flops(config.text, work) * (1 + walk.reached)}


@dataclass
class _AdapterWalk:
    """A count layer by layer, in the order in which data passes them."""

    config: ModelConfig
    work: StepWork
    trainable: set[str]
    lora: LoraConfig

    def __post_init__(self) -> None:
        self.adapted = {layer.name for layer in adapted_layers(self.config, self.lora)}
        self.flops = dict.fromkeys(("language", "output", "merger", "vision"), 0.0)
        # Pixels have no gradient, and the patch embedding no adapter.
        embedding = patch_embedding_flops(self.config.vision, self.work)
        self.flops["vision"] = embedding * (1 + self._trains_whole("vision"))
        self.reached = False
        """A trained adapter is before the place of the walk, so gradients pass it."""
        self.at_block: list[bool] = []
        """The same at the output of each block of the tower."""

    def visit(self, layer: LinearLayer) -> None:
        """Add a layer's product, its adapter, and what has no weights of its own after it."""
        group, leaf = group_of(layer.name), layer.name.rpartition(".")[2]
        self._begin(layer, group, leaf)
        rows = self._rows(layer, group)
        has_adapter = layer.name in self.adapted
        own = group in self.trainable and has_adapter
        whole = self._trains_whole(group)
        # Something before its product trains too: the patch embedding, or a merger's norm.
        self.reached = self.reached or whole

        product = 2.0 * rows * layer.inputs * layer.outputs
        self.flops[group] += product * (1 + self.reached + whole)
        if has_adapter:
            self.flops[group] += 2.0 * rows * self._adapter(layer, own)
        self.reached = self.reached or own
        self._end(group, leaf)

    def _trains_whole(self, group: str) -> bool:
        """Return whether the weights of a group train themselves."""
        return group in self.trainable and group in self.lora.full

    def _adapter(self, layer: LinearLayer, own: bool) -> int:
        """Return the multiplications of an adapter in all passes, a row; `own`: it trains."""
        # Forward, gradient of the factor, gradient of its input: B passes one on wherever A needs one.
        width = self.lora.rank * len(layer.parts)
        down = width * layer.inputs * (1 + own + self.reached)
        up_passes = 1 + own + (own or self.reached)
        return down + self.lora.rank * layer.outputs * up_passes

    def _end(self, group: str, leaf: str) -> None:
        """Add what follows a layer and has no adapter: scores, router; note the end of a block."""
        if leaf in ("qkv", "linear_qkv"):
            self.flops[group] += self._attention(group) * (1 + 2.0 * self.reached)
        text = self.config.text
        if leaf == "linear_proj" and text.experts:
            # The router.
            product = 2.0 * self.work.tokens * text.hidden_size * text.experts
            self.flops[group] += product * (1 + self.reached)
        if group == "vision" and leaf == "linear_fc2":
            self.at_block.append(self.reached)

    def _begin(self, layer: LinearLayer, group: str, leaf: str) -> None:
        """Set `reached` where data does not come from the layer before."""
        if group == "merger" and leaf == "linear_fc1":
            # The main merger sees the last block, the others each a block of theirs.
            level = layer.name.removeprefix("visual.deepstack_merger_list.").partition(".")[0]
            levels = self.config.vision.deepstack_layers
            block = levels[int(level)] if level.isdigit() else -1
            self.reached = self.at_block[block]
        elif group == "language" and layer.name.endswith("layers.0.self_attention.linear_qkv"):
            # Features come from all mergers.
            before = self.trainable - {"language"}
            has_adapter = any(group_of(name) in before for name in self.adapted)
            self.reached = has_adapter or any(map(self._trains_whole, before))

    def _rows(self, layer: LinearLayer, group: str) -> int:
        """Return the rows that a layer multiplies: patches, visual tokens or tokens, each once for every expert it takes."""
        merged = self.config.vision.spatial_merge_size**2
        rows = {"vision": self.work.patches, "merger": self.work.patches // merged}
        taken = self.config.text.experts_per_token if layer.experts else 1
        return rows.get(group, self.work.tokens) * taken

    def _attention(self, group: str) -> int:
        """Return forward operations of one layer's scores and weighted sums; causal ones count half."""
        if group == "language":
            text = self.config.text
            return 2 * text.heads * text.head_dim * self.work.token_pairs
        return 4 * self.config.vision.hidden_size * self.work.patch_pairs
