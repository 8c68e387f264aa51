"""run.plan=true: which card is planned for, what is refused, and that nothing of the run is touched before."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from visionloom.common.errors import UserError
from visionloom.forecast.machine import machine, machine_names
from visionloom.forecast.results import RunForecast
from visionloom.forecast.show.document import document
from visionloom.launch import environment
from visionloom.launch.configure import compose, start
from visionloom.launch.plan_commands.first import (
    check_plan,
    is_of,
    plan_of,
    words_of_card,
    words_of_memory,
)
from visionloom.tests.forecast.made import good_forecast, run_forecast
from visionloom.train.config import RunConfig

WORDS = ["+recipe=demo", "run.plan=true"]
CARDS = {
    "NVIDIA A100-SXM4-80GB": "a100_80",
    "NVIDIA A100 80GB PCIe": "a100_80",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100 NVL": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "NVIDIA GeForce RTX 4090": "",
    "NVIDIA A100-SXM4-40GB": "",
    "NVIDIA GB200": "",
}
"""Names that drivers give, and the file about each."""


def config_of(*words: str) -> RunConfig:
    config = compose([*WORDS, *words], 1)
    assert config is not None
    return config


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The planner's command lines; it answers with a run that fits on two ranks and with none elsewhere."""
    lines = []

    def answer(command: list[str], env: dict[str, str], **_: Any) -> Any:
        lines.append(command)
        assert not {"RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"} & set(env)
        words = dict(word.partition("=")[::2] for word in command)
        forecast = good_forecast() if words["world"] == "2" else run_forecast()
        return planned(forecast, Path(words["out"]))

    monkeypatch.setattr(subprocess, "run", answer)
    return lines


def planned(forecast: RunForecast, folder: Path) -> Any:
    """Do what the planner does with a forecast."""
    (folder / "plan.json").write_text(json.dumps(document(forecast)))
    return subprocess.CompletedProcess([], 0 if forecast.can_run else 1, "", "")


@pytest.mark.parametrize("card", CARDS)
def test_a_card_has_its_file(card: str) -> None:
    fitting = [name for name in machine_names() if is_of(name, card)]
    assert fitting == ([CARDS[card]] if CARDS[card] else [])


def test_the_driver_says_which_card_and_how_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(*_: Any, **__: Any) -> Any:
        lines = "NVIDIA H100 80GB HBM3, 81559\nNVIDIA H100 80GB HBM3, 81559\n"
        return subprocess.CompletedProcess([], 0, lines, "")

    monkeypatch.setattr(subprocess, "run", answer)
    assert words_of_card("") == ["gpu=h100", "memory=79.65"]
    assert words_of_card("h200") == ["gpu=h200", "memory=79.65"]


def test_a_card_that_nobody_knows_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(
        UserError, match=r"^run.plan=true: no file .* run.gpu=NAME, NAME one of a10"
    ):
        words_of_card("")
    with pytest.raises(UserError, match=r"^run.gpu=h10 is unknown \(did you mean h100\?\)"):
        words_of_card("h10")
    assert words_of_card("h100") == ["gpu=h100"]


def test_ranks_on_cpus_share_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    gpu, memory = words_of_memory("bf16")
    assert words_of_memory("auto") == [gpu, memory, "run.precision=fp32"]
    gib = float(memory.removeprefix("memory=")) - machine(gpu.removeprefix("gpu=")).reserved_gib
    assert gib * 4 == pytest.approx(environment.memory_bytes() / 2**30, rel=1e-3)


def test_a_run_that_fits_says_what_it_takes(
    commands: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, value)
    check_plan(config_of(), WORDS)
    _, first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("plan of short: 68.0 of 80.0 GiB (predicted")
    assert second.startswith("plan of long")
    (command,) = commands
    assert command[2:4] == WORDS


def test_a_run_that_does_not_fit_is_refused_in_one_line(commands: list[list[str]]) -> None:
    with pytest.raises(UserError) as refusal:
        check_plan(config_of(), WORDS)
    (line,) = refusal.value.lines
    assert "stage 0 takes 136.0 GiB of 79.6: parallel.recompute=full" in line
    assert "run.plan=false" in line


def test_other_ranks_and_runs_that_do_not_ask_start_no_planner(
    commands: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_plan(config_of("run.plan=false"), WORDS)
    monkeypatch.setenv("RANK", "1")
    check_plan(config_of(), WORDS)
    assert commands == []


def test_a_planner_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(*_: Any, **__: Any) -> Any:
        return subprocess.CompletedProcess([], 1, "", "Traceback\nValueError: x\x1b[2J")

    monkeypatch.setattr(subprocess, "run", answer)
    with pytest.raises(UserError) as refusal:
        check_plan(config_of(), WORDS)
    (line,) = refusal.value.lines
    assert line.startswith(r"run.plan=true: no plan could be made: ValueError: x\x1b[2J:")


def test_a_refused_start_begins_nothing(
    commands: list[list[str]],
    demo_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("VISIONLOOM_DEMO_DATA", str(demo_data))
    folder = tmp_path / "run"
    started = []
    words = [*WORDS, f"run.folder={folder}"]
    with pytest.raises(SystemExit, match="2"):
        start(started.append, words)
    assert started == [] and not folder.exists()
    assert capsys.readouterr().err.startswith(
        "error: run.plan=true: finetune: stage 0 takes 136.0 GiB"
    )
    # An evaluation holds no gradients and no optimizer: the plan is none of it.
    start(started.append, words, trains=False)
    assert len(started) == 1


def test_the_planner_itself_is_asked() -> None:
    """By its real command, which cannot build what only it is told to."""
    with pytest.raises(UserError, match=r"^run.plan=true: no plan could be made: .* 3 data-par"):
        plan_of(["+recipe=demo", "gpu=h100", "world=3"])
