"""One optimizer step: micro-batches forward and backward, one division by the global weight, update.

The loss of a step is sum of w * l over sum of w, both over all supervised tokens of the global batch, with weights made
before packing. So it does not depend on packing, micro-batches or layout (docs/decisions.md).
"""

import functools
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from visionloom.data.stream.batch import PackedBatch
from visionloom.model.experts import close_step
from visionloom.model.qwen3vl import Qwen3VL
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
    router: dict[str, float]
    """Health of a mixture's routers; see model/experts.py `close_step`."""


class LossSums:
    """Sums of weighted losses and of weights, by source, fp64 on the device."""

    def __init__(self, sources: Sequence[str], device: torch.device) -> None:
        self.sources = tuple(sources)
        self.values = torch.zeros(2, len(self.sources), dtype=torch.float64, device=device)

    def add(self, batch: PackedBatch, tokens: Tensor, losses: Tensor) -> None:
        """Add a micro-batch with the loss of each of its supervised tokens, fp32 [R], and their rows, int64 [R] on the host."""
        places = torch.tensor([self.sources.index(name) for name in batch.source_names] + [0])
        segment = torch.searchsorted(batch.cu_seqlens, tokens, right=True) - 1
        source = places[batch.segment_sources[segment]].to(losses.device)
        weights = batch.loss_weights[tokens].to(losses.device, torch.float64)
        self.values[0].index_add_(0, source, weights * losses.double())
        self.values[1].index_add_(0, source, weights)

    def reduce(self, topology: Topology) -> None:
        """Sum over all tokens of the global batch; only the last pipeline stage has added any."""
        topology.from_last_stage(topology.sum_over_tokens(self.values))

    def means(self) -> tuple[float, dict[str, float]]:
        """Loss over everything and by source; a source without weight is left out."""
        sums, weights = self.values.tolist()
        total = sum(weights)
        loss = sum(sums) / total if total else 0.0
        return loss, {name: s / w for name, s, w in zip(self.sources, sums, weights, strict=True) if w}


def count(batches: Sequence[PackedBatch], packs: int) -> dict[str, int]:
    """Tokens, patches and samples of this data-parallel rank's micro-batches."""
    tokens = sum(b.real_tokens for b in batches)
    return {
        "tokens": tokens,
        "supervised_tokens": sum(b.supervised_tokens for b in batches),
        "padding_tokens": sum(b.input_ids.numel() for b in batches) - tokens,
        "visual_tokens": sum(b.visual_rows.numel() for b in batches),
        "patches": sum(b.patch_count for b in batches),
        "samples": sum(len(b.sample_ids) for b in batches),
        "packs": packs,
    }


def train_step(stage: Stage, batches: list[PackedBatch]) -> StepResult:
    """Run this rank's micro-batches, reduce the gradients and update the weights.

    A step whose gradient is not finite changes nothing and is reported as skipped, alike on all ranks.
    """
    topology = stage.topology
    batches = agree_on_unreadable(batches, topology)
    sums = LossSums([corpus.name for corpus in stage.stream.corpora], topology.device)
    for chunk in stage.wrapped:
        chunk.zero_grad_buffer()
    stage.optimizer.zero_grad()
    run_micro_batches(stage, batches, sums)
    stage.scheduler.step(1)
    grad_norm = update(stage)
    router = close_step(stage.chunks, topology)
    counts = count(batches, len(batches) * stage.phase.micro_batch)
    totals = reduce_counts(counts, topology)
    loss, by_source = sums.means()
    return StepResult(loss, by_source, grad_norm, not math.isfinite(grad_norm), totals, router)


def encoder_of(topology: Topology) -> tuple[int, int]:
    """This rank's place among the encoder ranks, which decode a pack's pictures, and their number; -1: it decodes none."""
    return -1 if topology.encoder_rank is None else topology.encoder_rank, topology.config.encoder_ranks


