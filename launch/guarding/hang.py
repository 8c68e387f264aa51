"""A run that stands still is ended, and told by which rank: each looks at its own signs of life (common/pulse.py).

In a collective all ranks wait for one. When a rank has been silent for longer than its activity may be, it writes what it is at, with
the Python stacks of all its threads, into `hang/` of the run's folder; so do all others, since they wait too, though their last sign may
have come a little later. One rank of each machine sees to those that cannot answer: a process that is stopped, or whose thread holds Python's lock, leaves its stacks from a signal
handler in C (faulthandler), after SIGUSR2 and SIGCONT. Then the first to have all reports names who did not wait for anybody.
"""

import contextlib
import ctypes
import faulthandler
import json
import os
import shutil
import signal
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from visionloom.common import pulse
from visionloom.common.atomic import replacing
from visionloom.common.jsonfile import JsonError, parse_json
from visionloom.common.processes import stat_fields
from visionloom.common.pulse import DATA
from visionloom.common.ranks import ranks_here
from visionloom.common.text import one_line, warn
from visionloom.launch.guarding.exit import attempt_folder, end_process, is_first
from visionloom.launch.guarding.watch import MEMBER
from visionloom.train.observe import status, stopping

FOLDER: Final = "hang"
LOOK_SECONDS: Final = 0.5
ANSWER_SECONDS: Final = 2.0
"""For the reports of other ranks."""
STACK_SECONDS: Final = 0.5
"""For the stacks of a process after its signal."""
WAITING: Final = ("gradient reduction", "optimizer", "weights gathering")
"""Parts of a step in which a rank waits for all others; see parallel/parts.py, which would import torch."""
WAITING_IN: Final = ("torch/distributed/", "megatron/core/distributed/", "megatron/core/pipeline")
"""Where the main thread stands if it waits for another rank outside of them."""


@dataclass(frozen=True)
class Report:
    """What a rank was at when the run stood still."""

    rank: int
    host: str
    pid: int
    step: int
    activity: str
    part: str
    state: str = ""
    """Of a process that did not answer: its letter in /proc/PID/stat, T for stopped."""
    waits: bool = False
    """It waits for another rank, as far as its stack tells."""

    @property
    def order(self) -> tuple[bool, int, bool, bool]:
        """Return a key by which the rank that the others wait for comes first."""
        return not self.state, self.step, self.waits, self.part != DATA

    def describe(self) -> str:
        """Return where the rank is, in words."""
        why = {"": "", "T": ", stopped by a signal (SIGSTOP)"}.get(
            self.state, ", without an answer"
        )
        return f"rank {self.rank} on {self.host}, {self.activity}, part {self.part}{why}"


def named(reports: list[Report], ranks: int, seconds: float, folder: Path) -> str:
    """Return the line that says who hangs: those that others wait for, or without a difference all."""
    first = min(report.order for report in reports)
    guilty = [report for report in reports if report.order == first]
    absent = sorted(set(range(ranks)) - {report.rank for report in reports})
    said = "; ".join(report.describe() for report in guilty)
    if absent:
        # A machine that is gone says nothing at all.
        said = f"no report of rank {', '.join(map(str, absent))}; {said}"
    step = max(report.step for report in reports)
    return f"no sign of life for {seconds:.0f} s after step {step}: {said}; stacks of all ranks: {folder}"


