"""A rank that stands still is named, with the stacks of all. Rows 13 and 14 of the fault matrix.

Reference: the limit of the silence, and faulthandler's own stacks.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from visionloom.common.pulse import Pulse, Sign, read_sign
from visionloom.launch.guarding import hang
from visionloom.launch.guarding.hang import WAITING, HangWatch, Report, innermost, named
from visionloom.tests.ranks import torchrun_environment
from visionloom.train.observe.slow_ranks import WAITS
from visionloom.train.observe.status import RunStatus

LIMIT, SOONEST = 2.0, 5.0
"""Seconds: of silence, and until the run has to be ended after that."""
RANK = """
import os, re, signal, sys, time
from pathlib import Path
from visionloom.common import pulse
from visionloom.launch.guarding.hang import watch_hangs
from visionloom.launch.guarding.watch import watch_ranks
from visionloom.train.observe import status
status.current.begin(Path(sys.argv[1]))
watch_ranks()
watch_hangs(Path(sys.argv[1]), {"step": float(sys.argv[2])})
def wait_for_another():
    pulse.current.enter("gradient reduction")
    time.sleep(60)
def stands_still():
    exec(sys.argv[3])
with pulse.current.during("step"):
    pulse.current.next_step(7)
    print("begun", flush=True)
    stands_still()
"""
HANGS = {
    "stopped": (
        "os.kill(os.getpid(), signal.SIGSTOP); time.sleep(1000)",
        "stopped by a signal (SIGSTOP)",
    ),
    "asleep in data": ("pulse.current.enter('data'); time.sleep(1000)", "step, part data;"),
    "with Python's lock": (
        "re.match(r'(a?){40}a{40}', 'a' * 40)",
        "step, part other, without an answer",
    ),
}


def begun(
    rank: int, ranks: int, attempt: Path, folder: Path, does: str, limit: float = LIMIT
) -> subprocess.Popen[str]:
    # Of one start: else the one that hangs would write that the other is gone, in place of the cause.
    variables = torchrun_environment(rank, ranks)
    variables["TORCHELASTIC_ERROR_FILE"] = str(attempt / str(rank) / "error.json")
    environment = os.environ | variables
    command = [sys.executable, "-c", RANK, str(folder), str(limit), does]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, env=environment, text=True, **pipes)  # type: ignore[call-overload]
    assert process.stdout.readline() == "begun\n"
    return process  # type: ignore[no-any-return]


def status(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "status.json").read_text())
    return content


@pytest.mark.parametrize("hang", HANGS)
def test_the_rank_that_others_wait_for_is_named(hang: str, tmp_path: Path) -> None:
    (tmp_path / "attempt_0").mkdir()
    does, said = HANGS[hang]
    waiting = begun(0, 2, tmp_path / "attempt_0", tmp_path, "wait_for_another()")
    with waiting, begun(1, 2, tmp_path / "attempt_0", tmp_path, does) as guilty:
        _, shown = waiting.communicate(timeout=LIMIT + SOONEST)
        guilty.send_signal(signal.SIGTERM)  # as torchrun does
        guilty.wait(timeout=SOONEST)
    assert waiting.returncode == 75 and guilty.returncode in (-signal.SIGTERM, -signal.SIGKILL)
    found = status(tmp_path)
    assert (found["state"], found["code"]) == ("failed", 75)
    assert found["cause"].startswith(f"no sign of life for {LIMIT:.0f} s after step 7: rank 1 on ")
    assert said in found["cause"] and "rank 0" not in found["cause"]
    assert shown == f"error: {found['cause']}; start the same command again to resume\n"
    first, second = ((tmp_path / "hang" / f"rank-0000{rank}.txt").read_text() for rank in (0, 1))
    assert "in wait_for_another" in first and "in stands_still" in second


GOES_ON = """
hung = Path(sys.argv[1], "hung")
while not hung.exists() or time.time() - hung.stat().st_mtime < 2.4:
    pulse.current.enter("forward")
    time.sleep(0.05)
with pulse.current.during("checkpoint"):
    wait_for_another()
