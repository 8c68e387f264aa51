"""DeepSpeed's ZeRO as the engine of real runs. Reference: the same runs on Megatron-core's, step for step."""

from pathlib import Path
from typing import Any

import pytest

from visionloom.tests.ranks import RankPool
from visionloom.tests.train.runs import metrics, run_config
from visionloom.tests.train.test_layouts import train

STEPS = 8
STAGES = {
    "1": ["stage=1"],
    "2": ["stage=2"],
    "3": ["stage=3"],
    "1 offloaded": ["stage=1", "offload_optimizer=cpu"],
    "2 offloaded": ["stage=2", "offload_optimizer=cpu"],
    "3 offloaded": ["stage=3", "offload_optimizer=cpu", "offload_parameters=cpu"],
}


def words_of(stage: str) -> list[str]:
    return ["parallel.engine=deepspeed", *(f"parallel.zero.{word}" for word in STAGES[stage])]


def losses(folder: Path) -> list[list[Any]]:
    return [[line["loss"], line["grad_norm"]] for line in metrics(folder)]


@pytest.fixture(scope="module")
def expected(pool: RankPool, demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("megatron")
    pool.run(2, train, run_config(demo_data, folder, STEPS, 2))
    return folder


@pytest.mark.parametrize("stage", list(STAGES))
def test_steps_are_megatrons(
    stage: str, pool: RankPool, demo_data: Path, expected: Path, tmp_path: Path
) -> None:
    pool.run(2, train, run_config(demo_data, tmp_path, STEPS, 2, *words_of(stage)))
    for ours, theirs in zip(losses(tmp_path), losses(expected), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