class HangWatch:
    """Watches this process and, once it hangs, speaks for those of its machine that cannot."""

    def __init__(self, folder: Path, limits: dict[str, float]) -> None:
        """`folder`: of the run; `limits`: seconds of silence by activity."""
        self.folder, self.limits = folder / FOLDER, limits
        self.attempt = attempt_folder()
        self.local = int(os.environ.get("LOCAL_RANK", "0"))
        self._main_thread = threading.main_thread().ident or 0
        self._stacks: Any = None

    def begin(self) -> None:
        """Show signs of life to the other ranks, leave stacks on SIGUSR2, and watch."""
        if self.attempt is not None:
            pulse.current.show(self.attempt / f"visionloom.pulse{self.local}")
            # Kept open: the handler in C only knows its number.
            self._stacks = (self.attempt / f"visionloom.stacks{self.local}").open("w")
            faulthandler.register(signal.SIGUSR2, self._stacks, all_threads=True)
        threading.Thread(target=self.run, name="visionloom-hang", daemon=True).start()

    def run(self) -> None:
        """Count silence, and end the run when it has lasted too long."""
        seen, silent, looked = 0.0, 0.0, time.monotonic()
        while True:
            time.sleep(LOOK_SECONDS)
            now, since = time.monotonic(), pulse.current.since
            # A job that a scheduler has suspended as a whole was not silent in that time.
            silent = silent + min(now - looked, 2 * LOOK_SECONDS) if since == seen else 0.0
            seen, looked = since, now
            limit = self.limits.get(pulse.current.sign.activity, float("inf"))
            if silent > limit or self.is_called(silent):
                self.end(silent)

    def is_called(self, silent: float) -> bool:
        """Return whether another rank has seen a hang, of which this one's silence is a part: without its report it would be blamed."""
        # The limit of its own activity may be longer than that of the rank that it waits for. Half of the shortest: a rank goes
        # on for some seconds before it has to wait, and one that begins may see the folder of an earlier start.
        return silent > min(self.limits.values()) / 2 and self.folder.is_dir()

    def end(self, seconds: float) -> None:
        """Report and end this process, also where there can be no report: a hung run must not stand for ever."""
        try:
            self.speak(seconds)
        except Exception as error:  # a full disk above all, and what comes of missing reports
            tell(f"no sign of life for {seconds:.0f} s; who hangs is not known: {error}")
        finally:
            end_process(status.STOPPED)

    def speak(self, seconds: float) -> None:
        """Report, see to the others of this machine if nobody else does, and end this process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.report_self()
        if not is_first("hang"):
            # torchrun ends it, as soon as the one that speaks is gone.
            time.sleep(3 * ANSWER_SECONDS)
            end_process(status.STOPPED)
        mute = self.see_to_others()
        until = time.monotonic() + ANSWER_SECONDS
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        # Those of other machines have seen it at the same time.
        while len(reports := self.reports()) < ranks and time.monotonic() < until:
            time.sleep(0.1)
        code = tell(named(reports, ranks, seconds, self.folder))
        for pid in mute:
            # torchrun would wait 30 s for a stopped one.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        end_process(code or status.STOPPED)

    def report_self(self) -> None:
        """Write this rank's report."""
        own = self.folder / f"own-{os.getpid()}"
        with own.open("w+") as file:
            faulthandler.dump_traceback(file)
            file.seek(0)
            stacks = file.read()
        own.unlink()
        sign = pulse.current.sign
        top = innermost(stacks, self._main_thread)
        waits = sign.part in WAITING or any(each in top for each in WAITING_IN)
        place = socket.gethostname(), os.getpid(), sign.step, sign.activity, sign.part
        self.write(Report(int(os.environ.get("RANK", "0")), *place, waits=waits), stacks)

    def write(self, report: Report, stacks: str) -> None:
        """Write a report: a line of JSON, and the stacks."""
        path = self.folder / f"rank-{report.rank:05d}.txt"
        with replacing(path, durable=False) as file:
            file.write(f"{json.dumps(asdict(report))}\n{stacks}".encode())

    def reports(self) -> list[Report]:
        """Read the reports of all ranks that have written one."""
        reports = []
        for path in sorted(self.folder.glob("rank-*.txt")):
            with contextlib.suppress(JsonError, OSError):
                line, _, _ = path.read_text(errors="replace").partition("\n")
                reports.append(parse_json(line, Report, str(path)))
        return reports

    def see_to_others(self) -> list[int]:
        """Wait for the reports of this machine's ranks, and write those of ranks that do not answer; returns their processes."""
        members = self._members()
        until = time.monotonic() + ANSWER_SECONDS
        while members and time.monotonic() < until:
            time.sleep(0.1)
            for report in self.reports():
                members.pop(report.rank, None)
        for rank, (local, pid) in members.items():
            # Before it is continued for its stacks.
            state = state_of(pid)
            sign = pulse.read_sign(self._place("pulse", local)) or pulse.current.sign
            stacks = self._stacks_of(local, pid)
            place = socket.gethostname(), pid, sign.step, sign.activity, sign.part
            self.write(Report(rank, *place, state or "gone"), stacks)
        return [pid for _, pid in members.values()]

    def _members(self) -> dict[int, tuple[int, int]]:
        """Return local rank and process of the other ranks here, by rank."""
        members = {}
        for local in set(range(ranks_here() if self.attempt else 1)) - {self.local}:
            with contextlib.suppress(OSError, ValueError):
                rank, pid = map(int, self._place(MEMBER, local).read_text().split())
                members[rank] = local, pid
        return members

    def _stacks_of(self, local: int, pid: int) -> str:
        """Let another process leave its stacks, from where it stands."""
        path = self._place("stacks", local)
        with contextlib.suppress(OSError):
            # To its main thread: another one may take a signal to the process, while the main thread goes on.
            ctypes.CDLL(None).tgkill(pid, pid, signal.SIGUSR2)
            os.kill(pid, signal.SIGCONT)
            until, before, size = time.monotonic() + STACK_SECONDS, -1, 0
            # They are whole once no more come.
            while (not size or size != before) and time.monotonic() < until:
                time.sleep(0.01)
                before, size = size, path.stat().st_size
            # Lest it goes on, and the others with it.
            os.kill(pid, signal.SIGSTOP)
            return path.read_text(errors="replace")
        return ""

    def _place(self, name: str, local: int) -> Path:
        assert self.attempt is not None
        return self.attempt / f"visionloom.{name}{local}"


def tell(cause: str) -> int | None:
    """Record and print why the run ends; returns the exit code, None if another rank has told."""
    code = status.current.failed(status.STOPPED, cause, stopping.RESUME)
    if code is not None:
        warn(f"error: {one_line(cause)}; {stopping.RESUME}")
    return code


def watch_hangs(folder: Path, limits: dict[str, float]) -> None:
    """Begin to watch this rank of a run; reports of an earlier start are put aside by the main rank."""
    before = folder / FOLDER
    if os.environ.get("RANK", "0") == "0" and before.is_dir():
        aside = before.with_name(f"{FOLDER}-before")
        shutil.rmtree(aside, ignore_errors=True)
        with contextlib.suppress(OSError):
            before.rename(aside)
    HangWatch(folder, limits).begin()


def innermost(stacks: str, thread: int) -> str:
    """Return the line of the innermost frame of a thread, in the words of faulthandler; empty if it is not there."""
    _, _, own = stacks.partition(f"0x{thread:016x} ")
    lines = own.splitlines()
    return lines[1] if len(lines) > 1 else ""


def state_of(pid: int) -> str:
    """Return the letter of a process's state, see proc(5); empty if it is gone."""
    fields = stat_fields(pid)
    return fields[0] if fields else ""
