"""Each published model built at a realistic world size, as any rank of it, in seconds and without memory.

Reference: the exact numbers of parameters of tests/model/test_sizes.py: the ranks' parts must add up to the model.
"""

from typing import Any

import pytest

from visionloom.common.settings import check
from visionloom.parallel.config import ParallelConfig
from visionloom.parallel.pipeline import suggestion
from visionloom.tests.model.test_sizes import COUNTS, published
from visionloom.tests.ranks import RankPool

WORLDS: dict[str, tuple[int, dict[str, Any]]] = {
    "qwen3vl_2b": (64, {"tensor": 2}),
    "qwen3vl_4b": (128, {"tensor": 2, "context": 4}),
    "qwen3vl_8b": (256, {"tensor": 4, "pipeline": 2, "context": 2}),
    "qwen3vl_32b": (512, {"tensor": 8, "pipeline": 4, "virtual_pipeline": 2, "context": 4}),
    "qwen3vl_30b_a3b": (256, {"tensor": 2, "pipeline": 4, "expert": 16}),
    "qwen3vl_235b_a22b": (
        1024,
        {
            "tensor": 4,
            "pipeline": 8,
            "context": 2,
            "expert": 32,
            "pipeline_layout": suggestion(94, 8),
            "recompute": "full",
        },
    ),
}


def parts(
    size: str, world_size: int, layout: dict[str, Any], ranks: list[int]
) -> list[tuple[int, int, float]]:
    """What each of these ranks would hold; runs on a rank of the pool, which leaves its own world for it."""
    import torch.distributed as dist

    dist.destroy_process_group()
    return [part(size, world_size, layout, rank) for rank in ranks]


def part(size: str, world_size: int, layout: dict[str, Any], rank: int) -> tuple[int, int, float]:
    """Stage, this rank's parameters, and its share of the model: each parameter divided by the ranks of a copy that hold it."""
    import torch

    from visionloom.model.qwen3vl import Qwen3VL
    from visionloom.model.sharding import canonical_parameters, cuts
    from visionloom.parallel import topology as topologies

    topology = topologies.imagine(ParallelConfig(**layout), world_size, rank)
    try:
        numbers = topology.config.chunk_numbers
        with torch.device("meta"):
            chunks = [
                Qwen3VL(published(size), topology, torch.bfloat16, number) for number in numbers
            ]
        total, share = 0, 0.0
        for chunk in chunks:
            for name, parameter in canonical_parameters(chunk):
                assert parameter.is_meta, name
                total += parameter.numel()
                ways = 1
                for cut in cuts(name, parameter, topology):
                    ways *= cut.size
                share += parameter.numel() * ways
        return topology.pipeline_rank, total, share
    finally:
        topologies.stop()


@pytest.mark.parametrize("size", WORLDS)
def test_every_stage_of_the_model(size: str, pool: RankPool) -> None:
    """One rank of each pipeline stage: what they hold, multiplied by the cuts, is the whole model."""
    world_size, layout = WORLDS[size]
    config = ParallelConfig(**layout)
    model = published(size)
    assert [
        *config.all_problems(world_size),
        *check(model, "model").lines,
        *model.layout_problems(config),
    ] == []
    per_stage = world_size // config.pipeline
    ranks = [stage * per_stage + (7 * stage) % per_stage for stage in range(config.pipeline)]
    (found,) = pool.run(1, parts, size, world_size, layout, ranks)
    assert [stage for stage, _, _ in found] == list(range(config.pipeline))
    total, by_part = COUNTS[size]
    tied_twice = by_part[3] if config.pipeline > 1 and published(size).text.tie_embeddings else 0
    assert sum(share for _, _, share in found) == total + tied_twice
    assert max(held for _, held, _ in found) < total
