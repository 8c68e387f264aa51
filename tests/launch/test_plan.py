"""The command plan.py: its words, what it writes, and how it ends. The forecast is one made by hand."""

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from visionloom.forecast import run as runs
from visionloom.forecast.machine import machine
from visionloom.forecast.request import PlanRequest
from visionloom.forecast.results import PhaseForecast, RunForecast
from visionloom.launch.composing.explain import available
from visionloom.launch.configure import compose
from visionloom.launch.plan import main
from visionloom.launch.plan_commands import search
from visionloom.launch.plan_commands import table as plan_table
from visionloom.launch.plan_commands.table import stated_ranks
from visionloom.tests.forecast.made import good_forecast, run_forecast
from visionloom.tests.launch.guarding.test_exit import run_command

DOCS = Path(__file__).resolve().parents[2] / "docs"
RECIPE = "+recipe=full/qwen3vl_8b"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[PlanRequest]:
    """What the command asks for; the answer is a run that fits where it has 16 GPUs, and one that does not elsewhere."""
    requests = []

    def answer(request: PlanRequest, _: Any, is_brief: bool = False) -> RunForecast:
        requests.append(request)
        forecast = good_forecast() if request.world_size == 16 else run_forecast()
        return replace(forecast, world_size=request.world_size)

    def answer_all(several: list[PlanRequest], finished: Callable[[], None]) -> list[PhaseForecast]:
        # Each is done before the list is: the bar must not wait for all.
        forecasts = []
        for request in several:
            # Its passes are those of no layout in particular.
            forecasts.append(replace(answer(request, None).phases[0], timeline=()))
            finished()
        return forecasts

    monkeypatch.setattr(runs, "forecast_run", answer)
    monkeypatch.setattr(runs, "forecast_layouts", answer_all)
    # In this process, where the answers above are.
    monkeypatch.setattr(plan_table, "processes", lambda: ThreadPoolExecutor(1))
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
    assert "128,000" in shown.out and "note: the host waits" in shown.out
    assert shown.err == ""
    folder = Path("runs/full-qwen3vl-8b/plan")
    assert json.loads((folder / "plan.json").read_text())["can_run"]
    assert (folder / "plan.html").read_text().startswith("<!doctype html>")
    assert str(folder / "plan.html") in shown.out


