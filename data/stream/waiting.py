"""What a training process does while it waits for a step: it looks at who reads, and says so, so that no wait is long without a word."""

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Self

import psutil

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
        self.due = SLOW_SECONDS
        self.first: tuple[float, int] | None = None
        """Time of the first look, and the bytes that had been read by then: most waits are over before."""
        self.continued: set[int] = set()
        """Processes that were stopped, and were told to go on."""

    def look(self) -> None:
        """Let a stopped process go on, and say what takes long."""
        readers, now = self.readers(), time.monotonic()
        for reader in readers:
            if reader.is_stopped:
                self.let_go_on(reader)
        size = sum(reader.bytes_read for reader in readers)
        self.first = self.first or (now, size)
        if now - self.began < self.due:
            return
        waited = now - self.began
        # Twice as long each time: a dozen lines in a day.
        self.due = 2 * waited
        since, before = self.first
        speed = max(0, size - before) / 1e6 / max(now - since, 1e-3)
        warn(f"warning: {slow_line(readers, waited, speed)}")

    def let_go_on(self, reader: StepReader) -> None:
        """Continue a process that was stopped from outside, once; one that is stopped again is killed, which ends the wait."""
        again = reader.process in self.continued
        self.continued.add(reader.process)
        fate = "again: it is killed" if again else "and is told to go on"
        warn(
            f"warning: {reader.name} (process {reader.process}) was stopped by a signal {fate}; it is at {reader.place}"
        )
        with suppress(ProcessLookupError):
            os.kill(reader.process, signal.SIGKILL if again else signal.SIGCONT)


def slow_line(readers: Sequence[StepReader], seconds: float, speed: float) -> str:
    """Return what is said of a long wait; `speed`: MB/s."""
    rank = os.environ.get("RANK", "0")
    places = "; ".join(f"{reader.name} is at {reader.place}" for reader in readers)
    return f"rank {rank} has waited {seconds:.0f} s for its data, which is read from files at {speed:.1f} MB/s: {places}"


class WaitWatch:
    """A thread that looks while the training process waits for a step.

    Not that process: torch fetches a step's tensors from the worker that built them, and waits without a limit for one that is stopped.
    """

    def __init__(self, readers: Callable[[], Sequence[StepReader]]) -> None:
        self.readers = readers
        self.wait: StepWait | None = None
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        threading.Thread(target=self._run, name="visionloom-waits", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def take[T](self, step: Callable[[], T]) -> T:
        """Return the next step, while the thread looks."""
        self.wait = StepWait(self.readers)
        try:
            return step()
        finally:
            self.wait = None

    def _run(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            # A wait that began since the last look is looked at too: its own times count.
            if (wait := self.wait) is not None:
                wait.look()
