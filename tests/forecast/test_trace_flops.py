"""The operations of a trace, by part. Reference: model/flops.py, which torch's FlopCounterMode confirms elsewhere."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch.distributed as dist

from visionloom.forecast.imagine import trace_rank
from visionloom.forecast.trace.events import Direction
from visionloom.model.flops import language_flops, patch_embedding_flops, step_flops, vision_flops
from visionloom.model.lora_config import LoraConfig
from visionloom.parallel.config import ParallelConfig
from visionloom.parallel.parts import LANGUAGE, LOSS, MERGER, VISION
from visionloom.tests.forecast.batches import pictured_pack, work_of
from visionloom.tests.model.test_sizes import published
from visionloom.tests.ranks import RankPool
from visionloom.train.config import InitConfig, RunConfig
from visionloom.train.phase.config import PhaseConfig

NAMES = {"language": LANGUAGE, "output": LOSS, "merger": MERGER, "vision": VISION}
TOKENS = 1024


@dataclass(frozen=True)
class Work:
    """What is trained of which model."""

    model: str = "qwen3vl_2b"
    trainable: tuple[str, ...] = ("vision", "merger", "language")
    recompute: str = "none"
    lora: int = 0


CASES = {
    "dense": Work(),
    "recomputed": Work(recompute="full"),
    "mergers alone": Work(trainable=("merger",)),
    "language alone": Work(trainable=("language",)),
    "adapters": Work(lora=16),
    "mixture": Work("qwen3vl_30b_a3b", recompute="full"),
}


def config_of(work: Work) -> RunConfig:
    """A run of a published model with fewer decoder layers."""
    model = published(work.model)
    model = replace(model, text=replace(model.text, layers=4))
    phase = PhaseConfig(
        sequence_length=TOKENS, steps=2, trainable=list(work.trainable), global_batch=1
    )
    groups = list(work.trainable)
    return RunConfig(
        model=model,
        init=InitConfig(huggingface="models/none"),
        lora=LoraConfig(rank=work.lora, groups=groups),
        parallel=ParallelConfig(recompute=work.recompute),
        phases={"phase": phase},
    )


def traced(work: Work) -> dict[tuple[str, str], float]:
    """Operations of one step by part and direction; runs on a rank of the pool."""
    dist.destroy_process_group()
    trace = trace_rank(config_of(work), "phase", 1, 0, [pictured_pack(TOKENS, 4)])
    counts: Counter[Any] = Counter()
    for slot in trace.slots:
        for operation, launches in slot.operations:
            counts[operation.part, operation.direction] += operation.flops * launches  # type: ignore[assignment]
    return dict(counts)


@pytest.mark.parametrize("name", CASES)
def test_operations_are_those_that_the_model_needs(name: str, pool: RankPool) -> None:
    work = CASES[name]
    config, sizes = config_of(work), work_of(pictured_pack(TOKENS, 4))
    (counts,) = pool.run(1, traced, work)

    lora = config.lora if work.lora else None
    needed = step_flops(config.model, sizes, set(work.trainable), lora)
    for part, named in NAMES.items():
        own = sum(counts.get((named, way), 0.0) for way in (Direction.FORWARD, Direction.BACKWARD))
        assert own == pytest.approx(needed[part], rel=0.01), part

    again = {part: counts.get((part, Direction.RECOMPUTE), 0.0) for part in NAMES.values()}
    if work.recompute == "none":
        assert not any(again.values())
        return
    vision = config.model.vision
    blocks = vision_flops(vision, sizes) - patch_embedding_flops(vision, sizes)
    # torch stops at the last tensor that is needed: the last product of a block is not made again.
    blocks -= 2.0 * vision.depth * vision.hidden_size * vision.ffn_hidden_size * sizes.patches
    text = config.model.text
    layers = language_flops(text, sizes)
    if text.experts:
        # Nothing after a mixture needs its result to pass gradients back: the last of its three products is not made again.
        width = text.experts_per_token * text.expert_ffn_hidden_size
        layers -= 2.0 * text.layers * text.hidden_size * width * sizes.tokens
    assert again[LANGUAGE] == pytest.approx(layers, rel=0.01)
    assert again[VISION] == pytest.approx(blocks, rel=0.01)
    assert again[MERGER] == again[LOSS] == 0.0
