"""The words of the command line, made such that Hydra's grammar reads in them what the user meant, or refused with the cure.

Hydra gives , = : ( ) [ ] { } quotes and spaces in a value a meaning and knows no letters but ASCII: it takes `path=/d/a,b` for
two values. Where the schema wants a text, the value is therefore quoted for Hydra as it stands.
"""

import dataclasses
import functools
import math
import re
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from visionloom.common.errors import UserError
from visionloom.launch.environment import check_home
from visionloom.launch.explain import groups, no_such_key
from visionloom.train.config import RunConfig

LONGEST = 8192
"""Characters of a word: twice a path's."""
LONGEST_NUMBER = 40
OVERRIDE = re.compile(r"(\+{0,2})([^=+~][^=]*)=(.*)", re.DOTALL)
EXPONENT = re.compile(r"[+-]?[0-9]+(?:\.[0-9]*)?[eE][+]?[0-9]{1,3}")
NUMBERS = {int: "a whole number", float: "a number", bool: "true or false"}


def readable(words: Sequence[str]) -> list[str]:
    """The words with every text quoted for Hydra.

    A text that Hydra reads as one string is left alone, with its quotes, escapes and `${...}`; so is null.

    Raises:
        UserError: one line, with how to write the first word that cannot be read.
    """
    parser, read = OverridesParser.create(), list[str]()
    for before, word in zip(["", *words], words, strict=False):
        if len(word) > LONGEST:
            raise UserError(
                f"command line: '{word[:40]}...' has {len(word)} characters: at most {LONGEST}; use a recipe of your own"
            )
        if word.startswith("~"):
            read.append(word)
        elif match := OVERRIDE.fullmatch(word):
            read.append(_readable(parser, word, *match.groups()))
        else:
            joined = ""
            if before:
                joined = f"; if it belongs to the word before it, quote both for the shell: '{before} {word}'"
            raise UserError(f"command line: cannot read '{word}': write key=value{joined}")
    return read


def option_type(key: str) -> Any:
    """The type that the schema has at a dotted path, without None; None where it has nothing there."""
    return functools.reduce(_item_type, key.split("."), RunConfig)


def _item_type(hint: Any, name: str) -> Any:
    """The type of a key of a section or mapping, without None; None where it has no such key."""
    if dataclasses.is_dataclass(hint):
        inner = typing.get_type_hints(hint).get(name)
    else:
        inner = typing.get_args(hint)[1] if typing.get_origin(hint) is dict else None
    if isinstance(inner, types.UnionType):
        return next(choice for choice in typing.get_args(inner) if choice is not types.NoneType)
    return inner


def _readable(parser: OverridesParser, word: str, sign: str, key: str, value: str) -> str:
    """Return one `key=value` word as Hydra can read it."""
    hint = option_type(key)
    if hint is int and (number := whole(value)) is not None:
        value, word = str(number), f"{sign}{key}={number}"
    override = _parse(parser, word)
    if override is not None and override.is_sweep_override():
        override = None  # several values, which every rank would sweep over by itself

    is_group = re.split("[/@]", key)[0] in groups() and not value.startswith(("[", "{"))
    if hint is str or is_group:
        check_home(f"{sign}{key}", value)
        if override is not None and isinstance(override.value(), str | None):
            return word
        word = f"{sign}{key}={QuotedString(value, Quote.single).with_quotes()}"
        override = _parse(parser, word)

    if hint in NUMBERS and len(value) > LONGEST_NUMBER:
        raise UserError(f"command line: {key} takes {NUMBERS[hint]}, not {len(value)} characters")
    if override is None:
        raise UserError(_cure(parser, word, sign, key, value))
    for path, text in _changed_texts(hint, override.value(), key, value):
        raise UserError(
            f"command line: {path} in '{word}' would be read as {text}: {_quoting(sign, key)}"
        )
    return word


def whole(text: str) -> int | None:
    """The whole number that a text with an exponent stands for (`15e12`); None for any other text."""
    if len(text) > LONGEST_NUMBER or EXPONENT.fullmatch(text) is None:
        return None
    number = float(text)
    if not math.isfinite(number) or not number.is_integer():
        return None
    return int(number)


def _parse(parser: OverridesParser, word: str) -> Override | None:
    try:
        return parser.parse_override(word)
    except (HydraException, ValueError, RecursionError):
        return None  # ValueError: a number of more than 4,300 digits


def _cure(parser: OverridesParser, word: str, sign: str, key: str, value: str) -> str:
    """The line for a word that Hydra cannot read, or reads as several values."""
    if _parse(parser, f"{key}=1") is None:
        return (
            f"command line: cannot read the name '{key}': names have letters, digits, - and _; recipes with other names are"
            " included by one of your own, +recipe=NAME --config-dir DIR"
        )
    hint = option_type(key)
    if hint is None and re.split("[/@]", key)[0] not in groups():
        return no_such_key(key)
    if hint in NUMBERS:
        return f"command line: {key} takes {NUMBERS[hint]}, not '{value}'"
    if typing.get_origin(hint) is list and not value.startswith("["):
        return f"command line: {key} takes a list, not '{value}': {_quoting(sign, key)}"
    return f"command line: cannot read '{word}': {_quoting(sign, key)}"


def _quoting(sign: str, key: str) -> str:
    """How to write a value that holds texts, with an example for this option."""
    hint, text = option_type(key), '"a,b"'
    example = text
    if typing.get_origin(hint) is list:
        example = f"[{text}]"
    elif dataclasses.is_dataclass(hint):
        texts = [name for name, field in typing.get_type_hints(hint).items() if field is str]
        example = f"{{{next(iter(texts), 'name')}: {text}}}"
    elif typing.get_origin(hint) is dict:
        example = f"{{name: {text}}}"
    return (
        "put a text that has spaces or signs such as , = : ( ) { } into double quotes, and quote the word for the shell, as in"
        f" '{sign}{key}={example}'"
    )


def _changed_texts(hint: Any, read: Any, path: str, written: str) -> Iterator[tuple[str, Any]]:
    """Texts inside a list or section that Hydra takes for something else and changes: {path: 2024_01} is the number 202401."""
    if hint is str:
        if isinstance(read, bool | int | float) and str(read) not in written:
            yield path, read
    elif isinstance(read, list):
        inner = next(iter(typing.get_args(hint)), None)
        for at, item in enumerate(read):
            yield from _changed_texts(inner, item, f"{path}[{at}]", written)
    elif isinstance(read, dict) and hint is not None:
        for name, item in read.items():
            inner = _item_type(hint, str(name))
            yield from _changed_texts(inner, item, f"{path}.{name}", written)
