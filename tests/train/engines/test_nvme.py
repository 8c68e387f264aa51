"""Optimizer and weights in files of a fast disk. Reference: the same runs on Megatron-core's engine, step for step."""

from pathlib import Path
from typing import Any

import pytest

from visionloom.tests.ranks import RankPool
from visionloom.tests.train.engines.test_zero import agree, stopped_anew, weights_agree
from visionloom.tests.train.runs import run_config
from visionloom.tests.train.test_early_end import exact
from visionloom.tests.train.test_layouts import train

STEPS = 6
MODEL = "model.text.ffn_hidden_size=2304"
"""DeepSpeed keeps less than 1 MiB in memory: with this a rank's stretches of a layer's first matrix are larger."""


def words_of(path: Path, **places: str) -> list[str]:
    places = {"stage": "3", "nvme_path": str(path), "bucket_bytes": str(1 << 22)} | places
    return ["parallel.engine=deepspeed", *(f"parallel.zero.{name}={place}" for name, place in places.items())]


PLACES: dict[str, dict[str, str]] = {
    "optimizer": {"offload_optimizer": "nvme"},
    "both": {"offload_optimizer": "nvme", "offload_parameters": "nvme"},
    "parameters": {"offload_parameters": "nvme"},
}


@pytest.fixture(scope="module")
def megatrons(pool: RankPool, demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("megatron")
    config = run_config(demo_data, folder, STEPS, 2, MODEL)
    pool.run(2, stopped_anew, config, [], 0)
    return folder


@pytest.mark.long
@pytest.mark.parametrize("places", PLACES)
def test_steps_are_megatrons_and_go_on_exactly(
    places: str, megatrons: Path, pool: RankPool, demo_data: Path, tmp_path: Path
) -> None:
    words = [MODEL, *words_of(tmp_path / "disk", **PLACES[places])]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    pool.run(2, stopped_anew, run_config(demo_data, whole, STEPS, 2, *words), [], 0)
    agree(whole, megatrons)
    weights_agree(pool, whole, megatrons)
    config = run_config(demo_data, resumed, STEPS, 2, *words)
    assert pool.run(2, stopped_anew, config, [1], 2)[0].startswith("stopped by SIGTERM after step 3")
    pool.run(2, train, config)
    assert exact(resumed) == exact(whole)
    weights_agree(pool, resumed, whole, 0.0)