def test_kernels_of_attention_are_named_where_they_are_not_the_default(
    asked: list[PlanRequest], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([RECIPE, "world=16", "gpu=b200", "model.attention=flash4"]) == 0
    (request,) = asked
    # Of the file; as_planned gives it the speed that the run asks for.
    assert request.machine == machine("b200") and request.config.model.attention == "flash4"
    planned = replace(good_forecast(), attention="flash4")
    monkeypatch.setattr(runs, "forecast_run", lambda *_: planned)
    assert "flash" not in capsys.readouterr().out
    assert main([RECIPE, "world=16", "model.attention=flash4"]) == 0
    assert "mine on 16 x h100 with flash4 (" in capsys.readouterr().out
    folder = Path("runs/full-qwen3vl-8b/plan")
    assert json.loads((folder / "plan.json").read_text())["attention"] == "flash4"
    assert "16 x h100 with flash4" in (folder / "plan.html").read_text()
    # A search says it too.
    monkeypatch.setattr(search, "TRIES", 1)
    assert main(["search", RECIPE, "world=16", "gpu=h200", "model.attention=flash3"]) == 0
    assert "on 16 x h200 with flash3 (" in capsys.readouterr().out


def test_a_run_that_does_not_fit(
    asked: list[PlanRequest], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([RECIPE, "world=8", "out=here/below"]) == 1
    assert (
        capsys.readouterr().err
        == "wrong: finetune: stage 0 takes 136.0 GiB of 79.6: parallel.recompute=full\n"
    )
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
        (
            [RECIPE, "world=8", "gpu=h10"],
            "gpu=h10 is unknown (did you mean h100?): use one of a100",
        ),
        ([RECIPE, "world=8", "gpu="], "gpu= is empty: give it a value or leave the word out"),
        ([RECIPE, "world=8", "memory=-3"], "memory=-3 must be above 0 and at most 4,096"),
        ([RECIPE, "world=8", "memory=big"], "memory=big is not a number: write memory=N"),
        ([RECIPE, "world=8", "memory=nan"], "memory=nan is not a number"),
        ([RECIPE, "world=8", "imbalance=0.5"], "imbalance=0.5 must be at least 1"),
        ([RECIPE, "world=8", "imbalance=inf"], "imbalance=inf must be a finite number"),
        ([RECIPE, "world=8", "phase=finetun"], "phase=finetun is unknown (did you mean finetune?)"),
        ([RECIPE, "world=8", "wrold=8"], "no such key: wrold (did you mean world?)"),
        ([RECIPE, "world=8", "gpus=h200"], "no such key: gpus (did you mean gpu?)"),
        ([RECIPE, "world=8", "+gpu=h200"], "+gpu has no plus: write gpu=h200"),
        ([RECIPE, "world=8", "gpu=a100"], "gpu=a100 is unknown (did you mean a100_80?): use"),
        (["serach", RECIPE, "world=8"], "serach is no command of plan.py (did you mean search?)"),
        (["search", RECIPE, "world=8", "out=x"], "out= is for a plan: a search writes no files"),
        ([RECIPE, "world=8", "out=~/x"], "out=~/x: the shell has not replaced ~"),
        (["world=8"], "no recipe: choose one with +recipe=NAME"),
        ([RECIPE, "world=7"], "7 ranks cannot hold tensor 2"),
        ([RECIPE, "search", "world=8"], "command line: cannot read 'search'"),
        (
            [RECIPE, "world=8", "gpu=b200", "model.attention=flash3"],
            "model.attention=flash3 cannot be planned: recipes/gpu/b200.yaml says no speed of",
        ),
        (
            ["search", RECIPE, "world=8", "gpu=a100_80", "model.attention=flash4"],
            "model.attention=flash4 cannot be planned: recipes/gpu/a100_80.yaml says no speed of",
        ),
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
    own = ["world=0", "memory=x", "imbalance=0", "gpu=tpu"]
    assert len(refused(capsys, RECIPE, *own)) == len(own)
    run = ["parallel.tensor=0", "phases.finetune.global_batch=0", "run.device=tpu"]
    assert len(refused(capsys, RECIPE, "world=8", *run)) == len(run)


def test_a_folder_that_cannot_be_written_is_known_before_the_work(
    asked: list[PlanRequest], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").write_text("")
    (line,) = refused(capsys, RECIPE, "world=8", "out=file/plan")
    assert line.startswith("error: out=file/plan cannot be written: Not a directory")
    # Without out= it is the run's own folder.
    (line,) = refused(capsys, RECIPE, "world=8", "run.folder=file/run")
    assert line.startswith("error: run.folder=file/run/plan cannot be written: Not a directory")
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


def test_the_table_has_every_recipe_at_its_stated_ranks(
    asked: list[PlanRequest], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["table", "docs/plans.md"]) == 1
    requests = {request.config.run.name: request.world_size for request in asked}
    assert len(requests) == len(available("recipe"))
    assert requests["full-qwen3vl-235b-a22b"] == 128 and requests["demo"] == 2
    rows = rows_of(Path("docs/plans.md"))
    # A recipe on 16 GPUs gets two phases that fit, all others one that does not.
    assert rows["full/qwen3vl_30b_a3b", "long"][-1] == "fits"
    row = rows["full/qwen3vl_8b", "finetune"]
    assert row[2:6] == ["8", "tensor 2, pipeline 4, data 2", "136.0", "4.000"]
    assert row[-1] == "does not fit"
    wrong = capsys.readouterr().err.splitlines()
    # Those on 16 GPUs fit.
    assert len(wrong) == sum(gpus != 16 for gpus in requests.values())
    assert wrong[0].startswith("wrong: demo: finetune: stage 0 takes 136.0 GiB of 79.6")


def test_a_recipe_that_cannot_be_built_does_not_stop_the_others(
    asked: list[PlanRequest], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan_table, "stated_ranks", lambda recipe: 7 if recipe == "demo" else 16)
    assert main(["table", "plans.md"]) == 1
    wrong = capsys.readouterr().err.splitlines()
    assert any(line.startswith("wrong: demo: phases.language.global_batch=4") for line in wrong)
    assert len(asked) > 5


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["table"], "plan.py table takes one word"),
        (["table", "a", "b"], "plan.py table takes one word"),
        (["table", "~/plans.md"], "table=~/plans.md: the shell has not replaced ~"),
    ],
)
def test_wrong_words_of_the_table(
    asked: list[PlanRequest], capsys: pytest.CaptureFixture[str], words: list[str], line: str
) -> None:
    (shown,) = refused(capsys, *words)
    assert shown.startswith(f"error: {line}") and asked == []


