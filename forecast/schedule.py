"""The order in which Megatron-core 0.19 runs the passes of a pipeline stage, and when its messages begin and are waited for.

Source: megatron/core/pipeline_parallel/schedules.py with the settings of model/language.py: messages one by one
(`batch_p2p_comm` off), overlapped with passes only in the steady part of interleaved stages (`overlap_p2p_comm` without
`overlap_p2p_comm_warmup_flush`), outputs deallocated, groups of as many micro-batches as there are stages. Imports no torch.
"""

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from visionloom.forecast.trace.events import SlotKind


class Pass(NamedTuple):
    """A micro-batch passes a chunk of a stage."""

    kind: SlotKind
    """FORWARD or BACKWARD."""
    chunk: int
    micro_batch: int


class Transfer(StrEnum):
    """A message, as a stage sees it; with several chunks the last stage is previous to the first."""

    SEND_NEXT = "send next"
    RECEIVE_PREVIOUS = "receive previous"
    SEND_PREVIOUS = "send previous"
    RECEIVE_NEXT = "receive next"


@dataclass(frozen=True, slots=True)
class Start:
    """A message may begin; it does when the other stage has come as far."""

    transfer: Transfer


@dataclass(frozen=True, slots=True)
class Await:
    """The stage waits until a message has ended."""

    transfer: Transfer
    number: int
    """Among the stage's messages of this kind."""


type Action = Pass | Start | Await


@dataclass(frozen=True)
class Pipeline:
    """Sizes of a pipeline; with several `chunks` the `micro_batches` are a multiple of `stages`."""

    stages: int
    chunks: int
    micro_batches: int

    def actions(self, stage: int) -> list[Action]:
        """Return what a stage does in a step, in order."""
        program = _Program()
        kind = _OneChunk if self.chunks == 1 else _Interleaved
        kind(program, self, stage).run()
        return program.actions

    def passes(self, stage: int) -> list[Pass]:
        """Return the passes of a stage in order."""
        return [action for action in self.actions(stage) if isinstance(action, Pass)]


@dataclass
class _Program:
    """The actions of a stage as they are written down."""

    actions: list[Action] = field(default_factory=list)
    started: Counter[Transfer] = field(default_factory=Counter)
    pending: dict[Transfer, list[int]] = field(default_factory=dict)
    """Numbers of messages that were started and not waited for."""

    def start(self, *transfers: Transfer | None) -> None:
        """Start messages; None stands for one that there is not."""
        for transfer in transfers:
            if transfer is not None:
                self.actions.append(Start(transfer))
                self.pending.setdefault(transfer, []).append(self.started[transfer])
                self.started[transfer] += 1

    def wait(self, transfer: Transfer) -> None:
        """Wait for the oldest message of a kind, if one is pending."""
        if numbers := self.pending.get(transfer):
            self.actions.append(Await(transfer, numbers.pop(0)))

    def exchange(self, *transfers: Transfer | None) -> None:
        """Start messages and wait for them at once."""
        self.start(*transfers)
        for transfer in transfers:
            if transfer is not None:
                self.actions.append(Await(transfer, self.pending[transfer].pop()))


@dataclass
class _OneChunk:
    """1F1B (`forward_backward_pipelining_without_interleaving`).

    With one stage it is the order of `forward_backward_no_pipelining`.
    """

    program: _Program
    pipeline: Pipeline
    stage: int

    def __post_init__(self) -> None:
        first, last = self.stage == 0, self.stage == self.pipeline.stages - 1
        self.send_next = None if last else Transfer.SEND_NEXT
        self.receive_next = None if last else Transfer.RECEIVE_NEXT
        self.send_previous = None if first else Transfer.SEND_PREVIOUS
        self.receive_previous = None if first else Transfer.RECEIVE_PREVIOUS

    def run_pass(self, kind: SlotKind, micro_batch: int) -> None:
        """Write down a pass."""
        self.program.actions.append(Pass(kind, 0, micro_batch))

    def run(self) -> None:
        """Write down what the stage does."""
        micro_batches = self.pipeline.micro_batches
        warmup = min(self.pipeline.stages - self.stage - 1, micro_batches)
        steady = micro_batches - warmup
        for number in range(warmup):
            self.program.exchange(self.receive_previous)
            self.run_pass(SlotKind.FORWARD, number)
            self.program.exchange(self.send_next)

        if steady:
            self.program.exchange(self.receive_previous)
        for number in range(steady):
            self.run_pass(SlotKind.FORWARD, warmup + number)
            self.program.exchange(self.send_next, self.receive_next)
            self.run_pass(SlotKind.BACKWARD, number)
            another = number < steady - 1
            receive = self.receive_previous if another else None
            self.program.exchange(receive, self.send_previous)

        for number in range(steady, micro_batches):
            self.program.exchange(self.receive_next)
            self.run_pass(SlotKind.BACKWARD, number)
            self.program.exchange(self.send_previous)


