"""Reading checkpoints: which is the newest whole one, and what of it a run takes. How they are written is in write.py.

`checkpoints/<phase>/step-00000100/` holds Megatron-core's torch_dist files, `state.json` (where the run stands) and
`manifest.json` (size and hash of every file); `checkpoints/latest` names the newest. All tensors are full ones under names
that no layout changes, so a checkpoint has no layout. Resuming takes the newest folder whose manifest verifies.
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import torch.distributed as dist
import xxhash
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from pydantic import Field
from torch import Tensor

from visionloom.common.errors import UserError
from visionloom.common.jsonfile import JsonError, read_json
from visionloom.common.places import PlaceError, locate
from visionloom.common.text import one_line
from visionloom.model.qwen3vl import Qwen3VL
from visionloom.model.trainable import is_adapter
from visionloom.parallel.topology import Topology
from visionloom.train.checkpoint.finite import require_finite
from visionloom.train.checkpoint.index import INDEX, IndexFault, read_index
from visionloom.train.checkpoint.state_file import CHECKPOINTS, STATE, RunState, read_run_state
from visionloom.train.checkpoint.state_file import LARGEST as LARGEST_STATE
from visionloom.train.checkpoint.untrusted import harmless_reading
from visionloom.train.exchange.companions import COMPANIONS
from visionloom.train.optimizer import load_state, state_tensors, updates
from visionloom.train.phase_trainer import PhaseTrainer

MANIFEST, LATEST = "manifest.json", "latest"
FORMAT: Final = "metadata.json"
"""Megatron-core's word for how the files are laid out."""
BESIDE: Final = {INDEX, FORMAT, STATE}
"""Files of a checkpoint that hold no tensors."""
HASH_BLOCK_BYTES = 1 << 24
LARGEST_MANIFEST: Final = 1 << 22
"""Bytes: 4 MiB, some 30,000 files."""


@dataclass(frozen=True)
class FileEntry:
    """What a manifest says of a file."""

    bytes: Annotated[int, Field(ge=0)]
    xxh3_128: str

    @classmethod
    def of(cls, path: Path) -> "FileEntry":
        """Of a file as it is on disk."""
        return cls(path.stat().st_size, hash_file(path))


@dataclass(frozen=True)
class Layout:
    """Megatron-core's metadata.json, of the only form that is read."""

    sharded_backend: Annotated[str, Field(pattern="^torch_dist$")]
    sharded_backend_version: Annotated[int, Field(ge=1, le=1)]
    common_backend: str = "torch"
    common_backend_version: int = 1


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    folder: Path
    run_state: RunState


def folder_of(run_folder: Path, phase: str, step: int) -> Path:
    """Where the checkpoint after the run's step `step` lies."""
    return run_folder / CHECKPOINTS / phase / f"step-{step:08d}"


def run_state_of(trainer: PhaseTrainer, step: int, phase_step: int) -> RunState:
    """Return where a run stands after the run's step `step`, the phase's `phase_step`."""
    lora, inputs = trainer.model_parts[0].lora, trainer.inputs
    return RunState(
        phase=trainer.phase_name,
        phase_step=phase_step,
        step=step,
        phase_steps=trainer.phase.total_steps,
        data=trainer.stream.state(phase_step),
        model=asdict(trainer.model_config),
        updates=updates(trainer.optimizer),
        lora=asdict(lora) if lora is not None else {},
        inputs=asdict(inputs) if inputs is not None else {},
        settings=trainer.settings,
    )


def load_trainer(checkpoint: Checkpoint, trainer: PhaseTrainer) -> None:
    """Continue a phase exactly, in any layout: weights, optimizer, schedule."""
    loaded = _read(checkpoint.folder, trainer_state(trainer, loading=True), trainer.topology)
    _load_parts(loaded, trainer.model_parts)
    require_finite(_tensors(loaded), f"{checkpoint.folder}", trainer.topology)
    load_state(trainer.optimizer, loaded["optimizer"], checkpoint.run_state.updates)
    trainer.scheduler.step(checkpoint.run_state.phase_step - trainer.scheduler.num_steps)


