"""The history of a run, read from its folder: metrics by phase, held-out losses, results, settings.

Every file may be missing or cut off: a report shows what there is.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from visionloom.common.jsonfile import JsonError, load_json, read_json
from visionloom.common.places import PlaceError, locate
from visionloom.common.yamlfile import read_yaml
from visionloom.train.observe.metrics import EVENTS, METRICS, number
from visionloom.train.observe.time_spent import TimeSpent, time_spent

RESULTS: Final = "eval.json"
SETTINGS: Final = "config.yaml"
LARGEST: Final = 1 << 22
"""Bytes of an eval.json: 4 MiB; each dataset and task has some 60."""
LONGEST_LINE: Final = 1 << 20
"""Bytes of a line of a log: 1 MiB; a metrics line of the demo has 900."""
LAST_STEP: Final = 1 << 53
LAST_SECOND: Final = 4e9
"""Seconds since 1970: the year 2096."""
PHASES_SHOWN: Final = 100
SOURCES_KNOWN: Final = 1000
"""Datasets of a run; a damaged log could name any number of them."""
NO_TASKS: Final = (
    "No answers are compared: no sample of data.validation has a task and an answer. Name one with `python launch/data.py convert"
    " ... --task NAME` or a key `task` in a record (docs/data.md): answers of such samples are generated and compared with it."
)
"""Shown in the place of the table of tasks."""

Line = Mapping[str, Any]
Values = NDArray[np.float64]


@dataclass(frozen=True)
class PhaseHistory:
    """Metrics, settings and held-out losses of one phase."""

    name: str
    lines: list[Line]
    """Its lines of metrics.jsonl; at least one."""
    settings: Line
    """Its part of config.yaml; empty if unknown."""
    before: Mapping[str, float]
    """Held-out loss of each source when it began; empty if not measured."""
    after: Mapping[str, float]
    """Held-out loss of each source when it ended."""
    tasks: Line
    """Accuracy and number of answers of each task when it ended; empty if not measured."""

    @property
    def first_step(self) -> int:
        """Return the step of the run that it began with."""
        return int(self.lines[0]["step"])

    @property
    def last_step(self) -> int:
        """Return the newest step of the run that belongs to it."""
        return int(self.lines[-1]["step"])

    def total(self, field: str) -> float:
        """Add up a field of its lines."""
        return sum(number(line.get(field)) or 0 for line in self.lines)

    def series(self, value: Callable[[Line], Any]) -> tuple[Values, Values]:
        """Return steps and values, fp64 [N] each, of the lines where `value` is a finite number."""
        steps, values = [], []
        for line in self.lines:
            measured = number(value(line))
            if measured is not None:
                steps.append(int(line["step"]))
                values.append(measured)
        return np.array(steps, np.float64), np.array(values, np.float64)


@dataclass(frozen=True)
class History:
    """A whole run."""

    folder: Path
    lines: list[Line]
    events: list[Line]
    results: Line
    """eval.json; empty if there is none."""
    config: Line
    """config.yaml; empty if there is none."""

    @classmethod
    def read(cls, folder: Path) -> "History":
        """Read the files of a run's folder; those that are missing or damaged count as empty."""
        lines = [line for line in read_lines(folder, METRICS) if is_step(line.get("step"))]
        return cls(
            folder,
            lines,
            events=read_lines(folder, EVENTS),
            results=_mapping(lambda: read_json(folder, RESULTS, dict[str, Any], LARGEST)),
            config=_mapping(lambda: read_yaml(folder, SETTINGS)),
        )

    @property
    def name(self) -> str:
        """Return run.name, or the folder's name."""
        return str(self.part("run").get("name") or self.folder.resolve().name)

    def part(self, name: str) -> Line:
        """Return a section of config.yaml; empty if it is not there."""
        return _part(self.config, name)

    @property
    def last_step(self) -> int:
        """Return the newest step of the run; 0 if none was taken."""
        return int(self.lines[-1]["step"]) if self.lines else 0

    @property
    def seconds_since_1970(self) -> float | None:
        """Return when the run last wrote an event; None if it never did."""
        if not self.events:
            return None
        when = number(self.events[-1].get("time"))
        return when if when is not None and 0 <= when < LAST_SECOND else None

    @cached_property
    def phases(self) -> list[PhaseHistory]:
        """Return the phases in the order in which they ran, at most PHASES_SHOWN."""
        by_phase = groupby(self.lines, key=lambda line: str(line.get("phase", "")))
        phases = []
        for name, group in islice(by_phase, PHASES_SHOWN):
            lines = list(group)
            before, after = self._held_out_losses(name, lines[0]["step"], lines[-1]["step"])
            settings = _part(self.part("phases"), name)
            tasks = self._tasks(name, lines[-1]["step"])
            phases.append(PhaseHistory(name, lines, settings, before, after, tasks))
        return phases

    def _held_out_losses(self, phase_name: str, first: int, last: int) -> tuple[Line, Line]:
        """Return the last held-out losses before a phase's steps `first` to `last`, and in them."""
        before: Line = {}
        after: Line = {}
        for event in self.of("validation"):
            step: Any = event.get("step")
            losses = event.get("loss")
            if event.get("phase") != phase_name or not is_step(step):
                continue
            if not isinstance(losses, Mapping):
                continue
            # A phase is measured before its first step too, under the step of the phase before.
            if step < first:
                before = losses
            elif step <= last:
                after = losses
        return before, after

    def _tasks(self, phase_name: str, last: int) -> Line:
        """Return the newest results of tasks at the end of a phase, whose last step is `last`."""
        tasks: Line = {}
        for event in self.of("validation"):
            if event.get("phase") == phase_name and event.get("step") == last:
                tasks = _part(event, "tasks") or tasks
        return tasks

    @property
    def sources(self) -> list[str]:
        """Return all datasets that were trained on or measured, in order of appearance."""
        names: dict[str, None] = {}
        for line in [*self.lines, *self.of("validation"), self.results]:
            # Metrics have the loss of all as well as those by source, events and results these alone.
            losses = line.get("loss_by_source", line.get("loss"))
            if isinstance(losses, Mapping) and len(names) < SOURCES_KNOWN:
                names |= dict.fromkeys(losses)
        return list(names)[:SOURCES_KNOWN]

    def held_out(self, source: str) -> tuple[Values, Values]:
        """Return steps and held-out losses of a dataset, fp64 [N] each, with a gap (NaN) after each phase."""
        points: list[tuple[float, float]] = []
        for phase in self.phases:
            # Before its first step a phase stands at the step of the one before.
            ends = ((phase.first_step - 1, phase.before), (phase.last_step, phase.after))
            for step, losses in ends:
                loss = number(losses.get(source))
                if loss is not None:
                    points.append((step, loss))
            points.append((float("nan"), float("nan")))
        x, y = np.array(points).T
        return x, y

    @property
    def time_spent(self) -> TimeSpent:
        """Return where the wall time went, up to the last line of the logs."""
        until = 0.0
        for line in (*self.events[-1:], *self.lines[-1:]):
            until = max(until, number(line.get("time")) or 0.0)
        return time_spent(self.events, self.lines, until)

    def of(self, event: str) -> list[Line]:
        """Return the events of a kind, oldest first."""
        return [line for line in self.events if line.get("event") == event]


