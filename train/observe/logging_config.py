"""Options of what a run shows and keeps of itself beside metrics.jsonl. Nothing here imports torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from visionloom.common.settings import option

LAST_STEP: Final = 10**9
MOST_PROFILED: Final = 100
"""Steps of one trace: each of a large model takes some 100 MB (estimated)."""


@dataclass
class LoggingConfig:
    """Logs other than metrics.jsonl, and how often a line is shown."""

    every_steps: int = option(10, "free", least=1, most=10**7)
    """Optimizer steps between two lines on the screen; metrics.jsonl has a line for every step."""
    wandb: bool = option(False, "free")
    """Send the metrics to Weights & Biases too."""
    tensorboard: bool = option(False, "free")
    """Write the metrics as TensorBoard's event files too."""
    profile_steps: list[int] = option([], "free", least=1, most=LAST_STEP)
    """First and last step of the run of which every rank writes a trace of torch's profiler into `profile/`; empty: none."""
    memory_history: bool = option(False, "free")
    """On a GPU: record where memory is allocated, for the snapshot that is written when it runs out; steps take some percent longer
    (estimated)."""

    def problems(self, here: str) -> Iterator[str]:
        """Yield a line if the steps to profile are not a first and a last one, or too many."""
        if not self.profile_steps:
            return
        written = f"{here}.profile_steps={self.profile_steps}"
        if len(self.profile_steps) != 2 or self.profile_steps[0] > self.profile_steps[1]:
            yield f"{written}: name the first and the last step to profile, as in [10,12]"
        elif self.profile_steps[1] - self.profile_steps[0] >= MOST_PROFILED:
            yield f"{written}: at most {MOST_PROFILED} steps fit into a trace"
