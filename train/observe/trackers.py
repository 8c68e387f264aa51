"""Weights & Biases and TensorBoard as well as metrics.jsonl; training never depends on them."""

import importlib.util
import json
import os
import queue
import re
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from visionloom.common.atomic import replacing
from visionloom.common.errors import UserError
from visionloom.common.text import warn
from visionloom.train.observe.logging_config import LoggingConfig

PROJECT: Final = "visionloom"
"""The wandb project, unless WANDB_PROJECT names another."""
RUN_ID: Final = re.compile("[A-Za-z0-9_-]{1,64}")
LAST_SECONDS: Final = 15.0
"""Longest wait at the end for wandb's process to send its last lines."""


class Trackers:
    """Passes each metrics line and each evaluation to the trackers that `logging` names; without any it does nothing."""

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
        self._purge: int | None = None
        self._wandb = start_wandb(folder, resolved_config, name) if config.wandb else None

    def step(self, line: Mapping[str, Any]) -> None:
        """Record a line of metrics.jsonl."""
        self._record(dict(_numbers(line)), int(line["step"]))

    def evaluation(self, results: Mapping[str, Any]) -> None:
        """Record `{"step", "loss": {source: x}, "tasks": {name: {"accuracy": x, "n": n}}}`; tasks may be absent."""
        accuracies = {}
        for name, task in results.get("tasks", {}).items():
            accuracies[name] = task["accuracy"]
        values = {"evaluation": {"loss": results["loss"], "accuracy": accuracies}}
        self._record(dict(_numbers(values)), int(results["step"]))

    def command(self, numbers: Mapping[str, float], step: int) -> None:
        """Record the numbers of evaluation.command by name."""
        values = {"evaluation": {"command": dict(numbers)}}
        self._record(dict(_numbers(values)), step)

    def samples(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]], step: int
    ) -> None:
        """Record texts as a table."""
        if self._board_wanted:
            lines = [columns, ["---"] * len(columns), *rows]
            # Cells of Markdown end at a bar or a line's end.
            text = "\n".join("|".join(map(_cell, line)) for line in lines)
            self._on_board(lambda board: board.add_text(name, text, step))
        if self._wandb is not None:
            table = {"columns": list(columns), "data": [list(row) for row in rows]}
            self._wandb.send({"tables": {name: table}, "step": step})

    def rewind(self, step: int) -> None:
        """Hide what was recorded after `step`, whose steps will be done again; wandb shows them twice, as it takes nothing back."""
        self._close_board()
        self._purge = step + 1

    def close(self) -> None:
        """Write the values that are pending."""
        self._close_board()
        if self._wandb is not None:
            self._wandb.finish()

    def _close_board(self) -> None:
        if self._board is not None:
            try:
                self._board.close()
            except OSError as error:
                self._without_board(error)
            self._board = None

    def _record(self, values: dict[str, float], step: int) -> None:
        """Pass values on to the trackers that are on."""

        def add(board: Any) -> None:
            for name, value in values.items():
                board.add_scalar(name, value, step)

        if self._board_wanted:
            self._on_board(add)
        if self._wandb is not None:
            self._wandb.send({**values, "step": step})

    def _on_board(self, add: Callable[[Any], None]) -> None:
        """Let `add` write to TensorBoard, which is turned off if that fails."""
        try:
            self._board = self._board or self._start_board()
            add(self._board)
        # Of the writer's thread, which raises it here with the next value.
        except OSError as error:
            self._without_board(error)

    def _start_board(self) -> Any:
        """Open a writer that hides the values of steps that will be done again."""
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self._folder / "tensorboard"), purge_step=self._purge)

    def _without_board(self, error: OSError) -> None:
        """Turn TensorBoard off, and say why."""
        self._board = None
        self._board_wanted = False
        warn(
            f"warning: TensorBoard is off from here on, training goes on: {self._folder / 'tensorboard'}: {error.strerror or error}"
        )


class WandbProcess:
    """Sends lines to the process that speaks with wandb; no call waits for it but `finish`, for a time."""

    def __init__(self, folder: Path, start: Mapping[str, Any]) -> None:
        """Start the process, which ends by itself with the lines that it was sent if this one is killed.

        Args:
            folder: of the run.
            start: the first line: arguments of wandb.init.
        """
        self._process = self._start_process()
        self._folder = folder
        # Unbounded: a line has 1 kB, and training must never wait for it.
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._sender = threading.Thread(target=self._send, name="visionloom-wandb", daemon=True)
        self._sender.start()
        self.send(start)

    @staticmethod
    def _start_process() -> subprocess.Popen[str]:
        """Start a process with this one's modules that reads lines."""
        command = [sys.executable, "-m", "visionloom.train.observe.wandb_process"]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "WANDB_SILENT": "true",
        }
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,  # so that Ctrl+C does not reach it, and its children can be ended
            stdout=subprocess.DEVNULL,
        )

    def send(self, values: Mapping[str, Any]) -> None:
        """Queue a line for the process."""
        self._lines.put(json.dumps(values, default=str) + "\n")

    def finish(self) -> None:
        """Wait at most LAST_SECONDS for the process to upload its lines."""
        self._lines.put(None)
        try:
            self._process.wait(LAST_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, 9)  # with wandb's own service, which would upload on
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


def start_wandb(folder: Path, config: Mapping[str, Any], name: str) -> WandbProcess | None:
    """Start the process for a run; None if it cannot start."""
    try:
        start = {
            "project": os.environ.get("WANDB_PROJECT", PROJECT),
            "name": name,
            "id": run_id(folder),
            "dir": str(folder),
            "config": dict(config),
        }
        return WandbProcess(folder, start)
    except OSError as error:
        warn(f"warning: wandb is off from here on, training goes on: {error}")
        return None


def run_id(folder: Path) -> str:
    """Return the run's wandb id: made once and kept in the run's folder, so that a resumed run continues the same one."""
    path = folder / "wandb" / "run_id"
    known = path.read_text(errors="replace").strip() if path.is_file() else ""
    if RUN_ID.fullmatch(known):
        return known
    made = uuid.uuid4().hex[:12]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(made.encode())
    return made


def _cell(text: str) -> str:
    """Return a text as a cell of a table in Markdown."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", "<br>")


def _numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of a nested mapping, with names joined by "/"; text and null are left out."""
    for name, value in values.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{path}/")
        elif isinstance(value, int | float) and path != "step":  # the axis of all others
            yield path, float(value)
