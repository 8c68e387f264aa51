"""Keys of records, turns and parts of turns: those that a format reads, those that leave a record out, and a count of the rest.

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
    """The keys that a format reads of one kind of object, and the use of each."""

    kind: str
    """Name of the object in the summary: record, turn, picture, ..."""
    read: Mapping[str, str]
    """The known keys, and for each what its value becomes: the table of docs/data.md."""
    others: str = ""
    """Place of all other keys, if they are kept; empty: they are counted."""


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
    # KTO: learn it, or its opposite.
    Refusal("preference data", re.compile(r"label|is_(good|desirable)"), ("record",), bool),
    Refusal(
        "unknown loss mark",
        re.compile(
            r"loss(_.*)?|train(able)?|train_on_.*|(.*_)?loss_mask|mask_(history|prompt|inputs?)|(sample|example)_weight"
        ),
        ("record",),
    ),
    Refusal("unknown loss mark", LOSS_MARK, ("turn", "text", "thought", "call")),
)
"""Keys that leave a record out wherever they have a value."""
LOSS_KEYS: Final = ("loss", "weight", "train", "trainable", "loss_scale")
"""Keys by which other formats mark a turn or part as learned or not: a truth value, or a weight from 0."""


class RecordFields:
    """One object of a source, read key by key; a null is no value. Raises Skip for a key that leaves the record out."""

    def __init__(self, keys: Keys, value: Mapping[str, Any]) -> None:
        self.keys, self._taken = keys, set[str]()
        self.value = {name: given for name, given in value.items() if given is not None}
        for name, given in self.value.items():
            # Tables give every row all keys, empty where a row has nothing for one.
            if name in keys.read or given in ("", [], {}):
                continue
            reason = refusal(keys.kind, name, given)
            if reason:
                raise Skip(reason, f"{keys.kind} key {name}")

    def take(self, *names: str) -> Any:
        """Return the value of the first of these keys that is there, None if there is none; the others stay unread."""
        for name in names:
            value = self.value.get(name)
            if value is not None:
                # The others stay unread, and so are counted.
                self._taken.add(name)
                return value
        return None

    def take_all(self, *names: str) -> None:
        """Mark keys as read that another reader of the whole object takes."""
        self._taken.update(names)

    def agreed(self, *names: str) -> Any:
        """Return the value that all of these keys have that are there; raises Skip where they differ."""
        there = [name for name in names if self.value.get(name) is not None]
        values = [self.take(name) for name in there]
        if any(value != values[0] for value in values):
            keys = f"{self.keys.kind} keys {' and '.join(there)}"
            raise Skip("keys that say different things", keys)
        return values[0] if values else None

    def text(self, *names: str) -> str | None:
        """Return the first of these keys that is a text or a whole number; others stay unread."""
        for name in names:
            value = self.value.get(name)
            if isinstance(value, str | int) and not isinstance(value, bool):
                self._taken.add(name)
                return str(value)
        return None

    def number(self, *names: str) -> float | None:
        """Return the first of these keys as a finite number from 0; raises Skip for anything else."""
        for name in names:
            value = self.take(name)
            if value is not None:
                return number(value, f"{self.keys.kind} key {name}")
        return None

    def whole(self, *names: str) -> int | None:
        """Return the same as `number`, cut to a whole number of at least 1."""
        value = self.number(*names)
        if value is None:
            return None
        if value < 1:
            key = f"{self.keys.kind} key {names[0]}"
            raise Skip("broken number", f"{key}: at least 1 expected, got {value:g}")
        return int(value)

    def has(self, *names: str) -> bool:
        """Return whether one of these keys is there."""
        return any(name in self.value for name in names)

    @property
    def unread(self) -> Iterator[str]:
        """Yield the keys that nobody took, as `turn key score`."""
        if self.keys.others:
            return
        for name in self.value:
            if name not in self._taken:
                yield f"{self.keys.kind} key {name}"


def refusal(kind: str, name: str, value: object) -> str:
    """Return the reason for which a key of an object of this kind leaves its record out; empty if it does not."""
    # Patterns take their time on long texts, and a long key is no word.
    if len(name) > LONGEST_KEY:
        return ""
    lower = name.lower()
    for rule in REFUSED:
        is_meant = not rule.kinds or kind in rule.kinds
        if is_meant and isinstance(value, rule.values) and rule.names.fullmatch(lower):
            return rule.reason
    return ""


def number(value: Any, where: str) -> float:
    """Return a finite number from 0, given as one or as its text; raises Skip for anything else."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise Skip("broken number", f"{where}: {value[:80]!r}") from None
    # bool is an int for Python.
    if isinstance(value, bool) or not _is_number(value):
        raise Skip("broken number", f"{where}: {value!r:.80}")
    return float(value)


def _is_number(value: Any) -> bool:
    """Return whether a value is a finite number from 0; NaN fails every comparison."""
    return isinstance(value, int | float) and 0 <= value < math.inf


def loss_of(turn: RecordFields, role: str) -> float | None:
    """Return the weight of a turn's tokens in the loss, None for the usual one of its role; raises Skip for unclear marks."""
    weight = weight_of(turn)
    usual = 1.0 if role == "assistant" else 0.0
    return None if weight == usual else weight


def weight_of(fields: RecordFields) -> float | None:
    """Return the weight in the loss that the marks of a turn or part agree on, None without any; raises Skip for unclear ones."""
    weights: dict[str, float] = {}
    for name in LOSS_KEYS:
        value = fields.take(name)
        if value is None:
            continue
        # True and False are 1 and 0.
        if not _is_number(value):
            raise Skip("unknown loss mark", f"{fields.keys.kind} key {name}: {value!r:.80}")
        weights[name] = float(value)

    if len(set(weights.values())) > 1:
        raise Skip("unknown loss mark", f"{fields.keys.kind} keys {' and '.join(weights)} differ")
    return next(iter(weights.values()), None)


def without_nulls(value: Any) -> Any:
    """Return the value without keys that are null, at any depth: Arrow gives every row the keys of all rows.

    Elements of lists stay, since their places count.
    """
    if isinstance(value, dict):
        return {name: without_nulls(one) for name, one in value.items() if one is not None}
    if isinstance(value, list):
        return [without_nulls(one) for one in value]
    return value


def record_json(data: bytes) -> Any:
    """Read a JSON document of a record; raises Skip. NaN, which pandas writes for nothing, passes: most keys are not read."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Skip("not valid JSON", str(error)) from None


def parsed(value: Any) -> Any:
    """Return the value of a JSON text, None if it is none; anything but a text is its own value."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None


def decoded(value: Any) -> Any:
    """Return a value that may be given as JSON text, decoded and without nulls; None if the text is no JSON."""
    try:
        return without_nulls(parsed(value)) if isinstance(value, str) else value
    except RecursionError:
        # Nested less deeply than the parser takes, but more than `without_nulls`.
        return None


def listed(value: Any) -> list[Any]:
    """Return the media of a key, one value or a list of some; nothing and an empty text are none."""
    if value is None or value == "":
        return []
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        return [value]
    return [one for one in value if one not in (None, "")]
