"""Options of a configuration: which values are possible, what a change means, and the walk that checks all of them.

Bounds and changes stand in the dataclass field itself (`option`), so that an option cannot be added without them; tests walk the
schema. What bounds cannot say a section says of itself (`ChecksItself`); `check` walks sections inside sections and hands each
its dotted path.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol, TypedDict, Unpack, cast, runtime_checkable

from visionloom.common.errors import SHOWN, unknown
from visionloom.common.names import name_fault
from visionloom.common.text import one_line

Change = Literal["free", "run", "data", "never"]
"""Effect of another value on a run that has begun: `free` none, `run` it continues differently (run.on_change), `data` it
reads other samples, which their content shows (data.on_change), `never` its checkpoint does not fit."""
ANY: Final = "<name>"
"""Stands for the free key of a mapping in a dotted path: phases.<name>.steps."""
ENTRIES: Final = 1024
"""Most entries of a list or mapping, where an option has no other limit."""
_RULES: Final = "rules"


@dataclass(frozen=True)
class Rules:
    """Bounds of an option's value, or of each value in its list or mapping; see `option`."""

    change: Change
    least: float | None = None
    """Smallest number."""
    most: float | None = None
    """Largest number."""
    above: float | None = None
    """Largest number that is too small."""
    below: float | None = None
    """Smallest number that is too large."""
    choices: Sequence[str] = ()
    """All texts that are allowed; empty: any."""
    entries: int = ENTRIES
    """Most entries of a list or mapping."""

    def problems(self, name: str, value: Any) -> Iterator[str]:
        """Yield a line for a plain value that is not allowed; `name` is the option's."""
        if isinstance(value, str) and self.choices and value not in self.choices:
            yield unknown(name, value, self.choices)
        # A bool is an int for Python, but no number that a bound is about.
        if isinstance(value, bool) or not isinstance(value, int | float):
            return
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{name}={value:g} must be a finite number"
        elif not self._holds(value):
            yield f"{name}={_shown(value)} must be {self._range()}"

    def _holds(self, value: float) -> bool:
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def _range(self) -> str:
        """Return all bounds, also where only one does not hold: the user sees the whole range."""
        bounds = {
            "at least": self.least,
            "above": self.above,
            "at most": self.most,
            "below": self.below,
        }
        given = []
        for word, bound in bounds.items():
            if bound is not None:
                given.append(f"{word} {_bound(bound)}")
        return " and ".join(given)


@dataclass(frozen=True)
class Option:
    """One option of a configuration."""

    name: str
    """Dotted path from the root that was walked."""
    value: Any
    rules: Rules

    def problems(self) -> Iterator[str]:
        """Yield a line for each value that the rules do not allow."""
        if not isinstance(self.value, list | dict):
            yield from self.rules.problems(self.name, self.value)
            return
        most = self.rules.entries
        if len(self.value) > most:
            yield f"{self.name} has {len(self.value)} entries, at most {most} are possible"
            return

        for path, entry in self._entries():
            if entry is None or isinstance(entry, list | dict):
                yield f"{path} holds {one_line(str(entry))[:SHOWN]}: its entries are plain values"
            yield from self.rules.problems(path, entry)

    def _entries(self) -> Iterator[tuple[str, Any]]:
        """Yield the entries of a list or mapping with their paths; those of a list have the option's own."""
        if isinstance(self.value, dict):
            for key, entry in self.value.items():
                yield _path(self.name, str(key)), entry
        else:
            for entry in self.value:
                yield self.name, entry


class RuleWords(TypedDict, total=False):
    """The rules of an option that `option` takes by name; see Rules."""

    least: float
    most: float
    above: float
    below: float
    choices: Sequence[str]
    entries: int


def option[T](default: T, change: Change, **rules: Unpack[RuleWords]) -> T:
    """Return a dataclass field with a default and its rules.

    Args:
        default: a list or mapping is copied for each instance.
        change: see Change.
        rules: see Rules.
    """
    metadata = {_RULES: Rules(change, **rules)}
    # dataclasses refuse a default that instances would share.
    if isinstance(default, list | dict):
        copied: Any = dataclasses.field(
            default_factory=lambda: deepcopy(default), metadata=metadata
        )
        return cast(T, copied)
    return dataclasses.field(default=default, metadata=metadata)


def options(config: Any, where: str = "") -> Iterator[Option]:
    """Yield the options of a dataclass and of those inside it, also in mappings by name, in order.

    A section that is None has none.
    """
    for item in dataclasses.fields(config):
        value, name = getattr(config, item.name), _path(where, item.name)
        if _RULES in item.metadata:
            yield Option(name, value, item.metadata[_RULES])
        elif dataclasses.is_dataclass(value):
            yield from options(value, name)
        elif isinstance(value, dict):
            for key, entry in value.items():
                yield from options(entry, f"{name}.{key}")


