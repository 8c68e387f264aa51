"""What this process is at: an activity of its run and a part of that, and when it last went on to another.

Each change is a sign of life. Ranks of a machine see each other's in small files, which outlive a process that stands still.
"""

import mmap
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

BYTES: Final = 128
"""Of a file."""
START: Final = "start"
STEP: Final = "step"
CHECKPOINT: Final = "checkpoint"
EVALUATION: Final = "evaluation"
ROLLOUT: Final = "rollout"
PROGRAM: Final = "evaluation.command"
"""The activities of a run: each may be silent for a time of its own, a program of the user's for any time."""
DATA: Final = "data"
OTHER: Final = "other"
"""Part of a step that is none with a name."""


@dataclass(frozen=True)
class Sign:
    """The last sign of life of a process."""

    step: int
    """Optimizer steps done in the run."""
    activity: str
    part: str


class Pulse:
    """Keeps where this process is; `enter` and `leave` take less than two microseconds."""

    def __init__(self) -> None:
        self.since = time.monotonic()
        """Time of the last sign."""
        self.sign = Sign(0, START, OTHER)
        self._parts: list[str] = []
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._board: mmap.mmap | None = None

    def show(self, path: Path) -> None:
        """Show each sign in a file from now on."""
        with path.open("wb+") as file:
            file.truncate(BYTES)
            self._board = mmap.mmap(file.fileno(), BYTES)
        self._beat(self.sign.step, self.sign.activity, self.sign.part)

    def enter(self, part: str) -> None:
        """Begin a part of a step, which may be inside another."""
        self._parts.append(self.sign.part)
        self._beat(self.sign.step, self.sign.activity, part)

    def leave(self) -> None:
        """End the part that was begun last."""
        self._beat(self.sign.step, self.sign.activity, self._parts.pop() if self._parts else OTHER)

    @contextmanager
    def at(self, part: str) -> Iterator[None]:
        """Be in a part."""
        self.enter(part)
        try:
            yield
        finally:
            self.leave()

    @contextmanager
    def during(self, activity: str) -> Iterator[None]:
        """Be in an activity."""
        before = self.sign
        self._beat(before.step, activity, OTHER)
        try:
            yield
        finally:
            self._beat(self.sign.step, before.activity, before.part)

    def next_step(self, step: int) -> dict[str, float]:
        """Begin a step after `step` others; returns the seconds that the one before took, by part."""
        self._beat(step, self.sign.activity, OTHER)
        seconds = dict(self._seconds)
        self._seconds.clear()
        return seconds

    def _beat(self, step: int, activity: str, part: str) -> None:
        now = time.monotonic()
        # Ranks write answers of their own length: slow ones are known by their steps.
        if self.sign.activity != ROLLOUT:
            self._seconds[self.sign.part] += now - self.since
        self.since, self.sign = now, Sign(step, activity, part)
        # Another process reads it without a lock: half a line is no sign to it.
        if self._board is not None:
            line = f"{step}\n{activity}\n{part}\n".encode()
            self._board[:] = line.ljust(BYTES)


def read_sign(path: Path) -> Sign | None:
    """Read the last sign of another process; None if it shows none."""
    try:
        step, activity, part, _ = path.read_text().split("\n")
        return Sign(int(step), activity, part)
    # A file that is being written to may hold half of each line.
    except (OSError, ValueError):
        return None


current: Final = Pulse()
"""Of this process."""
