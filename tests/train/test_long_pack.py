"""A pack of 262,144 tokens, the longest of the report's phases, takes a real step on two context ranks.

Reference: the same pack in one process.
"""

from dataclasses import dataclass, replace

import pytest
import torch

from visionloom.model.config import ModelConfig
from visionloom.model.sharding import canonical_parameters
from visionloom.tests.model.reference import TestPack, make_pack, reference_model
from visionloom.tests.ranks import RankPool
from visionloom.tests.train.layouts import Case, Layout, build, deal, examples_of

TOKENS = 262_144
SAMPLES = [
    # 65,536 tokens: 32 blocks of 64 visual tokens with their two marks, and text
    [*([1_000, (16, 16)] * 32), 31_424],
    # and twelve of 16,384, every other one with a video of eight temporal patches
    *([16_384], [9_000, (8, 16, 16), 6_848]) * 6,
]


@dataclass(frozen=True)
class NarrowCase(Case):
    """A model with a quarter of the tiny one's attention: 65,536 tokens squared are what a step costs."""

    @property
    def model(self) -> ModelConfig:
        config = super().model
        text = replace(config.text, layers=2, heads=2, kv_heads=1, max_positions=TOKENS)
        return replace(config, text=text, vision=replace(config.vision, deepstack_layers=[0, 2]))


def step(layout: Layout, pack: TestPack) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Loss and gradient norm of a step, and the weights after it. Runs on every rank of the pool."""
    from visionloom.train.step import train_step

    trainer = build(layout, sharded=True)
    mine = deal([pack], trainer.topology, one_encoder=False)
    result = train_step(trainer, mine)  # type: ignore[arg-type]
    trainer.gather_weights()
    (model,) = trainer.model_parts
    weights = {name: weight.detach().clone() for name, weight in canonical_parameters(model)}
    return result.loss, result.grad_norm, weights


@pytest.mark.long
def test_the_longest_pack_takes_a_step_on_two_context_ranks(pool: RankPool) -> None:
    case = NarrowCase()
    pack = make_pack(reference_model(case.model, 0), examples_of(SAMPLES), multiple=4)
    assert len(pack.input_ids) == TOKENS
    assert pack.max_seqlen == 65_536

    ((loss, norm, weights),) = pool.run(1, step, Layout(1, {}, case), pack)
    for ours in pool.run(2, step, Layout(2, {"context": 2}, case), pack):
        assert ours[0] == pytest.approx(loss, rel=1e-5)
        assert ours[1] == pytest.approx(norm, rel=1e-5)
        assert ours[2].keys() == weights.keys()
        for name, weight in weights.items():
            assert (ours[2][name] - weight).norm() <= 1e-5 * weight.norm(), name
