"""Measure how fast a rank writes to and reads from the run's folder, as checkpoints do: all ranks at the same time. Imports no torch."""

import os
import time
from collections.abc import Callable, Iterator
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
    try:
        yield speed("write", write, path)
        yield speed("read", read, path)
    finally:
        path.unlink(missing_ok=True)


def write(path: Path) -> int:
    """Write a file for MOST_SECONDS at most, and flush it to the disk; returns its bytes."""
    # Not zeros, which some file systems do not write.
    chunk = os.urandom(CHUNK)
    until = time.monotonic() + MOST_SECONDS
    with path.open("wb", buffering=0) as file:
        while file.tell() < MOST_BYTES and time.monotonic() < until:
            file.write(chunk)
            # Each by itself: 32 GiB of 512 ranks in the page cache would be flushed for longer than a rank may be silent.
            os.fdatasync(file.fileno())
        # Out of this machine's memory, or it would be that which is read.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return file.tell()


def read(path: Path) -> int:
    """Read a file for MOST_SECONDS at most; returns the bytes that were read."""
    until = time.monotonic() + MOST_SECONDS
    with path.open("rb", buffering=0) as file:
        # Chunk by chunk, as a whole file may not come in time.
        while file.read(CHUNK) and time.monotonic() < until:
            continue
        return file.tell()


def speed(name: str, move: Callable[[Path], int], path: Path) -> MeasuredSpeed:
    """Return the speed of moving bytes; `move` returns how many."""
    began = time.perf_counter()
    size = move(path)
    seconds = time.perf_counter() - began
    return MeasuredSpeed(name, size / 1e6 / max(seconds, 1e-6), "MB/s")
