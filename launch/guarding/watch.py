"""Ranks of one machine look after each other: what ended first is written down as the cause, though it could not say so itself.

A rank that is killed says nothing, and the others only see a connection that is gone. torchrun knows the signal and prints it to a
log of its own. So each rank has a thread that the kernel wakes when another one ends (pidfd), and reads its exit status while
torchrun has not yet taken it away (it looks every 0.1 s).
"""

import os
import select
import signal
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from visionloom.common.atomic import replacing
from visionloom.common.processes import stat_fields
from visionloom.common.ranks import ranks_here
from visionloom.launch.guarding.exit import FAILURE, attempt_folder
from visionloom.train.observe import status, stopping

MEMBER: Final = "rank"
"""Beginning of the file, in torchrun's folder, in which each rank leaves its number and its process."""
LOOK_SECONDS: Final = 1.0
"""Between two looks at the memory of the others."""
LOOKS_KEPT: Final = 61
"""A minute: whether memory grew slowly, as by a leak, or at once."""
EXIT_STATUS: Final = 49
"""Place of exit_code in /proc/PID/stat behind the command's name: field 52 of proc(5)."""
KERNEL_COUNTS: Final = Path("/proc/vmstat")
"""`oom_kill` there counts the processes that the kernel has killed for want of memory, of the machine's or of a cgroup's."""

lost_a_rank: Final = threading.Event()
"""Another rank of this machine has ended, and not as it should: no step can come to its end any more."""


@dataclass
class Sibling:
    """Another rank of this machine."""

    rank: int
    pid: int
    descriptor: int
    resident: deque[int] = field(default_factory=lambda: deque(maxlen=LOOKS_KEPT))
    """Bytes of memory that it had at each of the last looks."""

    def look(self) -> None:
        """Note the memory that it has; one that has just ended has none left, which is no look."""
        # The second number of statm is the resident pages.
        words = _read(Path(f"/proc/{self.pid}/statm")).split()
        pages = int(words[1]) if len(words) > 1 else 0
        if pages:
            self.resident.append(pages * os.sysconf("SC_PAGE_SIZE"))

    def describe(self) -> str:
        """Return the memory that it had last, and whether that had grown before."""
        if not self.resident:
            return "its memory"
        last = f"{self.resident[-1] / 2**30:.1f} GiB"
        earlier = len(self.resident) - 1
        if not earlier:
            return last
        middle = self.resident[earlier // 2] / 2**30
        return (
            f"{last} (in the {earlier * LOOK_SECONDS:.0f} s before: {self.resident[0] / 2**30:.1f} GiB first,"
            f" {middle:.1f} halfway)"
        )


@dataclass
class Watch:
    """The ranks of this start on this machine."""

    folder: Path
    own: int
    """Local rank."""
    count: int
    kills_before: int = field(default_factory=lambda: out_of_memory_kills())

    def run(self) -> None:
        """Wait for the others, then for one that ends."""
        siblings = self._meet()
        poll = select.poll()
        for descriptor in siblings:
            poll.register(descriptor, select.POLLIN)
        while siblings:
            for descriptor, _ in poll.poll(LOOK_SECONDS * 1000):
                poll.unregister(descriptor)
                self._ended(siblings.pop(descriptor))
            for sibling in siblings.values():
                sibling.look()

    def _meet(self) -> dict[int, Sibling]:
        siblings: dict[int, Sibling] = {}
        missing = set(range(self.count)) - {self.own}
        while missing:
            for local in sorted(missing):
                # No words: that rank has not come so far, and is looked for again.
                words = _read(self.folder / f"visionloom.{MEMBER}{local}").split()
                if len(words) == 2:
                    missing.remove(local)
                    try:
                        descriptor = os.pidfd_open(int(words[1]))
                    except ProcessLookupError:
                        continue  # it has ended since, and torchrun has seen it
                    siblings[descriptor] = Sibling(int(words[0]), int(words[1]), descriptor)
            # Long enough that waiting takes no core, short beside a rank's start.
            time.sleep(0.05)
        return siblings

    def _ended(self, sibling: Sibling) -> None:
        """Write how it ended, if that was not as it should; what it had to say itself is written by now."""
        code = exit_status(sibling.pid)
        os.close(sibling.descriptor)
        if code == 0:
            return
        lost_a_rank.set()
        status.current.failed(
            FAILURE,
            self._cause(sibling, code),
            stopping.RESUME,
            sibling.rank,
        )

    def _cause(self, sibling: Sibling, code: int | None) -> str:
        if code is None:
            return f"rank {sibling.rank} ended, for a reason that was not seen"
        if not os.WIFSIGNALED(code):
            return f"rank {sibling.rank} ended with exit code {os.waitstatus_to_exitcode(code)}"
        number = os.WTERMSIG(code)
        name = signal.Signals(number).name
        cause = f"rank {sibling.rank} was killed by signal {number} ({name})"
        # The kernel says how many it killed for want of memory, not whom: a kill at this moment is likely this one.
        if number == signal.SIGKILL and out_of_memory_kills() > self.kills_before:
            cause += (
                f", likely out of memory: the kernel has killed a process for want of it, and this one held {sibling.describe()}; lower"
                " data.workers, micro_batch or sequence_length, or give the job more memory"
            )
        return cause


def watch_ranks() -> None:
    """Begin to watch the other ranks of this machine, where torchrun has started them."""
    count = ranks_here()
    own = int(os.environ.get("LOCAL_RANK", "0"))
    folder = attempt_folder()
    if folder is None or count == 1:
        return
    # The threads of the others wait for this file.
    with replacing(folder / f"visionloom.{MEMBER}{own}", durable=False) as file:
        rank = os.environ.get("RANK", "0")
        file.write(f"{rank} {os.getpid()}".encode())
    threading.Thread(
        target=Watch(folder, own, count).run, name="visionloom-watch", daemon=True
    ).start()


def exit_status(pid: int) -> int | None:
    """Return the wait status of a process that has ended and that nobody has waited for; None if the kernel does not say."""
    words = stat_fields(pid)
    if len(words) > EXIT_STATUS and words[0] in "ZX":
        return int(words[EXIT_STATUS])
    return None


def out_of_memory_kills() -> int:
    """Count the processes of the machine that the kernel has killed for want of memory since it started."""
    for line in _read(KERNEL_COUNTS).splitlines():
        if line.startswith("oom_kill "):
            return int(line.split()[1])
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
