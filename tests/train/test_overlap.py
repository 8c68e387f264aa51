"""Gradients reduced and weights gathered beside computation give the same bits as one after the other.

Reference: the same layout without overlap, not clipped: a rank has other parts of the parameters then, and the norm of all gradients
is summed in another order. A sum of two ranks has no order. tests/train/test_parity.py holds layouts with
overlap to one process.
"""

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from visionloom.model.vision import PositionTable
from visionloom.tests.model.reference import TestPack
from visionloom.tests.ranks import RankPool
from visionloom.tests.train.layouts import Case, Layout, build, deal, packs_of
from visionloom.train import optimizer
from visionloom.train.step import train_step

EACH_ALONE = mock.patch.object(optimizer, "bucket_elements", lambda parts, topology: 1)
"""A bucket for each parameter: none is gathered because its neighbour is asked for."""


def dense(**parallel: Any) -> Layout:
    return Layout(2, parallel)


LAYOUTS = {
    "data": dense(),
    "remade": dense(recompute="mlp"),
    "context": replace(dense(context=2), one_encoder=True),
    "experts": Layout(2, {"expert": 2, "recompute": "norms_and_activations"}, Case(experts=8)),
    "mergers": Layout(2, {}, Case(trainable=("merger",))),
    "adapters": Layout(2, {}, Case(lora=True)),
    "stages with several chunks": Layout(
        4,
        {"pipeline": 2, "virtual_pipeline": 2, "pipeline_layout": "E|tt|t|tL"},
        Case(experts=8),
    ),
}


def only_one_sees(packs: list[TestPack]) -> list[TestPack]:
    """Packs that give the first of two data ranks all pictures, and the second only text."""
    return [packs[0], packs[1], packs[2], packs[1]]


def trained(
    layout: Layout, packs: list[TestPack], overlap: bool
) -> tuple[list[float], list[Tensor]]:
    chosen = replace(layout, parallel=layout.parallel | {"overlap": overlap})
    stage = build(chosen, sharded=True, clip=0.0)
    mine: list[Any] = deal(packs, stage.topology, layout.one_encoder)
    losses = [train_step(stage, mine).loss for _ in range(3)]
    stage.gather_weights()
    first, *more = stage.engine.parts
    buckets = [len(buffer.buckets) for buffer in first.buffers]
    # Of several parts each is one bucket: the schedule begins its collectives.
    assert bool(first.module.config.param_sync_func if more else min(buckets) > 3) == overlap
    weights = [each.detach().clone() for part in stage.model_parts for each in part.parameters()]
    return losses, weights


def differs(layout: Layout, packs: list[TestPack]) -> bool:
    """Whether overlap changes a bit of three steps; runs on every rank of the pool."""
    (losses, weights), (others, their_weights) = (
        trained(layout, packs, overlap) for overlap in (True, False)
    )
    pairs = zip(weights, their_weights, strict=True)
    return losses != others or any(not torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", LAYOUTS)
def test_overlap_changes_no_bit(name: str, pool: RankPool) -> None:
    packs = only_one_sees(packs_of("everything"))
    layout = LAYOUTS[name]
    assert pool.run(layout.ranks, differs, layout, packs) == [False] * layout.ranks


def first_step(layout: Layout, packs: list[TestPack], by_weight: bool) -> tuple[float, float]:
    """Loss and gradient norm of a step in which a weight is there only once a call of its module has asked for it."""
    with EACH_ALONE:
        stage = build(layout, sharded=True)
    (wrapped,) = stage.engine.parts
    for group in (*wrapped.bucket_groups, *wrapped.expert_parallel_bucket_groups):
        group.next_param_gather_bucket_group = None
        ranks = group.intra_distributed_optimizer_instance_size
        for bucket in group.buckets:
            shards = bucket.param_data.chunk(ranks)
            for rank, shard in enumerate(shards):
                if rank != group.intra_distributed_optimizer_instance_rank:
                    shard.fill_(math.nan)

    mistake = mock.patch.object(PositionTable, "__call__", PositionTable.forward)
    with mistake if by_weight else nullcontext():
        result = train_step(stage, deal(packs, stage.topology, False))  # type: ignore[arg-type]
    return result.loss, result.grad_norm


@pytest.mark.parametrize(
    "case", [Case(tied=False), Case(experts=8), Case(lora=True)], ids=["untied", "mixture", "lora"]
)
def test_every_weight_is_waited_for(case: Case, pool: RankPool) -> None:
    """A weight of another rank is not a number until the module that owns it is called."""
    found = pool.run(2, first_step, Layout(2, {}, case), packs_of("everything"), False)
    assert all(math.isfinite(number) for numbers in found for number in numbers)


def test_weights_of_experts_are_waited_for(pool: RankPool) -> None:
    """Two ranks share the experts and two hold the same ones: matrices are taken before the call that waits."""
    layout = Layout(4, {"expert": 2}, Case(experts=8))
    found = pool.run(4, first_step, layout, packs_of("everything"), False)
    assert all(math.isfinite(number) for numbers in found for number in numbers)


def test_a_weight_that_is_not_waited_for_turns_the_test_red(pool: RankPool) -> None:
    found = pool.run(2, first_step, Layout(2, {}), packs_of("everything"), True)
    assert any(not math.isfinite(loss) for loss, _ in found)
