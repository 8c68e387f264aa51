"""A wish of the outside that a run end early: a signal to any of its ranks, or a file `stop` in its folder.

While a phase trains, the wish waits for the end of a step, which all ranks agree on: it travels with the sums that they reduce
anyway. At any other time there is nothing to save.
"""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from visionloom.common.errors import EarlyEnd

STOP_FILE: Final = "stop"
LOOK_SECONDS: Final = 0.5
"""Least time between two looks for the file: on a network disk each takes a millisecond."""
RESUME: Final = "start the same command again to resume"


class StopAsked(Exception):
    """A rank wishes to end the run between two steps: raised on all of them."""


class StopRequest:
    """Keeps the wish of this process until the loop asks for it."""

    def __init__(self) -> None:
        self._reason = ""
        self._file: Path | None = None
        self._looked = 0.0
        self._at_steps = False
        # Between the thread that hears signals and the one that trains.
        self._lock = threading.Lock()

    def begin(self, folder: Path) -> None:
        """Begin a start in its folder: the main rank looks for the file there, and removes one from before."""
        if os.environ.get("RANK", "0") == "0":
            self._file = folder / STOP_FILE
            # It would stop this start too, before its first step.
            self._remove_file()

    def ask(self, reason: str) -> bool:
        """Ask for an end, the first reason staying; returns whether a step's end will see to it."""
        with self._lock:
            self._reason = self._reason or reason
            return self._at_steps

    @property
    def reason(self) -> str:
        """Return why this rank wishes to end, looking for the file now and then; empty if it does not."""
        now = time.monotonic()
        # A rank that has its reason need not look for another.
        if not self._reason and self._file is not None and now - self._looked > LOOK_SECONDS:
            self._looked = now
            if self._file.is_file():
                self.ask(f"stopped by {self._file}")
        return self._reason

    @contextmanager
    def at_steps(self) -> Iterator[None]:
        """Let the wish wait for the end of a step while a phase trains; what is left at its end all ranks see to together."""
        with self._lock:
            self._at_steps = True
        try:
            yield
        finally:
            with self._lock:
                self._at_steps = False

    def end(self, reason: str) -> EarlyEnd:
        """Return what ends a run that is saved; the file has done its work."""
        self._remove_file()
        return EarlyEnd(reason, os.EX_TEMPFAIL, RESUME)

    def _remove_file(self) -> None:
        # A folder of that name is somebody's own, and stops nothing.
        with contextlib.suppress(OSError):
            if self._file is not None:
                self._file.unlink()


current: Final = StopRequest()
"""Of this process."""
