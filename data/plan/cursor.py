"""Where a data stream stands, as a few numbers that any layout can continue from, and what changed if it cannot.

The state is JSON, the same on every rank, and at most STATE_BYTES long with up to 20 datasets. It names a step, the block
that the step begins in, how many draws of each dataset were made, up to the last one that was trained on, and what the plan
was made from.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from visionloom.common.count import Count
from visionloom.common.errors import UserError
from visionloom.common.jsonfile import JsonError, checked

STATE_VERSION: Final = 3
STATE_BYTES: Final = 4096
OPTIONS: Final = {
    "version": "this program's way of planning",
    "seed": "run.seed",
    "patch_budget": "data.max_patches_per_token",
    "packing_window_samples": "data.packing_window_samples",
    "sample_token_multiple": "data.sample_token_multiple",
    "max_samples_per_pack": "data.max_samples_per_pack",
    "shuffle_block_samples": "data.shuffle_block_samples",
    "weights_in": "data.weights_in",
    "phase": "phase",
    "tokenizer": "data.tokenizer",
    "media": "data.media or data.chat_format",
    "draws_per_block": "draws of a block",
}
"""The option behind each fact of a plan; others are the phase's own."""
OLD_FACTS: Final = {
    "window": "packing_window_samples",
    "multiple": "sample_token_multiple",
    "most": "max_samples_per_pack",
    "block": "shuffle_block_samples",
    "draws_per_segment": "draws_per_block",
}
"""Today's name of facts that states had under another one until 2026-11-26."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a plan begins: usually at step 0 with nothing drawn."""

    step: int = 0
    """Step of the phase that is the plan's first."""
    draws: Mapping[str, int] = field(default_factory=dict)
    """Draws of each dataset, by its content, that were made before."""

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "Origin":
        """Return the origin of the plan that a state was made by."""
        return cls(int(state["origin"]["step"]), dict(state["origin"]["draws"]))

    @classmethod
    def after(cls, state: Mapping[str, Any], step: int) -> "Origin":
        """Continue after all that a state has drawn, at a step of the phase.

        What was drawn before the last sample trained on, but still waited for a pack, is passed over for this epoch: of each
        dataset at most a window and a 40th of its epoch (`Plan.limits`). So nothing that was seen comes again.
        """
        contents = {name: facts[0] for name, facts in state["plan"]["datasets"].items()}
        # datasets that the plan no longer draws from keep their counts
        draws = dict(state["origin"]["draws"])
        for name, count in state["draws"].items():
            draws[contents[name]] = count
        return cls(step, draws)


@dataclass(frozen=True)
class _Origin:
    step: Count
    draws: dict[str, Count]


@dataclass(frozen=True)
class _State:
    """The form of a state."""

    version: int
    plan_hash: str
    step: Count
    block: Count
    first_pack: Count
    draws: dict[str, Count]
    origin: _Origin
    plan: dict[str, Any]
    passed_over: list[tuple[Count, Count]] = field(default_factory=list)
    prompts: Count = 0


def plan_hash(facts: Mapping[str, Any], origin: Origin) -> str:
    """Return 32 hexadecimal digits over all that decides what the steps of a plan contain."""
    # names of facts are in it too: a renamed option makes another hash, see _with_todays_names
    parts = [facts, origin.step, sorted(origin.draws.items())]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def check_state(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a state with today's names; it may come from a stranger's checkpoint.

    Raises UserError for a state of another version of this program, or of another form.
    """
    # until 2026-11-26; the same state with another word in it
    if state.get("version") == 2 and "segment" in state:
        state = {**state, "block": state["segment"], "version": STATE_VERSION}
        state.pop("segment")
    if state.get("version") != STATE_VERSION:
        raise UserError(
            f"the checkpoint's data state has version {str(state.get('version'))[:20]}, this program reads version {STATE_VERSION}:"
            " continue with the program that wrote it, or begin a new run with its weights (init.checkpoint=FOLDER, run.name=NEW)"
        )
    _check_form(state)
    return _with_todays_names(state)


def _check_form(state: Mapping[str, Any]) -> None:
    """Refuse a state that plans could not be made from; it is as untrusted as the rest of its checkpoint."""
    where = "state.json of a checkpoint"
    facts_form = dict[str, tuple[str, float, str]]
    try:
        checked(dict(state), _State, where, "data")
        facts = state["plan"].get("datasets")
        datasets = checked(facts, facts_form, where, "data.plan.datasets")
    except JsonError as error:
        raise UserError(f"{error}: take a checkpoint of this version") from error
    if unknown := sorted(state["draws"].keys() - datasets.keys()):
        raise UserError(
            f"{where}: data.draws counts {unknown[0][:80]!r}, which is none of its datasets: take a checkpoint of this version"
        )


def _with_todays_names(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Rename old facts, and make the hash anew: it is over names too, and the plan is the same."""
    if OLD_FACTS.keys().isdisjoint(state["plan"]):
        return state
    facts = {OLD_FACTS.get(name, name): value for name, value in state["plan"].items()}
    return {**state, "plan": facts, "plan_hash": plan_hash(facts, Origin.of(state))}


def changes(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    phase: str,
) -> list[str]:
    """Say what differs between the facts of two plans, one phrase each, naming the option."""
    changed = []
    for name, value in now.items():
        # the draws of a block follow from the rest
        if name not in ("datasets", "draws_per_block") and before.get(name) != value:
            option = OPTIONS.get(name, f"phases.{phase}.{name}")
            changed.append(f"{option} was {before.get(name)}, now {value}")
    for name in sorted({*before["datasets"], *now["datasets"]}):
        changed += _dataset_changes(name, before["datasets"].get(name), now["datasets"].get(name))
    return changed or ["the order of the datasets changed"]


def _dataset_changes(
    name: str, before: Sequence[object] | None, now: Sequence[object] | None
) -> list[str]:
    """Say what differs between the facts of a dataset; None: the plan is without it."""
    if before is None:
        return [f"dataset {name} was added"]
    if now is None:
        return [f"dataset {name} was removed"]
    meaning = ("content", "weight", "over_length")
    return [
        f"{text} of dataset {name} was {old}, now {new}"
        for text, old, new in zip(meaning, before, now, strict=True)
        if old != new
    ]
