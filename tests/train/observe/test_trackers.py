"""TensorBoard and wandb beside the metrics: what they receive, how a run goes on, and that a fault stops nothing.

Reference: TensorBoard's own event reader; wandb offline, as it runs without an account.
"""

import importlib.util
import re
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from visionloom.common.errors import UserError
from visionloom.tests.launch.submitting.cluster import wait_for
from visionloom.train.observe import trackers as trackers_module
from visionloom.train.observe import wandb_process
from visionloom.train.observe.logging_config import LoggingConfig
from visionloom.train.observe.trackers import Trackers

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
    """Of a start that resumes after step 2 and goes back to step 3 once, and of one that only evaluates."""
    for resumed, steps in ((0, [1, 2, 3]), (2, [3, 4]), (4, [])):
        trackers = Trackers(LoggingConfig(tensorboard=True), tmp_path, {}, "run")
        trackers.rewind(resumed)
        for step in steps:
            trackers.step(line(step))
        if resumed == 2:
            trackers.rewind(3)
            trackers.step({**line(4), "loss": 7.0})
        if resumed == 4:
            trackers.evaluation({**RESULTS, "step": 4})
            trackers.command({"results.mme.score": 0.5}, 4)
            trackers.samples("samples", ("question", "answer"), [["1 + 1?", "a | b\nc"]], 4)
        trackers.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(tmp_path / "tensorboard"))
    reader.Reload()
    assert set(reader.Tags()["scalars"]) == {
        "loss", "loss_by_source/captions", "skipped", "evaluation/loss/captions", "evaluation/accuracy/read",
        "evaluation/command/results.mme.score",
    }  # fmt: skip
    assert reader.Scalars("evaluation/accuracy/read")[0].value == 0.75
    (text,) = reader.Tensors("samples/text_summary")
    table = text.tensor_proto.string_val[0].decode()
    assert table == "question|answer\n---|---\n1 + 1?|a \\| b<br>c"
    losses = [(each.step, round(each.value, 3)) for each in reader.Scalars("loss")]
    assert losses == [(1, 1.0), (2, 0.5), (3, 0.333), (4, 7.0)]


def test_missing_tensorboard_is_the_users_to_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"logging\.tensorboard=true .* pip install visionloom\[tensorboard\]"
    ):
        Trackers(LoggingConfig(tensorboard=True), tmp_path, {}, "run")


