"""Take a run's folder before torch is imported: nobody else writes to it, and it can be written to."""

import os
import shutil
from pathlib import Path

from visionloom.common.errors import UserError
from visionloom.common.lock import FolderLock
from visionloom.train.observe import status

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
            # Permissions do not tell: quotas and read-only mounts show only when something is written.
            probe = folder / ".writable"
            probe.write_bytes(bytes(4096))
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"run.folder={folder} cannot be written: {error.strerror}: correct run.folder or its permissions, or make room"
            ) from error
        free = shutil.disk_usage(folder).free
        if free < FREE_BYTES:
            raise UserError(
                f"run.folder={folder} has {free} bytes free: make room or move run.folder"
            )
    status.current.begin(folder)
