"""Which ranks of a run differ: one rank of each kind is traced and stands for the others. Imports no torch.

Ranks of a stage differ in the pictures that they encode; copies of the model, tensor ranks and context ranks do equal work.
Stages differ in what they hold. Stages that hold as much are one kind, though in 1F1B an earlier one keeps more micro-batches:
how many a stage keeps follows from its number, and not from a trace.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from visionloom.model.config import ModelConfig
from visionloom.parallel.config import ParallelConfig
from visionloom.parallel.pipeline import layers_per_chunk

ALIKE: Final = 0.9
"""Encoder ranks are one kind where the one with the fewest patches has this share of the most: a tenth less of the tower's
work would be a row of the table that nobody can tell from the other."""


@dataclass(frozen=True)
class RankKind:
    """Ranks that do the same work."""

    rank: int
    """The first of them, which is traced."""
    ranks: int
    """How many there are."""
    stages: tuple[int, ...]
    """Pipeline stages that they are on."""
    descriptions: tuple[str, ...]
    """Of each stage, what it holds, for example `vision tower, layers 0-11, most pictures`."""


@dataclass(frozen=True)
class _Chunk:
    """Layers of one chunk."""

    number: int
    """In the order in which a token passes them."""
    first: int
    stop: int
    is_last: bool

    def holds(self, levels: int) -> tuple[int, ...]:
        """Return what decides its work: tower, layers, loss, and the DeepStack levels that come in and that go on."""
        before = max(0, levels - self.first)
        after = max(0, levels - self.stop)
        return self.number == 0, self.stop - self.first, self.is_last, before, after


@dataclass(frozen=True)
class _Stage:
    """The chunks of a pipeline stage."""

    number: int
    chunks: tuple[_Chunk, ...]

    @classmethod
    def all(cls, parallel: ParallelConfig, model: ModelConfig) -> "list[_Stage]":
        """Return the stages of a layout."""
        counts = layers_per_chunk(parallel, model.text.layers)
        chunks, first = [], 0
        for number, count in enumerate(counts):
            chunks.append(_Chunk(number, first, first + count, number == len(counts) - 1))
            first += count
        # The first `pipeline` chunks go to the stages in turn, then the second ones.
        size = parallel.pipeline
        return [cls(stage, tuple(chunks[stage::size])) for stage in range(size)]

    @property
    def description(self) -> str:
        """Say what it holds."""
        ranges = []
        for chunk in self.chunks:
            if chunk.stop > chunk.first:
                ranges.append(f"{chunk.first}-{chunk.stop - 1}")
        words = f"layers {' and '.join(ranges)}" if ranges else "no layers"
        tower = "" if self.number else "vision tower, "
        loss = ", loss" if self.chunks[-1].is_last else ""
        return tower + words + loss


def rank_number(
    parallel: ParallelConfig, world_size: int, stage: int, encoder_rank: int = 0
) -> int:
    """Return the rank of the first copy of the model on a stage, by its place among those that share the pictures of a pack."""
    per_stage = world_size // parallel.pipeline
    # Megatron-core counts tensor ranks first, then context ranks; without sequence parallelism all tensor ranks encode.
    ranks_between = 1 if parallel.sequence_parallel else parallel.tensor
    return stage * per_stage + encoder_rank * ranks_between


def rank_kinds(
    parallel: ParallelConfig,
    world_size: int,
    model: ModelConfig,
    encoder_patches: Sequence[int],
) -> list[RankKind]:
    """Return the kinds of ranks of a layout, in the order of stages.

    Args:
        parallel: a layout that is possible for the model on these ranks.
        world_size: ranks of the run.
        model: whose layers are cut.
        encoder_patches: patches of a pack that each encoder rank gets.
    """
    levels = len(model.vision.deepstack_layers)
    alike: dict[tuple[tuple[int, ...], ...], list[_Stage]] = {}
    for stage in _Stage.all(parallel, model):
        held = tuple(chunk.holds(levels) for chunk in stage.chunks)
        alike.setdefault(held, []).append(stage)

    first, *others = alike.values()
    kinds = _ranks_with_tower(parallel, world_size, first[0].description, encoder_patches)
    for stages in others:
        numbers = tuple(stage.number for stage in stages)
        rank = rank_number(parallel, world_size, numbers[0])
        ranks = world_size // parallel.pipeline * len(stages)
        descriptions = tuple(stage.description for stage in stages)
        kinds.append(RankKind(rank, ranks, numbers, descriptions))
    return kinds


def _ranks_with_tower(
    parallel: ParallelConfig,
    world_size: int,
    description: str,
    encoder_patches: Sequence[int],
) -> list[RankKind]:
    """Return the kinds of the first stage: ranks with most pictures, and those with fewest where they have clearly less."""
    per_stage = world_size // parallel.pipeline
    most, fewest = max(encoder_patches), min(encoder_patches)
    busiest = rank_number(parallel, world_size, 0, encoder_patches.index(most))
    if fewest >= ALIKE * most:
        return [RankKind(busiest, per_stage, (0,), (description,))]

    # Ranks between the two count with the nearer one.
    middle = (most + fewest) / 2
    busy = sum(patches >= middle for patches in encoder_patches)
    busy *= per_stage // len(encoder_patches)
    idlest = rank_number(parallel, world_size, 0, encoder_patches.index(fewest))
    return [
        RankKind(busiest, busy, (0,), (f"{description}, most pictures",)),
        RankKind(idlest, per_stage - busy, (0,), (f"{description}, fewest pictures",)),
    ]
