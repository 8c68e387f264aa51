"""The teacher of a phase that distils: a live model in the student's layout, or stored log-probabilities that came with the packs.

A live model in another layout is in own_layout.py.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from visionloom.common.errors import UserError
from visionloom.data.stream.batch import PackedBatch
from visionloom.model.distillation import DistillationLoss, HiddenTeacher, TopKTeacher
from visionloom.model.distillation_config import DistillationConfig
from visionloom.model.loss import RowLossMaker
from visionloom.model.qwen3vl import Qwen3VL
from visionloom.parallel.device import to_device
from visionloom.parallel.schedule import run_schedule
from visionloom.parallel.share import Share
from visionloom.parallel.topology import Topology

DIVERGENCE: Final = ("distillation_loss",)


class Teacher(Protocol):
    """What a step asks of whoever knows more of its supervised tokens than which they are, on every rank."""

    measures: tuple[str, ...]
    """Names of the kinds of loss after the first."""

    def share(self, student: Share) -> Share:
        """Return what a rank reads for its student and its teacher."""
        return student

    def take(self, batches: list[PackedBatch]) -> list[PackedBatch]:
        """Take what was read for the teacher from a step's micro-batches, and return those of the student."""
        return batches

    def begin(self, batches: Sequence[PackedBatch]) -> None:
        """Prepare for the student's micro-batches of a step; all ranks call it."""
        return

    def close(self) -> None:
        """Close what the teacher alone has opened, at the end of its phase."""
        return

    def for_rows(self, batch: PackedBatch, tokens: Tensor) -> RowLossMaker:
        """Return what makes the losses, on a rank of the last stage, for its micro-batches in order.

        Args:
            batch: on the host.
            tokens: its supervised tokens of this rank, int64 [R] on the host.
        """


class StoredTeacher(Teacher):
    """A teacher whose most probable tokens ride in the packs."""

    measures = DIVERGENCE

    def __init__(self, options: DistillationConfig, device: torch.device) -> None:
        """Hand out on `device` what the packs bring."""
        self.options, self.device = options, device

    def for_rows(self, batch: PackedBatch, tokens: Tensor) -> RowLossMaker:
        """Return the rows of these tokens; see Teacher."""
        stored = batch.teacher
        assert stored is not None, "the stream of a phase with a store attaches its rows"
        # The host knows both: the device is not asked, and not waited for.
        places = torch.searchsorted(stored.tokens, tokens)
        known = places < len(stored.tokens)
        if not known.all() or not torch.equal(stored.tokens[places], tokens):
            raise UserError(
                "the teacher could not read pictures that the student can: store it again by launch/teacher.py"
            )
        wanted = TopKTeacher(stored.ids, stored.log_probabilities, stored.log_rest).at(places)
        teacher = TopKTeacher(
            to_device(wanted.ids, self.device),
            to_device(wanted.log_probabilities, self.device),
            to_device(wanted.log_rest, self.device),
        )
        return partial(DistillationLoss, self.options, teacher)


class LiveTeacher(Teacher):
    """A frozen model in the student's layout, which runs over the packs of a step before the student does.

    Of each micro-batch only the hidden states of its supervised tokens are kept.
    """

    measures = DIVERGENCE

    def __init__(
        self, options: DistillationConfig, parts: list[Qwen3VL], topology: Topology
    ) -> None:
        """Freeze the parts of the teacher on this rank's stage."""
        self.options, self.parts, self.topology = options, parts, topology
        self.states: deque[Tensor] = deque()
        """[R, H] of the micro-batches that the student has not come to."""
        for part in parts:
            part.requires_grad_(False)
            part.eval()

    def begin(self, batches: Sequence[PackedBatch]) -> None:
        """Run over the micro-batches; see Teacher."""
        # Of a step that failed some may be left.
        self.states.clear()
        with torch.no_grad():
            run_schedule(self._forward, self.parts, batches, self.topology, forward_only=True)

    def _forward(self, batches: Iterator[PackedBatch], part: Qwen3VL) -> tuple[Tensor, Any]:
        """Run a part of the teacher over the next micro-batch, as Megatron-core's schedule calls it."""
        states = part.supervised_states(part.prepare(next(batches)))
        if not part.post_process:
            return states, None
        self.states.append(states)
        return without_loss(states)

    def for_rows(self, batch: PackedBatch, tokens: Tensor) -> RowLossMaker:
        """Return the hidden states of the next micro-batch; see Teacher."""
        teacher = HiddenTeacher(self.states.popleft(), self.output_matrix())
        return partial(DistillationLoss, self.options, teacher)

    def output_matrix(self) -> Tensor:
        """Return this rank's rows of the output matrix [v, H], on a rank of the student's last stage."""
        # The last part of the last stage has it, wherever the embedding is.
        matrix: Tensor = self.parts[-1].language_model.output_matrix()
        return matrix


def without_loss(states: Tensor) -> tuple[Tensor, Any]:
    """Return what Megatron-core's schedule takes of a last stage that has no loss."""
    nothing = torch.zeros([], device=states.device)
    return nothing, lambda total: (total, nothing.int(), {})
