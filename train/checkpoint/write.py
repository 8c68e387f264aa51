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

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from visionloom.common.atomic import replacing
from visionloom.common.errors import UserError
from visionloom.common.text import warn
from visionloom.parallel.topology import Topology
from visionloom.train.checkpoint.index import read_index
from visionloom.train.checkpoint.read import (
    LATEST,
    FileEntry,
    content,
    folder_of,
    run_state_of,
    trainer_state,
    write_manifest,
)
from visionloom.train.checkpoint.state_file import CHECKPOINTS, STATE, RunState
from visionloom.train.config import CheckpointConfig
from visionloom.train.phase_trainer import PhaseTrainer

EventWriter = Callable[..., None]
"""Called with an event's name and its fields."""
NUMBERED: Final = re.compile(r"step-[0-9]{8,18}")
"""Names of checkpoints; what else lies there is not ours to remove."""
MOST_FAILURES = 3
"""Failed saves in a row after which a run that tolerates them stops all the same."""


@dataclass
class WritePlan:
    """What Megatron-core and torch have worked out for a save: who writes what."""

    writer: FileSystemWriterAsync
    metadata: Any
    """Index of all tensors, on the main rank."""
    transforms: list[Any]
    finalize_fns: list[Any] = field(default_factory=list)
    """Megatron-core appends to these; the writing down here replaces them."""


