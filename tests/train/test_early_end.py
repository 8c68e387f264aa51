"""Runs that end before their last step and go on. Reference: the same run without interruption, bit for bit."""

import contextlib
import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from visionloom.common.errors import EarlyEnd
from visionloom.tests.ranks import RankPool
from visionloom.tests.train.faulty import pretrain_with
from visionloom.tests.train.runs import metrics, run_config, run_words
from visionloom.tests.train.test_faults import rank_processes, torchrun, wait_for_steps
from visionloom.tests.train.test_layouts import train
from visionloom.tests.train.test_resume import checkpoint_tensors
from visionloom.train.config import RunConfig

STEPS, LONGER = 8, 60
EXACT = ("step", "loss", "loss_by_source", "grad_norm", "lr", "tokens", "samples", "data_cursor")


def exact(folder: Path) -> list[list[Any]]:
    return [[line[key] for key in EXACT] for line in metrics(folder)]


@pytest.fixture(scope="module")
def undisturbed(pool: RankPool, demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    pool.run(2, train, run_config(demo_data, folder, STEPS, 2))
    return folder


@pytest.fixture(scope="module")
def longer(pool: RankPool, demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of enough steps that a signal comes before the last."""
    folder = tmp_path_factory.mktemp("longer")
    pool.run(2, train, run_config(demo_data, folder, LONGER, 2))
    return folder


@contextlib.contextmanager
def asked_to_stop(ranks: list[int], step: int, saved: bool = False) -> Iterator[None]:
    """Some ranks are asked to stop after a step of the run in this process, or once that is `saved`."""
    from visionloom.train.observe import stopping
    from visionloom.train.observe.observer import Observer
    from visionloom.train.observe.stopping import StopRequest

    stopping.current = StopRequest()  # type: ignore[misc]  # of the process, which outlives the run
    name = "saved" if saved else "step"
    report = getattr(Observer, name)

    def ask(self: Observer, *words: Any, **fields: Any) -> None:
        report(self, *words, **fields)
        if (fields or words[0])["step"] == step and torch.distributed.get_rank() in ranks:
            stopping.current.ask("stopped by SIGTERM")

    setattr(Observer, name, ask)
    try:
        yield
    finally:
        setattr(Observer, name, report)
        stopping.current = StopRequest()  # type: ignore[misc]


def stopped(config: RunConfig, ranks: list[int], step: int, saved: bool = False) -> str:
    """Train, while some ranks are asked to stop after a step, or once it is saved (runs in the pool)."""
    try:
        with asked_to_stop(ranks, step, saved):
            train(config)
    except EarlyEnd as end:
        return str(end)
    return "done"


def test_one_rank_is_asked_and_all_stop_together(
    pool: RankPool, demo_data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """With a checkpoint in the background at that time, and no other cadence than the undisturbed run's afterwards."""
    config = run_config(demo_data, tmp_path, STEPS, 2, "checkpoint.every_steps=3")
    said = pool.run(2, stopped, config, [1], 3)
    assert said == ["stopped by SIGTERM after step 4, which is saved"] * 2
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "checkpoint"] == [3, 4]
    # While the phase's last step is saved, one rank alone, and none is left.
    assert (
        pool.run(2, stopped, config, [1], STEPS, True)
        == [f"stopped by SIGTERM after step {STEPS}, which is saved"] * 2
    )
    assert exact(tmp_path) == exact(undisturbed)
    assert pool.run(2, stopped, config, [], 0) == ["done", "done"]
    ours, expected = (pool.run(1, checkpoint_tensors, each)[0] for each in (tmp_path, undisturbed))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.faults
@pytest.mark.parametrize("whom", ["rank", "agent", "file"])
def test_a_real_run_stops_and_goes_on(
    whom: str, pool: RankPool, demo_data: Path, longer: Path, tmp_path: Path
) -> None:
    """Rows 7 and 8: SIGTERM to one rank or to torchrun's agent, and the file that a batch script touches; torchrun may restart."""
    folder = tmp_path / "run"
    words = run_words(demo_data, folder, LONGER)
    with torchrun(words, "--max-restarts=2") as agent:
        wait_for_steps(agent, folder, 3)
        ranks = list(rank_processes(agent).values())
        if whom == "file":
            (folder / "stop").touch()
        else:
            (agent if whom == "agent" else ranks[1]).send_signal(signal.SIGTERM)
        output, _ = agent.communicate(timeout=60)
    assert not [rank for rank in ranks if psutil.pid_exists(rank.pid)]
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["code"], status["restarts"]) == ("stopped", 75, 0), output
    assert output.count("which is saved; start the same command again to resume") == 1
    assert agent.returncode == (0 if whom != "agent" else 1)
    saved = sorted((folder / "checkpoints" / "multimodal").iterdir())
    assert [int(each.name[-8:]) for each in saved] == [status["step"]] == [len(metrics(folder))]
    assert 3 <= status["step"] < LONGER
    pool.run(2, train, run_config(demo_data, folder, LONGER, 2))
    assert exact(folder) == exact(longer)


