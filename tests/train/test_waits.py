"""How often the host waits for the device in a step, with the project's own loop and step. Reference: the counter of waits.py."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NORM = "item: megatron/core/optimizer/clip_grads.py get_grad_norm_fp32"
SUMS = "cpu: train/step_sums.py totals"


def measured(ranks: int) -> Any:
    """What waits.py counts, in a process of its own: it replaces parts of torch."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / ".link"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "visionloom.tests.train.waits", str(ranks)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_dense_step_waits_for_the_norm_and_for_its_sums() -> None:
    """A whole turn of the loop of one of eight data-parallel ranks, its line of metrics included."""
    counted = measured(8)
    assert counted["waits"] == {NORM: 1, SUMS: 1}
    assert counted["collectives"]["c10d::allreduce_"] == 2, "of the norm, and of the sums"
