"""Gradients are scaled by the rank whose optimizer owns them, once.

References: steps that scale whole buffers by Megatron-core's own function, and the number of parameters of the published shapes.
"""

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from visionloom.model.huggingface.shapes import parameter_count
from visionloom.tests.model.reference import TestPack
from visionloom.tests.ranks import RankPool
from visionloom.tests.train.layouts import Case, Layout, build, deal, packs_of
from visionloom.train.step import train_step

DENSE, MIXTURE = Layout(2, {}), Layout(2, {"expert": 2}, Case(experts=8))
FP32, BF16 = torch.float32, torch.bfloat16
STEPS: dict[str, tuple[Layout, torch.dtype]] = {
    "fp32": (DENSE, FP32),
    "bf16": (DENSE, BF16),
    "experts": (MIXTURE, FP32),
    "muon": (replace(MIXTURE, case=replace(MIXTURE.case, optimizer="muon")), FP32),
    # The second stage has an optimizer of nothing.
    "mergers": (Layout(2, {"pipeline": 2}, Case(trainable=("merger",))), FP32),
}


def scale_all(engine: Any, factor: Tensor) -> None:
    """Multiply whole buffers."""
    for part in engine.parts:
        part.scale_gradients(factor)
    engine.optimizer.prepare_grads()


def trained(layout: Layout, dtype: torch.dtype, packs: list[TestPack]) -> tuple[Any, list[Tensor]]:
    """Losses and norms of two steps, and the weights after them."""
    stage = build(layout, sharded=True, dtype=dtype)
    mine: list[Any] = deal(packs, stage.topology, False)
    results = [train_step(stage, mine) for _ in range(2)]
    stage.gather_weights()
    weights = [each.detach().clone() for part in stage.model_parts for each in part.parameters()]
    return [(result.loss, result.grad_norm) for result in results], weights


def is_alike(layout: Layout, dtype: torch.dtype, packs: list[TestPack]) -> bool:
    """Whether steps that scale whole buffers end in the same bits; runs on every rank of the pool."""
    from visionloom.train.engines.megatron import MegatronEngine

    numbers, weights = trained(layout, dtype, packs)
    with mock.patch.object(MegatronEngine, "scale", scale_all):
        others, their_weights = trained(layout, dtype, packs)
    pairs = zip(weights, their_weights, strict=True)
    return numbers == others and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", STEPS)
def test_a_step_has_the_same_bits_as_one_that_scales_whole_buffers(
    name: str, pool: RankPool
) -> None:
    assert pool.run(2, is_alike, *STEPS[name], packs_of("everything")) == [True, True]


def scaled_numbers(layout: Layout) -> tuple[int, int]:
    """How many numbers of this rank's buffers a factor has changed, and how many it has; runs on every rank of the pool."""
    stage = build(layout, sharded=True)
    (part,) = stage.engine.parts
    buffers = [buffer.grad_data for buffer in (*part.buffers, *part.expert_parallel_buffers)]
    for buffer in buffers:
        buffer.fill_(1.0)
    stage.engine.scale(torch.tensor(0.5))
    assert all(((buffer == 0.5) | (buffer == 1.0)).all() for buffer in buffers)
    changed = sum(int((buffer == 0.5).sum()) for buffer in buffers)
    return changed, sum(buffer.numel() for buffer in buffers)


@pytest.mark.parametrize("layout", [DENSE, MIXTURE], ids=["dense", "mixture"])
def test_each_gradient_is_scaled_by_one_rank(layout: Layout, pool: RankPool) -> None:
    counts = pool.run(2, scaled_numbers, layout)
    assert sum(changed for changed, _ in counts) == parameter_count(layout.case.model)
    # Of what both ranks have each scales its part alone.
    assert all(changed < held for changed, held in counts)