def agree_on_unreadable(batches: list[PackedBatch], topology: Topology) -> list[PackedBatch]:
    """Take samples out of the loss on all ranks that share a pack if one of them could not read their pictures.

    Raises RuntimeError on all of them if they do not have the same text and pictures in a pack, as when a shard has vanished
    for some only: exchanging features would hang.
    """
    if topology.config.model_parallel_size == 1:
        return batches
    content = zlib.crc32(b"".join(t.numpy().tobytes() for b in batches for t in (b.input_ids, b.grid_thw)))
    unreadable = torch.cat([batch.unreadable for batch in batches])
    found = torch.cat([torch.tensor([content, -content]), unreadable.long()]).to(topology.device)
    for group in (topology.groups.tp_cp, topology.groups.pp):
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
    if int(found[0]) != -int(found[1]):
        raise RuntimeError(
            "ranks that share a pack have read different samples: a shard can be read by some of them only; check the storage"
            " (python launch/data.py verify) and start the same command again"
        )
    if not found[2:].any():
        return batches
    parts = found[2:].bool().cpu().split([len(batch.unreadable) for batch in batches])
    return [batch.without(part) for batch, part in zip(batches, parts, strict=True)]


def run_micro_batches(stage: Stage, batches: list[PackedBatch], sums: LossSums) -> None:
    """Forward and backward of all micro-batches; gradients end up divided by the global weight, `sums` reduced."""
    for chunk in stage.chunks:
        chunk.config.finalize_model_grads_func = functools.partial(_finalize, sums=sums, topology=stage.topology)
        if stage.model_config.text.experts:
            chunk.config.moe_grad_scale_func = functools.partial(torch.Tensor.clone, _balance_scale(batches, stage.topology))
    run_schedule(functools.partial(forward_losses, sums=sums), stage.wrapped, batches, stage.topology, forward_only=False)


def run_schedule(
    forward: Callable[..., Any],
    chunks: Sequence[Any],
    batches: list[PackedBatch],
    topology: Topology,
    forward_only: bool,
    **options: Any,
) -> list[Any]:
    """Megatron-core's schedule for this layout over all micro-batches; what the last stage collected, empty elsewhere.

    Args:
        forward: called with an iterator over `batches` and a chunk.
        chunks: of this stage, wrapped for data parallelism or not.
        batches: alike on all stages.
        topology: the layout.
        forward_only: without a backward pass.
        options: of the schedule.
    """
    found: list[Any] = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=[iter(batches) for _ in chunks] if len(chunks) > 1 else iter(batches),
        model=list(chunks),
        num_microbatches=len(batches),
        seq_length=batches[0].input_ids.numel(),
        micro_batch_size=1,
        forward_only=forward_only,
        # Without pipeline stages the groups can be given; with them Megatron-core takes its own.
        pg_collection=topology.groups if topology.config.pipeline == 1 else None,
        **options,
    )
    return found


def model_of(chunk: Any) -> Qwen3VL:
    """A chunk without its data-parallel wrapper."""
    found: Qwen3VL = getattr(chunk, "module", chunk)
    return found


def forward_losses(batches: Iterator[PackedBatch], chunk: Any, *, sums: LossSums) -> tuple[Tensor, Any]:
    """A chunk's forward pass of the next micro-batch, as Megatron-core's schedule calls it; `sums` gets the losses."""
    batch = next(batches)
    model = model_of(chunk)
    inputs = model.prepare(batch)
    output = chunk(inputs)
    if model.post_process:
        output, losses = output
        sums.add(batch, inputs.loss_tokens, losses)
    # Megatron-core counts tokens in integers; the real denominator is a sum of floats, divided by in _finalize.
    no_tokens = torch.zeros([], dtype=torch.int, device=output.device)
    return output, lambda total: (total, no_tokens, {})


def _balance_scale(batches: list[PackedBatch], topology: Topology) -> Tensor:
    """Weight of the global batch over its tokens: gradients are divided by the weight, the balance is a mean over tokens."""
    own = torch.tensor(
        [[float(b.loss_weights.sum(dtype=torch.float64)), float(b.real_tokens)] for b in batches], dtype=torch.float64
    )
    weight, tokens = topology.sum_over_data(own.sum(0).to(topology.device))
    return (weight / tokens.clamp_min(1.0)).float().reshape(1)  # Megatron-core keeps one for the process, of this shape


def _finalize(chunks: list[Any], num_tokens: Any, *, sums: LossSums, topology: Topology, **options: Any) -> None:
    """Reduce gradients over the ranks and divide them by the weight of the global batch."""
    finalize_model_grads(chunks, None, **options)
    sums.reduce(topology)
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
