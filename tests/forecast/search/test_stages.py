"""Layers over the chunks of a pipeline. References: all ways to deal them, and steps played in full length."""

from collections.abc import Iterator

import pytest

from visionloom.forecast.results import Span
from visionloom.forecast.schedule import Pipeline
from visionloom.forecast.search import stages
from visionloom.forecast.search.stages import ChunkSeconds, PassSeconds, balanced
from visionloom.forecast.timeline import play
from visionloom.parallel.config import ParallelConfig
from visionloom.parallel.pipeline import layers_per_chunk, named, suggestion

NOTHING = PassSeconds(0.0, 0.0)
LAYER, TOWER, LOSS = PassSeconds(1.0, 2.0), PassSeconds(4.0, 11.0), PassSeconds(1.5, 1.0)


def deals(layers: int, chunks: int, least: int = 0) -> Iterator[list[int]]:
    """All ways to deal layers to chunks, of which only the first may have none."""
    if chunks == 1:
        if layers >= least:
            yield [layers]
        return
    for count in range(least, layers + 1):
        for others in deals(layers - count, chunks - 1, 1):
            yield [count, *others]


@pytest.mark.parametrize("pipeline", [Pipeline(2, 2, 4), Pipeline(4, 1, 8), Pipeline(2, 2, 12)])
@pytest.mark.parametrize("tower", [NOTHING, LAYER, TOWER])
def test_no_deal_is_faster(pipeline: Pipeline, tower: PassSeconds) -> None:
    seconds = ChunkSeconds(pipeline, LAYER, tower, LOSS)
    chunks = pipeline.stages * pipeline.chunks
    best = min(seconds.step(deal) for deal in deals(12, chunks))
    even = [12 // chunks] * chunks
    assert seconds.step(seconds.fastest(even)) <= best * 1.001
    assert sum(seconds.fastest(even)) == 12


def timeline_of(seconds: ChunkSeconds, layers: list[int]) -> tuple[Span, ...]:
    return play(seconds.pipeline, seconds.stages(seconds.pipeline, layers)).spans


def test_seconds_are_those_of_the_traced_step() -> None:
    pipeline, layers = Pipeline(4, 2, 8), [1, 3, 3, 2, 4, 3, 3, 2]
    seconds = ChunkSeconds(pipeline, LAYER, TOWER, LOSS)
    read = ChunkSeconds.of(layers, 4, timeline_of(seconds, layers))
    assert read is not None and read.pipeline == pipeline
    for ours, right in zip((read.layer, read.first, read.last), (LAYER, TOWER, LOSS), strict=True):
        assert ours == pytest.approx(right)


@pytest.mark.parametrize("layers", [[3] * 8, [0, 3, 3, 3, 3, 4, 4, 4]])
def test_a_long_step_is_known_from_a_short_one(
    layers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = ChunkSeconds(Pipeline(4, 2, 64), LAYER, TOWER, LOSS)
    short = seconds.step(layers)
    monkeypatch.setattr(stages, "GROUPS", 16)
    assert short == pytest.approx(seconds.step(layers), rel=0.03)


def test_a_layout_is_dealt_anew_where_that_is_faster() -> None:
    layout = ParallelConfig(pipeline=4, virtual_pipeline=2, pipeline_layout=suggestion(26, 8))
    seconds = ChunkSeconds(Pipeline(4, 2, 16), LAYER, TOWER, LOSS)
    held = layers_per_chunk(layout, 26)
    changed = balanced(layout, 26, timeline_of(seconds, held))
    assert changed.pipeline_layout is not None and changed.pipeline_layout.startswith("E|t*")
    dealt = layers_per_chunk(changed, 26)
    assert seconds.step(dealt) < 0.9 * seconds.step(held)
    # Nothing is gained once more, nor where all chunks take as long.
    assert balanced(changed, 26, timeline_of(seconds, dealt)) == changed
    even = ChunkSeconds(Pipeline(4, 2, 16), LAYER, NOTHING, NOTHING)
    alike = ParallelConfig(pipeline=4, virtual_pipeline=2)
    assert balanced(alike, 24, timeline_of(even, [3] * 8)) == alike


def test_what_cannot_be_told_apart_stays() -> None:
    """With two chunks each has layers and something else; with one there is nothing to deal."""
    layout = ParallelConfig(pipeline=2)
    seconds = ChunkSeconds(Pipeline(2, 1, 4), LAYER, TOWER, LOSS)
    assert balanced(layout, 12, timeline_of(seconds, [6, 6])) == layout
    assert balanced(ParallelConfig(), 12, ()) == ParallelConfig()


def test_a_name_says_what_each_chunk_holds() -> None:
    assert named([0, 2, 1]) == "E|t*2|t*1L"
    layout = ParallelConfig(pipeline=3, pipeline_layout=named([0, 2, 1]))
    assert layers_per_chunk(layout, 3) == [0, 2, 1]
