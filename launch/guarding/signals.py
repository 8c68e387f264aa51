"""Signals that ask a run to end: SIGTERM, which schedulers and torchrun's agent send, and SIGUSR1, by which batch scripts warn.

Python runs handlers between two lines of the main thread, which may wait for another rank inside a library. So a thread is told by
the C handler (`signal.set_wakeup_fd`) and acts at once.
"""

import signal
import socket
import threading
from typing import Final, NoReturn

from visionloom.launch.guarding.exit import end_process, exit_stopped
from visionloom.launch.guarding.watch import lost_a_rank
from visionloom.train.observe import status, stopping

STOPPING: Final = (signal.SIGTERM, signal.SIGUSR1)
_kept: Final[list[socket.socket]] = []
"""The end that the C handler writes to, kept open until the process ends."""


def hear_signals() -> None:
    """Let a signal end the run after the step that it trains, or at once where it trains none; called by the main thread."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    _kept.append(theirs)
    # The bytes are the signals; a full buffer has enough of them.
    signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    for number in STOPPING:
        # Without a handler the signal would end the process.
        signal.signal(number, lambda *_: None)
    threading.Thread(target=_listen, args=(ours,), name="visionloom-signals", daemon=True).start()


def _listen(heard: socket.socket) -> NoReturn:
    """Act on the signals that are ours; those of all handlers come here."""
    while True:
        (number,) = heard.recv(1)
        # torch handles the end of its data workers (SIGCHLD), and Python Ctrl-C.
        if number in STOPPING:
            act(signal.Signals(number))


def act(number: signal.Signals) -> None:
    """End at a step's end, or at once where none will come: torchrun's agent ends the ranks that are left when one is gone."""
    # A collective with it would be waited for until the agent's SIGKILL, 30 s later.
    # One of another machine is only seen by what it has written; a run that was stopped still comes to its end together.
    if lost_a_rank.is_set() or status.current.has_failed():
        end_process(128 + number)
    reason = f"stopped by {number.name}"
    if not stopping.current.ask(reason):
        exit_stopped(reason)
