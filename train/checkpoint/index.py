"""The index of a checkpoint, `.metadata`: the file and the place of every part of every tensor.

torch trusts it: it allocates what the index says, and opens the files that it names. So it is compared with the files before torch
sees it: every part of every tensor is in a file of the folder, within its size, and the parts make up the tensor.
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
from visionloom.train.checkpoint.rectangles import Rectangle, are_apart

INDEX: Final = ".metadata"
LEAST_LIMIT: Final = 1 << 23
SHARE: Final = 8
"""Most bytes of an index: 8 MiB and an eighth of the data. Measured: 0.7% of the tiny model's data, in which names weigh most."""
MOST_BYTES: Final = 1 << 28
"""And never more than 256 MiB: the largest model, with 72,000 parts and their moments, is estimated to take 32."""
MOST_DIMS: Final = 16
"""Most dims of a tensor."""
LARGEST_DIM: Final = 1 << 48
LONGEST_NAME: Final = 1000
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
"""Types of tensors; no other can be in a checkpoint."""
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
"""Classes and functions that an index may name, by module."""

Key = tuple[str, tuple[int, ...] | None]
"""A part: the name of its tensor, and where it begins there; None: an entry that is no tensor."""


class IndexFault(ValueError):
    """Says why an index cannot be used."""


@dataclass(frozen=True)
class Index:
    """The content of an index, in torch's own types."""

    tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata]
    places: dict[MetadataIndex, _StorageInfo]
    files: set[str] = field(default_factory=set)
    """Names of the files with data."""

    def metadata(self) -> Metadata:
        """Return a new object for torch's reader, which writes into it."""
        return Metadata(dict(self.tensors), None, self.places, StorageMeta())


