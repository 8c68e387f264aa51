"""Reading checkpoints: find the newest whole one and load weights, optimizer and schedule. write.py writes them.

`checkpoints/<phase>/step-00000100/` holds Megatron-core's torch_dist files, `state.json` (where the run stands) and
`manifest.json` (size and hash of every file); `checkpoints/latest` names the newest. All tensors are full ones under names
that no layout changes, so a checkpoint has no layout. A run resumes from the newest folder whose manifest verifies.
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Final

import torch.distributed as dist
import xxhash
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, merge
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
from visionloom.model.sharding import EXPERTS
from visionloom.parallel.divided import is_divided
from visionloom.parallel.topology import Topology
from visionloom.train.checkpoint.finite import require_finite
from visionloom.train.checkpoint.index import INDEX, IndexFault, read_index
from visionloom.train.checkpoint.optimizer_state import own_tensors
from visionloom.train.checkpoint.state_file import CHECKPOINTS, STATE, RunState, read_run_state
from visionloom.train.checkpoint.state_file import LARGEST as LARGEST_STATE
from visionloom.train.checkpoint.untrusted import harmless_reading
from visionloom.train.checkpoint.weights_state import Weights, named_parts
from visionloom.train.engines.engine import divided_weights
from visionloom.train.exchange.companions import COMPANIONS
from visionloom.train.phase.trainer import PhaseTrainer

MANIFEST, LATEST = "manifest.json", "latest"
FORMAT: Final = "metadata.json"
"""Names Megatron-core's file format and its version."""
WITHOUT_TENSORS: Final = {INDEX, FORMAT, STATE}
"""Files of a checkpoint that hold no tensors."""
HASH_BLOCK_BYTES = 1 << 22
"""Bytes hashed at once: 4 MiB, which every rank holds beside what it saves."""
LARGEST_MANIFEST: Final = 1 << 22
"""Bytes: 4 MiB, some 30,000 files."""


@dataclass(frozen=True)
class FileEntry:
    """Size and hash of a file, as a manifest has them."""

    bytes: Annotated[int, Field(ge=0)]
    xxh3_128: str

    @classmethod
    def of(cls, path: Path) -> "FileEntry":
        """Measure a file as it is on disk."""
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


def folder_of(run_folder: Path, phase_name: str, step: int) -> Path:
    """Return the folder of the checkpoint after the run's step `step`."""
    return run_folder / CHECKPOINTS / phase_name / f"step-{step:08d}"


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
        updates=trainer.engine.updates,
        lora=asdict(lora) if lora is not None else {},
        inputs=asdict(inputs) if inputs is not None else {},
        recent=trainer.judge.state(),
        settings=trainer.settings,
    )


def load_trainer(checkpoint: Checkpoint, trainer: PhaseTrainer) -> None:
    """Load weights, optimizer and schedule, so that a phase continues exactly, in any layout."""
    engine = trainer.engine
    weights = engine.weights()
    slices = own_tensors(engine.owned(), weights)
    _load(checkpoint.folder, weights, slices, trainer.model_parts, trainer.topology)
    engine.loaded(checkpoint.run_state.updates)
    # Steps and not updates: a skipped step advances the schedule too.
    trainer.scheduler.step(checkpoint.run_state.phase_step - trainer.scheduler.num_steps)


def load_weights(checkpoint: Checkpoint, parts: list[Qwen3VL], topology: Topology) -> None:
    """Load only the weights, as a new phase does.

    Call it before the model is wrapped and its optimizer built, which copies them.
    """
    weights = Weights.of(parts, topology)
    slices = own_tensors(divided_weights(weights.pieces), weights)
    _load(checkpoint.folder, weights, slices, parts, topology)


