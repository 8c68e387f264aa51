"""Measure how fast a rank writes to and reads from the run's folder, as checkpoints do: all ranks at the same time. Imports no torch."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from visionloom.launch.check_parts.results import MeasuredSpeed

CHUNK: Final = 4 << 20
"""Bytes of a write or read."""
MOST_BYTES: Final = 64 << 20
MOST_SECONDS: Final = 4.0
"""For each way: slow storage is known to be slow by then."""


def measure_storage(folder: Path, rank: int) -> Iterator[MeasuredSpeed]:
    """Yield MB/s of writing, flushed to the disk, and of reading back; OSError if the folder cannot be written to."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".preflight-{rank}"
    # Not zeros, which some file systems do not write.
    chunk = os.urandom(CHUNK)
    try:
        began = time.perf_counter()
        with path.open("wb", buffering=0) as file:
            while file.tell() < MOST_BYTES and time.perf_counter() - began < MOST_SECONDS:
                file.write(chunk)
            os.fsync(file.fileno())
            size = file.tell()
            yield speed("write", size, time.perf_counter() - began)
            # Out of this machine's memory, or it would be that which is read.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

        began = time.perf_counter()
        with path.open("rb", buffering=0) as file:
            while file.read(CHUNK) and time.perf_counter() - began < MOST_SECONDS:
                pass
            yield speed("read", file.tell(), time.perf_counter() - began)
    finally:
        path.unlink(missing_ok=True)


def speed(name: str, size: int, seconds: float) -> MeasuredSpeed:
    """Return the speed at which `size` bytes were moved."""
    return MeasuredSpeed(name, size / 1e6 / max(seconds, 1e-6), "MB/s")
