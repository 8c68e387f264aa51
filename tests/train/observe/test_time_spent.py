"""Where a run's time went. Reference: hand-made moments, and the wall clock of real runs."""

import re
from pathlib import Path
from typing import Any

import pytest

from visionloom.train.observe.time_spent import WORDS, TimeSpent, time_spent
from visionloom.train.report import sections
from visionloom.train.report.history import History


def event(when: float, kind: str, **fields: Any) -> dict[str, Any]:
    return {"time": when, "event": kind, **fields}


def line(step: int, seconds: float, waited: float = 0.0, skipped: bool = False) -> dict[str, Any]:
    return {
        "step": step, "step_seconds": seconds, "data_wait_seconds": waited, "skipped": skipped,
    }  # fmt: skip


FIRST = [
    event(108.0, "start", began=100.0, last_sign=None, unfinished_seconds=0.0),
    event(120.0, "phase_start", phase="align", step=0),
    event(125.0, "evaluation", seconds=5.0),
    event(136.0, "checkpoint", step=5, stall_seconds=1.0),
]
"""20 s of start, 5 of evaluation, five steps of 2 s to 136 with a stall of 1; then two steps that no checkpoint has."""
LINES = [line(step, 2.0, 0.5) for step in range(1, 6)]


def parts(spent: TimeSpent) -> dict[str, float]:
    return {name: round(each, 6) for name, each in spent.seconds.items() if each}


def test_a_run_that_was_never_ended() -> None:
    spent = time_spent(FIRST, [*LINES, line(6, 2.0), line(7, 2.0)], until=141.0)
    assert (spent.wall, spent.starts, spent.lost_steps) == (41.0, 1, 0)
    # 7.5 of five steps without their waits, and two of 2 s; a second that nothing tells of.
    assert parts(spent) == {
        "productive": 11.5, "start": 20.0, "data": 2.5, "checkpoint": 1.0, "evaluation": 5.0, "other": 1.0,
    }  # fmt: skip
    assert spent.productive_share == pytest.approx(11.5 / 41)


SECOND = [
    # Killed in step 8, half a second after the last line at 140.
    event(170.0, "start", began=160.0, last_sign=140.5, unfinished_seconds=0.5),
    event(171.0, "resume", step=5),
    event(171.0, "lost", step=5, steps=2, seconds=4.0),
    event(180.0, "phase_start", phase="align", step=5),
]


def test_lost_steps_and_the_time_between_starts() -> None:
    spent = time_spent(FIRST + SECOND, [*LINES, line(6, 2.0), line(7, 2.0)], until=184.0)
    assert (spent.wall, spent.starts, spent.lost_steps) == (84.0, 2, 2)
    assert parts(spent) == {
        "productive": 11.5, "start": 40.0, "data": 2.5, "checkpoint": 1.0, "evaluation": 5.0, "lost": 4.5, "restarts": 19.5,
    }  # fmt: skip
    assert sum(spent.seconds.values()) == pytest.approx(spent.wall)
    assert spent.describe() == (
        "time: 13.7% productive (ETTR) of 84 s in 2 starts; start 47.6%, between starts 23.2%, evaluation 6.0%, lost steps 5.4%,"
        " waits for data 3.0%, checkpoint stalls 1.2%"
    )


def test_a_start_that_ended_before_its_first_step() -> None:
    """It was start to its last sign of life, and trained nothing."""
    third = event(230.0, "start", began=220.0, last_sign=176.0, unfinished_seconds=5.0)
    spent = time_spent([*FIRST, *SECOND[:3], third], LINES, until=230.0)
    assert parts(spent)["start"] == 20.0 + 16.0 + 10.0 and parts(spent)["lost"] == 4.5
    assert parts(spent)["restarts"] == 19.5 + 44.0


def test_skipped_steps_are_lost_and_phases_are_built() -> None:
    second = [event(140.0, "phase_end"), event(147.0, "phase_start"), event(150.0, "done")]
    spent = time_spent(FIRST + second, [*LINES, line(6, 2.0, 0.5, skipped=True)], until=150.0)
    assert parts(spent)["start"] == 27.0 and parts(spent)["lost"] == 1.5 and spent.lost_steps == 1


def test_a_run_that_goes_back_builds_its_phase_again() -> None:
    back = [
        event(140.0, "back", step=5),
        event(140.0, "lost", step=5, steps=1, seconds=2.0),
        event(143.0, "phase_start"),
    ]
    spent = time_spent(FIRST + back, LINES, until=143.0)
    assert parts(spent)["start"] == 23.0 and parts(spent)["lost"] == 2.0


@pytest.mark.parametrize("until", [0.0, 50.0, 1e9])
def test_logs_that_are_damaged_or_of_an_older_version(until: float) -> None:
    events = [
        {}, event(99.0, "resume"), {"time": "x", "event": "start"}, event(101.0, "lost", seconds=None, steps=[1]),
        event(110.0, "evaluation", seconds=-5.0), event(112.0, "checkpoint", stall_seconds=float("nan")),
    ]  # fmt: skip
    spent = time_spent(events, [{"step_seconds": "x"}, {"step_seconds": True}], until)
    assert set(spent.seconds) == set(WORDS) and min(spent.seconds.values()) >= 0
    assert spent.wall == max(0.0, until - 99.0) and spent.describe()


def test_the_report_shows_it_over_all_starts() -> None:
    lines = [{**each, "time": 100.0} for each in LINES]
    history = History(Path("run"), lines, [*FIRST, *SECOND], {}, {})
    page = sections.time_spent(history)
    assert "in 2 starts; 2 steps were lost" in page
    # Of 80 s up to the last event.
    for words, share, seconds in (
        ("start", "50.0%", "40.0 s"),
        ("between starts", "24.4%", "19.5 s"),
    ):
        row = re.search(f"<td>{words}</td>.*?</tr>", page)
        assert row is not None and share in row[0] and seconds in row[0], page
    assert sections.time_spent(History(Path("run"), lines[:0], [], {}, {})) == ""
