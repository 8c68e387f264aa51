"""Decoder layers over the chunks of a pipeline, so that stages wait least for each other: from a traced step's own times. Imports no torch.

The vision tower and the loss take the place of layers, and nobody knows of how many before a trace. A chunk that takes longer than
the others holds all stages up while a group of micro-batches passes it, even where its stage has a short one to make up for it.
"""

import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Final, NamedTuple

from visionloom.forecast.results import Span
from visionloom.forecast.schedule import Pass, Pipeline
from visionloom.forecast.timeline import play
from visionloom.forecast.trace.events import SlotKind
from visionloom.parallel.config import ParallelConfig
from visionloom.parallel.pipeline import layers_per_chunk, named

TRIES: Final = 1000
"""Layers that are moved, and moved back where that is slower: each from every chunk to each other one four times where there are sixteen."""
GROUPS: Final = 3
"""Groups of as many micro-batches as there are stages that are played: in longer steps each further one takes as long as the fullest stage."""
LEAST_GAIN: Final = 0.005
"""Of a step: a smaller one is not worth a trace."""


class PassSeconds(NamedTuple):
    """Seconds of a micro-batch, forward and backward."""

    forward: float
    backward: float


@dataclass(frozen=True)
class ChunkSeconds:
    """What a micro-batch takes in a pipeline's chunks."""

    pipeline: Pipeline
    layer: PassSeconds
    """Of a decoder layer."""
    first: PassSeconds
    """Of what the first chunk has besides its layers: vision tower and embedding."""
    last: PassSeconds
    """Of what the last has besides: final norm and loss."""

    @classmethod
    def of(
        cls, layers: Sequence[int], stages: int, timeline: Sequence[Span]
    ) -> "ChunkSeconds | None":
        """Take them from a step; None where no chunk has layers alone.

        Args:
            layers: of each chunk.
            stages: of the pipeline.
            timeline: the step's passes.
        """
        alone = sum(layers[1:-1])
        if not alone or not timeline:
            return None

        def seconds(kind: SlotKind) -> Iterator[float]:
            chunks = []
            for place in range(len(layers)):
                chunk, stage = divmod(place, stages)
                passes = [
                    span.end - span.start
                    for span in timeline
                    if (span.stage, span.chunk, span.kind) == (stage, chunk, kind)
                ]
                # A few also wait for collectives.
                chunks.append(statistics.median(passes))
            layer = sum(chunks[1:-1]) / alone
            yield layer
            for end in (0, -1):
                yield max(0.0, chunks[end] - layers[end] * layer)

        micro_batches = max(span.micro_batch for span in timeline) + 1
        pipeline = Pipeline(stages, len(layers) // stages, micro_batches)
        parts = zip(seconds(SlotKind.FORWARD), seconds(SlotKind.BACKWARD), strict=True)
        return cls(pipeline, *(PassSeconds(*both) for both in parts))

    def step(self, layers: Sequence[int]) -> float:
        """Return the seconds of a step's passes with these layers in the chunks."""
        groups = self.pipeline.micro_batches // self.pipeline.stages
        if groups <= GROUPS:
            return self._played(self.pipeline, layers)
        few = replace(self.pipeline, micro_batches=GROUPS * self.pipeline.stages)
        more = self.pipeline.micro_batches - few.micro_batches
        busy = [sum(map(sum, stage.seconds)) for stage in self.stages(few, layers)]
        return self._played(few, layers) + more * max(busy)

    def fastest(self, layers: Sequence[int]) -> list[int]:
        """Return the layers of each chunk with which a step takes least, as far as a search from `layers` finds them."""
        numbers, best, fewest = random.Random(0), list(layers), self.step(layers)
        moves = list(permutations(range(len(layers)), 2))
        for number in range(TRIES):
            sweep, place = divmod(number, len(moves))
            if place == 0:
                numbers.shuffle(moves)
            # Every other time round a second layer is moved too: no single one may help.
            second = [numbers.choice(moves)] if sweep % 2 else []
            tried = list(best)
            for one, other in (moves[place], *second):
                tried[one] -= 1
                tried[other] += 1
            # The tower alone is a chunk; any other without layers would be a stage's rest for nothing.
            if min(tried[0], min(tried[1:]) - 1) < 0:
                continue
            seconds = self.step(tried)
            if seconds <= fewest:
                best, fewest = tried, seconds
        return best

    def stages(self, pipeline: Pipeline, layers: Sequence[int]) -> "list[_Stage]":
        """Return the stages with these layers."""
        chunks = [PassSeconds(*(count * each for each in self.layer)) for count in layers]
        for end, more in ((0, self.first), (-1, self.last)):
            chunks[end] = PassSeconds(*map(sum, zip(chunks[end], more, strict=True)))
        stages = pipeline.stages
        return [_Stage(chunks[stage::stages]) for stage in range(stages)]

    def _played(self, pipeline: Pipeline, layers: Sequence[int]) -> float:
        return max(play(pipeline, self.stages(pipeline, layers)).ends)


@dataclass(frozen=True)
class _Stage:
    """A stage whose passes take as long whenever they begin, and whose messages take no time."""

    seconds: Sequence[PassSeconds]
    """Of each chunk."""
    send_next: float = 0.0
    send_previous: float = 0.0

    def run(self, one: Pass | SlotKind, clock: float) -> float:
        """Let a pass begin at `clock`; return when it is done."""
        if not isinstance(one, Pass):
            return clock
        chunk = self.seconds[one.chunk]
        return clock + (chunk.forward if one.kind is SlotKind.FORWARD else chunk.backward)


def balanced(layout: ParallelConfig, layers: int, timeline: Sequence[Span]) -> ParallelConfig:
    """Return a layout with its layers dealt to the chunks as a step seems fastest; the same one where that gains too little.

    Args:
        layout: any.
        layers: of the model.
        timeline: passes of a step in this layout.
    """
    held = layers_per_chunk(layout, layers)
    seconds = ChunkSeconds.of(held, layout.pipeline, timeline)
    if seconds is None:
        return layout
    best = seconds.fastest(held)
    if seconds.step(best) > (1 - LEAST_GAIN) * seconds.step(held):
        return layout
    return replace(layout, pipeline_layout=named(best))
