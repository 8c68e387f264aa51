"""Accuracies at the end of a phase: those that an evaluation of the same weights has; none at its start."""

import json
from pathlib import Path
from typing import Any

from visionloom.tests.ranks import RankPool
from visionloom.tests.train.runs import metrics, run_config
from visionloom.train.config import RunConfig
from visionloom.train.run import evaluate, pretrain


def trained_and_evaluated(config: RunConfig) -> dict[str, Any]:
    """Train, evaluate, and return the tasks of the evaluation."""
    pretrain(config)
    tasks: dict[str, Any] = evaluate(config)["tasks"]
    return tasks


def test_tasks_at_the_end_of_a_phase(demo_data: Path, tmp_path: Path, pool: RankPool) -> None:
    words = [f"evaluation.{name}=3" for name in ("samples", "phase_answers", "max_new_tokens")]
    config = run_config(demo_data, tmp_path, 1, 1, *words, "phases.multimodal.warmup_steps=0")
    config.data.validation = {"vqa": config.data.validation["vqa"]}
    (tasks,) = pool.run(1, trained_and_evaluated, config)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    (measured,) = [event for event in events if event["event"] == "validation"]
    assert (measured["phase"], measured["step"], measured["loss"]) == ("multimodal", 1, {})
    assert measured["tasks"] == tasks
    assert sum(task["n"] for task in tasks.values()) == 3


def test_between_steps_they_change_nothing(demo_data: Path, tmp_path: Path, pool: RankPool) -> None:
    """Two data ranks: what one has updated must be with the other before it answers."""
    words = [f"evaluation.{name}=3" for name in ("samples", "phase_answers", "max_new_tokens")]
    losses = []
    for every in (0, 2):
        folder = tmp_path / str(every)
        config = run_config(demo_data, folder, 5, 2, *words, f"evaluation.every_steps={every}")
        config.data.validation = {"vqa": config.data.validation["vqa"]}
        pool.run(2, pretrain, config)
        losses.append([line["loss"] for line in metrics(folder)])
    assert losses[0] == losses[1]
    lines = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    assert [each["step"] for each in lines if each["event"] == "validation"] == [2, 4, 5]
