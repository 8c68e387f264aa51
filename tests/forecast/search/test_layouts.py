"""All possible layouts, and no other. Reference: every degree of every axis, by the run's own checks."""

from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from visionloom.common.settings import check
from visionloom.forecast.search.layouts import LegalLayouts, cut_evenly, with_layout, yaml_of
from visionloom.launch.configure import compose
from visionloom.parallel.config import ParallelConfig
from visionloom.tests.model.test_sizes import published
from visionloom.tests.ranks import RankPool
from visionloom.train.config import RunConfig, RunSection
from visionloom.train.phase.config import PhaseConfig

NODE = 4


def run_of(model: str, global_batch: int, length: int = 8192) -> RunConfig:
    """One phase of a model, with four layers so that all degrees can be looked at."""
    config = published(model)
    config = replace(config, text=replace(config.text, layers=4))
    phase = PhaseConfig(steps=10, global_batch=global_batch, sequence_length=length)
    return RunConfig(RunSection(name="x"), config, phases={"p": phase})


def by_hand(config: RunConfig, world_size: int) -> list[dict[str, Any]]:
    """The layouts, of all degrees up to the number of ranks, that all of the run's checks let pass."""
    layers = config.model.text.layers
    experts = range(1, world_size + 1) if config.model.text.experts else [1]
    possible = []
    for tensor, pipeline, context, expert, shared, chunks, exchange in product(
        range(1, NODE + 1),
        range(1, layers + 1),
        range(1, world_size + 1),
        experts,
        experts,
        [None, 2, 3, 4],
        ["gather", "ulysses"],
    ):
        if tensor * pipeline * context > world_size or pipeline * (chunks or 1) > layers:
            continue
        if context == 1 and exchange == "ulysses":
            continue  # nothing is exchanged
        layout = ParallelConfig(tensor, pipeline, chunks, context, exchange, expert)
        layout = replace(layout, expert_tensor=shared if shared > 1 else None)
        layout = cut_evenly(replace(layout, expert_parts=2 if expert > 1 else 1), layers)
        if not with_layout(config, "p", layout).all_problems(world_size):
            possible.append(asdict(layout))
    return possible


@pytest.mark.parametrize(
    ("model", "world_size", "global_batch", "length"),
    [
        ("qwen3vl_2b", 6, 12, 8192),
        ("qwen3vl_2b", 8, 4, 8190),
        ("qwen3vl_30b_a3b", 4, 4, 8192),
        ("qwen3vl_30b_a3b", 6, 12, 8192),
    ],
)
def test_layouts_are_all_that_are_possible(
    model: str, world_size: int, global_batch: int, length: int
) -> None:
    config = run_of(model, global_batch, length)
    proposed = [asdict(layout) for layout in LegalLayouts(config, "p", world_size, NODE)]
    expected = by_hand(config, world_size)
    print(f"{model} on {world_size}: {len(expected)} layouts")
    assert len(expected) > 5

    def order(layout: dict[str, Any]) -> str:
        return repr(layout)

    assert sorted(proposed, key=order) == sorted(expected, key=order)


def test_a_layout_can_be_pasted(tmp_path: Path) -> None:
    """As a file of parallel/, chosen by a word: the run has the layout, and samples in the multiples that it needs."""
    layout = ParallelConfig(
        tensor=2, pipeline=4, context=2, virtual_pipeline=5, recompute="full", sequence=True
    )
    layout = cut_evenly(layout, published("qwen3vl_8b").text.layers)
    words = ["+recipe=full/qwen3vl_8b", f"--config-dir={tmp_path}"]
    config = compose(words, 8)
    assert config is not None
    searched = with_layout(config, "finetune", layout)
    text = yaml_of(searched)
    assert 'pipeline_layout: "Et*' in text

    file = tmp_path / "parallel" / "own.yaml"
    file.parent.mkdir()
    file.write_text(text)
    pasted = compose([*words, "parallel=own"], 16)
    assert pasted == searched


def test_the_usual_layout_has_no_values() -> None:
    text = yaml_of(with_layout(run_of("qwen3vl_2b", 8), "p", ParallelConfig()))
    assert text == "# @package _global_\nparallel: {}\n"


# ---- three layouts of other frameworks' recipes that cannot be built there


@pytest.mark.parametrize(
    ("layout", "product"),
    [
        ({"pipeline": 8, "virtual_pipeline": 4}, "pipeline 8 x virtual_pipeline 4 = 32"),
        ({"pipeline": 16}, "pipeline 16 = 16"),
    ],
)
def test_layers_that_cannot_be_cut_are_refused(layout: dict[str, Any], product: str) -> None:
    """235B has 94 layers: the reason is named, and a layout that works."""
    model = published("qwen3vl_235b_a22b")
    (line,) = model.layout_problems(ParallelConfig(tensor=2, expert=16, **layout))
    assert line.startswith(f"94 layers cannot be cut evenly into {product} chunks: give")
    stages = line.partition("parallel.pipeline_layout='")[2].partition("'")[0]
    given = ParallelConfig(tensor=2, expert=16, pipeline_layout=stages, **layout)
    assert model.layout_problems(given) == given.all_problems(256) == []


def chunk_layers(size: str, world_size: int, layout: dict[str, Any]) -> list[list[int]]:
    """The layers of the first two chunks of each stage; runs on a rank of the pool, which leaves its world."""
    import torch
    import torch.distributed as dist

    from visionloom.model.qwen3vl import Qwen3VL
    from visionloom.parallel import topology as topologies

    dist.destroy_process_group()
    config = ParallelConfig(**layout)
    stages = []
    for stage in range(config.pipeline):
        rank = stage * world_size // config.pipeline
        topology = topologies.imagine(config, world_size, rank, torch.device("meta"))
        with torch.device("meta"):
            for number in config.chunk_numbers[:2]:
                chunk = Qwen3VL(published(size), topology, torch.bfloat16, number)
                layers = chunk.language_model.decoder.layers
                stages.append([layer.layer_number - 1 for layer in layers])
        topologies.stop()
    return stages


def test_chunks_shorter_than_the_deepstack_levels_are_built(pool: RankPool) -> None:
    """30B in 2 x 12 chunks of two layers, for three levels: here those that a chunk has no layer for travel on."""
    layout = {"pipeline": 2, "virtual_pipeline": 12, "expert": 8}
    parallel = ParallelConfig(**layout)
    model = published("qwen3vl_30b_a3b")
    assert [*parallel.all_problems(16), *model.layout_problems(parallel)] == []
    assert check(model, "model").lines == []
    (chunks,) = pool.run(1, chunk_layers, "qwen3vl_30b_a3b", 16, layout)
    assert sorted(chunks) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert len(model.vision.deepstack_layers) > len(chunks[0])
