"""Parameters in a checkpoint folder one by one, without building the model: their names there, and reading them.

A checkpoint stacks the same parameter of all layers into one tensor with the layer as its first dim, and calls the norms before
attention and MLP as TransformerEngine does; Megatron-core decides both.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from visionloom.common.errors import UserError
from visionloom.model.sharding import LAYERS
from visionloom.model.trainable import is_adapter
from visionloom.train.checkpoint.index import IndexFault, entries, read_index
from visionloom.train.checkpoint.untrusted import harmless_reading

NORMS: Final = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


def stored_name(name: str) -> tuple[str, int | None]:
    """Return a parameter's tensor in a checkpoint and its place along the first dim; None if it is the whole tensor."""
    # Adapters may be in some layers only: theirs are not stacked.
    if not name.startswith(LAYERS) or is_adapter(name):
        return name, None
    layer, _, rest = name.removeprefix(LAYERS).partition(".")
    return f"{LAYERS}{NORMS.get(rest, rest)}", int(layer)


def canonical_region(
    key: str, offsets: Sequence[int], sizes: Sequence[int]
) -> tuple[str, list[slice]]:
    """Return the parameter, and the region of it, that a part of a checkpoint's tensor is.

    The inverse of `stored_name`.
    """
    region = [slice(begin, begin + size) for begin, size in zip(offsets, sizes, strict=True)]
    if not key.startswith(LAYERS):
        return key, region
    rest = key.removeprefix(LAYERS)
    for ours, theirs in NORMS.items():
        if rest == theirs:
            rest = ours
    return f"{LAYERS}{offsets[0]}.{rest}", region[1:]


class StoredWeights:
    """The parameters of a checkpoint folder; nothing in its files can run code."""

    def __init__(self, folder: Path) -> None:
        """Read the index; UserError if there is none or it cannot be trusted."""
        self.folder = folder
        self.reader = FileSystemReader(folder)
        try:
            index = read_index(folder)
        except OSError as error:
            raise UserError(
                f"{folder} has no readable .metadata ({error.strerror}): name a whole checkpoint"
            ) from None
        except IndexFault as error:
            raise UserError(
                f"{folder} is not read: {error}: take a checkpoint from a source that you trust"
            ) from None
        self.reader.set_up_storage_reader(index.metadata(), is_coordinator=False)
        self.tensors: dict[str, TensorStorageMetadata] = dict(entries(index))

    def entry(self, name: str) -> tuple[tuple[int, ...], torch.dtype] | None:
        """Return shape and type of a parameter by its canonical name; None if it is missing."""
        key, layer = stored_name(name)
        stored = self.tensors.get(key)
        if stored is None:
            return None
        dtype = stored.properties.dtype
        if layer is None:
            return tuple(stored.size), dtype
        layers, *shape = stored.size
        return (tuple(shape), dtype) if layer < layers else None

    def parameter(self, name: str) -> Tensor:
        """Read a full parameter by its canonical name from the parts that cover it."""
        key, layer = stored_name(name)
        entry = self.tensors[key]
        offsets = [0] * len(entry.size)
        sizes = list(entry.size)
        if layer is not None:
            offsets[0], sizes[0] = layer, 1
        # One layer of the stacked tensor: torch reads only the parts that overlap it.
        whole = torch.empty(sizes, dtype=entry.properties.dtype)
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        plan = LoadPlan(create_read_items_for_chunk_list(key, entry, [chunk]))
        with harmless_reading(self.folder):
            self.reader.read_data(plan, _Target(whole))
        return whole if layer is None else whole[0]


class _Target(LoadPlanner):
    """Reads into one tensor, through torch's interface of a planner."""

    def __init__(self, whole: Tensor) -> None:
        self.whole = whole

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        return narrow_tensor_by_index(self.whole, read_item.dest_offsets, read_item.lengths)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Do nothing: it was written in place."""

    def set_up_planner(
        self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False
    ) -> None:
        """Do nothing: torch's interface has it, the reader does not call it."""

    def create_local_plan(self) -> LoadPlan:
        raise NotImplementedError

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        raise NotImplementedError

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        raise NotImplementedError

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise NotImplementedError
