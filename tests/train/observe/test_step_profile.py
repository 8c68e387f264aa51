"""The trace of some steps, and what is kept of a GPU that ran out of memory. Reference: the marks of torch's own profiler."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from visionloom.launch.guarding.causes import cause_of
from visionloom.tests.ranks import RankPool
from visionloom.tests.train.runs import run_config
from visionloom.tests.train.test_layouts import train
from visionloom.train.observe.logging_config import LoggingConfig
from visionloom.train.observe.memory import MOST_EVENTS, record_memory


def test_the_steps_asked_for_are_traced_on_every_rank(
    pool: RankPool, demo_data: Path, tmp_path: Path
) -> None:
    config = run_config(demo_data, tmp_path, 5, 2, "logging.profile_steps=[2,3]")
    pool.run(2, train, config)
    names = sorted(path.name for path in (tmp_path / "profile").iterdir())
    assert names == [f"steps-00000002-00000003-rank-0000{rank}.json" for rank in (0, 1)]
    for name in names:
        trace = json.loads((tmp_path / "profile" / name).read_text())
        marks = Counter(event.get("name") for event in trace["traceEvents"])
        # Once a step.
        assert marks["part: gradient reduction"] == 2, marks
        assert marks["part: vision"] >= 2 and marks["aten::mm"] > 10
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    (event,) = (event for event in events if event["event"] == "profile")
    assert event["step"] == 3 and event["file"].endswith(names[0])


@pytest.mark.parametrize(
    ("steps", "fault"),
    [([], ""), ([3, 3], ""), ([4], "first and the last"), ([4, 3], "first and"), ([1, 101], "100")],
)
def test_steps_that_make_no_trace_are_refused(steps: list[int], fault: str) -> None:
    lines = list(LoggingConfig(profile_steps=steps).problems("logging"))
    assert len(lines) == bool(fault)
    assert all(fault in line and "logging.profile_steps=" in line for line in lines)


def test_want_of_memory_leaves_a_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's functions as they are called: a GPU that really runs out of memory is none of a laptop's."""
    calls: list[Any] = []
    memory = torch.cuda.memory
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(memory, "_record_memory_history", lambda **words: calls.append(words))
    monkeypatch.setattr(memory, "_dump_snapshot", lambda path: Path(path).write_text("x"))
    record_memory()
    assert calls == [{"max_entries": MOST_EVENTS}]
    monkeypatch.setenv("RANK", "3")
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    cause = cause_of(error, tmp_path)
    path = tmp_path / "memory" / "rank-00003.pickle"
    assert path.read_text() == "x" and cause.endswith(f"memory_viz: {path}")
    assert cause.startswith("out of memory: OutOfMemoryError: CUDA out of memory. Tried")
    # A disk that is full too hides nothing.
    monkeypatch.setattr(memory, "_dump_snapshot", lambda path: 1 / 0)
    assert cause_of(error, tmp_path).endswith("Tried to allocate 2.00 GiB")
    assert "memory_viz" not in cause_of(ValueError("x"), tmp_path)
