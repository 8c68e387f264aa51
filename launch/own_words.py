"""The `name=value` words of a command itself, apart from those of the run that it composes: fields of a dataclass."""

import math
import typing
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any, Final

from visionloom.common.errors import SHOWN, UserError, did_you_mean
from visionloom.common.settings import check
from visionloom.common.text import one_line
from visionloom.launch.composing.words import NUMBERS
from visionloom.launch.configure import split_options
from visionloom.launch.environment import check_home
from visionloom.train.config import RunConfig

OF_RUN: Final = frozenset(field.name for field in fields(RunConfig)) | {"recipe"}
"""First names of a run's own options."""
FLAGS: Final = {"true": True, "false": False}


def take_words(own: Any, argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Set the fields of a dataclass by the words of a command line.

    Args:
        own: its fields have types and bounds (common/settings.py).
        argv: the command line without the program.

    Returns:
        a line for each word that is wrong; the words of the run.
    """
    hints = typing.get_type_hints(type(own))
    given, others = split_options(argv, list(hints))
    faults = []
    for name, text in given.items():
        try:
            setattr(own, name, _value(hints[name], name, text))
        except UserError as error:
            faults += error.lines
    faults += check(own).lines
    return faults + _mistyped(hints, others), others


def _mistyped(names: Iterable[str], words: Sequence[str]) -> list[str]:
    """Return a line for each word of the run that the run does not know and that is near one of this command."""
    names = list(names)
    lines = []
    for word in words:
        name, equals, value = word.partition("=")
        bare = name.lstrip("+")
        if not equals or "." in bare or bare in OF_RUN:
            continue
        if bare in names:
            lines.append(f"{one_line(name)} has no plus: write {bare}={_shown(value)}")
        elif close := did_you_mean(bare, names):
            lines.append(f"no such key: {one_line(bare)}{close}")
    return lines


def _value(hint: Any, name: str, text: str) -> Any:
    """Return a word's value in its type; UserError if the text is none."""
    if hint is str:
        check_home(name, text)
        if not text:
            raise UserError(f"{name}= is empty: give it a value or leave the word out")
        return text
    if hint is bool:
        if text not in FLAGS:
            raise UserError(f"{name}={_shown(text)} is not {NUMBERS[bool]}: write {name}=false")
        return FLAGS[text]
    return _number(float if hint in (float, float | None) else int, name, text)


def _number(kind: type[int] | type[float], name: str, text: str) -> float:
    try:
        # Of thousands of digits Python makes no number.
        value: float = kind(text) if len(text) <= SHOWN else math.nan
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise UserError(f"{name}={_shown(text)} is not {NUMBERS[kind]}: write {name}=N")
    return value


def _shown(text: str) -> str:
    return one_line(text[:SHOWN])
