"""Writing checkpoints that are whole or not there: saved aside, hashed, checked, renamed; in the background where asked.

The protocol: every rank stages its part and writes it to `step-N.tmp/` and hashes it (xxh3) as it is on disk; when all ranks
are done, the main rank writes the index, checks that every tensor is where the index says, writes the manifest, flushes all to
disk, renames the folder and replaces `latest`. A save that is killed or fails anywhere leaves the checkpoints before it as
they were. Training waits only while tensors are staged.
"""

import json
import os
import queue
import re
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from visionloom.common import pulse
from visionloom.common.atomic import replacing
from visionloom.common.errors import UserError
from visionloom.common.pulse import CHECKPOINT
from visionloom.common.text import warn
from visionloom.parallel.topology import Topology
from visionloom.train.checkpoint.index import read_index
from visionloom.train.checkpoint.optimizer_state import written_parts
from visionloom.train.checkpoint.planning import PhasePlanner, WritePlan
from visionloom.train.checkpoint.read import (
    LATEST,
    MANIFEST,
    WITHOUT_TENSORS,
    FileEntry,
    folder_of,
    gather_by_name,
    run_state_of,
    write_manifest,
)
from visionloom.train.checkpoint.state_file import CHECKPOINTS, STATE, RunState
from visionloom.train.config import CheckpointConfig
from visionloom.train.phase.trainer import PhaseTrainer

EventWriter = Callable[..., None]
"""Called with an event's name and its fields."""
NUMBERED: Final = re.compile(r"step-[0-9]{8,18}")
"""Names of checkpoints; anything else there is not ours to remove."""
OVERHEAD_BYTES: Final = 2_000
"""Bytes that a tensor takes beyond its numbers: 1,565 of its archive and some 400 in the index (the demo's checkpoints)."""
MOST_FAILURES: Final = 3
"""Failed saves in a row after which a run that tolerates them stops all the same."""


@dataclass
class Written:
    """What a rank has written for a save."""

    places: list[Any] = field(default_factory=list)
    """Of its tensors, as torch's writer returns them."""
    files: dict[str, FileEntry] = field(default_factory=dict)
    """Its files by name."""
    fault: str = ""
    """Why it could not write; empty if it could."""


@dataclass
class Save:
    """A save under way."""

    partial: Path
    final: Path
    run_state: RunState
    plan: WritePlan
    buckets: list[Any]
    """Staged tensors by file, as Megatron-core's writer takes them."""
    started: float
    stalled: float = 0.0
    """Seconds that training has waited for it."""
    waited: float = 0.0
    """Of these, seconds in which it was still being written though the next one was due."""
    written: Written = field(default_factory=Written)
    thread: threading.Thread | None = None

    @property
    def is_done(self) -> bool:
        """Return whether this rank has written its files, or failed to."""
        return self.thread is None or not self.thread.is_alive()

    def begin(self, background: bool) -> None:
        """Write this rank's files, or have them written by a thread."""
        if not background:
            _write(self)
            return
        # A daemon: a run that ends by an error does not wait for its disk.
        self.thread = threading.Thread(
            target=_write, args=(self,), name="visionloom-save", daemon=True
        )
        self.thread.start()

    def publish(self) -> None:
        """Give the folder its name and point `latest` to it; OSError if the disk fails."""
        # On disk before it has its name: else a power cut could leave a whole folder of empty files.
        # Files of tensors are there already: each rank has waited for its own.
        for name in (*WITHOUT_TENSORS, MANIFEST):
            _flush(self.partial / name)
        _flush(self.partial)
        # A damaged one that the run has passed over.
        if self.final.exists():
            shutil.rmtree(self.final)
        self.partial.rename(self.final)
        _flush(self.final.parent)

        # Last: for people and scripts; a run itself looks for the newest folder that is whole.
        pointer = self.final.parents[1] / LATEST
        with replacing(pointer) as file:
            file.write(f"{self.final.relative_to(pointer.parent)}\n".encode())


