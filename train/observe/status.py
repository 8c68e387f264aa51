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
from visionloom.common.errors import EarlyEnd
from visionloom.common.jsonfile import JsonError, read_json
from visionloom.common.lock import is_held
from visionloom.common.processes import seconds_alive
from visionloom.common.text import warn

STATUS: Final = "status.json"
REFRESH_SECONDS: Final = 2.0
"""Least time between two writes of the step while a run trains."""
FAILURE: Final = 1
STOPPED: Final = os.EX_TEMPFAIL
"""75: the same command goes on."""
GAVE_UP: Final = 93
"""The same command would end the same way; the code that nvidia-resiliency-ext has for it."""
MOST_STARTS: Final = 3
"""Starts in a row that may end without a new checkpoint."""
MEND: Final = "mend the cause before you start it again"
AGENT: Final = "TORCHELASTIC_RUN_ID"
"""Variable that torchrun's agent sets for its ranks."""
TIME: Final = "%Y-%m-%d %H:%M:%S"
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
    resumed: int | None = None
    """The step after which the start went on; None: at the run's beginning, or it has not come so far."""
    saved: int | None = None
    """The step of its last checkpoint; None: it has saved none."""
    starts: int = 1
    """Starts in a row, with this one, of which each ended without a new checkpoint."""
    restarts: int = 0
    """How often torchrun has started the ranks anew (`--max-restarts`)."""
    start: str = field(default_factory=lambda: _start())
    """The same for all ranks of one start on one machine, and for no other start there."""
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    time: str = field(default_factory=lambda: time.strftime(TIME))

    @property
    def has_progressed(self) -> bool:
        """Return whether this start has brought the run further, so that the next goes on from there."""
        return self.saved is not None and self.saved > (self.resumed or 0)

    @property
    def seconds_since_1970(self) -> float:
        """Return when it was written, to a second; 0 if its time is none."""
        try:
            return time.mktime(time.strptime(self.time, TIME))
        except (ValueError, OverflowError):
            return 0.0

    @property
    def end(self) -> str:
        """Return in one line how the start has ended."""
        killed = f"killed without a word, with process {self.pid} on {self.host}"
        return (self.cause or killed).splitlines()[0]

    @property
    def fruitless(self) -> int:
        """Return the starts in a row, this one the last, after which the run stood where it had stood before."""
        # A person who mends a configuration or presses Ctrl-C is no loop, and one who starts again after GAVE_UP means it.
        is_counted = self.state == "running" or self.code in (FAILURE, STOPPED)
        return self.starts if is_counted and not self.has_progressed else 0