class PlanningStrategy(TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """Megatron-core's strategy up to the point where files are written."""

    def _get_save_and_finalize_callbacks(
        self, writer: Any, planned: Any, async_strategy: str
    ) -> WritePlan:
        transforms = [writer.transforms] if hasattr(writer, "transforms") else []
        return WritePlan(writer, planned[1], transforms)


@dataclass
class Save:
    """A save under way."""

    partial: Path
    final: Path
    run_state: RunState
    plan: WritePlan
    buckets: list[Any]
    started: float
    stalled: float = 0.0
    """Seconds that training has waited for it."""
    waited: float = 0.0
    """Seconds of these in which it was still being written though the next one was due."""
    results: list[Any] = field(default_factory=list)
    hashes: dict[str, FileEntry] = field(default_factory=dict)
    fault: str = ""
    thread: threading.Thread | None = None

    @property
    def written(self) -> bool:
        """Whether this rank has written its files, or failed to."""
        return self.thread is None or not self.thread.is_alive()


class Saver:
    """Saves the checkpoints of a run; all ranks call its methods together."""

    def __init__(self, run_folder: Path, settings: CheckpointConfig, report: EventWriter) -> None:
        """`report` gets the events `checkpoint` and `checkpoint_failed`."""
        self.run_folder, self.settings, self.report = run_folder, settings, report
        self.pending: Save | None = None
        self.failures = 0

    def is_due(self, phase_step: int) -> bool:
        """Whether to save after this step of the phase."""
        every = self.settings.every_steps
        return bool(every) and phase_step % every == 0

    def save(self, trainer: PhaseTrainer, step: int, phase_step: int, last: bool) -> None:
        """Save the state after the run's step `step`; in the background unless it is the phase's `last`.

        Raises UserError if the save fails and the run must not go on without it (see `checkpoint.on_error`).
        """
        self.finish(trainer.topology)
        started = time.perf_counter()
        save, fault = self._begin(trainer, step, phase_step, started)
        background = self.settings.asynchronous and not last
        if fault is None and save is not None:
            if background:
                save.thread = threading.Thread(
                    target=_write, args=(save,), name="visionloom-save", daemon=True
                )
                save.thread.start()
            else:
                _write(save)
            save.stalled = time.perf_counter() - started
            self.pending = save
        else:
            self._failed(
                folder_of(self.run_folder, trainer.phase_name, step),
                fault or "another rank failed",
                last,
            )
        if not background:
            self.finish(trainer.topology, last)

    @property
    def is_writing(self) -> bool:
        """Return whether this rank is still writing in the background."""
        return self.pending is not None and not self.pending.written

    def poll(self, topology: Topology, any_writing: bool) -> None:
        """Make a save in the background a checkpoint once no rank is writing; call it after each step.

        Args:
            topology: of the run.
            any_writing: whether `is_writing` was true on any rank before the step.
        """
        if self.pending is not None and not any_writing:
            self._complete(topology, last=False)

    def finish(self, topology: Topology, last: bool = False) -> None:
        """Wait for a save under way and make it a checkpoint."""
        if self.pending is None:
            return
        started = time.perf_counter()
        if self.pending.thread is not None:
            self.pending.thread.join()
            self.pending.waited = time.perf_counter() - started
            self.pending.stalled += self.pending.waited
        self._complete(topology, last)

    def _begin(
        self, trainer: PhaseTrainer, step: int, phase_step: int, started: float
    ) -> tuple[Save | None, str | None]:
        """Plan a save and stage this rank's tensors; or say why not, the same on all ranks."""
        final = folder_of(self.run_folder, trainer.phase_name, step)
        partial = final.with_name(final.name + ".tmp")
        topology, fault = trainer.topology, ""
        if topology.is_main:
            try:
                for leftover in final.parent.glob("step-*.tmp"):
                    shutil.rmtree(leftover)
                partial.mkdir(parents=True)
            except OSError as error:
                fault = _told(error, partial)
        if found := first_fault(fault):
            return None, found
        # Megatron-core's own queue lives in a process that it starts: 600 MiB a rank, left behind when a rank is killed.
        filesystem_async._results_queue = filesystem_async._results_queue or queue.Queue()
        strategy = FullyParallelSaveStrategyWrapper(PlanningStrategy(), topology.groups.dp_cp)
        plan: Any = dist_checkpointing.save(
            trainer_state(trainer, loading=False), str(partial), strategy, async_sharded_save=True, async_strategy="mcore",
            content_metadata=content(None),
        )  # fmt: skip
        staged = FileSystemWriterAsync.preload_tensors(plan.writer.write_buckets or [], True)
        if self.settings.asynchronous:
            staged = [
                (path, key, (data, [(item, _own(t)) for item, t in tensors]))
                for path, key, (data, tensors) in staged
            ]
        return Save(
            partial, final, run_state_of(trainer, step, phase_step), plan, staged, started
        ), None

    def _complete(self, topology: Topology, last: bool) -> None:
        """Gather what the ranks have written and let the main rank commit it, or report why there is no checkpoint."""
        save, self.pending = self.pending, None
        assert save is not None
        parts: list[Any] = [None] * topology.world_size
        dist.all_gather_object(parts, (save.results, save.hashes, save.fault))
        fault = next((found for _, _, found in parts if found), "")
        if not fault and topology.is_main:
            try:
                _commit(
                    save,
                    [results for results, _, _ in parts],
                    {k: v for _, hashes, _ in parts for k, v in hashes.items()},
                )
                _retain(save.final, self.settings)
            except (OSError, ValueError) as error:
                fault = _told(error, save.partial)
        if fault := first_fault(fault):
            if topology.is_main:
                shutil.rmtree(save.partial, ignore_errors=True)
            self._failed(save.final, fault, last)
            return
        self.failures = 0
        seconds, size = (
            round(time.perf_counter() - save.started, 3),
            sum(file.bytes for _, hashes, _ in parts for file in hashes.values()),
        )
        self.report(
            "checkpoint", step=save.run_state.step, phase=save.run_state.phase, folder=str(save.final), seconds=seconds,
            stall_seconds=round(save.stalled, 3), waited_seconds=round(save.waited, 3),
            mb_per_second=round(size / 1e6 / max(seconds, 1e-3), 1),
        )  # fmt: skip

    def _failed(self, folder: Path, fault: str, last: bool) -> None:
        """Go on without this checkpoint, or stop: at the end of a phase, on request, and when saving fails again and again."""
        self.failures += 1
        self.report("checkpoint_failed", folder=str(folder), cause=fault)
        if last or self.settings.on_error == "stop" or self.failures >= MOST_FAILURES:
            raise UserError(
                f"{folder} could not be saved: {fault}; the checkpoints before it are whole: make room or correct run.folder,"
                " and start the same command again"
            )


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """A copy: training goes on changing what lies on the CPU while it is written."""
    return tensor.clone()


def _write(save: Save) -> None:
    """Write and hash this rank's files; what fails is told in `save.fault`."""
    try:
        for number, bucket in enumerate(save.buckets):
            _, result = FileSystemWriterAsync.write_preloaded_data(
                save.plan.transforms, number, bucket, None, None, True
            )
            if isinstance(result, Exception):
                raise result
            save.results += result
            path = Path(bucket[0])
            save.hashes[path.name] = FileEntry.of(path)
        save.buckets = []
    except Exception as error:  # torch's serialiser raises RuntimeError for a full disk
        save.fault = _told(error, save.partial)


def _told(error: BaseException, folder: Path) -> str:
    """An error of the file system in words, with what is free."""
    root = next((cause for cause in _causes(error) if isinstance(cause, OSError)), error)
    text = (
        f"{root.strerror or root} ({root.filename or folder})"
        if isinstance(root, OSError)
        else f"{root} ({folder})"
    )
    try:
        return f"{text}, {shutil.disk_usage(_existing(folder)).free / 2**20:.1f} MiB free"
    except OSError:
        return text


def _causes(error: BaseException | None) -> list[BaseException]:
    found = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _existing(path: Path) -> Path:
    """The nearest folder above that is there."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def first_fault(fault: str) -> str:
    """The first rank's fault, alike on all ranks; empty if none has one."""
    faults = [""] * dist.get_world_size()
    dist.all_gather_object(faults, fault)
    return next((found for found in faults if found), "")


def _commit(save: Save, results: list[Any], hashes: dict[str, FileEntry]) -> None:
    """Make what all ranks have written the newest checkpoint; raises ValueError if something planned is not there."""
    save.plan.writer.finish(save.plan.metadata, results)
    save_config(CheckpointingConfig("torch_dist", 1), str(save.partial))
    (save.partial / STATE).write_text(json.dumps(asdict(save.run_state)))
    for path in save.partial.iterdir():
        if path.name not in hashes:
            hashes[path.name] = FileEntry.of(path)
    read_index(save.partial)  # torch has been seen to report success with parts missing
    write_manifest(save.partial, hashes)
    for path in [*save.partial.iterdir(), save.partial]:
        _flush(path)
    if save.final.exists():
        shutil.rmtree(save.final)
    save.partial.rename(save.final)
    _flush(save.final.parent)
    pointer = save.final.parents[1] / LATEST
    with replacing(pointer) as file:
        file.write(f"{save.final.relative_to(pointer.parent)}\n".encode())


def _retain(final: Path, settings: CheckpointConfig) -> None:
    """Remove old checkpoints of the phase: all but the newest `keep`, and one for each `keep_every_steps`.

    Those of later steps than `final` are damaged ones that the run has passed over: they neither count nor go. What has other names
    than checkpoints is somebody else's.
    """
    steps = (
        f
        for f in final.parent.glob("step-*")
        if NUMBERED.fullmatch(f.name) and f.is_dir() and not f.is_symlink()
    )
    siblings = sorted(f for f in steps if f.name <= final.name)
    for old in siblings[: -settings.keep]:
        if not (
            settings.keep_every_steps
            and int(old.name.removeprefix("step-")) % settings.keep_every_steps == 0
        ):
            try:
                shutil.rmtree(old)
            except OSError as error:  # the new one is whole all the same
                warn(
                    f"warning: {old} is no longer needed and could not be removed: {error.strerror}"
                )


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(run_folder: Path) -> None:
    """Remove what a save that was killed has left; the main rank calls it when a run starts."""
    for leftover in (run_folder / CHECKPOINTS).glob("*/step-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def check_room(run_folder: Path, trainer: PhaseTrainer) -> None:
    """Refuse to start a phase whose first checkpoint cannot be written; all ranks call it.

    Raises:
        UserError: naming the folder, the bytes needed and the bytes free.
    """
    needed, fault = estimated_bytes(trainer), ""
    folder = run_folder / CHECKPOINTS / trainer.phase_name
    if trainer.topology.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / ".writable"
            probe.write_bytes(b"")
            probe.unlink()
            free = shutil.disk_usage(folder).free
            if free < needed:
                fault = f"{folder} has {free / 2**20:.1f} MiB free, a checkpoint needs {needed / 2**20:.1f}: make room or move run.folder"
        except OSError as error:
            fault = f"{folder} cannot be written: {error.strerror}: correct run.folder or its permissions"
    if found := first_fault(fault):
        raise UserError(found)


BESIDE_NUMBERS = 2_000
"""Bytes that a tensor takes beside its numbers: 1,565 of its archive and some 400 in the index (the demo's checkpoints)."""


def estimated_bytes(trainer: PhaseTrainer) -> int:
    """Bytes of the tensors of a checkpoint: weights once, and of trainable ones a master copy and two moments in fp32."""
    from visionloom.model.sharding import canonical_parameters, full_shape

    own: dict[str, int] = {}
    for chunk in trainer.model_parts:
        for name, parameter in canonical_parameters(chunk):
            count = torch.Size(full_shape(name, parameter, trainer.topology)).numel()
            parts_on_disk = 1 + 3 * parameter.requires_grad
            own[name] = (
                count * (parameter.element_size() + 12 * parameter.requires_grad)
                + BESIDE_NUMBERS * parts_on_disk
            )
    parts: list[dict[str, int]] = [{}] * trainer.topology.world_size
    dist.all_gather_object(parts, own)
    return sum({name: size for part in parts for name, size in part.items()}.values())
