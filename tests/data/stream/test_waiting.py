"""Waits for data: whoever reads is looked at meanwhile. References: the kernel's list of processes and its states."""

import pickle
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from visionloom.data.config import DataConfig
from visionloom.data.shards.store import LocalStore
from visionloom.data.stream import waiting
from visionloom.data.stream.waiting import StepReader, StepWait
from visionloom.data.stream.workers import iterate
from visionloom.parallel.share import ALONE
from visionloom.tests.data.samples import essay
from visionloom.tests.data.stream.test_train_stream import stream


@pytest.fixture
def data(config: Callable[..., DataConfig]) -> DataConfig:
    return config(texts=[essay(number, number % 40) for number in range(50)])


PLACE = r"step \d+, dataset texts, shard texts-\d+\.tar, sample \d+( and \d+ more)?"
READER = """
import pickle, sys
from visionloom.data.stream import waiting
from visionloom.data.stream.workers import iterate
from visionloom.parallel.share import ALONE

if __name__ == "__main__":
    waiting.LOOK_SECONDS = 1.0
    for _ in iterate(pickle.load(open(sys.argv[1], "rb")), range(40), ALONE, 6, 1):
        print("ready", flush=True)
        sys.stdin.readline()
"""


@pytest.mark.faults
def test_row_37_a_stopped_worker_goes_on(data: DataConfig, tmp_path: Path) -> None:
    """SIGSTOP of a worker, as a debugger or a mistaken kill sends it: it is continued, with a line that says so."""
    (tmp_path / "stream").write_bytes(pickle.dumps(stream(data, mixture={"texts": 1})))
    (tmp_path / "reader.py").write_text(READER)
    command = [sys.executable, str(tmp_path / "reader.py"), str(tmp_path / "stream")]
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, text=True, **pipes) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        helpers = psutil.Process(process.pid).children(recursive=True)
        worker = next(one for one in helpers if any(other.pid == one.ppid() for other in helpers))
        worker.suspend()
        steps, said = process.communicate("\n" * 40)
    assert process.returncode == 0 and steps.count("ready") == 39
    name = rf"warning: data worker 0 \(process {worker.pid}\) was stopped by a signal and is"
    assert re.fullmatch(rf"{name} told to go on; it is at {PLACE}\n", said), said


def test_row_37_a_worker_that_is_stopped_again_is_killed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its end is what ends the run, as any dead worker's."""
    with subprocess.Popen(["sleep", "60"]) as process:
        worker = psutil.Process(process.pid)
        wait = StepWait(lambda: [StepReader("data worker 3", process.pid, "step 5, shard a.tar")])
        wait.look()
        assert capsys.readouterr().err == ""
        for _ in range(2):
            worker.suspend()
            while worker.status() != psutil.STATUS_STOPPED:
                time.sleep(0.01)
            wait.look()
        assert process.wait(10) == -9
    who = f"warning: data worker 3 (process {process.pid}) was stopped by a signal"
    assert capsys.readouterr().err.splitlines() == [
        f"{who} and is told to go on; it is at step 5, shard a.tar",
        f"{who} again: it is killed; it is at step 5, shard a.tar",
    ]


def test_row_36_slow_reading_is_told(
    data: DataConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A disk that takes its time: a line says what is read and how fast, and the step comes all the same."""
    monkeypatch.setattr(waiting, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(waiting, "SLOW_SECONDS", 0.1)
    read = LocalStore.read

    def slowly(self: LocalStore, *arguments: Any, **named: Any) -> bytes:
        time.sleep(0.03)
        return read(self, *arguments, **named)

    monkeypatch.setattr(LocalStore, "read", slowly)
    steps = iterate(stream(data, mixture={"texts": 1}), range(1), ALONE, 6, workers=0)
    assert len(list(steps)) == 1
    said = capsys.readouterr().err.splitlines()
    speed = r"rank 0 has waited \d s for its data, which is read from files at \d+\.\d MB/s"
    # The first may be before the first sample.
    line = f"warning: {speed}: the reading thread is at {PLACE}"
    assert any(re.fullmatch(line, each) for each in said), said
