"""List the linear layers that can have a LoRA adapter, by names here and in transformers, with the options of LoRA.

Source: LoRA (arXiv 2106.09685). The router, the patch embedding, the embeddings and the output layer have none.
Nothing here imports torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from visionloom.common.settings import option
from visionloom.model.config import GROUPS, ModelConfig, TextConfig, VisionConfig
from visionloom.model.trainable import group_of, is_adapter

WHOLE_GROUPS = ("vision", "merger")
"""Groups that are small beside the language model, whose adapters save most of the memory."""
EXPERT_RANKS = 8
"""A rank is a multiple of this where experts have adapters: grouped bf16 products want rows of 16 bytes."""


@dataclass
class LoraConfig:
    """Low-rank adapters, which then train alone, or together with the weights of `full`."""

    rank: int = option(0, "never", least=0, most=65_536)
    """Width of an adapter; 0: no adapters, the weights themselves train."""
    alpha: float = option(32.0, "run", above=0, most=1e6)
    """An adapter's output is multiplied by alpha / rank."""
    dropout: float = option(0.0, "run", least=0, below=1)
    """Share of an adapter's input values that are zeroed in training."""
    targets: list[str] = option(["*"], "never", entries=64)
    """Linear layers that get an adapter: patterns for whole names (`language_model.decoder.layers.*.self_attention.*`) or last
    names (`linear_qkv`, `linear_proj`, `linear_fc1`, `linear_fc2`; in the vision tower also `qkv` and `proj`)."""
    groups: list[str] = option(["language"], "never", choices=GROUPS)
    """Parameter groups whose layers get adapters: vision, merger, language. A phase trains those that its `trainable` names."""
    full: list[str] = option([], "never", choices=WHOLE_GROUPS)
    """Parameter groups whose weights train themselves beside the adapters: vision, merger; none of `groups`."""
    adapter: str = option("", "run")
    """Folder of a PEFT adapter to start from; empty: new adapters, which change nothing at first."""

    @property
    def scaling(self) -> float:
        """Return the factor of an adapter's output."""
        return self.alpha / self.rank

    @property
    def trained_groups(self) -> list[str]:
        """Return the groups of which something can train: adapters or weights."""
        return [*self.groups, *self.full]

    def trains(self, name: str) -> bool:
        """Return whether a parameter, by its name in the model, trains and is kept in checkpoints."""
        return is_adapter(name) or group_of(name) in self.full

    def problems(self, here: str) -> Iterator[str]:
        """Yield a line where an adapter is named, but no adapters train, and for a group that would train twice."""
        if self.rank == 0 and self.adapter:
            yield f"{here}.adapter={self.adapter} needs {here}.rank: set it to the adapter's rank"
        if self.rank == 0 and self.full:
            yield f"{here}.full={self.full} needs {here}.rank above 0: without adapters all weights train"
        # An adapter on weights that train themselves would be a second rate for the same thing.
        both = [group for group in self.full if group in self.groups]
        if self.rank and both:
            yield f"{here}.full and {here}.groups both have {', '.join(both)}: take it out of one of them"

    def layer_problems(self, model: ModelConfig) -> list[str]:
        """Return why these adapters cannot be put on a model's layers: a line a problem; the rank is above 0."""
        layers = [layer for layer in linear_layers(model) if group_of(layer.name) in self.groups]
        lines = []
        for pattern in self.targets:
            if not any(_matches(layer.name, pattern) for layer in layers):
                lines.append(
                    f"lora.targets={pattern} matches no linear layer of lora.groups={self.groups}:"
                    " use names such as linear_qkv or *.mlp.*"
                )

        chosen = adapted_layers(model, self)
        if not lines and not chosen:
            lines.append(
                "lora.targets and lora.groups choose no layer: name at least one of each, or set lora.rank=0"
            )
        if any(layer.experts for layer in chosen):
            lines += self._expert_problems()
        return lines

    def _expert_problems(self) -> Iterator[str]:
        if self.rank % EXPERT_RANKS:
            yield f"lora.rank={self.rank} must be a multiple of {EXPERT_RANKS} where experts have adapters"
        if self.dropout:
            yield (
                f"lora.dropout={self.dropout:g} does not work with adapters on experts:"
                " set it to 0 or leave the experts out, lora.targets=['*.self_attention.*']"
            )


