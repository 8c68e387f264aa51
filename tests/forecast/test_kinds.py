"""One rank of each kind stands for all: every rank of a run is counted once, where Megatron-core puts it.

Reference: the groups that Megatron-core opens for an imagined rank, and the layers that a chunk is built with.
"""

from typing import Any

import pytest

from visionloom.forecast.kinds import RankKind, rank_kinds, rank_number
from visionloom.parallel.config import ParallelConfig
from visionloom.tests.model.test_layout_sizes import WORLDS
from visionloom.tests.model.test_sizes import published
from visionloom.tests.ranks import RankPool

PLACES: list[tuple[int, dict[str, Any]]] = [
    (64, {"tensor": 2, "context": 4, "pipeline": 2}),
    (64, {"tensor": 2, "context": 4, "sequence": False}),
    (128, {"tensor": 4, "pipeline": 4, "context": 2, "expert": 8, "expert_tensor": 2}),
]


def kinds_of(model: str, world_size: int, patches: list[int], **layout: Any) -> list[RankKind]:
    parallel = ParallelConfig(**layout)
    assert parallel.all_problems(world_size) == []
    assert published(model).layout_problems(parallel) == []
    assert len(patches) == parallel.encoder_ranks
    return rank_kinds(parallel, world_size, published(model), patches)


def places(cases: list[tuple[int, dict[str, Any], int]]) -> list[tuple[int, int | None, int]]:
    """Stage, encoder rank and data rank of ranks; runs on a rank of the pool, which leaves its own world for it."""
    import torch.distributed as dist

    from visionloom.parallel import topology as topologies

    dist.destroy_process_group()
    seen = []
    for world_size, layout, rank in cases:
        topology = topologies.imagine(ParallelConfig(**layout), world_size, rank)
        seen.append((topology.pipeline_rank, topology.encoder_rank, topology.data_rank))
        topologies.stop()
    return seen


def test_ranks_are_where_megatron_core_puts_them(pool: RankPool) -> None:
    cases, expected = [], []
    for world_size, layout in PLACES:
        parallel = ParallelConfig(**layout)
        for stage in range(parallel.pipeline):
            for encoder_rank in {0, 1, parallel.encoder_ranks - 1}:
                rank = rank_number(parallel, world_size, stage, encoder_rank)
                cases.append((world_size, layout, rank))
                # Pictures are encoded on the first stage only.
                expected.append((stage, None if stage else encoder_rank, 0))
    (seen,) = pool.run(1, places, cases)
    assert seen == expected


@pytest.mark.parametrize("size", WORLDS)
def test_every_rank_is_of_one_kind(size: str) -> None:
    world_size, layout = WORLDS[size]
    parallel = ParallelConfig(**layout)
    patches = [1000 - 100 * number for number in range(min(5, parallel.encoder_ranks))]
    patches += [700] * (parallel.encoder_ranks - len(patches))
    kinds = kinds_of(size, world_size, patches, **layout)
    for kind in kinds:
        print(f"{size}: rank {kind.rank} of {kind.ranks}, {kind.descriptions}")
    assert sum(kind.ranks for kind in kinds) == world_size
    stages = [stage for kind in kinds for stage in kind.stages if stage]
    assert sorted(stages) == list(range(1, parallel.pipeline))
    assert len(kinds) <= 5, "a few traces stand for a thousand ranks"


def test_stages_in_the_middle_are_one_kind() -> None:
    first, middle, last = kinds_of("qwen3vl_8b", 64, [100] * 2, pipeline=4, tensor=2)
    assert first == RankKind(0, 16, (0,), ("vision tower, layers 0-8",))
    assert middle == RankKind(16, 32, (1, 2), ("layers 9-17", "layers 18-26"))
    assert last == RankKind(48, 16, (3,), ("layers 27-35, loss",))


def test_uneven_stages_are_kinds_of_their_own() -> None:
    layout = {"pipeline": 4, "pipeline_layout": "Et*8|t*10|t*9|t*9L"}
    kinds = kinds_of("qwen3vl_8b", 8, [0], **layout)
    assert [kind.stages for kind in kinds] == [(0,), (1,), (2,), (3,)]


def test_virtual_stages_hold_several_runs_of_layers() -> None:
    kinds = kinds_of("qwen3vl_32b", 32, [100], pipeline=4, virtual_pipeline=2)
    assert [kind.descriptions for kind in kinds] == [
        ("vision tower, layers 0-7 and 32-39",),
        ("layers 8-15 and 40-47", "layers 16-23 and 48-55"),
        ("layers 24-31 and 56-63, loss",),
    ]


def test_stages_that_pass_pictures_on_differ() -> None:
    """Three DeepStack levels and stages of a layer or two: messages are longer until all levels are used."""
    layout = {"pipeline": 6, "pipeline_layout": "Et|t|t|t*11|t*11|t*11L"}
    kinds = kinds_of("qwen3vl_8b", 6, [100], **layout)
    assert [kind.stages for kind in kinds] == [(0,), (1,), (2,), (3, 4), (5,)]


def test_one_stage_holds_all() -> None:
    (kind,) = kinds_of("qwen3vl_2b", 64, [50])
    assert kind == RankKind(0, 64, (0,), ("vision tower, layers 0-27, loss",))


@pytest.mark.parametrize(
    ("layout", "most", "fewest"),
    [
        # Encoder ranks are tensor x context; the seventh has most, the third fewest.
        ({"tensor": 2, "context": 4}, 6, 2),
        # Without sequence parallelism tensor ranks encode the same pictures.
        ({"tensor": 2, "context": 8, "sequence": False}, 12, 4),
    ],
)
def test_the_ranks_with_most_and_fewest_pictures(
    layout: dict[str, Any], most: int, fewest: int
) -> None:
    patches = [500, 500, 10, 900, 900, 900, 1000, 300]
    kinds = kinds_of("qwen3vl_4b", 32, patches, **layout)
    assert [(kind.rank, kind.ranks) for kind in kinds] == [(most, 16), (fewest, 16)]
    assert kinds[0].descriptions == ("vision tower, layers 0-35, loss, most pictures",)
    # What one would not tell apart is one kind, and the busiest is traced.
    (kind,) = kinds_of("qwen3vl_4b", 32, [99] * 6 + [100, 95], **layout)
    assert (kind.rank, kind.ranks) == (most, 32)


def test_a_pack_of_text_makes_no_difference() -> None:
    (kind,) = kinds_of("qwen3vl_4b", 8, [0] * 8, tensor=8)
    assert (kind.rank, kind.ranks) == (0, 8)
