"""What a submission leaves in the run's folder: scripts, the configuration as it was composed, and the state of the code."""

import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from visionloom.common.errors import UserError
from visionloom.launch.guarding.claim import check_writable
from visionloom.launch.submitting.jobs import SubmittedJob

FOLDER: Final = "submit"
LOG: Final = "%x-%j.log"
"""Name of a job and its number, as sbatch fills them in."""
GIT_SECONDS: Final = 60.0


def new_folder(run_folder: Path) -> Path:
    """Name the folder of a submission, which is not there yet: by the time, since a run may be submitted again."""
    return run_folder / FOLDER / time.strftime("%Y%m%d-%H%M%S")


def write(folder: Path, jobs: list[SubmittedJob], scripts: Mapping[str, str]) -> None:
    """Write scripts by name, the configuration of each job and the state of the code into a new folder.

    Raises:
        UserError: if that is impossible.
    """
    check_writable(folder.parent, "run.folder")
    try:
        folder.mkdir()
    except FileExistsError:
        raise UserError(f"{folder} is there: the run was submitted a moment ago") from None
    for job in jobs:
        (folder / f"{job.name}.yaml").write_text(job.config.to_yaml())
    for name, script in scripts.items():
        (folder / f"{name}.sh").write_text(script)
    (folder / "git.txt").write_text(git_state(Path(__file__).parents[2]))


def git_state(root: Path) -> str:
    """Return the commit of a checkout, and what was changed in it since."""
    parts = []
    for words in (["log", "-1"], ["status", "--short", "--branch"], ["diff", "HEAD"]):
        command = ["git", "-C", str(root), *words]
        try:
            done = subprocess.run(command, capture_output=True, timeout=GIT_SECONDS, check=True)
        except (OSError, subprocess.SubprocessError):
            return f"{root} is no checkout of git\n"
        parts.append(f"$ git {' '.join(words)}\n{done.stdout.decode(errors='replace')}")
    return "\n".join(parts)
