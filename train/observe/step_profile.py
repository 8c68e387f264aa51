"""A trace of torch's profiler of some steps, as `logging.profile_steps` asks for it; parts of the step are ranges in it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist
from torch.autograd import profiler

from visionloom.common.text import warn

FOLDER: Final = "profile"


class StepProfile:
    """Profiles steps of this rank; with none to profile it does nothing."""

    def __init__(self, folder: Path, steps: Sequence[int]) -> None:
        """Be ready for the steps of a run in `folder`: none, or the first and the last of them."""
        self.folder = folder / FOLDER
        self.steps = steps
        self._profile: profiler.profile | None = None
        self._first = 0

    def begin(self, step: int) -> None:
        """Begin the trace if `step`, which comes next, is one of its steps: a resumed run may begin within them."""
        if self._profile is None and self.steps and self.steps[0] <= step <= self.steps[-1]:
            self._first = step
            # torch.profiler.profile is this one, and imports torch's compiler, which takes seconds. Kineto sees kernels of a GPU.
            device = "cuda" if torch.cuda.is_available() else None
            self._profile = profiler.profile(use_device=device, use_kineto=True)
            self._profile.__enter__()

    def end(self, step: int, is_last: bool = False) -> Path | None:
        """End the trace after the last of its steps, or of its phase, and return its file; None while there is none."""
        profile = self._profile
        if profile is None or (step < self.steps[-1] and not is_last):
            return None
        self._profile = None
        profile.__exit__(None, None, None)
        name = f"steps-{self._first:08d}-{step:08d}-rank-{dist.get_rank():05d}.json"
        path = self.folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            warn(f"warning: {path} could not be written, training goes on: {error}")
            return None
        return path
