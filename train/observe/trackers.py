"""Weights & Biases and TensorBoard beside metrics.jsonl, for those who want them; training never depends on them."""

import importlib.util
import json
import os
import queue
import re
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from visionloom.common.atomic import replacing
from visionloom.common.errors import UserError
from visionloom.common.text import warn
from visionloom.train.config import LoggingConfig

PROJECT: Final = "visionloom"
"""The wandb project, unless WANDB_PROJECT names another."""
RUN_ID: Final = re.compile("[A-Za-z0-9_-]{1,64}")
LAST_SECONDS: Final = 15.0
"""Longest wait at the end for what wandb's process still has to do."""


class Trackers:
    """Hands each metrics line and each evaluation to the trackers that `logging` names; with none it does nothing."""

    def __init__(
        self, config: LoggingConfig, folder: Path, resolved_config: Mapping[str, Any], name: str
    ) -> None:
        """Start the trackers of a run in its folder; only the main rank may turn any on.

        Raises UserError if logging.tensorboard=true and the tensorboard package is missing.
        """
        if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise UserError(
                "logging.tensorboard=true needs the tensorboard package: pip install visionloom[tensorboard]"
            )
        self._folder = folder
        self._board_wanted = config.tensorboard
        self._board: Any = None
        self._wandb = _start_wandb(folder, resolved_config, name) if config.wandb else None

    def step(self, line: Mapping[str, Any]) -> None:
        """Record a line of metrics.jsonl."""
        self._record(dict(_numbers(line)), int(line["step"]))

    def evaluation(self, results: Mapping[str, Any]) -> None:
        """Record `{"step", "loss": {source: x}, "tasks": {name: {"accuracy": x, "n": n}}}`; tasks may be absent."""
        accuracies = {name: task["accuracy"] for name, task in results.get("tasks", {}).items()}
        found = {"evaluation": {"loss": results["loss"], "accuracy": accuracies}}
        self._record(dict(_numbers(found)), int(results["step"]))

    def close(self) -> None:
        """Write out what is pending."""
        if self._board is not None:
            try:
                self._board.close()
            except OSError as error:
                self._without_board(error)
        if self._wandb is not None:
            self._wandb.finish()

    def _record(self, values: dict[str, float], step: int) -> None:
        if self._board_wanted:
            try:
                self._board = self._board or self._start_board(step)
                for name, value in values.items():
                    self._board.add_scalar(name, value, step)
            except (
                OSError
            ) as error:  # of the writer's thread, which raises it here with the next value
                self._without_board(error)
        if self._wandb is not None:
            self._wandb.send({**values, "step": step})

    def _start_board(self, step: int) -> Any:
        """A writer that hides what an earlier start of the run recorded from `step` on."""
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self._folder / "tensorboard"), purge_step=step)

    def _without_board(self, error: OSError) -> None:
        self._board, self._board_wanted = None, False
        warn(
            f"warning: TensorBoard is off from here on, training goes on: {self._folder / 'tensorboard'}: {error.strerror or error}"
        )


class WandbProcess:
    """Sends lines to the process that speaks with wandb; no call waits for it but `finish`, for a time."""

    def __init__(self, folder: Path, start: Mapping[str, Any]) -> None:
        """Start the process; it goes on by itself, with what it was sent, if this one is killed."""
        command = [sys.executable, "-m", "visionloom.train.observe.wandb_process"]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "WANDB_SILENT": "true",
        }
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
        )
        self._folder = folder
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._sender = threading.Thread(target=self._send, name="visionloom-wandb", daemon=True)
        self._sender.start()
        self.send(start)

    def send(self, values: Mapping[str, Any]) -> None:
        """Leave a line for it."""
        self._lines.put(json.dumps(values, default=str) + "\n")

    def finish(self) -> None:
        """Let it upload what is left, for so long."""
        self._lines.put(None)
        try:
            self._process.wait(LAST_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, 9)
            self._process.wait()
            warn(
                f"warning: wandb has not taken all values: upload them later with wandb sync {self._folder}/wandb/*run-*"
            )

    def _send(self) -> None:
        """Write lines as fast as they are read; the pipe may be full or gone."""
        assert self._process.stdin is not None
        try:
            while (line := self._lines.get()) is not None:
                self._process.stdin.write(line)
                self._process.stdin.flush()
            self._process.stdin.close()
        except (OSError, ValueError):  # the process has ended, and has said why
            return


def _start_wandb(folder: Path, config: Mapping[str, Any], name: str) -> WandbProcess | None:
    """The process for a run; None where it cannot start."""
    try:
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        start = {
            "project": project,
            "name": name,
            "id": _run_id(folder),
            "dir": str(folder),
            "config": dict(config),
        }
        return WandbProcess(folder, start)
    except OSError as error:
        warn(f"warning: wandb is off from here on, training goes on: {error}")
        return None


def _run_id(folder: Path) -> str:
    """The run's wandb id: made once, kept in the run's folder, so that a resumed run goes on in the same one."""
    path = folder / "wandb" / "run_id"
    known = path.read_text(errors="replace").strip() if path.is_file() else ""
    if RUN_ID.fullmatch(known):
        return known
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write((made := uuid.uuid4().hex[:12]).encode())
    return made


def _numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a nested mapping, with names joined by "/"; `step` is left to the axis, text and null are left out."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and f"{prefix}{name}" != "step":
            yield f"{prefix}{name}", float(value)
