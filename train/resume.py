"""Find where a run stands when it is started: its newest whole checkpoint, and how the last start ended."""

from pathlib import Path

from visionloom.common.atomic import replacing
from visionloom.common.errors import UserError
from visionloom.parallel.topology import Topology
from visionloom.train.changes import changes
from visionloom.train.checkpoint import read as checkpoint
from visionloom.train.checkpoint.read import Checkpoint
from visionloom.train.checkpoint.state_file import CHECKPOINTS
from visionloom.train.checkpoint.write import first_fault, sweep
from visionloom.train.config import RunConfig
from visionloom.train.exchange.companions import SETTINGS_OF_RUN
from visionloom.train.lost import lost_checkpoints, move_aside
from visionloom.train.observe import status
from visionloom.train.observe.observer import Observer


def resume(
    config: RunConfig, folder: Path, topology: Topology, observer: Observer
) -> Checkpoint | None:
    """Find the newest whole checkpoint of a run, None for a new one, and rewind its metrics to it.

    Raises:
        UserError: if the checkpoint does not fit the configuration, or all that the run had are lost.
    """
    if topology.is_main:
        sweep(folder)
    observer.begin()
    report_last_end(observer)
    # After the sweep: a rank that is ahead must not see a folder that is being removed.
    topology.barrier()
    newest, damaged = checkpoint.newest(folder, topology)
    for line in damaged:
        observer.event("damaged_checkpoint", detail=line)
        observer.say(f"passing over a damaged checkpoint: {line}")

    if newest is None:
        begin_anew(folder, damaged, config.run.start_anew, topology, observer)
        step = 0
    else:
        step = newest.run_state.step
        report_resume(config, newest, observer)

    status.current.resumes(step)
    # Only now: a start that is refused leaves the files of the run as they are.
    if observer.log is not None:
        keep_settings(config, folder)
        observer.log.load_waiting(folder / CHECKPOINTS)
        observer.rewind(step)
    return newest


def keep_settings(config: RunConfig, folder: Path) -> None:
    """Write the resolved configuration into the run's folder, for exports, reports and people."""
    with replacing(folder / SETTINGS_OF_RUN) as file:
        file.write(config.to_yaml().encode())


def report_resume(config: RunConfig, newest: Checkpoint, observer: Observer) -> None:
    """Say where a run resumes and with which other settings; UserError if these are not allowed."""
    step = newest.run_state.step
    changed = changes(config, newest.run_state, str(newest.folder))
    observer.event("resume", step=step, folder=str(newest.folder))
    observer.say(f"resuming after step {step} from {newest.folder}")
    for each in changed:
        fields = {"option": each.option, "was": each.was, "now": each.now}
        observer.event("settings_changed", step=step, **fields)
        observer.say(f"goes on with other settings: {each}")


def report_last_end(observer: Observer) -> None:
    """Say how the start before this one ended, if not as it should."""
    before = status.current.before
    if before is None or before.state == "done":
        return
    cause = before.cause or before.end
    observer.event("last_end", cause=cause, rank=before.rank, step=before.step)
    after = f" after step {before.step}" if before.step else ""
    observer.say(f"the start before this one ended{after}: {before.end}")


def begin_anew(
    folder: Path, damaged: list[str], allowed: bool, topology: Topology, observer: Observer
) -> None:
    """Begin at step 0, and keep the files of a run that has had checkpoints.

    Raises:
        UserError: on all ranks, if it has had some and run.start_anew does not allow it.
    """
    fault = first_fault(lost_checkpoints(folder, damaged) if topology.is_main else "")
    if not fault:
        return
    if not allowed:
        raise UserError(
            f"{fault}: put one back, set run.name to start another run, or begin this one at step 0 with run.start_anew=true,"
            " which moves aside what is left"
        )
    if topology.is_main:
        observer.event("start_anew", cause=fault, kept=str(move_aside(folder)))
    observer.say(f"beginning at step 0: {fault}")
