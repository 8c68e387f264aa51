"""The pool of ranks itself. Reference: the kernel, which says how a process has ended."""

import os
import signal
from pathlib import Path

import pytest

from visionloom.tests.ranks import RankFailed, RankPool


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def test_a_rank_that_crashes_is_named_with_its_signal() -> None:
    pool = RankPool()
    with pytest.raises(RankFailed, match="rank 0 died with exit code -11"):
        pool.run(1, crash)


def began(folder: Path | None) -> float | None:
    from visionloom.train.observe import status

    if folder is not None:
        status.current.begin(folder)
    return status.current.began


def test_a_start_of_a_command_is_forgotten(pool: RankPool, tmp_path: Path) -> None:
    """Else the next test's run would have begun when the pool was started."""
    assert pool.run(1, began, tmp_path)[0] is not None
    assert pool.run(1, began, None) == [None]


def nothing() -> None:
    pass


def test_a_world_ends_while_its_folder_is_there(pool: RankPool) -> None:
    """Ranks let go of their store after they have answered; without its folder torch waits five minutes for the file to appear."""
    pool.run(2, nothing)
    assert Path(pool.stores.name).is_dir()