def read_index(folder: Path) -> Index:
    """Read the index of a checkpoint and compare it with the files of its folder.

    Raises:
        IndexFault: if it names anything outside KNOWN, or does not agree with the files or with itself.
        OSError: if it cannot be read.
    """
    sizes = {path.name: path.stat().st_size for path in regular_files(folder)}
    try:
        data = sum(size for name, size in sizes.items() if name != INDEX)
        content = read_located(folder, INDEX, min(LEAST_LIMIT + data // SHARE, MOST_BYTES))
        # A part takes at least a byte of the index, so there are no more parts than bytes.
        return _index(read_pickle(content, KNOWN), sizes, len(content))
    except (pickle.UnpicklingError, PlaceError) as error:
        raise IndexFault(str(error)) from error


def _index(raw: Any, sizes: dict[str, int], most: int) -> Index:
    """Check a pickle's content and return it in torch's types.

    Args:
        raw: the pickle's content.
        sizes: bytes of the folder's files.
        most: parts that there can be.
    """
    state = _state(raw, {f"{METADATA}.Metadata", f"{OLD}.MCoreMetadata"}, "the index")
    named = _of(state.get("state_dict_metadata"), dict, "state_dict_metadata")
    stored = _of(state.get("storage_data"), dict, "storage_data")

    tensors = _tensors(named, most)
    places = _places(stored, sizes)
    check_complete(tensors, places)
    check_apart(places)
    return Index(tensors, places, {info.relative_path for info in places.values()})


def _tensors(
    named: dict[Any, Any], most: int
) -> dict[str, TensorStorageMetadata | BytesStorageMetadata]:
    """Return the tensors and the other entries by name, of at most `most` parts together."""
    tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for name, entry in named.items():
        _require(_is_name(name), "a name of a tensor is no name")
        if isinstance(entry, PickledObject) and entry.name == f"{METADATA}.BytesStorageMetadata":
            tensors[name] = BytesStorageMetadata()
            most -= 1
        else:
            tensors[name] = tensor = _tensor(name, entry, most)
            most -= len(tensor.chunks)
    return tensors


def _places(stored: dict[Any, Any], sizes: dict[str, int]) -> dict[MetadataIndex, _StorageInfo]:
    """Return the places of all parts, each within a file of the folder."""
    places: dict[MetadataIndex, _StorageInfo] = {}
    for key, value in stored.items():
        index = _place_key(key)
        _require(index not in places, f"{index.fqn} is there twice")
        places[index] = _place(index.fqn, value, sizes)
    return places


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST_NAME


def _tensor(name: str, entry: Any, most: int) -> TensorStorageMetadata:
    """Return a tensor of at most `most` parts, which make it up."""
    state = _state(entry, {f"{METADATA}.TensorStorageMetadata"}, name)
    size = _size(state.get("size"), name)
    dtype = _dtype(state.get("properties"), name)
    parts = _of(state.get("chunks"), list, name)
    # Before any part is looked at: the tiles are compared in pairs.
    _require(len(parts) <= most, f"{name} has more parts than the file can hold")
    chunks = [_chunk(part, name, size) for part in parts]
    if math.prod(size):
        Tiles.of(name, chunks).check(size)
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)


def _chunk(raw: Any, name: str, size: torch.Size) -> ChunkStorageMetadata:
    """Return a part of a tensor of this size; IndexFault if it is not within it."""
    state = _state(raw, {f"{METADATA}.ChunkStorageMetadata"}, name)
    offsets = _size(state.get("offsets"), name)
    counts = _size(state.get("sizes"), name)
    within = len(offsets) == len(counts) == len(size)
    if within:
        for begin, count, end in zip(offsets, counts, size, strict=True):
            within = within and begin + count <= end
    _require(within, f"a part of {name} lies outside of it")
    return ChunkStorageMetadata(offsets, counts)


def _dtype(properties: Any, name: str) -> torch.dtype:
    """Return the type in torch's TensorProperties, which pickle themselves as a tuple that begins with it."""
    is_properties = f"{METADATA}.TensorProperties"
    _require(
        isinstance(properties, PickledObject) and properties.name == is_properties,
        f"{name} has no type",
    )
    state = properties.state
    dtype: Any = None
    if isinstance(state, dict):  # older versions of torch
        dtype = state.get("dtype")
    elif isinstance(state, tuple) and state:
        dtype = state[0]
    known = isinstance(dtype, Name) and dtype in TYPES
    _require(known, f"{name} is of a type that no checkpoint has")
    return TYPES[dtype]


def _size(value: Any, name: str) -> torch.Size:
    """Return a size or a place of numbers that a tensor can have."""
    raw: Any = None
    if isinstance(value, PickledObject) and value.name == "torch.Size":
        raw = value.arguments[0] if len(value.arguments) == 1 else None
    fits = isinstance(raw, tuple | list) and len(raw) <= MOST_DIMS
    for number in raw if fits else ():
        # By type: True is an int too.
        fits = fits and type(number) is int and 0 <= number <= LARGEST_DIM
    _require(fits, f"{name} has a size or place that no tensor has")
    return torch.Size(raw)


def _place_key(key: Any) -> MetadataIndex:
    """Return the name and the offset of a part that has a place."""
    state = _state(key, {f"{METADATA}.MetadataIndex"}, "a place")
    name, offset = state.get("fqn"), state.get("offset")
    _require(_is_name(name), "a place is that of no name")
    return MetadataIndex(name, None if offset is None else _size(offset, name))


def _place(name: str, value: Any, sizes: dict[str, int]) -> _StorageInfo:
    """Return a part's place; IndexFault if it is not within a file of the folder."""
    state = _state(value, {f"{FILES}._StorageInfo"}, name)
    path, offset, length = state.get("relative_path"), state.get("offset"), state.get("length")
    _require(
        isinstance(path, str) and path in sizes and path != INDEX,
        f"{name} lies in {str(path)[:80]}, which is no file of the folder",
    )
    are_numbers = type(offset) is int and type(length) is int
    inside = are_numbers and offset >= 0 and length > 0 and offset + length <= sizes[path]
    _require(inside, f"{name} lies outside of {path}")
    # A packed part could be of any size.
    _require(not state.get("transform_descriptors"), f"{name} is packed in a way that is not read")
    return _StorageInfo(path, offset, length)


def check_complete(tensors: dict[str, Any], places: dict[MetadataIndex, _StorageInfo]) -> None:
    """Refuse a part without a place that can hold it, and a place without a part."""
    left: dict[Key, _StorageInfo] = {}
    for index, info in places.items():
        left[index.fqn, None if index.offset is None else tuple(index.offset)] = info
    for name, entry in tensors.items():
        if isinstance(entry, BytesStorageMetadata):
            written = left.pop((name, None), None)
            _require(written is not None, f"{name} was planned but not written")
            continue
        _take_places(name, entry, left)
    for unknown, _ in left:
        raise IndexFault(f"{unknown} has a place and is no part of a tensor")


def _take_places(name: str, tensor: TensorStorageMetadata, left: dict[Key, _StorageInfo]) -> None:
    """Take the places of a tensor's parts out of `left`; IndexFault if one has none that can hold it."""
    for chunk in tensor.chunks:
        offsets = tuple(chunk.offsets)
        where = f"{name} at {offsets}"
        place = left.pop((name, offsets), None)
        if place is None:
            raise IndexFault(f"{where} was planned but not written")
        needed = math.prod(chunk.sizes) * tensor.properties.dtype.itemsize
        _require(place.length >= needed, f"{where} is larger than its place")


def check_apart(places: dict[MetadataIndex, _StorageInfo]) -> None:
    """Refuse entries that share bytes: a small file would stand for large tensors."""
    spans = []
    for index, info in places.items():
        end = info.offset + info.length
        spans.append((info.relative_path, info.offset, end, index.fqn))
    for (path, _, end, name), (next_path, begin, _, next_name) in pairwise(sorted(spans)):
        is_apart = path != next_path or end <= begin
        _require(is_apart, f"{name} and {next_name} lie in the same place of {path}")


@dataclass(frozen=True)
class Tiles:
    """The parts of a tensor that hold numbers."""

    name: str
    """Of the tensor."""
    boxes: list[Rectangle]

    @classmethod
    def of(cls, name: str, chunks: list[ChunkStorageMetadata]) -> "Tiles":
        """Return the tiles among the parts of a tensor: an empty part covers nothing."""
        boxes: list[Rectangle] = []
        for chunk in chunks:
            if math.prod(chunk.sizes):
                boxes.append((tuple(chunk.offsets), tuple(chunk.sizes)))
        return cls(name, boxes)

    def check(self, size: Sequence[int]) -> None:
        """Refuse parts that overlap or leave something of a tensor of this size open."""
        covered = sum(math.prod(sizes) for _, sizes in self.boxes)
        _require(covered == math.prod(size), f"the parts of {self.name} do not make it up")
        try:
            _require(are_apart(self.boxes), f"parts of {self.name} overlap")
        except ValueError as error:
            raise IndexFault(f"{self.name} has {error}") from None


def _state(value: Any, names: set[str], where: str) -> Any:
    """Return the attributes of a record of one of the names."""
    _require(
        isinstance(value, PickledObject) and value.name in names and not value.arguments,
        f"{where[:80]} is of another form",
    )
    return _of(value.state if value.state is not None else {}, dict, where)


def _of(value: Any, kind: type, where: str) -> Any:
    """Return a value of exactly this type; IndexFault for any other."""
    _require(type(value) is kind, f"{where[:80]} is of another form")
    return value


def _require(holds: bool, fault: str) -> None:
    if not holds:
        raise IndexFault(fault)


def entries(index: Index) -> Iterator[tuple[str, TensorStorageMetadata]]:
    """Yield the tensors by name."""
    for name, entry in index.tensors.items():
        if isinstance(entry, TensorStorageMetadata):
            yield name, entry
