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
    description: str
    """What sets them apart, for example `vision tower, layers 0-11, most pictures`."""


@dataclass(frozen=True)
class _Chunk:
    """Layers of one chunk."""

    number: int
    """In the order in which a token passes them."""
    first: int
    stop: int
    is_last: bool

    def holds(self, levels: int) -> tuple[bool, int, bool, int, int]:
        """Return what decides its work: tower, layers, loss, and the DeepStack levels that come in and go on."""
        before, after = max(0, levels - self.first), max(0, levels - self.stop)
        return self.number == 0, self.stop - self.first, self.is_last, before, after


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
    stages = _stage_chunks(parallel, model)
    levels = len(model.vision.deepstack_layers)
    alike: dict[tuple[tuple[bool, int, bool, int, int], ...], list[int]] = {}
    for stage, chunks in enumerate(stages):
        held = tuple(chunk.holds(levels) for chunk in chunks)
        alike.setdefault(held, []).append(stage)

    per_stage = world_size // parallel.pipeline
    kinds = []
    for numbers in alike.values():
        first = numbers[0]
        description = _description(stages[first], numbers)
        if first == 0:
            kinds += _encoder_kinds(parallel, world_size, encoder_patches, description)
            continue
        rank = rank_number(parallel, world_size, first)
        kinds.append(RankKind(rank, per_stage * len(numbers), tuple(numbers), description))
    return kinds


def _encoder_kinds(
    parallel: ParallelConfig,
    world_size: int,
    encoder_patches: Sequence[int],
    description: str,
) -> list[RankKind]:
    """Return the kinds of the first stage: ranks with most pictures, and those with fewest where they have clearly less."""
    per_stage = world_size // parallel.pipeline
    most, fewest = max(encoder_patches), min(encoder_patches)
    if fewest >= ALIKE * most:
        rank = rank_number(parallel, world_size, 0, encoder_patches.index(most))
        return [RankKind(rank, per_stage, (0,), description)]

    # Ranks between the two count with the nearer one.
    busy = sum(2 * patches >= most + fewest for patches in encoder_patches)
    ranks_each = per_stage // len(encoder_patches)
    counts = {most: busy, fewest: len(encoder_patches) - busy}
    kinds = []
    for patches, name in ((most, "most pictures"), (fewest, "fewest pictures")):
        rank = rank_number(parallel, world_size, 0, encoder_patches.index(patches))
        ranks = counts[patches] * ranks_each
        kinds.append(RankKind(rank, ranks, (0,), f"{description}, {name}"))
    return kinds


def _stage_chunks(parallel: ParallelConfig, model: ModelConfig) -> list[list[_Chunk]]:
    """Return the chunks of each stage."""
    counts = layers_per_chunk(parallel, model.text.layers)
    stages: list[list[_Chunk]] = [[] for _ in range(parallel.pipeline)]
    first = 0
    for number, count in enumerate(counts):
        chunk = _Chunk(number, first, first + count, number == len(counts) - 1)
        # The first `pipeline` chunks go to the stages in turn, then the second ones.
        stages[number % parallel.pipeline].append(chunk)
        first += count
    return stages


def _description(chunks: list[_Chunk], stages: list[int]) -> str:
    """Say what a stage holds, and which other stages hold as much."""
    ranges = [f"{chunk.first}-{chunk.stop - 1}" for chunk in chunks if chunk.stop > chunk.first]
    words = [f"layers {' and '.join(ranges)}" if ranges else "no layers"]
    if chunks[0].number == 0:
        words.insert(0, "vision tower")
    if chunks[-1].is_last:
        words.append("loss")
    if len(stages) > 1:
        others = ", ".join(map(str, stages[1:]))
        words.append(f"alike stage {others}" if len(stages) == 2 else f"alike stages {others}")
    return ", ".join(words)
