"""What a user sees while a run goes on: a live line on a terminal, plain lines anywhere else."""

import contextlib
import errno
import os
import sys
import time
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from visionloom.common.screen import PlainConsole
from visionloom.common.text import one_line, warn


class _Console(PlainConsole):
    """Where rich would end the program since nobody reads on."""

    def on_broken_pipe(self) -> None:
        """Show no more."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


class Screen:
    """Shows metrics lines; only the main rank shows anything, and nothing more once standard output takes no more."""

    def __init__(self, shown: bool, every_steps: int) -> None:
        self.console = _Console(file=sys.stdout, soft_wrap=True)
        self.shown, self.every_steps = shown, max(1, every_steps)
        self.live: Progress | None = None
        self.total, self.started, self.first = 0, 0.0, 0

    def say(self, text: str) -> None:
        """One line of news."""
        if self.shown:
            self._print(text)

    def begin(self, phase: str, done: int, total: int) -> None:
        """A phase starts, or goes on after `done` of its `total` steps."""
        self.total, self.started, self.first = total, time.perf_counter(), done
        if self.shown and self.console.is_terminal:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[news]}", markup=False),
                TimeRemainingColumn(),
            )
            self.live = Progress(*columns, console=self.console)
            self.live.add_task(one_line(phase), total=total, completed=done, news="")
            self.live.start()

    def step(self, line: dict[str, Any]) -> None:
        """One optimizer step is done."""
        if not self.shown:
            return
        if self.live is not None:
            self.live.update(
                self.live.task_ids[0], completed=line["phase_step"], news=summary(line)
            )
        elif line["phase_step"] % self.every_steps == 0 or line["phase_step"] == self.total:
            self._print(
                f"{line['phase']:<12} {line['phase_step']:>6}/{self.total}  {summary(line)}  {self._left(line)}"
            )

    def end(self) -> None:
        """The phase is over."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def _print(self, text: str) -> None:
        """Show a line; a log on a full disk, or a pipe that nobody reads, is no reason to end a run."""
        try:
            (self.live.console if self.live else self.console).print(text)
        except OSError as error:
            self.shown = False
            with contextlib.suppress(
                OSError, ValueError
            ):  # what is left in the stream would be an error when Python ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.console.file.fileno())
            warn(
                f"warning: standard output: {error.strerror}: nothing more is shown there, training goes on"
            )

    def _left(self, line: dict[str, Any]) -> str:
        pace = (time.perf_counter() - self.started) / max(1, line["phase_step"] - self.first)
        return f"{pace * (self.total - line['phase_step']):.0f} s left"


def summary(line: dict[str, Any]) -> str:
    """A metrics line in a few words."""
    skipped = "  SKIPPED: gradient not finite" if line["skipped"] else ""
    rate = max(line["lr"].values())
    return f"loss {line['loss']:.4f}  lr {rate:.2e}  {line['tokens_per_second']:,.0f} tokens/s  padding {line['padding_fraction']:.1%}{skipped}"