class Saver:
    """Saves the checkpoints of a run; all ranks call its methods together."""

    def __init__(self, run_folder: Path, settings: CheckpointConfig, report: EventWriter) -> None:
        """Begin with no save under way; `report` gets the events `checkpoint` and `checkpoint_failed`."""
        self.run_folder = run_folder
        self.settings = settings
        self.report = report
        self.planner: PhasePlanner | None = None
        self.pending: Save | None = None
        self.failures = 0
        """Saves that have failed in a row."""

    def is_due(self, phase_step: int) -> bool:
        """Return whether to save after this step of the phase."""
        every = self.settings.every_steps
        return bool(every) and phase_step % every == 0

    def save(self, trainer: PhaseTrainer, step: int, phase_step: int, last: bool) -> None:
        """Save the state after the run's step `step`; in the background unless it is the phase's `last`.

        Raises:
            UserError: if the save fails and the run must stop without it (see `checkpoint.on_error`).
        """
        with pulse.current.during(CHECKPOINT):
            self._save(trainer, step, phase_step, last)

    def _save(self, trainer: PhaseTrainer, step: int, phase_step: int, last: bool) -> None:
        # One save at a time: two would need the memory of two copies.
        self.finish(trainer.topology)
        started = time.perf_counter()
        background = self.settings.asynchronous and not last
        final = folder_of(self.run_folder, trainer.phase_name, step)
        # No name of a checkpoint: a start that finds it removes it.
        partial = final.with_name(final.name + ".tmp")
        if fault := first_fault(make_partial(partial) if trainer.topology.is_main else ""):
            self._failed(final, fault, last)
            return

        # Megatron-core's own queue lives in a process that it starts: 600 MiB a rank, left behind when a rank is killed.
        filesystem_async._results_queue = filesystem_async._results_queue or queue.Queue()
        plan, buckets = self._planner_of(trainer).plan(partial, copied=background)
        run_state = run_state_of(trainer, step, phase_step)
        save = Save(partial, final, run_state, plan, buckets, started)
        save.begin(background)
        # Not its writing in the background, which training does not wait for.
        save.stalled = time.perf_counter() - started
        self.pending = save
        if not background:
            self.finish(trainer.topology, last)

    @property
    def is_writing(self) -> bool:
        """Return whether this rank is still writing in the background."""
        return self.pending is not None and not self.pending.is_done

    def poll(self, topology: Topology, any_writing: bool) -> None:
        """Make a save in the background a checkpoint once no rank is writing; call it after each step.

        Args:
            topology: of the run.
            any_writing: whether `is_writing` was true on any rank before the step.
        """
        # Flags of before the step, the same on all ranks: so all complete it after the same step.
        if self.pending is not None and not any_writing:
            # Flushing to a slow disk may take longer than a step may.
            with pulse.current.during(CHECKPOINT):
                self._complete(topology, last=False)

    def finish(self, topology: Topology, last: bool = False) -> None:
        """Wait for a save under way and make it a checkpoint."""
        if self.pending is None:
            return
        started = time.perf_counter()
        with pulse.current.during(CHECKPOINT):
            if self.pending.thread is not None:
                self.pending.thread.join()
                self.pending.waited = time.perf_counter() - started
                self.pending.stalled += self.pending.waited
            self._complete(topology, last)

    def _planner_of(self, trainer: PhaseTrainer) -> PhasePlanner:
        """Return the planner of a trainer's saves; that of another trainer is dropped."""
        if self.planner is None or self.planner.trainer is not trainer:
            self.planner = PhasePlanner(trainer)
        return self.planner

    def _complete(self, topology: Topology, last: bool) -> None:
        """Let the main rank commit what all ranks have written, or report why there is no checkpoint."""
        save, self.pending = self.pending, None
        assert save is not None
        started = time.perf_counter()
        fault, size = self._outcome(save, topology)
        # Flushing and renaming are the main rank's, and all wait for it.
        save.stalled += time.perf_counter() - started
        if fault:
            self._failed(save.final, fault, last)
            return
        self.failures = 0
        self._report_saved(save, size)

    def _outcome(self, save: Save, topology: Topology) -> tuple[str, int]:
        """Commit a save on the main rank; returns on all ranks why that is not possible, and the bytes of its tensors."""
        parts: list[Written] = [save.written for _ in range(topology.world_size)]
        dist.gather_object(save.written, parts if topology.is_main else None)
        outcome: list[Any] = ["", 0]
        if topology.is_main:
            size = sum(file.bytes for part in parts for file in part.files.values())
            outcome = [self._commit(save, parts), size]
        dist.broadcast_object_list(outcome)

        fault, size = outcome
        return fault, size

    def _commit(self, save: Save, parts: list[Written]) -> str:
        """Make a save a checkpoint and remove old ones; returns why that is not possible, empty if it is."""
        fault = next((part.fault for part in parts if part.fault), "")
        if not fault:
            try:
                commit(save, parts)
                remove_old(save.final, self.settings)
                return ""
            except (OSError, ValueError) as error:
                fault = _in_words(error, save.partial)
        shutil.rmtree(save.partial, ignore_errors=True)
        return fault

    def _report_saved(self, save: Save, size: int) -> None:
        """Report a checkpoint of `size` bytes of tensors, and what it has cost."""
        seconds = round(time.perf_counter() - save.started, 3)
        self.report(
            "checkpoint",
            step=save.run_state.step,
            phase=save.run_state.phase,
            folder=str(save.final),
            seconds=seconds,
            stall_seconds=round(save.stalled, 3),
            waited_seconds=round(save.waited, 3),
            mb_per_second=round(size / 1e6 / max(seconds, 1e-3), 1),
        )

    def _failed(self, folder: Path, fault: str, last: bool) -> None:
        """Report a failed save, and stop the run at the end of a phase, on request, or after MOST_FAILURES.

        Raises:
            UserError: if the run stops.
        """
        self.failures += 1
        self.report("checkpoint_failed", folder=str(folder), cause=fault)
        if last or self.settings.on_error == "stop" or self.failures >= MOST_FAILURES:
            raise UserError(
                f"{folder} could not be saved: {fault}; the checkpoints before it are whole: make room or correct run.folder,"
                " and start the same command again"
            )


