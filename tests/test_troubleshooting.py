"""Every command of docs/troubleshooting.md is run, and every message that it quotes is one of the program's.

Reference: the exit codes of the commands, and the texts in the sources.
"""

import json
import os
import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from visionloom.forecast import run as forecasts
from visionloom.launch import data, plan
from visionloom.launch.configure import compose
from visionloom.tests.forecast.made import good_forecast
from visionloom.tests.ranks import RankPool
from visionloom.tests.sources import ROOT, sources
from visionloom.tests.train.runs import configured, run_words
from visionloom.train.config import RunConfig

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
COMMANDS = [
    line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()
]
TRAIN = "torchrun --standalone --nproc-per-node 2 launch/pretrain.py +recipe=demo "
TRAINING = [line for line in COMMANDS if TRAIN in line]
SHELL = [line for line in COMMANDS if "launch/" not in line]
STEPS = 12


def own_words(command: str) -> list[str]:
    """The words of a training command after its recipe."""
    return shlex.split(command.partition(TRAIN)[2])


def train_offline(config: RunConfig) -> None:
    """Train without wandb's network (runs in the pool)."""
    from visionloom.train.run import pretrain

    os.environ["WANDB_MODE"] = "offline"
    try:
        pretrain(config)
    finally:
        del os.environ["WANDB_MODE"]


@pytest.fixture(scope="module")
def place(pool: RankPool, demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `runs/` as after `make demo`, by one run with the words of all training commands."""
    folder = tmp_path_factory.mktemp("place")
    run = folder / "runs" / "demo"
    run.mkdir(parents=True)
    (folder / "runs" / "demo-data").symlink_to(demo_data)
    words = [word for command in TRAINING for word in own_words(command)]
    pool.run(2, train_offline, configured([*run_words(demo_data, run, STEPS), *words], 2))
    # What only a run in trouble leaves; the tests of each look at it.
    (run / "status.json").write_text('{"state": "done"}\n')
    (run / "hang").mkdir()
    (run / "hang" / "rank-00000.txt").write_text("x")
    with (run / "events.jsonl").open("a") as file:
        for kind in ("slow_rank", "bad_step"):
            file.write(json.dumps({"time": 1.0, "event": kind}) + "\n")
    return folder


def test_the_training_commands_have_left_what_they_ask_for(place: Path) -> None:
    run = place / "runs" / "demo"
    assert len(TRAINING) >= 7
    assert len(list((run / "profile").iterdir())) == 2
    assert [step.name for step in (run / "checkpoints" / "multimodal").iterdir()] == [
        "step-00000012"
    ]


@pytest.mark.parametrize("command", TRAINING)
def test_a_training_command_is_composed(command: str) -> None:
    config = compose(["+recipe=demo", *own_words(command)], 2)
    assert config is not None and config.run.folder == "runs/demo"


@pytest.mark.parametrize("command", SHELL)
def test_a_command_of_the_shell(command: str, place: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", command], cwd=place, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout or done.stderr or command.startswith("touch ")


@pytest.mark.parametrize(
    "command", [line for line in COMMANDS if line.startswith("python launch/")]
)
def test_a_command_of_ours(command: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, a plan with a forecast made by hand: tests/forecast makes real ones."""
    monkeypatch.chdir(place)

    def answer(request: Any, *_: Any, **__: Any) -> Any:
        return replace(good_forecast(), world_size=request.world_size)

    monkeypatch.setattr(forecasts, "forecast_run", answer)
    _, program, *words = shlex.split(command)
    programs = {"launch/data.py": data.main, "launch/plan.py": plan.main}
    assert programs[program](words) == 0


def test_commands_stand_in_blocks_alone() -> None:
    """So that all of them are run; each line of a block is one command."""
    assert sorted(COMMANDS) == sorted({*TRAINING, *SHELL, *(c for c in COMMANDS if c.startswith("python launch/"))})  # fmt: skip
    text = re.sub(r"```sh\n.*?```", "", PAGE, flags=re.DOTALL)
    assert not re.search(r"`(python |torchrun -|wandb sync|tensorboard -|cat |grep |touch )", text)


def quoted() -> list[str]:
    """What visionloom says: code in the second column of the tables, cut at the parts that vary."""
    rows = [line.split(" | ") for line in PAGE.splitlines() if line.count(" | ") == 2]
    texts = [text for row in rows for text in re.findall(r"`([^`]+)`", row[1])]
    return [piece for text in texts for piece in text.split("…") if len(piece.strip()) > 2]


def test_messages_are_the_programs() -> None:
    joined = "\n".join(source.text for source in sources())
    # Messages are built of several literals, with values between.
    flat = re.sub(r'"\s*\n?\s*f?"', "", joined)
    assert len(quoted()) > 30
    assert [text for text in quoted() if text not in flat] == []