def rows_of(table: Path) -> dict[tuple[str, str], list[str]]:
    """The cells of a table of Markdown by recipe and phase."""
    lines = [line for line in table.read_text().splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {(row[0], row[1]): row for row in rows}


def test_the_table_of_the_documentation_is_of_todays_recipes() -> None:
    """Its numbers change with `make plans`; which recipes stand in it, and on how many GPUs, is compared here."""
    rows = rows_of(DOCS / "plans.md")
    shipped = {}
    for recipe in available("recipe"):
        ranks = stated_ranks(recipe)
        config = compose([f"+recipe={recipe}"], ranks)
        assert config is not None
        shipped |= {(recipe, phase): f"{ranks}" for phase in config.phases}
    assert {place: row[2] for place, row in rows.items()} == shipped
    assert {row[-1] for row in rows.values()} == {"fits"}


def test_a_search_shows_the_layouts_and_the_text_to_paste(
    asked: list[PlanRequest], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(search, "TRIES", 5)
    # Not a number of GPUs that the recipe's own layout would take.
    assert main(["search", "+recipe=full/qwen3vl_8b", "world=16", "gpu=h200"]) == 0
    # The best three once more, on their fullest packs.
    assert len(asked) == 5 + 3
    assert {request.phases for request in asked} == {("finetune",)}
    assert len({str(request.config.parallel) for request in asked}) == 5
    shown = capsys.readouterr().out
    assert "the fastest that fits" in shown and "5 were traced" in shown
    # What is to be pasted is a layout that a run takes.
    _, *pasted = shown.split("# layout ")
    assert len(pasted) == 3
    for text in pasted:
        assert text[2:].startswith("# @package _global_\nparallel:")


def test_a_search_in_which_nothing_fits(
    asked: list[PlanRequest], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(search, "TRIES", 2)
    assert main(["search", "+recipe=full/qwen3vl_8b", "world=8"]) == 1
    shown = capsys.readouterr().out
    assert "does not fit: needs 1" in shown and "# layout" not in shown


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([RECIPE], "world is missing"),
        ([RECIPE, "world=8", "phase=x"], "phase=x is unknown"),
        ([RECIPE, "world=8", "parallel.tensor=2"], "parallel.tensor: a search chooses layouts"),
        ([RECIPE, "world=8", "parallel=single"], "parallel: a search chooses layouts itself"),
        (["+recipe=full/qwen3vl_235b_a22b", "world=2"], "world=2 GPUs cannot hold qwen3vl"),
    ],
)
def test_wrong_words_of_a_search(
    asked: list[PlanRequest], capsys: pytest.CaptureFixture[str], words: list[str], line: str
) -> None:
    (shown,) = refused(capsys, "search", *words)
    assert shown.startswith(f"error: {line}") and asked == []