def make_partial(partial: Path) -> str:
    """Make the folder of a save in place of what killed ones have left; returns why it cannot be made."""
    try:
        for leftover in partial.parent.glob("step-*.tmp"):
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)
    except OSError as error:
        return _in_words(error, partial)
    return ""


def _write(save: Save) -> None:
    """Write and hash this rank's files; a failure goes to `save.written.fault`."""
    written = save.written
    try:
        for number, bucket in enumerate(save.buckets):
            # Without queue and count of workers it returns its result; the last argument: fsync.
            _, result = FileSystemWriterAsync.write_preloaded_data(
                save.plan.transforms, number, bucket, None, None, True
            )
            if isinstance(result, Exception):
                raise result
            written.places += result
            path = Path(bucket[0])
            written.files[path.name] = FileEntry.of(path)
        save.buckets = []  # the copies' memory
    except Exception as error:  # torch's serialiser raises RuntimeError for a full disk
        written.fault = _in_words(error, save.partial)


def _in_words(error: BaseException, folder: Path) -> str:
    """Describe an error of the file system with the space that is free."""
    # Megatron-core and torch wrap it in errors of their own.
    root = next((cause for cause in _causes(error) if isinstance(cause, OSError)), error)
    if isinstance(root, OSError):
        text = f"{root.strerror or root} ({root.filename or folder})"
    else:
        text = f"{root} ({folder})"
    try:
        existing = next(place for place in (folder, *folder.parents) if place.exists())
        free = shutil.disk_usage(existing).free
    except OSError:
        return text
    return f"{text}, {free / 2**20:.1f} MiB free"


def _causes(error: BaseException | None) -> list[BaseException]:
    """Return an error and the errors that led to it, the newest first."""
    causes: list[BaseException] = []
    while error is not None and error not in causes:  # an error may be its own context
        causes.append(error)
        error = error.__cause__ or error.__context__
    return causes


