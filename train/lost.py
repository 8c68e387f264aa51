"""A run whose checkpoints are all gone: its events say that it had some, and its files are kept."""

from pathlib import Path

from visionloom.common.errors import UserError
from visionloom.train.checkpoint.state_file import CHECKPOINTS
from visionloom.train.observe.metrics import ASIDE, EVENTS, aside, read_lines


def lost_checkpoints(folder: Path, damaged: list[str]) -> str:
    """Return why a run's folder without a whole checkpoint is not that of a new run; empty if it is.

    Args:
        folder: of the run.
        damaged: a line for each damaged checkpoint in it.
    """
    if damaged:
        more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        return f"{folder} holds only damaged checkpoints, {damaged[0]}{more}"
    if (step := last_saved(folder)) is not None:
        return f"{folder} holds no checkpoint, but {EVENTS} tells of one after step {step}"
    return ""


def move_aside(folder: Path) -> Path:
    """Move a run's checkpoints where no start looks for them; returns the folder of the checkpoints."""
    # May be a link to another disk, so its content is moved within it.
    checkpoints = folder / CHECKPOINTS
    if checkpoints.is_symlink() and not checkpoints.exists():
        raise UserError(
            f"{checkpoints} is a link to {checkpoints.readlink()}, which is not there: put it back, or remove the link"
        )
    if checkpoints.exists() and not checkpoints.is_dir():
        checkpoints.rename(aside(checkpoints))
    # Inside, so that it is on the same disk: a rename takes no room.
    kept = aside(checkpoints / CHECKPOINTS)
    kept.mkdir(parents=True, exist_ok=True)
    for entry in list(checkpoints.iterdir()):
        if not entry.name.startswith(ASIDE):
            entry.rename(kept / entry.name)
    return kept


def last_saved(folder: Path) -> int | None:
    """Return the step of the last checkpoint in the events since the run last began; None without."""
    path = folder / EVENTS
    last = None
    if not path.exists():
        return None
    for event in read_lines(path.read_text(errors="replace"), EVENTS):
        if event.get("event") == "start_anew":
            last = None
        elif event.get("event") == "checkpoint" and isinstance(event.get("step"), int):
            last = int(event["step"])
    return last
