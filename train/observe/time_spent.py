"""Where the wall time of a run went, over all its starts: added up from the times in its two logs, which no kill takes away.

The lines of metrics.jsonl are the steps that the newest weights are made of, for a resumed run drops those that were done again.
"""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from visionloom.train.observe.metrics import EVENTS, METRICS, number, read_lines

PRODUCTIVE: Final = "productive"
WORDS: Final = {
    PRODUCTIVE: "steps that count",
    "start": "start",
    "data": "waits for data",
    "checkpoint": "checkpoint stalls",
    "evaluation": "evaluation",
    "lost": "lost steps",
    "restarts": "between starts",
    "other": "other",
}
"""What time is spent on, and how it is called; see docs/troubleshooting.md."""
LEAST_SHOWN: Final = 0.0005
MEASURED: Final = {"evaluation": "seconds", "checkpoint": "stall_seconds", "lost": "seconds"}
"""Events that tell how long something took, by the part of WORDS that they are called like, with the field."""


@dataclass(frozen=True)
class TimeSpent:
    """The wall time of a run from its first start, in seconds."""

    wall: float
    seconds: Mapping[str, float]
    """For each of WORDS; together `wall`."""
    starts: int
    lost_steps: int
    """Steps that were done and are not in the newest weights."""

    @property
    def productive_share(self) -> float:
        """Return the effective training time ratio (ETTR): the share of the wall time that made the newest weights."""
        return self.seconds[PRODUCTIVE] / self.wall if self.wall > 0 else 0.0

    def describe(self) -> str:
        """Return the shares in one line, the large ones first."""
        shares = []
        for name in sorted(self.seconds, key=lambda each: -self.seconds[each]):
            share = self.seconds[name] / max(self.wall, 1e-9)
            # What would be shown as 0.0 % says nothing.
            if name != PRODUCTIVE and share >= LEAST_SHOWN:
                shares.append(f"{WORDS[name]} {share:.1%}")
        count = "1 start" if self.starts == 1 else f"{self.starts} starts"
        return (
            f"time: {self.productive_share:.1%} productive (ETTR) of {self.wall:.0f} s in {count};"
            f" {', '.join(shares) or 'nothing else'}"
        )


class _Sums:
    """Adds up events and metrics in the order in which they were written."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.first: float | None = None
        """Time at which the run began."""
        self.starts = 0
        self.lost_steps = 0
        self.building: float | None = None
        """Time since which a phase is imported and built; None while it trains."""

    def add(self, event: Mapping[str, Any]) -> None:
        """Add what an event tells of."""
        kind, when = event.get("event"), number(event.get("time"))
        if when is None:
            return
        if kind == "start":
            self._start(event, when)
        elif self.first is None:  # of a version that wrote no starts
            self.first = self.building = when
        if kind == "phase_start" and self.building is not None:
            self.seconds["start"] += when - self.building
            self.building = None
        elif kind in ("phase_end", "back"):
            self.building = when
        elif kind in ("done", "early_end"):
            self.building = None
        elif kind in MEASURED:
            self.seconds[kind] += seconds_of(event, MEASURED[kind])
            self.lost_steps += int(seconds_of(event, "steps"))

    def _start(self, event: Mapping[str, Any], when: float) -> None:
        """Add a start: what became of the one before, and the time between both."""
        began = number(event.get("began")) or when
        sign = number(event.get("last_sign"))
        self.starts += 1
        if self.first is None:
            self.first = began
        elif sign is not None:
            self.seconds["restarts"] += max(0.0, began - sign)
            if self.building is None:
                self.seconds["lost"] += seconds_of(event, "unfinished_seconds")
            else:
                # It was vain, but no step was lost.
                self.seconds["start"] += max(0.0, sign - self.building)
        self.building = began

    def step(self, line: Mapping[str, Any]) -> None:
        """Add a line of metrics."""
        waited = seconds_of(line, "data_wait_seconds")
        worked = max(0.0, seconds_of(line, "step_seconds") - waited)
        self.seconds["data"] += waited
        # A skipped step has changed nothing.
        self.seconds["lost" if line.get("skipped") is True else PRODUCTIVE] += worked
        self.lost_steps += line.get("skipped") is True

    def until(self, when: float) -> TimeSpent:
        """Return the account at a moment; what has no name is `other`."""
        if self.building is not None:
            self.seconds["start"] += max(0.0, when - self.building)
        wall = max(0.0, when - self.first) if self.first is not None else 0.0
        seconds = {name: self.seconds[name] for name in WORDS}
        seconds["other"] = max(0.0, wall - sum(seconds.values()))
        return TimeSpent(wall, seconds, max(1, self.starts), self.lost_steps)


def time_spent(
    events: Iterable[Mapping[str, Any]], lines: Iterable[Mapping[str, Any]], until: float
) -> TimeSpent:
    """Add up where the time of a run went.

    Args:
        events: of events.jsonl.
        lines: of metrics.jsonl.
        until: seconds since 1970 at which the account ends.
    """
    sums = _Sums()
    for event in events:
        sums.add(event)
    for line in lines:
        sums.step(line)
    return sums.until(until)


def time_spent_in(folder: Path) -> TimeSpent:
    """Add up where the time of the run in a folder has gone until now."""
    return time_spent(lines_of(folder / EVENTS), lines_of(folder / METRICS), time.time())


def lines_of(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a log one by one: that of a long run has a gigabyte."""
    if path.is_file():
        with path.open(errors="replace") as file:
            for text in file:
                yield from read_lines(text, path.name)


def seconds_of(line: Mapping[str, Any], name: str) -> float:
    """Return a field of a line of a log; 0 for anything that is no number above 0."""
    return max(0.0, number(line.get(name)) or 0.0)
