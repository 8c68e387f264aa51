"""What an exception that reached the end of a command means: the machine's fault, the fault of another rank, or its own."""

import errno
import os
import sys
import time
from pathlib import Path
from typing import Final

from visionloom.common.errors import UserError
from visionloom.launch.environment import last_warning_of_nccl
from visionloom.train.observe import stopping

SECONDS_FOR_THE_CAUSE: Final = 1.0
"""Time for the rank that ended first, or for who watches it, to have written the cause."""
OF_THE_DISK: Final = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)
"""What a disk that is full, read-only, broken or gone answers with."""
LOST: Final = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "failed to recv",
    "Socket Timeout",
    "remote process exited",
    "ncclRemoteError",
    "ncclSystemError",
    "connectFullMesh failed",
)
"""How gloo, NCCL and torch's store tell that another rank is gone."""
NO_MEMORY: Final = ("out of memory", "can't allocate memory", "Cannot allocate memory")


def of_the_machine(error: Exception, folder: Path) -> UserError | None:
    """Return one line for a disk or a run's `folder` that could not be used; None for any other error.

    A missing file, or a folder in the place of one, may be a mistake of the program, but not in the run's folder.
    """
    if not isinstance(error, OSError):
        return None
    name = ""  # opening a file names it, writing to it does not
    if isinstance(error.filename, str | bytes):
        name = os.fsdecode(error.filename)
    inside = bool(name) and Path(name).absolute().is_relative_to(folder.absolute())
    if error.errno not in OF_THE_DISK and not inside:
        return None
    return UserError(
        f"{name or f'a file of run.folder={folder}'}: {error.strerror}: make room, correct run.folder or its permissions, move"
        " away what lies there, and start the same command again"
    )


def is_lost_connection(error: Exception) -> bool:
    """Return whether another rank went first, so that this error is a consequence."""
    return any(words in str(error) for words in LOST)


def is_out_of_memory(error: Exception) -> bool:
    """Return whether there was no memory left, on the host or on a GPU."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY)


def cause_of(error: Exception, folder: Path) -> str:
    """Return what status.json says of an error that nobody expected, which ended the run in `folder`."""
    cause = f"{type(error).__name__}: {error}".rstrip(": ")
    if warning := last_warning_of_nccl():
        # torch's own words are often no more than "unhandled system error".
        cause = f"{cause}; NCCL's last warning: {warning}"
    if is_out_of_memory(error):
        cause = f"out of memory: {cause}{_snapshot(folder)}"
    if is_lost_connection(error):
        # The rank that watches the lost one writes its cause; on another machine nobody sees it.
        time.sleep(SECONDS_FOR_THE_CAUSE)
        cause = f"the connection to another rank was lost, which ended first: {cause}"
    return cause


def _snapshot(folder: Path) -> str:
    """Write what a GPU that ran out of memory held, and return where, as the end of a line; empty without a GPU."""
    # A command that needs no torch has no GPU either.
    if "torch" not in sys.modules:
        return ""
    from visionloom.train.observe.memory import snapshot

    path = snapshot(folder)
    return f"; what was allocated, for torch's memory_viz: {path}" if path is not None else ""


def hint_for(error: Exception) -> str:
    """Return what a user may do about an error that is not known to be theirs."""
    if is_out_of_memory(error):
        return (
            "out of memory: lower phases.<name>.micro_batch or sequence_length, turn on parallel.recompute, or use more ranks;"
            " then start the same command again"
        )
    return stopping.RESUME