def without_rules(schema: type, where: str = "") -> Iterator[str]:
    """Yield the dotted paths of a dataclass type whose fields are neither an `option` nor a section; keys of mappings are ANY."""
    hints = typing.get_type_hints(schema)
    for item in dataclasses.fields(schema):
        if _RULES in item.metadata:
            continue

        hint, name = hints[item.name], _path(where, item.name)
        if isinstance(hint, types.UnionType):  # a section that may be None
            hint = next(choice for choice in typing.get_args(hint) if choice is not types.NoneType)
        if typing.get_origin(hint) is dict:
            _, entry = typing.get_args(hint)
            if dataclasses.is_dataclass(entry):
                hint, name = entry, f"{name}.{ANY}"
        if dataclasses.is_dataclass(hint):
            yield from without_rules(cast(type, hint), name)
        else:
            yield name


@runtime_checkable
class ChecksItself(Protocol):
    """A section with problems that bounds of single options cannot show."""

    def problems(self, here: str) -> Iterator[str]:
        """Yield a line for each problem, naming its option; all values inside are within their bounds.

        Args:
            here: dotted path of this section: `phases.align.parallel`. A cure may name a second option by it.
        """


@dataclass
class Problems:
    """Lines about a configuration; each names an option by its dotted path."""

    bounds: list[str] = field(default_factory=list)
    """Values that their options do not allow, with which nothing may be computed."""
    sections: list[str] = field(default_factory=list)
    """Problems that sections have in themselves."""

    @property
    def lines(self) -> list[str]:
        """Return all of them, bounds first."""
        return self.bounds + self.sections

    def add(self, others: "Problems") -> None:
        """Add those of a part."""
        self.bounds += others.bounds
        self.sections += others.sections


def check(section: Any, here: str = "") -> Problems:
    """Walk a section and those inside it, and collect the problems of all.

    A section checks itself only where all values in it are within their bounds: its checks divide by them.

    Args:
        section: a dataclass whose fields are options, sections, or mappings of sections by name.
        here: its dotted path; empty for the root.
    """
    problems = Problems()
    for item in dataclasses.fields(section):
        value, path = getattr(section, item.name), _path(here, item.name)
        if _RULES in item.metadata:
            problems.bounds += Option(path, value, item.metadata[_RULES]).problems()
            continue
        if dataclasses.is_dataclass(value):
            problems.add(check(value, path))
        elif isinstance(value, dict):
            problems.add(_check_entries(value, path))

    if not problems.bounds and isinstance(section, ChecksItself):
        problems.sections += section.problems(here)
    return problems


def _check_entries(entries: Mapping[str, Any], path: str) -> Problems:
    """Check the names and the sections of a mapping; what several entries have in common is one line."""
    if len(entries) > ENTRIES:
        return Problems([f"{path} has {len(entries)} entries, at most {ENTRIES} are possible"])

    names: list[str] = []
    bounds: dict[str, list[str]] = {}
    sections: dict[str, list[str]] = {}
    for name, entry in entries.items():
        if fault := name_fault(name):
            names.append(f"{path}.{one_line(name)}: {fault}")
        problems = check(entry, f"{path}.{ANY}")
        bounds[name], sections[name] = problems.bounds, problems.sections
    return Problems(names + likewise(path, bounds), likewise(path, sections))


def likewise(
    path: str,
    problems: Mapping[str, list[str]],
) -> list[str]:
    """Return the problems of a mapping's entries, with one line for those that have the same.

    Args:
        path: of the mapping: `phases`.
        problems: of each entry by its name, in lines that call it `phases.<name>`.
    """
    names: dict[str, list[str]] = {}
    for name, lines in problems.items():
        for line in lines:
            names.setdefault(line, []).append(name)

    # A fault of all phases of a recipe is one line, and not one for each.
    merged = []
    for line, (first, *others) in names.items():
        more = f" (likewise {', '.join(others)})" if others else ""
        named = line.replace(f"{path}.{ANY}", f"{path}.{first}")
        merged.append(named + more)
    return merged


def _path(here: str, name: str) -> str:
    return f"{here}.{name}" if here else name


def _bound(bound: float) -> str:
    """Write whole bounds below a milliard with commas, others in short: 1,024 and 1e+12."""
    if bound == int(bound) and abs(bound) < 10**9:
        return f"{int(bound):,}"
    return f"{bound:g}"


def _shown(value: float) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if abs(value) < 10**SHOWN:
        return str(value)
    return f"a number of more than {SHOWN} digits"
