"""Files that appear complete or not at all."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO, Final
from uuid import uuid4

UNFINISHED: Final = ".tmp"
"""Ending of the name that a file has until it is complete."""


@contextmanager
def replacing(
    path: Path,
    durable: bool = True,
    placing: AbstractContextManager[object] | None = None,
) -> Iterator[BinaryIO]:
    """Open a file that is moved to `path` when the block ends, and removed if the block raises.

    Args:
        path: the final name; a file that is there is replaced.
        durable: wait until the content is on the disk, so that a loss of power leaves no empty file of that name; a cache needs no
            such wait.
        placing: entered around the move, for example a lock.
    """
    # In the same folder: a move between file systems is no single step.
    unfinished = path.with_name(f".{path.name}.{uuid4().hex}{UNFINISHED}")
    try:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())

        with placing or nullcontext():
            os.replace(unfinished, path)
    # Ctrl-C too must leave no unfinished file.
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
