"""What must survive: ranks killed at any moment, some of them while a checkpoint is written. `make faults` runs these.

Reference: the same run without interruption; final weights and optimizer state must be equal bit for bit.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from visionloom.tests.ranks import RankPool
from visionloom.tests.train.runs import metrics, run_words
from visionloom.tests.train.test_resume import checkpoint_tensors

pytestmark = pytest.mark.faults
STEPS, EVERY, KILLS, SEED = 30, 3, 20, 7


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines() if line.endswith("}")]


@pytest.fixture(scope="module")
def attempts(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    work = tmp_path_factory.mktemp("faults")
    words = run_words(demo_data, work, STEPS, f"checkpoint.every_steps={EVERY}")
    words = [word for word in words if not word.startswith("run.folder=")]
    command = [sys.executable, "-m", "visionloom.tests.train.forked", str(work), str(SEED), str(KILLS), *words]
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root / ".link"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment, cwd=root, check=False)
    assert done.returncode == 0, done.stderr + (work / "log.txt").read_text()[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_attempt_goes_on_from_the_last_whole_checkpoint(attempts: list[dict[str, Any]]) -> None:
    assert sum(attempt["killed"] for attempt in attempts) >= KILLS
    for attempt in attempts:
        assert attempt["killed"] or attempt["codes"] == [0, 0], attempt


def test_nothing_is_lost_or_doubled(attempts: list[dict[str, Any]]) -> None:
    reference = metrics(Path(attempts[0]["folder"]))
    for folder in {attempt["folder"] for attempt in attempts}:
        lines = metrics(Path(folder))
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        assert [line["loss"] for line in lines] == [line["loss"] for line in reference]


def test_resuming_takes_the_newest_commit(attempts: list[dict[str, Any]]) -> None:
    """A resume goes on from the last checkpoint that was committed before the kill, or from one whose event was cut off."""
    resumed = 0
    for folder in {attempt["folder"] for attempt in attempts}:
        newest = 0
        for event in events(Path(folder)):
            if event["event"] == "checkpoint":
                newest = event["step"]
            elif event["event"] == "resume":
                assert newest <= event["step"] <= newest + 2 * EVERY
                newest, resumed = event["step"], resumed + 1
            assert event["event"] != "damaged_checkpoint"
    assert resumed >= 5


def test_the_weights_end_as_if_nothing_had_happened(attempts: list[dict[str, Any]], pool: RankPool) -> None:
    folders = sorted({attempt["folder"] for attempt in attempts})
    (expected, *others) = (pool.run(1, checkpoint_tensors, Path(folder))[0] for folder in folders)
    for found in others:
        assert found.keys() == expected.keys()
        assert [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])] == []
