"""Names of the parts of a step, as torch's profiler, the forecast and the watch over hung ranks show them.

`@in_part(NAME)` marks a function: what runs in it is a range of that name in a profile. A mark costs some four
microseconds.
"""

from typing import Any, Final, Self

from torch.profiler import record_function

from visionloom.common import pulse

PREFIX: Final = "part: "
INPUT: Final = "input"
"""A micro-batch on its way to the device."""
VISION: Final = "vision"
"""The vision tower and the exchange of its features."""
MERGER: Final = "merger"
LANGUAGE: Final = "language"
"""Embedding and decoder layers."""
LOSS: Final = "loss"
"""Output layer and cross-entropy."""
REDUCTION: Final = "gradient reduction"
OPTIMIZER: Final = "optimizer"
GATHERING: Final = "weights gathering"
"""Inside of others: the forward pass waits for weights that other ranks have updated."""


class in_part(record_function):  # reads as the word that it is, `with in_part(LOSS)`
    """A decorator and context manager that marks a part of the step; each mark is a sign of life too."""

    def __init__(self, name: str) -> None:
        super().__init__(PREFIX + name)
        self.part = name

    def __enter__(self) -> Self:
        pulse.current.enter(self.part)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        pulse.current.leave()
