"""The screen of a run: a live line on a terminal, plain lines anywhere else."""

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
    """A console whose closed pipe is an error of its own; rich would end the program."""

    def on_broken_pipe(self) -> None:
        """Show no more."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


class Screen:
    """Shows metrics lines; only the main rank shows anything, and nothing more once standard output takes no more."""

    def __init__(self, shown: bool, every_steps: int) -> None:
        self.console = _Console(file=sys.stdout, soft_wrap=True)
        """Show nothing unless `shown`; without a terminal a line every `every_steps` steps."""
        self.shown = shown
        self.every_steps = max(1, every_steps)
        self.live: Progress | None = None
        self.total = 0
        self.started = 0.0
        self.first = 0

    def say(self, text: str) -> None:
        """Show a line of news."""
        if self.shown:
            self._print(text)

    def begin(self, phase_name: str, done: int, total: int) -> None:
        """Begin a phase, of whose `total` steps `done` are done."""
        self.total = total
        self.started = time.perf_counter()
        self.first = done
        # In a file or a pipe a bar would be one line for each of its updates.
        if self.shown and self.console.is_terminal:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[news]}", markup=False),
                TimeRemainingColumn(),
            )
            self.live = Progress(*columns, console=self.console)
            self.live.add_task(one_line(phase_name), total=total, completed=done, news="")
            self.live.start()

    def step(self, line: dict[str, Any]) -> None:
        """Show the metrics of an optimizer step."""
        if not self.shown:
            return
        done = line["phase_step"]
        if self.live is not None:
            self.live.update(self.live.task_ids[0], completed=done, news=summary(line))
        elif done % self.every_steps == 0 or done == self.total:
            progress = f"{line['phase']:<12} {done:>6}/{self.total}"
            self._print(f"{progress}  {summary(line)}  {self._left(done)}")

    def end(self) -> None:
        """End the phase."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def _print(self, text: str) -> None:
        """Show a line; a log on a full disk, or a pipe that nobody reads, is no reason to end a run."""
        try:
            (self.live.console if self.live else self.console).print(text)
        except OSError as error:
            self.shown = False
            # Bytes left in the stream would be an error when Python ends: they go to /dev/null.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.console.file.fileno())
            warn(
                f"warning: standard output: {error.strerror}: nothing more is shown there, training goes on"
            )

    def _left(self, done: int) -> str:
        """Estimate the time left by the mean pace of this start."""
        seconds = time.perf_counter() - self.started
        pace = seconds / max(1, done - self.first)
        return f"{pace * (self.total - done):.0f} s left"


def summary(line: dict[str, Any]) -> str:
    """Return a metrics line in a few words."""
    skipped = "  SKIPPED" if line["skipped"] else ""
    rate = max(line["lr"].values())  # groups may differ: the largest is the one to watch
    return (
        f"loss {line['loss']:.4f}  lr {rate:.2e}"
        f"  {line['tokens_per_second']:,.0f} tokens/s"
        f"  padding {line['padding_fraction']:.1%}{skipped}"
    )