@pytest.mark.usefixtures("offline")
def test_wandb_offline_keeps_the_runs_id(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for first in (1, 2):
        trackers = Trackers(LoggingConfig(wandb=True), tmp_path, {"run": {"seed": 1}}, "run")
        trackers.step(line(first))
        trackers.evaluation(RESULTS)
        trackers.close()
    identity = (tmp_path / "wandb" / "run_id").read_text()
    assert capfd.readouterr().err == ""
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert files and {file.name for file in files} == {f"run-{identity}.wandb"}
    assert [record for file in files for record in recorded(file)] == [
        (identity, 1),
        (identity, 2),
    ]


def test_tables_of_texts_are_wandbs() -> None:
    import wandb

    logged: list[dict[str, Any]] = []
    run = SimpleNamespace(log=logged.append)
    table = {"columns": ["question", "answer"], "data": [["1 + 1?", "2"]]}
    wandb_process.log(run, {"step": 3, "tables": {"samples": table}})
    assert logged[0]["step"] == 3 and isinstance(logged[0]["samples"], wandb.Table)
    assert logged[0]["samples"].data == [["1 + 1?", "2"]]


def recorded(file: Path) -> list[tuple[str, int]]:
    """Run and step of each loss in a file of wandb's: LevelDB's log format, which holds wandb's own messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, message = file.read_bytes(), 7, b""  # a header of the file's own
    identity, steps = "", list[tuple[str, int]]()
    while place + 7 <= len(content):
        _, size, kind = struct.unpack_from("<IHB", content, place)
        left = 32768 - place % 32768
        if left < 7 or kind == 0:  # the rest of a block
            place += left
            continue
        message += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            record, message = Record.FromString(message), b""
            identity = record.run.run_id or identity
            names = {(each.key or each.nested_key[0]): each for each in record.history.item}
            if "loss" in names:
                steps.append((identity, int(float(names["step"].value_json))))
    return steps


FAKE = """
import os, time
def _call(name):
    with open(os.environ["FAKE_CALLS"], "a") as file:
        file.write(name + "\\n")
    if name == os.environ["FAKE_BROKEN"]:
        raise RuntimeError("no route to host\\nat line 1")
    if name == os.environ["FAKE_SILENT"]:
        time.sleep(600)
class Run:
    def log(self, values): _call("log")
    def finish(self): _call("finish")
    def define_metric(self, *_, **__): _call("define_metric")
Settings = dict
def login(**_): _call("login")
def init(**_):
    _call("init")
    return Run()
"""


@pytest.fixture
def fake_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """A wandb that fails in one of its functions, or never comes back from it; returns the list of its calls."""

    def make(broken: str, silent: str) -> Path:
        (tmp_path / "fake").mkdir()
        (tmp_path / "fake" / "wandb.py").write_text(FAKE)
        monkeypatch.syspath_prepend(tmp_path / "fake")
        calls = tmp_path / "calls"
        for name, value in {"CALLS": str(calls), "BROKEN": broken, "SILENT": silent}.items():
            monkeypatch.setenv(f"FAKE_{name}", value)
        return calls

    return make


@pytest.mark.parametrize("held", [b"\xff\xfe", b"", b"a/../b", b"x" * 100])
def test_an_id_that_cannot_be_is_made_anew(tmp_path: Path, held: bytes) -> None:
    """A file that a full disk or another hand has left."""
    path = tmp_path / "wandb" / "run_id"
    path.parent.mkdir()
    path.write_bytes(held)
    made = trackers_module.run_id(tmp_path)
    assert (
        re.fullmatch("[0-9a-f]{12}", made)
        and trackers_module.run_id(tmp_path) == made == path.read_text()
    )


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_wandb_fault_is_one_warning(
    tmp_path: Path,
    fake_wandb: Callable[[str, str], Path],
    capfd: pytest.CaptureFixture[str],
    broken: str,
) -> None:
    calls = fake_wandb(broken, "")
    trackers = Trackers(LoggingConfig(wandb=True), tmp_path, {}, "run")
    trackers.step(line(1))
    trackers.step(line(2))
    trackers.close()
    (warning,) = capfd.readouterr().err.splitlines()
    assert "no route to host" in warning and "training goes on" in warning
    assert calls.read_text().split().count(broken) == 1


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("silent", ["login", "init", "log", "finish"])
def test_wandb_that_never_comes_back_holds_nothing_up(
    tmp_path: Path,
    fake_wandb: Callable[[str, str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    silent: str,
) -> None:
    """Row 35 of the fault matrix: no call waits for it, though its pipe is full; the end waits for a time that is given."""
    monkeypatch.delenv("WANDB_MODE")
    calls = fake_wandb("", silent)
    monkeypatch.setattr(trackers_module, "LAST_SECONDS", 2.0)
    trackers = Trackers(LoggingConfig(wandb=True), tmp_path, {}, "run")
    for step in range(1, 3000):
        trackers.step(line(step))
    # On a busy machine its imports alone take longer than the end waits.
    wait_for(calls.exists, 60)
    trackers.close()
    assert trackers._wandb is not None and trackers._wandb._process.poll() is not None
    (warning,) = capfd.readouterr().err.splitlines()
    assert "wandb sync" in warning and calls.read_text().split()[-1] == silent


@pytest.mark.parametrize("moment", ["start", "later", "close"])
def test_tensorboard_on_a_full_disk_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], moment: str
) -> None:
    """Row 35, TensorBoard's part. Its writer is a thread, whose error comes with a later value."""
    from torch.utils import tensorboard

    full = OSError(28, "No space left on device")

    class Writer:
        def __init__(self, *_: object, **__: object) -> None:
            if moment == "start":
                raise full

        def add_scalar(self, *_: object) -> None:
            if moment == "later":
                raise full

        def close(self) -> None:
            raise full

    monkeypatch.setattr(tensorboard, "SummaryWriter", Writer)
    trackers = Trackers(LoggingConfig(tensorboard=True), tmp_path, {}, "run")
    for step in range(1, 4):
        trackers.step(line(step))
    trackers.close()
    (warning,) = capsys.readouterr().err.splitlines()
    assert "TensorBoard is off" in warning and "No space left on device" in warning
