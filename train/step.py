"""One optimizer step: micro-batches forward and backward, one division by the global weight, update.

The loss of a step is sum of w * l over sum of w, both over all supervised tokens of the global batch, with weights made
before packing. So it does not depend on packing, micro-batches or layout (docs/decisions.md).

The host waits for the device twice, both times before the update: for the gradient norm, which Megatron-core clips by, and
for the sums of the step, which are there by then. A mixture's token dispatch waits on its own account in each layer.
"""

import functools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from visionloom.data.stream.batch import PackedBatch
from visionloom.model.experts import update_router_loads
from visionloom.model.qwen3vl import Qwen3VL
from visionloom.parallel.device import to_device
from visionloom.parallel.topology import Topology
from visionloom.train.distillation.teacher import Teacher
from visionloom.train.optim.bad_steps import Verdict
from visionloom.train.phase.trainer import PhaseTrainer
from visionloom.train.step_sums import LossSums, Signals, StepCounts, StepSums, StepTotals

SILENT = Signals()


@dataclass(frozen=True)
class StepResult:
    """Sums, gradient norm and outcome of one optimizer step."""

    totals: StepTotals
    """Over the global batch."""
    grad_norm: float
    """Before clipping."""
    verdict: Verdict
    """Whether it was skipped, and nothing was changed."""

    @property
    def loss(self) -> float:
        """Return the loss over the global batch."""
        return self.totals.loss


def train_step(
    trainer: PhaseTrainer, batches: list[PackedBatch], signals: Signals = SILENT
) -> StepResult:
    """Run this rank's micro-batches, reduce the gradients and update the weights.

    Those that a teacher with a layout of its own reads come after the student's.
    A step whose loss or gradient is not finite changes nothing and is reported as skipped, alike on all ranks.
    """
    if trainer.teacher is not None:
        # First: what the ranks of a student agree on, those of its teacher may not share.
        batches = trainer.teacher.take(batches)
    batches = agree_on_unreadable(batches, trainer.topology)
    sums = open_sums(trainer, batches, signals)
    compute_gradients(trainer, batches, sums)
    trainer.scheduler.step(1)
    grad_norm = trainer.engine.gradient_norm()
    totals = sums.totals()  # now and not after the update, which would have to be waited for
    verdict = trainer.judge.judge(totals.loss, grad_norm)
    if verdict.skipped:
        trainer.engine.drop()
    else:
        trainer.engine.update(grad_norm)
    return StepResult(totals, grad_norm, verdict)


def open_sums(
    trainer: PhaseTrainer, batches: list[PackedBatch], signals: Signals = SILENT
) -> StepSums:
    """Begin the sums of a step with what is known of its micro-batches before it runs."""
    counts = StepCounts.of(batches, len(batches) * trainer.phase.micro_batch)
    names = [dataset.name for dataset in trainer.stream.datasets]
    return StepSums(names, counts, trainer.flops(counts.work), signals, trainer.topology)


def agree_on_unreadable(batches: list[PackedBatch], topology: Topology) -> list[PackedBatch]:
    """Take samples out of the loss on all ranks that share a pack if one of them could not read their pictures.

    The hosts agree among themselves, over gloo: the device is not waited for.

    Raises:
        RuntimeError: on all of them if they do not have the same text and pictures in a pack, as when a shard has vanished
            for some only: exchanging features would hang.
    """
    if topology.pack_hosts is None:
        return batches
    content = 0
    for batch in batches:
        for tensor in (batch.input_ids, batch.grid_thw):
            content = zlib.crc32(tensor.numpy().tobytes(), content)
    unreadable = torch.cat([batch.unreadable for batch in batches])
    # With its negative, one maximum shows the largest content and the smallest.
    agreed = torch.cat([torch.tensor([content, -content]), unreadable.long()])
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=topology.pack_hosts)
    if int(agreed[0]) != -int(agreed[1]):
        raise RuntimeError(
            "ranks that share a pack have read different samples: a shard can be read by some of them only; check the storage"
            " (python launch/data.py verify) and start the same command again"
        )
    if not agreed[2:].any():
        return batches
    sizes = [len(batch.unreadable) for batch in batches]
    masks = agreed[2:].bool().split(sizes)
    return [batch.without(mask) for batch, mask in zip(batches, masks, strict=True)]


def compute_gradients(trainer: PhaseTrainer, batches: list[PackedBatch], sums: StepSums) -> None:
    """Fill the gradients of the loss over the global batch, alike on all copies of the model, and reduce `sums`."""
    topology, experts = trainer.topology, trainer.model_config.text.experts
    trainer.engine.clear()
    if experts:
        balance_scale = balance_scale_of(batches, topology)
        for part in trainer.model_parts:
            part.config.moe_grad_scale_func = balance_scale.clone
    if trainer.teacher is not None:
        trainer.teacher.begin(batches)
    forward = functools.partial(forward_losses, sums=sums.losses, teacher=trainer.teacher)
    trainer.engine.accumulate(forward, batches)
    # A dense model has no collective here, which would be a wait.
    if experts:
        sums.set_routers(update_router_loads(trainer.model_parts, topology))

    sums.reduce()
    weight = sums.losses.values[0].sum()
    # Chosen on the device: asking for the weight on the host would be a wait.
    scale = torch.where(weight > 0, 1.0 / weight, torch.zeros_like(weight)).float()
    trainer.engine.scale(scale)


def unwrapped(part: Any) -> Qwen3VL:
    """Return a part of the model without its data-parallel wrapper."""
    model: Qwen3VL = getattr(part, "module", part)
    return model


def forward_losses(
    batches: Iterator[PackedBatch], part: Any, *, sums: LossSums, teacher: Teacher | None = None
) -> tuple[Tensor, Any]:
    """Run a part's forward pass of the next micro-batch, as Megatron-core's schedule calls it; `sums` gets the losses."""
    batch = next(batches)
    model = unwrapped(part)
    inputs = model.prepare(batch)
    if model.post_process and teacher is not None:
        inputs = replace(inputs, row_loss=teacher.for_rows(batch, inputs.loss_tokens))
    output = part(inputs)
    if model.post_process:
        output, losses = output
        sums.add(batch, inputs.loss_tokens, losses)
    # Megatron-core counts tokens in integers; the real denominator is a sum of floats, divided by in compute_gradients.
    no_tokens = torch.zeros([], dtype=torch.int, device=output.device)
    return output, lambda total: (total, no_tokens, {})


def balance_scale_of(batches: list[PackedBatch], topology: Topology) -> Tensor:
    """Return the weight of the global batch over its tokens, fp32 [1] on the device.

    Gradients are divided by the weight, but the balance of experts is a mean over tokens.
    """
    own = torch.zeros(len(batches), 2, dtype=torch.float64)
    for row, batch in zip(own, batches, strict=True):
        row[0] = batch.loss_weights.sum(dtype=torch.float64)
        row[1] = batch.real_tokens
    on_device = to_device(own.sum(0), topology.device)
    weight, tokens = topology.sum_over_data(on_device)
    # Megatron-core keeps one for the process, of this shape.
    return (weight / tokens.clamp_min(1.0)).float().reshape(1)
