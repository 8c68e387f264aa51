"""Layouts of a pipeline: what each chunk holds, and what is refused, in one line with the numbers.

Reference: Megatron-core's PipelineParallelLayerLayout reads the same strings.
"""

import pytest

from visionloom.parallel.config import ParallelConfig
from visionloom.parallel.pipeline import layers_per_chunk, layout_of, pipeline_problems, suggestion


@pytest.mark.parametrize(
    ("config", "layers", "expected"),
    [
        (ParallelConfig(pipeline=2), 8, [4, 4]),
        (ParallelConfig(pipeline=2, virtual_pipeline=2), 8, [2, 2, 2, 2]),
        (ParallelConfig(pipeline=3, pipeline_layout="Ettt|tttt|ttL"), 9, [3, 4, 2]),
        (ParallelConfig(pipeline=2, pipeline_layout="E | t*4 L"), 4, [0, 4]),
        (ParallelConfig(pipeline=4, pipeline_layout="Et|(t*3|)*2, t*2L"), 9, [1, 3, 3, 2]),
        (ParallelConfig(), 4, [4]),
    ],
)
def test_layers_of_each_chunk(config: ParallelConfig, layers: int, expected: list[int]) -> None:
    assert pipeline_problems(config, layers) == []
    assert layers_per_chunk(config, layers) == expected


@pytest.mark.parametrize(
    ("config", "layers", "expected"),
    [
        (
            ParallelConfig(pipeline=4),
            94,
            ["94 layers", "pipeline 4 = 4 chunks", "'Et*23|t*24|t*24|t*23L'"],
        ),
        (
            ParallelConfig(pipeline=2, virtual_pipeline=2),
            6,
            ["pipeline 2 x virtual_pipeline 2 = 4"],
        ),
        (
            ParallelConfig(pipeline=2, pipeline_layout="Ett|tt|ttL"),
            6,
            ["names 3 chunks, pipeline 2 needs 2"],
        ),
        (
            ParallelConfig(pipeline=2, pipeline_layout="Ett|ttL"),
            6,
            ["holds 4 layers, the model has 6"],
        ),
        (ParallelConfig(pipeline=2, pipeline_layout="tt|ttL"), 4, ["only E"]),
        (ParallelConfig(pipeline=2, pipeline_layout="Ett|xxL"), 4, ["may hold E, t, L"]),
        (ParallelConfig(pipeline=2, pipeline_layout="Ett|(tt)L"), 4, ["may hold E, t, L"]),
        (ParallelConfig(pipeline=2, pipeline_layout="E|t*40000000000L"), 4, ["may hold E, t, L"]),
    ],
)
def test_layouts_that_cannot_be(config: ParallelConfig, layers: int, expected: list[str]) -> None:
    (line,) = pipeline_problems(config, layers)
    assert [part for part in expected if part not in line] == []


@pytest.mark.parametrize(("layers", "chunks"), [(94, 4), (94, 8), (64, 3), (7, 7), (36, 16)])
def test_a_suggestion_is_possible_and_spares_the_ends(layers: int, chunks: int) -> None:
    config = ParallelConfig(pipeline=chunks, pipeline_layout=suggestion(layers, chunks))
    assert pipeline_problems(config, layers) == []
    counts = layers_per_chunk(config, layers)
    assert max(counts) - min(counts) <= 1
    assert counts[0] == min(counts)


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("Et|t*2|ttt|t*2L", [1, 2, 3, 2]),
        ("E|(tt,|)*2 t*4L", [0, 2, 2, 4]),
        ("(Et*2)*1|(t|t*2|)*1t*3L", [2, 1, 2, 3]),
    ],
)
def test_megatron_reads_the_layout_alike(layout: str, expected: list[int]) -> None:
    """It drops no spaces."""
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    config = ParallelConfig(pipeline=2, virtual_pipeline=2, pipeline_layout=layout)
    assert pipeline_problems(config, 8) == []
    read = PipelineParallelLayerLayout(layout.replace(" ", ""), 2)
    counts = [
        sum(layer.name == "decoder" for layer in read.layout[stage][chunk])
        for chunk in range(2)
        for stage in range(2)
    ]
    assert counts == layers_per_chunk(config, 8) == expected
    assert PipelineParallelLayerLayout(layout_of(config, 8), 2).layout == read.layout
