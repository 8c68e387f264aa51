"""Options that have another name since, or are gone: refused on the command line and in recipes, read in old checkpoints.

The only place that knows old names; state_file.py and changes.py translate what a checkpoint remembers, launch/composing/explain.py says
what to write now.
"""

from collections.abc import Mapping
from typing import Any, Final

RENAMED: Final = {
    "data.window": "data.packing_window_samples",
    "data.pack_multiple": "data.sample_token_multiple",
    "data.pack_segments": "data.max_samples_per_pack",
    "data.patch_budget": "data.max_patches_per_token",
    "data.shuffle_block": "data.shuffle_block_samples",
    "evaluation.pictures": "evaluation.report_samples",
}
"""Today's name of each old one."""
GONE: Final = {
    "model.backend": "attention is chosen by what is installed",
}
"""Why an option is no longer needed; each had one value that worked."""
UNNAMED: Final = {"optim.name": "adamw"}
"""Values of options that older checkpoints do not name: there was one."""


def old_option(path: str) -> str | None:
    """Return the line for an option of older versions, which says what to do; None for any other path."""
    if path in RENAMED:
        return f"{path} has a new name: write {RENAMED[path]}"
    if path not in GONE:
        return None
    return f"{path} is gone: leave it out, {GONE[path]}"


def todays_settings(settings: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Return what an older version stored under today's names, without what is gone.

    Args:
        settings: values by dotted path, or sections by name as dataclasses.asdict makes them.
        path: dotted path of these settings; empty for those of a whole run.
    """
    prefix = f"{path}." if path else ""
    today = {}
    for name, value in settings.items():
        option = f"{prefix}{name}"
        # It had one value that worked, so nothing is lost.
        if option in GONE:
            continue
        new = RENAMED.get(option, option).removeprefix(prefix)
        today[new] = todays_settings(value, option) if isinstance(value, dict) else value
    return today
