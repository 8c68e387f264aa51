"""Small file systems, which real faults of disks need."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted(folder: Path, mebibytes: int) -> Iterator[Path]:
    """A file system of its own in a new folder, writable again when it goes; skips the test without the rights for it."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, check=False).returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
    subprocess.run(["umount", str(folder)], check=True)
