"""When passes run. References: closed formulas for even stages, and a search for the earliest times that satisfy the rules."""

import random
from collections.abc import Mapping
from dataclasses import dataclass

import pytest

from visionloom.forecast.schedule import Await, Pass, Pipeline, Start, Transfer
from visionloom.forecast.timeline import play
from visionloom.forecast.trace.events import SlotKind
from visionloom.tests.forecast.test_schedule import PIPELINES

FORWARD, BACKWARD = SlotKind.FORWARD, SlotKind.BACKWARD


@dataclass(frozen=True)
class StageTimes:
    """A stage whose passes take as long whenever they begin."""

    passes: Mapping[Pass, float]
    begin: float = 0.0
    send_next: float = 0.0
    send_previous: float = 0.0

    def run(self, one: Pass | SlotKind, clock: float) -> float:
        if isinstance(one, Pass):
            return clock + self.passes[one]
        return clock + (self.begin if one is SlotKind.BEGIN else 0.0)


def even(pipeline: Pipeline, forward: float, backward: float) -> list[StageTimes]:
    """Chunks that all take as long; the whole model's times are given."""
    share = 1 / (pipeline.stages * pipeline.chunks)
    seconds = {FORWARD: forward * share, BACKWARD: backward * share}
    return [
        StageTimes({each: seconds[each.kind] for each in pipeline.passes(stage)})
        for stage in range(pipeline.stages)
    ]


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_the_bubble_of_even_stages(pipeline: Pipeline) -> None:
    """(stages - 1) / chunks passes of a whole stage are lost: Narayanan et al., arXiv 2104.04473, section 2.2."""
    forward, backward = 3.0, 5.0
    busy = pipeline.micro_batches * (forward + backward) / pipeline.stages
    lost = (pipeline.stages - 1) / pipeline.chunks * (forward + backward) / pipeline.stages
    timeline = play(pipeline, even(pipeline, forward, backward))
    assert max(timeline.ends) == pytest.approx(busy + lost)


def drawn_times(pipeline: Pipeline, seed: int, longest: float = 1.0) -> list[StageTimes]:
    """Uneven stages, passes and messages; `longest`: of a message, where passes take up to 3 s."""
    numbers = random.Random(seed)
    return [
        StageTimes(
            {each: numbers.uniform(0.5, 3.0) for each in pipeline.passes(stage)},
            begin=numbers.uniform(0.0, 2.0),
            send_next=numbers.uniform(0.0, longest),
            send_previous=numbers.uniform(0.0, longest),
        )
        for stage in range(pipeline.stages)
    ]


def searched_times(pipeline: Pipeline, times: list[StageTimes]) -> list[list[float]]:
    """When each action of each stage ends: raised again and again until no rule is broken.

    The rules know nothing of an order in which stages are played: an action ends after the one before it; a pass takes its
    seconds; a message that is awaited ends its seconds after both sides have come to it and the one before it has ended.
    """
    programs = [pipeline.actions(stage) for stage in range(pipeline.stages)]
    ends = [[0.0] * len(program) for program in programs]

    def place(stage: int, transfer: Transfer, number: int) -> int:
        starts = [at for at, each in enumerate(programs[stage]) if each == Start(transfer)]
        return starts[number]

    def message_end(stage: int, transfer: Transfer, number: int) -> float:
        forward = transfer in (Transfer.SEND_NEXT, Transfer.RECEIVE_PREVIOUS)
        sends = transfer in (Transfer.SEND_NEXT, Transfer.SEND_PREVIOUS)
        step = 1 if forward else -1
        sender = stage if sends else (stage - step) % pipeline.stages
        receiver = (sender + step) % pipeline.stages
        send = Transfer.SEND_NEXT if forward else Transfer.SEND_PREVIOUS
        receive = Transfer.RECEIVE_PREVIOUS if forward else Transfer.RECEIVE_NEXT
        seconds = times[sender].send_next if forward else times[sender].send_previous
        end = 0.0
        for each in range(number + 1):
            came = (
                ends[sender][place(sender, send, each)],
                ends[receiver][place(receiver, receive, each)],
            )
            end = max(end, *came) + seconds
        return end

    changed = True
    while changed:
        changed = False
        for stage, program in enumerate(programs):
            for at, action in enumerate(program):
                earliest = ends[stage][at - 1] if at else times[stage].begin
                if isinstance(action, Pass):
                    earliest += times[stage].passes[action]
                elif isinstance(action, Await):
                    earliest = max(earliest, message_end(stage, action.transfer, action.number))
                if earliest > ends[stage][at] + 1e-12:
                    ends[stage][at], changed = earliest, True
    return ends


@pytest.mark.parametrize("longest", [1.0, 9.0])
@pytest.mark.parametrize("pipeline", [each for each in PIPELINES if each.micro_batches < 8])
def test_uneven_times_equal_a_search(pipeline: Pipeline, longest: float) -> None:
    times = drawn_times(pipeline, pipeline.micro_batches, longest)
    timeline = play(pipeline, times)
    searched = searched_times(pipeline, times)
    assert list(timeline.ends) == pytest.approx([stage[-1] for stage in searched])

    passes = [
        end
        for stage, ends in enumerate(searched)
        for action, end in zip(pipeline.actions(stage), ends, strict=True)
        if isinstance(action, Pass)
    ]
    assert [span.end for span in timeline.spans] == pytest.approx(passes)


def test_a_pass_begins_after_what_it_needs() -> None:
    pipeline = Pipeline(4, 2, 8)
    times = drawn_times(pipeline, seed=1)
    timeline = play(pipeline, times)
    ends = {
        (span.kind, span.chunk * 4 + span.stage, span.micro_batch): span.end
        for span in timeline.spans
    }
    for span in timeline.spans:
        place = span.chunk * 4 + span.stage
        before = {FORWARD: place - 1, BACKWARD: place + 1}[span.kind]
        sender = times[before % 4]
        seconds = sender.send_next if span.kind is FORWARD else sender.send_previous
        if needed := ends.get((span.kind, before, span.micro_batch)):
            assert span.start >= needed + seconds - 1e-9


def test_messages_take_time_only_where_nothing_overlaps_them() -> None:
    """Two stages, one micro-batch: two messages one after the other."""
    pipeline = Pipeline(2, 1, 1)
    times = [
        StageTimes(dict.fromkeys(pipeline.passes(stage), 1.0), 0.0, 0.25, 0.5) for stage in (0, 1)
    ]
    timeline = play(pipeline, times)
    assert max(timeline.ends) == 4 + 0.25 + 0.5