@dataclass
class _Interleaved:
    """1F1B with several chunks on each stage (`forward_backward_pipelining_with_interleaving`)."""

    program: _Program
    pipeline: Pipeline
    stage: int

    def __post_init__(self) -> None:
        stages, chunks = self.pipeline.stages, self.pipeline.chunks
        self.last_chunk = chunks - 1
        self.leads = {
            SlotKind.FORWARD: self.stage == 0,
            SlotKind.BACKWARD: self.stage == stages - 1,
        }
        """The stage at which the model begins in this direction."""
        self.total = self.pipeline.micro_batches * chunks
        ahead = (stages - self.stage - 1) * 2 + (chunks - 1) * stages
        self.warmup = min(ahead, self.total)
        self.steady = self.total - self.warmup

    def chunk(self, number: int, kind: SlotKind) -> int:
        """Return the chunk of a stage's forward or backward pass by its number in the step."""
        chunk = number // self.pipeline.stages % self.pipeline.chunks
        return chunk if kind is SlotKind.FORWARD else self.last_chunk - chunk

    def depth(self, number: int, kind: SlotKind) -> int:
        """Return how many chunks of the stage the micro-batch has passed in this direction."""
        chunk = self.chunk(number, kind)
        return chunk if kind is SlotKind.FORWARD else self.last_chunk - chunk

    def run_pass(self, number: int, kind: SlotKind) -> None:
        """Write down a pass by its number in the step."""
        stages = self.pipeline.stages
        group = number // (stages * self.pipeline.chunks)
        micro_batch = group * stages + number % stages
        self.program.actions.append(Pass(kind, self.chunk(number, kind), micro_batch))

    def messages(
        self, number: int, kind: SlotKind, more: bool = True
    ) -> tuple[Transfer | None, Transfer | None]:
        """Return what is sent after a pass and what is received meanwhile.

        Args:
            number: of the pass in the step.
            kind: of the pass.
            more: there is something left to receive.
        """
        forward = kind is SlotKind.FORWARD
        send = Transfer.SEND_NEXT if forward else Transfer.SEND_PREVIOUS
        receive = Transfer.RECEIVE_PREVIOUS if forward else Transfer.RECEIVE_NEXT
        other = SlotKind.BACKWARD if forward else SlotKind.FORWARD
        ends = self.leads[other] and self.depth(number, kind) == self.last_chunk

        if self.leads[kind]:
            # It is ahead of the stage that sends to it by all others; what leaves the model is not sent.
            sent = number - (self.pipeline.stages - 1)
            more = more and sent >= 0 and self.depth(sent, kind) != self.last_chunk
        return None if ends else send, receive if more else None

    def wait_for_input(self, number: int, kind: SlotKind) -> None:
        """Wait for what a pass needs, if it was not waited for before."""
        if not (self.leads[kind] and self.depth(number, kind) == 0):
            forward = kind is SlotKind.FORWARD
            self.program.wait(Transfer.RECEIVE_PREVIOUS if forward else Transfer.RECEIVE_NEXT)

    def run(self) -> None:
        """Write down what the stage does."""
        receive_next = None if self.leads[SlotKind.BACKWARD] else Transfer.RECEIVE_NEXT
        if not self.leads[SlotKind.FORWARD]:
            self.program.exchange(Transfer.RECEIVE_PREVIOUS)
        for number in range(self.warmup):
            self.run_pass(number, SlotKind.FORWARD)
            more = number < self.total - 1
            self.program.exchange(*self.messages(number, SlotKind.FORWARD, more))

        if self.steady:
            self.program.start(receive_next)
        for number in range(self.steady):
            self.run_steady(number)

        if not self.steady:
            self.program.exchange(receive_next)
        for number in range(self.steady, self.total):
            self.wait_for_input(number, SlotKind.BACKWARD)
            self.run_pass(number, SlotKind.BACKWARD)
            more = number < self.total - 1
            self.program.exchange(*self.messages(number, SlotKind.BACKWARD, more))
        self.program.wait(Transfer.SEND_PREVIOUS)

    def run_steady(self, number: int) -> None:
        """Write down a forward and a backward pass, with messages under way meanwhile."""
        forward = self.warmup + number
        self.wait_for_input(forward, SlotKind.FORWARD)
        self.run_pass(forward, SlotKind.FORWARD)
        more = number < self.steady - 1
        self.program.start(*self.messages(forward, SlotKind.FORWARD, more))
        # The output is deallocated, so that it must have been sent.
        self.program.wait(Transfer.SEND_NEXT)

        self.wait_for_input(number, SlotKind.BACKWARD)
        self.run_pass(number, SlotKind.BACKWARD)
        earlier = bool(self.program.pending.get(Transfer.SEND_PREVIOUS))
        self.program.start(*self.messages(number, SlotKind.BACKWARD))
        if earlier:
            self.program.wait(Transfer.SEND_PREVIOUS)