class RunStatus:
    """Keeps status.json up to date for this process; without a folder it only remembers the step."""

    def __init__(self) -> None:
        self.step: int | None = None
        self.before: Status | None = None
        """Status of the start before this one."""
        self.saved: int | None = None
        """Step of the last checkpoint of this start."""
        self.resumed: int | None = None
        """Step after which this start went on."""
        self.began: float | None = None
        """When this process was started, in seconds since 1970; None if it is no start of a run's command."""
        self._starts = 1
        self._folder: Path | None = None
        self._resumed = False
        """The step is of this start."""
        self._written = 0.0

    def begin(self, folder: Path) -> None:
        """Begin a start in its folder: the main rank writes that it runs, the others only remember where.

        Raises:
            EarlyEnd: on all ranks, if one of an earlier attempt of their agents was asked to end or gave up; on the main rank,
                if MOST_STARTS before it have ended without a new checkpoint.
        """
        self._folder, self.step, self._resumed = folder, None, False
        self.began = time.time() - seconds_alive()
        before = read_status(folder)
        if before is not None and before.code is not None and _is_final(before):
            raise EarlyEnd(before.cause, before.code, before.hint)
        if _rank() == 0:
            self.before = before
            self.step = self.before.step if self.before is not None else None
            if self.before is not None and AGENT in os.environ:
                has_failed = self.before.state == "failed"
                if has_failed and self._is_of_this_start(self.before):
                    return  # another rank was quicker, and has failed already
            self._refuse_loop()
            self._write_running()

    def _refuse_loop(self) -> None:
        """Raise EarlyEnd if the start before was one too many."""
        before = self.before
        if before is None:
            return
        self._starts = before.fruitless + 1
        if self._starts > MOST_STARTS:
            raise EarlyEnd(without_progress(before.step, before.end), GAVE_UP, MEND)

    def at(self, step: int) -> None:
        """Record that `step` optimizer steps of the run are done."""
        # Not every step: a file on a network disk takes milliseconds.
        due = not self._resumed or time.monotonic() - self._written > REFRESH_SECONDS
        self.step, self._resumed = step, True
        if self._folder is not None and _rank() == 0 and due:
            self._write_running()

    def resumes(self, step: int) -> None:
        """Record the step after which this start goes on, 0 at the run's beginning."""
        self.resumed = step
        self.at(step)

    def saves(self, step: int) -> None:
        """Record that a checkpoint after `step` is whole: the start has not been in vain."""
        self.saved = step
        if _rank() == 0:
            self._write_running()

    def done(self) -> None:
        """Record that the run has ended as it should."""
        if _rank() == 0:
            self._write(Status("done", 0, "done", 0, self.step, ""))

    def failed(self, code: int, cause: str, hint: str, rank: int | None = None) -> int | None:
        """Record why the run has failed, as `ended` does."""
        return self.ended("failed", code, cause, hint, rank)

    def ended(
        self, state: State, code: int, cause: str, hint: str, rank: int | None = None
    ) -> int | None:
        """Record how the run has ended, unless another cause is there: later ranks end because of the first.

        Returns:
            the exit code that was recorded, GAVE_UP if this is one start without progress too many; None if this was not the
            first cause, which is told once.
        """
        if self._folder is None:
            return None
        written = read_status(self._folder)
        step = self.step
        if written is not None:
            is_of_this_start = self._is_of_this_start(written)
            if _is_final(written) or (written.state != "running" and is_of_this_start):
                return None
            step = written.step if step is None else step
        end = Status(state, code, cause, _rank() if rank is None else rank, step, hint)
        self._count(end, written)
        self._write(end)
        return end.code

    def has_failed(self) -> bool:
        """Return whether a rank of this start, on any machine, has written why the run failed."""
        written = read_status(self._folder) if self._folder is not None else None
        return written is not None and written.state == "failed" and self._is_of_this_start(written)

    def _count(self, end: Status, written: Status | None) -> None:
        """Take from what was written how many starts were in vain, and give up where this is one too many."""
        # Counted by the main rank, which alone has read how the starts before ended.
        if written is not None and self._is_of_this_start(written):
            end.resumed, end.saved, end.starts = written.resumed, written.saved, written.starts
        if end.fruitless >= MOST_STARTS:
            end.state, end.code, end.hint = "failed", GAVE_UP, MEND
            end.cause = without_progress(end.step, end.cause)

    def _is_of_this_start(self, status: Status) -> bool:
        """Return whether a rank of this start has written it: of this agent by its name, of others by the time.

        Agents stop all their ranks before any of them starts new ones, and count attempts each for itself.
        """
        if status.start == _start() and status.host == socket.gethostname():
            return True
        began = self.began or 0.0
        return _is_of_another_agent(status) and status.seconds_since_1970 >= int(began)

    def _write_running(self) -> None:
        running = Status("running", None, "", 0, self.step, "")
        running.resumed, running.saved, running.starts = self.resumed, self.saved, self._starts
        self._write(running)

    def _write(self, status: Status) -> None:
        status.restarts = _restarts()
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


def without_progress(step: int | None, cause: str) -> str:
    """Return the cause of giving up: where the run stands, and how the last start ended."""
    stands = f"after step {step}" if step else "before its first step"
    return f"{MOST_STARTS} starts in a row have ended without a new checkpoint, the last {stands}: {cause}"


def agent_of(start: str) -> str:
    """Return the part of the name of a start that is the same for all attempts of torchrun's agent."""
    return start.rpartition("/")[0]


def _start() -> str:
    """Name the attempt of torchrun's agent, or this process where there is none."""
    if AGENT not in os.environ:
        return str(os.getpid())
    # The agent is the parent of its ranks; the id alone may be the user's, and the same each time.
    return f"{os.environ[AGENT]}/{os.getppid()}/{_restarts()}"


def _is_of_these_agents(status: Status) -> bool:
    """Return whether it was written under the agents that have started this rank and the others."""
    if AGENT not in os.environ:
        return False
    if agent_of(status.start) == agent_of(_start()) and status.host == socket.gethostname():
        return True
    began = time.time() - seconds_alive(os.getppid())
    return _is_of_another_agent(status) and status.seconds_since_1970 >= int(began)


def _is_final(status: Status) -> bool:
    """Return whether the run was asked to end, or gave up, under these agents, which take its exit code for a fault and start anew."""
    ended = status.state == "stopped" or status.code == GAVE_UP
    return ended and _is_of_these_agents(status)


def _is_of_another_agent(status: Status) -> bool:
    """Return whether an agent has written it that may have met with this one: they share a name, which the user may have given."""
    # Set by torchrun; other launchers may start ranks on several machines without it.
    if AGENT not in os.environ or os.environ.get("GROUP_WORLD_SIZE") == "1":
        return False
    agent = agent_of(status.start)
    is_own = agent == agent_of(_start()) and status.host == socket.gethostname()
    return not is_own and agent.rpartition("/")[0] == os.environ[AGENT]


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
