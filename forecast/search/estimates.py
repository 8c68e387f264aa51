"""About how long a step takes in a layout, and about how much its activations take: to order layouts before any is traced.

What is true of a layout its trace says.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property

from visionloom.forecast.machine import Machine
from visionloom.forecast.search.bounds import expert_ranks, stage_layers
from visionloom.model.flops import StepWork, language_flops, step_flops, vision_flops
from visionloom.model.loss import BLOCK_BYTES
from visionloom.model.vision import PIECE_PATCHES, WHOLE_BLOCKS
from visionloom.parallel.config import ParallelConfig
from visionloom.train.config import RunConfig

DENSE_LAUNCHES, MIXTURE_LAUNCHES, PART_LAUNCHES, BLOCK_LAUNCHES = 24, 65, 35, 31
"""Kernels of a decoder layer, forward and backward, with a second part of the tokens of its experts more, and of a block of the
tower: 881 for the 36 layers of 8B, 3,137 for the 48 of 30B on expert ranks, 4,817 in two parts, and 842 for the 27 blocks (traced)."""
BF16, FP32 = 2, 4
"""Bytes of an activation, and of a value of the loss."""


@dataclass(frozen=True)
class Estimates:
    """Of all layouts of a phase."""

    config: RunConfig
    phase: str
    world_size: int
    machine: Machine
    work: StepWork
    """Of the mean micro-batch."""

    def step_seconds(self, layout: ParallelConfig, rest_bytes: float) -> float:
        """Return the time of a step: its micro-batches through the slowest stage, the bubble, the reduction of gradients."""
        phase = self.config.phases[self.phase]
        copies = layout.data_parallel_size(self.world_size)
        micro_batches = phase.global_batch / (copies * phase.micro_batch)
        bubble = (layout.pipeline - 1) / layout.chunks
        passes = (micro_batches + bubble) * max(self._stage_seconds(layout))

        # Gradients in fp32 and weights in bf16, about a third of what is at rest, move while nothing else runs.
        stage = self.world_size // layout.pipeline
        reduced = rest_bytes / 3 * (1 - layout.tensor / stage)
        return passes + self._transfer(reduced, stage)

    def activation_bytes(self, layout: ParallelConfig) -> float:
        """Return what the fuller of the first and the last stage keeps for its backward passes, and needs for the loss."""
        held = stage_layers(layout, self.config.model.text.layers)
        tokens = self._tokens / (layout.tensor * layout.context)
        layer = tokens * self._layer_width(layout) * BF16
        if layout.offload_activations:
            layer = 0.0
        patches = self.work.patches / layout.encoder_ranks
        if layout.recompute in WHOLE_BLOCKS:
            patches = min(patches, PIECE_PATCHES)
        tower = patches * self._tower_width(layout) * BF16

        # The first stage keeps a micro-batch for each stage; interleaved, one round of chunks more.
        more = (layout.pipeline - 1) / layout.chunks if layout.chunks > 1 else 0.0
        first = (layout.pipeline + more) * (layer * held[0] + tower)
        last = first if layout.pipeline == 1 else layer * held[-1]
        return max(first, last + self._loss_bytes(layout))

    def _loss_bytes(self, layout: ParallelConfig) -> float:
        """Return what the output layer needs: its matrix's gradient in fp32, and first a block of logits, then it in bf16."""
        text = self.config.model.text
        columns = text.vocab_size / layout.tensor
        logits = self.work.supervised_tokens / layout.context * columns * BF16
        weights = text.hidden_size * columns
        return weights * FP32 + max(weights * BF16, min(BLOCK_BYTES, logits))

    @cached_property
    def flops(self) -> dict[str, float]:
        """Return the operations of a micro-batch by part, forward and backward."""
        config = self.config
        trainable = set(config.phases[self.phase].trainable)
        lora = config.lora if config.lora.rank else None
        return step_flops(config.model, self.work, trainable, lora)

    @property
    def _tokens(self) -> int:
        """Return the tokens of a micro-batch, padding included."""
        phase = self.config.phases[self.phase]
        return phase.sequence_length * phase.micro_batch

    def _layer_width(self, layout: ParallelConfig) -> float:
        """Return the values of a token that a decoder layer keeps, within 2 % of traces of 8B and 30B."""
        text = self.config.model.text
        if layout.recompute == "full":
            return text.hidden_size
        if layout.recompute == "all_but_attention":
            return text.hidden_size + text.heads * text.head_dim

        # The residual streams before both norms; queries, keys and values joined; and what attention returns.
        queries, keys = text.heads * text.head_dim, text.kv_heads * text.head_dim
        width = 2 * text.hidden_size + 2 * queries + 2 * keys
        if layout.recompute == "mlp":
            return width
        # Gate and up, of each expert of a token.
        each, inner = 1, text.ffn_hidden_size
        if text.experts:
            each, inner = text.experts_per_token, text.expert_ffn_hidden_size
        width += each * 2 * inner
        if layout.recompute != "none":
            # The experts' rows are copied again from those that have come, of all that cut an expert.
            gathered = self._sent_rows(layout) * (layout.expert_tensor or 1)
            return width + gathered * text.hidden_size
        # Results of both norms; queries and keys rotated; of SwiGLU; and the rows of a token's experts.
        copied = each * text.hidden_size if text.experts else 0
        return width + 2 * text.hidden_size + queries + keys + each * inner + copied

    def _sent_rows(self, layout: ParallelConfig) -> float:
        """Return how many expert ranks have some of a token's experts, which it draws; 0 where nothing is sent."""
        text, ranks = self.config.model.text, layout.expert
        if not text.experts or expert_ranks(layout) == 1:
            return 0.0
        others = math.comb(text.experts - text.experts // ranks, text.experts_per_token)
        return ranks * (1 - others / math.comb(text.experts, text.experts_per_token))

    def _tower_width(self, layout: ParallelConfig) -> float:
        """Return the values of a patch that the tower and its mergers keep, within 5 % of traces of 8B."""
        vision = self.config.model.vision
        size = vision.hidden_size
        # A merger's norm, first product and GELU, and the next one's input: four patches share four times the width.
        mergers = 4 * size * (1 + len(vision.deepstack_layers))
        # The input alone; or the residual streams, queries, keys and values joined, and what attention returns.
        block = size
        if layout.recompute == "all_but_attention":
            block = 2 * size
        elif layout.recompute != "full":
            block = 6 * size
        if layout.recompute not in (*WHOLE_BLOCKS, "mlp"):
            # The GELU's input.
            block += vision.ffn_hidden_size
        if layout.recompute == "none":
            # Results of both norms and of the GELU; queries and keys rotated.
            block += vision.ffn_hidden_size + 4 * size
        return float(vision.depth * block + mergers)

    def _stage_seconds(self, layout: ParallelConfig) -> list[float]:
        """Return the time of a micro-batch on each stage, forward and backward."""
        model, flops = self.config.model, self.flops
        speed = self.machine.peak * self.machine.product_share
        shared = layout.tensor * layout.context
        again_language, again_vision = self._recomputed(layout)
        language = (flops["language"] + again_language) / shared / model.text.layers / speed
        tower = flops["vision"] + flops["merger"] + again_vision
        tower_seconds = tower / layout.encoder_ranks / speed

        # However small its products are, each kernel must be launched.
        passes = 1.5 if layout.recompute in WHOLE_BLOCKS else 1.0
        launch = self.machine.launch * passes
        launches = DENSE_LAUNCHES
        if model.text.experts:
            launches = MIXTURE_LAUNCHES + PART_LAUNCHES * (layout.expert_parts - 1)
        layer = max(language, launches * launch) + self._layer_transfers(layout)
        stages = [layers * layer for layers in stage_layers(layout, model.text.layers)]
        stages[0] += max(tower_seconds, model.vision.depth * BLOCK_LAUNCHES * launch)
        stages[-1] += flops["output"] / shared / speed
        return [seconds + self._stage_transfers(layout) for seconds in stages]

    def _recomputed(self, layout: ParallelConfig) -> tuple[float, float]:
        """Return the operations that are done again in the backward pass, of the language model and of the tower."""
        text, vision = self.config.model.text, self.config.model.vision
        # Norms and activations take no products.
        if layout.recompute not in ("mlp", *WHOLE_BLOCKS):
            return 0.0, 0.0
        work = self.work
        if layout.recompute == "all_but_attention":
            work = replace(work, token_pairs=0, patch_pairs=0)
        language, tower = language_flops(text, work), vision_flops(vision, work)
        if layout.recompute == "mlp":
            attention = replace(text, ffn_hidden_size=0, expert_ffn_hidden_size=0)
            language -= language_flops(attention, self.work)
            tower -= vision_flops(replace(vision, ffn_hidden_size=0), self.work)
        return language, tower

    def _layer_transfers(self, layout: ParallelConfig) -> float:
        """Return the time of a layer's messages in a micro-batch in which nothing else runs."""
        text = self.config.model.text
        tensor, context = layout.tensor, layout.context
        tokens = self._tokens / context * BF16
        # All tokens of a context rank are gathered and scattered twice, for attention and for the MLP.
        gathered = 4 * tokens * text.hidden_size * (1 - 1 / tensor)
        keys = 2 * text.kv_heads * text.head_dim
        exchanged = tokens * context * keys
        if layout.context_exchange == "ulysses":
            exchanged = tokens * (keys + 2 * text.heads * text.head_dim)
        exchanged *= (1 - 1 / context) / tensor
        # To the experts and back, where what one part of the tokens sends another's products hide; ranks that share one expert
        # gather what each of them gets.
        others = (1 - 1 / layout.expert) / layout.expert_parts + (layout.expert_tensor or 1) - 1
        sent = 2 * tokens / tensor * self._sent_rows(layout) * text.hidden_size * others

        passes = 3 if layout.recompute in WHOLE_BLOCKS else 2
        once = self._transfer(gathered, tensor) + self._transfer(exchanged, tensor * context)
        return passes * (once + self._transfer(sent, expert_ranks(layout)))

    def _stage_transfers(self, layout: ParallelConfig) -> float:
        """Return the time of a stage's messages to the next one, a forward and a backward one for each chunk."""
        if layout.pipeline == 1:
            return 0.0
        shared = layout.tensor * layout.context
        hidden = self._tokens / shared * self.config.model.text.hidden_size * BF16
        return 2 * layout.chunks * self._transfer(hidden, self.world_size)

    def _transfer(self, volume: float, ranks: int) -> float:
        """Return the seconds in which a rank moves bytes among neighbouring ranks."""
        inside = ranks <= self.machine.node_ranks
        speed = self.machine.inside_gbps if inside else self.machine.between_gbps
        return volume / (speed * 1e9)