def first_fault(fault: str, group: Any = None) -> str:
    """Return the first rank's fault, the same on all ranks of a group (None: of all); empty if none has one."""
    faults = [""] * dist.get_world_size(group)
    dist.all_gather_object(faults, fault, group=group)
    return next((each for each in faults if each), "")


def commit(save: Save, parts: list[Written]) -> None:
    """Make what all ranks have written the newest checkpoint.

    Raises:
        ValueError: if a planned tensor is missing.
        OSError: if the disk fails.
    """
    save.plan.writer.finish(save.plan.metadata, [part.places for part in parts])
    save_config(CheckpointingConfig("torch_dist", 1), str(save.partial))
    (save.partial / STATE).write_text(json.dumps(asdict(save.run_state)))

    files: dict[str, FileEntry] = {}
    for part in parts:
        files |= part.files
    # The ranks have hashed their own; what remains is the index, the state and the format.
    for name in WITHOUT_TENSORS:
        files[name] = FileEntry.of(save.partial / name)
    read_index(save.partial)  # torch has been seen to report success with parts missing
    write_manifest(save.partial, files)
    save.publish()


def remove_old(final: Path, settings: CheckpointConfig) -> None:
    """Remove old checkpoints of the phase: all but the newest `keep`, and one for each `keep_every_steps`.

    Those of later steps than `final` are damaged ones that the run has passed over: they neither count nor are removed. Anything
    with another name than a checkpoint's is somebody else's.
    """
    siblings = []
    for folder in sorted(final.parent.glob("step-*")):
        is_checkpoint = NUMBERED.fullmatch(folder.name) and folder.is_dir()
        if is_checkpoint and not folder.is_symlink() and folder.name <= final.name:
            siblings.append(folder)
    for old in siblings[: -settings.keep]:
        step = int(old.name.removeprefix("step-"))
        if settings.keep_every_steps and step % settings.keep_every_steps == 0:
            continue
        try:
            shutil.rmtree(old)
        except OSError as error:  # the new one is whole all the same
            warn(f"warning: {old} is no longer needed and could not be removed: {error.strerror}")


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(run_folder: Path) -> None:
    """Remove what a save that was killed has left; the main rank calls it when a run starts."""
    # Errors are ignored: the next save in the same phase reports them.
    for leftover in (run_folder / CHECKPOINTS).glob("*/step-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def check_room(run_folder: Path, trainer: PhaseTrainer) -> None:
    """Refuse to start a phase whose first checkpoint cannot be written; all ranks call it.

    Raises:
        UserError: naming the folder, the bytes needed and the bytes free.
    """
    needed = estimated_bytes(trainer)
    folder = run_folder / CHECKPOINTS / trainer.phase_name
    fault = room_fault(folder, needed) if trainer.topology.is_main else ""
    if fault := first_fault(fault):
        raise UserError(fault)


def room_fault(folder: Path, needed: int) -> str:
    """Return why a checkpoint of `needed` bytes cannot be written in a folder; empty if it can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # By trying: permissions do not tell of read-only disks and quotas.
        probe = folder / ".writable"
        probe.write_bytes(b"")
        probe.unlink()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return (
            f"{folder} cannot be written: {error.strerror}: correct run.folder or its permissions"
        )
    if free >= needed:
        return ""
    return (
        f"{folder} has {free / 2**20:.1f} MiB free, a checkpoint needs {needed / 2**20:.1f}:"
        " make room or move run.folder"
    )


def estimated_bytes(trainer: PhaseTrainer) -> int:
    """Estimate the bytes of a checkpoint's tensors; all ranks call it."""
    sizes: dict[str, int] = {}
    for tensor in written_parts(trainer.engine):
        # By name and place: data-parallel ranks all have the same weights.
        sizes[f"{tensor.key} at {tensor.global_offset}"] = tensor.data.nbytes + OVERHEAD_BYTES
    return sum(gather_by_name(sizes).values())
