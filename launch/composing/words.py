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
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from visionloom.common.errors import UserError
from visionloom.launch.composing.explain import groups, no_such_key
from visionloom.launch.environment import check_home
from visionloom.train.config import RunConfig
from visionloom.train.old_options import old_option

LONGEST = 8192
"""Characters of a word: twice a path's."""
LONGEST_NUMBER = 40
OVERRIDE = re.compile(r"(\+{0,2})([^=+~][^=]*)=(.*)", re.DOTALL)
EXPONENT = re.compile(r"[+-]?[0-9]+(?:\.[0-9]*)?[eE][+]?[0-9]{1,3}")
NUMBERS = {int: "a whole number", float: "a number", bool: "true or false"}


def check_words(words: Sequence[str]) -> None:
    """Refuse, with their cure, the words that Hydra would answer with advice that does not help here."""
    keys = [word.lstrip("+~").partition("=")[0] for word in words]
    # All of them together: Hydra stops at the first.
    lines = [line for key in keys if (line := old_option(key))]
    if lines:
        raise UserError(*lines)

    for word in words:
        if re.match(r"[+~]*=", word):
            raise UserError(f"command line: '{word}' has no key: write key=value")
        if word.startswith("recipe="):
            raise UserError(f"a recipe is added, not overridden: write +{word}")
        if re.match(r"[+~]*(?:[^=]*@)?hydra(?:$|[./@=:])", word):
            raise UserError(
                f"command line: '{word}' is refused: words set options of the run, not of Hydra"
            )


def readable(words: Sequence[str]) -> list[str]:
    """Return the words with every text quoted for Hydra.

    A text that Hydra reads as one string is left alone, with its quotes, escapes and `${...}`; so is null.

    Raises:
        UserError: one line, with how to write the first word that cannot be read.
    """
    read = []
    # With the word before it: a space in a value that the shell was not to split is its likely cause.
    for before, word in zip(["", *words], words, strict=False):
        if len(word) > LONGEST:
            raise UserError(
                f"command line: '{word[:40]}...' has {len(word)} characters: at most {LONGEST}; use a recipe of your own"
            )
        if word.startswith("~"):
            read.append(word)
        elif match := OVERRIDE.fullmatch(word):
            read.append(Setting(*match.groups()).for_hydra())
        else:
            joined = ""
            if before:
                joined = f"; if it belongs to the word before it, quote both for the shell: '{before} {word}'"
            raise UserError(f"command line: cannot read '{word}': write key=value{joined}")
    return read


