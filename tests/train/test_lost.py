"""Runs that have lost what they had saved, or cannot write their log any more. Reference: the files before and after."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from visionloom.common.errors import UserError
from visionloom.tests.ranks import RankPool
from visionloom.tests.train.runs import metrics, run_config
from visionloom.train.config import RunConfig


def outcome(config: RunConfig) -> str:
    """Train, and return the UserError that ended it (runs in the pool)."""
    from visionloom.parallel import topology as topologies
    from visionloom.train.run import pretrain

    try:
        pretrain(config)
    except UserError as error:
        topologies.stop()
        return str(error)
    return "done"


def without_lines(config: RunConfig, refused: Callable[[str, Any], bool]) -> str:
    """Train with logs that do not take the lines that `refused` says, by the name of the log and the line."""
    from visionloom.train.observe.metrics import RunLog

    written = RunLog._write

    def write(self: RunLog, name: str, line: str) -> str:
        if refused(name, json.loads(line)):
            return f"{self.folder / name}: No space left on device"
        return written(self, name, line)

    RunLog._write = write  # type: ignore[method-assign]
    try:
        return outcome(config)
    finally:
        RunLog._write = written  # type: ignore[method-assign]


def without_log(config: RunConfig, from_line: int) -> str:
    """Train with a metrics.jsonl that takes no more lines from one on (runs in the pool)."""
    return without_lines(
        config, lambda name, line: name == "metrics.jsonl" and line["step"] >= from_line
    )


def without_last_event(config: RunConfig) -> str:
    """Train with an events.jsonl that does not take the last line (runs in the pool)."""
    return without_lines(
        config, lambda name, line: name == "events.jsonl" and line["event"] == "done"
    )


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


@pytest.mark.long
def test_a_run_whose_checkpoints_are_all_damaged(
    pool: RankPool, demo_data: Path, tmp_path: Path
) -> None:
    """Rows 23 and 24 of the fault matrix to their end: nothing is begun anew and nothing rewound unless told to."""
    folder = tmp_path / "run"
    words = ("checkpoint.every_steps=2", "phases.multimodal.warmup_steps=1")
    assert pool.run(1, outcome, run_config(demo_data, folder, 4, 1, *words)) == ["done"]
    for checkpoint in folder.glob("checkpoints/multimodal/step-*"):
        (checkpoint / "state.json").write_text("{}")
    before = (folder / "metrics.jsonl").read_bytes()

    (said,) = pool.run(1, outcome, run_config(demo_data, folder, 4, 1, *words))
    assert (
        "only damaged checkpoints" in said
        and "step-00000004" in said
        and "run.start_anew=true" in said
    )
    assert (folder / "metrics.jsonl").read_bytes() == before

    assert pool.run(
        1, outcome, run_config(demo_data, folder, 4, 1, *words, "run.start_anew=true")
    ) == ["done"]
    assert [line["step"] for line in metrics(folder)] == [1, 2, 3, 4]
    assert [kept.read_bytes() for kept in folder.glob("before-*.metrics.jsonl")] == [before]
    assert len(list(folder.glob("checkpoints/before-*/multimodal/step-*"))) == 2
    assert [event["cause"] for event in events(folder) if event["event"] == "start_anew"] == [
        said.partition(": put one")[0]
    ]
    assert pool.run(1, outcome, run_config(demo_data, folder, 4, 1, *words)) == ["done"], (
        "and the new ones are found"
    )


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_log_that_cannot_be_written_ends_the_run_saved(
    ranks: int, pool: RankPool, demo_data: Path, tmp_path: Path
) -> None:
    """After one more step: with its sums all ranks hear of the third line."""
    folder = tmp_path / "run"
    config = run_config(demo_data, folder, 5, ranks)
    said = pool.run(ranks, without_log, config, 3)
    assert set(said) == {
        f"{folder}/metrics.jsonl: No space left on device: the run's log cannot be written; the run is saved after step 4:"
        " make room, and start the same command again"
    }
    assert [line["step"] for line in metrics(folder)] == [1, 2]
    assert pool.run(ranks, outcome, config) == ["done"] * ranks
    assert [line["step"] for line in metrics(folder)] == list(range(1, 6)), (
        "the third and fourth came with the checkpoint"
    )


@pytest.mark.long
def test_a_log_that_fails_after_the_last_step_is_told(
    pool: RankPool, demo_data: Path, tmp_path: Path
) -> None:
    """No step follows that would look at it: the run would end with 0 and without its last lines. The next start is done."""
    folder = tmp_path / "run"
    config = run_config(demo_data, folder, 4, 2)
    assert set(pool.run(2, without_last_event, config)) == {
        f"{folder}/events.jsonl: No space left on device: the run's log cannot be written; the run is saved after step 4:"
        " make room, and start the same command again"
    }
    assert pool.run(2, outcome, config) == ["done"] * 2
    done, spent = events(folder)[-2:]
    assert (done["event"], done["step"], spent["event"]) == ("done", 4, "time_spent")


def test_a_run_that_ended_before_its_first_checkpoint(
    pool: RankPool, demo_data: Path, tmp_path: Path
) -> None:
    """It begins anew without being told to, and the lines that it had are kept."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    assert pool.run(1, outcome, run_config(demo_data, folder, 4, 1)) == ["done"]
    assert [line["step"] for line in metrics(folder)] == [1, 2, 3, 4]
    assert [kept.read_text() for kept in folder.glob("before-*.metrics.jsonl")] == [
        '{"step": 1}\n{"step": 2}\n'
    ]
