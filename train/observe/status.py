"""status.json of a run's folder: that it runs and how far it is, or how it ended and why.

torchrun turns every exit code into 1, and the lines on the screen are gone with it. The file is written as `running` when a start
begins, so a run that is killed never shows how an earlier start ended; the folder's lock shows whether it still runs.
"""

import json
import os
import socket
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from visionloom.common.atomic import replacing
from visionloom.common.jsonfile import JsonError, read_json
from visionloom.common.lock import is_held
from visionloom.common.text import warn

STATUS: Final = "status.json"
REFRESH_SECONDS: Final = 2.0
"""Least time between two writes of the step while a run trains."""
AGENT: Final = "TORCHELASTIC_RUN_ID"
"""Variable that torchrun's agent sets for its ranks."""
State = Literal["running", "done", "failed", "stopped"]
"""`stopped`: as somebody wished, and saved where there was something to save."""


@dataclass
class Status:
    """The content of status.json."""

    state: State
    code: int | None
    """Exit code; None while it runs."""
    cause: str
    """Why it ended."""
    rank: int
    """The rank that ended first."""
    step: int | None
    """Optimizer steps done in the run, as far as is known: a start that has not yet read its checkpoint has the step of the one
    before it; None before training has begun."""
    hint: str
    """Tells the user the next thing to do."""
    restarts: int = 0
    """How often torchrun has started the ranks anew (`--max-restarts`)."""
    start: str = field(default_factory=lambda: _start())
    """The same for all ranks of one start on one machine, and for no other start there."""
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    time: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S"))


class RunStatus:
    """Keeps status.json up to date for this process; without a folder it only remembers the step."""

    def __init__(self) -> None:
        self.step: int | None = None
        self.before: Status | None = None
        """Status of the start before this one."""
        self._folder: Path | None = None
        self._resumed = False
        """The step is of this start."""
        self._written = 0.0

    def begin(self, folder: Path) -> None:
        """Begin a start in its folder: the main rank writes that it runs, the others only remember where."""
        self._folder, self.step, self._resumed = folder, None, False
        if _rank() == 0:
            self.before = read_status(folder)
            self.step = self.before.step if self.before is not None else None
            if self.before is not None and AGENT in os.environ:
                has_failed = self.before.state == "failed"
                if has_failed and _is_of_this_start(self.before):
                    return  # another rank was quicker, and has failed already
            self._write(Status("running", None, "", 0, self.step, "", _restarts()))

    def at(self, step: int) -> None:
        """Record that `step` optimizer steps of the run are done."""
        # Not every step: a file on a network disk takes milliseconds.
        due = not self._resumed or time.monotonic() - self._written > REFRESH_SECONDS
        self.step, self._resumed = step, True
        if self._folder is not None and _rank() == 0 and due:
            self._write(Status("running", None, "", 0, step, "", _restarts()))

    def done(self) -> None:
        """Record that the run has ended as it should."""
        if _rank() == 0:
            self._write(Status("done", 0, "done", 0, self.step, "", _restarts()))

    def failed(self, code: int, cause: str, hint: str, rank: int | None = None) -> None:
        """Record why the run has failed, unless another cause is there."""
        self.ended("failed", code, cause, hint, rank)

    def ended(
        self, state: State, code: int, cause: str, hint: str, rank: int | None = None
    ) -> bool:
        """Record how the run has ended, unless another cause is there: later ranks end because of the first.

        Returns whether this was the first one, so that it is told once.
        """
        if self._folder is None:
            return False
        written = read_status(self._folder)
        step = self.step
        if written is not None:
            # A start on another machine may be this one: only its host can tell.
            is_older = written.host == socket.gethostname() and not _is_of_this_start(written)
            if written.state != "running" and not is_older:
                return False
            step = written.step if step is None else step
        ending_rank = _rank() if rank is None else rank
        self._write(Status(state, code, cause, ending_rank, step, hint, _restarts()))
        return True

    def _write(self, status: Status) -> None:
        if self._folder is not None:
            self._written = time.monotonic()
            write_status(self._folder, status)


current: Final = RunStatus()
"""Of this process."""


def refused(folder: Path, code: int, cause: str, hint: str) -> None:
    """Record a start that ended before it began; nothing is written without the folder, or if a run works in it."""
    if folder.is_dir() and not is_held(folder):
        before = read_status(folder)
        step = before.step if before is not None else None
        write_status(folder, Status("failed", code, cause, _rank(), step, hint))


def read_status(folder: Path) -> Status | None:
    """Read the file; None if there is none, or not of this version."""
    try:
        return read_json(folder, STATUS, Status, 1 << 20)
    except (JsonError, OSError):
        return None


def write_status(folder: Path, status: Status) -> None:
    """Replace the file; if it cannot be written that is a warning, since the cause is printed too."""
    document: dict[str, Any] = asdict(status)
    target = folder / STATUS
    try:
        # Not flushed to disk: after a power cut its age does not matter.
        with replacing(target, durable=False) as file:
            file.write((json.dumps(document, indent=1) + "\n").encode())
    except OSError as fault:
        warn(f"warning: {target} could not be written: {fault.strerror}")


def _start() -> str:
    """Name the attempt of torchrun's agent, or this process where there is none."""
    if AGENT not in os.environ:
        return str(os.getpid())
    # The agent is the parent of its ranks; the id alone may be the user's, and the same each time.
    return f"{os.environ[AGENT]}/{os.getppid()}/{_restarts()}"


def _is_of_this_start(status: Status) -> bool:
    return status.start == _start() and status.host == socket.gethostname()


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
