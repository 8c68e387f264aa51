"""Layouts that cannot be built are refused in one line that names the option; those that can be are not."""

import pytest

from visionloom.parallel.config import ParallelConfig


@pytest.mark.parametrize(
    ("config", "world_size", "expected"),
    [
        (ParallelConfig(tensor=0), 1, ["parallel.tensor=0 must be at least 1"]),
        (ParallelConfig(pipeline=-1), 1, ["parallel.pipeline=-1 must be at least 1"]),
        (ParallelConfig(sequence=True), 1, ["parallel.sequence=true", "parallel.tensor"]),
        (ParallelConfig(tensor=2), 3, ["3 ranks", "tensor 2", "multiple of 2"]),
        (ParallelConfig(tensor=4), 2, ["2 ranks", "tensor 4", "multiple of 4"]),
        (
            ParallelConfig(tensor=2, pipeline=2, context=2),
            12,
            ["12 ranks", "tensor 2 x pipeline 2 x context 2 = 8"],
        ),
        (
            ParallelConfig(expert=4),
            6,
            ["6 ranks of a pipeline stage", "expert 4 x expert_tensor 1 = 4"],
        ),
        (
            ParallelConfig(pipeline=2, expert=4, expert_tensor=2),
            8,
            ["the 4 ranks", "= 8", "multiple of 16"],
        ),
        (
            ParallelConfig(virtual_pipeline=2),
            2,
            ["parallel.virtual_pipeline=2", "parallel.pipeline"],
        ),
        (
            ParallelConfig(recompute="some"),
            1,
            [
                "parallel.recompute=some",
                "none, norms_and_activations, mlp, block, all_but_attention, full",
            ],
        ),
        (ParallelConfig(recompute="block"), 1, ["parallel.recompute=block", "recompute_layers"]),
        (
            ParallelConfig(recompute="mlp", recompute_layers=2),
            1,
            ["parallel.recompute_layers=2", "block or all_but_attention", "now mlp"],
        ),
        (
            ParallelConfig(context_exchange="ring"),
            1,
            ["parallel.context_exchange=ring", "gather, ulysses"],
        ),
    ],
)
def test_a_layout_that_cannot_be(
    config: ParallelConfig, world_size: int, expected: list[str]
) -> None:
    (line,) = config.all_problems(world_size)
    assert [part for part in expected if part not in line] == []


@pytest.mark.parametrize(
    ("tensor", "world_size", "data"), [(1, 1, 1), (1, 6, 6), (2, 2, 1), (2, 8, 4), (8, 8, 1)]
)
def test_a_layout_that_can_be(tensor: int, world_size: int, data: int) -> None:
    config = ParallelConfig(tensor=tensor)
    assert config.all_problems(world_size) == []
    assert config.data_parallel_size(world_size) == data


def test_sequence_parallelism_follows_tensor_parallelism() -> None:
    assert [ParallelConfig(tensor=n).sequence_parallel for n in (1, 2)] == [False, True]
    assert not ParallelConfig(tensor=2, sequence=False).sequence_parallel
