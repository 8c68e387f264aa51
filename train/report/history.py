"""What a report tells of a run, read from the run's folder: metrics by phase, held-out losses, results, settings.

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
from visionloom.train.observe.metrics import EVENTS, METRICS

RESULTS: Final = "eval.json"
SETTINGS: Final = "config.yaml"
LARGEST: Final = 1 << 22
"""Bytes of an eval.json: 4 MiB; each dataset and task has some 60."""
LONGEST_LINE: Final = 1 << 20
"""Bytes of a line of a log: 1 MiB; a metrics line of the demo has 900."""
LARGEST_NUMBER: Final = 1e30
LAST_STEP: Final = 1 << 53
LAST_SECOND: Final = 4e9
"""The year 2096."""
PHASES_SHOWN: Final = 100
SOURCES_KNOWN: Final = 1000
NO_TASKS: Final = (
    "No answers are compared: no sample of data.validation has a task and an answer. Name one with `python launch/data.py convert"
    " ... --task NAME` or a key `task` in a record (docs/data.md): answers of such samples are generated and compared word for word."
)
"""Stands where the table of tasks would be."""

Line = Mapping[str, Any]
Values = NDArray[np.float64]


@dataclass(frozen=True)
class PhaseHistory:
    """What happened in one phase."""

    name: str
    lines: list[Line]
    """Its lines of metrics.jsonl; at least one."""
    settings: Line
    """Its part of config.yaml; empty if unknown."""
    before: Mapping[str, float]
    """Held-out loss of each source when it began; empty if not measured."""
    after: Mapping[str, float]
    """Held-out loss of each source when it ended."""

    @property
    def first_step(self) -> int:
        """Step of the run that it began with."""
        return int(self.lines[0]["step"])

    @property
    def last_step(self) -> int:
        """Newest step of the run that belongs to it."""
        return int(self.lines[-1]["step"])

    def total(self, field: str) -> float:
        """Sum of a field of its lines."""
        return sum(number(line.get(field)) or 0 for line in self.lines)

    def series(self, value: Callable[[Line], Any]) -> tuple[Values, Values]:
        """Steps and values of the lines in which `value` finds a finite number."""
        found = [
            (int(line["step"]), x) for line in self.lines if (x := number(value(line))) is not None
        ]
        steps, values = np.array(found, np.float64).reshape(-1, 2).T
        return steps, values


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
        """Read what the run's folder holds."""
        lines = [line for line in read_lines(folder, METRICS) if is_step(line.get("step"))]
        results = _mapping(lambda: read_json(folder, RESULTS, dict[str, Any], LARGEST))
        return cls(
            folder,
            lines,
            read_lines(folder, EVENTS),
            results,
            _mapping(lambda: read_yaml(folder, SETTINGS)),
        )

    @property
    def name(self) -> str:
        """run.name, or the folder's name."""
        return str(self.part("run").get("name") or self.folder.resolve().name)

    def part(self, name: str) -> Line:
        """A section of config.yaml; empty if it is not there."""
        return _part(self.config, name)

    @property
    def last_step(self) -> int:
        """Newest step of the run; 0 if none was taken."""
        return int(self.lines[-1]["step"]) if self.lines else 0

    @property
    def seconds_since_1970(self) -> float | None:
        """When the run last wrote an event; None if it never did."""
        when = number(self.events[-1].get("time")) if self.events else None
        return when if when is not None and 0 <= when < LAST_SECOND else None

    @cached_property
    def phases(self) -> list[PhaseHistory]:
        """The phases in the order in which they ran."""
        found = []
        validations = [
            e
            for e in self.of("validation")
            if is_step(e.get("step")) and isinstance(e.get("loss"), Mapping)
        ]
        for name, group in islice(
            groupby(self.lines, key=lambda line: str(line.get("phase", ""))), PHASES_SHOWN
        ):
            lines = list(group)
            measured = [event for event in validations if event.get("phase") == name]
            before = [event["loss"] for event in measured if event["step"] < lines[0]["step"]]
            after = [
                event["loss"]
                for event in measured
                if lines[0]["step"] <= event["step"] <= lines[-1]["step"]
            ]
            settings = _part(self.part("phases"), name)
            found.append(
                PhaseHistory(
                    name, lines, settings, before[-1] if before else {}, after[-1] if after else {}
                )
            )
        return found

    @property
    def sources(self) -> list[str]:
        """All datasets that were trained on or measured, in order of appearance."""
        names: dict[str, None] = {}
        for line in [*self.lines, *self.of("validation"), self.results]:
            found = line.get("loss_by_source", line.get("loss"))
            names |= dict.fromkeys(
                found if isinstance(found, Mapping) and len(names) < SOURCES_KNOWN else ()
            )
        return list(names)[:SOURCES_KNOWN]

    def of(self, event: str) -> list[Line]:
        """The events of a kind, oldest first."""
        return [line for line in self.events if line.get("event") == event]


