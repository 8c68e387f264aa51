"""What ended first is the cause that status.json gives. Reference: the kernel's wait status, and torchrun's files for its ranks."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from visionloom.launch.guarding import watch
from visionloom.launch.guarding.watch import Sibling, Watch, exit_status, out_of_memory_kills

RANK = """
import os, sys, time
from pathlib import Path
from visionloom.launch.guarding.watch import watch_ranks
from visionloom.train.observe import status
status.current.begin(Path(sys.argv[1]))
status.current.at(17)
watch_ranks()
print("watching", flush=True)
exec(sys.argv[2])
time.sleep(30)
"""
ENDS = {
    "killed": ("os.kill(os.getpid(), 9)", "rank 1 was killed by signal 9 (SIGKILL)"),
    "segmentation fault": ("os.kill(os.getpid(), 11)", "rank 1 was killed by signal 11 (SIGSEGV)"),
    "exit without a word": ("os._exit(3)", "rank 1 ended with exit code 3"),
    "a cause of its own": (
        "status.current.failed(1, 'ValueError: mine', ''); os._exit(1)",
        "ValueError: mine",
    ),
}


def start_rank(rank: int, attempt: Path, folder: Path, then: str) -> subprocess.Popen[str]:
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    variables["TORCHELASTIC_ERROR_FILE"] = attempt / str(rank) / "error.json"
    environment = os.environ | {name: str(value) for name, value in variables.items()}
    process = subprocess.Popen(
        [sys.executable, "-c", RANK, str(folder), then],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "watching\n"
    return process


def wait_for_status(folder: Path) -> dict[str, Any]:
    until = time.monotonic() + 20
    while True:
        status: dict[str, Any] = json.loads((folder / "status.json").read_text())
        if status["state"] != "running" or time.monotonic() > until:
            return status
        time.sleep(0.05)


@pytest.mark.parametrize("end", ENDS)
def test_the_end_of_a_rank_is_written_by_another(end: str, tmp_path: Path) -> None:
    """Rows 1, 2, 16 and 17 of the fault matrix: one line names rank, signal and step."""
    (tmp_path / "attempt_0").mkdir()
    does, said = ENDS[end]
    with start_rank(0, tmp_path / "attempt_0", tmp_path, "") as survivor:
        with start_rank(1, tmp_path / "attempt_0", tmp_path, "time.sleep(0.5); " + does):
            status = wait_for_status(
                tmp_path
            )  # the ended rank has not been waited for: as under torchrun
        survivor.kill()
    assert (status["state"], status["code"], status["rank"], status["step"]) == ("failed", 1, 1, 17)
    assert status["cause"] == said


def test_a_rank_that_is_done_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "attempt_0").mkdir()
    attempt = tmp_path / "attempt_0"
    survivor = start_rank(0, attempt, tmp_path, "time.sleep(1.5); os._exit(0)")
    with survivor, start_rank(1, attempt, tmp_path, "os._exit(0)"):
        survivor.wait()
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "running"


@pytest.mark.parametrize(("kills", "named"), [(0, False), (1, True)])
def test_want_of_memory_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kills: int, named: bool
) -> None:
    """Row 18 of the fault matrix, by the kernel's count of processes killed for want of memory."""
    counts = tmp_path / "vmstat"
    counts.write_text("nr_free_pages 1\noom_kill 4\n")
    monkeypatch.setattr(watch, "KERNEL_COUNTS", counts)
    watching = Watch(tmp_path, 0, 2)
    counts.write_text(f"nr_free_pages 1\noom_kill {4 + kills}\n")
    sibling = Sibling(1, 1, 0)
    for gibibytes in (1, 1, 2, 2, 3):
        sibling.resident.append(gibibytes * 2**30)
    cause = watching._cause(sibling, 9)
    assert cause.startswith("rank 1 was killed by signal 9 (SIGKILL)")
    said = "held 3.0 GiB (in the 4 s before: 1.0 GiB first, 2.0 halfway)"
    assert ("likely out of memory" in cause and said in cause) == named
    assert Sibling(1, 1, 0).describe() == "its memory"


def test_the_kernels_words() -> None:
    """Reference: os.waitstatus_to_exitcode of what waitpid gives."""
    child = os.fork()
    if not child:
        os._exit(5)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    found = exit_status(child)
    assert found == os.waitpid(child, 0)[1] and os.waitstatus_to_exitcode(found) == 5
    assert exit_status(os.getpid()) is None and exit_status(2**22 + 1) is None
    assert out_of_memory_kills() >= 0
