"""A run whose checkpoints are all gone: that it had some is known from its events, and what is left of it is kept."""

import time
from pathlib import Path
from typing import Final

from visionloom.common.jsonfile import JsonError, load_json
from visionloom.train.metrics import EVENTS, METRICS
from visionloom.train.state_file import CHECKPOINTS

ASIDE: Final = "before-"
"""What names of things moved aside begin with."""


def lost_checkpoints(folder: Path, damaged: list[str]) -> str:
    """Why a run's folder without a whole checkpoint is not that of a new run; empty if it is.

    Args:
        folder: of the run.
        damaged: a line for each damaged checkpoint in it.
    """
    if damaged:
        more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        return f"{folder} holds only damaged checkpoints, {damaged[0]}{more}"
    if (step := _last_saved(folder)) is not None:
        return f"{folder} holds no checkpoint, but {EVENTS} tells of one after step {step}"
    return ""


def move_aside(folder: Path) -> Path:
    """Move a run's checkpoints and metrics where no start looks for them; returns the folder of the checkpoints."""
    stamp = f"{ASIDE}{time.strftime('%Y%m%d-%H%M%S')}"
    checkpoints = folder / CHECKPOINTS  # may be a link to another disk, so what is in it is moved within it
    kept = checkpoints / stamp
    kept.mkdir(parents=True, exist_ok=True)
    for entry in list(checkpoints.iterdir()):
        if not entry.name.startswith(ASIDE):
            entry.rename(kept / entry.name)
    if (folder / METRICS).exists():
        (folder / METRICS).rename(folder / f"{stamp}.{METRICS}")
    return kept


def _last_saved(folder: Path) -> int | None:
    """The step of the last checkpoint that the events tell of since the run last began; None if there was none."""
    path, last = folder / EVENTS, None
    if not path.exists():
        return None
    for line in path.read_text(errors="replace").splitlines():
        try:
            event = load_json(line, EVENTS)
            if event["event"] == "start_anew":
                last = None
            elif event["event"] == "checkpoint":
                last = int(event["step"])
        except (JsonError, KeyError, TypeError, ValueError):  # a line that was cut off
            continue
    return last
