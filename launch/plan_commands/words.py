"""The words of launch/plan.py itself, apart from those of the run that it plans."""

import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Final

from visionloom.common.errors import SHOWN, UserError, did_you_mean, unknown
from visionloom.common.settings import check, option
from visionloom.common.text import one_line
from visionloom.forecast.machine import machine, machine_names
from visionloom.forecast.request import PlanRequest
from visionloom.launch.composing.words import NUMBERS
from visionloom.launch.configure import split_options
from visionloom.launch.environment import check_home
from visionloom.train.config import RunConfig

MOST_GPUS: Final = 1 << 20


@dataclass
class PlanWords:
    """The GPUs to plan for, and what is planned on them."""

    world: int = option(1, "free", least=1, most=MOST_GPUS)
    """GPUs of the run, a rank on each; it must be given."""
    gpu: str = option("h100", "free")
    """File of recipes/gpu."""
    memory: float | None = option(None, "free", above=0, most=4096)
    """GiB of each card; None: as the file says."""
    imbalance: float = option(1.0, "free", least=1, most=1024)
    """Tokens of a mixture's busiest rank of experts, as a multiple of the mean."""
    phase: str = option("", "free")
    """Only this phase; empty: all."""
    out: str = option("", "free")
    """Folder of plan.json and plan.html; empty: plan/ in the run's folder."""

    def request(self, config: RunConfig) -> PlanRequest:
        """Return what is to be planned of a run; UserError for a phase that it lacks."""
        card = machine(self.gpu)
        if self.memory is not None:
            card = replace(card, memory_gib=self.memory)
        phases = tuple(config.phases)
        if self.phase and self.phase not in phases:
            raise UserError(unknown("phase", self.phase, phases))
        if self.phase:
            phases = (self.phase,)
        return PlanRequest(config, self.world, self.gpu, card, self.imbalance, phases)


_HINTS: Final = typing.get_type_hints(PlanWords)
_OF_RUN: Final = frozenset(field.name for field in fields(RunConfig)) | {"recipe"}
"""First names of a run's own options."""


def read_plan_words(argv: Sequence[str]) -> tuple[PlanWords, list[str]]:
    """Take the command's own words from the command line; return them, and the words of the run.

    Raises:
        UserError: one line for each word that is missing or wrong; a phase is checked only with the run.
    """
    given, others = split_options(argv, list(_HINTS))
    own = PlanWords()
    faults = []
    if "world" not in given:
        faults.append("world is missing: say how many GPUs the run has, world=N")
    for name, text in given.items():
        try:
            setattr(own, name, _value(_HINTS[name], name, text))
        except UserError as error:
            faults += error.lines
    faults += check(own).lines
    if own.gpu not in machine_names():
        faults.append(unknown("gpu", own.gpu, machine_names()))
    faults += _mistyped(others)
    if faults:
        raise UserError(*faults)
    return own, others


def _mistyped(words: Sequence[str]) -> list[str]:
    """Return a line for each word of the run that the run does not know and that is near one of this command."""
    lines = []
    for word in words:
        name, equals, value = word.partition("=")
        bare = name.lstrip("+")
        if not equals or "." in bare or bare in _OF_RUN:
            continue
        if bare in _HINTS:
            lines.append(f"{one_line(name)} has no plus: write {bare}={one_line(value[:SHOWN])}")
        elif close := did_you_mean(bare, _HINTS):
            lines.append(f"no such key: {one_line(bare)}{close}")
    return lines


def _value(hint: Any, name: str, text: str) -> Any:
    """Return a word's value in its type; UserError if the text is none."""
    if hint is str:
        check_home(name, text)
        if not text:
            raise UserError(f"{name}= is empty: give it a value or leave the word out")
        return text

    kind: type[int] | type[float] = int if hint is int else float
    try:
        # Of thousands of digits Python makes no number.
        value: float = kind(text) if len(text) <= SHOWN else math.nan
    except ValueError:
        value = math.nan
    if math.isnan(value):
        shown = one_line(text[:SHOWN])
        raise UserError(f"{name}={shown} is not {NUMBERS[kind]}: write {name}=N")
    return value
