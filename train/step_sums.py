"""The sums of one optimizer step: losses, counts and router loads as one fp64 vector on the device.

Each rank fills the entries that it speaks for and leaves the others zero. So one sum over all ranks gives the sums over any
axis, and maxima too: every copy of the model, and every pipeline stage, has a slot of its own. Then the host reads the vector
once. Integers are exact in fp64 below 2**53; a step of 10**9 tokens in samples of 10**6 has 10**15 token pairs, a ninth of it.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

import numpy as np
import torch
from torch import Tensor

from visionloom.data.stream.batch import PackedBatch
from visionloom.model.flops import StepWork
from visionloom.parallel.device import to_device
from visionloom.parallel.topology import Topology
from visionloom.train.observe.slow_ranks import PARTS

LOSS_ROWS = 6
"""Sums over the supervised tokens: weights, and the weighted losses of up to five kinds, the loss itself first."""
FLAGS = 3
"""Of Signals."""
ROUTER_SUMS = 3
"""Sums over the layers of a mixture: largest shares, entropies, layers."""


@dataclass(frozen=True)
class StepCounts:
    """How much a step has trained on, of one copy of the model or of all; padding counts only where it is named."""

    tokens: int
    supervised_tokens: int
    padding_tokens: int
    visual_tokens: int
    patches: int
    samples: int
    packs: int
    token_pairs: int
    """Sum of the squared lengths of the samples."""
    patch_pairs: int
    """Sum of the squared patch counts of the frames."""

    @classmethod
    def of(cls, batches: Sequence[PackedBatch], packs: int) -> "StepCounts":
        """Count one copy's micro-batches, which hold `packs` packs."""
        tokens = sum(batch.real_tokens for batch in batches)
        token_pairs = patch_pairs = 0
        for batch in batches:
            real = ~batch.padding_mask.numpy()
            starts = batch.cu_seqlens.numpy()[:-1]
            lengths = np.add.reduceat(real, starts, dtype=np.int64)
            token_pairs += int((lengths**2).sum())

            frames, height, width = batch.grid_thw.numpy().astype(np.int64).T
            patch_pairs += int((frames * (height * width) ** 2).sum())
        return cls(
            tokens=tokens,
            supervised_tokens=sum(batch.supervised_tokens for batch in batches),
            padding_tokens=sum(batch.input_ids.numel() for batch in batches) - tokens,
            visual_tokens=sum(batch.visual_rows.numel() for batch in batches),
            patches=sum(batch.patch_count for batch in batches),
            samples=sum(len(batch.sample_ids) for batch in batches),
            packs=packs,
            token_pairs=token_pairs,
            patch_pairs=patch_pairs,
        )

    @property
    def work(self) -> StepWork:
        """Return what the count of operations needs."""
        return StepWork(
            self.tokens, self.supervised_tokens, self.token_pairs, self.patches, self.patch_pairs
        )


@dataclass(frozen=True)
class Signals:
    """Flags of one rank for all: they travel with the sums of its next step, so that nobody waits for them."""

    log_failed: bool = False
    """The run's log could not be written."""
    saving: bool = False
    """A checkpoint is still being written in the background."""
    stop: bool = False
    """The run is to end early."""
    own_seconds: tuple[float, ...] = (0.0,) * len(PARTS)
    """Of the step before, for each of PARTS; not a flag: it is not joined over the ranks."""

    @property
    def flags(self) -> tuple[bool, ...]:
        """Return what any rank may say for all."""
        return self.log_failed, self.saving, self.stop


@dataclass(frozen=True)
class StepTotals:
    """The sums of a step over all ranks, on the host."""

    loss: float
    loss_by_source: dict[str, float]
    measured: list[float]
    """Of the kinds of loss after the first, weighted as the loss; 0 where a step has fewer."""
    counts: StepCounts
    largest_flops: float
    """Operations of the copy of the model with the most work."""
    router: dict[str, float]
    """Health of a mixture's routers (see model/experts.py `update_router_loads`); empty for a dense model."""
    signals: Signals
    """Which of them any rank has given."""
    own_seconds: list[list[float]]
    """Of each rank in the step before, for each of PARTS."""


