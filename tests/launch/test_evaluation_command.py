"""evaluation.command without a model: how a command fails and ends, and that no recipe sets it.

Reference: the kernel, which says when the last process of a command has ended. test_evaluate.py has a command that succeeds.
"""

import os
import select
from pathlib import Path

import pytest

from visionloom.common.command import environment_alone
from visionloom.common.errors import UserError
from visionloom.launch.configure import check_program, compose
from visionloom.train.exchange.evaluation_command import EvaluationCommand


def fault_of(folder: Path, command: str, seconds: float = 600) -> str:
    """Return what is said of a command that fails, run without an export."""
    here = EvaluationCommand(command, folder / "evaluation", 7)
    here.clear()
    here.model.mkdir()
    with pytest.raises(UserError) as caught:
        here.run(seconds)
    assert not here.model.exists()
    return str(caught.value)


def test_a_command_ends_with_its_time(tmp_path: Path) -> None:
    """And so do the processes that it has started: the last writer of a pipe is gone."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    command = f"sh -c 'sleep 600 > {pipe} & echo begun; wait' {{model}} {{out}}"
    line = fault_of(tmp_path, command, seconds=1.0)
    assert "did not end within 0.0166667 min: raise evaluation.command_minutes" in line
    poll = select.poll()
    poll.register(reader, 0)
    # It waits until the writer ends; one that was not killed would live for ten minutes.
    assert poll.poll(60_000) == [(reader, select.POLLHUP)]
    os.close(reader)


def test_other_faults_are_a_line(tmp_path: Path) -> None:
    assert "cannot be started" in fault_of(tmp_path, f"{tmp_path} {{model}} {{out}}")
    assert "left no number" in fault_of(tmp_path, "true {model} {out}")
    assert "ended by signal 9" in fault_of(tmp_path, "sh -c 'kill -9 $$' {model} {out}")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "evaluation").symlink_to(tmp_path)
    with pytest.raises(UserError, match="is a link: remove it"):
        EvaluationCommand("", tmp_path / "linked" / "evaluation", 7).clear()


def test_a_command_is_checked_before_the_run() -> None:
    for command, expected in (
        ("lmms-eval --out {out}", "lacks {model}"),
        ("{model} {out}", "lacks {model}"),
        ("x '{model} {out}", "cannot be split into words: No closing quotation"),
    ):
        with pytest.raises(UserError) as caught:
            compose(["+recipe=demo", f"evaluation.command={command}"], 1)
        assert expected in str(caught.value) and "\n" not in str(caught.value)
    config = compose(["+recipe=demo", "evaluation.command=no-such-program {model} {out}"], 1)
    assert config is not None
    with pytest.raises(UserError, match="no program no-such-program"):
        check_program(config)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("evaluation: {command: 'touch {model} {out}'}", []),
        ("evaluation: {command: 'touch {model} {out}'}", ["evaluation={samples: 4}"]),
        ("evaluation: {command: '${oc.env:VISIONLOOM_COMMAND}'}", []),
        ("run: {name: a}", ["evaluation.command='touch {model} {out} ${run.name}'"]),
        (
            "evaluation: {command: '${data.datasets.text.path}'}",
            ["+data.datasets.text.path='touch {model} {out}'"],
        ),
    ],
)
def test_no_recipe_has_a_part_in_a_command(
    recipe: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VISIONLOOM_COMMAND", "touch {model} {out}")
    (tmp_path / "recipe").mkdir()
    path = tmp_path / "recipe" / "evil.yaml"
    path.write_text(f"# @package _global_\ndefaults: [/recipe/demo, _self_]\n{recipe}\n")
    start = ["+recipe=evil", "--config-dir", str(tmp_path)]
    with pytest.raises(UserError, match=r"evaluation\.command in a recipe is refused") as caught:
        compose([*start, *words], 1)
    assert "\n" not in str(caught.value)
    own = "echo a,b={model} 'c d' {out}"
    config = compose([*start, f"evaluation.command={own}"], 1)
    assert config is not None and config.evaluation.command == own


def test_a_command_is_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "VISIONLOOM_KEPT"):
        monkeypatch.setenv(name, "1")
    kept = environment_alone()
    assert "VISIONLOOM_KEPT" in kept
    assert not {"RANK", "LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID"} & set(kept)
