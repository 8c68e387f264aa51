"""The index of a checkpoint, `.metadata`: which part of which tensor lies where in which file.

torch trusts it: it allocates what the index says, and opens the files that it names. So it is held against the files before torch
sees it: every part of every tensor lies in a file of the folder, within its size, and the parts make up the tensor.
"""

import math
import pickle
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from visionloom.common.places import PlaceError, read_located, regular_files
from visionloom.train.checkpoint.pickled import Name, PickledObject, read_pickle

INDEX: Final = ".metadata"
LEAST_LIMIT: Final = 1 << 23
SHARE: Final = 8
"""Most bytes of an index: 8 MiB and an eighth of the data. Measured: 0.7% of the tiny model's data, in which names weigh most."""
MOST_BYTES: Final = 1 << 28
"""And never more than 256 MiB: the largest model, with 72,000 parts and their moments, is estimated to take 32."""
MOST_DIMS: Final = 16
LARGEST_DIM: Final = 1 << 48
LONGEST_NAME: Final = 1000
MOST_IRREGULAR: Final = 1000
"""Parts of a tensor that are compared pair by pair where they form no grid."""
TYPES: Final = {
    Name(f"torch.{name}"): getattr(torch, name)
    for name in (
        "float64",
        "float32",
        "float16",
        "bfloat16",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint8",
        "bool",
    )
}
METADATA, FILES, PLANS = (
    f"torch.distributed.checkpoint.{name}" for name in ("metadata", "filesystem", "planner")
)
OLD: Final = "megatron.core.dist_checkpointing.strategies.torch"
KNOWN: Final[dict[str, Collection[str]]] = {
    "torch": {"Size", *(name.removeprefix("torch.") for name in TYPES)},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "PurePosixPath", "Path"},
    "pathlib._local": {"PosixPath"},  # where Python 3.13 has it
    "collections": {"OrderedDict"},
    FILES: {"_StorageInfo", "_StoragePrefix"},
    METADATA: {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    OLD: {"MCoreMetadata", "MCoreSavePlan"},
    PLANS: {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"},
}  # fmt: skip
"""What an index may name."""

Key = tuple[str, tuple[int, ...] | None]
"""An entry: a name, and where the part begins in its tensor; None: it is no tensor."""


class IndexFault(ValueError):
    """An index that cannot be used: the message says why."""


@dataclass(frozen=True)
class Index:
    """What an index says, as torch wants it."""

    tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata]
    places: dict[MetadataIndex, _StorageInfo]
    files: set[str] = field(default_factory=set)
    """Names of the files with data."""

    def metadata(self) -> Metadata:
        """A new object for torch's reader, which writes into it."""
        return Metadata(dict(self.tensors), None, self.places, StorageMeta())


