"""The account of a run's time. Reference: this process's clock around real runs that do not reach their end at once."""

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from visionloom.tests.ranks import RankPool
from visionloom.tests.train.runs import metrics, run_config, run_words
from visionloom.tests.train.test_early_end import stopped
from visionloom.tests.train.test_faults import ENVIRONMENT, ROOT, wait_for_steps
from visionloom.tests.train.test_layouts import train
from visionloom.train.report.history import History

STEPS, EVERY = 12, 5
LEAST_NAMED = 0.8
"""Share of the wall time that has a name other than `other`."""


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == kind]


def check_account(folder: Path, clock: float, starts: int) -> dict[str, float]:
    """The account of the run's last line is whole, and no longer than the clock around it."""
    account = events(folder, "time_spent")[-1]
    seconds: dict[str, float] = account["seconds"]
    assert sum(seconds.values()) == pytest.approx(account["wall_seconds"], abs=0.01)
    assert account["wall_seconds"] <= clock + 0.1
    assert account["productive_share"] == pytest.approx(
        seconds["productive"] / account["wall_seconds"], abs=1e-4
    )
    assert seconds["other"] < (1 - LEAST_NAMED) * account["wall_seconds"], seconds
    lines = metrics(folder)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    worked = sum(line["step_seconds"] - line["data_wait_seconds"] for line in lines)
    assert seconds["productive"] == pytest.approx(worked, abs=0.01)
    assert len(events(folder, "start")) == starts == History.read(folder).time_spent.starts
    return seconds


def test_a_run_that_is_stopped_and_goes_on(pool: RankPool, demo_data: Path, tmp_path: Path) -> None:
    config = run_config(demo_data, tmp_path, STEPS, 1)
    began = time.time()
    pool.run(1, stopped, config, [0], 4)
    paused = time.time()
    time.sleep(1.0)
    resumed = time.time()
    pool.run(1, train, config)
    seconds = check_account(tmp_path, time.time() - began, 2)
    assert resumed - paused <= seconds["restarts"] and seconds["lost"] == 0
    # Each of both has imported nothing, but built its phase.
    assert seconds["start"] > 0 and seconds["checkpoint"] > 0
    assert len(events(tmp_path, "time_spent")) == 2


@pytest.mark.faults
def test_a_killed_run_counts_what_it_lost(demo_data: Path, tmp_path: Path) -> None:
    """Row 6: nothing but its logs is left of the first process, which is killed between two checkpoints."""
    folder = tmp_path / "run"
    saves = f"checkpoint.every_steps={EVERY}", "checkpoint.asynchronous=false"
    words = run_words(demo_data, folder, STEPS, *saves)
    command = [sys.executable, "launch/pretrain.py", *words]
    began = time.time()
    with subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL) as first:
        wait_for_steps(first, folder, EVERY + 2)
        first.kill()
    killed, done = time.time(), len(metrics(folder))
    time.sleep(1.0)
    again = time.time()
    second = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    seconds = check_account(folder, time.time() - began, 2)
    assert again - killed <= seconds["restarts"]
    (resume,) = events(folder, "resume")
    (lost,) = events(folder, "lost")
    assert lost["steps"] == done - resume["step"] > 0 and seconds["lost"] >= lost["seconds"] > 0
    # The wall time has no gap: a start begins where the time between starts ends.
    for before, after in itertools.pairwise(events(folder, "start")):
        assert before["began"] < after["last_sign"] < after["began"]
    assert second.stdout.splitlines()[-1].startswith("time: ")
    assert "productive (ETTR)" in second.stdout and "in 2 starts; start " in second.stdout
