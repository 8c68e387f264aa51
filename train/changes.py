"""Settings that changed since a checkpoint was made: free ones pass, those that change the run are told or refused.

What a change of an option means stands in the schema (common/settings.py). Options of a phase count while that phase is in
progress: what a finished phase had is done, and what a phase to come has is no change. What is read is compared by its content
in data/plan/cursor.py and is under data.on_change.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from visionloom.common.errors import UserError
from visionloom.common.settings import Change, Option, Rules, options
from visionloom.common.text import one_line
from visionloom.train.checkpoint.state_file import RunState, absolute, model_of
from visionloom.train.config import RunConfig
from visionloom.train.old_options import todays_settings

PHASES = "phases"
"""The names of the phases before the one in progress, as a setting: they count as done."""
WEIGHTS = ("init.huggingface", "init.checkpoint")
"""Folders, which may be written in another way, or from another working folder."""
SHOWN = 80
"""Characters of a checkpoint's value in a message."""


@dataclass(frozen=True)
class Changed:
    """An option that has another value than in a checkpoint."""

    option: str
    was: Any
    now: Any
    change: Change

    def __str__(self) -> str:
        return f"{self.option} was {one_line(str(self.was)[:SHOWN])}, now {self.now}"


def settings_of(config: RunConfig, phase: str) -> dict[str, Any]:
    """What a checkpoint of a phase remembers: the settings that count for going on with it, by their option."""
    return {each.name: each.value for each in _counting(config, phase)}


def changes(config: RunConfig, run_state: RunState, where: str) -> list[Changed]:
    """What is to be told of a run that goes on from a checkpoint, where run.on_change lets it.

    Args:
        config: of the run as it is started now.
        progress: the checkpoint's state; of versions that did not keep settings it knows model, adapters and steps.
        where: the checkpoint's folder, for messages.

    Raises:
        UserError: naming each change that cannot be, or that run.on_change=error does not let pass.
    """
    if run_state.phase not in config.phases:
        raise UserError(
            f"{where} is of phase {run_state.phase}, which this recipe lacks: {_fresh_start(config)}"
        )
    found = list(_changed(config, run_state))
    if never := [each for each in found if each.change == "never"]:
        raise UserError(
            f"{where} does not fit: {_listed(never)}: {'set it back' if len(never) == 1 else 'set them back'},"
            f" or {_fresh_start(config)}"
        )
    if found and config.run.on_change == "error":
        raise UserError(
            f"{where} was trained with other settings: {_listed(found)}: {'set it back' if len(found) == 1 else 'set them back'},"
            f" go on with what is new by run.on_change=continue, or {_fresh_start(config)}"
        )
    return found


def _changed(config: RunConfig, run_state: RunState) -> Iterator[Changed]:
    """Options of the checkpoint whose value is another one here, as far as something is left that they count for."""
    before = todays_settings(run_state.settings) or _older(run_state)
    finished = (
        run_state.phase_done and config.phases[run_state.phase].total_steps <= run_state.phase_step
    )
    over = finished and run_state.phase == list(config.phases)[-1]
    adapters = config.lora.rank or before.get("lora.rank")
    for each in _counting(config, run_state.phase):
        if each.name not in before or before[each.name] == each.value:
            continue
        if (
            each.name in WEIGHTS
            and each.value
            and absolute(each.value) == run_state.inputs.get("weights")
        ):
            continue
        if each.name == PHASES and not _reordered(config, run_state.phase, before[PHASES]):
            continue
        if each.name.startswith("phases.") and finished:
            continue
        if each.name.startswith("lora.") and not adapters:
            continue
        if over and each.rules.change == "run":
            continue
        was = before[each.name]
        more = each.name.endswith(".trainable") and not set(each.value) <= set(
            map(str, was if isinstance(was, list) else ())
        )
        yield Changed(each.name, was, each.value, "never" if more else each.rules.change)


def _reordered(config: RunConfig, phase: str, before: Any) -> bool:
    """Whether a phase counts as done that the run has not had, or one to come is done; those left out were, and stay so."""
    names, done = list(config.phases), set(map(str, before if isinstance(before, list) else ()))
    at = names.index(phase)
    return not set(names[:at]) <= done or bool(set(names[at + 1 :]) & done)


def _counting(config: RunConfig, phase: str) -> Iterator[Option]:
    """The options that count for a phase: `tokens` as the `steps` that they make."""
    names = list(config.phases)
    yield Option(PHASES, names[: names.index(phase)], Rules("run"))
    settings = config.phases[phase]
    settings = replace(settings, steps=settings.total_steps)
    for each in options(replace(config, phases={phase: settings})):
        if each.rules.change in ("run", "never") and each.name != f"phases.{phase}.tokens":
            yield each


def _older(run_state: RunState) -> dict[str, Any]:
    """The settings that a checkpoint without `settings` knows all the same."""
    model = asdict(model_of(run_state))
    parts = {"model.text": model["text"], "model.vision": model["vision"]}
    found = {
        f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()
    }
    adapters: Mapping[str, Any] = run_state.lora or {"rank": 0}
    found |= {
        f"lora.{name}": adapters[name] for name in ("rank", "targets", "groups") if name in adapters
    }
    return found | {f"phases.{run_state.phase}.steps": run_state.phase_steps}


def _listed(changed: list[Changed]) -> str:
    return "; ".join(map(str, changed))


def _fresh_start(config: RunConfig) -> str:
    folder = config.run.folder
    other = (
        ""
        if folder in ("", f"runs/{config.run.name}")
        else f" (and run.folder, which is set to {folder})"
    )
    return f"set run.name to start a new run{other}"
