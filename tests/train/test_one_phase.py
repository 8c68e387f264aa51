"""Phases of one run, each trained by a start of its own (run.phase). Reference: the same run in one start, bit for bit."""

import json
from pathlib import Path

import pytest

from visionloom.common.errors import UserError
from visionloom.tests.ranks import RankPool
from visionloom.tests.train.runs import configured, metrics, run_words
from visionloom.tests.train.test_early_end import exact
from visionloom.tests.train.test_layouts import train
from visionloom.tests.train.test_lost import outcome


def two_phases(data: Path, folder: Path, *more: str) -> list[str]:
    """Words of a run of `align` and `multimodal`, three steps each."""
    words = [word for word in run_words(data, folder, 3) if word != "~phases.align"]
    align = [
        f"phases.align.{each}" for each in ("steps=3", "sequence_length=256", "warmup_steps=1")
    ]
    return [*words, *align, "phases.multimodal.warmup_steps=1", *more]


@pytest.mark.long
def test_phases_with_starts_of_their_own(pool: RankPool, demo_data: Path, tmp_path: Path) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    pool.run(2, train, configured(two_phases(demo_data, whole), 2))
    first, second = (
        configured(two_phases(demo_data, parted, f"run.phase={name}"), 2)
        for name in ("align", "multimodal")
    )
    said = "run.phase=multimodal: phase align before it is not trained to its end"
    assert said in pool.run(2, outcome, second)[0]
    for config in (first, first, second):
        assert pool.run(2, outcome, config) == ["done", "done"]
    assert exact(parted) == exact(whole)
    assert [line["phase"] for line in metrics(parted)] == ["align"] * 3 + ["multimodal"] * 3
    events = [json.loads(line) for line in (parted / "events.jsonl").read_text().splitlines()]
    assert [each["step"] for each in events if each["event"] == "resume"] == [3, 3]


def test_other_phases_need_not_fit_the_ranks(demo_data: Path, tmp_path: Path) -> None:
    """Three packs of a step do not divide among two ranks."""
    words = two_phases(demo_data, tmp_path, "phases.align.global_batch=3")
    with pytest.raises(UserError, match=r"phases\.align\.global_batch=3"):
        configured(words, 2)
    configured([*words, "run.phase=multimodal"], 2)
    with pytest.raises(UserError, match=r"run\.phase=lnog"):
        configured([*words, "run.phase=lnog"], 2)
