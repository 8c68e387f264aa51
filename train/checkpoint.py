"""Reading checkpoints: which is the newest whole one, and what of it a run takes. How they are written is in saving.py.

`checkpoints/<phase>/step-00000100/` holds Megatron-core's torch_dist files, `state.json` (where the run stands) and
`manifest.json` (size and hash of every file); `checkpoints/latest` names the newest. All tensors are full ones under names
that no layout changes, so a checkpoint has no layout. Resuming takes the newest folder whose manifest verifies.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import xxhash
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy

from visionloom.model.qwen3vl import Qwen3VL
from visionloom.model.trainable import is_adapter
from visionloom.parallel.topology import Topology
from visionloom.train.build import Stage
from visionloom.train.optimizer import state_tensors, take_state, updates
from visionloom.train.state_file import CHECKPOINTS, Progress, read_progress
from visionloom.train.untrusted import harmless_reading

MANIFEST, LATEST = "manifest.json", "latest"
HASH_BLOCK_BYTES = 1 << 24


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    folder: Path
    progress: Progress


def folder_of(run_folder: Path, phase: str, step: int) -> Path:
    """Where the checkpoint after the run's step `step` lies."""
    return run_folder / CHECKPOINTS / phase / f"step-{step:08d}"


def progress_of(stage: Stage, step: int, phase_step: int) -> Progress:
    """Where a run stands after the run's step `step`, the phase's `phase_step`."""
    return Progress(
        stage.name,
        phase_step,
        step,
        stage.phase.total_steps,
        stage.stream.state(phase_step),
        asdict(stage.model_config),
        updates(stage.optimizer),
        asdict(lora) if (lora := stage.chunks[0].lora) else {},
        asdict(stage.inputs) if stage.inputs is not None else {},
        stage.settings,
    )


def load_stage(checkpoint: Checkpoint, stage: Stage) -> None:
    """Continue a phase exactly, in any layout: weights, optimizer, schedule."""
    loaded = _read(checkpoint.folder, stage_state(stage, loading=True), stage.topology)
    _take(loaded, stage.chunks)
    take_state(stage.optimizer, loaded["optimizer"], checkpoint.progress.updates)
    stage.scheduler.step(checkpoint.progress.phase_step - stage.scheduler.num_steps)


def load_weights(checkpoint: Checkpoint, chunks: list[Qwen3VL], topology: Topology) -> None:
    """Take only the weights, as a new phase does; call it before the model is wrapped and its optimizer built."""
    loaded = _read(checkpoint.folder, weights_state(chunks, topology), topology)
    _take(loaded, chunks)


def _take(loaded: dict[str, Any], chunks: list[Qwen3VL]) -> None:
    for key, chunk in _named(chunks).items():
        # Megatron-core leaves out what is empty: a chunk without adapters.
        chunk.load_state_dict(loaded.get(key, {}), strict=chunk.lora is None)


def _read(folder: Path, state: dict[str, Any], topology: Topology) -> dict[str, Any]:
    """Fill a sharded state from a checkpoint; nothing in its files can run code."""
    strategy = FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), topology.groups.dp_cp)
    # Megatron-core leaves out what is empty: a stage whose optimizer has nothing to read.
    with harmless_reading(folder):
        return {"optimizer": {}} | dict(dist_checkpointing.load(state, str(folder), strategy))


def _named(chunks: list[Qwen3VL]) -> dict[str, Qwen3VL]:
    """The chunks by the key that their weights have in this rank's state; it is not part of a weight's name on disk."""
    return {"model": chunks[0]} if len(chunks) == 1 else {f"model{number}": chunk for number, chunk in enumerate(chunks)}


def weights_state(chunks: list[Qwen3VL], topology: Topology) -> dict[str, Any]:
    """The model's weights for Megatron-core's checkpoints; where there are adapters, they alone.

    Adapters may be in some layers only, so theirs are not stacked over the layers as those of weights are.
    """
    adapters = chunks[0].lora is not None
    metadata = content(topology) | {"non_homogeneous_layers": adapters}
    states = {key: chunk.sharded_state_dict(metadata=metadata) for key, chunk in _named(chunks).items()}
    if adapters:  # routers still count loads
        states = {
            key: {name: part for name, part in state.items() if is_adapter(name) or name.endswith(".router.load")}
            for key, state in states.items()
        }
    return states


def stage_state(stage: Stage, loading: bool) -> dict[str, Any]:
    """Weights and optimizer of a phase for Megatron-core's checkpoints."""
    weights = weights_state(stage.chunks, stage.topology)
    return {**weights, "optimizer": state_tensors(stage.optimizer, weights, loading, content(stage.topology))}


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
    return Checkpoint(folder, read_progress(folder))


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
    return None if hash_file(path) == expected["xxh3_128"] else f"{path.name} was changed after it was written"


def _candidates(run_folder: Path) -> list[Path]:
    """Folders that look like checkpoints, newest step first."""
    found = (run_folder / CHECKPOINTS).glob("*/step-*")
    return sorted((f for f in found if f.suffix != ".tmp"), key=lambda folder: folder.name, reverse=True)


def content(topology: Topology | None) -> dict[str, Any]:
    """How Megatron-core lays out the optimizer: one full tensor a parameter, which any layout can read."""
    found: dict[str, Any] = {"distrib_optim_sharding_type": "fully_reshardable", "singleton_local_shards": False}
    return found if topology is None else found | {"dp_cp_group": topology.groups.dp_cp}


def hash_file(path: Path) -> str:
    """The xxh3 of a file, 32 hexadecimal digits."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
