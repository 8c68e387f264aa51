"""Keys of records, turns and parts of turns: what a format reads, what leaves a record out, and the count of all the rest.

A key that is not read may change what is trained, and its user would never know. So every object of a source is read through
`RecordFields`, which remembers what was taken. What a `Keys` table does not name, or nobody took, is counted by name in the
summary, with the first record that had it; what must change training (`REFUSED`) leaves the record out.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from visionloom.data.convert.skip import Skip
from visionloom.data.shards.sample_json import LONGEST_KEY, LOSS_MARK


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys that a format reads of one kind of object, and what becomes of each."""

    kind: str
    """What the object is called in the summary: record, turn, picture, ..."""
    read: Mapping[str, str]
    """The known keys, and for each what its value becomes: the table of docs/data.md."""
    others: str = ""
    """Where all other keys go, if they are kept; empty: they are counted."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Keys that no schema has a word for and that must change training."""

    reason: str
    names: re.Pattern[str]
    """Matched with a whole key in lower case."""
    kinds: tuple[str, ...] = ()
    """Objects in which they mean this; empty: all."""
    values: type = object
    """Values with which they mean this."""


REFUSED: Final = (
    Refusal("audio", re.compile(r"(input_)?(audio|sound|speech|wav)s?(_.*)?")),
    Refusal(
        "preference data",
        re.compile(r"(.*_)?(rejected|chosen|dispreferred|preferred)(_.*)?|kto_tag|kto_label"),
    ),
    Refusal(
        "preference data",
        re.compile(r"(positive|negative)_(messages|responses?|answers?|images?)"),
        ("record",),
    ),
    Refusal(
        "preference data", re.compile(r"label|is_(good|desirable)"), ("record",), bool
    ),  # KTO: learn it, or its opposite
    Refusal(
        "unknown loss mark",
        re.compile(
            r"loss(_.*)?|train(able)?|train_on_.*|(.*_)?loss_mask|mask_(history|prompt|inputs?)|(sample|example)_weight"
        ),
        ("record",),
    ),
    Refusal("unknown loss mark", LOSS_MARK, ("turn", "text", "thought", "call")),
)
"""What leaves a record out wherever it has a value."""
LOSS_KEYS: Final = ("loss", "weight", "train", "trainable", "loss_scale")
"""Keys of a turn or part by which other formats say whether it is learned: a truth value, or a weight from 0."""


class RecordFields:
    """One object of a source, read key by key; a null is no value. Raises Skip for a key that leaves the record out."""

    def __init__(self, keys: Keys, value: Mapping[str, Any]) -> None:
        self.keys, self._taken = keys, set[str]()
        self.value = {name: found for name, found in value.items() if found is not None}
        for name, found in self.value.items():
            if (
                name not in keys.read
                and found not in ("", [], {})
                and (reason := refusal(keys.kind, name, found))
            ):
                raise Skip(reason, f"{keys.kind} key {name}")

    def take(self, *names: str) -> Any:
        """The value of the first of these keys that is there, None if there is none; the others stay unread."""
        for name in names:
            if (value := self.value.get(name)) is not None:
                self._taken.add(name)
                return value
        return None

    def take_all(self, *names: str) -> None:
        """Mark keys as read that another reader of the whole object takes."""
        self._taken.update(names)

    def agreed(self, *names: str) -> Any:
        """The value that all of these keys have that are there; raises Skip where they differ."""
        given = {name: value for name in names if (value := self.take(name)) is not None}
        first = next(iter(given.values()), None)
        if any(value != first for value in given.values()):
            raise Skip(
                "keys that say different things", f"{self.keys.kind} keys {' and '.join(given)}"
            )
        return first

    def text(self, *names: str) -> str | None:
        """The first of these keys that is a text or a whole number; others stay unread."""
        for name in names:
            if isinstance(value := self.value.get(name), str | int) and not isinstance(value, bool):
                self._taken.add(name)
                return str(value)
        return None

    def number(self, *names: str) -> float | None:
        """The first of these keys as a finite number from 0; raises Skip for anything else."""
        for name in names:
            if (value := self.take(name)) is not None:
                return number(value, f"{self.keys.kind} key {name}")
        return None

    def whole(self, *names: str) -> int | None:
        """Like `number`, cut to a whole number of at least 1."""
        found = self.number(*names)
        if found is not None and found < 1:
            raise Skip(
                "broken number",
                f"{self.keys.kind} key {names[0]}: at least 1 expected, got {found:g}",
            )
        return None if found is None else int(found)

    def has(self, *names: str) -> bool:
        """Whether one of these keys is there."""
        return any(name in self.value for name in names)

    @property
    def unread(self) -> Iterator[str]:
        """What nobody took, as `turn key score`."""
        if not self.keys.others:
            yield from (
                f"{self.keys.kind} key {name}" for name in self.value if name not in self._taken
            )


