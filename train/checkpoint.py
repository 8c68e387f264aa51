"""Checkpoints that are whole or not there: saved aside, hashed, renamed; without a layout of their own.

`checkpoints/<phase>/step-00000100/` holds Megatron-core's torch_dist files, `state.json` (where the run stands) and
`manifest.json` (size and hash of every file); `checkpoints/latest` names the newest. A save that is killed leaves only a
`.tmp` folder, which the next save removes. Resuming takes the newest folder whose manifest verifies.
"""

import json
import os
import queue
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import xxhash
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy, TorchDistSaveShardedStrategy

from visionloom.model.qwen3vl import Qwen3VL
from visionloom.parallel.errors import UserError
from visionloom.parallel.topology import Topology
from visionloom.train.build import Stage

MANIFEST, STATE, LATEST, FOLDER = "manifest.json", "state.json", "latest", "checkpoints"
HASH_BLOCK_BYTES = 1 << 24


@dataclass(frozen=True)
class Progress:
    """Where a run stands: what a checkpoint holds beside tensors."""

    phase: str
    phase_step: int
    """Optimizer steps done in the phase."""
    step: int
    """Optimizer steps done in the run."""
    phase_steps: int
    """Optimizer steps of the whole phase."""
    data: dict[str, Any]
    """PackStream.state."""
    model: dict[str, Any]
    """ModelConfig, to name what changed."""

    @property
    def phase_done(self) -> bool:
        """Whether the phase's last step is in this checkpoint."""
        return self.phase_step >= self.phase_steps


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    folder: Path
    progress: Progress


def folder_of(run_folder: Path, phase: str, step: int) -> Path:
    """Where the checkpoint after the run's step `step` lies."""
    return run_folder / FOLDER / phase / f"step-{step:08d}"


def save(run_folder: Path, stage: Stage, step: int, phase_step: int, keep: int) -> Path:
    """Write a checkpoint of weights, optimizer, schedule and data cursor; all ranks call it together.

    Returns:
        its folder, which exists only when everything in it is written and hashed.
    """
    progress = Progress(
        stage.name,
        phase_step,
        step,
        stage.phase.total_steps,
        stage.stream.state(phase_step),
        asdict(stage.model_config),
    )
    final = folder_of(run_folder, stage.name, step)
    partial = final.with_name(final.name + ".tmp")
    topology = stage.topology
    if topology.is_main:
        _remove_partial(final.parent)
        partial.mkdir(parents=True)
    topology.barrier()
    # Its own queue lives in a process that Megatron-core starts for asynchronous saves: 600 MiB a rank, and left behind when
    # a rank is killed. A save that is waited for needs none.
    filesystem_async._results_queue = filesystem_async._results_queue or queue.Queue()
    strategy = FullyParallelSaveStrategyWrapper(TorchDistSaveShardedStrategy(), topology.groups.dp_cp)
    dist_checkpointing.save(_stage_state(stage, loading=False), str(partial), strategy, content_metadata=_content(None))
    if topology.is_main:
        (partial / STATE).write_text(json.dumps(asdict(progress)))
    _write_manifest(partial, topology)
    if topology.is_main:
        _commit(partial, final, run_folder, keep)
    topology.barrier()
    return final


def load_stage(checkpoint: Checkpoint, stage: Stage) -> None:
    """Continue a phase exactly: weights, optimizer, schedule."""
    strategy = FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), stage.topology.groups.dp_cp)
    loaded = dist_checkpointing.load(_stage_state(stage, loading=True), str(checkpoint.folder), strategy)
    for key, chunk in _named(stage.chunks).items():
        chunk.load_state_dict(loaded[key])
    stage.optimizer.load_state_dict(loaded["optimizer"])
    stage.scheduler.step(checkpoint.progress.phase_step - stage.scheduler.num_steps)


def load_weights(checkpoint: Checkpoint, chunks: list[Qwen3VL], topology: Topology) -> None:
    """Take only the weights, as a new phase does; call it before the model is wrapped and its optimizer built."""
    strategy = FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), topology.groups.dp_cp)
    loaded = dist_checkpointing.load(_weights_state(chunks, topology), str(checkpoint.folder), strategy)
    for key, chunk in _named(chunks).items():
        chunk.load_state_dict(loaded[key])


def _named(chunks: list[Qwen3VL]) -> dict[str, Qwen3VL]:
    """The chunks by the key that their weights have in this rank's state; it is not part of a weight's name on disk."""
    return {"model": chunks[0]} if len(chunks) == 1 else {f"model{number}": chunk for number, chunk in enumerate(chunks)}


