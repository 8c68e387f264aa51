"""TensorBoard and wandb beside the metrics: what they receive, how a run goes on, and that a fault stops nothing.

Reference: TensorBoard's own event reader; wandb offline, as it runs without an account.
"""

import importlib.util
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from visionloom.common.errors import UserError
from visionloom.train.config import LoggingConfig
from visionloom.train.trackers import Trackers

RESULTS = {"step": 2, "loss": {"captions": 0.5}, "tasks": {"read": {"accuracy": 0.75, "n": 4}}}


def line(step: int) -> dict[str, Any]:
    """A line of metrics.jsonl, cut short."""
    return {
        "step": step, "phase": "align", "loss": 1.0 / step, "loss_by_source": {"captions": 2.0}, "mfu": None, "skipped": False,
    }  # fmt: skip


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Wandb without a network, and without anyone's account."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def test_without_trackers_nothing_is_written(tmp_path: Path) -> None:
    trackers = Trackers(LoggingConfig(), tmp_path, {}, "run")
    trackers.step(line(1))
    trackers.evaluation(RESULTS)
    trackers.close()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_receives_numbers_and_hides_steps_taken_again(tmp_path: Path) -> None:
    for first, last in ((1, 3), (3, 4)):  # the second start resumes after step 2
        trackers = Trackers(LoggingConfig(tensorboard=True), tmp_path, {}, "run")
        for step in range(first, last + 1):
            trackers.step(line(step))
        trackers.close()
    trackers = Trackers(LoggingConfig(tensorboard=True), tmp_path, {}, "run")
    trackers.evaluation({**RESULTS, "step": 4})
    trackers.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(tmp_path / "tensorboard"))
    reader.Reload()
    assert set(reader.Tags()["scalars"]) == {
        "loss", "loss_by_source/captions", "skipped", "evaluation/loss/captions", "evaluation/accuracy/read",
    }  # fmt: skip
    assert reader.Scalars("evaluation/accuracy/read")[0].value == 0.75
    assert [found.step for found in reader.Scalars("loss")] == [1, 2, 3]


def test_missing_tensorboard_is_the_users_to_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"logging\.tensorboard=true .* pip install visionloom\[tensorboard\]"):
        Trackers(LoggingConfig(tensorboard=True), tmp_path, {}, "run")


@pytest.mark.usefixtures("offline")
def test_wandb_offline_keeps_the_runs_id(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for first in (1, 2):
        trackers = Trackers(LoggingConfig(wandb=True), tmp_path, {"run": {"seed": 1}}, "run")
        trackers.step(line(first))
        trackers.evaluation(RESULTS)
        trackers.close()
    identity = (tmp_path / "wandb" / "run_id").read_text()
    assert [record for record in caplog.records if record.name == "visionloom.train.trackers"] == []
    files = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert files and {file.name for file in files} == {f"run-{identity}.wandb"}


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_wandb_fault_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    calls: list[str] = []

    def method(name: str, answer: Any = None) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if name == broken:
                raise RuntimeError("no route to host\nat line 1")
            return answer

        return call

    run = SimpleNamespace(log=method("log"), finish=method("finish"), define_metric=method("define_metric"))
    fake = SimpleNamespace(init=method("init", run), login=method("login"), Settings=dict)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with caplog.at_level(logging.WARNING):
        trackers = Trackers(LoggingConfig(wandb=True), tmp_path, {}, "run")
        trackers.step(line(1))
        trackers.step(line(2))
        trackers.close()
    assert [record.getMessage().count("\n") for record in caplog.records] == [0]
    assert "no route to host" in caplog.text and "training goes on" in caplog.text
    assert calls.count(broken) == 1