"""


def test_a_rank_that_went_on_for_some_seconds_is_not_blamed(tmp_path: Path) -> None:
    """The one that hangs is the first to see it; the others speak for themselves, though their own time is not over."""
    (tmp_path / "attempt_0").mkdir()
    waiting = begun(0, 2, tmp_path / "attempt_0", tmp_path, GOES_ON, 5.0)
    does = "Path(sys.argv[1], 'hung').touch(); pulse.current.enter('data'); time.sleep(1000)"
    with waiting, begun(1, 2, tmp_path / "attempt_0", tmp_path, does, 5.0) as guilty:
        guilty.communicate(timeout=5.0 + SOONEST)
        waiting.send_signal(signal.SIGTERM)  # as torchrun does
        waiting.communicate(timeout=SOONEST)
    assert (guilty.returncode, waiting.returncode) == (75, -signal.SIGTERM)
    cause = status(tmp_path)["cause"]
    assert "after step 7: rank 1 on " in cause and "rank 0" not in cause
    assert "in wait_for_another" in (tmp_path / "hang" / "rank-00000.txt").read_text()


def test_one_process_alone(tmp_path: Path) -> None:
    environment = os.environ | {"TORCHELASTIC_ERROR_FILE": ""}
    command = [sys.executable, "-c", RANK, str(tmp_path), str(LIMIT), "time.sleep(1000)"]
    done = subprocess.run(command, env=environment, timeout=30, capture_output=True, check=False)
    assert done.returncode == 75 and "rank 0 on " in status(tmp_path)["cause"]
    assert "in stands_still" in (tmp_path / "hang" / "rank-00000.txt").read_text()


def test_parts_are_signs_of_life_and_limits_are_of_a_stage(tmp_path: Path) -> None:
    """Many short parts are no hang, however long the step is; an activity without a limit may take any time."""
    works = (
        "[(time.sleep(0.1), pulse.current.enter('x'), pulse.current.leave()) for _ in range(40)]"
    )
    rests = "exec('with pulse.current.during(\"evaluation.command\"): time.sleep(4)'); os._exit(0)"
    command = [sys.executable, "-c", RANK, str(tmp_path), str(LIMIT), f"{works}; {rests}"]
    assert (
        subprocess.run(command, timeout=60, stdout=subprocess.DEVNULL, check=False).returncode == 0
    )


def test_a_disk_that_takes_no_report_does_not_keep_a_hung_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hang, "end_process", sys.exit)
    monkeypatch.setattr(hang.status, "current", RunStatus())
    hang.status.current.begin(tmp_path)
    # As a folder that cannot be made: its name is taken.
    (tmp_path / "hang").touch()
    with pytest.raises(SystemExit, match="75"):
        HangWatch(tmp_path, {"step": 1.0}).end(9.0)
    told = capsys.readouterr().err
    assert told.startswith("error: no sign of life for 9 s; who hangs is not known: ")
    assert "File exists" in status(tmp_path)["cause"] and status(tmp_path)["code"] == 75


def test_the_parts_in_which_a_rank_waits() -> None:
    """launch/guarding/hang.py has their names written out: it is imported before torch."""
    assert set(WAITING) == set(WAITS)


def report(rank: int, **more: Any) -> Report:
    facts = {"host": "a", "pid": 1, "step": 7, "activity": "step", "part": "other"} | more
    return Report(rank, **facts)


def test_who_is_named(tmp_path: Path) -> None:
    """The one that cannot answer, else the one behind, else the one that waits for nobody; a machine without a word too."""
    ahead, waits = report(0, step=8), report(1, waits=True)
    assert "rank 1 on a, step, part other;" in named([ahead, waits], 2, 9.0, tmp_path)
    assert ": rank 2 on a" in named([waits, report(2), report(0, waits=True)], 3, 9.0, tmp_path)
    assert ": rank 1 on a" in named([report(0), report(1, state="T")], 2, 9.0, tmp_path)
    both = named([report(0), report(1)], 4, 9.0, tmp_path)
    assert ": no report of rank 2, 3; rank 0 on a, step, part other; rank 1 on a" in both


def test_the_innermost_frame_of_a_thread() -> None:
    stacks = 'Thread 0x000000000000002a (most recent call first):\n  File "a.py", line 3 in f\n  File "b.py"'
    assert innermost(stacks, 42) == '  File "a.py", line 3 in f' and innermost(stacks, 43) == ""


def test_a_pulse_counts_seconds_by_part(tmp_path: Path) -> None:
    pulse = Pulse()
    pulse.show(tmp_path / "board")
    pulse.next_step(3)
    with pulse.during("step"), pulse.at("data"):
        time.sleep(0.05)
        with pulse.at("read"):
            time.sleep(0.1)
        assert read_sign(tmp_path / "board") == Sign(3, "step", "data")
    seconds = pulse.next_step(4)
    assert seconds["data"] >= 0.05 and seconds["read"] >= 0.1
    assert read_sign(tmp_path / "absent") is None and pulse.sign == Sign(4, "start", "other")