def _load(
    folder: Path,
    weights: Weights,
    slices: dict[str, Any],
    parts: list[Qwen3VL],
    topology: Topology,
) -> None:
    """Load the weights that ranks share and the slices of this rank; UserError if there are numbers that are not finite."""
    loaded = _read(folder, weights.shared, topology)
    for key, part in named_parts(parts).items():
        # Megatron-core leaves out what is empty: a part without adapters.
        has_all = part.lora is None and not any(map(is_divided, part.parameters()))
        part.load_state_dict(loaded.get(key, {}), strict=has_all)
    _read_own(folder, slices)
    # Moments too: they would make the weights so at the next step.
    own = ((name, part.data) for name, part in slices.items())
    require_finite(chain(_tensors(loaded), own), f"{folder}", topology)


def _tensors(loaded: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in nested dicts and lists of a state, with their dotted path."""
    if isinstance(loaded, Tensor):
        yield name, loaded
        return
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(loaded, dict):
        items = loaded.items()
    elif isinstance(loaded, list):
        items = enumerate(loaded)
    for key, value in items:
        yield from _tensors(value, f"{name}.{key}" if name else str(key))


def _read(folder: Path, state: dict[str, Any], topology: Topology) -> dict[str, Any]:
    """Fill a sharded state from a checkpoint; nothing in its files can run code.

    Each of the ranks that need the same tensors reads a share of them, and they exchange these.
    """
    shared = [(state, topology.groups.dp_cp)]
    if topology.groups.ep.size() > 1:
        # Experts apart, else each rank would be sent those of all the others.
        experts, others = extract_matching_values(state, lambda each: EXPERTS in each.key)
        shared = [(others, topology.groups.dp_cp), (experts, topology.groups.expt_dp)]

    loaded: dict[str, Any] = {}
    for part, group in shared:
        strategy = FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), group)
        with harmless_reading(folder):
            read_part = dist_checkpointing.load(part, str(folder), strategy)
        # It has plain values of the file beside the tensors.
        merge(loaded, {key: value for key, value in read_part.items() if key in part})
    return loaded


def _read_own(folder: Path, slices: dict[str, Any]) -> None:
    """Fill tensors that no other rank needs, in place and without the others; nothing in the files can run code."""
    # A stage may train nothing.
    if not slices:
        return
    strategy = TorchDistLoadShardedStrategy()
    with harmless_reading(folder):
        # What ranks read is apart, or the same for tensor ranks: there is nothing to compare with each other.
        dist_checkpointing.load(slices, str(folder), strategy, validate_access_integrity=False)


def trainer_state(trainer: PhaseTrainer) -> dict[str, Any]:
    """Return weights and optimizer of a phase for Megatron-core's checkpoints."""
    weights = trainer.engine.weights()
    return {**weights.shared, "optimizer": own_tensors(trainer.engine.owned(), weights)}


def newest(run_folder: Path, topology: Topology) -> tuple[Checkpoint | None, list[str]]:
    """Find the newest whole checkpoint of a run; all ranks call it and get the same.

    Returns:
        the checkpoint, None if there is none, and a line for each damaged one that was passed over.
    """
    damaged: list[str] = []
    for folder in _candidates(run_folder):
        fault = verify(folder, topology)
        if fault is None:
            return read(folder), damaged
        damaged.append(f"{folder}: {fault}")
    return None, damaged


def read(folder: Path) -> Checkpoint:
    """Read a checkpoint's state, not its tensors; UserError if there is none."""
    return Checkpoint(folder, read_run_state(folder))


def whole(folder: Path, option: str, topology: Topology) -> Checkpoint:
    """Return a checkpoint after checking that its files are as they were written; all ranks call it.

    Args:
        folder: the checkpoint's.
        option: that named it.
        topology: of any layout.

    Raises:
        UserError: if it is damaged, or none.
    """
    checkpoint = read(folder)
    if fault := verify(folder, topology):
        raise UserError(f"{option}={folder} is damaged: {fault}: name another one")
    return checkpoint


def verify(folder: Path, topology: Topology) -> str | None:
    """Return the first fault of a checkpoint's files, None if they are whole; the same on all ranks.

    Every rank hashes a share of them, the main rank compares the names.
    """
    fault = fault_in_share(folder, topology.rank, topology.world_size)
    faults: list[str | None] = [None] * topology.world_size
    dist.all_gather_object(faults, fault)
    return next((each for each in faults if each), None)


def gather_by_name[T](own: dict[str, T]) -> dict[str, T]:
    """Join the dicts of all ranks, which call it together; a name of several ranks has one value."""
    gathered: list[dict[str, T]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, own)
    joined: dict[str, T] = {}
    for part in gathered:
        joined |= part
    return joined


def fault_in_share(folder: Path, rank: int, ranks: int) -> str | None:
    """Return the first fault in the files that `verify` gives to one of `ranks` ranks; None without."""
    try:
        files = read_manifest(folder)
        # In turn, since files of one rank are next to each other and alike in size.
        for name in sorted(files)[rank::ranks]:
            if fault := file_fault(folder, name, files[name]):
                return fault
        return content_fault(folder, files.keys()) if rank == 0 else None
    except (JsonError, OSError) as error:
        return f"no readable {MANIFEST} ({one_line(str(error))})"


def read_manifest(folder: Path) -> dict[str, FileEntry]:
    """Read a checkpoint's files by name; JsonError or OSError if its manifest cannot be read."""
    return read_json(folder, MANIFEST, dict[str, FileEntry], LARGEST_MANIFEST)


def write_manifest(folder: Path, files: dict[str, FileEntry]) -> None:
    """Write which files make up a checkpoint; it is the last file written."""
    content = {name: asdict(entry) for name, entry in files.items()}
    (folder / MANIFEST).write_text(json.dumps(content, indent=1, sort_keys=True))


def file_fault(folder: Path, name: str, expected: FileEntry) -> str | None:
    """Return why a file is not the one that was written; None if it is."""
    shown = one_line(name)
    try:
        path = locate(folder, name)
        # The size first: it costs nothing, and most damage is a file cut short.
        if path.stat().st_size != expected.bytes:
            return f"{shown} has {path.stat().st_size} bytes instead of {expected.bytes}"
        if hash_file(path) != expected.xxh3_128:
            return f"{shown} was changed after it was written"
        return None
    except FileNotFoundError:
        return f"{shown} is missing"
    except PlaceError as error:
        return f"{shown} {error}"
    except OSError as error:
        return f"{shown} cannot be read ({error.strerror})"


def content_fault(folder: Path, listed: Iterable[str]) -> str | None:
    """Return the first file that folder, manifest and index do not all have; None if they agree."""
    expected = set(listed)
    for name in sorted(WITHOUT_TENSORS - expected):
        return f"{MANIFEST} does not list {name}"
    for name in sorted(set(_files_in(folder)) - expected - {MANIFEST}):
        # Imported checkpoints of earlier versions did not list the files that go along with weights.
        if not name.startswith(f"{COMPANIONS}/"):
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
    data = {name for name in expected - WITHOUT_TENSORS if not name.startswith(f"{COMPANIONS}/")}
    for name in sorted(data ^ held):
        lister = MANIFEST if name in data else INDEX
        return f"{one_line(name)} is listed by {lister} alone"
    return None


def _files_in(folder: Path) -> Iterator[str]:
    """Yield all that is no folder, by its path from here; links are not followed."""
    for walked, folders, names in os.walk(folder):
        place = Path(walked)
        links = [name for name in folders if (place / name).is_symlink()]
        for name in names + links:
            yield str((place / name).relative_to(folder))


def _candidates(run_folder: Path) -> list[Path]:
    """Return folders that look like checkpoints, newest step first."""
    folders = []
    for folder in (run_folder / CHECKPOINTS).glob("*/step-*"):
        if folder.suffix != ".tmp":  # a save that was killed
            folders.append(folder)
    return sorted(folders, key=lambda folder: folder.name, reverse=True)


def hash_file(path: Path) -> str:
    """Return the xxh3 of a file, 32 hexadecimal digits."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
