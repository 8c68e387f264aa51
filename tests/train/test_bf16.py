"""Runs in bf16 on CPUs: resumed bit for bit, and with the losses of fp32 within a bound.

References: the same run without interruption; the same run in fp32.
"""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from visionloom.tests.ranks import RankPool
from visionloom.tests.train.runs import metrics, run_config
from visionloom.tests.train.test_layouts import train
from visionloom.tests.train.test_resume import checkpoint_tensors

RANKS, STEPS, HALF = 2, 6, 3
EXACT = ("step", "loss", "loss_by_source", "grad_norm", "lr", "tokens", "samples", "data_cursor")
BOUND = 0.002
"""Of losses, relative, over six steps; 0.0004 measured for the dense model and 0.0003 for the mixture."""


class Runs(NamedTuple):
    """Folders of three runs of one model."""

    wide: Path
    """In fp32."""
    whole: Path
    """In bf16."""
    resumed: Path
    """In bf16, resumed half-way."""


@pytest.fixture(scope="module", params=["tiny", pytest.param("tiny_moe", marks=pytest.mark.long)])
def runs(
    request: pytest.FixtureRequest,
    pool: RankPool,
    demo_data: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Runs:
    folder = tmp_path_factory.mktemp("bf16")
    made = Runs(folder / "wide", folder / "whole", folder / "resumed")

    def run(into: Path, precision: str) -> None:
        words = (f"model={request.param}", f"run.precision={precision}")
        every = f"checkpoint.every_steps={HALF}"
        pool.run(RANKS, train, run_config(demo_data, into, STEPS, RANKS, *words, every))

    run(made.wide, "fp32")
    run(made.whole, "bf16")
    shutil.copytree(made.whole, made.resumed)
    shutil.rmtree(made.resumed / "checkpoints" / "multimodal" / f"step-{STEPS:08d}")
    run(made.resumed, "bf16")
    return made


def test_a_resumed_run_has_the_same_bits(runs: Runs, pool: RankPool) -> None:
    """Weights in bf16 are rounded from those in fp32, which a checkpoint holds."""
    events = [json.loads(line) for line in (runs.resumed / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "resume"] == [HALF]
    lines, expected = metrics(runs.resumed), metrics(runs.whole)
    assert len(lines) == STEPS
    for line, other in zip(lines, expected, strict=True):
        assert [line[key] for key in EXACT] == [other[key] for key in EXACT]

    ours, theirs = (
        pool.run(1, checkpoint_tensors, folder)[0] for folder in (runs.resumed, runs.whole)
    )
    assert ours.keys() == theirs.keys() and len(ours) > 100
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def test_losses_are_those_of_fp32(runs: Runs) -> None:
    """Not the same: the arithmetic is another."""
    narrow, wide = (
        [line["loss"] for line in metrics(folder)] for folder in (runs.whole, runs.wide)
    )
    assert narrow != wide
    assert narrow == pytest.approx(wide, rel=BOUND)