@dataclass(frozen=True)
class Setting:
    """A word of the form `key=value`."""

    sign: str
    """What stands before the key: nothing, + or ++."""
    key: str
    value: str

    @property
    def word(self) -> str:
        """Return the word as it is written."""
        return f"{self.sign}{self.key}={self.value}"

    @property
    def type(self) -> Any:
        """Return the type that the schema wants; None for a group or an unknown key."""
        return option_type(self.key)

    @property
    def names_group(self) -> bool:
        """Return whether the key is a group of recipes, one of whose files the value chooses."""
        return re.split("[/@]", self.key)[0] in groups()

    def for_hydra(self) -> str:
        """Return the word such that Hydra reads what the user meant; UserError with the cure if it cannot."""
        if self.type is int and (number := whole(self.value)) is not None:
            return Setting(self.sign, self.key, str(number)).for_hydra()
        if self.type is str or (self.names_group and not self.value.startswith(("[", "{"))):
            return self._quoted()

        # Python refuses more than 4,300 digits, in words that name no option.
        if self.type in NUMBERS and len(self.value) > LONGEST_NUMBER:
            raise UserError(
                f"command line: {self.key} takes {NUMBERS[self.type]}, not {len(self.value)} characters"
            )
        override = _parse(self.word)
        if override is None:
            raise UserError(self._cure())
        self._refuse_changed(override)
        return self.word

    def _refuse_changed(self, override: Override) -> None:
        """Refuse a list or section with a text that Hydra has taken for something else."""
        for path, text in _changed_texts(self.type, override.value(), self.key, self.value):
            raise UserError(
                f"command line: {path} in '{self.word}' would be read as {text}: {self._quoting()}"
            )

    def _quoted(self) -> str:
        """Return a word whose value is a text, quoted unless Hydra reads one string as it stands."""
        check_home(f"{self.sign}{self.key}", self.value)
        override = _parse(self.word)
        if override is not None and isinstance(override.value(), str | None):
            return self.word
        text = QuotedString(self.value, Quote.single).with_quotes()
        word = f"{self.sign}{self.key}={text}"
        if _parse(word) is None:
            raise UserError(self._cure())
        return word

    def _cure(self) -> str:
        """Return the line for a word that Hydra cannot read, or reads as several values."""
        key, value = self.key, self.value
        # With a value that is beyond doubt, only the name can be at fault.
        if _parse(f"{key}=1") is None:
            return (
                f"command line: cannot read the name '{key}': names have letters, digits, - and _; recipes with other names are"
                " included by one of your own, +recipe=NAME --config-dir DIR"
            )
        if self.type is None and not self.names_group:
            return no_such_key(key)
        if self.type in NUMBERS:
            return f"command line: {key} takes {NUMBERS[self.type]}, not '{value}'"
        if typing.get_origin(self.type) is list and not value.startswith("["):
            return f"command line: {key} takes a list, not '{value}': {self._quoting()}"
        return f"command line: cannot read '{self.word}': {self._quoting()}"

    def _quoting(self) -> str:
        """Return how to write a value that holds texts, with an example for this option."""
        text = '"a,b"'
        example = text
        if typing.get_origin(self.type) is list:
            example = f"[{text}]"
        elif dataclasses.is_dataclass(self.type):
            hints = typing.get_type_hints(self.type)
            texts = [name for name, hint in hints.items() if hint is str]
            example = f"{{{next(iter(texts), 'name')}: {text}}}"
        elif typing.get_origin(self.type) is dict:
            example = f"{{name: {text}}}"
        return (
            "put a text that has spaces or signs such as , = : ( ) { } into double quotes, and quote the word for the shell, as in"
            f" '{self.sign}{self.key}={example}'"
        )


def option_type(key: str) -> Any:
    """Return the type that the schema has at a dotted path, without None; None where it has nothing there."""
    return functools.reduce(_item_type, key.split("."), RunConfig)


def _item_type(hint: Any, name: str) -> Any:
    """Return the type of a key of a section or mapping, without None; None where it has no such key."""
    inner: Any = None
    if dataclasses.is_dataclass(hint):
        inner = typing.get_type_hints(hint).get(name)
    elif typing.get_origin(hint) is dict:
        _, inner = typing.get_args(hint)
    if isinstance(inner, types.UnionType):
        return next(choice for choice in typing.get_args(inner) if choice is not types.NoneType)
    return inner


def whole(text: str) -> int | None:
    """Return the whole number that a text with an exponent stands for (`15e12`); None for any other text."""
    if len(text) > LONGEST_NUMBER or EXPONENT.fullmatch(text) is None:
        return None
    # Three digits of exponent reach past 1e308, where a float is infinite.
    number = float(text)
    if not math.isfinite(number) or not number.is_integer():
        return None
    return int(number)


def _parse(word: str) -> Override | None:
    """Return what Hydra reads in a word; None if it reads nothing, or several values."""
    try:
        override = OverridesParser.create().parse_override(word)
    except (HydraException, ValueError, RecursionError):
        return None  # ValueError: a number of more than 4,300 digits
    # Several values are a sweep, which every rank would run by itself.
    return None if override.is_sweep_override() else override


def _changed_texts(hint: Any, read: Any, path: str, written: str) -> Iterator[tuple[str, Any]]:
    """Yield texts inside a list or section that Hydra takes for something else, with what it makes of them.

    An example is {path: 2024_01}, which it reads as the number 202401.
    """
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
