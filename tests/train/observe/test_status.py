"""status.json says what is true at every moment, the first cause and not what followed from it."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from visionloom.common import lock
from visionloom.train.observe import status
from visionloom.train.observe.status import RunStatus, read_status, refused


def content(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "status.json").read_text())
    return found


def test_a_killed_run_does_not_show_how_an_earlier_one_ended(tmp_path: Path) -> None:
    first = RunStatus()
    first.begin(tmp_path)
    first.at(12)
    first.done()
    assert [content(tmp_path)[key] for key in ("state", "code", "cause", "step")] == [
        "done",
        0,
        "done",
        12,
    ]
    second = RunStatus()
    second.begin(tmp_path)
    assert [content(tmp_path)[key] for key in ("state", "code", "step", "pid")] == [
        "running",
        None,
        12,
        os.getpid(),
    ]
    assert second.before is not None and second.before.state == "done"


def test_the_step_is_kept_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = RunStatus()
    running.begin(tmp_path)
    running.at(2)
    assert content(tmp_path)["step"] == 2, "where it begins is known at once"
    running.at(3)
    assert content(tmp_path)["step"] == 2, "not at every step"
    monkeypatch.setattr(status, "REFRESH_SECONDS", 0.0)
    running.at(4)
    assert (content(tmp_path)["state"], content(tmp_path)["step"]) == ("running", 4)


def test_the_first_cause_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main = RunStatus()
    main.begin(tmp_path)
    main.at(7)
    monkeypatch.setenv("RANK", "1")
    other = RunStatus()
    other.begin(tmp_path)
    other.at(7)
    other.failed(1, "ValueError: the cause", "resume")
    monkeypatch.setenv("RANK", "0")
    main.failed(1, "RuntimeError: Connection closed by peer", "resume")
    assert [content(tmp_path)[key] for key in ("state", "cause", "rank", "step")] == [
        "failed",
        "ValueError: the cause",
        1,
        7,
    ]


def test_a_refused_start_says_why_but_not_into_a_run_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(tmp_path / "absent", 2, "no such key", "")
    assert not (tmp_path / "absent").exists()
    earlier = RunStatus()
    earlier.begin(tmp_path)
    earlier.at(5)
    refused(tmp_path, 2, "no such key", "change it")
    assert [content(tmp_path)[key] for key in ("code", "cause", "step")] == [2, "no such key", 5]
    RunStatus().begin(tmp_path)
    monkeypatch.setattr(status, "is_held", lambda folder: True)
    refused(tmp_path, 2, "no such key", "")
    assert content(tmp_path)["state"] == "running"
    assert lock.is_held is not status.is_held


def test_a_start_that_fails_early_keeps_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where another rank writes it, which has not read the file."""
    first = RunStatus()
    first.begin(tmp_path)
    first.at(9)
    RunStatus().begin(tmp_path)
    monkeypatch.setenv("RANK", "1")
    other = RunStatus()
    other.begin(tmp_path)
    other.failed(1, "ImportError: x", "")
    assert [content(tmp_path)[key] for key in ("state", "rank", "step")] == ["failed", 1, 9]


def test_a_rank_that_fails_before_the_main_rank_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cause stays, whatever an earlier start has left; the next attempt of the same agent begins as any other."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    earlier = RunStatus()
    earlier.begin(tmp_path)
    earlier.done()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("RANK", "1")
    other = RunStatus()
    other.begin(tmp_path)
    other.failed(1, "ValueError: the cause", "")
    monkeypatch.setenv("RANK", "0")
    main = RunStatus()
    main.begin(tmp_path)
    main.failed(1, "rank 1 ended with exit code 1", "")
    assert [content(tmp_path)[key] for key in ("state", "cause", "rank")] == [
        "failed",
        "ValueError: the cause",
        1,
    ]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    RunStatus().begin(tmp_path)
    assert [content(tmp_path)[key] for key in ("state", "restarts")] == ["running", 2]


@pytest.mark.parametrize("text", ["", "[]", '{"state": "done"}', '{"state": 3}', "x" * 10])
def test_a_file_of_another_version_is_no_status(text: str, tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text(text)
    assert read_status(tmp_path) is None


def test_a_folder_that_is_gone_is_no_second_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    running = RunStatus()
    running.begin(tmp_path / "gone")
    assert "status.json could not be written" in capsys.readouterr().err
