"""The same run in different layouts: the same global batches, the same losses over 20 optimizer steps.

Reference: one process.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from visionloom.tests.ranks import RankPool
from visionloom.tests.train.runs import DATASETS, configured, metrics, run_config, run_words
from visionloom.train.config import RunConfig

STEPS = 20
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "data2": (2, []),
    "tensor2": (2, ["parallel.tensor=2"]),
    "tensor2 without sequence parallelism": (2, ["parallel.tensor=2", "parallel.sequence=false"]),
    "tensor2 data2": (4, ["parallel.tensor=2"]),
    "pipeline2": (
        2,
        ["parallel.pipeline=2", "parallel.pipeline_layout=Et|tttL", "parallel.recompute=full"],
    ),
    "context2": (2, ["parallel.context=2"]),
    "tensor2 context2": (4, ["parallel.tensor=2", "parallel.context=2"]),
    "micro-batches of two packs": (1, ["phases.multimodal.micro_batch=2"]),
}

LATER = {"long": ("tensor", "context"), "sft": ("pipeline", "expert")}
"""Phases after the first, and the axes of two ranks that they have."""


QUICK = ("data2",)


def train(config: RunConfig) -> None:
    """Runs on every rank of the pool."""
    from visionloom.train.run import pretrain

    pretrain(config)


def run(
    pool: RankPool, data: Path, folder: Path, world_size: int, words: list[str]
) -> list[dict[str, Any]]:
    # What two context ranks need; it changes packs, so every layout has it.
    pool.run(
        world_size,
        train,
        run_config(data, folder, STEPS, world_size, "data.sample_token_multiple=4", *words),
    )
    return metrics(folder)


@pytest.fixture(scope="module")
def alone(
    pool: RankPool, demo_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    return run(pool, demo_data, tmp_path_factory.mktemp("alone"), 1, [])


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in LAYOUTS],
)
def test_a_layout_does_not_change_training(
    layout: str, alone: list[dict[str, Any]], pool: RankPool, demo_data: Path, tmp_path: Path
) -> None:
    world_size, words = LAYOUTS[layout]
    lines = run(pool, demo_data, tmp_path, world_size, words)
    assert len(lines) == len(alone) == STEPS
    for ours, reference in zip(lines, alone, strict=True):
        for counted in (
            "step",
            "tokens",
            "supervised_tokens",
            "visual_tokens",
            "patches",
            "samples",
            "packs",
            "padding_fraction",
        ):
            assert ours[counted] == reference[counted]
        assert abs(ours["loss"] - reference["loss"]) <= 1e-4
        assert ours["loss_by_source"] == pytest.approx(reference["loss_by_source"], abs=1e-4)
        assert ours["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-3)
        assert (
            1.0 <= ours["load_imbalance"] <= 1.2
        )  # the plan deals packs evenly, by their operations
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]


def test_a_phase_may_have_a_layout_of_its_own(
    alone: list[dict[str, Any]], pool: RankPool, demo_data: Path, tmp_path: Path
) -> None:
    lines = run(pool, demo_data, tmp_path, 2, ["phases.multimodal.parallel.tensor=2"])
    assert [line["loss"] for line in lines] == pytest.approx(
        [line["loss"] for line in alone], abs=1e-4
    )


@pytest.mark.long
def test_experts_on_ranks_of_their_own(pool: RankPool, demo_data: Path, tmp_path: Path) -> None:
    lines = [
        run(pool, demo_data, tmp_path / str(n), n, ["model=tiny_moe", f"parallel.expert={n}"])
        for n in (1, 2)
    ]
    assert [line["loss"] for line in lines[1]] == pytest.approx(
        [line["loss"] for line in lines[0]], abs=1e-4
    )
    for line in lines[1]:
        assert 1.0 <= line["router"]["load_mean_max"] <= line["router"]["load_max"] <= 8.0
        assert 0.0 < line["router"]["entropy"] <= math.log(8) + 1e-6


@pytest.mark.long
def test_a_change_of_layout_between_phases_changes_nothing(
    pool: RankPool, demo_data: Path, tmp_path: Path
) -> None:
    """A phase begins with the held-out losses that the one before ended with, both measured in their own layouts."""
    words = run_words(demo_data, tmp_path, 4, "model=tiny_moe", "data.sample_token_multiple=4")
    words += ["evaluation.phase_samples=8", "phases.multimodal.parallel.tensor=1"]
    words += ["phases.multimodal.micro_batch=1"]
    for later, layout in LATER.items():
        pool.run(4, train, configured(words, 4))
        words.remove(f"~phases.{later}")
        words += [f"phases.{later}.steps=4", f"phases.{later}.warmup_steps=1"]
        words += [f"phases.{later}.parallel.{axis}=2" for axis in layout]
    # Each phase has a start of its own: a start measures before its first step what it has not measured itself.
    pool.run(4, train, configured(words, 4))

    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    losses = [event["loss"] for event in events if event["event"] == "validation"]
    assert len(losses) == 6
    for ended, began in ((losses[1], losses[2]), (losses[3], losses[4])):
        assert ended.keys() == began.keys() == set(DATASETS)
        assert began == pytest.approx(ended, rel=1e-5)
        # Training moves them, so equal ones are no matter of course.
        assert ended != pytest.approx(losses[0], rel=1e-3)