def load_weights(checkpoint: Checkpoint, chunks: list[Qwen3VL], topology: Topology) -> None:
    """Load only the weights, as a new phase does; call it before the model is wrapped and its optimizer built."""
    loaded = _read(checkpoint.folder, weights_state(chunks, topology), topology)
    _load_parts(loaded, chunks)
    require_finite(_tensors(loaded), f"{checkpoint.folder}", topology)


def _load_parts(loaded: dict[str, Any], chunks: list[Qwen3VL]) -> None:
    for key, chunk in _named(chunks).items():
        # Megatron-core leaves out what is empty: a chunk without adapters.
        chunk.load_state_dict(loaded.get(key, {}), strict=chunk.lora is None)


def _tensors(loaded: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested dicts and lists of a state, by their path in it."""
    if isinstance(loaded, Tensor):
        yield name, loaded
    items = (
        loaded.items()
        if isinstance(loaded, dict)
        else enumerate(loaded)
        if isinstance(loaded, list)
        else ()
    )
    for key, value in items:
        yield from _tensors(value, f"{name}.{key}" if name else str(key))


def _read(folder: Path, state: dict[str, Any], topology: Topology) -> dict[str, Any]:
    """Fill a sharded state from a checkpoint; nothing in its files can run code."""
    strategy = FullyParallelLoadStrategyWrapper(
        TorchDistLoadShardedStrategy(), topology.groups.dp_cp
    )
    # Megatron-core leaves out what is empty: a stage whose optimizer has nothing to read.
    with harmless_reading(folder):
        return {"optimizer": {}} | dict(dist_checkpointing.load(state, str(folder), strategy))


def _named(chunks: list[Qwen3VL]) -> dict[str, Qwen3VL]:
    """The chunks by the key that their weights have in this rank's state; it is not part of a weight's name on disk."""
    return (
        {"model": chunks[0]}
        if len(chunks) == 1
        else {f"model{number}": chunk for number, chunk in enumerate(chunks)}
    )


def weights_state(chunks: list[Qwen3VL], topology: Topology) -> dict[str, Any]:
    """The model's weights for Megatron-core's checkpoints; where there are adapters, they alone.

    Adapters may be in some layers only, so theirs are not stacked over the layers as those of weights are.
    """
    adapters = chunks[0].lora is not None
    metadata = content(topology) | {"non_homogeneous_layers": adapters}
    states = {
        key: chunk.sharded_state_dict(metadata=metadata) for key, chunk in _named(chunks).items()
    }
    if adapters:  # routers still count loads
        states = {
            key: {
                name: part
                for name, part in state.items()
                if is_adapter(name) or name.endswith(".router.load")
            }
            for key, state in states.items()
        }
    return states


def trainer_state(trainer: PhaseTrainer, loading: bool) -> dict[str, Any]:
    """Return weights and optimizer of a phase for Megatron-core's checkpoints."""
    weights = weights_state(trainer.model_parts, trainer.topology)
    return {
        **weights,
        "optimizer": state_tensors(trainer.optimizer, weights, loading, content(trainer.topology)),
    }


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
    """A checkpoint by its folder, its tensors not looked at; UserError if there is none."""
    return Checkpoint(folder, read_run_state(folder))


def whole(folder: Path, option: str, topology: Topology) -> Checkpoint:
    """A checkpoint whose files are as they were written; all ranks call it together.

    Args:
        folder: the checkpoint's.
        option: that named it.
        topology: of any layout.

    Raises:
        UserError: if it is damaged, or none.
    """
    found = read(folder)
    if fault := verify(folder, topology):
        raise UserError(f"{option}={folder} is damaged: {fault}: name another one")
    return found


def verify(folder: Path, topology: Topology) -> str | None:
    """What is wrong with a checkpoint's files, or None; every rank hashes a share of them, the main rank compares the names."""
    fault = fault_in_share(folder, topology.rank, topology.world_size)
    faults: list[str | None] = [None] * topology.world_size
    dist.all_gather_object(faults, fault)
    return next((found for found in faults if found), None)


def fault_in_share(folder: Path, rank: int, ranks: int) -> str | None:
    """What `verify` finds on one rank."""
    fault = None
    try:
        files = read_manifest(folder)
        for name in sorted(files)[rank::ranks]:
            fault = fault or _file_fault(folder, name, files[name])
        return fault or (_content_fault(folder, files.keys()) if rank == 0 else None)
    except (JsonError, OSError) as error:
        return f"no readable {MANIFEST} ({one_line(str(error))})"


def read_manifest(folder: Path) -> dict[str, FileEntry]:
    """A checkpoint's files by name; JsonError or OSError if it does not say."""
    return read_json(folder, MANIFEST, dict[str, FileEntry], LARGEST_MANIFEST)


def write_manifest(folder: Path, files: dict[str, FileEntry]) -> None:
    """Say which files make up a checkpoint; the last one that is written."""
    content = {name: asdict(entry) for name, entry in files.items()}
    (folder / MANIFEST).write_text(json.dumps(content, indent=1, sort_keys=True))


def _file_fault(folder: Path, name: str, expected: FileEntry) -> str | None:
    """Whether a file is there, inside the folder, and what was written."""
    shown = one_line(name)
    try:
        path = locate(folder, name)
        if path.stat().st_size != expected.bytes:
            return f"{shown} has {path.stat().st_size} bytes instead of {expected.bytes}"
        return (
            None
            if hash_file(path) == expected.xxh3_128
            else f"{shown} was changed after it was written"
        )
    except FileNotFoundError:
        return f"{shown} is missing"
    except PlaceError as error:
        return f"{shown} {error}"
    except OSError as error:
        return f"{shown} cannot be read ({error.strerror})"


def _content_fault(folder: Path, listed: Iterable[str]) -> str | None:
    """Whether folder, manifest and index have the same files."""
    expected = set(listed)
    for name in sorted(BESIDE - expected):
        return f"{MANIFEST} does not list {name}"
    # Imported checkpoints of earlier versions did not list the files that go along with weights.
    there = {
        name
        for name in _files_in(folder)
        if name != MANIFEST and (name in expected or not name.startswith(f"{COMPANIONS}/"))
    }
    for name in sorted(there - expected):
        return f"{one_line(name)} is there, and {MANIFEST} does not list it"
    try:
        read_json(folder, STATE, RunState, LARGEST_STATE)
    except JsonError as error:
        return f"{STATE} cannot be used: {one_line(str(error))}"
    try:
        read_json(folder, FORMAT, Layout)
        held = read_index(folder).files
    except (IndexFault, JsonError) as error:
        return f"{INDEX} or {FORMAT} cannot be used: {one_line(str(error))}"
    data = {name for name in expected - BESIDE if not name.startswith(f"{COMPANIONS}/")}
    for name in sorted(data ^ held):
        return f"{one_line(name)} is listed by {MANIFEST if name in data else INDEX} alone"
    return None


def _files_in(folder: Path) -> Iterator[str]:
    """All that is no folder, by its path from here; links are not followed."""
    for place, folders, names in os.walk(folder):
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        yield from (str((Path(place) / name).relative_to(folder)) for name in names + links)


def _candidates(run_folder: Path) -> list[Path]:
    """Folders that look like checkpoints, newest step first."""
    found = (run_folder / CHECKPOINTS).glob("*/step-*")
    return sorted(
        (f for f in found if f.suffix != ".tmp"), key=lambda folder: folder.name, reverse=True
    )


def content(topology: Topology | None) -> dict[str, Any]:
    """How Megatron-core lays out the optimizer: one full tensor a parameter, which any layout can read."""
    found: dict[str, Any] = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
    }
    return found if topology is None else found | {"dp_cp_group": topology.groups.dp_cp}


def hash_file(path: Path) -> str:
    """The xxh3 of a file, 32 hexadecimal digits."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
