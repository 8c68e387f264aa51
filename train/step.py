"""One optimizer step: micro-batches forward and backward, one division by the global weight, update.

The loss of a step is sum of w * l over sum of w, both over all supervised tokens of the global batch, with weights made
before packing. So it does not depend on packing, micro-batches or layout (docs/decisions.md).
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from visionloom.data.pack import PackedBatch
from visionloom.parallel.topology import Topology
from visionloom.train.build import Stage


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, summed over the global batch."""

    loss: float
    loss_by_source: dict[str, float]
    grad_norm: float
    skipped: bool
    counts: dict[str, int]
    """tokens, supervised_tokens, padding_tokens, visual_tokens, patches, samples, packs."""


class LossSums:
    """Sums of weighted losses and of weights, by source, fp64 on the device."""

    def __init__(self, sources: Sequence[str], device: torch.device) -> None:
        self.sources = tuple(sources)
        self.values = torch.zeros(2, len(self.sources), dtype=torch.float64, device=device)

    def add(self, batch: PackedBatch, losses: Tensor) -> None:
        """Add a micro-batch with the loss of each of its supervised tokens, fp32 [R]."""
        rows = (batch.loss_weights > 0).nonzero()[:, 0]
        places = torch.tensor([self.sources.index(name) for name in batch.source_names] + [0])
        segment = torch.searchsorted(batch.cu_seqlens, rows, right=True) - 1
        source = places[batch.segment_sources[segment]].to(losses.device)
        weights = batch.loss_weights[rows].to(losses.device, torch.float64)
        self.values[0].index_add_(0, source, weights * losses.double())
        self.values[1].index_add_(0, source, weights)

    def means(self) -> tuple[float, dict[str, float]]:
        """Loss over everything and by source; a source without weight is left out."""
        sums, weights = self.values.tolist()
        total = sum(weights)
        loss = sum(sums) / total if total else 0.0
        return loss, {name: s / w for name, s, w in zip(self.sources, sums, weights, strict=True) if w}


def count(batches: Sequence[PackedBatch], packs: int) -> dict[str, int]:
    """Tokens, patches and samples of this rank's micro-batches."""
    tokens = sum(b.real_tokens for b in batches)
    return {
        "tokens": tokens,
        "supervised_tokens": sum(b.supervised_tokens for b in batches),
        "padding_tokens": sum(b.input_ids.numel() for b in batches) - tokens,
        "visual_tokens": sum(b.visual_rows.numel() for b in batches),
        "patches": sum(len(b.patches) for b in batches),
        "samples": sum(len(b.sample_ids) for b in batches),
        "packs": packs,
    }


def train_step(stage: Stage, batches: list[PackedBatch]) -> StepResult:
    """Run this rank's micro-batches, reduce the gradients and update the weights.

    A step whose gradient is not finite changes nothing and is reported as skipped, alike on all ranks.
    """
    topology = stage.topology
    sums = LossSums([corpus.name for corpus in stage.stream.corpora], topology.device)
    stage.wrapped.zero_grad_buffer()
    stage.optimizer.zero_grad()
    run_micro_batches(stage, batches, sums)
    stage.scheduler.step(1)
    grad_norm = update(stage)
    counts = count(batches, len(batches) * stage.phase.micro_batch)
    totals = reduce_counts(counts, topology)
    loss, by_source = sums.means()
    return StepResult(loss, by_source, grad_norm, not math.isfinite(grad_norm), totals)


def run_micro_batches(stage: Stage, batches: list[PackedBatch], sums: LossSums) -> None:
    """Forward and backward of all micro-batches; gradients end up divided by the global weight, `sums` reduced."""
    stage.model.config.finalize_model_grads_func = functools.partial(_finalize, sums=sums, topology=stage.topology)
    get_forward_backward_func()(
        forward_step_func=functools.partial(_forward, sums=sums),
        data_iterator=iter(batches),
        model=[stage.wrapped],
        num_microbatches=len(batches),
        seq_length=stage.phase.sequence_length * stage.phase.micro_batch,
        micro_batch_size=1,
        forward_only=False,
        pg_collection=stage.topology.groups,
    )


def _forward(batches: Iterator[PackedBatch], wrapped: Any, *, sums: LossSums) -> tuple[Tensor, Any]:
    batch = next(batches)
    total, losses = wrapped(wrapped.module.prepare(batch))
    sums.add(batch, losses)
    # Megatron-core counts tokens in integers; the real denominator is a sum of floats, divided by in _finalize.
    no_tokens = torch.zeros([], dtype=torch.int, device=total.device)
    return total, lambda output: (output, no_tokens, {})


def _finalize(chunks: list[Any], num_tokens: Any, *, sums: LossSums, topology: Topology, **options: Any) -> None:
    """Reduce gradients over the ranks and divide them by the weight of the global batch."""
    finalize_model_grads(chunks, None, **options)
    topology.sum_over_data(sums.values)
    weight = sums.values[1].sum()
    scale = torch.where(weight > 0, 1.0 / weight, torch.zeros_like(weight)).float()
    for chunk in chunks:
        chunk.scale_gradients(scale)


def update(stage: Stage) -> float:
    """Clip and apply the gradients; returns the global gradient norm before clipping. Nothing changes if it is not finite."""
    optimizer = stage.optimizer
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if not math.isfinite(norm):
        return norm
    for inner in optimizer.chained_optimizers:
        clip = inner.config.clip_grad
        if clip > 0.0 and inner.get_parameters():
            clip_grad_by_total_norm_fp32(inner.get_parameters(), max_norm=clip, total_norm=norm)
    optimizer.step_with_ready_grads()
    return norm


def reduce_counts(counts: dict[str, int], topology: Topology) -> dict[str, int]:
    """Sum of the counts over the copies of the model."""
    values = torch.tensor(list(counts.values()), dtype=torch.int64, device=topology.device)
    return dict(zip(counts, topology.sum_over_data(values).tolist(), strict=True))
