"""Weights & Biases and TensorBoard beside metrics.jsonl, for those who want them; training never depends on them."""

import importlib.util
import logging
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from visionloom.common.errors import UserError
from visionloom.train.config import LoggingConfig

PROJECT: Final = "visionloom"
"""The wandb project, unless WANDB_PROJECT names another."""

logger = logging.getLogger(__name__)


class Trackers:
    """Hands each metrics line and each evaluation to the trackers that `logging` names; with none it does nothing."""

    def __init__(self, config: LoggingConfig, folder: Path, resolved_config: Mapping[str, Any], name: str) -> None:
        """Start the trackers of a run in its folder; only the main rank may turn any on.

        Raises UserError if logging.tensorboard=true and the tensorboard package is missing.
        """
        if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise UserError("logging.tensorboard=true needs the tensorboard package: pip install visionloom[tensorboard]")
        self._folder = folder
        self._board_wanted = config.tensorboard
        self._board: Any = None
        self._wandb = self._start_wandb(resolved_config, name) if config.wandb else None

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
            self._board.close()
        if self._wandb is not None:
            self._guard("finish")

    def _record(self, values: dict[str, float], step: int) -> None:
        if self._board_wanted:
            if self._board is None:
                self._board = self._start_board(step)
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._guard("log", {**values, "step": step})

    def _start_board(self, step: int) -> Any:
        """A writer that hides what an earlier start of the run recorded from `step` on."""
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self._folder / "tensorboard"), purge_step=step)

    def _start_wandb(self, config: Mapping[str, Any], name: str) -> Any:
        """A wandb run, offline unless the user is logged in; None if it cannot start."""
        try:
            import wandb

            mode: Any = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False, verify=False) else "offline")
            run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=name,
                id=self._run_id(),
                resume="allow" if mode == "online" else None,
                dir=str(self._folder),
                mode=mode,
                config=dict(config),
                settings=wandb.Settings(silent=True, console="off"),
            )
            # Steps come as values: wandb's own counter would refuse those that a resumed run takes again.
            run.define_metric("*", step_metric="step")
        except Exception as error:  # whatever it is, training matters more
            self._give_up(error)
            return None
        return run

    def _run_id(self) -> str:
        """The run's wandb id: made once, kept in the run's folder, so that a resumed run goes on in the same one."""
        path = self._folder / "wandb" / "run_id"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(uuid.uuid4().hex[:12])
        return path.read_text().strip()

    def _guard(self, method: str, *arguments: Any) -> None:
        try:
            getattr(self._wandb, method)(*arguments)
        except Exception as error:  # whatever it is, training matters more
            self._wandb = None
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        logger.warning("wandb is off from here on, training goes on: %s (WANDB_MODE=offline needs no network)", cause)


def _numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a nested mapping, with names joined by "/"; `step` is left to the axis, text and null are left out."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and f"{prefix}{name}" != "step":
            yield f"{prefix}{name}", float(value)
