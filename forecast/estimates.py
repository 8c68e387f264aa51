"""About how long a step takes in a layout, and about how much its activations take: to order layouts before any is traced.

What is true of a layout its trace says. No torch.
"""

from dataclasses import dataclass, replace
from typing import Final, Protocol

from visionloom.forecast.bounds import expert_ranks, stage_layers
from visionloom.model.flops import (
    StepWork,
    language_flops,
    merger_flops,
    step_flops,
    vision_flops,
)
from visionloom.parallel.config import ParallelConfig
from visionloom.train.config import RunConfig

LAUNCHES: Final = 170
"""Kernels of a block or layer, forward and backward: 9,259 for the 24 blocks and 28 layers of 2B (traced)."""
BF16: Final = 2
"""Bytes of an activation."""


class SearchMachine(Protocol):
    """The numbers of a GPU that estimates need; see forecast/machine.py."""

    node_ranks: int
    product_share: float
    launch: float
    inside_gbps: float
    between_gbps: float

    @property
    def usable_bytes(self) -> int:
        """Return the bytes that tensors can have."""

    @property
    def peak(self) -> float:
        """Return the operations a second of bf16 products."""


@dataclass(frozen=True)
class Estimates:
    """Of all layouts of a phase."""

    config: RunConfig
    phase: str
    world_size: int
    machine: SearchMachine
    work: StepWork
    """Of the mean micro-batch."""

    @property
    def tokens(self) -> int:
        """Return the tokens of a micro-batch, padding included."""
        phase = self.config.phases[self.phase]
        return phase.sequence_length * phase.micro_batch

    def step_seconds(self, layout: ParallelConfig, rest_bytes: float) -> float:
        """Return the time of a step: its micro-batches through the slowest stage, the bubble, the reduction of gradients."""
        phase = self.config.phases[self.phase]
        copies = layout.data_parallel_size(self.world_size)
        micro_batches = phase.global_batch / (copies * phase.micro_batch)
        bubble = (layout.pipeline - 1) / layout.chunks
        passes = (micro_batches + bubble) * max(self._stage_seconds(layout))
        # Gradients in fp32 and weights in bf16, about a third of what is at rest, are not overlapped with anything.
        reduced = rest_bytes / 3 * (1 - 1 / (self.world_size // layout.pipeline))
        return passes + self._transfer(reduced, self.world_size)

    def activation_bytes(self, layout: ParallelConfig) -> float:
        """Return what the first or the last stage keeps for its backward passes."""
        text = self.config.model.text
        shared = layout.tensor * layout.context
        kept = self.tokens / shared * self._layer_width(layout) * BF16
        # The first stage keeps a micro-batch for each stage, and interleaved a part of them more.
        share = 1 + (layout.pipeline - 1) / (layout.pipeline * layout.chunks)
        in_flight = layout.pipeline * (share if layout.chunks > 1 else 1)
        layers = stage_layers(layout, text.layers)
        kept_layers = 0.0 if layout.offload_activations else kept * layers[0] * in_flight
        tower = self.work.patches / layout.encoder_ranks * self._tower_width(layout) * BF16
        logits = self.work.supervised_tokens / shared * text.vocab_size * (4 + BF16)
        return max(kept_layers + tower * min(in_flight, layout.pipeline), kept * layers[-1] + logits)

    def _layer_width(self, layout: ParallelConfig) -> float:
        """Return the values of a token that a layer keeps."""
        text = self.config.model.text
        if layout.recompute == "full":
            return text.hidden_size
        queries, keys = text.heads * text.head_dim, text.kv_heads * text.head_dim
        # Inputs of both norms and of the products after them; queries, keys and values before and after their norms.
        attention = 4 * text.hidden_size + 3 * queries + 4 * keys
        if not text.experts:
            return attention + 4 * text.ffn_hidden_size
        if layout.recompute == "selective":
            return attention
        copies = 2 * text.hidden_size + 4 * text.expert_ffn_hidden_size
        return attention + text.experts_per_token * copies

    def _tower_width(self, layout: ParallelConfig) -> float:
        """Return the values of a patch that the whole tower keeps."""
        vision = self.config.model.vision
        if layout.recompute == "full":
            return vision.depth * vision.hidden_size
        return vision.depth * (9 * vision.hidden_size + 2 * vision.ffn_hidden_size)

    def _stage_seconds(self, layout: ParallelConfig) -> list[float]:
        """Return the time of a micro-batch on each stage, forward and backward."""
        config, model = self.config, self.config.model
        trainable = set(config.phases[self.phase].trainable)
        lora = config.lora if config.lora.rank else None
        flops = step_flops(model, self.work, trainable, lora)
        tower = (flops["vision"] + flops["merger"]) / layout.encoder_ranks
        language = flops["language"]
        if layout.recompute == "full":
            language += language_flops(model.text, self.work)
            tower += vision_flops(model.vision, self.work) / layout.encoder_ranks
            tower += merger_flops(model, self.work) * 0
        elif layout.recompute == "selective":
            language += self._selective_flops()

        shared = layout.tensor * layout.context
        layer = language / shared / model.text.layers / self._speed
        layer = max(layer, LAUNCHES * self.machine.launch) + self._layer_transfers(layout)
        stages = [layers * layer for layers in stage_layers(layout, model.text.layers)]
        launches = model.vision.depth * LAUNCHES * self.machine.launch
        stages[0] += max(tower / self._speed, launches)
        stages[-1] += flops["output"] / shared / self._speed
        return stages
