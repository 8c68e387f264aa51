"""What a training process does while it waits for a step: it looks at who reads, and says so, so that no wait is long without a word."""

import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import psutil

from visionloom.common.errors import MachineError
from visionloom.common.text import warn

LOOK_SECONDS: Final = 5.0
"""Between two looks."""
SLOW_SECONDS: Final = 30.0
"""Wait after which it is told; again whenever it has doubled. Ended it is by watch.step_minutes."""


@dataclass(frozen=True)
class StepReader:
    """A process that reads steps ahead."""

    name: str
    process: int
    place: str
    """What it is at: step, dataset, shard and sample."""

    @property
    def is_stopped(self) -> bool:
        """Return whether a signal has stopped it; one that is gone is not."""
        with suppress(psutil.NoSuchProcess):
            return bool(psutil.Process(self.process).status() == psutil.STATUS_STOPPED)
        return False

    @property
    def bytes_read(self) -> int:
        """Return the bytes that it has read from files so far; 0 where the system does not say."""
        with suppress(psutil.Error, OSError):
            return int(psutil.Process(self.process).io_counters().read_chars)
        return 0


class StepWait:
    """One wait for a step; `look` is called every LOOK_SECONDS of it."""

    def __init__(self, readers: Callable[[], Sequence[StepReader]]) -> None:
        """`readers`: returns who reads, and at what, at this moment."""
        self.readers = readers
        self.began = time.monotonic()
        self.bytes_before = self.bytes_read()
        self.due = SLOW_SECONDS
        self.continued: set[int] = set()
        """Processes that were stopped, and were told to go on."""

    def bytes_read(self) -> int:
        """Return the bytes that all readers have read from files."""
        return sum(reader.bytes_read for reader in self.readers())

    def look(self) -> None:
        """Let a stopped process go on, and say what takes long.

        Raises:
            MachineError: for a process that is stopped again; it is killed.
        """
        for reader in self.readers():
            if reader.is_stopped:
                self.let_go_on(reader)
        waited = time.monotonic() - self.began
        if waited < self.due:
            return
        self.due = 2 * waited
        moved = max(0, self.bytes_read() - self.bytes_before) / 1e6
        places = "; ".join(f"{reader.name} is at {reader.place}" for reader in self.readers())
        warn(
            f"warning: rank {os.environ.get('RANK', '0')} has waited {waited:.0f} s for its data, read from files at"
            f" {moved / waited:.1f} MB/s meanwhile: {places}"
        )

    def let_go_on(self, reader: StepReader) -> None:
        """Continue a process that was stopped from outside, once."""
        who = f"{reader.name} (process {reader.process})"
        if reader.process not in self.continued:
            self.continued.add(reader.process)
            warn(f"warning: {who} was stopped by a signal at {reader.place}: it is told to go on")
            os.kill(reader.process, signal.SIGCONT)
            return
        # A stopped process does not hear anything else, and would be waited for.
        os.kill(reader.process, signal.SIGKILL)
        raise MachineError(
            f"{who} was stopped by a signal again at {reader.place}: see who stops it; the same command goes on from the last"
            " checkpoint"
        )
