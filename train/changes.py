"""Settings that changed since a checkpoint was made: free ones pass, those that change the run are reported or refused.

The schema says what a change of each option means (common/settings.py). Options of a phase count while that phase is in
progress: a finished phase is done, and a phase to come has not begun. data/plan/cursor.py compares datasets by their content,
which data.on_change governs.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from visionloom.common.errors import UserError
from visionloom.common.settings import Change, Option, Rules, options
from visionloom.common.text import one_line
from visionloom.train.checkpoint.state_file import RunState, absolute, model_of
from visionloom.train.config import RunConfig
from visionloom.train.old_options import UNNAMED, todays_settings

PHASES = "phases"
"""The names of the phases before the one in progress, as a setting: they count as done."""
WEIGHTS = ("init.huggingface", "init.checkpoint", "init.vision", "init.language")
"""Folders, which may be written in another way, or from another working folder."""
SHOWN = 80
"""Characters of a checkpoint's value in a message."""


@dataclass(frozen=True)
class Changed:
    """An option whose value is not that of a checkpoint."""

    option: str
    was: Any
    now: Any
    change: Change

    def __str__(self) -> str:
        was = one_line(str(self.was)[:SHOWN])
        return f"{self.option} was {was}, now {self.now}"


def settings_of(config: RunConfig, phase_name: str) -> dict[str, Any]:
    """Return the settings that count for continuing a phase, by their option, which its checkpoints keep."""
    return {each.name: each.value for each in _counting(config, phase_name)}


def changes(config: RunConfig, run_state: RunState, where: str) -> list[Changed]:
    """Return the changed settings of a run that continues from a checkpoint, if run.on_change allows them.

    Args:
        config: of the run as it is started now.
        run_state: the checkpoint's; of versions that kept no settings it has model, adapters and steps.
        where: the checkpoint's folder, for messages.

    Raises:
        UserError: naming each change that is impossible, or that run.on_change=error forbids.
    """
    if run_state.phase not in config.phases:
        raise UserError(
            f"{where} is of phase {run_state.phase}, which this recipe lacks: {_fresh_start(config)}"
        )
    changed = list(_changed(config, run_state))
    never = [each for each in changed if each.change == "never"]
    if never:
        raise UserError(
            f"{where} does not fit: {_listed(never)}: {_set_back(never)}, or {_fresh_start(config)}"
        )
    if changed and config.run.on_change == "error":
        raise UserError(
            f"{where} was trained with other settings: {_listed(changed)}: {_set_back(changed)},"
            f" go on with what is new by run.on_change=continue, or {_fresh_start(config)}"
        )
    return changed


def _changed(config: RunConfig, run_state: RunState) -> Iterator[Changed]:
    """Yield the checkpoint's options whose value is another one here, as far as they still count for something."""
    before = UNNAMED | (todays_settings(run_state.settings) or _older(run_state))
    phase_name = run_state.phase
    finished = (
        run_state.phase_done and config.phases[phase_name].total_steps <= run_state.phase_step
    )
    is_last = phase_name == list(config.phases)[-1]
    adapters = config.lora.rank or before.get("lora.rank")
    for each in _counting(config, phase_name):
        if each.name not in before or before[each.name] == each.value:
            continue
        was = before[each.name]
        # The same folder, written in another way or from another working folder.
        if each.name in WEIGHTS and each.value:
            if absolute(each.value) == run_state.inputs.get("weights"):
                continue
        elif (
            (each.name == PHASES and not _reordered(config, phase_name, was))
            or (each.name.startswith("phases.") and finished)
            or (each.name.startswith("lora.") and not adapters)
        ):
            continue
        if finished and is_last and each.rules.change == "run":
            continue
        change = each.rules.change
        if each.name.endswith(".trainable") and _trains_more(each.value, was):
            # A group that was frozen has no moments in the checkpoint.
            change = "never"
        yield Changed(each.name, was, each.value, change)


def _trains_more(groups: Any, before: Any) -> bool:
    """Return whether a phase trains groups that it did not train before, as a checkpoint says."""
    known = set(map(str, before)) if isinstance(before, list) else set()
    return not set(groups) <= known


def _reordered(config: RunConfig, phase_name: str, before: Any) -> bool:
    """Return whether the phases before the one in progress are not those that the run has had.

    Phases that are left out now were done all the same.
    """
    names = list(config.phases)
    done = set(map(str, before)) if isinstance(before, list) else set()
    place = names.index(phase_name)
    is_missing = not set(names[:place]) <= done
    is_repeated = bool(set(names[place + 1 :]) & done)
    return is_missing or is_repeated


def _counting(config: RunConfig, phase_name: str) -> Iterator[Option]:
    """Yield the options that count for a phase: `tokens` as the `steps` that they make."""
    names = list(config.phases)
    yield Option(PHASES, names[: names.index(phase_name)], Rules("run"))
    phase = config.phases[phase_name]
    phase = replace(phase, steps=phase.total_steps)
    for each in options(replace(config, phases={phase_name: phase})):
        counts = each.rules.change in ("run", "never")
        if counts and each.name != f"phases.{phase_name}.tokens":
            yield each


def _older(run_state: RunState) -> dict[str, Any]:
    """Return the settings of a checkpoint without `settings`: its model, adapters and steps."""
    settings: dict[str, Any] = {}
    model = asdict(model_of(run_state))
    for part in ("text", "vision"):
        for name, value in model[part].items():
            settings[f"model.{part}.{name}"] = value
    adapters: Mapping[str, Any] = run_state.lora or {"rank": 0}
    for name in ("rank", "targets", "groups"):
        if name in adapters:
            settings[f"lora.{name}"] = adapters[name]
    settings[f"phases.{run_state.phase}.steps"] = run_state.phase_steps
    return settings


def _listed(changed: list[Changed]) -> str:
    return "; ".join(map(str, changed))


def _set_back(changed: list[Changed]) -> str:
    return "set it back" if len(changed) == 1 else "set them back"


def _fresh_start(config: RunConfig) -> str:
    """Return the way out that always works, for the end of a message."""
    folder = config.run.folder
    # A folder that is set by itself would stay the old run's under any name.
    is_own = folder in ("", f"runs/{config.run.name}")
    other = "" if is_own else f" (and run.folder, which is set to {folder})"
    return f"set run.name to start a new run{other}"
