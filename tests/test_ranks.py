"""The pool of ranks itself. Reference: the kernel, which says how a process has ended."""

import os
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from visionloom.tests.ranks import RankFailed, RankPool


def crash_first(place: Path) -> int:
    if not place.exists():
        place.touch()
        os.kill(os.getpid(), signal.SIGSEGV)
    return dist.get_rank()


def test_a_rank_that_crashes_is_named_and_its_work_repeated(tmp_path: Path) -> None:
    pool = RankPool()
    with pytest.warns(match="rank 0 was ended by SIGSEGV: once more"):
        assert pool.run(1, crash_first, tmp_path / "crashed") == [0]
    pool.close()


def test_it_is_repeated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks are any processes here: those of a pool take seconds to start."""
    pool = RankPool()

    def crash(*_: object) -> list[tuple[bool, str]]:
        process = subprocess.Popen(["sleep", "9"])
        process.kill()
        ended = SimpleNamespace(exitcode=process.wait(), join=print, kill=process.kill)
        pool.processes = [ended]
        return [(False, "rank 0 died")]

    monkeypatch.setattr(pool, "_once", crash)
    with (
        pytest.warns(match="once more"),
        pytest.raises(RankFailed, match="rank 0 was ended by SIGKILL"),
    ):
        pool.run(1, crash_first)


def began(folder: Path | None) -> float | None:
    from visionloom.train.observe import status

    if folder is not None:
        status.current.begin(folder)
    return status.current.began


def test_a_start_of_a_command_is_forgotten(pool: RankPool, tmp_path: Path) -> None:
    """Else the next test's run would have begun when the pool was started."""
    assert pool.run(1, began, tmp_path)[0] is not None
    assert pool.run(1, began, None) == [None]
