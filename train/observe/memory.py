"""What was allocated on a GPU whose memory ran out, as a file for torch's viewer of snapshots (memory_viz)."""

import os
from pathlib import Path
from typing import Final

import torch

FOLDER: Final = "memory"
MOST_EVENTS: Final = 100_000
"""Allocations that are remembered, the newest ones: some hundred steps of a large model (estimated)."""


def record_memory() -> None:
    """Remember from now on where memory is allocated, for the snapshot."""
    torch.cuda.memory._record_memory_history(max_entries=MOST_EVENTS)


def snapshot(run_folder: Path) -> Path | None:
    """Write what this rank has allocated and return the file; None without a GPU, or if it cannot be written."""
    if not torch.cuda.is_initialized():
        return None
    path = run_folder / FOLDER / f"rank-{int(os.environ.get('RANK', '0')):05d}.pickle"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))
    # Whatever it is, the want of memory is what must be told.
    except Exception:
        return None
    return path
