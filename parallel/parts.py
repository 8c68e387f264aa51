"""Names of the parts of a step, as torch's profiler and the forecast show them.

`@in_part(NAME)` marks a function: what runs in it is a range of that name in a profile. A mark costs about two microseconds.
"""

from typing import Final

from torch.profiler import record_function

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
OTHER: Final = "other"
"""What is in none of them."""


def in_part(name: str) -> record_function:
    """Return a decorator and context manager that marks a part of the step."""
    return record_function(PREFIX + name)
