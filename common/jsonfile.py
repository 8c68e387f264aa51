"""Read JSON that somebody else wrote: parse it within bounds, and check it against the type that the program works with.

`read_json` and `parse_json` say in one line which file, which field and what was expected there. pydantic does the checking.
"""

import functools
import json
import math
from pathlib import Path
from typing import Any, Final, cast

from pydantic import TypeAdapter, ValidationError

from visionloom.common.places import PlaceError, read_located

LARGEST: Final = 1 << 30
"""Bytes of a JSON file: 1 GiB, a dataset.json of two million shards."""
DEEPEST: Final = 100
"""Levels of lists and objects; a tokenizer.json has six."""
SHOWN: Final = 60
"""Characters of a wrong value that a message quotes."""


class JsonError(ValueError):
    """A document that cannot be used: the message names the file, the field, what is there and what is expected."""


def read_json[T](
    folder: Path,
    name: str,
    schema: type[T],
    largest: int = LARGEST,
) -> T:
    """Read a file of a folder as a value of `schema`: a dataclass, or a type such as dict[str, int].

    Raises:
        JsonError: if it is no JSON, too large, of another form, or no regular file inside the folder.
        FileNotFoundError: if it is not there.
        OSError: if it cannot be read.
    """
    where = str(folder / name)
    try:
        content = read_located(folder, name, largest)
    except PlaceError as error:
        raise JsonError(f"{where} {error}") from None
    return parse_json(content, schema, where)


def parse_json[T](
    content: bytes | str,
    schema: type[T],
    where: str,
) -> T:
    """Parse a document as a value of `schema`; `where` names its file in errors. Raises JsonError.

    Types are strict: "3", 3.0 and true are no int; a key that a dataclass lacks is an error.
    """
    return checked(load_json(content, where), schema, where)


def checked[T](
    value: Any,
    schema: type[T],
    where: str,
    part: str = "",
) -> T:
    """Return a value that `load_json` returned as one of `schema`, as `parse_json`; `part`: the field that it is of the document."""
    # By way of JSON: strict types of Python objects would refuse a list where a tuple is meant.
    text = json.dumps(value)
    try:
        typed = _adapter(cast(Any, schema)).validate_json(text, strict=True, extra="forbid")
        return cast(T, typed)
    except ValidationError as error:
        raise JsonError(f"{where}: {_fault(error, value, part)}") from None


def load_json(content: bytes | str, where: str, finite: bool = True) -> Any:
    """Parse JSON of any form.

    Raises:
        JsonError: if it is none, has endless numbers or endless nesting, or, if `finite`, NaN or infinity.
    """
    try:
        value = json.loads(
            content,
            parse_constant=_refuse_constant if finite else float,
            parse_float=_finite if finite else float,
        )
    except RecursionError:
        raise JsonError(f"{where}: nested too deeply") from None
    except UnicodeDecodeError:
        raise JsonError(f"{where}: not UTF-8") from None
    except ValueError as error:
        # JSONDecodeError, and numbers of more than 4,300 digits.
        raise JsonError(f"{where}: not JSON: {error}") from None
    if _is_deep(value):
        raise JsonError(f"{where}: nested more than {DEEPEST} deep")
    return value


def _is_deep(value: Any) -> bool:
    """Return whether there are more levels than DEEPEST, on which copying and comparing would fail."""
    # Level by level and not by recursion, which is what a deep value would break.
    level = [value]
    for _ in range(DEEPEST):
        below: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                below += each.values()
            elif isinstance(each, list):
                below += each
        if not below:
            return False
        level = below
    return True


@functools.cache
def _adapter(schema: Any) -> TypeAdapter[Any]:
    """Return pydantic's check of a type; kept, because making one is slow."""
    return TypeAdapter(schema)


def _fault(error: ValidationError, value: Any, part: str) -> str:
    """Return the first of pydantic's errors in one line."""
    # Without the inputs: each of the errors would hold its own copy.
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    first = errors[0]
    path = [part, *first["loc"]] if part else first["loc"]
    field = ".".join(map(str, path))
    if first["type"] == "missing":
        return f"{field} is missing"
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{field} is unknown"
    expected = first["msg"].removeprefix("Input ").removeprefix("Value error, ")
    shown = _shown(_at(value, first["loc"]))
    place = field or "the document"
    return f"{place} {expected[:1].lower()}{expected[1:]}, got {shown}"


def _at(value: Any, place: tuple[int | str, ...]) -> Any:
    """Return the value at a place that pydantic names."""
    # Names of a union's members stand in the place too, and are no keys.
    for key in place:
        if isinstance(value, dict) and key in value:
            value = value[str(key)]
        elif isinstance(value, list) and isinstance(key, int) and key < len(value):
            value = value[key]
    return value


def _shown(value: Any) -> str:
    """Return the beginning of a value as JSON."""
    if isinstance(value, dict | list) and len(value) > SHOWN:
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value):,}"
    text = json.dumps(value, default=str)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def _refuse_constant(name: str) -> float:
    """Refuse NaN and infinities, which Python writes and JSON does not know."""
    raise ValueError(f"{name} is not a number that JSON has")


def _finite(digits: str) -> float:
    """Refuse numbers that are infinite as a float, such as 1e999."""
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:SHOWN]} is too large")
    return number
