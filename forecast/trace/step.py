"""Trace one optimizer step of a rank: Megatron-core's schedule is cut into slots, and what a message would bring is stated."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from megatron.core.pipeline_parallel import schedules
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch.nn.modules import module

from visionloom.data.stream.batch import PackedBatch
from visionloom.forecast.trace.axes import Axes
from visionloom.forecast.trace.events import Category, RankTrace, SlotKind
from visionloom.forecast.trace.imagined import ImaginedRecorder
from visionloom.forecast.trace.memory import heard_resizes
from visionloom.forecast.trace.real import HostCopies, MarkedDevice, RealRecorder
from visionloom.forecast.trace.recorder import Recorder
from visionloom.forecast.trace.values import Routing, StatedValues
from visionloom.model.rank_share import RankShare
from visionloom.parallel import stand_in
from visionloom.parallel.pipeline import layers_per_chunk
from visionloom.train.phase.trainer import PhaseTrainer
from visionloom.train.step import train_step


@contextlib.contextmanager
def recording(device: torch.device, routing: Routing | None = None) -> Iterator[Recorder]:
    """Record what runs inside: on an imagined device, or on a real CPU, whose device tensors are then marked.

    Args:
        device: of the rank: `meta` or the CPU.
        routing: of a mixture's tokens, None: even; a real rank routes as stated, too.
    """
    values = StatedValues(routing or Routing())
    if device.type == "meta":
        with imagining(ImaginedRecorder(values)) as recorder:
            yield recorder
        return
    marked = MarkedDevice()
    with HostCopies(marked) as copies, stand_in.passing_for_cuda(marked.holds):
        real = RealRecorder(marked, copies, values)
        with _listening(real):
            yield real


@contextlib.contextmanager
def imagining(recorder: ImaginedRecorder) -> Iterator[ImaginedRecorder]:
    """Let a recorder record an imagined rank inside."""
    with recorder.heard_works(), _listening(recorder):
        yield recorder


@contextlib.contextmanager
def _listening(recorder: Recorder) -> Iterator[None]:
    """Let a recorder see operations, and hear of all else that it records."""
    # Megatron-core keeps this tensor for the process: each rank begins with none, and leaves none of its device.
    scale = mock.patch.object(MoEAuxLossAutoScaler, "main_loss_backward_scale", None)
    with (
        scale,
        _heard_recomputation(recorder),
        heard_resizes(recorder.ledger),
        _heard_synchronization(recorder),
        recorder,
    ):
        yield


@contextlib.contextmanager
def _heard_synchronization(recorder: Recorder) -> Iterator[None]:
    """Let the recorder hear of the host's waits for streams and events, which the stand-in for torch.cuda does not have."""

    def wait(*_: object) -> None:
        recorder.synchronized()

    stream = stand_in.StandInStream
    with (
        mock.patch.object(stream, "synchronize", wait),
        mock.patch.object(torch.cuda, "synchronize", wait),
    ):
        yield


@contextlib.contextmanager
def _heard_recomputation(recorder: Recorder) -> Iterator[None]:
    """Let the recorder know when a module is called from inside a backward pass: only recomputation does that."""
    begun: list[bool] = []

    def before(*_: object) -> None:
        begun.append(torch._C._current_autograd_node() is not None)
        recorder.recomputing += begun[-1]

    def after(*_: object) -> None:
        recorder.recomputing -= begun.pop()

    first = module.register_module_forward_pre_hook(before)
    # Recomputation that has all it needs stops by an exception.
    last = module.register_module_forward_hook(after, always_call=True)
    try:
        yield
    finally:
        first.remove()
        last.remove()


def trace_step(recorder: Recorder, trainer: PhaseTrainer, batches: list[PackedBatch]) -> RankTrace:
    """Run one step of a trainer that was built while `recorder` recorded, and return its trace.

    Args:
        recorder: of `recording`, whose context is still open.
        trainer: model, wrapper and optimizer.
        batches: this rank's micro-batches, on the host.
    """
    topology, ledger = trainer.topology, recorder.ledger
    # The first update would make them: between steps they are there.
    for inner in trainer.engine.optimizer.chained_optimizers:
        if getattr(inner.optimizer, "make_moments", None):
            inner.optimizer.make_moments()
    for wrapped in trainer.engine.parts:
        expect_gradients(wrapped)
    for tensors, category in owned(trainer):
        ledger.own(tensors, category)
    recorder.axes = Axes(topology)

    at_rest = recorder.start()
    passes = _Passes(recorder, trainer, len(batches))
    with passes.watched(), _stated_shapes(trainer, batches):
        train_step(trainer, batches)
    recorder.finish()
    return RankTrace(
        rank=topology.rank,
        world_size=topology.world_size,
        stage=topology.pipeline_rank,
        micro_batches=len(batches),
        groups=dict(recorder.axes.ranks),
        slots=tuple(recorder.slots),
        waits=recorder.take_waits(),
        mixed=recorder.take_mixed(),
        allocated=ledger.allocated(),
        at_rest=at_rest,
        peak=ledger.peak(),
    )


def expect_gradients(wrapped: Any) -> None:
    """Let Megatron-core's DDP reduce gradients as soon as they are there: in the first step it learns what comes."""
    for group in (*wrapped.bucket_groups, *wrapped.expert_parallel_bucket_groups):
        group.is_first_batch = False
        group.golden_per_param_grad_ready_counts = dict.fromkeys(group.params, 1)


