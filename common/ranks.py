"""The ranks that share this machine, and the cores that each of them has."""

import os
from typing import Final

STORE_THREAD: Final = "visionloom-store"
"""Name of the thread that opens torch's store; it may never come back from there."""


def ranks_here() -> int:
    """Return the ranks that share this machine: LOCAL_WORLD_SIZE, or 1."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def cores_of_rank() -> int:
    """Return the cores of this machine divided by its ranks, rounded down."""
    # Not os.cpu_count: a container or a scheduler may give fewer.
    return len(os.sched_getaffinity(0)) // ranks_here()
