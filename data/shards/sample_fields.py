"""Checked values of a sample's JSON: each failure is a SampleError with the dotted field."""

import json
import re
import sys
from collections.abc import Mapping
from typing import Any, Final, NoReturn, cast

from visionloom.data.shards.sample import SampleError

LARGEST_JSON: Final = 32 << 20
"""Bytes of a sample's JSON: the text of the longest packs has 2 million; in memory JSON may take twenty times as much."""
REF: Final = re.compile(r"(?!json$)[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
"""Names of media members: no folders, no `..`, no leading dot, and never the name of the sample's own JSON."""
LONGEST_ID: Final = 8192
LONGEST_REF: Final = 80
LARGEST_WEIGHT: Final = 1e6
"""In the loss: a larger one would drown all other samples, and soon float32."""
LARGEST_NUMBER: Final = 1e9
"""Seconds (32 years) and coordinates; nobody measures a larger number."""
LARGEST_RATE: Final = 1e6
"""Frames per second; its inverse is the smallest rate."""

RawSample = bytes | str | Mapping[str, Any]
"""The JSON text of a sample, or the object that was read from it."""


def load_object(raw: RawSample, origin: str) -> Mapping[str, Any]:
    """Decode the JSON text of an object; raises SampleError for anything else."""
    if not isinstance(raw, bytes | str):
        return raw
    if len(raw) > LARGEST_JSON:
        raise SampleError(origin, "", f"its JSON has {len(raw)} bytes, at most {LARGEST_JSON}")

    try:
        # Not load_json: the checks below refuse what is not finite, and this is read in every epoch.
        values = json.loads(raw)
    # Numbers of more than 4,300 digits are ValueErrors too.
    except (ValueError, RecursionError) as error:
        raise SampleError(origin, "", f"not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise SampleError(origin, "", f"a JSON object expected, got {type(values).__name__}")
    return values


class SampleFields:
    """Checked access to the values of one JSON object; every failure names the sample and the dotted field."""

    def __init__(self, sample_id: str, path: str, values: Any) -> None:
        self.sample_id, self.path = sample_id, path
        # dict first: asking an abstract class takes ten times as long.
        if not isinstance(values, dict | Mapping):
            raise SampleError(sample_id, path, f"an object expected, got {_kind_of(values)}")
        self.values: Mapping[str, Any] = values

    def fail(self, name: str, problem: str) -> NoReturn:
        """Raise SampleError for the field `name`."""
        raise SampleError(self.sample_id, self.at(name), problem)

    def at(self, name: str) -> str:
        """Return the dotted path of the field `name`."""
        return f"{self.path}.{name}" if self.path and name else self.path or name

    def get(self, name: str) -> Any:
        """Return the value of a field that must be there."""
        if name not in self.values:
            self.fail(name, "missing")
        return self.values[name]

    def has(self, name: str) -> bool:
        """Return whether the field holds a value; null counts as none."""
        return self.values.get(name) is not None

    def text(self, name: str) -> str:
        """Return a string; an id must not be empty."""
        value = self.get(name)
        if not isinstance(value, str) or (name == "id" and not value):
            self.fail(name, f"a string expected, got {_kind_of(value)}")
        if name == "id" and len(value) > LONGEST_ID:
            self.fail(name, f"at most {LONGEST_ID} characters expected, got {len(value)}")
        return value

    def optional_text(self, name: str) -> str | None:
        """Return a string, or None where there is none."""
        return self.text(name) if self.has(name) else None

    def choice(self, name: str, allowed: tuple[str, ...], default: str | None = None) -> str:
        """Return one of the `allowed` words."""
        value = self.values.get(name, default)
        if value not in allowed:
            self.fail(name, f"one of {', '.join(allowed)} expected, got {value!r:.80}")
        return cast(str, value)

    def number(
        self,
        name: str,
        default: float | None = None,
        low: float = -LARGEST_NUMBER,
        high: float = LARGEST_NUMBER,
    ) -> float:
        """Return a finite number from `low` to `high`; without a default the field must be there."""
        value = self.values.get(name, default)
        return self._number(name, value, low, high)

    def optional_number(self, name: str, low: float = -LARGEST_NUMBER) -> float | None:
        """Return a finite number, or None where there is none."""
        return self.number(name, low=low) if self.has(name) else None

    def positive(self, name: str, low: float = 0.0, high: float = LARGEST_NUMBER) -> float:
        """Return a finite number above 0."""
        value = self.number(name, low=0.0, high=high)
        if not value:
            self.fail(name, "more than 0 expected")
        if value < low:
            self.fail(name, f"at least {low:g} expected, got {value:g}")
        return value

    def rate(self, name: str) -> float:
        """Return frames per second."""
        return self.positive(name, 1 / LARGEST_RATE, LARGEST_RATE)

    def loss(self) -> float | None:
        """Return the weight in the loss, or None where there is none."""
        return self.number("loss", low=0.0, high=LARGEST_WEIGHT) if self.has("loss") else None

    def integer(self, name: str, low: int, high: int) -> int:
        """Return an integer from `low` to `high`."""
        value = self.get(name)
        # bool is an int for isinstance.
        if type(value) is not int or value < low:
            self.fail(name, f"an integer of at least {low} expected, got {value!r:.80}")
        if value > high:
            self.fail(name, f"at most {high} expected, got {value!r:.80}")
        return value

    def optional_integer(self, name: str, low: int, high: int) -> int | None:
        """Return an integer from `low` to `high`, or None where there is none."""
        return self.integer(name, low, high) if self.has(name) else None

    def items(self, name: str) -> list[Any]:
        """Return the items of a list."""
        value = self.get(name)
        if not isinstance(value, list | tuple):
            self.fail(name, f"a list expected, got {_kind_of(value)}")
        return list(value)

    def numbers(
        self, name: str, count: int | None = None, low: float = -LARGEST_NUMBER
    ) -> tuple[float, ...]:
        """Return a list of finite numbers of at least `low`, exactly `count` of them if it is given."""
        items = self.items(name)
        if count is not None and len(items) != count:
            self.fail(name, f"{count} numbers expected, got {len(items)}")

        # One pass without a call an item: long videos have many thousand times.
        if all(type(item) is float and low <= item <= LARGEST_NUMBER for item in items):
            return tuple(items)
        return tuple(
            self._number(f"{name}[{index}]", item, low, LARGEST_NUMBER)
            for index, item in enumerate(items)
        )

    def _number(self, name: str, value: Any, low: float, high: float) -> float:
        # bool is an int for Python; NaN fails every comparison.
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not abs(value) <= sys.float_info.max:
            self.fail(name, f"a finite number expected, got {value!r:.80}")
        if value < low:
            self.fail(name, f"at least {low:g} expected, got {value!r:.80}")
        if value > high:
            self.fail(name, f"at most {high:g} expected, got {value!r:.80}")
        return float(value)

    def ref(self, name: str, value: Any) -> str:
        """Return `value` if it is the name of a media member."""
        is_name = isinstance(value, str) and len(value) <= LONGEST_REF
        # The length first: the pattern need not see a long text.
        if not is_name or REF.fullmatch(value) is None:
            self.fail(name, f"a plain member name like img0.png expected, got {value!r:.100}")
        return cast(str, value)


def _kind_of(value: Any) -> str:
    """Return the name of the value's type, as errors show it."""
    return "null" if value is None else type(value).__name__
