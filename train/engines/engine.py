"""The few things that a step and a checkpoint ask of an engine."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from visionloom.data.stream.batch import PackedBatch
from visionloom.parallel.divided import is_divided, own_numbers
from visionloom.train.checkpoint.weights_state import Weights


@dataclass(frozen=True)
class Owned:
    """What this rank alone holds of a parameter: a stretch of the flattened parameter."""

    parameter: Any
    begin: int
    """Its first number, in the flattened parameter."""
    values: dict[str, Tensor]
    """One number for each of the stretch, [n], by kind: the master copy is `param`, the moments have torch's names, and the weight itself,
    where no rank has it whole, is WEIGHT. They are the engine's own memory: a load writes into them."""


WEIGHT = ""


def divided_weights(parameters: Iterable[Any]) -> Iterator[Owned]:
    """Yield what this rank has of those parameters that are divided."""
    for parameter in parameters:
        begin, numbers = own_numbers(parameter)
        if is_divided(parameter) and len(numbers):
            yield Owned(parameter, begin, {WEIGHT: numbers})


class Engine(Protocol):
    """Wraps the parts of a model for training, holds their gradients and their optimizer, and updates them.

    A step calls, in order: `clear`, `accumulate`, `scale`, `gradient_norm`, then `update` or `drop`. All ranks call all methods.
    """

    parts: list[Any]
    """The parts of the model as a training step calls them."""
    optimizer: Any
    """Has `param_groups`, which the schedule gives their learning rates."""
    has_whole_weights: bool
    """Each rank has the weights of its parameters whole, and not only a stretch of them."""

    @property
    def updates(self) -> int:
        """Return the updates made so far: steps that were not skipped."""

    def clear(self) -> None:
        """Begin a step without gradients."""

    def accumulate(self, forward: Callable[..., Any], batches: Sequence[PackedBatch]) -> None:
        """Run the forward and backward passes of micro-batches, and add up the gradients over them and over the ranks.

        Args:
            forward: as Megatron-core's schedules call it: with an iterator over `batches` and a part of the model.
            batches: of the step, on this rank.
        """

    def scale(self, factor: Tensor) -> None:
        """Multiply the gradients by a number, fp32 [] on the device: those that this rank updates weights by, others may stay."""

    def gradient_norm(self) -> float:
        """Return the global norm of the gradients; the host waits for the device."""

    def update(self, norm: float) -> None:
        """Clip the gradients, whose norm is given, and apply them."""

    def drop(self) -> None:
        """Forget the gradients of a step that is skipped."""

    def gather_weights(self) -> None:
        """Gather the weights that other ranks have updated, which the next forward pass would."""

    def whole_weights(self) -> AbstractContextManager[None]:
        """Have the weights as they are now on each rank inside, so that the model can be called without the other data ranks."""

    def weights(self) -> Weights:
        """Return the weights of the model for a checkpoint."""

    def owned(self) -> Iterator[Owned]:
        """Yield what this rank alone holds of each parameter that it updates."""

    def loaded(self, updates: int) -> None:
        """Take over what was written into the tensors of `owned`, and the count of updates."""

    def close(self) -> None:
        """Let go of the model; no other method is called after."""
