"""A run ends by a signal or a file, in one line and with EX_TEMPFAIL of sysexits.h, 75. Rows 7 and 8 of the fault matrix."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from visionloom.launch.guarding import signals
from visionloom.launch.guarding.watch import lost_a_rank
from visionloom.tests.launch.guarding.test_claim import PATHS, ROOT
from visionloom.train.observe import status
from visionloom.train.observe.status import RunStatus, Status, write_status
from visionloom.train.observe.stopping import StopRequest

RUN = """
import sys, time
from visionloom.launch import configure
from visionloom.train.observe import status, stopping
configure.check_paths = configure.check_agreements = lambda *_: None
def command(config):
    status.current.at(3)
    if sys.argv[2] == "starting":
        print("began", flush=True)
        time.sleep(60)
    with stopping.current.at_steps():
        print("began", flush=True)
        while not stopping.current.reason:
            time.sleep(0.01)
        raise stopping.current.end(f"{stopping.current.reason} after step 4")
configure.start(command, ["+recipe=demo", f"run.folder={sys.argv[1]}"])
"""


def begun(folder: Path, where: str, **variables: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUN, str(folder), where]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, text=True, env=PATHS | variables, cwd=ROOT, **pipes)  # type: ignore[call-overload]
    assert process.stdout.readline() == "began\n"
    return process  # type: ignore[no-any-return]


def end_of(process: subprocess.Popen[str], folder: Path) -> tuple[int, str, list[object]]:
    _, said = process.communicate(timeout=60)
    status = json.loads((folder / "status.json").read_text())
    return process.returncode, said, [status[key] for key in ("state", "code", "cause", "step")]


@pytest.mark.parametrize("how", ["SIGTERM", "SIGUSR1", "stop"])
def test_a_wish_waits_for_the_end_of_a_step(how: str, tmp_path: Path) -> None:
    (tmp_path / "stop").touch()  # of a start before, which has ended otherwise
    process = begun(tmp_path, "training")
    time.sleep(0.2)
    assert process.poll() is None and not (tmp_path / "stop").exists()
    if how == "stop":
        (tmp_path / "stop").touch()
    else:
        process.send_signal(signal.Signals[how])
    cause = f"stopped by {tmp_path / 'stop' if how == 'stop' else how} after step 4"
    hint = "start the same command again to resume"
    assert end_of(process, tmp_path) == (75, f"{cause}; {hint}\n", ["stopped", 75, cause, 3])
    assert not (tmp_path / "stop").exists()


def test_where_no_phase_trains_it_ends_at_once(tmp_path: Path) -> None:
    process = begun(tmp_path, "starting")
    process.send_signal(signal.SIGTERM)
    code, said, status = end_of(process, tmp_path)
    assert (
        code == os.EX_TEMPFAIL and said.startswith("stopped by SIGTERM") and said.count("\n") == 1
    )
    assert status == ["stopped", 75, "stopped by SIGTERM", 3]


def test_torchrun_does_not_begin_it_anew(tmp_path: Path) -> None:
    """Its agent takes any code but 0 for a fault, see SimpleElasticAgent._invoke_run of torch."""
    process = begun(tmp_path, "training", TORCHELASTIC_MAX_RESTARTS="3")
    process.send_signal(signal.SIGTERM)
    code, _, status = end_of(process, tmp_path)
    assert (code, status[1]) == (0, 75)


def test_a_rank_that_is_left_alone_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without a handler: 128 + signal, as a shell counts it."""
    monkeypatch.setattr(signals, "end_process", sys.exit)
    lost_a_rank.set()
    try:
        with pytest.raises(SystemExit, match="143"):
            signals.act(signal.SIGTERM)
    finally:
        lost_a_rank.clear()


def test_a_rank_that_another_machine_has_left_alone_ends_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent here sends SIGTERM because a rank there has failed, which only status.json says; before that a wish is a wish."""
    asked: list[str] = []
    monkeypatch.setattr(signals, "end_process", sys.exit)
    monkeypatch.setattr(StopRequest, "ask", lambda _, reason: not asked.append(reason))
    monkeypatch.setattr(signals.status, "current", RunStatus())
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    signals.status.current.begin(tmp_path)
    signals.act(signal.SIGTERM)
    agent = os.getppid()
    monkeypatch.setattr(os, "getppid", lambda: agent + 1)
    write_status(tmp_path, Status("failed", 1, "ValueError: x", 1, 4, "resume"))
    monkeypatch.setattr(os, "getppid", lambda: agent)
    with pytest.raises(SystemExit, match="143"):
        signals.act(signal.SIGTERM)
    # What a start an hour before has left says nothing of this one.
    hour_ago = time.strftime(status.TIME, time.localtime(time.time() - 3600))
    write_status(tmp_path, Status("failed", 1, "x", 1, 4, "", start="job/1/0", time=hour_ago))
    signals.act(signal.SIGTERM)
    assert asked == ["stopped by SIGTERM"] * 2


def test_a_wish_that_nobody_saw_to_is_not_lost() -> None:
    """After the last step of a phase, and before what comes next; train/test_early_end.py has what all ranks make of it."""
    request = StopRequest()
    with request.at_steps():
        assert request.ask("stopped by SIGTERM")
    assert not request.ask("stopped by SIGUSR1") and request.reason == "stopped by SIGTERM"
