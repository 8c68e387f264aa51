"""What a layout needs at least: weights, gradients and optimizer of the fullest rank, by arithmetic. Imports no torch.

What activations take on top of it a trace says.
"""

import functools
import math
from collections import Counter
from dataclasses import dataclass
from typing import Final

from visionloom.model.config import ModelConfig
from visionloom.model.huggingface.shapes import parameter_shapes
from visionloom.model.trainable import group_of
from visionloom.parallel.config import ParallelConfig
from visionloom.parallel.pipeline import layers_per_chunk
from visionloom.train.config import RunConfig
from visionloom.train.optim.config import OptimConfig

LAYERS: Final = "language_model.decoder.layers."
FIRST, LAYER, LAST = "first", "layer", "last"
"""Where a parameter is: on the first stage, in each decoder layer, on the last stage."""
WHOLE, TENSOR, EXPERTS = "whole", "tensor", "experts"
"""What it is cut over: nothing, the tensor ranks, the ranks that share experts."""
ParameterKind = tuple[str, str, str]
"""Place, cut and parameter group."""


def stage_layers(layout: ParallelConfig, layers: int) -> tuple[int, ...]:
    """Return the decoder layers of each pipeline stage."""
    return _stage_layers(layout.pipeline, layout.virtual_pipeline, layout.pipeline_layout, layers)


@functools.cache
def _stage_layers(
    pipeline: int, virtual_pipeline: int | None, pipeline_layout: str | None, layers: int
) -> tuple[int, ...]:
    """Return them, once for the thousands of layouts that a search has of each pipeline."""
    layout = ParallelConfig(
        pipeline=pipeline, virtual_pipeline=virtual_pipeline, pipeline_layout=pipeline_layout
    )
    chunks = layers_per_chunk(layout, layers)
    return tuple(sum(chunks[stage::pipeline]) for stage in range(pipeline))


def parameter_counts(model: ModelConfig) -> dict[ParameterKind, int]:
    """Count the parameters by place, cut and group; of all equal decoder layers one is counted."""
    counts: Counter[ParameterKind] = Counter()
    for name, shape in parameter_shapes(model).items():
        place = FIRST
        if name.startswith(f"{LAYERS}0."):
            place = LAYER
        elif name.startswith(LAYERS):
            continue
        elif "final_layernorm" in name or "output_layer" in name:
            place = LAST

        cut = WHOLE
        if ".experts." in name:
            cut = EXPERTS
        elif name.startswith("language_model.") and len(shape) == 2 and ".router" not in name:
            cut = TENSOR
        counts[place, cut, group_of(name)] += math.prod(shape)
    return dict(counts)


@dataclass(frozen=True)
class RestBounds:
    """Least memory between two steps in any layout of a run."""

    counts: dict[ParameterKind, int]
    layers: int
    tied: int
    """Parameters of the embedding that the last of several stages holds too; 0 where it is not tied."""
    trainable: frozenset[str]
    """Groups whose weights train."""
    element_bytes: int
    """Of a weight."""
    optimizer_bytes: int
    """Of a weight that trains, over all its holders."""
    world_size: int

    @classmethod
    def of(cls, config: RunConfig, phase: str, world_size: int) -> "RestBounds":
        """Return those of a phase; adapters count nothing, so that the bound stays one."""
        is_fp32 = config.run.precision == "fp32"
        trains = frozenset(config.phases[phase].trainable)
        if config.lora.rank:
            trains &= frozenset(config.lora.full)
        text = config.model.text
        return cls(
            counts=parameter_counts(config.model),
            layers=text.layers,
            tied=text.vocab_size * text.hidden_size * text.tie_embeddings,
            trainable=trains,
            element_bytes=4 if is_fp32 else 2,
            optimizer_bytes=_optimizer_bytes(config.phase_optim(phase), is_fp32),
            world_size=world_size,
        )

    def of_fullest_rank(self, layout: ParallelConfig) -> float:
        """Return the bytes at rest on a rank of the fullest stage."""
        held = stage_layers(layout, self.layers)
        in_layer = self._bytes(layout, LAYER)
        stages = [layers * in_layer for layers in held]
        stages[0] += self._bytes(layout, FIRST)
        stages[-1] += self._bytes(layout, LAST)
        if layout.pipeline > 1:
            each = self._bytes_each(layout, TENSOR, "language")
            stages[-1] += self.tied / layout.tensor * each
        return max(stages)

    def _bytes(self, layout: ParallelConfig, wanted: str) -> float:
        """Return the bytes at rest of what is at a place."""
        ways = {WHOLE: 1, TENSOR: layout.tensor, EXPERTS: expert_ranks(layout)}
        total = 0.0
        for (place, cut, group), count in self.counts.items():
            if place == wanted:
                total += count / ways[cut] * self._bytes_each(layout, cut, group)
        return total

    def _bytes_each(self, layout: ParallelConfig, cut: str, group: str) -> float:
        """Return the bytes of a parameter: weight, gradient in fp32, share of the optimizer."""
        if group not in self.trainable:
            return self.element_bytes
        stage = self.world_size // layout.pipeline
        holders = stage // (expert_ranks(layout) if cut == EXPERTS else layout.tensor)
        return self.element_bytes + 4 + self.optimizer_bytes / holders


def _optimizer_bytes(optim: OptimConfig, is_fp32: bool) -> int:
    """Return the least bytes of a weight's moments, and where weights are bf16 of its copy in fp32."""
    # Muon has one for most weights; in bf16 the two of AdamW take as much.
    moments = 4 if optim.name == "muon" or optim.moments != "fp32" else 8
    return moments if is_fp32 else moments + 4


def expert_ranks(layout: ParallelConfig) -> int:
    """Return the number of ranks that share the experts of a layer."""
    return layout.expert * (layout.expert_tensor or 1)
