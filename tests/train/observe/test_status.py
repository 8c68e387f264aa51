"""status.json says what is true at every moment, the first cause and not what followed from it."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from visionloom.common import lock
from visionloom.common.errors import EarlyEnd
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


def start_that(folder: Path, end: str, saves: int = 0) -> tuple[int | None, str]:
    """The code and the cause that a start from step 4 leaves."""
    start = RunStatus()
    try:
        start.begin(folder)
    except EarlyEnd as refused:
        start.ended(refused.state, refused.code, str(refused), refused.hint)
        return content(folder)["code"], content(folder)["cause"]
    start.resumes(4)
    start.at(6)
    if saves:
        start.saves(saves)
    if end == "fails":
        start.failed(1, "ValueError: x", "resume")
    elif end == "stops":
        start.ended("stopped", 75, "stopped by SIGTERM", "resume")
    elif end == "is mended":
        start.failed(2, "no such key", "")
    return content(folder)["code"], content(folder)["cause"]


IN_VAIN = "3 starts in a row have ended without a new checkpoint, the last after step"


def test_three_starts_without_progress_are_the_last(tmp_path: Path) -> None:
    """Row 12 of the fault matrix; 93 is what nvidia-resiliency-ext's launcher takes for "do not requeue"."""
    assert [start_that(tmp_path, end)[0] for end in ("fails", "stops")] == [1, 75]
    assert start_that(tmp_path, "fails") == (93, f"{IN_VAIN} 6: ValueError: x")
    # A person who starts it once more has three again.
    assert [start_that(tmp_path, "fails")[0] for _ in range(3)] == [1, 1, 93]


def test_progress_and_people_are_no_loop(tmp_path: Path) -> None:
    ends = [("fails", 0), ("fails", 5), ("fails", 4), ("fails", 0), ("is mended", 0), ("fails", 0)]
    # Saved again at the step that it went on from, as a stop before the first step does, is no progress.
    assert [start_that(tmp_path, *end)[0] for end in ends] == [1, 1, 1, 1, 2, 1]


def test_killed_starts_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They say nothing themselves: the next one does. Attempts of the agent that go on after it are refused too."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    said = []
    for attempt in range(5):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        said.append(start_that(tmp_path, "killed"))
    assert [code for code, _ in said] == [None, None, None, 93, 93]
    assert said[3][1].startswith(f"{IN_VAIN} 4: killed without a word") and said[4] == said[3]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    assert start_that(tmp_path, "killed") == (None, "")


def test_what_was_stopped_is_not_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal between phases ends a rank with 75, after which torchrun starts all ranks again: each of them ends itself."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for attempt, end in enumerate(("fails", "stops", "", "")):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        assert start_that(tmp_path, end)[0] == (75 if attempt else 1)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(EarlyEnd, match="stopped by SIGTERM") as refused:
        RunStatus().begin(tmp_path)
    assert (refused.value.state, refused.value.hint) == ("stopped", "resume")
    # It stays as the one that was stopped has left it: the second start in vain, in attempt 1.
    assert [content(tmp_path)[key] for key in ("starts", "restarts")] == [2, 1]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    assert start_that(tmp_path, "fails")[0] == 93, "whoever starts it again means it"


def test_what_gave_up_is_not_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun starts the ranks a fourth time, if it may; the file stays as the third has left it."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for attempt in range(5):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        assert start_that(tmp_path, "fails")[0] == (1 if attempt < 2 else 93)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(EarlyEnd, match=IN_VAIN) as refused:
        RunStatus().begin(tmp_path)
    assert (refused.value.state, refused.value.code) == ("failed", 93)
    assert [content(tmp_path)[key] for key in ("starts", "restarts")] == [3, 2]


def test_agents_of_several_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each agent counts attempts for itself, so a start's ranks know each other by the time at which they write.

    Attempts are an hour apart, and the agents have begun a day ago.
    """
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job/7")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    ages = {"self": 60.0}
    monkeypatch.setattr(status, "seconds_alive", lambda process="self": ages.get(process, 86400.0))
    codes = []
    for attempt in range(4):
        starts = []
        for rank, agent, count in (("0", 11, attempt), ("1", 22, 2 * attempt + 1)):
            monkeypatch.setenv("RANK", rank)
            monkeypatch.setattr(os, "getppid", lambda agent=agent: agent)
            monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(count))
            starts.append(RunStatus())
            try:
                starts[-1].begin(tmp_path)
            except EarlyEnd as end:
                starts[-1].ended(end.state, end.code, str(end), end.hint)
        codes.append(content(tmp_path)["code"])
        starts[1].failed(1, f"ValueError: {attempt}", "")
        starts[0].failed(1, "Connection closed by peer", "")
        codes.append(content(tmp_path)["code"])
        earlier = content(tmp_path)
        earlier["time"] = time.strftime(status.TIME, time.localtime(time.time() - 3600))
        (tmp_path / "status.json").write_text(json.dumps(earlier))
    # The fourth is refused, and leaves what the third has said.
    assert codes[:6] == [None, 1, None, 1, None, 93] and codes[6] == 93
    assert "ValueError: 2" in content(tmp_path)["cause"], "and not of the rank that lost it"


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