def is_step(value: Any) -> bool:
    """Return whether a value can be the number of a step."""
    return type(value) is int and 0 <= value < LAST_STEP


def read_lines(folder: Path, name: str) -> list[Line]:
    """Read the JSON objects of a file with one a line; lines that are cut off or are none are skipped."""
    lines: list[Line] = []
    try:
        file = locate(folder, name).open("rb")
    except (PlaceError, OSError):
        return lines
    with file:
        # By pieces: a line of a damaged file may have any length.
        while text := file.readline(LONGEST_LINE):
            try:
                line = load_json(text, name, finite=False)  # a loss may have been none
            except JsonError:
                continue
            if isinstance(line, dict):
                lines.append(line)
    return lines


def _mapping(read: Callable[[], dict[str, Any]]) -> Line:
    """Return a file's mapping; empty if it cannot be read."""
    try:
        return read()
    except (OSError, JsonError):
        return {}


def _part(content: Line, name: str) -> Line:
    """Return a mapping inside a mapping; empty if it is not there."""
    part = content.get(name)
    return part if isinstance(part, Mapping) else {}


def smooth(values: Values, span: float) -> Values:
    """Smooth values, fp64 [N], over about `span` of them.

    Returns the mean of the exponential moving averages from either side, which does not lag.
    """
    forward = _moving_average(values, span)
    backward = _moving_average(values[::-1], span)[::-1]
    return (forward + backward) / 2


def _moving_average(values: Values, span: float) -> Values:
    """Return the exponential moving average, fp64 [N], corrected for the missing past at its start."""
    keep = 1 - 1 / max(1.0, span)
    averages = np.empty_like(values)
    mean = weight = 0.0
    for place, value in enumerate(values):
        mean = keep * mean + (1 - keep) * value
        weight = keep * weight + (1 - keep)  # as for a value of 1 at each step, as Adam does
        averages[place] = mean / weight
    return averages


def thin(x: Values, y: Values, points: int) -> tuple[Values, Values]:
    """Thin a curve, fp64 [N] each, to at most `points` points: the means of equally long stretches."""
    if len(x) <= points:
        return x, y
    starts = np.linspace(0, len(x), points + 1).astype(np.int64)[:-1]
    counts = np.diff(np.append(starts, len(x)))
    mean_x = np.add.reduceat(x, starts) / counts
    mean_y = np.add.reduceat(y, starts) / counts
    return mean_x, mean_y


def curve(
    phases: Sequence[PhaseHistory], value: Callable[[Line], Any], points: int, span: float = 1.0
) -> tuple[Values, Values]:
    """Return steps and smoothed values over all phases, fp64 [N] each, with a gap (NaN) after each.

    Args:
        phases: in the order in which they ran.
        value: of a line of metrics.
        points: about the most that are returned.
        span: values to smooth over; 1: none.
    """
    total = max(1, sum(len(phase.lines) for phase in phases))
    gap = np.full(1, np.nan)
    xs, ys = [np.empty(0)], [np.empty(0)]
    for phase in phases:
        steps, values = phase.series(value)
        if not len(steps):
            continue
        share = max(1, points * len(phase.lines) // total)
        x, y = thin(steps, values, share)
        # A thinned curve has fewer points, so that the same part of the run has fewer too.
        span_of_points = span * len(x) / len(steps)
        xs += [x, gap]
        ys += [smooth(y, span_of_points), gap]
    return np.concatenate(xs), np.concatenate(ys)