def refusal(kind: str, name: str, value: object) -> str:
    """Why a key of an object of this kind leaves its record out; empty if it does not."""
    if len(name) > LONGEST_KEY:
        return ""
    lower = name.lower()
    fitting = (
        rule
        for rule in REFUSED
        if (not rule.kinds or kind in rule.kinds) and isinstance(value, rule.values)
    )
    return next((rule.reason for rule in fitting if rule.names.fullmatch(lower)), "")


def number(value: Any, where: str) -> float:
    """A finite number from 0, or its text; raises Skip for anything else."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise Skip("broken number", f"{where}: {value[:80]!r}") from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise Skip("broken number", f"{where}: {value!r:.80}")
    return float(value)


def loss_of(turn: RecordFields, role: str) -> float | None:
    """The weight of a turn's tokens in the loss, None for what its role has anyway; raises Skip for unclear marks."""
    weight, usual = weight_of(turn), 1.0 if role == "assistant" else 0.0
    return None if weight == usual else weight


def weight_of(fields: RecordFields) -> float | None:
    """The weight in the loss that the marks of a turn or part agree on, None without any; raises Skip for unclear ones."""
    marks = {
        name: _weight(fields, name, value)
        for name in LOSS_KEYS
        if (value := fields.take(name)) is not None
    }
    if len(set(marks.values())) > 1:
        raise Skip("unknown loss mark", f"{fields.keys.kind} keys {' and '.join(marks)} differ")
    return next(iter(marks.values()), None)


def _weight(fields: RecordFields, name: str, value: Any) -> float:
    if not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise Skip("unknown loss mark", f"{fields.keys.kind} key {name}: {value!r:.80}")
    return float(value)


def without_nulls(value: Any) -> Any:
    """The value without keys that are null, at any depth: Arrow gives every row the keys of all rows.

    Elements of lists stay, since their places count.
    """
    if isinstance(value, dict):
        return {name: without_nulls(one) for name, one in value.items() if one is not None}
    if isinstance(value, list):
        return [without_nulls(one) for one in value]
    return value


def record_json(data: bytes) -> Any:
    """A JSON document of a record; raises Skip. NaN, which pandas writes for nothing, is let through: most keys are not read."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Skip("not valid JSON", str(error)) from None


def parsed(value: Any) -> Any:
    """The value of a JSON text, None if it is none; what is no text is its own value."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None


def decoded(value: Any) -> Any:
    """A value that may be given as JSON text, as what the text says without nulls; None if it is no JSON."""
    try:
        return without_nulls(parsed(value)) if isinstance(value, str) else value
    except RecursionError:  # nested less deeply than the parser takes, but more than this
        return None


def listed(value: Any) -> list[Any]:
    """Media of a key: one value or a list of some; nothing and an empty text are none."""
    if value is None or value == "":
        return []
    return (
        [one for one in value if one not in (None, "")]
        if isinstance(value, Sequence) and not isinstance(value, str | bytes)
        else [value]
    )
