"""Writing shards: samples with their media become WebDataset tar files, cut by bytes and by samples, each indexed.

Sources for converters are written in parts by several processes: see `visionloom.data.shards.write_parts`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Final, Protocol

from visionloom.common.atomic import replacing
from visionloom.common.errors import UserError
from visionloom.data.shards.index import KEY, index_shard
from visionloom.data.shards.manifest import MANIFEST, ShardInfo, write_manifest
from visionloom.data.shards.sample import Sample, SampleError
from visionloom.data.shards.sample_json import parse_sample, to_json
from visionloom.data.shards.tar import LARGEST_MEMBER

SAMPLES_PER_SHARD: Final = 10_000
SHARD_BYTES: Final = 1 << 30
_BLOCK: Final = 512
_LONG_NAME: Final = 100
"""A longer member name costs two more blocks in the tar."""
_END: Final = 10_240
"""Bytes of zeros at the end of a tar, at most."""

SampleMembers = tuple[tuple[str, bytes], ...]
"""Names and bytes of a sample's members, JSON first."""
Pair = tuple[Sample | Mapping[str, Any], Mapping[str, bytes]]
"""A sample, or its JSON object, and its media members by name."""


@dataclass(frozen=True, slots=True)
class ShardLimits:
    """Most samples and bytes of a shard; a sample larger than `bytes` has a shard of its own."""

    samples: int = SAMPLES_PER_SHARD
    bytes: int = SHARD_BYTES


class _Tar(Protocol):
    """The one method of webdataset.TarWriter that is used."""

    def write(self, members: dict[str, Any]) -> int: ...


def write_shards(
    folder: str | Path,
    name: str,
    samples: Iterable[Pair],
    samples_per_shard: int = SAMPLES_PER_SHARD,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write samples with their media members as indexed shards, then dataset.json.

    The bytes depend on the samples only. Each file appears complete or not at all. Keys are running numbers. Raises
    SampleError if a sample breaks the schema or its media differ from its refs, UserError if the folder already holds
    a dataset, `name` breaks the key rule, or there are no samples.
    """
    folder = Path(folder)
    check_target(folder, name)
    folder.mkdir(parents=True, exist_ok=True)

    def ready() -> Iterator[SampleMembers]:
        for number, (sample, media) in enumerate(samples):
            yield members_of(sample, media, f"number {number}")

    limits = ShardLimits(samples_per_shard, shard_bytes)
    path = partial(shard_path, folder, name)
    shards = list(cut_shards(ready(), path, lambda row: f"{row:09d}", limits))
    # dataset.json is written last, and not for nothing.
    if not shards:
        raise UserError(f"{folder}: no samples to write")
    write_manifest(folder, shards)


def check_target(folder: Path, name: str) -> None:
    """Raise UserError if a dataset of this name cannot be written into this folder."""
    if KEY.fullmatch(name) is None or name.startswith("-"):
        rule = "letters, digits, _ and - only, at most 80, and no - at its beginning"
        raise UserError(f"dataset name {name!r}: {rule}")
    if (folder / MANIFEST).exists():
        raise UserError(f"{folder} already holds a dataset: remove it or choose another folder")


def shard_path(folder: Path, name: str, shard: int) -> Path:
    """Return the path of shard number `shard` of a dataset."""
    return folder / f"{name}-{shard:06d}.tar"


def members_of(
    raw: Sample | Mapping[str, Any], media: Mapping[str, bytes], origin: str = ""
) -> SampleMembers:
    """Return the members of a sample, JSON first, checked, so that a reader never fails for their contents.

    Raises SampleError if the sample breaks the schema, its media differ from its refs, or JSON in UTF-8 cannot hold it: half of
    a surrogate pair, a number that is none, more bytes than a member may have.
    """
    sample = raw if isinstance(raw, Sample) else parse_sample(raw, origin)
    _check_refs(sample, media)
    document = _encode(sample)
    if len(document) > LARGEST_MEMBER:
        problem = f"its JSON has {len(document)} bytes, at most {LARGEST_MEMBER}"
        raise SampleError(sample.id, "", problem)
    return ("json", document), *((ref, media[ref]) for ref in sample.refs)


def _encode(sample: Sample) -> bytes:
    """Return the sample's JSON in UTF-8; raises SampleError for what that cannot hold."""
    try:
        return to_json(sample).encode()
    except UnicodeEncodeError as error:
        # The id itself may be what cannot be printed.
        sample_id = sample.id.encode(errors="backslashreplace").decode()
        problem = f"no valid Unicode: {error.object[error.start : error.end]!r}"
        raise SampleError(sample_id, "", problem) from None
    except ValueError as error:
        raise SampleError(sample.id, "", f"a number that JSON cannot hold: {error}") from None


def tar_writer(file: Any) -> Any:
    """Return a webdataset.TarWriter into an open file, whose bytes follow from the members alone."""
    # It imports torch, which takes seconds; readers do without it.
    from webdataset import TarWriter

    # Nothing in a header depends on who writes, or when.
    plain = {"user": "", "group": "", "mode": 0o644, "mtime": 0}
    return TarWriter(file, encoder=False, compress=False, **plain)


def cut_shards(
    samples: Iterable[SampleMembers],
    path: Callable[[int], Path],
    key: Callable[[int], str],
    limits: ShardLimits,
) -> Iterator[ShardInfo]:
    """Write samples one after another, each into the open shard while that has room; yield each finished shard.

    `path` gives the file of a shard by its number, `key` the key of a sample by its place in `samples`. One sample is in
    memory at a time. Indexing reads each shard back and so checks every sample again.
    """
    stream = enumerate(samples)
    waiting = next(stream, None)
    for shard in count():
        if waiting is None:
            return
        room = _Room(limits)
        with replacing(path(shard)) as file, tar_writer(file) as tar:
            while waiting is not None:
                row, members = waiting
                if not room.takes(key(row), members):
                    break
                _put(tar, key(row), members)
                waiting = next(stream, None)
        # Read back from the disk: what was written is what is checked.
        yield index_shard(path(shard))


def _check_refs(sample: Sample, names: Iterable[str]) -> None:
    """Raise SampleError unless the names of the media are the sample's refs."""
    refs, given = set(sample.refs), set(names)
    missing, unused = sorted(refs - given), sorted(given - refs)
    if missing:
        raise SampleError(sample.id, "", f"media member {missing[0]!r} is missing")
    if unused:
        problem = f"media member {unused[0]!r} is not referred to by any element"
        raise SampleError(sample.id, "", problem)


class _Room:
    """The samples and bytes that a shard still has room for."""

    def __init__(self, limits: ShardLimits) -> None:
        self.empty, self.samples, self.bytes = True, limits.samples, limits.bytes - _END

    def takes(self, key: str, members: SampleMembers) -> bool:
        """Count the sample and return whether it still fits into the shard; the first one always does."""
        # Counted before it is known to fit: a sample that does not fit ends the shard anyway.
        self.samples -= 1
        for name, data in members:
            headers = 3 if len(f"{key}.{name}") > _LONG_NAME else 1
            # Data fill whole blocks.
            self.bytes -= _BLOCK * (headers + -(-len(data) // _BLOCK))
        fits = self.empty or (self.samples >= 0 and self.bytes >= 0)
        self.empty = False
        return fits


def _put(tar: _Tar, key: str, members: SampleMembers) -> None:
    for name, data in members:
        # One call for each member keeps the JSON first: TarWriter sorts the members of a call by name.
        tar.write({"__key__": key, name: data})
