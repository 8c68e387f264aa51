"""A Hugging Face folder into a checkpoint folder that `init.checkpoint` takes, tensor by tensor.

The model is built on the meta device, so its layout says which rank writes which part of which tensor; each part is read from
the folder when its turn to be written has come, and let go after. A rank holds no more than one part at a time.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from visionloom.common.errors import UserError
from visionloom.model.huggingface.folder import HuggingFaceFolder
from visionloom.model.huggingface.shapes import parameter_shapes
from visionloom.model.qwen3vl import Qwen3VL
from visionloom.model.sharding import LAYERS, canonical_parameters
from visionloom.parallel.topology import Topology
from visionloom.train.checkpoint.finite import is_finite, not_finite
from visionloom.train.checkpoint.read import (
    FileEntry,
    gather_by_name,
    write_manifest,
)
from visionloom.train.checkpoint.state_file import STATE, RunState
from visionloom.train.checkpoint.stored import canonical_region
from visionloom.train.checkpoint.weights_state import layout_metadata, weights_state
from visionloom.train.exchange.companions import COMPANIONS, carry

PHASE = "import"
"""Phase in the state of a checkpoint that no training has led to."""
REPORT_BYTES = 1 << 30
"""Read between two progress lines: 1 GiB."""


def import_huggingface(
    folder: Path, out: Path, topology: Topology, say: Callable[[str], None]
) -> None:
    """Write a folder's weights as a checkpoint, types kept; all ranks call it together.

    Args:
        folder: of a Hugging Face model.
        out: the checkpoint's folder, made here; there is none until it is whole.
        topology: the layout that decides who writes what; the checkpoint has none.
        say: receives progress lines of this rank.

    Raises:
        UserError: if the folder is no whole Qwen3-VL model, the layout does not fit it, or `out` is there already.
    """
    source = HuggingFaceFolder(folder)
    if problems := source.config.layout_problems(topology.config):
        raise UserError("; ".join(problems))
    check_layers_alike(source)

    partial = start_folder(out, topology)
    parts = empty_model(source, topology)
    strategy = FullyParallelSaveStrategyWrapper(StreamedSave(source, say), topology.groups.dp_cp)
    state = weights_state(parts, topology)
    dist_checkpointing.save(state, str(partial), strategy, content_metadata=layout_metadata(None))

    if topology.is_main:
        run_state = RunState(PHASE, 0, 0, 0, {}, asdict(source.config), 0)
        (partial / STATE).write_text(json.dumps(asdict(run_state)))
        # So that a run from this checkpoint needs the folder no more.
        carry(folder, partial / COMPANIONS)
    _write_manifest(partial, topology)
    if topology.is_main:
        partial.rename(out)
    topology.barrier()


def check_layers_alike(source: HuggingFaceFolder) -> None:
    """Refuse a folder that has one parameter in different types in different layers.

    A checkpoint stacks a parameter of all layers into one tensor, which has one type.
    """
    for examples in types_of_layers(source).values():
        if len(examples) > 1:
            named = []
            for dtype, name in examples.items():
                named.append(f"{name} in {str(dtype).removeprefix('torch.')}")
            raise UserError(
                f"hf={source.folder}: layers differ in type, {' and '.join(named)}, which a checkpoint cannot hold: save the model in one type,"
                " or train from the folder itself (init.huggingface)"
            )


def types_of_layers(source: HuggingFaceFolder) -> dict[str, dict[torch.dtype, str]]:
    """Return for each parameter that layers have its types, each with the name of one in a layer."""
    types: dict[str, dict[torch.dtype, str]] = {}
    for name, shape in parameter_shapes(source.config).items():
        if name.startswith(LAYERS):
            _, _, kind = name.removeprefix(LAYERS).partition(".")
            dtype = source.parameter_dtype(name, shape)
            types.setdefault(kind, {}).setdefault(dtype, name)
    return types


def start_folder(out: Path, topology: Topology) -> Path:
    """Make a folder next to `out`, to be renamed when everything is in it; all ranks call it.

    Raises:
        UserError: on all ranks, if `out` is there already or the folder cannot be made.
    """
    partial = out.with_name(out.name + ".tmp")

    def make() -> None:
        if out.exists():
            raise UserError(f"out={out} is there already: name a new folder or remove it")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"out={out} cannot be made: {error.strerror}") from None

    topology.on_main(make)
    return partial


def empty_model(source: HuggingFaceFolder, topology: Topology) -> list[Qwen3VL]:
    """Build this rank's parts on the meta device, each parameter in the type that it has in the folder."""
    shapes = parameter_shapes(source.config)
    [(most, _)] = Counter(map(source.dtype, source.names)).most_common(1)
    numbers = topology.config.chunk_numbers
    # In the type of most; building it in another for each parameter is not possible.
    with torch.device("meta"):
        parts = [Qwen3VL(source.config, topology, most, number) for number in numbers]
    for part in parts:
        for name, parameter in canonical_parameters(part):
            parameter.data = parameter.data.to(source.parameter_dtype(name, shapes[name]))
    return parts