class LossSums:
    """Sums of weights and of weighted losses of all kinds, by source, fp64 on the device."""

    def __init__(self, sources: Sequence[str], values: Tensor) -> None:
        """Add to `values`, fp64 [LOSS_ROWS, sources]: weights, and losses of each kind."""
        self.sources = tuple(sources)
        self.values = values

    @classmethod
    def zeros(cls, sources: Sequence[str], device: torch.device) -> "LossSums":
        """Begin with nothing added."""
        return cls(
            sources, torch.zeros(LOSS_ROWS, len(sources), dtype=torch.float64, device=device)
        )

    def add(self, batch: PackedBatch, tokens: Tensor, losses: Tensor) -> None:
        """Add the losses of a micro-batch.

        Args:
            batch: on the host.
            tokens: its supervised tokens of this rank, int64 [R] on the host.
            losses: of these tokens, fp32 [n, R] on the device.
        """
        # One more for padding, which has no source and no weight.
        places = torch.tensor([self.sources.index(name) for name in batch.dataset_names] + [0])
        segments = torch.searchsorted(batch.cu_seqlens, tokens, right=True) - 1
        # non_blocking: a plain copy would let the host wait for all that the device has yet to do.
        sources = to_device(places[batch.segment_datasets[segments]], losses.device)
        weights = to_device(batch.loss_weights[tokens].double(), losses.device)
        # There are rows for more kinds than most steps have.
        rows = torch.cat([weights.unsqueeze(0), weights * losses.double()])
        self.values[: len(rows)].index_add_(1, sources, rows)

    def reduce(self, topology: Topology) -> None:
        """Sum over all ranks that share the data; only the last pipeline stage has added any."""
        topology.from_last_stage(topology.sum_over_tokens(self.values))

    def means(self) -> tuple[float, dict[str, float]]:
        """Return the loss over everything and by source; a source without weight is left out. Waits for the device."""
        weights, losses, *_ = self.values.tolist()
        return means_of(self.sources, losses, weights)

    def measured(self) -> list[float]:
        """Return the means of the further kinds of loss over everything. Waits for the device."""
        weights, _, *others = self.values.sum(1).tolist()
        return [each / weights if weights else 0.0 for each in others]


def means_of(
    sources: Sequence[str],
    losses: Sequence[float],
    weights: Sequence[float],
) -> tuple[float, dict[str, float]]:
    """Divide sums of losses by sums of weights: over everything, and by source where it has weight."""
    total = sum(weights)
    loss = sum(losses) / total if total else 0.0
    by_source = {}
    for name, weighted_loss, weight in zip(sources, losses, weights, strict=True):
        if weight:
            by_source[name] = weighted_loss / weight
    return loss, by_source


class StepSums:
    """The vector of a step: `losses` and `set_routers` fill it, `reduce` adds it up, `totals` reads it."""

    def __init__(
        self,
        sources: Sequence[str],
        counts: StepCounts,
        flops: float,
        signals: Signals,
        topology: Topology,
    ) -> None:
        """Put in what the host knows before the step.

        Args:
            sources: names of the datasets.
            counts: of this rank's copy of the model.
            flops: operations of that copy in the step.
            signals: of this rank.
            topology: whose ranks are summed over.
        """
        self.topology = topology
        self.sources = tuple(sources)
        self.sizes = (
            LOSS_ROWS * len(self.sources),
            len(fields(StepCounts)),
            FLAGS,
            topology.data_size,
            len(PARTS) * topology.world_size,
            ROUTER_SUMS,
            topology.config.pipeline,
        )
        host = torch.zeros(sum(self.sizes), dtype=torch.float64)
        _, own_counts, own_signals, own_flops, seconds, _, _ = host.split(self.sizes)
        own_signals.copy_(torch.tensor(signals.flags))
        # A slot a rank, as for the operations of each copy.
        seconds.view(-1, len(PARTS))[topology.rank] = torch.tensor(
            signals.own_seconds, dtype=torch.float64
        )
        # The ranks that share a pack have counted the same: one of them speaks.
        if topology.is_data_leader:
            own_counts.copy_(torch.tensor(astuple(counts), dtype=torch.float64))
            own_flops[topology.data_rank] = flops

        self.vector = to_device(host, topology.device)
        parts = self.vector.split(self.sizes)
        losses, self._router_sums, self._router_largest = parts[0], parts[-2], parts[-1]
        self.losses = LossSums(self.sources, losses.view(LOSS_ROWS, -1))

    def set_routers(self, health: Tensor) -> None:
        """Put in the health of this pipeline stage's routers, fp64 [4] of `update_router_loads`."""
        topology = self.topology
        # All ranks of a stage have the same: one of them speaks.
        if topology.tensor_rank == topology.context_rank == topology.data_rank == 0:
            self._router_sums.copy_(health[:ROUTER_SUMS])
            self._router_largest[topology.pipeline_rank] = health[ROUTER_SUMS]

    def reduce(self) -> None:
        """Add up over all ranks, once; nothing waits for the device."""
        if self.topology.tensor_rank:
            self.losses.values.zero_()  # every tensor rank has added the same losses
        self.topology.sum_over_ranks(self.vector)

    def totals(self) -> StepTotals:
        """Read the sums: the one wait for them."""
        parts = self.vector.cpu().split(self.sizes)
        losses, counts, signals, flops, seconds, router_sums, router_largest = parts
        read = LossSums(self.sources, losses.view(LOSS_ROWS, -1))
        loss, by_source = read.means()
        return StepTotals(
            loss=loss,
            loss_by_source=by_source,
            measured=read.measured(),
            counts=StepCounts(*map(int, counts.tolist())),
            largest_flops=max(flops.tolist()),
            router=_router_means(router_sums.tolist(), router_largest.tolist()),
            signals=Signals(*(flag > 0 for flag in signals.tolist())),
            own_seconds=seconds.view(-1, len(PARTS)).tolist(),
        )


def _router_means(sums: list[float], largest: list[float]) -> dict[str, float]:
    """Return the means over the layers of all stages; empty without routers."""
    shares, entropies, layers = sums
    if not layers:
        return {}
    return {
        "load_max": max(largest),
        "load_mean_max": shares / layers,
        "entropy": entropies / layers,
    }
