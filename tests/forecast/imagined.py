"""The same step traced on a real rank and on an imagined one. Runs on the ranks of the pool."""

from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from visionloom.forecast.trace.events import RankTrace
from visionloom.forecast.trace.step import recording, trace_step
from visionloom.model.language import LanguageModel
from visionloom.parallel import topology as topologies
from visionloom.tests.model.reference import TestPack
from visionloom.tests.train.layouts import Layout, build, deal

META = torch.device("meta")
CLIP = 1e-6
"""Largest norm of a gradient: below any real one, so that both kinds of rank clip."""


def real(layout: Layout, packs: list[TestPack]) -> RankTrace:
    """A step of this rank, with real tensors and messages."""
    with recording(torch.device("cpu")) as recorder:
        trainer = build(layout, sharded=True, clip=CLIP)
        mine: Any = deal(packs, trainer.topology, layout.one_encoder)
        return trace_step(recorder, trainer, mine)


def extra_copy(hidden: Tensor) -> Tensor:
    """A copy that nobody needs."""
    return hidden.clone()


def host_wait(hidden: Tensor) -> Tensor:
    """A look at a value, as a print does it."""
    hidden.detach().sum().item()
    return hidden


def mask_on_the_host(hidden: Tensor) -> Tensor:
    """A mask that was forgotten on the host."""
    return hidden * torch.ones(len(hidden), 1, 1)


def imagined(
    layout: Layout,
    packs: list[TestPack],
    ranks: list[int],
    mistake: Callable[[Tensor], Tensor] | None = None,
) -> list[RankTrace]:
    """A step of each of these ranks, on no device; this process leaves its own world for it.

    A mistake is made with the hidden states before the decoder layers.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    forward: Any = LanguageModel.forward

    def mistaken(model: Any, hidden: Tensor, *others: Any) -> Any:
        return forward(model, hidden if mistake is None else mistake(hidden), *others)

    with mock.patch.object(LanguageModel, "forward", mistaken):
        return [_imagined(layout, packs, rank) for rank in ranks]


def _imagined(layout: Layout, packs: list[TestPack], rank: int) -> RankTrace:
    topology = topologies.imagine(layout.config, layout.ranks, rank, META)
    try:
        with recording(META) as recorder:
            trainer = build(layout, sharded=True, topology=topology, clip=CLIP)
            mine: Any = deal(packs, topology, layout.one_encoder)
            return trace_step(recorder, trainer, mine)
    finally:
        topologies.stop()


def flops(trace: RankTrace) -> Counter[Any]:
    """Operations by kind of slot, part and direction."""
    counts: Counter[Any] = Counter()
    for slot in trace.slots:
        for operation, launches in slot.operations:
            counts[slot.kind, operation.part, operation.direction] += operation.flops * launches  # type: ignore[assignment]
    return +counts


def collectives(trace: RankTrace) -> Counter[Any]:
    """Collectives by kind of slot."""
    counts: Counter[Any] = Counter()
    for slot in trace.slots:
        for collective, calls in slot.collectives:
            counts[
                slot.kind, collective.name, collective.axis, collective.part, collective.bytes
            ] += calls
    return counts


def launches(trace: RankTrace) -> Counter[Any]:
    """Launches by kind of slot, name, part and direction."""
    counts: Counter[Any] = Counter()
    for slot in trace.slots:
        for operation, number in slot.operations:
            counts[slot.kind, operation.name, operation.part, operation.direction] += number
    return counts
