"""One object for all that the outside sees of a run: log, screen, trackers and status.json have five hooks."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from visionloom.common import pulse
from visionloom.common.pulse import EVALUATION
from visionloom.train.observe import status
from visionloom.train.observe.logging_config import LoggingConfig
from visionloom.train.observe.metrics import RunLog
from visionloom.train.observe.screen import Screen
from visionloom.train.observe.slow_ranks import SlowRanks
from visionloom.train.observe.step_profile import StepProfile
from visionloom.train.observe.time_spent import time_spent_in
from visionloom.train.observe.trackers import Trackers
from visionloom.train.phase.trainer import PhaseTrainer

ENDS: Final = ("done", "stopped")
"""States of a run that has ended as somebody wished, of which its log tells."""
SLOW_SECONDS: Final = 1.0
"""Training that waits longer for a save that is not written when the next one is due is worth a warning."""


class Observer:
    """Passes a run's events on: phase_start, step, saved, validation, phase_end.

    All ranks have one; the main rank's alone writes and shows.
    """

    def __init__(
        self,
        folder: Path,
        logging: LoggingConfig,
        is_main: bool,
        name: str,
        settings: Mapping[str, Any],
    ) -> None:
        """Open log and trackers in the run's folder.

        Args:
            folder: of the run.
            logging: which trackers, and how often a line is shown.
            is_main: this is the main rank.
            name: of the run.
            settings: all of the run, for the trackers.
        """
        self.log = RunLog(folder) if is_main else None
        self.screen = Screen(is_main, logging.every_steps)
        self.trackers = Trackers(logging if is_main else LoggingConfig(), folder, settings, name)
        self.profile = StepProfile(folder, logging.profile_steps)
        self.held_out_losses: dict[str, float] = {}
        """Of the last validation."""
        self._slow_ranks = SlowRanks()

    @property
    def log_fault(self) -> str:
        """Return why the log could not be written; empty if it could, and on ranks without one."""
        return self.log.fault if self.log is not None else ""

    def begin(self) -> None:
        """Report that a start begins, when its process did, and when the start before it gave its last sign of life."""
        if self.log is None:
            return
        before, logged = status.current.before, self.log.last_time()
        sign = logged or 0.0
        # A start that was refused has no lines, and those that were done or stopped have one of their end.
        if before is not None and before.resumed is not None and before.state not in ENDS:
            sign = max(sign, before.seconds_since_1970)
        self.event(
            "start",
            began=round(status.current.began or time.time(), 3),
            last_sign=sign or None,
            unfinished_seconds=round(sign - (logged or sign), 3),
        )

    def rewind(self, step: int) -> None:
        """Take log and trackers back to `step`, and report the steps after it as lost."""
        seconds = self.log.rewind(step) if self.log is not None else []
        if seconds:
            self.event("lost", step=step, steps=len(seconds), seconds=round(sum(seconds), 3))
        self.trackers.rewind(step)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Measure something held out, and log for how long."""
        started = time.perf_counter()
        with pulse.current.during(EVALUATION):
            yield
        self.event("evaluation", seconds=round(time.perf_counter() - started, 3))

    def report_time(self) -> None:
        """Log and show where the time of the run has gone, over all its starts."""
        if self.log is None:
            return
        spent = time_spent_in(self.log.folder)
        seconds = {name: round(each, 3) for name, each in spent.seconds.items()}
        share, wall = round(spent.productive_share, 4), round(spent.wall, 3)
        self.event("time_spent", productive_share=share, wall_seconds=wall, seconds=seconds)
        self.say(spent.describe())

    def event(self, event: str, **fields: Any) -> None:
        """Write an event to the log."""
        if self.log is not None:
            self.log.event(event, **fields)

    def say(self, text: str) -> None:
        """Show a line of news."""
        self.screen.say(text)

    def phase_start(self, trainer: PhaseTrainer) -> None:
        """Report a phase that is built, and begins or continues."""
        self.event(
            "phase_start",
            phase=trainer.phase_name,
            step=trainer.step,
            phase_step=trainer.phase_step,
            phase_steps=trainer.phase.total_steps,
        )

    def step(self, line: dict[str, Any]) -> None:
        """Report an optimizer step by its line of metrics.jsonl."""
        if self.log is not None:
            self.log.metric(line)
        status.current.at(line["step"])  # on all ranks: any of them may fail
        self.screen.step(line)
        self.trackers.step(line)
        self._profiled(line["step"])

    def samples(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]], step: int
    ) -> None:
        """Pass texts of a step on to the trackers; no rows: there is nothing new."""
        if rows:
            self.trackers.samples(name, columns, rows, step)

    def slow(self, own_seconds: Sequence[Sequence[float]], step_seconds: float) -> None:
        """Report a rank that has been slow for long, by the seconds that each rank needed for itself in the last step."""
        # Alone, a rank is slow beside nobody.
        if len(own_seconds) > 1 and (said := self._slow_ranks.look(own_seconds, step_seconds)):
            self.event("slow_rank", detail=said)
            self.say(f"warning: {said}")

    def saved(self, event: str, **fields: Any) -> None:
        """Report a checkpoint: `checkpoint` or `checkpoint_failed`, with the fields of checkpoint/write.py."""
        self.event(event, **fields)
        if event == "checkpoint":
            status.current.saves(fields["step"])
        waited = fields.get("waited_seconds", 0.0)
        if waited > SLOW_SECONDS:
            self.say(
                f"warning: training has waited {waited:.1f} s for {fields['folder']}, which was written at"
                f" {fields['mb_per_second']} MB/s: raise checkpoint.every_steps or use faster storage"
            )
        if event == "checkpoint_failed":
            self.say(f"warning: {fields['folder']} could not be saved: {fields['cause']}; going on")

    def validation(
        self, trainer: PhaseTrainer, losses: dict[str, float], tasks: dict[str, Any]
    ) -> None:
        """Report held-out losses by dataset and, where answers were compared, `{task: {"accuracy": x, "n": n}}`."""
        self.held_out_losses = losses
        results = {"step": trainer.step, "loss": losses, "tasks": tasks}
        self.event("validation", phase=trainer.phase_name, **results)
        self.trackers.evaluation(results)

    def phase_end(self, trainer: PhaseTrainer) -> None:
        """Report a phase that is trained and saved."""
        self.event("phase_end", phase=trainer.phase_name, step=trainer.step)

    def _profiled(self, step: int, is_last: bool = False) -> None:
        """Report a trace that ends with a step."""
        if (trace := self.profile.end(step, is_last)) is not None:
            self.event("profile", step=step, file=str(trace))
            self.say(f"trace of this and the other ranks: {trace}")

    @contextmanager
    def live(self, trainer: PhaseTrainer) -> Iterator[None]:
        """Show the phase's progress while it trains."""
        self.screen.begin(trainer.phase_name, trainer.phase_step, trainer.phase.total_steps)
        try:
            yield
            # Not over a change of phase: building a model is no step.
            self._profiled(trainer.step, is_last=True)
        finally:
            self.screen.end()
