"""Whole training steps in bf16 on a CUDA device that is not there: nothing that a GPU would refuse, and a constant number of waits.

References: torch itself, whose FakeTensorMode refuses operations with tensors of two devices and rows that are not aligned, and
runs the shape rules of its own kernels; the trace of the same step on `meta`, from which a forecast is made.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from visionloom.tests.forecast.trace.imagined_cuda import UNPINNED, environment
from visionloom.tests.sources import ROOT

NORM = "item: megatron/core/optimizer/clip_grads.py get_grad_norm_fp32"
SUMS = "copy to the host: train/step_sums.py totals"
EXCHANGE = "synchronize: model/dispatch.py exchange"
CONSTANT = {NORM: 1, SUMS: 1}
STEPS: dict[str, dict[str, int]] = {
    "dense": CONSTANT,
    # Three micro-batches and six layers instead of one and four.
    "dense, more": CONSTANT,
    "mixture": CONSTANT,
    "mixture, more": CONSTANT,
    # With expert ranks the host asks once a layer how many rows come.
    "mixture, expert 2": CONSTANT | {EXCHANGE: 4},
    "mixture, expert 2, more": CONSTANT | {EXCHANGE: 3 * 6},
    "adapters": CONSTANT,
    "recompute full": CONSTANT,
    "tensor 2": CONSTANT,
    "context 2": CONSTANT,
    "activations in host memory": CONSTANT,
    "8B": CONSTANT,
}
QUICK = ("dense", "mixture, expert 2, more", "tensor 2")
OTHERS = [name for name in STEPS if name not in (*QUICK, "8B")]
MISTAKES = ("a mask on the host", "a look at a value", "unpinned memory", "experts 12 wide")


def reports(names: list[str], folder: Path) -> dict[str, Any]:
    """What tests/train/imagined_steps.py prints of these steps."""
    command = [sys.executable, "-m", "visionloom.tests.train.imagined_steps", *names]
    variables = environment(folder) | {"PYTHONPATH": str(ROOT / ".link")}
    done = subprocess.run(
        command, capture_output=True, text=True, env=variables, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Steps for each test run, in one process."""
    return reports([*QUICK, *MISTAKES], tmp_path_factory.mktemp("quick"))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The other steps."""
    return reports(OTHERS, tmp_path_factory.mktemp("others"))


def check(name: str, report: dict[str, Any]) -> None:
    """Fail where a step was refused, waits as it should not, or is not what a forecast is made from."""
    assert "error" not in report, report
    assert report["mixed"] == 0
    assert report["waits"] == report["waits of the forecast"] == STEPS[name]
    assert report["launches that differ"] == []
    assert report["same flops"]
    own, forecast = report["peaks"]
    assert own == pytest.approx(forecast, rel=1e-3)


@pytest.mark.parametrize("name", QUICK)
def test_a_step_is_one_that_a_gpu_can_run(name: str, quick: dict[str, Any]) -> None:
    check(name, quick[name])


@pytest.mark.long
@pytest.mark.parametrize("name", OTHERS)
def test_another_step_is_one_that_a_gpu_can_run(name: str, others: dict[str, Any]) -> None:
    check(name, others[name])


@pytest.mark.long
def test_the_whole_8b_waits_as_often_as_a_tiny_model(tmp_path: Path) -> None:
    """Rank 0 of 8 in the recipe's layout: all layers, two micro-batches of 8,192 tokens."""
    check("8B", reports(["8B"], tmp_path)["8B"])


def test_a_tensor_of_the_host_is_refused(quick: dict[str, Any]) -> None:
    assert "found at least two devices, cuda:0 and cpu" in quick["a mask on the host"]["error"]


def test_rows_that_are_not_aligned_are_refused(quick: dict[str, Any]) -> None:
    assert "to be multiple of 16 bytes, got 12" in quick["experts 12 wide"]["error"]


def test_a_look_at_a_value_is_counted(quick: dict[str, Any]) -> None:
    """In each of three micro-batches."""
    looks = {"item: tests/forecast/imagined.py host_wait": 3}
    assert quick["a look at a value"]["waits"] == CONSTANT | looks


def test_a_copy_from_memory_that_is_not_pinned_is_counted(quick: dict[str, Any]) -> None:
    """Which a forecast cannot know."""
    report = quick["unpinned memory"]
    assert report["waits"].keys() - CONSTANT.keys() == {f"{UNPINNED}: parallel/device.py to_device"}
    assert report["waits of the forecast"] == CONSTANT
