"""Take a run's folder before torch is imported: nobody else writes to it, and it can be written to."""

import os
import shutil
from pathlib import Path

from visionloom.common.errors import UserError
from visionloom.common.lock import FolderLock
from visionloom.train.observe import status, stopping

FREE_BYTES = 1 << 20
"""Least room that a run's folder must have for its logs: 1 MiB. How much a checkpoint takes is known when the model is built."""
_held: list[FolderLock] = []
"""The lock of this process, kept until it ends."""


def claim(folder: Path) -> None:
    """Lock a run's folder for the main rank and try to write to it; on all ranks, tell status.json that the start begins.

    Raises:
        UserError: if another run has it, or it cannot be written to.
    """
    if os.environ.get("RANK", "0") == "0":
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _held.append(FolderLock(folder, "run.folder"))
        except OSError as error:
            raise _unwritable(folder, "run.folder", error) from error
        # With the lock: the run that has the folder may be writing its own probe.
        check_writable(folder, "run.folder")
    status.current.begin(folder)
    stopping.current.begin(folder)


def check_writable(folder: Path, option: str) -> None:
    """Make a folder and write to it, since permissions do not tell: quotas and read-only mounts show only then.

    Raises:
        UserError: naming the option, if that fails or there is no room.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_bytes(bytes(4096))
        probe.unlink()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise _unwritable(folder, option, error) from error
    if free < FREE_BYTES:
        raise UserError(f"{option}={folder} has {free} bytes free: make room or move {option}")


def _unwritable(folder: Path, option: str, error: OSError) -> UserError:
    return UserError(
        f"{option}={folder} cannot be written: {error.strerror}: correct {option} or its permissions, or make room"
    )
