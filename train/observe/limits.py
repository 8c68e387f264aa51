"""How long a run may be silent in each of its activities before it counts as hung. Nothing here imports torch."""

from dataclasses import dataclass
from typing import Final

from visionloom.common.pulse import CHECKPOINT, EVALUATION, ROLLOUT, START, STEP
from visionloom.common.settings import option

PREFLIGHTS: Final = ("auto", "always", "never")


@dataclass
class WatchConfig:
    """Longest times without a sign of life of a rank, after which the run ends with 75 and stacks of all ranks.

    A sign is each part of a step, not the step. Collectives have run.timeout_minutes, which should be longer.
    """

    preflight: str = option("auto", "free", choices=PREFLIGHTS)
    """Measure every rank before the first step, a minute at most, and show what is slow: `always`, `never`, or `auto`: on more than
    one machine."""

    start_minutes: float = option(25.0, "free", above=0, most=100_000)
    """While modules are imported, weights are read and a phase is built."""
    step_minutes: float = option(10.0, "free", above=0, most=100_000)
    """In optimizer steps, waiting for data included."""
    checkpoint_minutes: float = option(25.0, "free", above=0, most=100_000)
    """While training waits for a checkpoint."""
    evaluation_minutes: float = option(25.0, "free", above=0, most=100_000)
    """While held-out losses and answers are measured."""
    rollout_minutes: float = option(25.0, "free", above=0, most=100_000)
    """While a policy writes answers, and they are judged and scored."""

    def measures_ranks(self, machines: int) -> bool:
        """Return whether the ranks of a run on so many machines are measured before its first step."""
        return self.preflight == "always" or (self.preflight == "auto" and machines > 1)

    @property
    def seconds(self) -> dict[str, float]:
        """Return the limit of each activity."""
        minutes = {
            START: self.start_minutes,
            STEP: self.step_minutes,
            CHECKPOINT: self.checkpoint_minutes,
            EVALUATION: self.evaluation_minutes,
            ROLLOUT: self.rollout_minutes,
        }
        return {activity: 60 * each for activity, each in minutes.items()}
