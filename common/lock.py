"""A folder that one process at a time writes to."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any, Final

from visionloom.common.errors import UserError
from visionloom.common.jsonfile import JsonError, read_json
from visionloom.common.text import one_line, warn

LOCK: Final = ".lock"
TRIES: Final = 20
"""Attempts, a tenth of a second apart, before a folder counts as taken: a run that was just ended
may need that long to exit."""
UNSUPPORTED: Final = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""Errors by which file systems without locks answer."""


class FolderLock:
    """Holds a folder for this process until it ends, however it ends.

    The lock is the kernel's (POSIX, as NFS and Lustre have it too): a killed process leaves none. Forked children do not have it.
    """

    def __init__(self, folder: Path, option: str) -> None:
        """Take the lock; `option` names the folder in errors.

        Raises:
            UserError: if another process has it, with its host and number.
            OSError: if the file cannot be made.
        """
        # O_CLOEXEC: a command that this process starts must not keep the folder locked.
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = os.open(folder / LOCK, flags, 0o644)
        if not self._take(folder):
            os.close(self._descriptor)
            raise UserError(
                f"{option}={folder} is in use by {holder_of(folder)}: end that run first, or set run.name to start another one"
            )
        holder = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        # Truncated only with the lock: what was there names the holder to others.
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(holder).encode() + b"\n", 0)

    def release(self) -> None:
        """Let others have the folder."""
        os.close(self._descriptor)

    def _take(self, folder: Path) -> bool:
        for attempt in range(TRIES):
            time.sleep(0.1 if attempt else 0)
            try:
                fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                # Some cluster file systems are mounted without locks: a run there is better than none.
                if error.errno in UNSUPPORTED:
                    warn(
                        f"warning: {folder} cannot be locked ({error.strerror}): see to it that no other run writes to it"
                    )
                    return True
                continue
            return True
        return False


def is_held(folder: Path) -> bool:
    """Return whether another process holds the folder."""
    with contextlib.suppress(OSError), open(folder / LOCK, "rb+") as file:
        # Taken for a moment: POSIX locks can be asked about only by this or by a C structure.
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in UNSUPPORTED
    return False


def holder_of(folder: Path) -> str:
    """Name the process that holds a folder."""
    try:
        holder = read_json(folder, LOCK, dict[str, Any], 1 << 16)
    except (JsonError, OSError):
        # The holder writes its name after it has the lock: a moment later the file is there.
        return "another process"

    def shown(name: str) -> str:
        return one_line(str(holder.get(name, "?")))

    return f"process {shown('pid')} on {shown('host')} since {shown('since')}"
