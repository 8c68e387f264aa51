"""The command plan.py: its words, what it writes, and how it ends. The forecast is one made by hand."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from visionloom.forecast import run as runs
from visionloom.forecast.machine import machine
from visionloom.forecast.request import PlanRequest
from visionloom.forecast.results import RunForecast
from visionloom.launch.plan import main
from visionloom.tests.forecast.made import good_forecast, run_forecast
from visionloom.tests.launch.test_exit import run_command

RECIPE = "+recipe=full/qwen3vl_8b"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[PlanRequest]:
    """What the command asks for; the answer is a run that fits where it has 16 GPUs, and one that does not elsewhere."""
    requests = []

    def answer(request: PlanRequest, _: Any) -> RunForecast:
        requests.append(request)
        return good_forecast() if request.world_size == 16 else run_forecast()

    monkeypatch.setattr(runs, "forecast_run", answer)
    monkeypatch.chdir(tmp_path)
    return requests


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """The lines of a command that ends with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()


def test_a_run_that_fits(asked: list[PlanRequest], capsys: pytest.CaptureFixture[str]) -> None:
    words = [RECIPE, "world=16", "gpu=h200", "memory=100", "imbalance=1.5", "run.seed=3"]
    assert main(words) == 0
    (request,) = asked
    assert (request.world_size, request.gpu, request.imbalance) == (16, "h200", 1.5)
    assert request.machine.memory_gib == 100
    assert request.machine.memory_gbps == machine("h200").memory_gbps
    assert request.phases == ("finetune",) and request.config.run.seed == 3
    shown = capsys.readouterr()
    assert "128,000" in shown.out and shown.err == ""
    folder = Path("runs/full-qwen3vl-8b/plan")
    assert json.loads((folder / "plan.json").read_text())["can_run"]
    assert (folder / "plan.html").read_text().startswith("<!doctype html>")
    assert str(folder / "plan.html") in shown.out


def test_a_run_that_does_not_fit(
    asked: list[PlanRequest], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([RECIPE, "world=8", "out=here/below"]) == 1
    assert capsys.readouterr().err == "wrong: stage 0 takes 136.0 GiB of 79.6: parallel.recompute=full\n"
    assert sorted(path.name for path in Path("here/below").iterdir()) == ["plan.html", "plan.json"]
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([RECIPE], "world is missing: say how many GPUs the run has, world=N"),
        ([RECIPE, "world=0"], "world=0 must be at least 1 and at most 1,048,576"),
        ([RECIPE, "world=-8"], "world=-8 must be at least 1 and"),
        ([RECIPE, "world=abc"], "world=abc is not a whole number: write world=N"),
        ([RECIPE, "world="], "world= is not a whole number"),
        ([RECIPE, "world=8.5"], "world=8.5 is not a whole number"),
        ([RECIPE, "world=1e99"], "world=1e99 is not a whole number"),
        ([RECIPE, "world=8", "gpu=h10"], "gpu=h10 is unknown (did you mean h100?): use one of a100"),
        ([RECIPE, "world=8", "gpu="], "gpu= is empty: give it a value or leave the word out"),
        ([RECIPE, "world=8", "memory=-3"], "memory=-3 must be above 0 and at most 4,096"),
        ([RECIPE, "world=8", "memory=big"], "memory=big is not a number: write memory=N"),
        ([RECIPE, "world=8", "memory=nan"], "memory=nan is not a number"),
        ([RECIPE, "world=8", "imbalance=0.5"], "imbalance=0.5 must be at least 1"),
        ([RECIPE, "world=8", "imbalance=inf"], "imbalance=inf must be a finite number"),
        ([RECIPE, "world=8", "phase=finetun"], "phase=finetun is unknown (did you mean finetune?)"),
        ([RECIPE, "world=8", "wrold=8"], "no such key: wrold"),
        ([RECIPE, "world=8", "out=~/x"], "out=~/x: the shell has not replaced ~"),
        (["world=8"], "no recipe: choose one with +recipe=NAME"),
        ([RECIPE, "world=7"], "7 ranks cannot hold tensor 2"),
        ([RECIPE, "search", "world=8"], "command line: cannot read 'search'"),
    ],
)
def test_a_wrong_word_is_one_line(
    asked: list[PlanRequest], capsys: pytest.CaptureFixture[str], words: list[str], line: str
) -> None:
    (shown,) = refused(capsys, *words)
    assert shown.startswith(f"error: {line}")
    assert asked == [] and not Path("runs").exists()


def test_all_that_is_wrong_is_said_at_once(
    asked: list[PlanRequest], capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(refused(capsys, RECIPE, "world=0", "memory=x", "imbalance=0")) == 3
    layout = ["parallel.tensor=3", "phases.finetune.sequence_length=8191", "run.device=tpu"]
    lines = refused(capsys, RECIPE, "world=8", *layout)
    assert len(lines) >= 2


def test_a_folder_that_cannot_be_written_is_known_before_the_work(
    asked: list[PlanRequest], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").write_text("")
    (line,) = refused(capsys, RECIPE, "world=8", "out=file/plan")
    assert line.startswith("error: out=file/plan cannot be written: Not a directory")
    assert asked == []


def test_help_names_every_word(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], [], [RECIPE, "-h"]):
        assert main(words) == 0
        shown = capsys.readouterr().out
        assert "a100_80, b200, h100, h200" in shown
        for word in ("world=N", "gpu=NAME", "memory=GIB", "imbalance=X", "phase=NAME", "out=DIR"):
            assert word in shown


def test_a_run_can_be_shown_without_a_plan(
    asked: list[PlanRequest], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([RECIPE, "world=8", "--cfg", "job", "--package", "parallel"]) == 0
    assert "tensor: 2" in capsys.readouterr().out and asked == []


def test_wrong_words_are_refused_before_torch_is_imported() -> None:
    code = (
        "import sys\nfrom visionloom.launch.plan import main\ntry:\n    main(sys.argv[1:])\n"
        "finally:\n    print('torch' in sys.modules)"
    )
    done = run_command("-c", code, RECIPE, "world=7", PYTHONPATH=".link")
    assert done.returncode == 2 and done.stdout == "False\n"
    assert done.stderr.startswith("error: 7 ranks cannot hold")


def test_ctrl_c_is_one_line(
    asked: list[PlanRequest], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> RunForecast:
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "forecast_run", interrupted)
    monkeypatch.setattr("os._exit", sys.exit)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit) as stop:
        main([RECIPE, "world=8"])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "interrupted; start the same command again\n"
