"""Steps that are bad: a loss or gradient that is not finite, or far above those of the last steps.

All ranks judge by sums that are the same on all of them, so they judge alike.
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from visionloom.train.optim.config import OptimConfig

WINDOW: Final = 128
"""Steps that a step is compared with, as OLMo-core's StabilityMonitor has it."""
LEAST: Final = 32
"""Steps after which a phase is judged: a median of fewer says little."""
NORMAL: Final = 1.4826
"""Standard deviations of a normal distribution in its median absolute deviation."""
LEAST_SPREAD: Final = 0.01
"""Of the median: where steps are all but equal, a hair's breadth is no spike."""


def robust_score(value: float, before: Sequence[float]) -> float:
    """Return how many standard deviations a value lies above the median, these estimated by the median absolute deviation."""
    center = statistics.median(before)
    deviation = statistics.median(abs(each - center) for each in before)
    spread = max(NORMAL * deviation, LEAST_SPREAD * abs(center), 1e-30)
    return (value - center) / spread


@dataclass(frozen=True)
class Verdict:
    """What is thought of a step before its update."""

    skipped: bool
    """It changes nothing."""
    spikes: Mapping[str, float] = field(default_factory=dict)
    """Robust scores of its loss and gradient norm, where they are too high."""

    def describe(self, values: Mapping[str, float]) -> str:
        """Return in words what is bad of a step's loss and gradient norm."""
        shown = [f"{name} {values[name]:.4g}" for name in self.spikes or values]
        kind = "a spike" if self.spikes else "not finite"
        return f"{', '.join(shown)}: {kind}{', skipped' if self.skipped else ''}"


class StepJudge:
    """Judges the steps of a phase by those before, and counts bad ones in a row."""

    def __init__(self, options: OptimConfig) -> None:
        """Begin a phase."""
        self.options = options
        self.in_a_row = 0
        """Skipped steps up to now."""
        self._recent = {name: deque[float](maxlen=WINDOW) for name in ("loss", "grad_norm")}

    @property
    def has_enough(self) -> bool:
        """Return whether so many steps were skipped in a row that skipping does not help."""
        return self.in_a_row >= self.options.skip_limit

    def judge(self, loss: float, grad_norm: float) -> Verdict:
        """Judge a step; what is not skipped counts for those to come."""
        values = {"loss": loss, "grad_norm": grad_norm}
        spikes: dict[str, float] = {}
        is_finite = all(map(math.isfinite, values.values()))
        for name, recent in self._recent.items():
            if is_finite and len(recent) >= LEAST:
                score = robust_score(values[name], recent)
                spikes |= {name: round(score, 1)} if score > self.options.spike_score else {}
        skipped = not is_finite or (self.options.skip_spikes and bool(spikes))
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if not skipped:
            for name, recent in self._recent.items():
                recent.append(values[name])
        return Verdict(skipped, spikes)

    def state(self) -> dict[str, list[float]]:
        """Return what a checkpoint keeps, which is made after good steps only: a resumed run judges as an undisturbed one."""
        return {name: list(recent) for name, recent in self._recent.items()}

    def load_state(self, state: Mapping[str, Sequence[float]]) -> None:
        """Go on from a checkpoint; of versions that kept nothing it is empty."""
        for name, recent in self._recent.items():
            recent.clear()
            recent.extend(state.get(name, ()))


class GoBack(Exception):
    """Steps in a row were skipped in vain: the phase goes back to the newest checkpoint and passes over their data."""

    def __init__(self, steps: Sequence[int]) -> None:
        """`steps`: of the plan, those that were skipped."""
        super().__init__(f"{len(steps)} steps in a row were skipped")
        self.steps = steps