def _weights_state(chunks: list[Qwen3VL], topology: Topology) -> dict[str, Any]:
    metadata = _content(topology)
    return {key: chunk.sharded_state_dict(metadata=metadata) for key, chunk in _named(chunks).items()}


def newest(run_folder: Path, topology: Topology) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint of a run, and one line for each damaged one that was passed over; alike on all ranks."""
    damaged: list[str] = []
    for folder in _candidates(run_folder):
        fault = verify(folder, topology)
        if fault is None:
            return read(folder), damaged
        damaged.append(f"{folder}: {fault}")
    return None, damaged


def read(folder: Path) -> Checkpoint:
    """A checkpoint by its folder; UserError if there is none."""
    try:
        return Checkpoint(folder, Progress(**json.loads((folder / STATE).read_text())))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{folder} is not a checkpoint of this version ({error}): name a folder such as checkpoints/<phase>/step-00000100"
        ) from error


def verify(folder: Path, topology: Topology) -> str | None:
    """What is wrong with a checkpoint's files, or None; every rank hashes a share of them."""
    try:
        files: dict[str, dict[str, Any]] = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"no readable {MANIFEST} ({error})"
    fault = None
    for name in sorted(files)[topology.rank :: topology.world_size]:
        fault = fault or _file_fault(folder / name, files[name])
    faults: list[str | None] = [None] * topology.world_size
    dist.all_gather_object(faults, fault)
    return next((found for found in faults if found), None)


def _file_fault(path: Path, expected: dict[str, Any]) -> str | None:
    if not path.exists():
        return f"{path.name} is missing"
    if path.stat().st_size != expected["bytes"]:
        return f"{path.name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
    return None if _hash(path) == expected["xxh3_128"] else f"{path.name} was changed after it was written"


def _candidates(run_folder: Path) -> list[Path]:
    """Folders that look like checkpoints, newest step first."""
    found = (run_folder / FOLDER).glob("*/step-*")
    return sorted((f for f in found if f.suffix != ".tmp"), key=lambda folder: folder.name, reverse=True)


def _stage_state(stage: Stage, loading: bool) -> dict[str, Any]:
    weights = _weights_state(stage.chunks, stage.topology)
    named = weights["model"] if len(stage.chunks) == 1 else dict(weights)
    optimizer = stage.optimizer.sharded_state_dict(named, is_loading=loading, metadata=_content(stage.topology))
    return {**weights, "optimizer": optimizer}


def _content(topology: Topology | None) -> dict[str, Any]:
    """How Megatron-core lays out the optimizer: one full tensor a parameter, which any layout can read."""
    content: dict[str, Any] = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }
    return content if topology is None else content | {"dp_cp_group": topology.groups.dp_cp}


def _write_manifest(folder: Path, topology: Topology) -> None:
    """Hash the files: each rank those that it wrote, the main rank also those that belong to no rank."""
    own = [p for p in folder.iterdir() if p.name.startswith(f"__{topology.rank}_")]
    if topology.is_main:
        own += [p for p in folder.iterdir() if not p.name.startswith("__")]
    entries = {p.name: {"bytes": p.stat().st_size, "xxh3_128": _hash(p)} for p in own}
    gathered: list[dict[str, Any]] = [{}] * topology.world_size
    dist.all_gather_object(gathered, entries)
    if topology.is_main:
        merged = {name: entry for part in gathered for name, entry in part.items()}
        (folder / MANIFEST).write_text(json.dumps(merged, indent=1, sort_keys=True))


def _hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _commit(partial: Path, final: Path, run_folder: Path, keep: int) -> None:
    """Make a finished folder the newest checkpoint: flush, rename, replace `latest`, drop old ones."""
    for path in [*partial.iterdir(), partial]:
        _flush(path)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    _flush(final.parent)
    pointer = run_folder / FOLDER / LATEST
    staged = pointer.with_name(LATEST + ".tmp")
    staged.write_text(str(final.relative_to(run_folder / FOLDER)) + "\n")
    _flush(staged)
    staged.replace(pointer)
    siblings = sorted(f for f in final.parent.glob("step-*") if f.suffix != ".tmp")
    for old in siblings[:-keep]:
        shutil.rmtree(old)


def _remove_partial(phase_folder: Path) -> None:
    for leftover in phase_folder.glob("step-*.tmp"):
        shutil.rmtree(leftover)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
