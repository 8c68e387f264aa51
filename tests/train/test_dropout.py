"""Dropout of adapters is drawn from the seed and the step: a run that was interrupted goes on with the same losses.

Reference: the same run without interruption.
"""

from pathlib import Path

import pytest

from visionloom.tests.ranks import RankPool
from visionloom.tests.train.runs import metrics, run_config
from visionloom.tests.train.test_layouts import train

LORA = ("lora.rank=4", "lora.dropout=0.2", "phases.multimodal.trainable=[language]")


def losses(pool: RankPool, data: Path, folder: Path, *more: str) -> list[float]:
    pool.run(1, train, run_config(data, folder, 6, 1, "checkpoint.every_steps=2", *more))
    return [line["loss"] for line in metrics(folder)]


@pytest.mark.long
def test_an_interrupted_run_draws_the_same(pool: RankPool, demo_data: Path, tmp_path: Path) -> None:
    losses(pool, demo_data, tmp_path / "base")
    lora = (*LORA, f"init.checkpoint={tmp_path}/base/checkpoints/multimodal/step-00000006")
    whole = losses(pool, demo_data, tmp_path / "whole", *lora)
    again = losses(pool, demo_data, tmp_path / "again", *lora)
    assert whole == again
    last = tmp_path / "again" / "checkpoints" / "multimodal" / "step-00000006"
    for file in last.iterdir():
        file.unlink()
    assert losses(pool, demo_data, tmp_path / "again", *lora) == whole
    assert losses(pool, demo_data, tmp_path / "other", *lora, "lora.dropout=0.0") != whole