def owned(trainer: PhaseTrainer) -> Iterator[tuple[list[Any], Category]]:
    """Yield the tensors that live between steps, with what they are for."""
    for part in trainer.model_parts:
        yield [*part.parameters(), *part.buffers()], Category.WEIGHTS
    for wrapped in trainer.engine.parts:
        buffers = [*wrapped.buffers, *wrapped.expert_parallel_buffers]
        yield [buffer.grad_data for buffer in buffers], Category.GRADIENTS
        yield [b.param_data for b in buffers if b.param_data is not None], Category.WEIGHTS
    for inner in trainer.engine.optimizer.chained_optimizers:
        if getattr(inner.optimizer, "param_groups", None):
            groups = inner.optimizer.param_groups
            yield [x for group in groups for x in group["params"]], Category.OPTIMIZER
            states = inner.optimizer.state.values()
            yield (
                [x for state in states for x in state.values() if torch.is_tensor(x)],
                Category.OPTIMIZER,
            )


# ---- the schedule


class _Passes:
    """Begins a slot with each forward and backward pass of Megatron-core's schedule."""

    def __init__(self, recorder: Recorder, trainer: PhaseTrainer, micro_batches: int) -> None:
        self.recorder = recorder
        self.forward_step, self.backward_step = schedules.forward_step, schedules.backward_step
        self.numbers = {id(part): number for number, part in enumerate(trainer.engine.parts)}
        self.passed = [0] * len(self.numbers)
        """Micro-batches that have passed each part of the model forward."""
        self.made: dict[int, tuple[int, int]] = {}
        """Chunk and micro-batch of an output that waits for its backward pass."""
        self.left = len(self.numbers) * micro_batches

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run schedules.forward_step in a slot of its own."""
        model = kwargs["model"] if "model" in kwargs else args[2]
        chunk = self.numbers[id(model)]
        micro_batch = self.passed[chunk]
        self.passed[chunk] += 1
        self.recorder.slot(SlotKind.FORWARD, chunk, micro_batch)
        result = self.forward_step(*args, **kwargs)
        self.made[id(_first(result[0]))] = chunk, micro_batch
        self.recorder.slot(SlotKind.BETWEEN)
        return result

    def backward(self, input_tensor: Any, output_tensor: Any, *others: Any) -> Any:
        """Run schedules.backward_step in a slot of its own."""
        chunk, micro_batch = self.made[id(_first(output_tensor))]
        self.left -= 1
        self.recorder.slot(SlotKind.BACKWARD, chunk, micro_batch)
        result = self.backward_step(input_tensor, output_tensor, *others)
        self.recorder.slot(SlotKind.BETWEEN if self.left else SlotKind.END)
        return result

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Put both in the place of Megatron-core's."""
        forward = mock.patch.object(schedules, "forward_step", self.forward)
        backward = mock.patch.object(schedules, "backward_step", self.backward)
        with forward, backward:
            yield


def _first(tensor: Any) -> Any:
    return tensor[0] if isinstance(tensor, list) else tensor


@contextlib.contextmanager
def _stated_shapes(trainer: PhaseTrainer, batches: Sequence[PackedBatch]) -> Iterator[None]:
    """State the shapes that neighbouring stages would send: hidden states, and DeepStack levels that travel with them."""
    topology = trainer.topology
    if topology.config.pipeline == 1 or topology.device.type != "meta":
        yield
        return
    forward, backward = received_shapes(trainer, batches)
    ask, distributed = P2PCommunicator._communicate_shapes, torch.distributed

    def answer(
        communicator: Any, send_next: Any, send_previous: Any, previous: bool, following: bool
    ) -> Any:
        ask(communicator, send_next, send_previous, previous, following)
        nothing = [0, 0, 0]
        return next(forward) if previous else nothing, next(backward) if following else nothing

    def one_by_one(messages: list[Any]) -> list[Any]:
        return [each.op(each.tensor, each.peer, each.group, each.tag) for each in messages]

    # Messages are batched by a backend, which torch's meta device has none of.
    batched = mock.patch.object(distributed, "batch_isend_irecv", one_by_one)
    with batched, mock.patch.object(P2PCommunicator, "_communicate_shapes", answer):
        yield


def received_shapes(
    trainer: PhaseTrainer, batches: Sequence[PackedBatch]
) -> tuple[Iterator[list[int]], Iterator[list[int]]]:
    """Return the shapes of hidden states and of gradients that this stage receives, in the order of the schedule."""
    topology = trainer.topology
    stages, chunks = topology.config.pipeline, topology.config.chunks
    sizes = [boundary_sizes(trainer, batch) for batch in batches]
    own = topology.pipeline_rank
    forward, backward = [], []
    for micro_batch, chunk in schedules.get_schedule_table(len(batches), chunks, stages):
        place = chunk * stages + own
        if place:
            forward.append(sizes[micro_batch][place - 1])
        place = (chunks - 1 - chunk) * stages + own
        if place < stages * chunks - 1:
            backward.append(sizes[micro_batch][place])
    return iter(forward), iter(backward)


def boundary_sizes(trainer: PhaseTrainer, batch: PackedBatch) -> list[list[int]]:
    """Return the shape of what leaves each chunk of the pipeline but the last, for one micro-batch on this rank."""
    topology, config = trainer.topology, trainer.model_config
    share = RankShare.of(batch, topology)
    rows = share.hidden.stop - share.hidden.start
    visual = len(share.visual_rows) if len(batch.grid_thw) else 0
    levels = len(config.vision.deepstack_layers)
    shapes = []
    for layers in layers_per_chunk(topology.config, config.text.layers):
        levels = max(0, levels - layers)
        shapes.append([rows + visual * levels, 1, config.text.hidden_size])
    return shapes[:-1]