@dataclass(frozen=True)
class LinearLayer:
    """One linear layer that can have an adapter.

    Matrices that transformers keeps apart (q, k, v) are parts with adapters of their own.
    """

    name: str
    """Canonical name of the module."""
    theirs: str
    """Name of the transformers module that has the parts."""
    parts: dict[str, int]
    """Output width of each part, by its name in transformers."""
    inputs: int
    """Width of its input."""
    experts: int = 0
    """Matrices of this size, one an expert; 0: it is no expert layer."""

    @property
    def outputs(self) -> int:
        """Return the width of all parts together."""
        return sum(self.parts.values())


def linear_layers(model: ModelConfig) -> Iterator[LinearLayer]:
    """Yield all layers that can have an adapter, in the order in which data passes them: tower, mergers, language model."""
    vision = model.vision
    for block in range(vision.depth):
        yield from vision_block_layers(vision, f"visual.blocks.{block}")

    merged = vision.hidden_size * vision.spatial_merge_size**2
    levels = range(len(vision.deepstack_layers))
    mergers = ["visual.merger"] + [f"visual.deepstack_merger_list.{level}" for level in levels]
    for name in mergers:
        yield _plain(name, "linear_fc1", merged, merged)
        yield _plain(name, "linear_fc2", merged, model.text.hidden_size)

    for layer in range(model.text.layers):
        yield from decoder_layers(model, layer)


def vision_block_layers(vision: VisionConfig, name: str) -> Iterator[LinearLayer]:
    """Yield the layers of a block of the vision tower."""
    width, inner = vision.hidden_size, vision.ffn_hidden_size
    yield _plain(f"{name}.attn", "qkv", width, 3 * width)
    yield _plain(f"{name}.attn", "proj", width, width)
    yield _plain(f"{name}.mlp", "linear_fc1", width, inner)
    yield _plain(f"{name}.mlp", "linear_fc2", inner, width)


def _plain(parent: str, leaf: str, inputs: int, outputs: int) -> LinearLayer:
    """Return a layer that has one part and one name here and there."""
    return LinearLayer(f"{parent}.{leaf}", f"model.{parent}", {leaf: outputs}, inputs)


def decoder_layers(model: ModelConfig, layer: int) -> Iterator[LinearLayer]:
    """Yield the layers of a decoder layer that can have an adapter."""
    text = model.text
    here = f"language_model.decoder.layers.{layer}"
    there = f"model.language_model.layers.{layer}"

    name, theirs = f"{here}.self_attention.linear", f"{there}.self_attn"
    queries = text.heads * text.head_dim
    keys = text.kv_heads * text.head_dim
    joint = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    # One matrix of three parts here, three matrices there.
    yield LinearLayer(f"{name}_qkv", theirs, joint, text.hidden_size)
    yield LinearLayer(f"{name}_proj", theirs, {"o_proj": text.hidden_size}, queries)

    yield from feed_forward_layers(text, f"{here}.mlp", f"{there}.mlp")


def feed_forward_layers(text: TextConfig, here: str, there: str) -> Iterator[LinearLayer]:
    """Yield the two matrices of a decoder layer's MLP, or those of all its experts."""
    hidden, width = text.hidden_size, text.ffn_hidden_size
    gated = {"gate_proj": width, "up_proj": width}
    if text.experts:
        here, there = f"{here}.experts", f"{there}.experts"
        width = text.expert_ffn_hidden_size
        gated = {"gate_up_proj": 2 * width}
    yield LinearLayer(f"{here}.linear_fc1", there, gated, hidden, text.experts)
    yield LinearLayer(f"{here}.linear_fc2", there, {"down_proj": hidden}, width, text.experts)


def adapted_layers(model: ModelConfig, lora: LoraConfig) -> list[LinearLayer]:
    """Return the layers that `lora` gives an adapter, in order."""
    layers = [layer for layer in linear_layers(model) if group_of(layer.name) in lora.groups]
    return [
        layer for layer in layers if any(_matches(layer.name, pattern) for pattern in lora.targets)
    ]


def _matches(name: str, pattern: str) -> bool:
    """Return whether a pattern fits a layer's whole name or its last one."""
    return fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[2], pattern)
