"""The command check.py: a whole run without a GPU, a broken operation, ranks, and how it ends."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from visionloom.launch import check
from visionloom.launch.check_parts import training
from visionloom.launch.check_parts.operations import HOST, larger_twins, twins
from visionloom.launch.check_parts.ranks import Collectives, curve_difference, gather_results
from visionloom.launch.check_parts.report import document, markdown
from visionloom.launch.check_parts.results import (
    CheckReport,
    CheckResult,
    MeasuredSpeed,
    attempt,
)
from visionloom.launch.check_parts.training import STEPS, tiny_result
from visionloom.model.kernels import activation
from visionloom.parallel import topology as topologies
from visionloom.parallel.config import ParallelConfig
from visionloom.parallel.topology import Topology
from visionloom.tests.launch.guarding.test_exit import run_command
from visionloom.tests.ranks import RankPool


def test_a_run_without_a_gpu(tmp_path: Path) -> None:
    done = run_command("launch/check.py", "--report", str(tmp_path / "card.md"), "--device", "cpu")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "card.json").read_text())
    assert report["passed"] and all(each["passed"] for each in report["checks"])
    names = " ".join(each["name"] for each in report["checks"])
    for part in ("attention and its definition", "bf16 on cpu", "with a resume", "slope"):
        assert part in names

    assert report["machine"]["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert all(each["value"] > 0 for each in report["speeds"])
    # The table of ranks has the host on the screen only: the file is sent to others.
    (rank,) = report["ranks"]
    assert rank["host"] == "" and [each["name"] for each in rank["speeds"]] == [
        "product",
        "copy",
        "write",
        "read",
    ]
    assert "ranks before step 1" in done.stdout
    # It says what it did not do, on the screen and in both files.
    assert any("no GPU" in line for line in report["not_checked"])
    assert "not checked: GPU" in done.stdout
    assert "no GPU is visible" in (tmp_path / "card.md").read_text()


@pytest.fixture
def operations_only(topology: Topology, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command in this process, on the topology of the tests and without training."""
    monkeypatch.setattr(topologies, "start", lambda *_, **__: topology)
    monkeypatch.setattr(topologies, "stop", lambda: None)
    monkeypatch.setattr(training, "check_training", lambda _: [])


@pytest.mark.usefixtures("operations_only")
def test_a_broken_operation_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The control: the twin of SwiGLU is 1 % too large, the others are right."""
    broken = SimpleNamespace(silu=lambda x: F.silu(x) * 1.01)
    monkeypatch.setattr(activation, "F", broken)
    assert check.main(["--device", "cpu"]) == 1
    failures = [line for line in capsys.readouterr().err.splitlines() if "failed" in line]
    assert len(failures) == 1
    assert failures[0].startswith("failed: swiglu and its definition: difference 0.0")


@pytest.mark.usefixtures("operations_only")
def test_a_part_that_fails_does_not_end_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(_: Topology) -> list[CheckResult]:
        raise RuntimeError("no such\nkernel")

    monkeypatch.setattr(training, "check_training", fails)
    assert check.main(["--device", "cpu"]) == 1
    shown = capsys.readouterr()
    assert "failed: training: RuntimeError: no such kernel" in shown.err.replace("\\n", " ")
    assert "10 of 11 checks passed" in shown.out


def test_twins_of_a_gpu_are_compared_with_themselves_on_a_cpu() -> None:
    """What a GPU's owner runs has never seen a GPU here: at least its cases can be made."""
    failures = [case.result(HOST) for case in [*twins(), *larger_twins()]]
    assert [result.line for result in failures if not result.passed] == []


def test_collectives_and_layouts(topology: Topology, pool: RankPool) -> None:
    curve = tiny_result("cpu", topology).curve
    assert len(curve) == STEPS and curve[-1] < curve[0]
    for gathered in pool.run(2, on_ranks, curve):
        results = {result.name: result for result in gathered}
        assert len(results) == 8
        failed = {name for name, result in results.items() if not result.passed}
        # The control: rank 1 alone says that it failed, and all learn which rank it was.
        assert failed == {"a check of rank 1, rank 1"}


def on_ranks(curve: tuple[float, ...]) -> list[CheckResult]:
    topology = topologies.start(ParallelConfig(), HOST)
    results = [*Collectives(topology).check()]
    difference = partial(curve_difference, 2, curve, topology)
    results.append(attempt("tensor ranks", 1e-5, difference))
    results.append(CheckResult("a check of rank 1", float(topology.rank), 0.5))
    gathered = gather_results(results, topology)
    topologies.stop()
    return gathered


def test_a_collective_that_adds_wrongly_is_seen(topology: Topology) -> None:
    """The control of the arithmetic."""
    collectives = Collectives(topology)
    assert collectives.difference(collectives.own(2), 1, 1) == 0.0
    assert collectives.difference(collectives.own(2), 1, 2) == 1.0


def test_speeds_stand_beside_what_plans_assume() -> None:
    speed = MeasuredSpeed("copy", 2500.0, "GB/s", 2847.5, "memory_share")
    report = CheckReport({"links": "GPU0\nGPU1"}, "h100", speeds=[speed])
    assert document(report)["speeds"][0]["ratio"] == pytest.approx(0.878, abs=1e-3)
    assert "| copy | 2,500 GB/s | 2,848 | 0.88 | memory_share |" in markdown(report)
    assert replace(speed, assumed=None).ratio is None


def test_a_result_that_is_no_number_has_failed() -> None:
    assert not CheckResult("a", float("nan"), 1.0).passed
    assert not attempt("b", 1.0, lambda: 1 / 0).passed
    assert attempt("b", 1.0, lambda: 1 / 0).line == "b: ZeroDivisionError: division by zero"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["--device", "gpu"],
            "error: --device=gpu is unknown (did you mean cpu?): use one of auto, cpu, cuda",
        ),
        (["--gpu", "h10"], "error: --gpu=h10 is unknown"),
        (["--report", "."], "error: --report . is a folder: name a file in it"),
    ],
)
def test_a_wrong_word_is_one_line(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        check.main(words)
    assert stop.value.code == 2
    (shown,) = capsys.readouterr().err.splitlines()
    assert shown.startswith(line)


def test_the_file_of_a_card_is_that_of_its_name() -> None:
    def facts(*names: str) -> dict[str, Any]:
        return {"gpus": [{"name": name} for name in names]}

    assert check.file_of(facts("NVIDIA H100 80GB HBM3"), "cuda") == "h100"
    assert check.file_of(facts("NVIDIA L4"), "cuda") == check.file_of(facts(), "cuda") == ""
    assert check.file_of(facts("NVIDIA H100 80GB HBM3"), "cpu") == ""