def faulty(kind: str, first: int, last: int, rank: int) -> tuple[str, ...]:
    """The script of a run with a fault; see faulty.py."""
    return "-m", "visionloom.tests.train.faulty", kind, str(first), str(last), str(rank)


@pytest.mark.faults
def test_a_crash_loop_ends_after_three_starts(demo_data: Path, tmp_path: Path) -> None:
    """Row 12: torchrun starts the ranks once more; the third is the last that trains, and what it has said stays."""
    folder = tmp_path / "run"
    words = run_words(demo_data, folder, LONGER)
    with torchrun(words, "--max-restarts=3", script=faulty("fail", 2, 2, 1)) as agent:
        output, _ = agent.communicate(timeout=300)
    status = json.loads((folder / "status.json").read_text())
    # The fourth is refused before torch is imported.
    assert output.count("[rank1]: ValueError: a fault on purpose\n") == 3, output
    assert "[rank0]:" not in output, "the others are quiet"
    ours = [status[key] for key in ("state", "code", "starts", "restarts")]
    assert ours == ["failed", 93, 3, 2]
    assert (
        status["cause"].startswith("3 starts in a row") and "a fault on purpose" in status["cause"]
    )


@pytest.mark.faults
def test_a_stopped_rank_is_named_with_stacks(demo_data: Path, tmp_path: Path) -> None:
    """Row 13, and 14 in launch/guarding/test_hang.py: a real run with a limit of six seconds; torchrun need not kill the stopped rank."""
    folder = tmp_path / "run"
    words = run_words(demo_data, folder, LONGER, "watch.step_minutes=0.1")
    with torchrun(words, script=faulty("halt", 4, 4, 1)) as agent:
        wait_for_steps(agent, folder, 3)
        output, _ = agent.communicate(timeout=6 + 5 + 15)
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["code"], status["step"]) == ("failed", 75, 3), output
    assert re.match(
        r"no sign of life for \d s after step 3: rank 1 on \S+, step, part other, stopped by a signal \(SIGSTOP\); stacks",
        status["cause"],
    )
    stacks = [(folder / "hang" / f"rank-0000{rank}.txt").read_text() for rank in (0, 1)]
    assert "in halt" in stacks[1] and "in halt" not in stacks[0] and "in train_step" in stacks[0]


@pytest.mark.faults
def test_a_slow_rank_is_named(pool: RankPool, demo_data: Path, tmp_path: Path) -> None:
    """Row 15: half a second in each of rank 1's steps, before its forward pass."""
    config = run_config(demo_data, tmp_path, 24, 2)
    pool.run(2, pretrain_with, config, "slow", 2, 0, 1)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    (event,) = (event for event in events if event["event"] == "slow_rank")
    assert event["detail"].startswith("rank 1 is slow in computation for 20 steps: 0.")
