"""When the passes of a pipeline run: its schedule, played with the times of passes and messages. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from visionloom.forecast.results import Span
from visionloom.forecast.schedule import Action, Pass, Pipeline, Start, Transfer
from visionloom.forecast.trace.events import SlotKind

SENT: Final = (Transfer.SEND_NEXT, Transfer.SEND_PREVIOUS)


class PipelineStage(Protocol):
    """A stage of the pipeline while a step is played."""

    @property
    def send_next(self) -> float:
        """Return the seconds of a message to the next stage."""

    @property
    def send_previous(self) -> float:
        """Return the seconds of a message to the stage before."""

    def run(self, one: Pass | SlotKind, clock: float) -> float:
        """Let a pass begin at `clock`, or what comes before or after all of them; return when it is done."""


@dataclass(frozen=True)
class Timeline:
    """A step's passes; seconds from its begin."""

    spans: tuple[Span, ...]
    """Of each stage in order."""
    ends: tuple[float, ...]
    """When each stage is done with what comes after its last action."""


@dataclass
class _Messages:
    """All messages of one kind from one stage: the first that is sent is the first that is received."""

    seconds: float
    sent: list[float] = field(default_factory=list)
    """When the sender came to them."""
    received: list[float] = field(default_factory=list)
    """When the receiver came to them."""
    ends: list[float] = field(default_factory=list)

    def start(self, sends: bool, clock: float) -> None:
        """Note that a stage has come to its next message; the message runs once both have."""
        (self.sent if sends else self.received).append(clock)
        number = len(self.ends)
        if min(len(self.sent), len(self.received)) > number:
            begin = max(self.sent[number], self.received[number])
            # One after the other: they share a link.
            before = self.ends[-1] if self.ends else 0.0
            self.ends.append(max(begin, before) + self.seconds)


@dataclass
class _Player:
    """One stage while it is played."""

    stage: int
    actions: list[Action]
    times: PipelineStage
    messages: dict[Transfer, _Messages]
    """Those that it sends and receives."""
    clock: float
    next: int = 0
    spans: list[Span] = field(default_factory=list)

    def run(self) -> bool:
        """Act until a message that is awaited has not been sent yet; return whether anything was done."""
        before = self.next
        while self.next < len(self.actions) and self.act(self.actions[self.next]):
            self.next += 1
        return self.next > before

    def act(self, action: Action) -> bool:
        """Do the next action; return whether it can be done by now."""
        if isinstance(action, Pass):
            start = self.clock
            self.clock = self.times.run(action, self.clock)
            kind, chunk, number = action
            self.spans.append(Span(self.stage, chunk, number, kind, start, self.clock))
        elif isinstance(action, Start):
            self.messages[action.transfer].start(action.transfer in SENT, self.clock)
        else:
            ends = self.messages[action.transfer].ends
            if action.number >= len(ends):
                return False
            self.clock = max(self.clock, ends[action.number])
        return True


def play(pipeline: Pipeline, times: Sequence[PipelineStage]) -> Timeline:
    """Play a step; `times`: of each stage.

    A message runs when sender and receiver have both come to it, as NCCL's do, and a stage stands still while it waits.
    """
    messages = _messages_of(times)
    players = [
        _Player(stage, pipeline.actions(stage), own, messages[stage], own.run(SlotKind.BEGIN, 0.0))
        for stage, own in enumerate(times)
    ]

    while any(player.run() for player in players):
        pass
    assert all(player.next == len(player.actions) for player in players)
    spans = tuple(span for player in players for span in player.spans)
    ends = [player.times.run(SlotKind.END, player.clock) for player in players]
    return Timeline(spans, tuple(ends))


def _messages_of(times: Sequence[PipelineStage]) -> list[dict[Transfer, _Messages]]:
    """Return the messages that each stage sends and receives; one object for both ends."""
    stages = len(times)
    messages: list[dict[Transfer, _Messages]] = [{} for _ in times]
    for stage, own in enumerate(times):
        following, previous = messages[(stage + 1) % stages], messages[stage - 1]
        sent = messages[stage][Transfer.SEND_NEXT] = _Messages(own.send_next)
        following[Transfer.RECEIVE_PREVIOUS] = sent
        sent = messages[stage][Transfer.SEND_PREVIOUS] = _Messages(own.send_previous)
        previous[Transfer.RECEIVE_NEXT] = sent
    return messages
