"""Every command of docs/slurm.md runs. References: bash for the shell's own words; stand-ins for the programs of SLURM."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from visionloom.launch.submit import HELP, run
from visionloom.launch.submitting.words import SubmitWords
from visionloom.tests.launch.guarding.test_claim import ROOT
from visionloom.tests.launch.submitting.test_submit import calls, no_folders

__all__ = ["calls", "no_folders"]  # fixtures
TEXT = (ROOT / "docs" / "slurm.md").read_text()
COMMANDS = [
    line for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()
]


def test_every_command_runs(
    calls: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In their order, in a folder that has our launch/ in it; SLURM's own programs must be called as it is written."""
    monkeypatch.chdir(calls)
    (calls / "launch").symlink_to(ROOT / "launch")
    (calls / "runs" / "mine").mkdir(parents=True)
    (calls / "runs" / "mine" / "status.json").write_text("{}\n")
    (calls / "bin" / "scontrol").write_text('#!/bin/bash\necho "$*" >> "$CALLS/scontrol"\n')
    assert len(COMMANDS) >= 12
    for number, line in enumerate(COMMANDS):
        # A second may not have passed since the last one.
        monkeypatch.setattr("time.strftime", lambda *_, number=number: str(number))
        words = shlex.split(line)
        if words[:2] == ["python", "launch/submit.py"]:
            assert run(words[2:]) == 0, line
        else:
            subprocess.run(["bash", "-e", "-c", line], check=True, stdout=subprocess.DEVNULL)
    assert (calls / "sbatch").read_text().count("\n") >= 1 + 3 + 1 + 1
    assert (calls / "runs" / "mine" / "stop").exists()
    assert "exec " in capsys.readouterr().out


def test_every_word_is_explained() -> None:
    for name in vars(SubmitWords()):
        assert f"{name}=" in TEXT and f"{name}=" in HELP, name