def number(value: Any) -> float | None:
    """A number of a size that can be drawn and added up, as a float; None for anything else."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not abs(value) < LARGEST_NUMBER
    ):
        return None
    return float(value)


def is_step(value: Any) -> bool:
    """Whether a value can be the number of a step."""
    return type(value) is int and 0 <= value < LAST_STEP


def read_lines(folder: Path, name: str) -> list[Line]:
    """The JSON objects of a file with one a line; lines that were cut off or are none are passed over."""
    found: list[Line] = []
    try:
        file = locate(folder, name).open("rb")
    except (PlaceError, OSError):
        return found
    with file:
        while text := file.readline(LONGEST_LINE):
            try:
                line = load_json(text, name, finite=False)  # a loss may have been none
            except JsonError:
                continue
            if isinstance(line, dict):
                found.append(line)
    return found


def _mapping(read: Callable[[], dict[str, Any]]) -> Line:
    """What a file holds; empty if it cannot be read."""
    try:
        return read()
    except (OSError, JsonError):
        return {}


def _part(content: Line, name: str) -> Line:
    """A mapping inside a mapping; empty if it is not there."""
    found = content.get(name)
    return found if isinstance(found, Mapping) else {}


def smooth(values: Values, span: float) -> Values:
    """Mean of the exponential moving averages over about `span` values from either side, so that it does not lag."""
    return (_moving_average(values, span) + _moving_average(values[::-1], span)[::-1]) / 2


def _moving_average(values: Values, span: float) -> Values:
    """Exponential moving average, with the start corrected for its missing past."""
    keep = 1 - 1 / max(1.0, span)
    out, mean, weight = np.empty_like(values), 0.0, 0.0
    for i, value in enumerate(values):
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        out[i] = mean / weight
    return out


def thin(x: Values, y: Values, points: int) -> tuple[Values, Values]:
    """At most `points` points of a curve: the means of equally long stretches."""
    if len(x) <= points:
        return x, y
    starts = np.linspace(0, len(x), points + 1).astype(np.int64)[:-1]
    counts = np.diff(np.append(starts, len(x)))
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts


def curve(
    phases: Sequence[PhaseHistory], value: Callable[[Line], Any], points: int, span: float = 1.0
) -> tuple[Values, Values]:
    """Steps and smoothed values over all phases, at most about `points` of them, with a gap (NaN) between phases."""
    total = max(1, sum(len(phase.lines) for phase in phases))
    pieces = []
    for phase in phases:
        steps, values = phase.series(value)
        if len(steps):
            share = max(1, points * len(phase.lines) // total)
            x, y = thin(steps, values, share)
            pieces += [
                np.stack((x, smooth(y, span * len(x) / len(steps)))),
                np.full((2, 1), np.nan),
            ]
    joined = np.concatenate([np.empty((2, 0)), *pieces], axis=1)
    return joined[0], joined[1]