class StreamedSave(TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """Megatron-core's checkpoint format, with tensors that are read only when they are written."""

    def __init__(self, source: HuggingFaceFolder, say: Callable[[str], None]) -> None:
        super().__init__()
        self.source, self.say = source, say

    def save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> None:
        """Write this rank's parts."""
        flat, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        state = mcore_to_pyt_state_dict(flat)
        writer = FileSystemWriter(checkpoint_dir, thread_count=1, sync_files=True)
        try:
            save_distributed(
                state, storage_writer=writer, planner=StreamedPlanner(self.source, self.say)
            )
        # torch's own is no Exception, and holds those of all ranks.
        except CheckpointException as error:
            causes = [cause for cause, _ in error.failures.values()]
            for cause in causes:
                if isinstance(cause, UserError):
                    raise cause from error
            raise OSError(f"{checkpoint_dir} could not be written: {causes[0]}") from error


class StreamedPlanner(MCoreSavePlanner):  # type: ignore[misc]
    """Hands each part of a tensor to torch's writer when its turn has come."""

    def __init__(self, source: HuggingFaceFolder, say: Callable[[str], None]) -> None:
        super().__init__(
            dedup_replicated_tensors=False, flatten_state_dict=False, flatten_sharded_tensors=False
        )
        self.source, self.say = source, say
        self.last: Tensor | None = None
        self.bytes = 0

    def resolve_data(self, write_item: WriteItem) -> Any:
        """Read the part of a tensor, or the bytes, of an item of the plan."""
        if write_item.type == WriteItemType.BYTE_IO or write_item.tensor_data is None:
            return super().resolve_data(write_item)
        if self.last is not None:
            # torch's writer keeps the last tensor of each name although it has written it: let its memory go.
            self.last.untyped_storage().resize_(0)
        chunk = write_item.tensor_data.chunk
        dtype = write_item.tensor_data.properties.dtype
        sizes = tuple(chunk.sizes)
        name, region = canonical_region(write_item.index.fqn, chunk.offsets, chunk.sizes)
        # Published models keep no loads of routers: they count anew.
        if name.endswith("mlp.router.load"):
            part = torch.zeros(sizes, dtype=dtype)
        else:
            part = self._read_finite(name, region, sizes, dtype)
        # A part may be a view of the mapped file, whose memory is not ours to let go.
        self.last = part if part.untyped_storage().resizable() else part.clone()
        self._report(part.nbytes)
        return self.last

    def _read_finite(
        self, name: str, region: list[slice], sizes: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:
        """Read a region of a parameter in the form of the checkpoint; UserError if a number is not finite."""
        stored = self.source.parameter(name, region)
        part = stored.reshape(sizes).to(dtype).contiguous()
        if not is_finite(part):
            raise UserError(not_finite(f"hf={self.source.folder}", [name]))
        return part

    def _report(self, size: int) -> None:
        before = self.bytes
        self.bytes += size
        if self.bytes // REPORT_BYTES > before // REPORT_BYTES:
            self.say(f"{self.bytes / 2**30:.1f} GiB read")


def _write_manifest(folder: Path, topology: Topology) -> None:
    """Hash the files, each rank its own, as loading a checkpoint checks them."""
    paths = list(folder.glob(f"__{topology.rank}_*"))
    if topology.is_main:
        paths += [
            path
            for path in folder.rglob("*")
            if path.is_file() and not path.name.startswith("__")  # data: each rank's own
        ]
    entries = {str(path.relative_to(folder)): FileEntry.of(path) for path in paths}
    files = gather_by_name(entries)
    if topology.is_main:
        write_manifest(folder, files)
