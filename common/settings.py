"""What a schema says of its options beside names, types and defaults: which values are possible, and what a change means.

Both stand in the dataclass field itself (`option`), so that an option cannot be added without them; tests walk the schema.
"""

import dataclasses
import operator
import types
import typing
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Final, Literal, cast

from visionloom.common.errors import SHOWN, unknown
from visionloom.common.text import one_line

Change = Literal["free", "run", "data", "never"]
"""What another value means for a run that has begun: `free` nothing, `run` that it goes on differently (run.on_change), `data`
that other samples are read, which is noticed by what they hold (data.on_change), `never` that its checkpoint does not fit."""
ENTRIES: Final = 1024
"""Most entries of a list or mapping, where an option says nothing else."""
_RULES: Final = "rules"


@dataclass(frozen=True)
class Rules:
    """What holds for the value of an option, or for each value in its list or mapping."""

    change: Change
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    choices: Sequence[str] = ()
    entries: int = ENTRIES


@dataclass(frozen=True)
class Option:
    """One option of a configuration."""

    name: str
    """Dotted path from the root that was walked."""
    value: Any
    rules: Rules


def option[T](
    default: T,
    change: Change,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Sequence[str] = (),
    entries: int = ENTRIES,
) -> T:
    """A dataclass field with a default and its rules.

    Args:
        default: a list or mapping is copied for each instance.
        change: see Change.
        least, most: smallest and largest number.
        above, below: the same, but the number itself is not allowed.
        choices: all texts that are allowed; empty: any.
        entries: most entries of a list or mapping.
    """
    metadata = {_RULES: Rules(change, least, most, above, below, choices, entries)}
    if isinstance(default, list | dict):
        return cast(T, dataclasses.field(default_factory=lambda: deepcopy(default), metadata=metadata))
    return dataclasses.field(default=default, metadata=metadata)


def options(config: Any, where: str = "") -> Iterator[Option]:
    """The options of a dataclass and of those inside it, also in mappings by name, in order; sections that are None have none."""
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{where}.{field.name}".removeprefix(".")
        if _RULES in field.metadata:
            yield Option(name, value, field.metadata[_RULES])
        elif dataclasses.is_dataclass(value):
            yield from options(value, name)
        elif isinstance(value, dict):
            for key, entry in value.items():
                yield from options(entry, f"{name}.{key}")


def without_rules(schema: type, where: str = "") -> Iterator[str]:
    """Dotted paths of a dataclass type whose fields are no `option` and no section; `<name>` stands for the keys of mappings."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        hint, name = hints[field.name], f"{where}.{field.name}".removeprefix(".")
        if isinstance(hint, types.UnionType):
            hint = next(choice for choice in typing.get_args(hint) if choice is not types.NoneType)
        if typing.get_origin(hint) is dict and dataclasses.is_dataclass(typing.get_args(hint)[1]):
            hint, name = typing.get_args(hint)[1], f"{name}.<name>"
        if _RULES in field.metadata:
            continue
        if dataclasses.is_dataclass(hint):
            yield from without_rules(cast(type, hint), name)
        else:
            yield name


def option_faults(config: Any, where: str = "") -> list[str]:
    """Values of a configuration that its options do not allow: one line each, naming the option."""
    return [line for each in options(config, where) for line in _faults(each)]


def _faults(one: Option) -> Iterator[str]:
    value, rules = one.value, one.rules
    if not isinstance(value, list | dict):
        yield from _fault(one.name, value, rules)
        return
    if len(value) > rules.entries:
        yield f"{one.name} has {len(value)} entries, at most {rules.entries} are possible"
        return
    pairs = (
        [(f".{key}", entry) for key, entry in value.items()] if isinstance(value, dict) else [("", entry) for entry in value]
    )
    for key, entry in pairs:
        if entry is None or isinstance(entry, list | dict):
            yield f"{one.name}{key} holds {one_line(str(entry))[:SHOWN]}: its entries are plain values"
        yield from _fault(f"{one.name}{key}", entry, rules)


def _bound(bound: float) -> str:
    return f"{int(bound):,}" if bound == int(bound) and abs(bound) < 10**9 else f"{bound:g}"


def _fault(name: str, value: Any, rules: Rules) -> Iterator[str]:
    if isinstance(value, str) and rules.choices and value not in rules.choices:
        yield unknown(name, value, rules.choices)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    bounds = {
        "at least": (rules.least, operator.ge),
        "above": (rules.above, operator.gt),
        "at most": (rules.most, operator.le),
        "below": (rules.below, operator.lt),
    }
    given = {words: (bound, holds) for words, (bound, holds) in bounds.items() if bound is not None}
    if not all(holds(value, bound) for bound, holds in given.values()):
        yield f"{name}={_shown(value)} must be {' and '.join(f'{words} {_bound(bound)}' for words, (bound, _) in given.items())}"


def _shown(value: float) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if abs(value) < 10**SHOWN else f"a number of more than {SHOWN} digits"
