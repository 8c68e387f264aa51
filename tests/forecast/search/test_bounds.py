"""Memory at rest by arithmetic is a lower bound, and a close one. Reference: the model built without memory."""

from dataclasses import replace
from typing import Any

import pytest

from visionloom.forecast.search.bounds import RestBounds
from visionloom.model.lora_config import LoraConfig
from visionloom.parallel.config import ParallelConfig
from visionloom.tests.model.test_layout_sizes import WORLDS
from visionloom.tests.model.test_sizes import COUNTS, published
from visionloom.tests.ranks import RankPool
from visionloom.train.config import RunConfig, RunSection
from visionloom.train.phase.config import PhaseConfig

CASES: list[tuple[str, int, dict[str, Any], list[str]]] = [
    *(
        (size, world, layout, ["vision", "merger", "language"])
        for size, (world, layout) in WORLDS.items()
    ),
    ("qwen3vl_2b", 8, {"pipeline": 4}, ["language"]),
    ("qwen3vl_30b_a3b", 16, {"expert": 4, "expert_tensor": 2, "tensor": 2}, ["merger"]),
]


def run_of(size: str, trainable: list[str]) -> RunConfig:
    phase = PhaseConfig(steps=1, trainable=trainable)
    return RunConfig(RunSection(name="x"), published(size), phases={"p": phase})


def built_bytes(cases: list[tuple[str, int, dict[str, Any], list[str]]]) -> list[int]:
    """Weights, gradients and optimizer of the fullest stage's rank; runs on a rank of the pool, which leaves its world."""
    import torch.distributed as dist

    dist.destroy_process_group()
    held = []
    for size, world_size, layout, trainable in cases:
        stages = ParallelConfig(**layout).pipeline
        ranks = [stage * world_size // stages for stage in range(stages)]
        held.append(max(rank_bytes(size, world_size, layout, trainable, rank) for rank in ranks))
    return held


def rank_bytes(
    size: str, world: int, layout: dict[str, Any], trainable: list[str], rank: int
) -> int:
    import torch

    from visionloom.model.qwen3vl import Qwen3VL
    from visionloom.model.trainable import group_of
    from visionloom.parallel import topology as topologies

    topology = topologies.imagine(ParallelConfig(**layout), world, rank, torch.device("meta"))
    try:
        numbers = topology.config.chunk_numbers
        with torch.device("meta"):
            chunks = [Qwen3VL(published(size), topology, torch.bfloat16, n) for n in numbers]
        total = 0.0
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                groups = topology.groups
                sharing = groups.expt_dp if ".experts." in name else groups.dp_cp
                trains = group_of(name) in trainable
                each = 2 + trains * (4 + 12 / sharing.size())
                total += parameter.numel() * each
        return round(total)
    finally:
        topologies.stop()


@pytest.mark.long
def test_memory_at_rest_is_that_of_the_built_model(pool: RankPool) -> None:
    (held,) = pool.run(1, built_bytes, CASES)
    for (size, world_size, layout, trainable), built in zip(CASES, held, strict=True):
        bounds = RestBounds.of(run_of(size, trainable), "p", world_size)
        bound = bounds.of_fullest_rank(ParallelConfig(**layout))
        print(f"{size} on {world_size}: {bound / 2**30:.2f} of {built / 2**30:.2f} GiB")
        assert 0.999 * built <= bound <= built + 1


@pytest.mark.parametrize("size", COUNTS)
def test_one_rank_holds_all(size: str) -> None:
    bounds = RestBounds.of(run_of(size, ["vision", "merger", "language"]), "p", 1)
    assert bounds.of_fullest_rank(ParallelConfig()) == COUNTS[size][0] * (2 + 4 + 12)


def test_frozen_weights_and_adapters_are_weights_only() -> None:
    run = run_of("qwen3vl_2b", ["vision", "merger", "language"])
    adapted = replace(run, lora=LoraConfig(rank=8))
    bounds = RestBounds.of(adapted, "p", 8)
    assert bounds.of_fullest_rank(ParallelConfig()) == COUNTS["qwen3vl_2b"][0] * 2


def test_fp32_needs_no_copies() -> None:
    run = run_of("qwen3vl_2b", ["vision", "merger", "language"])
    run.run.precision = "fp32"
    bound = RestBounds.of(run, "p", 1).of_fullest_rank(ParallelConfig())
    assert bound == COUNTS["qwen3vl_2b"][0] * (4 + 4 + 8)
