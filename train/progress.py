"""What a user sees while a run goes on: a live line on a terminal, plain lines anywhere else."""

import sys
import time
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from visionloom.common.screen import PlainConsole
from visionloom.common.text import one_line


class Screen:
    """Shows metrics lines; only the main rank shows anything."""

    def __init__(self, shown: bool, every_steps: int) -> None:
        self.console = PlainConsole(file=sys.stdout, soft_wrap=True)
        self.shown, self.every_steps = shown, max(1, every_steps)
        self.live: Progress | None = None
        self.total, self.started, self.first = 0, 0.0, 0

    def say(self, text: str) -> None:
        """One line of news."""
        if self.shown:
            (self.live.console if self.live else self.console).print(text)

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
            self.live.update(self.live.task_ids[0], completed=line["phase_step"], news=summary(line))
        elif line["phase_step"] % self.every_steps == 0 or line["phase_step"] == self.total:
            self.console.print(f"{line['phase']:<12} {line['phase_step']:>6}/{self.total}  {summary(line)}  {self._left(line)}")

    def end(self) -> None:
        """The phase is over."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def _left(self, line: dict[str, Any]) -> str:
        pace = (time.perf_counter() - self.started) / max(1, line["phase_step"] - self.first)
        return f"{pace * (self.total - line['phase_step']):.0f} s left"


def summary(line: dict[str, Any]) -> str:
    """A metrics line in a few words."""
    skipped = "  SKIPPED: gradient not finite" if line["skipped"] else ""
    rate = max(line["lr"].values())
    return f"loss {line['loss']:.4f}  lr {rate:.2e}  {line['tokens_per_second']:,.0f} tokens/s  padding {line['padding_fraction']:.1%}{skipped}"
