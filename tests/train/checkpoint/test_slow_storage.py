"""Row 36 of the fault matrix: storage that is slower than the checkpoints come. Reference: the times of the writer itself."""

import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import pytest

from visionloom.common import pulse
from visionloom.tests.ranks import RankPool
from visionloom.tests.train.checkpoint.test_checkpoint import (
    DENSE,
    Layout,
    events_of,
    layout_of,
    stage_of,
    train,
)
from visionloom.tests.train.layouts import TestPack, packs_of
from visionloom.train.checkpoint import write as saving
from visionloom.train.checkpoint.write import Saver
from visionloom.train.config import CheckpointConfig
from visionloom.train.observe import observer, status
from visionloom.train.observe.observer import Observer

SECONDS = 0.6


def save_slowly(layout: Layout, packs: list[TestPack], folder: Path) -> Any:
    """Three saves in the background, each due before the last one is written; runs on every rank of the pool."""
    stage, events, spans, steps = (
        stage_of(layout),
        list[dict[str, Any]](),
        list[tuple[float, float]](),
        list[float](),
    )
    saver = Saver(folder, CheckpointConfig(), events_of(events))
    write = saving._write

    def slowly(save: Any) -> None:
        began = time.monotonic()
        time.sleep(SECONDS)
        write(save)
        spans.append((began, time.monotonic()))

    with patch.object(saving, "_write", slowly):
        for step in range(1, 4):
            saver.save(stage, step, step, last=False)
            train(stage, layout, packs, 1)
            steps.append(time.monotonic())
        saver.finish(stage.topology)
    return events, spans, steps


def test_row_36_saves_wait_for_each_other_and_training_goes_on_meanwhile(
    pool: RankPool, tmp_path: Path
) -> None:
    layout = layout_of("data 2", DENSE)
    for events, spans, steps in pool.run(2, save_slowly, layout, packs_of("images"), tmp_path):
        assert [(event["event"], event["step"]) for event in events] == [
            ("checkpoint", step) for step in (1, 2, 3)
        ]
        assert all(end <= begin for (_, end), (begin, _) in pairwise(spans)), "no two at a time"
        assert all(step < end for step, (_, end) in zip(steps, spans, strict=True)), (
            "a step was made while each was written"
        )
        assert all(0 < event["waited_seconds"] <= event["stall_seconds"] for event in events)
        assert all(0 < event["mb_per_second"] < 1000 for event in events)


@pytest.mark.parametrize(("waited", "told"), [(0.2, False), (12.5, True)])
def test_row_36_a_save_that_holds_up_training_is_told(
    waited: float, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "current", status.RunStatus())
    said: list[str] = []
    watched = SimpleNamespace(event=lambda *_, **__: None, say=said.append)
    Observer.saved(
        watched, "checkpoint", step=1, folder="c/step-1", waited_seconds=waited, mb_per_second=3.5
    )  # type: ignore[arg-type]
    assert bool(said) == told == (waited > observer.SLOW_SECONDS)
    assert not said or (
        "waited 12.5 s for c/step-1" in said[0]
        and "3.5 MB/s" in said[0]
        and "checkpoint.every_steps" in said[0]
    )


@pytest.mark.parametrize("call", ["poll", "finish"])
def test_what_training_waits_for_between_steps_may_take_as_long_as_a_checkpoint(
    call: str, tmp_path: Path
) -> None:
    """Else a disk that flushes slowly would be a hang after watch.step_minutes; a poll with nothing to complete is no wait."""
    seen: list[str] = []

    def look(*_: Any) -> tuple[str, int]:
        seen.append(pulse.current.sign.activity)
        return "", 0

    saver = Saver(tmp_path, CheckpointConfig(), events_of([]))
    saver.pending = MagicMock(stalled=0.0, waited=0.0, started=0.0)
    saver.pending.thread.join = look
    with patch.object(Saver, "_outcome", look), pulse.current.during(pulse.STEP):
        saver.poll(MagicMock(), any_writing=True)
        assert not seen
        if call == "poll":
            saver.poll(MagicMock(), any_writing=False)
        else:
            saver.finish(MagicMock())
        assert pulse.current.sign.activity == pulse.STEP
    assert seen == [pulse.CHECKPOINT] * (1 if call == "poll" else 2)
