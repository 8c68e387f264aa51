"""Ranks that are slow: the time that each needs for itself, beside that of the others."""

import statistics
from collections.abc import Sequence
from typing import Final

from visionloom.common.pulse import DATA
from visionloom.parallel.parts import GATHERING, OPTIMIZER, REDUCTION

COMPUTATION: Final = "computation"
PARTS: Final = (DATA, COMPUTATION)
"""What a rank does for itself in a step; for the rest it waits for others."""
WAITS: Final = (REDUCTION, OPTIMIZER, GATHERING)
"""Parts in which a rank waits for others."""
STEPS: Final = 20
"""In a row that a rank is slow, after which it is named, and again after as many."""
SLOW: Final = 1.5
"""Times the median of the others."""
WORTH: Final = 0.2
"""Least share of a step that it costs."""


def own_seconds(seconds: dict[str, float]) -> list[float]:
    """Return a rank's own seconds of a step for each of PARTS, by its seconds in each part."""
    others = (each for name, each in seconds.items() if name not in (DATA, *WAITS))
    return [seconds.get(DATA, 0.0), sum(others)]


class SlowRanks:
    """Looks at the own seconds of all ranks, step by step; the main rank does."""

    def __init__(self) -> None:
        self._last: tuple[int, str] | None = None
        self._steps = 0

    def look(self, seconds: Sequence[Sequence[float]], step_seconds: float) -> str:
        """Return what is to be said, empty mostly.

        Args:
            seconds: for each rank, own seconds for each of PARTS.
            step_seconds: of the step, the same for all.
        """
        slow = slowest(seconds, step_seconds)
        self._steps = self._steps + 1 if slow == self._last else 1
        self._last = slow
        if slow is None or self._steps % STEPS:
            return ""
        rank, part = slow
        place = PARTS.index(part)
        own, usual = beside_others(seconds, place, rank)
        return (
            f"rank {rank} is slow in {part} for {self._steps} steps: {own:.2f} s of a step of {step_seconds:.2f} s,"
            f" where others need {usual:.2f} s"
        )


def beside_others(seconds: Sequence[Sequence[float]], place: int, rank: int) -> tuple[float, float]:
    """Return a rank's own seconds for a part, and the median of the other ranks'."""
    column = [each[place] for each in seconds]
    # Apart from its own: of two ranks the median would be between both.
    own = column.pop(rank)
    return own, statistics.median(column)


def slowest(seconds: Sequence[Sequence[float]], step_seconds: float) -> tuple[int, str] | None:
    """Return the rank that costs the others most time, and by which part; None if none stands out."""
    worst: tuple[float, int, str] | None = None
    for place, part in enumerate(PARTS):
        rank = max(range(len(seconds)), key=lambda each: seconds[each][place])
        own, usual = beside_others(seconds, place, rank)
        cost = own - usual
        if own > SLOW * usual and cost > WORTH * step_seconds:
            worst = max(worst or (0.0, 0, ""), (cost, rank, part))
    return worst[1:] if worst is not None else None