def read_index(folder: Path) -> Index:
    """The index of a checkpoint, held against the files of its folder.

    Raises:
        IndexFault: if it names what it may not, or does not agree with the files or with itself.
        OSError: if it cannot be read.
    """
    sizes = {path.name: path.stat().st_size for path in regular_files(folder)}
    try:
        data = sum(size for name, size in sizes.items() if name != INDEX)
        content = read_located(folder, INDEX, min(LEAST_LIMIT + data // SHARE, MOST_BYTES))
        return _index(read_pickle(content, KNOWN), sizes, len(content))
    except (pickle.UnpicklingError, PlaceError) as error:
        raise IndexFault(str(error)) from error


def _index(raw: Any, sizes: dict[str, int], most: int) -> Index:
    """Args: the pickle's content, the files' sizes, and the most parts that there can be."""
    state = _state(raw, {f"{METADATA}.Metadata", f"{OLD}.MCoreMetadata"}, "the index")
    named, stored = (
        _of(state.get(key), dict, key) for key in ("state_dict_metadata", "storage_data")
    )
    tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for name, entry in named.items():
        _require(
            isinstance(name, str) and len(name) <= LONGEST_NAME, "a name of a tensor is no name"
        )
        if isinstance(entry, PickledObject) and entry.name == f"{METADATA}.BytesStorageMetadata":
            tensors[name] = BytesStorageMetadata()
            most -= 1
        else:
            tensors[name] = tensor = _tensor(name, entry, most)
            most -= len(tensor.chunks)
    places = {}
    for key, value in stored.items():
        index = _place_key(key)
        _require(index not in places, f"{index.fqn} is there twice")
        places[index] = _place(index.fqn, value, sizes)
    _check_complete(tensors, places)
    _check_apart(places)
    return Index(tensors, places, {info.relative_path for info in places.values()})


def _tensor(name: str, entry: Any, most: int) -> TensorStorageMetadata:
    state = _state(entry, {f"{METADATA}.TensorStorageMetadata"}, name)
    size, dtype = _size(state.get("size"), name), _dtype(state.get("properties"), name)
    raw = _of(state.get("chunks"), list, name)
    _require(len(raw) <= most, f"{name} has more parts than the file can hold")
    chunks = []
    for each in raw:
        part = _state(each, {f"{METADATA}.ChunkStorageMetadata"}, name)
        chunk = ChunkStorageMetadata(
            _size(part.get("offsets"), name), _size(part.get("sizes"), name)
        )
        within = len(chunk.offsets) == len(chunk.sizes) == len(size) and all(
            begin + count <= end
            for begin, count, end in zip(chunk.offsets, chunk.sizes, size, strict=True)
        )
        _require(within, f"a part of {name} lies outside of it")
        chunks.append(chunk)
    _check_tiles(name, size, chunks)
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)


def _dtype(properties: Any, name: str) -> torch.dtype:
    """Of torch's TensorProperties, which pickle themselves as a tuple that begins with the type."""
    _require(
        isinstance(properties, PickledObject) and properties.name == f"{METADATA}.TensorProperties",
        f"{name} has no type",
    )
    state = properties.state
    found: Any = (
        state.get("dtype")
        if isinstance(state, dict)
        else state[0]
        if isinstance(state, tuple) and state
        else None
    )
    _require(
        isinstance(found, Name) and found in TYPES, f"{name} is of a type that no checkpoint has"
    )
    return TYPES[found]


def _size(value: Any, name: str) -> torch.Size:
    raw: Any = (
        value.arguments[0]
        if isinstance(value, PickledObject)
        and value.name == "torch.Size"
        and len(value.arguments) == 1
        else None
    )
    fits = (
        isinstance(raw, tuple | list)
        and len(raw) <= MOST_DIMS
        and all(type(number) is int and 0 <= number <= LARGEST_DIM for number in raw)
    )
    _require(fits, f"{name} has a size or place that no tensor has")
    return torch.Size(raw)


def _place_key(key: Any) -> MetadataIndex:
    state = _state(key, {f"{METADATA}.MetadataIndex"}, "a place")
    name, offset = state.get("fqn"), state.get("offset")
    _require(isinstance(name, str) and len(name) <= LONGEST_NAME, "a place is that of no name")
    return MetadataIndex(name, None if offset is None else _size(offset, name))


def _place(name: str, value: Any, sizes: dict[str, int]) -> _StorageInfo:
    state = _state(value, {f"{FILES}._StorageInfo"}, name)
    path, offset, length = (state.get(key) for key in ("relative_path", "offset", "length"))
    _require(
        isinstance(path, str) and path in sizes and path != INDEX,
        f"{name} lies in {str(path)[:80]}, which is no file of the folder",
    )
    inside = (
        type(offset) is int
        and type(length) is int
        and offset >= 0
        and length > 0
        and offset + length <= sizes[path]
    )
    _require(inside, f"{name} lies outside of {path}")
    _require(not state.get("transform_descriptors"), f"{name} is packed in a way that is not read")
    return _StorageInfo(path, offset, length)


def _check_complete(tensors: dict[str, Any], places: dict[MetadataIndex, _StorageInfo]) -> None:
    """Every part of every tensor has a place that can hold it, and there are no other places."""
    left = {_key(index): info for index, info in places.items()}
    for name, entry in tensors.items():
        if isinstance(entry, BytesStorageMetadata):
            _require(
                left.pop((name, None), None) is not None, f"{name} was planned but not written"
            )
            continue
        for chunk in entry.chunks:
            info = left.pop((name, tuple(chunk.offsets)), None)
            _require(
                info is not None, f"{name} at {tuple(chunk.offsets)} was planned but not written"
            )
            needed = math.prod(chunk.sizes) * entry.properties.dtype.itemsize
            _require(
                info is not None and info.length >= needed,
                f"{name} at {tuple(chunk.offsets)} is larger than its place",
            )
    _require(not left, f"{next(iter(left), ('', None))[0]} has a place and is no part of a tensor")


def _key(index: MetadataIndex) -> Key:
    return index.fqn, None if index.offset is None else tuple(index.offset)


def _check_apart(places: dict[MetadataIndex, _StorageInfo]) -> None:
    """No two entries share bytes: a small file would stand for large tensors."""
    spans = sorted(
        (info.relative_path, info.offset, info.offset + info.length, index.fqn)
        for index, info in places.items()
    )
    for one, other in pairwise(spans):
        _require(
            one[0] != other[0] or one[2] <= other[1],
            f"{one[3]} and {other[3]} lie in the same place of {one[0]}",
        )


def _check_tiles(name: str, size: Sequence[int], chunks: list[ChunkStorageMetadata]) -> None:
    """The parts make up the tensor: none overlaps another, and nothing is left open."""
    if not math.prod(size):
        return
    boxes = [
        (tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in chunks if math.prod(chunk.sizes)
    ]
    _require(
        sum(math.prod(sizes) for _, sizes in boxes) == math.prod(size),
        f"the parts of {name} do not make it up",
    )
    _require(len({offsets for offsets, _ in boxes}) == len(boxes), f"parts of {name} overlap")
    if not all(_is_cut(boxes, dim) for dim in range(len(size))):
        _require(
            len(boxes) <= MOST_IRREGULAR,
            f"{name} has more than {MOST_IRREGULAR} parts that form no grid",
        )
        apart = all(
            not _overlap(*one, *other) for at, one in enumerate(boxes) for other in boxes[:at]
        )
        _require(apart, f"parts of {name} overlap")


def _is_cut(boxes: list[Any], dim: int) -> bool:
    """Whether all parts are cut at the same places of a dim, so that those that differ there are apart."""
    spans = sorted({(offsets[dim], offsets[dim] + sizes[dim]) for offsets, sizes in boxes})
    return all(one[1] <= other[0] for one, other in pairwise(spans))


def _overlap(
    at: Sequence[int], sizes: Sequence[int], other_at: Sequence[int], other_sizes: Sequence[int]
) -> bool:
    return all(
        a < d + e and d < a + b for a, b, d, e in zip(at, sizes, other_at, other_sizes, strict=True)
    )


def _state(value: Any, names: set[str], where: str) -> Any:
    """The attributes of a record of one of the names."""
    _require(
        isinstance(value, PickledObject) and value.name in names and not value.arguments,
        f"{where[:80]} is of another form",
    )
    return _of(value.state if value.state is not None else {}, dict, where)


def _of(value: Any, kind: type, where: str) -> Any:
    _require(type(value) is kind, f"{where[:80]} is of another form")
    return value


def _require(holds: bool, fault: str) -> None:
    if not holds:
        raise IndexFault(fault)


def entries(index: Index) -> Iterator[tuple[str, TensorStorageMetadata]]:
    """The tensors by name."""
    for name, entry in index.tensors.items():
        if isinstance(entry, TensorStorageMetadata):
            yield name, entry
