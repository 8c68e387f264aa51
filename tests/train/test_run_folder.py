"""A run's folder that somebody else has filled: what is written there stays there, and what is read there is of the run."""

import json
import os
from pathlib import Path

import pytest

from visionloom.common.errors import UserError
from visionloom.train import agreement_sides
from visionloom.train.agreement_sides import newest_checkpoint
from visionloom.train.observe.metrics import EVENTS, METRICS, WAITING, RunLog


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    file = tmp_path / "victim"
    file.write_text("kept\n")
    return file


@pytest.mark.parametrize("name", [METRICS, EVENTS])
def test_a_log_that_is_a_link_is_not_written_through(
    name: str, victim: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / name).symlink_to(victim)
    log = RunLog(run)
    log.metric({"step": 1})
    log.event("start")
    assert f"{run / name} is no file, or a link" in log.fault and victim.read_text() == "kept\n"


def test_a_pipe_in_the_place_of_a_log_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / METRICS)
    log = RunLog(tmp_path)
    log.metric({"step": 1})
    assert f"{tmp_path / METRICS} is no file" in log.fault
    with pytest.raises(UserError, match="no file"):
        log.rewind(0)


def test_lines_that_waited_go_into_the_logs_of_the_run(victim: Path, tmp_path: Path) -> None:
    run, folder = tmp_path / "run", tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    good = (
        json.dumps([METRICS, '{"step": 1, "loss": NaN}\n'])
        + "\n"
        + json.dumps([EVENTS, '{"event": "x"}\n'])
        + "\n"
    )
    (folder / WAITING).write_text(good)
    RunLog(run).load_waiting(folder)
    assert (run / METRICS).read_text() == '{"step": 1, "loss": NaN}\n' and not (
        folder / WAITING
    ).exists()
    assert (run / EVENTS).read_text() == '{"event": "x"}\n'
    for bad in (
        ["../victim", "{}"],
        [str(victim), "{}"],
        [METRICS, "3"],
        [METRICS],
        "x",
        [METRICS, "["],
    ):
        (folder / WAITING).write_text(json.dumps(bad) + "\n")
        with pytest.raises(UserError, match=WAITING):
            RunLog(run).load_waiting(folder)
    assert victim.read_text() == "kept\n" and (run / METRICS).read_text().count("\n") == 1


@pytest.mark.parametrize("pointer", ["../../elsewhere", "/etc", "", "a\0b", "x" * 5000, "sft/none"])
def test_the_pointer_to_the_newest_checkpoint_leads_nowhere_else(
    pointer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies where it leads counts as a state that can be read."""
    monkeypatch.setattr(
        agreement_sides, "read_run_state", lambda folder: (folder / "state.json").read_bytes()
    )
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "state.json").write_text("{}")
    good = tmp_path / "run" / "checkpoints" / "sft" / "step-1"
    good.mkdir(parents=True)
    (good / "state.json").write_text("{}")
    (tmp_path / "run" / "checkpoints" / "latest").write_text(pointer)
    assert newest_checkpoint(tmp_path / "run") is None
    (tmp_path / "run" / "checkpoints" / "latest").write_text("sft/step-1\n")
    assert newest_checkpoint(tmp_path / "run") == good
