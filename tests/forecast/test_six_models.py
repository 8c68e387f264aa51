"""Each published model at a realistic world size: ranks of the first, a middle and the last stage take an imagined step.

References: tests/model/test_layout_sizes.py for what a rank holds, model/flops.py for what a step needs.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch.distributed as dist

from visionloom.forecast.imagine import trace_rank
from visionloom.forecast.trace.events import Category, Direction, RankTrace
from visionloom.model.config import ModelConfig
from visionloom.model.flops import step_flops
from visionloom.parallel import topology as topologies
from visionloom.parallel.config import ParallelConfig
from visionloom.parallel.parts import LANGUAGE, LOSS, MERGER, VISION
from visionloom.tests.forecast.batches import pictured_pack, work_of
from visionloom.tests.forecast.imagined import META
from visionloom.tests.model.test_layout_sizes import WORLDS, part
from visionloom.tests.model.test_sizes import published
from visionloom.tests.ranks import RankPool
from visionloom.train.config import RunConfig
from visionloom.train.phase.config import PhaseConfig

GIB = 2**30
TOKENS = 262_144
NAMES = {"language": LANGUAGE, "output": LOSS, "merger": MERGER, "vision": VISION}


@dataclass(frozen=True)
class World:
    """A model on a number of ranks, and its packs."""

    size: str
    ranks: int
    layout: dict[str, Any] = field(default_factory=dict)
    tokens: int = 8192
    samples: int = 8

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(**self.layout)

    @property
    def model(self) -> ModelConfig:
        return published(self.size)

    def trace(self, rank: int) -> RankTrace:
        """Trace a rank on the fewest micro-batches that its layout takes."""
        topology = topologies.imagine(self.parallel, self.ranks, rank, META)
        share = topology.share
        topologies.stop()
        pack = pictured_pack(
            self.tokens,
            self.samples,
            encoder_ranks=share.encoder_ranks,
            encoder_rank=share.encoder_rank,
        )
        parallel = self.parallel
        packs = [pack] * (parallel.pipeline if parallel.chunks > 1 else 1)
        phase = PhaseConfig(sequence_length=self.tokens, steps=2, global_batch=self.ranks)
        config = RunConfig(model=self.model, parallel=parallel, phases={"phase": phase})
        return trace_rank(config, "phase", self.ranks, rank, packs)


def traced(world: World, ranks: list[int]) -> list[RankTrace]:
    """The traces of ranks; runs on a rank of the pool, which leaves its own world for it."""
    dist.destroy_process_group()
    return [world.trace(rank) for rank in ranks]


def held(world: World, ranks: list[int]) -> list[int]:
    """Parameters of ranks."""
    dist.destroy_process_group()
    return [part(world.size, world.ranks, world.layout, rank)[1] for rank in ranks]


@pytest.mark.long
@pytest.mark.parametrize("size", WORLDS)
def test_ranks_hold_their_part_and_meet_ranks_of_the_world(size: str, pool: RankPool) -> None:
    ranks, layout = WORLDS[size]
    world = World(size, ranks, layout)
    stages = world.parallel.pipeline
    chosen = sorted({0, stages // 2, stages - 1})
    numbers = [stage * (ranks // stages) for stage in chosen]
    (traces,) = pool.run(1, traced, world, numbers)
    (counts,) = pool.run(1, held, world, numbers)

    assert [trace.stage for trace in traces] == chosen
    for trace, count in zip(traces, counts, strict=True):
        # Buffers of the data-parallel wrapper are padded.
        assert trace.at_rest[Category.WEIGHTS] == pytest.approx(2 * count, rel=0.01)
        assert trace.at_rest[Category.GRADIENTS] == pytest.approx(4 * count, rel=0.01)
        for axis in axes_of(trace):
            members = trace.groups[axis]
            assert trace.rank in members and len(set(members)) == len(members)
            assert set(members) <= set(range(ranks)), axis
        assert trace.mixed == ()


def axes_of(trace: RankTrace) -> set[str]:
    """The axes whose ranks a rank meets in a step."""
    axes = {each.axis for slot in trace.slots for each, _ in slot.collectives}
    assert axes
    return axes


@pytest.mark.long
def test_operations_of_all_ranks_are_those_of_the_model(pool: RankPool) -> None:
    """Eight pictures for eight encoder ranks: no rank runs the tower without a picture, and nothing is done twice."""
    ranks, layout = WORLDS["qwen3vl_8b"]
    world = World("qwen3vl_8b", ranks, layout)
    parallel = world.parallel
    assert parallel.encoder_ranks == world.samples and parallel.recompute == "none"
    # Context ranks have targets of their own; tensor ranks of each do the same.
    per_stage = ranks // parallel.pipeline
    numbers = [
        stage * per_stage + context * parallel.tensor
        for stage in range(parallel.pipeline)
        for context in range(parallel.context)
    ]
    (traces,) = pool.run(1, traced, world, numbers)

    counts: Counter[str] = Counter()
    for trace in traces:
        for slot in trace.slots:
            for operation, launches in slot.operations:
                assert operation.direction is not Direction.RECOMPUTE
                counts[operation.part] += parallel.tensor * operation.flops * launches  # type: ignore[assignment]
    work = work_of(pictured_pack(world.tokens, world.samples))
    needed = step_flops(world.model, work, {"vision", "merger", "language"})
    for part_name, flops in needed.items():
        assert counts[NAMES[part_name]] == pytest.approx(flops, rel=0.01), part_name
    assert sum(counts.values()) == pytest.approx(sum(needed.values()), rel=0.01)


LONG = {
    "8B, gathered": World(
        "qwen3vl_8b", 64, {"tensor": 8, "context": 8, "recompute": "full"}, TOKENS, 1
    ),
    "8B, exchanged": World(
        "qwen3vl_8b",
        64,
        {"context": 8, "recompute": "full", "context_exchange": "ulysses"},
        TOKENS,
        1,
    ),
    "2B, gathered": World("qwen3vl_2b", 8, {"context": 8}, TOKENS, 1),
    "2B, exchanged": World(
        "qwen3vl_2b", 8, {"context": 8, "context_exchange": "ulysses"}, TOKENS, 1
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("name", LONG)
def test_one_sample_of_262144_tokens(name: str, pool: RankPool) -> None:
    """Whichever way context ranks exchange, no mask is made: of gathered keys it had 4.25 GiB on each rank."""
    world = LONG[name]
    parallel = world.parallel
    assert [*parallel.all_problems(world.ranks), *world.model.layout_problems(parallel)] == []
    ((trace,),) = pool.run(1, traced, world, [0])
    print(f"{name}: peak {trace.peak.bytes / GIB:.1f} GiB")

    made = {operation.name for slot in trace.slots for operation, _ in slot.operations}
    assert "visionloom::attention" in made and "aten::tril" not in made
    assert trace.peak.bytes > sum(trace.at_rest.values())
    assert trace.mixed == ()


def test_heads_of_8b_cannot_be_exchanged_among_64_ranks() -> None:
    layout = ParallelConfig(tensor=8, context=8, context_exchange="ulysses")
    (problem,) = published("qwen3vl_8b").layout_problems(layout)
    assert problem.startswith("parallel.context_exchange=ulysses needs tensor 8 x context 8 = 64")
